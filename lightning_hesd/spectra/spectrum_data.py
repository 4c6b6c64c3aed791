"""`SpectrumData`: the numbers of one analysis, their checks, and their storage."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lightning_hesd.spectra.files import damage_named, read_archive, save_archive
from lightning_hesd.spectra.layer_curvature import NUMBERS, LayerCurvature
from lightning_hesd.spectra.validation import at_least, check_fields, each, number, of, optional, text, within

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from typing_extensions import Self

    from lightning_hesd.spectra.validation import Check

ARRAYS = ("nodes", "weights", "residuals")
"""The fields that are arrays."""

EXTRA_ARRAYS = {"group_curvatures": (3,), "resampled_extremes": (2,), "losses_along": (2, 2)}
"""Fields that are arrays, empty if they were not asked for, with their shapes but for the last dimension."""

STORED_ARRAYS = (*ARRAYS, "layer_numbers", *EXTRA_ARRAYS)
"""The arrays of `SpectrumData.to_dict`."""

MAX_SIZE = 1e150
"""Largest absolute value of a node, so that its square is finite."""

SAMPLING = (
    *("c_t_sampling_error", "c_t_sampling_bias", "lambda_min_sampling_error", "lambda_max_sampling_error"),
    *("lambda_min_sampling_bias", "lambda_max_sampling_bias"),
)

REQUIRED: dict[str, Check] = {
    **dict.fromkeys(ARRAYS, of(np.ndarray)),
    "steps_per_probe": each(at_least(0)),
    "dimension": at_least(1),
    "num_samples": at_least(0),
    "loss": number,
    "rounding": within(0.0, MAX_SIZE),
    "matvecs": at_least(0),
    "seconds": number,
}
OPTIONAL: dict[str, Check] = {
    **dict.fromkeys(("matrix", "probe", "mode", "strategy", "strategy_reason", "basis", "architecture"), text),
    "seed": of(int),
    "confidence": within(1e-9, 1 - 1e-9),
    "tolerance": optional(lambda value: value in {"type", "auto"} if text(value) else within(0.0, MAX_SIZE)(value)),
    "stop": lambda value: text(value) and value in {"c_t", "density"},
    **dict.fromkeys(("reason", "sampling_reason"), optional(text)),
    "verified": lambda value: text(value) and value in {"yes", "no", "unknown"},
    "verification": text,
    **dict.fromkeys(("predicted_memory", "sampling_groups"), optional(at_least(0))),
    "layer_names": each(text),
    **dict.fromkeys(("layer_numbers", *EXTRA_ARRAYS), of(np.ndarray)),
    "subspace_overlap": optional(number),
    **dict.fromkeys(("asymmetry", "gradient_equivalents", "squared_weight_norm", *SAMPLING), optional(number)),
}


def check_spectrum(values: Mapping[str, Any]) -> None:
    """Check the fields of a spectrum by name, each by itself.

    Raises:
        ValueError: If a field is missing, is unknown, or has another kind of value.
    """
    given = {name: check for name, check in OPTIONAL.items() if name in values}
    check_fields(values, {**REQUIRED, **given}, "a spectrum")
    unknown = set(values) - set(REQUIRED) - set(OPTIONAL)
    if unknown:
        msg = f"a spectrum has no field {min(map(str, unknown))!r:.80}"
        raise ValueError(msg)


def check_rules(nodes: Any, weights: Any, residuals: Any, steps_per_probe: tuple[int, ...]) -> None:
    """Check that arrays of shape (probes, steps) are quadrature rules with so many nodes.

    Raises:
        ValueError: If they are not.
    """
    present = ~np.isnan(nodes)
    conditions = (
        present.sum(axis=1) == steps_per_probe,
        present[:, :-1] >= present[:, 1:],  # the padding comes last
        np.abs(nodes[present]) <= MAX_SIZE,
        weights >= 0,
        np.abs(weights.sum(axis=1) - np.minimum(steps_per_probe, 1)) <= 1e-6,
        (residuals >= 0) & (residuals <= MAX_SIZE),
    )
    if not all(np.all(condition) for condition in conditions):
        msg = "its nodes, weights and residuals are no quadrature rules of so many steps"
        raise ValueError(msg)


@dataclass(frozen=True, eq=False)
class SpectrumData:
    """The numbers of one analysis. `Spectrum` adds the quantities that follow from them.

    Attributes:
        nodes: Quadrature nodes (Ritz values), ascending, shape (probes, steps); a probe that ended early is padded with
            NaN nodes of weight 0.
        weights: Quadrature weights, shape (probes, steps); each row sums to 1.
        residuals: Ritz residual of each node, shape (probes, steps): an eigenvalue lies within this distance.
        steps_per_probe: Lanczos steps taken by each probe.
        dimension: Number of analyzed parameters n.
        num_samples: Number of samples, whatever their weight; of batches whose samples cannot be counted, their weight.
        loss: Mean loss over these samples.
        rounding: Size below which an eigenvalue cannot be told from zero.
        matvecs: Number of HVPs, including those for the step of central differences and for sampling errors.
        seconds: Duration of the analysis.
        gradient_equivalents: Cost of one HVP in plain gradients on the same batches, by time; None if not measured, as
            after fewer than 60 HVPs, where timing a gradient would take more than 1 % of the time. Gradients of a
            millisecond or two count for more than they should: preparing the batch is part of them.
        matrix: Curvature matrix ("hessian", "ggn", "residual", or "preconditioned" and one of these).
        probe: Distribution of the start vectors ("gaussian": uniform on the sphere, or "rademacher").
        seed: Seed of the start vectors.
        mode: Module mode during the analysis ("eval", "train", "keep", or "deterministic": training mode without
            dropout and without batch statistics).
        strategy: HVP strategy ("graph", "recompute" or "finite_difference").
        strategy_reason: Reason for this strategy.
        basis: Device of the Krylov basis ("device", "cpu" or "none").
        predicted_memory: Bytes the analysis was expected to take at most, beyond module and batches; None: unknown.
        confidence: Least probability, over start vectors, with which `c_t_interval` holds.
        tolerance: Requested accuracy: a number, "type" or "auto" (see `AnalysisOptions`); None: fixed steps.
        stop: Quantity that a number for `tolerance` refers to: "c_t" or "density".
        reason: Reason why C_t is undefined (NaN); None where it is defined.
        verified: Whether HVPs and gradient were found to be those of the loss: "yes", "unknown" where that cannot be
            told, or "no": then nothing was computed, and every number is NaN.
        verification: Comparison behind `verified` and its result, in words.
        asymmetry: Largest component of a product Hv_j along earlier Lanczos vectors that a symmetric matrix does not
            have, relative to ‖T‖: rounding, in which case it is part of `rounding`. None: not known.
        sampling_reason: Reason why there are no sampling errors although they were asked for; None otherwise.
        c_t_sampling_error: Standard error of C_t from the finite sample; None, as all of the following, if not asked
            for, or if there is a `sampling_reason`.
        c_t_sampling_bias: Expected difference of C_t from that of infinitely many samples; not corrected for.
        lambda_min_sampling_error: Standard error of the smallest eigenvalue.
        lambda_max_sampling_error: Standard error of the largest eigenvalue.
        lambda_min_sampling_bias: Expected difference from infinitely many samples, at most 0.
        lambda_max_sampling_bias: Expected difference from infinitely many samples, at least 0.
        sampling_groups: Number of groups of samples that the sampling errors rest on.
        group_curvatures: Share of each group of samples in the mean loss, and uᵀH_g u with the group's Hessian H_g and
            the eigenvectors u of the smallest and of the largest eigenvalue, shape (3, groups); no groups without a
            sampling error.
        resampled_extremes: Smallest and largest eigenvalue for resampled groups of samples, shape (2, resamples), the
            same resamples in every analysis: those of two analyses of the same samples tell how well the difference is
            known. None without a sampling error.
        squared_weight_norm: Squared Euclidean norm of the analyzed parameters, in the coordinates of the preconditioner
            if there is one; None: unknown.
        subspace_overlap: Overlap of the span of the leading eigenvectors with that of the previous analysis, from 0
            (orthogonal) to 1 (the same); None if eigenvectors are not tracked (`track_eigenvectors`), or at first.
        losses_along: Mean loss along the unit eigenvectors of λ_min and of λ_max: for each of the two the distances t
            from the weights, ascending, and the losses there, shape (2, 2, points); no points if not asked for
            (`loss_along_eigenvectors`). Near t = 0 the losses are L + st + ½λt² with a slope s ≤ 0.
        architecture: Kind of the network by the kinds of its modules: "perceptron", "convolution", "attention",
            "other", or "part" where some parameters are not analyzed; empty: unknown.
        by_layer: Curvature of each layer, by name, as it follows from this analysis of the whole matrix; empty without
            a Krylov basis, and for a layer's own spectrum.
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
    stop: Literal["c_t", "density"] = "c_t"
    reason: str | None = None
    verified: Literal["yes", "no", "unknown"] = "unknown"
    verification: str = "not compared with differences of the loss"
    asymmetry: float | None = None
    sampling_reason: str | None = None
    c_t_sampling_error: float | None = None
    c_t_sampling_bias: float | None = None
    lambda_min_sampling_error: float | None = None
    lambda_max_sampling_error: float | None = None
    lambda_min_sampling_bias: float | None = None
    lambda_max_sampling_bias: float | None = None
    sampling_groups: int | None = None
    group_curvatures: NDArray[np.float64] = field(default_factory=partial(np.empty, (3, 0)))
    resampled_extremes: NDArray[np.float64] = field(default_factory=partial(np.empty, (2, 0)))
    squared_weight_norm: float | None = None
    subspace_overlap: float | None = None
    losses_along: NDArray[np.float64] = field(default_factory=partial(np.empty, (2, 2, 0)))
    architecture: str = ""
    by_layer: Mapping[str, LayerCurvature] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*ARRAYS, *EXTRA_ARRAYS):
            array = np.array(getattr(self, name), dtype=np.float64)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        object.__setattr__(self, "steps_per_probe", tuple(int(steps) for steps in self.steps_per_probe))
        shape, probes = self.nodes.shape, len(self.steps_per_probe)
        if len(shape) != 2 or shape[0] != probes or 0 in shape:
            msg = f"`nodes` must have shape ({probes} probes, steps >= 1), got {shape}."
            raise ValueError(msg)
        for name in ARRAYS[1:]:
            if getattr(self, name).shape != shape:
                msg = f"`{name}` must have the shape of `nodes`, {shape}, got {getattr(self, name).shape}."
                raise ValueError(msg)
        for name, leading in EXTRA_ARRAYS.items():
            shape = getattr(self, name).shape
            if len(shape) != len(leading) + 1 or shape[:-1] != leading:
                expected = ", ".join(map(str, leading))
                msg = f"`{name}` must have shape ({expected}, any number), got {shape}."
                raise ValueError(msg)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields: arrays as NumPy arrays, everything else as plain Python values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        layers = values.pop("by_layer")
        numbers = np.array([layer.numbers for layer in layers.values()]).reshape(len(layers), NUMBERS)
        return {**values, "layer_names": list(layers), "layer_numbers": numbers}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the spectrum of `to_dict`, from a file or a checkpoint, which may be of unknown origin.

        Raises:
            ValueError: If a field is missing, is unknown or is invalid.
        """
        check_spectrum(values)
        plain = dict(values)
        names, numbers = plain.pop("layer_names", []), plain.pop("layer_numbers", np.empty((0, NUMBERS)))
        if numbers.shape != (len(names), NUMBERS):
            msg = f"`layer_numbers` must have shape ({len(names)} layers, {NUMBERS}), got {numbers.shape}"
            raise ValueError(msg)
        by_layer = {name: LayerCurvature.of_numbers(row) for name, row in zip(names, numbers, strict=True)}
        spectrum = cls(**plain, by_layer=by_layer)
        check_rules(spectrum.nodes, spectrum.weights, spectrum.residuals, spectrum.steps_per_probe)
        return spectrum

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the spectrum to `path` as .npz: arrays and one JSON text, no pickle.

        The file appears whole or not at all.
        """
        values = self.to_dict()
        arrays = {name: values.pop(name) for name in STORED_ARRAYS}
        save_archive(path, values, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a spectrum that `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a spectrum, is damaged, or was written by a newer version.
        """
        kind = "a spectrum written by `Spectrum.save`"
        header, arrays = read_archive(path, kind)
        with damage_named(path, kind):
            return cls.from_dict({**header, **arrays})
