import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hesd import Spectrum, hessian_spectrum
from tests import cases, example_spectra, oracles

# Of the spectral radius. float64: nothing but rounding. float32: the weights and data are the same numbers, so that
# nothing but the rounding of the products differs.
ACCURACY = {torch.float64: 1e-8, torch.float32: 1e-4}


def assert_eigenvalues(spectrum: Spectrum, true: np.ndarray, accuracy: float) -> None:
    """Compare all nodes of a record, whose only probe ran until nothing was left."""
    [nodes] = spectrum.nodes
    assert oracles.hausdorff(nodes, true) <= accuracy * np.abs(true).max()


@pytest.mark.parametrize("name", cases.NAMES)
@pytest.mark.parametrize("dtype", ACCURACY)
def test_as_many_steps_as_parameters_find_every_distinct_eigenvalue(name, dtype):
    """How accurate few steps are is in `operators/test_strategies.py` and `test_coverage.py`."""
    true = oracles.case_eigenvalues(name)
    radius = np.abs(true).max()
    problem = cases.make(name, dtype)
    spectrum = hessian_spectrum(*problem, steps=len(true))
    slack = ACCURACY[dtype] * radius
    assert spectrum.dimension == len(true)
    assert spectrum.num_samples == sum(len(batch[0]) for batch in problem.batches)
    assert spectrum.lambda_min == pytest.approx(true[0], rel=0, abs=slack)
    assert spectrum.lambda_max == pytest.approx(true[-1], rel=0, abs=slack)
    assert spectrum.c_t == pytest.approx(true[0] / true[-1], rel=0, abs=ACCURACY[dtype] * radius / true[-1])
    assert_eigenvalues(spectrum, true, ACCURACY[dtype])
    assert true[0] < -100 * slack  # negative curvature beyond doubt: a Gauss-Newton matrix would not do
    with torch.no_grad():
        losses = [float(problem.loss_fn(problem.module.eval(), batch)) for batch in problem.batches]
    assert spectrum.verified == "yes"
    assert spectrum.asymmetry < 20 * torch.finfo(dtype).eps
    mean = np.average(losses, weights=[len(batch[0]) for batch in problem.batches])
    assert spectrum.loss == pytest.approx(mean, rel=1e-12 if dtype == torch.float64 else 1e-6)


class TestClosedForms:
    @pytest.mark.parametrize("dtype", ACCURACY)
    def test_linear_regression(self, dtype):
        problem = cases.regression((7, 4), inputs=6, outputs=3, dtype=dtype)
        x = torch.cat([batch[0] for batch in problem.batches]).double().numpy()
        # Mean over samples and outputs; every output has the same block.
        true = np.linalg.eigvalsh(2 * x.T @ x / (len(x) * 3))
        spectrum = hessian_spectrum(*problem)
        assert_eigenvalues(spectrum, true, ACCURACY[dtype])
        assert spectrum.c_t == 0.0

    def test_a_quadratic_form(self):
        spectrum = quadratic([-1.0, 2.0, 4.0], torch.float64, seed=3)
        np.testing.assert_allclose(spectrum.nodes, [[-1.0, 2.0, 4.0]], rtol=0, atol=1e-14)
        assert spectrum.c_t == pytest.approx(-0.25, rel=1e-14)
        # The weights are the squared components of the start vector.
        (start,) = start_vectors(3, 3, 1, "gaussian")
        np.testing.assert_allclose(spectrum.weights[0], (start / start.norm()).square(), rtol=0, atol=1e-14)


def quadratic(diagonal: list[float], dtype: torch.dtype, **options: Any) -> Spectrum:
    """Analyze a loss with this Hessian."""
    module = example_spectra.Quadratic(np.array(diagonal), dtype)
    return hessian_spectrum(module, [torch.zeros(1)], example_spectra.quadratic_loss, **options)


def softmax_head(inputs: int, classes: int, samples: int, seed: int) -> cases.Problem:
    """Softmax regression with fewer samples than inputs: positive semidefinite, and singular."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(inputs, classes)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(inputs))
    x = torch.randn(samples, inputs, generator=generator)
    return cases.Problem(module, [(x, torch.randint(classes, (samples,), generator=generator))], cases.cross_entropy)


class TestRounding:
    """Positive semidefinite Hessians in float32: every negative Ritz value is rounding, and must not count."""

    @pytest.mark.parametrize("seed", [0, 1])
    @pytest.mark.parametrize(
        "make",
        [
            functools.partial(cases.regression, (8,), 30, 2, torch.float32),
            functools.partial(cases.regression, (100,), 1000, 10, torch.float32),
            functools.partial(softmax_head, 30, 3, 5),
            functools.partial(softmax_head, 1000, 5, 40),
        ],
        ids=lambda make: f"{make.func.__name__} {make.args}",
    )
    def test_no_negative_curvature_is_invented(self, make, seed):
        spectrum = hessian_spectrum(*make(seed), steps=60)
        assert (spectrum.c_t, spectrum.hesd_type) == (0.0, "MP")
        # The worst of these is 1.5 epsilons of the norm. It grows with the number of parameters (4 at 100 000), so the
        # threshold must leave room.
        negative = -spectrum.lambda_min / (torch.finfo(torch.float32).eps * spectrum.lambda_max)
        assert negative <= 2.5

    @pytest.mark.parametrize(("weights", "vectors"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
    def test_the_coarser_of_weights_and_vectors_counts(self, weights, vectors):
        for seed in range(3):
            problem = cases.regression((8,), inputs=30, outputs=2, dtype=weights, seed=seed)
            assert hessian_spectrum(*problem, dtype=vectors).c_t == 0.0

    def test_small_but_real_negative_curvature_is_kept(self):
        assert quadratic([-3e-5, 0.0, 0.5, 1.0], torch.float32).c_t == pytest.approx(-3e-5, rel=1e-2)


class TestDtype:
    @pytest.mark.parametrize(
        ("weights", "vectors", "accuracy"), [(torch.float32, torch.float64, 1e-6), (torch.float64, torch.float32, 1e-5)]
    )
    def test_vectors_may_be_finer_or_coarser_than_the_weights(self, weights, vectors, accuracy):
        true = oracles.case_eigenvalues("mlp")
        spectrum = hessian_spectrum(*cases.make("mlp", weights), steps=len(true), dtype=vectors)
        assert_eigenvalues(spectrum, true, accuracy)

    def test_mixed_parameters_are_analysed_in_the_finer_type(self):
        def loss(module: nn.ParameterDict, _: Any) -> Tensor:
            fine, coarse = module.fine.square(), module.coarse.double().square()
            return fine @ torch.tensor([1.0, 2.0]).double() + coarse @ torch.tensor([-2.0, 8.0]).double()

        mixed = nn.ParameterDict({"fine": torch.ones(2, dtype=torch.float64), "coarse": torch.ones(2)})
        spectrum = hessian_spectrum(mixed, [torch.zeros(1)], loss)
        # The coarse parameters' share of the products is no better than their own arithmetic.
        np.testing.assert_allclose(spectrum.nodes, [[-4.0, 2.0, 4.0, 16.0]], rtol=1e-6)
        # The fine ones' is: a block of the fine parameters alone is exact.
        fine = hessian_spectrum(mixed, [torch.zeros(1)], loss, parameters=lambda name, p: name == "fine")
        np.testing.assert_allclose(fine.nodes, [[2.0, 4.0]], rtol=1e-14)

    def test_half_precision_parameters_are_analysed_with_single_precision_vectors(self):
        module = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
        x = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.bfloat16)
        spectrum = hessian_spectrum(module, [x], lambda module, batch: module(batch).square().mean())
        np.testing.assert_allclose(spectrum.nodes, [[1.0, 4.0]], rtol=2**-7)


class TestBatches:
    def test_weights_of_the_user(self):
        module, batches, loss_fn = cases.make("mlp")
        weights = {len(batch[0]): weight for batch, weight in zip(batches, (0.5, 2.0, 7.25), strict=True)}
        true = oracles.eigenvalues(module, batches, loss_fn, weights=list(weights.values()))
        spectrum = hessian_spectrum(module, batches, loss_fn, batch_weight=lambda batch: weights[len(batch[0])])
        assert_eigenvalues(spectrum, true, 1e-10)
        assert spectrum.num_samples == sum(len(batch[0]) for batch in batches)

    @pytest.mark.parametrize(("attached", "strategy"), [(True, "graph"), (False, "recompute")])
    def test_a_batch_without_influence_counts_in_the_mean(self, attached, strategy):
        module, batches, loss_fn = cases.make("mlp")
        idle = (torch.full_like(batches[0][0][:2], torch.inf), batches[0][1][:2])

        def loss(module: nn.Module, batch: Any) -> Tensor:
            if not batch[0].isfinite().all():
                # A constant, with or without a place in the graph.
                return (module[0].weight * 0).sum() if attached else torch.zeros((), dtype=torch.float64)
            return loss_fn(module, batch)

        alone = hessian_spectrum(module, batches, loss_fn, strategy=strategy)
        together = hessian_spectrum(module, [batches[0], idle, *batches[1:]], loss, strategy=strategy)
        share = alone.num_samples / (alone.num_samples + 2)
        assert together.num_samples == alone.num_samples + 2
        assert together.loss == pytest.approx(share * alone.loss, rel=1e-14)
        np.testing.assert_allclose(together.nodes, share * alone.nodes, rtol=0, atol=1e-12 * alone.lambda_max)

    def test_they_are_read_once(self):
        module, batches, loss_fn = cases.make("mlp")
        expected, once = (
            hessian_spectrum(module, given, loss_fn, steps=5, strategy="recompute")
            for given in (batches, iter(batches))
        )
        np.testing.assert_array_equal(once.nodes, expected.nodes)


def start_vectors(n: int, seed: int, probes: int, probe: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if probe == "gaussian":
        return [torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(probes)]
    return [torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1 for _ in range(probes)]


@pytest.mark.parametrize("probe", ["gaussian", "rademacher"])
def test_trace_and_moments_are_those_of_the_same_probe_vectors(probe):
    hessian = oracles.case_hessian("tied")
    n = len(hessian)
    spectrum = hessian_spectrum(*cases.make("tied"), steps=5, probes=3, seed=11, probe=probe)
    units = torch.stack([v / v.norm() for v in start_vectors(n, 11, 3, probe)])
    products = units @ hessian
    first, second, third = (float(p.sum()) / 3 for p in (units * products, products**2, products @ hessian * products))
    assert spectrum.trace == pytest.approx(n * first, rel=1e-12)
    assert spectrum.moment(2) == pytest.approx(second, rel=1e-12)
    assert spectrum.moment(3) == pytest.approx(third, rel=0, abs=1e-12 * second)


def test_each_probe_has_its_own_row_and_the_first_is_the_only_one_of_one():
    spectrum = hessian_spectrum(*cases.make("mlp"), steps=6, probes=3, confidence=0.9)
    assert spectrum.nodes.shape == spectrum.weights.shape == spectrum.residuals.shape == (3, 6)
    assert (spectrum.steps_per_probe, spectrum.matvecs) == ((6, 6, 6), 18)
    assert (spectrum.confidence, spectrum.mode, spectrum.seconds > 0) == (0.9, "eval", True)
    np.testing.assert_allclose(spectrum.weights.sum(axis=1), 1.0, rtol=1e-14)
    assert len({row.tobytes() for row in spectrum.nodes}) == 3
    one, other = (hessian_spectrum(*cases.make("mlp"), steps=6, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(one.nodes, spectrum.nodes[:1])
    assert (one.seed, other.seed) == (0, 1)
    assert one.trace != other.trace
    assert spectrum.gradient_equivalents is None  # few products: a gradient would take too much of their time
    assert hessian_spectrum(*cases.make("mlp"), steps=20, probes=3).gradient_equivalents > 0


class TestParameters:
    def test_a_filter_is_not_asked_about_frozen_parameters(self):
        problem = cases.make("frozen")
        names = []
        hessian_spectrum(*problem, steps=1, parameters=lambda name, p: bool(names.append(name)) or True)
        assert names == [name for name, p in problem.module.named_parameters() if p.requires_grad]
        assert "0.bias" not in names

    def test_unused_parameters_have_no_curvature(self):
        problem = cases.make("mlp")
        expected = hessian_spectrum(*problem)
        problem.module.register_parameter("idle", nn.Parameter(torch.ones(5, dtype=torch.float64)))
        spectrum = hessian_spectrum(*problem)
        assert spectrum.dimension == expected.dimension + 5
        assert_eigenvalues(spectrum, np.array([*expected.nodes[0], 0.0]), 1e-12)

    def test_memory_layout_and_scalars_do_not_matter(self):
        spectra = []
        for layout in (torch.contiguous_format, torch.channels_last):
            module, batches, _ = cases.make("conv_batchnorm")
            module.to(memory_format=layout).register_parameter("scale", nn.Parameter(torch.tensor(1.5).double()))
            spectra.append(hessian_spectrum(module, batches, lambda m, b: F.mse_loss(m.scale * m(b[0]), b[1])))
        assert spectra[0].dimension == 43
        np.testing.assert_allclose(spectra[0].nodes, spectra[1].nodes, rtol=0, atol=1e-12 * spectra[0].lambda_max)

    def test_a_complex_parameter_may_be_filtered_out(self):
        problem = cases.make("mlp")
        expected = hessian_spectrum(*problem, steps=5)
        problem.module.register_parameter("phase", nn.Parameter(torch.zeros(2, dtype=torch.complex128)))
        spectrum = hessian_spectrum(*problem, steps=5, parameters=lambda name, p: not p.is_complex())
        np.testing.assert_array_equal(spectrum.nodes, expected.nodes)


class TestModes:
    def test_train_uses_the_statistics_of_the_batch_and_eval_the_running_ones(self):
        for mode in ("train", "eval"):
            problem = cases.make("conv_batchnorm")
            true = oracles.eigenvalues(*problem, train=mode == "train")
            assert_eigenvalues(hessian_spectrum(*problem, mode=mode), true, 1e-10)

    def test_dropout_draws_masks_that_follow_from_the_seed_for_each_batch(self):
        """That all products have the same mask is in `isolation/test_isolation.py`."""
        module, batches, loss_fn = cases.make("mlp")
        module.insert(2, nn.Dropout(0.5))
        first, again, other = (
            hessian_spectrum(module, batches[:1], loss_fn, steps=12, mode="train", seed=seed) for seed in (0, 0, 3)
        )
        np.testing.assert_array_equal(first.nodes, again.nodes)
        assert abs(first.loss - other.loss) > 1e-3
        # The same samples twice: equal masks would make both batches one.
        twice = hessian_spectrum(module, [batches[0], batches[0]], loss_fn, steps=12, mode="train")
        assert abs(twice.loss - first.loss) > 1e-3


class TestUndefined:
    def test_a_loss_linear_in_the_parameters_has_no_criteria(self):
        module, batches, _ = cases.regression((4, 3), inputs=3, outputs=2, dtype=torch.float64)
        spectrum = hessian_spectrum(module, batches, lambda m, batch: m(batch[0]).mean())
        assert (spectrum.lambda_min, spectrum.lambda_max) == (0.0, 0.0)
        assert math.isnan(spectrum.c_t)
        assert "no curvature" in spectrum.reason
        assert (spectrum.hesd_type, spectrum.type_certain, spectrum.converged) == (None, False, False)
        assert spectrum.trace == spectrum.trace_error == 0.0
        grid, values = spectrum.density()
        assert np.trapezoid(values, grid) == pytest.approx(1.0, abs=1e-8)

    def test_a_loss_without_gradient_has_none_either(self):
        problem = cases.make("mlp")
        constant = hessian_spectrum(*problem[:2], lambda m, b: m(b[0]).mean() * 0, strategy="finite_difference")
        assert constant.reason is not None
        spectrum = hessian_spectrum(*problem[:2], lambda m, batch: problem.loss_fn(m, batch).detach())
        assert spectrum.reason is not None
        assert spectrum.loss > 0

    def test_negative_curvature_only(self):
        problem = cases.regression((6,), inputs=4, outputs=1, dtype=torch.float64)
        spectrum = hessian_spectrum(*problem[:2], lambda m, batch: -cases.squared_error(m, batch))
        assert spectrum.c_t_interval == (-math.inf, -math.inf) == (spectrum.c_t, -spectrum.r_e)
        assert (spectrum.hesd_type, spectrum.type_certain, spectrum.converged) == ("MN", True, True)

    @pytest.mark.parametrize("exponent", [-60, 60])
    def test_criteria_do_not_depend_on_the_scale_of_the_loss(self, exponent):
        module, batches, loss_fn = cases.make("mlp")
        expected = hessian_spectrum(module, batches, loss_fn)
        scaled = hessian_spectrum(module, batches, lambda m, batch: 10.0**exponent * loss_fn(m, batch))
        assert scaled.c_t == pytest.approx(expected.c_t, rel=1e-9)
        assert scaled.lambda_max == pytest.approx(expected.lambda_max * 10.0**exponent, rel=1e-9)
        assert scaled.k_h() == pytest.approx(expected.k_h(), rel=1e-6)
