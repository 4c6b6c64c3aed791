"""The matrix of `make stress`, in short: a few cases; and whether its harness sees failures."""

import json
from pathlib import Path

import pytest

from tests.programs import run_python
from tests.stress.__main__ import main

SHORT = ["NaN in a weight"]

HARNESS = """
import json, os, sys, tempfile, time
from pathlib import Path
from tests.stress.harness import Program, in_own_process, run_all

def fails(folder):
    raise ValueError("no luck")

def hangs(folder):
    if os.fork() == 0:  # a child that outlives its parent
        (folder / "child").write_text(str(os.getpid()))
    time.sleep(60)

def is_gone(process):
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"

cases = [
    Program("good", "fine", lambda folder: "fine"),
    Program("other", "fine", lambda folder: "not so fine"),
    Program("fails", "fine", fails),
    Program("dies", "fine", lambda folder: os._exit(3)),
]
results = [(r.name, r.ok, r.got) for r in run_all(cases)]
with tempfile.TemporaryDirectory() as folder:
    results.append(("hangs", *in_own_process(hangs, Path(folder), seconds=1.0)))
    child = int((Path(folder) / "child").read_text())
for _ in range(100):
    if not is_gone(child):
        time.sleep(0.1)
json.dump([results, is_gone(child)], sys.stdout)
"""


def test_a_few_cases() -> None:
    said = run_python("-m", "tests.stress", "--kills", "0", "--soak", "0", "--only", *SHORT)
    assert f"\n{len(SHORT)} cases, 0 not as expected." in said, said


def test_a_case_that_is_not_as_expected_is_seen(tmp_path: Path) -> None:
    script = tmp_path / "harness.py"
    script.write_text(HARNESS, encoding="utf-8")
    results, gone = json.loads(run_python(str(script)))
    expected = [("good", True, "fine"), ("other", False, "not so fine"), ("fails", False, "ValueError: no luck")]
    expected += [("dies", False, "exit code 3"), ("hangs", False, "hangs")]
    assert [(name, ok) for name, ok, _ in results] == [(name, ok) for name, ok, _ in expected]
    for (_, _, text), (_, _, part) in zip(results, expected, strict=True):
        assert part in text
    assert gone, "a child of a hanging case outlived it"


def test_no_case_at_all_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["stress", "--only", "no such case"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
