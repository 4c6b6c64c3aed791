"""The study of sample sizes: it runs as a whole, and its rules tell what agrees from what does not."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from examples.sample_study import outcomes, trends
from examples.sample_study.data import features, load
from examples.sample_study.measuring import displaced, losses_of, make_network, run, trained_network
from examples.sample_study.outcomes import Displaced, Numbers, Outcomes, State
from examples.sample_study.settings import DEPTH, FEATURES, INPUTS, PIXELS, STATES, TRAINED, WIDTH, Run, Setup, Study
from examples.sample_study.statements import Statement, at_initialization, follow_up, statements, trend_of
from examples.sample_study.trends import Interval, Region, Trend, student, trend
from examples.shared import AGREES, DIFFERS, UNSEEN
from lightning_hesd.sample_size.loss_differences import differences_of
from tests.programs import run_python

TINY = Setup(epochs=1, orders=4, steps=4, extractor_epochs=1)
QUICKEST = ["--quick", "--seeds", "2", "--epochs", "2", "--jobs", "1"]
NAN = Interval(math.nan, math.nan, math.nan)

# The program


@pytest.mark.slow
def test_everything_once(tmp_path: Path) -> None:
    said = run_python("-m", "examples.sample_study", "--out", str(tmp_path), *QUICKEST)
    assert "20 runs to do, 0 finished earlier" in said
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^## (.*)\n\n((?:(?!^## ).*\n?)*)", report, re.MULTILINE))
    line = r"^\| (.*?) \| (pixels|features|both) \| .* \| \*\*(?:agrees|differs|cannot be seen at this scale)\*\* \|$"
    found = re.findall(line, parts["Summary"], re.MULTILINE)
    # Rate, two trends with their sizes, losses, two norms, distance, entries: on both inputs. Then consistency, two
    # bounds, and the follow-up at two distances.
    assert len(set(found)) == len(found) == 2 * 10 + 2 + 2 + 2 * 2
    before = re.findall(line, parts["The same rules at initialization"], re.MULTILINE)
    assert len(before) == 2 * 8
    for claim, _ in found:
        assert f"- {claim} *Rule: " in parts["Rules"]
    for state in STATES:
        assert len(re.findall(r"^\| (?:pixels|features) \| ", parts[f"Numbers, {state}"], re.MULTILINE)) == 2 * 4
    images = re.findall(r"!\[.*\]\((.*)\)", report)
    assert len(images) == 5
    for image in images:
        assert (tmp_path / image).read_bytes().startswith(b"\x89PNG")
    assert not re.search(r"\bnan\b", report)


def test_a_run_is_kept_under_its_settings(tmp_path: Path) -> None:
    tiny = Study(widths=(4,), depths=(1,), width=4, depth=1, seeds=1, setup=TINY)
    first, second = tiny.runs()
    assert (first.inputs, second.inputs) == INPUTS
    assert len({r.file for r in (first, second, replace(first, seed=1), replace(first, setup=Setup()))}) == 4
    for settings in (first, second):
        run(settings, tmp_path)
    data = outcomes.read(tiny, tmp_path)
    x, y = load(PIXELS, TINY, tmp_path)
    initial, trained = trained_network(first, x, y)
    for state, network in zip(STATES, (trained, initial), strict=True):
        [found] = data.find(PIXELS, state, 4, 1)
        np.testing.assert_array_equal(found.losses, losses_of(network, (x.double(), y)))
        assert found.numbers.ggn <= found.numbers.tight_ggn
        assert found.numbers.hessian <= found.numbers.tight_hessian
    assert data.seconds > 0


# Data and networks


def test_networks_are_the_papers() -> None:
    network = make_network(5, 3)
    shapes = [tuple(p.shape) for p in network.parameters()]
    assert shapes == [(5, 64), (5, 5), (5, 5), (10, 5)]  # no biases
    assert [type(layer).__name__ for layer in network] == ["Linear", "ReLU"] * 3 + ["Linear"]


def test_features_are_made_once(tmp_path: Path) -> None:
    x, y = load(PIXELS, TINY, tmp_path)
    assert (x.shape, x.min(), x.max()) == ((1797, 64), 0, 1)
    z, again = load(FEATURES, TINY, tmp_path)
    assert (z.shape, z.min(), z.max()) == (x.shape, 0, 1)
    assert torch.equal(y, again)
    stamp = next(tmp_path.glob("features-*")).stat().st_mtime_ns
    assert 0.25 < features(x, TINY, tmp_path)[1] <= 1
    assert next(tmp_path.glob("features-*")).stat().st_mtime_ns == stamp


def test_displacements(tmp_path: Path) -> None:
    settings = Run(PIXELS, 4, 1, 0, replace(TINY, radii=(0.0, 0.5), directions=2))
    x, y = load(PIXELS, TINY, tmp_path)
    network, batch = make_network(4, 1).double(), (x.double(), y)
    before = losses_of(network, batch)
    at_weights, first, second = displaced(network, batch, settings)
    np.testing.assert_array_equal(losses_of(network, batch), before)
    settling = differences_of(before, orders=4, seed=0)
    assert at_weights.constant == pytest.approx(settling.constant)
    assert at_weights.largest == pytest.approx(max((k + 2) / 2 * d for k, d in enumerate(settling.mean)))
    norm = math.sqrt(sum(float(p.detach().square().sum()) for p in network.parameters()))
    assert (at_weights.radius, first.radius, second.radius) == pytest.approx((0, norm / 2, norm / 2))
    assert first.constant != second.constant


# Statistics


def test_intervals_are_students_and_correlations_spearmans() -> None:
    values = np.random.default_rng(0).normal(size=7)
    low, high = stats.t.interval(0.95, 6, values.mean(), stats.sem(values))
    assert student([*values, math.nan]) == pytest.approx((values.mean(), low, high), abs=1e-4)
    assert student([1.0]).shown() == "undefined"
    first, second = np.random.default_rng(1).normal(size=(2, 6))
    assert trends.rank_correlation(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)
    assert math.isnan(trends.rank_correlation(first[:2], second[:2]))


def test_trends_of_powers_and_of_dead_networks() -> None:
    sizes = [1.0, 2.0, 3.0, 4.0]
    values = np.exp(np.outer([1.0, 2.0, 3.0], sizes))
    found = trend(values, sizes)
    assert found.slope == pytest.approx(student([1, 2, 3]))
    assert found.change == pytest.approx(student([3, 6, 9]))
    assert found.straightness == pytest.approx(1)
    values[0, 3] = 0  # has no logarithm; the slope is that of the others
    assert trend(values, sizes).slope == pytest.approx(found.slope)
    assert trend(values, sizes).change == pytest.approx(student([6, 9]))
    assert trend(np.exp([[0, 5, 0, 5.1]] * 2), sizes).straightness < 0.5


# Rules


@pytest.mark.parametrize(
    ("region", "inside", "outside", "both"),
    [
        (trends.POSITIVE, (0.1, 0.3), (-0.3, -0.1), (-0.1, 0.3)),
        (trends.NEGATIVE, (-0.3, -0.1), (0.1, 0.3), (-0.1, 0.3)),
        (trends.SLIGHT, (-0.6, 0.6), (0.7, 0.9), (0.6, 0.8)),
        (trends.SLIGHT, (-0.1, 0.6), (-0.9, -0.7), (-0.8, 0.6)),
        (trends.INVERSE, (-1.09, -0.91), (-0.8, -0.7), (-1.0, -0.8)),
        (trends.INVERSE_SQUARE, (-2.1, -1.9), (-1.7, -1.6), (-2.3, -1.9)),
        (trends.EQUAL, (-0.04, 0.04), (0.06, 0.5), (0.0, 0.1)),
        (trends.BELOW_ONE, (0.5, 0.9), (1.1, 2.0), (0.9, 1.1)),
        (trends.AT_LEAST_ONE, (1.0, 1.0), (0.9, 0.9), (0.9, 1.1)),
    ],
)
def test_regions(
    region: Region, inside: tuple[float, float], outside: tuple[float, float], both: tuple[float, float]
) -> None:
    yes, no, maybe = (Interval(sum(pair) / 2, *pair) for pair in (inside, outside, both))
    assert region.judge([yes]) == region.judge([yes, yes]) == AGREES
    assert region.judge([no]) == region.judge([yes, no, maybe]) == DIFFERS
    assert region.judge([maybe]) == region.judge([yes, maybe]) == region.judge([NAN]) == region.judge([]) == UNSEEN


def test_growth_must_be_on_a_line() -> None:
    up, down, flat = Interval(2, 1, 3), Interval(-2, -3, -1), Interval(0, -1, 1)
    assert trends.judge_growth(Trend(up, up, 0.95)) == AGREES
    assert trends.judge_growth(Trend(up, up, 0.5)) == trends.judge_growth(Trend(up, up, math.nan)) == UNSEEN
    assert trends.judge_growth(Trend(down, down, 0.5)) == DIFFERS
    assert trends.judge_growth(Trend(flat, flat, 0.95)) == UNSEEN
    assert trends.judge_same(up, up) == trends.judge_same(down, down) == AGREES
    assert trends.judge_same(up, down) == DIFFERS
    assert trends.judge_same(up, flat) == trends.judge_same(NAN, up) == UNSEEN


# Statements, of networks that are made up

MADE = Study(seeds=4, setup=Setup(orders=16, radii=(0.0, 0.3)))
NUMBERS = Numbers(accuracy=1, ggn=1, hessian=1, weight_norm=1, largest_entry=0.001, published=10, tight_ggn=5,
                  tight_hessian=6)  # fmt: skip


def made(spread: Callable[[Run], float], farther: float = 2, **numbers: Callable[[Run], float]) -> Outcomes:
    """Return outcomes with this spread of the losses, their mean as large, and 2 % of noise between seeds."""
    generator = np.random.default_rng(0)
    states: dict[str, dict[Run, State]] = {state: {} for state in STATES}
    for state in STATES:
        for settings in MADE.runs():
            losses = spread(settings) * (1 + 0.5 * generator.uniform(-1, 1, size=400)) * (1 + generator.normal() / 50)
            moved = (Displaced(0.0, 0.0, 1.0, 0.5), Displaced(0.3, 1.0, farther * (1 + generator.normal() / 50), 1.0))
            own = replace(NUMBERS, **{name: value(settings) for name, value in numbers.items()})
            states[state][settings] = State(settings, own, losses, moved)
    return Outcomes(MADE, states, 1.0)


def verdict(found: list[Statement], start: str, inputs: str = PIXELS) -> Any:
    [one] = [s for s in found if s.finding.claim.startswith(start) and s.inputs == inputs]
    return one.finding.verdict


DEEPER, WIDER = "More layers", "A larger hidden size"
DEEP_SLIGHT, WIDE_SLIGHT = "The change with the number of layers", "The change with the hidden size"


def test_statements_agree() -> None:
    norm = {"hessian": lambda r: r.width**0.5 * math.exp(r.depth), "ggn": lambda r: 9.0}
    data = made(lambda r: 1.05**r.depth / r.width**0.1, **norm)
    found = statements(data)
    assert [s.finding for s in found if s.finding.verdict != AGREES] == []
    assert len(found) == 24
    assert [s.seen for s in found if s.finding.claim.startswith(DEEPER)] == ["it grows"] * 2
    assert [s.seen for s in found if s.finding.claim.startswith(WIDER)] == ["it falls"] * 2
    for axis, slope in ((DEPTH, 1), (WIDTH, 0.5)):
        assert trend_of(data, PIXELS, TRAINED, axis, "‖H‖").slope.mean == pytest.approx(slope)
    assert len(at_initialization(data)) == 16


def test_statements_differ() -> None:
    data = made(
        lambda r: 1.5 ** (-r.depth if r.inputs == PIXELS else r.depth) * r.width,
        farther=0.1,
        hessian=lambda r: math.exp(-r.depth) / r.width,
        ggn=lambda r: 11.0 if r.seed == 1 and r.width == 64 else 1.0,
        largest_entry=lambda r: 1.0,
    )
    found = statements(data)
    for start in (DEEPER, WIDER, DEEP_SLIGHT, WIDE_SLIGHT, "The norm", "It is a", "Farther", "The number"):
        assert verdict(found, start) == DIFFERS, start
    assert verdict(found, "On features the effect of depth", "both") == DIFFERS
    assert verdict(found, "On features the effect of width", "both") == AGREES
    assert verdict(found, "Theorem 1", "both") == DIFFERS
    assert verdict(found, "Over widths the difference follows") == AGREES
    broken = made(lambda r: 1.0, published=lambda r: 1e-9)
    settings, state = next(iter(broken.states[TRAINED].items()))
    moved = (state.displaced[0], state.displaced[1]._replace(largest=100.0))
    broken.states[TRAINED][settings] = replace(state, displaced=moved)
    assert verdict(statements(broken), "Lemma 2", "both") == DIFFERS


def test_follow_up() -> None:
    class Found:
        sigma, constant, monte_carlo_constant, monte_carlo_constant_error = 0.1, 2.0, 2.02, 0.01
        rate, rate_error = -2.01, 0.02

    def verdicts(**changes: float) -> list[str]:
        found: Any = type("Other", (Found,), changes)()
        return [s.finding.verdict for s in follow_up(found)]

    assert verdicts() == [AGREES, AGREES]
    assert verdicts(monte_carlo_constant=3.0, rate=-1.5) == [DIFFERS, DIFFERS]
    assert verdicts(monte_carlo_constant_error=0.5, rate_error=0.3) == [UNSEEN, UNSEEN]
