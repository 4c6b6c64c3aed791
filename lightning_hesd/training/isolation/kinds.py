"""Kinds of objects that code in a training step may reach, and which of them an analysis looks into."""

from __future__ import annotations

import array
import ast
import concurrent.futures
import contextlib
import copy
import copyreg
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
from lightning_hesd.training.compat.namespaces import lightning_types

ATOMS = {type(None), bool, int, float, complex, str, bytes, range, slice}

INERT = (
    *(type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, staticmethod, classmethod, property),
    *(types.GetSetDescriptorType, types.MemberDescriptorType, Enum, PurePath, random.SystemRandom),
    *(np.generic, np.dtype, torch.dtype, torch.device, torch.layout),
)
"""What does not change, or is out of reach: what functions and modules hold."""

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
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
_REPEATABLE = tuple({type(iter(empty)) for empty in _EMPTY})

_CSV_WRITER = type(csv.writer(io.StringIO()))

TRACKERS = {"aim", "clearml", "comet_ml", "dvclive", "mlflow", "neptune", "swanlab", "wandb"}
"""Packages that track experiments."""

_RECORDERS = r"(Client|Experiment|Live|Run|Task)$"

_INSTALLED = tuple(
    {
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
        site.getusersitepackages(),
    }
)


def slots_of(value: object) -> dict[str, Any]:
    """Return the attributes that an object keeps in slots, None where one is not set."""
    names = copyreg._slotnames(type(value))  # type: ignore[attr-defined]  # noqa: SLF001 - as `copy` and `pickle` do
    return {name: getattr(value, name, None) for name in names}


def attributes_of(value: object) -> dict[str, Any]:
    """Return the dict of the attributes of an object; an empty one if it has none of its own."""
    attributes = getattr(value, "__dict__", None)
    return attributes if isinstance(attributes, dict) else {}


def global_generators() -> list[Any]:
    """Return the generators of the process, which are the matter of the analysis."""
    own = [torch.default_generator, random._inst, np.random.mtrand._rand]  # noqa: SLF001
    return [*own, *(g for module in accelerators() for g in getattr(module, "default_generators", ()))]


class Openness:
    """Tells which objects to look into."""

    def __init__(self) -> None:
        self._plain: dict[int, object] = {}  # objects found to be, kept alive so that an id names one only

    def __call__(self, value: object) -> bool:
        """Whether to look into an object: the user's own, one of a known kind, or one of plain values only."""
        return self._is_known(value) or (not _is_at_work(value) and self._is_plain(value))

    def _is_known(self, value: object) -> bool:
        kind = type(value)
        if _is_at_work(value):
            return False
        package = kind.__module__.split(".")[0]
        known = package in _LIGHTNING or kind.__module__.startswith(_TORCH) or isinstance(value, queue.Queue)
        known = known or _is_framework(value)
        return known or is_users(kind.__module__)

    def _is_plain(self, value: object) -> bool:
        """Whether an object of an installed library holds nothing but values, and objects to look into."""
        reached: dict[int, object] = {}
        pending = [value]
        while pending:
            part = pending.pop()
            leaf = type(part) in ATOMS or isinstance(part, (*INERT, *GENERATORS, *BUFFERS, Tensor, np.ndarray))
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


def is_outward(value: object) -> bool:
    """Whether what an object holds is no matter of the module that has it in an attribute."""
    kind = type(value)
    is_module = isinstance(value, nn.Module)
    return not is_module and (_is_framework(value) or kind.__module__.split(".")[0] in {*_LIGHTNING, "torch"})


def is_logger(value: object) -> bool:
    """Whether it is a logger of Lightning."""
    return isinstance(value, lightning_types("loggers.Logger"))


def _is_framework(value: object) -> bool:
    return isinstance(value, (*_KINDS, *lightning_types(*_LIGHTNING_KINDS)))


def _is_at_work(value: object) -> bool:
    """Whether an object may change during an analysis by itself: the package's own, progress bars, workers."""
    if any(kind.__module__.split(".")[0] == "lightning_hesd" for kind in type(value).__mro__):
        return not isinstance(value, lightning_types("callbacks.ModelCheckpoint"))
    weak = type(value).__module__ in {"weakref", "_weakrefset"}  # loses what nothing else holds
    return weak or isinstance(value, lightning_types("callbacks.ProgressBar")) or is_spent_by_reading(value)


@functools.cache
def is_users(module: str | None) -> bool:
    """Whether a Python module is the user's own code, and of no installed library."""
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    if module is None or file is None:
        return module == "__main__"  # of a notebook
    return module.split(".")[0] != "lightning_hesd" and not file.startswith(_INSTALLED)


# Threads --------------------------------------------------------------------------------------------------------------


class Threads:
    """The threads that may execute code of the user's: of a class or a function of theirs, or those of a pool."""

    def __init__(self) -> None:
        self._running = [thread for thread in threading.enumerate() if _is_users_thread(thread)]
        self._theirs = [part for thread in self._running for part in (thread, *_given(thread))]

    def may_share(self, value: object, held: Iterable[object]) -> bool:
        """Whether an object that holds others may be theirs as well: made for threads, given to one, or a logger."""
        if not self._running:
            return False
        given = any(value is part for part in self._theirs)
        return given or is_logger(value) or any(isinstance(part, _THREADING) for part in held)


def _is_users_thread(thread: threading.Thread) -> bool:
    modules = {type(thread).__module__, getattr(_target(thread), "__module__", None)}
    return "concurrent.futures.thread" in modules or any(map(is_users, modules))


def _target(thread: threading.Thread) -> object:
    return getattr(thread, "_target", None)  # has no public name


def _given(thread: threading.Thread) -> list[object]:
    """Return what the function of a thread is given, and is bound to."""
    arguments, named = getattr(thread, "_args", ()), getattr(thread, "_kwargs", {})
    return [getattr(_target(thread), "__self__", thread), *arguments, *named.values()]


# Trackers of experiments ----------------------------------------------------------------------------------------------


def is_recorder(value: object) -> bool:
    """Whether an object writes to a tracker of experiments: a summary writer, run or client."""
    return any(
        base.__name__ == "SummaryWriter"
        or (base.__module__.split(".")[0] in TRACKERS and re.search(_RECORDERS, base.__name__) is not None)
        for base in type(value).__mro__
    )


# Tables, files and iterators ------------------------------------------------------------------------------------------


def is_table(value: object) -> bool:
    """Whether it is a DataFrame or a Series of pandas."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.DataFrame | pandas.Series)


def is_output(value: object) -> bool:
    """Whether it is a file or stream that is written to, without those of the terminal, or a writer of CSV."""
    if not isinstance(value, io.IOBase):
        return isinstance(value, _CSV_WRITER)
    terminal = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return not value.closed and value.writable() and not value.isatty() and value not in terminal


def like_output(output: Any) -> Any:
    """Return what takes text or bytes as an output does, and leads nowhere."""
    if isinstance(output, _CSV_WRITER):
        return csv.writer(io.StringIO())
    buffer: Any = io.StringIO() if isinstance(output, io.TextIOBase) else io.BytesIO()
    if isinstance(output, io.StringIO | io.BytesIO):
        buffer.write(output.getvalue())
        buffer.seek(output.tell())
    return buffer


def is_spent_by_reading(value: object) -> bool:
    """Whether it is an iterator of Python or of a DataLoader, which cannot go back."""
    kind = type(value)
    return issubclass(kind, Iterator) and (
        kind.__module__ in {"builtins", "itertools"} or kind.__module__.startswith("torch.")
    )


def repeated(iterator: Any) -> Any:
    """Return an iterator that yields what this one will; None if there is no such thing."""
    if isinstance(iterator, itertools.count):  # of which only some versions of Python make copies
        with contextlib.suppress(ValueError):  # it counts by other numbers than Python's own
            return itertools.count(*ast.literal_eval(repr(iterator).removeprefix("count").replace(")", ",)")))
    return copy.copy(iterator) if isinstance(iterator, _REPEATABLE) else None
