"""Spectra of layers and of the parts of the Hessian in a callback: metrics, figures, files, resume, failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_hesd import HessianSpectrumCallback, SpectrumHistory, hessian_spectrum, layer_spectra
from lightning_hesd.spectra.indicators import layer_indicators
from tests.training.digits_run import Net, data
from tests.training.logs import read_events
from tests.training.scripted import make_trainer

EPOCHS = 2
OUTPUTS = {
    "output_fn": lambda module, batch: module.net(batch[0]),
    "output_loss": lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
}


def callback(**arguments: Any) -> HessianSpectrumCallback:
    defaults = {"steps": 8, "num_samples": 160, "layers": "auto", "decompose": True, **OUTPUTS}
    return HessianSpectrumCallback(**{**defaults, **arguments})


def fit(folder: Path, *callbacks: Any, logger: Any = False, ckpt_path: Any = None, epochs: int = EPOCHS) -> Any:
    torch.manual_seed(0)
    trainer = make_trainer(folder, list(callbacks), epochs, logger=logger, log_every_n_steps=4)
    trainer.fit(Net(), data(), ckpt_path=ckpt_path)
    return trainer


def loss(module: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(module.net(batch[0]), batch[1])


def test_records_have_the_spectra_of_layers_and_of_both_parts(tmp_path: Path) -> None:
    spectra = callback()
    module = fit(tmp_path, spectra).lightning_module
    record, everything = spectra.history[-1], [data().dataset.tensors]  # type: ignore[attr-defined]
    assert record.error is None
    assert record.layers is not None
    assert record.ggn is not None
    assert record.residual is not None
    assert list(record.layers) == ["net.0", "net.2"]
    for name, spectrum in layer_spectra(module, everything, loss, steps=8).items():
        np.testing.assert_allclose(record.layers[name].nodes, spectrum.nodes, rtol=1e-3, atol=1e-5)
    for matrix, ours in (("ggn", record.ggn), ("residual", record.residual)):
        theirs = hessian_spectrum(module, everything, loss, steps=8, matrix=matrix, **OUTPUTS)  # type: ignore[arg-type]
        assert ours.matrix == matrix
        np.testing.assert_allclose(ours.nodes, theirs.nodes, rtol=1e-3, atol=1e-5)
    assert record.spectrum is not None
    assert record.ggn.trace + record.residual.trace == pytest.approx(record.spectrum.trace, rel=1e-4)


def test_tensorboard_gets_metrics_figures_and_a_table(tmp_path: Path) -> None:
    logger, spectra = TensorBoardLogger(tmp_path), callback(at_start=True)
    fit(tmp_path, spectra, logger=logger)
    events = read_events(logger.log_dir)
    tags = events.Tags()
    layers = spectra.history[-1].layers
    assert layers is not None
    for layer, indicators in layer_indicators(layers).items():
        for key in ("c_t", "lambda_max", "trace", "trace_share", "effective_rank", "near_zero_share", "negative_share"):
            last = events.Scalars(f"hesd/layer/{layer}/{key}")[-1]
            assert (last.step, last.value) == (7, pytest.approx(getattr(indicators, key), rel=1e-6))
    for key in ("hesd_ggn/lambda_max", "hesd_residual/c_t"):
        assert key in tags["scalars"]
    for key in ("hesd/layers_figure", "hesd/decomposition_figure", "hesd_ggn/density_figure"):
        assert [image.step for image in events.Images(key)] == [0, 3, 7]
    table = events.Tensors("hesd/layers/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert table.splitlines()[0].startswith("| layer | c_t | lambda_max | trace |")
    assert table.splitlines()[2].startswith(f"| net.0 | {layers['net.0'].c_t:.3g} | {layers['net.0'].lambda_max:.3g} |")


def test_histories_from_before_there_was_all_this_are_read(tmp_path: Path) -> None:
    spectra = callback(layers=None, decompose=False, output_fn=None, output_loss=None)
    fit(tmp_path, spectra)
    index, state = tmp_path / "hesd/index.json", spectra.history.state_dict()
    written = json.loads(index.read_text(encoding="utf-8"))
    records = json.loads(state["records"])
    for row in (*written["records"], *records):
        for field in ("generalization", "preconditioned", "stability_threshold", "ggn", "residual", "layers"):
            assert row.pop(field) is None
    index.write_text(json.dumps(written), encoding="utf-8")
    loaded = SpectrumHistory()
    loaded.load_state_dict({**state, "records": json.dumps(records)})
    for history in (SpectrumHistory.load(tmp_path), loaded):
        assert [r.spectrum.c_t for r in history] == [r.spectrum.c_t for r in spectra.history]  # type: ignore[union-attr]
        assert history[0].layers is None


@pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning")
def test_files_and_resumed_runs_have_them(tmp_path: Path) -> None:
    whole = callback()
    fit(tmp_path / "whole", whole, epochs=3)
    loaded = SpectrumHistory.load(tmp_path / "whole")
    assert [file.name for file in sorted((tmp_path / "whole/hesd").glob("*_layers.npz"))] == [
        f"epoch={epoch}-step={4 * epoch + 4}_layers.npz" for epoch in range(3)
    ]

    first, second = callback(), callback()
    trainer = fit(tmp_path / "first", first)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fit(tmp_path / "second", second, epochs=3, ckpt_path=tmp_path / "last.ckpt")
    for history in (loaded, second.history):
        for found, expected in zip(history, whole.history, strict=True):
            assert found.layers is not None
            assert expected.layers is not None
            assert list(found.layers) == list(expected.layers)
            for name, spectrum in expected.layers.items():
                np.testing.assert_allclose(found.layers[name].nodes, spectrum.nodes, rtol=1e-4, atol=1e-6)
            assert found.residual is not None
            assert expected.residual is not None
            assert found.residual.lambda_min == pytest.approx(expected.residual.lambda_min, rel=1e-4)


def test_weights_are_those_of_a_training_without(tmp_path: Path) -> None:
    with_it = fit(tmp_path / "with", callback()).lightning_module.state_dict()
    without = fit(tmp_path / "without").lightning_module.state_dict()
    assert all(torch.equal(with_it[key], without[key]) for key in without)


def test_layers_that_are_none_cost_the_layers_only(tmp_path: Path) -> None:
    spectra = callback(layers="encoder", decompose=False, output_fn=None, output_loss=None)
    with pytest.warns(RuntimeWarning, match="the analysis of layers of epoch 0 failed.*`layers` has 'encoder'"):
        fit(tmp_path, spectra, epochs=1)
    [record] = spectra.history
    assert record.spectrum is not None
    assert record.layers is None
    assert record.error is not None
    assert record.error.startswith("the analysis of layers: ValueError: `layers` has 'encoder', which is no module")


def test_several_analyses_in_an_epoch_are_columns_of_their_own(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, callback(every_n_train_steps=2, decompose=False, output_fn=None, output_loss=None), logger=logger)
    assert [image.step for image in read_events(logger.log_dir).Images("hesd/layers_figure")] == [1, 3, 5, 7]


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
