"""Remarks on the latest record: that the criteria do not apply, and why; that λ_max has lost its meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_hesd.spectra.criteria import quasi_singular
from lightning_hesd.spectra.selection import loss_tolerance
from lightning_hesd.training.gradient_monitor import likely_causes
from lightning_hesd.training.history import START_EPOCH

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_hesd.training.gradient_monitor import GradientStatistics
    from lightning_hesd.training.history import SpectrumHistory


def remarks(
    trainer: pl.Trainer, history: SpectrumHistory, gradients: GradientStatistics | None, *, monitored: bool
) -> dict[str, str]:
    """Return the remarks that the last record gives reason for, by kind: "MN", "QS".

    `gradients` are the gradient statistics of its epoch, if any.
    """
    found: dict[str, str] = {}
    record = history[-1]
    if record.spectrum is None or record.epoch == START_EPOCH:
        return found
    if record.spectrum.hesd_type == "MN" and record.spectrum.type_certain:
        causes = likely_causes(trainer, gradients)
        if not causes:
            causes = ["none was found" if monitored else "unknown; `monitor_gradients=True` looks for one"]
        found["MN"] = (
            f"the spectrum of epoch {record.epoch} is MN (C_t = {record.spectrum.c_t:.3g}), so the criteria of "
            f"generalization do not apply. Likely cause: {'; '.join(causes)}. An untrained network is MN, too."
        )
    states = [r.spectrum for r in history if r.spectrum is not None]
    if quasi_singular([s.lambda_max for s in states], [s.loss for s in states], tolerance=loss_tolerance(history)):
        found["QS"] = (
            f"the spectrum of epoch {record.epoch} is quasi-singular: the largest eigenvalue fell to "
            f"{record.spectrum.lambda_max:.3g} while the loss hardly changed. Largest eigenvalue and trace no longer "
            "mean flatness; prefer C_t, also to pick checkpoints."
        )
    return found
