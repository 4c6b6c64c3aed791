"""Losses of single samples, whichever way the loss function gives them."""

import contextlib
import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hesd.sample_size.sample_losses import per_sample_losses
from tests.cases import cross_entropy, seeded

SIZES = (5, 3, 1)


def batches(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    return seeded(lambda: [(torch.randn(size, 4).to(dtype), torch.randint(3, (size,))) for size in SIZES])


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(), nn.Linear(6, 3)), 1).to(dtype)


def each(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize(("loss_fn", "dtype"), [(each, torch.float32), (cross_entropy, torch.float64)])
def test_are_those_of_the_samples_one_by_one(loss_fn: Any, dtype: torch.dtype) -> None:
    module = network(dtype).eval()
    found = per_sample_losses(module, batches(dtype), loss_fn)
    samples = [sample for batch in batches(dtype) for sample in zip(*batch, strict=True)]
    expected = [F.cross_entropy(module(x[None]), y[None]).item() for x, y in samples]
    assert found.dtype == np.float64
    assert found.shape == (sum(SIZES),)
    np.testing.assert_allclose(found, expected, rtol=8 * torch.finfo(dtype).eps)


def test_a_mean_is_taken_apart_in_any_structure() -> None:
    given = [{"inputs": [x, x.numpy()], "labels": (y,), "name": "common"} for x, y in batches()]

    def loss_fn(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        assert batch["name"] == "common"
        assert np.array_equal(batch["inputs"][0].numpy(), batch["inputs"][1])
        return cross_entropy(module, (batch["inputs"][0], batch["labels"][0]))

    expected = per_sample_losses(network(), batches(), cross_entropy)
    np.testing.assert_array_equal(per_sample_losses(network(), given, loss_fn), expected)


def test_each_way_costs_what_the_docstring_says() -> None:
    calls: list[int] = []

    def counted(loss_fn: Any) -> Any:
        def call(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            calls.append(len(batch[0]))
            assert not torch.is_grad_enabled()
            return loss_fn(module, batch)

        return call

    per_sample_losses(network(), batches(), counted(each))
    assert calls == list(SIZES)
    calls.clear()
    per_sample_losses(network(), batches(), counted(cross_entropy))
    assert calls.count(1) == sum(SIZES)


class TestState:
    @pytest.mark.parametrize(("mode", "fails"), [("eval", True), ("train", False), ("keep", True)])
    def test_is_put_back(self, mode: Any, fails: bool) -> None:
        module = nn.Sequential(network(), nn.BatchNorm1d(3).double()).train()
        module[0].eval()
        module[1].weight.grad = torch.ones(3, dtype=torch.float64)
        before, random = copy.deepcopy(module.state_dict()), torch.get_rng_state()

        def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            losses = each(module, batch)
            assert module[1].training is (mode != "eval")
            assert module[0].training is (mode == "train")
            if fails:
                raise ZeroDivisionError
            return losses

        with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
            per_sample_losses(module, batches()[:2], loss_fn, mode=mode)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)
        assert (module.training, module[0].training) == (True, False)
        assert torch.equal(module[1].weight.grad, torch.ones(3, dtype=torch.float64))

    @pytest.mark.parametrize("loss_fn", [each, cross_entropy])
    def test_what_is_random_is_the_same_every_time(self, loss_fn: Any) -> None:
        found = []
        for seed in range(2):
            torch.manual_seed(seed)
            found.append(per_sample_losses(network(), batches(), loss_fn, mode="train"))
        np.testing.assert_array_equal(*found)
        assert (found[0] != per_sample_losses(network(), batches(), loss_fn)).any()  # there is dropout

    def test_batches_that_the_loss_changes_are_copies(self) -> None:
        given = batches()

        def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            losses = each(module, batch)
            batch[0].zero_()
            return losses

        found = per_sample_losses(network(), given, loss_fn)
        np.testing.assert_array_equal(found, per_sample_losses(network(), given, each))


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (
            lambda m, b: each(m, b).repeat(2),
            ValueError,
            r"\(5,\) for batch 0, or their mean, a scalar; got shape \(10,\)",
        ),
        (lambda m, b: torch.ones(1), ValueError, r"must return one loss per sample, shape \(5,\)"),
        (lambda m, b: torch.ones(5, 1), ValueError, r"must return one loss per sample, shape \(5,\)"),
        (lambda m, b: 1.0, TypeError, "`loss_fn` must return a tensor, got float"),
        (lambda m, b: each(m, b) / (len(b[0]) - 3), ArithmeticError, "the loss of a sample of batch 1 is inf"),
    ],
)
def test_refusals_of_losses(losses: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        per_sample_losses(network(), batches(), losses)
    with pytest.raises(ValueError, match="`batches` is empty"):
        per_sample_losses(network(), [], losses)
