"""What spectra are compared with, and what the answer is, also at the ends of ranges and sizes."""

import math
from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest

from lightning_hesd import SpectrumHistory, compare_with_reference
from lightning_hesd.commands.report import run_data
from lightning_hesd.spectra import reference_range
from lightning_hesd.spectra.analysis_lines import WIDTH
from lightning_hesd.spectra.payload import to_json
from lightning_hesd.spectra.payload_reading import PayloadError, read_payload
from lightning_hesd.spectra.record import SpectrumRecord
from lightning_hesd.spectra.reference_range import LEAST_NETWORKS, range_of, similar
from lightning_hesd.spectra.reference_table import (
    ARCHITECTURES,
    PHASES,
    QUANTITIES,
    TABLE,
    ReferenceState,
    phase_by_loss,
    quantities_of,
    read_states,
    reference_states,
    states_text,
)
from lightning_hesd.spectra.summary import summarize
from tests.spectra.nodes import layer, spectrum
from tests.states import history_of
from tests.training.scripted import make_spectrum

INF = math.inf


def state(number: int = 0, value: float = 0.0, **changes: Any) -> ReferenceState:
    values = dict.fromkeys(QUANTITIES, (value, value))
    return ReferenceState(number, 0, "perceptron", 100, "late", values)._replace(**changes)


STATES = [state(number, float(number)) for number in range(21)]
"""21 networks with the values 0, 1, ..., 20 in every quantity: the quantiles of 10 % and 90 % are 2 and 18."""


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [
        (2, 2, "usual"),
        (18, 18, "usual"),
        (1.9, 1.9, "unusual"),
        (18.1, 18.1, "unusual"),
        (0, 20, "no comparison"),  # known too coarsely
        (20, 20, "unusual"),
        (-0.1, -0.1, "outside what we have seen"),
        (20.1, 20.1, "outside what we have seen"),
        (-INF, -5, "outside what we have seen"),
        (-5, 2, "usual"),  # the whole interval must lie beyond
        (-5, 1.9, "unusual"),
        (18.1, 30, "unusual"),
        (-INF, 18, "usual"),
        (1.9, 18.1, "no comparison"),
    ],
)
def test_the_answer_at_the_ends_of_the_range(low: float, high: float, answer: str) -> None:
    found = range_of(STATES, "c_t")
    assert found is not None
    assert (found.usual, found.seen, found.networks) == ((2, 18), (0, 20), 21)
    assert found.answer(low, high) == answer
    between = range_of(STATES[:20], "c_t")  # quantiles between two values: the outer one counts
    assert between is not None
    assert between.usual == (1, 18)


def test_the_range_of_intervals_reaches_from_low_to_high_ends_and_skips_what_is_unknown() -> None:
    states = [
        state(n, values={"c_t": (-INF if n == 0 else -n - 1, -n), "stable_rank": (math.nan, math.nan)})
        for n in range(LEAST_NETWORKS)
    ]
    found = range_of(states, "c_t")
    assert found is not None
    assert found.seen == (-INF, 0)
    assert not math.isnan(found.usual[0])
    assert range_of(states, "stable_rank") is None
    assert range_of(states[1:], "c_t") is None  # one too few


def test_similar_networks_are_of_the_same_kind_and_phase_and_up_to_ten_times_as_large() -> None:
    sizes = [state(n, dimension=size) for n, size in enumerate((9, 10, 100, 1000, 1001))]
    assert [s.dimension for s in similar(sizes, "perceptron", 100, "late")] == [10, 100, 1000]
    kinds = [state(architecture=kind) for kind in ARCHITECTURES]
    assert [s.architecture for s in similar(kinds, "attention", 100, "late")] == ["attention"]
    assert similar(kinds, "", 100, "late") == kinds
    phases = [state(phase=phase) for phase in PHASES]
    assert [s.phase for s in similar(phases, "perceptron", 100, "start")] == ["start"]
    assert [s.phase for s in similar(phases, "perceptron", 100, None)] == ["early", "middle", "late"]


def test_states_of_one_network_count_once() -> None:
    few = [state(n // 3, phase=PHASES[1 + n % 3]) for n in range(3 * (LEAST_NETWORKS - 1))]
    compared = compare_with_reference(spectrum(-1.0, 4.0), architecture="", states=few)
    assert compared.networks == LEAST_NETWORKS - 1
    wanted = "it takes 10 networks of any kind of 10 to 1,000 parameters at any time after the first step"
    assert str(compared) == f"no comparison: {compared.reason}" == f"no comparison: {wanted}, and the table has 9"
    assert compared.sentence == f"No comparison: {compared.reason}."
    assert compared.quantities == ()
    enough = compare_with_reference(spectrum(-1.0, 4.0), architecture="", states=[*few, state(99)])
    assert (enough.reason, enough.networks) == (None, LEAST_NETWORKS)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "other"}, "no networks of this kind"),
        ({"architecture": "of a later release"}, "no networks of this kind"),
        ({"architecture": "part"}, "only some of the parameters"),
        ({"matrix": "ggn"}, "this matrix is the ggn"),
        ({"verified": "no"}, "not those of the loss"),
    ],
)
def test_what_the_table_has_not_is_not_compared(changes: dict[str, str], reason: str) -> None:
    compared = compare_with_reference(spectrum(-1.0, 4.0, **changes), states=STATES)
    assert compared.reason is not None
    assert reason in compared.reason
    with pytest.raises(ValueError, match="`architecture` must be '' or 'perceptron'"):
        compare_with_reference(spectrum(1.0), architecture="part")


def test_the_quantities_of_a_spectrum() -> None:
    # 100 dimensions; two nodes are converged eigenvalues, and the rest of the start vector is at zero.
    found = spectrum(-1.0, 0.0, 4.0, weights=[[0.01, 0.98, 0.01]], squared_weight_norm=10.0, loss=2.0)
    found = replace(found, by_layer={"a": layer(50, 0.8, error=0.1), "b": layer(50, 3.2, error=0.1)})
    values = quantities_of(found, 4.0)
    assert values["c_t"] == pytest.approx((-0.25, -0.25), abs=1e-6)
    assert values["relative_curvature"] == pytest.approx((10.0, 10.0), rel=1e-6)
    assert values["far_negative_share"] == (0.01, 0.01)  # one eigenvalue, exactly
    assert values["stable_rank"] == pytest.approx((17 / 16,) * 2)
    assert values["largest_share"] == pytest.approx((0.75, 0.85))  # two standard errors
    # In another unit of the loss, they are the same.
    scaled = replace(found, nodes=3 * found.nodes, loss=3 * found.loss, rounding=3 * found.rounding, by_layer={})
    of_scaled = quantities_of(scaled, 12.0)
    for key in ("c_t", "relative_curvature", "far_negative_share", "stable_rank"):
        assert of_scaled[key] == pytest.approx(values[key])
    # Shares in a trace that may be zero are noise.
    layers = {"a": layer(50, -1.0, error=0.1), "b": layer(50, 6.0, error=0.1)}
    noisy = spectrum(-1.0, 1.1, residual=0.5, by_layer=layers)
    assert 2 * noisy.trace_error > 5.0
    assert math.isnan(quantities_of(noisy, 4.0)["largest_share"][0])


@pytest.mark.parametrize(("norm", "start"), [(10.0, None), (10.0, 0.0), (10.0, -1.0), (None, 100.0)])
def test_unknown_quantities_are_not_compared(norm: float | None, start: float | None) -> None:
    found = spectrum(-1.0, 4.0, squared_weight_norm=norm, architecture="perceptron")
    compared = {one.key: one for one in compare_with_reference(found, start_loss=start, states=STATES).quantities}
    for key in ("relative_curvature", "largest_share"):
        assert math.isnan(compared[key].low)
        assert compared[key].answer == "no comparison"
        assert compared[key].value == "unknown"
    assert compared["c_t"].answer == "outside what we have seen"
    assert str(compared["c_t"]) == "C_t = -0.25: outside what we have seen (middle 80 %: 2 to 18; all: 0 to 20)"


def test_phases_go_by_the_loss_that_is_left() -> None:
    losses = (2.0, 2.5, 1.01, 1.0, 0.2, 0.19)
    assert [phase_by_loss(loss, 2.0) for loss in losses] == ["start", "early", "early", "middle", "middle", "late"]
    assert [phase_by_loss(1.0, start) for start in (None, 0.0, -1.0)] == [None] * 3
    assert phase_by_loss(math.nan, 2.0) is None


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> SpectrumHistory:
    """A run with an analysis of the start, a failed one and a late one; the table has late states only."""
    states = tuple(state(n, -n / 20, dimension=2) for n in range(21))
    monkeypatch.setattr(reference_range, "reference_states", lambda: states)
    start, late = (make_spectrum(-0.95, loss=loss) for loss in (2.0, 0.1))
    failed = SpectrumRecord(0, 10, None, "OSError: gone")
    return history_of(SpectrumRecord(-1, 0, start), failed, SpectrumRecord(1, 20, late))


def test_a_record_is_compared_in_its_phase(history: SpectrumHistory) -> None:
    start, failed, late = (history.compare_with_reference(index) for index in range(3))
    assert start is not None
    wanted = "it takes 10 networks of any kind of 1 to 20 parameters before the first step"
    assert start.reason == f"{wanted}, and the table has none"
    assert failed is None
    assert late is not None
    assert late.among == "21 networks of any kind of 2 parameters that have less than a tenth of their first loss left"
    assert late.titles("unusual")[0] == "C_t"
    assert str(history.compare_with_reference()) == str(late)
    # Without an analysis of the start, the first loss is unknown: all trained states count.
    [*_, last] = history
    history[:] = [last]
    unknown = history.compare_with_reference()
    assert unknown is not None
    assert unknown.among.endswith("at any time after the first step")


def test_terminal_payload_and_report_show_it(history: SpectrumHistory, tmp_path: Any) -> None:
    summary = summarize(history, "hesd", seconds=1.0, overhead=None, kept={})
    assert summary is not None
    lines = [note for note in summary.notes if "21 networks of any kind" in note or "nusual: C_t" in note]
    assert lines
    assert max(map(len, lines)) <= WIDTH
    history.save(tmp_path / "hesd")
    first, failed, last = run_data(tmp_path)["records"]
    assert first["reference"]["reason"].startswith("it takes 10 networks")
    assert failed["reference"] == {}
    [c_t, *_] = last["reference"]["quantities"]
    assert c_t == {
        "key": "c_t", "title": "C_t", "value": "-0.95", "usual": "-0.9 to -0.1", "seen": "-1 to 0", "answer": "unusual",
    }  # fmt: skip
    text = to_json(last)
    assert read_payload(text)["reference"] == last["reference"]
    with pytest.raises(PayloadError, match="`reference`"):
        read_payload(text.replace('"among":', '"amid":'))


def test_the_table_in_the_package() -> None:
    text = (files("lightning_hesd.spectra") / TABLE).read_text(encoding="utf-8")
    assert len(text) < 40_000
    states = reference_states()
    assert states_text(states) == text
    assert {state.architecture for state in states} == set(ARCHITECTURES)
    assert {state.phase for state in states} == set(PHASES)
    assert len({state.network for state in states}) >= 60
    for kind in ARCHITECTURES:  # of a size in the middle, there is a comparison in each phase
        found = spectrum(-0.1, 1.0, dimension=10_000, squared_weight_norm=10.0, architecture=kind)
        assert compare_with_reference(found).reason is None
        assert compare_with_reference(found, start_loss=found.loss).reason is None
        assert compare_with_reference(found, start_loss=20 * found.loss).reason is None


def test_unknown_and_infinite_values_survive_in_the_table() -> None:
    values = {**dict.fromkeys(QUANTITIES, (0.5, 0.5)), "c_t": (-INF, -1.25), "stable_rank": (math.nan, math.nan)}
    text = states_text([state(values=values)])
    assert text.splitlines()[1] == "0,0,perceptron,100,late,-inf:-1.25,0.5,0.5,,0.5"
    [read] = read_states(text)
    assert read.values["c_t"] == (-INF, -1.25)
    assert math.isnan(read.values["stable_rank"][0])
