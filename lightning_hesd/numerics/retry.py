"""Another try of an analysis that ran out of memory, with less of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from lightning_hesd.numerics.guards import release_memory
from lightning_hesd.numerics.memory import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_hesd.numerics.options import AnalysisOptions
    from lightning_hesd.numerics.strategies import Calibration

Result = TypeVar("Result")


def retried(
    attempt: Callable[[AnalysisOptions, str | None], Result],
    options: AnalysisOptions,
    calibration: Calibration,
    agree: Callable[[bool], bool] = bool,
) -> Result:
    """Return the result of an attempt, repeated with leaner options for as long as it runs out of memory.

    First without retained graphs, which gives the same result in more time; then without the Krylov basis as well,
    unless the user says where it goes. The memory of a failed attempt is given back before the next.

    Args:
        attempt: Takes options, and why they are not the given ones (None if they are).
        options: What to begin with.
        calibration: What is known about the loss.
        agree: Takes whether this process ran out of memory, and returns whether any did; called where all have failed.
    """
    reason: str | None = None
    while True:
        try:
            return attempt(options, reason)
        except Exception as error:
            leaner = _leaner(options, calibration)  # the attempt may have found an obstacle
            if not agree(is_out_of_memory(error)) or leaner is None:
                raise
            options, cause = leaner
            message = f"out of memory ({(str(error) or type(error).__name__).splitlines()[0]}), hence {cause}"
        # Not in the handler: the exception holds the frames of the attempt, and they its tensors.
        release_memory()
        reason = message if reason is None else f"{reason}; {message}"


def _leaner(options: AnalysisOptions, calibration: Calibration) -> tuple[AnalysisOptions, str] | None:
    """Return options that take less memory, and how in words; None if there is nothing left to save."""
    if options.strategy == "graph" or (options.strategy == "auto" and calibration.obstacle is None):
        return replace(options, strategy="recompute"), "products are recomputed"
    if options.basis == "auto":
        return replace(options, basis="none"), "no basis is kept"
    return None
