"""Rayleigh-Ritz in a small subspace that grows by residuals: the largest eigenvalue from a few products.

From one start vector that is the Lanczos method; further start vectors may be given. The same products serve two
problems: Hy = θy, and Hx = θDx with a positive diagonal D, whose θ are the eigenvalues of D^(-1/2) H D^(-1/2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_hesd.numerics.krylov.vectors import euclidean_norm, inner_product, inner_products

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

MAX_BASIS = 6
"""Basis vectors from which on, before another residual is added, the leading Ritz vectors replace them."""


@dataclass(frozen=True)
class LeadingPair:
    """The largest Ritz value of a subspace, and its vector.

    Attributes:
        value: θ, a Rayleigh quotient, and so a lower bound of the largest eigenvalue.
        vector: y of unit length, or x with xᵀDx = 1, shape (n,).
        product: Its product with H, shape (n,).
        direction: The residual, D⁻¹(Hx − θDx), shape (n,): the gradient of the Rayleigh quotient.
        error: Norm of the residual in the coordinates of the problem, relative to |θ|: there is an eigenvalue within
            this share of θ.
    """

    value: float
    vector: Tensor
    product: Tensor
    direction: Tensor
    error: float


class RitzSubspace:
    """An orthonormal basis Q and its products HQ.

    Attributes:
        products: Products with H so far.
    """

    def __init__(self, matvec: Callable[[Tensor], Tensor], scale: Tensor | None = None) -> None:
        """Begin with an empty basis; `scale` is the diagonal of D^(-1/2), shape (n,), None for D = 1."""
        self.products = 0
        self._matvec = matvec
        self._scale = scale
        self._basis: list[Tensor] = []
        self._images: list[Tensor] = []

    def add(self, vector: Tensor, product: Tensor | None = None) -> bool:
        """Take a vector, shape (n,), into the basis, unless it lies in the subspace up to rounding; return whether.

        That costs a product unless it is given.
        """
        length = euclidean_norm(vector)
        for _ in range(2):  # Gram-Schmidt, twice
            for known, image in zip(self._basis, self._images, strict=True):
                along = inner_product(known, vector)
                vector = vector - along * known
                product = None if product is None else product - along * image
        rest = euclidean_norm(vector)
        if not rest > torch.finfo(vector.dtype).eps ** 0.5 * length:
            return False
        vector = vector / rest
        if product is None:
            self.products += 1
            product = self._matvec(vector)
        else:
            product = product / rest
        self._basis.append(vector)
        self._images.append(product)
        return True

    def expand(self, max_products: int, tolerance: float) -> list[LeadingPair]:
        """Add residuals of the leading Ritz pairs until their errors are within a tolerance, or products are used up.

        Returns:
            The leading Ritz pair of H and, with a scale, that of D^(-1/2) H D^(-1/2).
        """
        pairs = self.leading()
        while self.products < max_products:
            worst = max(pairs, key=lambda pair: pair.error)
            if worst.error <= tolerance:
                break
            if len(self._basis) >= MAX_BASIS:
                self._restart(pairs)
            if not self.add(worst.direction):
                break
            pairs = self.leading()
        return pairs

    def _restart(self, pairs: list[LeadingPair]) -> None:
        """Replace the basis by the leading Ritz vectors."""
        self._basis, self._images = [], []
        for pair in pairs:
            self.add(pair.vector, pair.product)

    def leading(self) -> list[LeadingPair]:
        """Return the leading Ritz pair of H and, with a scale, that of D^(-1/2) H D^(-1/2)."""
        return [self._pair(None)] + ([] if self._scale is None else [self._pair(self._scale)])

    def _pair(self, scale: Tensor | None) -> LeadingPair:
        """Solve cᵀ(QᵀHQ)c = θ cᵀ(QᵀDQ)c for the largest θ."""
        basis, images = torch.stack(self._basis), torch.stack(self._images)
        scaled = basis if scale is None else basis / scale
        projected = inner_products(basis, images.T).cpu().double()
        gram = inner_products(scaled, scaled.T).cpu().double()
        # Directions that rounding may have made are left out.
        lengths = gram.diagonal().rsqrt()
        weights, axes = torch.linalg.eigh(lengths[:, None] * gram * lengths)
        kept = weights > len(weights) * torch.finfo(basis.dtype).eps * weights[-1]
        whitening = lengths[:, None] * axes[:, kept] * weights[kept].rsqrt()
        values, vectors = torch.linalg.eigh(whitening.T @ ((projected + projected.T) / 2) @ whitening)
        coefficients = (whitening @ vectors[:, -1]).to(basis)
        value, vector, product = float(values[-1]), coefficients @ basis, coefficients @ images
        if scale is None:
            direction = residual = product - value * vector
        else:
            residual = scale * product - value * (vector / scale)
            direction = scale * residual
        size = float(euclidean_norm(residual))
        return LeadingPair(value, vector, product, direction, size / abs(value) if value else float("inf"))
