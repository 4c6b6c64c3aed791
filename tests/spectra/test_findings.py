"""Each kind of finding, planted in a history, and none in a healthy one."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lightning_hesd.spectra.analysis_lines import WIDTH
from lightning_hesd.spectra.analyzed_run import Found
from lightning_hesd.spectra.differences import c_t_difference
from lightning_hesd.spectra.finding_kinds import GROWTH, KINDS
from lightning_hesd.spectra.findings import Finding, findings
from lightning_hesd.spectra.layer_curvature import LayerCurvature
from lightning_hesd.spectra.record import SpectrumRecord
from lightning_hesd.spectra.spectrum import Spectrum
from lightning_hesd.spectra.summary import MAX_FINDINGS, STATED, summarize
from tests.spectra.nodes import layer
from tests.training.scripted import make_spectrum

C_T = (-0.5, -0.3, -0.2, -0.12, -0.08)
LOSSES = (2.0, 1.0, 0.5, 0.3, 0.2)


def healthy(**of_spectra: Any) -> list[SpectrumRecord]:
    """A run whose C_t rises while the loss falls, from an analysis of the start on."""
    layers = {"a": layer(20, 0.4), "b": layer(80, 0.6)}
    spectra = [
        replace(make_spectrum(c_t, loss=loss, lambda_max=1.0 + i), by_layer=layers, **of_spectra)
        for i, (c_t, loss) in enumerate(zip(C_T, LOSSES, strict=True))
    ]
    start = SpectrumRecord(-1, 0, make_spectrum(-0.95, loss=2.3), first_loss=2.3)
    return [start, *(SpectrumRecord(e, 10 * e + 10, found, first_loss=2.3) for e, found in enumerate(spectra))]


def changed(spectrum: Spectrum, gradients: dict[str, float] | None = None, **fields: Any) -> list[SpectrumRecord]:
    """The healthy run with another spectrum at its end, of which `fields` are changed."""
    *run, last = healthy()
    return [*run, replace(last, spectrum=replace(spectrum, **fields), gradients=gradients or {})]


def with_ratios(*ratios: float) -> list[SpectrumRecord]:
    all_ratios = (500.0, *ratios)  # of the start the state of the optimizer says nothing
    return [
        replace(r, preconditioned=make_spectrum(-0.1, lambda_max=2 * ratio), stability_threshold=2.0)
        for r, ratio in zip(healthy(), all_ratios, strict=True)
    ]


def sampled(*c_t: float, scatter: float) -> list[SpectrumRecord]:
    """A run at one loss whose values of C_t have independent sampling errors: `scatter` in two resamples each."""
    run = []
    for epoch, value in enumerate(c_t):
        lowest = np.full(2 * len(c_t), value)
        lowest[2 * epoch : 2 * epoch + 2] += [scatter, -scatter]
        extremes = np.array([lowest, np.ones_like(lowest)])
        of_samples = {"group_curvatures": np.full((3, 4), 0.25), "resampled_extremes": extremes} if scatter else {}
        run.append(SpectrumRecord(epoch, 10 * epoch + 10, replace(make_spectrum(value), **of_samples)))
    return run


def notes(run: list[SpectrumRecord], overhead: float | None = None) -> list[str]:
    """The lines about findings in the table of a run."""
    made = summarize(run, "hesd", seconds=1.0, overhead=overhead, kept={})
    assert made is not None
    found = list(made.notes)
    begin = "findings, the most important first:"
    return found[found.index(begin) + 1 :] if begin in found else []


WRONG = "differences of the loss give 2, the products 3"
PLANTED: dict[str, tuple[str, list[SpectrumRecord], str]] = {
    "failed": (
        "failed, certain",
        [*healthy()[:3], SpectrumRecord(2, 30, None, "RuntimeError: no luck.\nline 2"), *healthy()[4:]],
        "1 of 6 analyses failed, first at epoch 2: RuntimeError: no luck.",
    ),
    "wrong products": (
        "unverified, certain",
        changed(make_spectrum(math.nan), verified="no", verification=WRONG, reason=WRONG),
        f"1 of 6 analyses found wrong products, first at epoch 4: {WRONG}.",
    ),
    "wrong products in a run": (
        "unverified, certain",
        [*healthy(), SpectrumRecord(5, 60, None, f"WrongDerivativeError: {WRONG}.\nmore")],
        f"1 of 7 analyses found wrong products, first at epoch 5: {WRONG}.",
    ),
    "unverified": (
        "unverified, hint",
        changed(make_spectrum(-0.08, loss=0.2), verified="unknown", verification="the loss is noisy"),
        "1 of 6 analyses could not be verified, first at epoch 4: the loss is noisy.",
    ),
    "open type": (
        "short_run, certain",
        changed(make_spectrum(-0.4, loss=0.2), residuals=[[0.01, 0.0]]),
        "C_t may be above or below -0.6 in 1 of 5 analyses, at epoch 4 [-0.72, -0.32].",
    ),
    "wide intervals": (
        "short_run, certain",
        [SpectrumRecord(e, e, replace(make_spectrum(c), residuals=[[0.003, 0.0]])) for e, c in enumerate(C_T[2:])],
        "C_t is known to ±0.11 in the median; its values differ by 0.12 in all.",
    ),
    "small sample": (
        "small_sample, likely",
        sampled(-0.2, -0.21, -0.22, -0.202, scatter=0.03),
        "3 of 3 other candidates are within 2 standard errors of the pick's C_t.",
    ),
    "start only": ("mainly_negative, certain", healthy()[:1], "C_t is -0.95 at the start, before the first step."),
    "untrained": (
        "mainly_negative, likely",
        [healthy()[0], SpectrumRecord(0, 10, make_spectrum(-0.9, loss=2.2))],
        "C_t is -0.9 at epoch 0, the loss 2.2, near that of the first analysis, 2.3.",
    ),
    "perhaps untrained": (
        "mainly_negative, hint",
        [SpectrumRecord(0, 10, make_spectrum(-0.9, loss=2.2)), SpectrumRecord(1, 20, make_spectrum(-0.9, loss=2.1))],
        "C_t is -0.9 at epoch 1, the loss 2.1, near that of the first analysis, 2.2.",
    ),
    "one layer is negative": (
        "mainly_negative, likely",
        changed(make_spectrum(-2.0, loss=0.2), by_layer={"a": layer(20, 0.5, 0.1), "b": layer(20, 0.5, 0.9)}),
        "C_t is -2 at epoch 4, and 90% of the negative curvature is in b.",
    ),
    "clipped": (
        "mainly_negative, hint",
        changed(make_spectrum(-2.0, loss=0.2), gradients={"clipped_share": 0.75}),
        "C_t is -2 at epoch 4, and gradients were clipped in 75% of the sampled steps.",
    ),
    "MN": ("mainly_negative, certain", changed(make_spectrum(-2.0, loss=0.2)), "C_t is -2 at epoch 4."),
    "edge": (
        "edge_of_stability, likely",
        with_ratios(0.4, 0.9, 1.02, 0.98, 1.01),
        "The stability ratio was 0.9 or more in 4 of 5 analyses, and 1.02 at most.",
    ),
    "two spikes": (
        "edge_of_stability, hint",
        with_ratios(0.4, 1.1, 1.6, 0.1, 0.2),
        "The stability ratio was 0.9 or more in 2 of 5 analyses, and 1.6 at most.",
    ),
    "headroom": (
        "headroom, hint",
        with_ratios(0.001, 0.002, 0.003, 0.002, 0.001),
        "The stability ratio was 0.003 at most, in 5 analyses.",
    ),
    "quasi-singular": (
        "quasi_singular, hint",
        changed(make_spectrum(-0.08, loss=0.25, lambda_max=0.3)),
        "λ_max fell from 4 to 0.3 at epoch 4, at about the same loss.",
    ),
    "one layer": (
        "concentrated, certain",
        changed(make_spectrum(-0.08, loss=0.2), by_layer={"a": layer(20, 0.95), "b": layer(80, 0.05)}),
        "a has 95% of the trace, 95% of λ_max's eigenvector, 20.0% of the parameters.",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted(name: str) -> None:
    key_and_confidence, run, evidence = PLANTED[name]
    [found] = findings(run)
    assert (f"{found.key}, {found.confidence}", found.evidence) == (key_and_confidence, evidence)
    lines = notes(run)  # in the terminal
    assert lines == ([] if found.key in STATED else [f"- {evidence}", f"  {found.confidence}; next: {found.action}"])
    assert max(map(len, lines), default=0) <= WIDTH


def test_every_kind_is_planted() -> None:
    assert {told.split(",")[0] for told, *_ in PLANTED.values()} | {"cost"} == set(KINDS)


def test_a_healthy_run_has_none() -> None:
    assert findings(healthy(), overhead=0.3) == notes(healthy()) == []
    assert findings([]) == []
    assert findings(with_ratios(0.02, 0.02, 0.5, 0.3, 0.02)) == []
    assert findings(with_ratios(0.02, 0.02, 5.0, 0.3, 0.02)) == []


def test_the_cost_of_long_analyses() -> None:
    run = healthy(seconds=30.0)
    [found] = findings(run, overhead=2.5)
    assert (found.key, found.confidence) == ("cost", "certain")
    assert found.evidence == "The analyses took 2.5 times as long as training, 150 s in all."
    assert notes(run, 2.5) == [f"- {found.evidence}", f"  certain; next: {found.action}"]
    # Cheap, of an unknown share, or short.
    assert findings(healthy(seconds=30.0), overhead=0.9) == []
    assert findings(healthy(seconds=30.0)) == []
    assert findings(healthy(seconds=1.0), overhead=2.5) == []


class TestSample:
    def test_the_advice_is_enough(self):
        """Standard errors that are smaller by the root of the advised factor tell half of the candidates apart."""
        c_t = (-0.1, -0.15, -0.12, -0.14, -0.16)  # half of them are 0.05 or more below the pick
        [found] = findings(sampled(*c_t, scatter=0.1))
        factor = float(found.action.split("`, ")[1].split(" times")[0])
        assert f"`num_samples={math.ceil(8 * factor)}`" in found.action
        assert self.told_apart(c_t, scatter=0.1 / math.sqrt(1.02 * factor)) == 2
        assert self.told_apart(c_t, scatter=0.1 / math.sqrt(0.95 * factor)) == 1
        # A sample that need not grow much is no finding.
        least = math.sqrt(GROWTH[0] / factor)
        assert findings(sampled(*c_t, scatter=0.098 * least)) == []
        assert findings(sampled(*c_t, scatter=0.102 * least)) != []

    @staticmethod
    def told_apart(c_t: tuple[float, ...], scatter: float) -> int:
        pick, *others = [record.spectrum for record in sampled(*c_t, scatter=scatter)]
        assert pick is not None
        return sum(c_t_difference(pick, other).is_evident for other in others if other is not None)

    def test_no_fault_of_the_sample(self):
        assert findings(sampled(-0.1, -0.1, -0.1001, scatter=0.1)) == []  # equal candidates
        assert findings(sampled(-0.1, -0.15, -0.12, -0.14, -0.5, scatter=0.1)) == []  # one of four is evident
        assert findings(sampled(-0.1, -0.1, -0.1, scatter=0.0)) == []  # no errors
        assert findings(sampled(-0.1, -0.1, scatter=0.1)) == []  # two candidates


def test_wide_intervals_double_the_steps_unless_they_were_asked_for() -> None:
    def wide(residual: float, *c_t: float, **fields: Any) -> list[SpectrumRecord]:
        spectra = [replace(make_spectrum(c), residuals=[[residual, 0.0]], **fields) for c in c_t]
        return [SpectrumRecord(epoch, epoch, spectrum) for epoch, spectrum in enumerate(spectra)]

    [found] = findings(wide(0.003, -0.2, -0.21, -0.19))
    assert found.action == "Set `steps=4`, or `tolerance=0.05`."
    assert findings(wide(0.003, -0.2, -0.21, -0.19, tolerance="auto")) == []
    assert findings(wide(1e-4, -0.2, -0.2, -0.2)) == []  # constant, and accurate to 2 %


class TestMainlyNegative:
    def test_neither_gradients_that_were_not_clipped_nor_a_single_analysis_tell_the_cause(self):
        [found] = findings(changed(make_spectrum(-2.0, loss=0.2), gradients={"clipped_share": 0.0}))
        assert found.title == "MN: the cause is not known"
        assert found.action.startswith("Gradients were not clipped")
        record = SpectrumRecord(0, 10, make_spectrum(-2.0, loss=2.0), first_loss=2.0)
        assert [found.title for found in findings([record])] == ["MN: the cause is not known"]

    @pytest.mark.parametrize("shares", [(0.25, 0.75), (math.nan, math.nan)], ids=["several layers", "unknown"])
    def test_negative_curvature_that_is_in_no_single_layer(self, shares):
        layers = {name: layer(20, 0.5, share) for name, share in zip("ab", shares, strict=True)}
        [found] = findings(changed(make_spectrum(-2.0, loss=0.2), by_layer=layers))
        assert found.title == "MN: the cause is not known"


@pytest.mark.parametrize(
    "layers",
    [
        {"a": layer(20, 0.95, error=0.1), "b": layer(80, 0.05)},  # a share within its error
        {"a": layer(60, 0.95), "b": layer(40, 0.05)},  # a large layer may hold most
        {"a": layer(20, math.nan, math.nan), "b": layer(80, math.nan, math.nan)},
    ],
)
def test_layers_that_are_no_finding(layers: dict[str, LayerCurvature]) -> None:
    assert findings(changed(make_spectrum(-0.08, loss=0.2), by_layer=layers)) == []


def test_neither_no_curvature_nor_no_positive_eigenvalue_is_a_finding() -> None:
    negative = replace(make_spectrum(-0.1), nodes=np.array([[-2.0, -1.0]]))
    run = [SpectrumRecord(e, e, s) for e, s in enumerate([negative, make_spectrum(math.nan), negative])]
    assert findings(run) == []
    assert findings([replace(r, preconditioned=negative, stability_threshold=2.0) for r in healthy()]) == []


def test_what_matters_most_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    run = with_ratios(1.0, 1.0, 1.0, 1.0, 1.0)
    run[3] = replace(run[3], error="the layers: E")
    assert [found.key for found in findings(run, overhead=3.0)] == ["failed", "edge_of_stability"]
    monkeypatch.setitem(KINDS, "new", lambda _run: Found("New", "New.", "hint", "Look."))
    assert findings(run)[-1] == Finding("new", "New", "New.", "hint", "Look.")


def test_a_long_name_is_cut_at_a_space() -> None:
    layers = {"very " * 30 + "long": layer(20, 0.95), "b": layer(80, 0.05)}
    run = changed(make_spectrum(-0.08, loss=0.2), by_layer=layers)
    assert notes(run)[0].endswith("very ...")
    assert WIDTH - 5 <= len(notes(run)[0]) <= WIDTH


def test_more_than_a_few_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(MAX_FINDINGS + 2):
        monkeypatch.setitem(KINDS, str(number), lambda _run: Found("New", "New.", "hint", "Look."))
    assert len(notes(healthy())) == 2 * MAX_FINDINGS + 1
    assert notes(healthy())[-1] == "- and 2 more, in `callback.findings`"
