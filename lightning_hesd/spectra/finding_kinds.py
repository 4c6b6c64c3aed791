"""The kinds of findings: for each a function that looks for it in a run, and its thresholds. New kinds: `KINDS`.

How often planted faults and healthy trainings raise each: benchmarks/results/findings.md. No kind says that labels were
memorized: it takes a study with planted label noise to show that spectra tell.
"""

from __future__ import annotations

import math
from statistics import median, median_low
from typing import TYPE_CHECKING

from lightning_hesd.spectra import criteria
from lightning_hesd.spectra.analyzed_run import Found, share_of, time_of
from lightning_hesd.spectra.differences import STANDARD_ERRORS, are_comparable, c_t_difference
from lightning_hesd.spectra.record import START_EPOCH, UNTRAINED_DROP
from lightning_hesd.spectra.selection import first_loss, loss_tolerance, rank_by_loss
from lightning_hesd.spectra.spectrum import DEFAULT_TOLERANCE
from lightning_hesd.spectra.validation import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lightning_hesd.spectra.analyzed_run import AnalyzedRun, Confidence
    from lightning_hesd.spectra.layer_curvature import LayerCurvature
    from lightning_hesd.spectra.record import SpectrumRecord

LEAST_RECORDS = 3
"""Findings on the course of a run need so many analyses of trained weights."""

WIDE_SHARE = 0.5
"""C_t changes too little for its error if the median error is a larger share of its range over the run."""

TIED_SHARE = 0.8
"""The sample is too small if a larger share of the other candidates is not evidently worse than the pick."""

GROWTH = (4.0, 100.0)
"""Factors by which the sample would have to grow that are findings. Less hardly matters, and more would be needed where
candidates differ by almost nothing, which is no fault of the sample."""

EDGE = 0.9
"""Stability ratio from which on the optimizer counts as at the edge: 1, less the error from the finite sample."""

HEADROOM = 0.01
"""Stability ratio below which, in all analyses of a run, a higher learning rate is worth a try."""

TRACE_SHARE = 0.9
"""Share of the trace from which on one layer counts as holding most of the curvature."""

NEGATIVE_SHARE = 0.8
"""Share of the negative curvature from which on one layer explains a spectrum that is MN."""

LARGE_LAYER = 0.5
"""A layer with a larger share of the parameters may hold most of the curvature: that is no finding."""

LARGEST_COST = 1.0
"""Time of analyses over time of training from which on the cost is a finding."""

LEAST_SECONDS = 60.0
"""Analyses that take less time in all are cheap, whatever their share."""

WRONG = "WrongDerivativeError"
"""Name of the error of analyses whose products are not those of the loss."""


# Numbers that are absent or wrong -------------------------------------------------------------------------------------


def _failed(run: AnalyzedRun) -> Found | None:
    failures = [(record, record.error) for record in run.records if record.error is not None]
    failed = [(record, error) for record, error in failures if WRONG not in error]
    if not failed:
        return None
    record, error = failed[0]
    reason = first_line(error) or "no message"
    evidence = f"{share_of(failed, run.records)} failed, first {time_of(record)}: {reason.rstrip('.')}."
    return Found("Analyses failed", evidence, "certain", "Look the message up: page “When an analysis fails”.")


def _unverified(run: AnalyzedRun) -> Found | None:
    spectra = [(record, record.spectrum) for record in run.records if record.spectrum is not None]
    doubtful = [(record, s.verification) for record, s in spectra if s.verified == "unknown"]
    wrong = [(record, s.verification) for record, s in spectra if s.verified == "no"]
    # In a run, an analysis with wrong products fails.
    failures = [(record, record.error) for record in run.records if record.error is not None]
    wrong += [(record, error.partition(f"{WRONG}: ")[2]) for record, error in failures if WRONG in error]
    if not wrong and not doubtful:
        return None
    record, words = (wrong or doubtful)[0]
    detail = f"first {time_of(record)}: {first_line(words).rstrip('.')}."
    if wrong:
        evidence = f"{share_of(wrong, run.records)} found wrong products, {detail}"
        action = "Pass a `loss_fn`: see page “When an analysis fails”."
        return Found("Hessian-vector products are not those of the loss", evidence, "certain", action)
    evidence = f"{share_of(doubtful, run.records)} could not be verified, {detail}"
    action = "See page “Read a spectrum”, “Is it the Hessian of the loss?”."
    return Found("Hessian-vector products may not be those of the loss", evidence, "hint", action)


# Numbers that are uncertain -------------------------------------------------------------------------------------------


def _short_run(run: AnalyzedRun) -> Found | None:
    if not run.trained:
        return None
    steps = f"`steps={2 * max(spectrum.steps for _, spectrum in run.trained)}`"
    is_open = [(r, s) for r, s in run.trained if not criteria.type_certain(s.c_t_interval)]
    if is_open:
        record, spectrum = is_open[-1]
        low, high = spectrum.c_t_interval
        evidence = (
            f"C_t may be above or below {criteria.MP_THRESHOLD:g} in {share_of(is_open, run.trained)}, "
            f"{time_of(record)} [{low:.2g}, {high:.2g}]."
        )
        action = f"Set {steps}, or `tolerance='type'`."
        return Found("Too few Lanczos steps to tell the type", evidence, "certain", action)
    if any(spectrum.tolerance == "auto" for _, spectrum in run.trained):
        return None  # the sampling error is larger, by that option
    values = [spectrum.c_t for _, spectrum in run.trained]
    error, extent = median(spectrum.c_t_error for _, spectrum in run.trained), max(values) - min(values)
    relative = error / (median(map(abs, values)) or math.inf)
    if len(values) < LEAST_RECORDS or error <= WIDE_SHARE * extent or relative <= DEFAULT_TOLERANCE:
        return None
    evidence = f"C_t is known to ±{error:.2g} in the median; its values differ by {extent:.2g} in all."
    action = f"Set {steps}, or `tolerance={DEFAULT_TOLERANCE:g}`."
    return Found("Too few Lanczos steps for the differences of C_t", evidence, "certain", action)


def _small_sample(run: AnalyzedRun) -> Found | None:
    ranking = rank_by_loss(run.states, "highest_c_t")
    if ranking.pick is None or not ranking.qualified:
        return None
    picked = run.records[int(ranking.pick.path)].spectrum
    candidates = [run.records[int(candidate.path)].spectrum for candidate in ranking.qualified]
    others = [s for s in candidates if s is not None and s is not picked]
    if picked is None or len(others) < LEAST_RECORDS - 1 or not all(are_comparable(picked, s) for s in others):
        return None
    differences = [c_t_difference(picked, other) for other in others]
    tied = sum(not difference.is_evident for difference in differences)
    if tied <= TIED_SHARE * len(others):
        return None
    # A standard error falls with the root of the number of samples; the error of the Lanczos run stays.
    known = [max(abs(d.value) - d.numerical_error, 0.0) for d in differences]
    errors = [STANDARD_ERRORS * d.standard_error for d in differences]
    factor = median_low((error / left) ** 2 if left else math.inf for error, left in zip(errors, known, strict=True))
    if not GROWTH[0] <= factor <= GROWTH[1]:
        return None
    evidence = (
        f"{tied} of {len(others)} other candidates are within {STANDARD_ERRORS:g} standard errors of the pick's C_t."
    )
    samples = _round_up(picked.num_samples * factor)
    action = f"Set `num_samples={samples}`, {factor:.2g} times as many, to tell half of them."
    return Found("The sample is too small to tell the pick", evidence, "likely", action)


# What the numbers say of training -------------------------------------------------------------------------------------


def _mainly_negative(run: AnalyzedRun) -> Found | None:
    if run.last is None:
        return None
    record, spectrum = run.last
    if spectrum.hesd_type != "MN" or not criteria.type_certain(spectrum.c_t_interval):
        return None
    found = f"C_t is {spectrum.c_t:.3g} {time_of(record)}"
    if record.epoch == START_EPOCH:
        action = "Analyze trained weights: random ones are MN, without meaning."
        return Found("MN: the weights are random", f"{found}, before the first step.", "certain", action)
    first = first_loss(run.records)
    if record is not run.records[0] and first is not None and first - spectrum.loss < UNTRAINED_DROP * abs(first):
        evidence = f"{found}, the loss {spectrum.loss:.3g}, near that of the first analysis, {first:.3g}."
        action = "Train longer: until the loss falls, the type says nothing."
        # Without an analysis of the start, the loss may have fallen before the first one.
        confidence: Confidence = "likely" if run.records[0].epoch == START_EPOCH else "hint"
        return Found("MN: the weights look untrained", evidence, confidence, action)
    shares = {name: layer.negative_share for name, layer in spectrum.by_layer.items()}
    if len(shares) > 1:
        name, share = max(shares.items(), key=lambda item: -math.inf if math.isnan(item[1]) else item[1])
        if share >= NEGATIVE_SHARE:
            evidence = f"{found}, and {share:.0%} of the negative curvature is in {name}."
            action = "Look at this layer; `layers='auto'` gives its own C_t."
            return Found("MN: the negative curvature is in one layer", evidence, "likely", action)
    return _of_gradients(record, found)


def _of_gradients(record: SpectrumRecord, found: str) -> Found:
    """Return the finding on an MN spectrum that neither untrained weights nor a layer explain; `found`: its C_t."""
    clipped = record.gradients.get("clipped_share", 0.0)
    if clipped > 0:
        evidence = f"{found}, and gradients were clipped in {clipped:.0%} of the sampled steps."
        return Found("MN: gradients are clipped", evidence, "hint", "Train without clipping, and compare the types.")
    action = "Set `monitor_gradients=True`: are gradients clipped or rotated?"
    if record.gradients:
        action = "Gradients were not clipped: does the optimizer rotate them?"
    return Found("MN: the cause is not known", f"{found}.", "certain", action)


def _edge_of_stability(run: AnalyzedRun) -> Found | None:
    ratios = _stability_ratios(run)
    count = sum(ratio >= EDGE for ratio in ratios)
    at_the_edge = 0 < len(ratios) <= 2 * count
    if count < 2 and not at_the_edge:  # alone, it may be chance: a few weights that the optimizer has hardly moved yet
        return None
    evidence = (
        f"The stability ratio was {EDGE:g} or more in {count} of {len(ratios)} analyses, and {max(ratios):.3g} at most."
    )
    if at_the_edge:
        action = "If the loss oscillates, lower the learning rate, or warm it up."
        return Found("Training is at the edge of stability", evidence, "likely", action)
    action = "If the loss has spikes there, lower the learning rate."
    return Found("Training touched the edge of stability", evidence, "hint", action)


def _headroom(run: AnalyzedRun) -> Found | None:
    ratios = _stability_ratios(run)
    if len(ratios) < LEAST_RECORDS or not 0 < max(ratios) < HEADROOM:
        return None
    evidence = f"The stability ratio was {max(ratios):.2g} at most, in {len(ratios)} analyses."
    action = "Try a higher rate; the ratio ignores the noise of batches."
    return Found("The learning rate may have headroom", evidence, "hint", action)


def _stability_ratios(run: AnalyzedRun) -> list[float]:
    found = [record.stability_ratio for record in run.records if record.epoch != START_EPOCH]
    return [ratio for ratio in found if ratio is not None and math.isfinite(ratio)]


def _quasi_singular(run: AnalyzedRun) -> Found | None:
    if not run.trained:
        return None
    sizes = [spectrum.lambda_max for _, spectrum in run.trained]
    losses = [spectrum.loss for _, spectrum in run.trained]
    tolerance = loss_tolerance(run.states)
    if not criteria.quasi_singular(sizes, losses, tolerance=tolerance):
        return None
    record, _ = run.trained[-1]
    peak = max(size for size, loss in zip(sizes, losses, strict=True) if abs(loss - losses[-1]) <= tolerance)
    evidence = f"λ_max fell from {peak:.3g} to {sizes[-1]:.3g} {time_of(record)}, at about the same loss."
    action = "Pick by C_t: λ_max and trace do not measure flatness here."
    # λ_max of networks with batch normalization jumps as much from one analysis to the next.
    return Found("The spectrum may be quasi-singular", evidence, "hint", action)


def _concentrated(run: AnalyzedRun) -> Found | None:
    if run.last is None or run.last[0].epoch == START_EPOCH:
        return None
    _, spectrum = run.last
    layers = {name: layer for name, layer in spectrum.by_layer.items() if math.isfinite(layer.trace_share)}
    if len(layers) < 2:
        return None
    name, layer = max(layers.items(), key=lambda item: item[1].trace_share)
    size = layer.dimension / sum(other.dimension for other in layers.values())
    if _least_share(layer, layers) < TRACE_SHARE or size > LARGE_LAYER:
        return None
    evidence = (
        f"{name} has {layer.trace_share:.0%} of the trace, {layer.lambda_max_weight:.0%} of λ_max's eigenvector, "
        f"{size:.1%} of the parameters."
    )
    action = "Compare its scale and learning rate: page “Analyze layers”."
    return Found("One layer holds most of the curvature", evidence, "certain", action)


def _least_share(layer: LayerCurvature, layers: Mapping[str, LayerCurvature]) -> float:
    """Return the share of a layer in the trace, if its trace is two standard errors smaller than estimated."""
    total = sum(other.trace for other in layers.values())
    return layer.trace_share - STANDARD_ERRORS * layer.trace_error / total


# What the analyses cost -----------------------------------------------------------------------------------------------


def _cost(run: AnalyzedRun) -> Found | None:
    spectra = [spectrum for record in run.records for spectrum in record.spectra.values()]
    seconds = sum(spectrum.seconds for spectrum in spectra)
    if run.overhead is None or run.overhead < LARGEST_COST or seconds < LEAST_SECONDS:
        return None
    evidence = f"The analyses took {run.overhead:.2g} times as long as training, {seconds:.0f} s in all."
    action = "Set `max_overhead=0.2`; see page “Save time and memory”."
    return Found("The analyses cost more than training", evidence, "certain", action)


KINDS: dict[str, Callable[[AnalyzedRun], Found | None]] = {
    "failed": _failed,
    "unverified": _unverified,
    "short_run": _short_run,
    "small_sample": _small_sample,
    "mainly_negative": _mainly_negative,
    "edge_of_stability": _edge_of_stability,
    "quasi_singular": _quasi_singular,
    "concentrated": _concentrated,
    "headroom": _headroom,
    "cost": _cost,
}
"""Functions that look for one kind of finding each, by key; what matters more comes first."""


def _round_up(value: float) -> int:
    """Return the number, rounded up to two digits."""
    unit = int(10 ** max(math.floor(math.log10(value)) - 1, 0))
    return math.ceil(value / unit) * unit
