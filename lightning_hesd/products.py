"""Hessian-vector products of one batch: the strategies.

The product is the derivative of the gradient along the vector: exact by differentiating the gradient's graph once more
(Pearlmutter 1994), or as the difference of two gradients. An exact product costs at least about two gradients; one
whose graph must be built first, a third.
"""

from __future__ import annotations

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
        self.gradient(loss)

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
