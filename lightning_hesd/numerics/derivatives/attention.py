"""Attention, with second derivatives that are cheap for short contexts and take memory linear in long ones.

For each head o = P v with P = softmax(scale · q kᵀ + mask), a row for each query. For short contexts P and its gradient
stay in the graph of the gradient. For long ones nothing stays but q, k, v and the gradient on o. Every derivative
computes the scores again, in blocks of rows, which suffices: a row of P belongs to one query, and what a derivative
gives for keys and values is a sum over the queries. As the derivative of such a function is one again, this goes on to
every order: a gradient penalty takes no more memory than its loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_hesd.numerics.derivatives.autograd_functions import differentiate, row_sum

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCK = 2**18
"""Scores in a block on the CPU, where intermediate results of this size stay in the cache."""

_BLOCK_ELSEWHERE = 2**24
"""Scores in a block on accelerators, which need large operations."""

_MIN_ROWS = 16
"""Rows in a block at least: with fewer, matrix products are slow."""


def short_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool) -> Tensor:
    """Return softmax(scale · query keyᵀ) value, for three tensors of shape (batch, tokens, width)."""
    return _ShortAttention.apply(query, key, value, scale, causal)  # type: ignore[no-any-return, no-untyped-call]


class _ShortAttention(Function):
    """o = P v with P = softmax(scale · q kᵀ)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        q, k, v, scale, causal = inputs
        probabilities = _probabilities(q, k, scale, causal=causal)
        ctx.save_for_backward(q, k, v, probabilities)
        ctx.options = scale, causal
        attended: Tensor = probabilities @ v
        return attended

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        of_inputs = _ShortAttentionBackward.apply(gradient, *ctx.saved_tensors, ctx.options)  # type: ignore[no-untyped-call]
        return *of_inputs, None, None


class _ShortAttentionBackward(Function):
    """The gradients of o = P v with respect to q, k and v."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Any) -> Any:
        q, k, v, probabilities, (scale, _) = inputs
        of_probabilities = gradient @ v.mT
        of_scores = _through_softmax(of_probabilities, probabilities) * scale
        ctx.save_for_backward(gradient, q, k, v, probabilities, of_probabilities, of_scores)
        ctx.options = inputs[-1]
        return of_scores @ k, of_scores.mT @ q, probabilities.mT @ gradient

    @staticmethod
    def backward(ctx: Any, along_q: Tensor, along_k: Tensor, along_v: Tensor) -> Any:
        gradient, q, k, v, probabilities, of_probabilities, of_scores = ctx.saved_tensors
        scale, causal = ctx.options
        if torch.is_grad_enabled():

            def gradients(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
                probabilities = _probabilities(q, k, scale, causal=causal)
                of_scores = _through_softmax(gradient @ v.mT, probabilities) * scale
                return [of_scores @ k, of_scores.mT @ q, probabilities.mT @ gradient]

            along = along_q, along_k, along_v
            return *differentiate(gradients, (gradient, q, k, v), along), None, None
        along_scores = torch.baddbmm(along_q @ k.mT, q, along_k.mT, beta=scale, alpha=scale)
        along_probabilities = _through_softmax(along_scores, probabilities)
        # The gradient on the scores is P ∘ (Q - rows of P ∘ Q) with Q the one on P; this differentiates it by P.
        turn = along_scores * (of_probabilities - row_sum(probabilities, of_probabilities))
        turn.addcmul_(row_sum(probabilities, along_scores), of_probabilities, value=-1).baddbmm_(gradient, along_v.mT)
        turn = _through_softmax(turn, probabilities).mul_(scale)
        return (
            torch.baddbmm(probabilities @ along_v, along_probabilities, v),
            torch.baddbmm(turn @ k, of_scores, along_k),
            torch.baddbmm(turn.mT @ q, of_scores.mT, along_q),
            along_probabilities.mT @ gradient,
            None,
            None,
        )


def _probabilities(q: Tensor, k: Tensor, scale: float, *, causal: bool) -> Tensor:
    scores = q @ k.mT * scale
    if causal:
        scores = scores.masked_fill(scores.new_ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.softmax(scores, -1)


def _through_softmax(gradient: Tensor, probabilities: Tensor) -> Tensor:
    """Return the gradient with respect to what the softmax takes, given that with respect to what it gives."""
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
        mask: What is added to the scores, or whether a score counts, without gradient; it broadcasts with them.
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
        together = (*heads[:-2], heads[-2:].numel()) if grouped else heads
        mask = mask.expand(*together, q.shape[-2], k.shape[-2])
        mask = mask.unflatten(-3, heads[-2:]) if grouped else mask  # type: ignore[no-untyped-call]
    (attended,) = _LongAttention.apply(0, _Scores(scale, causal), mask, q, k, v)  # type: ignore[no-untyped-call]
    return (attended.flatten(-4, -3) if grouped else attended).to(dtype)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Scores:
    """How scores come from queries and keys.

    Attributes:
        scale: Their factor.
        causal: Whether query i attends to the keys up to i only.
    """

    scale: float
    causal: bool

    def blocks(self, queries: int, keys: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
        """Yield ranges of queries, each with the range of keys to which they attend."""
        size = _BLOCK if device.type == "cpu" else _BLOCK_ELSEWHERE
        rows = max(_MIN_ROWS, size // max(1, keys))
        for start in range(0, queries, rows):
            stop = min(start + rows, queries)
            yield slice(start, stop), slice(0, min(stop, keys) if self.causal else keys)

    def probabilities(self, q: Tensor, k: Tensor, mask: Tensor | None, start: int) -> Tensor:
        """Return rows of P for a head's queries from `start` on."""
        scores = (q * self.scale) @ k.mT
        if self.causal:
            recent = scores[:, start:]
            recent.masked_fill_(torch.ones_like(recent, dtype=torch.bool).triu(1), -torch.inf)
        if mask is None:
            return torch.softmax(scores, -1)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return torch._safe_softmax(scores, -1)  # noqa: SLF001 - zeros where all is masked, as PyTorch's attention has it


class _LongAttention(Function):
    """Attention (order 0) or one of its derivatives: the gradient of the order before, times a factor for each result.

    A function takes what the one before takes, and the factors. It gives the gradients on what the one before takes.
    """

    @staticmethod
    def forward(ctx: Any, order: int, scores: _Scores, mask: Tensor | None, *inputs: Tensor) -> Any:
        ctx.save_for_backward(mask, *inputs)
        ctx.order, ctx.scores = order, scores
        return _in_blocks(order, scores, mask, inputs)

    @staticmethod
    def backward(ctx: Any, *along: Tensor) -> Any:
        mask, *inputs = ctx.saved_tensors
        derivatives = _LongAttention.apply(ctx.order + 1, ctx.scores, mask, *inputs, *along)  # type: ignore[no-untyped-call]
        return None, None, None, *derivatives


def _in_blocks(order: int, scores: _Scores, mask: Tensor | None, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Evaluate the derivative of an order, head by head and block by block."""
    q, k, v, *_ = inputs
    inputs_of_queries, results_of_queries = _of_queries(order)
    shapes = [i.shape for i in inputs[: len(results_of_queries)]] if order else [(*q.shape[:-1], v.shape[-1])]
    results = tuple(q.new_zeros(shape) for shape in shapes)
    for head in itertools.product(*map(range, q.shape[:-2])):
        for rows, columns in scores.blocks(q.shape[-2], k.shape[-2], q.device):

            def softmax(q: Tensor, k: Tensor, head: Any = head, rows: slice = rows, columns: slice = columns) -> Tensor:
                part = None if mask is None else mask[head][rows, columns]
                return scores.probabilities(q, k, part, rows.start)

            given = [
                i[head][rows if is_query else columns] for i, is_query in zip(inputs, inputs_of_queries, strict=True)
            ]
            found = _derivative(order)(softmax, scores.scale, *given)
            for result, part, is_query in zip(results, found, results_of_queries, strict=True):
                result[head][rows if is_query else columns] += part
    return results


def _of_queries(order: int) -> tuple[Sequence[bool], Sequence[bool]]:
    """Return which inputs and which results of a derivative have a row for each query; the others, for each key."""
    inputs: Sequence[bool] = (True, False, False)
    results: Sequence[bool] = (True,)
    for _ in range(order):
        inputs, results = (*inputs, *results), inputs
    return inputs, results


_Softmax = Callable[[Tensor, Tensor], Tensor]
"""The rows of P for some queries and the keys to which they attend."""


def _derivative(order: int) -> Callable[..., Sequence[Tensor]]:
    """Return the derivative of an order, for a block of one head's queries."""
    written_out = (_attended, _gradients, _products)
    return written_out[order] if order < len(written_out) else _automatic(order)


def _automatic(order: int) -> Callable[..., Sequence[Tensor]]:
    """Return the derivative that PyTorch finds for the one before."""
    count = len(_of_queries(order - 1)[0])
    function = _derivative(order - 1)

    def derivative(softmax: _Softmax, scale: float, *inputs: Tensor) -> Sequence[Tensor]:
        is_differentiated = torch.is_grad_enabled()
        with torch.enable_grad():
            # An input may depend on another; views cut that path, which is the business of the graph outside.
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
    """Return the gradients of ⟨g, o⟩ on q, k and v."""
    p = softmax(q, k)
    of_scores = _through_softmax(g @ v.mT, p) * scale
    return of_scores @ k, of_scores.mT @ q, p.mT @ g


def _products(  # noqa: PLR0917 - the order of all derivatives
    softmax: _Softmax, scale: float, q: Tensor, k: Tensor, v: Tensor, g: Tensor, a_q: Tensor, a_k: Tensor, a_v: Tensor
) -> Sequence[Tensor]:
    """Return the gradients on q, k, v and g of the sum of ⟨a, gradient⟩ over the gradients on q, k and v.

    With A and G the changes of scores and P along a and g, less their means over P, the gradient on the scores is
    P ∘ G, and its derivative that of ⟨A ∘ G, P⟩.
    """
    p = softmax(q, k)
    along_scores = torch.addmm(a_q @ k.mT, q, a_k.mT).mul_(scale)
    of_p = g @ v.mT
    along_p, of_scores = _through_softmax(along_scores, p), _through_softmax(of_p, p) * scale
    turn = (along_scores - row_sum(p, along_scores)) * (of_p - row_sum(p, of_p))
    turn = _through_softmax(torch.addmm(turn, g, a_v.mT), p) * scale
    return (
        torch.addmm(turn @ k, of_scores, a_k),
        torch.addmm(turn.mT @ q, of_scores.mT, a_q),
        along_p.mT @ g,
        torch.addmm(p @ a_v, along_p, v),
    )
