"""Loggers stay what they are in an analysis, and get nothing from it, by whatever way they are written to."""

import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch.utils.tensorboard import SummaryWriter

from tests.training.logs import read_events, rows
from tests.training.modules import Classifier, Digits, callback, fit, loader, plain_loss

SEEN: list[Any] = []
"""Out of reach of the module and the Trainer."""


class ListLogger(Logger):
    """A logger of the user's, whose experiment is a dict."""

    name, version = "list", 3

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []
        self.folder = folder
        self._experiment: dict[str, list[float]] = {"losses": []}

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @property
    def experiment(self) -> Any:
        return self._experiment

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        own = {key: value for key, value in metrics.items() if not key.startswith("hesd")}
        self.rows.append(own)
        with (self.folder / "rows").open("a", encoding="utf-8") as file:
            file.write(f"{own if set(own) - {'epoch'} else ''}")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log nothing."""


class Writing(Classifier):
    """Writes to its loggers in every way there is."""

    def on_fit_start(self) -> None:
        csv_logger, _, board = self.loggers
        self.kept = [csv_logger, board.experiment, {"method": csv_logger.log_metrics}]
        self.add, self.write = board.experiment.add_scalar, self.log
        folder = Path(self.trainer.default_root_dir)
        self.extra, self.writer = CSVLogger(folder, name="extra"), SummaryWriter(folder / "own")

    def on_fit_end(self) -> None:
        self.writer.close()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        value, board = loss.item(), self.loggers[2].experiment
        facts = [(logger.name, logger.version, logger.save_dir, logger.log_dir) for logger in self.loggers]
        SEEN.append((type(self.logger), facts, self.trainer.log_dir, board.get_logdir()))
        for logger in (*self.loggers, self.kept[0]):
            logger.log_metrics({"direct": value}, step=self.global_step)
            logger.save()
        self.loggers[1].experiment["losses"].append(value)
        board.add_scalar("direct/experiment", value, self.global_step)
        board.add_text("direct/text", "text")
        self.kept[1].add_scalar("direct/kept", value, self.global_step)
        self.kept[2]["method"]({"kept": value}, self.global_step)
        self.add("direct/method", value, self.global_step)
        self.write("written", loss)
        self.loggers[2].log_hyperparams({"a": 1})
        self.extra.log_metrics({"extra": value})
        self.extra.save()
        self.writer.add_scalar("own", value, self.global_step)
        self.trainer.print("never printed by an analysis" if not self.training else "")
        return loss


def written(folder: Path, loggers: list[Any]) -> dict[str, Any]:
    """What the loggers have, without what the callback adds."""
    board, own = read_events(loggers[2].log_dir), read_events(folder / "own")
    tags = [{t: [(e.step, e.value) for e in read.Scalars(t)] for t in read.Tags()["scalars"]} for read in (board, own)]
    texts = [tag for tag in board.Tags()["tensors"] if "direct" in tag]
    return {
        "csv": rows(Path(loggers[0].log_dir) / "metrics.csv"),
        "extra": rows(folder / "extra" / "version_0" / "metrics.csv"),
        "list": [row for row in loggers[1].rows if set(row) - {"epoch"}],
        "file": (folder / "rows").read_text(),
        "experiment": loggers[1].experiment,
        "events": {tag: values for tag, values in tags[0].items() if not tag.startswith(("epoch", "hesd"))},
        "texts": [len(board.Tensors(tag)) for tag in texts],
        "own": tags[1],
        "event files": len(list(Path(loggers[2].log_dir).glob("events*"))),
    }


@pytest.mark.parametrize(
    ("schedule", "analyses"), [({}, 1), ({"at_start": True, "every_n_train_steps": 3}, 2)], ids=["epochs", "steps"]
)
def test_loggers_get_nothing_from_an_analysis(
    schedule: dict[str, Any], analyses: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes, facts = [], []
    observer = callback(num_samples=8, steps=2, **schedule)
    for name, callbacks in {"without": [], "with": [observer]}.items():
        folder = tmp_path / "run"
        SEEN.clear()
        loggers = [CSVLogger(folder), ListLogger(folder), TensorBoardLogger(folder)]
        trainer = fit(folder, *callbacks, module=Writing(), data=loader(Digits(24)), logger=loggers, max_epochs=1)
        outcomes.append(written(folder, loggers))
        facts.append(list(SEEN))
        assert trainer.loggers == loggers
        folder.rename(tmp_path / name)
    assert outcomes[0] == outcomes[1]
    assert len(outcomes[0]["own"]["own"]) == 3
    assert len(facts[1]) > len(facts[0]) == 3
    assert all(seen == facts[0][0] for seen in facts[1]), "the same as in training"
    assert [record.error for record in observer.history] == [None] * analyses
    assert "never printed" not in capsys.readouterr().out


class OwnLog(Classifier):
    """Has a logger of Python's in the place of Lightning's method."""

    def __init__(self) -> None:
        super().__init__()
        self.log: Any = logging.getLogger("own")  # type: ignore[method-assign]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log.debug("batch %d", batch_idx)
        return plain_loss(self, batch)


class BareLogger(Logger):
    """Has what Lightning asks of a logger, which includes no experiment."""

    name = version = None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log nothing."""

    log_hyperparams = log_metrics


def test_a_log_of_the_module_s_own_is_neither_replaced_nor_used(tmp_path: Path) -> None:
    observer = callback(num_samples=8, steps=2)
    trainer = fit(tmp_path, observer, module=OwnLog(), max_epochs=1, logger=BareLogger())
    assert trainer.callback_metrics["hesd/c_t"] == pytest.approx(observer.history[0].spectrum.c_t)


class LogsFromThread(pl.Callback):
    """Logs from a thread of its own, as a monitor of devices may."""

    def __init__(self) -> None:
        self.stop = threading.Event()

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.logger: Any = trainer.logger
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def work(self) -> None:
        while not self.stop.wait(0.001):
            self.logger.log_metrics({"thread": float(len(SEEN))})
            SEEN.append(None)

    def on_train_end(self, *_: Any) -> None:
        self.stop.set()
        self.thread.join()


def test_other_threads_go_on_logging(tmp_path: Path) -> None:
    SEEN.clear()
    monitor, logger = LogsFromThread(), ListLogger(tmp_path)

    def loss_fn(module: Any, batch: Any) -> Any:
        module.logger.log_metrics({"analysis": 1.0})
        before = len(SEEN)
        while len(SEEN) == before:  # until the thread gets its turn
            pass
        return plain_loss(module, batch)

    observer = callback(num_samples=8, steps=2, loss_fn=loss_fn)
    fit(tmp_path, monitor, observer, logger=logger, max_epochs=1, data=loader(Digits(16)))
    assert [row["thread"] for row in logger.rows if "thread" in row] == list(range(len(SEEN)))
    assert not any("analysis" in row for row in logger.rows)
    assert [record.error for record in observer.history] == [None]


@pytest.mark.filterwarnings("ignore:The `srun` command is available")
def test_a_job_that_is_requeued_in_an_analysis_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler of the signal saves a checkpoint; the function that is analyzed must not."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", "")  # there is no `scontrol`
    signalled: list[int] = []

    def loss_fn(module: Any, batch: Any) -> Any:
        module.trainer.save_checkpoint(tmp_path / "never.ckpt")
        if not signalled:
            signalled.append(1)
            os.kill(os.getpid(), signal.SIGUSR1)
            for _ in range(1000):  # until Python gets to the signal
                pass
        return plain_loss(module, batch)

    observer = callback(num_samples=8, steps=2, loss_fn=loss_fn)
    fit(tmp_path, observer, max_epochs=1, plugins=[SLURMEnvironment(auto_requeue=True)])
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["hpc_ckpt_1.ckpt"]
    assert [record.error for record in observer.history] == [None]
