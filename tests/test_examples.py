"""The examples run, and say what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd-momentum"])
def test_digits(tmp_path: Path, optimizer: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "digits.py"), "--model", "resnet", "--epochs", "6", "--optimizer", optimizer],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^ *(start|\d+)  .*\[ *(-?\d\.\d+), *(-?\d\.\d+)\] +(\d+\.\d+)  (MP|MN)", done.stdout, re.MULTILINE
    )
    assert [row[0] for row in rows] == ["start", "2", "5"]
    assert all(float(low) <= float(high) <= 0 for _, low, high, *_ in rows)
    for rule in ("highest C_t", "lowest λ_max"):
        assert re.search(rf"^{rule} +picks epoch +[25], generalization accuracy 0\.\d+", done.stdout, re.MULTILINE)
    assert "tensorboard --logdir runs/digits" in done.stdout
    assert "Warning" not in done.stderr

    events = EventAccumulator(str(next((tmp_path / "runs" / "digits").rglob("events.*")).parent))
    events.Reload()
    assert {"hesd/c_t", "hesd/lambda_max", "train_acc", "gen_acc"} <= set(events.Tags()["scalars"])
    assert events.Tags()["histograms"] == ["hesd/density"]
    assert events.Tags()["images"] == ["hesd/density_figure"]
