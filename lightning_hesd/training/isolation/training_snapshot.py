"""The state of training around the module: saved when an analysis begins, restored after every evaluation.

The snapshot covers all reachable objects (see `reachable`). Containers, attributes and random number generators are
restored, and so are small tensors and arrays. Changes of large tensors are detected by the version counters of
autograd; large arrays are read-only during the analysis, or compared by checksums. A change that cannot be undone fails
the analysis at once, or is reported at its end.

Objects of the module are restored here at the end only: between evaluations `numerics.isolation` restores them, which
knows the tensors that graphs hold.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_hesd.numerics.isolation.settings import SETTINGS
from lightning_hesd.numerics.isolation.snapshot import restore_state
from lightning_hesd.training.compat.namespaces import MisconfigurationException
from lightning_hesd.training.isolation.tracked_states import (
    Owner,
    TrackedContent,
    TrackedStates,
    TrackedValue,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lightning_hesd.training.isolation.reachable import ReachableObjects
    from lightning_hesd.training.isolation.tracked_states import Place, TrackedState

COPIED_BYTES = 64 * 2**20
"""Memory for copies of tensors and arrays outside the module, the smallest first."""


class DisturbedTrainingError(MisconfigurationException):
    """The analyzed function has an effect on training that an analysis cannot undo."""

    def __init__(self, action: str, reason: str = "an analysis could not undo that") -> None:
        """Make the message from the effect, a predicate such as "changed `x`", and the reason against it, a clause."""
        super().__init__(
            f"the function that is analyzed {action}; {reason}: pass the callback `loss_fn=`, a function (module, "
            "batch) -> mean loss over the batch without it."
        )


def names_in_words(names: Sequence[str], most: int = 3) -> str:
    """Return the first names as a list in words."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"`{name}`" for name in names[:most]) + more


class TrainingSnapshot:
    """All reachable objects around a module in training, as they were when this was made.

    Attributes:
        unrestored: Names of objects that could not be restored -> the reason.
        damaged: Names of tensors that were changed and cannot be restored.
    """

    def __init__(self, reachable: ReachableObjects, stack: contextlib.ExitStack, *, watches: bool = True) -> None:
        """Save the state.

        Args:
            reachable: The objects.
            stack: Restores gradients and writable arrays on leaving; call `finish` before.
            watches: Whether to detect changes of objects that are not copied: large ones, and those of threads.
        """
        self.unrestored: dict[str, str] = {}
        self.damaged: list[str] = []
        self._reported: list[str] = []
        tensors, self._watched = _split(reachable.tensors, COPIED_BYTES)
        writable = [(values, place) for values, place in reachable.arrays if values.flags.writeable]
        arrays, self._locked = _split(writable, COPIED_BYTES - sum(tensor.nbytes for tensor, _ in tensors))
        self._shared = reachable.shared if watches else []
        if not watches:
            self._watched, self._locked = [], []
        states = [*reachable.states]
        found: list[tuple[Callable[..., TrackedState], Sequence[tuple[Any, ...]]]] = [
            (TrackedContent.of, reachable.containers),
            (TrackedValue.of_array, arrays),
            (TrackedValue.of_setting, SETTINGS),
        ]
        for make, arguments in found:
            for given in arguments:
                with contextlib.suppress(Exception):  # objects that cannot be read are skipped
                    states.append(make(*given))
        # Between evaluations the analysis itself restores the objects of the module.
        self._module = TrackedStates([state for state in states if state.place.owner is Owner.MODULE])
        self._outside = TrackedStates([state for state in states if state.place.owner is not Owner.MODULE])
        self._leaves = [tensor for tensor, _ in reachable.tensors if tensor.is_leaf and tensor.requires_grad]
        for leaf in self._leaves:
            stack.callback(setattr, leaf, "grad", leaf.grad)
            leaf.grad = None
        self._tensors = [tensor for tensor, place in tensors if place.owner is not Owner.MODULE]
        stack.enter_context(restore_state(*(tensor for tensor, place in tensors if place.owner is Owner.MODULE)))
        self._restore_tensors = stack.enter_context(restore_state(*self._tensors))
        self._restore_generators = stack.enter_context(restore_state(*reachable.generators))
        self._checksums = [(*found, _checksum(found[0])) for found in self._locked if not _can_be_locked(found[0])]
        self._locked = [found for found in self._locked if _can_be_locked(found[0])]
        # Views are locked first and opened last: a view can become writable only after its base has.
        for values, _ in sorted(self._locked, key=lambda found: not isinstance(found[0].base, np.ndarray)):
            stack.callback(values.setflags, write=True)
            values.setflags(write=False)
        self._memories = [None if _has_special_memory(tensor) else tensor.data for tensor, _ in self._watched]
        self._versions = _versions(self._tensors)
        self._watched_versions = _versions([tensor for tensor, _ in self._watched])

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Restore the changes of the previous evaluation, and check that the present one does no damage.

        Changes are restored only now, because until now the backward of the previous evaluation may need them.

        Raises:
            DisturbedTrainingError: If the evaluation changes an object that cannot be restored.
            ValueError: If the user's function raises it.
        """
        self._restore()
        try:
            yield
        except ValueError as error:
            if not self._locked or "read-only" not in str(error):
                raise
            names = names_in_words([str(place) for _, place in self._locked])
            msg = f"writes to an array of which no copy is kept because it is large ({names})"
            raise DisturbedTrainingError(msg) from error
        finally:
            damaged = self._find_damaged()
        if damaged:
            self._reported += damaged
            names = names_in_words(damaged)
            msg = f"changed {names} in place, of which no copy is kept because it is large, sparse or the like"
            raise DisturbedTrainingError(msg)

    def _restore(self, *, thorough: bool = False) -> None:
        self._record(self._outside.restore(thorough=thorough))
        self._attempt("random number generators", self._restore_generators)
        for leaf in self._leaves:
            leaf.grad = None
        if thorough or _versions(self._tensors) != self._versions:
            self._attempt("tensors", self._restore_tensors)
            self._versions = _versions(self._tensors)

    def _find_damaged(self) -> list[str]:
        """Return the names of tensors that have been changed in place and cannot be restored."""
        versions = _versions([tensor for tensor, _ in self._watched])
        changes = zip(self._watched, self._watched_versions, versions, strict=True)
        damaged = [str(place) for (_, place), before, now in changes if before != now]
        self._watched_versions = versions
        self.damaged += damaged
        return damaged

    def finish(self) -> None:
        """Restore all changes, and enter in `unrestored` every object that still differs."""
        for (tensor, _), memory in zip(self._watched, self._memories, strict=True):
            if memory is not None and tensor.data_ptr() != memory.data_ptr():
                tensor.data = memory
        self._find_damaged()
        self._restore(thorough=True)
        self._record(self._module.restore(thorough=True))
        unreported = [name for name in self.damaged if name not in self._reported]
        unreported += [str(place) for values, place, before in self._checksums if _checksum(values) != before]
        self.unrestored |= dict.fromkeys(unreported, "no copy of it is kept because it is large, sparse or the like")
        for state in self._shared:
            self.unrestored |= {
                f"{state.place}{label}": "it was left to the threads that may share it" for label in state.changed()
            }

    def _attempt(self, name: str, restore: Callable[[], None]) -> None:
        try:
            restore()
        except Exception as error:  # noqa: BLE001 - recorded; the others are restored
            self._record({name: error})

    def _record(self, unrestored: dict[str, Exception | None]) -> None:
        self.unrestored |= {
            name: f"{error!r}" if error else "it does not take its former values" for name, error in unrestored.items()
        }


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor._version for tensor in tensors]  # noqa: SLF001


def _split(values: Sequence[tuple[Any, Place]], room: float) -> tuple[list[tuple[Any, Place]], list[tuple[Any, Place]]]:
    """Divide tensors or arrays into those that fit into a number of bytes, the smallest first, and the others.

    Objects of the module are left out of the others: the analysis itself copies them.
    """
    copied: list[tuple[Any, Place]] = []
    others: list[tuple[Any, Place]] = []
    sizes = [math.inf if _has_special_memory(value) else value.nbytes for value, _ in values]
    for size, found in sorted(zip(sizes, values, strict=True), key=itemgetter(0)):
        room -= size
        (copied if room >= 0 else others).append(found)
    return copied, [found for found in others if found[1].owner is not Owner.MODULE]


def _has_special_memory(value: Tensor | np.ndarray[Any, Any]) -> bool:
    """Whether a value is a tensor without memory that can simply be copied: sparse, nested, on no device, ..."""
    if not isinstance(value, Tensor):
        return False
    is_plain = type(value).__torch_dispatch__ is Tensor.__torch_dispatch__ and value.layout is torch.strided
    return not is_plain or value.is_nested or value.is_quantized or value.device.type == "meta"


def _can_be_locked(values: np.ndarray[Any, Any]) -> bool:
    """Whether an array can be made read-only and writable again: not if it shares the memory of a tensor."""
    owner: Any = values
    while isinstance(owner, np.ndarray):
        if owner.base is None:
            return True
        owner = owner.base
    try:
        return not memoryview(owner).readonly
    except TypeError:
        return False


def _checksum(values: np.ndarray[Any, Any]) -> int:
    return zlib.adler32(np.ascontiguousarray(values).data.cast("B"))
