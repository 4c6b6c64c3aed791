"""Hooks of autograd: they act when the user's function differentiates, and not when the analysis does.

A hook on an activation, a module or a node of the graph may change gradients (clip or scale them), and the curvature
would be that of another function. But a loss that contains derivatives may need its hooks, for example to record the
gradients of activations. So hooks act while the user's function runs, and at no other time; unless the gradient is that
of the loss by virtue of a hook, as in implicit layers whose hook solves the backward equation.
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
        act: Whether hooks act now.
        were_idle: Whether a hook did not act when its turn came.
    """

    def __init__(self) -> None:
        self.act = self.were_idle = False

    def acting(self) -> contextlib.AbstractContextManager[None]:
        """Return the context of the user's function, in which hooks act."""
        return patched(self, "act", True)

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        """Limit hooks that are registered in this context to act inside `acting` only."""
        on_node = _HookMixin._register_hook  # noqa: SLF001 - used for nodes, by modules as well
        with (
            patched(Tensor, "register_hook", self._limiting(Tensor.register_hook)),
            patched(
                Tensor, "register_post_accumulate_grad_hook", self._limiting(Tensor.register_post_accumulate_grad_hook)
            ),
            patched(_HookMixin, "_register_hook", staticmethod(self._limiting(on_node))),
        ):
            yield

    def _limiting(self, register: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that registers hooks like `register`, limited."""

        @functools.wraps(register)
        def register_limited(target: Any, hook: Hook) -> Any:
            def limited(*arguments: Any) -> Any:
                self.were_idle |= not self.act
                return hook(*arguments) if self.act else None

            return register(target, limited)

        return register_limited


@contextlib.contextmanager
def no_hooks_in_backward(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Let `backward()` accumulate the gradients of some leaves without running hooks of earlier origin on them.

    In such hooks optimizers may step, and DistributedDataParallel starts its reduction. Some are registered with the
    node that accumulates the gradient of a leaf, where they cannot be found: `torch.autograd.grad` does not run them.
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
