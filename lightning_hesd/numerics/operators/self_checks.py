"""Checks of a risk operator: the loss against its derivatives, once for each kind of graph that the loss has."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lightning_hesd.numerics.devices import finest_dtype
from lightning_hesd.numerics.isolation.tensor_states import size_in_memory
from lightning_hesd.numerics.operators.curvature import OutputMatrix
from lightning_hesd.numerics.operators.memory import COMPARED_SAMPLES, COMPARISON_VECTORS, DIFFERENCE_VECTORS
from lightning_hesd.numerics.operators.verification import Verification, WrongDerivativeError, gradient_agrees, verify

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning_hesd.numerics.derivatives.hooks import Hooks
    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.operators.directional import Outcome
    from lightning_hesd.numerics.operators.risk_operator import RiskOperator
    from lightning_hesd.numerics.operators.verification import InFinest

EPSILONS = (0.0, *(torch.finfo(t).eps for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)))
"""Precisions that the ranks tell each other of."""

SPREAD_BATCHES, SPREAD_SAMPLES = 6, 24
"""Numbers of batches and of their samples that are compared beside the first few.

A part that is wrong for one sample in ten is missed with a probability of 0.08, and one that is wrong for every second
batch with 0.016.
"""

LEAST_SAMPLES = 2
"""Least number of samples of a batch, so that deviations and differences of samples exist."""

OUTCOMES: tuple[Outcome, ...] = ("differs", "agrees", "undecided")
"""In the order of their rank: the first that any rank found holds for all ranks."""

SHARDED_PART = Verification(
    "undecided", "undecided", "where parameters are sharded, parts of the Hessian are not compared"
)
"""The outputs of the network differ from rank to rank."""


def check_derivatives(risk: RiskOperator, in_finest: InFinest | None, hooks: Hooks) -> None:
    """Compare the loss with its derivatives by `verify`, and enter the result into the cache.

    Where only the products by differentiating twice are wrong, central differences take their place, if the strategy is
    "auto".

    Raises:
        WrongDerivativeError: If there are no right products.
    """
    cache, facts = risk.cache, risk.matrix.facts
    hooks.act |= cache.needs_hooks
    kinds = frozenset(facts.kinds)
    is_new = cache.verification is None or not kinds <= cache.kinds
    is_new_anywhere, *counts = _anywhere(risk, [is_new, *(facts.epsilon >= epsilon for epsilon in EPSILONS)])
    risk.epsilon = max(epsilon for epsilon, is_there in zip(EPSILONS, counts, strict=True) if is_there)
    if risk.sharding.is_sharded and isinstance(risk.matrix, OutputMatrix):
        cache.verification = SHARDED_PART
    elif is_new_anywhere:
        cache.verification = _compared(risk, in_finest, hooks)
        cache.kinds = kinds | frozenset(facts.kinds)
    if risk.verification.verdict(exact=risk.is_exact) == "no":
        _give_up_exact_products(risk)


def refute(risk: RiskOperator, words: str) -> None:
    """Take central differences from now on, because exact products are not those of a symmetric matrix: see `words`.

    Raises:
        WrongDerivativeError: If the strategy is not "auto", or differences do not give the matrix.
    """
    risk.cache.verification = replace(risk.verification, products="differs", words=words)
    _give_up_exact_products(risk)


def _compared(risk: RiskOperator, in_finest: InFinest | None, hooks: Hooks) -> Verification:
    """Compare on every rank that has a batch, and join the outcomes."""
    together = risk.sharding.is_sharded
    own = Verification("undecided", "undecided", "this rank has no batch to compare with differences")
    if risk.batches:
        smallest = min(risk.batches, key=lambda batch: batch.num_samples)
        batch = risk.batches[0] if together else smallest
        risk.comparison_bytes = _bytes_of_comparison(risk, min(COMPARED_SAMPLES, batch.num_samples), in_finest)
        own = verify(risk.matrix, batch, risk.space, exact=risk.is_exact, in_finest=in_finest, may_fail=not together)
        if own.gradient == "differs" and hooks.were_idle and not together:
            own = _with_hooks(risk, batch, own, hooks, in_finest)
        if own.gradient == "agrees":
            own = _with_other_samples(risk, own, in_finest)
    of_gradient, of_products = (_joint(risk, outcome) for outcome in (own.gradient, own.products))
    return Verification(of_gradient, of_products, own.words)


def _with_other_samples(risk: RiskOperator, own: Verification, in_finest: InFinest | None) -> Verification:
    """Compare samples from all over the batches, given that the gradient is right for the first ones.

    A loss may hide a part of itself for some samples only: pseudo-labels, tasks that take turns.
    """
    for batch in _spread(risk, in_finest):
        if in_finest and gradient_agrees(risk.matrix, batch, risk.space, in_finest, own.kinds):
            continue
        exact = risk.is_exact and own.products != "differs"
        may_fail = not risk.sharding.is_sharded
        found = verify(
            risk.matrix, batch, risk.space, exact=exact, in_finest=in_finest, may_fail=may_fail, few_first=False
        )
        if found.verdict(exact=exact) == "no":
            own = replace(found, products=found.products if exact else own.products)
        if own.gradient == "differs":
            break
    return own


def _spread(risk: RiskOperator, in_finest: InFinest | None) -> Iterator[WeightedBatch]:
    """Yield evenly spaced samples of some batches, the same at every call, as many as the memory allows."""
    chosen = random.Random(0).sample(range(len(risk.batches)), min(SPREAD_BATCHES, len(risk.batches)))
    count, bytes_per_sample = SPREAD_SAMPLES // len(chosen), _bytes_per_sample(risk, in_finest)
    if bytes_per_sample:
        of_product = risk.cache.product_bytes * max(batch.num_samples for batch in risk.batches)
        count = min(count, int((risk.spare_memory + of_product) / bytes_per_sample))
    count = max(count, LEAST_SAMPLES)
    for at in sorted(chosen):
        batch = risk.batches[at].thinned(count)
        needed = _bytes_of_comparison(risk, batch.num_samples, in_finest)
        risk.comparison_bytes = max(risk.comparison_bytes, needed)
        yield batch


def _with_hooks(
    risk: RiskOperator, batch: WeightedBatch, without: Verification, hooks: Hooks, in_finest: InFinest | None
) -> Verification:
    """Compare the gradient with hooks, given the comparison without them; if it is right, hooks act from now on."""
    with hooks.acting():
        found = verify(risk.matrix, batch, risk.space, exact=False, in_finest=in_finest)
    if found.gradient != "agrees":
        return without
    hooks.act = risk.cache.needs_hooks = True
    return replace(found, products="differs", words=f"{found.words} only if hooks act, and exact products do without")


def _bytes_of_comparison(risk: RiskOperator, num_samples: float, in_finest: InFinest | None) -> float:
    """Return the bytes of the kept graphs, and of the comparison of the loss of some samples."""
    graphs = num_samples * _bytes_per_sample(risk, in_finest)
    vector = _times_finer(risk, in_finest) * sum(size_in_memory(p) for p in risk.matrix.parameters)
    return risk.kept_bytes + max(COMPARISON_VECTORS * vector + graphs, DIFFERENCE_VECTORS * vector)


def _bytes_per_sample(risk: RiskOperator, in_finest: InFinest | None) -> float:
    """Return the bytes of graph and product of one sample in the comparison."""
    return _times_finer(risk, in_finest) * ((risk.cache.graph_bytes or 0.0) + risk.cache.product_bytes)


def _times_finer(risk: RiskOperator, in_finest: InFinest | None) -> float:
    """Return how many times as long the numbers of the comparison are as those of the parameters."""
    return finest_dtype(risk.device).itemsize / risk.matrix.parameters[0].element_size() if in_finest else 1.0


def _joint(risk: RiskOperator, own: Outcome) -> Outcome:
    """Return the outcome that holds for all ranks."""
    counts = risk.collectives.sum_values([float(own == outcome) for outcome in OUTCOMES])
    return next(outcome for outcome, count in zip(OUTCOMES, counts, strict=True) if count)


def _give_up_exact_products(risk: RiskOperator) -> None:
    if not risk.may_fall_back or risk.verification.gradient == "differs":
        raise WrongDerivativeError(risk.verification.words, risk.loss)
    risk.fall_back(risk.verification.words)


def _anywhere(risk: RiskOperator, facts: Sequence[bool]) -> list[bool]:
    """Return which of these holds on any rank."""
    counts = risk.collectives.sum_values([float(fact) for fact in facts])
    return [risk.sharding.collectives.max(count) > 0 for count in counts]
