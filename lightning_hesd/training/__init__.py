"""The callbacks, and what they need of Lightning: samples, losses, records of a run, checkpoints, loggers."""
