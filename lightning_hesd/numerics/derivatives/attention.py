"""Attention with second derivatives that take memory linear in the context.

For each head o = P v with P = softmax(scale · q kᵀ + mask), one row per query. Only q, k, v and the gradient with
respect to o are stored, and every derivative recomputes the scores in blocks of rows. Blocks suffice because a row of P
belongs to one query, and derivatives with respect to keys and values are sums over queries. The derivative of such a
function is such a function again, to every order: a gradient penalty takes no more memory than its loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCK = 2**18
"""Scores per block on the CPU, where intermediate results of this size fit into the cache."""

_BLOCK_ELSEWHERE = 2**24
"""Scores per block on accelerators, which need large operations: there several heads share a block."""

_MIN_ROWS = 16
"""Minimal rows per block: with fewer, matrix products are slow."""


def _row_sum(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of a · b over the last dimension, which is kept."""
    return (a * b).sum(-1, keepdim=True)


def _through_softmax(gradient: Tensor, probabilities: Tensor) -> Tensor:
    """Return the gradient with respect to the input of the softmax, from that with respect to its output."""
    result: Tensor = torch.ops.aten._softmax_backward_data(gradient, probabilities, -1, gradient.dtype)  # noqa: SLF001
    return result


def long_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    causal: bool,
    grouped: bool = False,
) -> Tensor:
    """Return softmax(scale · query keyᵀ + mask) value, computed in float32 at least.

    Args:
        query: Shape (..., heads, queries, width).
        key: Shape (..., heads, keys, width).
        value: Shape (..., heads, keys, another width).
        mask: Added to the scores, or, if boolean, True for scores that count; without gradient; it broadcasts.
        scale: Factor of the scores.
        causal: Whether query i attends to the keys up to i only.
        grouped: Whether consecutive heads of the queries share a head of the keys and values.
    """
    dtype = query.dtype
    q, k, v = (t.float() if dtype in {torch.float16, torch.bfloat16} else t for t in (query, key, value))
    if grouped:
        k, v = k.unsqueeze(-3), v.unsqueeze(-3)
        q = q.unflatten(-3, (k.shape[-4], -1))  # type: ignore[no-untyped-call]
    heads = torch.broadcast_shapes(*(t.shape[:-2] for t in (q, k, v)))  # type: ignore[no-untyped-call]
    q, k, v = (t.expand(*heads, *t.shape[-2:]) for t in (q, k, v))
    if mask is not None:
        all_heads = (*heads[:-2], heads[-2:].numel()) if grouped else heads
        mask = mask.expand(*all_heads, q.shape[-2], k.shape[-2])
        mask = mask.unflatten(-3, heads[-2:]) if grouped else mask  # type: ignore[no-untyped-call]
    (attended,) = _LongAttention.apply(0, _Scores(scale, causal), mask, q, k, v)  # type: ignore[no-untyped-call]
    return (attended.flatten(-4, -3) if grouped else attended).to(dtype)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Scores:
    """The definition of scores by queries and keys, as for `long_attention`."""

    scale: float
    causal: bool

    def blocks(self, queries: int, keys: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
        """Yield ranges of queries, each with the range of keys to which the queries attend."""
        size = _BLOCK if device.type == "cpu" else _BLOCK_ELSEWHERE
        rows = max(_MIN_ROWS, size // max(1, keys))
        for start in range(0, queries, rows):
            stop = min(start + rows, queries)
            yield slice(start, stop), slice(0, min(stop, keys) if self.causal else keys)

    def probabilities(self, q: Tensor, k: Tensor, mask: Tensor | None, start: int) -> Tensor:
        """Return the rows of P of one head, or of several, for queries from `start` on."""
        scores = (q * self.scale) @ k.mT
        if self.causal:
            recent = scores[..., start:]
            recent.masked_fill_(torch.ones_like(recent, dtype=torch.bool).triu(1), -torch.inf)
        if mask is None:
            return torch.softmax(scores, -1)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return torch._safe_softmax(scores, -1)  # noqa: SLF001 - zeros in fully masked rows, as in PyTorch's attention


class _LongAttention(Function):
    """Attention (order 0) or its derivative of some order: the gradient of the previous order.

    It takes the inputs of the previous order and a cotangent for each of its results, and returns the gradients with
    respect to these inputs.
    """

    @staticmethod
    def forward(ctx: Any, order: int, scores: _Scores, mask: Tensor | None, *inputs: Tensor) -> Any:
        ctx.save_for_backward(mask, *inputs)
        ctx.order, ctx.scores = order, scores
        return _in_blocks(order, scores, mask, inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        mask, *inputs = ctx.saved_tensors
        derivatives = _LongAttention.apply(ctx.order + 1, ctx.scores, mask, *inputs, *cotangents)  # type: ignore[no-untyped-call]
        return None, None, None, *derivatives


def _in_blocks(order: int, scores: _Scores, mask: Tensor | None, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Evaluate the derivative of an order, block by block."""
    q, k, v, *_ = inputs
    inputs_of_queries, results_of_queries = _has_query_rows(order)
    shapes = [i.shape for i in inputs[: len(results_of_queries)]] if order else [(*q.shape[:-1], v.shape[-1])]
    results = tuple(q.new_zeros(shape) for shape in shapes)
    for head in _heads(q, k):
        for rows, columns in scores.blocks(q.shape[-2], k.shape[-2], q.device):

            def softmax(q: Tensor, k: Tensor, head: Any = head, rows: slice = rows, columns: slice = columns) -> Tensor:
                part = None if mask is None else mask[head][..., rows, columns]
                return scores.probabilities(q, k, part, rows.start)

            places = [rows if is_query else columns for is_query in inputs_of_queries]
            given = [i[head][..., place, :] for i, place in zip(inputs, places, strict=True)]
            found = _derivative(order)(softmax, scores.scale, *given)
            for result, part, is_query in zip(results, found, results_of_queries, strict=True):
                result[head][..., rows if is_query else columns, :] += part
    return results


def _heads(q: Tensor, k: Tensor) -> Iterator[tuple[int | slice, ...]]:
    """Yield indices of heads: one by one on the CPU, and elsewhere as many of a sample as fit into a block."""
    shape = q.shape[:-2]
    together = 1 if q.device.type == "cpu" else _BLOCK_ELSEWHERE // max(1, q.shape[-2] * k.shape[-2])
    if together <= 1 or not shape:
        yield from itertools.product(*map(range, shape))
        return
    for others in itertools.product(*map(range, shape[:-1])):
        for start in range(0, shape[-1], together):
            yield *others, slice(start, start + together)


def _has_query_rows(order: int) -> tuple[Sequence[bool], Sequence[bool]]:
    """Return which inputs and which results of a derivative have a row per query; all others have a row per key."""
    inputs: Sequence[bool] = (True, False, False)
    results: Sequence[bool] = (True,)
    for _ in range(order):
        inputs, results = (*inputs, *results), inputs
    return inputs, results


_Softmax = Callable[[Tensor, Tensor], Tensor]
"""The rows of P for some queries and the keys to which they attend."""


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of a matrix and a product of two, of one head or of each of several."""
    return torch.addmm(total, a, b) if total.ndim == 2 else torch.baddbmm(total, a, b)


def _derivative(order: int) -> Callable[..., Sequence[Tensor]]:
    """Return the derivative of an order, for a block of queries of one head, or of several."""
    written_out = (_attended, _gradients, _products)
    return written_out[order] if order < len(written_out) else _automatic(order)


def _automatic(order: int) -> Callable[..., Sequence[Tensor]]:
    """Return PyTorch's derivative of the previous order."""
    count = len(_has_query_rows(order - 1)[0])
    function = _derivative(order - 1)

    def derivative(softmax: _Softmax, scale: float, *inputs: Tensor) -> Sequence[Tensor]:
        is_differentiated = torch.is_grad_enabled()
        with torch.enable_grad():
            # One input may depend on another. Views cut that path, which the graph outside accounts for.
            cut = [i.view_as(i) if is_differentiated else i.detach().requires_grad_() for i in inputs[:count]]
            results = function(softmax, scale, *cut)
            return torch.autograd.grad(
                results, cut, inputs[count:], create_graph=is_differentiated, materialize_grads=True
            )

    return derivative


def _attended(softmax: _Softmax, _: float, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
    """Return o = P v."""
    return (softmax(q, k) @ v,)


def _gradients(  # noqa: PLR0917 - the order of all derivatives
    softmax: _Softmax, scale: float, q: Tensor, k: Tensor, v: Tensor, g: Tensor
) -> Sequence[Tensor]:
    """Return the gradients of ⟨g, o⟩ with respect to q, k and v."""
    p = softmax(q, k)
    grad_scores = _through_softmax(g @ v.mT, p) * scale
    return grad_scores @ k, grad_scores.mT @ q, p.mT @ g


def _products(  # noqa: PLR0917 - the order of all derivatives
    softmax: _Softmax, scale: float, q: Tensor, k: Tensor, v: Tensor, g: Tensor, a_q: Tensor, a_k: Tensor, a_v: Tensor
) -> Sequence[Tensor]:
    """Return the gradients with respect to q, k, v and g of Σ ⟨a, gradient⟩ over the gradients of `_gradients`.

    Let A and G be the changes of scores and P along a and g, minus their means under P. The gradient with respect to
    the scores is P ∘ G, and its derivative is that of ⟨A ∘ G, P⟩.
    """
    p = softmax(q, k)
    tangent_scores = _add_product(a_q @ k.mT, q, a_k.mT).mul_(scale)
    grad_p = g @ v.mT
    tangent_p, grad_scores = _through_softmax(tangent_scores, p), _through_softmax(grad_p, p) * scale
    of_scores = (tangent_scores - _row_sum(p, tangent_scores)) * (grad_p - _row_sum(p, grad_p))
    of_scores = _through_softmax(_add_product(of_scores, g, a_v.mT), p) * scale
    return (
        _add_product(of_scores @ k, grad_scores, a_k),
        _add_product(of_scores.mT @ q, grad_scores.mT, a_q),
        tangent_p.mT @ g,
        _add_product(p @ a_v, tangent_p, v),
    )
