"""`HessianCheckpoint`, its ranking, and its files."""
