"""An analysis that runs out of memory is tried again with less of it, and gives back what it held."""

import gc
import itertools
import math

import numpy as np
import pytest
import torch

from lightning_hesd import hessian_spectrum, layer_spectra
from lightning_hesd.numerics.operators.memory import is_out_of_memory
from tests import cases
from tests.scarcity import EXHAUSTIONS, Scarce, ScarceInProducts


def test_exhaustion_is_recognized_and_other_trouble_is_not() -> None:
    for exhaust in EXHAUSTIONS.values():
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            exhaust()
        assert is_out_of_memory(caught.value)
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("no memory")):
        assert not is_out_of_memory(error)


def test_first_without_graphs_then_without_a_basis() -> None:
    module, batches, loss = cases.make("mlp")
    whole = hessian_spectrum(module, batches, loss, steps=8, batch_size=None)
    for times, basis in ((1, "device"), (2, "none")):
        scarce = Scarce(loss, EXHAUSTIONS["Python"], times)
        spectrum = hessian_spectrum(module, batches, scarce, steps=8, batch_size=None)
        assert (spectrum.strategy, spectrum.basis) == ("recompute", basis)
        assert spectrum.strategy_reason.startswith("out of memory (")
        assert spectrum.strategy_reason.count("out of memory (") == times
        assert spectrum.strategy_reason.endswith(("", "hence products are recomputed", "hence no basis is kept")[times])
        # Both evaluate the same derivatives in another order; without a basis, rounding may grow as Lanczos goes on.
        np.testing.assert_allclose(spectrum.nodes, whole.nodes, atol=1e-8 * np.abs(whole.nodes).max())


def test_the_last_failure_is_raised_its_memory_given_back_and_what_the_user_chose_stays() -> None:
    module, batches, loss = cases.make("mlp")
    scarce = Scarce(loss, EXHAUSTIONS["CPU"], math.inf)
    gc.disable()
    try:
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            hessian_spectrum(module, batches, scarce, steps=8, batch_size=None)
        # The last failure's frames are pytest's to hold; all before it must have been let go of.
        assert [tensor() is None for tensor in scarce.held[:-1]] == [True, True]
        assert len(scarce.held) == 3
    finally:
        gc.enable()
    scarce = Scarce(loss, EXHAUSTIONS["CPU"], math.inf)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        hessian_spectrum(module, batches, scarce, steps=8, batch_size=None, strategy="recompute", basis="device")
    assert len(scarce.held) == 1


def test_exhaustion_in_a_product_or_of_layers_is_no_lack_of_a_second_derivative() -> None:
    module, batches, loss = cases.make("mlp")
    spectrum = hessian_spectrum(module, batches, ScarceInProducts(loss, 1), steps=8, batch_size=None)
    assert spectrum.strategy == "recompute"
    assert "out of memory" in spectrum.strategy_reason
    assert "differentiated" not in spectrum.strategy_reason
    spectra = layer_spectra(module, batches, Scarce(loss, EXHAUSTIONS["GPU"], 1), steps=4, batch_size=None)
    assert {spectrum.strategy for spectrum in spectra.values()} == {"recompute"}


def test_without_a_second_derivative_there_are_no_graphs_to_save() -> None:
    """Products are central differences then, and there is but the basis to do without."""
    module, batches, loss = cases.make("mlp")

    evaluations = itertools.count(1)

    def rough(module: torch.nn.Module, batch: object) -> torch.Tensor:
        if next(evaluations) == 5:
            EXHAUSTIONS["GPU"]()
        return cases.OnceDifferentiable.apply(loss(module, batch).exp()).log()

    spectrum = hessian_spectrum(module, batches, rough, steps=4, batch_size=None)
    assert (spectrum.strategy, spectrum.basis) == ("finite_difference", "none")
    assert "differentiated twice" in spectrum.strategy_reason
    assert "out of memory" in spectrum.strategy_reason


class ClippedInForward(torch.nn.Linear):
    """Changes its weights in place in every forward pass, to the values that they have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.clamp_(-10, 10)
        return super().forward(x)


def test_graphs_that_later_evaluations_change_in_place_are_not_retained() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(ClippedInForward(3, 4), torch.nn.Tanh(), ClippedInForward(4, 2))
    batches = [(torch.randn(5, 3), torch.randn(5, 2)) for _ in range(2)]
    spectrum = hessian_spectrum(module, batches, cases.squared_error, steps=10, batch_size=None)
    assert spectrum.strategy == "recompute"
    assert "in place" in spectrum.strategy_reason
    plain = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    plain.load_state_dict(module.state_dict())
    truth = hessian_spectrum(plain, batches, cases.squared_error, steps=10, batch_size=None)
    assert truth.strategy == "graph"
    assert spectrum.c_t == pytest.approx(truth.c_t, rel=1e-5)
