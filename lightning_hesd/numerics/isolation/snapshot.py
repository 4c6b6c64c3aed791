"""Snapshots: put back whatever running the user's code has changed.

What the analysis calls (a loss function, a training step, a dataset) may leave traces: running statistics, metric
states, lists that grow, random numbers drawn. A snapshot remembers all of it that Python lets one reach, and puts it
back in place. Out of reach are files, globals, closures, and objects that hold anything but plain values (a database
connection, a logger's run).
"""

from __future__ import annotations

import contextlib
import itertools
import random
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_hesd.numerics.devices import accelerators
from lightning_hesd.numerics.dtensors import local_part
from lightning_hesd.numerics.isolation.holders import Empties
from lightning_hesd.numerics.isolation.reach import Reach
from lightning_hesd.numerics.isolation.streams import stream
from lightning_hesd.numerics.isolation.tensor_states import Array, Leaf, Memory, OpaqueTensor, has_memory, is_opaque

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lightning_hesd.numerics.isolation.holders import Holder
    from lightning_hesd.numerics.isolation.tensor_states import References

    class State(Protocol):
        """Something that can be put back."""

        kind: str
        """What it is, for messages."""

        def restore(self, references: References | None, *, thorough: bool) -> bool:
            """Put it back, and return whether it was changed; for the arguments see `Memory.restore`."""


DATA_SIZE = 2**24
"""Bytes of a tensor or an array from which on it is taken to be data, except in the module."""

DATA_COUNT = 1000
"""Tensors and arrays from which on they are taken to be data, except in the module."""

MANY = 5000
"""States from which on only those that have been found changed before are looked at, unless thoroughly."""


@contextlib.contextmanager
def restore_state(*roots: object, tensors: bool = True) -> Iterator[Callable[[], None]]:
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
    """Seed the global generators of Python, NumPy and PyTorch (all devices); call it inside `restore_state`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the user's code may draw from the legacy generator
    # `torch.manual_seed` would have the seed wait for accelerators that are not in use, to begin with it one day.
    torch.default_generator.manual_seed(seed)
    for module in accelerators():
        (module.manual_seed_all if hasattr(module, "manual_seed_all") else module.manual_seed)(seed)


def _global_generator_states() -> list[Callable[[], object]]:
    """Return one restoring function for each global generator."""
    restorers: list[Callable[[], object]] = [
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state()),  # noqa: NPY002
        partial(torch.set_rng_state, torch.get_rng_state()),
    ]
    for module in accelerators():
        which = "rng_state_all" if hasattr(module, "get_rng_state_all") else "rng_state"
        restorers.append(partial(getattr(module, f"set_{which}"), getattr(module, f"get_{which}")()))
    return restorers


class Snapshot:
    """Remembers the mutable state reachable from some objects, and restores it in place.

    Attributes:
        failures: What could not be put back, by kind, and why.
    """

    def __init__(
        self,
        *roots: object,
        tensors: bool = True,
        others: Sequence[object] = (),
        known: Snapshot | None = None,
        without: Sequence[Tensor] = (),
    ) -> None:
        """Take a snapshot.

        Args:
            *roots: Modules, datasets or other objects.
            tensors: Whether to remember the values of tensors and arrays too; then datasets are left alone.
            others: More of them, where what may be data is left alone, but datasets are not.
            known: An earlier snapshot, whose copies of values still hold: they are not copied once more.
            without: Tensors whose values are not remembered.
        """
        self.failures: dict[str, Exception] = {} if known is None else known.failures
        self._memories: dict[int, Memory] = {}  # by storage
        self._places: dict[int, list[Holder]] = {}  # of tensors and counts
        self._changed: set[int] = set()  # positions of states
        with _plainly():
            own = Reach(roots, datasets=not tensors)
            more = Reach(others, datasets=True, but=own)
            self._reached = own, more  # keeps what is in reach alive
            for holder in [*own.holders, *more.holders]:
                self._note_places(holder)
            self._leaves: list[Leaf] = []
            values: list[State] = []
            if tensors:
                few = [t for t in more.tensors if t.nbytes <= DATA_SIZE][:DATA_COUNT]
                values += [state for t in [*own.tensors, *few] for state in self._states_of(t, known)]
                few = [a for a in more.arrays if a.nbytes <= DATA_SIZE][:DATA_COUNT]
                values += [Array(a) for a in [*own.arrays, *few] if a.flags.writeable]
            values += [stream(s, self.replace) for s in [*own.streams, *more.streams]]
            for tensor in map(local_part, without):
                if has_memory(tensor):
                    self._memories.pop(_storage_key(tensor), None)
            for memory in self._memories.values():
                memory.save()
        # Holders first: tensors are held by fewer once these are restored.
        holders = [holder for holder in [*own.holders, *more.holders] if not holder.is_fixed]
        empties = Empties([*own.empty, *more.empty])
        self._states: list[State] = [empties, *holders, *self._leaves, *self._memories.values(), *values]

    def _note_places(self, holder: Holder) -> None:
        for kind in set(map(type, holder.values)):
            if issubclass(kind, Tensor | itertools.count):
                for value in holder.values:
                    if type(value) is kind:
                        self._places.setdefault(id(value), []).append(holder)

    def _states_of(self, tensor: Tensor, known: Snapshot | None) -> list[State]:
        """Remember a tensor, and return the states that it does not share with others."""
        with contextlib.suppress(Exception):  # those of odd classes may have no values to be read
            if tensor.is_leaf and (tensor.is_floating_point() or tensor.is_complex()):
                self._leaves.append(Leaf(tensor))
            if is_opaque(tensor):
                return [OpaqueTensor(tensor)]
            if has_memory(tensor):
                key, storage = _storage_key(tensor), tensor.untyped_storage()
                shared = None if known is None else known._memories.get(key)  # noqa: SLF001 - of this class
                memory = self._memories.get(key) or shared or Memory(storage)
                memory.add(tensor)
                self._memories[key] = memory
        return []

    def set_gradients_aside(self) -> None:
        """Leave tensors without gradients, and without hooks on them, until the next restoration."""
        with _plainly():
            for leaf in self._leaves:
                leaf.clear()

    def restore(self, *, thorough: bool = True, replacing: bool = False) -> None:
        """Put everything back in place.

        Args:
            thorough: Whether to look for changes where none is likely, too: in large containers and tensors.
            replacing: Whether tensors that graphs hold are replaced by copies; otherwise the original ones come back.
        """
        references = self if replacing else None
        every = thorough or not replacing or len(self._states) <= MANY
        with _plainly():
            for position in range(len(self._states)) if every else sorted(self._changed):
                state = self._states[position]
                try:
                    if state.restore(references, thorough=thorough):
                        self._changed.add(position)
                except Exception as error:  # noqa: BLE001 - the rest must be restored; `restored` tells
                    self.failures[state.kind] = error

    def can_replace(self, tensor: object) -> bool:
        """Whether another object can be put in all places where this one was found."""
        places = self._places.get(id(tensor), [])
        return bool(places) and not any(holder.is_fixed for holder in places)

    def replace(self, value: object, other: object, *, for_good: bool = False) -> None:
        """Put another object in all places of a value, until the original ones come back unless it is for good."""
        places = self._places.pop(id(value), [])
        for holder in places:
            holder.replace(value, other, for_good=for_good)
        self._places[id(other)] = places


def _storage_key(tensor: Tensor) -> int:
    storage: Any = local_part(tensor).untyped_storage()
    return storage._cdata  # type: ignore[no-any-return]  # noqa: SLF001 - as an id: Python objects come and go


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Let operations on tensors do just what they say, for tensors of any class."""
    own: Any = torch._C  # noqa: SLF001
    with (
        torch.inference_mode(mode=False),
        torch.no_grad(),
        own.DisableTorchFunction(),
        own._DisableTorchDispatch(),  # noqa: SLF001 - made here and no sooner: it acts from its making on
    ):
        yield
