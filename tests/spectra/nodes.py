"""Spectra of given nodes, and layers of given curvature."""

from typing import Any

import numpy as np

from lightning_hesd import Spectrum
from lightning_hesd.spectra.layer_curvature import LayerCurvature


def spectrum(
    *nodes: float, weights: list[list[float]] | None = None, residual: float = 0.0, **changes: Any
) -> Spectrum:
    """A spectrum of one hundred dimensions whose nodes are the same for every probe, a row of `weights`.

    By default one probe with equal weights. All nodes have the same residual, and other fields as in `changes`.
    """
    rows = [[1 / len(nodes)] * len(nodes)] if weights is None else weights
    fields: dict[str, Any] = {
        "nodes": np.tile(np.array(nodes), (len(rows), 1)),
        "weights": rows,
        "residuals": np.full((len(rows), len(nodes)), residual),
        "steps_per_probe": (len(nodes),) * len(rows),
        "dimension": 100,
        "num_samples": 8,
        "loss": 0.5,
        "rounding": 1e-9,
        "matvecs": len(nodes),
        "seconds": 0.1,
        "verified": "yes",
    }
    return Spectrum(**{**fields, **changes})


def layer(size: int, trace: float, negative: float = 0.5, error: float = 0.0) -> LayerCurvature:
    """A layer that has this share of the negative curvature, in a network of trace one."""
    return LayerCurvature(size, trace, error, trace, negative, trace, 0.5, (0.0, 1.0), (-1.0, 0.0))
