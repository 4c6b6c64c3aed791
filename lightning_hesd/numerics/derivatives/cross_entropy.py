"""Cross-entropy with class labels, with second derivatives that hold one tensor of the logits' size.

The loss of a row of logits z with target q (one entry per class, nonnegative) is -Σ_c q_c log p_c with
p = softmax(z). With Q = Σ_c q_c and the gradient u on the loss, the gradient on z is

    g = u (Q p - q),

whose derivative along a is uQ (p ∘ a - p ⟨p, a⟩). As uQ p = g + u q, the gradient, which the layer before holds anyway,
is all that this needs: neither logits nor probabilities stay. Behind a linear layer PyTorch holds three tensors of this
size and takes five more for a product; here it is one, and two more for a product. Everything between them is computed
in chunks of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK = 2**19
"""Logits in a chunk on the CPU, where intermediate results of this size stay in the cache."""

_CHUNK_ELSEWHERE = 2**24
"""Logits in a chunk on accelerators, which need large operations."""


@dataclass(frozen=True)
class Labels:
    """The labels of rows of logits, and how the loss counts them.

    Attributes:
        classes: The class of each row, shape (rows,) or (rows, positions).
        weight: Weights of the classes, shape (classes,); None: all are 1.
        ignored: The class whose rows have no loss.
        smoothing: The share of the loss that is spread over all classes.
    """

    classes: Tensor
    weight: Tensor | None
    ignored: int
    smoothing: float

    def losses(self, z: Tensor) -> Tensor:
        """Return the loss of each row, 0 for those ignored."""
        return F.cross_entropy(
            z, self.classes, self.weight, ignore_index=self.ignored, reduction="none", label_smoothing=self.smoothing
        )

    def total_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the sum of the weights of the rows' classes, a scalar."""
        kept = self.classes != self.ignored
        if self.weight is None:
            return kept.sum().to(dtype)
        return self.weight[self.classes.where(kept, 0)].where(kept, 0).sum()

    def part(self, rows: slice) -> Labels:
        """Return the labels of some rows."""
        return Labels(self.classes[rows], self.weight, self.ignored, self.smoothing)

    def sums(self, z: Tensor) -> Tensor:
        """Return Q of each row, in a shape that goes with the logits."""
        _, of_label, of_all, weight = self._entries(z)
        return of_label + of_all * weight.sum().mul(z.shape[1] / weight.numel())

    def add_to(self, z: Tensor, factor: Tensor) -> Tensor:
        """Return a tensor like the logits plus factor · q."""
        index, of_label, of_all, weight = self._entries(z)
        if self.smoothing:
            z = z + factor * of_all * weight
        return z.scatter(1, index, z.gather(1, index) + factor * of_label)

    def dot(self, z: Tensor) -> Tensor:
        """Return ⟨q, z⟩ of each row."""
        index, of_label, of_all, weight = self._entries(z)
        result = z.gather(1, index) * of_label
        return result + (z * weight).sum(1, keepdim=True) * of_all if self.smoothing else result

    def _entries(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the rows' classes, and q as a number for these and one for all classes, times a weight."""
        kept = (self.classes != self.ignored).unsqueeze(1)
        index = self.classes.unsqueeze(1).where(kept, 0)
        scale = kept.to(z.dtype)
        weight = z.new_ones(1) if self.weight is None else self.weight
        of_label = scale * (1 - self.smoothing)
        if self.weight is not None:
            of_label = of_label * self.weight[index]
        of_all = scale * (self.smoothing / z.shape[1])
        return index, of_label, of_all, weight.view(-1, *[1] * (z.ndim - 2))


def cross_entropy(z: Tensor, labels: Labels) -> Tensor:
    """Return the loss of each row of logits, for logits of shape (rows, classes) or (rows, classes, positions)."""
    return _CrossEntropy.apply(z, labels)  # type: ignore[no-any-return, no-untyped-call]


class _CrossEntropy(Function):
    """-Σ_c q_c log p_c, with p = softmax(z)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, labels: Labels) -> Tensor:
        ctx.save_for_backward(z)
        ctx.labels = labels
        losses = [labels.part(rows).losses(z[rows]) for rows in _chunks(z)]
        return torch.cat(losses) if losses else labels.losses(z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _CrossEntropyBackward.apply(gradient.unsqueeze(1), *ctx.saved_tensors, ctx.labels), None  # type: ignore[no-untyped-call]


class _CrossEntropyBackward(Function):
    """g = u (Q p - q)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, z: Tensor, labels: Labels) -> Tensor:
        g = torch.empty_like(z)
        for rows in _chunks(z):
            part = labels.part(rows)
            probabilities = torch.softmax(z[rows], 1)
            g[rows] = part.add_to(probabilities.mul_(u[rows] * part.sums(z[rows])), -u[rows])
        # From g, p follows but where u is 0, and there only the derivative by u depends on p.
        ctx.save_for_backward(u, z if ctx.needs_input_grad[0] else g)
        ctx.labels = labels
        return g

    @staticmethod
    def backward(ctx: Any, along: Tensor) -> Any:
        u, saved = ctx.saved_tensors
        needs_u, needs_z, _ = ctx.needs_input_grad

        def derivatives(rows: slice) -> tuple[Tensor | None, Tensor | None]:
            labels, a, u_rows = ctx.labels.part(rows), along[rows], u[rows]
            sums = labels.sums(a)
            if needs_u:
                probabilities = torch.softmax(saved[rows], 1)
                turned = probabilities * a
                mean = turned.sum(1, keepdim=True)
                of_z = (turned - probabilities * mean) * (u_rows * sums) if needs_z else None
                return sums * mean - labels.dot(a), of_z
            scale = u_rows * sums
            scaled = labels.add_to(saved[rows], u_rows)
            turned = scaled * a
            return None, turned - scaled * (turned.sum(1, keepdim=True) / scale.where(scale != 0, 1))

        if torch.is_grad_enabled():  # for a loss that holds derivatives itself
            return *derivatives(slice(None)), None
        of_u = torch.empty_like(u) if needs_u else None
        of_z = torch.empty_like(saved) if needs_z else None
        for rows in _chunks(saved):
            for whole, part in zip((of_u, of_z), derivatives(rows), strict=True):
                if whole is not None and part is not None:
                    whole[rows] = part
        return of_u, of_z, None


def _chunks(z: Tensor) -> Iterator[slice]:
    """Yield the rows of a tensor in chunks of about as many numbers as its device works on best."""
    chunk = _CHUNK if z.device.type == "cpu" else _CHUNK_ELSEWHERE
    length = max(1, chunk // max(1, z[:1].numel()))
    for start in range(0, len(z), length):
        yield slice(start, start + length)
