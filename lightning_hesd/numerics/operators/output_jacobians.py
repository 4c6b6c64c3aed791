"""Products of layers' diagonal blocks from Jacobians of the outputs, for networks that are piecewise linear in layers.

Let z be the result of a layer with the parameters w, and o the outputs of the network. Where o is piecewise linear in z
(convolutions, ReLU, pooling, batch norm in evaluation mode), the block of the layer is

    H_ll = (∂z/∂w)ᵀ Jᵀ S J (∂z/∂w) + Σ_k g_k ∂²z_k/∂w²    with J = ∂o/∂z, S = ∂²L/∂o², g = ∂L/∂z.

J is the same in all products. One pass per output computes it for all layers and samples; after that a product takes
the operations of the layer itself, and none of the layers above. The identity is checked, not assumed: by derivatives
that must be exactly zero, and by an ordinary product.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.autograd import grad

from lightning_hesd.numerics.derivatives.checkpointing import kept_activations
from lightning_hesd.numerics.derivatives.graph_cuts import GraphCuts
from lightning_hesd.numerics.operators.curvature import HessianMatrix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.autograd.graph import GradientEdge

    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.operators.curvature import Matvec, Vector
    from lightning_hesd.numerics.operators.risk_operator import RiskOperator

MAX_OUTPUTS = 32
"""Number of outputs per sample up to which Jacobians are read faster than layers are passed."""

MIN_BLOCKS = 8
"""Number of blocks from which on there are enough layers above the average one."""


class UnsuitableError(Exception):
    """The products of a network do not follow from Jacobians of its outputs, or not cheaply."""


def use_output_jacobians(risk: RiskOperator) -> None:
    """Compute products from Jacobians of the outputs from now on, if that is right, cheaper, and fits into the memory.

    Otherwise the products stay as they are. A rank decides for its own batches.
    """
    matrix = risk.matrix
    if type(matrix) is not HessianMatrix or len(matrix.blocks) < MIN_BLOCKS or risk.sharding.is_sharded:
        return
    held = risk.collectives.run_together(lambda: _replace_products(risk, matrix))
    if held:
        risk.graph_bytes = (risk.graph_bytes or 0.0) + held
        risk.strategy_reason += f"; Jacobians of the outputs for the products of layers hold {held / 2**20:.1f} MiB"


def _replace_products(risk: RiskOperator, matrix: HessianMatrix) -> int:
    """Replace the products of this rank's batches, up to the first that is unsuitable, and return the bytes held."""
    held = 0
    largest = max((batch.num_samples for batch in risk.batches), default=0)
    # Of one batch there are two graphs at a time: the old one is needed for the check.
    room = risk.spare_memory - (risk.cache.graph_bytes or 0.0) * largest
    if room <= 0:
        return 0
    for position, batch in enumerate(risk.batches):
        try:
            products = JacobianProducts(matrix, batch, room - held)
            products.check(risk.matvecs[position], math.sqrt(risk.epsilon))
        except (UnsuitableError, RuntimeError):  # of PyTorch, if there is no derivative
            break
        risk.matvecs[position] = products.matvec
        held += products.size
    return held


@dataclass
class Layer:
    """A diagonal block, and the tensor z by way of which alone its parameters act on the loss.

    Attributes:
        block: Range of the parameters.
        result: z as an edge of the graph, shape (samples, ...).
        slope: g = ∂L/∂z, in the shape of z; a leaf.
        gradients: gᵀ ∂z/∂w, in the shapes of the parameters, with a graph that ends in g and w; None: unused.
        jacobian: ∂o/∂z of each sample, shape (samples, outputs, elements of z); None if z is o.
    """

    block: slice
    result: GradientEdge
    slope: Tensor
    gradients: Sequence[Tensor | None]
    jacobian: Tensor | None


class JacobianProducts:
    """Products of the diagonal blocks of the Hessian of a batch.

    Attributes:
        size: Bytes of the Jacobians.
    """

    def __init__(self, matrix: HessianMatrix, batch: WeightedBatch, room: float) -> None:
        """Compute the Jacobians if they take no more than `room` bytes.

        Raises:
            UnsuitableError: If the products do not follow from the Jacobians, or not cheaply.
            RuntimeError: If there is no derivative.
        """
        self._parameters, self._blocks = matrix.parameters, matrix.blocks
        with kept_activations():
            loss = matrix.loss(batch)
        self._loss = loss  # keeps the graph, which edges alone do not
        cuts = GraphCuts(loss)
        cut_of_block = [(block, cuts.after(self._parameters[block])) for block in self._blocks]
        layers = [(block, edge) for block, edge in cut_of_block if edge is not None]
        if not layers:
            raise UnsuitableError
        self._outputs = cuts.common([edge for _, edge in layers])
        edges = list(dict.fromkeys([edge for _, edge in layers if edge != self._outputs]))
        if len(edges) < MIN_BLOCKS:
            raise UnsuitableError
        (self._output_slope,) = grad(loss, [self._outputs], create_graph=True)
        slopes = grad(loss, [*edges, self._outputs], retain_graph=True)
        self.size = self._checked_size(slopes[:-1])
        if self.size > room:
            raise UnsuitableError
        self._check_linearity(edges)
        self._check_samples(edges)
        slope_of = dict(zip([*edges, self._outputs], slopes, strict=True))
        jacobian_of = dict(zip(edges, self._jacobians(edges, slopes), strict=True))
        self._layers = [
            self._layer(block, edge, slope_of[edge].requires_grad_(), jacobian_of.get(edge)) for block, edge in layers
        ]

    def _checked_size(self, slopes: Sequence[Tensor]) -> int:
        """Return the bytes of the Jacobians of tensors in the shapes of `slopes`.

        Raises:
            UnsuitableError: If there are many outputs, or the first dimension of a tensor is not that of the outputs.
        """
        shape = self._output_slope.shape
        if not shape or shape.numel() > MAX_OUTPUTS * shape[0] or any(g.shape[:1] != shape[:1] for g in slopes):
            raise UnsuitableError
        return sum(g.numel() * g.element_size() for g in slopes) * shape[1:].numel()

    def _check_linearity(self, edges: Sequence[GradientEdge]) -> None:
        """Check that a weighted sum of the outputs has no second derivatives: they are exactly zero then.

        Raises:
            UnsuitableError: If it has.
        """
        generator = torch.Generator().manual_seed(0)
        slopes = grad([self._outputs], edges, [_normal(self._output_slope, generator)], create_graph=True)
        with_graph = [g for g in slopes if g.requires_grad]
        if with_graph:
            directions = [_normal(g, generator) for g in with_graph]
            changes = grad(with_graph, edges, directions, retain_graph=True, allow_unused=True)
            if any(c is not None and bool(c.any()) for c in changes):
                raise UnsuitableError

    def _check_samples(self, edges: Sequence[GradientEdge]) -> None:
        """Check that samples do not mix: a sample has slopes of exactly zero where its own outputs do not count.

        In every pass the outputs of about half of the samples do not count. No sample's set of such passes contains
        that of another (Sperner 1928), so that every sample is left out at least once while any other counts.

        Raises:
            UnsuitableError: If they mix.
        """
        generator = torch.Generator().manual_seed(0)
        samples = len(self._output_slope)
        passes = next(count for count in itertools.count() if math.comb(count, count // 2) >= samples)
        left_out = itertools.islice(itertools.combinations(range(passes), passes // 2), samples)
        samples_of_pass: list[list[int]] = [[] for _ in range(passes)]
        for sample, of_sample in enumerate(left_out):
            for index in of_sample:
                samples_of_pass[index].append(sample)
        for absent in samples_of_pass:
            weights = _normal(self._output_slope, generator)
            weights[absent] = 0
            if any(bool(g[absent].any()) for g in grad([self._outputs], edges, [weights], retain_graph=True)):
                raise UnsuitableError

    def _jacobians(self, edges: Sequence[GradientEdge], results: Sequence[Tensor]) -> list[Tensor]:
        """Return the Jacobian of each tensor in `edges`, which has the shape of the one in `results`."""
        slope = self._output_slope.detach()
        samples, count = len(slope), slope[0].numel()
        jacobians = [z.new_empty(samples, count, z[0].numel()) for z, _ in zip(results, edges, strict=False)]
        for output in range(count):
            row = torch.zeros_like(slope).view(samples, count)
            row[:, output] = 1
            found = grad([self._outputs], edges, [row.view_as(slope)], retain_graph=True)
            for jacobian, of_output in zip(jacobians, found, strict=True):
                jacobian[:, output] = of_output.reshape(samples, -1)
        return jacobians

    def _layer(self, block: slice, edge: GradientEdge, slope: Tensor, jacobian: Tensor | None) -> Layer:
        gradients = grad([edge], self._parameters[block], [slope], create_graph=True, allow_unused=True)
        return Layer(block, edge, slope, gradients, jacobian)

    def matvec(self, vector: Vector) -> Vector:
        """Return Hv in the blocks where v is not None."""
        result: list[Tensor | None] = [None] * len(self._parameters)
        for layer in self._layers:
            if any(v is not None for v in vector[layer.block]):
                result[layer.block] = self._product(layer, vector[layer.block])
        return result

    def _product(self, layer: Layer, vector: Vector) -> list[Tensor | None]:
        """Return the product with the block of a layer.

        Raises:
            UnsuitableError: If a backward pass is none: it gives no gradients, or does not use the one it is given.
        """
        parameters = self._parameters[layer.block]
        pairs = [(g, v) for g, v in zip(layer.gradients, vector, strict=True) if g is not None and v is not None]
        if not pairs:
            raise UnsuitableError
        gradients, directions = zip(*pairs, strict=True)
        # gᵀ ∂z/∂w v has the derivatives ∂z/∂w v with respect to g, and Σ_k g_k ∂²z_k/∂w² v with respect to w.
        tangent, *of_curvature = grad(
            gradients, [layer.slope, *parameters], directions, retain_graph=True, allow_unused=True
        )
        if tangent is None:
            raise UnsuitableError
        cotangent = self._through_outputs(layer, tangent)
        of_slope = grad([layer.result], parameters, [cotangent], retain_graph=True, allow_unused=True)
        return [_sum(a, b) for a, b in zip(of_slope, of_curvature, strict=True)]

    def _through_outputs(self, layer: Layer, tangent: Tensor) -> Tensor:
        """Return Jᵀ S J times a tangent of z."""
        jacobian = layer.jacobian
        if jacobian is None:
            return self._curvature_of_loss(tangent)
        samples = len(jacobian)
        of_outputs = torch.bmm(jacobian, tangent.reshape(samples, -1, 1)).view_as(self._output_slope)
        cotangent = self._curvature_of_loss(of_outputs).reshape(samples, 1, -1)
        return torch.bmm(cotangent, jacobian).view_as(tangent)

    def _curvature_of_loss(self, tangent: Tensor) -> Tensor:
        """Return S times a tangent of the outputs."""
        if not self._output_slope.requires_grad:
            return torch.zeros_like(tangent)
        (cotangent,) = grad(self._output_slope, [self._outputs], tangent, retain_graph=True)
        return cotangent

    def check(self, matvec: Matvec, rtol: float) -> None:
        """Compare a product of each block with an ordinary one.

        Raises:
            UnsuitableError: If they differ by more than `rtol` times their norm.
        """
        generator = torch.Generator().manual_seed(0)
        vector = [_normal(p, generator) for p in self._parameters]
        found, expected = self.matvec(vector), matvec(vector)
        for block in self._blocks:
            pairs = [
                (torch.zeros_like(v) if a is None else a, torch.zeros_like(v) if b is None else b)
                for a, b, v in zip(found[block], expected[block], vector[block], strict=True)
            ]
            error = math.hypot(*(float((a - b).norm()) for a, b in pairs))
            if not error <= rtol * math.hypot(*(float(b.norm()) for _, b in pairs)):
                raise UnsuitableError


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64, device=generator.device).to(like)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
