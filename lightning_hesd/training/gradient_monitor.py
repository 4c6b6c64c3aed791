"""What optimizers make of the gradients of the loss: clipping, rescaling, rotation, on sampled steps of training.

The cause of an MN spectrum is that the gradients used are not those of the loss (Gabdullin 2025, section 3.4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    import lightning.pytorch as pl
    from torch import Tensor
    from torch.optim import Optimizer

    Attempt = Callable[[str], AbstractContextManager[list[str]]]

SAMPLES_PER_EPOCH = 16
EVERY_WITHOUT_LENGTH = 50
"""Steps between samples where the number of batches of an epoch is not known."""

CHANGED = 1e-5
"""Relative change from which on a gradient counts as clipped; below it is rounding."""

MANIPULATING = {
    "adahessian": "averages the Hessian's diagonal over space",
    "lamb": "rescales the gradients of each layer",
    "lars": "rescales the gradients of each layer",
    "novograd": "rescales the gradients of each layer",
    "shampoo": "rotates the gradients of each layer",
    "muon": "orthogonalises the gradients of each layer",
}
"""Optimizers, in lower case, that change large groups of gradients together, and how."""


@dataclass(frozen=True)
class GradientStatistics:
    """What happened to the gradients between backward pass and optimizer, over the sampled steps of an epoch.

    Attributes:
        steps: Number of optimizer steps looked at.
        clipped_share: Share of these whose gradient was changed.
        clip_factor: Mean of norm after over norm before, over the changed ones; 1 if there was none.
        gradient_cosine: Mean cosine between the gradient before and after.
        update_cosine: Mean cosine between the gradient and the step that the weights took downhill.
    """

    steps: int
    clipped_share: float
    clip_factor: float
    gradient_cosine: float
    update_cosine: float


class GradientMonitor:
    """Compares gradients as backward passes leave them with what optimizers use, every so many steps."""

    def __init__(self) -> None:
        self._every = 1
        self._raw: dict[Tensor, Tensor] = {}
        self._weights: dict[Tensor, Tensor] = {}
        self._seen: list[Tensor] = []
        self._hooks: list[Any] = []
        self._attempt: Attempt | None = None

    def __reduce__(self) -> Any:
        """Let a copy watch nothing until it is attached."""
        return GradientMonitor, ()

    def attach(self, trainer: pl.Trainer, attempt: Attempt) -> None:
        """Look at the optimizers of this trainer from now on, until that fails.

        Args:
            trainer: The trainer.
            attempt: Takes what to say if the block within fails, and gives a list that then has the failure.
        """
        self.detach()
        self._attempt = attempt
        batches = trainer.num_training_batches / trainer.accumulate_grad_batches
        self._every = math.ceil(batches / SAMPLES_PER_EPOCH) if math.isfinite(batches) else EVERY_WITHOUT_LENGTH
        self._hooks = [
            optimizer.register_step_post_hook(lambda optimizer, *_: self._look(lambda: self._compare(optimizer)))
            for optimizer in trainer.optimizers
        ]

    def detach(self) -> None:
        """Leave the optimizers alone, and forget."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._attempt = None
        self._seen = []
        self._forget()

    def _forget(self) -> None:
        self._raw, self._weights = {}, {}

    @torch.no_grad()
    def after_backward(self, trainer: pl.Trainer) -> None:
        """Keep gradients and weights if this is a step to look at; called before anybody changes the gradients."""
        self._look(lambda: self._keep(trainer))

    def _look(self, work: Callable[[], None]) -> None:
        if self._attempt is None:
            return
        with self._attempt("the gradients will no longer be looked at") as failures:
            work()
        if failures:
            self._attempt = None
            self._forget()

    def _keep(self, trainer: pl.Trainer) -> None:
        if trainer.fit_loop.batch_idx // trainer.accumulate_grad_batches % self._every:
            self._forget()  # what an optimizer skipped
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        for optimizer in trainer.optimizers:
            for p in _dense(optimizer):
                assert p.grad is not None  # noqa: S101 - for the type checker; `_dense` leaves those without out
                self._raw[p] = p.grad / scale
                self._weights.setdefault(p, p.detach().clone())

    @torch.no_grad()
    def _compare(self, optimizer: Optimizer) -> None:
        pairs = [(self._raw.pop(p), p.grad, self._weights.pop(p) - p) for p in _dense(optimizer) if p in self._raw]
        if not pairs:
            return
        raw, used, down = (torch.cat([part.flatten().float() for part in parts]) for parts in zip(*pairs, strict=True))
        norms = [raw.norm(), used.norm(), down.norm(), (used - raw).norm()]
        self._seen.append(torch.stack([*norms, raw @ used, raw @ down]))

    def restart(self) -> None:
        """Begin a new epoch."""
        self._seen = []

    def summary(self) -> GradientStatistics | None:
        """Return what was seen in this epoch; None if that is nothing."""
        rows = torch.stack(self._seen).cpu().double() if self._seen else torch.empty(0, 6)
        rows = rows[(rows[:, 0] > 0) & rows.isfinite().all(1)]
        if not len(rows):
            return None
        raw, used, down, change, along, descent = rows.T
        clipped = change > CHANGED * raw
        factors = (used / raw)[clipped]
        return GradientStatistics(
            steps=len(rows),
            clipped_share=float(clipped.double().mean()),
            clip_factor=float(factors.mean()) if len(factors) else 1.0,
            gradient_cosine=float((along / (raw * used).clamp_min(1e-300)).mean()),
            update_cosine=float((descent / (raw * down).clamp_min(1e-300)).mean()),
        )


def likely_causes(trainer: pl.Trainer, statistics: GradientStatistics | None) -> list[str]:
    """Return what may have made a spectrum MN, from what the monitor saw and from the Trainer's settings."""
    causes = []
    if statistics is not None and statistics.clipped_share > 0:
        causes.append(
            f"gradients were clipped in {statistics.clipped_share:.0%} of the steps looked at, to "
            f"{statistics.clip_factor:.2g} of their norm on average, cosine {statistics.gradient_cosine:.2g}"
        )
    elif statistics is None and trainer.gradient_clip_val:
        causes.append(f"the Trainer clips gradients (gradient_clip_val={trainer.gradient_clip_val})")
    names = sorted({type(optimizer).__name__ for optimizer in trainer.optimizers})
    return causes + [f"{name} {MANIPULATING[name.lower()]}" for name in names if name.lower() in MANIPULATING]


def _dense(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield the parameters of an optimizer that have a gradient, other than a sparse one."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and not p.grad.is_sparse:
                yield p
