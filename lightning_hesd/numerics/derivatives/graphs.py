"""Facts about autograd graphs: the kinds of operations, their precision, and missing derivatives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from torch.autograd.graph import Node

KINKED = (
    *("abs", "amax", "amin", "celu", "clamp", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "kthvalue"),
    *("leakyrelu", "max", "median", "min", "multimargin", "nanmedian", "prelu", "quantile", "relu", "rrelu"),
    *("softshrink", "sort", "threshold", "topk"),
)
"""Prefixes, in lower case, of operations whose first or second derivative is discontinuous."""

ENDS = ("torch::autograd::Error", "NotImplemented", "WarnNotImplemented")
"""Nodes that stand for a missing derivative: its value would be zero, without an error."""


@dataclass
class GraphFacts:
    """Facts about the graphs of a loss and its gradient.

    Attributes:
        kinds: Names of the operations.
        custom: Names of autograd functions in Python, without those of this package: their derivatives may be wrong.
        epsilon: Machine epsilon of the least precise floating-point dtype.
        constant_rows: Weight of an embedding -> its rows for padding, which are constants by definition: their gradient
            is zero, whatever the loss.
    """

    kinds: set[str] = field(default_factory=set)
    custom: set[str] = field(default_factory=set)
    epsilon: float = 0.0
    constant_rows: dict[Tensor, set[int]] = field(default_factory=dict)

    @property
    def is_kinked(self) -> bool:
        """Whether the gradient may be discontinuous."""
        return any(kind.lstrip("_").lower().startswith(KINKED) for kind in self.kinds)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Add the graph of some tensors.

        Raises:
            RuntimeError: If the graph of a gradient ends in an operation without a derivative.
        """
        for node in graph_nodes(tensors):
            name = node.name()
            self.kinds.add(name)
            if name in ENDS:
                msg = (
                    "the loss cannot be differentiated twice: it contains an operation without a second derivative (a "
                    "custom autograd function marked `once_differentiable`, or a library's kernel without an autograd "
                    "formula), whose Hessian autograd would silently take for zero. Replace the operation by plain "
                    "ones for the analysis, for example with `loss_fn`."
                )
                raise RuntimeError(msg)
            if name.startswith("Embedding"):
                self._add_embedding(node)
            is_python = isinstance(node, torch.autograd.function.BackwardCFunction)
            if is_python and not _is_own(node):
                self.custom.add(name)
            for metadata in getattr(node, "_input_metadata", ()):
                # The node of a function in Python that returns None reports a float32 scalar.
                if metadata.dtype.is_floating_point and not (is_python and not metadata.shape):
                    self.epsilon = max(self.epsilon, torch.finfo(metadata.dtype).eps)

    def _add_embedding(self, node: Any) -> None:
        weight = next((getattr(parent, "variable", None) for parent, _ in node.next_functions), None)
        row = getattr(node, "_saved_padding_idx", -1)
        if weight is not None and 0 <= row < len(weight):
            self.constant_rows.setdefault(weight, set()).add(row)

    def without_constant_rows(
        self, vector: Sequence[Tensor | None], parameters: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Return a vector in the shapes of parameters with zeros for constant rows."""
        return [
            v if v is None or p not in self.constant_rows else v.index_fill(0, self._rows(p), 0.0)
            for v, p in zip(vector, parameters, strict=True)
        ]

    def _rows(self, weight: Tensor) -> Tensor:
        return torch.tensor(sorted(self.constant_rows[weight]), device=weight.device)


def graph_nodes(tensors: Sequence[Tensor]) -> Iterator[Node]:
    """Yield each node of the graph of some tensors once, in no particular order."""
    pending: list[Node | None] = [tensor.grad_fn for tensor in tensors]
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(parent for parent, _ in node.next_functions)


def _is_own(node: Node) -> bool:
    function = getattr(node, "_forward_cls", None)
    return getattr(function, "__module__", "").split(".")[0] == __name__.split(".", maxsplit=1)[0]


def wanted_gradients(ctx: Any) -> list[bool]:
    """Return for each input of a function whether the present backward pass uses the gradient with respect to it.

    `ctx.needs_input_grad` only tells which inputs require grad. In the product of one layer's block, it would have the
    gradients with respect to the weights of all layers above computed and dropped, which is half of the work.
    """
    nodes = (node for node, _ in ctx.next_functions if node is not None)  # one for each input that requires grad
    return [needs and _is_executed(next(nodes)) for needs in ctx.needs_input_grad]


def _is_executed(node: Node) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)  # noqa: SLF001
    except (AttributeError, RuntimeError):  # another version of PyTorch; a parameter whose gradient is asked for
        return True
