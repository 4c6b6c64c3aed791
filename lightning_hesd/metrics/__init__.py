"""The criteria as torchmetrics, and as functions on tensors."""

from lightning_hesd.metrics.criteria import GeneralizationCriteria, HessianCriteria

__all__ = ["GeneralizationCriteria", "HessianCriteria"]
