"""The command line: a module for each command, the models and data of checkpoints, and the folder of results."""
