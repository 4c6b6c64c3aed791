"""The history on disk."""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch

from lightning_hesd import SpectrumHistory
from lightning_hesd.training.history import SpectrumRecord
from tests.lightning.scripted import make_spectrum


def example() -> SpectrumHistory:
    history = SpectrumHistory()
    history.append(SpectrumRecord(-1, 0, make_spectrum(-0.9)))
    history.append(SpectrumRecord(0, 10, None, "RuntimeError: no luck"))
    history.append(SpectrumRecord(1, 20, make_spectrum(-0.2)))
    return history


def test_save_and_load(tmp_path: Path) -> None:
    example().save(tmp_path / "run" / "hesd")
    for folder in (tmp_path / "run", tmp_path / "run" / "hesd"):
        loaded = SpectrumHistory.load(folder)
        assert [(r.epoch, r.global_step, r.error) for r in loaded] == [
            (-1, 0, None),
            (0, 10, "RuntimeError: no luck"),
            (1, 20, None),
        ]
        assert loaded[1].spectrum is None
        np.testing.assert_array_equal(loaded[2].spectrum.nodes, make_spectrum(-0.2).nodes)
        assert loaded[2].spectrum.c_t == -0.2


def test_files_are_written_once_and_no_partial_ones_remain(tmp_path: Path) -> None:
    history = example()
    history.save(tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}
    history.append(SpectrumRecord(2, 30, make_spectrum(-0.1)))
    history.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"index.json", "epoch=-1-step=0.npz", "epoch=1-step=20.npz", "epoch=2-step=30.npz"}
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in times.items())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_leaves_no_partial_file_and_the_next_try_succeeds(tmp_path: Path) -> None:
    history = example()
    (tmp_path / "epoch=1-step=20.npz.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        history.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"epoch=-1-step=0.npz"}
    history.save(tmp_path)
    assert len(SpectrumHistory.load(tmp_path)) == 3


def test_another_folder_gets_everything(tmp_path: Path) -> None:
    history = example()
    history.save(tmp_path / "a")
    history.save(tmp_path / "b")
    assert len(SpectrumHistory.load(tmp_path / "b")) == 3


def test_state_dict_round_trip() -> None:
    history = SpectrumHistory()
    history.load_state_dict(example().state_dict())
    assert [r.error for r in history] == [None, "RuntimeError: no luck", None]
    assert history[2].spectrum.c_t == -0.2
    assert history[2].spectrum.steps_per_probe == (2,)


def test_more_records_are_no_more_parts_of_a_checkpoint(tmp_path: Path) -> None:
    history = example()
    parts = []
    for path in (tmp_path / "a.ckpt", tmp_path / "b.ckpt"):
        torch.save(history.state_dict(), path)
        with ZipFile(path) as archive:
            parts.append(len(archive.namelist()))
        history.extend(example())
    assert parts[0] == parts[1]


def test_an_empty_history_has_a_state() -> None:
    history = example()
    history.load_state_dict(SpectrumHistory().state_dict())
    assert history == []


@pytest.mark.parametrize(("step", "epochs"), [(0, []), (10, [-1, 0]), (25, [-1, 0, 1])])
def test_rewind(step: int, epochs: list[int]) -> None:
    history = example()
    history.rewind(step)
    assert [r.epoch for r in history] == epochs


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="pass the log directory of a run"):
        SpectrumHistory.load(tmp_path)


NAMELESS = '{"format": 1, "records": [{"epoch": 0, "global_step": 1, "error": null, "spectrum": ""}]}'


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"format": 1, "records": [{}]}', NAMELESS])
def test_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match="is not the index of a spectrum history, or is damaged"):
        SpectrumHistory.load(tmp_path)


def test_newer_index(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"format": 99, "records": []}))
    with pytest.raises(ValueError, match="has format 99"):
        SpectrumHistory.load(tmp_path)


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    make_spectrum(-0.2).save(tmp_path / "secret.npz")
    history = SpectrumHistory()
    history.append(SpectrumRecord(0, 1, make_spectrum(-0.2)))
    history.save(tmp_path / "hesd")
    index = json.loads((tmp_path / "hesd" / "index.json").read_text())
    index["records"][0]["spectrum"] = "../secret.npz"
    (tmp_path / "hesd" / "index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError):
        SpectrumHistory.load(tmp_path)
