"""The criteria as functions on tensors: nodes and weights of any origin."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from lightning_hesd.spectra import criteria

if TYPE_CHECKING:
    from torch import Tensor


def hessian_criteria(nodes: Tensor, weights: Tensor, rounding: float = 0.0) -> dict[str, Tensor]:
    """Return the criteria of a spectrum, each a scalar tensor on the device of the nodes.

    Args:
        nodes: Quadrature nodes, or eigenvalues, shape (probes, steps) or (steps,); NaN pads probes that ended early.
        weights: Quadrature weights of the same shape, 0 for padding; each row sums to 1. Equal weights for eigenvalues.
        rounding: Nodes within `rounding` of zero count as neither negative nor positive.

    Returns:
        `c_t` (Gabdullin 2025, eq. 1), `lambda_max`, `lambda_min`, `k_h05` (arXiv:2412.10146; NaN where a probe has no
        positive node), and `mp`, 1 for MP and 0 for MN (eq. 2; NaN where C_t is undefined).

    Raises:
        ValueError: If the shapes differ, or there is no node.

    Examples:
        >>> import torch
        >>> found = hessian_criteria(torch.tensor([-1.0, 0.0, 4.0]), torch.tensor([0.25, 0.5, 0.25]))
        >>> {name: value.item() for name, value in found.items()}
        {'c_t': -0.25, 'lambda_max': 4.0, 'lambda_min': -1.0, 'k_h05': 0.5, 'mp': 1.0}
    """
    theta, tau = (np.atleast_2d(t.detach().cpu().double().numpy()) for t in (nodes, weights))
    present = theta[~np.isnan(theta)]
    if theta.shape != tau.shape or theta.ndim != 2 or not len(present):
        msg = (
            "`nodes` and `weights` must have the same shape, (probes, steps) or (steps,), and a node that is not NaN; "
            f"got {tuple(nodes.shape)} and {tuple(weights.shape)}."
        )
        raise ValueError(msg)
    lambda_min, lambda_max = float(present.min()), float(present.max())
    c_t = criteria.c_t(lambda_min, lambda_max, rounding)
    values = {
        "c_t": c_t,
        "lambda_max": lambda_max,
        "lambda_min": lambda_min,
        "k_h05": float(criteria.k_h(theta, tau, 0.5, rounding).mean()),
        "mp": math.nan if math.isnan(c_t) else float(criteria.hesd_type(c_t) == "MP"),
    }
    return {name: nodes.new_tensor(value) for name, value in values.items()}


def generalization_criteria(training: dict[str, Tensor], generalization: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return Δr_e and ΔK_H05 (Gabdullin 2025, eqs. 3 and 4) of two results of `hessian_criteria`.

    Both spectra must come from the same number of steps and the same probes. NaN where a criterion is undefined.

    Examples:
        >>> import torch
        >>> weights = torch.tensor([0.5, 0.5])
        >>> training, other = (hessian_criteria(torch.tensor([low, 4.0]), weights) for low in (-1.0, -2.0))
        >>> generalization_criteria(training, other)["delta_r_e"].item()
        2.0
    """
    r_e = [criteria.r_e(float(found["c_t"])) for found in (generalization, training)]
    k_h05 = [float(found["k_h05"]) for found in (generalization, training)]
    values = {"delta_r_e": criteria.delta(*r_e), "delta_k_h05": criteria.delta(*k_h05)}
    return {name: training["c_t"].new_tensor(value) for name, value in values.items()}
