"""A notebook for first steps, and the page of the documentation that shows it with its outputs: see `__main__`."""
