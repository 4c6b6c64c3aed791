"""What reaches the loggers, read back with TensorBoard's own reader and from CSV files."""

import json
import logging
import re
import struct
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_hesd import HessianCheckpoint, SpectrumHistory
from lightning_hesd.spectra.scalars import scalars
from lightning_hesd.training.history import SpectrumRecord
from tests.training.broken import raising
from tests.training.digits_run import Net, callback, fit
from tests.training.logs import ListLogger, read_csv, read_events
from tests.training.scripted import keeping, make_spectrum

KEYS = {
    *("c_t", "c_t_low", "c_t_high", "c_t_threshold", "verified", "mp", "lambda_max", "lambda_min", "trace", "k_h05"),
    *("negative_count_low", "negative_count_high", "squared_weight_norm", "loss", "seconds", "overhead"),
}
EPOCHS = 2


def charts_in(events: Any) -> list[Any]:
    """Return the categories of charts in TensorBoard's layout: it shows the one that was written last."""
    config = events.Tensors("custom_scalars__config__")[-1]
    return list(layout_pb2.Layout.FromString(config.tensor_proto.string_val[0]).category)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[SpectrumHistory, pl.Trainer]:
    """A training with both loggers, analyzed before its first step and after its epochs."""
    folder, spectra = tmp_path_factory.mktemp("run"), callback(at_start=True)
    trainer = fit(folder, spectra, logger=[TensorBoardLogger(folder), CSVLogger(folder)])
    return spectra.history, trainer


STEPS = {-1: 0, 0: 3, 1: 7}
"""Where the analyses of the epochs are logged."""


def test_tensorboard_gets_scalars_histograms_figures_and_charts(run: Any) -> None:
    history, trainer = run
    events = read_events(trainer.log_dir)
    records = {record.epoch: record for record in history}
    own_steps = [event.step for event in events.Scalars("train_acc")]  # of Lightning itself
    assert {-1: 0, **dict(enumerate(own_steps))} == STEPS

    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("hesd/")} == {f"hesd/{key}" for key in KEYS}
    overheads = {event.step: event.value for event in events.Scalars("hesd/overhead")}
    assert sorted(overheads) == own_steps  # none at the start, where there was no training yet
    assert min(overheads.values()) > 0
    for key in KEYS - {"overhead"}:
        logged = {event.step: event.value for event in events.Scalars(f"hesd/{key}")}
        expected = {STEPS[epoch]: scalars(record, "hesd")[f"hesd/{key}"] for epoch, record in records.items()}
        assert logged == pytest.approx(expected, rel=1e-6), key

    histograms = {event.step: event.histogram_value for event in events.Histograms("hesd/density")}
    assert sorted(histograms) == sorted(STEPS.values())
    for epoch, record in records.items():
        spectrum, histogram = record.spectrum, histograms[STEPS[epoch]]
        edges, counts = np.array(histogram.bucket_limit), np.array(histogram.bucket)
        assert counts.sum() == pytest.approx(1.0)
        negative = spectrum.density_weights[spectrum.nodes < 0].sum()
        assert counts[edges <= 1e-9].sum() == pytest.approx(negative)
        # The outermost nodes lie in the outermost bars: nothing stretches, nothing is cut off.
        smallest, largest = -(6 + np.log10(-spectrum.lambda_min)), 6 + np.log10(spectrum.lambda_max)
        assert histogram.min <= smallest < edges[0]
        assert np.diff([histogram.min, *edges]) == pytest.approx(0.1)
        assert edges[-2] < largest <= histogram.max
        assert counts[0] > 0
        assert counts[-1] > 0

    images = events.Images("hesd/density_figure")
    assert [image.step for image in images] == sorted(STEPS.values())
    for image in images:
        width, height = struct.unpack(">II", image.encoded_image_string[16:24])  # the PNG header
        assert (width, height) >= (600, 400)

    margin, largest = charts_in(events)[0].chart
    assert [(s.value, s.lower, s.upper) for s in margin.margin.series] == [
        ("hesd/c_t", "hesd/c_t_low", "hesd/c_t_high"),
        ("hesd/c_t_threshold",) * 3,
    ]
    assert list(largest.multiline.tag) == ["^hesd/lambda_max$"]
    assert trainer.callback_metrics["hesd/c_t"] == pytest.approx(records[1].spectrum.c_t)
    assert "hesd/c_t" in trainer.progress_bar_metrics


def test_steps_within_epochs_reach_the_logger_whatever_log_every_n_steps_is(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    spectra = callback(every_n_train_steps=3)
    trainer = fit(tmp_path, spectra, logger=logger)
    events = read_events(logger.log_dir)
    logged = {event.step: event.value for event in events.Scalars("hesd/c_t")}
    assert list(logged.values()) == pytest.approx([r.spectrum.c_t for r in spectra.history])
    # As with `self.log(on_step=True)`, the value after n steps is at n - 1.
    assert list(logged) == [r.global_step - 1 for r in spectra.history] == [2, 5]
    assert [event.step for event in events.Histograms("hesd/density")] == list(logged)
    assert trainer.callback_metrics["hesd/c_t"] == pytest.approx(spectra.history[-1].spectrum.c_t)


def test_two_callbacks_have_keys_folders_states_and_charts_of_their_own(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    first = callback(checkpoint="highest_c_t")
    second = callback(name="head", parameters=lambda name, _: name.startswith("net.2"), checkpoint="highest_c_t")
    trainer = fit(tmp_path, first, second, epochs=1, logger=logger)
    events = read_events(logger.log_dir)
    for name, spectra in (("hesd", first), ("head", second)):
        values = [event.value for event in events.Scalars(f"{name}/lambda_max")]
        assert values == pytest.approx([r.spectrum.lambda_max for r in spectra.history])
        assert (Path(logger.log_dir) / name / "index.json").is_file()
    assert [category.title for category in charts_in(events)] == ["hesd", "head"]
    assert first.history[0].spectrum.dimension > second.history[0].spectrum.dimension == 90
    state = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["callbacks"]
    assert {first.state_key, second.state_key, first.checkpoint.state_key, second.checkpoint.state_key} <= set(state)


def test_csv_gets_scalars_and_the_density_as_a_table(run: Any) -> None:
    history, trainer = run
    folder = Path(trainer.loggers[1].log_dir)
    rows = read_csv(folder / "metrics.csv")
    values = {int(row["step"]): float(row["hesd/c_t"]) for row in rows if row["hesd/c_t"]}
    assert values == pytest.approx({STEPS[r.epoch]: r.spectrum.c_t for r in history})
    table = read_csv(folder / "hesd_density.csv")
    for record in history:
        part = [row for row in table if int(row["epoch"]) == record.epoch]
        assert sum(float(row["mass"]) for row in part) == pytest.approx(1.0)
        assert {int(row["step"]) for row in part} == {STEPS[record.epoch]}
        mean = sum(float(row["mass"]) * (float(row["left"]) + float(row["right"])) / 2 for row in part)
        width = float(part[0]["right"]) - float(part[0]["left"])
        assert mean == pytest.approx(record.spectrum.moment(1), abs=width)


class Diverging(Net):
    """Trains with another rate from its second epoch on."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.optimizers[0].param_groups[0]["lr"] *= self.rate


@pytest.mark.filterwarnings("ignore:(Experiment logs|Checkpoint) directory .* exists and is not empty:UserWarning")
@pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning")
def test_a_folder_used_before_has_the_last_run_only(tmp_path: Path) -> None:
    """First by another run, then by a continuation from the first epoch; the logger's version is the same."""
    every = ModelCheckpoint(dirpath=tmp_path / "every", save_top_k=-1, filename="{epoch}")
    continued = {"ckpt_path": tmp_path / "every" / "epoch=0.ckpt"}
    for rate, epochs, arguments in ((1.0, 3, {}), (2.0, 2, {}), (3.0, 3, {}), (4.0, 2, continued)):
        spectra = callback(checkpoint=keeping(dirpath=tmp_path / str(rate)))
        logger = CSVLogger(tmp_path, name="", version="run")
        callbacks = [spectra, every] if rate == 1 else [spectra]
        fit(tmp_path, *callbacks, net=partial(Diverging, rate), epochs=epochs, logger=logger, **arguments)
        folder = tmp_path / "run"
        c_t = {r.epoch: r.spectrum.c_t for r in spectra.history}
        assert list(c_t) == list(range(epochs))
        assert {r.epoch: r.spectrum.c_t for r in SpectrumHistory.load(folder)} == c_t
        assert len(list((folder / "hesd").glob("*.npz"))) == epochs
        selections = [json.loads(line) for line in (folder / "hesd" / "selections.jsonl").read_text().splitlines()]
        # Those of the first epoch belong to the run that is continued, which has not written to this folder last.
        assert [c["epoch"] for c in selections] == list(range(epochs))[len(arguments) :]
        losses = [spectra.history[c["epoch"]].spectrum.loss for c in selections]
        assert [c["metric"] for c in selections] == pytest.approx(losses, rel=1e-6)
        table = read_csv(folder / "hesd_density.csv")
        assert {(int(row["epoch"]), int(row["step"])) for row in table} == {(e, 3 + 4 * e) for e in c_t}
        for record in spectra.history:
            mass = [float(row["mass"]) for row in table if int(row["epoch"]) == record.epoch]
            assert mass == pytest.approx([share for share in record.spectrum.histogram()[0] if share > 0])


@pytest.mark.filterwarnings("ignore:(Experiment logs|Checkpoint) directory .* exists and is not empty:UserWarning")
def test_choices_of_the_run_that_goes_on_are_kept(tmp_path: Path) -> None:
    for path in (None, tmp_path / "c" / "last.ckpt"):
        checkpoint = HessianCheckpoint(dirpath=tmp_path / "c", tolerance=9.0, require_mp=False, save_last=True)
        logger = CSVLogger(tmp_path, name="", version="run")
        fit(tmp_path, callback(checkpoint=checkpoint), epochs=3 if path else 2, logger=logger, ckpt_path=path)
    selections = (tmp_path / "run" / "hesd" / "selections.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in selections] == [0, 1, 2]


class Charting(Net):
    """Writes a layout of its own charts, as users do, and is not the first to do so."""

    def on_train_start(self) -> None:
        own = {"own": {"loss": ["Multiline", ["loss"]]}, "c.t": {"C_t": ["Multiline", ["x"]]}}
        self.trainer.loggers[-1].experiment.add_custom_scalars(own)


def test_charts_have_the_tags_of_their_logger_and_stand_beside_those_of_the_user(tmp_path: Path) -> None:
    prefixes = ["", "a+b"]
    loggers = [TensorBoardLogger(tmp_path / str(n), prefix=prefix) for n, prefix in enumerate(prefixes)]
    loggers[0].experiment.add_custom_scalars({"before": {"loss": ["Multiline", ["loss"]]}})
    users = TensorBoardLogger(tmp_path / "user")
    fit(tmp_path, callback(name="c.t", at_start=True), net=Charting, epochs=1, logger=[*loggers, users])
    for logger, prefix in zip(loggers, prefixes, strict=True):
        events = read_events(logger.log_dir)
        *others, ours = charts_in(events)
        assert [category.title for category in others] == (["before"] if logger is loggers[0] else [])
        margin, largest = ours.chart
        tags = set(events.Tags()["scalars"])
        assert {tag for s in margin.margin.series for tag in (s.value, s.lower, s.upper)} <= tags
        expected = f"{prefix}-c.t/lambda_max" if prefix else "c.t/lambda_max"
        assert [tag for tag in tags if re.match(largest.multiline.tag[0], tag)] == [expected]
    # A category of the user's that has the name of the callback stays as it is.
    kept = [(c.title, c.chart[0].multiline.tag[0]) for c in charts_in(read_events(users.log_dir))]
    assert kept == [("own", "loss"), ("c.t", "x")]


def test_a_history_knows_how_it_was_made(run: Any) -> None:
    history, trainer = run
    about = SpectrumHistory.load(trainer.log_dir).about
    assert about == history.about
    assert about["started"] <= about["written"]
    assert set(about["versions"]) == {"lightning_hesd", "torch", "lightning", "python"}
    assert torch.__version__.startswith(about["versions"]["torch"])  # which may add the name of a build
    assert about["device"] == "cpu"
    assert about["options"] == {"steps": 8, "num_samples": 48, "batch_size": 16}


def test_unknown_loggers_get_scalars_and_a_debug_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = ListLogger()
    with caplog.at_level(logging.DEBUG, logger="lightning_hesd"):
        trainer = fit(tmp_path, callback(progress=False), logger=logger)
    assert sum("hesd/c_t" in metrics for metrics in logger.metrics) == EPOCHS
    [note] = [record.getMessage() for record in caplog.records if record.name.startswith("lightning_hesd")]
    assert note == "ListLogger gets scalars only: lightning_hesd knows no other output for it."
    assert "hesd/c_t" in trainer.callback_metrics
    assert "hesd/c_t" not in trainer.progress_bar_metrics, "as `progress=False` says"


def test_an_output_that_fails_costs_its_own_output_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_hesd.plotting.plot_density", raising(OSError("disk full")))
    logger = TensorBoardLogger(tmp_path)
    with pytest.warns(RuntimeWarning, match=r"cannot write the spectrum of epoch \d\. OSError: disk full") as caught:
        fit(tmp_path, callback(), logger=logger)
    assert sum("disk full" in str(warning.message) for warning in caught) == 1
    events = read_events(logger.log_dir)
    assert len(events.Scalars("hesd/c_t")) == len(events.Histograms("hesd/density")) == EPOCHS
    assert len(list((Path(logger.log_dir) / "hesd").glob("*.npz"))) == EPOCHS


class Unreachable(CSVLogger):
    """Its server does not answer."""

    log_metrics = raising(ConnectionError("no answer"))


def test_a_logger_that_fails_within_an_epoch_costs_no_training(tmp_path: Path) -> None:
    """Within epochs the loggers get scalars from the callback, at their ends from Lightning, which raises."""
    spectra = callback(every_n_train_steps=3)
    logging_seldom = {"logger": Unreachable(tmp_path), "log_every_n_steps": 100, "enable_checkpointing": False}
    with pytest.warns(RuntimeWarning, match=r"cannot log the scalars of epoch \d\. ConnectionError: no answer"):
        trainer = fit(tmp_path, spectra, net=Quiet, **logging_seldom)
    assert trainer.state.finished
    assert [record.error for record in spectra.history] == [None] * 2


class Quiet(Net):
    def log(self, *_args: Any, **_kwargs: Any) -> None:
        """Log nothing."""


def test_nan_is_never_logged(tmp_path: Path) -> None:
    """A loss without curvature has no C_t; everything else is logged all the same."""
    logger = ListLogger()
    spectra = callback(loss_fn=lambda module, batch: module.net[0].weight.mean())
    trainer = fit(tmp_path, spectra, logger=logger)
    assert spectra.history[0].spectrum.reason is not None
    keys = {key for metrics in logger.metrics for key in metrics if key.startswith("hesd/")}
    undefined = {"c_t", "c_t_low", "c_t_high", "mp", "k_h05"}
    assert keys == {f"hesd/{key}" for key in KEYS - undefined}
    assert "hesd/c_t" not in trainer.callback_metrics


def test_scalars_of_a_mainly_negative_spectrum() -> None:
    values = scalars(SpectrumRecord(0, 1, make_spectrum(-0.9)), "x")
    assert (values["x/mp"], values["x/c_t"], values["x/c_t_threshold"]) == (0.0, -0.9, -0.6)
