"""Warnings and information, from rank zero only."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn


def warn(message: str) -> None:
    """Warn, on rank zero only."""
    rank_zero_warn(f"lightning_hesd: {message}", category=RuntimeWarning)


def inform(message: str) -> None:
    """Inform, on rank zero only."""
    rank_zero_info(message)
