"""The criteria of Gabdullin (2025, Fig. 10) for generalization, by spectra on training and on generalization data.

They are experimental: in our reproduction their verdict was right in 18 of 40 cases. So words say which criteria hold,
not how well a network generalizes.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

from lightning_hesd.spectra import criteria
from lightning_hesd.spectra.intervals import student_quantile

if TYPE_CHECKING:
    from lightning_hesd.spectra.spectrum import Spectrum

Verdict = Literal["good", "poor", "undecided", "not applicable"]
Interval = tuple[float, float]

VERDICT_VALUES: dict[Verdict, float] = {"good": 1.0, "undecided": 0.5, "poor": 0.0, "not applicable": -1.0}
"""The number that is logged for each verdict."""

TITLE = "criteria of Gabdullin (2025), Fig. 10"
CAVEAT = "experimental: right in 18 of 40 cases of our study"
SHORT_CAVEAT = "experimental, right in 18/40"
"""Where a line of the terminal must do."""

WORDS: dict[Verdict, str] = {
    "good": "hold",
    "poor": "fail",
    "undecided": "undecided",
    "not applicable": "do not apply",
}
"""What the criteria do, for each verdict."""

UNKNOWN: Interval = (math.nan, math.nan)


@dataclass(frozen=True)
class Assessment:
    """The verdict of two spectra on generalization, by the paper's criteria.

    Attributes:
        verdict: "good", "poor", "undecided" or "not applicable".
        applicable: Whether the criteria apply, that is whether the spectrum on the training data is MP; None where
            that is uncertain.
        delta_r_e: Δr_e = r_e(generalization) / r_e(training) (eq. 3); NaN where undefined.
        delta_r_e_interval: (low, high) for it; (NaN, NaN) where undefined.
        delta_k_h05: ΔK_H05 = K_H05(generalization) / K_H05(training) (eq. 4); NaN where undefined.
        delta_k_h05_interval: (low, high) for it over probes; (NaN, NaN) where undefined, or for a single probe.
        reasons: Reasons in words, in the order of the algorithm.
    """

    verdict: Verdict
    applicable: bool | None
    delta_r_e: float
    delta_r_e_interval: Interval
    delta_k_h05: float
    delta_k_h05_interval: Interval
    reasons: tuple[str, ...]

    @property
    def value(self) -> float:
        """The verdict as a number: good 1, undecided 0.5, poor 0, not applicable -1."""
        return VERDICT_VALUES[self.verdict]

    @property
    def words(self) -> str:
        """What the criteria do, such as "fail"."""
        return WORDS[self.verdict]

    def __str__(self) -> str:
        """Return what the criteria do, with their caveat, and the reasons, in one line."""
        return f"{TITLE} ({CAVEAT}): {self.words}; {'; '.join(self.reasons)}"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: what the criteria do, with their caveat, and a list of the reasons."""
        reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in self.reasons)
        return f"<div>{html.escape(f'{TITLE} ({CAVEAT}): {self.words}')}</div><ul>{reasons}</ul>"

    def of_untrained_weights(self, why: str) -> Assessment:
        """Return the same criteria without a verdict, because the weights are untrained."""
        return replace(self, verdict="not applicable", applicable=False, reasons=(why, *self.reasons))


def assess_generalization(
    train: Spectrum,
    generalization: Spectrum,
    *,
    mp_threshold: float = criteria.MP_THRESHOLD,
    delta_r_e_threshold: float = criteria.DELTA_R_E_THRESHOLD,
    delta_k_h05_threshold: float = criteria.DELTA_K_H05_THRESHOLD,
) -> Assessment:
    """Assess generalization by the algorithm of Gabdullin (2025, section 4.3 and Fig. 10), with its certainty.

    The type of the spectrum on the training data decides whether the criteria apply: they do for MP. Then both
    Δr_e < 1.5 (eq. 3) and ΔK_H05 < 1.2 (eq. 4) make it good, else it is poor. A criterion whose interval
    contains its threshold leaves the verdict undecided, unless the other criterion has already failed.

    Args:
        train: The spectrum on training data.
        generalization: The spectrum of the same weights on other data, analyzed with the same options.
        mp_threshold: C_t above which a spectrum is MP.
        delta_r_e_threshold: Δr_e below which generalization may be good.
        delta_k_h05_threshold: ΔK_H05 below which generalization may be good.

    Raises:
        ValueError: If the two spectra cannot be compared; the message names what differs.
    """
    check_comparable(train, generalization)
    r_e, r_e_interval = _delta_r_e(train, generalization)
    k_h05, k_h05_interval, no_k_h05 = _delta_k_h05(train, generalization)
    applicable, reasons = _applicable(train, mp_threshold)
    for data, spectrum in (("training", train), ("generalization", generalization)):
        if spectrum.verified != "yes":
            reasons.append(f"the spectrum on the {data} data is not verified: {spectrum.verification}")
    verdict: Verdict = "undecided" if applicable is None else "not applicable"
    if applicable:
        judged = [
            _judge("Δr_e", r_e, r_e_interval, delta_r_e_threshold, _no_delta_r_e(train, generalization)),
            _judge("ΔK_H05", k_h05, k_h05_interval, delta_k_h05_threshold, no_k_h05),
        ]
        holds = [held for held, _ in judged]
        verdict = "poor" if False in holds else "undecided" if None in holds else "good"
        reasons += [reason for _, reason in judged]
        if criteria.type_certain(generalization.c_t_interval, mp_threshold) and generalization.c_t <= mp_threshold:
            reasons.append(f"on the generalization data the spectrum turned MN (C_t = {generalization.c_t:.3g})")
    return Assessment(verdict, applicable, r_e, r_e_interval, k_h05, k_h05_interval, tuple(reasons))


def check_comparable(train: Spectrum, generalization: Spectrum) -> None:
    """Check that two spectra may be of the same weights, analyzed with the same options.

    Raises:
        ValueError: If they are not; the message names what differs.
    """
    for name in ("dimension", "matrix", "mode", "probe", "seed"):
        ours, theirs = getattr(train, name), getattr(generalization, name)
        if ours != theirs:
            msg = (
                f"the spectra cannot be compared: `{name}` is {ours!r} on the training data and {theirs!r} on the "
                "generalization data; analyze the same weights on both with the same options."
            )
            raise ValueError(msg)


def _applicable(train: Spectrum, threshold: float) -> tuple[bool | None, list[str]]:
    """Return whether the criteria apply, None for uncertain, and the reasons."""
    if train.reason:
        return None, [f"C_t is undefined on the training data: {train.reason}"]
    low, high = train.c_t_interval
    found = f"on the training data C_t = {train.c_t:.3g} [{low:.3g}, {high:.3g}]"
    if not criteria.type_certain((low, high), threshold):
        return None, [f"{found} may be on either side of {threshold:g}: take more steps, or `tolerance='type'`"]
    if train.c_t > threshold:
        return True, [f"{found}: MP, so the criteria apply"]
    symmetric, highest = criteria.UNTRAINED_C_T
    cause = (
        "MN comes from gradients that were manipulated before the optimizer used them, or of an untrained network "
        f"(C_t near {symmetric:g}; {highest:g} for ResNet18 in evaluation mode)"
    )
    return False, [f"{found}: MN, so the criteria do not apply", cause]


def _judge(name: str, value: float, interval: Interval, threshold: float, missing: str) -> tuple[bool | None, str]:
    """Return whether Δ is below its threshold, None for uncertain, and the reason."""
    if math.isnan(value) and math.isnan(interval[0]):
        return None, f"{name} is undefined: {missing}"
    low, high = (value, value) if math.isnan(interval[0]) else interval
    spread = " (one probe: its uncertainty is not known)" if math.isnan(interval[0]) else f" [{low:.3g}, {high:.3g}]"
    found = f"{name} = {value:.3g}{spread}"
    if low < threshold <= high:
        return None, f"{found} may be on either side of {threshold:g}"
    return (True, f"{found} < {threshold:g}") if high < threshold else (False, f"{found} >= {threshold:g}")


def _delta_r_e(train: Spectrum, generalization: Spectrum) -> tuple[float, Interval]:
    interval = criteria.delta_interval(_r_e_interval(generalization), _r_e_interval(train))
    return criteria.delta(generalization.r_e, train.r_e), interval


def _r_e_interval(spectrum: Spectrum) -> Interval:
    """Return the interval of r_e: that of the Lanczos runs, widened by the sampling error where that is known."""
    low, high = spectrum.c_t_interval
    quantile = NormalDist().inv_cdf((1 + spectrum.confidence) / 2)
    sampling = quantile * (spectrum.c_t_sampling_error or 0.0)
    return max(criteria.r_e(high) - sampling, 0.0), criteria.r_e(low) + sampling


def _no_delta_r_e(train: Spectrum, generalization: Spectrum) -> str:
    if generalization.reason:
        return f"so is C_t on the generalization data: {generalization.reason}"
    return f"r_e = {train.r_e:.3g} on the training data"


def _delta_k_h05(train: Spectrum, generalization: Spectrum) -> tuple[float, Interval, str]:
    """Return ΔK_H05, its interval, and the reason if it is undefined.

    The probes are the same on both data sets, so that their noise cancels in the ratio, for the most part: its error
    is that of the mean of K_gen - Δ·K_train over the probes, relative to the mean of K_train.
    """
    if train.tolerance is not None or generalization.tolerance is not None:
        return math.nan, UNKNOWN, "it needs equally many steps on both data sets, hence an analysis without `tolerance`"
    if train.steps_per_probe != generalization.steps_per_probe:
        steps = f"{train.steps_per_probe} on the training data, {generalization.steps_per_probe} on the other"
        return math.nan, UNKNOWN, f"the numbers of Lanczos steps differ, {steps}"
    over, under = (criteria.k_h(s.nodes, s.weights, 0.5, s.rounding) for s in (generalization, train))
    value = criteria.delta(float(over.mean()), float(under.mean()))
    if math.isnan(value) or len(under) < 2:
        return value, UNKNOWN, f"K_H05 = {under.mean():.3g} on the training data, {over.mean():.3g} on the other"
    error = float((over - value * under).std(ddof=1)) / math.sqrt(len(under)) / float(under.mean())
    half = student_quantile(train.confidence, len(under) - 1) * error
    return value, (value - half, value + half), ""
