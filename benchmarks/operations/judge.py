"""Compare the analysis of an operation with differences of the loss."""

from __future__ import annotations

import contextlib
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_hesd import hessian_spectrum
from lightning_hesd.numerics.derivatives.compositions import (
    WRONG_FORWARD_DERIVATIVE,
    WRONG_SECOND_DERIVATIVE,
    WRONG_THIRD_DERIVATIVE,
)
from lightning_hesd.numerics.isolation.exact_mode import exact_mode
from lightning_hesd.numerics.krylov.vectors import VectorSpace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.operations.case import Case
    from lightning_hesd import Spectrum

Setting = Literal["loss", "gradient penalty", "directional derivative"]
"""Losses with the operation; the last two contain its derivative, in reverse and in forward mode."""

SETTINGS: tuple[Setting, ...] = get_args(Setting)

Outcome = Literal["exact", "differences", "unverified", "refused", "wrong", "no loss", "kink"]

PROBES = 3

STEP = 3e-3
"""Length of the steps of differences, for arguments of size one; extrapolated with steps of twice the length."""

ACCURACY = 1e-5
"""Relative accuracy of differences of such steps in float64."""

KINK = 1e-2
"""Relative change between the two steps that shows a kink: smooth operations have a far smaller one."""


class Problem(nn.Module):
    """An operation whose arguments are parameters."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.operation = case.make()
        self.arguments = nn.ParameterList(case.arguments())
        self.double().train(case.mode == "train")

    def value(self, first: Tensor) -> Tensor:
        """Return a scalar with curvature, given the first argument."""
        torch.manual_seed(0)  # for operations that are random
        parts = [torch.view_as_real(p.resolve_conj()) if p.is_complex() else p for p in self._outputs(first)]
        outputs = torch.cat([p.flatten() for p in parts if p.is_floating_point()])
        weights = torch.linspace(-1, 1.7, len(outputs), dtype=outputs.dtype)
        return (outputs * weights).sum() + 0.25 * outputs.square().sum()

    def _outputs(self, first: Tensor) -> list[Any]:
        return [p for p in tree_leaves(self.operation(first, *list(self.arguments)[1:])) if isinstance(p, Tensor)]

    def loss(self, setting: Setting) -> Tensor:
        """Return the loss, a scalar."""
        x = self.arguments[0]
        if setting == "loss":
            return self.value(x)
        if setting == "gradient penalty":
            value = self.value(x)
            (slope,) = torch.autograd.grad(value, x, create_graph=True)
            penalized: Tensor = value + slope.square().sum()
            return penalized
        along = torch.linspace(-1, 1.3, x.numel(), dtype=x.dtype).view_as(x)
        value, slope = cast("tuple[Tensor, Tensor]", torch.func.jvp(self.value, (x,), (along,)))
        return value + slope.square()


@dataclass(frozen=True)
class Verdict:
    """Outcome of an analysis.

    Attributes:
        outcome: "exact" or "differences": right, by this strategy; "unverified": wrong, and it says that it may be;
            "refused": no value, and a reason; "wrong"; "no loss": PyTorch cannot evaluate the loss; "kink": the loss
            has no second derivative nearby, so differences show nothing.
        gap: Error of the HVPs, relative to their size.
        remark: Reason.
    """

    outcome: Outcome
    gap: float = 0.0
    remark: str = ""


def judge(case: Case, setting: Setting) -> Verdict:
    """Analyze an operation, and compare the curvature along random vectors with second differences of the loss."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem = Problem(case)
        try:
            with exact_mode(problem, "keep"):
                expected, changes = _curvatures(problem, setting)
        except Exception as error:  # noqa: BLE001 - the report says what PyTorch refuses
            return Verdict("no loss", remark=_first_line(error))
        try:
            spectrum = hessian_spectrum(
                problem,
                [torch.zeros(1, dtype=torch.float64)],
                lambda module, _: module.loss(setting),
                steps=2,
                probes=PROBES,
                mode="keep",
            )
        except Exception as error:  # noqa: BLE001 - the report says what the analysis refuses
            return Verdict("refused", remark=_first_line(error))
    return _compared(spectrum, expected, changes)


@contextlib.contextmanager
def without_compositions() -> Iterator[None]:
    """Turn off the replacements of operations that PyTorch differentiates wrongly."""
    tables = (WRONG_SECOND_DERIVATIVE, WRONG_THIRD_DERIVATIVE, WRONG_FORWARD_DERIVATIVE)
    with contextlib.ExitStack() as stack:
        for table in tables:
            stack.enter_context(mock.patch.dict(table, clear=True))
        yield


def _compared(spectrum: Spectrum, expected: list[float], changes: list[float]) -> Verdict:
    size = max(1.0, *map(abs, expected), *np.nan_to_num(np.abs(spectrum.nodes)).flat)
    if not all(map(math.isfinite, expected)) or max(changes) > KINK * size:
        return Verdict("kink")
    if not np.isfinite(spectrum.nodes).any():
        return Verdict("refused", remark=spectrum.reason or "")
    found = np.nansum(spectrum.nodes * spectrum.weights, axis=1)
    gap = float(np.abs(found - expected).max()) / size
    if gap > ACCURACY + spectrum.rounding / size:
        is_certain = spectrum.verified == "yes"
        return Verdict("wrong" if is_certain else "unverified", gap, spectrum.verification or spectrum.strategy_reason)
    by_differences = spectrum.strategy == "finite_difference"
    return Verdict("differences" if by_differences else "exact", gap, spectrum.strategy_reason)


def _curvatures(problem: Problem, setting: Setting) -> tuple[list[float], list[float]]:
    """Return vᵀHv for the start vector v of each probe, and how much its estimates from two steps differ."""
    parameters = list(problem.parameters())
    origin = torch.nn.utils.parameters_to_vector(parameters).detach()
    generator = torch.Generator().manual_seed(0)

    def loss(shift: Tensor) -> float:
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(origin + shift, parameters)
        return problem.loss(setting).item()

    curvatures, changes = [], []
    for _ in range(PROBES):
        v = nn.functional.normalize(VectorSpace(len(origin)).gaussian(generator), dim=0)
        middle = loss(0 * v)
        steps = (STEP, 2 * STEP)
        fine, coarse = ((loss(h * v) - 2 * middle + loss(-h * v)) / h**2 for h in steps)
        curvatures.append((4 * fine - coarse) / 3)
        changes.append(abs(fine - coarse))
    loss(torch.zeros_like(origin))
    return curvatures, changes


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
