"""The loss of an analysis in the modes of the module: evaluated there, and compared with the loss in another mode."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lightning_hesd.numerics.analysis.mode_comparison import difference, evaluated, gradient_space
from lightning_hesd.numerics.derivatives.checkpointing import recomputed_under
from lightning_hesd.numerics.isolation.modes import ModuleModes, WithoutRandomness, set_mode, without_randomness
from lightning_hesd.numerics.isolation.snapshot import restore_state
from lightning_hesd.numerics.operators.memory import is_out_of_memory
from lightning_hesd.spectra.validation import one_line
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
        make_loss: Makes the loss function, given `evaluating`.
        evaluating: Makes the context of an evaluation.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    batches: Sequence[WeightedBatch]
    make_loss: Callable[[Evaluating], LossFunction]
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

    def evaluate(self, mode: ModeName, **changes: Any) -> Evaluated:
        """Evaluate loss and gradient in a mode, on all ranks together; `changes` are options of this evaluation."""

        def work() -> Evaluated:
            setting = self.setting(mode)
            options = replace(self.options, mode=setting.mode, **changes)
            loss_fn = self.make_loss(setting.evaluating)
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
