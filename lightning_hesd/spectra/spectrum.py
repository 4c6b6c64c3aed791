"""`Spectrum`: the immutable result of one analysis, with the criteria and densities that follow from it."""

from __future__ import annotations

import importlib
import math
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from lightning_hesd.spectra import criteria, eigenvalue_bounds, quadrature
from lightning_hesd.spectra.spectrum_density import SpectrumDensity
from lightning_hesd.spectra.validation import check_choice

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

DEFAULT_TOLERANCE = 0.05
MIN_SCALE = 1e-3
"""C_t is judged relative to its size, but never finer than relative to this: a C_t of 0 has no relative error."""

SHARE_OF_SAMPLING_ERROR = 0.25
"""More accuracy than this share of the sampling error is of no use (tolerance "auto")."""


def plotting() -> Any:
    """Return the package of figures. It is built on this one, and loaded when something is drawn."""
    return importlib.import_module("lightning_hesd.plotting")


class Spectrum(SpectrumDensity):
    """Hessian eigenvalue spectral density (HESD) at one point in weight space, with its error bounds.

    Made by `hessian_spectrum`; never edited. Curvatures are in units of the loss per squared parameter unit.
    Fields as in `SpectrumData`.
    """

    def __str__(self) -> str:
        """Return the main results in one line."""
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

    def __repr__(self) -> str:
        """Return the main results in one line: all fields would be thousands of numbers."""
        return f"<Spectrum: {self}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the main results and a figure."""
        found: str = plotting().spectrum_html(self)
        return found

    def plot(
        self,
        kind: Literal["density", "cumulative", "losses_along"] = "density",
        ax: Axes | None = None,
        title: str = "",
    ) -> Axes:
        """Draw the density, the numbers of eigenvalues beyond thresholds, or the loss along the extreme eigenvectors.

        Args:
            kind: What to draw; "losses_along" needs `loss_along_eigenvectors=True` in the analysis.
            ax: Axes to draw on; default: those of a new figure.
            title: First line of the title.

        Raises:
            ValueError: If `kind` is unknown, or the spectrum lacks what it draws.
        """
        check_choice("kind", kind, ("density", "cumulative", "losses_along"))
        draw: Callable[..., Axes] = getattr(plotting(), f"plot_{kind}")
        return draw(self, ax, title)

    # Extremes and criteria ------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Lanczos steps of the probe that took most."""
        return max(self.steps_per_probe)

    @cached_property
    def _extremes(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Smallest and largest node over all probes, each with its Ritz residual."""
        low, high = quadrature.extreme_positions(self.nodes)
        nodes, residuals = self.nodes, self.residuals
        return (float(nodes[low]), float(residuals[low])), (float(nodes[high]), float(residuals[high]))

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
        """Whether C_t, or the density, is as accurate as `tolerance` asks; C_t to 5 % where none was given."""
        if self.tolerance == "type":
            return criteria.type_certain(self.c_t_interval)
        return self.error <= self.allowed_error

    @property
    def error(self) -> float:
        """The error that `tolerance` is about: `c_t_error`, or `density_error` with `stop="density"`."""
        return self.density_error if self.stop == "density" else self.c_t_error

    @property
    def allowed_error(self) -> float:
        """Largest `error` that `tolerance` allows; 5 % of C_t where it is None or "type"."""
        if self.stop == "density":
            return self._relative_tolerance
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
