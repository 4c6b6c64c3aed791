"""Which parameters make up a block, and the spectra of blocks against dense diagonal blocks."""

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.networks import GPT, ViT, resnet20
from lightning_hesd import hessian_spectrum, layer_spectra
from lightning_hesd.numerics.inputs.blocks import blocks
from tests import cases, oracles


def names(module: nn.Module, layers: Any = None) -> dict[str, list[str]]:
    analyzed = dict(module.named_parameters())
    of = {p: name for name, p in analyzed.items()}
    return {block: [of[p] for p in parameters] for block, parameters in blocks(module, layers, analyzed).items()}


def shared_twice() -> cases.Problem:
    """One layer that is applied twice, and stands under two names."""
    torch.manual_seed(0)
    batches = [(torch.randn(size, 4).double(), torch.randint(3, (size,))) for size in (5, 3)]
    first = nn.Linear(4, 4)
    layers = {"first": first, "tanh": nn.Tanh(), "again": first, "tanh again": nn.Tanh(), "last": nn.Linear(4, 3)}
    return cases.Problem(nn.Sequential(OrderedDict(layers)).double(), batches, cases.cross_entropy)


class TestFunctionalBlocks:
    def test_convolution_and_its_norm_are_one_so_that_resnet20_has_a_block_for_each_of_its_layers(self):
        module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
        assert names(module) == {"0": ["0.weight", "0.bias", "1.weight", "1.bias"], "4": ["4.weight", "4.bias"]}
        found = names(resnet20())
        assert len(found) == 20
        assert found["3.body.0"] == ["3.body.0.weight", "3.body.1.weight", "3.body.1.bias"]

    def test_norms_of_other_features_and_layer_norms_whose_place_is_not_known_stand_alone(self):
        module = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.Unflatten(1, (1, 3)), nn.BatchNorm1d(1))
        assert list(names(module)) == ["1", "3"]
        encoder = nn.TransformerEncoderLayer(4, 2, 8)
        assert list(names(encoder)) == ["self_attn", "linear1", "linear2", "norm1", "norm2"]
        assert len(names(encoder)["self_attn"]) == 4
        module = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3), nn.LayerNorm(3), nn.ReLU(), nn.Linear(3, 2))
        assert {name: len(own) for name, own in names(module).items()} == {"0": 2, "1": 4, "4": 2}

    def test_attention_and_mlp_are_one_by_the_names_of_their_classes(self):
        attention, mlp = (type(name, (nn.Sequential,), {}) for name in ("CausalSelfAttention", "MLP"))
        of_attention = attention(nn.Linear(4, 12), nn.Linear(4, 4))
        module = nn.ModuleDict({"attn": of_attention, "mlp": mlp(nn.Linear(4, 8), nn.Linear(8, 4))})
        assert {name: len(own) for name, own in names(module).items()} == {"attn": 4, "mlp": 4}

    def test_parameters_of_the_network_itself(self):
        module = nn.ModuleDict({"inner": nn.Linear(2, 2)})
        module.scale, module.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        assert list(names(module)) == ["scale", "shift", "inner"]

    def test_shared_parameters_belong_to_the_first(self):
        expected = {layer: [f"{layer}.weight", f"{layer}.bias"] for layer in ("first", "last")}
        assert names(shared_twice().module) == expected
        tied = cases.make("tied").module
        assert names(tied) == {"embedding": ["embedding.weight"], "mix": ["mix.weight", "mix.bias"]}
        assert names(tied, ["output"]) == {"output": ["embedding.weight"]}

    @pytest.mark.parametrize("module", [resnet20(), ViT(), GPT(30, 64)], ids=["resnet20", "vit", "gpt"])
    def test_every_parameter_is_in_one(self, module):
        found = [name for own in names(module).values() for name in own]
        assert sorted(found) == sorted(dict(module.named_parameters()))


class TestChosenBlocks:
    module = nn.ModuleDict(
        {"a": nn.Sequential(nn.Linear(2, 2), nn.Tanh()), "b": nn.Linear(2, 2), "c": nn.Conv1d(2, 2, 1)}
    )

    @pytest.mark.parametrize(
        ("layers", "expected"),
        [
            ("b", ["b"]),
            (["c", "a"], ["c", "a"]),
            (nn.Linear, ["a.0", "b"]),
            ([nn.Linear, "c"], ["a.0", "b", "c"]),
            ("*", ["a", "b", "c"]),
            (["a.*"], ["a.0"]),
            (("[bc]",), ["b", "c"]),
            (lambda name, p: name.rsplit(".")[-1], ["weight", "bias"]),
            (lambda name, p: "vectors" if p.ndim == 1 else None, ["vectors"]),
        ],
    )
    def test_by_name_pattern_class_and_function(self, layers, expected):
        assert list(names(self.module, layers)) == expected

    @pytest.mark.parametrize(
        ("layers", "error", "message"),
        [
            ("d", ValueError, "`layers` has 'd', which is no module of this network: a, a.0, a.1, b, c"),
            ([nn.LSTM], ValueError, "`layers` has <class '.*LSTM'>, which is no module"),
            (["a", "a.0"], ValueError, "`layers` has 'a.0' and a module that it is part of"),
            ([3], TypeError, "`layers` must hold names, patterns and classes of modules, got 3"),
            (3, TypeError, "`layers` must be 'auto', names, patterns or classes of modules, or a function, got 3"),
            (lambda name, p: 1, TypeError, "must return the name of a parameter's block or None, got 1 for 'a.0"),
            (lambda name, p: None, ValueError, "`layers` leaves no block with parameters"),
            ("a.1", ValueError, "`layers` leaves no block with parameters"),
        ],
    )
    def test_mistakes(self, layers, error, message):
        with pytest.raises(error, match=message):
            names(self.module, layers)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [*((name, "graph") for name in (*cases.NAMES, "shared")), ("tied", "recompute"), ("shared", "recompute")],
)
def test_spectra_are_those_of_the_dense_diagonal_blocks(name, strategy):
    module, batches, loss_fn = shared_twice() if name == "shared" else cases.make(name)
    hessian = oracles.dense_hessian(module, batches, loss_fn)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    ends = dict(zip(trained, np.cumsum([p.numel() for p in trained.values()]), strict=True))
    spectra = layer_spectra(module, batches, loss_fn, steps=len(hessian), strategy=strategy)
    exact_trace = 0.0
    for block, parameters in blocks(module, None, trained).items():
        own = [n for n, p in trained.items() if p in set(parameters)]
        index = np.concatenate([np.arange(ends[n] - trained[n].numel(), ends[n]) for n in own])
        dense = hessian[np.ix_(index, index)]
        true = np.linalg.eigvalsh(dense)
        spectrum = spectra[block]
        assert spectrum.dimension == len(index)
        scale = max(abs(true[0]), abs(true[-1]))
        nodes = spectrum.nodes[0][spectrum.weights[0] > 0]
        # Where the spectrum has fewer distinct eigenvalues than steps, all of them are found, and nothing else.
        assert oracles.hausdorff(nodes, true) <= 1e-8 * scale
        assert spectrum.lambda_max == pytest.approx(true[-1], abs=1e-8 * scale)
        exact_trace += float(np.trace(dense))
    assert exact_trace == pytest.approx(float(torch.trace(hessian)), rel=1e-12)
    assert len(spectra) == len(blocks(module, None, trained))


def test_all_in_one_block_is_the_whole_spectrum():
    module, batches, loss_fn = cases.make("mlp")
    whole = hessian_spectrum(module, batches, loss_fn, steps=12, probes=2, seed=3)
    [block] = layer_spectra(module, batches, loss_fn, lambda name, p: "all", steps=12, probes=2, seed=3).values()
    np.testing.assert_array_equal(block.nodes, whole.nodes)
    assert (block.matvecs, block.steps_per_probe) == (whole.matvecs, whole.steps_per_probe)


def test_blocks_stop_when_they_are_done():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 2)).double()
    batch = (torch.randn(40, 6).double(), torch.randint(2, (40,)))
    spectra = layer_spectra(module, [batch], cases.cross_entropy, steps=100, tolerance=0.01, strategy="graph")
    assert len({spectrum.steps for spectrum in spectra.values()}) == 2
    for name, spectrum in spectra.items():
        assert spectrum.converged
        options = {"steps": 100, "tolerance": 0.01, "parameters": lambda n, p, own=name: n.startswith(own)}
        alone = hessian_spectrum(module, [batch], cases.cross_entropy, **options)
        assert spectrum.steps == alone.steps
        np.testing.assert_allclose(spectrum.nodes, alone.nodes, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"sampling_error": True},
        {"matrix": "ggn", "output_fn": lambda m, b: m(b[0]), "output_loss": lambda o, b: F.cross_entropy(o, b[1])},
        {"basis": "none"},
        {"preconditioner": "some"},
        {"strategy": "finite_difference"},
    ],
    ids=["sampling error", "ggn", "no basis", "preconditioned", "differences"],
)
def test_every_option_does_for_blocks_what_it_does_for_all(options):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    batches = [(torch.randn(16, 6).double(), torch.randint(3, (16,))) for _ in range(2)]
    if "preconditioner" in options:
        options = {"preconditioner": {n: 0.5 + torch.rand_like(p) for n, p in module.named_parameters()}}
    spectra = layer_spectra(module, batches, cases.cross_entropy, steps=10, **options)
    for name, spectrum in spectra.items():
        chosen = {"parameters": lambda n, p, own=name: n.startswith(own), **options}
        alone = hessian_spectrum(module, batches, cases.cross_entropy, steps=10, **chosen)
        tolerance = 1e-6 if options.get("strategy") else 1e-11
        np.testing.assert_allclose(spectrum.nodes, alone.nodes, rtol=0, atol=tolerance)
        assert (spectrum.c_t_sampling_error is None) == (alone.c_t_sampling_error is None)
        if alone.c_t_sampling_error is not None:
            assert spectrum.c_t_sampling_error == pytest.approx(alone.c_t_sampling_error, rel=1e-9)
        assert spectrum.matrix == alone.matrix


class TestParametersWithoutElements:
    @staticmethod
    def table() -> nn.ModuleDict:
        """A network for a table without categories."""
        weight = nn.Linear(1, 4, bias=False)
        weight.weight = nn.Parameter(torch.empty(4, 0))
        return nn.ModuleDict({"categories": weight, "numbers": nn.Linear(3, 4)})

    @staticmethod
    def loss(module: Any, batch: Any) -> Tensor:
        hidden = module["numbers"](batch[0]) + F.linear(batch[0][:, :0], module["categories"].weight)
        return torch.tanh(hidden).square().mean()

    @pytest.mark.parametrize("strategy", ["auto", "finite_difference"])
    def test_make_no_block(self, strategy):
        module, batches = self.table(), [(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),)]
        found = layer_spectra(module, batches, self.loss, strategy=strategy, steps=16)
        assert {name: spectrum.dimension for name, spectrum in found.items()} == {"numbers": 16}
        whole = hessian_spectrum(module, batches, self.loss, strategy=strategy, steps=16)
        np.testing.assert_allclose(found["numbers"].nodes, whole.nodes, rtol=0, atol=whole.rounding)

    def test_what_is_left_without_any_is_refused(self):
        module = self.table()
        del module["numbers"]
        with pytest.raises(ValueError, match="the parameters to analyze have no elements"):
            hessian_spectrum(module, [(torch.zeros(5, 3),)], self.loss)
        with pytest.raises(ValueError, match="`layers` leaves no block with parameters to analyze"):
            layer_spectra(self.table(), [(torch.zeros(5, 3),)], self.loss, ["categories"])
