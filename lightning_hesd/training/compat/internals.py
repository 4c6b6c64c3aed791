"""Everything the package needs from Lightning's inside: private names, and rules Lightning keeps to itself."""

from __future__ import annotations

import contextlib
import inspect
import signal
import threading
import uuid
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn

from lightning_hesd.numerics.derivatives.patches import patched
from lightning_hesd.training.compat.namespaces import MisconfigurationException, lightning_types
from lightning_hesd.training.folders import joined

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar
    from lightning.pytorch.loggers import TensorBoardLogger
    from rich.progress import Progress
    from torch.utils.data import Sampler


_NAMES: WeakKeyDictionary[pl.Trainer, str] = WeakKeyDictionary()


def name_of(trainer: pl.Trainer) -> str:
    """Return a name that no other Trainer has, in no process; its `id` would be used again."""
    if trainer not in _NAMES:
        _NAMES[trainer] = uuid.uuid4().hex
    return _NAMES[trainer]


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the trainer's own list of callbacks."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def replace_callbacks(trainer: pl.Trainer, callbacks: list[pl.Callback]) -> None:
    """Give the trainer another list of callbacks; one that it is walking it walks to its end."""
    trainer.callbacks = callbacks  # type: ignore[attr-defined]


def logging_step(trainer: pl.Trainer, *, at_epoch_end: bool) -> int:
    """Return the step at which Lightning itself puts metrics that are logged now."""
    step = int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))
    return max(step - 1, 0) if at_epoch_end else step


def run_folder(trainer: pl.Trainer) -> str:
    """Return the folder of this run, a path or a URL, in which Lightning puts its checkpoints; every process must ask.

    With loggers other than TensorBoard's and CSV's, `trainer.log_dir` is where the folders of all runs lie, and a
    folder that is none of these is taken by MLflow for a damaged experiment.
    """
    folder = str(trainer.log_dir or trainer.default_root_dir)
    logger = trainer.logger
    if logger is None or isinstance(logger, lightning_types("loggers.TensorBoardLogger", "loggers.CSVLogger")):
        return folder
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return joined(folder, str(logger.name), version)


def tag_prefix(logger: TensorBoardLogger) -> str:
    """Return what a logger puts before the names of metrics."""
    prefix: str = logger._prefix  # noqa: SLF001
    return f"{prefix}{logger.LOGGER_JOIN_CHAR}" if prefix else ""


def looks_before_the_epoch_ends(trainer: pl.Trainer, callback: ModelCheckpoint | EarlyStopping) -> bool:
    """Return whether a callback looks at metrics in validation, before `on_train_epoch_end` of other callbacks."""
    if not isinstance(callback, lightning_types("callbacks.EarlyStopping")):
        return callback._save_on_train_epoch_end is not True  # type: ignore[union-attr]  # noqa: SLF001
    after_epochs = callback._check_on_train_epoch_end  # noqa: SLF001
    if after_epochs is None:
        after_epochs = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1
    return not after_epochs


@contextlib.contextmanager
def edited_checkpoints(trainer: pl.Trainer, edit: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Let a function change what is written to checkpoints, after all hooks have had their say."""
    save = trainer.strategy.save_checkpoint

    def edited(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        edit(checkpoint)
        save(checkpoint, *args, **kwargs)

    with patched(trainer.strategy, "save_checkpoint", edited):
        yield


def log_scalars(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    values: dict[str, float],
    *,
    at_epoch_end: bool,
    in_bar: Collection[str],
) -> None:
    """Log scalars so that `trainer.callback_metrics`, the progress bar and every logger see them.

    At the end of an epoch the module's own `log` does all of that. Elsewhere Lightning would pass them on to the
    loggers only at multiples of `log_every_n_steps`, or with the next epoch, so the loggers get them directly.

    Args:
        trainer: The trainer.
        pl_module: The module that logs.
        values: What to log.
        at_epoch_end: Whether this is `on_train_epoch_end`.
        in_bar: Keys to show in the progress bar.
    """
    if trainer.barebones:
        return
    if at_epoch_end:
        for key, value in values.items():
            pl_module.log(key, value, on_step=False, on_epoch=True, prog_bar=key in in_bar, batch_size=1)
        return
    tensors = {key: torch.tensor(value, dtype=torch.float32) for key, value in values.items()}
    trainer.callback_metrics.update(tensors)
    trainer.progress_bar_metrics.update({key: values[key] for key in in_bar if key in values})
    step = logging_step(trainer, at_epoch_end=False)
    for logger in trainer.loggers:
        logger.log_metrics({**values, "epoch": trainer.current_epoch}, step=step)
        logger.save()


def logged_before_the_epoch(trainer: pl.Trainer, key: str) -> bool:
    """Return whether a metric was logged in this epoch, but only before its first batch."""
    results = [r for r in trainer.fit_loop.epoch_loop._results.values() if not r.has_reset]  # noqa: SLF001
    hooks = {r.meta.fx for r in results if key in {r.meta.name, *map(r.meta.forked_name, (True, False))}}
    return hooks == {"on_train_epoch_start"}


def add_to_results(trainer: pl.Trainer, key: str, value: object) -> None:
    """Send a value along with the results of the fit if its processes end with it; for use in process zero of these."""
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, lightning_types("strategies.launchers.multiprocessing._MultiProcessingLauncher")):
        return
    collect = launcher.get_extra_results

    def extended(trainer: pl.Trainer) -> dict[str, Any]:
        return {**collect(trainer), key: value}

    launcher.get_extra_results = extended  # of this process, which ends


def wait_for_device(trainer: pl.Trainer) -> None:
    """Wait for what training has queued on its accelerator, so that nobody takes it for part of what comes next."""
    module: Any = getattr(torch, trainer.strategy.root_device.type, None)
    if hasattr(module, "synchronize"):
        module.synchronize()  # the present device, which is that of the trainer


def start_rich_progress(bar: RichProgressBar, trainer: pl.Trainer) -> Progress:
    """Return the live display of an enabled Rich progress bar, started if it does not run yet.

    Before training it may not. The bar's own hook will find it running then, and leave it at that.
    """
    bar._init_progress(trainer)  # noqa: SLF001
    assert bar.progress is not None  # noqa: S101 - for the type checker; an enabled bar has it now
    return bar.progress


def stop_rich_progress(bar: RichProgressBar) -> None:
    """End the live display of a Rich progress bar now, if it runs; its own hook will find that done."""
    if not bar._progress_stopped:  # noqa: SLF001
        bar._stop_progress()  # noqa: SLF001


def transfer_batch(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
    """Bring a batch to the device as Lightning does, through the module's or datamodule's own hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)  # noqa: SLF001
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def watch_batches(trainer: pl.Trainer, see: Callable[[Any, int], None]) -> Callable[[], None]:
    """Let a function see each training batch, and its index, as `training_step` gets it: after all other hooks.

    Args:
        trainer: The trainer.
        see: The function.

    Returns:
        A function that ends it.
    """
    strategy: Any = trainer.strategy
    name = "on_train_batch_start"  # the strategy's is the last one
    watched = vars(strategy).get(name)
    if not isinstance(watched, _WatchedHook):
        strategy.on_train_batch_start = watched = _WatchedHook(watched, strategy)
    watched.watchers.append(see)

    def end() -> None:
        watched.watchers.remove(see)
        if not watched.watchers and vars(strategy).get(name) is watched:
            if watched.own is None:
                del strategy.on_train_batch_start
            else:
                strategy.on_train_batch_start = watched.own

    return end


class _WatchedHook:
    """A strategy's hook, after which others may look at the batch.

    Attributes:
        own: The hook in the strategy's own attributes; None if it is that of the class.
        watchers: The functions that look.
    """

    def __init__(self, own: Any, strategy: Any) -> None:
        self.own = own
        self.watchers: list[Callable[[Any, int], None]] = []
        self._strategy = strategy

    def __call__(self, batch: Any, batch_idx: int) -> Any:
        hook = self.own or type(self._strategy).on_train_batch_start.__get__(self._strategy)
        result = hook(batch, batch_idx)
        for see in list(self.watchers):
            see(batch, batch_idx)
        return result


def combined_like_training(trainer: pl.Trainer, loaders: Any) -> CombinedLoader:
    """Return one loader that combines several as training does."""
    combined = trainer.fit_loop._combined_loader  # noqa: SLF001
    return CombinedLoader(loaders, "max_size_cycle" if combined is None else combined._mode)  # noqa: SLF001


def validation_loaders(trainer: pl.Trainer) -> Any:
    """Return what `trainer.val_dataloaders` holds or will hold: where validation comes later or never, it is None."""
    if trainer.val_dataloaders is not None:
        return trainer.val_dataloaders
    source = trainer.fit_loop.epoch_loop.val_loop._data_source  # noqa: SLF001
    return source.dataloader() if source.is_defined() else None


def unwrap_sampler(sampler: Sampler[Any]) -> Sampler[Any]:
    """Return the user's own sampler behind the one Lightning distributes over processes, if it wrapped it."""
    return getattr(getattr(sampler, "dataset", None), "_sampler", sampler)


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuse strategies that split parameters in a way the analysis does not know.

    Raises:
        MisconfigurationException: If it is one.
    """
    strategy: Any = trainer.strategy
    if isinstance(strategy, lightning_types("strategies.FSDPStrategy", "strategies.DeepSpeedStrategy")):
        msg = (
            f"{type(strategy).__name__} splits the parameters over processes in a way that the analysis does not "
            "support: shard them by ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1), with "
            "`fully_shard` in `configure_model`, or use a strategy that replicates them (such as 'ddp')."
        )
        raise MisconfigurationException(msg)
    if is_sharded(trainer) and strategy.device_mesh["tensor_parallel"].size() > 1:
        msg = (
            "ModelParallelStrategy(tensor_parallel_size="
            f"{strategy.device_mesh['tensor_parallel'].size()}) splits layers over processes, which the analysis does "
            f"not support: use data_parallel_size={trainer.world_size} and tensor_parallel_size=1."
        )
        raise MisconfigurationException(msg)


def is_sharded(trainer: pl.Trainer) -> bool:
    """Whether the processes may hold parts of the parameters, and must work on every batch together."""
    return isinstance(trainer.strategy, lightning_types("strategies.ModelParallelStrategy"))


def check_whole(trainer: pl.Trainer, option: str) -> None:
    """Refuse an option that needs what is not there where processes hold parts of the parameters.

    Raises:
        MisconfigurationException: If they do.
    """
    if is_sharded(trainer):
        msg = (
            f"`{option}` is not available with {type(trainer.strategy).__name__}, where every process holds a part of "
            "the parameters: leave it out."
        )
        raise MisconfigurationException(msg)


@contextlib.contextmanager
def sigterm_waits(trainer: pl.Trainer) -> Iterator[None]:
    """Let SIGTERM wait until all processes are through with the block; then all stop training, whoever got it.

    Lightning's handler waits for the other processes, and within an analysis those wait for this one: for ever.
    """
    if trainer.world_size == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    connector = signal_connector(trainer)
    arrived: list[tuple[Any, ...]] = []
    handler = signal.signal(signal.SIGTERM, lambda *arguments: arrived.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)
    if trainer.strategy.reduce_boolean_decision(bool(arrived), all=False):
        connector.received_sigterm = True
    # Lightning calls its own handlers and those it found.
    for other in getattr(handler, "signal_handlers", ()) if arrived else ():
        if callable(other) and getattr(other, "__self__", None) is not connector:
            other(*arrived[0])


def signal_connector(trainer: pl.Trainer) -> Any:
    """Return what holds the flags that handlers of signals set, at which Lightning's loops look."""
    return trainer._signal_connector  # noqa: SLF001


def logged_results(trainer: pl.Trainer) -> list[object]:
    """Return the collections of what was logged: only logging changes them, and they hold a metric for each value."""
    loop = trainer.fit_loop.epoch_loop
    return [loop._results, loop.val_loop._results]  # noqa: SLF001


def handles_signal() -> bool:
    """Whether this is called by a handler of signals of Lightning, such as that by which a SLURM job is requeued."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").endswith("connectors.signal_connector"):
            return True
        frame = frame.f_back
    return False


def warn(message: str) -> None:
    """Warn once for all processes."""
    rank_zero_warn(f"lightning_hesd: {message}", category=RuntimeWarning)


def inform(message: str) -> None:
    """Say something that is no warning, once for all processes."""
    rank_zero_info(message)
