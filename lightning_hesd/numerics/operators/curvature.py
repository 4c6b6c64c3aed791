"""Curvature matrices of the loss of one batch, known by their products: Hessian, Gauss-Newton matrix and residual.

With outputs o of the network and a loss L(o), the Hessian is H = G + R with the generalized Gauss-Newton matrix
G = Jᵀ (∂²L/∂o²) J, J = ∂o/∂w (Schraudolph 2002), and the residual R = Σ_i (∂L/∂o_i) ∂²o_i/∂w²: the G-term and H-term
of Kiselev & Grabovoy (2024, section 3.4).

Products are exact: the graph of a gradient is differentiated once more (Pearlmutter 1994), at the cost of about two
gradients. A matrix may be restricted to diagonal blocks of its parameters; all blocks share one graph.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from typing_extensions import override

from lightning_hesd.numerics.derivatives.checkpointing import kept_activations
from lightning_hesd.numerics.derivatives.graphs import GraphFacts
from lightning_hesd.numerics.inputs.batches import SkippedBatchError

if TYPE_CHECKING:
    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.inputs.options import MatrixName

Vector = Sequence[Tensor | None]
"""A vector as one tensor for each parameter, in its shape; None stands for zero."""

Matvec = Callable[[Vector], Vector]
"""Product with a curvature matrix, v -> Hv."""

EVERYTHING = slice(None)


@dataclass
class CurvatureMatrix(ABC):
    """A symmetric matrix of second derivatives of the loss of a batch.

    Attributes:
        loss: Mean loss of a batch, a scalar tensor that is the same at every call.
        parameters: The parameters w of rows and columns.
        blocks: Diagonal blocks to compute, each a range of the parameters.
        facts: Properties of the graphs evaluated so far: dtypes, operations, kinks.
        is_hessian: Whether the matrix is the Hessian of a function, so that differences of its gradient give it, too.
    """

    loss: Callable[[WeightedBatch], Tensor]
    parameters: Sequence[Tensor]
    blocks: Sequence[slice] = field(default=(EVERYTHING,), kw_only=True)
    facts: GraphFacts = field(default_factory=GraphFacts, init=False, kw_only=True)
    is_hessian: ClassVar[bool] = True

    @property
    def epsilon(self) -> float:
        """Machine epsilon of the coarsest floating-point type among the parameters and in the graphs so far."""
        return max(self.facts.epsilon, *(torch.finfo(p.dtype).eps for p in self.parameters))

    def has_loss(self, batch: WeightedBatch) -> bool:
        """Return whether the loss function has a loss for a batch, and does not skip it."""
        try:
            self.loss(batch)
        except SkippedBatchError:
            return False
        return True

    def check(self, batch: WeightedBatch) -> None:  # noqa: B027 - for subclasses
        """Raise a ValueError if the loss functions do not define the matrix."""

    @abstractmethod
    def make_matvec(self, batch: WeightedBatch, *, retain: bool) -> tuple[Tensor, Matvec]:
        """Return the loss of a batch, a scalar without graph, and v -> Hv, for one product unless `retain` is set."""

    def function(self, batch: WeightedBatch) -> Callable[[], Tensor]:
        """Return the scalar function of the parameters that has the matrix as its Hessian: the loss, by default."""
        return lambda: self.loss(batch)


class HessianMatrix(CurvatureMatrix):
    """The Hessian H = ∂²L/∂w² of the loss: Hv = ∂(gᵀv)/∂w with the gradient g = ∂L/∂w."""

    @override
    def make_matvec(self, batch: WeightedBatch, *, retain: bool) -> tuple[Tensor, Matvec]:
        with kept_activations():
            loss = self.loss(batch)
        return loss.detach(), _hessian_matvec(loss, self, retain=retain)


@dataclass(frozen=True)
class Outputs:
    """The outputs of a network for one batch, and their loss.

    Attributes:
        values: The outputs that depend on the parameters, with the graph of the network.
        detached: Their values without that graph, the inputs of the loss.
        loss: Mean loss, a scalar.
        cotangents: ∂L/∂o, in the shapes of the outputs, with a graph that ends in `detached`.
    """

    values: Sequence[Tensor]
    detached: Sequence[Tensor]
    loss: Tensor
    cotangents: Sequence[Tensor]


@dataclass
class OutputMatrix(CurvatureMatrix):
    """A curvature matrix that depends on the outputs of the network.

    Attributes:
        output_fn: Outputs of the network for a batch: a tensor, or tensors in lists, tuples and dicts.
        output_loss: Mean loss of outputs, a scalar tensor.
    """

    output_fn: Callable[[WeightedBatch], Any]
    output_loss: Callable[[Any, WeightedBatch], Tensor]

    @override
    def check(self, batch: WeightedBatch) -> None:
        """Check that both loss functions agree, and that the loss depends on parameters through the outputs only.

        Raises:
            ValueError: If not.
        """
        outputs = self._outputs(batch)
        loss, other = self.loss(batch).item(), outputs.loss.item()
        rounding = math.sqrt(torch.finfo(outputs.loss.dtype).eps)
        if not math.isclose(loss, other, rel_tol=rounding, abs_tol=rounding) and math.isfinite(loss):
            msg = (
                f"`loss_fn` must be the `output_loss` of what `output_fn` returns; for batch {batch.index} they are "
                f"{loss:.6g} and {other:.6g}."
            )
            raise ValueError(msg)
        if outputs.loss.requires_grad:
            direct = torch.autograd.grad(outputs.loss, self.parameters, allow_unused=True)
            if any(g is not None for g in direct):
                msg = (
                    "`output_loss` must depend on the parameters by way of the outputs only; it uses some directly "
                    "(a penalty on weights, perhaps)."
                )
                raise ValueError(msg)

    def values(self, batch: WeightedBatch) -> list[Any]:
        """Return the outputs for a batch, leaf by leaf, without a graph."""
        return [o.detach() if isinstance(o, Tensor) else o for o in tree_leaves(self.output_fn(batch))]

    def loss_near(self, batch: WeightedBatch, change: Sequence[Tensor | None], distance: float) -> float:
        """Return the loss of the outputs moved by `distance` times `change`; None leaves an output where it is."""
        leaves, structure = tree_flatten(self.output_fn(batch))
        moved = [o if c is None else o.detach() + distance * c for o, c in zip(leaves, change, strict=True)]
        return self.output_loss(tree_unflatten(moved, structure), batch).item()

    def _outputs(self, batch: WeightedBatch) -> Outputs:
        leaves, structure = tree_flatten(self.output_fn(batch))
        inputs = [o.detach().requires_grad_() if _depends(o) else o for o in leaves]
        loss = self.output_loss(tree_unflatten(inputs, structure), batch)
        values = [o for o in leaves if _depends(o)]
        detached = [new for new, o in zip(inputs, leaves, strict=True) if _depends(o)]
        return Outputs(values, detached, loss, gradient(loss, detached, create_graph=True))


class GaussNewtonMatrix(OutputMatrix):
    """The Gauss-Newton matrix G = Jᵀ (∂²L/∂o²) J, positive semidefinite where L is convex in the outputs o."""

    is_hessian: ClassVar[bool] = False

    @override
    def make_matvec(self, batch: WeightedBatch, *, retain: bool) -> tuple[Tensor, Matvec]:
        with kept_activations():
            outputs = self._outputs(batch)
        # cᵀJ is linear in c, for any c: its derivative with respect to c, along v, is Jv.
        dummies = [torch.zeros_like(o, requires_grad=True) for o in outputs.values]
        linear = _vjp(outputs.values, self.parameters, dummies, create_graph=True)
        self.facts.add([p for p in linear if p is not None])

        def matvec(vector: Vector) -> Vector:
            result: list[Tensor | None] = [None] * len(self.parameters)
            for block in self.blocks:
                tangents = _vjp(linear[block], dummies, vector[block])  # Jv
                cotangents = _vjp(outputs.cotangents, outputs.detached, tangents)  # (∂²L/∂o²) Jv
                is_last = not retain and block == self.blocks[-1]
                result[block] = _vjp(outputs.values, self.parameters[block], cotangents, retain=not is_last)
            return result

        return outputs.loss.detach(), matvec


class ResidualMatrix(OutputMatrix):
    """The residual R = Σ_i (∂L/∂o_i) ∂²o_i/∂w²: the Hessian of Σ_i c_i o_i with constant cotangents c = ∂L/∂o."""

    @override
    def make_matvec(self, batch: WeightedBatch, *, retain: bool) -> tuple[Tensor, Matvec]:
        with kept_activations():
            outputs = self._outputs(batch)
        weighted = _weighted_sum(outputs.values, outputs.cotangents)
        return outputs.loss.detach(), _hessian_matvec(weighted, self, retain=retain)

    @override
    def function(self, batch: WeightedBatch) -> Callable[[], Tensor]:
        cotangents = [c.detach() for c in self._outputs(batch).cotangents]
        return lambda: _weighted_sum([o for o in tree_leaves(self.output_fn(batch)) if _depends(o)], cotangents)


MATRICES: dict[MatrixName, type[CurvatureMatrix]] = {
    "hessian": HessianMatrix,
    "ggn": GaussNewtonMatrix,
    "residual": ResidualMatrix,
}
"""The curvature matrices by the name of the option `matrix`."""


def _depends(output: object) -> bool:
    return isinstance(output, Tensor) and output.requires_grad


def _weighted_sum(outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Tensor:
    terms = [(output * c.detach()).sum() for output, c in zip(outputs, cotangents, strict=True)]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def gradient(loss: Tensor, parameters: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """Return the gradient of `loss`, with zeros for parameters that it does not depend on.

    Backward passes of some custom functions (reversible networks) run a backward pass of their own, which adds to
    `.grad`; that part counts, too.

    Raises:
        RuntimeError: If one of the parameters does not require grad any longer.
    """
    if not all(p.requires_grad for p in parameters):
        msg = (
            "the loss function freezes parameters that are analyzed (`requires_grad=False`): leave them out by "
            "`parameters`, or do not freeze them in the loss function."
        )
        raise RuntimeError(msg)
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    before = [p.grad for p in parameters]
    gradients = torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True)
    return [
        _total(torch.zeros_like(p) if g is None else g, p.grad, grad)
        for g, p, grad in zip(gradients, parameters, before, strict=True)
    ]


def _total(gradient: Tensor, now: Tensor | None, before: Tensor | None) -> Tensor:
    """Return a gradient plus what `.grad` has gained; `Hooks` lets backward passes make a new tensor of it."""
    if now is None or now is before:
        return gradient
    return gradient + now if before is None else gradient + (now - before)


def _hessian_matvec(scalar: Tensor, matrix: CurvatureMatrix, *, retain: bool) -> Matvec:
    parameters, blocks = matrix.parameters, matrix.blocks
    gradients = gradient(scalar, parameters, create_graph=True)
    matrix.facts.add([scalar, *gradients])

    def matvec(vector: Vector) -> Vector:
        result: list[Tensor | None] = [None] * len(parameters)
        for block in blocks:
            is_last = not retain and block == blocks[-1]
            result[block] = _vjp(gradients[block], parameters[block], vector[block], retain=not is_last)
        return result

    return matvec


def _vjp(
    values: Vector, inputs: Sequence[Tensor], cotangents: Vector, *, retain: bool = True, create_graph: bool = False
) -> list[Tensor | None]:
    """Return the vector-Jacobian product cᵀ(∂values/∂inputs), in the shapes of the inputs; None stands for zero."""
    # A value without a graph is constant, and contributes zero.
    pairs = zip(values, cotangents, strict=True)
    curved = [(y, c) for y, c in pairs if y is not None and y.requires_grad and c is not None]
    if not curved:
        return [None] * len(inputs)
    outputs, directions = zip(*curved, strict=True)
    # Directions are often views of one vector. The gradient of `view_as_complex` refuses a view with an odd offset.
    directions = tuple(c.clone() if c.storage_offset() % 2 else c for c in directions)
    options = {"retain_graph": retain, "create_graph": create_graph, "allow_unused": True}
    return list(torch.autograd.grad(outputs, inputs, directions, **options))
