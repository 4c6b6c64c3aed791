"""The samples of an analysis, drawn from the user's dataloaders without taking anything from training."""
