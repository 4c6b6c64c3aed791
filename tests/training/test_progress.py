"""The bar of a long analysis, as it appears on a terminal between Lightning's own bars."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import rich
import rich.markup
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress import rich_progress

from lightning_hesd.training import terminal as progress
from tests.training.modules import callback, fit, freeze, global_generators, make_trainer
from tests.training.terminals import BARS, TOTAL, Spy, Terminal, Validated, rich_bar, scripted, tqdm_bar, train


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """The terminal of a run, on which bars appear at once."""
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    # As in notebooks: Rich draws at once rather than, now and then, in a thread. Older Lightning does so everywhere.
    monkeypatch.setattr(rich_progress, "_IS_INTERACTIVE", True, raising=False)
    yield Terminal()
    rich.reconfigure()


def counts_in(frames: list[list[str]]) -> list[str]:
    """Return the steps that the bar showed, in order and each once."""
    shown = [re.search(r"Lanczos steps.* (\d/\d+) ", " ".join(frame))[1] for frame in frames]  # type: ignore[index]
    return list(dict.fromkeys(shown))


def assert_gone(spy: Spy) -> None:
    """Check that nothing of the bar is left when the next callback has its turn."""
    assert spy.afterwards
    assert not any("Lanczos" in line for frame in spy.afterwards for line in frame)


@pytest.mark.parametrize("kind", BARS)
@pytest.mark.parametrize(("schedule", "batch"), [({}, "5"), ({"every_n_train_steps": 2}, r"\d")], ids=["after", "in"])
def test_a_bar_of_its_own_below_the_training_bar(
    kind: str, schedule: dict[str, Any], batch: str, tmp_path: Path, terminal: Terminal
) -> None:
    """After epochs, and within them."""
    observer, spy = scripted(terminal, **schedule)
    train(tmp_path, terminal, BARS[kind](terminal), observer, spy)
    frames = terminal.showing("Lanczos")
    assert f"1/{TOTAL}" in counts_in(frames)
    for frame in frames:
        first, second = (line for line in frame if line)
        assert re.match(rf"Epoch [01].* {batch}/5 ", first)
        assert second.startswith("hesd: Lanczos steps")
    assert {frame[0][:7] for frame in frames} == {"Epoch 0", "Epoch 1"}
    assert_gone(spy)
    assert re.match(r"Epoch 1.* 5/5 ", terminal.frames[-1][0])


@pytest.mark.parametrize("kind", BARS)
def test_the_bars_of_lightning_go_on_as_without_it(kind: str, tmp_path: Path, terminal: Terminal) -> None:
    def train_and_look(*callbacks: pl.Callback) -> tuple[list[str], set[str], list[str]]:
        terminal.__init__()  # type: ignore[misc]
        train(tmp_path, terminal, BARS[kind](terminal), *callbacks)
        training = [line for frame in terminal.frames for line in frame if line.startswith("Epoch")]
        places = {frame[1][:10] for frame in terminal.showing("Validation")}
        # Without times and speeds, which vary, and C_t, which is there on purpose.
        varying = r"[-\d.:?]+(it/s|s/it)|[-\d]+:[-\d:]+|,? ?hesd/c_t\S+( \S+)?"
        final = [re.sub(varying, "", line).rstrip(" ]") for line in terminal.frames[-1] if line]
        return list(dict.fromkeys(line[:8] for line in training)), places, final

    with_it = train_and_look(scripted(terminal)[0])
    without = train_and_look()
    assert with_it == without
    assert with_it[1] == {"Validation"}
    assert len(with_it[2]) == 1
    assert re.match(r"Epoch 1.* 5/5 ", with_it[2][0])


@pytest.mark.parametrize("order", ["bar first", "bar last"])
@pytest.mark.parametrize("kind", BARS)
def test_before_the_first_step(kind: str, order: str, tmp_path: Path, terminal: Terminal) -> None:
    observer, spy = scripted(terminal, at_start=True, epochs=[])
    bar = BARS[kind](terminal)
    tasks = []

    class Tasks(pl.Callback):
        """Finds Lightning's tasks as its users do."""

        def on_train_epoch_end(self, *_args: Any) -> None:
            if isinstance(bar, RichProgressBar):
                found = (bar.train_progress_bar.description, bar.val_progress_bar.description)
                tasks.append(tuple(rich.markup.render(text).plain for text in found))

    train(tmp_path, terminal, *([bar, observer] if order == "bar first" else [observer, bar]), spy, Tasks())
    assert f"1/{TOTAL}" in counts_in(terminal.showing("Lanczos"))
    assert not any("Epoch" in line for frame in terminal.showing("Lanczos") for line in frame)
    assert_gone(spy)
    assert tasks == ([] if kind == "tqdm" else [("Epoch 0/1 ", "Validation"), ("Epoch 1/1 ", "Validation")])
    assert re.match(r"Epoch 1.* 5/5 ", next(line for line in terminal.frames[-1] if line))


@pytest.mark.parametrize("kind", BARS)
@pytest.mark.parametrize(("on_error", "at_start"), [("warn", True), ("raise", True), ("raise", False)])
def test_gone_after_a_failure(kind: str, on_error: str, at_start: bool, tmp_path: Path, terminal: Terminal) -> None:
    observer, spy = scripted(terminal, steps=3, fails=True, on_error=on_error, at_start=at_start)
    own_stdout = sys.stdout
    with pytest.raises(OSError, match="no luck") if on_error == "raise" else pytest.warns(RuntimeWarning):
        train(tmp_path, terminal, observer, BARS[kind](terminal), spy)
    assert f"1/{TOTAL}" in counts_in(terminal.showing("Lanczos"))
    assert not any("Lanczos" in line for frame in [*spy.afterwards, terminal.frames[-1]] for line in frame)
    assert sys.stdout is own_stdout  # a live display redirects it while it runs


@pytest.mark.parametrize(
    ("kind", "arguments", "steps", "shown"),
    [
        ("tqdm", {}, 5, [1, 2, 3, 4, 5]),
        ("rich", {}, 5, [1, 2, 3, 4, 5]),
        ("tqdm", {"refresh_rate": 3}, TOTAL, [1, 3, 6, 8]),
    ],
)
def test_every_step_moves_it_and_ending_early_removes_it(
    kind: str, arguments: dict[str, Any], steps: int, shown: list[int], tmp_path: Path, terminal: Terminal
) -> None:
    observer, spy = scripted(terminal, steps=steps)
    train(tmp_path, terminal, BARS[kind](terminal, **arguments), observer, spy, max_epochs=1)
    assert counts_in(terminal.showing("Lanczos")) == [f"{step}/{TOTAL}" for step in shown]
    assert_gone(spy)


@pytest.mark.parametrize("kind", BARS)
def test_a_total_that_shrinks_and_a_count_that_starts_again(kind: str, tmp_path: Path, terminal: Terminal) -> None:
    """An analysis may have several parts, and know only on the way how many steps there can be."""
    bar = BARS[kind](terminal)
    trainer = make_trainer(tmp_path, bar, enable_progress_bar=True)
    with contextlib.redirect_stdout(terminal), progress.analysis_bar(trainer, "x", shown=True) as report:
        assert report is not None
        for done, total in ((1, 100), (2, 4), (4, 4), (1, 4)):
            report(done, total)
    assert counts_in(terminal.showing("x: Lanczos")) == ["1/100", "2/4", "4/4", "1/4"]
    if isinstance(bar, RichProgressBar):
        bar.teardown(trainer, Validated(), "fit")


def test_a_name_is_no_markup(tmp_path: Path, terminal: Terminal) -> None:
    observer, _ = scripted(terminal, name="[red]h[bold]")
    train(tmp_path, terminal, rich_bar(terminal), observer, max_epochs=1)
    assert terminal.showing("[red]h[bold]: Lanczos steps")


@pytest.mark.parametrize("kind", BARS)
def test_real_analyses_report_their_steps_and_training_is_as_without(
    kind: str, tmp_path: Path, terminal: Terminal
) -> None:
    def outcome(*callbacks: pl.Callback, **arguments: Any) -> Any:
        with contextlib.redirect_stdout(terminal):
            trainer = fit(tmp_path, *callbacks, **arguments)
        return freeze(dict(trainer.lightning_module.state_dict())), global_generators()

    with_bar = outcome(BARS[kind](terminal), callback(at_start=True, steps=4), enable_progress_bar=True)
    assert "1/4" in counts_in(terminal.showing("hesd: Lanczos steps"))
    assert with_bar == outcome()


class OwnBar(ProgressBar):
    """A kind of bar that the package does not know."""

    def disable(self) -> None:
        pass


NO_BARS: dict[str, tuple[Callable[[Terminal], ProgressBar] | None, dict[str, Any], dict[str, Any]]] = {
    "turned off": (None, {"enable_progress_bar": False}, {}),
    "barebones": (None, {"barebones": True}, {}),
    "unknown kind": (lambda _: OwnBar(), {}, {}),
    "tqdm disabled": (lambda terminal: tqdm_bar(terminal, refresh_rate=0), {}, {}),
    "rich disabled": (lambda terminal: rich_bar(terminal, refresh_rate=0), {}, {}),
    "not wanted": (tqdm_bar, {}, {"progress": False}),
}


@pytest.mark.parametrize("name", NO_BARS)
def test_without_a_bar_analyses_report_nothing(name: str, tmp_path: Path, terminal: Terminal) -> None:
    make_bar, arguments, options = NO_BARS[name]
    observer, spy = scripted(terminal, at_start=True, **options)
    train(tmp_path, terminal, *([make_bar(terminal)] if make_bar else []), observer, spy, **arguments)
    assert spy.reports == [None, None, None]
    assert not terminal.showing("Lanczos")


def test_rank_zero_only(tmp_path: Path) -> None:
    for is_zero in (True, False):
        trainer: Any = SimpleNamespace(is_global_zero=is_zero, progress_bar_callback=TQDMProgressBar())
        with progress.analysis_bar(trainer, "hesd", shown=True) as report:
            assert (report is not None) is is_zero


@pytest.mark.parametrize("kind", BARS)
def test_short_analyses_do_not_flicker(
    kind: str, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DELAY", 1.0)
    bar = BARS[kind](terminal)
    trainer = make_trainer(tmp_path, bar, enable_progress_bar=True)
    times = iter([50.0, 50.9, 51.0])
    analysis_bar = progress.analysis_bar(trainer, "hesd", shown=True, clock=lambda: next(times))
    with contextlib.redirect_stdout(terminal), analysis_bar as report:
        assert report is not None
        report(1, TOTAL)
        assert terminal.frames == []
        report(2, TOTAL)
        assert counts_in(terminal.showing("Lanczos")) == [f"2/{TOTAL}"]
    if isinstance(bar, RichProgressBar):
        bar.teardown(trainer, Validated(), "fit")


@pytest.mark.parametrize("methods", [["__init__"], ["show"], ["close"], ["show", "close"]])
def test_a_bar_that_cannot_be_drawn_costs_one_warning_and_is_given_up(
    methods: list[str], tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where failures of analyses are raised."""
    calls = []

    def fail(method: str, *_args: Any) -> None:
        calls.append(method)
        msg = "the screen is gone"
        raise OSError(msg)

    for method in methods:
        monkeypatch.setattr(progress._TqdmBar, method, partial(fail, method))
    observer, _ = scripted(terminal, on_error="raise")
    with pytest.warns(RuntimeWarning, match="cannot draw the progress .* which goes on.*the screen is gone") as caught:
        trainer = train(tmp_path, terminal, tqdm_bar(terminal), observer, max_epochs=1)
    assert len([warning for warning in caught if "cannot draw" in str(warning.message)]) == 1
    assert calls == methods
    assert trainer.state.finished
    assert [record.error for record in observer.history] == [None]
    assert "close" in methods or not any("Lanczos" in line for line in terminal.frames[-1])
