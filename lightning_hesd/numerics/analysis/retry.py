"""Repetition of an analysis that has failed for want of memory, or of an intact graph, with options that need less."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from lightning_hesd.numerics.collectives import LOCAL, Collectives
from lightning_hesd.numerics.devices import release_memory
from lightning_hesd.numerics.operators.memory import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_hesd.numerics.inputs.options import AnalysisOptions
    from lightning_hesd.numerics.operators.strategies import AnalysisCache

Result = TypeVar("Result")


def retry_on_oom(
    attempt: Callable[[AnalysisOptions, str | None], Result],
    options: AnalysisOptions,
    cache: AnalysisCache,
    collectives: Collectives = LOCAL,
) -> Result:
    """Return the result of an attempt, repeated with other options if it runs out of memory or finds a graph changed.

    The first repetition retains no graphs, which gives the same result in more time. If memory is still short, the
    second one keeps no Krylov basis, unless the user has chosen where it is kept. The memory of a failed attempt is
    released before the next one. All ranks fail if one does.

    Args:
        attempt: Function of the options, and of the reason why they are not the given ones, None for the given ones.
        options: Options of the first attempt.
        cache: What earlier analyses of the same loss have measured.
        collectives: Communication between the ranks.
    """
    reason: str | None = None
    while True:
        try:
            return attempt(options, reason)
        except Exception as error:
            change = _leaner(error, options, cache, collectives)
            if change is None:
                raise
            options, words = change
        # Not in the handler: the exception holds the frames of the attempt, and they its tensors.
        release_memory()
        reason = words if reason is None else f"{reason}; {words}"


def _leaner(
    error: Exception, options: AnalysisOptions, cache: AnalysisCache, collectives: Collectives
) -> tuple[AnalysisOptions, str] | None:
    """Return options that avoid an error, and the reason for them in words; None if there are none."""
    # Every rank must ask both.
    is_short_of_memory = collectives.any(is_out_of_memory(error))
    is_graph_changed = collectives.any(_is_graph_changed(error))
    if is_short_of_memory:
        cause = f"out of memory ({(str(error) or type(error).__name__).splitlines()[0]})"
    else:
        cause = "an evaluation changes in place what graphs keep"
    # With "auto" the failed attempt may have found that there are no exact products, hence no graphs.
    retains_graphs = options.strategy == "graph" or (options.strategy == "auto" and cache.inexact_reason is None)
    if retains_graphs and (is_short_of_memory or is_graph_changed):
        return replace(options, strategy="recompute", batch_size=None), f"{cause}, hence products are recomputed"
    if options.basis == "auto" and is_short_of_memory:
        return replace(options, basis="none"), f"{cause}, hence no basis is kept"
    return None


def _is_graph_changed(error: Exception) -> bool:
    """Return whether a tensor that a graph has saved was changed in place.

    Only the message tells: autograd's check of versions (`SavedVariable::unpack`, in C++) raises a plain RuntimeError.
    """
    return isinstance(error, RuntimeError) and "modified by an inplace operation" in str(error)
