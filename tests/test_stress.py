"""The matrix of `make stress`, in short: a few cases; and whether its harness sees failures."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.programs import ROOT
from tests.stress.__main__ import main

SHORT = ["precision bf16-true", "NaN in a weight", "out of memory twice", "a logger that refuses metrics*"]

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
time.sleep(0.2)
state = Path(f"/proc/{child}/stat")
gone = not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"
json.dump([results, gone], sys.stdout)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments; the cases fork, which a process of many threads must not."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)


def test_a_few_cases() -> None:
    done = run("-m", "tests.stress", "--kills", "0", "--soak", "0", "--only", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"\n{len(SHORT)} cases, 0 not as expected." in done.stdout, done.stdout


def test_what_is_not_as_expected_is_seen() -> None:
    done = run("-c", HARNESS)
    assert done.returncode == 0, done.stderr
    results, gone = json.loads(done.stdout)
    assert [(name, ok) for name, ok, _ in results] == [
        *(("good", True), ("other", False), ("fails", False), ("dies", False), ("hangs", False)),
    ]
    told = [text for _, _, text in results]
    for text, part in zip(told, ("fine", "not so fine", "ValueError: no luck", "exit code 3", "hangs"), strict=True):
        assert part in text
    assert gone, "a child of a hanging case outlived it"


def test_no_case_at_all_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["stress", "--only", "no such case"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
