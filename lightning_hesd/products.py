"""Hessian-vector products of one batch: the strategies.

The product is the derivative of the gradient along the vector: exact by differentiating the gradient's graph once more
(Pearlmutter 1994), or as the difference of two gradients. An exact product costs at least about two gradients; one
whose graph must be built first, a third.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.autograd.graph import Node

Product = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]
"""Takes a vector, and returns its product, in the shapes of the parameters; None stands for zero."""

Strategy = Literal["graph", "recompute", "finite_difference"]

LADDER_FACTOR = 4.0
"""Ratio of neighbouring steps in the search for the best step of central differences."""

LADDER_RUNGS = 10

ERROR_MARGIN = 4.0
"""The search sees one sample of the rounding; this many times as much is stated for all products."""


def gradient(loss: Tensor, parameters: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """Return the gradient of `loss`, zeros where a parameter does not take part in it."""
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    gradients = torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]


def retained_graph_product(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, Product]:
    """Build the gradient's graph once and differentiate it again for every product: fast, holds the graph.

    Returns:
        The value of the loss, a scalar without graph, and the product.
    """
    value = loss()
    gradients = gradient(value, parameters, create_graph=True)
    check_twice_differentiable(gradients)
    return value.detach(), lambda vector: _differentiate(gradients, parameters, vector, retain_graph=True)


def recomputed_product(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, Product]:
    """Build the gradient's graph anew for every product: slower, holds nothing between products.

    Returns:
        The value of the loss, a scalar without graph, and the product.
    """
    value = loss()
    check_twice_differentiable(gradient(value, parameters, create_graph=True))

    def product(vector: Sequence[Tensor]) -> Sequence[Tensor | None]:
        return _differentiate(gradient(loss(), parameters, create_graph=True), parameters, vector, retain_graph=False)

    return value.detach(), product


def _differentiate(
    gradients: Sequence[Tensor], parameters: Sequence[Tensor], vector: Sequence[Tensor], *, retain_graph: bool
) -> Sequence[Tensor | None]:
    # A gradient without a graph is constant in the parameters: its part of the product is zero.
    curved = [(g, v) for g, v in zip(gradients, vector, strict=True) if g.requires_grad]
    if not curved:
        return [None] * len(parameters)
    outputs, directions = zip(*curved, strict=True)
    return torch.autograd.grad(outputs, parameters, directions, retain_graph=retain_graph, allow_unused=True)


@dataclass
class FiniteDifferences:
    """Products by central differences of the gradient: two gradients each, and nothing else is needed of the loss.

    The parameters are moved in place and put back bit by bit, so that compiled, scripted and custom code sees them.

    Attributes:
        parameters: The analysed parameters.
        step: How far they are moved along the vector, to either side; the vector is taken to have length 1.
    """

    parameters: Sequence[Tensor]
    step: float = 0.0
    _originals: list[Tensor] = field(init=False)
    _by_backward: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._originals = [p.detach().clone() for p in self.parameters]

    def product(self, loss: Callable[[], Tensor]) -> tuple[Tensor, Product]:
        """Return the value of the loss, a scalar without graph, and the product at the present `step`."""
        value = loss().detach()

        def product(vector: Sequence[Tensor]) -> Sequence[Tensor | None]:
            try:
                self._move(vector, self.step)
                ahead = self.gradient(loss)
                self._move(vector, -self.step)
                behind = self.gradient(loss)
            finally:
                self._move(vector, 0.0)
            return [a.sub_(b).div_(2 * self.step) for a, b in zip(ahead, behind, strict=True)]

        return value, product

    def choose_step(self, matvec: Callable[[Tensor], Tensor], vector: Tensor, known: float | None = None) -> float:
        """Choose the step that balances truncation, which falls with the step, against rounding, which grows.

        From a long step downward, each a quarter of the one before, products of neighbouring steps differ by the
        truncation of the longer and the rounding of the shorter; where they differ least, that difference is the error
        of the shorter. The test vector is made rich in the directions of extreme curvature, where truncation is worst.

        Args:
            matvec: The product with the whole Hessian, at the present `step`.
            vector: A random vector, shape (n,).
            known: The step found for other weights: the search begins near it.

        Returns:
            Norm of the error of a product with a unit vector; 0 where there is nothing to measure.
        """
        epsilon = max(torch.finfo(p.dtype).eps for p in self.parameters)
        size = math.sqrt(sum(float(p.double().square().sum()) for p in self._originals))
        self.step = known or max(size, 1.0) * epsilon ** (1 / 3) / LADDER_FACTOR
        for _ in range(2):
            vector = matvec(vector / torch.linalg.vector_norm(vector))
        norm = torch.linalg.vector_norm(vector)
        if not 0 < float(norm) < math.inf:
            return 0.0  # no curvature, or a failure, which the first product will tell
        vector /= norm

        best = (math.inf, self.step)
        self.step *= LADDER_FACTOR if known else LADDER_FACTOR**2
        previous = matvec(vector)
        for _ in range(LADDER_RUNGS):
            self.step /= LADDER_FACTOR
            product = matvec(vector)
            gap = float(torch.linalg.vector_norm(product - previous))
            best = min(best, (gap, self.step))
            if gap > 2 * best[0]:
                break
            previous = product
        gap, self.step = best
        return ERROR_MARGIN * gap

    def gradient(self, loss: Callable[[], Tensor]) -> list[Tensor]:
        """Return the gradient at the present parameters."""
        if not self._by_backward:
            try:
                return gradient(loss(), self.parameters)
            except RuntimeError:  # reentrant activation checkpointing knows `backward()` only
                self._by_backward = True
        for p in self.parameters:
            p.grad = None
        loss().backward()  # type: ignore[no-untyped-call]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        return gradients

    def _move(self, vector: Sequence[Tensor], distance: float) -> None:
        for p, original, part in zip(self.parameters, self._originals, vector, strict=True):
            if distance:
                torch.add(original, part, alpha=distance, out=p.data)
            else:
                p.data.copy_(original)


def check_twice_differentiable(gradients: Sequence[Tensor]) -> None:
    """Refuse gradients that autograd would differentiate again silently wrong.

    A custom function marked `once_differentiable` cuts the graph: products through it come out as zeros, without an
    error. Its cut shows as an error node in the graph.

    Raises:
        RuntimeError: If there is such a node.
    """
    pending: list[Node | None] = [g.grad_fn for g in gradients]
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            msg = (
                "the loss cannot be differentiated twice: it passes through a custom autograd function marked "
                "`once_differentiable`, whose Hessian autograd would silently take for zero; replace the function by "
                "plain operations for the analysis, for example with `loss_fn`."
            )
            raise RuntimeError(msg)
        pending.extend(parent for parent, _ in node.next_functions)
