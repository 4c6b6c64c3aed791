"""Comparison of a loss and its gradient in two modes of the module."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from lightning_hesd.numerics.analysis.evaluation import Evaluator
from lightning_hesd.numerics.devices import accelerators
from lightning_hesd.numerics.inputs.batches import SkippedBatchError
from lightning_hesd.numerics.inputs.parameters import select_parameters, vector_dtype
from lightning_hesd.numerics.isolation.exact_mode import exact_mode
from lightning_hesd.numerics.operators.curvature import gradient

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from lightning_hesd.numerics.analysis.evaluation import LossFunction
    from lightning_hesd.numerics.collectives import Collectives
    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.inputs.options import AnalysisOptions
    from lightning_hesd.numerics.inputs.parameter_sharding import ParameterSharding
    from lightning_hesd.numerics.krylov.vectors import VectorSpace

FLOAT32_EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Evaluated:
    """A loss and its gradient on this rank's batches.

    Attributes:
        weights: Weight of each batch.
        losses: Loss of each batch; None for a batch that the loss function skipped.
        draws: For each batch, a fingerprint of the random number generators after its loss was computed.
        gradient: Gradient of the weighted sum of the losses, flat, shape (n,).
        norm: Weighted sum of the norms of the gradients of the batches.
    """

    weights: tuple[float, ...]
    losses: tuple[float | None, ...]
    draws: tuple[int, ...]
    gradient: Tensor
    norm: float


def gradient_space(module: nn.Module, options: AnalysisOptions, sharding: ParameterSharding) -> VectorSpace:
    """Return the space of gradients with respect to the analyzed parameters."""
    return sharding.space(sharding.local_shards(list(select_parameters(module, options).values())))


def evaluated(
    module: nn.Module,
    batches: Sequence[WeightedBatch],
    loss_fn: LossFunction,
    options: AnalysisOptions,
    sharding: ParameterSharding,
    *,
    alone: bool,
) -> Evaluated:
    """Evaluate the loss of each of this rank's batches and its gradient, as an analysis with these options does.

    `alone` says whether there is no other rank.

    Raises:
        ArithmeticError: If a loss or its gradient is NaN or infinite.
        SkippedBatchError: If a batch is skipped that all ranks must evaluate together.
    """
    analyzed = list(select_parameters(module, options).values())
    parameters = sharding.local_shards(analyzed)
    space = sharding.space(parameters)
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=vector_dtype(parameters), device=parameters[0].device)
    losses: list[float | None] = []
    draws: list[int] = []
    norm = 0.0
    with exact_mode(module, options.mode, analyzed) as isolation, sharding.full_parameters(module):
        joint = sharding.joint_batches(batches)
        evaluator = Evaluator(module, loss_fn, options, sharding, isolation, batches=joint if alone else None)
        for batch in joint:
            try:
                loss = evaluator.loss(batch)
            except SkippedBatchError:
                if sharding.is_sharded:  # only this rank knows of it
                    raise
                losses.append(None)
                draws.append(0)
                continue
            draws.append(_fingerprint())
            flat = torch.cat([g.reshape(-1).to(total.dtype) for g in gradient(loss, parameters)])
            losses.append(loss.item())
            norm += batch.weight * space.norm(flat).item()
            total.add_(flat, alpha=batch.weight)
            if not math.isfinite(losses[-1] or 0.0) or not math.isfinite(norm):
                msg = f"the loss of {batch.label} is {losses[-1]}, or its gradient is not finite."
                raise ArithmeticError(msg)
    return Evaluated(tuple(batch.weight for batch in joint), tuple(losses), tuple(draws), total, norm)


def _fingerprint() -> int:
    """Return a hash of the states of the global random number generators."""
    _, keys, position, *_ = cast("tuple[Any, ...]", np.random.get_state())  # noqa: NPY002
    states: list[Any] = [random.getstate(), keys.tobytes(), position, torch.get_rng_state().numpy().tobytes()]
    states += [module.get_rng_state().cpu().numpy().tobytes() for module in accelerators()]
    return hash(tuple(states))


@dataclass(frozen=True)
class Difference:
    """The difference of two losses, over all ranks.

    Attributes:
        losses: The two mean losses; NaN if all batches are skipped.
        loss: Mean distance of the losses of batches, relative to their mean size.
        gradient: Distance of the gradients, relative to the mean norm of the gradients of batches.
        in_draws: Whether the two draw different random numbers.
        limit: Largest `loss` and `gradient` that rounding explains.
    """

    losses: tuple[float, float]
    loss: float
    gradient: float
    in_draws: bool
    limit: float

    @property
    def is_rounding(self) -> bool:
        """Whether rounding explains the difference."""
        return self.loss <= self.limit and self.gradient <= self.limit


def difference(first: Evaluated, second: Evaluated, space: VectorSpace, collectives: Collectives) -> Difference:
    """Compare two losses of the same batches, with gradients in `space`, over all ranks."""

    def compare() -> list[float]:
        both = list(zip(first.weights, first.losses, second.losses, strict=True))
        skipped = sum((one is None) != (other is None) for _, one, other in both)
        kept = [(w, one, other) for w, one, other in both if one is not None and other is not None]
        apart = space.norm(first.gradient - second.gradient).item()
        return [
            math.fsum(w for w, *_ in kept),
            math.fsum(w * one for w, one, _ in kept),
            math.fsum(w * other for w, _, other in kept),
            math.fsum(w * abs(one - other) for w, one, other in kept),
            math.fsum(w * max(abs(one), abs(other)) for w, one, other in kept),
            apart,
            max(first.norm, second.norm),
            float(skipped),
            float(first.draws != second.draws),
        ]

    weight, one, other, apart, size, gradients_apart, norms, skipped, draws = collectives.sum_values(
        collectives.run_together(compare)
    )
    epsilon = torch.finfo(first.gradient.dtype).eps
    return Difference(
        (one / weight, other / weight) if weight else (math.nan, math.nan),
        math.inf if skipped else _share(apart, size),
        _share(gradients_apart, norms),
        in_draws=draws > 0,
        limit=math.sqrt(min(epsilon, FLOAT32_EPSILON)),
    )


def _share(amount: float, whole: float) -> float:
    return amount / whole if whole else 0.0
