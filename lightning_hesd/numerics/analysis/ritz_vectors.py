"""What the Ritz vectors of Lanczos runs tell: the curvature of layers, changes of eigenvectors, the loss along them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lightning_hesd.numerics.krylov.ritz import tridiagonal_eigh
from lightning_hesd.numerics.operators.losses_along import losses_along
from lightning_hesd.spectra.deflation import converged_nodes
from lightning_hesd.spectra.layer_curvature import LayerCurvature, RestProbe, RitzPairs, layer_curvatures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from lightning_hesd.numerics.krylov.lanczos import Lanczos
    from lightning_hesd.numerics.operators.diagonal_block import DiagonalBlock
    from lightning_hesd.spectra.spectrum import Spectrum

    Array = NDArray[np.float64]
    Ranges = Sequence[Sequence[slice]]
    """Ranges of elements, in a vector, that belong to each layer."""

HALF = 10
"""Number of points on each side of the weights at which the loss along an eigenvector is evaluated."""

POINTS = 2 * HALF + 1
"""Number of points at which the loss along an eigenvector is evaluated."""

CHANGE = 0.1
"""How much the curvature changes the loss at the farthest point, as a share of the loss."""

Layers = dict[str, tuple[list[int], int]]
"""Positions of each layer's parameters among those of the operator, and their number of elements, by name."""


def layers_of_runs(
    operator: DiagonalBlock, runs: Sequence[Lanczos], layers: Layers, probes: Sequence[Tensor], spectrum: Spectrum
) -> dict[str, LayerCurvature]:
    """Return the curvature of each layer.

    Args:
        operator: The curvature operator.
        runs: Its Lanczos runs, with their Krylov bases.
        layers: The layers.
        probes: Random vectors, shape (n,), of which further products are taken.
        spectrum: The spectrum from the runs.

    Raises:
        ArithmeticError: If a product is NaN or infinite; the message names the batch.
    """
    ranges = [operator.ranges(positions) for positions, _ in layers.values()]
    found = []
    for run in runs:
        nodes, vectors = tridiagonal_eigh(run.alphas, run.betas)
        found.append(RitzPairs(nodes, vectors, float(run.betas[-1]) * np.abs(vectors[-1]), run.grams(ranges)))
    further: list[RestProbe] = []
    if probes:
        rule = found[0].nodes[None], found[0].vectors[:1] ** 2, found[0].residuals[None]
        converged = converged_nodes(*rule, operator.dimension, spectrum.rounding)[0]
        known = found[0].vectors[:, converged]
        further = [_rest_probe(operator, runs[0], known, probe, ranges) for probe in probes]
    dimensions = {name: dimension for name, (_, dimension) in layers.items()}
    by_layer = layer_curvatures(found, dimensions, spectrum.rounding, spectrum.confidence, further)
    norms = {name: operator.squared_weight_norm(positions) for name, (positions, _) in layers.items()}
    return {name: replace(layer, squared_norm=norms[name]) for name, layer in by_layer.items()}


def _rest_probe(operator: DiagonalBlock, run: Lanczos, known: Array, probe: Tensor, ranges: Ranges) -> RestProbe:
    """Return what a random vector tells of the matrix without some Ritz pairs, the columns of `known`.

    Raises:
        ArithmeticError: If the product is NaN or infinite.
    """
    space = operator.space

    def products(first: Tensor, second: Tensor) -> Array:
        return np.array([sum(float(space.dot(first[own], second[own])) for own in layer) for layer in ranges])

    probe = run.without(known, probe)
    product = run.without(known, operator.finite_matvec(probe))
    scale = (operator.dimension - known.shape[1]) / float(space.norm(probe)) ** 2
    return RestProbe(scale * products(probe, product), scale * products(product, product))


def subspace_overlap(operator: DiagonalBlock, run: Lanczos, count: int) -> float | None:
    """Return the overlap of the leading eigenvectors with those of the analysis before, and keep them for the next.

    That is ‖UᵀW‖²/k of two orthonormal bases of k vectors (Gur-Ari, Roberts & Dyer 2018, arXiv:1812.04754).

    Args:
        operator: The curvature operator.
        run: A Lanczos run on it, with its Krylov basis.
        count: The number k; 0: eigenvectors are not tracked.

    Returns:
        The overlap, from 0 to 1; None if eigenvectors are not tracked, or there was no analysis before.
    """
    cache, count = operator.risk.cache, min(count, len(run.alphas))
    if not count:
        return None
    _, coefficients = tridiagonal_eigh(run.alphas, run.betas)
    vectors = run.ritz_vectors(coefficients[:, -count:])
    before, cache.eigenvectors = cache.eigenvectors, vectors.cpu()
    if before is None or before.shape != vectors.shape:
        return None
    products = operator.space.coefficients(before.to(vectors.device), vectors.T)
    return float(products.square().sum()) / count


def losses_along_extremes(
    operator: DiagonalBlock, runs: Sequence[Lanczos], spectrum: Spectrum, weight_norm: float
) -> Array:
    """Return the mean loss along the Ritz vectors of the extreme nodes, each of unit length.

    The signs of the vectors are those with which the loss begins to fall, or rises less.

    Args:
        operator: The curvature operator, of the Hessian.
        runs: Its Lanczos runs, with their Krylov bases.
        spectrum: The spectrum from the runs.
        weight_norm: Norm of the parameters, in the coordinates of the vectors.

    Returns:
        For λ_min and for λ_max the distances, ascending, and the losses there, shape (2, 2, points).
    """
    smallest, largest = int(np.nanargmin(spectrum.nodes[:, 0])), int(np.nanargmax(np.nanmax(spectrum.nodes, axis=1)))
    found = []
    for run, column, node in ((runs[smallest], 0, spectrum.lambda_min), (runs[largest], -1, spectrum.lambda_max)):
        _, coefficients = tridiagonal_eigh(run.alphas, run.betas)
        [vector] = run.ritz_vectors(coefficients[:, [column]])
        steps = np.arange(-HALF, HALF + 1) / HALF
        distances = _reach(node, spectrum.loss, weight_norm) * steps
        losses = np.array(losses_along(operator, vector / operator.space.norm(vector), distances.tolist()))
        is_turned = losses[HALF + 1] > losses[HALF - 1]
        found.append((distances, losses[::-1] if is_turned else losses))
    return np.array(found)


def _reach(eigenvalue: float, loss: float, weight_norm: float) -> float:
    """Return the distance at which the curvature changes the loss by `CHANGE`, at most the norm of the weights."""
    limit = weight_norm or 1.0
    distance = math.sqrt(2 * CHANGE * abs(loss) / abs(eigenvalue)) if eigenvalue else limit
    return min(distance, limit) or limit
