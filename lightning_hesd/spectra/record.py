"""`SpectrumRecord`: one analysis of a run. Everything that shows, tells or selects analyses reads this."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lightning_hesd.spectra.assessment import assess_generalization

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_hesd.spectra.assessment import Assessment
    from lightning_hesd.spectra.spectrum import Spectrum

SUFFIXES = {
    "spectrum": "",
    "generalization": "_gen",
    "preconditioned": "_pre",
    "ggn": "_ggn",
    "residual": "_residual",
}
"""What distinguishes the spectra of a record in the names of files and metrics."""

PLAIN_FIELDS = ("epoch", "global_step", "error", "stability_threshold")
"""The fields of a record that are plain values."""

LAYERS_SUFFIX = "_layers"

START_EPOCH = -1
"""Epoch of the record made before the first optimizer step."""


@dataclass(frozen=True)
class SpectrumRecord:
    """One analysis of a run.

    Attributes:
        epoch: Epoch it was made in, as `trainer.current_epoch`; -1 before the first step.
        global_step: Optimizer steps taken by then.
        spectrum: The spectrum on the training data; None if the analysis failed.
        error: What failed, and why; None if nothing did.
        generalization: The spectrum on the generalization data; None where none is analysed.
        layers: The spectra of single layers, by name; None where none are analysed.
        preconditioned: The preconditioned spectrum on the training data; None where it is not analysed.
        stability_threshold: Up to which largest eigenvalue of that the optimizer's steps are stable; None: unknown.
        ggn: The spectrum of the Gauss-Newton matrix; None where it is not analysed.
        residual: The spectrum of the rest of the Hessian; None where it is not analysed.
    """

    epoch: int
    global_step: int
    spectrum: Spectrum | None
    error: str | None = None
    generalization: Spectrum | None = None
    layers: Mapping[str, Spectrum] | None = None
    preconditioned: Spectrum | None = None
    stability_threshold: float | None = None
    ggn: Spectrum | None = None
    residual: Spectrum | None = None

    @property
    def spectra(self) -> dict[str, Spectrum]:
        """The spectra there are, by what distinguishes them in the names of files and metrics: see `SUFFIXES`."""
        every = {suffix: getattr(self, field) for field, suffix in SUFFIXES.items()}
        return {suffix: spectrum for suffix, spectrum in every.items() if spectrum is not None}

    @property
    def stability_ratio(self) -> float | None:
        """Largest preconditioned eigenvalue over the optimizer's threshold: 1 is the edge of stability."""
        if self.preconditioned is None or self.stability_threshold is None:
            return None
        return self.preconditioned.lambda_max / self.stability_threshold

    @cached_property
    def assessment(self) -> Assessment | None:
        """What the two spectra say about generalization; None where there are no two."""
        if self.spectrum is None or self.generalization is None:
            return None
        return assess_generalization(self.spectrum, self.generalization)

    def file_name(self, suffix: str = "") -> str:
        """Return the name of a spectrum's file in the history's folder."""
        return f"epoch={self.epoch}-step={self.global_step}{suffix}.npz"


def when(epoch: int) -> str:
    """Return in words when the record of an epoch was made."""
    return "before the first step" if epoch == START_EPOCH else f"of epoch {epoch}"
