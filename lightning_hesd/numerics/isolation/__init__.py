"""What running the user's code has changed, put back; and the modes in which second derivatives are exact."""
