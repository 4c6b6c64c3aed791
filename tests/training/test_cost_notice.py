"""What analyses cost is said once, with the options that reduce it; by clocks that go by the test."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_hesd import HessianSpectrumCallback
from lightning_hesd.spectra.record import SpectrumRecord
from lightning_hesd.training import cost_notice
from lightning_hesd.training.schedule import Schedule
from tests.spectra.test_shorter_run import spectrum
from tests.training.scripted import make_spectrum
from tests.training.test_schedule import Clock, fit, make_callback

WORDS = "analyses will take about"


@pytest.fixture(autouse=True)
def warned_as_usual(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cost_notice, "WARNED", 1.0)
    caplog.set_level(logging.INFO)


def informed(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if "an analysis takes" in message]


def words(found: Any = None, *, generalization: Any = None, **schedule: Any) -> str:
    """What is said of an analysis of 6 s after 2 s of training."""
    record = SpectrumRecord(0, 10, found or spectrum(None), generalization=generalization)
    return cost_notice.cost_words(record, Schedule(**schedule), 6.0, 2.0)[0]


@pytest.mark.parametrize(
    ("arguments", "overhead"),
    [
        # Epochs of 20 s, of two steps, and analyses of 5 s.
        ({}, "0.25×"),
        ({"every_n_epochs": 2}, "0.12×"),
        ({"every_n_train_steps": 1}, "0.5×"),
        ({"epochs": [1, 2, 7]}, "0.12×"),  # two of four epochs, which take 80 s
        ({"at_start": True}, "0.25×"),
        ({"max_overhead": 0.5}, "0.25×"),
    ],
)
def test_a_line_says_it_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, arguments: dict[str, Any], overhead: str
) -> None:
    fit(tmp_path, make_callback(Clock(), 5, **arguments), epochs=4)
    [said] = informed(caplog)
    assert said.startswith("hesd: an analysis takes 5 s, and the training between two of them ")
    assert f"{WORDS} {overhead} the training time." in said


def test_more_than_twice_the_training_time_is_a_warning_instead(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.warns(RuntimeWarning, match=f"lightning_hesd: hesd: an analysis takes 48 s.*{WORDS} 2.4×") as warned:
        fit(tmp_path, make_callback(Clock(), 48, progress=False), epochs=4)
    assert len([w for w in warned if WORDS in str(w.message)]) == 1
    assert informed(caplog) == []


@pytest.mark.parametrize(
    ("options", "trial", "count"),
    [({"progress": False}, False, 0), ({"progress": False, "verbose": True}, False, 1), ({}, True, 0)],
)
def test_it_is_not_said_in_a_trial_run_and_without_progress_with_verbose_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], trial: bool, count: int
) -> None:
    fit(tmp_path, make_callback(Clock(), 5, **options), epochs=2, fast_dev_run=trial)
    assert len(informed(caplog)) == count


def test_a_limit_keeps_the_warning_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path, make_callback(Clock(), 400, max_overhead=0.1), epochs=2)
    [said] = informed(caplog)
    assert said.endswith("20 s: `max_overhead=0.1` leaves out analyses beyond 0.1× the training time.")


@pytest.mark.parametrize(("stop_after", "expected"), [(1, 1), (3, 0)])
def test_a_resumed_run_says_it_if_nothing_was_analyzed_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stop_after: int, expected: int
) -> None:
    """The first analysis, after the second epoch, counts the training before the interruption."""
    first = make_callback(Clock(), 5, every_n_epochs=2)
    fit(tmp_path, first, epochs=stop_after).save_checkpoint(tmp_path / "last.ckpt")
    caplog.clear()
    fit(tmp_path, make_callback(Clock(), 5, every_n_epochs=2), epochs=6, ckpt_path=tmp_path / "last.ckpt")
    assert [f"{WORDS} 0.12×" in said for said in informed(caplog)] == [True] * expected


def test_the_options_have_numbers() -> None:
    said = words()
    assert said.startswith(
        "an analysis takes 6 s, and the training between two of them 2 s: analyses will take about 3× the training "
        "time. Less with `tolerance=0.05` (about "
    )
    products, share = re.search(r"about (\d+) products in place of 60: ([\d.]+)×", said).groups()  # type: ignore[union-attr]
    # The cost model: 2.2 gradients a product, and three more.
    assert float(share) == pytest.approx(3 * (2.2 * int(products) + 3) / (2.2 * 60 + 3), rel=0.05)
    assert said.endswith("`every_n_epochs=4` (0.75×) or `max_overhead=0.1` (at most 0.1×: it leaves out analyses).")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"every_n_train_steps": 50}, "`every_n_train_steps=200` (0.75×)"),
        ({"epochs": [0, 3]}, "fewer `epochs`"),
        ({"max_overhead": 4.0}, "or `every_n_epochs=4` (0.75×)."),
    ],
)
def test_the_options_are_those_of_the_schedule(schedule: dict[str, Any], expected: str) -> None:
    said = words(**schedule)
    assert expected in said
    assert ("max_overhead" in said) == ("max_overhead" not in schedule)


def test_options_that_do_not_help_are_not_named() -> None:
    """Few samples, a tolerance already, a second spectrum that needs fixed steps, a short run, and cheap analyses."""
    assert "num_samples=" not in words()
    plain = make_spectrum(-0.1)
    assert "`num_samples=128` (0.75×)" in words(replace(plain, num_samples=512))
    assert "tolerance" not in words(spectrum(0.3))
    assert "tolerance" not in words(generalization=plain)
    for length, named in ((11, False), (12, True), (-1, True), (None, True)):
        said = cost_notice.cost_words(SpectrumRecord(2, 30, plain), Schedule(every_n_epochs=3), 6.0, 2.0, length)[0]
        assert ("`every_n_epochs=12`" in said) is named
    cheap, overhead = cost_notice.cost_words(SpectrumRecord(0, 10, plain), Schedule(), 0.5, 10.0)
    assert (cheap.endswith(f"{WORDS} 0.05× the training time."), overhead) == (True, 0.05)


def test_epochs_beyond_the_end_of_training_do_not_count() -> None:
    schedule = Schedule(epochs=[0, 5, 50])
    assert schedule.training_per_analysis(10) == 5
    assert schedule.training_per_analysis(-1) == schedule.training_per_analysis(None) == 17
    assert Schedule(every_n_epochs=3).training_per_analysis(10) == 3
    assert isinstance(HessianSpectrumCallback(epochs=[]).schedule.training_per_analysis(None), float)
