"""Cuts of the graph of a loss: tensors by way of which alone some parameters act on the loss.

A node that every path from a parameter to the loss passes is a dominator of the parameter. The closest dominators of
all nodes form a tree (Cooper, Harvey & Kennedy 2001); walking up in it leads to the first common one of several nodes.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from torch.autograd.graph import GradientEdge

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor
    from torch.autograd.graph import Node


ACCUMULATE = "torch::autograd::AccumulateGrad"
"""Name of the nodes that stand for leaves."""


class GraphCuts:
    """Finds cuts of the graph of a loss."""

    def __init__(self, loss: Tensor) -> None:
        """Find the closest dominator of every node in the graph of a scalar."""
        nodes = [] if loss.grad_fn is None else _from_loss_to_leaves(loss.grad_fn)
        self._rank = {node: rank for rank, node in enumerate(nodes)}
        self._dominator: dict[Node, Node] = {node: node for node in nodes[:1]}  # the loss is its own
        self._used_outputs: dict[Node, set[int]] = {node: set() for node in nodes}
        self._leaves: dict[Tensor, Node] = {}
        for node in nodes:
            if node.name() == ACCUMULATE:
                self._leaves[node.variable] = node  # type: ignore[attr-defined]
            for source, output in node.next_functions:
                if source is not None:
                    self._used_outputs[source].add(output)
                    others = self._dominator.get(source, node)
                    self._dominator[source] = self._first_common(others, node)

    def after(self, parameters: Iterable[Tensor]) -> GradientEdge | None:
        """Return the first tensor by way of which alone the parameters act on the loss; None if they do not."""
        nodes = [self._dominator[self._leaves[p]] for p in parameters if p in self._leaves]
        return self._cut(nodes) if nodes else None

    def common(self, edges: Iterable[GradientEdge]) -> GradientEdge:
        """Return the first tensor by way of which alone some others act on the loss: one of them, perhaps."""
        return self._cut([edge.node for edge in edges])

    def _cut(self, nodes: Iterable[Node]) -> GradientEdge:
        node = functools.reduce(self._first_common, nodes)
        while len(self._used_outputs[node]) > 1:  # several tensors
            node = self._dominator[node]
        [output] = self._used_outputs[node] or {0}
        return GradientEdge(node, output)

    def _first_common(self, a: Node, b: Node) -> Node:
        while a is not b:
            if self._rank[a] > self._rank[b]:
                a = self._dominator[a]
            else:
                b = self._dominator[b]
        return a


def _from_loss_to_leaves(root: Node) -> list[Node]:
    """Return all nodes of a graph, each after those that use its results."""
    found: list[Node] = []
    seen: set[Node] = set()
    pending = [(root, False)]
    while pending:
        node, is_done = pending.pop()
        if is_done:
            found.append(node)
        elif node not in seen:
            seen.add(node)
            pending.append((node, True))
            pending += [(source, False) for source, _ in node.next_functions if source is not None]
    return found[::-1]
