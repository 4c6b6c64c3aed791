"""Generalization data analyzed beside the training data: metrics, text, files, resume, failures."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_hesd import hessian_spectrum
from lightning_hesd.spectra.scalars import scalars
from tests.training import digits_run
from tests.training.digits_run import Net, fit
from tests.training.logs import read_csv, read_events
from tests.training.modules import digits, plain_loss


def other_data() -> DataLoader[Any]:
    images, classes = (part[1000:1048] for part in digits())
    return DataLoader(TensorDataset(images.roll(1, dims=1), classes), batch_size=24)


callback = functools.partial(digits_run.callback, generalization_dataloader=other_data())


class Run(NamedTuple):
    """A training with generalization data."""

    history: Any
    trainer: Any


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    spectra = callback(probes=2)
    return Run(spectra.history, fit(folder, spectra, logger=[TensorBoardLogger(folder), CSVLogger(folder)]))


def test_the_other_spectrum_is_that_of_the_other_data_with_the_same_probes(run: Run) -> None:
    ours = run.history[-1].generalization
    batches = [other_data().dataset.tensors]  # type: ignore[attr-defined]
    theirs = hessian_spectrum(run.trainer.lightning_module.net, batches, plain_loss, steps=8, probes=2)
    assert ours.num_samples == 48
    assert ours.c_t == pytest.approx(theirs.c_t, rel=1e-4)
    np.testing.assert_allclose(ours.weights, theirs.weights, rtol=1e-3, atol=1e-6)
    training = run.history[-1].spectrum
    assert (training.seed, training.probe) == (ours.seed, ours.probe)
    assert training.c_t != ours.c_t


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


@pytest.mark.parametrize(
    "validation",
    [{}, {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 2}, {"limit_val_batches": 0}],
    ids=["at once", "later", "never"],
)
def test_validation_data_by_name(validation: dict[str, Any], run: Run, tmp_path: Path) -> None:
    """They give the spectra of the same data passed as a loader."""
    by_name = callback(generalization_dataloader="val", probes=2, on_error="raise")
    trainer = fit(tmp_path / "name", by_name, net=Validated, **validation)
    random_state = torch.get_rng_state()
    for ours, theirs in zip(by_name.history, run.history, strict=True):
        np.testing.assert_array_equal(ours.generalization.nodes, theirs.generalization.nodes)
    without = fit(tmp_path / "without", net=Validated, **validation)
    assert all(map(torch.equal, trainer.lightning_module.parameters(), without.lightning_module.parameters()))
    assert torch.equal(random_state, torch.get_rng_state())


@pytest.mark.parametrize(("net", "message"), [(Net, "got none"), (lambda: Validated(2), "got a list of them")])
def test_validation_data_must_be_one(net: Any, message: str, tmp_path: Path) -> None:
    spectra = callback(generalization_dataloader="val", on_error="raise")
    with pytest.raises(MisconfigurationException, match=f"needs a Trainer with one validation dataloader, {message}"):
        fit(tmp_path, spectra, net=net)


def test_loggers_get_metrics_and_text(run: Run) -> None:
    tensorboard, table = run.trainer.loggers
    events = read_events(tensorboard.log_dir)
    records = dict(zip([3, 7], run.history, strict=True))
    for key in ("hesd/delta_k_h05", "hesd/verdict", "hesd_gen/c_t"):
        logged = {event.step: event.value for event in events.Scalars(key)}
        assert logged == pytest.approx({step: scalars(record, "hesd")[key] for step, record in records.items()})
        assert run.trainer.callback_metrics[key] == pytest.approx(logged[7])
    assert "hesd_gen/c_t_threshold" not in events.Tags()["scalars"]
    assert {event.step for event in events.Histograms("hesd_gen/density")} == {3, 7}
    assert {event.step for event in events.Images("hesd_gen/density_figure")} == {3, 7}
    texts = {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors("hesd/assessment/text_summary")}
    for step, record in records.items():
        assert f"**criteria of Gabdullin (2025), Fig. 10: {record.assessment.words}**" in texts[step]
        assert all(f"- {reason}" in texts[step] for reason in record.assessment.reasons)
    for name in ("hesd_density.csv", "hesd_gen_density.csv"):
        assert {row["epoch"] for row in read_csv(Path(table.log_dir) / name)} == {"0", "1"}


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_resumed_run_goes_on_with_the_same_samples(tmp_path: Path) -> None:
    whole, first, second = (callback(num_samples=20) for _ in range(3))
    fit(tmp_path / "whole", whole)
    fit(tmp_path / "parts", first, epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    fit(tmp_path / "rest", second, ckpt_path=tmp_path / "half.ckpt")
    for one, other in zip(whole.history, second.history, strict=True):
        np.testing.assert_array_equal(one.generalization.nodes, other.generalization.nodes)
    assert whole.state_dict()["samples"] == second.state_dict()["samples"]
    assert sorted(whole.state_dict()["samples"]) == ["generalization", "training"]


def test_a_failure_on_the_other_data_leaves_the_training_spectrum(tmp_path: Path) -> None:
    spectra: Any = callback(generalization_dataloader=DataLoader(TensorDataset(torch.ones(8, 3)), batch_size=4))
    with pytest.warns(RuntimeWarning, match="the analysis of generalization data of epoch 0 failed, training goes on"):
        fit(tmp_path, spectra, epochs=1)
    (record,) = spectra.history
    assert record.spectrum is not None
    assert record.generalization is record.assessment is None
    assert record.error.startswith("the analysis of generalization data: ValueError: ")
