"""The picks by the loss over the analysis samples: of records, and of their payloads, against the definition."""

import math
from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hesd import Spectrum
from lightning_hesd.spectra.decisions import decisions
from lightning_hesd.spectra.payload import record_payload, selection_payload
from lightning_hesd.spectra.record import SpectrumRecord
from lightning_hesd.spectra.rules import RULES
from lightning_hesd.spectra.selection import Candidate, CandidateFilter, SelectionEvent, candidates_of, picks
from tests.training.scripted import make_spectrum

# Coarse values, so that ties are frequent; NaN is an undefined C_t, and no value a failed analysis.
values = st.tuples(
    st.sampled_from([-0.9, -0.5, -0.25, -0.125, math.nan]),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0, 2, 3, 39, 40]),
)


@cache  # its interval takes a millisecond
def spectrum_of(c_t: float, lambda_max: float, loss: int) -> Spectrum:
    return make_spectrum(c_t, lambda_max=lambda_max, loss=loss / 8)


@st.composite
def histories(draw: st.DrawFn) -> list[SpectrumRecord]:
    found = []
    for epoch, entry in enumerate(draw(st.lists(st.one_of(st.none(), values), min_size=1, max_size=8)), start=-1):
        spectrum = None if entry is None else spectrum_of(*entry)
        found.append(SpectrumRecord(epoch, 10 * (epoch + 1), spectrum, None if spectrum else "failed"))
    return found


SHOWN = {name: rule for name, rule in RULES.items() if rule.is_shown}


def by_definition(history: list[SpectrumRecord]) -> tuple[list[SpectrumRecord], dict[str, SpectrumRecord]]:
    """The candidates and the picks, as section 4.2 has them."""
    losses = [record.spectrum.loss for record in history if record.spectrum]
    trained = [r for r in history if r.epoch >= 0 and r.spectrum and not math.isnan(r.spectrum.c_t)]
    lowest = min((r.spectrum.loss for r in trained if r.spectrum), default=math.inf)
    tolerance = 0.05 * max(losses[0] - lowest, 0.0) if losses else 0.0
    candidates = [r for r in trained if r.spectrum and r.spectrum.loss <= lowest + tolerance and r.spectrum.c_t > -0.6]
    candidates = candidates or [r for r in trained if r.spectrum and r.spectrum.loss == lowest][:1]
    found = {}
    for name, rule in SHOWN.items():
        if candidates:
            best = max(rule.score(record) for record in candidates)
            found[name] = next(record for record in candidates if rule.score(record) == best)
    return candidates, found


@settings(max_examples=40, deadline=None, derandomize=True)
@given(histories())
def test_picks_are_those_of_the_definition_from_records_and_from_payloads(history: list[SpectrumRecord]) -> None:
    candidates, expected = by_definition(history)
    assert [id(record) for record in candidates_of(history)] == [id(record) for record in candidates]
    assert {name: id(record) for name, record in picks(history).items()} == {n: id(r) for n, r in expected.items()}
    from_payloads = {rule["rule"]: rule for rule in decisions([record_payload(record) for record in history], [])}
    assert {name: rule["pick"] and rule["pick"]["epoch"] for name, rule in from_payloads.items()} == {
        name: expected[name].epoch if name in expected else None for name in SHOWN
    }


def test_a_state_that_a_resumed_run_has_ranked_again_counts_once() -> None:
    states = [Candidate(epoch, 10 + 10 * epoch, -0.5, -0.2, mainly_positive=True, path="") for epoch in range(2)]
    condition = CandidateFilter(0.05, require_mp=True)
    events = [SelectionEvent("highest_c_t", None, "min", condition, state, states[0]) for state in states]
    found = decisions([], [selection_payload(event) for event in (*events, events[1])])[0]
    assert found["near"] == [10, 20]
    assert "2 of 2 analyzed states" in found["why"]


def test_no_fallback_leaves_none_without_mp_spectra() -> None:
    history = [SpectrumRecord(epoch, 10 * (epoch + 1), make_spectrum(-0.9)) for epoch in range(2)]
    assert candidates_of(history, fallback=False) == []
    assert picks(history, fallback=False) == {}
    assert set(picks(history)) == set(SHOWN)
