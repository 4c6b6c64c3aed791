"""Hessian-vector products of one batch: the strategies, and the choice between them.

Pearlmutter (1994): the product is the derivative of the gradient along the vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.autograd.graph import Node

Product = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]
"""Takes a vector, and returns its product, in the shapes of the parameters; None stands for zero."""

Strategy = Literal["graph", "recompute"]

GRAPH_MEMORY_LIMIT = 2 * 2**30
"""`auto` keeps gradient graphs up to this many bytes; the same everywhere, so that all processes choose alike."""


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


def choose_strategy(loss: Callable[[], Tensor], parameters: Sequence[Tensor], scale: float) -> tuple[Strategy, str]:
    """Choose between a retained graph and recomputation by the memory the graphs would hold.

    Args:
        loss: Loss of one batch.
        parameters: The analysed parameters.
        scale: How many times the size of this batch all batches have together.

    Returns:
        The strategy and the reason for it.
    """
    storages: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        gradients = gradient(loss(), parameters, create_graph=True)
    held = sum(storages.values()) * scale
    del gradients
    if held <= GRAPH_MEMORY_LIMIT:
        return "graph", f"auto: the gradient graphs hold about {held / 2**20:.0f} MiB"
    return "recompute", (
        f"auto: the gradient graphs would hold about {held / 2**30:.1f} GiB, more than {GRAPH_MEMORY_LIMIT >> 30} GiB"
    )
