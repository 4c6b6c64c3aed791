"""Generalization data analyzed beside the training data: metrics, text, files, resume, failures."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback, SpectrumHistory, hessian_spectrum
from lightning_hesd.spectra.assessment import VERDICT_VALUES
from tests.training.digits_run import Net, data
from tests.training.logs import read_events
from tests.training.scripted import make_trainer

EPOCHS = 2


def other_data() -> DataLoader[Any]:
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)[1000:1048].roll(1, dims=1)
    return DataLoader(TensorDataset(images, torch.tensor(digits.target)[1000:1048]), batch_size=24)


def callback(**arguments: Any) -> HessianSpectrumCallback:
    defaults = {"steps": 8, "num_samples": 48, "batch_size": 16, "generalization_dataloader": other_data()}
    return HessianSpectrumCallback(**{**defaults, **arguments})


def fit(tmp_path: Path, *callbacks: Any, loggers: Any = False, ckpt_path: Any = None, epochs: int = EPOCHS) -> Any:
    torch.manual_seed(0)
    net = Net()
    trainer = make_trainer(tmp_path, list(callbacks), epochs, logger=loggers, log_every_n_steps=4)
    trainer.fit(net, data(), ckpt_path=ckpt_path)
    return trainer


def test_the_other_spectrum_is_that_of_the_other_data_with_the_same_probes(tmp_path: Path) -> None:
    spectra = callback(probes=2)
    trainer = fit(tmp_path, spectra)
    ours = spectra.history[-1].generalization
    images, classes = other_data().dataset.tensors  # type: ignore[attr-defined]
    theirs = hessian_spectrum(
        trainer.lightning_module.net,
        [(images, classes)],
        lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]),
        steps=8,
        probes=2,
    )
    assert ours is not None
    assert ours.num_samples == 48
    assert ours.c_t == pytest.approx(theirs.c_t, rel=1e-4)
    np.testing.assert_allclose(ours.weights, theirs.weights, rtol=1e-3, atol=1e-6)
    training = spectra.history[-1].spectrum
    assert training is not None
    assert (training.seed, training.probe) == (ours.seed, ours.probe)
    assert training.c_t != ours.c_t


def test_weights_are_those_of_a_training_without(tmp_path: Path) -> None:
    with_it = fit(tmp_path / "with", callback()).lightning_module.state_dict()
    without = fit(tmp_path / "without").lightning_module.state_dict()
    assert all(torch.equal(with_it[key], without[key]) for key in without)


class Validated(Net):
    """Its validation data are made when asked for, with random numbers."""

    def __init__(self, loaders: int = 1) -> None:
        super().__init__()
        self.loaders = loaders

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def val_dataloader(self) -> Any:
        torch.rand(1)
        return other_data() if self.loaders == 1 else [other_data() for _ in range(self.loaders)]


def fit_validated(tmp_path: Path, *callbacks: Any, loaders: int = 1, **arguments: Any) -> Any:
    torch.manual_seed(0)
    trainer = make_trainer(tmp_path, list(callbacks), EPOCHS, log_every_n_steps=4, **arguments)
    trainer.fit(Validated(loaders), data())
    return trainer


@pytest.mark.parametrize(
    "validation",
    [{}, {"num_sanity_val_steps": 0}, {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 2}],
    ids=["checked", "unchecked", "later"],
)
def test_validation_data_by_name(validation: dict[str, Any], tmp_path: Path) -> None:
    by_name, given = callback(generalization_dataloader="val", on_error="raise"), callback()
    trainer = fit_validated(tmp_path / "name", by_name, **validation)
    random_state = torch.get_rng_state()
    fit_validated(tmp_path / "loader", given, **validation)
    for ours, theirs in zip(by_name.history, given.history, strict=True):
        np.testing.assert_array_equal(ours.generalization.nodes, theirs.generalization.nodes)  # type: ignore[union-attr]
    without = fit_validated(tmp_path / "without", **validation).lightning_module.state_dict()
    assert all(torch.equal(trainer.lightning_module.state_dict()[key], without[key]) for key in without)
    assert torch.equal(random_state, torch.get_rng_state())


def test_validation_data_without_validation(tmp_path: Path) -> None:
    spectra = callback(generalization_dataloader="val", on_error="raise")
    fit_validated(tmp_path, spectra, limit_val_batches=0)
    assert spectra.history[-1].generalization is not None


@pytest.mark.parametrize(("loaders", "message"), [(0, "got none"), (2, "got a list of them")])
def test_validation_data_must_be_one(loaders: int, message: str, tmp_path: Path) -> None:
    spectra = callback(generalization_dataloader="val", on_error="raise")
    with pytest.raises(MisconfigurationException, match=f"needs a Trainer with one validation dataloader, {message}"):
        fit(tmp_path, spectra) if loaders == 0 else fit_validated(tmp_path, spectra, loaders=loaders)


def test_loggers_get_metrics_and_text(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path)]
    spectra = callback()
    trainer = fit(tmp_path, spectra, loggers=loggers)
    events = read_events(loggers[0].log_dir)
    records = dict(zip([3, 7], spectra.history, strict=True))
    expected = {
        "hesd/delta_r_e": lambda record: record.assessment.delta_r_e,
        "hesd/delta_k_h05": lambda record: record.assessment.delta_k_h05,
        "hesd/verdict": lambda record: VERDICT_VALUES[record.assessment.verdict],
        "hesd_gen/c_t": lambda record: record.generalization.c_t,
        "hesd_gen/lambda_max": lambda record: record.generalization.lambda_max,
        "hesd/c_t": lambda record: record.spectrum.c_t,
    }
    for key, value in expected.items():
        logged = {event.step: event.value for event in events.Scalars(key)}
        known = {step: value(record) for step, record in records.items() if not np.isnan(value(record))}
        assert logged == pytest.approx(known, rel=1e-6), key
        if 7 in known:
            assert trainer.callback_metrics[key] == pytest.approx(known[7])
    assert "hesd_gen/c_t_threshold" not in events.Tags()["scalars"]
    assert {event.step for event in events.Histograms("hesd_gen/density")} == {3, 7}
    assert {event.step for event in events.Images("hesd_gen/density_figure")} == {3, 7}
    texts = {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors("hesd/assessment/text_summary")}
    for step, record in records.items():
        assert record.assessment is not None
        assert f"**generalization: {record.assessment.verdict}**" in texts[step]
        assert all(f"- {reason}" in texts[step] for reason in record.assessment.reasons)
    for name in ("hesd_density.csv", "hesd_gen_density.csv"):
        rows = list(csv.DictReader((Path(loggers[1].log_dir) / name).read_text().splitlines()))
        assert {row["epoch"] for row in rows} == {"0", "1"}


def test_files_can_be_read_back(tmp_path: Path) -> None:
    spectra = callback()
    fit(tmp_path, spectra)
    for ours, theirs in zip(spectra.history, SpectrumHistory.load(tmp_path), strict=True):
        assert ours.generalization is not None
        assert theirs.generalization is not None
        np.testing.assert_array_equal(ours.generalization.nodes, theirs.generalization.nodes)
        assert ours.assessment == theirs.assessment or np.isnan(ours.assessment.delta_r_e)  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_resumed_run_goes_on_with_the_same_samples(tmp_path: Path) -> None:
    whole, first, second = callback(num_samples=20), callback(num_samples=20), callback(num_samples=20)
    fit(tmp_path / "whole", whole)
    trainer = fit(tmp_path / "parts", first, epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(tmp_path / "rest", second, ckpt_path=tmp_path / "half.ckpt")
    for one, other in zip(whole.history, second.history, strict=True):
        np.testing.assert_array_equal(one.generalization.nodes, other.generalization.nodes)  # type: ignore[union-attr]
    assert whole.state_dict()["samples"] == second.state_dict()["samples"]
    assert sorted(whole.state_dict()["samples"]) == ["generalization", "training"]


def test_a_failure_on_the_other_data_leaves_the_training_spectrum(tmp_path: Path) -> None:
    spectra = callback(generalization_dataloader=DataLoader(TensorDataset(torch.ones(8, 3)), batch_size=4))
    with pytest.warns(RuntimeWarning, match="the analysis of generalization data of epoch 0 failed, training goes on"):
        fit(tmp_path, spectra, epochs=1)
    (record,) = spectra.history
    assert record.spectrum is not None
    assert record.generalization is None
    assert record.assessment is None
    assert record.error is not None
    assert record.error.startswith("the analysis of generalization data: ValueError: ")


def test_a_rule_may_rank_by_the_assessment(tmp_path: Path) -> None:
    spectra = callback()
    rule = HessianCheckpoint(lambda record: -record.assessment.delta_k_h05, tolerance=10.0, require_mp=False)
    fit(tmp_path, spectra, rule, epochs=3)
    ratios = [record.assessment.delta_k_h05 for record in spectra.history]  # type: ignore[union-attr]
    assert f"epoch={int(np.argmin(ratios))}-" in Path(rule.best_model_path).name


def test_verbose_prints_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spectra = callback(verbose=True)
    fit(tmp_path, spectra, epochs=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("hesd: epoch")]
    assert [line.split(", ")[1].split(" ")[0] for line in lines] == ["C_t", "gen", "generalization:"]
    assert lines[2] == f"hesd: epoch 0, {spectra.history[0].assessment}"
