"""The training around an analysis stays as it was."""
