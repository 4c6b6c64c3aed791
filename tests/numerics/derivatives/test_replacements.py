"""Replacements that depend on the whole loss, or on other batches."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hesd import hessian_spectrum, layer_spectra
from lightning_hesd.numerics.analysis.engine import analyze
from lightning_hesd.numerics.analysis.evaluation import Evaluator
from lightning_hesd.numerics.derivatives.replacements import Replacements
from lightning_hesd.numerics.inputs.batches import WeightedBatch
from lightning_hesd.numerics.inputs.options import analysis_options
from lightning_hesd.numerics.inputs.parameter_sharding import ParameterSharding
from lightning_hesd.numerics.isolation.exact_mode import exact_mode
from tests.numerics.derivatives.comparisons import assert_same_nodes, jacobian
from tests.ranks import StandIn

IDS = [torch.tensor([[0, 1, 2], [4, 5, 5]]), torch.tensor([[2, 3, 1], [0, 0, 6]])]
"""Of batches that share some rows, and leave rows 7 and 8 out."""


class Words(nn.Module):
    """An embedding that is used in one of several ways, tied with the output layer."""

    def __init__(self, way: str, max_norm: float | None = 0.7) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.max_norm = way, max_norm
        kind = nn.EmbeddingBag if way == "bag" else nn.Embedding
        self.embedding = kind(9, 3, max_norm=max_norm if way in {"layer", "bag"} else None).double()

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        if self.way == "function":
            words = F.embedding(ids, self.weight, max_norm=self.max_norm).sum(1)
        else:
            if self.way == "by hand" and self.max_norm:
                torch.embedding_renorm_(self.weight.detach(), ids, self.max_norm, 2.0)
            words = self.embedding(ids) if self.way == "bag" else self.embedding(ids).sum(1)
        return words.tanh() @ self.weight.T


def loss(net: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(net(ids), ids[:, 0])


@pytest.mark.parametrize(
    ("way", "strategy"),
    [("layer", "graph"), ("layer", "finite_difference"), *((way, "auto") for way in ("function", "by hand", "bag"))],
)
def test_embeddings_with_max_norm(way: str, strategy: Any) -> None:
    net = Words(way)
    before = net.weight.detach().clone()
    assert (before.norm(dim=1) > 0.7).any()
    found = hessian_spectrum(net, IDS, loss, strategy=strategy, steps=8)
    assert torch.equal(net.weight, before)
    expected = hessian_spectrum(_plain(way), IDS, loss, steps=8)
    assert found.verified == expected.verified == "yes"
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)  # PyTorch scales by max_norm / (norm + 1e-7)
    torch.testing.assert_close(torch.tensor(found.nodes), torch.tensor(expected.nodes), rtol=1e-5, atol=1e-5)


def _plain(way: str, batches: list[Tensor] = IDS) -> Words:
    """Return a network without `max_norm` whose rows that the batches use are within it."""
    net = Words(way, None)
    used = torch.unique(torch.cat(batches))
    with torch.no_grad():
        net.weight[used] = torch.renorm(net.weight[used], 2, 0, 0.7)
    return net


def test_max_norm_with_layers_and_groups() -> None:
    net, plain = Words("layer"), _plain("layer")
    found, expected = (layer_spectra(n, IDS, loss, steps=5)["embedding"] for n in (net, plain))
    assert found.lambda_max == pytest.approx(expected.lambda_max, rel=1e-6)
    batches = [torch.randint(9, (8, 3), generator=torch.Generator().manual_seed(0)), *IDS]
    plain = _plain("layer", batches)
    found, expected = (hessian_spectrum(n, batches, loss, steps=5, sampling_error=True) for n in (net, plain))
    assert found.c_t_sampling_error == pytest.approx(expected.c_t_sampling_error, rel=1e-4)


def test_several_ranks_with_max_norm_are_refused() -> None:
    net = Words("layer")
    batches = [WeightedBatch(ids, 2.0, index) for index, ids in enumerate(IDS)]
    with pytest.raises(RuntimeError, match="single rank, or without `max_norm`"):
        analyze(net, batches, loss, analysis_options(steps=2), collectives=StandIn())


def penalized(net: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    value = net(x).sum()
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    return value + slope.square().sum()


@pytest.mark.parametrize(
    ("layer", "function", "again"),
    [
        (nn.Tanh(), penalized, False),
        (nn.LayerNorm(3), lambda net, x: net(x).square().mean(), False),
        (nn.LayerNorm(3), penalized, True),
    ],
    ids=["derivative, no norm", "norm, no derivative", "derivative of a norm"],
)
def test_a_loss_is_called_again_once_where_it_differentiates_a_norm(layer: Any, function: Any, again: bool) -> None:
    net, batch = nn.Sequential(nn.Linear(3, 3), layer).double(), WeightedBatch(torch.ones(2, 3).double(), 2.0, 0)
    calls = 0

    def counted(net: nn.Module, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return function(net, x)

    with exact_mode(net) as isolation:
        evaluator = Evaluator(net, counted, analysis_options(), ParameterSharding(), isolation)
        for expected in (2 if again else 1, 1):
            calls = 0
            evaluator.loss(batch)
            assert calls == expected


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("by", ["grad", "backward", "method"])
def test_inner_derivatives_are_noticed(by: str) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    for create_graph in (False, True):
        with Replacements() as replacements:
            value = F.layer_norm(x, (3,)).pow(3).sum()
            if by == "grad":
                torch.autograd.grad(value, x, create_graph=create_graph)
            elif by == "backward":
                torch.autograd.backward(value, inputs=[x], create_graph=create_graph, retain_graph=True)
            else:
                value.backward(inputs=[x], create_graph=create_graph)
        x.grad = None
        assert replacements.missed == ({"differentiated"} if create_graph else set())


def with_jacobian(net: nn.Module, x: Tensor, how: str) -> Tensor:
    """Return a loss with the Jacobian of a network."""
    x = x.clone().requires_grad_()
    y = net(x)
    if how == "vectorized":
        rows = torch.autograd.functional.jacobian(net, x, create_graph=True, vectorize=True)
    else:
        rows = jacobian(y, x, how)
    return y.square().mean() + rows.square().sum()


@pytest.mark.parametrize("how", ["vectorized", "vmap"])
def test_derivatives_along_many_directions_at_once(how: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.Tanh(), nn.Flatten()]
    net, x = nn.Sequential(*layers).double(), torch.randn(3, 4).double()
    assert_same_nodes(net, x, [functools.partial(with_jacobian, how=way) for way in (how, "one by one")], steps=4)


def test_signals_pass_through() -> None:
    class StopError(Exception):
        """As PyTorch ends a recomputation early."""

    calls = []

    def stop(_: Tensor) -> Tensor:
        calls.append(1)
        raise StopError

    x = torch.randn(2, 3, requires_grad=True)
    with Replacements(), torch.autograd.graph.saved_tensors_hooks(stop, lambda x: x), pytest.raises(StopError):
        F.conv1d(x[:, None], torch.ones(1, 1, 2, requires_grad=True))
    assert len(calls) == 1
