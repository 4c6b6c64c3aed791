"""Indicators of a layer from its spectrum, as shares between 0 and 1 or in numbers of directions.

Bolshim & Kugaevskikh (2025, arXiv:2510.17486) relate spectra of layer-wise Hessians to overfitting, to too few
parameters and to expressivity. Of their indicators only the abstract is public; these are usual measures of the
same properties: how many directions are curved, how evenly, and which share of the curvature is negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_hesd.spectra.layer_curvature import LayerCurvature
    from lightning_hesd.spectra.spectrum import Spectrum

NEAR_ZERO = 0.01
"""Eigenvalues up to this share of the largest, in size, count as near zero."""


@dataclass(frozen=True)
class LayerIndicators:
    """The indicators of one layer; NaN where a spectrum of the layer itself would be needed, and there is none.

    All but the extremes and the weights are estimated by quadrature, hence random: exact in the mean over probes.

    Attributes:
        c_t: C_t of the layer's Hessian (Gabdullin 2025, eq. 1).
        lambda_max: Largest eigenvalue of the layer's Hessian.
        trace: Trace of the layer's Hessian; the traces of all layers add up to that of the network.
        trace_share: Share in the sum of the layers' traces; NaN where that is not positive.
        effective_rank: exp of the entropy of |λ|/Σ|λ| (Roy & Vetterli 2007): over how many directions the curvature
            is spread, from 1 to the number of parameters; NaN where there is no curvature.
        near_zero_share: Share of directions with |λ| at most 1 % of the largest |λ|.
        negative_share: Σ|λ| over negative λ, as a share of Σ|λ| over all.
        lambda_max_weight: Share of the layer in the eigenvector of the network's largest eigenvalue.
        lambda_min_weight: Share of the layer in the eigenvector of the network's smallest eigenvalue.
    """

    c_t: float
    lambda_max: float
    trace: float
    trace_share: float
    effective_rank: float
    near_zero_share: float
    negative_share: float
    lambda_max_weight: float = math.nan
    lambda_min_weight: float = math.nan


def effective_rank(spectrum: Spectrum) -> float:
    """Return exp(-Σ pᵢ log pᵢ) of pᵢ = |λᵢ|/Σ|λ| (Roy & Vetterli 2007); NaN where there is no curvature.

    With S = Σ|λ| this is exp(log S - Σ|λ| log|λ| / S), two sums over the spectrum that quadrature estimates.
    """
    sizes = np.abs(spectrum.nodes)
    curved = sizes > spectrum.rounding  # and no padding
    sizes, shares = sizes[curved], spectrum.density_weights[curved] / len(spectrum.nodes)
    total = spectrum.dimension * float(shares @ sizes)
    if not total > 0:
        return math.nan
    entropy = math.log(total) - spectrum.dimension * float(shares @ (sizes * np.log(sizes))) / total
    return math.exp(entropy)


def near_zero_share(spectrum: Spectrum, relative: float = NEAR_ZERO) -> float:
    """Return the share of directions with |λ| at most `relative` times the largest |λ|."""
    sizes = np.abs(spectrum.nodes)
    near = sizes <= max(relative * float(np.nanmax(sizes)), spectrum.rounding)
    return float(np.where(near, spectrum.density_weights, 0.0).sum(axis=1).mean())


def negative_share(spectrum: Spectrum) -> float:
    """Return Σ|λ| over negative λ as a share of Σ|λ| over all; NaN where there is no curvature."""
    parts = np.nan_to_num(spectrum.nodes) * spectrum.density_weights
    negative = -float(np.where(spectrum.nodes < -spectrum.rounding, parts, 0.0).sum())
    positive = float(np.where(spectrum.nodes > spectrum.rounding, parts, 0.0).sum())
    return negative / (negative + positive) if negative + positive > 0 else math.nan


def layer_indicators(
    layers: Mapping[str, Spectrum], by_layer: Mapping[str, LayerCurvature] | None = None
) -> dict[str, LayerIndicators]:
    """Return the indicators of each layer, from the spectra of all.

    Args:
        layers: Spectra by name of layer, from `layer_spectra`.
        by_layer: `Spectrum.by_layer` of the network, for the weights of layers of the same name.
    """
    total = sum(spectrum.trace for spectrum in layers.values())
    return {
        name: LayerIndicators(
            c_t=spectrum.c_t,
            lambda_max=spectrum.lambda_max,
            trace=spectrum.trace,
            trace_share=spectrum.trace / total if total > 0 else math.nan,
            effective_rank=effective_rank(spectrum),
            near_zero_share=near_zero_share(spectrum),
            negative_share=negative_share(spectrum),
            **_weights((by_layer or {}).get(name)),
        )
        for name, spectrum in layers.items()
    }


def indicators_of_network(by_layer: Mapping[str, LayerCurvature]) -> dict[str, LayerIndicators]:
    """Return what the spectrum of the whole network tells of each layer, given its `Spectrum.by_layer`."""
    unknown = dict.fromkeys(("c_t", "lambda_max", "effective_rank", "near_zero_share", "negative_share"), math.nan)
    return {
        name: LayerIndicators(trace=layer.trace, trace_share=layer.trace_share, **unknown, **_weights(layer))
        for name, layer in by_layer.items()
    }


def _weights(layer: LayerCurvature | None) -> dict[str, float]:
    if layer is None:
        return {}
    return {"lambda_max_weight": layer.lambda_max_weight, "lambda_min_weight": layer.lambda_min_weight}
