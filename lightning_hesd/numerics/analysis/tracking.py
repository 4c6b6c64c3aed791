"""The sharpness of a loss, tracked between full analyses in a few products from the last Ritz vectors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lightning_hesd.numerics.analysis.preparation import opened_operators
from lightning_hesd.numerics.inputs.parameters import inverse_root, select_parameters
from lightning_hesd.numerics.krylov.rayleigh_ritz import RitzSubspace
from lightning_hesd.numerics.krylov.vectors import euclidean_norm, inner_product
from lightning_hesd.numerics.operators.curvature import gradient
from lightning_hesd.numerics.operators.diagonal_block import choose_difference_step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn
    from typing_extensions import Unpack

    from lightning_hesd.numerics.analysis.engine import Circumstances, Report
    from lightning_hesd.numerics.analysis.evaluation import LossFunction
    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.inputs.options import AnalysisOptions
    from lightning_hesd.numerics.operators.diagonal_block import DiagonalBlock

TRACKING_PRODUCTS = 4
"""Most products of a measurement that starts from Ritz vectors, beside the one with the gradient."""

SEARCH_PRODUCTS = 20
"""Most products of a measurement that starts from a random vector, beside the one with the gradient."""

TRACKING_TOLERANCE = 0.05
"""Error of the Ritz pairs, relative to the Ritz values, at which a measurement ends early.

The Ritz value itself is more accurate, as long as no other eigenvalue is near: its error is at most the square of this
over the relative gap. With twice the tolerance, a product in eight is saved, and the mean error of λ_max doubles.
"""

SEARCH_TOLERANCE = 0.01
"""The same for a search, which is rare and must not end at an eigenvalue just below the largest one."""


@dataclass(frozen=True)
class TrackedSharpness:
    """What a few products tell of the mean loss of some samples: tracked values, not verified ones.

    Attributes:
        lambda_max: Largest Ritz value of H, a lower bound of its largest eigenvalue.
        preconditioned: That of D^(-1/2) H D^(-1/2); None without a preconditioner D.
        batch_sharpness: gᵀHg/‖g‖² with the gradient g (Andreyev & Beneventano 2024, arXiv:2412.20553); None if g is 0.
        products: Number of Hessian-vector products taken.
    """

    lambda_max: float
    preconditioned: float | None
    batch_sharpness: float | None
    products: int


class SharpnessTracker:
    """Follows the largest eigenvalues of the Hessian and of the preconditioned Hessian from measurement to measurement.

    Each measurement starts from the gradient and from the leading Ritz vectors of the last one. From vectors near an
    eigenvector, a few products find no other one, even where another eigenvalue has become the largest. Therefore a
    *search*, which starts from a random vector and takes more products, should follow now and then.
    """

    def __init__(self) -> None:
        self._vectors: list[Tensor] = []  # leading Ritz vectors of the last measurement, on the CPU
        self._searches = True

    def search_next(self) -> None:
        """Let the next measurement be a search; the first one is."""
        self._searches = True

    def measure(
        self,
        module: nn.Module,
        batches: Sequence[WeightedBatch],
        loss_fn: LossFunction,
        options: AnalysisOptions,
        *,
        preconditioner: Mapping[str, Tensor] | None = None,
        report: Report | None = None,  # noqa: ARG002 - there is too little to report
        **circumstances: Unpack[Circumstances],
    ) -> TrackedSharpness:
        """Return the sharpness at the present weights, which must not be sharded.

        `preconditioner` is the diagonal D by parameter, and other arguments are as for `engine.analyze`.

        Raises:
            ArithmeticError: If the loss, its gradient or a product is NaN or infinite.
        """
        options = replace(options, basis="none")
        parameters = list(select_parameters(module, options).values())
        with opened_operators(module, batches, loss_fn, options, [parameters], **circumstances) as ([operator], _):
            choose_difference_step([operator])
            scale = inverse_root(module, parameters, preconditioner, operator.risk.dtype)
            subspace = RitzSubspace(operator.finite_matvec, scale)
            slope = _unit_gradient(operator)
            product = None if slope is None else operator.finite_matvec(slope)
            known = [v.to(operator.risk.device, operator.risk.dtype) for v in self._vectors if len(v) == operator.size]
            budget, tolerance = TRACKING_PRODUCTS, TRACKING_TOLERANCE
            if self._searches or not known:
                # From the random vector first: an eigenvector among the others would hide a larger eigenvalue.
                budget, tolerance = SEARCH_PRODUCTS, SEARCH_TOLERANCE
                drawn = operator.space.gaussian(torch.Generator().manual_seed(options.seed))
                subspace.add(drawn.to(operator.risk.device, operator.risk.dtype))
                subspace.expand(budget - len(known), tolerance)
            if slope is not None:
                subspace.add(slope, product)
            for vector in known:
                subspace.add(vector)
            pairs = subspace.expand(budget, tolerance)
        self._vectors, self._searches = [pair.vector.cpu() for pair in pairs], False
        return TrackedSharpness(
            lambda_max=pairs[0].value,
            preconditioned=pairs[1].value if len(pairs) > 1 else None,
            batch_sharpness=None if slope is None or product is None else float(inner_product(slope, product)),
            products=subspace.products + (slope is not None),
        )


def _unit_gradient(operator: DiagonalBlock) -> Tensor | None:
    """Return the gradient of the mean loss over all ranks, at unit length, shape (n,); None if it is zero.

    Raises:
        ArithmeticError: If it is NaN or infinite.
    """
    risk = operator.risk

    def own_share() -> Tensor:
        total = torch.zeros(operator.size, dtype=risk.dtype, device=risk.device)
        for batch in risk.batches:
            parts = gradient(risk.matrix.loss(batch), operator.parameters)
            flat = torch.cat([part.flatten().to(risk.dtype) for part in parts])
            total.add_(flat, alpha=batch.weight / risk.weight)
        return total

    total = risk.collectives.sum(risk.collectives.run_together(own_share))
    if not bool(total.isfinite().all()):
        msg = "the gradient of the loss is NaN or infinite, though the loss is finite."
        raise ArithmeticError(msg)
    length = euclidean_norm(total)
    return total / length if length > 0 else None
