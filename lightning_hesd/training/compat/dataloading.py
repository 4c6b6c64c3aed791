"""Batches and dataloaders as training uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import CombinedLoader

if TYPE_CHECKING:
    from collections.abc import Callable

    import lightning.pytorch as pl
    from torch.utils.data import Sampler


def transfer_batch(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
    """Move a batch to the device as Lightning does, through the module's or datamodule's own hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)  # noqa: SLF001
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def watch_batches(trainer: pl.Trainer, see: Callable[[Any, int], None]) -> Callable[[], None]:
    """Call `see` with each training batch and its index, as `training_step` gets them: after all other hooks.

    Return a function that ends the calls.
    """
    strategy: Any = trainer.strategy
    name = "on_train_batch_start"  # the strategy's is the last one
    watched = vars(strategy).get(name)
    if not isinstance(watched, _WatchedHook):
        strategy.on_train_batch_start = watched = _WatchedHook(watched, strategy.on_train_batch_start)
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
    """A strategy's hook that calls other functions with the batch, too.

    Attributes:
        own: The hook among the strategy's own attributes; None if it has that of its class.
        watchers: The functions to call.
    """

    def __init__(self, own: Any, hook: Callable[[Any, int], Any]) -> None:
        self.own = own
        self.watchers: list[Callable[[Any, int], None]] = []
        self._hook = hook

    def __call__(self, batch: Any, batch_idx: int) -> Any:
        result = self._hook(batch, batch_idx)
        for see in list(self.watchers):
            see(batch, batch_idx)
        return result


def batches_of_epoch(trainer: pl.Trainer) -> float:
    """Return the number of batches on which each rank trains in an epoch; training may end within the first one."""
    batches: float = trainer.num_training_batches
    if trainer.max_steps < 0 or not trainer.lightning_module.automatic_optimization:
        return batches
    return min(batches, trainer.max_steps * trainer.accumulate_grad_batches)


def combined_like_training(trainer: pl.Trainer, loaders: Any) -> CombinedLoader:
    """Return one loader that combines several as training does."""
    combined = trainer.fit_loop._combined_loader  # noqa: SLF001
    return CombinedLoader(loaders, "max_size_cycle" if combined is None else combined._mode)  # noqa: SLF001


def validation_loaders(trainer: pl.Trainer) -> Any:
    """Return `trainer.val_dataloaders`; before validation, when that is None, the dataloaders that it will be."""
    if trainer.val_dataloaders is not None:
        return trainer.val_dataloaders
    source = trainer.fit_loop.epoch_loop.val_loop._data_source  # noqa: SLF001
    return source.dataloader() if source.is_defined() else None


def unwrap_sampler(sampler: Sampler[Any]) -> Sampler[Any]:
    """Return the user's own sampler, which Lightning may have wrapped to distribute it over ranks."""
    return getattr(getattr(sampler, "dataset", None), "_sampler", sampler)
