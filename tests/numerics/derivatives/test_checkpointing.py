"""Checkpointed regions give the spectra of the same networks without checkpoints."""

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import (
    CheckpointFunction,
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from lightning_hesd import hessian_spectrum
from lightning_hesd.numerics.derivatives import fast_derivatives
from lightning_hesd.numerics.derivatives.checkpointing import kept_activations, recomputed_under
from lightning_hesd.numerics.derivatives.replacements import Replacements
from lightning_hesd.spectra.spectrum import Spectrum
from tests.numerics.derivatives.comparisons import assert_same_nodes

Region = Callable[[Tensor], Tensor]
Run = Callable[[Region, Region, Tensor], Tensor]


def each(call: Callable[[Region, Tensor], Tensor]) -> Run:
    return lambda first, second, h: call(second, call(first, h))


def nested(*, outer: bool, inner: bool) -> Run:
    inside = each(lambda region, h: checkpoint(region, h, use_reentrant=inner))
    return lambda first, second, h: checkpoint(lambda h: inside(first, second, h), h, use_reentrant=outer)


def nested_by_closure(first: Region, second: Region, h: Tensor) -> Any:
    def inside(h: Tensor) -> Tensor:
        return second(checkpoint(lambda: first(h), use_reentrant=True))

    return checkpoint(inside, h, use_reentrant=False)


def selective() -> Any:
    def policy(_: object, operation: object, *__: object, **___: object) -> CheckpointPolicy:
        keeps = operation is torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def in_sequence(first: Any, second: Any, h: Tensor, *, reentrant: bool) -> Any:
    return checkpoint_sequential(nn.Sequential(first, second), 2, h, use_reentrant=reentrant)


WAYS: dict[str, Run] = {
    "not": each(lambda region, h: region(h)),
    "recomputed": each(lambda region, h: checkpoint(region, h, use_reentrant=False)),
    "reentrant": each(lambda region, h: checkpoint(region, h, use_reentrant=True)),
    "random": each(lambda region, h: checkpoint(region, h, use_reentrant=False, preserve_rng_state=False)),
    "reentrant, random": each(lambda region, h: checkpoint(region, h, use_reentrant=True, preserve_rng_state=False)),
    "in sequence": functools.partial(in_sequence, reentrant=False),
    "in sequence, reentrant": functools.partial(in_sequence, reentrant=True),
    "nested": nested(outer=False, inner=False),
    "nested, outer reentrant": nested(outer=True, inner=False),
    "nested, inner reentrant": nested(outer=False, inner=True),
    "nested, by closure": nested_by_closure,
    "selective": each(lambda region, h: checkpoint(region, h, use_reentrant=False, context_fn=selective)),
    "as Hugging Face does": each(
        lambda region, h: functools.partial(checkpoint, use_reentrant=True)(functools.partial(region), h)
    ),
}


def region() -> nn.Module:
    """Operations that are replaced, and dropout."""
    mixing = nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 1, 3, padding=1), nn.Flatten()
    return nn.Sequential(weight_norm(nn.Linear(4, 4)), *mixing, nn.GELU(), nn.Dropout(0.2))


class Net(nn.Module):
    """Two regions between two layers."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.way = nn.Linear(3, 4), nn.Linear(4, 1), way
        self.regions = nn.ModuleList([region(), region()])
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(WAYS[self.way](*self.regions, self.first(x)))


def spectrum(way: str, **options: Any) -> Spectrum:
    torch.manual_seed(0)
    options = {"steps": 4, "mode": "train", **options}
    batches = [torch.randn(4, 3).double() for _ in range(2)]
    return hessian_spectrum(Net(way), batches, lambda net, x: (net(x) - 1).square().mean(), **options)


@functools.cache
def without(strategy: Any) -> Spectrum:
    return spectrum("not", strategy=strategy)


@pytest.mark.parametrize(
    ("way", "strategy"),
    [
        *((way, "graph") for way in list(WAYS)[1:]),
        *((way, "finite_difference") for way in ("reentrant, random", "nested, by closure")),
    ],
)
def test_spectrum_is_that_without_checkpoints(way: str, strategy: Any) -> None:
    found, expected = spectrum(way, strategy=strategy), without(strategy)
    assert found.verified == "yes"
    torch.testing.assert_close(torch.tensor(found.nodes), torch.tensor(expected.nodes), rtol=1e-6, atol=1e-6)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_region_whose_input_needs_no_gradient(reentrant: bool) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    losses = (
        lambda net, x: net(x).square().mean(),
        lambda net, x: checkpoint(net, x, use_reentrant=reentrant).square().mean(),
    )
    assert_same_nodes(net, torch.randn(6, 3).double(), losses, steps=5)


def test_recomputation_has_the_replacements_in_other_threads_too(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net("recomputed")
    mode = Replacements()
    with mode, recomputed_under(mode):
        loss = net(torch.ones(2, 3).double()).sum()
    names = set()
    original = fast_derivatives.SLOW[torch.conv1d]

    def spy(*args: Any, **kwargs: Any) -> Any:
        names.add(threading.current_thread().name)
        return original(*args, **kwargs)

    monkeypatch.setitem(fast_derivatives.SLOW, torch.conv1d, spy)
    thread = threading.Thread(target=torch.autograd.grad, args=(loss, list(net.parameters())), name="device")
    thread.start()
    thread.join()
    assert names == {"device"}


def test_exact_products_keep_activations_and_differences_recompute_them() -> None:
    runs: list[int] = []
    layer = nn.Linear(3, 3)

    def region(h: Tensor) -> Tensor:
        runs.append(1)
        return layer(h).tanh()

    mode = Replacements()
    for kept, expected in ((True, 1), (False, 2)):
        runs.clear()
        with mode, recomputed_under(mode), kept_activations() if kept else contextlib.nullcontext():
            loss = checkpoint(region, torch.ones(1, 3), use_reentrant=True).sum()
        torch.autograd.grad(loss, list(layer.parameters()))
        assert len(runs) == expected


def test_checkpointing_is_afterwards_as_it_was() -> None:
    def names() -> list[object]:
        module = torch.utils.checkpoint
        return [module._CheckpointFrame, module._checkpoint_hook, module._checkpoint_without_reentrant_generator]

    before = names()
    with pytest.raises(ZeroDivisionError), recomputed_under(Replacements()), kept_activations():
        raise ZeroDivisionError
    assert names() == before
    assert "apply" not in vars(CheckpointFunction)
