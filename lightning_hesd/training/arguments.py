"""Checks of the arguments of HessianSpectrumCallback."""

from __future__ import annotations

from lightning_hesd.training.checkpoints.checkpoint import HessianCheckpoint


def check_name(name: str) -> None:
    """Refuse a name that is no name of a folder.

    Raises:
        ValueError: If it is empty, has a slash, or is a path.
    """
    if not name or "/" in name or name in {".", ".."}:
        msg = f"`name` must be a non-empty text without '/', got {name!r}."
        raise ValueError(msg)


def check_loader(key: str, loader: object, alternative: str | None = None) -> None:
    """Refuse text in place of a dataloader.

    Raises:
        ValueError: If it is text other than the alternative.
    """
    if isinstance(loader, str) and loader != alternative:
        offered = "" if alternative is None else f" or {alternative!r}"
        msg = f"`{key}` must be a dataloader{offered}, got {loader!r}."
        raise ValueError(msg)


def as_checkpoint(checkpoint: object) -> HessianCheckpoint | None:
    """Return the checkpoint callback, made of the name of a rule if that is given.

    Raises:
        TypeError: If the argument is neither of them, nor None.
    """
    if isinstance(checkpoint, str):
        return HessianCheckpoint(checkpoint)  # type: ignore[arg-type]  # which checks the name
    if checkpoint is None or isinstance(checkpoint, HessianCheckpoint):
        return checkpoint
    msg = f"`checkpoint` must be the name of a rule, a HessianCheckpoint or None, got {checkpoint!r}."
    raise TypeError(msg)
