"""The loss of an analysis: that of `training_step`, or the user's, in the modes of the module."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_hesd.numerics.analysis.mode_comparison import difference, evaluated, gradient_space
from lightning_hesd.numerics.derivatives.checkpointing import recomputed_under
from lightning_hesd.numerics.inputs.batches import SkippedBatchError, position_in_epoch
from lightning_hesd.numerics.isolation.modes import ModuleModes, WithoutRandomness, set_mode, without_randomness
from lightning_hesd.numerics.isolation.snapshot import restore_state
from lightning_hesd.numerics.operators.memory import is_out_of_memory
from lightning_hesd.spectra.validation import one_line
from lightning_hesd.training.compat.namespaces import MisconfigurationException, lightning_types
from lightning_hesd.training.compat.strategies import collectives_of, parameter_sharding_of
from lightning_hesd.training.isolation.training_snapshot import DisturbedTrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import lightning.pytorch as pl

    from lightning_hesd.numerics.analysis.evaluation import LossFunction
    from lightning_hesd.numerics.analysis.mode_comparison import Difference, Evaluated
    from lightning_hesd.numerics.collectives import Collectives
    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.inputs.options import AnalysisOptions
    from lightning_hesd.numerics.isolation.modes import Mode, ModeName
    from lightning_hesd.training.isolation.isolation import Evaluating


def check_loss_source(pl_module: pl.LightningModule, loss_fn: LossFunction | None) -> None:
    """Check that the module has a loss to analyze.

    Raises:
        MisconfigurationException: If there is no `loss_fn`, and `training_step` does not return the loss of a batch.
    """
    if loss_fn is not None:
        return
    if not pl_module.automatic_optimization:
        msg = (
            f"{type(pl_module).__name__} uses manual optimization, so calling its `training_step` for the analysis "
            "would change the weights: pass the callback `loss_fn=`, a function (module, batch) -> mean loss "
            "over the batch."
        )
        raise MisconfigurationException(msg)
    if _fetches_batches(pl_module):
        msg = (
            f"the `training_step` of {type(pl_module).__name__} takes a `dataloader_iter` instead of a batch: pass the "
            "callback `loss_fn=`, a function (module, batch) -> mean loss over the batch."
        )
        raise MisconfigurationException(msg)


def check_gets_batches(pl_module: pl.LightningModule) -> None:
    """Check that `training_step` takes a batch, so that batches can be kept for analyses.

    Raises:
        MisconfigurationException: If it fetches its batches itself.
    """
    if _fetches_batches(pl_module):
        msg = (
            f"the `training_step` of {type(pl_module).__name__} takes a `dataloader_iter` instead of a batch, and no "
            "samples can be drawn from the training dataloader: pass the callback `dataloader=`, a loader or a "
            "list of batches."
        )
        raise MisconfigurationException(msg)


def _fetches_batches(pl_module: pl.LightningModule) -> bool:
    return is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True)


class UndecidedError(Exception):
    """The loss cannot be evaluated now, for a reason that does not depend on the mode."""


@dataclass(frozen=True)
class ModeSetting:
    """A mode of the module, and what makes the context in which the user's functions are evaluated in it."""

    mode: Mode | ModuleModes
    evaluating: Evaluating

    def within(self, function: Callable[..., Any] | None) -> Callable[..., Any] | None:
        """Return a function of the user's that runs in the context of an evaluation; None for None."""
        if function is None:
            return None

        def within(*arguments: Any) -> Any:
            with self.evaluating():
                return function(*arguments)

        return within


@dataclass(frozen=True)
class AnalyzedLoss:
    """The loss of an analysis over this rank's share of the batches, in any mode; the module has those of training.

    Attributes:
        trainer: The Trainer.
        module: The module.
        batches: This rank's share of the batches.
        loss_fn: The user's loss; None: that of `training_step`.
        options: Options of the analysis.
        evaluating: Makes the context of an evaluation.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    batches: Sequence[WeightedBatch]
    loss_fn: LossFunction | None
    options: AnalysisOptions
    evaluating: Evaluating

    @property
    def collectives(self) -> Collectives:
        """Communication between all ranks."""
        return collectives_of(self.trainer)

    def setting(self, mode: ModeName) -> ModeSetting:
        """Return the setting of a mode."""
        if mode == "eval":
            return ModeSetting(self._modes_of_validation(), self.evaluating)
        if mode == "deterministic":
            return ModeSetting(without_randomness(self.module, mode), self._without_randomness)
        return ModeSetting(mode, self.evaluating)

    @contextlib.contextmanager
    def _without_randomness(self) -> Iterator[None]:
        plain = WithoutRandomness()
        with self.evaluating(), plain, recomputed_under(plain):
            yield

    def _modes_of_validation(self) -> Mode | ModuleModes:
        """Return the modes of validation: those that the module's own `on_validation_model_eval` sets, if it has one.

        Other effects of the hook are undone. It may swap weights (for averages, or with a schedule-free optimizer), and
        those are not the weights in training.
        """
        hook = self.module.on_validation_model_eval
        if getattr(hook, "__module__", "").split(".")[0] in {"lightning", "pytorch_lightning"}:
            return "eval"
        roots = (self.trainer.strategy.model or self.module, self.module)  # the default hook sets the wrapped module
        before = [ModuleModes.of(root, "eval") for root in roots]
        kept_gradients = torch.set_grad_enabled(torch.is_grad_enabled())
        with restore_state(self.module, *self.trainer.optimizers), self.evaluating(), kept_gradients:
            hook()
            modes = ModuleModes.of(self.module, "eval")
        for root, earlier in zip(roots, before, strict=True):
            set_mode(root, earlier)
        return modes

    def function(self, setting: ModeSetting) -> LossFunction:
        """Return the loss as a function of module and batch, at the Trainer's precision but without autocast."""
        compute = self.loss_fn or _training_step_loss
        precision = self.trainer.precision_plugin
        # The forward context of mixed precision is autocast; other precisions set the dtype of new tensors in it.
        is_mixed = isinstance(precision, lightning_types("plugins.MixedPrecision"))
        context = contextlib.nullcontext if is_mixed else precision.forward_context

        def loss(module: pl.LightningModule, batch: Any) -> Tensor:
            # The comparison of loss and derivatives is in float64.
            is_compared = torch.get_default_dtype() == torch.float64
            with setting.evaluating(), contextlib.nullcontext() if is_compared else context():
                return compute(module, batch)

        return loss

    def evaluate(self, mode: ModeName, **changes: Any) -> Evaluated:
        """Evaluate loss and gradient in a mode, on all ranks together; `changes` are options of this evaluation."""

        def work() -> Evaluated:
            setting = self.setting(mode)
            options = replace(self.options, mode=setting.mode, **changes)
            loss_fn = self.function(setting)
            sharding = parameter_sharding_of(self.trainer, self.module)
            return sharding.collectives.run_together(
                lambda: evaluated(self.module, self.batches, loss_fn, options, sharding, alone=not ranks.is_distributed)
            )

        ranks = self.collectives
        return ranks.run_together(work)

    def attempt(self, mode: ModeName) -> Evaluated | str:
        """Evaluate loss and gradient in a mode, or return the reason why that fails.

        Raises:
            UndecidedError: If memory runs out, which the analysis deals with.
            DisturbedTrainingError: If the loss does something that must not be repeated.
        """
        try:
            return self.evaluate(mode)
        except Exception as error:
            # Every rank must ask both.
            if self.collectives.any(is_out_of_memory(error)):
                raise UndecidedError from error
            if self.collectives.any(isinstance(error, DisturbedTrainingError)):
                raise
            return one_line(error)

    def compare(self, first: Evaluated, second: Evaluated) -> Difference:
        """Compare two evaluations, over all ranks."""
        sharding = parameter_sharding_of(self.trainer, self.module)
        space = gradient_space(self.module, self.options, sharding)
        return sharding.collectives.run_together(lambda: difference(first, second, space, self.collectives))


def _training_step_loss(pl_module: pl.LightningModule, batch: Any) -> Tensor:
    arguments = [batch]
    if is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2):
        arguments.append(position_in_epoch())
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_idx", explicit=True):
        arguments.append(0)
    output = pl_module.training_step(*arguments)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if isinstance(loss, Tensor):
        return loss
    name = type(pl_module).__name__
    if output is None:
        msg = (
            f"the `training_step` of {name} returned None for batch {position_in_epoch()} of the epoch: it is skipped."
        )
        raise SkippedBatchError(msg)
    found = f"a {type(output).__name__} without 'loss'" if isinstance(output, Mapping) else type(output).__name__
    msg = (
        f"the `training_step` of {name} must return the loss as a tensor, or a dict with 'loss', got {found}: return "
        "it, or pass the callback `loss_fn=`."
    )
    raise MisconfigurationException(msg)
