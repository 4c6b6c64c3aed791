"""The criteria as torchmetrics, which accumulate probes over updates and ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_hesd.metrics.functional import generalization_criteria, hessian_criteria
from lightning_hesd.numerics.devices import to_device
from lightning_hesd.spectra.spectrum import Spectrum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_STATES = ("nodes", "weights", "steps", "rounding")


class _SpectrumMetric(Metric):
    """Accumulates probes of one or more named spectra."""

    spectra: tuple[str, ...]
    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in self.spectra:
            for state in _STATES:
                self.add_state(f"{name}_{state}", default=[], dist_reduce_fx="cat")

    def _append(self, name: str, spectrum: Spectrum | tuple[Tensor, Tensor]) -> None:
        """Add the probes of a spectrum: as flat tensors with lengths, because lengths may differ between ranks."""
        if isinstance(spectrum, Spectrum):
            nodes, weights, rounding = map(torch.tensor, (spectrum.nodes, spectrum.weights, [spectrum.rounding]))
        else:
            hessian_criteria(*spectrum)  # checks the shapes
            nodes, weights = (part.detach().reshape(-1, part.shape[-1]) for part in spectrum)
            rounding = nodes.new_zeros(1)
        present = ~nodes.isnan()
        found = {"nodes": nodes[present], "weights": weights[present], "steps": present.sum(1), "rounding": rounding}
        for state, value in found.items():
            getattr(self, f"{name}_{state}").append(to_device(value, self.device))

    def _criteria(self, name: str) -> dict[str, Tensor]:
        """Return the criteria of all probes together."""
        nodes, weights, steps, rounding = (dim_zero_cat(getattr(self, f"{name}_{state}")) for state in _STATES)
        padded_nodes, padded_weights = (
            pad_sequence(list(torch.split(flat, steps.tolist())), batch_first=True, padding_value=padding)
            for flat, padding in ((nodes, torch.nan), (weights, 0.0))
        )
        return hessian_criteria(padded_nodes, padded_weights, float(rounding.max()))

    def plot(
        self, val: dict[str, Tensor] | Sequence[dict[str, Tensor]] | None = None, ax: Axes | None = None
    ) -> tuple[Figure | None, Axes]:
        """Plot one result, or several as steps; default: `compute()`. Returns figure and axes."""
        return self._plot(val, ax)  # type: ignore[return-value]


class HessianCriteria(_SpectrumMetric):
    """C_t, extreme eigenvalues, K_H05 and type of a spectrum whose probes come in several updates or on several ranks.

    C_t and the extremes are those over all probes, K_H05 is the mean over them. `functional.hessian_criteria` names the
    results. All probes must be of the same matrix and, for K_H05, of equally many steps.

    Args:
        **kwargs: Arguments of `torchmetrics.Metric`.

    Examples:
        >>> metric = HessianCriteria()
        >>> metric.update(torch.tensor([-1.0, 4.0]), torch.tensor([0.5, 0.5]))
        >>> metric.update(torch.tensor([-2.0, 3.0]), torch.tensor([0.5, 0.5]))
        >>> metric.compute()["c_t"].item()
        -0.5
    """

    spectra = ("spectrum",)

    def update(self, spectrum: Spectrum | Tensor, weights: Tensor | None = None) -> None:
        """Add the probes of a spectrum.

        Args:
            spectrum: A Spectrum, or quadrature nodes of shape (probes, steps) or (steps,).
            weights: The weights of these nodes, in the same shape; not with a Spectrum, which has its own.

        Raises:
            ValueError: If nodes come without weights, a Spectrum with them, or shapes differ.
        """
        if isinstance(spectrum, Spectrum):
            if weights is not None:
                msg = "`weights` must be left out with a Spectrum, which has its own."
                raise ValueError(msg)
            self._append("spectrum", spectrum)
        elif weights is None:
            msg = f"nodes of shape {tuple(spectrum.shape)} came without `weights`: pass both, or a Spectrum."
            raise ValueError(msg)
        else:
            self._append("spectrum", (spectrum, weights))

    def compute(self) -> dict[str, Tensor]:
        """Return the criteria by name."""
        return self._criteria("spectrum")


class GeneralizationCriteria(_SpectrumMetric):
    """Δr_e and ΔK_H05 of the spectra on training and on generalization data (Gabdullin 2025, eqs. 3 and 4).

    Below 1.5 and 1.2 they indicate good generalization where the training spectrum is MP; `assess_generalization` also
    returns how certain that is.

    Args:
        **kwargs: Arguments of `torchmetrics.Metric`.

    Examples:
        >>> metric, weights = GeneralizationCriteria(), torch.tensor([0.5, 0.5])
        >>> metric.update((torch.tensor([-1.0, 4.0]), weights), (torch.tensor([-2.0, 4.0]), weights))
        >>> metric.compute()["delta_r_e"].item()
        2.0
    """

    spectra = ("training", "generalization")

    def update(
        self, training: Spectrum | tuple[Tensor, Tensor], generalization: Spectrum | tuple[Tensor, Tensor]
    ) -> None:
        """Add the probes of two spectra, each a Spectrum or a pair of nodes and weights.

        Raises:
            ValueError: If the shapes of nodes and weights differ.
        """
        self._append("training", training)
        self._append("generalization", generalization)

    def compute(self) -> dict[str, Tensor]:
        """Return the criteria by name."""
        return generalization_criteria(self._criteria("training"), self._criteria("generalization"))
