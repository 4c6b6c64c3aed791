"""The options of an analysis, checked in one place for `hessian_spectrum` and the callback alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightning_hesd.numerics.inputs.portable import Portable
from lightning_hesd.numerics.isolation.modes import ModuleModes
from lightning_hesd.spectra.checks import check_count

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from lightning_hesd.numerics.inputs.batches import Weigh
    from lightning_hesd.numerics.isolation.modes import Mode

Probe = Literal["gaussian", "rademacher"]


@dataclass(frozen=True)
class AnalysisOptions:
    """The options of `hessian_spectrum`, checked; their meaning and defaults are documented there."""

    batch_weight: Weigh | None
    steps: int
    probes: int
    seed: int
    tolerance: float | Literal["type", "auto"] | None
    confidence: float
    matrix: Literal["hessian", "ggn", "residual"]
    output_fn: Callable[[Any, Any], Any] | None
    output_loss: Callable[[Any, Any], Tensor] | None
    parameters: Callable[[str, nn.Parameter], bool] | None
    include_frozen: bool
    strategy: Literal["auto", "graph", "recompute", "finite_difference"]
    mode: Mode | ModuleModes
    probe: Probe
    dtype: torch.dtype | None
    basis: Literal["auto", "device", "cpu", "none"]
    memory_budget: int | None
    preconditioner: Mapping[str, Tensor] | None
    sampling_error: bool

    def __getstate__(self) -> dict[str, Any]:
        """Return the options, those that are objects of the user as `Portable`."""
        plain = (type(None), bool, int, float, str, torch.dtype)
        return {k: v if isinstance(v, plain) else Portable(k, v) for k, v in vars(self).items()}

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            ValueError: If one is out of range or not available in this version.
        """
        weight: object = self.batch_weight
        if not (callable(weight) or weight in (None, "tokens")):
            msg = f'`batch_weight` must be a function of the batch, "tokens" or None, got {weight!r}.'
            raise ValueError(msg)
        check_count("steps", self.steps)
        check_count("probes", self.probes)
        check_count("seed", self.seed, least=0)
        if not _is_share(self.confidence):
            msg = f"`confidence` must lie between 0 and 1, got {self.confidence!r}."
            raise ValueError(msg)
        if self.dtype not in (None, torch.float32, torch.float64):
            msg = f"`dtype` must be torch.float32, torch.float64 or None, got {self.dtype!r}."
            raise ValueError(msg)
        if not isinstance(self.mode, ModuleModes):
            _check_choice("mode", self.mode, ("eval", "train", "keep"))
        _check_choice("probe", self.probe, ("gaussian", "rademacher"))
        _check_choice("strategy", self.strategy, ("auto", "graph", "recompute", "finite_difference"), ("linearize",))
        _check_choice("matrix", self.matrix, ("hessian", "ggn", "residual"))
        self._check_outputs()
        _check_choice("basis", self.basis, ("auto", "device", "cpu", "none"))
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
        if self.tolerance in (None, "type", "auto"):
            return
        if not _is_share(self.tolerance):
            msg = f"`tolerance` must be a number between 0 and 1, 'type', 'auto' or None, got {self.tolerance!r}."
            raise ValueError(msg)
        object.__setattr__(self, "tolerance", float(self.tolerance))  # of NumPy, perhaps

    @property
    def wants_sampling_error(self) -> bool:
        """Whether it is asked for, or needed to know when to stop."""
        return self.sampling_error or self.tolerance == "auto"


def _is_share(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and 0 < float(value) < 1


OPTION_NAMES = tuple(field.name for field in fields(AnalysisOptions))


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


def _check_choice(name: str, value: object, choices: Sequence[str], later: Sequence[str] = ()) -> None:
    if value in choices:
        return
    offered = " or ".join(repr(choice) for choice in choices)
    if value in later:
        msg = f"`{name}={value!r}` is not available in this version: use {offered}."
    else:
        msg = f"`{name}` must be {offered}, got {value!r}."
    raise ValueError(msg)
