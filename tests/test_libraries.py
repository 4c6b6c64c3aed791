"""The harness for other libraries tells the same from the different, and its recipes are of libraries that it knows."""

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.libraries.__main__ import libraries, write
from benchmarks.libraries.case import Case
from benchmarks.libraries.independent import Batch, extremes
from benchmarks.libraries.recipes import PAGE, RECIPE, invalidate
from benchmarks.libraries.report import Tried, document, from_plain
from benchmarks.libraries.trial import Outcome, attempt, seed_everything
from tests.training.scripted import make_trainer


class Quadratic(pl.LightningModule):
    """Has the Hessian diag(1, -2, 3), twice that in evaluation mode."""

    def __init__(self, shift: float = 0.5) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((3,), shift))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        factor = 0.5 if self.training else 1.0
        return factor * (torch.tensor([1.0, -2.0, 3.0]) * self.w**2).sum() + 0 * batch.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def train(callbacks: list[Any], folder: Path, *, shift: float = 0.5) -> Any:
    seed_everything()
    module = Quadratic(shift if callbacks else 0.5)
    make_trainer(folder, callbacks, 1).fit(module, DataLoader(torch.zeros(4, 1), 2))  # type: ignore[arg-type]  # a tensor is a dataset
    return module


def test_a_case_is_compared_with_and_without_the_callback(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the mode, which the outcome has
        same = attempt(Case("plain", train), tmp_path / "same")
        other = attempt(Case("shifted", lambda *given: train(*given, shift=1.0)), tmp_path / "other")
    assert (same.namespace, same.weights, same.analyses, same.failed) == ("lightning", "identical", 1, 0)
    assert (same.pick, same.raised, same.hesd_type, same.mode) == ("loads", "", "MN", "deterministic")
    assert same.c_t == pytest.approx(-2 / 3)
    assert same.difference == pytest.approx(0, abs=1e-6)
    assert any("evaluation mode" in warning for warning in same.warnings)
    assert other.weights == "1 of 1 differ: w"


@pytest.mark.parametrize(("mode", "factor"), [("eval", 2.0), ("deterministic", 1.0)])
def test_the_independent_computation_knows_closed_forms(tmp_path: Path, mode: str, factor: float) -> None:
    module = train([], tmp_path)
    found = extremes(module, [Batch(torch.zeros(2, 1), 0.5, i, i) for i in range(2)], None, mode)
    assert (found.lambda_min, found.lambda_max) == pytest.approx((-2 * factor, 3 * factor))
    assert module.training


def test_rows_are_renewed_one_by_one(tmp_path: Path) -> None:
    fine = Outcome("a|b", "lightning", "identical", 2, c_t=-0.5, verified="yes", difference=1e-8, pick="loads")
    bad = Outcome("c", "lightning", raised="ValueError: no", warnings=("lightning_hesd: see /tmp/x/y.ckpt.",))
    for tried in (
        Tried("one", "tables", "2026-01-01", {"one": "1.0"}, [bad]),
        Tried("two", "graphs", "2026-01-02", {"two": "2.0"}, []),
        Tried("one", "tables", "2026-01-03", {"one": "1.1"}, [fine, bad]),
    ):
        write(tried, tmp_path)
    table = (tmp_path / "libraries.md").read_text(encoding="utf-8")
    assert "2 libraries, 2 models. With 1 of them" in table
    assert r"| one 1.1 | tables | `lightning` | a\|b | identical | -0.5 |" in table
    assert "| raised |" in table
    assert "cannot be tried" in table
    assert "one 1.0" not in table
    assert "- one, c: see .../y.ckpt." in table
    assert document([from_plain({**vars(Tried("a", "", "", {"a": "1"}, [])), "outcomes": []})])


def test_recipes_are_of_known_libraries_and_show_their_output(tmp_path: Path) -> None:
    known = {library.name for library in libraries().values()}
    text = PAGE.read_text(encoding="utf-8")
    recipes = list(RECIPE.finditer(text))
    assert len(recipes) == len(re.findall(r"^```py", text, re.MULTILINE))
    for recipe in recipes:
        assert recipe["library"] in {None, *known}
        compile(recipe["code"], str(PAGE), "exec")
        assert recipe["output"].strip()
    page = tmp_path / "page.md"
    block = '```py title="one"\nprint(1 + 1)\n```\n\n```text title="Output"\n{}```\n'
    page.write_text(block.format("") + block.replace("one", "two").format("kept\n"), encoding="utf-8")
    invalidate(page, {"one": lambda: Path(sys.executable)})
    assert page.read_text(encoding="utf-8") == block.format("2\n") + block.replace("one", "two").format("kept\n")
