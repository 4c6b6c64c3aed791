"""Extreme eigenpairs of a symmetric matrix that is known by its products only: thick-restart Lanczos with deflation.

Wu & Simon (2000): when the Krylov basis is full, it is replaced by the Ritz vectors nearest to the wanted ends of the
spectrum and the remainder vector, from which the run continues. A Krylov space holds one eigenvector of each eigenvalue
only. Therefore converged Ritz vectors are kept and a run from a random vector orthogonal to them follows, until one
finds nothing that lies further out: so multiple eigenvalues are found as often as they occur.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_hesd.numerics.krylov.vectors import euclidean_norm, inner_product, inner_products, normalized
from lightning_hesd.spectra.criteria import rounding_threshold

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Which = Literal["largest", "smallest", "both"]

MIN_BASIS = 40
"""Basis vectors between restarts, at least: with few, many products are spent on what a restart has thrown away."""

STEPS_BETWEEN_CHECKS = 4
"""Products between two eigendecompositions of the projected matrix."""

SAFETY = 4.0
"""Ritz residuals must be so many times smaller than the tolerance: keeping Ritz vectors adds a little to them."""


GUARD = 0.05
"""The first Ritz value that is not wanted must have a residual below this share of its distance from those that are.

With a larger one it may still be on its way outward, past them.
"""


class SymmetricOperator(Protocol):
    """A symmetric matrix, known by its products: a `HessianOperator`, or any object with these members."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and columns, (n, n)."""

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of vectors."""

    @property
    def device(self) -> torch.device:
        """Device of vectors."""

    def matvec(self, vector: Tensor, /) -> Tensor:
        """Return the product with a vector, shape (n,)."""


class Eigenpairs(NamedTuple):
    """Eigenvalues and eigenvectors, on the device and in the dtype of the operator.

    Attributes:
        values: Ritz values θ, shape (count,).
        vectors: Ritz vectors y, the columns, of unit length and orthogonal to each other, shape (n, count).
        residuals: Ritz residuals ‖Hy − θy‖, shape (count,), each from one more product: an eigenvalue of the matrix
            lies within the residual of each value.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


def top_eigenpairs(
    operator: SymmetricOperator,
    k: int,
    *,
    which: Which = "largest",
    seed: int = 0,
    tolerance: float | None = None,
    max_matvecs: int = 1000,
    basis_size: int | None = None,
) -> Eigenpairs:
    """Return extreme eigenvalues of a symmetric matrix with their eigenvectors.

    Args:
        operator: The matrix, such as a `HessianOperator`, which is entered if it is a context manager.
        k: Number of eigenpairs at each wanted end, at least 1.
        which: The largest eigenvalues by sign (not by size), descending; the smallest, ascending; or the k smallest and
            then the k largest ("both"), all ascending.
        seed: Seed of the start vectors.
        tolerance: Largest Ritz residual, relative to the norm of the matrix; default: the square root of the machine
            epsilon of the dtype (1.5e-8 in float64, 3.5e-4 in float32), at which the values of well separated
            eigenvalues are as good as rounding lets them be.
        max_matvecs: Largest number of products before the residuals are computed.
        basis_size: Vectors of length n that are kept; default: 3 for each eigenpair, and at least 40.

    Returns:
        values, vectors and residuals, of k eigenpairs or of 2k where `which` is "both". If the residuals do not meet
        the tolerance, a RuntimeWarning says so.

    Raises:
        ValueError: If an argument is out of range.
        ArithmeticError: If a product is NaN or infinite.

    Examples:
        >>> class Diagonal:
        ...     shape, dtype, device = (5, 5), torch.float64, torch.device("cpu")
        ...     def matvec(self, vector):
        ...         return torch.tensor([-1.0, 0.0, 2.0, 3.0, 3.0], dtype=torch.float64) * vector
        >>> values, vectors, residuals = top_eigenpairs(Diagonal(), 2)
        >>> values.round(decimals=6).tolist(), tuple(vectors.shape), bool(residuals.max() < 1e-7)
        ([3.0, 3.0], (5, 2), True)
    """
    n = operator.shape[0]
    if which not in ("largest", "smallest", "both"):
        msg = f"`which` must be 'largest', 'smallest' or 'both', got {which!r}."
        raise ValueError(msg)
    ends = 2 if which == "both" else 1
    if not isinstance(k, int) or not 1 <= k <= n // ends:
        msg = f"`k` must be a whole number between 1 and {n // ends} for a matrix of order {n}, got {k!r}."
        raise ValueError(msg)
    tolerance = torch.finfo(operator.dtype).eps ** 0.5 if tolerance is None else tolerance
    least = min(n, ends * k + 2)
    basis_size = min(n, max(3 * ends * k, MIN_BASIS) if basis_size is None else basis_size)
    if not tolerance > 0:
        msg = f"`tolerance` must be positive, got {tolerance}."
        raise ValueError(msg)
    if basis_size < least:
        msg = f"`basis_size` must be at least {least} for these eigenpairs, got {basis_size}."
        raise ValueError(msg)
    is_context = isinstance(operator, contextlib.AbstractContextManager)
    context: Any = operator if is_context else contextlib.nullcontext()
    with context:
        run = _RestartedRun(operator, k, which, basis_size=basis_size, tolerance=tolerance / SAFETY, seed=seed)
        is_converged = run.converge(max_matvecs)
        found = run.eigenpairs()
    limit = tolerance * run.norm
    if not is_converged or bool((found.residuals > limit).any()):
        warnings.warn(
            f"lightning_hesd: the eigenpairs have Ritz residuals up to {float(found.residuals.max()):.2g} after "
            f"{run.matvecs} products, more than the tolerance allows ({limit:.2g}), or copies of them may be missing: "
            "raise `max_matvecs`, `basis_size` or `tolerance`.",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


class _RestartedRun:
    """A Lanczos run with restarts: an orthonormal basis V and T = Vᵀ H V, with H V = V T + β v eᵀ.

    Attributes:
        norm: Largest absolute Ritz value so far, a lower bound of the norm of the matrix.
        matvecs: Products so far.
    """

    def __init__(
        self, operator: SymmetricOperator, k: int, which: Which, *, basis_size: int, tolerance: float, seed: int
    ) -> None:
        self.norm = 0.0
        self.matvecs = 0
        self._operator, self._which, self._tolerance = operator, which, tolerance
        self._lowest = 0 if which == "largest" else k
        self._highest = 0 if which == "smallest" else k
        self._n = operator.shape[0]
        self._generator = torch.Generator().manual_seed(seed)
        size = min(basis_size + 1, self._n)
        self._basis = torch.empty(size, self._n, dtype=operator.dtype, device=operator.device)  # rows are vectors
        self._matrix = np.zeros((basis_size, basis_size))
        self._rows = 0  # basis vectors whose products are in T
        self._beta = 0.0
        self._breakdown = rounding_threshold(1.0, torch.finfo(operator.dtype).eps, self._n)

    def converge(self, max_matvecs: int) -> bool:
        """Run until the wanted Ritz pairs have converged and a new start finds none further out; whether it did."""
        before: Array | None = None
        while True:
            self._start_at_random()
            while not self._has_settled():
                if self.matvecs >= max_matvecs:
                    return False
                if self._rows == len(self._matrix):
                    self._restart()
                self._expand()
            values = self._ritz()[0]
            wanted = values[self._chosen(len(values))]
            limit = SAFETY * self._tolerance * self.norm
            if self._rows == self._n or (before is not None and np.abs(wanted - before).max() <= limit):
                return True
            before = wanted
            self._keep(self._chosen(len(values)))

    def eigenpairs(self) -> Eigenpairs:
        """Return the wanted Ritz pairs, with their residuals from products."""
        values, coefficients, _ = self._ritz()
        chosen = self._chosen(len(values))
        vectors = normalized(self._combined(coefficients[:, chosen]))
        products = torch.stack([self._product(vector) for vector in vectors])
        quotients = [inner_product(*pair) for pair in zip(vectors, products, strict=True)]  # Rayleigh's
        found = torch.stack(quotients)
        residuals = torch.stack([euclidean_norm(rest) for rest in products - found[:, None] * vectors])
        return Eigenpairs(found, vectors.T, residuals)

    def _chosen(self, count: int) -> list[int]:
        """Return the positions of the wanted values among ascending ones, in the order of the result."""
        highest = list(range(count - min(self._highest, count), count))
        return list(range(min(self._lowest, count))) + (highest[::-1] if self._which == "largest" else highest)

    def _start_at_random(self) -> None:
        """Let a random vector, orthogonal to the basis, be the next one."""
        known = self._basis[: self._rows]
        drawn = torch.randn(self._n, generator=self._generator, dtype=torch.float64, device=self._generator.device)
        vector = drawn.to(self._operator.device, self._operator.dtype)
        for _ in range(3):  # where the basis spans almost all of the space, little of the vector is left at first
            vector = torch.addmv(vector, known.T, inner_products(known, vector), alpha=-1)
            vector /= euclidean_norm(vector)
        self._basis[self._rows] = vector
        self._beta = 0.0

    def _product(self, vector: Tensor) -> Tensor:
        product = self._operator.matvec(vector)
        self.matvecs += 1
        if not bool(product.isfinite().all()):
            msg = f"the matrix-vector product {self.matvecs} is NaN or infinite: the matrix must be finite."
            raise ArithmeticError(msg)
        return product

    def _expand(self) -> None:
        """Take the next vector into the basis: add its product to T, and make the remainder the next one."""
        known = self._basis[: self._rows + 1]
        remainder = self._product(known[-1]).clone()
        components = torch.zeros(len(known), dtype=known.dtype, device=known.device)
        for _ in range(2):  # classical Gram-Schmidt, twice
            along = inner_products(known, remainder)
            remainder.addmv_(known.T, along, alpha=-1)
            components += along
        column = components.cpu().double().numpy()
        self._matrix[: self._rows + 1, self._rows] = self._matrix[self._rows, : self._rows + 1] = column
        self._rows += 1
        self.norm = max(self.norm, float(np.linalg.norm(column)))
        self._beta = float(euclidean_norm(remainder))
        if self._rows == self._n:
            self._beta = 0.0
        elif self._beta <= self._breakdown * self.norm:
            self._start_at_random()  # the basis spans an invariant space
        else:
            self._basis[self._rows] = remainder / self._beta

    def _ritz(self) -> tuple[Array, Array, Array]:
        """Return the Ritz values, ascending, the eigenvectors of T as columns, and the Ritz residuals."""
        matrix = torch.from_numpy(self._matrix[: self._rows, : self._rows])
        values, vectors = (part.numpy() for part in torch.linalg.eigh(matrix))
        return values, vectors, self._beta * np.abs(vectors[-1])

    def _has_settled(self) -> bool:
        """Whether the wanted Ritz pairs have converged, and so has the next one, or enough to lie further inside."""
        rows, size = self._rows, len(self._matrix)
        if rows == self._n:
            return True
        if rows <= self._lowest + self._highest or (rows < size and rows % STEPS_BETWEEN_CHECKS):
            return False
        values, _, residuals = self._ritz()
        limit = self._tolerance * self.norm
        if (residuals[self._chosen(rows)] > limit).any():
            return False
        inner = [(self._lowest, self._lowest - 1)] if self._lowest else []
        inner += [(rows - self._highest - 1, rows - self._highest)] if self._highest else []
        return all(residuals[i] <= max(limit, GUARD * abs(values[i] - values[wanted])) for i, wanted in inner)

    def _restart(self) -> None:
        """Keep the wanted Ritz vectors and as many of their neighbors as fill a third of the other places."""
        more = max((len(self._matrix) - self._lowest - self._highest) // 3, 1)
        low = self._lowest + (more if self._which == "smallest" else more // 2 if self._lowest else 0)
        high = self._highest + (more if self._which == "largest" else more // 2 if self._highest else 0)
        after = self._basis[self._rows].clone()
        self._keep([*range(low), *range(self._rows - high, self._rows)])
        self._basis[self._rows] = after

    def _keep(self, positions: list[int]) -> None:
        """Replace the basis by Ritz vectors."""
        values, coefficients, _ = self._ritz()
        self._basis[: len(positions)] = self._combined(coefficients[:, positions])
        self._rows = len(positions)
        self._matrix[:] = 0.0
        self._matrix[range(self._rows), range(self._rows)] = values[positions]

    def _combined(self, coefficients: Array) -> Tensor:
        """Return combinations of the basis vectors, shape (count, n), given columns of coefficients."""
        weights = torch.from_numpy(np.ascontiguousarray(coefficients.T)).to(self._basis)
        return weights @ self._basis[: self._rows]
