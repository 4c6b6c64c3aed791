"""Facts about a run that its history keeps beside the records: time, versions, device, options of the callback."""

from __future__ import annotations

import inspect
import math
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import lightning.pytorch as pl

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


def given_options(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call that are not the defaults of the function, as plain values."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    return {
        name: plain(value)
        for name, value in arguments.items()
        if name not in defaults or not _is_default(value, defaults[name])
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


def _is_default(value: Any, default: Any) -> bool:
    if value is default:
        return True
    # Equality of tensors and of other objects is their own affair.
    return isinstance(value, bool | int | float | str) and type(value) is type(default) and value == default


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:  # a copy of the repository, which nothing has installed
        return None
