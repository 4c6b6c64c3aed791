"""What the analyses of a run cost, said once: in a line, or in a warning where they take longer than the training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_hesd.numerics.analysis.cost_model import Workload
from lightning_hesd.spectra.analysis_lines import listed
from lightning_hesd.spectra.scalars import as_factor
from lightning_hesd.spectra.shorter_run import products_within
from lightning_hesd.training.compat import messages
from lightning_hesd.training.source import without_training_time

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_hesd.spectra.record import SpectrumRecord
    from lightning_hesd.spectra.spectrum import Spectrum
    from lightning_hesd.training.schedule import Schedule
    from lightning_hesd.training.source import SpectrumSource

WARNED = 1.0
"""Overhead beyond which the line is a warning: the analyses more than double the training time."""

CHEAP = 0.1
"""Overhead below which no option is named that reduces it."""

TOLERANCE = 0.05
LIMIT = 0.1
FEWER = 4
"""The options that the line proposes: `tolerance`, `max_overhead`, and a fourth of the samples or analyses."""

LEAST_SAMPLES = 64
"""No fewer samples are proposed."""


class CostNotice:
    """Says once in a run what analyses cost, as soon as the time of an analysis and of training are known."""

    def __init__(self, source: SpectrumSource, *, is_shown: bool) -> None:
        """Speak of the analyses of the callback `source`; without `is_shown` only in a warning."""
        self._source = source
        self._is_shown = is_shown
        self._is_due = False

    def begin(self, trainer: pl.Trainer) -> None:
        """Wait for the first analysis of a run: one that starts now, or was interrupted before it."""
        source = self._source
        covers_training = trainer.global_step == 0 or source.budget.training_seconds > 0
        fast_dev_run: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        self._is_due = covers_training and not source.history and not fast_dev_run

    def after_analysis(self, trainer: pl.Trainer) -> None:
        """Speak if the last record is the first one with a spectrum that followed training."""
        source = self._source
        record, seconds = source.history[-1], source.budget.last_analysis_seconds
        trained = trainer.current_epoch + 1 if source.schedule.by_epoch else trainer.global_step
        training_seconds = source.budget.training_seconds
        if (
            not self._is_due
            or record.spectrum is None
            or not seconds
            or not trainer.global_step
            or not training_seconds
        ):
            return
        self._is_due = False
        per_analysis = source.schedule.training_per_analysis(trainer.max_epochs) * training_seconds / trained
        length = trainer.max_epochs if source.schedule.by_epoch else trainer.max_steps
        with without_training_time(trainer):
            text, overhead = cost_words(record, source.schedule, seconds, per_analysis, length)
        if overhead > WARNED:
            messages.warn(f"{source.name}: {text}")
        elif self._is_shown:
            messages.inform(f"{source.name}: {text}")


def cost_words(
    record: SpectrumRecord,
    schedule: Schedule,
    analysis_seconds: float,
    training_seconds: float,
    length: int | None = None,
) -> tuple[str, float]:
    """Return what analyses cost, in words, and the overhead: their time over the training time.

    Args:
        record: The record of an analysis, with a spectrum.
        schedule: When to analyze.
        analysis_seconds: Duration of the analysis.
        training_seconds: Training time from one analysis to the next.
        length: Epochs of the run, or optimizer steps if the schedule counts these; None or -1: unlimited.
    """
    overhead = analysis_seconds / training_seconds
    words = f"an analysis takes {analysis_seconds:.2g} s, and the training between two of them {training_seconds:.2g} s"
    limit = schedule.max_overhead
    if limit is not None and limit < overhead:
        text = f"{words}: `max_overhead={limit:g}` leaves out analyses beyond {as_factor(limit)} the training time."
        return text, limit
    text = f"{words}: analyses will take about {as_factor(overhead)} the training time."
    if overhead < CHEAP:
        return text, overhead
    assert record.spectrum is not None  # noqa: S101 - for the type checker; the caller has checked
    options = [
        *_fewer_products(record, record.spectrum, overhead),
        *_fewer_samples(record.spectrum, overhead),
        *_fewer_analyses(schedule, overhead, length),
    ]
    if limit is None and overhead > LIMIT:
        options.append(f"`max_overhead={LIMIT:g}` (at most {as_factor(LIMIT)}: it leaves out analyses)")
    return f"{text} Less with {listed(options, 'or')}." if options else text, overhead


def _fewer_products(record: SpectrumRecord, spectrum: Spectrum, overhead: float) -> list[str]:
    """Name the option `tolerance`, if it would have stopped this analysis; ΔK_H05 needs fixed steps."""
    products = products_within(spectrum, TOLERANCE) if spectrum.tolerance is None else None
    if products is None or record.generalization is not None:
        return []
    before = sum(spectrum.steps_per_probe)
    shorter, longer = (_gradients(spectrum, count) for count in (products, before))
    share = as_factor(overhead * shorter / longer)
    return [f"`tolerance={TOLERANCE:g}` (about {products} products in place of {before}: {share})"]


def _gradients(spectrum: Spectrum, products: int) -> float:
    """Return the work of an analysis of so many products, by the cost model."""
    known = {"graph", "recompute", "finite_difference"}
    strategy = spectrum.strategy if spectrum.strategy in known else "graph"
    return Workload(spectrum.dimension, steps=products, strategy=strategy).gradients  # type: ignore[arg-type]


def _fewer_samples(spectrum: Spectrum, overhead: float) -> list[str]:
    samples = spectrum.num_samples // FEWER
    return [] if samples < LEAST_SAMPLES else [f"`num_samples={samples}` ({as_factor(overhead / FEWER)})"]


def _fewer_analyses(schedule: Schedule, overhead: float, length: int | None) -> list[str]:
    if schedule.epochs is not None:
        return ["fewer `epochs`"]
    name, every = "every_n_epochs", schedule.every_n_epochs
    if schedule.every_n_train_steps is not None:
        name, every = "every_n_train_steps", schedule.every_n_train_steps
    if length is not None and 0 <= length < FEWER * every:  # there would be no analysis
        return []
    return [f"`{name}={FEWER * every}` ({as_factor(overhead / FEWER)})"]
