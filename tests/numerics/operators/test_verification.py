"""Products and gradients that are not those of the loss are found out: never a wrong C_t that looks certain."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hesd import hessian_spectrum, layer_spectra
from lightning_hesd.numerics.analysis import engine
from lightning_hesd.numerics.inputs.batches import weighted_batches
from lightning_hesd.numerics.inputs.options import analysis_options
from lightning_hesd.numerics.operators import self_checks
from lightning_hesd.numerics.operators.directional import Comparison
from lightning_hesd.numerics.operators.strategies import AnalysisCache
from lightning_hesd.numerics.operators.verification import Verification
from tests import cases
from tests.cases import custom


def in_float32(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise TypeError("float32 only")
    return x


LIBRARY = torch.library.Library("hesd_tests", "DEF")
LIBRARY.define("sin_backward(Tensor g, Tensor x) -> Tensor")
LIBRARY.impl("sin_backward", lambda g, x: g * x.cos(), "CPU")  # without an autograd formula

# The derivative of the saved sigmoid is missing in the second derivative.
swish = custom("Swish", lambda x: (x * x.sigmoid(), x, x.sigmoid()), lambda g, x, s: g * (s + x * s * (1 - s)))
sin = custom("Sin", lambda x: (x.sin(), x), torch.ops.hesd_tests.sin_backward)
reverse = custom("Reverse", lambda x: (x.view_as(x),), lambda g: -0.5 * g)
numpy_tanh = custom(
    "NumPyTanh",
    lambda x: (torch.from_numpy(np.tanh(x.numpy())), x),
    lambda g, x: g * torch.from_numpy(1 - np.tanh(x.detach().numpy()) ** 2),
)
float32_tanh = custom("Float32Tanh", lambda x: (in_float32(x).tanh(), x), lambda g, x: g * (1 - x.tanh() ** 2))
bfloat16_tanh = custom(
    "BFloat16Tanh",
    lambda x: (x.bfloat16().tanh().to(x.dtype), x),
    lambda g, x: (g.bfloat16() * (1 - x.bfloat16().tanh() ** 2)).to(g.dtype),
)
# The gradient by x forgets that it depends on w: its double backward pass is not symmetric.
times = custom("Times", lambda x, w: (x @ w.T, x, w), lambda g, x, w: (g @ w.data, g.T @ x))
# Its second derivative is half of what it should be.
wrong_square = custom("WrongSquare", lambda x: (x.square(), x), lambda g, x: g * (x + x.detach()))


def straight_through(x: Tensor) -> Tensor:
    return x + (torch.round(4 * x) / 4 - x).detach()


class Structured:
    """A batch of a class of its own."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


def net(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    module = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2)]).to(dtype)
    return module, [(torch.randn(6, 3, dtype=dtype), torch.randn(6, 2, dtype=dtype))]


def loss_through(function: Any) -> Any:
    return lambda m, b: F.mse_loss(m[1](function(m[0](b[0]))), b[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("function", "plain", "named"),
    [(swish, F.silu, "SwishBackward"), (numpy_tanh, torch.tanh, "NumPyTanhBackward"), (sin, torch.sin, "sin_backward")],
)
def test_a_wrong_second_derivative_is_replaced_by_differences(function, plain, named, dtype):
    found, truth = (hessian_spectrum(*net(dtype), loss_through(f)) for f in (function, plain))
    assert found.strategy == "finite_difference"
    assert named in found.strategy_reason
    assert found.verified == "yes"
    low, high = found.c_t_interval
    assert low <= truth.c_t <= high
    assert high - low < 0.02
    assert (truth.verified, truth.strategy) == ("yes", "graph")


def test_a_strategy_that_was_asked_for_is_not_replaced():
    spectrum = hessian_spectrum(*net(), loss_through(swish), strategy="graph")
    assert (spectrum.verified, math.isnan(spectrum.c_t)) == ("no", True)
    assert "SwishBackward" in spectrum.reason


def detached(m: Any, b: Any) -> Tensor:
    outputs = m[1](torch.tanh(m[0](b[0])))
    return F.mse_loss(outputs, (2 * outputs).detach())


def by_item(m: Any, b: Any) -> Tensor:
    loss = loss_through(torch.tanh)(m, b)
    return loss * float(loss.detach())


def reversed_branch(m: Any, b: Any) -> Tensor:
    return loss_through(torch.tanh)(m, b) + loss_through(reverse)(m, b)


NOT_DERIVATIVES = {
    "gradient reversal": reversed_branch,
    "straight-through estimator": loss_through(straight_through),
    "detached target": detached,
    "a number taken out of the graph": by_item,
}


@pytest.mark.parametrize("name", NOT_DERIVATIVES)
@pytest.mark.parametrize(("dtype", "strategy"), [(torch.float32, "auto"), (torch.float64, "finite_difference")])
def test_where_the_gradient_is_not_that_of_the_loss_there_is_no_c_t(name, dtype, strategy):
    spectrum = hessian_spectrum(*net(dtype), NOT_DERIVATIVES[name], strategy=strategy, steps=10)
    assert spectrum.verified == "no"
    assert np.isnan([spectrum.c_t, spectrum.lambda_max, spectrum.lambda_min, spectrum.trace]).all()
    assert not spectrum.type_certain
    assert "not the derivative of the loss" in spectrum.reason
    assert str(spectrum).startswith("no spectrum: the gradient")
    if name == "gradient reversal":
        assert "ReverseBackward" in spectrum.reason, "it names the custom function"
        layers = layer_spectra(*net(dtype), reversed_branch, strategy=strategy)
        assert {layer: found.verified for layer, found in layers.items()} == {"0": "no", "1": "no"}


@pytest.mark.parametrize("share", [1.0, 0.1, 0.01])
def test_a_small_part_that_the_loss_hides_is_found_out_whatever_the_weights(share):
    """One direction in a hundred shows less than a hundredth of a missing part."""

    def hiding(m: Any, b: Any) -> Tensor:
        return F.mse_loss(m(b[0]), b[1]) + share * m[0].weight.detach().sin().sum()

    for seed in range(40):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
        spectrum = hessian_spectrum(module, [(torch.randn(6, 3), torch.randn(6, 2))], hiding, steps=2)
        assert spectrum.verified == "no", seed


def test_a_detached_factor_that_hardly_changes_is_found_out():
    """The norm of normalized outputs is nearly constant, and its derivative a few thousandths of the gradient."""

    def loss(m: Any, b: Any) -> Tensor:
        hidden = m[1](m[0](b[0]))
        return F.cross_entropy(m[2](hidden / hidden.norm(dim=1, keepdim=True).detach()), b[1])

    for seed in range(20):
        torch.manual_seed(seed)
        module = nn.ModuleList([nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 4)])
        spectrum = hessian_spectrum(module, [(torch.randn(16, 16), torch.randint(4, (16,)))], loss, steps=2)
        assert spectrum.verified == "no", seed


class Tokens(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding = nn.Embedding(7, 4, **options)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens).mean(1)))


def tokens() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(torch.randint(3, (12, 6)), torch.randn(12, 3))]


def test_a_gradient_that_is_wrong_by_less_than_float32_can_tell_is_found_out():
    """Its slope is off by 1 %, which agrees by the measure of float32."""
    spectrum = hessian_spectrum(Tokens(scale_grad_by_freq=True), tokens(), cases.squared_error, steps=20)
    assert (spectrum.verified, math.isnan(spectrum.c_t)) == ("no", True)
    assert "scale_grad_by_freq" in spectrum.reason


@pytest.mark.parametrize("strategy", ["auto", "finite_difference"])
def test_sparse_gradients_are_compared_like_dense_ones(strategy):
    found, dense = (
        hessian_spectrum(Tokens(sparse=sparse), tokens(), cases.squared_error, steps=20, strategy=strategy)
        for sparse in (True, False)
    )
    assert found.verified == "yes"
    assert found.c_t == pytest.approx(dense.c_t, rel=1e-5)


def test_kinks_do_not_hide_the_answer_in_float64():
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(32, 32), nn.ReLU())]
    data = (torch.randn(64, 32), torch.randn(64, 32))
    spectrum = hessian_spectrum(nn.Sequential(*layers), [data], cases.squared_error, steps=3)
    assert (spectrum.verified, spectrum.strategy) == ("yes", "graph")


@pytest.mark.parametrize(
    ("activation", "scale", "zeros", "dtype"),
    [(nn.ReLU, 1.0, 1, torch.float64), (nn.ReLU, 30.0, 16, torch.float32), (nn.PReLU, 1.0, 6, torch.float32)],
)
def test_a_kink_at_the_weights_is_no_wrong_gradient(activation, scale, zeros, dtype):
    """Where data are zero and so is the bias, a ReLU is at its kink, and differences average both its slopes."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), activation(), nn.Linear(8, 3))
    nn.init.zeros_(module[0].bias)
    inputs = torch.randn(16, 4)
    inputs[:zeros] = 0.0
    data = [(inputs.to(dtype), scale * torch.randn(16, 3, dtype=dtype))]
    spectrum = hessian_spectrum(module.to(dtype), data, cases.squared_error, steps=20)
    assert (spectrum.verified, spectrum.strategy) == ("yes", "graph")


def test_a_singularity_at_the_weights_is_not_verified_beside_them():
    torch.manual_seed(0)
    module = nn.Linear(3, 3, bias=False).double()
    module.weight.data = torch.outer(torch.randn(3), torch.randn(3)).double()  # singular values of 1e-16
    batches = [(torch.randn(6, 3).double(), torch.randn(6, 3).double())]
    spectrum = hessian_spectrum(
        module, batches, lambda m, b: cases.squared_error(m, b) + torch.linalg.matrix_norm(m.weight, "nuc")
    )
    assert not (spectrum.verified == "yes" and spectrum.lambda_max > 1e6)


def test_a_jump_at_the_weights_is_not_verified_beside_them():
    """The Householder map of PyTorch multiplies by the diagonal of its weights, which is ±1, cut to integers."""
    torch.manual_seed(1)
    layer = torch.nn.utils.parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="householder")
    module, batch = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2)), (torch.randn(10, 4), torch.randn(10, 2))
    spectrum = hessian_spectrum(module, [batch], cases.squared_error, steps=20)
    assert spectrum.verified != "yes"
    assert not spectrum.type_certain


def test_a_module_that_float64_is_not_for_is_compared_in_its_own_precision():
    spectrum, expected = (hessian_spectrum(*net(), loss_through(f)) for f in (float32_tanh, torch.tanh))
    assert spectrum.strategy == "graph", "the second derivative of a custom function is used where it is right"
    assert spectrum.c_t == pytest.approx(expected.c_t, rel=1e-4)
    assert spectrum.verified == "yes"
    assert "a precision of 1e-07" in spectrum.verification
    kinked = hessian_spectrum(*net(), loss_through(lambda x: float32_tanh(x).relu()))
    assert kinked.verified in {"yes", "unknown"}
    assert not math.isnan(kinked.c_t)


def test_low_precision_inside_the_loss_widens_the_interval_and_is_verified_without_it():
    exact = loss_through(torch.tanh)
    coarse = loss_through(lambda x: torch.tanh(x.bfloat16()).to(x.dtype))
    truth, found = (hessian_spectrum(*net(torch.float64), loss) for loss in (exact, coarse))
    assert found.rounding >= 0.01 * found.lambda_max
    low, high = found.c_t_interval
    assert low <= truth.c_t <= high
    assert (found.verified, "float64" in found.verification) == ("yes", True)


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("cast", [Tensor.float, lambda x: x.to(torch.float32), lambda x: x.type(torch.float32)])
def test_a_small_missing_part_is_found_behind_casts_and_kinks(cast, scale):
    def loss(module: nn.Module, batch: Any, missing: float = 0.0) -> Tensor:
        outputs = cast(module[1](cast(module[0](batch[0])).to(batch[0].dtype).relu()))
        return 30 + scale * (F.mse_loss(outputs, cast(batch[1])) + missing * outputs.detach().square().mean())

    assert hessian_spectrum(*net(), loss, steps=3).verified == "yes"
    spectrum = hessian_spectrum(*net(), lambda m, b: loss(m, b, 0.01), steps=3)
    assert (spectrum.verified, "`detach`" in spectrum.verification) == ("no", True)


@pytest.mark.parametrize("structure", [Structured, lambda x, y: (x, y)])
def test_data_of_any_structure_and_constants_do_not_hide_the_answer(structure):
    batch, constant = structure(torch.randn(64, 3), torch.randn(64, 2)), torch.randn(3, 3)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        x, y = (batch.x, batch.y) if isinstance(batch, Structured) else batch
        return F.mse_loss(module[1](module[0](torch.cat([x, x @ constant])).relu()), torch.cat([y, y]))

    spectrum = hessian_spectrum(net()[0], [batch], loss, steps=3, batch_weight=lambda _: 64)
    assert (spectrum.verified, "float64" in spectrum.verification) == ("yes", True)


def test_a_comparison_that_a_cast_hides_leaves_the_spectrum_uncertain():
    kinked = loss_through(lambda x: bfloat16_tanh(x).relu())
    spectrum = hessian_spectrum(*net(torch.float64), kinked, tolerance="type")
    assert (spectrum.verified, spectrum.type_certain) == ("unknown", False)
    assert "not verified" in str(spectrum)


def test_gradients_that_underflow_in_a_cast_are_not_verified_by_the_loss_without_it():
    def loss(module: nn.Module, batch: Any) -> Tensor:
        small = 1e-9 * module[1](module[0](batch[0])).half().square().float().mean()  # its gradient is zero in float16
        return small + 1e-9 * module[0].weight.square().sum()

    assert hessian_spectrum(*net(), loss, steps=3).verified != "yes"


@pytest.mark.parametrize("matrix", ["ggn", "residual"])
@pytest.mark.parametrize(("activation", "dtype"), [(torch.tanh, torch.float64), (torch.relu, torch.float32)])
def test_the_parts_of_the_hessian_are_compared_too(matrix, dtype, activation):
    options = {"output_fn": lambda m, b: m[1](activation(m[0](b[0]))), "output_loss": lambda o, b: F.mse_loss(o, b[1])}
    assert hessian_spectrum(*net(dtype), loss_through(activation), matrix=matrix, **options).verified == "yes"


def test_a_part_that_the_outputs_hide_is_named():
    def outputs(m: Any, b: Any) -> Tensor:
        return m[1](m[0](b[0]).tanh().detach())

    spectrum = hessian_spectrum(
        *net(),
        loss_through(torch.tanh),
        matrix="ggn",
        output_fn=outputs,
        output_loss=lambda o, b: F.mse_loss(o, b[1]),
    )
    assert spectrum.verified == "no"
    assert "`output_fn` or `output_loss` hides a part" in spectrum.reason


@pytest.mark.parametrize("strategy", ["auto", "finite_difference"])
@pytest.mark.parametrize("sparse", [False, True])
def test_rows_for_padding_are_constants(strategy, sparse):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(4, 2, padding_idx=1, sparse=sparse), nn.Tanh(), nn.Flatten(), nn.Linear(6, 1))
    nn.init.ones_(module[0].weight[1].data)
    batches = [(torch.tensor([[0, 1, 2], [3, 2, 1], [1, 1, 0]]), torch.randn(3, 1))]

    def by_products(m: Any, b: Any) -> Tensor:
        rows = torch.stack([m[0].weight[0], torch.ones(2), m[0].weight[2], m[0].weight[3]])
        return F.mse_loss(m[3](m[1](rows[b[0]]).flatten(1)), b[1])

    found = hessian_spectrum(module, batches, cases.squared_error, strategy=strategy)
    truth = hessian_spectrum(module, batches, by_products)
    assert (found.verified, truth.verified) == ("yes", "yes")
    assert "rows of embeddings for padding count as constants" in found.verification
    assert found.c_t == pytest.approx(truth.c_t, abs=found.c_t_error + truth.c_t_error)
    assert found.c_t_error < 0.05

    def tied(m: Any, b: Any) -> Tensor:  # the row of padding is a class as well, and moves
        return F.cross_entropy(m[1](m[0](b[0])).sum(1) @ m[0].weight.T, b[0][:, 0])

    if sparse:
        return
    assert hessian_spectrum(module, batches, tied, strategy=strategy).verified == "no"
    without = [(torch.tensor([[0, 3, 2], [3, 2, 0], [2, 2, 0]]), torch.randn(3, 1))]
    found, truth = (hessian_spectrum(module.double(), without, tied, strategy=s) for s in (strategy, "recompute"))
    assert (found.verified, found.c_t) == ("yes", pytest.approx(truth.c_t, rel=1e-6))


@pytest.mark.parametrize(("scale", "big"), [(1e-10, 0.0), (1.0, 1e12)])
def test_weights_of_any_size_are_moved_by_the_right_distance(scale, big):
    torch.manual_seed(0)
    module = nn.Linear(3, 2).double()
    module.weight.data.mul_(scale)
    module.bias.data.fill_(big)  # does not curve the loss

    def loss(m: Any, b: Any) -> Tensor:
        return F.mse_loss(torch.tanh(b[0] @ m.weight.T / scale), b[1]) + 1e-12 * m.bias.sum()

    assert hessian_spectrum(module, [(torch.randn(6, 3).double(), torch.randn(6, 2).double())], loss).verified == "yes"


def test_a_gauss_newton_matrix_with_a_wrong_curvature_of_the_loss_is_refused():
    def loss(m: Any, b: Any) -> Tensor:
        return options["output_loss"](options["output_fn"](m, b), b)

    options = {
        "output_fn": lambda m, b: m[1](torch.tanh(m[0](b[0]))),
        "output_loss": lambda outputs, b: wrong_square(outputs - b[1]).mean(),
    }
    spectrum = hessian_spectrum(*net(torch.float64), loss, matrix="ggn", **options)
    assert spectrum.verified == "no"
    assert math.isnan(spectrum.lambda_max)


def test_parameters_stay_the_same_objects_with_the_same_gradient_accumulators():
    """DistributedDataParallel waits at these accumulators."""
    module, batches = net()
    accumulators = [p.view_as(p).grad_fn.next_functions[0][0] for p in module.parameters()]
    before = [(p, p.data_ptr(), p.dtype, p.detach().clone()) for p in module.parameters()]
    hessian_spectrum(module, batches, loss_through(torch.tanh), steps=3)
    for p, (same, pointer, dtype, values) in zip(module.parameters(), before, strict=True):
        assert p is same
        assert (p.data_ptr(), p.dtype) == (pointer, dtype)
        assert torch.equal(p, values)
    assert accumulators == [p.view_as(p).grad_fn.next_functions[0][0] for p in module.parameters()]
    assert torch.get_default_dtype() == torch.float32


def test_recurrent_networks_are_compared_in_float64():
    torch.manual_seed(0)
    module = nn.LSTM(3, 4, batch_first=True)
    data = (torch.randn(2, 5, 3), torch.randn(2, 5, 4))
    spectrum = hessian_spectrum(module, [data], lambda m, b: F.mse_loss(m(b[0])[0], b[1]), steps=3)
    assert spectrum.verified == "yes"
    assert "float64" in spectrum.verification


def of_late_samples(right: Any, wrong: Any) -> Any:
    """Return the loss whose first six samples are marked by zeros, and have the right part; others the wrong one."""

    def loss(m: Any, b: Any) -> Tensor:
        hidden = m[0](b[0])
        outputs = m[1](torch.where(b[1][:, :1] == 0, right(hidden), wrong(hidden)))
        return outputs.square().mean()

    return loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("analyze", [hessian_spectrum, layer_spectra])
def test_wrong_derivatives_for_some_samples_only_are_found_out(dtype, batches, analyze):
    module, [(x, _)] = net(dtype)
    x, y = torch.cat([x, 2 * x]), torch.arange(12, dtype=dtype).div(6, rounding_mode="floor")[:, None]
    samples = [(x, y)] if batches == 1 else [(x[:6], y[:6]), (x[6:], y[6:])]

    def found(loss: Any) -> Any:
        spectra = analyze(module, samples, loss)
        return [spectra] if analyze is hessian_spectrum else [*spectra.values()]

    hidden = found(of_late_samples(torch.tanh, lambda h: h.tanh() + 0.3 * (h - h.detach())))
    assert all(s.verified == "no" and "not the derivative" in s.reason for s in hidden)
    for spectrum, truth in zip(
        found(of_late_samples(F.silu, swish)), found(of_late_samples(F.silu, F.silu)), strict=True
    ):
        assert (spectrum.strategy, spectrum.verified) == ("finite_difference", "yes")
        assert spectrum.lambda_max == pytest.approx(truth.lambda_max, rel=1e-3)


def test_a_part_hidden_for_some_samples_is_found_behind_many_kinks_of_float32():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)]
    module, batches = nn.Sequential(*layers), [(torch.randn(64, 1, 8, 8), torch.arange(64) < 32)]

    def loss(m: Any, b: Any, is_hidden: bool) -> Tensor:
        outputs = m(b[0])
        targets = outputs.softmax(1).detach() if is_hidden else torch.ones_like(outputs)
        return torch.where(b[1], outputs.square().mean(1), F.cross_entropy(outputs, targets, reduction="none")).mean()

    verified = [hessian_spectrum(module, batches, lambda m, b, h=h: loss(m, b, h), steps=3).verified for h in (0, 1)]
    assert verified == ["yes", "no"]


def count(calls: list[int], loss: Tensor) -> Tensor:
    calls.append(1)
    return loss * (1 + len(calls) / 100)


def test_a_loss_that_is_another_one_at_each_call_has_no_spectrum():
    generator, calls = torch.Generator(), [1]
    losses = [
        lambda m, b: loss_through(torch.tanh)(m, (b[0] + torch.randn(b[0].shape, generator=generator), b[1])),
        lambda m, b: count(calls, loss_through(torch.tanh)(m, b)),
    ]
    for loss in losses:
        spectrum = hessian_spectrum(*net(), loss)
        assert (spectrum.verified, math.isnan(spectrum.c_t)) == ("no", True)
        assert "for the same weights, batch and seed" in spectrum.reason


def test_a_loss_that_is_undefined_for_a_few_samples_is_compared_for_all():
    module, batches = net()
    spectrum = hessian_spectrum(module, batches, lambda m, b: m[1](m[0](b[0]).tanh())[5:].square().mean())
    assert spectrum.verified == "yes"


class Fixpoint(nn.Module):
    """An implicit layer, z = tanh(Wz + Ux), whose hook solves the equation of the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u, self.has_hook = nn.Linear(3, 3), nn.Linear(3, 3), True
        with torch.no_grad():
            self.w.weight *= 0.5

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        with torch.set_grad_enabled(not self.has_hook):
            for _ in range(60):
                z = torch.tanh(self.w(z) + self.u(x))
        if not self.has_hook:
            return z
        z = torch.tanh(self.w(z) + self.u(x))
        at = z.detach().requires_grad_()
        again = torch.tanh(self.w(at) + self.u(x))

        def solve(gradient: Tensor) -> Tensor:
            solution = gradient
            for _ in range(60):
                solution = gradient + torch.autograd.grad(again, at, solution, retain_graph=True)[0]
            return solution

        z.register_hook(solve)
        return z


def test_hooks_act_where_the_gradient_is_right_only_with_them():
    torch.manual_seed(0)
    module, batches = Fixpoint(), [(torch.randn(5, 3), torch.randn(5, 3))]
    cache = AnalysisCache()
    weighted, options = weighted_batches(batches), analysis_options()
    found = [engine.analyze(module, weighted, cases.squared_error, options, cache=cache) for _ in range(2)]
    module.has_hook = False
    truth = hessian_spectrum(module, batches, cases.squared_error)
    for spectrum in found:
        assert (spectrum.strategy, spectrum.verified) == ("finite_difference", "yes")
        assert "hooks act" in spectrum.strategy_reason
        assert spectrum.c_t == pytest.approx(truth.c_t, abs=spectrum.c_t_error + truth.c_t_error)


class Reversible(torch.autograd.Function):
    """x + tanh(layer(x)), whose backward pass recomputes, and adds to the `.grad` of the layer's parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            return x + layer(x).tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(x + ctx.layer(x).tanh(), gradient)
        return x.grad, None


def test_gradients_that_a_backward_pass_accumulates_by_itself_count():
    module, batches = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]).double(), net(torch.float64)[1]
    gradients = [torch.ones_like(p) for p in module.parameters()]
    for p, g in zip(module.parameters(), gradients, strict=True):
        p.grad = g

    def loss(m: Any, b: Any, reversible: bool) -> Tensor:
        x = m[0](b[0])
        return (Reversible.apply(x, m[1]) if reversible else x + m[1](x).tanh()).square().mean()

    def spectra(reversible: bool) -> list[Any]:
        problem = module, batches, lambda m, b: loss(m, b, reversible)
        return [hessian_spectrum(*problem), *layer_spectra(*problem).values()]

    for found, truth in zip(spectra(reversible=True), spectra(reversible=False), strict=True):
        assert (found.verified, found.strategy) == ("yes", "finite_difference")
        assert found.lambda_max == pytest.approx(truth.lambda_max, rel=1e-4)
    assert all(p.grad is g and bool((g == 1).all()) for p, g in zip(module.parameters(), gradients, strict=True))


def test_later_analyses_compare_only_graphs_with_other_operations():
    cache = AnalysisCache()

    def evaluations(function: Any) -> int:
        (module, batches), calls = net(), []

        def loss(m: Any, b: Any) -> Tensor:
            calls.append(1)
            return loss_through(function)(m, b)

        engine.analyze(module, weighted_batches(batches), loss, analysis_options(steps=4), cache=cache)
        return len(calls)

    first, later, other = map(evaluations, (torch.tanh, torch.tanh, torch.sin))
    assert other == first > later == 1  # the graph


def test_asymmetric_products_that_the_comparison_missed_are_found_out(monkeypatch):
    monkeypatch.setattr(self_checks, "verify", lambda *_, **__: Verification("agrees", "agrees", "not really"))

    def loss(m: Any, b: Any) -> Tensor:
        return F.mse_loss(times(m[0](b[0]).tanh(), m[1].weight), b[1])

    found = hessian_spectrum(*net(torch.float64), loss)
    truth = hessian_spectrum(*net(torch.float64), lambda m, b: F.mse_loss(m[0](b[0]).tanh() @ m[1].weight.T, b[1]))
    assert found.strategy == "finite_difference"
    assert "asymmetric" in found.strategy_reason
    assert found.c_t == pytest.approx(truth.c_t, rel=1e-4)
    assert hessian_spectrum(*net(torch.float64), loss, strategy="recompute").verified == "no"


@pytest.mark.parametrize(
    ("values", "rounding", "outcome"),
    [
        ([2.0, 1.3, 1.0005, 7.0], 0.0, "agrees"),  # one estimate that is close will do
        ([2.0, 1.3, 1.2, 1.201], 0.0, "differs"),  # they converge to another value
        ([2.0, 1.3, 1.7, 0.6], 0.0, "undecided"),  # they do not converge
        ([2.0], 0.0, "undecided"),
        ([1.2, 1.2, 1.0], 0.1, "undecided"),  # rounding may have moved them
    ],
)
def test_outcomes_of_comparisons(values, rounding, outcome):
    comparison = Comparison(1.0, 1e-3, abs)
    for value in values:
        comparison.add(value, rounding)
    assert comparison.outcome == outcome
