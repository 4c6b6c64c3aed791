"""Sampling errors against brute force: what C_t and the extremes really do from one sample to the next."""

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hesd import hessian_spectrum
from lightning_hesd.numerics.analysis.sampling_error import sampling_error
from lightning_hesd.numerics.collectives import LOCAL, Collectives
from lightning_hesd.numerics.inputs.batches import SkippedBatchError, WeightedBatch, weighted_batches
from lightning_hesd.numerics.krylov.lanczos import Lanczos
from lightning_hesd.numerics.operators.curvature import HessianMatrix
from lightning_hesd.numerics.operators.diagonal_block import DiagonalBlock
from lightning_hesd.numerics.operators.risk_operator import RiskOperator
from tests import cases, example_spectra, oracles
from tests.ranks import in_threads

Batch = tuple[Tensor, Tensor]
SAMPLES = 256
EXTREMES = ("lambda_min", "lambda_max", "c_t")


def draw(samples: int, seed: int) -> Batch:
    """Samples of a population: two classes that a noisy plane divides."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.tensor([1.0, -0.6, 0.4, 0.9, -1.2, 0.3], dtype=torch.float64)
    widths = torch.tensor([2.0, 1.0, 1.0, 0.7, 0.5, 0.5], dtype=torch.float64)
    x = widths * torch.randn(samples, 6, generator=generator, dtype=torch.float64)
    noise = 0.5 * torch.randn(samples, generator=generator, dtype=torch.float64)
    return x, (x @ plane + noise > 0).long()


loss_fn = cases.cross_entropy


@functools.cache
def trained() -> nn.Module:
    """A network on its way: extreme eigenvalues that stand out, so that first order theory applies."""
    module = cases.seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)), 1).double()
    optimizer, data = torch.optim.Adam(module.parameters(), lr=0.02), draw(2048, 1)
    for _ in range(15):
        optimizer.zero_grad()
        loss_fn(module, data).backward()
        optimizer.step()
    return module.eval().requires_grad_(True)


def extremes(batches: list[Batch]) -> np.ndarray:
    """Smallest and largest eigenvalue and their ratio, a row for each batch."""
    x, y = map(torch.stack, zip(*batches, strict=True))
    values = torch.linalg.eigvalsh(oracles.cross_entropy_hessians(trained(), x, y, chunk_size=8)).numpy()
    return np.stack([values[:, 0], values[:, -1], values[:, 0] / values[:, -1]], axis=1)


def analyze(seed: int, batches: int = 1, samples: int = SAMPLES, **options: Any) -> Any:
    x, y = draw(samples, seed)
    parts = list(zip(x.chunk(batches), y.chunk(batches), strict=True))
    options = {"steps": 30, "sampling_error": True, "strategy": "graph", **options}
    return hessian_spectrum(trained(), parts, loss_fn, **options)


def fields(spectrum: Any, kind: str) -> np.ndarray:
    return np.array([getattr(spectrum, f"{name}_sampling_{kind}") for name in EXTREMES])


@functools.cache
def brute_force() -> tuple[np.ndarray, np.ndarray]:
    """Standard deviations over samples, and biases against a sample forty times as large."""
    values, [limit] = extremes([draw(SAMPLES, 100 + seed) for seed in range(64)]), extremes([draw(40 * SAMPLES, 9)])
    return values.std(axis=0, ddof=1), values.mean(axis=0) - limit


@functools.cache
def estimates() -> tuple[np.ndarray, np.ndarray]:
    """Mean stated standard errors and biases of twelve of these samples."""
    found = [analyze(100 + seed) for seed in range(12)]
    return tuple(np.mean([fields(spectrum, kind) for spectrum in found], axis=0) for kind in ("error", "bias"))


class TestAgainstBruteForce:
    @pytest.mark.parametrize("name", EXTREMES)
    def test_standard_errors_are_standard_deviations(self, name):
        position = EXTREMES.index(name)
        assert 0.7 <= estimates()[0][position] / brute_force()[0][position] <= 1.5

    def test_extremes_are_pushed_outward(self):
        _, (true_min, true_max, true_c_t) = brute_force()
        _, (bias_min, bias_max, bias_c_t) = estimates()
        deviations = brute_force()[0]
        assert true_min < -2 * deviations[0] / 8  # beyond chance, over 64 samples
        assert 1 / 3 <= bias_min / true_min <= 3
        # The other two biases are small beside their noise here.
        assert bias_max > 0 > bias_c_t
        assert abs(bias_max - true_max) <= deviations[1] / 2
        assert abs(bias_c_t - true_c_t) <= deviations[2] / 2


class TestClosedForm:
    """Samples whose Hessians are diag(a, 0, ..., −b): eigenvectors stay, so that everything is known."""

    @staticmethod
    def analyze(a: Tensor, b: Tensor) -> Any:
        module = example_spectra.Quadratic(np.zeros(6))

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            return ((batch[0] * module.w[0] ** 2 - batch[1] * module.w[-1] ** 2) / 2).mean()

        return hessian_spectrum(module, [(a, b)], loss, sampling_error=True)

    @staticmethod
    def samples(seed: int) -> Tensor:
        return 1 + torch.rand(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    @staticmethod
    def error_of_mean(values: Tensor) -> float:
        return float(values.view(16, 4).mean(dim=1).std()) / 4

    def test_extremes_and_their_ratio(self):
        a, b = self.samples(0), self.samples(1) / 3
        spectrum = self.analyze(a, b)
        assert spectrum.lambda_max_sampling_error == pytest.approx(self.error_of_mean(a), rel=1e-8)
        assert spectrum.lambda_min_sampling_error == pytest.approx(self.error_of_mean(b), rel=1e-8)
        assert spectrum.lambda_min_sampling_bias == pytest.approx(0.0, abs=1e-8)
        assert spectrum.lambda_max_sampling_bias == pytest.approx(0.0, abs=1e-8)
        # The error of b − ratio·a, to first order: the numbers as they are, correlation included.
        expected = self.error_of_mean(b - b.mean() / a.mean() * a) / float(a.mean())
        assert spectrum.c_t_sampling_error == pytest.approx(expected, rel=1e-8)

    def test_the_mean_of_a_ratio_is_not_the_ratio_of_means(self):
        # E[−b/a] for constant b: −b/ā·(1 + Var(ā)/ā²).
        a = self.samples(0)
        spectrum = self.analyze(a, torch.full_like(a, 0.5))
        expected = -0.5 / float(a.mean()) * (self.error_of_mean(a) / float(a.mean())) ** 2
        assert spectrum.c_t_sampling_bias == pytest.approx(expected, rel=1e-4)


class TestGroups:
    @pytest.mark.parametrize(
        ("options", "error_rtol", "bias_rtol"),
        [
            ({"batches": 4}, 1e-6, 1e-6),  # sixteen groups of the same samples in every case, in the same order
            ({"batches": 16}, 1e-6, 1e-6),
            ({"strategy": "finite_difference"}, 1e-4, 1e-3),
            ({"strategy": "auto"}, 1e-4, 1e-3),
        ],
    )
    def test_neither_batches_nor_strategy_matter(self, options, error_rtol, bias_rtol):
        one, other = analyze(7), analyze(7, **options)
        assert other.sampling_groups == one.sampling_groups == 16
        np.testing.assert_allclose(fields(other, "error"), fields(one, "error"), rtol=error_rtol)
        np.testing.assert_allclose(fields(other, "bias"), fields(one, "bias"), rtol=bias_rtol)

    def test_more_batches_are_more_groups_and_errors_cost_one_pass_over_the_samples(self):
        one, other, plain = analyze(7), analyze(7, 64), analyze(7, sampling_error=False)
        assert other.sampling_groups == 64
        np.testing.assert_allclose(fields(other, "error"), fields(one, "error"), rtol=0.6)
        assert plain.sampling_groups is plain.c_t_sampling_error is None
        assert one.matvecs == plain.matvecs + 2  # one for each end

    def test_errors_need_no_basis(self):
        one, other = (analyze(7, steps=40, basis=basis) for basis in ("device", "none"))
        np.testing.assert_allclose(fields(other, "error"), fields(one, "error"), rtol=1e-4)
        assert (np.sign(fields(other, "bias"))[:2] == [-1, 1]).all()


@pytest.mark.parametrize(("samples", "batches"), [(7, 1), (5, 2)])
def test_fewer_than_eight_groups_have_a_reason_and_everything_else(samples, batches):
    with pytest.warns(RuntimeWarning, match=f"no sampling error: .* 8 groups .* can be cut into {samples} only"):
        spectrum = analyze(7, batches, samples=samples)
    assert "analyze more samples" in (spectrum.sampling_reason or "")
    assert spectrum.sampling_groups is spectrum.c_t_sampling_error is None
    assert spectrum.c_t == analyze(7, batches, samples=samples, sampling_error=False).c_t
    enough = analyze(7, samples=8)
    assert (enough.sampling_groups, enough.sampling_reason) == (8, None)


class Batched:
    """A batch of a class of its own; of `visible` ones the tensors can be seen."""

    def __init__(self, x: Tensor, y: Tensor, *, visible: bool = True) -> None:
        if visible:
            self.x, self.y = x, y
        self.get = lambda: (x, y)

    def __iter__(self) -> Any:  # as the batches of torch_geometric do
        yield from ((name, value) for name, value in vars(self).items() if name != "get")


def stale(module: nn.Module, batch: Batched) -> Tensor:
    """A loss that does not see what was cut."""
    return loss_fn(module, batch.get())


def contrastive(module: nn.Module, batch: Batched) -> Tensor:
    """A loss that compares every sample with all others of its batch."""
    logits = module(batch.x)
    return F.cross_entropy(logits @ logits.T, torch.arange(len(logits)))


def token_mean(module: nn.Module, batch: Any) -> Tensor:
    """A mean over more than samples: the first ones have more terms."""
    terms = F.cross_entropy(module(batch[0]), batch[1], reduction="none")
    weights = 1.0 + 9.0 * (batch[0][:, 0] > 0)
    return (weights * terms).sum() / weights.sum()


class TestVerification:
    """Sampling errors rest on groups that are what they should be; or there are none."""

    @staticmethod
    def analyze(loss: Any, make: Any, batches: int = 1, **options: Any) -> Any:
        x, y = draw(SAMPLES, 7)
        parts = [make(*part) for part in zip(x.chunk(batches), y.chunk(batches), strict=True)]
        weight = SAMPLES / batches
        options = {"batch_weight": lambda _: weight, "steps": 40, "sampling_error": True, **options}
        return hessian_spectrum(trained(), parts, loss, **options)

    def test_batches_of_a_class_of_ones_own_are_cut(self):
        spectrum = self.analyze(lambda module, batch: loss_fn(module, (batch.x, batch.y)), Batched)
        assert fields(spectrum, "error").tolist() == pytest.approx(fields(analyze(7), "error").tolist(), rel=1e-9)

    @pytest.mark.parametrize(
        ("loss", "make", "message"),
        [
            (
                stale,
                Batched,
                "the same for all of its groups of samples: it does not depend on the values that were cut",
            ),
            (stale, functools.partial(Batched, visible=False), "cannot tell the number of samples|nothing in a batch"),
            (contrastive, Batched, r"not a mean over samples \(it may use statistics of the batch\)"),
            (token_mean, lambda *parts: parts, "not a mean over samples"),
            (loss_fn, lambda x, y: (x, y, torch.tensor([0, 3, 8])), "may be positions of samples"),
            (
                lambda m, b: loss_fn(m, b) / (len(b[0]) // 256),
                lambda *parts: parts,
                "group of batch 0 has no finite loss",
            ),
        ],
    )
    def test_others_have_the_reason_and_the_remedy_instead(self, loss, make, message):
        wanted = rf"(?s)no sampling error: .*cut into 1 only: .*({message}).*Pass at least 8 batches"
        with pytest.warns(RuntimeWarning, match=wanted):
            assert self.analyze(loss, make).c_t_sampling_error is None

    def test_a_tolerance_that_needs_sampling_errors_takes_all_steps_without(self):
        with pytest.warns(RuntimeWarning, match=r"(?s)not a mean over samples.*Pass at least 8 batches"):
            spectrum = self.analyze(contrastive, Batched, tolerance="auto", sampling_error=False)
        assert (spectrum.steps, spectrum.converged) == (40, False)

    def test_the_remedy_works(self):
        spectrum = self.analyze(contrastive, Batched, batches=8)
        assert spectrum.sampling_groups == 8
        assert (fields(spectrum, "error") > 0).all()

    def test_curvature_that_does_not_depend_on_the_groups(self):
        module = nn.Linear(6, 1).double()

        def constant_curvature(module: nn.Module, batch: Batch) -> Tensor:
            return module.weight.square().sum() - module.bias.square().sum() + (module(batch[0]) * 1.0).mean()

        with pytest.warns(RuntimeWarning, match=r"the curvature is the same in all groups.*Pass at least 16 batches"):
            spectrum = hessian_spectrum(module, [draw(64, 3)], constant_curvature, sampling_error=True)
        assert spectrum.c_t == pytest.approx(-1.0)


def skips(module: nn.Module, batch: Batch) -> Tensor:
    """A loss that leaves out every batch of an odd class at its beginning."""
    if batch[1][0] == 1:
        raise SkippedBatchError
    return loss_fn(module, batch)


def risk_of(batches: list[WeightedBatch], loss: Any, ranks: Collectives) -> RiskOperator:
    """Return the risk operator of a copy of the network, on one of several ranks."""
    module = copy.deepcopy(trained())
    matrix = HessianMatrix(lambda batch: loss(module, batch.data), list(module.parameters()))
    return RiskOperator(matrix, batches, strategy="graph", dtype=torch.float64, collectives=ranks)


class TestSkippedBatches:
    @pytest.mark.parametrize("strategy", ["auto", "finite_difference"])
    def test_are_left_out(self, strategy):
        x, y = draw(SAMPLES, 7)
        parts = list(zip(x.chunk(32), y.chunk(32), strict=True))
        kept = [part for part in parts if part[1][0] == 0]
        assert 8 < len(kept) < 32
        options = {"steps": 10, "sampling_error": True, "strategy": strategy}
        found, expected = (hessian_spectrum(trained(), of, skips, **options) for of in (parts, kept))
        assert f"{32 - len(kept)} of 32 batches left out" in found.strategy_reason
        assert found.num_samples == 8 * len(kept)
        assert found.loss == pytest.approx(expected.loss, rel=1e-12)
        assert found.c_t == pytest.approx(expected.c_t, rel=1e-6)
        assert found.sampling_groups == expected.sampling_groups > len(kept), "some cut, and some parts skipped"
        assert found.c_t_sampling_error == pytest.approx(expected.c_t_sampling_error, rel=1e-4)

    def test_all_and_those_of_a_whole_rank(self):
        x, y = draw(8, 1)
        with pytest.raises(ValueError, match=r"skipped all 2 batches.*Pass a `loss_fn`"):
            hessian_spectrum(trained(), [(x, torch.ones_like(y))] * 2, skips)

        def work(ranks: Collectives) -> float:
            x, y = draw(16, ranks.rank)
            risk = risk_of(weighted_batches([(x, torch.full_like(y, ranks.rank))]), skips, ranks)
            assert (risk.num_batches, risk.num_skipped, risk.weight) == (1, 1, 16.0)
            return float(risk.product([torch.ones_like(p) for p in trained().parameters()]).sum())

        first, second = in_threads(2, work)
        assert first == second != 0


def test_several_ranks_find_the_same_together_as_one_alone():
    def share(ranks: Collectives) -> list[float]:
        x, y = draw(SAMPLES, 7)
        batches = weighted_batches(zip(x.chunk(6), y.chunk(6), strict=True))
        operator = DiagonalBlock(risk_of(batches[ranks.rank :: ranks.size], loss_fn, ranks))
        start = torch.randn(operator.dimension, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        lanczos = Lanczos(operator.matvec, start, 40)
        lanczos.run()
        found = sampling_error(operator, [lanczos])
        assert found.sampling_groups == 18
        return [number for value in vars(found).values() for number in np.ravel(value)]

    alone = share(LOCAL)
    first, *others = in_threads(3, share)
    assert others == [first] * 2
    assert first == pytest.approx(alone, rel=1e-8)
