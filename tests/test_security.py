"""Attacks with a name: what a file, a checkpoint or a run of a stranger could try. Damage by chance: test_fuzz.py."""

import json
import os
import time
import tracemalloc
import zipfile
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback, Spectrum, SpectrumHistory
from lightning_hesd.commands import cli
from lightning_hesd.commands.report import write_report
from lightning_hesd.commands.results import summary_of
from lightning_hesd.spectra.payload import SELECTIONS_NAME, record_payload, selection_payload, to_json
from lightning_hesd.spectra.record import SpectrumRecord
from lightning_hesd.spectra.selection import Candidate, CandidateFilter, SelectionEvent
from tests.states import history_of
from tests.tab import Tab, data_of_report, write_payloads
from tests.training import scripted
from tests.training.scripted import Epoch, make_spectrum

MEBIBYTE = 2**20


class Marker:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


# Code -----------------------------------------------------------------------------------------------------------------


def test_a_pickle_in_an_archive_is_not_run(tmp_path: Path) -> None:
    values = {"header": np.array([Marker(tmp_path / "run")], dtype=object), "nodes": np.zeros((1, 1))}
    np.savez(tmp_path / "evil.npz", **values)
    with pytest.raises(ValueError, match="`header` has dtype object"):
        Spectrum.load(tmp_path / "evil.npz")
    assert not (tmp_path / "run").exists()
    np.load(tmp_path / "evil.npz", allow_pickle=True)["header"]
    assert (tmp_path / "run").exists()


def test_a_pickle_in_a_checkpoint_is_run_on_request_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}, "evil": Marker(tmp_path / "run")}, tmp_path / "evil.ckpt")
    project = ["--model=tests.training.cli_project.Net", "--data=tests.training.cli_project.Data"]
    arguments = ["analyze", str(tmp_path / "evil.ckpt"), *project, "--out", str(tmp_path / "out")]
    for unsafe in (False, True):
        with pytest.raises(SystemExit):
            cli.main([*arguments, *(["--unsafe=true"] if unsafe else [])])
        assert (tmp_path / "run").exists() == unsafe
        assert ("--unsafe loads those" in capsys.readouterr().err) != unsafe


# Memory and time ------------------------------------------------------------------------------------------------------


def member(shape: tuple[int, ...], data: bytes = b"", dtype: str = "<f8") -> bytes:
    """An array of an archive that claims a shape, whatever data follow."""
    file = BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def archive(path: Path, compression: int = zipfile.ZIP_STORED, **changed: bytes) -> Path:
    """A spectrum's file with some of its arrays exchanged."""
    make_spectrum(-0.2).save(path)
    with zipfile.ZipFile(path) as file:
        contents = {name: file.read(name) for name in file.namelist()}
    contents |= {f"{name}.npy": data for name, data in changed.items()}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in contents.items():
            file.writestr(name, data)
    return path


ZEROS = bytes(64 * MEBIBYTE)


@pytest.mark.parametrize(
    ("compression", "nodes", "message"),
    [
        (zipfile.ZIP_DEFLATED, member((1, len(ZEROS) // 8), ZEROS), "its arrays are compressed, which ours never are"),
        (zipfile.ZIP_STORED, member((10**9, 10**6)), "cannot reshape array of size 0"),
        (zipfile.ZIP_STORED, member((2**40, 0)), "`nodes` must have shape"),
        (zipfile.ZIP_STORED, member((1, 2), dtype="|O"), "`nodes` has dtype object"),
        (zipfile.ZIP_STORED, b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, "Header info length"),
        (zipfile.ZIP_STORED, b"\x93NUMPY\x03\x00\xff\xff", "another version of NumPy's format"),
    ],
    ids=["compressed", "claims-petabytes", "empty-but-large", "objects", "nested-header", "version"],
)
def test_an_archive_takes_no_more_memory_than_its_size(
    tmp_path: Path, compression: int, nodes: bytes, message: str
) -> None:
    path = archive(tmp_path / "evil.npz", compression, nodes=nodes)
    assert path.stat().st_size < MEBIBYTE
    started = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            Spectrum.load(path)
        assert tracemalloc.get_traced_memory()[1] < 2 * MEBIBYTE
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < 2


def test_overlapping_members_do_not_multiply(tmp_path: Path) -> None:
    """Many entries of an archive's index may be one and the same data."""
    path = archive(tmp_path / "evil.npz")
    with zipfile.ZipFile(path, "a") as file:
        (nodes,) = (m for m in file.infolist() if m.filename == "nodes.npy")
        file.filelist += [nodes] * 50
        file._didModify = True
    with pytest.raises(ValueError, match="which ours never are"):
        Spectrum.load(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.timeout(20)
def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "epoch=0-step=4.npz")
    with pytest.raises(ValueError, match="it is no regular file"):
        Spectrum.load(tmp_path / "epoch=0-step=4.npz")


# Paths ----------------------------------------------------------------------------------------------------------------


def test_a_callback_writes_to_a_folder_of_its_own_and_reads_names_in_an_index_there_only(tmp_path: Path) -> None:
    for name in ("..", "."):
        with pytest.raises(ValueError, match="`name` must be a non-empty text without '/'"):
            HessianSpectrumCallback(name=name)
    make_spectrum(-0.9).save(tmp_path / "secret.npz")
    history_of(SpectrumRecord(0, 4, make_spectrum(-0.1))).save(tmp_path / "hesd")
    index = tmp_path / "hesd" / "index.json"
    text = index.read_text()
    for name in ("../secret.npz", str(tmp_path / "secret.npz"), "..", ".", "../hesd/../secret.npz"):
        index.write_text(text.replace('"epoch=0-step=4.npz"', json.dumps(name)))
        with pytest.raises((FileNotFoundError, ValueError), match=str(tmp_path / "hesd")):
            SpectrumHistory.load(tmp_path)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_checkpoint_cannot_have_other_files_deleted(tmp_path: Path) -> None:
    folder, outside = tmp_path / "checkpoints", tmp_path / "outside"
    outside.mkdir()
    targets = [outside / "weights.ckpt", folder / "notes.txt", outside / "folder.ckpt" / "file"]
    script = [Epoch(-0.3), Epoch(-0.2)]

    def callbacks() -> list[Any]:
        return [scripted.ScriptedSource(script), HessianCheckpoint(dirpath=folder, save_last=True)]

    scripted.run_script(tmp_path, script[:1], callbacks())
    state = torch.load(folder / "last.ckpt", weights_only=True)
    (key,) = (key for key in state["callbacks"] if "HessianCheckpoint" in key)
    ours = state["callbacks"][key]
    (candidate,) = ours["candidates"]
    paths = [f"{folder}/../outside/weights.ckpt", str(targets[1]), f"{folder}/../outside/folder.ckpt"]
    # All are worse than what comes, so all would be deleted.
    ours["candidates"] += [{**candidate, "path": path, "criterion": -0.5} for path in paths]
    ours["last_model_path"] = paths[0]
    torch.save(state, tmp_path / "evil.ckpt")
    for target in targets:
        target.parent.mkdir(exist_ok=True)
        target.write_text("precious")
    trainer = scripted.make_trainer(tmp_path, callbacks(), len(script))
    trainer.fit(scripted.ScriptedModule(script), scripted.loader(), ckpt_path=tmp_path / "evil.ckpt")
    assert [c.epoch for c in trainer.checkpoint_callback.candidates] == [1]
    assert not Path(candidate["path"]).exists()  # ours, and beaten
    assert [target.read_text() for target in targets] == ["precious"] * 3


# Pages ----------------------------------------------------------------------------------------------------------------

EVIL = "</script></title><img src=x onerror=alert(1)><script>alert(2)</script>"


class Elements(HTMLParser):
    """The elements of a page, and their attributes that run something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [tag, *(name for name, _ in attrs if name.startswith("on") or name in {"src", "href"})]


def test_the_report_has_no_element_that_data_made_and_replaces_what_cannot_be_written(tmp_path: Path) -> None:
    def written(said: str) -> list[str]:
        folder = tmp_path / said.replace("/", "\N{DIVISION SLASH}")
        layers = {said: make_spectrum(-0.2)}
        records = SpectrumRecord(0, 4, None, error=said), SpectrumRecord(1, 8, make_spectrum(-0.1), layers=layers)
        history_of(*records).save(folder / "hesd")
        candidate = Candidate(1, 8, -0.5, -0.1, mainly_positive=True, path=said)
        selection = SelectionEvent(said, said, "min", CandidateFilter(0.05, require_mp=True), candidate, candidate)
        (folder / "hesd" / SELECTIONS_NAME).write_text(f"{to_json(selection_payload(selection))}\n{said}\n")
        write_report(folder, tmp_path / "report.html")
        document = (tmp_path / "report.html").read_text()
        assert data_of_report(document).count(said) >= 5  # it is there, but not as markup
        assert '<meta http-equiv="Content-Security-Policy"' in document
        page = Elements()
        page.feed(document)
        return page.found

    assert written(EVIL) == written("harmless")
    # Folders may have names that are no text in any encoding.
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff"))
    history_of(SpectrumRecord(0, 4, make_spectrum(-0.1))).save(folder / "hesd")
    write_report(folder, tmp_path / "report.html")
    assert "<title>HESD: run-?</title>" in (tmp_path / "report.html").read_text()


def test_a_hostile_payload_costs_itself_only(tmp_path: Path) -> None:
    good = record_payload(SpectrumRecord(0, 1, make_spectrum(-0.1)))
    text = to_json(good)
    nested = "[" * 5000 + "]" * 5000
    evil = [
        "[" * 100_000,
        text.replace('"error":null', f'"error":null,"more":{nested}'),
        text.replace('"error":null', '"error":"\\ud800"'),
        text.replace('"epoch":0', f'"epoch":{"9" * 5000}'),
        text.replace('"epoch":0', '"epoch":"<img src=x onerror=alert(1)>"'),
        text.replace('"loss":0.5', '"loss":1e999'),
        text.replace('"loss":0.5', '"loss":NaN'),
        text.replace('"layers":{"name":[]}', '"layers":{"name":[null]}'),
    ]
    assert all(one != text for one in evil)
    name = EVIL.replace("/", "|")
    write_payloads(tmp_path / name, [*evil, {**good, "global_step": 2}])
    tab = Tab(tmp_path)
    code, listed = tab.get("runs")
    assert (code, [run["run"] for run in listed["runs"]]) == (200, [name])
    code, found = tab.get("records", run=name, name="hesd")
    assert code == 200
    assert [record["global_step"] for record in found["records"]] == [2]
    assert len(found["problems"]) == len(evil)
    answer = tab.client.get("/data/plugin/hesd/runs")
    assert answer.mimetype == "application/json"  # not a page, whatever is in it
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_names_are_no_markup_of_the_terminal() -> None:
    shown = summary_of({"[/b][link=x]y": SpectrumRecord(1, 10, make_spectrum(-0.1))}, None)
    assert "[/b][link=x]y" in str(shown)
