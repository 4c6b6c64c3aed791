"""Snapshots: put back whatever running the user's code has changed.

What the analysis calls (a loss function, a training step, a dataset) may leave traces: running statistics, metric
states, lists that grow, random numbers drawn. A snapshot remembers all of it that Python lets one reach, and puts it
back in place. Out of reach are files, globals, closures, and objects that hold anything but plain values (a database
connection, a logger's run).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import decimal
import enum
import itertools
import random
import re
import types
import warnings
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_hesd.numerics.containers import holds_atoms
from lightning_hesd.numerics.dtensors import local_part
from lightning_hesd.numerics.holders import Empties, attributes, class_body, container, user_classes
from lightning_hesd.numerics.streams import STREAMS, stream
from lightning_hesd.numerics.tensor_states import Array, Leaf, Memory, OpaqueTensor, has_memory, is_opaque

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from lightning_hesd.numerics.holders import Holder
    from lightning_hesd.numerics.tensor_states import References

    class State(Protocol):
        """Something that can be put back."""

        kind: str
        """What it is, for messages."""

        def restore(self, references: References | None, *, thorough: bool) -> None:
            """Put it back; for the arguments see `Memory.restore`."""


_IMMUTABLE = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, type, enum.Enum, PurePath),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType),
    *(np.generic, np.dtype, torch.dtype, torch.device, torch.layout),
    *(dt.date, dt.time, dt.timedelta, decimal.Decimal, re.Pattern),
)
_ATOMS = {type(None), bool, int, float, complex, str, bytes, type, types.FunctionType, types.BuiltinFunctionType}
"""The most frequent of these, to be found without a look at their bases."""

_STATELESS = (*_IMMUTABLE, random.SystemRandom)
_PLAIN = (*_IMMUTABLE, *STREAMS, Tensor, np.ndarray, nn.Module, Dataset)
_FOREIGN = {"torch", "torchmetrics", "lightning", "lightning_fabric", "pytorch_lightning"}
"""Objects of these packages hold running machinery (trainers, optimizers, hooks), unless they are modules."""

LONGEST_SEARCHED = 10_000
"""Of longer containers of a dataset it is remembered what they hold, but not how that looks inside."""


@contextlib.contextmanager
def preserved(*roots: object, tensors: bool = True) -> Iterator[Callable[[], None]]:
    """Put back all state reachable from `roots`, and the global random number generators, on leaving.

    Args:
        *roots: Modules, datasets or other objects.
        tensors: Whether to restore the values of tensors and arrays too; they are copied for that. Without them,
            datasets are descended into, which may hold too many to copy.

    Yields:
        A function that puts the state of `roots` back meanwhile.
    """
    snapshot = Snapshot(*roots, tensors=tensors)
    with restored(snapshot):
        yield snapshot.restore


@contextlib.contextmanager
def restored(snapshot: Snapshot) -> Iterator[None]:
    """Put back the state in a snapshot, and the global random number generators, on leaving.

    What cannot be put back is left as it is, and a warning names it.
    """
    generators = _global_generator_states()
    try:
        yield
    finally:
        snapshot.restore()
        for restore in generators:
            restore()
        if snapshot.failures:
            what = "; ".join(f"{name} ({error})" for name, error in snapshot.failures.items())
            msg = (
                f"lightning_hesd could not put back all that the analysis changed: {what}. Training goes on from a "
                "changed state; keep such objects out of the module, or pass a `loss_fn` that does not change them."
            )
            warnings.warn(msg, RuntimeWarning, stacklevel=4)


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (all devices); call it inside `preserved`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the user's code may draw from the legacy generator
    # Without accelerators `torch.manual_seed` notes, at each call, from where it was called, in case that one turns up:
    # a millisecond, which is more than the loss of a small network takes.
    (torch if torch.accelerator.is_available() else torch.default_generator).manual_seed(seed)


def _global_generator_states() -> list[Callable[[], object]]:
    """Return one restoring function for each global generator."""
    restorers: list[Callable[[], object]] = [
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state()),  # noqa: NPY002
        partial(torch.set_rng_state, torch.get_rng_state()),
    ]
    if torch.accelerator.is_available():
        device: Any = torch.get_device_module(torch.accelerator.current_accelerator())
        which = "rng_state_all" if hasattr(device, "get_rng_state_all") else "rng_state"
        restorers.append(partial(getattr(device, f"set_{which}"), getattr(device, f"get_{which}")()))
    return restorers


class Snapshot:
    """Remembers the mutable state reachable from some objects, and restores it in place.

    Descends into modules, datasets, containers, classes of the user, and objects whose whole content is plain values.
    What cannot be read is left alone.

    Attributes:
        failures: What could not be put back, by type, and why.
    """

    def __init__(
        self,
        *roots: object,
        tensors: bool = True,
        known: Snapshot | None = None,
        without: Sequence[Tensor] = (),
    ) -> None:
        """Take a snapshot.

        Args:
            *roots: Modules, datasets or other objects; of these all attributes are remembered, plain or not.
            tensors: Whether to remember the values of tensors and arrays too.
            known: An earlier snapshot, whose copies of values still hold: they are not copied once more.
            without: Tensors whose values are not remembered.
        """
        self.failures: dict[str, Exception] = {} if known is None else known.failures
        self._tensors = tensors
        self._empties = Empties()
        self._states: list[State] = [self._empties]  # holders first: tensors are held by fewer once these are restored
        self._values: list[State] = []
        self._memories: dict[int, Memory] = {}  # by storage
        self._leaves: list[Leaf] = []
        self._places: dict[int, list[Holder]] = {}  # of tensors, and of others that may be replaced
        self._seen: dict[int, object] = {}  # keeps the objects alive, so that an id names one object only
        self._plain: dict[int, object] = {}  # those found to be
        with _plainly():
            pending = [*roots]
            for root in roots:
                pending += self._enter(attributes(root), root)
            while pending:  # a stack of its own, because chains of objects may be longer than Python's
                value = pending.pop()
                if type(value) not in _ATOMS and id(value) not in self._seen:
                    with contextlib.suppress(Exception):  # odd objects may raise anything: they are left alone
                        pending += self._take(value, known)
            for key in map(_storage_key, without):
                self._memories.pop(key, None)
            for memory in self._memories.values():
                memory.save()
        self._states += [*self._leaves, *self._memories.values(), *self._values]

    def set_gradients_aside(self) -> None:
        """Leave tensors without gradients, and without hooks on them, until the next restoration."""
        for leaf in self._leaves:
            leaf.clear()

    def restore(self, *, thorough: bool = True, replacing: bool = False) -> None:
        """Put everything back in place.

        Args:
            thorough: Whether to look for changes where none is likely, too: in large containers and tensors.
            replacing: Whether tensors that graphs hold are replaced by copies; otherwise the original ones come back.
        """
        references = self if replacing else None
        with _plainly():
            for state in self._states:
                try:
                    state.restore(references, thorough=thorough)
                except Exception as error:  # noqa: BLE001, PERF203 - the rest must be restored; `restored` tells
                    self.failures[state.kind] = error

    def can_replace(self, tensor: object) -> bool:
        """Whether another object can be put in all places where this one was found."""
        return not any(holder.is_fixed for holder in self._places.get(id(tensor), ()))

    def replace(self, value: object, other: object, *, for_good: bool = False) -> None:
        """Put another object in all places of a value, until the original ones come back unless it is for good."""
        places = self._places.pop(id(value), [])
        for holder in places:
            holder.replace(value, other, for_good=for_good)
        self._places[id(other)] = places

    def _enter(self, holders: Sequence[Holder], owner: object) -> list[object]:
        """Remember what holders hold, and return it."""
        bodies = [class_body(c) for c in user_classes(owner) if id(c) not in self._seen]
        self._seen.update((id(c), c) for c in user_classes(owner))
        found: list[object] = []
        for holder in [*holders, *bodies]:
            if not holder.is_fixed:
                self._states.append(holder)
            kinds = set(map(type, holder.values))
            found += holder.values if self._is_searched(holder.values) else []
            for kind in kinds:
                if issubclass(kind, Tensor | itertools.count):
                    for value in holder.values:
                        if type(value) is kind:
                            self._places.setdefault(id(value), []).append(holder)
        return found

    def _take(self, value: Any, known: Snapshot | None) -> Iterable[object]:
        """Remember the state of an object, and return the objects to go on with."""
        kind = type(value)  # not `isinstance`: objects that stand for others lie about what they are
        found: Iterable[object] = ()
        if issubclass(kind, _STATELESS):
            return found
        self._seen[id(value)] = value
        if issubclass(kind, Tensor):
            found = self._take_tensor(value, known)
        elif issubclass(kind, np.ndarray):
            if self._tensors and value.flags.writeable:
                self._values.append(Array(value))
            found = value.flat if value.dtype.hasobject else ()
        elif issubclass(kind, STREAMS):
            self._values.append(stream(value, self.replace))
        elif Empties.fits(value):
            self._empties.add(value)
        elif (held := container(value)) is not None:
            found = self._enter([held, *attributes(value)], value)
        elif self._is_open(value):
            found = self._enter(attributes(value), value)
        return found

    def _take_tensor(self, tensor: Tensor, known: Snapshot | None) -> list[object]:
        if tensor.is_leaf and (tensor.is_floating_point() or tensor.is_complex()):
            self._leaves.append(Leaf(tensor))
        if self._tensors and is_opaque(tensor):
            self._values.append(OpaqueTensor(tensor))
        elif self._tensors and has_memory(tensor):
            key, storage = _storage_key(tensor), tensor.untyped_storage()
            shared = None if known is None else known._memories.get(key)  # noqa: SLF001 - of this class
            memory = self._memories.setdefault(key, shared or Memory(storage))
            memory.add(tensor)
        if type(tensor) in {Tensor, nn.Parameter}:
            return [vars(tensor)]
        return self._enter(attributes(tensor), tensor)

    def _is_searched(self, values: Sequence[object]) -> bool:
        """Whether to look at each of some values: not at a million file names, nor at a million of any in datasets."""
        if not self._tensors and len(values) > LONGEST_SEARCHED:
            return False
        return not holds_atoms(values)

    def _is_open(self, value: object) -> bool:
        """Whether to descend into the attributes of `value`."""
        if issubclass(type(value), Dataset):
            return not self._tensors
        return issubclass(type(value), nn.Module) or (_is_own(value) and self._is_plain(value))

    def _is_plain(self, value: object) -> bool:
        """Whether `value` consists of plain values only, all the way down."""
        reached: dict[int, object] = {}
        pending = [value]
        while pending:
            part = pending.pop()
            if issubclass(type(part), _PLAIN) or id(part) in reached or id(part) in self._plain:
                continue
            reached[id(part)] = part
            held = container(part)
            parts = [held] if held is not None else attributes(part) if _is_own(part) else []
            if not parts:
                return False
            for holder in parts:
                pending.extend(holder.values if self._is_searched(holder.values) else ())
        self._plain.update(reached)
        return True


def _storage_key(tensor: Tensor) -> int:
    storage: Any = local_part(tensor).untyped_storage()
    return storage._cdata  # type: ignore[no-any-return]  # noqa: SLF001 - as an id: Python objects come and go


def _is_own(value: object) -> bool:
    return type(value).__module__.split(".")[0] not in _FOREIGN


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Let operations on tensors do just what they say, for tensors of any class."""
    with torch.inference_mode(mode=False), torch.no_grad(), torch._C.DisableTorchFunction():  # noqa: SLF001
        yield
