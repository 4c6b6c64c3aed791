"""`Spectrum`: the immutable record of one analysis, and the only thing that leaves the numerics."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lightning_hesd.spectra import criteria, quadrature
from lightning_hesd.spectra.files import damage_named, read_archive, save_archive
from lightning_hesd.spectra.spectrum_fields import ARRAYS, check_rules, check_spectrum

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

DEFAULT_TOLERANCE = 0.05
MIN_SCALE = 1e-3
"""C_t is judged relative to its size, but never finer than relative to this: a C_t of 0 has no relative error."""

SHARE_OF_SAMPLING_ERROR = 0.25
"""More accuracy than this share of the sampling error is of no use (tolerance "auto")."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Hessian eigenvalue spectral density (HESD) at one point in weight space, with its error bounds.

    Made by `hessian_spectrum`; never edited. Curvatures are in units of the loss per squared parameter unit.

    Attributes:
        nodes: Quadrature nodes (Ritz values), ascending, shape (probes, steps); a probe that ended early is padded with
            NaN nodes of weight 0.
        weights: Quadrature weights, shape (probes, steps); each row sums to 1.
        residuals: An eigenvalue lies within this distance of each node, shape (probes, steps).
        steps_per_probe: Lanczos steps taken by each probe.
        dimension: Number of analysed parameters n.
        num_samples: Number of samples, whatever they weigh; of batches whose samples cannot be counted, their weight.
        loss: That mean loss.
        rounding: Eigenvalues closer to zero than this are indistinguishable from it.
        matvecs: Hessian-vector products spent, those on central differences' step and on sampling errors included.
        seconds: Duration of the analysis.
        gradient_equivalents: Time in Hessian-vector products over the time of as many plain gradients on the same
            batches, i.e. the cost of one product in gradients; None if not measured. Gradients of a millisecond or two
            count for more than they should: preparing the batch is part of them.
        matrix: Which curvature matrix ("hessian", "ggn", "residual", or "preconditioned" and one of these).
        probe: Distribution of the start vectors ("gaussian": uniform on the sphere, or "rademacher").
        seed: Seed of the start vectors.
        mode: Module mode during the analysis ("eval", "train", "keep", or "deterministic": training mode without
            dropout and without statistics of the batch).
        strategy: How the products were computed ("graph", "recompute" or "finite_difference").
        strategy_reason: Why this strategy.
        basis: Where the Krylov basis was kept ("device", "cpu" or "none").
        predicted_memory: Bytes the analysis was expected to take at most, beyond module and batches; None: unknown.
        confidence: Probability, over start vectors, with which `c_t_interval` holds at least.
        tolerance: Accuracy asked for: a number, "type" or "auto" (see `hessian_spectrum`); None: fixed steps.
        reason: Why C_t is undefined (NaN), if it is.
        verified: Whether products and gradient were found to be those of the loss: "yes", "unknown" where that cannot
            be told, or "no": then nothing was computed, and every number is NaN.
        verification: What was compared and found, in words.
        asymmetry: Largest component of a product Hv_j along earlier Lanczos vectors that a symmetric matrix does not
            have, relative to ‖T‖: rounding, in which case it is part of `rounding`. None: not known.
        c_t_sampling_error: Standard error of C_t from the finite sample; None, as all of the following, if not asked
            for.
        c_t_sampling_bias: How far C_t is expected to lie from that of infinitely many samples; not corrected for.
        lambda_min_sampling_error: Standard error of the smallest eigenvalue.
        lambda_max_sampling_error: Standard error of the largest eigenvalue.
        lambda_min_sampling_bias: Expected difference from infinitely many samples, at most 0.
        lambda_max_sampling_bias: Expected difference from infinitely many samples, at least 0.
        sampling_groups: Number of groups of samples these rest on.
    """

    nodes: NDArray[np.float64]
    weights: NDArray[np.float64]
    residuals: NDArray[np.float64]
    steps_per_probe: tuple[int, ...]
    dimension: int
    num_samples: int
    loss: float
    rounding: float
    matvecs: int
    seconds: float
    gradient_equivalents: float | None = None
    matrix: str = "hessian"
    probe: Literal["gaussian", "rademacher"] = "gaussian"
    seed: int = 0
    mode: Literal["eval", "deterministic", "train", "keep"] = "eval"
    strategy: str = "graph"
    strategy_reason: str = ""
    basis: Literal["device", "cpu", "none"] = "device"
    predicted_memory: int | None = None
    confidence: float = 0.95
    tolerance: float | Literal["type", "auto"] | None = None
    reason: str | None = None
    verified: Literal["yes", "no", "unknown"] = "unknown"
    verification: str = "not compared with differences of the loss"
    asymmetry: float | None = None
    c_t_sampling_error: float | None = None
    c_t_sampling_bias: float | None = None
    lambda_min_sampling_error: float | None = None
    lambda_max_sampling_error: float | None = None
    lambda_min_sampling_bias: float | None = None
    lambda_max_sampling_bias: float | None = None
    sampling_groups: int | None = None

    def __post_init__(self) -> None:
        for name in ARRAYS:
            array = np.array(getattr(self, name), dtype=np.float64)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        object.__setattr__(self, "steps_per_probe", tuple(int(steps) for steps in self.steps_per_probe))
        shape = self.nodes.shape
        if len(shape) != 2 or shape[0] != len(self.steps_per_probe) or 0 in shape:
            msg = f"`nodes` must have shape ({len(self.steps_per_probe)} probes, steps >= 1), got {shape}."
            raise ValueError(msg)
        for name in ARRAYS[1:]:
            if getattr(self, name).shape != shape:
                msg = f"`{name}` must have the shape of `nodes`, {shape}, got {getattr(self, name).shape}."
                raise ValueError(msg)

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
    def _lowest(self) -> tuple[int, ...]:
        # Without any node the first place, which holds NaN.
        return tuple(int(i) for i in np.unravel_index(_argmin(self.nodes), self.nodes.shape))

    @cached_property
    def _highest(self) -> tuple[int, ...]:
        return tuple(int(i) for i in np.unravel_index(_argmin(-self.nodes), self.nodes.shape))

    @property
    def lambda_min(self) -> float:
        """Smallest node over all probes; the smallest eigenvalue is no larger."""
        return float(self.nodes[self._lowest])

    @property
    def lambda_max(self) -> float:
        """Largest node over all probes; the largest eigenvalue is no smaller."""
        return float(self.nodes[self._highest])

    @property
    def lambda_min_error(self) -> float:
        """Residual bound plus rounding: an eigenvalue lies within this distance of `lambda_min`."""
        return float(self.residuals[self._lowest]) + self.rounding

    @property
    def lambda_max_error(self) -> float:
        """Residual bound plus rounding: an eigenvalue lies within this distance of `lambda_max`."""
        return float(self.residuals[self._highest]) + self.rounding

    @property
    def c_t(self) -> float:
        """C_t = min(λ_neg)/max(λ_pos) (Gabdullin 2025, eq. 1), at most 0; NaN where `reason` says why."""
        return math.nan if self.reason else criteria.c_t(self.lambda_min, self.lambda_max, self.rounding)

    @cached_property
    def extreme_bounds(self) -> tuple[float, float]:
        """Between these two all eigenvalues lie, with probability `confidence` over the start vectors.

        See `quadrature.spectrum_bounds`; rounding is on top. Proven for Gaussian probes; for Rademacher probes it takes
        eigenvectors to be spread over many parameters.
        """
        failure = (1 - self.confidence) / 2
        low, high = quadrature.spectrum_bounds(
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
        """Whether all of `c_t_interval` lies on one side of the threshold, and the products are verified."""
        return self.verified == "yes" and criteria.type_certain(self.c_t_interval)

    @property
    def converged(self) -> bool:
        """Whether C_t is as accurate as `tolerance` asks, or to 5 % where none was given."""
        if self.tolerance == "type":
            return criteria.type_certain(self.c_t_interval)
        return self.c_t_error <= self.allowed_error

    @property
    def allowed_error(self) -> float:
        """What `tolerance` amounts to in units of C_t; 5 % where it is None or "type"."""
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

        Kuczyński & Woźniakowski (1992), for any matrix of this size. It does not look at the nodes found, as
        `c_t_interval` does, and is far more pessimistic. It holds for start vectors uniform on the sphere, so None for
        "rademacher".
        """
        if self.probe != "gaussian":
            return None
        return quadrature.miss_probability(self.dimension, self.steps_per_probe, self._relative_tolerance)

    # Densities and moments ------------------------------------------------------------------------------------------

    def k_h(self, n: float = 0.5) -> float:
        """Mean over probes of K_Hn (n = 0.5: K_H05); NaN where a probe has no positive node.

        Depends on the number of steps and on the probes: see `criteria.k_h`.

        Raises:
            ValueError: If the steps were not fixed beforehand.
        """
        self._check_fixed_steps()
        return float(criteria.k_h(self.nodes, self.weights, n, self.rounding).mean())

    def k_h_error(self, n: float = 0.5) -> float | None:
        """Standard error of `k_h` over probes; None for a single probe.

        Raises:
            ValueError: If the steps were not fixed beforehand.
        """
        self._check_fixed_steps()
        return _standard_error(criteria.k_h(self.nodes, self.weights, n, self.rounding))

    def _check_fixed_steps(self) -> None:
        if self.tolerance is not None:
            msg = (
                f"K_Hn depends on the number of Lanczos steps, and with `tolerance={self.tolerance!r}` these are not "
                "fixed: analyse with `steps` and without `tolerance`."
            )
            raise ValueError(msg)

    def moment(self, k: int) -> float:
        """Estimate of trace(Hᵏ)/n, the k-th moment of the density."""
        return math.nan if self.verified == "no" else float(quadrature.moments(self.nodes, self.weights, k).mean())

    @property
    def trace(self) -> float:
        """Hutchinson's estimate of the trace, n·mean v₁ᵀHv₁: random, also when the nodes are exact."""
        return self.dimension * self.moment(1)

    @property
    def trace_error(self) -> float:
        """Standard error of `trace`, from the second moment of the same probes.

        For v uniform on the sphere Var(n·vᵀHv) = 2n/(n + 2)·(tr H² − (tr H)²/n), and the quadrature estimates both
        traces even with one probe. For Rademacher probes Var = 2(tr H² − Σ H_ii²) is at most 2 tr H², used instead.
        """
        # After a single step the rule is not exact to degree 2: ‖Hv‖² = α² + β².
        single = np.array(self.steps_per_probe) == 1
        n, second = self.dimension, self.moment(2) + float(np.where(single, self.residuals[:, 0] ** 2, 0.0).mean())
        if self.probe == "gaussian":
            variance = 2 * n**2 / (n + 2) * max(second - self.moment(1) ** 2, 0.0)
        else:
            variance = 2 * n * second
        return math.sqrt(variance / len(self.nodes))

    def density(
        self, grid: ArrayLike | None = None, sigma: float | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (grid, density), each of shape (points,); the density integrates to 1. See `quadrature.density`.

        Raises:
            ValueError: If there is none, as products were not those of the loss.
        """
        self._check_computed()
        return quadrature.density(self.nodes, self.weights, grid, sigma)

    def histogram(self, bins: int | ArrayLike = 120) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (mass, edges), shapes (bins,) and (bins + 1,); the mass sums to 1. See `quadrature.histogram`.

        Raises:
            ValueError: If there is none, as products were not those of the loss.
        """
        self._check_computed()
        return quadrature.histogram(self.nodes, self.weights, bins)

    def _check_computed(self) -> None:
        if self.verified == "no":
            msg = f"there is no density, because nothing was computed: {self.reason}."
            raise ValueError(msg)

    # Storage --------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the fields: arrays as NumPy arrays, everything else as plain Python values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Spectrum:
        """Return the spectrum of `to_dict`, from a file or a checkpoint, which may be of unknown origin.

        Raises:
            ValueError: If a field is missing, is unknown or is invalid.
        """
        check_spectrum(values)
        spectrum = cls(**values)
        check_rules(spectrum.nodes, spectrum.weights, spectrum.residuals, spectrum.steps_per_probe)
        return spectrum

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the spectrum to `path` as .npz: arrays and one JSON text, no pickle.

        The file appears whole or not at all.
        """
        values = self.to_dict()
        arrays = {name: values.pop(name) for name in ARRAYS}
        save_archive(path, values, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Spectrum:
        """Read a spectrum that `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a spectrum, is damaged, or was written by a newer version.
        """
        kind = "a spectrum written by `Spectrum.save`"
        header, arrays = read_archive(path, kind)
        with damage_named(path, kind):
            return cls.from_dict({**header, **arrays})


def _argmin(values: NDArray[np.float64]) -> int:
    return int(np.argmin(np.where(np.isnan(values), np.inf, values)))


def _standard_error(values: NDArray[np.float64]) -> float | None:
    if len(values) < 2:
        return None
    return float(values.std(ddof=1) / math.sqrt(len(values)))
