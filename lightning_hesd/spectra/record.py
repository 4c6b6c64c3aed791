"""`SpectrumRecord`: the result of one analysis of a run, for logs, figures, tables and checkpoint rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from lightning_hesd.spectra.assessment import assess_generalization
from lightning_hesd.spectra.indicators import indicators_of_network, layer_indicators
from lightning_hesd.spectra.spectrum import plotting
from lightning_hesd.spectra.validation import first_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_hesd.spectra.assessment import Assessment
    from lightning_hesd.spectra.indicators import LayerIndicators
    from lightning_hesd.spectra.spectrum import Spectrum

SUFFIXES = {
    "spectrum": "",
    "generalization": "_gen",
    "preconditioned": "_pre",
    "ggn": "_ggn",
    "residual": "_residual",
}
"""Suffixes of the spectra of a record in names of files and metrics, by field."""

RECORDED_BY = {
    **dict.fromkeys(("generalization", "assessment"), "generalization_dataloader"),
    "preconditioned": "preconditioner",
    **dict.fromkeys(("stability_threshold", "stability_ratio"), "preconditioner='optimizer'"),
    **dict.fromkeys(("ggn", "residual"), "decompose=True"),
    "layers": "layers",
    "gradients": "monitor_gradients=True",
}
"""The option of HessianSpectrumCallback that records a field or property; others are recorded always."""

PLAIN_FIELDS = ("epoch", "global_step", "error", "stability_threshold", "metrics", "first_loss", "gradients")
"""The fields of a record that are plain values."""

LAYERS_SUFFIX = "_layers"
"""Follows the number of a record in the names of the files of its layers."""

VALIDATION_LOSSES = tuple(f"{prefix}{mark}loss" for prefix in ("val", "valid", "validation", "dev") for mark in "_/")
"""Keys under which the loss on validation data is logged, the usual ones."""

UNTRAINED_DROP = 0.1
"""Share of the loss at the first analysis by which that of trained weights is lower, at least."""

START_EPOCH = -1
"""Epoch of the record made before the first optimizer step."""


@dataclass(frozen=True)
class SpectrumRecord:
    """One analysis of a run.

    Attributes:
        epoch: Epoch of the analysis, as `trainer.current_epoch`; -1 before the first step.
        global_step: Optimizer steps taken by then.
        spectrum: Spectrum on the training data; None if the analysis failed.
        error: Message of a failure; None if nothing failed.
        generalization: Spectrum on the generalization data; None if these are not analyzed.
        layers: Spectra of single layers, by name; None if layers are not analyzed.
        preconditioned: Spectrum of the preconditioned Hessian on the training data; None if it is not analyzed.
        stability_threshold: Largest preconditioned eigenvalue at which the optimizer's steps are stable; None: unknown.
        ggn: Spectrum of the GGN; None if it is not analyzed.
        residual: Spectrum of the residual H − GGN; None if it is not analyzed.
        metrics: Logged metrics of the analyzed weights, by key, without those of the callback: the values logged in the
            last batch, as means over the epoch that ended with it, or in validation right after it. Values of older
            weights are left out, and so are those that are not finite.
        first_loss: Mean loss at the first analysis of the run; None: unknown.
        gradients: What became of the gradients between backward pass and optimizer in this epoch, the fields of
            `GradientStatistics` by name; empty without `monitor_gradients=True`.
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
    metrics: Mapping[str, float] = field(default_factory=dict)
    first_loss: float | None = None
    gradients: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return the time and the main results in one line."""
        found = self.spectrum if self.error is None else f"failed: {first_line(self.error)}"
        return f"<SpectrumRecord {when(self.epoch)}, step {self.global_step}: {found}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the results of the analysis, with a figure of the density."""
        found: str = plotting().record_html(self)
        return found

    @property
    def spectra(self) -> dict[str, Spectrum]:
        """The spectra of the record, by suffix: see `SUFFIXES`."""
        every = {suffix: getattr(self, field) for field, suffix in SUFFIXES.items()}
        return {suffix: spectrum for suffix, spectrum in every.items() if spectrum is not None}

    @property
    def stability_ratio(self) -> float | None:
        """Largest preconditioned eigenvalue over the optimizer's threshold: 1 is the edge of stability."""
        if self.preconditioned is None or self.stability_threshold is None:
            return None
        return self.preconditioned.lambda_max / self.stability_threshold

    @property
    def validation_loss(self) -> float | None:
        """The logged loss on validation data, by the usual keys; None if it was not logged for the analyzed weights."""
        return next((self.metrics[key] for key in VALIDATION_LOSSES if key in self.metrics), None)

    @property
    def squared_weight_norm(self) -> float | None:
        """Squared Euclidean norm of the analyzed weights; None if it is unknown."""
        return None if self.spectrum is None else self.spectrum.squared_weight_norm

    @cached_property
    def layer_indicators(self) -> dict[str, LayerIndicators]:
        """Indicators by name of layer: from `layers`, or else from the spectrum of the network."""
        by_layer = {} if self.spectrum is None else self.spectrum.by_layer
        return layer_indicators(self.layers, by_layer) if self.layers else indicators_of_network(by_layer)

    @cached_property
    def assessment(self) -> Assessment | None:
        """The paper's criteria for generalization, with no verdict on untrained weights; None if a spectrum is missing.

        Untrained are those before the first step, and those whose loss is less than a tenth below that of the first
        analysis of the run.
        """
        if self.spectrum is None or self.generalization is None:
            return None
        found = assess_generalization(self.spectrum, self.generalization)
        if self.epoch == START_EPOCH:
            return found.of_untrained_weights("the weights are those before the first step")
        loss, first = self.spectrum.loss, self.first_loss
        if first is not None and first - loss < UNTRAINED_DROP * abs(first):
            return found.of_untrained_weights(f"the loss, {loss:.3g}, is near that of the first analysis, {first:.3g}")
        return found

    def file_name(self, suffix: str = "") -> str:
        """Return the name of the file of a spectrum in the folder of the history."""
        return f"epoch={self.epoch}-step={self.global_step}{suffix}.npz"


def when(epoch: int) -> str:
    """Return the time of a record in words."""
    return "before the first step" if epoch == START_EPOCH else f"of epoch {epoch}"
