"""What autograd recorded of a loss: the kinds of operations, their precision, and where derivatives end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from torch.autograd.graph import Node

KINKED = (
    *("abs", "amax", "amin", "celu", "clamp", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "kthvalue"),
    *(
        "leakyrelu",
        "max",
        "median",
        "min",
        "multimargin",
        "nanmedian",
        "prelu",
        "quantile",
        "relu",
        "rrelu",
        "softshrink",
    ),
    *("sort", "threshold", "topk"),
)
"""How names of operations begin, in lower case, whose gradient or second derivative may jump."""

ENDS = ("torch::autograd::Error", "NotImplemented", "WarnNotImplemented")
"""Nodes in place of a derivative that does not exist: its value would be zero, without an error."""


@dataclass
class GraphFacts:
    """What is known of the graphs of a loss and its gradient.

    Attributes:
        kinds: Names of the operations.
        custom: Names of those that are written in Python, other than this package's: their derivatives may be wrong.
        epsilon: Machine epsilon of the coarsest floating-point type among them.
    """

    kinds: set[str] = field(default_factory=set)
    custom: set[str] = field(default_factory=set)
    epsilon: float = 0.0

    @property
    def is_kinked(self) -> bool:
        """Whether the gradient may jump between two points, however close."""
        return any(kind.lstrip("_").lower().startswith(KINKED) for kind in self.kinds)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Take up the graph behind some tensors.

        Raises:
            RuntimeError: If the graph of a gradient ends in an operation without a derivative.
        """
        for node in graph_nodes(tensors):
            name = node.name()
            self.kinds.add(name)
            if name in ENDS:
                msg = (
                    "the loss cannot be differentiated twice: it passes through an operation without a second "
                    "derivative (a custom autograd function marked `once_differentiable`, or a kernel of a library "
                    "that has no autograd formula), whose Hessian autograd would silently take for zero; replace it by "
                    "plain operations for the analysis, for example with `loss_fn`."
                )
                raise RuntimeError(msg)
            is_python = isinstance(node, torch.autograd.function.BackwardCFunction)
            if is_python and not _is_own(node):
                self.custom.add(name)
            for metadata in getattr(node, "_input_metadata", ()):
                # Where a function of Python returns None, its node says that it returns a float32 scalar.
                if metadata.dtype.is_floating_point and not (is_python and not metadata.shape):
                    self.epsilon = max(self.epsilon, torch.finfo(metadata.dtype).eps)


def graph_nodes(tensors: Sequence[Tensor]) -> Iterator[Node]:
    """Walk through the graph behind some tensors.

    Yields:
        Its nodes, each once, in no particular order.
    """
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
