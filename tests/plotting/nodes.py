"""Spectra of given nodes."""

from __future__ import annotations

import numpy as np

from lightning_hesd import Spectrum


def spectrum(*nodes: float, residual: float = 0.0, reason: str | None = None) -> Spectrum:
    return Spectrum(
        verified="yes",
        nodes=np.array([nodes]),
        weights=np.full((1, len(nodes)), 1 / len(nodes)),
        residuals=np.full((1, len(nodes)), residual),
        steps_per_probe=(len(nodes),),
        dimension=100,
        num_samples=8,
        loss=0.5,
        rounding=1e-9,
        matvecs=len(nodes),
        seconds=0.1,
        reason=reason,
    )
