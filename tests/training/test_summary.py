"""What a run says of its analyses on the terminal: the words, and where they appear between Lightning's bars."""

from __future__ import annotations

import builtins
import io
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import rich

from lightning_hesd import HessianCheckpoint
from lightning_hesd.spectra.selection import Candidate
from lightning_hesd.spectra.summary import GAP, MAX_ROWS, Kept, Summary, analysis_lines, summarize
from lightning_hesd.training import terminal
from lightning_hesd.training.history import SpectrumRecord
from tests.training.modules import Classifier, callback, fit
from tests.training.scripted import make_spectrum
from tests.training.terminals import BARS, Terminal, scripted, train


def record(epoch: int, c_t: float = -0.1, *, step: int | None = None, **values: Any) -> SpectrumRecord:
    return SpectrumRecord(epoch, (epoch + 1) * 10 if step is None else step, make_spectrum(c_t, **values))


def failed(epoch: int) -> SpectrumRecord:
    return SpectrumRecord(epoch, (epoch + 1) * 10, None, "RuntimeError: no luck\nin line 2")


def summary(*records: SpectrumRecord, **arguments: Any) -> Summary:
    defaults: dict[str, Any] = {"seconds": 3.21, "overhead": 0.0456, "kept": {}, "folder": None}
    found = summarize(records, "hesd", **{**defaults, **arguments})
    assert found is not None
    return found


def cells(found: Summary, column: str) -> list[str]:
    return [row[found.header.index(column)] for row in found.rows]


# Words ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "by_step", "lines"),
    [
        (record(-1, step=0), False, ["x: start, {}"]),
        (record(3), False, ["x: epoch 3, {}"]),
        (record(3, step=7), True, ["x: epoch 3, step 7, {}"]),
        (failed(2), False, ["x: epoch 2, failed: RuntimeError: no luck"]),
        (replace(record(2), error="the layers: E"), False, ["x: epoch 2, {}", "x: epoch 2, failed: the layers: E"]),
    ],
)
def test_lines(made: SpectrumRecord, by_step: bool, lines: list[str]) -> None:
    assert list(analysis_lines(made, "x", by_step=by_step)) == [line.format(made.spectrum) for line in lines]


class TestTable:
    def test_values(self):
        found = summary(
            record(-1, -0.9, step=0, loss=2.3),
            record(0, -0.25, lambda_max=4.0, loss=0.51),
            failed(1),
            record(2, math.nan),
        )
        assert found.title == "hesd: 4 analyses, 1 failed, 3.2 s, 0.046× the training time"
        assert found.header == ("epoch", "C_t", "[interval]", "type", "λ_max", "loss", "s", "candidate", "pick")
        assert found.rows == (
            ("start", "-0.9", "[-0.9, -0.9]", "MN", "1", "2.3", "0.1", "", ""),
            ("0", "-0.25", "[-0.25, -0.25]", "MP", "4", "0.51", "0.1", "C_t, λ_max", "C_t, λ_max"),
            ("1", "failed", "", "", "", "", "", "", ""),
            ("2", "undefined", "", "", "0", "0.5", "0.1", "", ""),
        )
        assert "epoch 1 failed: RuntimeError: no luck" in found.notes

    def test_a_reason_is_given_once(self):
        notes = summary(failed(0), record(1), failed(2), failed(3)).notes
        assert [note for note in notes if "no luck" in note] == ["epoch 0 and 2 more failed: RuntimeError: no luck"]

    def test_steps_where_epochs_have_several(self):
        found = summary(record(0, step=5, loss=0.5), record(0, -0.05, step=10, loss=0.3))
        assert cells(found, "step") == ["5", "10"]
        assert found.notes[0] == (
            "highest C_t would pick epoch 0, step 10 (MP, loss within 0.01, 5% of its drop, of the lowest)"
        )
        assert "step" not in summary(record(0), record(1)).header

    def test_an_open_type_has_a_question_mark(self):
        spectrum = replace(make_spectrum(-0.5), residuals=[[0.3, 0.3]])
        found = summary(SpectrumRecord(0, 1, spectrum))
        assert cells(found, "type") == ["MP?"]
        assert "?: the interval contains both types, or is not verified" in found.notes

    def test_seconds_are_those_of_all_spectra(self):
        """Layers are computed together, and count once."""
        layers = {"a": make_spectrum(-0.2), "b": make_spectrum(-0.1)}
        made = replace(record(0), generalization=make_spectrum(-0.2), layers=layers)
        found = summary(made)
        assert cells(found, "s") == ["0.3"]
        assert cells(found, "criteria") == [made.assessment.words]

    def test_picks_of_checkpoints_come_before_those_of_losses(self):
        """A checkpoint may go by another metric than the loss, and its file is what can be loaded."""
        kept = {
            "highest_c_t": Kept(Candidate(0, 10, 0.5, -0.3, True, "some/0.ckpt"), [10]),
            "my_rule": Kept(Candidate(1, 20, 0.5, 1.0, True, "some/1.ckpt"), [10, 20]),
        }
        found = summary(record(0, -0.3, lambda_max=2.0), record(1, -0.1), kept=kept)
        assert cells(found, "candidate") == ["C_t, my_rule, λ_max", "my_rule, λ_max"]
        assert cells(found, "pick") == ["C_t", "my_rule, λ_max"]
        assert found.notes == (
            "highest C_t picks epoch 0: some/0.ckpt",
            "my_rule picks epoch 1: some/1.ckpt",
            "lowest λ_max would pick epoch 1 (MP, loss within 0, 5% of its drop, of the lowest)",
        )

    def test_nothing_is_picked_of_mn_spectra_or_of_the_start(self):
        for records in ((record(0, -0.9),), (record(-1, -0.1, step=0), failed(0))):
            assert "pick" not in summary(*records).header

    def test_long_runs_are_shortened_around_the_picks(self):
        records = [record(n, -0.1 - 0.001 * abs(n - 101), lambda_max=1 + abs(n - 57)) for n in range(150)]
        found = summary(*records)
        shown = [int(epoch) for epoch in cells(found, "epoch") if epoch != GAP]
        assert {0, 57, 101, 149} <= set(shown)
        assert shown == sorted(set(shown))
        assert MAX_ROWS - 2 <= len(shown) <= MAX_ROWS
        assert found.title.startswith("hesd: 150 analyses")
        assert len(summary(*records[:MAX_ROWS]).rows) == MAX_ROWS

    def test_plain_text_is_aligned(self):
        lines = str(summary(record(0, -0.25), record(10, -0.125), folder=Path("run") / "hesd")).splitlines()
        assert lines[1] == "epoch     C_t        [interval]  type  λ_max  loss    s  candidate   pick"
        assert lines[2] == "    0   -0.25    [-0.25, -0.25]  MP        1   0.5  0.1  C_t, λ_max  λ_max"
        assert lines[3] == "   10  -0.125  [-0.125, -0.125]  MP        1   0.5  0.1  C_t, λ_max  C_t"
        assert lines[-1] == f"all spectra: {Path('run') / 'hesd'}"

    def test_nothing_analyzed(self):
        assert summarize([], "hesd", seconds=0.0, overhead=None, kept={}, folder=None) is None


# On the screen --------------------------------------------------------------------------------------------------------


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress._IS_INTERACTIVE", True)
    monkeypatch.setenv("COLUMNS", "150")  # no lines are broken
    yield Terminal()
    rich.reconfigure()


class Interrupt(pl.Callback):
    """Ends training in the second epoch: by Ctrl-C, or by an error."""

    def __init__(self, exception: BaseException) -> None:
        self.exception = exception

    def on_train_batch_end(self, trainer: pl.Trainer, *_args: Any) -> None:
        if trainer.global_step == 8:
            raise self.exception


def wide(kind: str, screen: Terminal) -> Any:
    bar = BARS[kind](screen)
    if kind == "rich":
        bar._console_kwargs["width"] = 150
    return bar


def analysis_rows(frame: list[str]) -> list[int]:
    return [row for row, line in enumerate(frame) if line.startswith("hesd: ") and "C_t = " in line]


@pytest.mark.parametrize("kind", BARS)
@pytest.mark.parametrize("order", ["bar first", "bar last"])
def test_lines_stay_whole_above_the_bar_and_the_table_comes_below(
    kind: str, order: str, tmp_path: Path, screen: Terminal
) -> None:
    observer, _ = scripted(screen, verbose=True, at_start=True, progress=False)
    bar = wide(kind, screen)
    train(tmp_path, screen, *([bar, observer] if order == "bar first" else [observer, bar]))
    last = [line for line in screen.frames[-1] if line][1:]  # after what is analyzed
    expected = [line for made in observer.history for line in analysis_lines(made, "hesd")]
    assert len(expected) == 3
    assert last[:3] == expected
    assert [line[:7] for line in last if "Epoch" in line] == ["Epoch 1"]
    assert last[3].startswith("Epoch 1")
    assert last[4].startswith("hesd: 3 analyses, ")
    assert last[5].split() == ["epoch", "C_t", "[interval]", "type", "λ_max", "loss", "s", "candidate", "pick"]
    assert [line.split()[0] for line in last[7:10]] == ["start", "0", "1"]  # below a rule
    assert last[-1] == f"all spectra: {tmp_path / 'hesd'}"
    # No line is ever torn by a bar.
    for frame in screen.frames:
        assert all(frame[row] in expected for row in analysis_rows(frame))


@pytest.mark.parametrize(
    ("kind", "exception"),
    [("tqdm", KeyboardInterrupt()), ("rich", ValueError("broken")), (None, KeyboardInterrupt()), (None, ValueError())],
)
def test_an_interrupted_run_is_summed_up_once(
    kind: str | None, exception: BaseException, tmp_path: Path, screen: Terminal
) -> None:
    observer, _ = scripted(screen, verbose=True)
    bars = [] if kind is None else [wide(kind, screen)]
    with pytest.raises(SystemExit if isinstance(exception, KeyboardInterrupt) else ValueError):
        train(tmp_path, screen, *bars, observer, Interrupt(exception), enable_progress_bar=kind is not None)
    assert sum(line.startswith("hesd: 1 analysis, ") for line in screen.frames[-1]) == 1
    assert any("highest C_t would pick epoch 0" in line for line in screen.frames[-1])


@pytest.mark.parametrize("kind", [*BARS, None])
def test_nothing_by_default(kind: str | None, tmp_path: Path, screen: Terminal) -> None:
    observer, _ = scripted(screen, progress=False)
    bars = [] if kind is None else [wide(kind, screen)]
    train(tmp_path, screen, *bars, observer, enable_progress_bar=kind is not None)
    said = [line for line in screen.frames[-1] if line] if screen.frames else []
    assert [line[:7] for line in said] == ([] if kind is None else ["Epoch 1"])


def test_once_per_fit_and_not_in_a_development_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    observer = callback(verbose=True)
    trainer = fit(tmp_path, observer)
    assert capsys.readouterr().out.count("× the training time") == 1
    trainer.validate(Validating(), dataloaders=[0], verbose=False)
    assert "training time" not in capsys.readouterr().out
    fit(tmp_path, observer)
    assert capsys.readouterr().out.count("× the training time") == 1
    fit(tmp_path, callback(verbose=True), fast_dev_run=True)
    out = capsys.readouterr().out
    assert "hesd: epoch 0, C_t = " in out
    assert "training time" not in out


class Validating(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def test_picks_of_all_checkpoints_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    observer = callback(verbose=True, checkpoint="highest_c_t")
    second = HessianCheckpoint("lowest_max_eigenvalue", tolerance=10.0, require_mp=False)
    fit(tmp_path, observer, second, enable_checkpointing=True)
    out = capsys.readouterr().out
    for name, checkpoint in (("highest C_t", observer.checkpoint), ("lowest λ_max", second)):
        assert f"\n{name} picks epoch {checkpoint.best.epoch}: {checkpoint.best_model_path}\n" in out
    assert "would pick" not in out


def test_rank_zero_only(capsys: pytest.CaptureFixture[str]) -> None:
    for rank, printed in ((0, True), (1, False)):
        trainer: Any = SimpleNamespace(is_global_zero=rank == 0, progress_bar_callback=None)
        terminal.say(trainer, "hello")
        terminal.show(trainer, lambda: summary(record(0)))
        out = capsys.readouterr().out
        assert (out.startswith("hello\n"), "hesd: 1 analysis" in out) == (printed, printed)


TRAINER: Any = SimpleNamespace(is_global_zero=True, progress_bar_callback=None)


def test_a_terminal_without_greek(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    terminal.show(TRAINER, lambda: summary(record(0)))
    assert "lowest ?_max would pick epoch 0" in raw.getvalue().decode()


def test_without_rich(monkeypatch: pytest.MonkeyPatch, screen: Terminal) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "rich":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(builtins, "__import__", without)
    terminal.show(TRAINER, lambda: summary(record(0)))
    assert [line for line in screen.lines if line] == str(summary(record(0))).splitlines()


def test_nothing_is_markup(monkeypatch: pytest.MonkeyPatch, screen: Terminal) -> None:
    monkeypatch.setattr(sys, "stdout", screen)
    made = replace(failed(0), error="[/red] [bold]E")
    terminal.show(TRAINER, lambda: summary(made))
    assert "─" in "".join(screen.lines)  # which only Rich draws
    assert "epoch 0 failed: [/red] [bold]E" in screen.lines


def test_a_failure_is_a_warning() -> None:
    def fail() -> None:
        msg = "the screen is gone"
        raise OSError(msg)

    with pytest.warns(RuntimeWarning, match="cannot print the summary.*the screen is gone"):
        terminal.show(TRAINER, fail)
