"""HessianCheckpoint, and the files it writes."""
