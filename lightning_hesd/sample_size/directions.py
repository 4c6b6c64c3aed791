"""Directions of largest curvature: leading eigenvectors of the Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_hesd.numerics.analysis.engine import estimate
from lightning_hesd.numerics.inputs.options import StrategyName, analysis_options
from lightning_hesd.numerics.inputs.parameters import select_parameters
from lightning_hesd.sample_size.sample_losses import mean_loss, read_batches
from lightning_hesd.spectra.validation import check_count

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from lightning_hesd.numerics.isolation.modes import Mode
    from lightning_hesd.sample_size.sample_losses import SampleLoss

    Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class DominantDirections:
    """The directions of largest curvature.

    Attributes:
        directions: Orthonormal Ritz vectors as columns, shape (n, D), in the order of the eigenvalues.
        eigenvalues: Largest Ritz values, descending, shape (D,).
        residuals: Ritz residuals, shape (D,): an eigenvalue lies within the residual, and rounding, of each Ritz value.
            A vector is accurate if its residual is small compared with the gap to the other eigenvalues; more `steps`
            reduce it.
    """

    directions: Tensor
    eigenvalues: Array
    residuals: Array


def dominant_directions(
    module: nn.Module,
    batches: Iterable[Any],
    loss_fn: SampleLoss,
    count: int,
    *,
    steps: int = 100,
    seed: int = 0,
    strategy: StrategyName = "auto",
    mode: Mode = "eval",
) -> DominantDirections:
    """Find the eigenvectors of the Hessian of the mean loss with the largest eigenvalues, by Lanczos.

    For a multiple eigenvalue one vector is found.

    Args:
        module: As for `loss_differences`.
        batches: As for `loss_differences`.
        loss_fn: As for `loss_differences`; a mean is as fast here.
        count: Number D of directions.
        steps: As for `hessian_spectrum`.
        seed: As for `hessian_spectrum`.
        strategy: As for `hessian_spectrum`.
        mode: As for `hessian_spectrum`.

    Returns:
        The directions with their eigenvalues, over all parameters that require grad.

    Raises:
        ValueError: If an argument is out of range, or Lanczos finds fewer directions.
        ArithmeticError: If the loss or a product is NaN or infinite.
        RuntimeError: If the loss cannot be differentiated twice, and `strategy` is "graph" or "recompute".

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = (torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))
        >>> found = dominant_directions(model, [data], lambda m, b: (m(b[0]) - b[1]).square().mean(dim=1), 1)
        >>> found.directions.abs().round(decimals=3).tolist(), found.eigenvalues.round(3).tolist()
        ([[0.0], [1.0]], [4.0])
    """
    check_count("count", count)
    options = analysis_options(steps=steps, seed=seed, strategy=strategy, mode=mode)
    parameters = list(select_parameters(module, options).values())
    weighted = read_batches(batches)
    [(values, vectors, residuals)] = estimate(
        module, weighted, mean_loss(loss_fn), options, [parameters], result=lambda runs: runs.leading(count)
    )
    return DominantDirections(vectors.T, values, residuals)
