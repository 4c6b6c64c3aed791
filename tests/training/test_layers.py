"""Spectra of layers and of the parts of the Hessian in a callback: metrics, figures, files, resume, failures."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_hesd import HessianSpectrumCallback, SpectrumHistory, hessian_spectrum, layer_spectra
from lightning_hesd.spectra.indicators import layer_indicators
from tests.training.digits_run import data, fit
from tests.training.logs import read_events

OUTPUTS = {
    "output_fn": lambda module, batch: module.net(batch[0]),
    "output_loss": lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
}


def callback(**arguments: Any) -> Any:
    defaults = {"steps": 8, "num_samples": 160, "layers": "auto", "decompose": True, **OUTPUTS}
    return HessianSpectrumCallback(**{**defaults, **arguments})


def loss(module: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(module.net(batch[0]), batch[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[SpectrumHistory, pl.Trainer]:
    """A training with all of it."""
    folder, spectra = tmp_path_factory.mktemp("run"), callback()
    trainer = fit(folder, spectra, epochs=1, logger=TensorBoardLogger(folder))
    return spectra.history, trainer


def test_records_have_the_spectra_of_layers_and_of_both_parts(run: Any) -> None:
    (*_, record), module = run[0], run[1].lightning_module
    everything = [data().dataset.tensors]  # type: ignore[attr-defined]
    assert record.error is None
    assert list(record.layers) == ["net.0", "net.2"]
    for name, spectrum in layer_spectra(module, everything, loss, steps=8).items():
        np.testing.assert_allclose(record.layers[name].nodes, spectrum.nodes, rtol=1e-3, atol=1e-5)
    for matrix, ours in (("ggn", record.ggn), ("residual", record.residual)):
        theirs = hessian_spectrum(module, everything, loss, steps=8, matrix=matrix, **OUTPUTS)  # type: ignore[arg-type]
        assert ours.matrix == matrix
        np.testing.assert_allclose(ours.nodes, theirs.nodes, rtol=1e-3, atol=1e-5)
    assert record.ggn.trace + record.residual.trace == pytest.approx(record.spectrum.trace, rel=1e-4)


def test_tensorboard_gets_metrics_figures_and_a_table(run: Any) -> None:
    events, layers = read_events(run[1].log_dir), run[0][-1].layers
    for layer, indicators in layer_indicators(layers).items():
        for key in ("c_t", "lambda_max", "trace", "trace_share", "effective_rank", "near_zero_share", "negative_share"):
            last = events.Scalars(f"hesd_layer/{layer}/{key}")[-1]
            assert (last.step, last.value) == (3, pytest.approx(getattr(indicators, key), rel=1e-6))
    assert {"hesd_ggn/lambda_max", "hesd_residual/c_t"} <= set(events.Tags()["scalars"])
    for key in ("hesd/layers_figure", "hesd/decomposition_figure", "hesd_ggn/density_figure"):
        assert [image.step for image in events.Images(key)] == [3]
    table = events.Tensors("hesd/layers/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert table.splitlines()[0].startswith("| layer | c_t | lambda_max | trace |")
    assert table.splitlines()[2].startswith(f"| net.0 | {layers['net.0'].c_t:.3g} | {layers['net.0'].lambda_max:.3g} |")


def test_layers_that_are_none_cost_the_layers_only(tmp_path: Path) -> None:
    spectra = callback(layers="encoder", decompose=False, output_fn=None, output_loss=None)
    with pytest.warns(RuntimeWarning, match="the analysis of layers of epoch 0 failed.*`layers` has 'encoder'"):
        fit(tmp_path, spectra, epochs=1)
    [record] = spectra.history
    assert record.spectrum is not None
    assert record.layers is None
    assert record.error.startswith("the analysis of layers: ValueError: `layers` has 'encoder', which is no module")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_loss": None}, "`matrix='ggn'` needs .*`output_loss` is None"),
        ({"matrix": "ggn"}, "`decompose=True` is about the parts of the Hessian: leave `matrix` out, got 'ggn'"),
        ({"strategy": "finite_difference"}, "`decompose=True` needs exact products"),
        ({"decompose": False}, "`output_fn` is for `matrix='ggn'`"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        callback(**options)
