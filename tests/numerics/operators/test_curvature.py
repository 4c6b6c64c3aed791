"""Gauss-Newton matrix, residual and diagonal blocks, against dense ones."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_hesd import Spectrum, hessian_spectrum
from lightning_hesd.numerics.inputs.batches import WeightedBatch, weighted_batches
from lightning_hesd.numerics.operators.curvature import GaussNewtonMatrix, HessianMatrix, ResidualMatrix
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
    matrix = {
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


@pytest.mark.parametrize("case", CASES)
class TestParts:
    def test_gauss_newton_is_the_dense_one(self, case):
        expected = oracles.dense_gauss_newton(*problem(case))
        found = dense(operator(case, "ggn"))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))

    def test_both_parts_add_up_to_the_hessian(self, case):
        whole, *parts = (operator(case, kind) for kind in ("hessian", "ggn", "residual"))
        recomputed = [operator(case, kind, "recompute") for kind in ("ggn", "residual")]
        for v in unit_vectors(whole.dimension, 3):
            both = whole.matvec(v)
            size = float(both.abs().max())
            for first, second in (parts, recomputed):
                products = first.matvec(v), second.matvec(v)
                assert min(float(product.abs().max()) for product in products) > 1e-3 * size
                torch.testing.assert_close(sum(products), both, rtol=0, atol=1e-14 * size)

    def test_residual_by_differences(self, case):
        exact, differences = operator(case, "residual"), operator(case, "residual", "finite_difference")
        errors = [float((differences.matvec(v) - exact.matvec(v)).norm()) for v in unit_vectors(exact.dimension)]
        assert max(errors) <= differences.risk.product_error < 1e-6


def test_the_time_of_a_product_is_a_mean():
    found = operator("cross-entropy", "hessian")
    started = time.perf_counter()
    for v in unit_vectors(found.dimension, 3):
        found.matvec(v)
    assert 0 < found.risk.seconds_per_product <= (time.perf_counter() - started) / 3


def once(module: nn.Module, batch: Any) -> Tensor:
    return cases.OnceDifferentiable.apply(module(batch[0]))


@pytest.mark.parametrize(
    ("output_loss", "options", "error", "message"),
    [
        (lambda o, b: 2 * flat_cross_entropy(o, b), {}, ValueError, r"batch 0 they are 1\.\d+ and 2\.\d+"),
        (flat_cross_entropy, {"strategy": "finite_difference"}, ValueError, "does not give `matrix='ggn'`"),
        (lambda o, b: o, {}, TypeError, "`output_loss` must return a scalar tensor"),
        (flat_cross_entropy, {"output_fn": once}, RuntimeError, "differentiated twice.*do not give this matrix"),
    ],
    ids=["another loss", "differences", "no scalar", "no second derivative of the outputs"],
)
def test_mistakes(output_loss, options, error, message):
    with pytest.raises(error, match=message):
        hessian_spectrum(
            *cases.make("mlp"), steps=3, matrix="ggn", output_loss=output_loss, **{"output_fn": outputs_of, **options}
        )


def test_a_loss_that_sees_more_than_the_outputs():
    module, batches, _ = cases.make("mlp")

    def penalized(outputs: Tensor, batch: Any) -> Tensor:
        return flat_cross_entropy(outputs, batch) + 0.1 * module[0].weight.square().sum()

    options = {"matrix": "residual", "output_fn": outputs_of, "output_loss": penalized}
    with pytest.raises(ValueError, match="depend on the parameters by way of the outputs only"):
        hessian_spectrum(module, batches, lambda m, b: penalized(m(b[0]), b), steps=3, **options)


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
    options = {"output_fn": outputs_of, "output_loss": two_losses}

    def analyze(**options: Any) -> Spectrum:
        return hessian_spectrum(module, [batch], lambda m, b: two_losses(m(b[0]), b), steps=50, **options)

    ggn, residual = (analyze(matrix=kind, **options) for kind in ("ggn", "residual"))
    assert (ggn.matrix, residual.matrix) == ("ggn", "residual")
    assert ggn.c_t == 0
    assert ggn.lambda_min >= -ggn.rounding
    assert residual.lambda_min < -residual.rounding
    # Traces of each, by the same random vector, add up to that of the Hessian.
    assert ggn.trace + residual.trace == pytest.approx(analyze().trace, rel=1e-12)


@pytest.mark.parametrize("strategy", ["graph", "recompute", "finite_difference"])
def test_products_are_those_of_the_diagonal_blocks(strategy):
    module, batches, loss_fn = cases.make("conv_batchnorm")
    blocks = [slice(0, 4), slice(4, 6)]
    matrix = HessianMatrix(lambda batch: loss_fn(module.eval(), batch.data), list(module.parameters()), blocks=blocks)
    risk = RiskOperator(matrix, weighted_batches(batches), strategy=strategy, dtype=torch.float64)
    first, second = operators = [DiagonalBlock(risk, block) for block in blocks]
    choose_difference_step(operators)
    hessian, n = oracles.case_hessian("conv_batchnorm"), first.dimension
    assert n + second.dimension == len(hessian)
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.randn(o.dimension, generator=generator, dtype=torch.float64) for o in operators)
    kept = u.clone()
    expected = (hessian[:n, :n] @ u, hessian[n:, n:] @ v)
    slack = 1e-12 if strategy != "finite_difference" else 1e-7
    passes = risk.passes
    for found in (block_products(operators, [u, v]), [first.matvec(u), second.matvec(v)]):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=slack * float(theirs.norm()))
            assert not ours.requires_grad
    assert risk.passes == passes + 3  # one for both, and one each
    assert torch.equal(u, kept)


class SpectralFilter(nn.Module):
    """Multiplies frequencies by complex weights, which are views of real ones, as Fourier neural operators do."""

    def __init__(self, as_complex: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))  # before the weights, so that these begin at an odd place
        self.weights = cases.seeded(lambda: nn.Parameter(torch.randn(4, 2)))
        self.as_complex = as_complex
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        filtered = torch.fft.rfft(x) * self.as_complex(self.weights)
        return self.scale * torch.tanh(torch.fft.irfft(filtered, n=x.size(-1)))


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_real_weights_that_are_seen_as_complex_ones(matrix: str) -> None:
    batches = [tuple(unit_vectors(6, 10).chunk(2))]
    twin = SpectralFilter(lambda w: torch.complex(*w.unbind(-1)))
    if matrix == "hessian":
        dense, options = oracles.dense_hessian(twin, batches, cases.squared_error), {}
    else:
        options = {"output_fn": outputs_of, "output_loss": squared_error}
        dense = oracles.dense_gauss_newton(twin, batches, squared_error)
    module = SpectralFilter(torch.view_as_complex)
    spectrum = hessian_spectrum(module, batches, cases.squared_error, matrix=matrix, steps=len(dense), **options)
    eigenvalues = torch.linalg.eigvalsh(dense)
    assert spectrum.lambda_max == pytest.approx(float(eigenvalues[-1]), rel=1e-9)
    assert spectrum.lambda_min == pytest.approx(float(eigenvalues[0]), rel=1e-9, abs=1e-9)
