"""What strangers may have written: only our own errors come out, never another exception, and never a hang.

Files, states and payloads are made by the package, then damaged: bytes flipped, cut and inserted, values replaced by
others. The examples are the same in every run; `HESD_FUZZ=100 pytest tests/test_fuzz.py` tries 100 times as many,
others each time.
"""

import copy
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback, Spectrum, SpectrumHistory
from lightning_hesd.commands import cli
from lightning_hesd.commands.errors import CommandError
from lightning_hesd.commands.project import Blueprint, Project, load_checkpoint
from lightning_hesd.commands.report import report, run_data
from lightning_hesd.commands.results import Results
from lightning_hesd.spectra.codec import load_layers, save
from lightning_hesd.spectra.decisions import decisions, rewound
from lightning_hesd.spectra.findings import findings
from lightning_hesd.spectra.payload import SELECTIONS_NAME, record_payload, selection_payload, to_json
from lightning_hesd.spectra.payload_reading import RECORD_FIELDS, SELECTION_FIELDS, PayloadError, read_payload
from lightning_hesd.spectra.record import SpectrumRecord
from lightning_hesd.spectra.selection import Candidate, CandidateFilter, SelectionEvent
from lightning_hesd.training.schedule import Budget
from tests.states import history_of
from tests.tab import Tab, write_payloads
from tests.training.scripted import make_spectrum

TIMES = int(os.environ.get("HESD_FUZZ", "1"))

pytestmark = [
    # Of absurd numbers the arithmetic warns.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.timeout(60 + 120 * TIMES),
]


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=examples * TIMES,
        derandomize=TIMES == 1,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],  # without tracing each line, to explain failures
        deadline=timedelta(seconds=20),  # what takes longer is taken for a hang
        suppress_health_check=list(HealthCheck),  # files are written over in the same folder
        print_blob=True,
    )


# How to damage --------------------------------------------------------------------------------------------------------

NESTED: Any = 0
for _ in range(40):
    NESTED = [NESTED]

JUNK = st.one_of(
    st.sampled_from(
        [
            *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, -(10**400)),
            *(0.5, -0.0, 1e-320, 1e308, -1e308, math.nan, math.inf, -math.inf),
            *("", "x", "hessian", "\ud800", "\0", "..", "../../x", "/etc/passwd"),
            *("<img src=x onerror=alert(1)>", "%{x}"),
            *([], {}, [[]], [None], {"": None}, {"a": {"b": 1}}, ["../x"], NESTED),
        ]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """All containers in a value, each with one of its keys or positions."""
    found: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        part = pending.pop()
        keys = list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
        found += [(part, key) for key in keys]
        pending += [part[key] for key in keys]
    return found


@st.composite
def damaged(draw: Callable[..., Any], original: Any, junk: st.SearchStrategy[Any] = JUNK) -> Any:
    """The value with a few parts replaced, removed, or exchanged."""
    value = [copy.deepcopy(original)]
    for _ in range(draw(st.integers(1, 3))):
        where = places(value)
        container, key = where[draw(st.integers(0, len(where) - 1))]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "exchange"]))
        if action == "replace" or container is value:
            container[key] = copy.deepcopy(draw(junk))  # a list among it may be damaged next
        elif action == "remove":
            del container[key]
        else:
            other, place = where[draw(st.integers(0, len(where) - 1))]
            container[key] = copy.deepcopy(other[place])
    return value[0]


@st.composite
def damaged_bytes(draw: Callable[..., Any], original: bytes) -> bytes:
    """The bytes with a few of them changed, cut off or inserted; or any bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        action = draw(st.sampled_from(["flip", "set", "cut", "insert", "remove"]))
        if action == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "set":
            data[at : at + 8] = draw(st.sampled_from([b"\xff" * 8, b"\0" * 8, b"9" * 8, b"[" * 8, b"\xff\xfe\xfd\xfc"]))
        elif action == "cut":
            del data[at:]
        elif action == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=20))
        else:
            del data[at : at + draw(st.integers(1, 40))]
    return bytes(data)


def texts(original: Any) -> st.SearchStrategy[str]:
    """JSON of the damaged value; the same damaged as text; texts that are no JSON or an unusual one."""
    return st.one_of(
        damaged(original).map(json.dumps),
        damaged_bytes(json.dumps(original).encode()).map(lambda data: data.decode("utf-8", "surrogateescape")),
        st.sampled_from(["", "[" * 10**5, '{"":' * 10**5, "9" * 5000, "1e999", "NaN", '"\\ud800"', "[1,]", "\ufeff{}"]),
    )


# What is damaged ------------------------------------------------------------------------------------------------------


def spectrum(c_t: float = -0.2) -> Spectrum:
    """Two probes, one of which ended early."""
    return replace(
        make_spectrum(c_t),
        nodes=np.array([[c_t, 0.1, 1.0], [c_t / 2, 0.8, np.nan]]),
        weights=np.array([[0.2, 0.7, 0.1], [0.5, 0.5, 0.0]]),
        residuals=np.array([[0.01, 0.02, 0.01], [0.01, 0.01, 0.0]]),
        steps_per_probe=(3, 2),
    )


def records() -> list[SpectrumRecord]:
    return [
        SpectrumRecord(-1, 0, spectrum(-0.9)),
        SpectrumRecord(0, 4, None, "RuntimeError: no luck"),
        SpectrumRecord(1, 8, spectrum(), generalization=spectrum(-0.3), layers={"a": spectrum(), "b": spectrum(-0.5)}),
    ]


def selection(epoch: int = 1) -> dict[str, Any]:
    latest = Candidate(epoch, 4 * epoch, -0.5, -0.2, mainly_positive=True, path="a.ckpt")
    condition = CandidateFilter(0.05, require_mp=True)
    return selection_payload(SelectionEvent("highest_c_t", None, "min", condition, latest, latest))


def described(*found: SpectrumRecord) -> None:
    """Do what the readers of a record do with it."""
    assert all(finding.evidence for finding in findings(found, overhead=2.0))
    for record in found:
        to_json(record_payload(record))
        for one in record.spectra.values():
            assert str(one)
            assert one.trace_error >= 0 or math.isnan(one.trace_error)
            assert one.miss_probability is None or one.miss_probability >= 0


# Archives -------------------------------------------------------------------------------------------------------------


LAYERS = {"a": spectrum(), "b": spectrum(-0.5)}
KINDS = {
    "spectrum": (spectrum().save, lambda path: [Spectrum.load(path)]),
    "layers": (partial(save, LAYERS), lambda path: load_layers(path).values()),
}


def load(path: Path, kind: str) -> None:
    try:
        found = KINDS[kind][1](path)
    except ValueError as error:
        assert str(error).startswith(f"{path} ")  # noqa: PT017 - many files are still good
    else:
        described(*(SpectrumRecord(0, 1, one) for one in found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def written(folder: Path, kind: str) -> Path:
    """Return a file of this kind, written once."""
    path = folder / f"{kind}.npz"
    if not path.exists():
        KINDS[kind][0](path)
    return path


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@fuzz(60)
def test_bytes_of_archives(folder: Path, kind: str, data: st.DataObject) -> None:
    original = written(folder, kind)
    path = folder / "damaged.npz"
    path.write_bytes(data.draw(damaged_bytes(original.read_bytes())))
    load(path, kind)


ARRAYS = st.sampled_from(
    [
        *(np.zeros((0, 3)), np.zeros((2, 0)), np.zeros(3), np.zeros((2, 3)), np.float64(1.0), np.full((2, 3), np.nan)),
        *(np.full((2, 3), np.inf), np.full((2, 3), 1e308), np.full((2, 3), -1.0), np.full((2, 3), 1e-320)),
        *(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int64), np.zeros((2, 3), np.complex128)),
        *(np.array([["a", "b", "c"]] * 2), *(np.zeros((2, 3), dtype) for dtype in ("M8[s]", "V8", "f8,i4", ">f8"))),
        *(np.asfortranarray([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]), np.zeros((400, 1)) + 1.0),
    ]
)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@fuzz(40)
def test_contents_of_archives(folder: Path, kind: str, data: st.DataObject) -> None:
    original = written(folder, kind)
    with np.load(original) as archive:
        contents = {name: archive[name] for name in archive.files}
    if data.draw(st.booleans()):
        header = json.loads(str(contents["header"]))
        contents["header"] = np.array(data.draw(texts(header)).encode("utf-8", "replace").decode())
    for _ in range(data.draw(st.integers(0, 2))):
        contents[data.draw(st.sampled_from(sorted(contents)))] = data.draw(ARRAYS)
    with (folder / "changed.npz").open("wb") as file:
        data.draw(st.sampled_from([np.savez, np.savez_compressed]))(file, **contents)
    load(folder / "changed.npz", kind)


# Histories ------------------------------------------------------------------------------------------------------------


@given(data=st.data())
@fuzz(30)
def test_indices_of_histories(folder: Path, data: st.DataObject) -> None:
    place = folder / "run" / "hesd"
    good = place / "good.json"
    if not good.exists():
        history_of(*records()).save(place)
        (place / "index.json").rename(good)
    original = json.loads(good.read_text())
    text = data.draw(texts(original))
    (place / "index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    selections = data.draw(st.lists(texts(selection()), max_size=2))
    (place / SELECTIONS_NAME).write_bytes("\n".join(selections).encode("utf-8", "surrogateescape"))
    try:
        found = SpectrumHistory.load(place)
        described(*found)
        report(run_data(place))
    except (ValueError, FileNotFoundError) as error:
        assert str(place) in str(error)  # noqa: PT017 - many are still good


@given(data=st.data())
@fuzz(20)
def test_results_of_the_command_line(folder: Path, data: st.DataObject) -> None:
    place, checkpoint = folder / "results", folder / "a.ckpt"
    checkpoint.write_bytes(b"")
    if not (place / "good.json").exists():
        Results(place, {"steps": 3}).keep("a", checkpoint, records()[-1])
        (place / "results.json").rename(place / "good.json")
    original = json.loads((place / "good.json").read_text())
    (place / "results.json").write_bytes(data.draw(texts(original)).encode("utf-8", "surrogateescape"))
    try:
        Results(place, {"steps": 3}).known("a", checkpoint)
    except (CommandError, ValueError, FileNotFoundError) as error:
        assert str(place) in str(error)  # noqa: PT017


# States in checkpoints ------------------------------------------------------------------------------------------------

TENSORS = st.sampled_from(
    [
        *(torch.zeros(0), torch.zeros(2, 3), torch.zeros(2, 3).to_sparse(), torch.zeros(2, 3, requires_grad=True)),
        *(torch.zeros(2, 3, dtype=dtype) for dtype in (torch.bfloat16, torch.int8, torch.complex64)),
        *(torch.full((2, 3), math.nan, dtype=torch.float64), torch.empty(2, 3, device="meta")),
    ]
)


def state() -> dict[str, Any]:
    return {
        "history": history_of(*records()).state_dict(),
        "samples": {"training": {"indices": [0, 1, 2], "lengths": [2, 1], "positions": [0, 1], "num_samples": 3}},
        "budget": {**Budget(0.1).state_dict(), "decisions": {4: True}},
    }


def with_records(change: Callable[[list[Any]], object]) -> dict[str, Any]:
    found = state()
    records = json.loads(found["history"]["records"])
    change(records)
    return {**found, "history": {**found["history"], "records": json.dumps(records)}}


@st.composite
def states(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a state with something else somewhere: in the records, which are a text, or around them."""
    found: dict[str, Any] = draw(damaged(state(), st.one_of(JUNK, TENSORS)))
    if draw(st.booleans()):
        records = draw(texts(json.loads(state()["history"]["records"])))
        found = {**state(), "history": {**state()["history"], "records": records}}
    return found


@given(changed=st.one_of(states(), JUNK))
@fuzz(50)
@example(changed=with_records(lambda records: records[0].update(epoch="../../escaped")))
@example(changed=with_records(lambda records: records[2]["generalization"].update(seed=5)))
def test_states_of_the_callback(folder: Path, changed: Any) -> None:
    callback = HessianSpectrumCallback(num_samples=3)
    try:
        callback.load_state_dict(changed)
    except ValueError as error:
        assert "the state of HessianSpectrumCallback(name='hesd') in the checkpoint is damaged" in str(error)  # noqa: PT017
        return
    described(*callback.history)
    before = {path for path in folder.rglob("*") if "state" not in path.parts}
    callback.history.save(folder / "state")
    assert {path for path in folder.rglob("*") if "state" not in path.parts} == before


def ranking(folder: Path) -> dict[str, Any]:
    candidate = vars(Candidate(1, 8, -0.5, -0.2, mainly_positive=True, path=str(folder / "a.ckpt")))
    return {
        "candidates": [candidate],
        "best_score": -0.5,
        "first_score": -2.0,
        "ranked": [{"global_step": 8, "score": -0.5, "mainly_positive": True}],
        "offered_step": 8,
        "preferred_step": 8,
        "best_model_path": candidate["path"],
        "last_model_path": "",
        "dirpath": str(folder),
    }


def test_undamaged_states_are_valid(folder: Path) -> None:
    callback = HessianSpectrumCallback(num_samples=3)
    callback.load_state_dict(state())
    assert len(callback.history) == len(records())
    checkpoint = HessianCheckpoint(dirpath=folder)
    checkpoint.load_state_dict(ranking(folder))
    assert checkpoint.state_dict() == ranking(folder)


@given(changed=st.one_of(damaged(ranking(Path("x")), st.one_of(JUNK, TENSORS)), JUNK))
@fuzz(30)
def test_states_of_the_checkpoint_callback(folder: Path, changed: Any) -> None:
    checkpoint = HessianCheckpoint(dirpath=folder)
    try:
        checkpoint.load_state_dict(changed)
    except ValueError as error:
        assert "the state of HessianCheckpoint(rule='highest_c_t') in the checkpoint is damaged" in str(error)  # noqa: PT017


@given(data=st.data())
@fuzz(30)
def test_checkpoints_of_the_command_line(folder: Path, data: st.DataObject) -> None:
    path = folder / "good.ckpt"
    original: dict[str, Any] = {
        "state_dict": {"weight": torch.zeros(2)},
        "epoch": 1,
        "global_step": 8,
        "hyper_parameters": {"width": 3},
        "callbacks": {HessianSpectrumCallback().state_key: state()},
        "optimizer_states": [{}],
    }
    if not path.exists():
        torch.save(original, path)
    damaged_path = folder / "damaged.ckpt"
    if data.draw(st.booleans()):
        damaged_path.write_bytes(data.draw(damaged_bytes(path.read_bytes())))
    else:
        torch.save(data.draw(damaged(original, st.one_of(JUNK, TENSORS))), damaged_path)
    try:
        Project(Blueprint("x"), Blueprint("x"))._drawn(load_checkpoint(damaged_path))
    except CommandError as error:
        assert "\n" not in str(error)  # noqa: PT017


# Payloads -------------------------------------------------------------------------------------------------------------

RECORD = record_payload(records()[-1])
PAYLOADS = {"record": (RECORD, RECORD_FIELDS), "selection": (selection(), SELECTION_FIELDS)}


@pytest.mark.parametrize("kind", PAYLOADS)
@given(data=st.data())
@fuzz(60)
def test_payloads(kind: str, data: st.DataObject) -> None:
    original, fields = PAYLOADS[kind]
    text = data.draw(texts(original))
    source = text if data.draw(st.booleans()) else text.encode("utf-8", "surrogateescape")
    try:
        found = read_payload(source, fields)
    except PayloadError:
        return
    made = decisions([found], []) if kind == "record" else decisions([], rewound([found, selection(9)]))
    to_json({"payload": found, "rules": made}).encode()


def test_no_candidate_is_within_a_negative_tolerance() -> None:
    with pytest.raises(PayloadError, match="`tolerance`"):
        read_payload(to_json({**selection(), "tolerance": -1}), SELECTION_FIELDS)


@pytest.fixture(scope="module")
def event_files(folder: Path) -> dict[str, bytes]:
    write_payloads(folder / "events" / "record", [RECORD])
    write_payloads(folder / "events" / "selection", [selection()], tag="selection/highest")
    return {f"{file.name}.{file.parent.name}": file.read_bytes() for file in (folder / "events").rglob("events*.0*")}


@given(data=st.data())
@fuzz(20)
def test_damaged_event_files_and_requests(
    tmp_path_factory: pytest.TempPathFactory, event_files: dict[str, bytes], data: st.DataObject
) -> None:
    place = tmp_path_factory.mktemp("events")
    for name, content in event_files.items():
        (place / "run" / name).parent.mkdir(exist_ok=True)
        (place / "run" / name).write_bytes(data.draw(damaged_bytes(content)))
    tab = Tab(place)
    assert tab.get("runs")[0] == 200
    names = st.one_of(st.sampled_from(["run", "hesd", "..", "/etc/passwd", "<b>", "\0"]), st.text(max_size=9))
    query = data.draw(st.dictionaries(st.sampled_from(["run", "name", "x"]), names.filter(lambda t: t.isprintable())))
    code, body = tab.get("records", **query)
    assert code == 200 or (code in {400, 404} and body["error"])


# Arguments ------------------------------------------------------------------------------------------------------------

WORDS = [
    *("analyze", "assess", "plot", "report", "sample-size", "--help", "--", "-", "--out", "--name", "--config"),
    *("--model", "--data", "--model.x=1", "--data_args", "--model_args={", "--generalization=val", "--unsafe=maybe"),
    *("--analysis.steps", "--analysis.steps=1e999", "--analysis.tolerance=[1]", "--batch_size=-1", "--accelerator"),
    *("--analysis.seed=99999999999999999999999", "--num_samples=null"),
    *("[[[[", "{a: b: c}", "!!python/object:os.system", "&a [*a]"),
    *("nowhere.Net", "os.path.join", "good.npz", "bad.npz", "good.ckpt", "*.none", "none", "\ud800", "[/b].ckpt", "%s"),
]


@given(arguments=st.lists(st.one_of(st.sampled_from(WORDS), st.text("-=.[]{}:,!&*ab1 \n", max_size=6)), max_size=7))
@fuzz(20)
@example(arguments=["assess", "good.npz", "good.npz"])
@example(arguments=["plot", "bad.npz"])
@example(arguments=["report", "."])
@example(arguments=["analyze", "good.ckpt", "--config", "bad.yaml"])
def test_arguments(folder: Path, arguments: list[str]) -> None:
    make_spectrum(-0.2).save(folder / "good.npz")
    (folder / "bad.npz").write_bytes(b"PK\x03\x04")
    (folder / "bad.yaml").write_bytes(b"\xff: [")
    torch.save({"state_dict": {}}, folder / "good.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(sys, "argv", ["lightning-hesd", *arguments])
        try:
            cli.main()
        except SystemExit as ended:
            assert ended.code in {0, 1, 2}  # noqa: PT017
