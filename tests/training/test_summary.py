"""What a run says of its analyses on the terminal: the words, and where they appear between Lightning's bars."""

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
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_hesd import HessianCheckpoint
from lightning_hesd.spectra.analysis_lines import analysis_lines
from lightning_hesd.spectra.assessment import CAVEAT, TITLE
from lightning_hesd.spectra.selection import Candidate
from lightning_hesd.spectra.summary import GAP, MAX_ROWS, Kept, Summary, summarize
from lightning_hesd.training import closing, terminal
from lightning_hesd.training.compat import messages
from lightning_hesd.training.history import SpectrumRecord
from tests.training.broken import raising
from tests.training.modules import Validated, callback, fit
from tests.training.scripted import make_spectrum
from tests.training.terminals import BARS, Terminal, scripted, train


def record(epoch: int, c_t: float = -0.1, *, step: int | None = None, **values: Any) -> SpectrumRecord:
    return SpectrumRecord(epoch, (epoch + 1) * 10 if step is None else step, make_spectrum(c_t, **values))


def failed(epoch: int) -> SpectrumRecord:
    return SpectrumRecord(epoch, (epoch + 1) * 10, None, "RuntimeError: no luck\nin line 2")


def summary(*records: SpectrumRecord, **arguments: Any) -> Summary:
    defaults: dict[str, Any] = {"seconds": 3.21, "overhead": 0.0456, "kept": {}}
    found = summarize(records, "hesd", **{**defaults, **arguments})
    assert found is not None
    return found


def cells(found: Summary, column: str) -> list[str]:
    return [row[found.header.index(column)] for row in found.rows]


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
    found = "C_t = -0.1 [-0.1, -0.1], MP, λ_max 1, loss 0.5, 0.1 s"
    assert list(analysis_lines(made, "x", by_step=by_step)) == [line.format(found) for line in lines]


def test_lines_fit_into_a_terminal() -> None:
    """What matters less is left out."""
    wide = replace(make_spectrum(-0.00123456), verified="unknown", seconds=1e4, c_t_sampling_error=0.00123)
    made = SpectrumRecord(1234, 123456, wide, "no luck " * 20, generalization=wide, preconditioned=wide)
    lines = analysis_lines(made, "hesd", by_step=True)
    assert all(len(line) <= 80 for line in lines), lines
    assert lines[0].startswith("hesd: epoch 1234, step 123456, C_t = -0.00123 [")
    assert lines[-1].endswith(" ...")
    assert "MP?, ±0.0012 by sampling" in analysis_lines(replace(made, epoch=0), "x")[0]


def test_the_criteria_have_their_caveat() -> None:
    made = replace(record(0), generalization=make_spectrum(-0.2))
    words = made.assessment.words
    first, second, third = analysis_lines(made, "x")
    assert first.startswith("x: epoch 0, C_t = -0.1 [")
    assert second.startswith("x: epoch 0, gen C_t = -0.2 [")
    assert third == f"x: epoch 0, criteria {words} (experimental, right in 18/40)"
    assert f"{TITLE} ({CAVEAT})" in summary(made).notes
    assert str(made.assessment).startswith(f"{TITLE} ({CAVEAT}): {words}; ")


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

    def test_notes_give_a_reason_once_and_explain_the_question_mark_of_an_open_type(self):
        notes = summary(failed(0), record(1), failed(2), failed(3)).notes
        assert [note for note in notes if "no luck" in note] == ["epoch 0 and 2 more failed: RuntimeError: no luck"]
        found = summary(replace(record(0), spectrum=replace(make_spectrum(-0.5), residuals=[[0.3, 0.3]])))
        assert cells(found, "type") == ["MP?"]
        assert "?: the interval contains both types, or is not verified" in found.notes

    def test_steps_where_epochs_have_several(self):
        found = summary(record(0, step=5, loss=0.5), record(0, -0.05, step=10, loss=0.3))
        assert cells(found, "step") == ["5", "10"]
        pick = "highest C_t would pick epoch 0, step 10 (MP, loss within 0.01, 5% of its drop, of the lowest)"
        assert found.notes[0] == pick
        assert "step" not in summary(record(0), record(1)).header

    def test_seconds_are_those_of_all_spectra(self):
        """Layers are computed together, and count once."""
        layers = {"a": make_spectrum(-0.2), "b": make_spectrum(-0.1)}
        made = replace(record(0), generalization=make_spectrum(-0.2), layers=layers)
        assert cells(summary(made), "s") == ["0.3"]
        assert cells(summary(made), "criteria") == [made.assessment.words]

    def test_picks_of_checkpoints_come_before_those_of_losses(self):
        """A checkpoint may go by another metric than the loss, and its file is what can be loaded."""
        kept = {
            "highest_c_t": Kept(Candidate(0, 10, 0.5, -0.3, True, "some/0.ckpt"), [10]),
            "my_rule": Kept(Candidate(1, 20, 0.5, 1.0, True, "some/1.ckpt"), [10, 20]),
        }
        found = summary(record(0, -0.3, lambda_max=2.0), record(1, -0.1), kept=kept)
        assert cells(found, "candidate") == ["C_t, my_rule, λ_max", "my_rule, λ_max"]
        assert cells(found, "pick") == ["C_t", "my_rule, λ_max"]
        assert found.notes == ("lowest λ_max would pick epoch 1 (MP, loss within 0, 5% of its drop, of the lowest)",)

    def test_nothing_is_picked_of_mn_spectra_or_of_the_start_and_nothing_shown_of_nothing(self):
        for records in ((record(0, -0.9),), (record(-1, -0.1, step=0), failed(0))):
            assert "pick" not in summary(*records).header
        assert summarize([], "hesd", seconds=0.0, overhead=None, kept={}) is None

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
        lines = str(summary(record(0, -0.25), record(10, -0.125))).splitlines()
        assert lines[1] == "epoch     C_t        [interval]  type  λ_max  loss    s  candidate   pick"
        assert lines[2] == "    0   -0.25    [-0.25, -0.25]  MP        1   0.5  0.1  C_t, λ_max  λ_max"
        assert lines[3] == "   10  -0.125  [-0.125, -0.125]  MP        1   0.5  0.1  C_t, λ_max  C_t"

    def test_a_narrow_terminal_does_without_some_columns(self):
        made = [replace(record(n, -0.25), generalization=make_spectrum(-0.2)) for n in range(3)]
        found = summary(*made)
        assert found.within(200) == found
        narrow = found.within(80)
        assert "candidate" not in narrow.header
        assert "s" in narrow.header
        assert not {"candidate", "s", "loss", "λ_max"} & set(found.within(40).header)
        assert {"epoch", "C_t", "[interval]", "type", "criteria", "pick"} <= set(narrow.header)
        assert all(len(line) < 80 for line in str(narrow).splitlines()[1 : len(made) + 2])


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
    assert last[-1] == f"hesd: all spectra are in {tmp_path / 'hesd'}; `lightning-hesd report {tmp_path}` shows them"
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
    assert sum(line.startswith("hesd: all spectra are in ") for line in screen.frames[-1]) == 1


@pytest.mark.parametrize("kind", [*BARS, None])
def test_two_lines_by_default(
    kind: str | None, tmp_path: Path, screen: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pick and the folder, as information and below the bar."""
    observer, _ = scripted(screen, progress=False, checkpoint=None if kind == "tqdm" else "highest_c_t")
    bars = [] if kind is None else [wide(kind, screen)]
    monkeypatch.setattr(messages, "inform", lambda line: screen.write(f"{line}\n"))
    options = {"enable_progress_bar": kind is not None, "enable_checkpointing": kind != "tqdm"}
    train(tmp_path, screen, *bars, observer, **options)
    *before, first, second = (line for line in screen.frames[-1] if line)
    assert [line[:7] for line in before] == ([] if kind is None else ["Epoch 1"])
    folder, pick = (second, first) if kind == "tqdm" else (first, second)
    assert folder == f"hesd: all spectra are in {tmp_path / 'hesd'}; `lightning-hesd report {tmp_path}` shows them"
    if observer.checkpoint is None:
        assert pick == 'hesd: highest C_t would pick epoch 0; `checkpoint="highest_c_t"` would keep its checkpoint'
    else:
        path = observer.checkpoint.best_model_path
        assert pick == f'hesd: highest C_t picks epoch 0, {path}; `ckpt_path="best"` loads it.'


def test_once_per_fit_and_not_in_a_development_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    observer = callback(verbose=True)
    trainer = fit(tmp_path, observer)
    assert capsys.readouterr().out.count("× the training time") == 1
    trainer.validate(Validated(), verbose=False)
    assert "training time" not in capsys.readouterr().out
    fit(tmp_path, observer)
    assert capsys.readouterr().out.count("× the training time") == 1
    fit(tmp_path, callback(verbose=True), fast_dev_run=True)
    out = capsys.readouterr().out
    assert "hesd: epoch 0, C_t = " in out
    assert "training time" not in out


def test_picks_of_all_checkpoints_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    observer = callback(verbose=True, checkpoint="highest_c_t")
    second = HessianCheckpoint("lowest_max_eigenvalue", tolerance=10.0, require_mp=False)
    fit(tmp_path, observer, second, enable_checkpointing=True)
    out = capsys.readouterr().out
    for name, checkpoint in (("highest C_t", observer.checkpoint), ("lowest λ_max", second)):
        assert f"\nhesd: {name} picks epoch {checkpoint.best.epoch}, {checkpoint.best_model_path}; " in out
    assert "would pick" not in out


def test_rank_zero_only(capsys: pytest.CaptureFixture[str]) -> None:
    for is_zero in (True, False):
        trainer: Any = SimpleNamespace(is_global_zero=is_zero, progress_bar_callback=None)
        terminal.say(trainer, "hello")
        terminal.show(trainer, lambda: summary(record(0)))
        out = capsys.readouterr().out
        assert (out.startswith("hello\n"), "hesd: 1 analysis" in out) == (is_zero, is_zero)


def test_what_is_said_of_a_run_without_a_rule() -> None:
    assert "`history[-1].error` says why" in closing.pick_words([failed(0)])
    assert "no analyzed one near the lowest loss is mainly positive" in closing.pick_words([record(0, -0.9)])


def test_results_are_shown_by_tensorboard_or_in_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    board = pl.Trainer(logger=TensorBoardLogger(tmp_path, "my logs"), accelerator="cpu", enable_progress_bar=False)
    folder = "my logs/version_0/hesd"
    words = closing.results_words(board, "hesd", str(tmp_path / folder))
    assert words == f"all spectra are in {folder}; `tensorboard --logdir 'my logs'` shows them"
    plain = pl.Trainer(logger=False, default_root_dir=tmp_path / "run", accelerator="cpu", enable_progress_bar=False)
    words = closing.results_words(plain, "own", "memory://run/own")
    assert words == "all spectra are in memory://run/own; `lightning-hesd report memory://run --name own` shows them"


TRAINER: Any = SimpleNamespace(is_global_zero=True, progress_bar_callback=None)


def test_a_terminal_without_greek(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    terminal.show(TRAINER, lambda: summary(record(0)))
    assert "lowest ?_max would pick epoch 0" in raw.getvalue().decode()


def test_without_rich(monkeypatch: pytest.MonkeyPatch, screen: Terminal) -> None:
    monkeypatch.setattr(sys, "stdout", screen)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "rich", None)
        terminal.show(TRAINER, lambda: summary(record(0)))
    assert [line for line in screen.lines if line] == str(summary(record(0))).splitlines()


def test_nothing_is_markup(monkeypatch: pytest.MonkeyPatch, screen: Terminal) -> None:
    monkeypatch.setattr(sys, "stdout", screen)
    made = replace(failed(0), error="[/red] [bold]E")
    terminal.show(TRAINER, lambda: summary(made))
    assert "─" in "".join(screen.lines)  # which only Rich draws
    assert "epoch 0 failed: [/red] [bold]E" in screen.lines


def test_a_failure_is_a_warning() -> None:
    with pytest.warns(RuntimeWarning, match="cannot print the summary.*the screen is gone"):
        terminal.show(TRAINER, raising(OSError("the screen is gone")))
