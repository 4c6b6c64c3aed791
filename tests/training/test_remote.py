"""Runs whose folders lie on another filesystem: `memory://` stands for those of fsspec."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback, SpectrumHistory
from lightning_hesd.commands.report import run_data
from lightning_hesd.training import folders
from lightning_hesd.training.checkpoints.exclusive_checkpoint import is_same_file, lies_in, place
from tests.training.modules import own_warnings
from tests.training.scripted import Epoch, ScriptedModule, ScriptedSource, example, keeping, loader, make_trainer

SCRIPT = [Epoch(-0.1, loss=loss) for loss in (0.4, 0.3, 0.2, 0.1)]
REMOTE = "memory://bucket/run"

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]


@pytest.fixture(autouse=True)
def nothing_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """An empty filesystem, and no file in the working directory afterwards."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()
    assert not list((tmp_path / "cwd").iterdir())


def c_t(history: SpectrumHistory) -> list[float | None]:
    return [record.spectrum and record.spectrum.c_t for record in history]


def test_a_run_on_another_filesystem(tmp_path: Path, nothing_local: Any) -> None:
    checkpoint = keeping(save_last=True)
    options: dict[str, Any] = {"num_samples": 2, "on_error": "raise", "checkpoint": checkpoint}
    observer = HessianSpectrumCallback(loss_fn=lambda m, _: (m.weight - 9) ** 2, **options)
    logger = CSVLogger(REMOTE)
    for _ in range(2):  # the second run overwrites what the first has left
        trainer = make_trainer(REMOTE, [observer], 2, logger=logger)
        trainer.fit(ScriptedModule(SCRIPT), loader())
        assert trainer.log_dir is not None
        assert c_t(SpectrumHistory.load(trainer.log_dir)) == c_t(observer.history)
        files = sorted(path.rpartition("/")[2] for path in nothing_local.ls(f"{trainer.log_dir}/hesd", detail=False))
        assert files == ["epoch=0-step=2.npz", "epoch=1-step=4.npz", "index.json", "selections.jsonl"]
        assert len(folders.read_text(f"{trainer.log_dir}/hesd", "selections.jsonl").splitlines()) == 2
        table = folders.read_text(trainer.log_dir, "hesd_density.csv").splitlines()
        assert {row["epoch"]: row["step"] for row in csv.DictReader(table)} == {"0": "1", "1": "3"}
        assert [rule["rule"] for rule in run_data(trainer.log_dir)["rules"] if rule["used"]] == ["earliest"]
        assert checkpoint.best_model_path.startswith(REMOTE)
        assert folders.exists(checkpoint.best_model_path)


def fitted(
    where: str, epochs: int, ckpt_path: str | None = None, **arguments: Any
) -> tuple[HessianCheckpoint, list[str]]:
    checkpoint = keeping(**{"save_last": True, "dirpath": where, **arguments})
    trainer = make_trainer("memory://root", [ScriptedSource(SCRIPT), checkpoint], epochs)
    with own_warnings() as said:
        trainer.fit(ScriptedModule(SCRIPT), loader(), ckpt_path=ckpt_path)
    return checkpoint, said


def test_candidates_are_kept_across_filesystems(tmp_path: Path) -> None:
    """From this machine to another filesystem, and back."""
    path = None
    for epochs, where in enumerate([str(tmp_path / "a"), "memory://b", "memory://c", str(tmp_path / "d")], start=1):
        checkpoint, said = fitted(where, epochs, path)
        assert not said
        assert [c.epoch for c in checkpoint.candidates] == list(range(epochs))
        assert all(folders.exists(c.path) for c in checkpoint.candidates)
        assert checkpoint.best_model_path.startswith(str(tmp_path / "a"))
        path = checkpoint.last_model_path


def test_what_cannot_be_reached_is_dropped_with_a_warning(nothing_local: Any) -> None:
    checkpoint, _ = fitted("memory://gone", 2)
    last = checkpoint.last_model_path
    nothing_local.mv(last, "memory://kept/last.ckpt")
    nothing_local.rm("memory://gone", recursive=True)
    resumed, [text] = fitted("memory://new", 3, "memory://kept/last.ckpt")
    assert [c.epoch for c in resumed.candidates] == [2]
    assert "cannot be reached" in text
    assert checkpoint.candidates[0].path in text


def test_a_link_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="only supported for local file paths"):
        fitted("memory://x", 1, save_last="link")


def test_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    """A pipe would wait for another process, and /dev/full never ends."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "full").symlink_to("/dev/full")
    for name in ("pipe", "full"):
        for use in (folders.read_text, lambda *where: folders.append(*where, "text")):
            with pytest.raises(ValueError, match="no regular file"):
                use(tmp_path, name)


@pytest.mark.parametrize("where", ["memory://store/a", "local", "file://local"])
def test_folders(where: str, tmp_path: Path) -> None:
    folder = where.replace("local", str(tmp_path / "a"))
    assert folders.is_remote(folder) == where.startswith("memory")
    assert folders.read_text(folder, "x.txt") == ""
    with folders.fetched(folder) as copy:
        assert not (copy / "x.txt").exists()
    for line in ("one\n", "two\n"):
        folders.append(folder, "x.txt", line)
    assert folders.read_text(folder, "x.txt") == "one\ntwo\n"
    example().save(folder)
    with folders.fetched(folder) as copy:
        files = {path.name for path in copy.iterdir()}
    assert files == {"x.txt", "index.json", "epoch=-1-step=0.npz", "epoch=1-step=20.npz"}
    assert len(SpectrumHistory.load(folder)) == 3
    folders.remove(folder, ["x.txt", "never there"])
    assert not folders.exists(folders.joined(folder, "x.txt"))
    assert folders.exists(folders.joined(folder, "index.json"))
    assert not folders.exists("nosuchprotocol://a/b")


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file.ckpt")
    (tmp_path / "file.ckpt").touch()
    assert place(f"{tmp_path}/x/../file.ckpt") == str(tmp_path / "file.ckpt")
    assert place(tmp_path / "link") != place(tmp_path / "file.ckpt")
    assert is_same_file(tmp_path / "link", tmp_path / "file.ckpt")
    assert is_same_file("memory://a/b", "memory://a/b")
    assert not is_same_file("memory://a/b", tmp_path)
    here = str(tmp_path)
    assert lies_in("memory://a/b.ckpt", "memory://a/", ".ckpt")
    assert lies_in(f"{here}/b.ckpt", here, ".ckpt")
    for path in ("memory://a/../b.ckpt", "memory://ab/b.ckpt", f"{here}/b.ckpt"):
        assert not lies_in(path, "memory://a", ".ckpt")
    for path in ("memory://a/b.ckpt", f"{here}/b.txt"):
        assert not lies_in(path, here, ".ckpt")
