"""Activation checkpointing in an analysis: the recomputation must repeat the computation.

PyTorch runs a checkpointed region again in the backward pass: outside the contexts of the forward pass, and on
accelerators in another thread. Checkpoints save no memory in an exact HVP, as the graph of a gradient holds all
recomputed activations (for a network of 12 layers 55 MB, without checkpoints 52 MB). In central differences, as in
training, they halve the memory.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from torch.utils import checkpoint

from lightning_hesd.numerics.derivatives.patches import patched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def recomputed_under(mode: TorchFunctionMode) -> Iterator[None]:
    """Recompute checkpointed regions of this context under `mode`, with the same random numbers.

    Reentrant regions, which support `backward()` only, become non-reentrant ones. Functions that were imported from
    PyTorch's module earlier are covered, too, as they look up the patched names when they run.
    """
    frame = checkpoint._CheckpointFrame  # noqa: SLF001
    generator = checkpoint._checkpoint_without_reentrant_generator  # noqa: SLF001

    def make_frame(recompute: Callable[..., None], *others: Any) -> Any:
        def recompute_under_mode(*args: Any) -> None:
            with mode, recomputed_under(mode):
                recompute(*args)

        return frame(recompute_under_mode, *others)

    def generate(function: Callable[..., Any], _preserve_rng_state: object = True, *others: Any, **named: Any) -> Any:
        return generator(function, True, *others, **named)

    def apply(function: Callable[..., Any], _preserve_rng_state: object, *args: Any) -> Any:
        return checkpoint.checkpoint(function, *args, use_reentrant=False)

    with (
        patched(checkpoint, "_CheckpointFrame", make_frame),
        patched(checkpoint, "_checkpoint_without_reentrant_generator", generate),
        patched(checkpoint.CheckpointFunction, "apply", apply),
    ):
        yield


@contextlib.contextmanager
def kept_activations() -> Iterator[None]:
    """Keep the activations of checkpointed regions of this context instead of recomputing them."""
    with patched(checkpoint, "_checkpoint_hook", lambda _: contextlib.nullcontext()):
        yield
