"""What reaches W&B, offline, and MLflow, in a local store: read back from the files that their own clients wrote."""

import json
import runpy
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from lightning_hesd import HessianSpectrumCallback, SpectrumHistory
from lightning_hesd.spectra.assessment import SHORT_CAVEAT
from lightning_hesd.spectra.scalars import scalars
from lightning_hesd.training import loggers
from tests.training.broken import raising
from tests.training.digits_run import Net, callback, data
from tests.training.logs import read_csv
from tests.training.modules import global_generators, seed
from tests.training.scripted import make_trainer

EPOCHS = 2
STEPS = [3, 7]
"""Where Lightning has its own metrics of the ends of these epochs."""

SUFFIXES = ["", "_gen"]


def train(folder: Path, loggers: list[Logger], *callbacks: HessianSpectrumCallback, fail_at: int | None = None) -> Net:
    for logger in loggers:
        _ = logger.experiment  # MLflow itself draws the name of a run from Python's generator
    seed()
    trainer = make_trainer(folder, list(callbacks), EPOCHS, logger=loggers, enable_checkpointing=False)
    trainer.fit(module := Net(fail_at), data())
    return module


@pytest.fixture(scope="module", autouse=True)
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Both clients in folders of their own, without network."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    folder = tmp_path_factory.mktemp("clients")
    with pytest.MonkeyPatch.context() as patch:
        folders = dict.fromkeys(("DATA_DIR", "CACHE_DIR", "CONFIG_DIR", "DIR"), str(folder))
        for name, value in {**folders, "MODE": "offline", "SILENT": "true"}.items():
            patch.setenv(f"WANDB_{name}", value)
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # 3.17 without a data base refuses otherwise
        patch.setenv("MLFLOW_TRACKING_URI", "")  # the client sets it
        yield
        wandb.teardown()


class WandbFiles:
    """A run of W&B, finished, and read back from its file of records."""

    def __init__(self, logger: WandbLogger) -> None:
        self.folder = Path(logger.experiment.dir)
        (file,) = self.folder.parent.glob("*.wandb")
        logger.experiment.finish()
        records = _finished(file)
        self.rows = [_nested(record.history.item) for record in records if record.HasField("history")]
        # Every table is an artifact, too.
        self.artifacts = [r.artifact for r in records if r.HasField("artifact") and r.artifact.type != "run_table"]
        changes = [_nested(record.config.update) for record in records]
        self.charts = [chart for change in changes for chart in change.get("_wandb", {}).get("visualize", {}).items()]

    def values(self, key: str) -> dict[int, Any]:
        """What was logged, by step of Lightning."""
        return {row["trainer/global_step"]: row[key] for row in self.rows if key in row}

    def tables(self, key: str) -> dict[int, list[dict[str, Any]]]:
        """Tables as their rows, by step."""
        tables = {s: json.loads((self.folder / value["path"]).read_text()) for s, value in self.values(key).items()}
        return {s: [dict(zip(t["columns"], row, strict=True)) for row in t["data"]] for s, t in tables.items()}

    def history(self, folder: Path) -> SpectrumHistory:
        """The history in the one artifact."""
        (artifact,) = self.artifacts
        assert artifact.type == "hesd"
        folder.mkdir()
        for entry in artifact.manifest.contents:
            shutil.copy(entry.local_path, folder / entry.path)
        return SpectrumHistory.load(folder)


def _finished(file: Path) -> list[Any]:
    """The records of a run whose end is among them: W&B's own process writes it a moment after `finish`."""
    record_type = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        records = [record_type.FromString(text) for text in _records(file.read_bytes())]
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.05)
    pytest.fail(f"{file} has no end")


def _records(file: bytes, block: int = 32768) -> Iterator[bytes]:
    """The whole records of a log in LevelDB's format: parts with checksum, length and kind, each within a block."""
    position, record = 7, b""
    while position + 7 <= len(file):
        left = block - position % block
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", file[position : position + 7])
        part = file[position + 7 : position + 7 + length]
        if len(part) < length:
            return
        position += 7 + length
        record += part
        if kind in {1, 4}:  # the whole, or the last part
            yield record
            record = b""


def _nested(items: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        place = found
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return found


class MLflowFiles:
    """A run of MLflow, read back by its client."""

    def __init__(self, logger: MLFlowLogger) -> None:
        self.client = pytest.importorskip("mlflow").MlflowClient(logger._tracking_uri)
        self.run = self.client.get_run(logger.run_id)

    def metric(self, key: str) -> dict[int, float]:
        return {metric.step: metric.value for metric in self.client.get_metric_history(self.run.info.run_id, key)}

    def images(self, folder: Path) -> dict[tuple[str, int], Path]:
        """Images by key and step."""
        found = Path(self.client.download_artifacts(self.run.info.run_id, "images", str(folder)))
        parts = {path: path.stem.replace("~", "/").split("+") for path in found.glob("*.png")}
        return {(key, int(step)): path for path, (key, _, step, *_) in parts.items()}

    def artifacts(self, folder: Path) -> Path:
        return Path(self.client.download_artifacts(self.run.info.run_id, "hesd", str(folder)))


def assert_figure(path: Path) -> None:
    width, height = struct.unpack(">II", path.read_bytes()[16:24])  # the PNG header
    assert width >= 600
    assert height >= 200


def assert_same(first: SpectrumHistory, second: SpectrumHistory) -> None:
    """All records, to the last bit."""
    assert len(first) == len(second)
    for mine, other in zip(first, second, strict=True):
        assert (mine.epoch, mine.global_step, mine.error) == (other.epoch, other.global_step, other.error)
        assert list(mine.spectra) == list(other.spectra)
        pairs = [(mine.spectra[suffix], other.spectra[suffix]) for suffix in mine.spectra]
        pairs += [(spectrum, other.layers[name]) for name, spectrum in (mine.layers or {}).items()]
        for a, b in pairs:
            np.testing.assert_equal(a.to_dict(), b.to_dict())


class Run(NamedTuple):
    history: Any
    module: Net
    generators: Any
    wandb: WandbFiles
    mlflow: MLflowFiles


@pytest.fixture(scope="module")
def run(clients: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    wandb, mlflow = WandbLogger(save_dir=folder), MLFlowLogger(tracking_uri=f"file://{folder}/mlruns")
    observer = callback(generalization_dataloader=data(), layers="auto")
    module, generators = train(folder, [wandb, mlflow], observer), global_generators()
    assert [list(record.spectra) for record in observer.history] == [SUFFIXES] * EPOCHS
    return Run(observer.history, module, generators, WandbFiles(wandb), MLflowFiles(mlflow))


def test_scalars_are_those_of_the_history(run: Run) -> None:
    for step, record in zip(STEPS, run.history, strict=True):
        expected = scalars(record, "hesd")
        assert {"hesd/c_t", "hesd_gen/c_t", "hesd_layer/net.0/trace", "hesd/verdict"} <= set(expected)
        for key, value in expected.items():
            assert run.wandb.values(key)[step] == pytest.approx(value, rel=1e-6), key
            assert run.mlflow.metric(key)[step] == pytest.approx(value, rel=1e-6), key


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_wandb_gets_densities_as_histograms_and_charts(run: Run, suffix: str) -> None:
    histograms = run.wandb.values(f"hesd{suffix}/density")
    tables = run.wandb.tables(f"hesd{suffix}/density_chart_table")
    assert list(histograms) == list(tables) == STEPS
    for record, histogram, rows in zip(run.history, histograms.values(), tables.values(), strict=True):
        spectrum = record.spectra[suffix]
        mass, edges = spectrum.histogram()
        assert histogram["_type"] == "histogram"
        np.testing.assert_array_equal(histogram["values"], mass)
        np.testing.assert_array_equal(histogram["bins"], edges)
        grid = np.array([row["eigenvalue"] for row in rows])
        density = 10 ** np.array([row["log10 density"] for row in rows])
        assert grid[0] < spectrum.lambda_min < spectrum.lambda_max < grid[-1]
        assert np.trapezoid(density, grid) == pytest.approx(1.0, abs=1e-3)
        np.testing.assert_allclose(density, spectrum.density(grid)[1], rtol=1e-6, atol=density.max() * 1e-9)
    charts = [chart for key, chart in run.wandb.charts if key == f"hesd{suffix}/density_chart"]
    assert [chart["panel_type"] for chart in charts] == ["Vega2"] * EPOCHS
    texts = [chart["panel_config"]["stringSettings"]["title"] for chart in charts]
    assert texts == [f"hesd{suffix}, epoch 0", f"hesd{suffix}, epoch 1"]


FIGURES = [*(f"hesd{suffix}/density_figure" for suffix in SUFFIXES), "hesd/layers_figure"]


def test_both_get_the_figures(run: Run, tmp_path: Path) -> None:
    images = run.mlflow.images(tmp_path)
    assert set(images) == {(key, step) for key in FIGURES for step in STEPS}
    for key in FIGURES:
        logged = run.wandb.values(key)
        assert [(step, image["caption"]) for step, image in logged.items()] == [(3, "epoch 0"), (7, "epoch 1")]
        for step, image in logged.items():
            assert_figure(run.wandb.folder / image["path"])
            assert_figure(images[key, step])


def test_both_get_the_layers_and_the_verdict_with_its_reasons(run: Run, tmp_path: Path) -> None:
    folder = run.mlflow.artifacts(tmp_path)
    layers, assessments = run.wandb.tables("hesd/layers"), run.wandb.tables("hesd/assessment")
    assert list(layers) == list(assessments) == STEPS
    for record, rows, [row] in zip(run.history, layers.values(), assessments.values(), strict=True):
        when = {"epoch": record.epoch, "step": record.global_step}
        file = f"epoch={record.epoch}-step={record.global_step}"
        expected = [{"layer": layer, **asdict(found)} for layer, found in record.layer_indicators.items()]
        assert [found["layer"] for found in expected] == ["net.0", "net.2"]
        assert rows == [when | found for found in expected]
        assert read_csv(folder / "layers" / f"{file}.csv") == [
            {key: str(value) for key, value in found.items()} for found in expected
        ]
        words, reasons = record.assessment.words, list(record.assessment.reasons)
        assert row == {**when, f"criteria ({SHORT_CAVEAT})": words, "reasons": row["reasons"]}
        assert row["reasons"].splitlines() == reasons
        text = (folder / "assessment" / f"{file}.md").read_text()
        assert all(part in text for part in (words, *reasons))
    words = run.history[-1].assessment.words
    assert run.mlflow.run.data.tags["hesd.criteria"] == f"{words} ({SHORT_CAVEAT})"


def test_both_keep_the_history_as_artifacts(run: Run, tmp_path: Path) -> None:
    assert_same(run.wandb.history(tmp_path / "wandb"), run.history)
    assert_same(SpectrumHistory.load(run.mlflow.artifacts(tmp_path)), run.history)
    assert run.mlflow.run.info.status == "FINISHED"


def test_training_is_the_same_without_any_of_it(run: Run, tmp_path: Path) -> None:
    plain = train(tmp_path, [])
    assert all(map(torch.equal, run.module.parameters(), plain.parameters()))
    assert run.generators == global_generators()


def test_a_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    """Of several loggers the first decides; MLflow takes every folder of its store for an experiment."""
    observer = callback()
    mlflow = MLFlowLogger(tracking_uri=f"file://{tmp_path}/mlruns")
    train(tmp_path, [mlflow], observer)
    assert_same(SpectrumHistory.load(tmp_path / "mlruns" / mlflow.experiment_id / mlflow.run_id), observer.history)
    experiments = {experiment.experiment_id for experiment in mlflow.experiment.search_experiments()}
    folders = {path.name for path in (tmp_path / "mlruns").iterdir() if not path.name.startswith((".", "models"))}
    assert folders == experiments

    wandb = WandbLogger(save_dir=tmp_path, project="p")
    train(tmp_path, [wandb], observer)
    assert_same(SpectrumHistory.load(tmp_path / "p" / wandb.experiment.id), observer.history)
    wandb.experiment.finish()


fail = raising(OSError("server gone"))


@pytest.mark.filterwarnings("ignore:MLFlow only allows:RuntimeWarning")
def test_a_logger_that_fails_costs_its_own_output_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here with a name that neither of both takes as it is."""
    wandb, mlflow = WandbLogger(save_dir=tmp_path), MLFlowLogger(tracking_uri=f"file://{tmp_path}/mlruns")
    observer = callback(name="λ (all)")
    monkeypatch.setattr("lightning_hesd.training.loggers.trackers.MLflowOutput.write", fail)
    with pytest.warns(RuntimeWarning, match="server gone") as caught:
        train(tmp_path, [mlflow, wandb], observer)
    assert sum("server gone" in str(warning.message) for warning in caught) == 1
    files = WandbFiles(wandb)
    assert list(files.values("λ (all)/density")) == STEPS
    assert_same(files.history(tmp_path / "artifact"), observer.history)
    assert [artifact.name for artifact in files.artifacts] == [f"___all_-{wandb.version}"]
    mlflow_files = MLflowFiles(mlflow)
    assert list(mlflow_files.metric(" all/c_t")) == STEPS
    folder = mlflow_files.client.download_artifacts(mlflow.run_id, "all", str(tmp_path))
    assert_same(SpectrumHistory.load(folder), observer.history)


def test_training_that_fails_leaves_its_spectra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what goes wrong then does not hide why it failed, even if errors are to be raised."""
    wandb, mlflow = WandbLogger(save_dir=tmp_path), MLFlowLogger(tracking_uri=f"file://{tmp_path}/mlruns")
    observer = callback(on_error="raise")
    monkeypatch.setattr("lightning_hesd.training.loggers.trackers.MLflowOutput.finish", fail)
    with (
        pytest.raises(RuntimeError, match="power cut"),
        pytest.warns(RuntimeWarning, match="cannot write the spectra at the end of training. OSError: server gone"),
    ):
        train(tmp_path, [wandb, mlflow], observer, fail_at=1)
    assert [record.epoch for record in observer.history] == [0]
    assert_same(WandbFiles(wandb).history(tmp_path / "artifact"), observer.history)
    assert MLflowFiles(mlflow).run.info.status == "FAILED"


def test_without_an_analysis_there_is_no_artifact(tmp_path: Path) -> None:
    wandb = WandbLogger(save_dir=tmp_path)
    train(tmp_path, [wandb], callback(epochs=[9]))
    assert WandbFiles(wandb).artifacts == []


@pytest.mark.parametrize("module", sorted(Path(loggers.__file__).parent.glob("*.py")), ids=lambda module: module.stem)
def test_outputs_can_be_imported_without_clients(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for client in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, client, None)
    runpy.run_path(str(module))


class WritesItself(Net):
    """Writes to W&B and MLflow by their own functions and clients."""

    def on_fit_start(self) -> None:
        self.run = self.loggers[0].experiment
        self.write = self.run.log

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        import mlflow  # noqa: PLC0415 - there only if it is installed
        import wandb  # noqa: PLC0415

        values = {"own": float(self.training)}
        wandb.log(values)
        self.write(values)
        self.run.log(values)
        client, run_id = self.loggers[1].experiment, self.loggers[1].run_id
        client.log_metric(run_id, "client", float(self.training))
        with mlflow.start_run(run_id=run_id):
            mlflow.log_metric("fluent", float(self.training))
        return super().training_step(batch, batch_idx)


def test_clients_get_nothing_from_an_analysis(tmp_path: Path) -> None:
    loggers = [WandbLogger(save_dir=tmp_path, offline=True), MLFlowLogger(save_dir=str(tmp_path / "ml"))]
    trainer = make_trainer(tmp_path, [callback()], 1, logger=loggers, enable_checkpointing=False)
    sys.modules["mlflow"].set_tracking_uri(str(tmp_path / "ml"))
    trainer.fit(WritesItself(), data())
    client, run_id = loggers[1].experiment, loggers[1].run_id
    for key in ("client", "fluent"):
        assert [metric.value for metric in client.get_metric_history(run_id, key)] == [1.0] * 4
    assert [row["own"] for row in WandbFiles(loggers[0]).rows if "own" in row] == [1.0] * 12
