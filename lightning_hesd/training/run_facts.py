"""Facts about a run that its history keeps beside the records: time, versions, device, options of the callback."""

from __future__ import annotations

import math
import platform
from dataclasses import fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import lightning.pytorch as pl
    from _typeshed import DataclassInstance

PACKAGES = ("lightning_hesd", "torch")
LIGHTNING = ("lightning", "pytorch_lightning")

MOST_ENTRIES = 50
"""Longer collections are not kept."""

Facts = dict[str, Any]


def run_facts(trainer: pl.Trainer, options: Mapping[str, Any]) -> Facts:
    """Return the facts of a run that begins now, as plain values; `options` are those of its callback."""
    roots = [cls.__module__.split(".")[0] for cls in type(trainer).__mro__]
    lightning = next((root for root in roots if root in LIGHTNING), LIGHTNING[0])
    versions = {name: found for name in (*PACKAGES, lightning) if (found := version_of(name)) is not None}
    return {
        "started": now(),
        "versions": {**versions, "python": platform.python_version()},
        "device": str(trainer.strategy.root_device),
        "options": dict(options),
    }


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def changed_settings(*settings: DataclassInstance) -> dict[str, Any]:
    """Return the fields of dataclasses that do not have their defaults, as plain values."""
    return {
        field.name: plain(getattr(each, field.name))
        for each in settings
        for field in fields(each)
        if field.init and getattr(each, field.name) != field.default
    }


def plain(value: Any) -> Any:
    """Return a value that JSON knows: of a function or a class its name, of another object its class in brackets.

    Collections are kept if they are short, but not those within others, such as batches.
    """
    entries = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list | tuple | set | frozenset | range) and len(value) <= MOST_ENTRIES:
        found = [_single(entry) for entry in entries]
        return dict(zip(map(str, value), found, strict=True)) if isinstance(value, dict) else found
    return _single(value)


def _single(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", None) or f"<{type(value).__name__}>"


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:  # a copy of the repository, which nothing has installed
        return None
