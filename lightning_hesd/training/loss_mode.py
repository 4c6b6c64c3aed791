"""The mode in which the loss is analysed: that of evaluation, or that of training without its randomness.

Evaluation mode stands for the training loss without dropout and without statistics of the batch, which is what most
modules mean by it. Some mean another function: a transform that acts in evaluation only, a head that is trained only,
forces without a graph, detections instead of losses. So the two are compared before the first analysis of a run.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_hesd.numerics.analysis.mode_comparison import difference, evaluated, gradient_space
from lightning_hesd.numerics.derivatives.checkpointing import recomputed_under
from lightning_hesd.numerics.isolation.modes import ModuleModes, WithoutRandomness, set_mode, without_randomness
from lightning_hesd.numerics.isolation.snapshot import restore_state
from lightning_hesd.numerics.operators.memory import is_out_of_memory
from lightning_hesd.spectra.validation import first_invalid_field, one_line, text
from lightning_hesd.training.compat import internals
from lightning_hesd.training.compat.collectives import collectives_of, parameter_sharding_of
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

Choice = Literal["eval", "deterministic"]
"""What "auto" chooses from."""

AnalysisMode = Literal["auto", "eval", "deterministic", "train", "keep"]

MODES: tuple[AnalysisMode, ...] = ("auto", "eval", "deterministic", "train", "keep")

WORDS: dict[str, str] = {
    "eval": "evaluation mode",
    "deterministic": "training mode without dropout and without statistics of the batch",
    "train": "training mode",
    "keep": "the mode the module is in",
}

_STATE = {"chosen": lambda value: value in {"eval", "deterministic"}, "reason": text}

OTHER_SEED = 7919
"""Added to the seed to see whether a loss is random."""

REPORTED_STEPS = 64
"""Steps of training whose losses are remembered until the mode is chosen."""


@dataclass(frozen=True)
class Setting:
    """A mode, and what goes with it.

    Attributes:
        mode: Mode of the module.
        evaluating: Makes the context of an evaluation of the user's functions.
    """

    mode: Mode | ModuleModes
    evaluating: Evaluating


@dataclass(frozen=True)
class AnalyzedLoss:
    """The loss of an analysis, whatever the mode.

    Attributes:
        trainer: The trainer.
        module: Its module, in the modes of training.
        batches: This process's share of the batches.
        make_loss: Makes the loss function, given what makes the context of an evaluation.
        options: Options of the analysis.
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

    def setting(self, mode: ModeName) -> Setting:
        """Return the setting for a mode."""
        if mode == "eval":
            return Setting(self._modes_of_validation(), self.evaluating)
        if mode == "deterministic":
            return Setting(without_randomness(self.module, mode), self._without_randomness)
        return Setting(mode, self.evaluating)

    @contextlib.contextmanager
    def _without_randomness(self) -> Iterator[None]:
        plain = WithoutRandomness()
        with self.evaluating(), plain, recomputed_under(plain):
            yield

    def _modes_of_validation(self) -> Mode | ModuleModes:
        """Return the modes of validation: those of the module's own `on_validation_model_eval`, if it has one.

        Of what the hook does only the modes are taken. Weights that it swaps (for averages, or with a schedule-free
        optimizer) are not those that are trained.
        """
        hook = self.module.on_validation_model_eval
        if getattr(hook, "__module__", "").split(".")[0] in {"lightning", "pytorch_lightning"}:
            return "eval"
        roots = (self.trainer.strategy.model or self.module, self.module)  # its default is about the wrapped module
        before = [ModuleModes.of(root, "eval") for root in roots]
        kept_gradients = torch.set_grad_enabled(torch.is_grad_enabled())
        with restore_state(self.module, *self.trainer.optimizers), self.evaluating(), kept_gradients:
            hook()
            modes = ModuleModes.of(self.module, "eval")
        for root, earlier in zip(roots, before, strict=True):
            set_mode(root, earlier)
        return modes

    def evaluate(self, mode: Choice, **changes: Any) -> Evaluated:
        """Evaluate loss and gradient in a mode, on all ranks together; if it fails on one, it fails on all.

        Args:
            mode: The mode.
            **changes: Options that differ.
        """

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

    def attempt(self, mode: Choice) -> Evaluated | str:
        """Evaluate loss and gradient in a mode, or return why they cannot be had in it.

        Raises:
            _Undecided: If memory runs out, which says nothing of the mode; the analysis deals with it.
            DisturbedTrainingError: If the loss does what must not be done again.
        """
        try:
            return self.evaluate(mode)
        except Exception as error:
            # Every rank must ask both.
            if self.collectives.any(is_out_of_memory(error)):
                raise _Undecided from error
            if self.collectives.any(isinstance(error, DisturbedTrainingError)):
                raise
            return one_line(error)

    def compare(self, first: Evaluated, second: Evaluated) -> Difference:
        """Compare two evaluations, over all ranks."""
        sharding = parameter_sharding_of(self.trainer, self.module)
        space = gradient_space(self.module, self.options, sharding)
        return sharding.collectives.run_together(lambda: difference(first, second, space, self.collectives))


class LossMode:
    """The mode of the analyses of a run, the same in all processes.

    Attributes:
        wanted: What the user asks for.
        chosen: What "auto" has come to in this run; None: nothing yet.
        reason: Why, in words.
    """

    def __init__(self, wanted: AnalysisMode = "auto") -> None:
        """Prepare.

        Raises:
            ValueError: If there is no such mode.
        """
        if wanted not in MODES:
            msg = f"`mode` must be {' or '.join(map(repr, MODES))}, got {wanted!r}."
            raise ValueError(msg)
        self.wanted = wanted
        self.chosen: Choice | None = None
        self.reason = "as asked"
        self._run: str | None = None
        self._is_resumed = False
        self._is_told = False
        self._reported: deque[tuple[Tensor, int]] = deque(maxlen=REPORTED_STEPS)

    def restart(self, trainer: pl.Trainer) -> None:
        """Begin with a run: choose anew unless it goes on from an earlier one."""
        run = internals.name_of(trainer)
        if not self._is_resumed and self._run != run:
            self.chosen = None
            self._reported.clear()
        self._run = run
        self._is_resumed = self._is_told = False

    def state_dict(self) -> dict[str, str] | None:
        """Return what was chosen; None if nothing was."""
        return None if self.chosen is None else {"chosen": self.chosen, "reason": self.reason}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on with what an earlier run chose.

        Raises:
            ValueError: If it does not say what.
        """
        if state is None:
            return
        if (wrong := first_invalid_field(state, _STATE)) is not None:
            msg = f"`{wrong}` of the mode is missing or is something else"
            raise ValueError(msg)
        if self.wanted == "auto":
            self.chosen, self.reason, self._is_resumed = state["chosen"], state["reason"], True

    def news(self) -> list[str]:
        """Return a line that says in which mode the loss is analysed, once in a run, as soon as that is known."""
        mode = self.chosen if self.wanted == "auto" else self.wanted
        if self._is_told or mode is None:
            return []
        self._is_told = True
        return [f"the loss is analysed in {WORDS[mode]} ({self.reason})"]

    def report(self, trainer: pl.Trainer, outputs: Any) -> None:
        """Remember the loss of a step of training, until the mode is chosen; nothing waits for the device."""
        if self.wanted != "auto" or self.chosen is not None:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._reported.append((loss.detach(), trainer.accumulate_grad_batches))

    def settle(self, loss: AnalyzedLoss) -> Setting:
        """Return the setting of an analysis; with "auto" the first one of a run that tells chooses the mode."""
        if self.wanted != "auto":
            mode: ModeName = self.wanted
        else:
            if self.chosen is None:
                with contextlib.suppress(_Undecided):
                    self.chosen, self.reason = self._choose(loss)
                    self._reported.clear()
            mode = self.chosen or "eval"
        return loss.collectives.run_together(partial(loss.setting, mode))

    def _choose(self, loss: AnalyzedLoss) -> tuple[Choice, str]:
        """Choose, and say so where it matters.

        Returns:
            mode: The mode.
            reason: Why.

        Raises:
            _Undecided: If that cannot be told now.
        """
        evaluation, training = loss.attempt("eval"), loss.attempt("deterministic")
        if isinstance(evaluation, str):
            if isinstance(training, str):  # so does the analysis in evaluation mode, and says so better
                raise _Undecided
            failure = f"the loss in evaluation mode fails ({evaluation})"
            internals.inform(f"lightning_hesd: {failure}, so that in {WORDS['deterministic']} is analysed.")
            return "deterministic", failure
        if isinstance(training, str):
            return "eval", f"the loss in {WORDS['deterministic']} fails ({training})"
        apart = loss.compare(evaluation, training)
        if apart.is_rounding:
            return "eval", f"the same loss and gradient as in {WORDS['deterministic']}"
        numbers = (
            f"{apart.losses[0]:.4g} in evaluation mode and {apart.losses[1]:.4g} in {WORDS['deterministic']}, with "
            f"gradients {apart.gradient:.2g} of their size apart"
        )
        reported = self._reported_loss(loss.trainer)
        if apart.in_draws:
            again = loss.compare(training, loss.evaluate("deterministic", seed=loss.options.seed + OTHER_SEED))
            if not again.is_rounding:
                internals.inform(
                    f"lightning_hesd: the loss in training mode is random beyond dropout ({again.losses[1]:.4g} with "
                    f"another seed): it is {numbers}{reported}. Evaluation mode is analysed; if that is another "
                    "function than the one that is trained, pass `mode='deterministic'` or a `loss_fn` to "
                    "HessianSpectrumCallback."
                )
                return "eval", f"training mode is random beyond dropout; the loss is {numbers}"
        internals.warn(
            f"the module's evaluation mode is not its training without randomness: the loss is {numbers}{reported}. "
            "The latter is analysed; pass `mode='eval'` to HessianSpectrumCallback to analyse the former, or "
            "`mode='deterministic'` if this is meant."
        )
        return "deterministic", f"evaluation mode is another function; the loss is {numbers}"

    def _reported_loss(self, trainer: pl.Trainer) -> str:
        """Say what training itself reported, if it did."""
        losses = [parts * loss.item() for loss, parts in self._reported]  # divided by gradient accumulation
        losses = [loss for loss in losses if math.isfinite(loss)]
        total, count = collectives_of(trainer).sum_values([math.fsum(losses), float(len(losses))])
        if not count:
            return ""
        return f"; training itself reported {total / count:.4g} on average over its last {len(self._reported)} steps"


class _Undecided(Exception):  # noqa: N818 - a signal
    """The mode cannot be chosen at this analysis."""
