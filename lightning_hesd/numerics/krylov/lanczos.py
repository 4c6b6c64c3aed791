"""Lanczos tridiagonalization of a symmetric matrix that is known by its products only.

For a start vector v₁ of unit length, m steps give an orthonormal Krylov basis V = (v₁, ..., v_m) and the tridiagonal
matrix T = Vᵀ H V with α on the diagonal and β beside it: H V = V T + β_m v_{m+1} e_mᵀ (Lanczos 1950). The basis is kept
orthogonal to machine precision by full reorthogonalization with classical Gram-Schmidt, twice where once is not enough
(Daniel, Gragg, Kaufman & Stewart 1976; Giraud, Langou & Rozložník 2005).
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
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Basis = Literal["device", "cpu", "none"]
    """Where the Krylov basis is kept: on the device of the vectors, in the computer's memory, or nowhere."""

STEPS_BETWEEN_CHECKS = 8
"""Steps between two readings of the coefficients on an accelerator: reading them waits for the device."""

STEPS_BETWEEN_STOPS = 2
"""Steps between two questions whether to stop, on the CPU: reading is free there, but an answer takes some time."""

USUAL_SIZES = (1e-12, 1e12)
"""Norms of first products whose squares stay far from underflow and overflow in float32; others are scaled."""


class NonFiniteProductError(ArithmeticError):
    """A matrix-vector product is NaN or infinite.

    Attributes:
        vector: A finite vector, shape (n,), whose product was not finite; None if it was not kept.
    """

    def __init__(self, vector: Tensor | None, step: int) -> None:
        super().__init__(f"the matrix-vector product of Lanczos step {step} is NaN or infinite")
        self.vector = vector


class Lanczos:
    """A Lanczos run: the tridiagonal matrix T after the steps taken so far, and the Krylov basis.

    Attributes:
        vector: Lanczos vector of the next step, shape (n,): `update` takes its product.
        alphas: Diagonal of T, shape (m,), float64.
        betas: Off-diagonal of T and, last, the norm of the remainder vector, shape (m,), float64.
        asymmetries: For each step j the norm of ⟨v_i, Hv_j⟩ − T_ij over the earlier Lanczos vectors i < j, shape (m,),
            float64: rounding where H is symmetric. Without a Krylov basis for i = j − 1 only.
        breakdown: Whether the Krylov space became invariant, so that the eigenvalues of T are eigenvalues of the
            matrix.
    """

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        start: Tensor,
        steps: int,
        *,
        basis: Basis = "device",
        space: VectorSpace | None = None,
    ) -> None:
        """Start a run; `run` or `update` takes the steps.

        Args:
            matvec: Product with a symmetric matrix, (n,) -> (n,).
            start: Start vector, shape (n,), finite and not zero.
            steps: Number of steps, at least 1; never more than n are taken.
            basis: Where the Krylov basis is kept, `steps` vectors: with the vectors ("device"), in the computer's
                memory ("cpu"), or nowhere ("none"). Without it the Lanczos vectors lose their orthogonality once a Ritz
                value has converged, and copies of that value ("ghosts") appear: extremes and quadrature stay right, but
                nodes no longer stand for one eigenvalue each (Paige 1980, Greenbaum 1989). Its dtype is that of the
                vectors; in bfloat16, C_t was off by up to 7e-4 and K_H05 by 1.4 %, after 100 steps on four spectra.
            space: Vector space with the inner product; default: this process holds whole vectors.

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
        self.vector = self._start = start / norm
        self._matvec = matvec
        self._max_steps = min(steps, space.dimension)
        self._on_accelerator = start.device.type != "cpu"
        self._limits = torch.finfo(start.dtype)
        self._step = 0
        self._scale = 1.0
        self._previous: tuple[Tensor, Tensor] | None = None  # the vector of the last step, and its β
        self._unread: list[Tensor] = []  # α, β and asymmetry of the steps that have not been read
        self._known = np.empty((3, self._max_steps))  # those of the others
        self._norm = 0.0  # of T, from the inside, so that the last β does not count
        self._basis: Tensor | None = None  # row j is the Lanczos vector v_j
        if basis != "none":
            device = start.device if basis == "device" else torch.device("cpu")
            self._basis = torch.empty(self._max_steps, start.numel(), dtype=start.dtype, device=device)
        self._next_is_row = basis == "device" or (basis == "cpu" and not self._on_accelerator)

    def run(self, stop: Callable[[], bool] | None = None) -> None:
        """Take all steps, or fewer if the Krylov space becomes invariant or `stop` returns True.

        Args:
            stop: Called every few steps, with `alphas` and `betas` up to date; True ends the run.

        Raises:
            NonFiniteProductError: If a product is NaN or infinite.
        """
        while not self.update(self._matvec(self.vector)):
            if stop is not None and self.may_stop and stop():
                return

    def update(self, product: Tensor) -> bool:
        """Take one step with Hv of `vector`, shape (n,), and return whether the run has ended.

        Raises:
            NonFiniteProductError: If this product, or one since the last check, is NaN or infinite.
        """
        space, vector, previous = self._space, self.vector, self._previous
        if previous is None:
            self._scale = self._suitable_scale(product)
        remainder = product if self._scale == 1 else product * self._scale
        if previous is not None:
            remainder = torch.addcmul(remainder, *previous, value=-1)
        alpha = space.dot(vector, remainder)
        remainder = torch.addcmul(remainder, vector, alpha, value=-1)
        if self._basis is not None:
            correction, beta, asymmetric = self._reorthogonalize(self._basis, remainder)
            alpha = alpha + correction
        else:
            beta = space.norm(remainder)
            asymmetric = torch.zeros_like(beta) if previous is None else space.dot(previous[0], remainder).abs()
        self._unread += [alpha, beta, asymmetric]
        self._step += 1
        if self._has_ended():
            return True
        row = self._basis[self._step] if self._next_is_row and self._basis is not None else None
        self._previous = vector, beta
        self.vector = torch.div(remainder, beta.clamp_min(self._limits.tiny), out=row)
        return False

    @property
    def may_stop(self) -> bool:
        """Whether `alphas` and `betas` are up to date, and it is time to ask again whether they suffice."""
        return len(self.alphas) == self._step and self._step % STEPS_BETWEEN_STOPS == 0

    def _has_ended(self) -> bool:
        """Read the coefficients every few steps, and return whether the run ends here."""
        is_last = self._step == self._max_steps
        if not is_last and self._step % (STEPS_BETWEEN_CHECKS if self._on_accelerator else 1):
            return False
        end = self._read()
        self.breakdown = end is not None
        self.alphas, self.betas, self.asymmetries = self._known[:, : end or self._step]
        return self.breakdown or is_last

    def _read(self) -> int | None:
        """Read the coefficients of the last steps, and return the number of steps until a breakdown; None without one.

        Raises:
            NonFiniteProductError: If one of them is NaN or infinite.
        """
        tolerance = rounding_threshold(1.0, self._limits.eps, self._space.dimension)
        unread = torch.stack(self._unread).cpu() if self._on_accelerator else self._unread
        values = iter([float(value) / self._scale for value in unread])
        first, self._unread = self._step - len(unread) // 3, []
        for step, (alpha, beta, asymmetric) in enumerate(zip(values, values, values, strict=True), start=first):
            if not (math.isfinite(alpha) and math.isfinite(beta)):
                raise self._non_finite(step)
            before = self._known[1, step - 1] if step else 0.0
            self._known[:, step] = alpha, beta, asymmetric
            self._norm = max(self._norm, abs(alpha) + before)
            if beta <= tolerance * self._norm:
                return step + 1
        return None

    def _suitable_scale(self, product: Tensor) -> float:
        """Return a power of two that brings products to a size whose squares neither underflow nor overflow."""
        low, high = USUAL_SIZES
        if low < float(self._space.norm(product)) < high:
            return 1.0
        norm = float(self._space.norm(in_float64(product)))
        return 2.0 ** -math.frexp(norm)[1] if 0 < norm < math.inf else 1.0

    def ritz_vectors(self, coefficients: NDArray[np.float64]) -> Tensor:
        """Return combinations of the Krylov basis, shape (count, n), on the device and in the dtype of the start.

        Args:
            coefficients: Eigenvectors of T as columns, shape (m, count), m the steps taken.
        """
        weights = torch.from_numpy(np.ascontiguousarray(coefficients.T)).to(self._start)
        if self._basis is not None:
            known = self._basis[: weights.shape[1]]
            return (weights.to(known.device) @ known).to(self._start.device)
        # Without a basis the run is repeated, with the coefficients that are known by now.
        combined = torch.outer(weights[:, 0], self._start)
        previous, current = torch.zeros_like(self._start), self._start
        for step in range(weights.shape[1] - 1):
            remainder = self._matvec(current)
            remainder = torch.sub(remainder, current, alpha=float(self.alphas[step]))
            remainder.sub_(previous, alpha=float(self.betas[step - 1]) if step else 0.0)
            previous, current = current, remainder.div_(float(self.betas[step]))
            combined.addr_(weights[:, step + 1], current)
        return combined

    def grams(self, layers: Sequence[Sequence[slice]]) -> Array:
        """Return the inner products of the basis vectors' elements in each layer, shape (layers, m, m), float64.

        Args:
            layers: Ranges of elements that belong to each layer; a Krylov basis must have been kept.
        """
        assert self._basis is not None  # noqa: S101 - callers check
        known = self._basis[: len(self.alphas)]
        grams = [
            torch.stack([self._space.coefficients(known[:, own], known[:, own].T) for own in layer]).sum(dim=0)
            for layer in layers
        ]
        return torch.stack(grams).cpu().double().numpy()

    def without(self, coefficients: Array, vector: Tensor) -> Tensor:
        """Return a vector, shape (n,), minus its components along some Ritz vectors.

        Args:
            coefficients: Orthonormal eigenvectors of T as columns, shape (m, count), m the steps taken.
            vector: The vector, shape (n,); a Krylov basis must have been kept.
        """
        assert self._basis is not None  # noqa: S101 - callers check
        known = self._basis[: len(coefficients)]
        chosen = torch.from_numpy(coefficients).to(known)
        components = chosen @ (chosen.T @ self._space.coefficients(known, vector.to(known.device)))
        return vector - (components @ known).to(vector.device)

    def project(self, vector: Tensor) -> Tensor | None:
        """Return the components of a vector along the Krylov basis, shape (m,); None without a basis."""
        if self._basis is None:
            return None
        known = self._basis[: len(self.alphas)]
        return self._space.coefficients(known, vector.to(known.device))

    def _reorthogonalize(self, basis: Tensor, remainder: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add the present vector to the Krylov basis, shape (steps, n), and subtract components along it in place.

        `remainder`, shape (n,), is the product minus its components along the last two basis vectors.

        Returns:
            The change of α, the norm of the remainder vector, and that of components that symmetric matrices lack.
        """
        if not self._next_is_row or self._step == 0:
            basis[self._step].copy_(self.vector)
        known = basis[: self._step + 1]
        moved = remainder.device != known.device
        vector = remainder.to(known.device) if moved else remainder
        coefficients = self._space.coefficients(known, vector)
        correction, asymmetric = coefficients[-1], asymmetry(coefficients)
        norm = self._subtract(known, coefficients, vector)
        # A pass that takes away more than it leaves is repeated: its rounding errors matter. Reading norms from an
        # accelerator means waiting for it; there the second pass is cheaper than the test.
        if self._on_accelerator or float(norm) <= math.hypot(float(asymmetric), float(correction)):
            coefficients = self._space.coefficients(known, vector)
            correction, norm = correction + coefficients[-1], self._subtract(known, coefficients, vector)
        if not moved:
            return correction, norm, asymmetric
        remainder.copy_(vector)
        return correction.to(remainder.device), norm.to(remainder.device), asymmetric.to(remainder.device)

    def _subtract(self, known: Tensor, coefficients: Tensor, vector: Tensor) -> Tensor:
        """Subtract a combination of the basis vectors in place, and return the norm of the result."""
        vector.addmv_(known.T, coefficients, alpha=-1)
        return self._space.norm(vector)

    def _non_finite(self, step: int) -> NonFiniteProductError:
        """Return the error for a step whose product is not finite."""
        vector = self.vector if self._basis is None else self._basis[step].to(self.vector.device)
        return NonFiniteProductError(vector.clone() if self._space.is_finite(vector) else None, step + 1)


def asymmetry(coefficients: Tensor) -> Tensor:
    """Return the norm of all components but the last along the basis vectors so far: zero for a symmetric matrix."""
    norm: Tensor = torch.linalg.vector_norm(coefficients[:-1])
    return norm
