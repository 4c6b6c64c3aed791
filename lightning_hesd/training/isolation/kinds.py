"""Kinds of objects that code in a training step may reach, and which of them an analysis searches."""

from __future__ import annotations

import array
import concurrent.futures
import contextlib
import copy
import csv
import ctypes
import functools
import io
import itertools
import queue
import random
import re
import site
import sys
import sysconfig
import threading
import types
from collections import deque
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_hesd.numerics.devices import accelerators
from lightning_hesd.numerics.isolation.attributes import slot_names
from lightning_hesd.numerics.isolation.containers import PLAIN_TYPES
from lightning_hesd.numerics.isolation.streams import GENERATORS, count_from
from lightning_hesd.training.compat.namespaces import lightning_types

IMMUTABLE_TYPES = {*PLAIN_TYPES, range, slice}

STATELESS = (
    *(type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, staticmethod, classmethod, property),
    *(types.GetSetDescriptorType, types.MemberDescriptorType, Enum, PurePath, random.SystemRandom),
    *(np.generic, np.dtype, torch.dtype, torch.device, torch.layout),
)
"""Types of objects without state, or whose state is not searched: that of functions and Python modules."""

BUFFERS = (bytearray, array.array, ctypes.Structure, ctypes.Array, ctypes._SimpleCData)  # noqa: SLF001 - of c_int, c_double, ...
CONTAINERS = (list, tuple, dict, set, frozenset, deque)

_KINDS = (nn.Module, Dataset, DataLoader, Sampler, Optimizer)
_LIGHTNING_KINDS = ("Callback", "LightningDataModule", "Trainer", "loggers.Logger")
_LIGHTNING = {"lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics"}
_TORCH = ("torch.optim.", "torch.utils.data.", "torch.amp.", "torch.cuda.amp.", "torch.nn.")
_THREADING = (
    *(threading.Thread, type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Event),
    *(threading.Semaphore, threading.Barrier, queue.Queue, queue.SimpleQueue, concurrent.futures.Executor),
)
_EMPTY: tuple[Any, ...] = ([], (), "", b"", range(0), range(2**70), {}, {}.values(), {}.items(), set())
_COPYABLE = tuple({type(iter(empty)) for empty in _EMPTY})

_CSV_WRITER = type(csv.writer(io.StringIO()))

TRACKERS = {"aim", "clearml", "comet_ml", "dvclive", "mlflow", "neptune", "swanlab", "wandb"}
"""Packages that track experiments."""

_WRITERS = r"(Client|Experiment|Live|Run|Task)$"

_INSTALLED = tuple(
    {
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
        site.getusersitepackages(),
    }
)


def slots_of(value: object) -> dict[str, Any]:
    """Return the attributes that an object keeps in slots, None where one is not set."""
    kind: Any = type(value)
    return {name: getattr(value, name, None) for name in slot_names(kind)}


def attributes_of(value: object) -> dict[str, Any]:
    """Return the `__dict__` of an object; an empty dict if it has none."""
    attributes = getattr(value, "__dict__", None)
    return attributes if isinstance(attributes, dict) else {}


def global_generators() -> list[Any]:
    """Return the global random number generators, which the analysis itself restores."""
    own = [torch.default_generator, random._inst, np.random.mtrand._rand]  # noqa: SLF001
    return [*own, *(g for module in accelerators() for g in getattr(module, "default_generators", ()))]


class SearchedObjects:
    """Tells for which objects the attributes are searched."""

    def __init__(self) -> None:
        self._plain: dict[int, object] = {}  # objects that consist of plain values; kept alive so that ids stay unique

    def __contains__(self, value: object) -> bool:
        """Whether an object is searched: one of the user's or of a known kind, or one that consists of plain values."""
        return self._is_known(value) or (not _is_active(value) and self._is_plain(value))

    def _is_known(self, value: object) -> bool:
        module = type(value).__module__
        known = module.split(".")[0] in _LIGHTNING or module.startswith(_TORCH) or isinstance(value, queue.Queue)
        return not _is_active(value) and (known or _is_framework(value) or is_user_code(module))

    def _is_plain(self, value: object) -> bool:
        """Whether an object of an installed library holds only plain values and searched objects."""
        reached: dict[int, object] = {}
        pending = [value]
        while pending:
            part = pending.pop()
            leaf = type(part) in IMMUTABLE_TYPES or isinstance(
                part, (*STATELESS, *GENERATORS, *BUFFERS, Tensor, np.ndarray)
            )
            if leaf or id(part) in reached or id(part) in self._plain or (part is not value and self._is_known(part)):
                continue
            reached[id(part)] = part
            if isinstance(part, CONTAINERS):
                pending.extend(part.values() if isinstance(part, dict) else part)
            elif held := [*attributes_of(part).values(), *slots_of(part).values()]:
                pending.extend(held)
            else:
                return False
        self._plain.update(reached)
        return True


def is_outside_module(value: object) -> bool:
    """Whether an object does not belong to a module even if the module refers to it: an optimizer, a Trainer, ..."""
    kind = type(value)
    is_module = isinstance(value, nn.Module)
    return not is_module and (_is_framework(value) or kind.__module__.split(".")[0] in {*_LIGHTNING, "torch"})


def is_logger(value: object) -> bool:
    """Whether an object is a logger of Lightning."""
    return isinstance(value, lightning_types("loggers.Logger"))


def _is_framework(value: object) -> bool:
    return isinstance(value, (*_KINDS, *lightning_types(*_LIGHTNING_KINDS)))


def _is_active(value: object) -> bool:
    """Whether an object may change by itself during an analysis: this package's own, progress bars, iterators."""
    if any(kind.__module__.split(".")[0] == "lightning_hesd" for kind in type(value).__mro__):
        return not isinstance(value, lightning_types("callbacks.ModelCheckpoint"))
    weak = type(value).__module__ in {"weakref", "_weakrefset"}  # loses objects as they are freed
    return weak or isinstance(value, lightning_types("callbacks.ProgressBar")) or is_one_way_iterator(value)


@functools.cache
def is_user_code(module: str | None) -> bool:
    """Whether a Python module is the user's own code, and not part of an installed library."""
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    if module is None or file is None:
        return module == "__main__"  # of a notebook
    return module.split(".")[0] != "lightning_hesd" and not file.startswith(_INSTALLED)


# Threads --------------------------------------------------------------------------------------------------------------


class UserThreads:
    """The threads that may run user code: with a class or a function of the user's, or those of a pool."""

    def __init__(self) -> None:
        self._running = [thread for thread in threading.enumerate() if _is_users_thread(thread)]
        self._objects = [part for thread in self._running for part in (thread, *_arguments_of(thread))]

    def may_share(self, value: object, held: Iterable[object]) -> bool:
        """Whether threads may use an object that holds others: one with locks, an argument of a thread, or a logger."""
        if not self._running:
            return False
        given = any(value is part for part in self._objects)
        return given or is_logger(value) or any(isinstance(part, _THREADING) for part in held)


def _is_users_thread(thread: threading.Thread) -> bool:
    modules = {type(thread).__module__, getattr(_target(thread), "__module__", None)}
    return "concurrent.futures.thread" in modules or any(map(is_user_code, modules))


def _target(thread: threading.Thread) -> object:
    return getattr(thread, "_target", None)  # has no public name


def _arguments_of(thread: threading.Thread) -> list[object]:
    """Return the arguments of the function of a thread, and the object it is bound to."""
    arguments, named = getattr(thread, "_args", ()), getattr(thread, "_kwargs", {})
    return [getattr(_target(thread), "__self__", thread), *arguments, *named.values()]


# Experiment trackers --------------------------------------------------------------------------------------------------


def is_experiment_writer(value: object) -> bool:
    """Whether an object writes to an experiment tracker: a summary writer, run or client."""
    return any(
        base.__name__ == "SummaryWriter"
        or (base.__module__.split(".")[0] in TRACKERS and re.search(_WRITERS, base.__name__) is not None)
        for base in type(value).__mro__
    )


# Tables, files and iterators ------------------------------------------------------------------------------------------


def is_table(value: object) -> bool:
    """Whether an object is a DataFrame or a Series of pandas."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.DataFrame | pandas.Series)


def is_output_file(value: object) -> bool:
    """Whether an object is a file or stream for writing, other than the terminal, or a writer of CSV."""
    if not isinstance(value, io.IOBase):
        return isinstance(value, _CSV_WRITER)
    terminal = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return not value.closed and value.writable() and not value.isatty() and value not in terminal


def dummy_output(output: Any) -> Any:
    """Return a buffer that takes text or bytes as an output file does."""
    if isinstance(output, _CSV_WRITER):
        return csv.writer(io.StringIO())
    buffer: Any = io.StringIO() if isinstance(output, io.TextIOBase) else io.BytesIO()
    if isinstance(output, io.StringIO | io.BytesIO):
        buffer.write(output.getvalue())
        buffer.seek(output.tell())
    return buffer


def is_one_way_iterator(value: object) -> bool:
    """Whether an object is an iterator of Python or of a DataLoader, which cannot go back."""
    kind = type(value)
    return issubclass(kind, Iterator) and (
        kind.__module__ in {"builtins", "itertools"} or kind.__module__.startswith("torch.")
    )


def copied_iterator(iterator: Any) -> Any:
    """Return an iterator that yields the same items as this one will; None if it cannot be copied."""
    if isinstance(iterator, itertools.count):
        with contextlib.suppress(ValueError):
            return count_from(repr(iterator))
    return copy.copy(iterator) if isinstance(iterator, _COPYABLE) else None
