"""Products with a Hessian as central differences of the gradient, where there is no second derivative."""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lightning_hesd.numerics.krylov.vectors import norm_of
from lightning_hesd.numerics.operators.curvature import EVERYTHING, gradient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from lightning_hesd.numerics.krylov.vectors import VectorSpace
    from lightning_hesd.numerics.operators.curvature import Matvec, Vector

LADDER_FACTOR = 4.0
"""Ratio of neighbouring steps in the search for the best step of central differences."""

LADDER_RUNGS = 10

ERROR_MARGIN = 4.0
"""The search sees one sample of the rounding; this many times as much is stated for all products."""


@dataclass
class FiniteDifferences:
    """Products by central differences of the gradient: two gradients each, and nothing else is needed of the loss.

    The parameters are moved in place and put back bit by bit, so that compiled, scripted and custom code sees them.
    What the function itself writes to them (an embedding with `max_norm`) is undone.

    Attributes:
        parameters: The analyzed parameters.
        space: The space of vectors over them.
        blocks: The diagonal blocks that are wanted, each a range of the parameters.
        step: How far they are moved along the vector, to either side.
    """

    parameters: Sequence[Tensor]
    space: VectorSpace
    blocks: Sequence[slice] = (EVERYTHING,)
    step: float = 0.0
    _versions: list[int] = field(init=False)

    @functools.cached_property
    def _originals(self) -> list[Tensor]:
        """Where the parameters belong: where a first evaluation left them, for `max_norm` moves those of embeddings."""
        self._versions = [p._version for p in self.parameters]  # noqa: SLF001 - how often each was written to
        return [p.detach().clone() for p in self.parameters]

    @property
    def size(self) -> float:
        """Norm of all parameters."""
        return self._length(self._originals)

    @contextlib.contextmanager
    def displaced(self, vector: Vector, distance: float, block: slice = EVERYTHING) -> Iterator[None]:
        """Move the parameters of a block along a vector, and put them back bit by bit."""
        pairs = zip(self.parameters[block], self._originals[block], vector, strict=True)
        try:
            self._put_back(self._written())
            for p, original, part in pairs:
                if part is not None:
                    torch.add(original, part, alpha=distance, out=p.data)
            yield
        finally:
            self._put_back([*range(len(self.parameters))[block], *self._written()])

    def make_matvec(self, function: Callable[[], Tensor]) -> Matvec:
        """Return the product with the Hessian of a function of the parameters, a scalar, at the present `step`."""

        def matvec(vector: Vector) -> Vector:
            result: list[Tensor | None] = [None] * len(self.parameters)
            for block in self.blocks:
                result[block] = self._block_product(function, block, vector[block])
            return result

        return matvec

    def _block_product(self, function: Callable[[], Tensor], block: slice, vector: Vector) -> list[Tensor | None]:
        length = self._length([v for v in vector if v is not None])
        if not length:
            return [None] * len(vector)
        with self.displaced(vector, self.step / length, block):
            ahead = self.gradient(function, block)
        with self.displaced(vector, -self.step / length, block):
            behind = self.gradient(function, block)
        return [a.sub_(b).div_(2 * self.step / length) for a, b in zip(ahead, behind, strict=True)]

    def _length(self, parts: Sequence[Tensor]) -> float:
        """Return the norm of a vector, given its parts in this process; the computer waits for the device once."""
        norms = torch.stack([norm_of(part) for part in parts]).tolist() if parts else []
        return math.sqrt(self.space.total(math.fsum(norm**2 for norm in norms)))

    def choose_step(self, matvec: Callable[[Tensor], Tensor], vector: Tensor, known: float | None = None) -> float:
        """Choose the step that balances truncation, which falls with the step, against rounding, which grows.

        From a long step downward, each a quarter of the one before, products of neighbouring steps differ by the
        truncation of the longer and the rounding of the shorter; where they differ least, that difference is the error
        of the shorter. The test vector is made rich in the directions of extreme curvature, where truncation is worst.

        Args:
            matvec: The product with the whole Hessian, at the present `step`.
            vector: A random vector, shape (n,).
            known: The step found for other weights: the search begins near it.

        Returns:
            Norm of the error of a product with a unit vector; 0 where there is nothing to measure.
        """
        epsilon = max(torch.finfo(p.dtype).eps for p in self.parameters)
        self.step = known or max(self.size, 1.0) * epsilon ** (1 / 3) / LADDER_FACTOR
        for _ in range(2):
            vector = matvec(vector / self.space.norm(vector))
        norm = self.space.norm(vector)
        if not 0 < float(norm) < math.inf:
            return 0.0  # no curvature, or a failure, which the first product will tell
        vector /= norm

        best = (math.inf, self.step)
        self.step *= LADDER_FACTOR if known else LADDER_FACTOR**2
        previous = matvec(vector)
        for _ in range(LADDER_RUNGS):
            self.step /= LADDER_FACTOR
            product = matvec(vector)
            gap = float(self.space.norm(product - previous))
            best = min(best, (gap, self.step))
            if gap > 2 * best[0]:
                break
            previous = product
        gap, self.step = best
        return ERROR_MARGIN * gap

    def gradient(self, function: Callable[[], Tensor], block: slice = EVERYTHING) -> list[Tensor]:
        """Return the gradient of a function of the parameters at their present values, by default by all of them."""
        return gradient(function(), self.parameters[block])

    def _written(self) -> list[int]:
        """Return the positions of parameters that the function itself has written to: moving them does not count."""
        return [i for i, p in enumerate(self.parameters) if p._version != self._versions[i]]  # noqa: SLF001

    def _put_back(self, indices: Iterable[int]) -> None:
        for i in indices:
            self.parameters[i].data.copy_(self._originals[i])
            self._versions[i] = self.parameters[i]._version  # noqa: SLF001
