"""The paper's statements, each with our evidence for or against it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from examples.sample_study import trends
from examples.sample_study.settings import DEPTH, FEATURES, INITIAL, INPUTS, PIXELS, STATES, SWEEPS, TRAINED, WIDTH
from examples.sample_study.trends import Interval, Region, Trend, student, trend
from examples.shared import AGREES, DIFFERS, UNSEEN, Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from examples.sample_study.outcomes import Outcomes, State
    from examples.shared import Verdict
    from lightning_hesd.sample_size.subspace import SubspaceStabilization


class Statement(NamedTuple):
    """A finding, its inputs, and the result in words."""

    inputs: str
    seen: str
    finding: Finding


QUANTITIES: dict[str, Callable[[State], float]] = {
    "mean loss": lambda state: state.mean_loss,
    "c": lambda state: state.settling.constant,
    "c/mean loss": lambda state: state.settling.constant / state.mean_loss,
    "‖G‖": lambda state: state.numbers.ggn,
    "‖H‖": lambda state: state.numbers.hessian,
    "Theorem 1": lambda state: state.numbers.published,
}
UNIT = {WIDTH: "against log h", DEPTH: "per layer"}
UNDECIDED = "nothing that could not be chance"
DIRECTION: dict[Verdict, str] = {AGREES: "it grows", DIFFERS: "it falls", UNSEEN: UNDECIDED}
"""Words for slopes that `POSITIVE` judges."""


def statements(data: Outcomes) -> list[Statement]:
    """Return all findings about trained networks and about bounds, sorted by claim."""
    found = _of_networks(data, TRAINED)
    found += [one for inputs in INPUTS for one in (_of_distance(data, inputs), _of_entries(data, inputs))]
    return [*_sorted(found), *_of_both_inputs(data), *_of_bounds(data)]


def at_initialization(data: Outcomes) -> list[Statement]:
    """Return the findings of the same rules before training; the paper makes no claims about it."""
    return _sorted(_of_networks(data, INITIAL))


def _sorted(found: list[Statement]) -> list[Statement]:
    claims = [one.finding.claim for one in found]
    return sorted(found, key=lambda one: claims.index(one.finding.claim))


def _of_networks(data: Outcomes, state: str) -> list[Statement]:
    parts = (_of_rates, _of_constants, _of_losses, _of_norms)
    return [one for inputs in INPUTS for part in parts for one in part(data, inputs, state)]


def judged(
    inputs: str,
    claim: str,
    region: Region,
    found: Sequence[Interval],
    *,
    of: str,
    evidence: str,
    words: tuple[str, str],
) -> Statement:
    """Return the statement that all values lie in a region; `words` are for inside and outside."""
    verdict, several = region.judge(found), len(found) > 1
    parts = {"all": " in all networks" * several, "one": " in one" * several}
    rule = trends.RULE.format(of=of, region=region.words, **parts)
    seen = {AGREES: words[0], DIFFERS: words[1]}.get(verdict, UNDECIDED)
    return Statement(inputs, seen, Finding(claim, rule, evidence, verdict))


def trend_of(data: Outcomes, inputs: str, state: str, sweep: str, quantity: str) -> Trend:
    """Return the trend of a quantity, over log width (a power) or over depth (an exponential)."""
    sizes = data.study.sizes(sweep)
    abscissa = [math.log(size) for size in sizes] if sweep == WIDTH else [float(size) for size in sizes]
    return trend(data.values(inputs, state, sweep, QUANTITIES[quantity]), abscissa)


def _everywhere(data: Outcomes, inputs: str, state: str, quantity: Callable[[State], float]) -> list[Interval]:
    """Return the means over seeds in all configurations."""
    return [student(column) for sweep in SWEEPS for column in data.values(inputs, state, sweep, quantity).T]


def _of_rates(data: Outcomes, inputs: str, state: str) -> Iterator[Statement]:
    rates = _everywhere(data, inputs, state, lambda s: s.settling.rate)
    half = max(rate.high - rate.mean for rate in rates)
    yield judged(
        inputs,
        "The difference is inversely proportional to the sample size (eq. 3).",
        trends.INVERSE,
        rates,
        of="the fitted exponent",
        evidence=f"exponents {_range(rate.mean for rate in rates)}, half-widths of their intervals up to {half:.3f}",
        words=("it falls as 1/k", "it falls with another exponent"),
    )


def _of_constants(data: Outcomes, inputs: str, state: str) -> Iterator[Statement]:
    for sweep, region, claim, words in (
        (DEPTH, trends.POSITIVE, "More layers lead to a greater difference (5.1).", ("it grows", "it falls")),
        (WIDTH, trends.NEGATIVE, "A larger hidden size leads to a smaller difference (5.1).", ("it falls", "it grows")),
    ):
        found, sizes = trend_of(data, inputs, state, sweep, "c"), data.study.sizes(sweep)
        evidence = f"slope of log c {found.slope.shown()} {UNIT[sweep]}"
        yield judged(inputs, claim, region, [found.slope], of="the slope of log c", evidence=evidence, words=words)
        yield judged(
            inputs,
            f"The change with {'the number of layers' if sweep == DEPTH else 'the hidden size'} is slight (5.1, 5.2).",
            trends.SLIGHT,
            [found.change],
            of="the ratio of the last c of the sweep to the first",
            evidence=f"c changes by a factor of {found.change.factor()} from {sizes[0]} to {sizes[-1]}",
            words=("a slight change", "a large change"),
        )


def _of_losses(data: Outcomes, inputs: str, state: str) -> Iterator[Statement]:
    c, loss = (data.values(inputs, state, WIDTH, QUANTITIES[quantity]) for quantity in ("c", "mean loss"))
    found = student([trends.rank_correlation(*pair) for pair in zip(c, loss, strict=True)])
    rest = trend_of(data, inputs, state, WIDTH, "c/mean loss").slope
    yield judged(
        inputs,
        "Over widths the difference follows the values of the loss (5.1).",
        trends.POSITIVE,
        [found],
        of="the rank correlation of c and mean loss",
        evidence=f"rank correlation {found.shown()}; slope of log(c/mean loss) {rest.shown()} {UNIT[WIDTH]}",
        words=("they go together", "they go opposite ways"),
    )


def _of_norms(data: Outcomes, inputs: str, state: str) -> Iterator[Statement]:
    rule = (
        f"agrees if the 95 % interval of the slope lies above 0, and a line fits the mean logarithms with R² of "
        f"{trends.STRAIGHT} or more; differs if the interval lies below 0"
    )
    for sweep, claim in (
        (WIDTH, "The norm of the Hessian is a (growing) power function of the hidden size (4.1)."),
        (DEPTH, "It is a (growing) exponential function of the number of layers (4.1)."),
    ):
        found, bound = (trend_of(data, inputs, state, sweep, quantity) for quantity in ("‖H‖", "Theorem 1"))
        evidence = (
            f"slope of log ‖H‖ {found.slope.shown()} {UNIT[sweep]}, R² {found.straightness:.2f}; of Theorem 1's bound "
            f"{bound.slope.shown()}"
        )
        verdict, direction = trends.judge_growth(found), DIRECTION[trends.POSITIVE.judge([found.slope])]
        bent = verdict == UNSEEN and direction != UNDECIDED
        seen = direction + ", but on no line" * bent
        yield Statement(inputs, seen, Finding(claim, rule, evidence, verdict))


def _of_distance(data: Outcomes, inputs: str) -> Statement:
    """Compare constants at some distance with those at the trained weights, averaged over the networks of a seed."""
    radii = [radius for radius in data.study.setup.radii if radius]
    grown = {
        radius: student(
            [
                np.mean([s.constant_at(radius) - s.constant_at(0.0) for s in data.of_seed(inputs, TRAINED, seed)])
                for seed in range(data.study.seeds)
            ]
        )
        for radius in radii
    }
    return judged(
        inputs,
        "Farther from the minimum the convergence is slower (4.2).",
        trends.POSITIVE,
        [grown[radii[-1]]],
        of=f"log c at {radii[-1]:.0%} of the weights' norm minus log c at the weights",
        evidence="c changes by a factor of " + ", ".join(f"{one.factor()} at {r:.0%}" for r, one in grown.items()),
        words=("greater differences farther away", "smaller differences farther away"),
    )


def _of_entries(data: Outcomes, inputs: str) -> Statement:
    found = _everywhere(data, inputs, TRAINED, lambda s: s.run.width * s.numbers.largest_entry)
    norms = _everywhere(data, inputs, TRAINED, lambda s: s.numbers.weight_norm)
    return judged(
        inputs,
        "The number that is raised to the power of L, h·M with M the largest weight, is probably below 1 (4.1).",
        trends.BELOW_ONE,
        found,
        of="h·M",
        evidence=f"h·M {_range(f.mean for f in found)}; M_W, which it stands for, {_range(f.mean for f in norms)}",
        words=("below 1", "not everywhere below 1"),
    )


def _of_both_inputs(data: Outcomes) -> Iterator[Statement]:
    rule = "agrees if both slopes have 95 % intervals on the same side of 0, differs if on opposite sides"
    for sweep in (DEPTH, WIDTH):
        pair = [trend_of(data, inputs, TRAINED, sweep, "c").slope for inputs in (PIXELS, FEATURES)]
        verdict = trends.judge_same(*pair)
        claim = f"On features the effect of {sweep} is consistent with that on pixels (5.2)."
        evidence = f"slopes of log c {pair[0].shown()} on pixels, {pair[1].shown()} on features, {UNIT[sweep]}"
        seen = {AGREES: "the same direction", DIFFERS: "opposite directions"}.get(verdict, UNDECIDED)
        yield Statement("both", seen, Finding(claim, rule, evidence, verdict))


def _of_bounds(data: Outcomes) -> Iterator[Statement]:
    """Yield whether bounds hold. The numbers have no intervals, because a single violation decides."""
    every = [state for name in STATES for state in data.states[name].values()]
    theorem = [s.numbers.published / s.numbers.ggn for s in every if s.numbers.ggn > 0]
    lemma = [margin for s in data.states[TRAINED].values() for margin in s.margins(s.numbers.published)]
    smallest = min(s.numbers.weight_norm for s in every)
    for claim, ratios, evidence in (
        (
            "Theorem 1 bounds ‖G‖ (of the mean over samples, trained and at initialization).",
            theorem,
            f"it is {_orders(theorem)} times ‖G‖; the smallest M_W is {smallest:.2f}, and from 0.595 on it is proved",
        ),
        (
            "Lemma 2, with Theorem 1's bound, bounds the difference (4.2, 5.2).",
            [margin for _, margin in lemma],
            "it is, in units of the difference, "
            + "; ".join(
                f"{_orders([m for r, m in lemma if r == radius])} at distance {radius:.0%}"
                for radius in data.study.setup.radii
            ),
        ),
    ):
        found = [Interval(ratio, ratio, ratio) for ratio in ratios]
        words = ("it holds everywhere", "it is violated")
        yield judged("both", claim, trends.AT_LEAST_ONE, found, of="bound/bounded", evidence=evidence, words=words)


def follow_up(found: SubspaceStabilization) -> Iterator[Statement]:
    """Yield the comparison of a measurement in the dominant subspace with its closed form and rate."""
    excess, half = (
        found.monte_carlo_constant / found.constant - 1,
        2 * found.monte_carlo_constant_error / found.constant,
    )
    ratio = Interval(excess, excess - half, excess + half)
    yield judged(
        PIXELS,
        f"Follow-up (arXiv:2604.14870): the quadratic model gives Δ₂(k), here with σ = {found.sigma:g}.",
        trends.EQUAL,
        [ratio],
        of="the relative difference of the constants by draws and by the model",
        evidence=f"constant {found.constant:.3g} by the model; the draws' differs by {ratio.shown('+.1%')}",
        words=("they are equal", "they differ"),
    )
    half = 2 * found.rate_error
    rate = Interval(found.rate, found.rate - half, found.rate + half)
    yield judged(
        PIXELS,
        f"Follow-up: Δ₂(k) falls as 1/k², here with σ = {found.sigma:g}.",
        trends.INVERSE_SQUARE,
        [rate],
        of="the fitted exponent, over orders,",
        evidence=f"exponent {rate.shown('.3f')}",
        words=("it falls as 1/k²", "it falls with another exponent"),
    )


def _range(values: Iterable[float]) -> str:
    found = list(values)
    return f"from {min(found):.3g} to {max(found):.3g}"


def _orders(ratios: Sequence[float]) -> str:
    """Return ratios as orders of magnitude."""
    powers = np.log10(ratios)
    return f"10^{powers.min():.1f} to 10^{powers.max():.1f} (median 10^{np.median(powers):.1f})"
