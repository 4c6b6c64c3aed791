"""Silenced logging: in an analysis nothing is logged, printed or saved, and optimizers do not step."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
import types
from typing import TYPE_CHECKING, Any, NoReturn

from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_hesd.training.compat import signals
from lightning_hesd.training.isolation.kinds import TRACKERS, attributes_of, copied_iterator, dummy_output
from lightning_hesd.training.isolation.training_snapshot import DisturbedTrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import lightning.pytorch as pl
    from torch.optim import Optimizer

    from lightning_hesd.training.isolation.reachable import ReachableObjects

_READING = ("get", "is_", "has_", "list", "search", "find", "load", "download")
"""Prefixes of the methods that read from loggers and trackers; all other public methods are taken to write."""

_FLUENT = {"mlflow": ("log_", "set_")}
"""Packages whose functions write to a run of their own, and the prefixes of these functions."""


@contextlib.contextmanager
def silence_logging(trainer: pl.Trainer, module: pl.LightningModule, reachable: ReachableObjects) -> Iterator[None]:
    """Disable logging, Lightning's printing, saving of checkpoints and steps of optimizers in this context.

    Loggers stay in their places, with their names and folders. Their writing methods are replaced on the object, so
    that code that has stored a logger, its experiment or a method is silenced as well. Other threads and handlers of
    signals are not silenced.
    """
    with Overrides() as overrides:
        overrides.silence(module, ("log", "log_dict", "print"))
        overrides.silence(trainer, ("print", "save_checkpoint"))
        overrides.silence(trainer.strategy, ("save_checkpoint", "remove_checkpoint"))
        recorders = list(_recorders(trainer, reachable))
        for recorder in recorders:
            overrides.silence(recorder, _writing_methods(recorder))
        for package in TRACKERS:
            overrides.silence_functions(package, recorders)
        for optimizer in reachable.optimizers:
            overrides.set(vars(optimizer), "step", _no_step(optimizer))
            # Schedulers warn if no optimizer has stepped, and training calls `training_step` within the first step.
            overrides.set(vars(optimizer), "_opt_called", True)
        for container, key, method, _ in reachable.methods:
            silent = attributes_of(method.__self__).get(method.__name__)
            if silent in overrides.silenced:
                overrides.set(container, key, silent)
        for container, key, output, _ in reachable.outputs:
            overrides.set(container, key, dummy_output(output))
        for container, key, iterator, place in reachable.iterators:
            overrides.set(container, key, copied_iterator(iterator) or _ForbiddenIterator(str(place)))
        overrides.callback(register_optimizer_step_pre_hook(_refuse_steps_in_this_thread()).remove)
        yield


def _recorders(trainer: pl.Trainer, reachable: ReachableObjects) -> Iterator[Any]:
    """Yield loggers, their experiments, and the file writers of TensorBoard in these."""
    seen: list[object] = [None]
    global_run = getattr(sys.modules.get("wandb"), "run", None)
    for recorder in [*trainer.loggers, *reachable.recorders, global_run]:
        # The Trainer's loggers have their experiments by now, if any; asking other loggers might create one.
        in_use = attributes_of(recorder).get("_experiment")
        if recorder in trainer.loggers:
            with contextlib.suppress(Exception):
                in_use = recorder.experiment
        for part in (recorder, in_use):
            if not any(part is other for other in seen):
                seen.append(part)
                yield part
                writers = attributes_of(part).get("all_writers")
                yield from writers.values() if isinstance(writers, dict) else ()


def _writing_methods(recorder: object) -> Iterator[str]:
    for name in dir(type(recorder)):
        if name.startswith(("_", *_READING)):
            continue
        member = inspect.getattr_static(type(recorder), name)
        if callable(member) or isinstance(member, staticmethod | classmethod):
            yield name


class Overrides(contextlib.ExitStack):
    """Temporary values of attributes and items, in the context of this stack.

    Attributes:
        silenced: The functions that do nothing in the place of others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.silenced: list[object] = []

    def set(self, container: Any, key: Any, value: object) -> None:
        """Set an item."""
        if isinstance(container, dict) and key not in container:
            self.callback(container.pop, key, None)
        else:
            self.callback(container.__setitem__, key, container[key])
        container[key] = value

    def silence(self, owner: object, names: Iterable[str]) -> None:
        """Make methods of an object do nothing."""
        attributes = attributes_of(owner)
        for name in names if attributes else ():
            with contextlib.suppress(Exception):  # a method that cannot be read cannot be called
                if callable(method := getattr(owner, name)):  # `self.log` may be a logger of Python's
                    self.set(attributes, name, self._silent(method))

    def silence_functions(self, package: str, recorders: Iterable[object]) -> None:
        """Make functions of a package do nothing if they are methods of recorders, or write to a run of their own."""
        functions = vars(sys.modules.get(package, types.ModuleType(package)))
        for name, function in list(functions.items()):
            is_method = isinstance(function, types.MethodType) and any(function.__self__ is r for r in recorders)
            if is_method or (
                isinstance(function, types.FunctionType) and name.startswith(_FLUENT.get(package, ("/",)))
            ):
                self.set(functions, name, self._silent(function))

    def _silent(self, method: Callable[..., Any]) -> Callable[..., Any]:
        thread = threading.get_ident()

        def silent(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread or signals.handles_signal():
                return method(*args, **kwargs)
            return None

        self.silenced.append(silent)
        return silent


def _no_step(optimizer: Optimizer) -> Callable[..., Any]:
    """Return a `step` that changes nothing, and calls the closure if there is one."""

    @functools.wraps(optimizer.step)  # with the attributes by which schedulers recognize it
    def step(closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        return None if closure is None else closure()

    return step


def _refuse_steps_in_this_thread() -> Callable[..., None]:
    thread = threading.get_ident()

    def refuse(optimizer: Optimizer, *_: Any) -> None:
        if threading.get_ident() == thread:
            msg = f"lets an optimizer step ({type(optimizer).__name__}, to which neither module nor Trainer refers)"
            raise DisturbedTrainingError(msg)

    return refuse


class _ForbiddenIterator:
    """Takes the place of an iterator whose position cannot be restored, and raises when it is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __iter__(self) -> _ForbiddenIterator:
        return self

    def __next__(self) -> NoReturn:
        msg = f"reads from the iterator `{self._name}`"
        raise DisturbedTrainingError(msg)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        msg = f"uses the iterator `{self._name}`"
        raise DisturbedTrainingError(msg)
