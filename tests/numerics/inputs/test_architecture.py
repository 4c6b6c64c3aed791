"""Networks of each kind, and what of them an analysis records."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from lightning_hesd import hessian_spectrum, layer_spectra
from lightning_hesd.numerics.inputs.architecture import architecture_of
from tests import cases


class SelfAttention(nn.Linear):
    """A layer that only its class calls attention."""


NETWORKS = {
    "perceptron": [
        nn.Linear(2, 1),
        nn.Sequential(nn.Flatten(), nn.Linear(2, 4), nn.BatchNorm1d(4), nn.PReLU(), nn.LayerNorm(4), nn.Linear(4, 1)),
        nn.ModuleDict({"net": nn.Linear(2, 1), "loss": nn.CrossEntropyLoss()}),
    ],
    "convolution": [
        nn.Sequential(nn.Conv1d(1, 2, 3), nn.Linear(2, 1)),
        nn.Sequential(nn.Linear(2, 4), nn.ConvTranspose2d(1, 2, 3), nn.BatchNorm2d(2)),
    ],
    "attention": [
        nn.TransformerEncoderLayer(4, 1, 4),
        nn.Sequential(nn.Conv2d(1, 2, 3), SelfAttention(2, 1)),
        nn.Sequential(OrderedDict(attn=nn.Linear(2, 1))),
    ],
    "other": [
        nn.LSTM(2, 3),
        nn.Sequential(nn.Conv1d(1, 2, 3), nn.GRUCell(2, 2)),
        nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 1)),
        nn.Sequential(nn.Linear(2, 2), nn.ParameterList([torch.zeros(2)])),
    ],
}


@pytest.mark.parametrize(("kind", "net"), [(kind, net) for kind, nets in NETWORKS.items() for net in nets])
def test_the_kind_of_a_network(kind: str, net: nn.Module) -> None:
    assert architecture_of(net, list(net.parameters())) == kind
    assert architecture_of(net, list(net.parameters())[1:]) == "part"


def test_an_analysis_records_it() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    problem = net, [(torch.randn(8, 2), torch.randn(8, 1))], cases.squared_error
    assert hessian_spectrum(*problem, steps=3).architecture == "perceptron"
    assert layer_spectra(*problem, steps=2)["0"].architecture == "part"
    net[0].requires_grad_(False)
    assert hessian_spectrum(*problem, steps=3).architecture == "part"
    assert hessian_spectrum(*problem, steps=3, include_frozen=True).architecture == "perceptron"
