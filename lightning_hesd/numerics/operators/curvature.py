"""The matrices of second derivatives of one batch's loss, as products: Hessian, Gauss-Newton matrix, and residual.

With outputs o of the network and a loss L(o), its Hessian is H = G + R: the generalised Gauss-Newton matrix
G = Jᵀ (∂²L/∂o²) J, with J = ∂o/∂w (Schraudolph 2002), and the residual R = Σ_i (∂L/∂o_i) ∂²o_i/∂w². Kiselev & Grabovoy
(2024, section 3.4) call them G-term and H-term.

Products are exact, by differentiating a gradient's graph once more (Pearlmutter 1994), and cost at least about two
gradients. A matrix may be cut down to diagonal blocks of its parameters; all blocks share one graph.
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

Vector = Sequence[Tensor | None]
"""Parts in the shapes of the parameters; None stands for zero."""

Matvec = Callable[[Vector], Vector]
"""Product with a curvature matrix, v -> Hv."""

EVERYTHING = slice(None)


@dataclass
class CurvatureMatrix(ABC):
    """A symmetric matrix that belongs to the loss of a batch.

    Attributes:
        loss: Mean loss of a batch, a scalar tensor that is the same at every call.
        parameters: What rows and columns of the matrix stand for.
        blocks: The diagonal blocks that are wanted of it, each a range of the parameters.
        facts: What the graphs evaluated so far have shown of the loss.
        is_hessian: Whether it is the Hessian of a function, so that differences of gradients give it, too.
    """

    loss: Callable[[WeightedBatch], Tensor]
    parameters: Sequence[Tensor]
    blocks: Sequence[slice] = field(default=(EVERYTHING,), kw_only=True)
    facts: GraphFacts = field(default_factory=GraphFacts, init=False, kw_only=True)
    is_hessian: ClassVar[bool] = True

    def has_loss(self, batch: WeightedBatch) -> bool:
        """Return whether the loss function has a loss for a batch, and does not skip it."""
        try:
            self.loss(batch)
        except SkippedBatchError:
            return False
        return True

    def check(self, batch: WeightedBatch) -> None:  # noqa: B027 - most have nothing to check
        """Raise a ValueError if the matrix cannot be what it is asked to be."""

    @abstractmethod
    def make_matvec(self, batch: WeightedBatch, *, retain: bool) -> tuple[Tensor, Matvec]:
        """Return the loss of a batch, a scalar without graph, and the product with its matrix.

        Args:
            batch: The batch.
            retain: Whether the product will be called more than once: the graph stays.
        """

    @abstractmethod
    def function(self, batch: WeightedBatch) -> Callable[[], Tensor]:
        """Return the function of the parameters, a scalar, whose Hessian at their present values the matrix is.

        Of a matrix that is none, the loss.
        """


class HessianMatrix(CurvatureMatrix):
    """The Hessian of the loss."""

    @override
    def make_matvec(self, batch: WeightedBatch, *, retain: bool) -> tuple[Tensor, Matvec]:
        with kept_activations():
            loss = self.loss(batch)
        return loss.detach(), _hessian_matvec(loss, self, retain=retain)

    @override
    def function(self, batch: WeightedBatch) -> Callable[[], Tensor]:
        return lambda: self.loss(batch)


@dataclass(frozen=True)
class Outputs:
    """The outputs of a network for one batch, and their loss.

    Attributes:
        values: The outputs that depend on the parameters, with the graph of the network.
        heads: The same values, cut off: what the loss below depends on.
        loss: Their mean loss, a scalar.
        slopes: ∂L/∂o, in the shapes of the outputs, with a graph that reaches back to the heads.
    """

    values: Sequence[Tensor]
    heads: Sequence[Tensor]
    loss: Tensor
    slopes: Sequence[Tensor]


@dataclass
class OutputMatrix(CurvatureMatrix):
    """What the matrices have in common that look at the outputs of the network.

    Attributes:
        output_fn: Outputs of the network for a batch: a tensor, or tensors in lists, tuples and dicts.
        output_loss: The loss of such outputs, a scalar tensor.
    """

    output_fn: Callable[[WeightedBatch], Any]
    output_loss: Callable[[Any, WeightedBatch], Tensor]

    @override
    def check(self, batch: WeightedBatch) -> None:
        """Compare the losses, and look whether the outputs are all that the parameters act on.

        Raises:
            ValueError: If they differ, or are not.
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
            past = torch.autograd.grad(outputs.loss, self.parameters, allow_unused=True)
            if any(p is not None for p in past):
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
        heads = [o.detach().requires_grad_() if _depends(o) else o for o in leaves]
        loss = self.output_loss(tree_unflatten(heads, structure), batch)
        values = [o for o in leaves if _depends(o)]
        own = [head for head, o in zip(heads, leaves, strict=True) if _depends(o)]
        return Outputs(values, own, loss, gradient(loss, own, create_graph=True))


class GaussNewtonMatrix(OutputMatrix):
    """G, positive semidefinite where the loss is convex in the outputs."""

    is_hessian: ClassVar[bool] = False

    @override
    def make_matvec(self, batch: WeightedBatch, *, retain: bool) -> tuple[Tensor, Matvec]:
        with kept_activations():
            outputs = self._outputs(batch)
        # cᵀJ is linear in c, whatever c: its derivative along v with respect to c is Jv.
        cotangents = [torch.zeros_like(o, requires_grad=True) for o in outputs.values]
        pulled = _derivative(outputs.values, self.parameters, cotangents, create_graph=True)
        self.facts.add([p for p in pulled if p is not None])

        def matvec(vector: Vector) -> Vector:
            result: list[Tensor | None] = [None] * len(self.parameters)
            for block in self.blocks:
                along = _derivative(pulled[block], cotangents, vector[block])
                curved = _derivative(outputs.slopes, outputs.heads, along)
                once = not retain and block == self.blocks[-1]
                result[block] = _derivative(outputs.values, self.parameters[block], curved, retain=not once)
            return result

        return outputs.loss.detach(), matvec

    @override
    def function(self, batch: WeightedBatch) -> Callable[[], Tensor]:
        return lambda: self.loss(batch)


class ResidualMatrix(OutputMatrix):
    """R: the Hessian of the outputs, weighted by the present slopes of the loss."""

    @override
    def make_matvec(self, batch: WeightedBatch, *, retain: bool) -> tuple[Tensor, Matvec]:
        with kept_activations():
            outputs = self._outputs(batch)
        weighted = _weighted_sum(outputs.values, outputs.slopes)
        return outputs.loss.detach(), _hessian_matvec(weighted, self, retain=retain)

    @override
    def function(self, batch: WeightedBatch) -> Callable[[], Tensor]:
        slopes = [slope.detach() for slope in self._outputs(batch).slopes]
        return lambda: _weighted_sum([o for o in tree_leaves(self.output_fn(batch)) if _depends(o)], slopes)


def _depends(output: object) -> bool:
    return isinstance(output, Tensor) and output.requires_grad


def _weighted_sum(outputs: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor:
    terms = [(output * slope.detach()).sum() for output, slope in zip(outputs, slopes, strict=True)]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def gradient(loss: Tensor, parameters: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """Return the gradient of `loss`, zeros where a parameter does not take part in it."""
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    gradients = torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]


def _hessian_matvec(scalar: Tensor, matrix: CurvatureMatrix, *, retain: bool) -> Matvec:
    parameters, blocks = matrix.parameters, matrix.blocks
    gradients = gradient(scalar, parameters, create_graph=True)
    matrix.facts.add([scalar, *gradients])

    def matvec(vector: Vector) -> Vector:
        result: list[Tensor | None] = [None] * len(parameters)
        for block in blocks:
            last = block == blocks[-1]
            result[block] = _derivative(gradients[block], parameters[block], vector[block], retain=retain or not last)
        return result

    return matvec


def _derivative(
    values: Vector, inputs: Sequence[Tensor], vector: Vector, *, retain: bool = True, create_graph: bool = False
) -> list[Tensor | None]:
    """Return vᵀ(∂values/∂inputs), in the shapes of the inputs; None stands for zero."""
    # A value without a graph is constant: its part is zero.
    pairs = zip(values, vector, strict=True)
    curved = [(y, v) for y, v in pairs if y is not None and y.requires_grad and v is not None]
    if not curved:
        return [None] * len(inputs)
    outputs, directions = zip(*curved, strict=True)
    options = {"retain_graph": retain, "create_graph": create_graph, "allow_unused": True}
    return list(torch.autograd.grad(outputs, inputs, directions, **options))
