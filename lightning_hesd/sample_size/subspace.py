"""Stabilization of the loss with the sample size in a subspace around the weights.

Kiselev & Grabovoy (2026, arXiv:2604.14870). With U the D leading eigenvectors of the Hessian as columns and L_k the
mean loss of the first k samples of an order,

    Δ₂(k) = E (L_{k+1}(w + Uε) − L_k(w + Uε))²,  ε ~ N(0, σ²I_D).

*In closed form.* Let the increment L_{k+1} − L_k be a + bᵀε + ½εᵀAε, as it is up to third order. Its mean is
a + ½σ² tr A. The linear and the quadratic part are uncorrelated, as odd moments vanish, and by the fourth moments
E ε_iε_jε_kε_l = σ⁴(δ_ij δ_kl + δ_ik δ_jl + δ_il δ_jk) the variance of ½εᵀAε is ½σ⁴‖A‖_F². Hence

    Δ₂(k) = (a + ½σ² tr A)² + σ²‖b‖² + ½σ⁴‖A‖_F²
          = a² + σ²‖b‖² + aσ² tr A + ¼σ⁴(2‖A‖_F² + (tr A)²).

The first line is ‖y_{k+1} − y_k‖² for running means y of the vectors (ℓ + ½σ² tr H, σg, σ²H/√2) of the samples, with
their losses, gradients and Hessians in the subspace. So only increments of means are needed.

*The rate.* By the identity proved in `increments`, the average over all orders is the total variance of these vectors
divided by k(k + 1), at every k: the exponent −2 follows from the random orders, and only the constant depends on the
network. The same holds without the quadratic model, with the mean over ε of the variance of the displaced losses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_hesd.numerics.devices import in_float64
from lightning_hesd.numerics.inputs.options import analysis_options
from lightning_hesd.numerics.inputs.parameters import select_parameters
from lightning_hesd.numerics.isolation.exact_mode import exact_mode
from lightning_hesd.plotting import NEGATIVE, POSITIVE, place_legend, settling_axes
from lightning_hesd.sample_size import increments
from lightning_hesd.sample_size.sample_losses import all_losses, chunks, displaced_losses, moments, read_batches
from lightning_hesd.spectra.validation import check_count

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from matplotlib.axes import Axes
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from lightning_hesd.numerics.isolation.modes import Mode
    from lightning_hesd.sample_size.sample_losses import SampleLoss

    Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SubspaceStabilization:
    """Δ₂(k) for k = 1, ..., N − 1, averaged over the same random orders for the closed form and the draws.

    Attributes:
        closed_form: Δ₂ under the quadratic model of the loss, in squared units of the loss, shape (N − 1,).
        monte_carlo: Mean over draws of ε, without this model, shape (N − 1,).
        monte_carlo_error: Standard error of `monte_carlo` over the draws, shape (N − 1,).
        constant: Average of `closed_form` over all N! orders, times k(k + 1).
        monte_carlo_constant: Average of `monte_carlo` over all N! orders, times k(k + 1). Where it differs from
            `constant` by more than chance, the quadratic model does not hold at distance σ.
        monte_carlo_constant_error: Standard error of `monte_carlo_constant` over the draws.
        rate: Exponent r of the fit monte_carlo ∝ (k(k + 1))^(r/2), least squares on logarithmic axes: −2 is expected.
        rate_error: Standard error of `rate` over the orders.
        sigma: Standard deviation σ of the displacement along each direction.
        dimension: Number D of directions.
        draws: Number of draws of ε.
        orders: Number of random orders.
        seed: Seed of draws and orders.
    """

    closed_form: Array
    monte_carlo: Array
    monte_carlo_error: Array
    constant: float
    monte_carlo_constant: float
    monte_carlo_constant_error: float
    rate: float
    rate_error: float
    sigma: float
    dimension: int
    draws: int
    orders: int
    seed: int

    @property
    def num_samples(self) -> int:
        """Number N of samples."""
        return len(self.closed_form) + 1

    @property
    def sample_sizes(self) -> NDArray[np.int64]:
        """The smaller sample size k of each increment, shape (N − 1,)."""
        return np.arange(1, self.num_samples)

    @property
    def expected(self) -> Array:
        """Average of `closed_form` over all N! orders, exactly: constant/(k(k + 1)), shape (N − 1,)."""
        return self.constant / increments.scale_of_sizes(self.num_samples) ** 2

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the closed form, its average over all orders, and the Monte Carlo mean, on a logarithmic axis.

        Args:
            ax: Axes to draw on; default: a new figure.
        """
        ax = settling_axes(ax, r"$\Delta_2(k)$")
        sizes, mean, error = self.sample_sizes, self.monte_carlo, self.monte_carlo_error
        ax.plot(sizes, self.closed_form, color=POSITIVE, linewidth=2.5, alpha=0.5, label="quadratic model")
        ax.plot(sizes, mean, color=NEGATIVE, linewidth=1, label=f"{self.draws} draws")
        low, high = np.maximum(mean - 2 * error, 0.0), mean + 2 * error
        ax.fill_between(sizes, low, high, color=NEGATIVE, alpha=0.25, linewidth=0, label="± 2 standard errors")
        expected = f"all orders: {self.constant:.3g}/k²"
        ax.plot(sizes, self.expected, color="black", linestyle="--", linewidth=1, label=expected)
        ax.set_title(rf"$D$ = {self.dimension}, $\sigma$ = {self.sigma:.3g}", fontsize=10)
        place_legend(ax)
        return ax


def subspace_stabilization(
    module: nn.Module,
    batches: Iterable[Any],
    loss_fn: SampleLoss,
    directions: Tensor,
    *,
    sigma: float,
    draws: int = 64,
    orders: int = 100,
    seed: int = 0,
    chunk_size: int | None = None,
    mode: Mode = "eval",
) -> SubspaceStabilization:
    """Measure how the loss at displaced weights within a subspace changes with the sample size.

    Takes one pass over the samples for each draw. The closed form takes about D(D + 5)/2 backward passes through graphs
    of derivatives, which are several times as large as the graph of the gradient of a chunk: choose a small D.

    Args:
        module: As for `loss_differences`; its parameters are never written to.
        batches: As for `loss_differences`.
        loss_fn: As for `loss_differences`; it must use the parameters of its argument `module`.
        directions: U, orthonormal columns over all parameters that require grad, shape (n, D); for example those of
            `dominant_directions`.
        sigma: Standard deviation σ of the displacement along each direction, in units of the weights.
        draws: Number of draws of ε, at least 2.
        orders: Number of random orders, at least 2.
        seed: Seed of draws and orders.
        chunk_size: Maximal number of samples to differentiate at a time; None: whole batches.
        mode: As for `loss_differences`.

    Raises:
        ValueError: If an argument is out of range, there are fewer than three samples, or the number of losses differs
            from that of the samples.
        TypeError: If `loss_fn` does not return a tensor.
        ArithmeticError: If a loss is NaN or infinite, at the weights or at displaced ones.
    """
    parameters = list(select_parameters(module, analysis_options()).values())
    _check_directions(directions, sum(p.numel() for p in parameters))
    if not 0 < sigma < math.inf:
        msg = f"`sigma` must be positive and finite, got {sigma!r}."
        raise ValueError(msg)
    check_count("draws", draws, least=2)
    check_count("chunk_size", 1 if chunk_size is None else chunk_size)
    increments.check_orders(orders, seed)
    dimension = directions.shape[1]
    generator = torch.Generator().manual_seed(seed)
    displacements = sigma * torch.randn(
        draws, dimension, generator=generator, dtype=torch.float64, device=generator.device
    )
    weighted = read_batches(batches)
    with exact_mode(module, mode) as isolation:
        losses_at = displaced_losses(module, loss_fn, parameters, directions, isolation)

        def losses_of_all(displacement: Tensor) -> Array:
            return all_losses(lambda batch: losses_at(batch, displacement), weighted)

        with torch.no_grad():
            displaced = np.stack([losses_of_all(displacement) for displacement in displacements], axis=1)
        of_chunks = [moments(losses_at, part, dimension, sigma) for part in chunks(weighted, chunk_size)]
    return _stabilization(np.concatenate(of_chunks), displaced, sigma, dimension, orders=orders, seed=seed)


def _stabilization(
    moments: Array, displaced: Array, sigma: float, dimension: int, *, orders: int, seed: int
) -> SubspaceStabilization:
    """Average over random orders: `moments`, shape (N, 1 + D + D²), and losses at displaced weights, (N, draws)."""
    increments.checked_losses(displaced[:, 0])
    draws = displaced.shape[1]

    def squares(values: Array) -> Iterator[Array]:
        return (change**2 for change in increments.increments(values, orders, seed))

    closed_form, by_draw = np.zeros(len(displaced) - 1), np.zeros((len(displaced) - 1, draws))
    for square in squares(moments):
        closed_form += square.sum(axis=1) / orders
    for square in squares(displaced):
        by_draw += square / orders
    monte_carlo = by_draw.mean(axis=1)
    rate, rate_error = increments.fit_rate((square.mean(axis=1) for square in squares(displaced)), monte_carlo)
    variances = displaced.var(axis=0, ddof=1)
    return SubspaceStabilization(
        closed_form=closed_form,
        monte_carlo=monte_carlo,
        monte_carlo_error=by_draw.std(axis=1, ddof=1) / math.sqrt(draws),
        constant=float(moments.var(axis=0, ddof=1).sum()),
        monte_carlo_constant=float(variances.mean()),
        monte_carlo_constant_error=float(variances.std(ddof=1)) / math.sqrt(draws),
        rate=rate,
        rate_error=rate_error,
        sigma=sigma,
        dimension=dimension,
        draws=draws,
        orders=orders,
        seed=seed,
    )


def _check_directions(directions: Tensor, n: int) -> None:
    if directions.ndim != 2 or directions.shape[0] != n or not 1 <= directions.shape[1] <= n:
        msg = (
            f"`directions` must have shape (n, D) with n={n}, the number of elements of the parameters that require "
            f"grad, and D from 1 to n; got {tuple(directions.shape)}."
        )
        raise ValueError(msg)
    columns = in_float64(directions.detach())
    off = float((columns.T @ columns - torch.eye(directions.shape[1]).to(columns)).abs().max())
    if not off <= math.sqrt(torch.finfo(directions.dtype).eps):
        msg = f"`directions` must have orthonormal columns, but UᵀU differs from the identity by {off:.3g}."
        raise ValueError(msg)
