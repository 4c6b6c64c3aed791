"""The command line: a module for each command, the analysis of checkpoints, its results, and the cost model."""
