"""`SpectrumDensity`: the spectral density of one analysis, its moments, and numbers of eigenvalues."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from lightning_hesd.spectra import counts, deflation, distribution, eigenvalue_bounds, quadrature
from lightning_hesd.spectra.spectrum_data import SpectrumData

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class SpectrumDensity(SpectrumData):
    """The density of a spectrum. `Spectrum` adds its extremes and the criteria. Fields as in `SpectrumData`."""

    @property
    def reorthogonalized(self) -> bool:
        """Whether the Krylov basis was kept orthogonal, so that no node is a ghost (a copy of a converged one)."""
        return self.basis != "none"

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
        """Weights of the nodes in the distribution and in moments, shape (probes, steps); each row sums to 1.

        Converged nodes have the weight 1/n, and the others share the rest by their quadrature weights: deflated
        stochastic Lanczos quadrature.
        """
        return deflation.deflated_weights(self.weights, self.converged_nodes, self.dimension)

    @cached_property
    def distribution(self) -> distribution.Distribution:
        """The estimate of the distribution that `density` and `histogram` show; see the module `distribution`."""
        return distribution.spread(self.nodes, self.density_weights, self.residuals, self.converged_nodes)

    def moment(self, k: int) -> float:
        """Estimate of trace(Hᵏ)/n by quadrature, which is exact for the start vector up to degree 2·steps − 1."""
        if self.verified == "no":
            return math.nan
        return float(quadrature.moments(self.nodes, self.density_weights, k).mean())

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
        """Return (grid, density), each of shape (points,); the density integrates to 1. See `Distribution.density`.

        Raises:
            ValueError: If nothing was computed, because HVPs were not those of the loss.
        """
        self._check_computed()
        return self.distribution.density(grid, sigma)

    def histogram(self, bins: int | ArrayLike = 120) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (mass, edges), shapes (bins,) and (bins + 1,); the mass sums to 1. See `Distribution.histogram`.

        Raises:
            ValueError: If nothing was computed, because HVPs were not those of the loss.
        """
        self._check_computed()
        return self.distribution.histogram(bins)

    # Numbers of eigenvalues -----------------------------------------------------------------------------------------

    def count(self, above: float = -math.inf, below: float = math.inf) -> tuple[int, int]:
        """Bound the number of eigenvalues between two thresholds, which do not depend on the result.

        Converged nodes count exactly; the number of the others follows from the share of the start vector along them,
        with probability `confidence` (see `counts`). Proven for Gaussian probes if the converged nodes are simple
        eigenvalues; for Rademacher probes it also requires eigenvectors that are spread over many parameters.

        A Lanczos run meets an eigenvalue that occurs k times, as in an ensemble of k equal networks, only once, and so
        does that of each further probe. A test finds most of these cases, and then no node counts exactly; in the
        others the eigenvalue is counted once, and the number may be above the interval. The more steps, the surer is
        the test. Without a Krylov basis (`basis="none"`) no node counts exactly: the interval is wider, and holds.

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

    @cached_property
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
        area = self.distribution.largest_distance(points, low, high)
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
