"""Another try of an analysis that ran out of memory, with less of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from lightning_hesd.numerics.collectives import LOCAL, Collectives
from lightning_hesd.numerics.isolation.exact_mode import release_memory
from lightning_hesd.numerics.operators.memory import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_hesd.numerics.inputs.options import AnalysisOptions
    from lightning_hesd.numerics.operators.strategies import AnalysisCache

Result = TypeVar("Result")

CHANGED_GRAPH = "modified by an inplace operation"
"""In PyTorch's message that a tensor is not what it was when the graph was made."""


def retry_on_oom(
    attempt: Callable[[AnalysisOptions, str | None], Result],
    options: AnalysisOptions,
    cache: AnalysisCache,
    collectives: Collectives = LOCAL,
) -> Result:
    """Return the result of an attempt, repeated with other options where it fails for want of memory or of a graph.

    Out of memory: first without retained graphs, which gives the same result in more time; then without the Krylov
    basis as well, unless the user says where it goes. A graph that a later evaluation has changed in place: without
    retained graphs. The memory of a failed attempt is given back before the next.

    Args:
        attempt: Takes options, and why they are not the given ones (None if they are).
        options: What to begin with.
        cache: What is known about the loss.
        collectives: Communication between the ranks, all of which fail if one does.
    """
    reason: str | None = None
    while True:
        try:
            return attempt(options, reason)
        except Exception as error:
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            other = None
            # Every rank must ask both.
            if collectives.any(is_out_of_memory(error)):
                other, cause = _leaner(options, cache), f"out of memory ({first_line})"
            if collectives.any(CHANGED_GRAPH in str(error)) and other is None:
                other, cause = _without_graphs(options, cache), "an evaluation changes in place what graphs keep"
            if other is None:
                raise
            options, change = other
            message = f"{cause}, hence {change}"
        # Not in the handler: the exception holds the frames of the attempt, and they its tensors.
        release_memory()
        reason = message if reason is None else f"{reason}; {message}"


def _leaner(options: AnalysisOptions, cache: AnalysisCache) -> tuple[AnalysisOptions, str] | None:
    """Return options that take less memory, and how in words; None if there is nothing left to save."""
    if (other := _without_graphs(options, cache)) is not None:
        return other
    if options.basis == "auto":
        return replace(options, basis="none"), "no basis is kept"
    return None


def _without_graphs(options: AnalysisOptions, cache: AnalysisCache) -> tuple[AnalysisOptions, str] | None:
    """Return options that retain no graphs, and how in words; None if these do not."""
    # The attempt may have found that there are no exact products.
    if options.strategy == "graph" or (options.strategy == "auto" and cache.inexact_reason is None):
        return replace(options, strategy="recompute"), "products are recomputed"
    return None
