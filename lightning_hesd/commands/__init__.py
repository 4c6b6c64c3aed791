"""The command line: analyses of checkpoints that exist, their results, and the report."""
