"""The content of checkpoints, right before Lightning writes them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from lightning_hesd.numerics.derivatives.patches import patched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import lightning.pytorch as pl


@contextlib.contextmanager
def edited_checkpoints(trainer: pl.Trainer, edit: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Let a function change the content of checkpoints in a block, after all hooks."""
    save = trainer.strategy.save_checkpoint

    def edited(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        edit(checkpoint)
        save(checkpoint, *args, **kwargs)

    with patched(trainer.strategy, "save_checkpoint", edited):
        yield
