"""Snapshots that restore the state user code changes, and the mode in which second derivatives are exact."""
