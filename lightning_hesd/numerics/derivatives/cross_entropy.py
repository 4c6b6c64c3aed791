"""Cross-entropy with class labels, whose second derivative stores one tensor of the size of the logits.

The loss of a row of logits z with target q (one nonnegative entry per class) is -Σ_c q_c log p_c with p = softmax(z).
With Q = Σ_c q_c and the gradient u with respect to the loss, the gradient with respect to z is

    g = u (Q p - q),

whose derivative along a is uQ (p ∘ a - p ⟨p, a⟩). As uQ p = g + u q, this needs only g, which the previous layer stores
anyway, and neither logits nor probabilities. After a linear layer PyTorch stores three tensors of this size, and an HVP
takes five more; here one is stored, and an HVP takes two more. All other intermediate results are computed in chunks of
rows.
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
"""Logits per chunk on the CPU, where intermediate results of this size fit into the cache."""

_CHUNK_ELSEWHERE = 2**24
"""Logits per chunk on accelerators, which need large operations."""


@dataclass(frozen=True)
class Labels:
    """The targets of rows of logits.

    Attributes:
        classes: The class of each row, shape (rows,) or (rows, positions).
        weight: Weights of the classes, shape (classes,); None: all are 1.
        ignored: Class whose rows do not count.
        smoothing: Share of the target that is spread over all classes.
    """

    classes: Tensor
    weight: Tensor | None
    ignored: int
    smoothing: float

    def losses(self, z: Tensor) -> Tensor:
        """Return the loss of each row, 0 for ignored rows."""
        return F.cross_entropy(
            z, self.classes, self.weight, ignore_index=self.ignored, reduction="none", label_smoothing=self.smoothing
        )

    def total_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the sum of the weights of the rows' classes, a scalar."""
        counted = self.classes != self.ignored
        if self.weight is None:
            return counted.sum().to(dtype)
        return self.weight[self.classes.where(counted, 0)].where(counted, 0).sum()

    def rows(self, rows: slice) -> Labels:
        """Return the labels of some rows."""
        return Labels(self.classes[rows], self.weight, self.ignored, self.smoothing)

    def sums(self, z: Tensor) -> Tensor:
        """Return Q of each row, in a shape that broadcasts with the logits."""
        _, label_entry, common_entry, weight = self._entries(z)
        return label_entry + common_entry * weight.sum().mul(z.shape[1] / weight.numel())

    def add_to(self, z: Tensor, factor: Tensor) -> Tensor:
        """Return z + factor · q."""
        index, label_entry, common_entry, weight = self._entries(z)
        if self.smoothing:
            z = z + factor * common_entry * weight
        return z.scatter(1, index, z.gather(1, index) + factor * label_entry)

    def dot(self, z: Tensor) -> Tensor:
        """Return ⟨q, z⟩ of each row."""
        index, label_entry, common_entry, weight = self._entries(z)
        result = z.gather(1, index) * label_entry
        return result + (z * weight).sum(1, keepdim=True) * common_entry if self.smoothing else result

    def _entries(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the classes of the rows, and q as an entry for these plus one for all classes times a weight."""
        counted = (self.classes != self.ignored).unsqueeze(1)
        index = self.classes.unsqueeze(1).where(counted, 0)
        scale = counted.to(z.dtype)
        weight = z.new_ones(1) if self.weight is None else self.weight
        label_entry = scale * (1 - self.smoothing)
        if self.weight is not None:
            label_entry = label_entry * self.weight[index]
        common_entry = scale * (self.smoothing / z.shape[1])
        return index, label_entry, common_entry, weight.view(-1, *[1] * (z.ndim - 2))


def cross_entropy(z: Tensor, labels: Labels) -> Tensor:
    """Return the loss of each row of logits, for logits of shape (rows, classes) or (rows, classes, positions)."""
    return _CrossEntropy.apply(z, labels)  # type: ignore[no-any-return, no-untyped-call]


class _CrossEntropy(Function):
    """-Σ_c q_c log p_c, with p = softmax(z)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, labels: Labels) -> Tensor:
        ctx.save_for_backward(z)
        ctx.labels = labels
        losses = [labels.rows(rows).losses(z[rows]) for rows in _chunks(z)]
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
            part = labels.rows(rows)
            probabilities = torch.softmax(z[rows], 1)
            g[rows] = part.add_to(probabilities.mul_(u[rows] * part.sums(z[rows])), -u[rows])
        # g determines p except where u is 0, and there only the derivative with respect to u depends on p.
        ctx.save_for_backward(u, z if ctx.needs_input_grad[0] else g)
        ctx.labels = labels
        return g

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> Any:
        u, saved = ctx.saved_tensors
        needs_u, needs_z, _ = ctx.needs_input_grad

        def derivatives(rows: slice) -> tuple[Tensor | None, Tensor | None]:
            labels, a, u_rows = ctx.labels.rows(rows), tangent[rows], u[rows]
            sums = labels.sums(a)
            if needs_u:
                probabilities = torch.softmax(saved[rows], 1)
                weighted = probabilities * a
                mean = weighted.sum(1, keepdim=True)
                grad_z = (weighted - probabilities * mean) * (u_rows * sums) if needs_z else None
                return sums * mean - labels.dot(a), grad_z
            scale = u_rows * sums
            scaled = labels.add_to(saved[rows], u_rows)
            weighted = scaled * a
            return None, weighted - scaled * (weighted.sum(1, keepdim=True) / scale.where(scale != 0, 1))

        if torch.is_grad_enabled():  # for a loss that contains derivatives
            return *derivatives(slice(None)), None
        grad_u = torch.empty_like(u) if needs_u else None
        grad_z = torch.empty_like(saved) if needs_z else None
        for rows in _chunks(saved):
            for whole, part in zip((grad_u, grad_z), derivatives(rows), strict=True):
                if whole is not None and part is not None:
                    whole[rows] = part
        return grad_u, grad_z, None


def _chunks(z: Tensor) -> Iterator[slice]:
    """Yield ranges of rows, with about as many logits as suit the device."""
    chunk = _CHUNK if z.device.type == "cpu" else _CHUNK_ELSEWHERE
    length = max(1, chunk // max(1, z[:1].numel()))
    for start in range(0, len(z), length):
        yield slice(start, start + length)
