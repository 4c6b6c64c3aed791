"""Snapshots: save the state of objects before user code runs, and restore it afterwards.

A loss function, a training step or a dataset may change running statistics, metric states, lists, and random number
generators. A snapshot saves the state that can be reached from some objects, and restores it in place. It does not
cover files, globals, closures, and objects that hold more than plain values (a database connection, a logger's run).
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
from lightning_hesd.numerics.dtensors import local_shard
from lightning_hesd.numerics.isolation.containers import EmptyContainersState
from lightning_hesd.numerics.isolation.reachable import ReachableState
from lightning_hesd.numerics.isolation.streams import stream_state
from lightning_hesd.numerics.isolation.tensor_memory import TensorMemory, has_memory
from lightning_hesd.numerics.isolation.tensor_states import ArrayState, LeafState, OpaqueTensorState, is_opaque

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lightning_hesd.numerics.isolation.containers import ContentState
    from lightning_hesd.numerics.isolation.tensor_memory import Replacer

    class State(Protocol):
        """The saved state of an object.

        Attributes:
            description: The kind of object, for messages.
        """

        description: str

        def restore(self, replacer: Replacer | None, *, thorough: bool) -> bool:
            """Restore the state, and return whether it had changed; for the arguments see `TensorMemory.restore`."""


MAX_COPIED_BYTES = 2**24
"""Size up to which tensors and arrays outside the module are copied; larger ones are taken for data."""

MAX_COPIED = 1000
"""Number of tensors, and of arrays, outside the module that are copied; any more are taken for data."""

MAX_COMPARED_STATES = 5000
"""Number of states up to which all are compared at every restoration; of more, those that have changed before."""


@contextlib.contextmanager
def restore_state(*roots: object, tensors: bool = True) -> Iterator[Callable[[], None]]:
    """Restore all state reachable from `roots`, and the global random number generators, on leaving.

    Args:
        *roots: Modules, datasets or other objects.
        tensors: Whether to restore the values of tensors and arrays, too, from copies. If not, datasets, which may hold
            too many values to copy, are searched as well.

    Yields:
        A function that restores the state of `roots` before that.
    """
    snapshot = Snapshot(*roots, tensors=tensors)
    with restoring(snapshot):
        yield snapshot.restore


@contextlib.contextmanager
def restoring(snapshot: Snapshot) -> Iterator[None]:
    """Restore a snapshot, and the global random number generators, on leaving; warn if that fails for an object."""
    generators = _global_generator_states()
    try:
        yield
    finally:
        snapshot.restore()
        for restore in generators:
            restore()
        if snapshot.failures:
            failed = "; ".join(f"{name} ({error})" for name, error in snapshot.failures.items())
            msg = (
                f"lightning_hesd could not restore everything that the analysis changed: {failed}. Training continues "
                "from a changed state. Keep such objects out of the module, or pass a `loss_fn` that does not change "
                "them."
            )
            warnings.warn(msg, RuntimeWarning, stacklevel=4)


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (all devices); call it inside `restore_state`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the user's code may draw from the legacy generator
    # `torch.manual_seed` would also seed accelerators that are first used after the generators have been restored.
    torch.default_generator.manual_seed(seed)
    for module in accelerators():
        (module.manual_seed_all if hasattr(module, "manual_seed_all") else module.manual_seed)(seed)


def _global_generator_states() -> list[Callable[[], object]]:
    """Return one function for each global generator that restores its present state."""
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
    """The mutable state that can be reached from some objects, as it was when the snapshot was taken.

    Attributes:
        failures: State that could not be restored: its description -> the error.
    """

    def __init__(
        self,
        *roots: object,
        tensors: bool = True,
        others: Sequence[object] = (),
        earlier: Snapshot | None = None,
        excluded: Sequence[Tensor] = (),
    ) -> None:
        """Take a snapshot.

        Args:
            *roots: Modules, datasets or other objects.
            tensors: Whether to save the values of tensors and arrays, too; then datasets are not searched.
            others: Further objects, among which datasets are searched, but large or many tensors are not copied.
            earlier: A snapshot whose copies of values are still valid, and are used again.
            excluded: Tensors whose values are not saved.
        """
        self.failures: dict[str, Exception] = {} if earlier is None else earlier.failures
        self._memories: dict[int, TensorMemory] = {}  # by storage
        self._referrers: dict[int, list[ContentState]] = {}  # of tensors and counters
        self._changed: set[int] = set()  # positions of states
        with _without_overrides():
            own = ReachableState(roots, datasets=not tensors)
            more = ReachableState(others, datasets=True, known=own)
            self._reached = own, more  # keeps the objects alive
            for content in [*own.contents, *more.contents]:
                self._save_referrer(content)
            self._leaves: list[LeafState] = []
            values: list[State] = []
            if tensors:
                few = [t for t in more.tensors if t.nbytes <= MAX_COPIED_BYTES][:MAX_COPIED]
                values += [state for t in [*own.tensors, *few] for state in self._save_tensor(t, earlier)]
                few = [a for a in more.arrays if a.nbytes <= MAX_COPIED_BYTES][:MAX_COPIED]
                values += [ArrayState(a) for a in [*own.arrays, *few] if a.flags.writeable]
            values += [stream_state(s, self.replace) for s in [*own.streams, *more.streams]]
            for tensor in map(local_shard, excluded):
                if has_memory(tensor):
                    self._memories.pop(_storage_key(tensor), None)
            for memory in self._memories.values():
                memory.save()
        # Contents come first: restoring them releases references to tensors.
        contents = [content for content in [*own.contents, *more.contents] if not content.is_immutable]
        empty = EmptyContainersState([*own.empty, *more.empty])
        self._states: list[State] = [empty, *contents, *self._leaves, *self._memories.values(), *values]

    def _save_referrer(self, content: ContentState) -> None:
        for kind in set(map(type, content.values)):
            if issubclass(kind, Tensor | itertools.count):
                for value in content.values:
                    if type(value) is kind:
                        self._referrers.setdefault(id(value), []).append(content)

    def _save_tensor(self, tensor: Tensor, earlier: Snapshot | None) -> list[State]:
        """Save a tensor, and return its states beside gradient and memory."""
        with contextlib.suppress(Exception):  # tensors of odd classes may have no values that can be read
            if tensor.is_leaf and (tensor.is_floating_point() or tensor.is_complex()):
                self._leaves.append(LeafState(tensor))
            if is_opaque(tensor):
                return [OpaqueTensorState(tensor)]
            if has_memory(tensor):
                key, storage = _storage_key(tensor), tensor.untyped_storage()
                saved = None if earlier is None else earlier._memories.get(key)  # noqa: SLF001 - of this class
                memory = self._memories.get(key) or saved or TensorMemory(storage)
                memory.add(tensor)
                self._memories[key] = memory
        return []

    def clear_gradients(self) -> None:
        """Remove the gradients of tensors, and the hooks on them, until the next restoration."""
        with _without_overrides():
            for leaf in self._leaves:
                leaf.clear()

    def restore(self, *, thorough: bool = True, replacing: bool = False) -> None:
        """Restore everything in place.

        Args:
            thorough: Whether to look for unlikely changes, too: in large containers and tensors.
            replacing: Whether tensors that graphs hold are replaced by copies; if not, the original tensors return.
        """
        replacer = self if replacing else None
        all_states = thorough or not replacing or len(self._states) <= MAX_COMPARED_STATES
        with _without_overrides():
            for position in range(len(self._states)) if all_states else sorted(self._changed):
                state = self._states[position]
                try:
                    if state.restore(replacer, thorough=thorough):
                        self._changed.add(position)
                except Exception as error:  # noqa: BLE001 - the others are restored; `restoring` warns
                    self.failures[state.description] = error

    def can_replace(self, tensor: object) -> bool:
        """Whether all objects that were found to refer to a tensor can refer to another."""
        referrers = self._referrers.get(id(tensor), [])
        return bool(referrers) and not any(content.is_immutable for content in referrers)

    def replace(self, value: object, other: object, *, permanent: bool = False) -> None:
        """Make all objects that refer to a value refer to another: until `restore()`, or permanently."""
        referrers = self._referrers.pop(id(value), [])
        for content in referrers:
            content.replace(value, other, permanent=permanent)
        self._referrers[id(other)] = referrers


def _storage_key(tensor: Tensor) -> int:
    storage: Any = local_shard(tensor).untyped_storage()
    return storage._cdata  # type: ignore[no-any-return]  # noqa: SLF001 - an id; Python objects of storages are temporary


@contextlib.contextmanager
def _without_overrides() -> Iterator[None]:
    """Disable gradients, and the overrides of operations by subclasses of tensors."""
    own: Any = torch._C  # noqa: SLF001
    with (
        torch.inference_mode(mode=False),
        torch.no_grad(),
        own.DisableTorchFunction(),
        own._DisableTorchDispatch(),  # noqa: SLF001 - made only here, because it acts from its construction on
    ):
        yield
