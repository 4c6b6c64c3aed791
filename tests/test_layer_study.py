"""The study of layer-wise Hessians: it runs as a whole, and its statistics are what the report says."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from examples.layer_study import associations as statistics
from examples.layer_study import data as data_sets
from examples.layer_study.associations import Association, associations, given, of_controls, plain, within
from examples.layer_study.indicators import NAMES
from examples.layer_study.outcomes import is_done, read
from examples.layer_study.settings import Run, Setup, Study
from examples.layer_study.training import MLP, constant_loss, run
from examples.layer_study.words import Sample, verdict
from examples.shared import run_all
from lightning_hesd import SpectrumHistory
from tests.programs import run_python

SHAPE = (3, 2, 12)  # data sets, seeds, configurations
TINY = ["--datasets", "iris", "diabetes", "--widths", "2", "3", "4", "--depths", "1", "--seeds", "2", "--epochs", "2"]
STUDY = Study(("iris", "diabetes"), (2, 3, 4), (1,), 2, Setup(epochs=2))


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 300)
    monkeypatch.setattr(statistics, "PERMUTATIONS", 300)


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape)


# The program


@pytest.mark.slow
def test_everything_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run_python("-m", "examples.layer_study", "--out", str(tmp_path), "--jobs", "1", *TINY)
    assert "12 runs to do, 0 finished earlier" in said
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^## (.*)\n\n((?:(?!^## ).*\n?)*)", report, re.MULTILINE))
    for word, claims in (("Overfitting", 3), ("Under-parameterization", 2), ("Expressivity", 3)):
        verdicts = re.findall(r"^- \*\*(agrees|differs|cannot be seen at this scale)\*\*: ", parts[word], re.MULTILINE)
        assert len(verdicts) == claims
        assert re.findall(rf"^\| {word} \| .* \| (.*) \|$", parts["Summary"], re.MULTILINE) == verdicts
        for name in NAMES:
            assert re.search(rf"^\| {re.escape(name)} \| [-+]", parts[word], re.MULTILINE)
    assert "| iris | 75/75 | 4 |" in parts["Runs"]
    assert "| diabetes | 200/242 | 10 |" in parts["Runs"]
    for image in re.findall(r"!\[.*\]\((.*)\)", report):
        assert (tmp_path / image).read_bytes().startswith(b"\x89PNG")
    assert "nan" not in report

    run_all(STUDY.runs(), run, tmp_path, is_done=lambda s: is_done(tmp_path / s.folder), jobs=1)
    assert "0 runs to do, 12 finished earlier" in capsys.readouterr().out


def test_a_run_is_kept_under_its_settings(tmp_path: Path) -> None:
    settings = Run("wine", 3, 2, 0, Setup(epochs=2, steps=10))
    assert run(settings, tmp_path) > 0
    assert run(settings, tmp_path) == 0
    assert run(replace(settings, setup=replace(settings.setup, steps=12)), tmp_path) > 0

    outcome = read(settings, tmp_path)
    halfway, end = SpectrumHistory.load(tmp_path / settings.folder)
    assert (halfway.epoch, end.epoch) == (0, 1)
    assert end.layers is not None
    assert halfway.layers is not None
    first, middle, last = end.layers.values()
    assert (first.dimension, middle.dimension, last.dimension) == (13 * 3 + 3, 3 * 3 + 3, 3 * 3 + 3)
    assert outcome.numbers.parameters == 42 + 12 + 12
    assert list(outcome.indicators) == NAMES
    assert outcome.indicators["λ_max, first"] == first.lambda_max
    assert outcome.indicators["λ_max, last"] == last.lambda_max
    assert outcome.indicators["λ_max, largest"] == max(s.lambda_max for s in end.layers.values())
    assert outcome.indicators["trace, mean"] == pytest.approx(sum(s.trace for s in end.layers.values()) / 3)
    assert outcome.indicators["growth of λ_max, first"] == pytest.approx(
        math.log(first.lambda_max / next(iter(halfway.layers.values())).lambda_max)
    )
    assert last.lambda_min > -1e-6 * last.lambda_max  # which is why two indicators of the last layer are left out
    assert end.spectrum is not None
    assert outcome.indicators["−C_t, whole"] == -end.spectrum.c_t > 0
    assert end.spectrum.loss == pytest.approx(outcome.numbers.train_loss, rel=1e-4)  # of all training samples


# Data and networks


@pytest.mark.parametrize("name", data_sets.NAMES)
def test_data(name: str) -> None:
    data = data_sets.load(name, 1, 200)
    assert len(data.x_train) == len(data.y_train) <= min(200, len(data.x_test))
    assert data.x_train.mean(0).abs().max() < 1e-4
    spread = data.x_train.std(0, correction=0)
    assert torch.all(torch.isclose(spread, torch.ones(()), atol=1e-3) | (spread == 0))
    again, other = data_sets.load(name, 1, 200), data_sets.load(name, 2, 200)
    assert torch.equal(again.x_train, data.x_train)
    assert not torch.equal(other.x_train, data.x_train)
    if name in data_sets.REGRESSION:
        assert (data.y_train.shape, data.outputs) == ((len(data.x_train), 1), 1)
    else:
        assert data.y_train.unique().tolist() == list(range(data.outputs))


def test_performance_and_constant_predictions() -> None:
    network = MLP(2, 1, width=3, depth=2, learning_rate=0.1)
    torch.nn.init.zeros_(network.network[-1].weight)  # type: ignore[arg-type]
    torch.nn.init.constant_(network.network[-1].bias, 2.0)  # type: ignore[arg-type]
    numbers = torch.tensor([[1.0], [2.0], [3.0]])
    assert network.performance(torch.zeros(3, 2), numbers) == pytest.approx((2 / 3, 0.0))
    assert constant_loss(numbers) == pytest.approx(2 / 3)
    assert constant_loss(torch.tensor([0, 0, 1, 1, 3, 3])) == pytest.approx(math.log(3))


# Statistics


def test_plain_is_spearman_within_each_stratum() -> None:
    x, y = normal(*SHAPE), np.round(normal(*SHAPE, seed=1))  # with ties
    expected = [np.mean([spearmanr(x[d, s], y[d, s]).statistic for s in range(2)]) for d in range(3)]
    assert statistics.by_dataset(plain(x), plain(y)) == pytest.approx(expected)

    shifted = x + 100 * np.arange(3)[:, None, None], y - 100 * np.arange(3)[:, None, None]
    assert statistics.by_dataset(*map(plain, shifted)) == pytest.approx(expected)  # data sets do not pose as effects


def test_given_is_the_partial_correlation_of_ranks() -> None:
    x, y, z, w = (normal(1, 1, 30, seed=seed) for seed in range(4))
    x, y = x + z, y + z + w
    xy, xz, yz = (spearmanr(a[0, 0], b[0, 0]).statistic for a, b in ((x, y), (x, z), (y, z)))
    expected = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    directions = of_controls([z])
    assert statistics.by_dataset(given(x, directions), given(y, directions)) == pytest.approx(expected)

    directions = of_controls([z, w, np.ones_like(z)])  # the inverse of the matrix of correlations has them all
    inverse = np.linalg.inv(spearmanr(np.stack([v[0, 0] for v in (x, y, z, w)]), axis=1).statistic)
    expected = -inverse[0, 1] / math.sqrt(inverse[0, 0] * inverse[1, 1])
    assert statistics.by_dataset(given(x, directions), given(y, directions)) == pytest.approx(expected)


def test_within_looks_at_equal_architectures_only() -> None:
    configuration, noise = np.arange(12.0), 0.1 * normal(*SHAPE)
    x, y = 10 * configuration + noise, 10 * configuration - noise
    assert statistics.by_dataset(plain(x), plain(y)) == pytest.approx(1)
    ranks_differ = normal(*SHAPE, seed=3)
    assert statistics.by_dataset(within(ranks_differ), within(-ranks_differ)) == pytest.approx(-1)
    constant = within(x)  # the same order of configurations with every seed: nothing is left
    assert np.isnan(constant).all()


def test_undefined_strata_are_left_out(few_draws: None) -> None:
    x, y = normal(*SHAPE), normal(*SHAPE, seed=1)
    y[0] = 1  # an outcome that does not vary on one data set
    x[1, 0, 3] = math.nan  # an indicator that is undefined in one run
    [found, never] = associations(np.stack([x, np.zeros(SHAPE)]), y, plain)
    assert math.isnan(found.by_dataset[0])
    assert found.by_dataset[1] == pytest.approx(spearmanr(x[1, 1], y[1, 1]).statistic)
    assert found.mean == pytest.approx(found.by_dataset[1:].mean())
    assert found.low < found.mean < found.high
    assert np.isnan([never.mean, never.p]).all()


def test_seeds_are_no_independent_evidence_and_a_real_effect_is_found(few_draws: None) -> None:
    x, y = normal(1, 1, 1, 12), normal(1, 1, 12, seed=1)
    [once] = associations(x, y, plain)
    [often] = associations(np.tile(x, (1, 3, 5, 1)), np.tile(y, (3, 5, 1)), plain)
    assert (often.mean, often.low, often.high) == pytest.approx((once.mean, once.low, once.high))
    assert often.p == once.p
    x, y = normal(10, *SHAPE), normal(*SHAPE, seed=1)
    x[4] = y + 0.5 * normal(*SHAPE, seed=2)
    found = associations(x, y, plain)
    assert found[4].p == pytest.approx(1 / 301)
    assert found[4].low > 0.5
    assert min(one.p for n, one in enumerate(found) if n != 4) > 0.05


def test_chance_is_called_an_effect_as_often_as_stated(few_draws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 2)
    monkeypatch.setattr(statistics, "PERMUTATIONS", 99)
    shape = (2, 1, 9)
    size, depth = (np.broadcast_to(values, shape) for values in (np.arange(9.0), np.tile([1.0, 2, 4], 3)))
    false = {plain: 0, given: 0}
    for seed in range(150):
        own, outcome = normal(6, 1, 1, 9, seed=seed), normal(1, 1, 9, seed=1000 + seed)  # common to both data sets
        x = own + 0.3 * normal(6, *shape, seed=2000 + seed)
        y = outcome + 0.3 * normal(*shape, seed=3000 + seed)
        false[plain] += min(a.p for a in associations(x, y, plain)) <= 0.1
        false[given] += min(a.p for a in associations(x + size, y + size, given, [size, depth])) <= 0.1
    assert all(4 <= count <= 27 for count in false.values()), false  # 15 expected, standard deviation 3.7


# Rules


def association(mean: float, low: float, high: float, p: float) -> Association:
    return Association(np.array([mean]), mean, low, high, p)


def test_verdicts() -> None:
    seen = association(0.5, 0.2, 0.8, 0.01)
    weak, wide = association(0.1, -0.1, 0.25, 0.01), association(0.6, 0.1, 0.9, 0.2)
    undefined = association(math.nan, math.nan, math.nan, math.nan)
    cannot = "cannot be seen at this scale"
    assert verdict([weak, seen, undefined]) == "agrees"
    assert verdict([weak, undefined]) == "differs"
    assert verdict([weak, wide]) == cannot
    assert verdict([weak, association(0.5, -0.1, 0.8, 0.01)]) == cannot  # p-value and interval disagree
    assert verdict([weak, association(-0.1, -0.4, 0.2, 0.9)]) == cannot
    assert verdict([undefined]) == cannot


def test_what_stands_for_the_words() -> None:
    loss = np.array([[[0.1, 0.15, 0.19, 0.55, 1.2]]])
    numbers = {"train_loss": loss, "test_loss": loss + 0.5, "constant_loss": np.ones_like(loss)}
    numbers["shuffled_loss"] = np.array([[[0.0, 0.25, 0.5, 1.0, 1.1]]])
    data = Sample(STUDY, np.zeros((1, 1, 1, 5)), numbers)
    assert data.gap == pytest.approx(0.5)
    assert data.unexplained[0, 0] == pytest.approx([0, 0.05 / 0.9, 0.1, 0.5, 1.1 / 0.9])
    assert data.shortfall[0, 0] == pytest.approx([0, 0, 0, 0.4, 1.1 / 0.9 - 0.1])
    assert data.memorized[0, 0] == pytest.approx([1, 0.75, 0.5, 0, -0.1])
