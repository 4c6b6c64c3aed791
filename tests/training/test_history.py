"""The history on disk."""

import json
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch

from lightning_hesd import Spectrum, SpectrumHistory
from lightning_hesd.spectra.codec import load_layers
from lightning_hesd.training.history import SpectrumRecord
from tests.training.broken import raising
from tests.training.scripted import example, make_spectrum


def test_save_and_load(tmp_path: Path) -> None:
    history = example()
    history.save(tmp_path / "another")
    history.save(tmp_path / "run" / "hesd")
    for folder in (tmp_path / "run", tmp_path / "run" / "hesd"):
        loaded = SpectrumHistory.load(folder)
        assert [(r.epoch, r.global_step) for r in loaded] == [(-1, 0), (0, 10), (1, 20)]
        assert [r.error for r in loaded] == [None, "RuntimeError: no luck", None]
        assert loaded[1].spectrum is None
        np.testing.assert_array_equal(loaded[2].spectrum.nodes, make_spectrum(-0.2).nodes)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_leaves_no_partial_file_and_the_next_try_succeeds(tmp_path: Path) -> None:
    history = example()
    (tmp_path / "epoch=1-step=20.npz.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        history.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"epoch=-1-step=0.npz"}
    history.save(tmp_path)
    assert len(SpectrumHistory.load(tmp_path)) == 3


def run_of(*c_ts: float, first: int = 0) -> SpectrumHistory:
    history = SpectrumHistory()
    history.extend(
        SpectrumRecord(epoch, 10 * epoch + 10, make_spectrum(c_t), layers={"a": make_spectrum(c_t / 2)})
        for epoch, c_t in enumerate(c_ts, start=first)
    )
    return history


def on_disk(folder: Path) -> dict[str, float]:
    """C_t by file, of spectra and of layers, and that the index names them all and no partial file remains."""
    assert not list(folder.glob("*.partial"))
    files = {path.name for path in folder.glob("epoch=*.npz")}
    rows = json.loads((folder / "index.json").read_text())["records"]
    assert {row[field] for row in rows for field in ("spectrum", "layers")} == files
    layers = {name for name in files if name.endswith("_layers.npz")}
    return {name: Spectrum.load(folder / name).c_t for name in files - layers} | {
        name: load_layers(folder / name)["a"].c_t for name in layers
    }


def expected(history: SpectrumHistory) -> dict[str, float]:
    return {record.file_name(): record.spectrum.c_t for record in history if record.spectrum} | {
        record.file_name("_layers"): record.layers["a"].c_t for record in history if record.layers
    }


@pytest.mark.parametrize("earlier", [(-0.9,), (-0.9, -0.8, -0.7), (-0.1, -0.8), ()])
def test_what_is_on_disk_is_what_the_last_run_holds(tmp_path: Path, earlier: tuple[float, ...]) -> None:
    run_of(*earlier).save(tmp_path)
    (tmp_path / "epoch=9-step=9.npz.bak").write_text("of the user")
    (tmp_path / "notes.npz").write_text("of the user")
    history = SpectrumHistory()
    for record in run_of(-0.1, -0.2):
        history.append(record)
        history.save(tmp_path)
        assert on_disk(tmp_path) == expected(history)
    assert (tmp_path / "notes.npz").read_text() == "of the user"


def test_one_history_serves_several_runs_in_one_folder(tmp_path: Path) -> None:
    history = run_of(-0.9, -0.8, -0.7)
    history.save(tmp_path)
    for start in (0, 1):  # from the beginning, and from after the first epoch
        history[start:] = run_of(*[-0.1 - 0.1 * start] * 2, first=start)
        history.save(tmp_path)
        assert on_disk(tmp_path) == expected(history)


def test_files_that_are_the_same_are_left_alone(tmp_path: Path) -> None:
    run_of(-0.1, -0.2, -0.3).save(tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}
    history = run_of(-0.1, -0.2, -0.4)
    assert not history.is_in(tmp_path)
    history.save(tmp_path)
    assert history.is_in(tmp_path)
    changed = {path.name for path in tmp_path.glob("*.npz") if path.stat().st_mtime_ns != times[path.name]}
    assert changed == {"epoch=2-step=30.npz", "epoch=2-step=30_layers.npz"}


@pytest.mark.parametrize("damage", ["spectrum", "index", "missing", "foreign"])
def test_a_damaged_folder_becomes_whole(tmp_path: Path, damage: str) -> None:
    run_of(-0.1, -0.8).save(tmp_path)
    if damage == "spectrum":
        (tmp_path / "epoch=0-step=10.npz").write_text("half")
        (tmp_path / "epoch=1-step=20_layers.npz").write_text("half")
    elif damage == "missing":
        (tmp_path / "epoch=0-step=10.npz").unlink()
    else:
        (tmp_path / "index.json").write_text("{" if damage == "index" else '{"format": 99, "records": []}')
    history = run_of(-0.1, -0.2)
    history.save(tmp_path)
    assert on_disk(tmp_path) == expected(history)


def test_an_index_cannot_have_others_deleted(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for victim in (victims := [tmp_path / "outside.npz", tmp_path / "run" / "notes.npz"]):
        victim.write_text("of the user")
    row = {"epoch": 0, "global_step": 10, "error": None, "layers": "notes.npz", "spectrum": "../outside.npz"}
    (tmp_path / "run" / "index.json").write_text(json.dumps({"format": 1, "records": [row]}))
    run_of(-0.1).save(tmp_path / "run")
    assert all(victim.read_text() == "of the user" for victim in victims)


def test_an_index_never_names_what_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed while it replaces the files of another leaves none of a mixture to be read."""
    run_of(-0.9, -0.8).save(tmp_path)
    monkeypatch.setattr("lightning_hesd.training.history_folder.write_text", raising(KeyboardInterrupt()))
    history = run_of(-0.1, -0.2)
    with pytest.raises(KeyboardInterrupt):
        history.save(tmp_path)
    with pytest.raises(FileNotFoundError):
        SpectrumHistory.load(tmp_path)
    monkeypatch.undo()
    history.save(tmp_path)
    assert on_disk(tmp_path) == expected(history)


def test_more_records_are_no_more_parts_of_a_checkpoint(tmp_path: Path) -> None:
    history = example()
    parts = []
    for path in (tmp_path / "a.ckpt", tmp_path / "b.ckpt"):
        torch.save(history.state_dict(), path)
        with ZipFile(path) as archive:
            parts.append(len(archive.namelist()))
        history.extend(example())
    assert parts[0] == parts[1]


def test_rewind() -> None:
    history = example()
    for step, epochs in ((25, [-1, 0, 1]), (10, [-1, 0]), (0, [])):
        history.rewind(step)
        assert [r.epoch for r in history] == epochs


DAMAGED = "is not the index of a spectrum history, or is damaged"
NAMELESS = '{"format": 1, "records": [{"epoch": 0, "global_step": 1, "error": null, "spectrum": ""}]}'
NEWER = '{"format": 99, "records": []}'


def test_no_index_or_a_damaged_or_a_newer_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="pass the log directory of a run"):
        SpectrumHistory.load(tmp_path)
    for text, message in (("", DAMAGED), ('{"format": 1}', DAMAGED), (NAMELESS, DAMAGED), (NEWER, "has version 99")):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            SpectrumHistory.load(tmp_path)
