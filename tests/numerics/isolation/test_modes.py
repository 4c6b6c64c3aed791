"""Training mode without its randomness: which modules and functions it concerns, and which it leaves alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hesd.numerics.isolation.modes import WithoutRandomness, set_mode, without_randomness


class StochasticDepth(nn.Module):
    pass


class NoisyLinear(nn.Linear):
    """With weights of its own: what its mode means is not known."""


class DropoutNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Dropout()


class OwnNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_var", torch.ones(3))


class Norm(nn.BatchNorm1d):
    pass


def test_random_layers_are_in_evaluation_mode_and_all_others_as_they_were() -> None:
    random = [
        nn.Dropout(),
        nn.RReLU(),
        nn.LSTM(2, 2),
        nn.MultiheadAttention(2, 1),
        StochasticDepth(),
        OwnNorm(),
        Norm(3),
    ]
    others = [NoisyLinear(2, 2), DropoutNet()]
    module = nn.ModuleList([*random, *others])
    others[0].eval()
    set_mode(module, without_randomness(module, "deterministic"))
    assert [m.training for m in random] == [False] * len(random)
    assert [m.training for m in others] == [False, True]
    assert not others[1].inner.training  # type: ignore[union-attr]


X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
STATISTICS = torch.zeros(3), torch.ones(3)

FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    # in training mode, and what it should be
    "dropout": (lambda: F.dropout(X), lambda: X),
    "dropout_by_position": (lambda: F.dropout(X, 0.3, True), lambda: X),
    "dropout_by_name": (lambda: F.dropout(X, training=True), lambda: X),
    "kernel": (lambda: torch.dropout(X, 0.3, True), lambda: X),
    "dropout1d": (lambda: F.dropout1d(X), lambda: X),
    "alpha_dropout": (lambda: F.alpha_dropout(X, training=True), lambda: X),
    "rrelu": (lambda: F.rrelu(X, training=True), lambda: F.rrelu(X)),
    "attention": (
        lambda: F.scaled_dot_product_attention(X, X, X, dropout_p=0.4),
        lambda: F.scaled_dot_product_attention(X, X, X),
    ),
    "batch_norm": (lambda: F.batch_norm(X, *STATISTICS, training=True), lambda: F.batch_norm(X, *STATISTICS)),
    "instance_norm": (
        lambda: F.instance_norm(X, *STATISTICS),
        lambda: F.instance_norm(X, *STATISTICS, use_input_stats=False),
    ),
    "instance_norm_without_running_statistics": (lambda: F.instance_norm(X), lambda: F.instance_norm(X)),
    "layer_norm": (lambda: F.layer_norm(X, (4,)), lambda: F.layer_norm(X, (4,))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_do_without_dropout_and_statistics_of_the_batch(name: str) -> None:
    training, expected = FUNCTIONS[name]
    with WithoutRandomness():
        found: Any = training()
    assert torch.equal(found, expected())
    assert torch.equal(STATISTICS[0], torch.zeros(3))
