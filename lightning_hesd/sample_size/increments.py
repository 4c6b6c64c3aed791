"""Increments of the mean as the sample grows by one, over random orders of the samples.

With V_k the mean of the first k values of a random order, one more value changes it by

    d_k = V_{k+1} − V_k = (v_{k+1} − V_k)/(k + 1).

Its mean square over all orders is exact at every k. In a random order of N given values, Cov(v_i, v_j) =
s²(δ_ij − 1/N) with s² their unbiased variance (drawing without replacement). A contrast, Σ c_i v_i with Σ c_i = 0, so
has variance s² Σ c_i² and mean 0. The numerator is a contrast with Σ c_i² = 1 + k·(1/k)² = (k + 1)/k, hence

    E d_k² = s²/(k(k + 1)).

Numerators of different k are orthogonal contrasts (Helmert's), so that increments, unlike the means, are uncorrelated.
The same holds for independent draws from a population, with its variance in place of s².
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from lightning_hesd.spectra.validation import check_count

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[np.float64]

MIN_VALUES = 3
"""Minimal number of values: two have only one increment, and no rate."""


def scale_of_sizes(count: int) -> Array:
    """Return √(k(k + 1)) for k = 1, ..., count − 1: the root mean square increment is s divided by this."""
    sizes = np.arange(1.0, count)
    return np.sqrt(sizes * (sizes + 1))


def increments(values: Array, orders: int, seed: int) -> Iterator[Array]:
    """Yield d_k, k = 1, ..., N − 1, shape (N − 1, c), for random orders of N values, shape (N, c).

    The orders are the same for equal seeds and numbers of values.

    Examples:
        >>> next(increments(np.array([[1.0], [4.0]]), orders=1, seed=0)).round(1).tolist()
        [[1.5]]
    """
    generator = np.random.default_rng(seed)
    # A common shift does not change increments, and sums of centered values are more accurate.
    centered = values - values.mean(axis=0)
    sizes = np.arange(1.0, len(values))[:, None]
    for _ in range(orders):
        ordered = centered[generator.permutation(len(values))]
        means = np.cumsum(ordered[:-1], axis=0) / sizes
        yield (ordered[1:] - means) / (sizes + 1)


def fit_rate(curves: Iterable[Array], mean: Array) -> tuple[float, float]:
    """Fit a power of the sample size to the mean of curves from independent random orders, on logarithmic axes.

    Least squares with equal weights, as the relative error is about the same at every k. The abscissa is
    log √(k(k + 1)), for which the exponent of the root mean square increment is exactly −1; for log k it would be −0.96
    with a hundred samples. A k where the mean is zero is left out.

    The standard error makes no assumption about the dependence between sizes, as the orders are independent: it is the
    standard error of the mean over orders of their contributions to the slope, to first order (the infinitesimal
    jackknife).

    Args:
        curves: One curve per order, each of shape (N − 1,), at least 2.
        mean: Mean of the curves, shape (N − 1,).

    Returns:
        The exponent and its standard error over orders; NaN where fewer than two sizes are left.
    """
    present = mean > 0
    if np.count_nonzero(present) < 2:
        return math.nan, math.nan
    abscissa = np.log(scale_of_sizes(len(mean) + 1)[present])
    deviations = abscissa - abscissa.mean()
    weights = deviations / (deviations @ deviations)
    exponent = float(weights @ np.log(mean[present]))
    influence = weights / mean[present]
    contributions = np.array([influence @ curve[present] for curve in curves])
    return exponent, float(contributions.std(ddof=1)) / math.sqrt(len(contributions))


def checked_losses(losses: ArrayLike) -> Array:
    """Return per-sample losses as float64, shape (N,).

    Raises:
        ValueError: If there are fewer than `MIN_VALUES`, or one is not finite.
    """
    found: Array = np.asarray(losses, dtype=np.float64)
    if found.ndim != 1 or len(found) < MIN_VALUES:
        msg = f"`losses` must have shape (N,) with N at least {MIN_VALUES}, got {found.shape}."
        raise ValueError(msg)
    if not np.isfinite(found).all():
        position = int(np.argmin(np.isfinite(found)))
        msg = f"`losses` must be finite, got {found[position]} for sample {position}."
        raise ValueError(msg)
    return found


def check_orders(orders: int, seed: int) -> None:
    """Raise a ValueError unless `orders` is an integer of at least 2, and `seed` one of at least 0."""
    check_count("orders", orders, least=2)
    check_count("seed", seed, least=0)
