"""Recommendation of a sample size, an application that Kiselev & Grabovoy (2024, arXiv:2409.11995, section 6) suggest.

Three quantities stabilize as the sample grows: the mean loss, the largest eigenvalue of its Hessian, and C_t. A pilot
sample gives an estimate of the remaining change of each, and of the sample size at which the change is small enough.

*The loss.* L_{k+1} − L_k = (ℓ_{k+1} − L_k)/(k + 1): one more sample changes the mean by its deviation divided by k + 1.
A quantile of the deviations |ℓ − L| of the pilot, taken as an order statistic as in conformal prediction (Vovk et al.
2005), holds for the next sample with the given confidence, for all distributions.

*The spectrum.* With k samples an extreme eigenvalue, or C_t, has a standard error s√(N/k) and a bias bN/k, where s and
b are those of the pilot of N samples, see `sampling_error`. As s is estimated from g groups, Student's quantile with
g − 1 degrees of freedom replaces the normal one.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from typing_extensions import Unpack

from lightning_hesd.numerics.analysis.engine import Context, analyze
from lightning_hesd.numerics.analysis.group_statistics import samples_needed
from lightning_hesd.numerics.inputs.options import StrategyName, analysis_options
from lightning_hesd.numerics.inputs.sample_counts import batch_size
from lightning_hesd.sample_size.sample_losses import mean_loss, per_sample_losses, read_batches
from lightning_hesd.spectra.analysis_lines import WIDTH
from lightning_hesd.spectra.intervals import chi_square_quantile, student_quantile
from lightning_hesd.spectra.scalars import SPECTRUM_SCALARS
from lightning_hesd.spectra.spectrum import MIN_SCALE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray
    from torch import nn

    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.inputs.options import AnalysisOptions
    from lightning_hesd.numerics.isolation.modes import Mode
    from lightning_hesd.sample_size.sample_losses import SampleLoss
    from lightning_hesd.spectra.spectrum import Spectrum

Quantity = Literal["loss", "lambda_max", "c_t"]


@dataclass(frozen=True)
class Stability:
    """The required stability.

    Attributes:
        tolerance: Maximal relative distance of λ_max and C_t from their values for infinitely many samples.
        loss_tolerance: Maximal relative change of the mean loss by one more sample.

    Raises:
        ValueError: If one is not positive and finite.
    """

    tolerance: float
    loss_tolerance: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                msg = f"`{name}` must be positive and finite, got {value!r}."
                raise ValueError(msg)


@dataclass(frozen=True)
class Requirement:
    """The number of samples that one quantity needs.

    Attributes:
        allowed: Maximal change of the quantity, in its own units.
        pilot: Change at the size of the pilot sample, with the given confidence, in the same units.
        samples: Smallest number of samples at which the change is at most `allowed`; infinite if the pilot is too small
            to determine it.
        interval: Interval for `samples` with the given confidence, which accounts for the randomness of the pilot.
    """

    allowed: float
    pilot: float
    samples: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class SampleSize:
    """The recommended sample size.

    Attributes:
        requirements: Number of samples needed for each quantity.
        pilot: Number of samples of the pilot.
        confidence: Confidence, for each quantity separately.
        spectrum: Spectrum of the pilot sample.
    """

    requirements: dict[Quantity, Requirement]
    pilot: int
    confidence: float
    spectrum: Spectrum

    @property
    def samples(self) -> float:
        """The number that is enough for all quantities; infinite if the pilot is too small to determine it."""
        return max(requirement.samples for requirement in self.requirements.values())

    @property
    def is_extrapolated(self) -> bool:
        """Whether `samples` exceeds the pilot: then a pilot of that size would give a better estimate."""
        return self.samples > self.pilot

    def __str__(self) -> str:
        """Return sentences in lines of at most `WIDTH` columns: how many samples are enough, and why."""
        sentences = [
            f"{self.samples:,.0f} samples are enough, with a confidence of {self.confidence:.0%} for each quantity."
            if math.isfinite(self.samples)
            else f"{self.pilot:,} samples are too few to tell how many are enough."
        ]
        for quantity, requirement in self.requirements.items():
            title = SPECTRUM_SCALARS[quantity].title
            if not math.isfinite(requirement.samples):
                sentences.append(f"- {title}: {self.pilot:,} samples are too few to tell.")
                continue
            low, high = (f"{end:,.0f}" if math.isfinite(end) else "unknown" for end in requirement.interval)
            needed = f"{requirement.samples:,.0f} samples [{low}, {high}]"
            before = f"With {self.pilot:,} samples it is {requirement.pilot:.3g}."
            sentences.append(f"- {title}: {needed}. {_effect(quantity, requirement.allowed)} {before}")
        return "\n".join(textwrap.fill(text, WIDTH, subsequent_indent="  ") for text in sentences)


def _effect(quantity: Quantity, allowed: float) -> str:
    """Say what the number of samples achieves."""
    if quantity == "loss":
        return f"The change by one more sample is then at most {allowed:.3g}."
    return f"The distance to the value for infinitely many samples is then at most {allowed:.3g}."


def recommend_sample_size(
    module: nn.Module,
    batches: Iterable[Any],
    loss_fn: SampleLoss,
    *,
    tolerance: float = 0.1,
    loss_tolerance: float = 0.01,
    confidence: float = 0.95,
    steps: int = 200,
    seed: int = 0,
    strategy: StrategyName = "auto",
    mode: Mode = "eval",
) -> SampleSize:
    """Find the smallest number of samples at which the loss, the largest eigenvalue and C_t are stable.

    With probability `confidence`, for each quantity separately and over samples drawn at random, the next sample
    changes the mean loss by at most a fraction `loss_tolerance`, and λ_max and C_t lie within a fraction `tolerance` of
    their values for infinitely many samples. For the spectrum this holds to first order: if a few samples have all the
    curvature, as late in training, more samples are needed.

    Args:
        module: The module, on the device of the batches; its state is restored.
        batches: The pilot sample, drawn at random; read once and held in memory. At least 8 samples, better hundreds.
        loss_fn: As for `loss_differences`.
        tolerance: Relative to λ_max, and to C_t, or to 0.001 if C_t is closer to zero.
        loss_tolerance: Relative to the mean loss.
        confidence: Confidence of the recommendation.
        steps: Maximal number of Lanczos steps; they stop when the error of the extreme eigenvalues is a quarter of
            their sampling error.
        seed: Seed of the start vector.
        strategy: HVP strategy, see `hessian_spectrum`.
        mode: As for `hessian_spectrum`.

    Raises:
        ValueError: If an argument is out of range, or there are fewer than 8 samples, or all have the same curvature.
        TypeError: If `loss_fn` does not return a tensor.
        ArithmeticError: If the loss or a product is NaN or infinite, or the spectrum has no positive eigenvalue.
    """
    stability = Stability(tolerance, loss_tolerance)
    options = pilot_options(steps=steps, seed=seed, strategy=strategy, mode=mode, confidence=confidence)
    return find_sample_size(module, read_batches(batches), loss_fn, stability=stability, options=options)


def pilot_options(*, steps: int, seed: int, strategy: StrategyName, mode: Mode, confidence: float) -> AnalysisOptions:
    """Return the options for the analysis of the pilot sample, from arguments of `recommend_sample_size`."""
    return analysis_options(
        steps=steps, seed=seed, strategy=strategy, mode=mode, tolerance="auto", confidence=confidence
    )


def find_sample_size(
    module: nn.Module,
    pilot: Sequence[WeightedBatch],
    loss_fn: SampleLoss,
    *,
    stability: Stability,
    options: AnalysisOptions,
    **context: Unpack[Context],
) -> SampleSize:
    """Find the sample size as `recommend_sample_size` does, on a single rank, with `pilot_options`.

    Raises:
        ArithmeticError: If the spectrum has no positive eigenvalue.
        ValueError: If the samples do not have a sampling error, as fewer than 8.
    """
    options = replace(options, batch_weight=batch_size)  # batches weigh their numbers of samples here
    spectrum = analyze(module, pilot, mean_loss(loss_fn), options, **context)
    if spectrum.c_t_sampling_error is None:
        msg = f"the spectrum has no sampling error: {spectrum.sampling_reason}"
        has_curvature = spectrum.reason is None and spectrum.lambda_max > spectrum.rounding
        raise (ValueError if has_curvature else ArithmeticError)(msg)
    losses = per_sample_losses(module, [batch.data for batch in pilot], loss_fn, mode=options.mode)
    tolerance, confidence = stability.tolerance, options.confidence
    requirements: dict[Quantity, Requirement] = {
        "loss": loss_requirement(losses, stability.loss_tolerance, confidence),
        "lambda_max": _spectral_requirement(spectrum, "lambda_max", tolerance, confidence),
        "c_t": _spectral_requirement(spectrum, "c_t", tolerance, confidence),
    }
    return SampleSize(requirements, len(losses), confidence, spectrum)


def loss_requirement(losses: NDArray[np.float64], tolerance: float, confidence: float) -> Requirement:
    """Return the number of samples from which on one more changes the mean loss by at most a fraction `tolerance`.

    The losses, shape (N,), are those of a pilot sample; `confidence` is the probability that this holds for the next.
    """
    count, mean = len(losses), float(losses.mean())
    allowed = tolerance * abs(mean)
    deviations = np.sort(np.abs(losses - mean))
    low, at, high = (_order_statistic(deviations, rank) for rank in _ranks(count, confidence))

    def needed(deviation: float) -> float:
        return max(1.0, math.ceil(deviation / allowed) - 1) if allowed and math.isfinite(deviation) else math.inf

    return Requirement(allowed, at / (count + 1), needed(at), (needed(low), needed(high)))


def _ranks(count: int, confidence: float) -> tuple[int, int, int]:
    """Return the ranks (from 1) of three order statistics: a quantile, between the ends of its confidence interval.

    With this probability, one more value does not exceed the middle one, and the quantile of the population lies
    between the other two (by the normal approximation of the binomial distribution).
    """
    middle = math.ceil(confidence * (count + 1))
    spread = _normal_quantile(confidence) * math.sqrt(count * confidence * (1 - confidence))
    return max(1, math.floor(count * confidence - spread)), middle, math.ceil(count * confidence + spread) + 1


def _normal_quantile(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _order_statistic(ascending: NDArray[np.float64], rank: int) -> float:
    return float(ascending[rank - 1]) if rank <= len(ascending) else math.inf


def _spectral_requirement(
    spectrum: Spectrum, quantity: Literal["lambda_max", "c_t"], tolerance: float, confidence: float
) -> Requirement:
    value: float = getattr(spectrum, quantity)
    error: float = getattr(spectrum, f"{quantity}_sampling_error")
    bias: float = getattr(spectrum, f"{quantity}_sampling_bias")
    degrees = (spectrum.sampling_groups or 2) - 1
    quantile = student_quantile(confidence, degrees)
    true = value - bias  # estimated
    allowed = tolerance * (max(abs(true), MIN_SCALE) if quantity == "c_t" else abs(true))
    # The variance of the pilot, divided by the true one, follows χ² divided by its degrees of freedom.
    tails = ((1 + confidence) / 2, (1 - confidence) / 2)
    factors = [math.sqrt(degrees / chi_square_quantile(tail, degrees)) for tail in tails]
    needed = [
        max(1.0, float(math.ceil(samples_needed(spectrum.num_samples, allowed, q * error, bias))))
        for q in (quantile, *(factor * _normal_quantile(confidence) for factor in factors))
    ]
    return Requirement(allowed, abs(bias) + quantile * error, needed[0], (needed[1], needed[2]))
