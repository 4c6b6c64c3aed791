"""The checkpoint rule against its definition, on histories of every kind."""

from hypothesis import given
from hypothesis import strategies as st

from lightning_hesd.spectra.selection import Candidate, CandidateFilter

# A coarse grid of values, so that ties are frequent; sums and differences of eighths are exact.
candidates = st.lists(st.tuples(st.integers(0, 8), st.integers(-8, 0), st.booleans()), min_size=1, max_size=12).map(
    lambda rows: [
        Candidate(epoch, 10 * epoch, score / 8, criterion / 8, mainly_positive, path=f"{epoch}.ckpt")
        for epoch, (score, criterion, mainly_positive) in enumerate(rows)
    ]
)
rules = st.builds(CandidateFilter, tolerance=st.sampled_from([0.0, 0.125, 0.25, 2.0]), require_mp=st.booleans())


def brute_force(history: list[Candidate], rule: CandidateFilter) -> Candidate:
    """The rule as the design states it, over the whole history."""
    best = max(c.score for c in history)
    near = [c for c in history if abs(c.score - best) <= rule.tolerance]
    if rule.require_mp:
        near = [c for c in near if c.mainly_positive]
        if not near:
            return min((c for c in history if c.score == best), key=lambda c: c.epoch)
    return min(near, key=lambda c: (-c.criterion, c.epoch))


@given(candidates, rules)
def test_the_pick_of_the_front_equals_the_pick_of_everything(history: list[Candidate], rule: CandidateFilter) -> None:
    kept: list[Candidate] = []
    best = float("-inf")
    for number, candidate in enumerate(history, 1):
        best = max(best, candidate.score)
        kept = rule.pareto_front([*kept, candidate], best)
        assert rule.pick(kept, best) == brute_force(history[:number], rule)


@given(candidates, rules)
def test_nothing_is_kept_that_no_continuation_could_pick(history: list[Candidate], rule: CandidateFilter) -> None:
    """Every kept candidate wins in some continuation: one that raises the best metric just to its tolerance."""
    best = max(c.score for c in history)
    kept = rule.pareto_front(history, best)
    for candidate in kept:
        latest = Candidate(99, 990, max(best, candidate.score + rule.tolerance), -1e9, mainly_positive=False, path="")
        continued = [*history, latest]
        assert candidate in {brute_force(history, rule), brute_force(continued, rule)}


def test_no_candidates() -> None:
    assert CandidateFilter(tolerance=0.1, require_mp=True).pick([], float("-inf")) is None
