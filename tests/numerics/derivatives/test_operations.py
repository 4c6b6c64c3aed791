"""A few of the operations that `python -m benchmarks.operations` goes through, and that it goes through all."""

import pytest
import torch
from torch import nn

from benchmarks.operations.__main__ import document
from benchmarks.operations.case import Case
from benchmarks.operations.functions import functions
from benchmarks.operations.judge import SETTINGS, Setting, Verdict, judge, without_compositions
from benchmarks.operations.layers import NO_CASE, layers

CASES: dict[str, Case] = {case.name: case for case in [*layers(), *functions()]}

WRONG_IN_PYTORCH: list[tuple[str, Setting]] = [
    *((name, "loss") for name in ("weight_norm", "weight_norm, dim=1", "weight_norm, old", "weight_norm, old, dim=2")),
    *((name, "gradient penalty") for name in ("weight_norm", "LayerNorm", "BatchNorm2d", "InstanceNorm1d")),
    *((name, "directional derivative") for name in ("LayerNorm", "BatchNorm1d, no statistics", "torch.logdet")),
    *((f"torch.linalg.{name}", "directional derivative") for name in ("det", "slogdet", "solve", "solve of a vector")),
]

EXPECTED: list[tuple[str, Setting, str]] = [
    *((name, setting, "exact") for name, setting in WRONG_IN_PYTORCH),
    *((name, "loss", "exact") for name in ("Conv2d", "GRU", "Hardsigmoid", "SiLU", "CrossEntropyLoss", "RMSNorm")),
    *((name, "gradient penalty", "exact") for name in ("Conv1d", "GELU", "GroupNorm", "BatchNorm2d, evaluated")),
    *((name, "gradient penalty", "exact") for name in ("MultiheadAttention", "Bilinear", "torch.linalg.slogdet")),
    ("torch.cdist", "loss", "differences"),
    ("CTCLoss", "loss", "differences"),
    ("torch.cdist", "gradient penalty", "refused"),
    ("torch.special.bessel_j0", "loss", "refused"),
    ("CTCLoss", "directional derivative", "no loss"),
]


@pytest.mark.parametrize(("name", "setting", "outcome"), EXPECTED)
def test_what_an_analysis_makes_of_an_operation(name: str, setting: Setting, outcome: str) -> None:
    assert judge(CASES[name], setting).outcome == outcome


@pytest.mark.parametrize(("name", "setting"), [WRONG_IN_PYTORCH[i] for i in (0, 5, -1)])
def test_without_replacements_some_are_not_exact(name: str, setting: Setting) -> None:
    with without_compositions():
        assert judge(CASES[name], setting).outcome in {"differences", "refused"}


def test_all_layers_are_there() -> None:
    names = {name for name, value in vars(nn).items() if isinstance(value, type) and not name.startswith("Lazy")}
    covered = {name.split(",")[0] for name in CASES}
    assert names - covered - set(NO_CASE) == set()
    assert not covered & set(NO_CASE)
    assert len([name for name in CASES if name.startswith(("torch.", "F."))]) >= 200
    assert all(torch.equal(a, b) for a, b in zip(CASES["Linear"].arguments(), CASES["Linear"].arguments(), strict=True))


def test_the_report_lists_exceptions_by_operation() -> None:
    chosen = [CASES["Tanh"], CASES["CTCLoss"]]
    exact = {(case.name, setting): Verdict("exact") for case in chosen for setting in SETTINGS}
    refused = {("CTCLoss", "loss"): Verdict("refused", remark="no | derivative " * 20)}
    text = document(chosen, {**exact, **refused}, exact)
    assert "| loss | 1 | 0 | 0 | 1 | 0 | 0 | 0 |" in text
    assert "| CTCLoss | refused | exact | exact | no \\| derivative" in text
    assert text.endswith("## Exact everywhere\n\n`Tanh`.\n")
