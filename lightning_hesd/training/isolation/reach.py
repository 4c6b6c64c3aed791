"""What code in a training step can reach from its module and Trainer, found by following attributes and items.

Out of reach are globals, closures, files on disk and other processes, and what lies within the items of very long
containers. Left alone is what may be at work meanwhile: progress bars, workers of dataloaders, connections, and what
the user's own threads share.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.sharedctypes
import types
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hesd.numerics.dtensors import is_distributed, local_part
from lightning_hesd.training.isolation import kinds
from lightning_hesd.training.isolation.kinds import attributes_of, slots_of
from lightning_hesd.training.isolation.structure import LARGE, Items, Memory, Owner, Place, Slots, Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import lightning.pytorch as pl

    from lightning_hesd.training.isolation.structure import Part

MAX_OBJECTS = 50_000
"""Objects that are followed, the nearest first; what lies further away is out of reach."""

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


class Item(NamedTuple):
    """An item of a list or dict.

    Attributes:
        container: The list or dict.
        key: Its key or position in there.
        value: The item.
        place: Where it was found.
    """

    container: Any
    key: Any
    value: Any
    place: Place


@dataclass
class Reach:
    """What is within reach, each with the place where it was found first.

    Attributes:
        containers: Lists, dicts, ..., the dicts of objects' attributes, and classes of the user.
        parts: What holds something in another form: slots, byte arrays, shared numbers.
        tensors: Tensors, without parameters and buffers of the module.
        arrays: NumPy arrays.
        generators: Random number generators.
        shared: Attributes, and containers in attributes, of objects that threads of the user's may share.
        optimizers: Optimizers.
        recorders: Loggers, and what they and their like write with: summary writers, runs.
        iterators: Iterators that cannot go back, without the Trainer's.
        outputs: Open files, without the Trainer's.
        methods: Bound methods that the user keeps.
    """

    containers: list[tuple[Any, Place]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    tensors: list[tuple[Tensor, Place]] = field(default_factory=list)
    arrays: list[tuple[np.ndarray[Any, Any], Place]] = field(default_factory=list)
    generators: list[Any] = field(default_factory=list)
    shared: list[Part] = field(default_factory=list)
    optimizers: list[Optimizer] = field(default_factory=list)
    recorders: list[Any] = field(default_factory=list)
    iterators: list[Item] = field(default_factory=list)
    outputs: list[Item] = field(default_factory=list)
    methods: list[Item] = field(default_factory=list)


class Walk:
    """A walk through everything within reach of a module in training.

    Attributes:
        found: What it found.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, untouched: Iterable[object] = ()) -> None:
        """Walk: first through what belongs to the module, then through the rest.

        Args:
            trainer: The Trainer.
            module: The module.
            untouched: Objects to leave alone, with what only they lead to.
        """
        self.found = Reach()
        self._seen: dict[int, object] = {}  # keeps the objects alive, so that an id names one only
        self._pending: deque[tuple[Any, Place]] = deque()
        self._left = MAX_OBJECTS
        self._opens = kinds.Openness()
        self._threads = kinds.Threads()
        self._names = {id(p): repr(name) for name, p in module.named_parameters()}
        rest = _roots(trainer)
        self._see(*untouched, *kinds.global_generators())
        self._see(*module.parameters(), *module.buffers(), *module.modules(), *(root for root, _ in rest))
        for name, part in module.named_modules():
            self._enter_module(part, Place(None, f"self.{name}" if name else "self", Owner.MODULE))
        self._follow()
        for root, _ in rest:
            self._seen.pop(id(root), None)
        self._pending.extend(rest)
        self._follow()

    def _see(self, *values: object) -> None:
        self._seen.update((id(value), value) for value in values)

    def _follow(self) -> None:
        while self._pending and self._left > 0:
            with contextlib.suppress(Exception):  # what does not let itself be looked at is left alone
                self._visit(*self._pending.popleft())

    # One value ------------------------------------------------------------------------------------------------------

    def _visit(self, value: Any, place: Place) -> None:
        if type(value) in kinds.ATOMS or type(value) in weakref.ProxyTypes or id(value) in self._seen:
            return
        self._see(value)
        self._left -= 1
        if isinstance(value, kinds.INERT):
            return
        if (held := _held_inside(value)) is not None:
            self._add(place, held)
        elif not self._is_content(value, place):
            if isinstance(value, list | dict | set | deque):
                self._enter(value, place)
            self._visit_object(value, place)

    def _is_content(self, value: Any, place: Place) -> bool:
        """Take something that has values in a memory of its own, or a state; return whether it is of that kind."""
        if isinstance(value, Tensor):
            if not value.is_inference():  # these can hardly be written to
                self.found.tensors.append((local_part(value) if is_distributed(value) else value, place))
        elif isinstance(value, np.ndarray):
            self.found.arrays.append((value, place))
            if value.dtype == object and value.size <= LARGE:
                self._add(place, {f".flat[{i}]": item for i, item in enumerate(value.flat)})
        elif isinstance(value, kinds.GENERATORS):
            self.found.generators.append(value)
        elif isinstance(value, kinds.BUFFERS):
            self.found.parts.append(Memory(value, place))
        elif kinds.is_table(value):
            self.found.parts.append(Table(value, place))
        else:
            return False
        return True

    def _visit_object(self, value: Any, place: Place) -> None:
        """Visit something that may have attributes."""
        if kinds.is_logger(value) or kinds.is_recorder(value):
            self.found.recorders.append(value)
        if isinstance(value, Optimizer):
            self.found.optimizers.append(value)
        attributes, slots = attributes_of(value), slots_of(value)
        if not (attributes or slots) or not self._opens(value):
            return
        if self._threads.may_share(value, [*attributes.values(), *slots.values()]):
            if not kinds.is_logger(value):  # which the analysed function cannot write to
                self._look_at(attributes, place)
            return
        if kinds.is_outward(value):
            place = place._replace(owner=max(place.owner, Owner.USER))
        for kind in type(value).__mro__:
            self._enter_class(kind, place.owner)
        if slots:
            self.found.parts.append(Slots(value, list(slots), place))
            self._add(place, {f".{name}": item for name, item in slots.items()})
        if attributes:
            self._enter(attributes, place._replace(of_attributes=True))

    # What a value holds ---------------------------------------------------------------------------------------------

    def _add(self, place: Place, held: Mapping[str, Any]) -> None:
        self._pending.extend((item, Place(place, label, place.owner)) for label, item in held.items())

    def _enter(self, container: Any, place: Place) -> None:
        """Take a container or a dict of attributes, and follow its items."""
        self._see(container)
        self.found.containers.append((container, place))
        if len(container) > LARGE:
            return
        items: Iterable[Any] = container.items() if isinstance(container, dict) else enumerate(container)
        if place.of_attributes:  # public names first, as things are named by the way on which they are found first
            items = sorted(items, key=lambda named: str(named[0]).startswith("_"))
        for key, item in items:
            if type(item) not in kinds.ATOMS:
                label = f"[{self._names[id(key)]}]" if id(key) in self._names else place.label_of(key)
                self._enter_item(container, key, item, Place(place, label, place.owner))

    def _enter_item(self, container: Any, key: Any, value: Any, place: Place) -> None:
        self._pending.append((value, place))
        if not isinstance(container, dict | list) or place.owner is Owner.TRAINER:
            return
        item = Item(container, key, value, place)
        with contextlib.suppress(Exception):  # as for what does not let itself be looked at
            if isinstance(value, types.MethodType):
                self.found.methods.append(item)
            elif kinds.is_spent_by_reading(value):
                self.found.iterators.append(item)
            elif kinds.is_output(value):
                self.found.outputs.append(item)

    def _enter_module(self, module: nn.Module, place: Place) -> None:
        """Follow the attributes of a part of the module; parameters and the like belong to the analysis."""
        attributes = vars(module)
        for name in [name for name in attributes if name not in _MODULE_ATTRIBUTES]:
            self._enter_item(attributes, name, attributes[name], Place(place, f".{name}", place.owner))
        for kind in type(module).__mro__:
            self._enter_class(kind, place.owner)

    def _enter_class(self, kind: type, owner: Owner) -> None:
        """Take the attributes of a class of the user's, and follow them."""
        if id(kind) in self._seen or not kinds.is_users(kind.__module__):
            return
        self._see(kind)
        place = Place(None, kind.__qualname__, owner, of_attributes=True)
        self.found.containers.append((kind, place))
        self._add(place, {f".{name}": value for name, value in vars(kind).items() if not name.startswith("__")})

    def _look_at(self, attributes: dict[str, Any], place: Place) -> None:
        """Take the attributes of an object that threads may share, and the containers among them."""
        if place.owner is Owner.TRAINER:
            return
        self.found.shared.append(Items(attributes, place._replace(of_attributes=True)))
        self.found.shared.extend(
            Items(value, Place(place, f".{name}", place.owner))
            for name, value in attributes.items()
            if isinstance(value, list | dict | set | deque)
        )


def _roots(trainer: pl.Trainer) -> list[tuple[Any, Place]]:
    """Return what is beyond the module, by the names that users know, and the Trainer at last."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    named: list[tuple[str, Iterable[Any]]] = [
        ("trainer.optimizers[{}]", trainer.optimizers),
        ("trainer.lr_scheduler_configs[{}].scheduler", [config.scheduler for config in trainer.lr_scheduler_configs]),
        ("trainer.datamodule", [getattr(trainer, "datamodule", None)]),
        ("trainer.train_dataloader", [trainer.train_dataloader]),
        ("trainer.callbacks[{}]", callbacks),
        ("trainer.loggers[{}]", trainer.loggers),
    ]
    roots = [
        (value, Place(None, name.format(i), Owner.USER)) for name, values in named for i, value in enumerate(values)
    ]
    return [*roots, (trainer, Place(None, "trainer", Owner.TRAINER))]


def _held_inside(value: Any) -> Mapping[str, Any] | None:
    """Return what a value of a built-in kind holds, and will as long as it is there; None for other kinds."""
    if isinstance(value, tuple | frozenset):
        return {f"[{i}]": item for i, item in enumerate(value) if type(item) not in kinds.ATOMS}
    if isinstance(value, functools.partial):
        return {".func": value.func, ".args": value.args, ".keywords": value.keywords}
    if isinstance(value, types.MethodType):
        return {".__self__": value.__self__}
    if isinstance(value, multiprocessing.sharedctypes.SynchronizedBase):
        return {".get_obj()": value.get_obj()}
    return None
