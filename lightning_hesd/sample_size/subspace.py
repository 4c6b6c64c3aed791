"""How the loss settles around the weights, in the directions of largest curvature.

Kiselev & Grabovoy (2026, arXiv:2604.14870). With U the D leading eigenvectors of the Hessian as columns and L_k the
mean loss of the first k samples of an order,

    Δ₂(k) = E (L_{k+1}(w + Uε) − L_k(w + Uε))²,  ε ~ N(0, σ²I_D).

*In closed form.* Let the increment L_{k+1} − L_k be a + bᵀε + ½εᵀAε, as it is up to third order. Its mean is
a + ½σ² tr A. The linear and the quadratic part are uncorrelated, as odd moments vanish, and by the fourth moments
E ε_iε_jε_kε_l = σ⁴(δ_ij δ_kl + δ_ik δ_jl + δ_il δ_jk) the variance of ½εᵀAε is ½σ⁴‖A‖_F². Hence

    Δ₂(k) = (a + ½σ² tr A)² + σ²‖b‖² + ½σ⁴‖A‖_F²
          = a² + σ²‖b‖² + aσ² tr A + ¼σ⁴(2‖A‖_F² + (tr A)²).

The first line is ‖y_{k+1} − y_k‖² for running means y of the samples' vectors (ℓ + ½σ² tr H, σg, σ²H/√2) of loss,
gradient and Hessian in the subspace, so increments of means are all that is needed.

*The rate.* By the identity that `increments` proves, the average over all orders is the total variance of these vectors
divided by k(k + 1), at every k: the exponent −2 belongs to the random orders and not to the network, whose mark is the
constant. The same holds without the quadratic model, with the mean over ε of the variance of the displaced losses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_hesd.numerics.devices import finest_dtype, in_float64
from lightning_hesd.numerics.inputs.options import analysis_options
from lightning_hesd.numerics.inputs.parameters import select_parameters
from lightning_hesd.numerics.isolation.exact_mode import analysis_state
from lightning_hesd.plotting import NEGATIVE, POSITIVE, place_legend, settling_axes
from lightning_hesd.sample_size import increments
from lightning_hesd.sample_size.sample_losses import check_finite, read_batches, sample_losses
from lightning_hesd.spectra.checks import check_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.isolation.isolation import Isolation
    from lightning_hesd.numerics.isolation.modes import Mode
    from lightning_hesd.sample_size.sample_losses import SampleLoss

    Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SubspaceStabilization:
    """Δ₂(k) for k = 1, ..., N − 1, averaged over random orders, the same ones for the closed form and the draws.

    Attributes:
        closed_form: Under the quadratic model of the loss, in squared units of the loss, shape (N − 1,).
        monte_carlo: Mean over draws of ε, without that model, shape (N − 1,).
        monte_carlo_error: Its standard error over the draws, shape (N − 1,).
        constant: Average of `closed_form` over all N! orders, times k(k + 1).
        monte_carlo_constant: That of `monte_carlo`. Where it differs from `constant` by more than chance, the quadratic
            model does not reach as far as σ.
        monte_carlo_constant_error: Its standard error over the draws.
        rate: Exponent r of the fit monte_carlo ∝ (k(k + 1))^(r/2), least squares on logarithmic axes: −2 is expected.
        rate_error: Its standard error over the orders.
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
            ax: Where to draw them; default: a new figure.
        """
        ax = settling_axes(ax, r"$\Delta_2(k)$")
        sizes, mean, error = self.sample_sizes, self.monte_carlo, self.monte_carlo_error
        ax.plot(sizes, self.closed_form, color=POSITIVE, linewidth=2.5, alpha=0.5, label="quadratic model")
        ax.plot(sizes, mean, color=NEGATIVE, linewidth=1, label=f"{self.draws} draws")
        low, high = np.maximum(mean - 2 * error, 0.0), mean + 2 * error
        ax.fill_between(sizes, low, high, color=NEGATIVE, alpha=0.25, linewidth=0, label="± 2 standard errors")
        ax.plot(
            sizes,
            self.expected,
            color="black",
            linestyle="--",
            linewidth=1,
            label=f"all orders: {self.constant:.3g}/k²",
        )
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
    """Measure how the loss around the weights settles with the sample size, within a subspace.

    Takes one pass over the samples for each draw. The closed form takes about D(D + 5)/2 backward passes through graphs
    of derivatives, which hold several times what the gradient's graph of a chunk does: D is meant to be small.

    Args:
        module: The module, on the device of the batches. Its parameters are never written to; it and the random number
            generators are afterwards as they were.
        batches: Batches as `loss_fn` takes them; read once.
        loss_fn: `loss_fn(module, batch)` -> losses of the samples, shape (batch,), which is fast, or their mean, a
            scalar, for which every sample is evaluated by itself. It must take the parameters from the module it is
            given.
        directions: U, orthonormal columns over all parameters that require grad, shape (n, D); for example those of
            `dominant_directions`.
        sigma: Standard deviation σ of the displacement along each direction, in units of the weights.
        draws: Number of draws of ε, at least 2.
        orders: Number of random orders, at least 2.
        seed: Seed of draws and orders.
        chunk_size: Most samples to differentiate at a time; None: those of a batch.
        mode: Module mode meanwhile: "eval", "train", or "keep" for no change.

    Raises:
        ValueError: If an argument is out of range, there are fewer than three samples, or the number of losses is not
            that of the samples.
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
    displacements = sigma * torch.randn(draws, dimension, generator=generator, dtype=torch.float64)
    weighted = read_batches(batches)
    with analysis_state(module, mode) as isolation:
        losses_at = _displaced(module, loss_fn, parameters, directions, isolation)
        with torch.no_grad():
            displaced = np.stack([_losses(losses_at, weighted, displacement) for displacement in displacements], axis=1)
        moments = [_moments(losses_at, part, dimension, sigma) for part in _chunks(weighted, chunk_size)]
    return _stabilization(np.concatenate(moments), displaced, sigma, dimension, orders=orders, seed=seed)


class _LossModule(nn.Module):
    """Makes a loss a module, so that `functional_call` can replace the parameters, tied ones together."""

    def __init__(self, module: nn.Module, loss_fn: SampleLoss) -> None:
        super().__init__()
        self.module = module
        self.loss_fn = loss_fn

    def forward(self, batch: WeightedBatch) -> Tensor:
        return sample_losses(self.module, batch, self.loss_fn)


def _displaced(
    module: nn.Module,
    loss_fn: SampleLoss,
    parameters: Sequence[nn.Parameter],
    directions: Tensor,
    isolation: Isolation,
) -> Callable[[WeightedBatch, Tensor], Tensor]:
    """Return the losses of a batch's samples at w + Uε as a function of the batch and ε, (D,) -> (batch,)."""
    names = {p: f"module.{name}" for name, p in module.named_parameters()}
    parts = torch.split(directions.detach(), [p.numel() for p in parameters])
    moved = [(names[p], p.detach(), part.to(p)) for p, part in zip(parameters, parts, strict=True)]
    wrapper = _LossModule(module, loss_fn)

    def losses_at(batch: WeightedBatch, displacement: Tensor) -> Tensor:
        values = {name: p + (part @ displacement.to(p)).view_as(p) for name, p, part in moved}
        isolation.restore(batch.index)
        with isolation.evaluation():
            losses: Tensor = functional_call(wrapper, values, (batch,))
        return losses

    return losses_at


def _losses(
    losses_at: Callable[[WeightedBatch, Tensor], Tensor], batches: Sequence[WeightedBatch], displacement: Tensor
) -> Array:
    """Return the losses of all samples at one displacement, shape (N,)."""
    found = []
    for batch in batches:
        losses = losses_at(batch, displacement)
        check_finite(losses, batch)
        found.append(losses.cpu().double().numpy())
    return np.concatenate(found)


def _chunks(batches: Sequence[WeightedBatch], chunk_size: int | None) -> Iterator[WeightedBatch]:
    for batch in batches:
        yield from [batch] if chunk_size is None else batch.split(math.ceil(batch.num_samples / chunk_size))


def _moments(
    losses_at: Callable[[WeightedBatch, Tensor], Tensor], batch: WeightedBatch, dimension: int, sigma: float
) -> Array:
    """Return (ℓ + ½σ² tr H, σg, σ²H/√2) of the samples of a batch, shape (batch, 1 + D + D²)."""
    point = torch.zeros(dimension, dtype=torch.float64, requires_grad=True)
    losses = losses_at(batch, point)
    check_finite(losses, batch)
    gradients, hessians = _derivatives(losses, point)
    trace = hessians.diagonal(dim1=1, dim2=2).sum(dim=1)
    shifted = losses.detach().to(gradients) + sigma**2 / 2 * trace
    columns = [shifted[:, None], sigma * gradients, sigma**2 / math.sqrt(2) * hessians.flatten(1)]
    moments: Array = torch.cat(columns, dim=1).cpu().double().numpy()
    return moments


def _derivatives(losses: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradients and Hessians of losses (batch,) in the point (D,), shapes (batch, D) and (batch, D, D).

    By reverse mode alone, which every loss with a Hessian has, whereas forward mode stops at some activations, and
    for all samples at once: Jᵀu is linear in u, and the derivative of its i-th element in u is column i of J, an
    element per sample. The columns of J are differentiated in the same way again. As fast as forward over forward.
    """
    count, dimension = len(losses), len(point)
    options: Any = {"dtype": finest_dtype(losses.device), "device": losses.device}
    gradients, hessians = torch.empty(count, dimension, **options), torch.empty(count, dimension, dimension, **options)
    outer, inner = torch.ones_like(losses, requires_grad=True), torch.ones_like(losses, requires_grad=True)
    total = _gradient(losses, point, outer)
    for i in range(dimension):
        column = _gradient(total[i], outer)
        gradients[:, i] = column.detach()
        row = _gradient(column, point, inner)
        for j in range(i + 1):
            hessians[:, i, j] = hessians[:, j, i] = _gradient(row[j], inner).detach()
    return gradients, hessians


def _gradient(output: Tensor, variable: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the gradient of Σ weights·output, with a graph; zeros where it does not depend on the variable."""
    if not output.requires_grad:
        return torch.zeros_like(variable)
    return torch.autograd.grad(output, variable, weights, create_graph=True, materialize_grads=True)[0]


def _stabilization(
    moments: Array, displaced: Array, sigma: float, dimension: int, *, orders: int, seed: int
) -> SubspaceStabilization:
    """Average over random orders.

    Args:
        moments: Vectors of the samples whose increments make the closed form, shape (N, 1 + D + D²).
        displaced: Their losses at displaced weights, shape (N, draws).
        sigma: Standard deviation of the displacements.
        dimension: Number D of directions.
        orders: Number of random orders.
        seed: Their seed.
    """
    increments.checked_values("losses", displaced[:, 0])
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
