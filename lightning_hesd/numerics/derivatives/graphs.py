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

EMBEDDINGS = {"EmbeddingBackward0", "EmbeddingBagBackward0"}
"""Nodes of operations that may have a row for padding."""


@dataclass
class GraphFacts:
    """Facts about the graphs of a loss and its gradient.

    Attributes:
        kinds: Names of the operations.
        custom: Names of autograd functions in Python, without those of this package: their derivatives may be wrong.
        epsilon: Machine epsilon of the least precise floating-point dtype.
        padding_rows: Leaf of the graphs -> its rows that are padding in all operations that use it.
    """

    kinds: set[str] = field(default_factory=set)
    custom: set[str] = field(default_factory=set)
    epsilon: float = 0.0
    padding_rows: dict[Tensor, set[int]] = field(default_factory=dict)

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
            self._add_uses(node, node._saved_padding_idx if name in EMBEDDINGS else -1)  # type: ignore[attr-defined]  # noqa: SLF001
            is_python = isinstance(node, torch.autograd.function.BackwardCFunction)
            if is_python and not _is_own(node):
                self.custom.add(name)
            for metadata in getattr(node, "_input_metadata", ()):
                # The node of a function in Python that returns None reports a float32 scalar.
                if metadata.dtype.is_floating_point and not (is_python and not metadata.shape):
                    self.epsilon = max(self.epsilon, torch.finfo(metadata.dtype).eps)

    def _add_uses(self, node: Node, padding: int) -> None:
        for argument, (parent, _) in enumerate(node.next_functions):
            leaf = getattr(parent, "variable", None)
            if leaf is not None:
                rows = {padding} if argument == 0 and 0 <= padding < len(leaf) else set()
                self.padding_rows[leaf] = rows & self.padding_rows.get(leaf, rows)

    @property
    def has_constant_rows(self) -> bool:
        """Whether a parameter has rows that are constants by definition: their gradient is zero, whatever the loss."""
        return any(self.padding_rows.values())

    def without_constant_rows(
        self, vector: Sequence[Tensor | None], parameters: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Return a vector in the shapes of parameters with zeros for constant rows."""
        return [
            v.index_fill(0, torch.tensor(sorted(rows), device=v.device), 0.0)
            if v is not None and (rows := self.padding_rows.get(p))
            else v
            for v, p in zip(vector, parameters, strict=True)
        ]


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
