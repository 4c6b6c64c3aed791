"""The samples of an analysis: read from the user's dataloaders without taking samples away from training."""
