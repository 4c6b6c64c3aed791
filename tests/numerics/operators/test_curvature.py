"""Gauss-Newton matrix, residual and diagonal blocks, against dense ones."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_hesd import hessian_spectrum
from lightning_hesd.numerics.inputs.batches import WeightedBatch, weighted_batches
from lightning_hesd.numerics.operators.curvature import (
    CurvatureMatrix,
    GaussNewtonMatrix,
    HessianMatrix,
    ResidualMatrix,
)
from lightning_hesd.numerics.operators.diagonal_block import DiagonalBlock, block_products, choose_difference_step
from lightning_hesd.numerics.operators.risk_operator import RiskOperator
from tests import cases, oracles

Loss = Callable[[Any, Any], Tensor]


@pytest.fixture(autouse=True)
def without_fused_attention() -> Iterator[None]:
    """As in an analysis."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def flat_cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), batch[1].flatten())


def squared_error(outputs: Tensor, batch: Any) -> Tensor:
    return F.mse_loss(outputs, batch[1])


def poisson(outputs: Tensor, batch: Any) -> Tensor:
    return F.poisson_nll_loss(outputs, batch[1].abs())


def not_convex(outputs: Tensor, batch: Any) -> Tensor:
    return outputs.sin().mean()


CASES: dict[str, tuple[str, Loss]] = {
    "cross-entropy": ("mlp", flat_cross_entropy),
    "cross-entropy of sequences, tied": ("tied", flat_cross_entropy),
    "cross-entropy, some frozen": ("frozen", flat_cross_entropy),
    "squared error": ("conv_batchnorm", squared_error),
    "squared error of attention": ("attention", squared_error),
    "poisson": ("conv_batchnorm", poisson),
    "not convex": ("mlp", not_convex),
}


def problem(case: str) -> tuple[nn.Module, list[Any], Loss]:
    name, output_loss = CASES[case]
    module, batches, _ = cases.make(name)
    return module.eval(), batches, output_loss


def outputs_of(module: nn.Module, batch: Any) -> Tensor:
    return module(batch[0])


def operator(case: str, kind: str, strategy: Any = "graph") -> DiagonalBlock:
    module, batches, output_loss = problem(case)
    parameters = [p for p in module.parameters() if p.requires_grad]

    def loss(batch: WeightedBatch) -> Tensor:
        return output_loss(outputs_of(module, batch.data), batch.data)

    of_outputs = {
        "output_fn": lambda batch: outputs_of(module, batch.data),
        "output_loss": lambda outputs, batch: output_loss(outputs, batch.data),
    }
    matrix: CurvatureMatrix = {
        "hessian": lambda: HessianMatrix(loss, parameters),
        "ggn": lambda: GaussNewtonMatrix(loss, parameters, **of_outputs),
        "residual": lambda: ResidualMatrix(loss, parameters, **of_outputs),
    }[kind]()
    found = DiagonalBlock(RiskOperator(matrix, weighted_batches(batches), strategy=strategy, dtype=torch.float64))
    choose_difference_step([found])
    return found


def dense(operator: DiagonalBlock) -> Tensor:
    return torch.stack([operator.matvec(row) for row in torch.eye(operator.dimension, dtype=torch.float64)])


def unit_vectors(dimension: int, count: int = 10) -> Tensor:
    vectors = torch.randn(count, dimension, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)


def dense_gauss_newton(case: str) -> Tensor:
    """Jᵀ (∂²L/∂o²) J, from Jacobians and Hessians written out."""
    module, batches, output_loss = problem(case)
    chosen = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    terms = []
    for batch in batches:

        def outputs(*values: Tensor, batch: Any = batch) -> Tensor:
            return functional_call(module, dict(zip(chosen, values, strict=True)), (batch[0],)).flatten()

        def loss(flat: Tensor, batch: Any = batch) -> Tensor:
            return output_loss(flat.view(outputs_of(module, batch).shape), batch)

        parts = torch.autograd.functional.jacobian(outputs, tuple(chosen.values()))
        jacobian = torch.cat([part.flatten(1) for part in parts], dim=1)
        curvature = torch.autograd.functional.hessian(loss, outputs(*chosen.values()))
        terms.append(len(batch[0]) * jacobian.T @ curvature @ jacobian)
    return sum(terms) / sum(len(batch[0]) for batch in batches)


@pytest.mark.parametrize("case", CASES)
class TestParts:
    @pytest.mark.parametrize("strategy", ["graph", "recompute"])
    def test_gauss_newton_is_the_dense_one(self, case, strategy):
        expected = dense_gauss_newton(case)
        found = dense(operator(case, "ggn", strategy))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))

    @pytest.mark.parametrize("strategy", ["graph", "recompute"])
    def test_both_parts_add_up_to_the_hessian(self, case, strategy):
        ggn, residual, whole = (operator(case, kind, strategy) for kind in ("ggn", "residual", "hessian"))
        for v in unit_vectors(whole.dimension):
            first, second, both = ggn.matvec(v), residual.matvec(v), whole.matvec(v)
            size = float(both.abs().max())
            assert min(float(first.abs().max()), float(second.abs().max())) > 1e-3 * size
            torch.testing.assert_close(first + second, both, rtol=0, atol=1e-14 * size)

    def test_residual_by_differences(self, case):
        exact, differences = operator(case, "residual"), operator(case, "residual", "finite_difference")
        errors = [float((differences.matvec(v) - exact.matvec(v)).norm()) for v in unit_vectors(exact.dimension)]
        assert max(errors) <= differences.risk.product_error < 1e-6


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # curvlinops
def test_gauss_newton_equals_that_of_curvlinops():
    if importlib.util.find_spec("curvlinops") is None:
        pytest.skip("curvlinops is not installed")
    from curvlinops import GGNLinearOperator  # noqa: PLC0415

    module, batches, _ = problem("cross-entropy")
    data = [(x, y) for x, y in batches]
    theirs = GGNLinearOperator(module, nn.CrossEntropyLoss(), list(module.parameters()), data)
    expected = theirs @ torch.eye(theirs.shape[1], dtype=torch.float64)
    torch.testing.assert_close(dense(operator("cross-entropy", "ggn")), expected, rtol=0, atol=1e-12)


class TwoHeads(nn.Module):
    """Its outputs are a dict of tensors, one of which does not depend on the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.heads = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 1)])

    def forward(self, x: Tensor) -> dict[str, Any]:
        z = self.body(x).tanh()
        return {"classes": self.heads[0](z), "more": [self.heads[1](z), x.square().mean()]}


def two_losses(outputs: dict[str, Any], batch: Any) -> Tensor:
    value, norm = outputs["more"]
    return F.cross_entropy(outputs["classes"], batch[1]) + norm * value.square().mean()


def test_outputs_may_be_nested():
    torch.manual_seed(0)
    module, batch = TwoHeads().double(), (torch.randn(6, 4).double(), torch.randint(3, (6,)))
    whole = oracles.dense_hessian(module, [batch], lambda m, b: two_losses(m(b[0]), b))
    n = len(whole)
    found = []
    for kind in ("ggn", "residual"):
        spectrum = hessian_spectrum(
            module, [batch], lambda m, b: two_losses(m(b[0]), b), steps=n, matrix=kind,
            output_fn=lambda m, b: m(b[0]), output_loss=two_losses,
        )  # fmt: skip
        found.append(spectrum)
    ggn, residual = found
    assert (ggn.matrix, residual.matrix) == ("ggn", "residual")
    assert ggn.c_t == 0
    assert ggn.lambda_min >= -ggn.rounding
    assert residual.lambda_min < -residual.rounding
    # Traces of each, by the same random vector, add up to that of the Hessian.
    plain = hessian_spectrum(module, [batch], lambda m, b: two_losses(m(b[0]), b), steps=n)
    assert ggn.trace + residual.trace == pytest.approx(plain.trace, rel=1e-12)


def test_the_gauss_newton_matrix_of_a_linear_model_is_its_hessian():
    module, batches, loss_fn = cases.regression((5, 3), 4, 2, torch.float64)
    shared = {"steps": 8, "output_fn": outputs_of, "output_loss": squared_error}
    ggn = hessian_spectrum(module, batches, loss_fn, matrix="ggn", **shared)
    plain = hessian_spectrum(module, batches, loss_fn, steps=8)
    np.testing.assert_allclose(ggn.nodes, plain.nodes, rtol=1e-12)
    residual = hessian_spectrum(module, batches, loss_fn, matrix="residual", **shared)
    assert abs(residual.lambda_max) < 1e-14


class TestMistakes:
    @pytest.mark.parametrize(
        ("output_loss", "options", "error", "message"),
        [
            (
                lambda o, b: 2 * flat_cross_entropy(o, b),
                {},
                ValueError,
                r"the `output_loss` of what .*batch 0 they are 1\.\d+ and 2\.\d+",
            ),
            (
                flat_cross_entropy,
                {"strategy": "finite_difference"},
                ValueError,
                "`strategy='finite_difference'` does not give `matrix='ggn'`",
            ),
            (lambda o, b: o, {}, TypeError, "`output_loss` must return a scalar tensor"),
        ],
        ids=["another loss", "differences", "no scalar"],
    )
    def test_of_options(self, output_loss, options, error, message):
        with pytest.raises(error, match=message):
            hessian_spectrum(
                *cases.make("mlp"), steps=3, matrix="ggn", output_fn=outputs_of, output_loss=output_loss, **options
            )

    def test_a_loss_that_sees_more_than_the_outputs(self):
        module, batches, _ = cases.make("mlp")

        def penalized(outputs: Tensor, batch: Any) -> Tensor:
            return flat_cross_entropy(outputs, batch) + 0.1 * module[0].weight.square().sum()

        with pytest.raises(ValueError, match="depend on the parameters by way of the outputs only"):
            hessian_spectrum(
                module, batches, lambda m, b: penalized(m(b[0]), b), steps=3, matrix="residual",
                output_fn=outputs_of, output_loss=penalized,
            )  # fmt: skip

    def test_no_second_derivative(self):
        once = cases.OnceDifferentiable.apply
        module, batches, _ = cases.make("mlp")
        with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*do not give this matrix"):
            hessian_spectrum(
                module, batches, lambda m, b: flat_cross_entropy(once(m(b[0])), b), steps=3, matrix="ggn",
                output_fn=lambda m, b: once(m(b[0])), output_loss=flat_cross_entropy,
            )  # fmt: skip


class TestBlocks:
    def operators(self, name: str, strategy: Any, sizes: tuple[int, ...]) -> list[DiagonalBlock]:
        module, batches, loss_fn = cases.make(name)
        module.eval()
        parameters = [p for p in module.parameters() if p.requires_grad]
        ends = np.cumsum([0, *sizes])
        blocks = [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]
        matrix = HessianMatrix(lambda batch: loss_fn(module, batch.data), parameters, blocks=blocks)
        risk = RiskOperator(matrix, weighted_batches(batches), strategy=strategy, dtype=torch.float64)
        operators = [DiagonalBlock(risk, block) for block in blocks]
        choose_difference_step(operators)
        return operators

    @pytest.mark.parametrize("strategy", ["graph", "recompute", "finite_difference"])
    @pytest.mark.parametrize(("name", "sizes"), [("mlp", (2, 2)), ("conv_batchnorm", (4, 2))])
    def test_products_are_those_of_the_diagonal_blocks(self, name, sizes, strategy):
        hessian = oracles.dense_hessian(*cases.make(name))
        first, second = self.operators(name, strategy, sizes)
        n = first.dimension
        assert n + second.dimension == len(hessian)
        generator = torch.Generator().manual_seed(1)
        u, v = (torch.randn(o.dimension, generator=generator, dtype=torch.float64) for o in (first, second))
        expected = (hessian[:n, :n] @ u, hessian[n:, n:] @ v)
        slack = 1e-12 if strategy != "finite_difference" else 1e-7
        passes = first.risk.passes
        for found in (block_products([first, second], [u, v]), [first.matvec(u), second.matvec(v)]):
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=slack * float(theirs.norm()))
        assert first.risk.passes == passes + 3  # one for both, and one each


class SpectralFilter(nn.Module):
    """Multiplies frequencies by complex weights, which are views of real ones, as Fourier neural operators do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))  # before the weights, so that these begin at an odd place
        self.weights = nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        filtered = torch.fft.rfft(x) * torch.view_as_complex(self.weights)
        return self.scale * torch.tanh(torch.fft.irfft(filtered, n=x.size(-1)))


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_real_weights_that_are_seen_as_complex_ones(matrix: str) -> None:
    torch.manual_seed(0)
    module, batch = SpectralFilter().double(), (torch.randn(5, 6).double(), torch.randn(5, 6).double())
    sizes = [p.numel() for p in module.parameters()]

    def outputs_at(flat: Tensor) -> Tensor:
        values = (part.view_as(p) for part, p in zip(flat.split(sizes), module.parameters(), strict=True))
        named = {name: value.clone() for (name, _), value in zip(module.named_parameters(), values, strict=True)}
        return functional_call(module, named, (batch[0],))

    flat = nn.utils.parameters_to_vector(module.parameters()).detach()
    if matrix == "hessian":
        gradients = torch.autograd.grad(
            F.mse_loss(module(batch[0]), batch[1]), [*module.parameters()], create_graph=True
        )
        rows = []
        for index in range(len(flat)):  # of directions that are no views
            unit = [part.clone() for part in torch.eye(len(flat), dtype=flat.dtype)[index].split(sizes)]
            unit = [part.view_as(p) for part, p in zip(unit, module.parameters(), strict=True)]
            row = torch.autograd.grad(gradients, [*module.parameters()], unit, retain_graph=True)
            rows.append(nn.utils.parameters_to_vector(row))
        dense = torch.stack(rows)
    else:
        jacobian = torch.autograd.functional.jacobian(outputs_at, flat).flatten(0, -2)
        dense = 2 / len(jacobian) * jacobian.T @ jacobian
    options = {"output_fn": outputs_of, "output_loss": squared_error} if matrix == "ggn" else {}
    spectrum = hessian_spectrum(
        module, [batch], lambda m, b: squared_error(m(b[0]), b), matrix=matrix, steps=len(flat), **options
    )
    eigenvalues = torch.linalg.eigvalsh(dense)
    assert spectrum.lambda_max == pytest.approx(float(eigenvalues[-1]), rel=1e-9)
    assert spectrum.lambda_min == pytest.approx(float(eigenvalues[0]), rel=1e-9, abs=1e-9)
