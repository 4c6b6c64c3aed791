"""The objects that code in a training step can reach from its module and Trainer: through attributes and items.

Not searched are globals, closures, files on disk, other processes, and the items of very long containers. Skipped are
objects that may change by themselves: progress bars, workers of dataloaders, connections, and objects of the user's
threads.
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

from lightning_hesd.numerics.dtensors import is_dtensor, local_shard
from lightning_hesd.numerics.isolation.attributes import SlotState
from lightning_hesd.numerics.isolation.containers import BufferState
from lightning_hesd.numerics.isolation.streams import GENERATORS
from lightning_hesd.training.compat import logged_metrics, runs, signals
from lightning_hesd.training.isolation import kinds
from lightning_hesd.training.isolation.kinds import attributes_of, slots_of
from lightning_hesd.training.isolation.tracked_states import LARGE_CONTAINER, Owner, Place, TrackedContent, TrackedValue

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import lightning.pytorch as pl

    from lightning_hesd.training.isolation.tracked_states import TrackedState

MAX_OBJECTS = 50_000
"""Number of objects that are searched, the nearest first."""

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


class FoundItem(NamedTuple):
    """An item of a list or dict, with its key or index, and the place where it was found."""

    container: Any
    key: Any
    value: Any
    place: Place


@dataclass
class ReachableObjects:
    """The objects that were found, most of them with the place where they were found first.

    Attributes:
        containers: Lists, dicts, ..., the `__dict__` of objects, and classes of the user.
        states: States of slots, buffers and tables.
        tensors: Tensors, without parameters and buffers of the module.
        arrays: NumPy arrays.
        generators: Random number generators.
        shared: States of objects that the user's threads may use: their attributes, and containers in these.
        optimizers: Optimizers.
        recorders: Loggers and other objects that write to experiment trackers: summary writers, runs.
        iterators: Iterators that cannot go back, without the Trainer's.
        outputs: Open files, without the Trainer's.
        methods: Bound methods that the user has stored.
    """

    containers: list[tuple[Any, Place]] = field(default_factory=list)
    states: list[TrackedState] = field(default_factory=list)
    tensors: list[tuple[Tensor, Place]] = field(default_factory=list)
    arrays: list[tuple[np.ndarray[Any, Any], Place]] = field(default_factory=list)
    generators: list[Any] = field(default_factory=list)
    shared: list[TrackedState] = field(default_factory=list)
    optimizers: list[Optimizer] = field(default_factory=list)
    recorders: list[Any] = field(default_factory=list)
    iterators: list[FoundItem] = field(default_factory=list)
    outputs: list[FoundItem] = field(default_factory=list)
    methods: list[FoundItem] = field(default_factory=list)


def find_reachable(trainer: pl.Trainer, module: pl.LightningModule) -> ReachableObjects:
    """Search all objects that can be reached from a module in training, without flags of signals and logged values."""
    return _Search(trainer, module, [signals.signal_connector(trainer), *logged_metrics.logged_results(trainer)]).found


class _Search:
    """A breadth-first search, first from the module, then from the Trainer and its parts.

    Attributes:
        found: The objects found.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, skipped: Iterable[object]) -> None:
        self.found = ReachableObjects()
        self._seen: dict[int, object] = {}  # keeps the objects alive, so that ids stay unique
        self._pending: deque[tuple[Any, Place]] = deque()
        self._remaining = MAX_OBJECTS
        self._searched = kinds.SearchedObjects()
        self._threads = kinds.UserThreads()
        self._names = {id(p): repr(name) for name, p in module.named_parameters()}
        outside = _roots(trainer)
        self._mark_seen(*skipped, *kinds.global_generators())
        self._mark_seen(*module.parameters(), *module.buffers(), *module.modules(), *(root for root, _ in outside))
        for name, part in module.named_modules():
            self._visit_module(part, Place(None, f"self.{name}" if name else "self", Owner.MODULE))
        self._run()
        for root, _ in outside:
            self._seen.pop(id(root), None)
        self._pending.extend(outside)
        self._run()

    def _mark_seen(self, *values: object) -> None:
        self._seen.update((id(value), value) for value in values)

    def _run(self) -> None:
        while self._pending and self._remaining > 0:
            with contextlib.suppress(Exception):  # objects that cannot be read are skipped
                self._visit(*self._pending.popleft())

    # One value ------------------------------------------------------------------------------------------------------

    def _visit(self, value: Any, place: Place) -> None:
        if type(value) in kinds.IMMUTABLE_TYPES or type(value) in weakref.ProxyTypes or id(value) in self._seen:
            return
        self._mark_seen(value)
        self._remaining -= 1
        if isinstance(value, kinds.STATELESS):
            return
        if (held := _fixed_references(value)) is not None:
            self._add_pending(place, held)
        elif not self._add_values(value, place):
            if isinstance(value, list | dict | set | deque):
                self._visit_container(value, place)
            self._visit_object(value, place)

    def _add_values(self, value: Any, place: Place) -> bool:
        """Add a tensor, array, generator, buffer or table; return whether the value is one."""
        if isinstance(value, Tensor):
            if not value.is_inference():  # such tensors can hardly be written to
                self.found.tensors.append((local_shard(value) if is_dtensor(value) else value, place))
        elif isinstance(value, np.ndarray):
            self.found.arrays.append((value, place))
            if value.dtype == object and value.size <= LARGE_CONTAINER:
                self._add_pending(place, {f".flat[{i}]": item for i, item in enumerate(value.flat)})
        elif isinstance(value, GENERATORS):
            self.found.generators.append(value)
        elif isinstance(value, kinds.BUFFERS):
            self.found.states.append(TrackedContent(BufferState(value), place))
        elif kinds.is_table(value):
            self.found.states.append(TrackedValue.of_table(value, place))
        else:
            return False
        return True

    def _visit_object(self, value: Any, place: Place) -> None:
        """Visit an object that may have attributes."""
        if kinds.is_logger(value) or kinds.is_experiment_writer(value):
            self.found.recorders.append(value)
        if isinstance(value, Optimizer):
            self.found.optimizers.append(value)
        attributes, slots = attributes_of(value), slots_of(value)
        if not (attributes or slots) or value not in self._searched:
            return
        if self._threads.may_share(value, [*attributes.values(), *slots.values()]):
            if not kinds.is_logger(value):  # to which the analyzed function cannot write
                self._add_shared(attributes, place)
            return
        if kinds.is_outside_module(value):
            place = place._replace(owner=max(place.owner, Owner.USER))
        for kind in type(value).__mro__:
            self._visit_class(kind, place.owner)
        if slots:
            self.found.states.append(TrackedContent(SlotState(value), place._replace(of_attributes=True)))
            self._add_pending(place, {f".{name}": item for name, item in slots.items()})
        if attributes:
            self._visit_container(attributes, place._replace(of_attributes=True))

    # References of a value ------------------------------------------------------------------------------------------

    def _add_pending(self, place: Place, held: Mapping[str, Any]) -> None:
        self._pending.extend((item, Place(place, label, place.owner)) for label, item in held.items())

    def _visit_container(self, container: Any, place: Place) -> None:
        """Add a container or a `__dict__`, and its items as pending."""
        self._mark_seen(container)
        self.found.containers.append((container, place))
        if len(container) > LARGE_CONTAINER:
            return
        items: Iterable[Any] = container.items() if isinstance(container, dict) else enumerate(container)
        if place.of_attributes:  # public names first, as objects are named by the place where they are found first
            items = sorted(items, key=lambda named: str(named[0]).startswith("_"))
        for key, item in items:
            if type(item) not in kinds.IMMUTABLE_TYPES:
                label = f"[{self._names[id(key)]}]" if id(key) in self._names else place.label_of(key)
                self._add_item(container, key, item, Place(place, label, place.owner))

    def _add_item(self, container: Any, key: Any, value: Any, place: Place) -> None:
        self._pending.append((value, place))
        if not isinstance(container, dict | list) or place.owner is Owner.TRAINER:
            return
        item = FoundItem(container, key, value, place)
        with contextlib.suppress(Exception):  # objects that cannot be read are skipped
            if isinstance(value, types.MethodType):
                self.found.methods.append(item)
            elif kinds.is_one_way_iterator(value):
                self.found.iterators.append(item)
            elif kinds.is_output_file(value):
                self.found.outputs.append(item)

    def _visit_module(self, module: nn.Module, place: Place) -> None:
        """Add the attributes of a submodule as pending, without parameters and others that the analysis restores."""
        attributes = vars(module)
        for name in [name for name in attributes if name not in _MODULE_ATTRIBUTES]:
            self._add_item(attributes, name, attributes[name], Place(place, f".{name}", place.owner))
        for kind in type(module).__mro__:
            self._visit_class(kind, place.owner)

    def _visit_class(self, kind: type, owner: Owner) -> None:
        """Add a class of the user, and its attributes as pending."""
        if id(kind) in self._seen or not kinds.is_user_code(kind.__module__):
            return
        self._mark_seen(kind)
        place = Place(None, kind.__qualname__, owner, of_attributes=True)
        self.found.containers.append((kind, place))
        self._add_pending(place, {f".{name}": value for name, value in vars(kind).items() if not name.startswith("__")})

    def _add_shared(self, attributes: dict[str, Any], place: Place) -> None:
        """Add the attributes of an object that threads may use, and the containers in these."""
        if place.owner is Owner.TRAINER:
            return
        self.found.shared.append(TrackedContent.of(attributes, place._replace(of_attributes=True)))
        self.found.shared.extend(
            TrackedContent.of(value, Place(place, f".{name}", place.owner))
            for name, value in attributes.items()
            if isinstance(value, list | dict | set | deque)
        )


def _roots(trainer: pl.Trainer) -> list[tuple[Any, Place]]:
    """Return the objects around the module, by the names that users know, and the Trainer last."""
    named: list[tuple[str, Iterable[Any]]] = [
        ("trainer.optimizers[{}]", trainer.optimizers),
        ("trainer.lr_scheduler_configs[{}].scheduler", [config.scheduler for config in trainer.lr_scheduler_configs]),
        ("trainer.datamodule", [getattr(trainer, "datamodule", None)]),
        ("trainer.train_dataloader", [trainer.train_dataloader]),
        ("trainer.callbacks[{}]", runs.callbacks_of(trainer)),
        ("trainer.loggers[{}]", trainer.loggers),
    ]
    roots = [
        (value, Place(None, name.format(i), Owner.USER)) for name, values in named for i, value in enumerate(values)
    ]
    return [*roots, (trainer, Place(None, "trainer", Owner.TRAINER))]


def _fixed_references(value: Any) -> Mapping[str, Any] | None:
    """Return the references of an object of a built-in type whose references cannot change; None for other types."""
    if isinstance(value, tuple | frozenset):
        return {f"[{i}]": item for i, item in enumerate(value) if type(item) not in kinds.IMMUTABLE_TYPES}
    if isinstance(value, functools.partial):
        return {".func": value.func, ".args": value.args, ".keywords": value.keywords}
    if isinstance(value, types.MethodType):
        return {".__self__": value.__self__}
    if isinstance(value, multiprocessing.sharedctypes.SynchronizedBase):
        return {".get_obj()": value.get_obj()}
    return None
