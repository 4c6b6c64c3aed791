"""The change of the mean loss with one more sample (Kiselev & Grabovoy 2024, arXiv:2409.11995, eqs. 1 to 3, section 5).

L_k is the mean loss of the first k samples of a random order, and |L_{k+1} − L_k| its change with one more sample. The
decrease as 1/k is arithmetic, see `increments`, and holds for all losses of finite variance. Networks differ in the
constant, which is the spread of their losses over samples.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_hesd.plotting import NEGATIVE, POSITIVE, SMOOTHING, place_legend, settling_axes
from lightning_hesd.sample_size import increments
from lightning_hesd.sample_size.sample_losses import per_sample_losses
from lightning_hesd.spectra.intervals import student_quantile

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray
    from torch import nn

    from lightning_hesd.numerics.isolation.modes import Mode
    from lightning_hesd.sample_size.sample_losses import SampleLoss

    Array = NDArray[np.float64]

PAPER_FACTOR = 0.99
"""Smoothing factor of the paper's figures."""


@dataclass(frozen=True, eq=False)
class LossDifferences:
    """|L_{k+1} − L_k| for k = 1, ..., N − 1, averaged over random orders of N samples.

    The standard errors are those of the average over orders, for these N samples. They do not include the differences
    to other samples from the same population, which more orders cannot reduce either.

    Attributes:
        mean: Mean over the orders, in units of the loss, shape (N − 1,).
        standard_error: Standard error of `mean` over the orders, shape (N − 1,).
        variance: Unbiased variance s² of the losses over the samples.
        rate: Exponent r of the fit mean ∝ (k(k + 1))^(r/2), least squares on logarithmic axes: −1 is expected. NaN
            where the losses do not differ.
        rate_error: Standard error of `rate` over the orders.
        orders: Number of random orders.
        seed: Seed of the orders.
        confidence: Confidence of `band`, at each k separately.
    """

    mean: Array
    standard_error: Array
    variance: float
    rate: float
    rate_error: float
    orders: int
    seed: int
    confidence: float

    @property
    def num_samples(self) -> int:
        """Number N of samples."""
        return len(self.mean) + 1

    @property
    def sample_sizes(self) -> NDArray[np.int64]:
        """The smaller sample size k of each difference, shape (N − 1,)."""
        return np.arange(1, self.num_samples)

    @property
    def band(self) -> tuple[Array, Array]:
        """(low, high), each of shape (N − 1,), for the mean over all orders: Student's interval, clipped at 0."""
        half = student_quantile(self.confidence, self.orders - 1) * self.standard_error
        return np.maximum(self.mean - half, 0.0), self.mean + half

    @property
    def expected_rms(self) -> Array:
        """Root mean square of L_{k+1} − L_k over all N! orders, exactly: s/√(k(k + 1)), shape (N − 1,).

        The mean absolute difference is smaller: for large k and normally distributed losses √(2/π) = 0.8 times as
        large.
        """
        return math.sqrt(self.variance) / increments.scale_of_sizes(self.num_samples)

    @property
    def constant(self) -> float:
        """The constant c, in units of the loss, of the fit mean = c/√(k(k + 1)), which is c/k for large k.

        For large k the numerator ℓ_{k+1} − L_k no longer depends on k, and c is the mean absolute deviation of the
        losses from their mean. All k have the same weight, as the relative error is about the same at every k.
        """
        return float((self.mean * increments.scale_of_sizes(self.num_samples)).mean())

    def smoothed(self, factor: float = PAPER_FACTOR) -> Array:
        """Return the exponential moving average of `mean` over k, shape (N − 1,), as in the paper's figures.

        y_1 = x_1 and y_k = factor·y_{k−1} + (1 − factor)·x_k, the authors' `calculate_ema`. It is biased upward, as it
        starts from the first and largest difference, whose weight decreases by 1 % per step: for an exact 1/k and a
        factor of 0.99 it is 28 times too high at k = 100, 16 % at 1000 and 1 % at 10,000.

        Args:
            factor: Weight of the past, at least 0 and less than 1.

        Raises:
            ValueError: If `factor` is out of range.
        """
        if not 0 <= factor < 1:
            msg = f"`factor` must be at least 0 and less than 1, got {factor!r}."
            raise ValueError(msg)
        steps = itertools.accumulate(self.mean.tolist(), lambda past, x: factor * past + (1 - factor) * x)
        return np.fromiter(steps, np.float64, len(self.mean))

    def plot(self, ax: Axes | None = None, bounds: Mapping[str, ArrayLike] | None = None) -> Axes:
        """Draw the differences with their band, their moving average, and the fitted 1/k, on a logarithmic axis.

        Args:
            ax: Axes to draw on; default: a new figure.
            bounds: Label -> upper bound to draw as well: one value for all k, or one per k, shape (N − 1,).
        """
        ax = settling_axes(ax, r"$|L_{k+1} - L_k|$")
        sizes, scale = self.sample_sizes, increments.scale_of_sizes(self.num_samples)
        ax.plot(sizes, self.mean, color=SMOOTHING, linewidth=0.6, label=f"mean of {self.orders} orders")
        ax.fill_between(sizes, *self.band, color=SMOOTHING, alpha=0.4, linewidth=0, label=f"{self.confidence:.0%} band")
        ax.plot(sizes, self.smoothed(), color=POSITIVE, linewidth=1.5, label=f"moving average ({PAPER_FACTOR})")
        ax.plot(
            sizes, self.constant / scale, color="black", linestyle="--", linewidth=1, label=f"{self.constant:.3g}/k"
        )
        for style, (label, bound) in zip(itertools.cycle(("-.", ":")), (bounds or {}).items(), strict=False):
            curve = np.broadcast_to(np.asarray(bound, dtype=np.float64), sizes.shape)
            ax.plot(sizes, curve, color=NEGATIVE, linestyle=style, linewidth=1.2, label=label)
        place_legend(ax)
        return ax


def loss_differences(
    module: nn.Module,
    batches: Iterable[Any],
    loss_fn: SampleLoss,
    *,
    orders: int = 100,
    seed: int = 0,
    confidence: float = 0.95,
    mode: Mode = "eval",
) -> LossDifferences:
    """Measure the change of the mean loss with one more sample, for every sample size, over random orders.

    Args:
        module: The module, on the device of the batches; its state and the random number generators are restored.
        batches: Batches as `loss_fn` takes them; read once.
        loss_fn: `loss_fn(module, batch)` -> losses of the samples, shape (batch,), or their mean, a scalar, which
            is slower, as every sample is evaluated by itself.
        orders: Number of random orders, at least 2; default from the paper.
        seed: Seed of the orders.
        confidence: Confidence of the band around the mean over orders.
        mode: Module mode during the measurement: "eval", "train", or "keep" for no change.

    Raises:
        ValueError: If an argument is out of range, there are fewer than three samples, or the number of losses differs
            from that of the samples.
        TypeError: If `loss_fn` does not return a tensor.
        ArithmeticError: If a loss is NaN or infinite.
    """
    _check(orders, seed, confidence)
    losses = per_sample_losses(module, batches, loss_fn, mode=mode)
    return differences_of(losses, orders=orders, seed=seed, confidence=confidence)


def differences_of(losses: ArrayLike, *, orders: int = 100, seed: int = 0, confidence: float = 0.95) -> LossDifferences:
    """Compute the changes of the mean of given losses, shape (N,), N at least 3, as `loss_differences` does.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> found = differences_of([1.0, 2.0, 3.0])
        >>> found.num_samples, found.expected_rms.round(3).tolist()
        (3, [0.707, 0.408])
    """
    _check(orders, seed, confidence)
    values = increments.checked_losses(losses)[:, None]

    def curves() -> Iterable[Array]:
        return (np.abs(change[:, 0]) for change in increments.increments(values, orders, seed))

    total = np.zeros(len(values) - 1)
    for curve in curves():
        total += curve
    mean = total / orders
    # The curves are computed again and not stored: a hundred orders of a million samples would take a gigabyte.
    squares = np.zeros_like(mean)
    for curve in curves():
        squares += (curve - mean) ** 2
    rate, rate_error = increments.fit_rate(curves(), mean)
    return LossDifferences(
        mean=mean,
        standard_error=np.sqrt(squares / (orders - 1) / orders),
        variance=float(values.var(ddof=1)),
        rate=rate,
        rate_error=rate_error,
        orders=orders,
        seed=seed,
        confidence=confidence,
    )


def _check(orders: int, seed: int, confidence: float) -> None:
    increments.check_orders(orders, seed)
    if not 0 < confidence < 1:
        msg = f"`confidence` must lie between 0 and 1, got {confidence!r}."
        raise ValueError(msg)
