"""`Spectrum`: the immutable result of one analysis, with the criteria and densities that follow from it."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from lightning_hesd.spectra import counts, criteria, deflation, eigenvalue_bounds, quadrature
from lightning_hesd.spectra.spectrum_data import SpectrumData

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

DEFAULT_TOLERANCE = 0.05
MIN_SCALE = 1e-3
"""C_t is judged relative to its size, but never finer than relative to this: a C_t of 0 has no relative error."""

SHARE_OF_SAMPLING_ERROR = 0.25
"""More accuracy than this share of the sampling error is of no use (tolerance "auto")."""


class Spectrum(SpectrumData):
    """Hessian eigenvalue spectral density (HESD) at one point in weight space, with its error bounds.

    Made by `hessian_spectrum`; never edited. Curvatures are in units of the loss per squared parameter unit.
    Fields as in `SpectrumData`.
    """

    def __str__(self) -> str:
        """Return the main findings in one line."""
        if self.verified == "no":
            return f"no spectrum: {self.reason}"
        low, high = self.c_t_interval
        sampling = "" if self.c_t_sampling_error is None else f" ± {self.c_t_sampling_error:.2g} (sampling)"
        mode = "" if self.mode == "eval" else f" in mode {self.mode!r}"
        return (
            f"C_t = {self.c_t:.4g} [{low:.4g}, {high:.4g}]{sampling}, type {self.hesd_type}, largest eigenvalue "
            f"{self.lambda_max:.4g}, loss {self.loss:.4g}{mode} ({self.num_samples} samples, {self.matvecs} products, "
            f"{self.seconds:.1f} s){'' if self.verified == 'yes' else f'; not verified: {self.verification}'}"
        )

    @property
    def reorthogonalized(self) -> bool:
        """Whether the Krylov basis was kept orthogonal, so that no node is a ghost (a copy of a converged one)."""
        return self.basis != "none"

    # Extremes and criteria ------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Lanczos steps of the probe that took most."""
        return max(self.steps_per_probe)

    @cached_property
    def _extremes(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Smallest and largest node over all probes, each with its Ritz residual."""
        low, high = quadrature.extreme_positions(self.nodes)
        (low_node, low_residual), (high_node, high_residual) = (
            (float(self.nodes[at]), float(self.residuals[at])) for at in (low, high)
        )
        return (low_node, low_residual), (high_node, high_residual)

    @property
    def lambda_min(self) -> float:
        """Smallest node over all probes; the smallest eigenvalue is no larger."""
        return self._extremes[0][0]

    @property
    def lambda_max(self) -> float:
        """Largest node over all probes; the largest eigenvalue is no smaller."""
        return self._extremes[1][0]

    @property
    def lambda_min_error(self) -> float:
        """Ritz residual plus rounding: an eigenvalue lies within this distance of `lambda_min`."""
        return self._extremes[0][1] + self.rounding

    @property
    def lambda_max_error(self) -> float:
        """Ritz residual plus rounding: an eigenvalue lies within this distance of `lambda_max`."""
        return self._extremes[1][1] + self.rounding

    @property
    def c_t(self) -> float:
        """C_t = min(λ_neg)/max(λ_pos) (Gabdullin 2025, eq. 1), at most 0; NaN where `reason` says why."""
        return math.nan if self.reason else criteria.c_t(self.lambda_min, self.lambda_max, self.rounding)

    @cached_property
    def extreme_bounds(self) -> tuple[float, float]:
        """(low, high) that enclose all eigenvalues, with probability `confidence` over the start vectors.

        See `eigenvalue_bounds.spectrum_bounds`; rounding is on top. Proven for Gaussian probes; for Rademacher probes
        it requires eigenvectors that are spread over many parameters.
        """
        failure = (1 - self.confidence) / 2
        low, high = eigenvalue_bounds.spectrum_bounds(
            self.nodes, self.weights, self.residuals, dimension=self.dimension, failure=failure
        )
        return low - self.rounding, high + self.rounding

    @property
    def c_t_interval(self) -> tuple[float, float]:
        """(low, high) that contains the C_t of these samples with probability `confidence` over the start vectors.

        (NaN, NaN) where C_t is undefined. It says nothing of other samples: see `c_t_sampling_error`.
        """
        if self.reason:
            return math.nan, math.nan
        low, high = self.extreme_bounds
        return criteria.c_t_interval(
            self.lambda_min, self.lambda_max, self.lambda_min - low, high - self.lambda_max, self.rounding
        )

    @property
    def c_t_error(self) -> float:
        """Distance from `c_t` to the farther end of `c_t_interval`; NaN where C_t is undefined."""
        low, high = self.c_t_interval
        return 0.0 if low == high else max(self.c_t - low, high - self.c_t)

    @property
    def c_t_total_error(self) -> float | None:
        """`c_t_error` plus `c_t_sampling_error`; None without the latter."""
        return None if self.c_t_sampling_error is None else self.c_t_error + self.c_t_sampling_error

    @property
    def hesd_type(self) -> criteria.HesdType | None:
        """The type by the point value of C_t (eq. 2), "MP" or "MN"; None where C_t is undefined."""
        return None if math.isnan(self.c_t) else criteria.hesd_type(self.c_t)

    @property
    def type_certain(self) -> bool:
        """Whether all of `c_t_interval` lies on one side of the threshold, and the HVPs are verified."""
        return self.verified == "yes" and criteria.type_certain(self.c_t_interval)

    @property
    def converged(self) -> bool:
        """Whether C_t is as accurate as `tolerance` asks, or to 5 % where none was given."""
        if self.tolerance == "type":
            return criteria.type_certain(self.c_t_interval)
        return self.c_t_error <= self.allowed_error

    @property
    def allowed_error(self) -> float:
        """`tolerance` in units of C_t; 5 % where it is None or "type"."""
        if self.tolerance == "auto":
            return SHARE_OF_SAMPLING_ERROR * (self.c_t_sampling_error or 0.0)
        return self._relative_tolerance * max(abs(self.c_t), MIN_SCALE)

    @property
    def _relative_tolerance(self) -> float:
        return self.tolerance if isinstance(self.tolerance, float) else DEFAULT_TOLERANCE

    @property
    def r_e(self) -> float:
        """r_e = -C_t (arXiv:2412.10146)."""
        return criteria.r_e(self.c_t)

    @property
    def miss_probability(self) -> float | None:
        """Bound on the probability of missing an extreme by more than `tolerance` (or 0.05) of the width.

        Kuczyński & Woźniakowski (1992), for any matrix of this size. Unlike `c_t_interval` it ignores the nodes found,
        and is far more pessimistic. It holds for start vectors uniform on the sphere, so None for "rademacher".
        """
        if self.probe != "gaussian":
            return None
        return eigenvalue_bounds.miss_probability(self.dimension, self.steps_per_probe, self._relative_tolerance)

    # Densities and moments ------------------------------------------------------------------------------------------

    def k_h(self, n: float = 0.5) -> float:
        """Mean over probes of K_Hn (n = 0.5: K_H05); NaN where a probe has no positive node.

        Depends on the number of steps and on the probes: see `criteria.k_h`.

        Raises:
            ValueError: If the steps were not fixed beforehand.
        """
        return float(self._k_h_of_probes(n).mean())

    def k_h_error(self, n: float = 0.5) -> float | None:
        """Standard error of `k_h` over probes; None for a single probe.

        Raises:
            ValueError: If the steps were not fixed beforehand.
        """
        values = self._k_h_of_probes(n)
        return None if len(values) < 2 else float(values.std(ddof=1) / math.sqrt(len(values)))

    def _k_h_of_probes(self, n: float) -> NDArray[np.float64]:
        if self.tolerance is not None:
            msg = (
                f"K_Hn depends on the number of Lanczos steps, and with `tolerance={self.tolerance!r}` these are not "
                "fixed: analyze with `steps` and without `tolerance`."
            )
            raise ValueError(msg)
        return criteria.k_h(self.nodes, self.weights, n, self.rounding)

    @cached_property
    def converged_nodes(self) -> NDArray[np.bool_]:
        """Which nodes are known to be simple eigenvalues, shape (probes, steps); see `deflation.converged_nodes`.

        None without a Krylov basis, because the copies of a converged node are not eigenvalues then.
        """
        if not self.reorthogonalized:
            return np.zeros(self.nodes.shape, dtype=bool)
        return deflation.converged_nodes(self.nodes, self.weights, self.residuals, self.dimension, self.rounding)

    @cached_property
    def density_weights(self) -> NDArray[np.float64]:
        """Weights of the nodes in densities, histograms and moments, shape (probes, steps); each row sums to 1.

        Converged nodes have the weight 1/n, and the others share the rest by their quadrature weights: deflated
        stochastic Lanczos quadrature.
        """
        return deflation.deflated_weights(self.weights, self.converged_nodes, self.dimension)

    def moment(self, k: int) -> float:
        """Estimate of trace(Hᵏ)/n, the k-th moment of the density."""
        return (
            math.nan if self.verified == "no" else float(quadrature.moments(self.nodes, self.density_weights, k).mean())
        )

    @property
    def trace(self) -> float:
        """Estimate of the trace: the sum of the converged nodes, and Hutchinson's estimate of the rest, n·mean v₁ᵀHv₁.

        The latter is random, also where the nodes are exact.
        """
        return self.dimension * self.moment(1)

    @property
    def trace_error(self) -> float:
        """Standard error of `trace`, from the second moment of the same probes; see `deflation.trace_error`."""
        if self.verified == "no":
            return math.nan
        return deflation.trace_error(
            self.nodes,
            self.weights,
            self.residuals,
            self.converged_nodes,
            dimension=self.dimension,
            rounding=self.rounding,
            on_sphere=self.probe == "gaussian",
        )

    def density(
        self, grid: ArrayLike | None = None, sigma: float | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (grid, density), each of shape (points,); the density integrates to 1. See `quadrature.density`.

        Raises:
            ValueError: If nothing was computed, because HVPs were not those of the loss.
        """
        self._check_computed()
        return quadrature.density(self.nodes, self.density_weights, grid, sigma)

    def histogram(self, bins: int | ArrayLike = 120) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (mass, edges), shapes (bins,) and (bins + 1,); the mass sums to 1. See `quadrature.histogram`.

        Raises:
            ValueError: If nothing was computed, because HVPs were not those of the loss.
        """
        self._check_computed()
        return quadrature.histogram(self.nodes, self.density_weights, bins)

    # Numbers of eigenvalues -----------------------------------------------------------------------------------------

    def count(self, above: float = -math.inf, below: float = math.inf) -> tuple[int, int]:
        """Bound the number of eigenvalues between two thresholds, which do not depend on the result.

        Converged nodes count exactly; the number of the others follows from the share of the start vector along them,
        with probability `confidence` (see `counts`). Proven for Gaussian probes; for Rademacher probes it requires
        eigenvectors that are spread over many parameters. Without a Krylov basis no node counts exactly.

        Args:
            above: Eigenvalues count if they are larger than this.
            below: Eigenvalues count if they are at most this. Eigenvalues within `rounding` of a threshold may count or
                not: thresholds should be farther from zero, where many eigenvalues may be.

        Returns:
            The least and the largest number.

        Raises:
            ValueError: If `above` is not less than `below`, or nothing was computed, because HVPs were not those of the
                loss.
        """
        self._check_computed()
        if not above < below:
            msg = f"`above` must be less than `below`, got {above} and {below}."
            raise ValueError(msg)
        return counts.count_between(self._rules, above, below, 1 - self.confidence)

    @property
    def negative_count(self) -> tuple[int, int]:
        """Bounds on the number of negative eigenvalues, those below -`rounding`: see `count`."""
        return self.count(below=-self.rounding)

    @cached_property
    def cumulative_band(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """A band that all of the cumulative distribution of the eigenvalues is within, with probability `confidence`.

        Points, ascending, and the least and the largest share of eigenvalues from each point to the next, each of shape
        (points,); see `counts.cumulative_band`.

        Raises:
            ValueError: If nothing was computed, because HVPs were not those of the loss.
        """
        self._check_computed()
        failure = (1 - self.confidence) / 2  # the other half is that of the ends
        ends = eigenvalue_bounds.spectrum_bounds(
            self.nodes, self.weights, self.residuals, dimension=self.dimension, failure=failure / 2
        )
        return counts.cumulative_band(self._rules, *ends, failure)

    @cached_property
    def density_error(self) -> float:
        """Bound on the Wasserstein-1 distance of the density from the spectrum, as a share of the spectrum's width.

        The distance is the area between the two cumulative distributions; the bound is what `cumulative_band` allows.

        Raises:
            ValueError: If nothing was computed, because HVPs were not those of the loss.
        """
        points, low, high = self.cumulative_band
        width = float(points[-1] - points[0])
        area = counts.largest_distance(points, low, high, self.nodes, self.density_weights / len(self.nodes))
        return area / width if width > 32 * self.rounding else 0.0  # all eigenvalues are equal up to rounding

    @cached_property
    def _rules(self) -> list[counts.Rule]:
        return counts.rules(
            self.nodes,
            self.weights,
            self.residuals,
            self.converged_nodes,
            dimension=self.dimension,
            rounding=self.rounding,
        )

    def _check_computed(self) -> None:
        if self.verified == "no":
            msg = f"there is no density, because nothing was computed: {self.reason}."
            raise ValueError(msg)
