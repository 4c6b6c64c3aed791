"""Bounds on Hessians of ReLU networks against dense ones, by automatic differentiation sample by sample."""

import functools
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hesd.sample_size.bounds import (
    bias_norm,
    hessian_bound,
    hidden_size_bound,
    input_norm,
    loss_difference_bound,
    network_bound,
    weight_norm,
)
from tests import cases as problems
from tests import oracles

SAFE_WEIGHT_NORM = 2**-0.75
"""Above it the published bound exceeds the one that holds."""


def network(layers: int, scale: float, seed: int, *, biased: bool, relu_on_logits: bool) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    widths = [3, *[4] * (layers - 1), 3]
    modules: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layer = nn.Linear(inputs, outputs, bias=biased, dtype=torch.float64)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64) / math.sqrt(inputs))
        modules += [layer, nn.ReLU()]
    return nn.Sequential(*(modules if relu_on_logits else modules[:-1]))


def dense_terms(module: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The G-term and the whole Hessian of one sample."""
    batches = [(x[None], y[None])]
    ggn = oracles.dense_gauss_newton(module, batches, lambda outputs, batch: F.cross_entropy(outputs, batch[1]))
    return ggn, oracles.dense_hessian(module, batches, problems.cross_entropy)


class Case(NamedTuple):
    layers: int
    biased: bool
    relu_on_logits: bool
    weight_norm: float
    ggn: float
    residual: float
    hessian: float
    tight: dict[str, float]
    published: float

    @property
    def rounding(self) -> float:
        """That of the difference of dense terms, whose summands are as large as ‖J‖²."""
        return 16 * torch.finfo(torch.float64).eps * self.tight["ggn"]


@functools.cache
def cases() -> list[Case]:
    """Random networks from very small to large weights, each with one sample, and the norms of its terms."""
    generator = torch.Generator().manual_seed(0)
    found = []
    settings = itertools.product((1, 2, 3, 4), (0.05, 0.7, 2.0), (False, True), (False, True))
    for seed, (layers, scale, biased, relu_on_logits) in enumerate(settings):
        module = network(layers, scale, seed, biased=biased, relu_on_logits=relu_on_logits)
        x = torch.randn(3, generator=generator, dtype=torch.float64) * (0.1, 1.0, 3.0)[seed % 3]
        ggn, hessian = dense_terms(module, x, torch.tensor(seed % 3))
        norms = [float(torch.linalg.matrix_norm(term, 2)) for term in (ggn, hessian - ggn, hessian)]
        tight = {name: network_bound(module, x[None], matrix=name) for name in ("ggn", "residual", "hessian")}
        published = hessian_bound(input_norm(x[None]), weight_norm(module), layers, kind="published")
        found.append(Case(layers, biased, relu_on_logits, weight_norm(module), *norms, tight, published))
    return found


class TestTight:
    @pytest.mark.parametrize("matrix", ["ggn", "residual", "hessian"])
    def test_holds_always(self, matrix: str) -> None:
        for case in cases():
            assert getattr(case, matrix) <= case.tight[matrix] * (1 + 1e-12) + case.rounding, case

    @pytest.mark.parametrize(("biased", "layers"), [(False, 1), (True, 1), (False, 4), (True, 4)])
    def test_on_the_g_term_is_met_with_equality(self, biased: bool, layers: int) -> None:
        # Hidden layers are multiples of the identity, inputs and biases point along (1, 1), so all units are active and
        # no size is lost; the last layer looks along (1, −1), so that the two classes are equally likely.
        m_w, m_b, along, across = 1.3, 0.7, torch.tensor([1.0, 1.0]).double(), torch.tensor([1.0, -1.0]).double()
        linear = [nn.Linear(2, 2, bias=biased, dtype=torch.float64) for _ in range(layers)]
        with torch.no_grad():
            for layer in linear:
                layer.weight.copy_(m_w * torch.eye(2).double())
                if biased:
                    layer.bias.copy_(m_b * along / math.sqrt(2))
            linear[-1].weight.copy_(m_w * torch.outer(across, across) / 2)
        module = nn.Sequential(*[part for layer in linear for part in (layer, nn.ReLU())][:-1])
        ggn, _ = dense_terms(module, x := 0.4 * along, torch.tensor(0))
        bound = network_bound(module, x[None], matrix="ggn")
        assert float(torch.linalg.matrix_norm(ggn, 2)) == pytest.approx(bound, rel=1e-12)

    def test_on_the_h_term_is_met_by_errors_that_are_certain(self) -> None:
        module = network(2, 20.0, 0, biased=True, relu_on_logits=False)
        x = torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64)
        ggn, hessian = dense_terms(module, x, module(x).argmin())
        bound = hessian_bound(3.0, weight_norm(module), 2, matrix="residual", bias_norm=0.0)
        assert float(torch.linalg.matrix_norm(hessian - ggn, 2)) == pytest.approx(bound, rel=1e-6)

    @pytest.mark.parametrize("m_b", [None, 0.7])
    def test_on_the_h_term_is_the_norm_of_the_pairs_of_layers(self, m_b: float | None) -> None:
        m_x, m_w, layers = 1.5, 1.3, 4
        sizes = {0: m_x}
        for p in range(1, layers):
            sizes[p] = m_w * sizes[p - 1] + (m_b or 0.0)
        pairs = np.zeros((layers, layers))
        for p, q in itertools.combinations(range(1, layers + 1), 2):
            # From the logits down to layer q, and from below it down to layer p, which is given x_{p−1} and a one.
            along = m_w ** (layers - q) * m_w ** (q - 1 - p)
            pairs[p - 1, q - 1] = pairs[q - 1, p - 1] = math.sqrt(2) * along * math.hypot(sizes[p - 1], m_b is not None)
        found = hessian_bound(m_x, m_w, layers, matrix="residual", bias_norm=m_b)
        assert found == pytest.approx(np.linalg.norm(pairs, 2), rel=1e-12)
        whole = hessian_bound(m_x, m_w, layers, matrix="hessian", bias_norm=m_b)
        assert whole == pytest.approx(found + hessian_bound(m_x, m_w, layers, bias_norm=m_b), rel=1e-14)

    def test_on_the_hessian_does_not_vanish_with_the_weights(self) -> None:
        # Two layers, W → 0: G is of the order of W², the H-term that of ‖π − y‖·‖relu'‖·‖x‖.
        x = torch.tensor([1.0, -2.0, 2.0], dtype=torch.float64)
        for scale in (1e-2, 1e-4):
            module = network(2, scale, 3, biased=False, relu_on_logits=False)
            ggn, hessian = dense_terms(module, x, torch.tensor(0))
            bounds = {matrix: network_bound(module, x[None], matrix=matrix) for matrix in ("ggn", "hessian")}
            assert float(torch.linalg.matrix_norm(ggn, 2)) <= bounds["ggn"] < 40 * scale**2
            # ‖π − y‖ = √(2/3) for three classes that are equally likely, as long as one unit is active.
            assert float(torch.linalg.matrix_norm(hessian, 2)) == pytest.approx(3 * math.sqrt(2 / 3), rel=3 * scale)
            assert bounds["hessian"] == pytest.approx(3 * math.sqrt(2), rel=3 * scale)


class TestPublished:
    def test_is_the_formula_and_has_its_limit_at_one(self) -> None:
        m_x, m_w, layers = 1.7, 1.2, 4
        first = math.sqrt(2) * layers * m_x**2 * m_w ** (2 * layers)
        second = math.sqrt(2) * m_w**2 * (m_w ** (2 * layers) - 1) / (m_w**2 - 1)
        assert hessian_bound(m_x, m_w, layers, kind="published") == pytest.approx(first + second, rel=1e-13)
        for m_w, accuracy in ((1.0, 2e-16), (1 + 1e-15, 1e-13), (1 - 1e-15, 1e-13)):
            found = hessian_bound(3.0, m_w, 5, kind="published")
            assert found == pytest.approx(math.sqrt(2) * 5 * (3.0**2 + 1), rel=accuracy)

    def test_holds_for_weights_that_are_not_small_and_not_for_small_ones(self) -> None:
        covered = [case for case in cases() if not case.biased and case.weight_norm >= SAFE_WEIGHT_NORM]
        assert len(covered) >= 15
        assert all(case.ggn <= case.published for case in covered)
        broken = [case for case in cases() if not case.biased and case.ggn > case.published]
        assert broken
        assert all(case.weight_norm < SAFE_WEIGHT_NORM for case in broken)


class TestLemmas:
    @pytest.mark.parametrize("kind", ["published", "tight"])
    def test_hidden_size_stands_for_the_weight_norm(self, kind: Any) -> None:
        assert hidden_size_bound(1.5, 0.3, 8, 3, kind=kind) == hessian_bound(1.5, 8 * 0.3, 3, kind=kind)

    def test_loss_differences_under_its_assumptions(self) -> None:
        # ℓ_i(w) = c_i + (w − w*)ᵀH_i(w − w*)/2 with one minimum for all samples: the quadratic model itself.
        rng = np.random.default_rng(0)
        count, radius = 30, 0.8
        constants, roots = rng.uniform(0, 2, count), rng.normal(size=(count, 4, 4))
        hessians = roots @ roots.transpose(0, 2, 1)
        step = rng.normal(size=4)
        step *= radius / np.linalg.norm(step)
        losses = constants + np.einsum("i,nij,j->n", step, hessians, step) / 2
        means = np.cumsum(losses) / np.arange(1, count + 1)
        norm = np.linalg.norm(hessians, 2, axis=(1, 2)).max()
        bounds = loss_difference_bound(np.arange(1, count), constants.max(), norm, radius)
        assert (np.abs(np.diff(means)) <= bounds / 2).all()  # as the docstring says


class TestMeasured:
    def test_norms(self) -> None:
        module = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2))
        with torch.no_grad():
            module[1].weight.copy_(torch.tensor([[3.0, 0, 0, 0], [0, 1, 0, 0]]))
            module[3].weight.copy_(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
            module[1].bias.copy_(torch.tensor([3.0, 4.0]))
            module[3].bias.zero_()
        assert weight_norm(module) == pytest.approx(3.0, rel=1e-12)
        assert bias_norm(module) == 5.0
        images = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.0, 3.0], [0.0, 4.0]]])
        assert input_norm(images) == 5.0
        assert network_bound(module, images) == hessian_bound(5.0, 3.0, 2, matrix="hessian", bias_norm=5.0)
        module = nn.Sequential(nn.Linear(2, 2, bias=False))
        assert bias_norm(module) == 0.0
        bound = network_bound(module, torch.ones(1, 2), matrix="ggn")
        assert bound == pytest.approx(1.0, rel=1e-12)  # ½·‖x‖²: nothing of a bias

    @pytest.mark.parametrize(
        ("module", "message"),
        [
            (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "got BatchNorm1d at '1'"),
            (nn.Sequential(nn.Linear(2, 2), nn.Tanh()), "got Tanh at '1'"),
            (nn.Sequential(nn.ReLU()), "must have linear layers, each with weights of its own, got 0"),
            (nn.Sequential(*[nn.Linear(2, 2)] * 2), "must have linear layers, each with weights of its own, got 2"),
        ],
    )
    def test_refuses_other_networks(self, module: nn.Module, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            weight_norm(module)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input_norm": -1.0}, "`input_norm` must be finite and not negative, got"),
        ({"weight_norm": math.nan}, "`weight_norm` must be finite and not negative, got"),
        ({"bias_norm": math.inf}, "`bias_norm` must be finite and not negative, got"),
        *(({"layers": layers}, "`layers` must be a positive integer, got") for layers in (0, -1, 2.0, True)),
        ({"kind": "loose"}, "`kind` must be 'published' or 'tight', got 'loose'"),
        ({"matrix": "fisher"}, "`matrix` must be 'ggn' or 'residual' or 'hessian', got 'fisher'"),
        *(
            ({"kind": "published", **beyond}, r"exists for `matrix='ggn'` without biases only, got")
            for beyond in ({"bias_norm": 0.1}, {"matrix": "hessian"}, {"matrix": "residual"})
        ),
    ],
)
def test_refusals(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hessian_bound(**{"input_norm": 1.0, "weight_norm": 1.0, "layers": 2, **wrong})


@pytest.mark.parametrize(
    ("bound", "arguments", "message"),
    [
        *((input_norm, (torch.zeros(s),), r"`inputs` must have shape \(N, ...\)") for s in [(3,), (0, 2), ()]),
        (hidden_size_bound, (1.0, -1.0, 2, 2), r"`entry_bound` must be finite and not negative, got -1\.0"),
        (hidden_size_bound, (1.0, 1.0, 0, 2), "`hidden_size` must be a positive integer, got 0"),
        (loss_difference_bound, ([1], 1.0, 1.0, math.nan), "`radius` must be finite and not negative, got nan"),
        (loss_difference_bound, ([1, 0], 1.0, 1.0, 1.0), r"`sample_sizes` must be at least 1, got 0\.0"),
    ],
)
def test_other_refusals(bound: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bound(*arguments)


@pytest.mark.parametrize("matrix", ["ggn", "residual", "hessian"])
def test_what_exceeds_all_numbers_is_infinite(matrix: Any) -> None:
    assert hessian_bound(1.0, 1e200, 4, matrix=matrix) == math.inf
    assert hessian_bound(1.0, 1e200, 4, kind="published") == math.inf
