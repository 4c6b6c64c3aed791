"""Lanczos tridiagonalisation of a symmetric matrix that is known by its products only.

Works on flat tensors; knows nothing of modules or losses. Lanczos (1950), Golub & Welsch (1969) for the quadrature rule
that the tridiagonal matrix stands for. The basis is kept orthogonal to machine precision by complete
reorthogonalisation with classical Gram-Schmidt, twice where once is not enough (Daniel, Gragg, Kaufman & Stewart 1976;
Giraud, Langou & Rozložník 2005).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_hesd.numerics.devices import in_float64
from lightning_hesd.numerics.krylov.vectors import VectorSpace
from lightning_hesd.spectra.criteria import rounding_threshold

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[np.float64]
    Storage = Literal["device", "cpu", "none"]
    Process = Generator[Tensor, Tensor, None]
    """Yields vectors, and is sent their products."""

STEPS_BETWEEN_CHECKS = 8
"""On an accelerator the coefficients are read back only every so many steps: reading them waits for the device."""

STEPS_BETWEEN_STOPS = 2
"""On the CPU reading is free, but asking whether to stop is not: it takes about a millisecond."""

USUAL_SIZES = (1e-12, 1e12)
"""Norms of first products whose squares stay far from underflow and overflow in float32; others are scaled."""

LOST_NORM = 0.7
"""A pass that leaves less than this share of a vector has removed so much that its rounding matters: pass again."""


class NonFiniteProductError(ArithmeticError):
    """A matrix-vector product came out NaN or infinite.

    Attributes:
        vector: A finite vector, shape (n,), whose product was not finite; None if it was not kept.
    """

    def __init__(self, vector: Tensor | None, step: int) -> None:
        super().__init__(f"the matrix-vector product of Lanczos step {step} is NaN or infinite")
        self.vector = vector


class Lanczos:
    """A Lanczos process: the tridiagonal matrix after the steps taken so far, and the basis behind it.

    Attributes:
        alphas: Diagonal, shape (m,), float64.
        betas: Off-diagonal and, last, the norm of the residual vector, shape (m,), float64.
        asymmetries: For each step j the norm of ⟨v_i, Hv_j⟩ − T_ij over the earlier Lanczos vectors i < j, shape (m,),
            float64: rounding where H is symmetric. Without a basis for i = j − 1 only.
        breakdown: Whether the Krylov space became invariant, so that the eigenvalues of T are eigenvalues of the
            matrix.
    """

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        start: Tensor,
        steps: int,
        *,
        storage: Storage = "device",
        space: VectorSpace | None = None,
    ) -> None:
        """Prepare the process.

        Args:
            matvec: Product with a symmetric matrix, (n,) -> (n,).
            start: Start vector, shape (n,), finite and not zero.
            steps: Number of steps, at least 1; never more than n are taken.
            storage: Where the basis is kept, `steps` vectors: with the vectors ("device"), in the computer's memory
                ("cpu"), or nowhere ("none"). Without a basis the vectors lose their orthogonality once a Ritz value
                has converged, and copies of it ("ghosts") appear: extremes and quadrature stay right, but nodes no
                longer stand for one eigenvalue each (Paige 1980, Greenbaum 1989). Its type is the vectors'; in
                bfloat16, C_t was off by up to 7e-4 and K_H05 by 1.4 %, after 100 steps on four spectra.
            space: What the vectors are vectors of; default: they are whole.

        Raises:
            ValueError: If `steps` is less than 1, or `start` is zero or not finite.
        """
        if steps < 1:
            msg = f"`steps` must be at least 1, got {steps}."
            raise ValueError(msg)
        self._space = space = space or VectorSpace(start.numel())
        norm = float(space.norm(start))
        if not 0 < norm < float("inf"):
            msg = f"`start` must be finite and not zero, got a vector of norm {norm}."
            raise ValueError(msg)
        self.alphas: NDArray[np.float64] = np.empty(0)
        self.betas: NDArray[np.float64] = np.empty(0)
        self.asymmetries: NDArray[np.float64] = np.empty(0)
        self.breakdown = False
        self._matvec = matvec
        self._start = start / norm
        self._steps = min(steps, space.dimension)
        self._on_accelerator = start.device.type != "cpu"
        self._basis: Tensor | None = None  # row j is the Lanczos vector v_j
        if storage != "none":
            device = start.device if storage == "device" else torch.device("cpu")
            self._basis = torch.empty(self._steps, start.numel(), dtype=start.dtype, device=device)

    def run(self, stop: Callable[[], bool] | None = None) -> None:
        """Take the steps, or fewer if the Krylov space becomes invariant or `stop` says so.

        Args:
            stop: Asked every few steps, with `alphas` and `betas` up to date, whether they will do.

        Raises:
            NonFiniteProductError: If a product is NaN or infinite.
        """
        process = self.process(stop)
        vector = next(process, None)
        while vector is not None:
            vector = advance(process, self._matvec(vector))

    def process(self, stop: Callable[[], bool] | None = None) -> Process:
        """Do what `run` does, for somebody else to make the products.

        Yields:
            Vectors, whose products it must be sent.
        """
        space = self._space
        interval = STEPS_BETWEEN_CHECKS if self._on_accelerator else 1
        limits = torch.finfo(self._start.dtype)
        coefficients = torch.zeros(3, self._steps, dtype=self._start.dtype, device=self._start.device)
        alphas, betas, asymmetries = coefficients
        previous, current = None, self._start
        scale = 1.0

        for step in range(self._steps):
            self._keep(step, current)
            residual = yield current
            if previous is None:
                scale = self._scale(residual)
            if scale != 1:
                residual = residual * scale
            if previous is not None:
                residual = torch.addcmul(residual, previous, betas[step - 1], value=-1)
            alphas[step] = space.dot(current, residual)
            residual = torch.addcmul(residual, current, alphas[step], value=-1)
            if self._basis is not None:
                correction, betas[step], asymmetries[step] = self._reorthogonalize(self._basis[: step + 1], residual)
                alphas[step] += correction
            else:
                betas[step] = space.norm(residual)
                if previous is not None:
                    asymmetries[step] = space.dot(previous, residual).abs()
            last = step + 1 == self._steps
            if (step + 1) % interval == 0 or last:
                known = coefficients[:, : step + 1].cpu().double() / scale
                self.alphas, self.betas, self.asymmetries = known.numpy()
                self._check_finite(current)
                end = _breakdown(self.alphas, self.betas, rounding_threshold(1.0, limits.eps, space.dimension))
                if end is not None:
                    self.alphas, self.betas, self.asymmetries, self.breakdown = (
                        *(c[:end] for c in (self.alphas, self.betas, self.asymmetries)),
                        True,
                    )
                    return
                if stop is not None and not last and (step + 1) % STEPS_BETWEEN_STOPS == 0 and stop():
                    return
            previous, current = current, residual / betas[step].clamp_min(limits.tiny)

    def _scale(self, product: Tensor) -> float:
        """Return a power of two that brings products to a size whose squares neither underflow nor overflow."""
        low, high = USUAL_SIZES
        if low < float(self._space.norm(product)) < high:
            return 1.0
        norm = float(self._space.norm(in_float64(product)))
        return 2.0 ** -math.frexp(norm)[1] if 0 < norm < math.inf else 1.0

    def ritz_vectors(self, coefficients: NDArray[np.float64]) -> Tensor:
        """Return combinations of the basis vectors, shape (count, n), in the device and type of the start vector.

        Args:
            coefficients: Eigenvectors of T as columns, shape (m, count), m the steps taken.
        """
        weights = torch.from_numpy(np.ascontiguousarray(coefficients.T)).to(self._start)
        if self._basis is not None:
            known = self._basis[: weights.shape[1]]
            return (weights.to(known.device) @ known).to(self._start.device)
        # Without a basis the process is repeated, with the coefficients that are known by now.
        combined = torch.outer(weights[:, 0], self._start)
        previous, current = torch.zeros_like(self._start), self._start
        for step in range(weights.shape[1] - 1):
            residual = self._matvec(current)
            residual = torch.sub(residual, current, alpha=float(self.alphas[step]))
            residual.sub_(previous, alpha=float(self.betas[step - 1]) if step else 0.0)
            previous, current = current, residual.div_(float(self.betas[step]))
            combined.addr_(weights[:, step + 1], current)
        return combined

    def project(self, vector: Tensor) -> Tensor | None:
        """Return the components of a vector along the basis vectors, shape (m,); None without a basis."""
        if self._basis is None:
            return None
        known = self._basis[: len(self.alphas)]
        return self._space.coefficients(known, vector.to(known.device))

    def _keep(self, step: int, vector: Tensor) -> None:
        if self._basis is not None:
            self._basis[step].copy_(vector)

    def _reorthogonalize(self, known: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Remove, in place, what the basis still spans.

        Args:
            known: Rows of the basis so far, shape (m, n).
            residual: The product, freed from its parts along the last two of them, shape (n,).

        Returns:
            correction: What this amounts to in α.
            norm: That of what is left.
            asymmetry: Norm of the components along the earlier basis vectors, which are zero for a symmetric matrix.
        """
        moved = residual.device != known.device
        vector = residual.to(known.device) if moved else residual
        norm = self._space.norm(vector)
        coefficients = self._space.coefficients(known, vector)
        correction, asymmetric = coefficients[-1], asymmetry(coefficients)
        before, norm = norm, self._subtract(known, coefficients, vector)
        # Asking an accelerator would mean waiting for it; there the second pass is the cheaper answer.
        if self._on_accelerator or float(norm) <= LOST_NORM * float(before):
            coefficients = self._space.coefficients(known, vector)
            correction, norm = correction + coefficients[-1], self._subtract(known, coefficients, vector)
        if moved:
            residual.copy_(vector)
        return correction.to(residual.device), norm.to(residual.device), asymmetric.to(residual.device)

    def _subtract(self, known: Tensor, coefficients: Tensor, vector: Tensor) -> Tensor:
        """Subtract a combination of the basis in place, and return the norm of what is left."""
        vector.addmv_(known.T, coefficients, alpha=-1)
        return self._space.norm(vector)

    def _check_finite(self, current: Tensor) -> None:
        finite = np.isfinite(self.alphas) & np.isfinite(self.betas)
        if not finite.all():
            culprit = int(np.argmin(finite))
            vector = current if self._basis is None else self._basis[culprit].to(current.device)
            raise NonFiniteProductError(vector.clone() if self._space.is_finite(vector) else None, culprit + 1)


def asymmetry(coefficients: Tensor) -> Tensor:
    """Return the norm of a remainder's components along all basis vectors but the last: zero for a symmetric matrix.

    Args:
        coefficients: Components along the basis vectors so far, shape (m,), of a product freed from its parts along the
            last two.
    """
    norm: Tensor = torch.linalg.vector_norm(coefficients[:-1])
    return norm


def advance(process: Process, product: Tensor) -> Tensor | None:
    """Send a product, and return the next vector, or None if there is none."""
    try:
        return process.send(product)
    except StopIteration:
        return None


def _breakdown(alphas: NDArray[np.float64], betas: NDArray[np.float64], tolerance: float) -> int | None:
    """Return the first number of steps after which the residual is rounding relative to ‖T‖, or None."""
    previous = np.concatenate([[0.0], betas[:-1]])
    norms = np.maximum.accumulate(np.abs(alphas) + previous)  # ‖T‖ from the inside, so that β itself does not count
    ended = np.flatnonzero(betas <= tolerance * norms)
    return int(ended[0]) + 1 if len(ended) else None


def gauss_quadrature(alphas: ArrayLike, betas: ArrayLike) -> tuple[Array, Array, Array]:
    """Turn a Lanczos tridiagonal matrix into a Gauss quadrature rule with residual bounds.

    Args:
        alphas: Diagonal, shape (m,).
        betas: Off-diagonal and, last, the norm of the final residual vector, shape (m,).

    Returns:
        nodes: Eigenvalues θ of the tridiagonal matrix, ascending, shape (m,).
        weights: Squared first components of its eigenvectors, shape (m,), sum 1.
        residuals: β_m·|last components|, shape (m,): an eigenvalue lies within the residual of each node.

    Example:
        >>> nodes, weights, residuals = gauss_quadrature([0.0, 0.0], [1.0, 0.5])
        >>> nodes.tolist(), weights.round(3).tolist(), residuals.round(3).tolist()
        ([-1.0, 1.0], [0.5, 0.5], [0.354, 0.354])
    """
    nodes, vectors = eigen(alphas, betas)
    weights = vectors[0] ** 2
    return nodes, weights / weights.sum(), float(np.asarray(betas)[-1]) * np.abs(vectors[-1])


def eigen(alphas: ArrayLike, betas: ArrayLike) -> tuple[Array, Array]:
    """Return the eigenvalues, ascending, shape (m,), and eigenvectors, columns of shape (m, m), of the matrix T.

    Args:
        alphas: Diagonal, shape (m,).
        betas: Off-diagonal and, last, a number that does not matter, shape (m,).
    """
    diagonal = np.asarray(alphas, dtype=np.float64)
    off_diagonal = np.asarray(betas, dtype=np.float64)
    # By PyTorch: NumPy's threads go on spinning for a while, and would share the cores with those of the next product.
    matrix = torch.from_numpy(np.diag(diagonal) + np.diag(off_diagonal[:-1], -1))  # eigh reads the lower triangle
    nodes, vectors = torch.linalg.eigh(matrix)
    return nodes.numpy(), vectors.numpy()
