"""Remarks on the latest record: that the criteria do not apply, and why; that λ_max has lost its meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_hesd.spectra.criteria import quasi_singular
from lightning_hesd.spectra.selection import loss_tolerance
from lightning_hesd.training.compat import messages
from lightning_hesd.training.gradient_monitor import likely_causes
from lightning_hesd.training.history import START_EPOCH

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_hesd.training.gradient_monitor import GradientStatistics
    from lightning_hesd.training.history import SpectrumHistory


class Remarks:
    """Remarks on the history of a run, each made once."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._made: set[str] = set()

    def restart(self) -> None:
        """Begin a run, in which every remark may be made again."""
        self._made = set()

    def remark(
        self, trainer: pl.Trainer, history: SpectrumHistory, gradients: GradientStatistics | None, *, monitored: bool
    ) -> None:
        """Make the remarks that the last record gives reason for, with the gradient statistics of its epoch, if any."""
        record = history[-1]
        if record.spectrum is None or record.epoch == START_EPOCH:
            return
        if record.spectrum.hesd_type == "MN" and record.spectrum.type_certain:
            causes = likely_causes(trainer, gradients)
            if not causes:
                causes = ["none was found" if monitored else "unknown; `monitor_gradients=True` looks for one"]
            self._say(
                "MN",
                f"the spectrum of epoch {record.epoch} is MN (C_t = {record.spectrum.c_t:.3g}), so the criteria of "
                f"generalization do not apply. Likely cause: {'; '.join(causes)}. An untrained network is MN, too.",
            )
        states = [r.spectrum for r in history if r.spectrum is not None]
        if quasi_singular([s.lambda_max for s in states], [s.loss for s in states], tolerance=loss_tolerance(history)):
            self._say(
                "QS",
                f"the spectrum of epoch {record.epoch} is quasi-singular: the largest eigenvalue fell to "
                f"{record.spectrum.lambda_max:.3g} while the loss hardly changed. Largest eigenvalue and trace no "
                "longer mean flatness; prefer C_t, also to pick checkpoints.",
            )

    def _say(self, key: str, message: str) -> None:
        if key not in self._made:
            self._made.add(key)
            messages.inform(f"{self._name}: {message}")
