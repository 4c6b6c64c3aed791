"""The options of an analysis: their names, types, defaults, meanings and checks."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from lightning_hesd.numerics.inputs.portable import Portable
from lightning_hesd.numerics.isolation.modes import ModuleModes
from lightning_hesd.spectra.validation import check_choice, check_count

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from lightning_hesd.numerics.isolation.modes import Mode

Probe = Literal["gaussian", "rademacher"]
MatrixName = Literal["hessian", "ggn", "residual"]
StrategyName = Literal["auto", "graph", "recompute", "finite_difference"]


@dataclass(frozen=True, kw_only=True)
class AnalysisOptions:
    """The options of an analysis: of `hessian_spectrum`, `layer_spectra` and, as `**analysis`, of the callback.

    Args:
        batch_weight: `batch_weight(batch)` -> weight of the batch, positive; default: its number of samples, the
            first dimension of its tensors; a warning says where these disagree. "tokens": the number of its `labels`
            other than -100 (without the first of each row if the loss does not depend on it), or without `labels` of
            the nonzero values of its `attention_mask`. The default turns to "tokens", with a warning, where the losses
            of two chunks of a batch show that its loss is the mean over tokens and not over samples.
        batch_size: Largest number of samples to which consecutive batches are merged, because large batches take less
            time per sample; "auto": as many as pays, and as the memory allows; None: batches stay as they are. They
            are merged where one process has all of them, `mode` is "eval", and the loss of a merged batch is the mean
            of theirs, which is tested.
        steps: Lanczos steps per probe, one Hessian-vector product each; at most the number of parameters. With
            `tolerance` the largest number of steps. Default from Gabdullin (2025) and Yao et al. (2020).
        probes: Number of independent start vectors.
        seed: Seed of the start vectors and of all random numbers in the forward pass.
        tolerance: Stop as soon as the interval of C_t is narrow enough: a number for the relative accuracy (0.05:
            within 5 % of C_t, or of 0.001 where C_t is closer to zero); "type" for MP or MN to be certain; "auto" for
            a quarter of the sampling error of C_t, which is estimated on the way; without one all steps are taken, as
            with None.
        stop: What a number for `tolerance` refers to: "c_t", or "density" for the distance between the density and the
            spectrum, as a share of the spectrum's width (`Spectrum.density_error`). The latter has a lower limit,
            because a start vector is random; it is smaller for larger networks.
        confidence: Probability, over the start vectors, with which the interval of C_t holds at least.
        matrix: "hessian", or one of its two summands: "ggn", the generalized Gauss-Newton matrix Jᵀ (∂²L/∂o²) J of
            outputs o with Jacobian J, and "residual", the rest (the G-term and H-term of Kiselev & Grabovoy 2024,
            section 3.4).
        output_fn: `output_fn(module, batch)` -> outputs o: a tensor, or tensors in lists, tuples and dicts; for "ggn"
            and "residual".
        output_loss: `output_loss(outputs, batch)` -> mean loss L, the same as that of `loss_fn`, a function of the
            outputs and the batch only.
        parameters: `parameters(name, parameter)` -> whether to include it.
        include_frozen: Include parameters that do not require grad, as the loss depends on them: the spectrum of all
            weights of a network that is fine-tuned in part.
        strategy: "graph" keeps the gradient's graph (fast), "recompute" builds it anew for each product (lean),
            "finite_difference" takes central differences of the gradient (works without a second derivative; the
            error is part of the record's `rounding`). "auto" keeps the graphs of as many batches as fit into the
            memory and recomputes the rest; it takes differences only where there is no exact product. For layers of
            piecewise linear networks it also keeps Jacobians of the outputs, if they fit. An analysis that runs out of
            memory is repeated with "recompute", and if need be without a basis; `strategy_reason` says so.
        mode: Module mode during the analysis: "eval", "train", or "keep" for no change.
        probe: "gaussian" (start vectors uniform on the sphere) or "rademacher" (random signs, as the papers use).
        dtype: Floating-point type of the Lanczos vectors; default: the parameters', at least float32.
        basis: Where the Krylov basis is kept, `steps` vectors: "device", "cpu", or "none", without
            reorthogonalization. "auto": the first of these that fits.
        memory_budget: Bytes the analysis may take, beyond module and batches; default: half of the free memory.
        preconditioner: Parameter name -> positive diagonal D in the shape of the parameter, for all analyzed ones: take
            D^(-1/2) H D^(-1/2) for H, the curvature in the coordinates of an optimizer that steps along -D⁻¹g.
        sampling_error: Also estimate how much of C_t is due to the finite sample, in one more pass over it. Where the
            samples cannot be cut into 8 groups, `Spectrum.sampling_reason` says why there is no such error.
        layer_probes: Number k of further random vectors, with a Hessian-vector product each, that make the traces of
            layers in `Spectrum.by_layer` more accurate, by a factor √(1 + k).
        track_eigenvectors: Number k of leading eigenvectors whose subspace is compared with that of the previous
            analysis in the same run of a callback (`Spectrum.subspace_overlap`); k vectors stay in the computer's
            memory.
        loss_along_eigenvectors: Also evaluate the loss at 21 points along the eigenvectors of λ_min and of λ_max each
            (`Spectrum.losses_along`): 42 evaluations of all samples, without derivatives. Of the Hessian only, and not
            with `basis="none"`, as `layer_probes` and `track_eigenvectors`.

    Raises:
        ValueError: If an option is out of range, or excludes another one.
    """

    batch_weight: Literal["tokens"] | Callable[[Any], float] | None = None
    batch_size: int | Literal["auto"] | None = "auto"
    steps: int = 100
    probes: int = 1
    seed: int = 0
    tolerance: float | Literal["type", "auto"] | None = None
    stop: Literal["c_t", "density"] = "c_t"
    confidence: float = 0.95
    matrix: MatrixName = "hessian"
    output_fn: Callable[[Any, Any], Any] | None = None
    output_loss: Callable[[Any, Any], Any] | None = None
    parameters: Callable[[str, nn.Parameter], bool] | None = None
    include_frozen: bool = False
    strategy: StrategyName = "auto"
    mode: Mode | ModuleModes = "eval"
    probe: Probe = "gaussian"
    dtype: torch.dtype | None = None
    basis: Literal["auto", "device", "cpu", "none"] = "auto"
    memory_budget: int | None = None
    preconditioner: Mapping[str, Tensor] | None = None
    sampling_error: bool = False
    layer_probes: int = 0
    track_eigenvectors: int = 0
    loss_along_eigenvectors: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """Return the options, with the user's functions and tensors as `Portable`."""
        plain = (type(None), bool, int, float, str, torch.dtype)
        return {k: v if isinstance(v, plain) else Portable(k, v) for k, v in vars(self).items()}

    def __post_init__(self) -> None:
        weight: object = self.batch_weight
        if not (callable(weight) or weight in (None, "tokens")):
            msg = f'`batch_weight` must be a function of the batch, "tokens" or None, got {weight!r}.'
            raise ValueError(msg)
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size, alternative="auto")
        check_count("steps", self.steps)
        check_count("probes", self.probes)
        check_count("seed", self.seed, least=0)
        check_count("layer_probes", self.layer_probes, least=0)
        check_count("track_eigenvectors", self.track_eigenvectors, least=0)
        if not _is_share(self.confidence):
            msg = f"`confidence` must lie between 0 and 1, got {self.confidence!r}."
            raise ValueError(msg)
        if self.dtype not in (None, torch.float32, torch.float64):
            msg = f"`dtype` must be torch.float32, torch.float64 or None, got {self.dtype!r}."
            raise ValueError(msg)
        if not isinstance(self.mode, ModuleModes):
            check_choice("mode", self.mode, ("eval", "train", "keep"))
        check_choice("probe", self.probe, get_args(Probe))
        check_choice("strategy", self.strategy, get_args(StrategyName))
        check_choice("matrix", self.matrix, get_args(MatrixName))
        self._check_outputs()
        check_choice("basis", self.basis, ("auto", "device", "cpu", "none"))
        _check_preconditioner(self.preconditioner)
        self._check_tolerance()
        budget = self.memory_budget
        if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 1):
            msg = f"`memory_budget` must be a positive integer, a number of bytes, or None, got {budget!r}."
            raise ValueError(msg)

    def _check_outputs(self) -> None:
        given = {name: getattr(self, name) for name in ("output_fn", "output_loss")}
        for name, function in given.items():
            if self.matrix == "hessian" and function is not None:
                msg = f"`{name}` is for `matrix='ggn'` and `matrix='residual'`: leave it None for the Hessian."
                raise ValueError(msg)
            if self.matrix != "hessian" and not callable(function):
                msg = (
                    f"`matrix={self.matrix!r}` needs `output_fn(module, batch)` and `output_loss(outputs, batch)`, the "
                    f"two steps of the loss; `{name}` is {function!r}."
                )
                raise ValueError(msg)
        if self.matrix == "ggn" and self.strategy == "finite_difference":
            msg = "`strategy='finite_difference'` does not give `matrix='ggn'`: use 'auto', 'graph' or 'recompute'."
            raise ValueError(msg)

    def _check_tolerance(self) -> None:
        check_choice("stop", self.stop, ("c_t", "density"))
        if self.stop == "density" and not _is_share(self.tolerance):
            msg = f"`stop='density'` needs a number between 0 and 1 for `tolerance`, got {self.tolerance!r}."
            raise ValueError(msg)
        if self.tolerance in (None, "type", "auto"):
            return
        if not _is_share(self.tolerance):
            msg = f"`tolerance` must be a number between 0 and 1, 'type', 'auto' or None, got {self.tolerance!r}."
            raise ValueError(msg)
        object.__setattr__(self, "tolerance", float(self.tolerance))  # of NumPy, perhaps

    @property
    def wants_sampling_error(self) -> bool:
        """Whether the sampling error is an option, or needed to know when to stop."""
        return self.sampling_error or self.tolerance == "auto"


OPTION_NAMES = tuple(field.name for field in fields(AnalysisOptions))


def analysis_options(**given: Any) -> AnalysisOptions:
    """Return options, given some of them as keyword arguments.

    Raises:
        TypeError: If a keyword is not the name of an option.
    """
    for name in given:
        if name not in OPTION_NAMES:
            near = " or ".join(map(repr, difflib.get_close_matches(name, OPTION_NAMES)))
            msg = (
                f"unexpected keyword argument {name!r}{': did you mean ' if near else ''}{near}"
                f"{'?' if near else '.'} The options of an analysis are {', '.join(OPTION_NAMES)}."
            )
            raise TypeError(msg)
    return AnalysisOptions(**given)


def _is_share(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and 0 < float(value) < 1


def _check_preconditioner(diagonals: Mapping[str, Tensor] | None) -> None:
    if diagonals is None:
        return
    if not isinstance(diagonals, Mapping) or not all(isinstance(d, torch.Tensor) for d in diagonals.values()):
        msg = f"`preconditioner` must map names of parameters to tensors, their positive diagonals; got {diagonals!r}."
        raise ValueError(msg)
    for name, diagonal in diagonals.items():
        wrong = diagonal[~((diagonal > 0) & diagonal.isfinite())]
        if len(wrong):
            msg = f"`preconditioner[{name!r}]` must be positive and finite, got {float(wrong[0])}."
            raise ValueError(msg)
