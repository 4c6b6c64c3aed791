"""Checks of a risk operator: the loss against its derivatives, once for each kind of graph that the loss has."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lightning_hesd.numerics.devices import finest_dtype
from lightning_hesd.numerics.isolation.tensor_states import size_in_memory
from lightning_hesd.numerics.operators.curvature import OutputMatrix
from lightning_hesd.numerics.operators.memory import COMPARED_SAMPLES, COMPARISON_VECTORS, DIFFERENCE_VECTORS
from lightning_hesd.numerics.operators.verification import Verification, WrongDerivativeError, verify

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_hesd.numerics.operators.directional import Outcome
    from lightning_hesd.numerics.operators.risk_operator import RiskOperator
    from lightning_hesd.numerics.operators.verification import InFinest

EPSILONS = (0.0, *(torch.finfo(t).eps for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)))
"""Precisions that the ranks tell each other of."""

OUTCOMES: tuple[Outcome, ...] = ("differs", "agrees", "undecided")
"""In the order of their rank: the first that any rank found holds for all ranks."""

SHARDED_PART = Verification(
    "undecided", "undecided", "where parameters are sharded, parts of the Hessian are not compared"
)
"""The outputs of the network differ from rank to rank."""


def check_derivatives(risk: RiskOperator, in_finest: InFinest | None) -> None:
    """Compare the loss with its derivatives by `verify`, and enter the result into the cache.

    Where only the products by differentiating twice are wrong, central differences take their place, if the strategy is
    "auto".

    Raises:
        WrongDerivativeError: If there are no right products.
    """
    cache, facts = risk.cache, risk.matrix.facts
    kinds = frozenset(facts.kinds)
    is_new = cache.verification is None or not kinds <= cache.kinds
    is_new_anywhere, *counts = _anywhere(risk, [is_new, *(facts.epsilon >= epsilon for epsilon in EPSILONS)])
    risk.epsilon = max(epsilon for epsilon, is_there in zip(EPSILONS, counts, strict=True) if is_there)
    if risk.sharding.is_sharded and isinstance(risk.matrix, OutputMatrix):
        cache.verification = SHARDED_PART
    elif is_new_anywhere:
        cache.verification = _compared(risk, in_finest)
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


def _compared(risk: RiskOperator, in_finest: InFinest | None) -> Verification:
    """Compare on every rank that has a batch, and join the outcomes."""
    together = risk.sharding.is_sharded
    own = Verification("undecided", "undecided", "this rank has no batch to compare with differences")
    if risk.batches:
        smallest = min(risk.batches, key=lambda batch: batch.num_samples)
        batch = risk.batches[0] if together else smallest
        risk.comparison_bytes = _bytes_of_comparison(risk, batch.num_samples, in_finest)
        own = verify(risk.matrix, batch, risk.space, exact=risk.is_exact, in_finest=in_finest, may_fail=not together)
    of_gradient, of_products = (_joint(risk, outcome) for outcome in (own.gradient, own.products))
    return Verification(of_gradient, of_products, own.words)


def _bytes_of_comparison(risk: RiskOperator, num_samples: float, in_finest: InFinest | None) -> float:
    """Return the bytes of the kept graphs, and of the comparison of a batch's loss in the finest precision."""
    cache, fine = risk.cache, 1.0
    if in_finest is not None:
        fine = finest_dtype(risk.device).itemsize / risk.matrix.parameters[0].element_size()
    graphs = min(COMPARED_SAMPLES, num_samples) * ((cache.graph_bytes or 0.0) + cache.product_bytes)
    vector = sum(size_in_memory(p) for p in risk.matrix.parameters)
    return risk.kept_bytes + fine * max(COMPARISON_VECTORS * vector + graphs, DIFFERENCE_VECTORS * vector)


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
