"""Hooks of autograd: they act in the user's own differentiation, and are passed by in that of the analysis.

A hook on an activation, a module or a node of the graph may change the gradient that passes it (clip it, scale it), and
the spectrum would be that of what it returns. But a loss that differentiates inside may need its hooks: to catch the
gradients of activations, for example. So while the user's function runs they act as written, and otherwise they do not.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import _HookMixin

from lightning_hesd.numerics.derivatives.graphs import graph_nodes
from lightning_hesd.numerics.derivatives.patches import patched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Hook = Callable[..., Any]


class Hooks:
    """The hooks that the user's code registers during an analysis.

    Attributes:
        act: Whether they act now.
        registered: How many there have been.
    """

    def __init__(self) -> None:
        self.act = False
        self.registered = 0

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """Let them act: the user's function runs."""
        before, self.act = self.act, True
        try:
            yield
        finally:
            self.act = before

    @contextlib.contextmanager
    def passed_by(self) -> Iterator[None]:
        """Let hooks that are registered from now on act only where they should, until the end of this context."""
        register: Any = Tensor.register_hook
        register_on_leaf: Any = Tensor.register_post_accumulate_grad_hook
        register_on_node: Any = _HookMixin._register_hook  # noqa: SLF001 - by which nodes do, and modules on theirs

        @functools.wraps(register)
        def register_limited(tensor: Tensor, hook: Hook) -> Any:
            return register(tensor, self._limited(hook))

        @functools.wraps(register_on_leaf)
        def register_limited_on_leaf(tensor: Tensor, hook: Hook) -> Any:
            return register_on_leaf(tensor, self._limited(hook))

        def register_limited_on_node(hooks: Any, hook: Hook) -> Any:
            return register_on_node(hooks, self._limited(hook))

        with (
            patched(Tensor, "register_hook", register_limited),
            patched(Tensor, "register_post_accumulate_grad_hook", register_limited_on_leaf),
            patched(_HookMixin, "_register_hook", staticmethod(register_limited_on_node)),
        ):
            yield

    def _limited(self, hook: Hook) -> Hook:
        self.registered += 1

        def limited(*arguments: Any) -> Any:
            return hook(*arguments) if self.act else None

        return limited


@contextlib.contextmanager
def no_hooks_in_backward(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Let `backward()` add to the gradients of some leaves, as ever, but call nothing that waits for that.

    Optimizers may take a step there, and DistributedDataParallel starts its reduction. Where hooks of that kind were
    registered with the node that adds up a leaf's gradient, they cannot be found.
    """
    backward: Any = torch.autograd.backward
    protected = set(leaves)

    @functools.wraps(backward)
    def adding(
        tensors: Any, grad_tensors: Any = None, retain_graph: Any = None, create_graph: Any = False, **others: Any
    ) -> None:
        roots = [tensors] if isinstance(tensors, Tensor) else tensors
        plain = not others.get("inputs") and not others.get("grad_variables") and isinstance(roots, list | tuple)
        reached: list[Tensor] = []
        if plain and all(isinstance(root, Tensor) for root in roots):
            reached = [node.variable for node in graph_nodes(roots) if hasattr(node, "variable")]
        if protected.isdisjoint(reached):
            backward(tensors, grad_tensors, retain_graph, create_graph, **others)
            return
        options = {"retain_graph": retain_graph, "create_graph": create_graph, "allow_unused": True}
        gradients = torch.autograd.grad(roots, reached, grad_tensors, **options)
        with torch.set_grad_enabled(bool(create_graph)):
            for leaf, gradient in zip(reached, gradients, strict=True):
                if gradient is not None:
                    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
                for hook in list((leaf._post_accumulate_grad_hooks or {}).values()):  # noqa: SLF001
                    hook(leaf)

    with patched(torch.autograd, "backward", adding):
        yield
