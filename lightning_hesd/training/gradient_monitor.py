"""Compares the gradients of the loss with those that optimizers use: clipped, rescaled, rotated; on sampled steps.

A spectrum is MN if the optimizer uses other gradients than those of the loss (Gabdullin 2025, section 3.4).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lightning_hesd.numerics.krylov.vectors import euclidean_norm, inner_product
from lightning_hesd.training.compat.strategies import check_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import lightning.pytorch as pl
    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_hesd.training.error_policy import ErrorPolicy

SAMPLES_PER_EPOCH = 16
EVERY_WITHOUT_LENGTH = 50
"""Steps between samples where the number of batches of an epoch is not known."""

CHANGED = 1e-5
"""Relative change above which a gradient counts as clipped; smaller changes are rounding."""

MANIPULATING = {
    "adahessian": "averages the Hessian's diagonal over space",
    "lamb": "rescales the gradients of each layer",
    "lars": "rescales the gradients of each layer",
    "novograd": "rescales the gradients of each layer",
    "shampoo": "rotates the gradients of each layer",
    "muon": "orthogonalizes the gradients of each layer",
}
"""Optimizers, in lower case, that change large groups of gradients together, and how."""


@dataclass(frozen=True)
class GradientStatistics:
    """Changes of the gradients between backward pass and optimizer, over the sampled steps of an epoch.

    Attributes:
        steps: Number of sampled optimizer steps.
        clipped_share: Share of the sampled steps whose gradient was changed.
        clip_factor: Mean of norm after over norm before, over the changed gradients; 1 without any.
        gradient_cosine: Mean cosine between the gradient before and after.
        update_cosine: Mean cosine between the gradient and the negative of the step that the weights took.
    """

    steps: int
    clipped_share: float
    clip_factor: float
    gradient_cosine: float
    update_cosine: float


class GradientMonitor:
    """Compares gradients after the backward pass with gradients in the optimizer step, every few steps.

    Attributes:
        enabled: Whether to compare at all.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self._every = 1
        self._raw: dict[Tensor, Tensor] = {}
        self._weights: dict[Tensor, Tensor] = {}
        self._rows: list[Tensor] = []
        self._hooks: list[Any] = []
        self._errors: ErrorPolicy | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which monitors nothing until it is attached."""
        return vars(GradientMonitor(enabled=self.enabled))

    def attach(self, trainer: pl.Trainer, errors: ErrorPolicy) -> None:
        """Monitor the optimizers of this Trainer from now on, until that fails.

        Raises:
            MisconfigurationException: If parameters are sharded.
        """
        self.detach()
        if not self.enabled:
            return
        check_whole(trainer, "monitor_gradients")
        self._errors = errors
        batches = trainer.num_training_batches / trainer.accumulate_grad_batches
        self._every = math.ceil(batches / SAMPLES_PER_EPOCH) if math.isfinite(batches) else EVERY_WITHOUT_LENGTH
        self._hooks = [
            optimizer.register_step_post_hook(lambda optimizer, *_: self._guarded(partial(self._compare, optimizer)))
            for optimizer in trainer.optimizers
        ]

    def detach(self) -> None:
        """Remove the hooks from the optimizers, and forget the gradients."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._errors = None
        self._rows = []
        self._forget()

    def _forget(self) -> None:
        self._raw, self._weights = {}, {}

    @torch.no_grad()
    def after_backward(self, trainer: pl.Trainer) -> None:
        """Keep gradients and weights if this step is sampled; to be called before other code changes the gradients."""
        self._guarded(partial(self._keep, trainer))

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do some work, and stop monitoring if it fails."""
        if self._errors is None:
            return
        with self._errors.guard("the gradients will no longer be monitored") as attempt:
            work()
        if attempt.failure is not None:
            self._errors = None
            self._forget()

    def _keep(self, trainer: pl.Trainer) -> None:
        if trainer.fit_loop.batch_idx // trainer.accumulate_grad_batches % self._every:
            self._forget()  # gradients of a step that an optimizer skipped
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        for optimizer in trainer.optimizers:
            for p in _dense(optimizer):
                assert p.grad is not None  # noqa: S101 - for the type checker; `_dense` yields no others
                self._raw[p] = p.grad / scale
                self._weights.setdefault(p, p.detach().clone())

    @torch.no_grad()
    def _compare(self, optimizer: Optimizer) -> None:
        pairs = [(self._raw.pop(p), p.grad, self._weights.pop(p) - p) for p in _dense(optimizer) if p in self._raw]
        if not pairs:
            return
        raw, used, down = (torch.cat([part.flatten().float() for part in parts]) for parts in zip(*pairs, strict=True))
        norms = [euclidean_norm(vector) for vector in (raw, used, down, used - raw)]
        self._rows.append(torch.stack([*norms, inner_product(raw, used), inner_product(raw, down)]))

    def restart(self) -> None:
        """Begin a new epoch."""
        self._rows = []

    def summary(self) -> GradientStatistics | None:
        """Return the statistics of this epoch; None without a sampled step."""
        rows = torch.stack(self._rows).cpu().double() if self._rows else torch.empty(0, 6)
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

    def values(self) -> dict[str, float]:
        """Return the statistics of this epoch so far by name; empty without a sampled step."""
        found: list[GradientStatistics | None] = []
        self._guarded(lambda: found.append(self.summary()))
        return {} if not found or found[0] is None else asdict(found[0])


def likely_causes(trainer: pl.Trainer, statistics: GradientStatistics | None) -> list[str]:
    """Return likely causes of an MN spectrum, from the statistics of gradients and the Trainer's settings."""
    causes = []
    if statistics is not None and statistics.clipped_share > 0:
        causes.append(
            f"gradients were clipped in {statistics.clipped_share:.0%} of the sampled steps, to "
            f"{statistics.clip_factor:.2g} of their norm on average, cosine {statistics.gradient_cosine:.2g}"
        )
    elif statistics is None and trainer.gradient_clip_val:
        causes.append(f"the Trainer clips gradients (gradient_clip_val={trainer.gradient_clip_val})")
    names = sorted({type(optimizer).__name__ for optimizer in trainer.optimizers})
    return causes + [f"{name} {MANIPULATING[name.lower()]}" for name in names if name.lower() in MANIPULATING]


def _dense(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield the parameters of an optimizer that have a dense gradient."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and not p.grad.is_sparse:
                yield p
