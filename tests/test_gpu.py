"""The small form of `python -m benchmarks.gpu` holds on the CPU, and reports failures, of checks and of processes."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu.finding import Finding, Setting
from tests.programs import run_program

pytestmark = pytest.mark.usefixtures("problem_cache")

CPU = Setting(torch.device("cpu"), is_small=True)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("name", program.CHECKS)
def test_everything_holds_on_the_cpu(name: str) -> None:
    findings = list(program.guarded(name, CPU))
    assert findings
    assert [f for f in findings if f.status == "failed"] == []


def failing(setting: Setting) -> Iterator[Finding]:
    yield Finding("a claim", "passed", "1 | 2")
    msg = "no luck"
    raise ValueError(msg)


def test_a_failing_check_does_not_stop_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = {"first": failing, "second": lambda _: iter([Finding("another", "needs CUDA", "")])}
    monkeypatch.setattr(program, "CHECKS", checks)
    monkeypatch.setattr("sys.argv", ["", "--device", "cpu", "--together", "--out", str(tmp_path)])
    assert program.main() == 1
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "| a claim | passed | 1 \\| 2 |" in page
    assert "| first runs to its end | **FAILED** | ValueError: no luck |" in page
    assert "| another | needs CUDA |" in page
    assert f"torch {torch.__version__}" in page
    assert "1 of 3 failed" in capsys.readouterr().out


def test_a_process_that_dies_or_takes_too_long_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert program.in_own_process("exactness", CPU, 60.0)[-1].status == "failed"
    assert "the time was spent" in program.in_own_process("exactness", CPU, 0.0)[-1].figures


STANDING_ALONE = """
import sys
import lightning.pytorch  # what it imports by itself where it is installed stays
BLOCKED = {"sklearn", "matplotlib", "tensorboard", "plotly", "pandas", "scipy", "rich", "jsonargparse", "pytest"}
for name in [*sys.modules]:
    if name.split(".")[0] in BLOCKED | {"benchmarks", "lightning_hesd", "tests"}:
        del sys.modules[name]
sys.modules.update(dict.fromkeys(BLOCKED))  # as if they were not installed
root, findings = sys.argv[1:]
sys.path.insert(0, root)
sys.argv = ["", "--device", "cpu", "--together", "--only", "mixed_precision", "--findings", findings]
from benchmarks.gpu.__main__ import main
sys.exit(main())
"""


def test_it_needs_torch_and_lightning_only(tmp_path: Path) -> None:
    script, findings = tmp_path / "alone.py", tmp_path / "findings.json"
    script.write_text(STANDING_ALONE)
    run_program(str(script), str(program.ROOT), str(findings))
    assert {finding["status"] for finding in json.loads(findings.read_text())} == {"passed"}
