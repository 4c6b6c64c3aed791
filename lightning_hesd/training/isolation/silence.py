"""What code in a training step must not do in an analysis: write to loggers, save checkpoints, let optimizers step."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
import types
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_hesd.training.compat import signals, strategies
from lightning_hesd.training.isolation.kinds import TRACKERS, attributes_of, like_output, repeated
from lightning_hesd.training.isolation.surroundings import DisturbedTrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import lightning.pytorch as pl
    from torch.optim import Optimizer

    from lightning_hesd.training.isolation.reach import Reach

_READING = ("get", "is_", "has_", "list", "search", "find", "load", "download")
"""How the names of methods begin by which recorders are read; all their other public methods count as writing."""

_FLUENT = {"mlflow": ("log_", "set_")}
"""Packages whose functions write to a run of their own, and how the names of these begin."""

_COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single"),
    *("broadcast", "broadcast_object_list", "gather", "gather_object", "reduce", "reduce_scatter"),
    *("reduce_scatter_tensor", "scatter", "scatter_object_list", "send", "recv", "isend", "irecv"),
)


@contextlib.contextmanager
def silenced(trainer: pl.Trainer, module: pl.LightningModule, reach: Reach) -> Iterator[None]:
    """Let what is logged, printed by Lightning or saved come to nothing, and optimizers stand still.

    The loggers stay in their places, with their names and folders; only what writes is replaced, so that it is muted
    for those who keep a logger, its experiment or a method as well. Other threads are not muted, nor handlers of
    signals.

    Args:
        trainer: The trainer.
        module: Its module.
        reach: What is within reach of it.
    """
    with contextlib.ExitStack() as stack:
        shadows = _Shadows(stack)
        shadows.mute(module, ("log", "log_dict", "print"))
        shadows.mute(trainer, ("print", "save_checkpoint"))
        shadows.mute(trainer.strategy, ("save_checkpoint", "remove_checkpoint"))
        recorders = list(_recorders(trainer, reach))
        for recorder in recorders:
            shadows.mute(recorder, _writing_methods(recorder))
        for package in TRACKERS:
            shadows.mute_functions(package, recorders)
        for optimizer in reach.optimizers:
            shadows.put(vars(optimizer), "step", _still(optimizer))
            # Training calls `training_step` within a step, and schedulers complain before the first one.
            shadows.put(vars(optimizer), "_opt_called", True)
        for container, key, method, _ in reach.methods:
            shadow = attributes_of(method.__self__).get(method.__name__)
            if shadow in shadows.muted:
                shadows.put(container, key, shadow)
        for container, key, output, _ in reach.outputs:
            shadows.put(container, key, like_output(output))
        for container, key, iterator, place in reach.iterators:
            shadows.put(container, key, repeated(iterator) or _Untouchable(str(place)))
        stack.callback(register_optimizer_step_pre_hook(_refuse_steps_of_this_thread()).remove)
        yield


def _recorders(trainer: pl.Trainer, reach: Reach) -> Iterator[Any]:
    """Yield loggers, what they write with, and the file writers of TensorBoard behind that."""
    seen: list[object] = [None]
    global_run = getattr(sys.modules.get("wandb"), "run", None)
    for recorder in [*trainer.loggers, *reach.recorders, global_run]:
        # Those of the Trainer have their experiments by now; of others, asking for it might begin one.
        in_use = recorder.experiment if recorder in trainer.loggers else attributes_of(recorder).get("_experiment")
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


class _Shadows:
    """Replacements of attributes and items, which end with a stack."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.muted: list[object] = []

    def put(self, container: Any, key: Any, value: object) -> None:
        """Replace an item."""
        if isinstance(container, dict) and key not in container:
            self._stack.callback(container.pop, key, None)
        else:
            self._stack.callback(container.__setitem__, key, container[key])
        container[key] = value

    def mute(self, owner: object, names: Iterable[str]) -> None:
        """Let methods of an object do nothing."""
        attributes = attributes_of(owner)
        for name in names if attributes else ():
            with contextlib.suppress(Exception):  # what cannot be had cannot be called
                self.put(attributes, name, self._silent(getattr(owner, name)))

    def mute_functions(self, package: str, recorders: Iterable[object]) -> None:
        """Let the functions of a package do nothing that are methods of recorders, or write to a run of their own."""
        functions = vars(sys.modules.get(package, types.ModuleType(package)))
        for name, function in list(functions.items()):
            is_method = isinstance(function, types.MethodType) and any(function.__self__ is r for r in recorders)
            if is_method or (
                isinstance(function, types.FunctionType) and name.startswith(_FLUENT.get(package, ("/",)))
            ):
                self.put(functions, name, self._silent(function))

    def _silent(self, method: Callable[..., Any]) -> Callable[..., Any]:
        thread = threading.get_ident()

        def silent(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread or signals.handles_signal():
                return method(*args, **kwargs)
            return None

        self.muted.append(silent)
        return silent


def _still(optimizer: Optimizer) -> Callable[..., Any]:
    """Return a `step` that leaves everything as it is, and returns the loss if it is to compute it."""

    @functools.wraps(optimizer.step)  # with the marks by which schedulers know it
    def step(closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        return None if closure is None else closure()

    return step


def _refuse_steps_of_this_thread() -> Callable[..., None]:
    thread = threading.get_ident()

    def refuse(optimizer: Optimizer, *_: Any) -> None:
        if threading.get_ident() == thread:
            msg = (
                f"lets an optimizer step ({type(optimizer).__name__}, kept out of reach of the module and the Trainer)"
            )
            raise DisturbedTrainingError(msg)

    return refuse


class _Untouchable:
    """Stands in for an iterator that cannot be put back to where it was."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __iter__(self) -> _Untouchable:
        return self

    def __next__(self) -> NoReturn:
        msg = f"reads from the iterator `{self._name}`"
        raise DisturbedTrainingError(msg)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        msg = f"uses the iterator `{self._name}`"
        raise DisturbedTrainingError(msg)


# Several processes ----------------------------------------------------------------------------------------------------


class Seclusion:
    """Lets evaluations do without the other processes, which have other batches, and other numbers of them."""

    def __init__(self, trainer: pl.Trainer) -> None:
        """Ask the other processes for what an evaluation may want to know: the folder of the run.

        Args:
            trainer: The trainer; all processes take part.
        """
        self._trainer = trainer
        self._is_needed = trainer.world_size > 1 and not strategies.is_sharded(trainer)
        self._own_folder = self._folder = None
        if self._is_needed:
            with contextlib.ExitStack() as stack:
                _Shadows(stack).put(vars(trainer.strategy), "broadcast", lambda folder, *_: folder)
                self._own_folder = trainer.log_dir
            self._folder = trainer.strategy.broadcast(self._own_folder)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Refuse to wait for other processes, except at barriers, which are passed.

        Raises:
            DisturbedTrainingError: By way of the functions that are refused.
        """
        if not self._is_needed:
            yield
            return
        with contextlib.ExitStack() as stack:
            shadows = _Shadows(stack)
            strategy, collectives = vars(self._trainer.strategy), vars(torch.distributed)
            for name in _COLLECTIVES:
                shadows.put(collectives, name, _refused(name))
            for name in ("reduce", "all_gather", "reduce_boolean_decision"):
                shadows.put(strategy, name, _refused(name))
            shadows.put(strategy, "broadcast", self._broadcast)
            shadows.put(strategy, "barrier", _pass)
            for name in ("barrier", "monitored_barrier"):
                shadows.put(collectives, name, _pass)
            yield

    def _broadcast(self, obj: object, src: int = 0) -> object:
        if src == 0 and isinstance(obj, str | None) and obj == self._own_folder:  # for `trainer.log_dir`
            return self._folder
        return _refused("broadcast")()


def _refused(name: str) -> Callable[..., NoReturn]:
    def refused(*_args: Any, **_kwargs: Any) -> NoReturn:
        msg = f"calls `{name}`"
        raise DisturbedTrainingError(msg, "in an analysis the processes have different batches, and numbers of them")

    return refused


def _pass(*_args: Any, **_kwargs: Any) -> None:
    """Stand in for a barrier."""
