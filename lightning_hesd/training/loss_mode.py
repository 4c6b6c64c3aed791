"""The mode of the module in which the loss is analyzed: evaluation mode, or training mode without randomness.

For most modules evaluation mode is the training loss without dropout and batch statistics. For some it is another
function: with a transform that acts in evaluation only, a head that is trained only, forces without a graph, detections
instead of losses. So "auto" compares the two modes before the first analysis of a run.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor

from lightning_hesd.spectra.validation import check_fields, text
from lightning_hesd.training.compat import messages, runs
from lightning_hesd.training.compat.strategies import collectives_of
from lightning_hesd.training.loss import UndecidedError

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_hesd.numerics.isolation.modes import ModeName
    from lightning_hesd.training.loss import AnalyzedLoss, ModeSetting

AutoMode = Literal["eval", "deterministic"]
"""The modes between which "auto" chooses."""

AnalysisMode = Literal["auto", "eval", "deterministic", "train", "keep"]

MODES: tuple[AnalysisMode, ...] = get_args(AnalysisMode)

WORDS: dict[str, str] = {
    "eval": "evaluation mode",
    "deterministic": "training mode without dropout and without batch statistics",
    "train": "training mode",
    "keep": "the mode the module is in",
}

_STATE = {"chosen": lambda value: value in {"eval", "deterministic"}, "reason": text}

OTHER_SEED = 7919
"""Added to the seed, to find out whether a loss is random."""

REPORTED_STEPS = 64
"""Number of training steps whose losses are kept until the mode is chosen."""


class LossMode:
    """The mode of the analyses of a run, the same on all ranks.

    Attributes:
        wanted: The user's option.
        chosen: The mode that "auto" has chosen in this run; None: none yet.
        reason: Why it was chosen, in words.

    Raises:
        ValueError: If the user's option is no mode.
    """

    def __init__(self, wanted: AnalysisMode = "auto") -> None:
        if wanted not in MODES:
            msg = f"`mode` must be {' or '.join(map(repr, MODES))}, got {wanted!r}."
            raise ValueError(msg)
        self.wanted = wanted
        self.chosen: AutoMode | None = None
        self.reason = "as asked"
        self._run: str | None = None
        self._is_resumed = False
        self._is_told = False
        self._reported: deque[tuple[Tensor, int]] = deque(maxlen=REPORTED_STEPS)

    def restart(self, trainer: pl.Trainer) -> None:
        """Begin a run: choose again, unless it continues an earlier one."""
        run = runs.name_of(trainer)
        if not self._is_resumed and self._run != run:
            self.chosen = None
            self._reported.clear()
        self._run = run
        self._is_resumed = self._is_told = False

    def state_dict(self) -> dict[str, str] | None:
        """Return the chosen mode and the reason; None before the choice."""
        return None if self.chosen is None else {"chosen": self.chosen, "reason": self.reason}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take up the choice of the run that is resumed.

        Raises:
            ValueError: If a field is missing or invalid.
        """
        if state is None:
            return
        check_fields(state, _STATE, "the mode")
        if self.wanted == "auto":
            self.chosen, self.reason, self._is_resumed = state["chosen"], state["reason"], True

    def news(self) -> list[str]:
        """Return a line that names the mode, once in a run, as soon as it is known."""
        mode = self.chosen if self.wanted == "auto" else self.wanted
        if self._is_told or mode is None:
            return []
        self._is_told = True
        return [f"the loss is analyzed in {WORDS[mode]} ({self.reason})"]

    def report(self, trainer: pl.Trainer, outputs: Any) -> None:
        """Keep the loss of a training step, until the mode is chosen, without waiting for the device."""
        if self.wanted != "auto" or self.chosen is not None:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._reported.append((loss.detach(), trainer.accumulate_grad_batches))

    def settle(self, loss: AnalyzedLoss) -> ModeSetting:
        """Return the setting of an analysis; with "auto", the first one of a run that can chooses the mode."""
        if self.wanted != "auto":
            mode: ModeName = self.wanted
        else:
            if self.chosen is None:
                with contextlib.suppress(UndecidedError):
                    self.chosen, self.reason = self._choose(loss)
                    self._reported.clear()
            mode = self.chosen or "eval"
        return loss.collectives.run_together(partial(loss.setting, mode))

    def _choose(self, loss: AnalyzedLoss) -> tuple[AutoMode, str]:
        """Choose the mode, and report it if the modes differ; return it with the reason in words.

        Raises:
            UndecidedError: If the loss cannot be evaluated now.
        """
        evaluation, training = loss.attempt("eval"), loss.attempt("deterministic")
        if isinstance(evaluation, str):
            if isinstance(training, str):  # the analysis in evaluation mode fails with a better message
                raise UndecidedError
            failure = f"the loss in evaluation mode fails ({evaluation})"
            messages.inform(f"lightning_hesd: {failure}, so the loss in {WORDS['deterministic']} is analyzed.")
            return "deterministic", failure
        if isinstance(training, str):
            return "eval", f"the loss in {WORDS['deterministic']} fails ({training})"
        change = loss.compare(evaluation, training)
        if change.is_rounding:
            return "eval", f"the same loss and gradient as in {WORDS['deterministic']}"
        numbers = (
            f"{change.losses[0]:.4g} in evaluation mode and {change.losses[1]:.4g} in {WORDS['deterministic']}, with "
            f"gradients {change.gradient:.2g} of their size apart"
        )
        reported = self._reported_loss(loss.trainer)
        if change.in_draws:
            again = loss.compare(training, loss.evaluate("deterministic", seed=loss.options.seed + OTHER_SEED))
            if not again.is_rounding:
                messages.inform(
                    f"lightning_hesd: the loss in training mode is random beyond dropout ({again.losses[1]:.4g} with "
                    f"another seed): it is {numbers}{reported}. Evaluation mode is analyzed; if training minimizes "
                    "another function, pass the callback `mode='deterministic'` or a `loss_fn`."
                )
                return "eval", f"training mode is random beyond dropout; the loss is {numbers}"
        messages.warn(
            f"the module's evaluation mode is not its training without randomness: the loss is {numbers}{reported}. "
            "The latter is analyzed; pass the callback `mode='eval'` to analyze the former, or "
            "`mode='deterministic'` to silence this warning."
        )
        return "deterministic", f"evaluation mode is another function; the loss is {numbers}"

    def _reported_loss(self, trainer: pl.Trainer) -> str:
        """Return the mean of the losses that training reported, in words; empty without any."""
        losses = [parts * loss.item() for loss, parts in self._reported]  # divided by gradient accumulation
        losses = [loss for loss in losses if math.isfinite(loss)]
        total, count = collectives_of(trainer).sum_values([math.fsum(losses), float(len(losses))])
        if not count:
            return ""
        return f"; training itself reported {total / count:.4g} on average over its last {len(self._reported)} steps"
