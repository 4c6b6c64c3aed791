"""Loss, gradient and outputs along one line through the weights, and comparisons of derivatives with differences."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_hesd.numerics.devices import finest_dtype, to_device
from lightning_hesd.numerics.krylov.vectors import in_shape
from lightning_hesd.numerics.operators.curvature import gradient
from lightning_hesd.numerics.operators.finite_differences import FiniteDifferences

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.krylov.vectors import VectorSpace
    from lightning_hesd.numerics.operators.curvature import CurvatureMatrix, GaussNewtonMatrix, Vector

Outcome = Literal["agrees", "differs", "undecided"]

SETTLED = 0.3
"""Two estimates that differ by less than this share of their distance from the claim refute it.

From one step to the next the truncation error of a smooth function falls by far more.
"""

MOVE = 1e-3
"""Distance from weights that may lie at a kink, relative to their size."""


@contextlib.contextmanager
def beside_the_weights(parameters: Sequence[Tensor], space: VectorSpace, move: float = MOVE) -> Iterator[None]:
    """Move parameters a little in a random direction, and back on leaving; `move` is relative to their size."""
    differences = FiniteDifferences(parameters, space)
    noise = space.gaussian(torch.Generator().manual_seed(2))
    vector = to_device(noise / space.norm(noise), parameters[0].device)
    with differences.displaced(in_shape(vector, parameters), move * max(differences.size, 1.0)):
        yield


class Line:
    """The loss and its gradient along one line through the weights.

    Vectors in float64 count twice in the memory of an analysis, so none is kept that is not needed.

    Attributes:
        differences: Central differences, which move the parameters.
        direction: Unit vector, half random and half gradient, shape (n,), in the finest precision of the device; zero
            for constant rows of embeddings.
        loss: Loss at the weights.
        length: Norm of the gradient at the weights.
        slope: Component of that gradient along the direction.
    """

    def __init__(self, matrix: CurvatureMatrix, batch: WeightedBatch, space: VectorSpace) -> None:
        self._parameters, self._space = matrix.parameters, space
        self._function = matrix.function(batch)
        self.differences = FiniteDifferences(matrix.parameters, space)
        device = matrix.parameters[0].device
        self._dtype = finest_dtype(device)
        self.direction = space.gaussian(torch.Generator().manual_seed(1)).to(device, self._dtype)
        self.direction /= space.norm(self.direction)
        with self.differences.displaced(self.vector(), 0.0):
            loss = self._function()
            matrix.facts.add([loss])
            self.loss, gradient_here = loss.item(), self.flat(gradient(loss, matrix.parameters))
        self.length = self.norm(gradient_here)
        if 0 < self.length < math.inf:
            self.direction.add_(gradient_here, alpha=1 / self.length)
        if matrix.facts.has_constant_rows:
            self.direction = self.flat(matrix.facts.without_constant_rows(self.vector(), matrix.parameters))
        self.direction /= space.norm(self.direction)
        self.slope = self.along(gradient_here)

    def loss_at(self, step: float) -> float:
        """Return the loss at a distance along the direction."""
        with self.differences.displaced(self.vector(), step):
            return self._function().item()

    def at(self, step: float) -> tuple[float, Tensor]:
        """Return loss and gradient, shape (n,), at a distance along the direction."""
        with self.differences.displaced(self.vector(), step):
            loss = self._function()
            return loss.item(), self.flat(gradient(loss, self._parameters))

    def vector(self) -> list[Tensor]:
        """Return the direction in the shapes of the parameters."""
        return in_shape(self.direction, self._parameters)

    def flat(self, vector: Vector) -> Tensor:
        """Return a vector in the shapes of the parameters as a flat one, shape (n,); a list is emptied on the way.

        So the vector does not exist twice.
        """
        rest = vector if isinstance(vector, list) else list(vector)
        sizes = [p.numel() for p in self._parameters]
        flat = torch.zeros(sum(sizes), dtype=self._dtype, device=self._parameters[0].device)
        for piece in reversed(torch.split(flat, sizes)):
            tensor = rest.pop()
            if tensor is not None:
                piece.copy_(tensor.detach().to_dense().flatten())
        return flat

    def norm(self, vector: Tensor) -> float:
        """Return the norm of a flat vector."""
        return float(self._space.norm(vector))

    def along(self, vector: Tensor) -> float:
        """Return the component of a flat vector along the direction."""
        return float(self._space.dot(vector, self.direction))


def output_bend(matrix: GaussNewtonMatrix, batch: WeightedBatch, line: Line, step: float, far: float) -> float:
    """Return vᵀGv for the direction v of a line: the second difference of the loss of the outputs along Jv.

    Jv, the change of the outputs along the line, is taken by differences of length `step`; the second difference
    reaches `far` to both sides.
    """

    def outputs(distance: float) -> list[Any]:
        with line.differences.displaced(line.vector(), distance):
            return matrix.values(batch)

    change = [
        (a - b) / (2 * step) if isinstance(a, Tensor) and a.is_floating_point() else None
        for a, b in zip(outputs(step), outputs(-step), strict=True)
    ]
    up, at, down = (matrix.loss_near(batch, change, distance) for distance in (far, 0.0, -far))
    return (up - 2 * at + down) / far**2


class Comparison:
    """A claimed value, and estimates of it at descending steps.

    Args:
        claim: A number or a vector.
        tolerance: Largest relative distance at which claim and estimate agree.
        size: Absolute value of a number, or norm of a vector.
        scale: Unit of relative distances; default: the larger size of claim and estimate.

    Attributes:
        gap: Smallest relative distance of an estimate from the claim so far.
    """

    def __init__(self, claim: Any, tolerance: float, size: Callable[[Any], float], scale: float | None = None) -> None:
        self.gap = math.inf
        self._claim, self._tolerance, self._size, self._scale = claim, tolerance, size, scale
        self._before: Any = None  # the last estimate whose rounding error is small enough
        self._distance = math.inf  # of that from the claim
        self._agrees = self._has_settled = self._has_moved = False

    def add(self, value: Any, rounding: float) -> None:
        """Add the estimate at the next step, with its absolute rounding error."""
        scale = max(self._size(self._claim), self._size(value)) if self._scale is None else self._scale
        change = math.inf if self._before is None else self._size(value - self._before)
        if not math.isfinite(scale) or rounding > self._tolerance * scale:
            if self._before is not None:  # coarse as the value is, it may tell whether the last estimate had settled
                self._has_settled |= change + rounding <= SETTLED * self._distance
                self._has_moved |= change > SETTLED * self._distance + rounding
            return
        self._before = value
        self._distance = self._size(value - self._claim)
        self._agrees |= self._distance <= self._tolerance * scale + rounding
        self._has_settled = change <= SETTLED * self._distance
        self.gap = min(self.gap, self._distance / scale if scale else 0.0)

    @property
    def is_hidden(self) -> bool:
        """Whether the rounding error is too large at every step."""
        return self._before is None

    @property
    def outcome(self) -> Outcome:
        """Whether the claim agrees with an estimate, or is far from the last two, which lie close together.

        Otherwise kinks or rounding hide the answer.
        """
        if self._agrees:
            return "agrees"
        return "differs" if self._has_settled and not self._has_moved else "undecided"
