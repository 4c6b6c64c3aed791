"""The result of a comparison in a sentence that needs no knowledge of statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_hesd.judgment.candidates import LAST
from lightning_hesd.judgment.statistics import runs_needed
from lightning_hesd.spectra.analysis_lines import listed
from lightning_hesd.spectra.rules import rule_title

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_hesd.judgment.outcomes import Outcomes

MAX_NAMED = 3
"""A sentence names this many rules at most."""


def verdict(outcomes: Outcomes, against: str = LAST) -> str:
    """Return whether some rule is evidently better or worse than a baseline, with the largest gain."""
    if against not in outcomes.comparisons:
        return f"No rule can be compared with the {rule_title(against)}: no run has a pick of both."
    baseline = f"the {outcomes.titles[against]}"
    comparison = outcomes.comparisons[against]
    rules = [place for place, name in enumerate(comparison.names) if name in outcomes.rules]
    found = comparison.statistics
    ranked = [int(place) for place in np.argsort(-found.means, kind="stable") if place in rules and found.counts[place]]
    if not ranked:
        return f"No rule can be compared with {baseline}: no run has a pick of both."

    def named(places: Sequence[int]) -> str:
        shown = [f"{_title(outcomes, against, place)} ({_gain(outcomes, against, place)})" for place in places]
        more = [f"{len(shown) - MAX_NAMED} more"] if len(shown) > MAX_NAMED else []
        return listed([*shown[:MAX_NAMED], *more])

    best = _best(outcomes, against, ranked[0])
    needed = runs_needed(outcomes.level)
    count = int(found.counts[ranked].max())
    if count < needed:
        few = "One run cannot" if count == 1 else f"{count} runs are too few to"
        claim = (
            f"{few} tell a rule from {baseline}: at least {needed} runs are needed (level {100 * outcomes.level:.2g}%)."
        )
        return f"{claim} Here {best}."
    over = f"Over {count} runs"
    better = [place for place in ranked if found.better[place]]
    worse = [place for place in reversed(ranked) if found.worse[place]]
    if not better and not any(found.wins[place] or found.losses[place] for place in ranked):
        return f"{over} the pick of every rule is exactly as good as {baseline}."
    if better:
        sentence = f"{over} {named(better)} {'is' if len(better) == 1 else 'are'} evidently better than {baseline}."
    else:
        sentence = f"{over} no rule is evidently better than {baseline}; {best}."
    if worse:
        sentence += f" Evidently worse {'is' if len(worse) == 1 else 'are'} {named(worse)}."
    return sentence


def baselines_verdict(outcomes: Outcomes) -> list[str]:
    """Return a sentence about the baselines that are evidently better or worse than the last epoch, if any are."""
    if LAST not in outcomes.comparisons:
        return []
    comparison = outcomes.comparisons[LAST]
    found, sentences = comparison.statistics, []
    for place, name in enumerate(comparison.names):
        if name not in outcomes.rules and (found.better[place] or found.worse[place]):
            word = "better" if found.better[place] else "worse"
            gain = _gain(outcomes, LAST, place)
            sentences.append(f"The {outcomes.titles[name]} is evidently {word} than the last epoch: {gain}.")
    return sentences


def _title(outcomes: Outcomes, against: str, place: int) -> str:
    return outcomes.titles[outcomes.comparisons[against].names[place]]


def _gain(outcomes: Outcomes, against: str, place: int) -> str:
    """Return the mean gain with its unit and its interval, or why many runs give no interval."""
    found, numbers = outcomes.comparisons[against].statistics, outcomes.numbers
    interval = numbers.interval(float(found.low[place]), float(found.high[place]))
    if not interval and found.counts[place] >= runs_needed(outcomes.level):
        differing = found.wins[place] + found.losses[place]
        interval = f"(from {differing} of {found.counts[place]} runs, too few for an interval)"
    return f"{numbers.difference(float(found.means[place]))}{numbers.unit} {interval}".rstrip()


def _best(outcomes: Outcomes, against: str, place: int) -> str:
    """Return the rule with the largest mean gain, and the gain."""
    found, title = outcomes.comparisons[against].statistics, _title(outcomes, against, place)
    if found.wins[place] + found.losses[place] == 0:
        return f"the best of them, {title}, is exactly as good"
    words = f"the largest gain, {title}, is" if found.means[place] > 0 else f"the best of them, {title}, is at"
    return f"{words} {_gain(outcomes, against, place)}"
