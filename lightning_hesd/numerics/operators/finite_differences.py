"""Products with a Hessian by central differences of the gradient: Hv ≈ (g(w + hv) − g(w − hv)) / 2h."""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lightning_hesd.numerics.derivatives.graphs import GraphFacts
from lightning_hesd.numerics.krylov.vectors import norm_of
from lightning_hesd.numerics.operators.curvature import EVERYTHING, gradient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from lightning_hesd.numerics.krylov.vectors import VectorSpace
    from lightning_hesd.numerics.operators.curvature import Matvec, Vector

LADDER_FACTOR = 4.0
"""Ratio of neighboring steps in the search for the best step."""

LADDER_RUNGS = 10
"""Largest number of steps in the search."""

ERROR_MARGIN = 4.0
"""Error stated for all products, relative to that of the one product in the search."""


@dataclass
class FiniteDifferences:
    """Products by central differences of the gradient: two gradients each, of any loss that has a gradient.

    The parameters are moved in place, so that compiled, scripted and custom code uses the moved values, and restored
    bit by bit. Changes by the function itself (an embedding with `max_norm`) are undone.

    Attributes:
        parameters: The analyzed parameters.
        space: The space of vectors over them.
        blocks: Diagonal blocks to compute, each a range of the parameters.
        step: Distance h by which the parameters are moved along the vector, to either side.
        facts: Facts about the graph of the function; constant rows of embeddings are not moved.
    """

    parameters: Sequence[Tensor]
    space: VectorSpace
    blocks: Sequence[slice] = (EVERYTHING,)
    step: float = 0.0
    facts: GraphFacts = field(default_factory=GraphFacts, kw_only=True)
    _versions: list[int] = field(init=False)
    _lengths: dict[int, tuple[weakref.ref[Tensor], float]] = field(default_factory=dict, init=False)

    @functools.cached_property
    def _originals(self) -> list[Tensor]:
        """Values of the parameters after a first evaluation, as `max_norm` changes those of embeddings."""
        self._versions = [p._version for p in self.parameters]  # noqa: SLF001 - how often each was written to
        return [p.detach().clone() for p in self.parameters]

    @property
    def size(self) -> float:
        """Norm of all parameters."""
        return self._length(self._originals)

    @contextlib.contextmanager
    def displaced(self, vector: Vector, distance: float, block: slice = EVERYTHING) -> Iterator[None]:
        """Move the parameters of a block along a vector, and restore them bit by bit on leaving."""
        pairs = zip(self.parameters[block], self._originals[block], vector, strict=True)
        try:
            self._put_back(self._written())
            for p, original, direction in pairs:
                if direction is not None:
                    torch.add(original, direction, alpha=distance, out=p.data)
            yield
        finally:
            self._put_back([*range(len(self.parameters))[block], *self._written()])
            self.space.parameters_moved()

    def make_matvec(self, function: Callable[[], Tensor]) -> Matvec:
        """Return the product with the Hessian of a function of the parameters, a scalar, at the present `step`."""

        def matvec(vector: Vector) -> Vector:
            result: list[Tensor | None] = [None] * len(self.parameters)
            for block in self.blocks:
                result[block] = self._block_product(function, block, vector[block])
            return result

        return matvec

    def _block_product(self, function: Callable[[], Tensor], block: slice, vector: Vector) -> list[Tensor | None]:
        length = self._known_length(block.start or 0, [v for v in vector if v is not None])
        if not length:
            return [None] * len(vector)
        vector = self.facts.without_constant_rows(vector, self.parameters[block])
        with self.displaced(vector, self.step / length, block):
            ahead = self._gradient(function, block)
        with self.displaced(vector, -self.step / length, block):
            behind = self._gradient(function, block)
        return [a.sub_(b).div_(2 * self.step / length) for a, b in zip(ahead, behind, strict=True)]

    def _gradient(self, function: Callable[[], Tensor], block: slice) -> list[Tensor]:
        if not self.facts.custom:
            return gradient(function(), self.parameters[block])
        # A backward pass that accumulates by itself runs only where gradients of other parameters need it.
        return gradient(function(), self.parameters)[block]

    def _known_length(self, key: int, tensors: Sequence[Tensor]) -> float:
        """Return the norm of a vector in a block; it is read once for the products of all batches with the vector."""
        if not tensors:
            return 0.0
        known, length = self._lengths.get(key, (None, 0.0))
        if known is None or known() is not tensors[0]:
            length = self._length(tensors)
            self._lengths[key] = weakref.ref(tensors[0]), length
        return length

    def _length(self, tensors: Sequence[Tensor]) -> float:
        """Return the norm of a vector, given this rank's tensors of it; the device is read once."""
        norms = torch.stack([norm_of(tensor) for tensor in tensors]).tolist() if tensors else []
        return math.sqrt(self.space.total(math.fsum(norm**2 for norm in norms)))

    def choose_step(self, matvec: Callable[[Tensor], Tensor], vector: Tensor, known: float | None = None) -> float:
        """Choose the step that balances the truncation error, which falls with the step, and rounding, which grows.

        From a long step downward, each a quarter of the one before, the products of two neighboring steps differ by the
        truncation error of the longer step and the rounding error of the shorter one. Where they differ least, the
        difference is the error of the shorter. Two products first turn the test vector towards directions of extreme
        curvature, where truncation is worst.

        Args:
            matvec: The product with the whole Hessian, at the present `step`.
            vector: A random vector, shape (n,).
            known: Step chosen for earlier weights, near which the search begins.

        Returns:
            Norm of the error of a product with a unit vector; 0 if all products are zero or not finite.
        """
        epsilon = max(torch.finfo(p.dtype).eps for p in self.parameters)
        self.step = known or max(self.size, 1.0) * epsilon ** (1 / 3) / LADDER_FACTOR
        for _ in range(2):
            vector = matvec(vector / self.space.norm(vector))
        norm = self.space.norm(vector)
        if not 0 < float(norm) < math.inf:
            return 0.0  # no curvature, or a failure, which the first product will show
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

    def _written(self) -> list[int]:
        """Return the positions of parameters that the function itself has changed."""
        return [i for i, p in enumerate(self.parameters) if p._version != self._versions[i]]  # noqa: SLF001

    def _put_back(self, indices: Iterable[int]) -> None:
        for i in indices:
            self.parameters[i].data.copy_(self._originals[i])
            self._versions[i] = self.parameters[i]._version  # noqa: SLF001
