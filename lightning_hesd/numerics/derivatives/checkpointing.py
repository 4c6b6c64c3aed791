"""Activation checkpointing in an analysis: what is recomputed must be what was computed.

PyTorch runs a checkpointed region again when its gradient is taken: elsewhere, later, and on accelerators in another
thread. An exact product gains nothing from that, as the graph of a gradient holds all that was recomputed (of a network
of 12 layers, 55 MB where it takes 52 MB without checkpoints); central differences, like training, take half the memory.
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
    """Have checkpointed regions that run inside recomputed under `mode`, with the random numbers they had.

    Reentrant regions, which give gradients to `backward()` only, become regions of the other kind. Names that were
    imported from PyTorch's module before are covered, as it looks these up when a region runs.
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
    """Keep the activations of checkpointed regions that run inside, instead of recomputing them."""
    with patched(checkpoint, "_checkpoint_hook", lambda _: contextlib.nullcontext()):
        yield
