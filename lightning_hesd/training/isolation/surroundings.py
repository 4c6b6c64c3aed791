"""What an analysis finds around its module stays as it was: put back after every evaluation, or seen to have changed.

Everything within reach (see `reach`) is remembered when an analysis begins. Containers, attributes and generators are
put back, and so are tensors and arrays up to a size. Larger tensors are watched by the versions that autograd counts;
larger arrays are read-only meanwhile, or compared by checksums. A change that cannot be undone fails the analysis at
once, or is told of at its end.

What belongs to the module is put back here at the end only: between evaluations that is the matter of the analysis,
which knows what its graphs hold.
"""

from __future__ import annotations

import contextlib
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_hesd.numerics.isolation.snapshot import restore_state
from lightning_hesd.training.compat.namespaces import MisconfigurationException
from lightning_hesd.training.isolation.structure import SETTINGS, Elements, Items, Owner, Setting, Structure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lightning_hesd.training.isolation.reach import Reach
    from lightning_hesd.training.isolation.structure import Part, Place

COPIED_BYTES = 64 * 2**20
"""Memory for copies of tensors and arrays beyond the module, the smallest first."""


class DisturbedTrainingError(MisconfigurationException):
    """The function that is analysed does what an analysis cannot undo."""

    def __init__(self, what: str, why: str = "an analysis could not undo that") -> None:
        """Make the message.

        Args:
            what: What the function does, as a predicate.
            why: Why an analysis must not, as a clause.
        """
        super().__init__(
            f"the function that is analysed {what}; {why}: pass `loss_fn=` to HessianSpectrumCallback, a function "
            "(module, batch) -> mean loss over the batch without it."
        )


def some_of(names: Sequence[str], most: int = 3) -> str:
    """Return the first names as a list in words."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"`{name}`" for name in names[:most]) + more


class Surroundings:
    """Everything within reach, as it was when this was made.

    Attributes:
        left: What could not be put back, by name, with what is known of the reason.
        harm: Names of tensors that were changed and cannot be put back.
    """

    def __init__(self, reach: Reach, stack: contextlib.ExitStack, *, watches: bool = True) -> None:
        """Remember it.

        Args:
            reach: What is within reach.
            stack: Takes what is to be undone at the end, after `finish`.
            watches: Whether to watch what is too large to be copied, and what threads may share.
        """
        self.left: dict[str, str] = {}
        self.harm: list[str] = []
        self._told: list[str] = []
        tensors, self._watched = _split(reach.tensors, COPIED_BYTES)
        writable = [(values, place) for values, place in reach.arrays if values.flags.writeable]
        arrays, self._locked = _split(writable, COPIED_BYTES - sum(tensor.nbytes for tensor, _ in tensors))
        self._shared = reach.shared if watches else []
        if not watches:
            self._watched, self._locked = [], []
        parts = [*reach.parts]
        found: list[tuple[Callable[..., Part], Sequence[tuple[Any, ...]]]] = [
            (Items, reach.containers),
            (Elements, arrays),
            (Setting, SETTINGS),
        ]
        for make, arguments in found:
            for given in arguments:
                with contextlib.suppress(Exception):  # what does not let itself be read is left alone
                    parts.append(make(*given))
        # What is the module's, the analysis itself puts back between evaluations.
        self._module = Structure([part for part in parts if part.place.owner is Owner.MODULE])
        self._beyond = Structure([part for part in parts if part.place.owner is not Owner.MODULE])
        self._leaves = [tensor for tensor, _ in reach.tensors if tensor.is_leaf and tensor.requires_grad]
        stack.enter_context(_without_gradients(self._leaves))
        self._tensors = [tensor for tensor, place in tensors if place.owner is not Owner.MODULE]
        stack.enter_context(restore_state(*(tensor for tensor, place in tensors if place.owner is Owner.MODULE)))
        self._restore_tensors = stack.enter_context(restore_state(*self._tensors))
        self._restore_generators = stack.enter_context(restore_state(*reach.generators))
        self._sums = [(*found, _checksum(found[0])) for found in self._locked if not _can_be_locked(found[0])]
        self._locked = [found for found in self._locked if _can_be_locked(found[0])]
        stack.enter_context(_read_only([values for values, _ in self._locked]))
        self._memories = [None if _is_odd(tensor) else tensor.data for tensor, _ in self._watched]
        self._versions = _versions(self._tensors)
        self._watched_versions = _versions([tensor for tensor, _ in self._watched])

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Put back what the evaluation before has changed, and see to it that this one does no harm.

        It is put back no sooner, because the gradient of the evaluation before may depend on it until now.

        Raises:
            DisturbedTrainingError: If it does.
            ValueError: If the user's function raises it.
        """
        self._restore()
        try:
            yield
        except ValueError as error:
            if not self._locked or "read-only" not in str(error):
                raise
            names = some_of([str(place) for _, place in self._locked])
            msg = f"writes to an array of which no copy is kept because it is large ({names})"
            raise DisturbedTrainingError(msg) from error
        finally:
            harm = self._find_harm()
        if harm:
            self._told += harm
            msg = f"changed {some_of(harm)} in place, of which no copy is kept because it is large, sparse or the like"
            raise DisturbedTrainingError(msg)

    def _restore(self, *, thoroughly: bool = False) -> None:
        """Put back what changed."""
        self._note(self._beyond.restore(thoroughly=thoroughly))
        self._attempt("random number generators", self._restore_generators)
        for leaf in self._leaves:
            leaf.grad = None
        if thoroughly or _versions(self._tensors) != self._versions:
            self._attempt("tensors", self._restore_tensors)
            self._versions = _versions(self._tensors)

    def _find_harm(self) -> list[str]:
        """Return the names of tensors that were changed in place and cannot be put back."""
        versions = _versions([tensor for tensor, _ in self._watched])
        changes = zip(self._watched, self._watched_versions, versions, strict=True)
        harm = [str(place) for (_, place), before, now in changes if before != now]
        self._watched_versions = versions
        self.harm += harm
        return harm

    def finish(self) -> None:
        """Put back all that changed, and note in `left` what is not as it was."""
        for (tensor, _), memory in zip(self._watched, self._memories, strict=True):
            if memory is not None and tensor.data_ptr() != memory.data_ptr():
                tensor.data = memory
        self._find_harm()
        self._restore(thoroughly=True)
        self._note(self._module.restore(thoroughly=True))
        untold = [name for name in self.harm if name not in self._told]
        untold += [str(place) for values, place, before in self._sums if _checksum(values) != before]
        self.left |= dict.fromkeys(untold, "no copy of it is kept because it is large, sparse or the like")
        for part in self._shared:
            self.left |= {
                f"{part.place}{label}": "it was left to the threads that may share it" for label in part.changed()
            }

    def _attempt(self, what: str, restore: Callable[[], None]) -> None:
        try:
            restore()
        except Exception as error:  # noqa: BLE001 - noted, and the rest is put back
            self._note({what: error})

    def _note(self, left: dict[str, Exception | None]) -> None:
        self.left |= {
            name: f"{error!r}" if error else "it does not take its former values" for name, error in left.items()
        }


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor._version for tensor in tensors]  # noqa: SLF001


def _split(values: Sequence[tuple[Any, Place]], room: float) -> tuple[list[tuple[Any, Place]], list[tuple[Any, Place]]]:
    """Divide tensors or arrays into those that fit into a number of bytes, the smallest first, and the others.

    Of the others, those that belong to the module are left to the analysis, which copies them all.
    """
    copied: list[tuple[Any, Place]] = []
    others = [found for found in values if _is_odd(found[0])]
    for found in sorted((found for found in values if not _is_odd(found[0])), key=lambda found: found[0].nbytes):
        room -= found[0].nbytes
        (copied if room >= 0 else others).append(found)
    return copied, [found for found in others if found[1].owner is not Owner.MODULE]


def _is_odd(value: Tensor | np.ndarray[Any, Any]) -> bool:
    """Whether it is a tensor without a plain memory to copy from and to: sparse, nested, on no device, ..."""
    if not isinstance(value, Tensor):
        return False
    is_plain = type(value).__torch_dispatch__ is Tensor.__torch_dispatch__ and value.layout is torch.strided
    return not is_plain or value.is_nested or value.is_quantized or value.device.type == "meta"


@contextlib.contextmanager
def _without_gradients(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Set gradients aside."""
    gradients = [leaf.grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        yield
    finally:
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient


def _can_be_locked(values: np.ndarray[Any, Any]) -> bool:
    """Whether an array that is made read-only can be made writable again: not where the memory is that of a tensor."""
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


@contextlib.contextmanager
def _read_only(arrays: Sequence[np.ndarray[Any, Any]]) -> Iterator[None]:
    """Keep arrays from being written to."""
    for values in arrays:
        values.flags.writeable = False
    try:
        yield
    finally:
        # Views can be writable only if what they are views of is.
        for values in sorted(arrays, key=lambda values: isinstance(values.base, np.ndarray)):
            values.flags.writeable = True
