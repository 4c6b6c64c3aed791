"""Check on a GPU what other tests cannot see on a CPU, and write the table.

python -m benchmarks.gpu                        # everything, on the first GPU: a few minutes
python -m benchmarks.gpu --only memory waiting  # these checks; prints only
python -m benchmarks.gpu --device cpu           # a small form, which tests this program; prints only

It needs torch and Lightning, no network and no installation: copy the repository, and start it there. Each check runs
in a process of its own, so that a failure of one, or of the device itself, does not end the others. The exit status is
1 if a claim does not hold.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu import comparison, exactness, process_group, resources, surroundings, training
from benchmarks.gpu.finding import Check, Finding, Setting
from benchmarks.gpu.page import document, environment
from benchmarks.isolation import describe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[2]

CHECKS: dict[str, Check] = {
    "exactness": exactness.exactness,
    "precision": exactness.precision,
    "attention": exactness.attention,
    "surroundings": surroundings.surroundings,
    "identity": training.identity,
    "mixed_precision": training.mixed_precision,
    "process_group": process_group.process_group,
    "out_of_memory": training.out_of_memory,
    "waiting": resources.waiting,
    "memory": resources.memory,
    "comparison": comparison.comparison,
}


def main() -> int:
    """Run checks, print and write what they find, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CHECKS, help="these checks; prints, and writes nothing")
    parser.add_argument("--device", default="cuda", help="default: %(default)s; cpu: a small form")
    parser.add_argument("--minutes", type=float, default=8.0, help="end checks that take longer in total")
    parser.add_argument("--together", action="store_true", help="run the checks in this process")
    parser.add_argument("--findings", type=Path, help="also write the findings to this file, as JSON, one by one")
    parser.add_argument("--out", type=Path, help="folder of the table; default: benchmarks/results, of a GPU only")
    args = parser.parse_args()
    device = torch.device("cuda:0" if args.device == "cuda" else args.device)
    setting = Setting(device, is_small=device.type == "cpu")
    if setting.is_cuda and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu runs a small form")

    started = time.perf_counter()
    print(environment(setting), flush=True)
    out: Path | None = args.out
    if out is None and args.only is None and setting.is_cuda:
        out = ROOT / "benchmarks" / "results"
    found: list[Finding] = []
    for name in args.only or CHECKS:
        left = 60 * args.minutes - (time.perf_counter() - started)
        findings = guarded(name, setting) if args.together else in_own_process(name, setting, left)
        for finding in findings:
            found.append(finding)
            print(finding.status, finding.title, finding.figures, sep=" | ", flush=True)
            if args.findings is not None:
                args.findings.write_text(json.dumps([asdict(one) for one in found]), encoding="utf-8")
            if out is not None:  # at once: what follows may be interrupted
                out.mkdir(parents=True, exist_ok=True)
                page = document(setting, found, time.perf_counter() - started)
                (out / "gpu.md").write_text(page, encoding="utf-8")
    failed = [finding.title for finding in found if finding.status == "failed"]
    print(f"{len(failed)} of {len(found)} failed", *failed, sep="\n- ")
    return 1 if failed else 0


def guarded(name: str, setting: Setting) -> Iterator[Finding]:
    """Yield the findings of a check in this process, and its failure as one of them."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    try:
        yield from CHECKS[name](setting)
    except Exception as error:  # noqa: BLE001 - the table has any failure
        traceback.print_exc()
        yield Finding(f"{name} runs to its end", "failed", describe(error))
    gc.collect()


def in_own_process(name: str, setting: Setting, seconds: float) -> Sequence[Finding]:
    """Return the findings of a check in a new process that ends after some seconds."""
    if seconds <= 0:
        return [Finding(f"{name} runs in time", "failed", "the time was spent on the checks before")]
    with tempfile.TemporaryDirectory() as folder:
        findings = Path(folder) / "findings.json"
        options = ["--only", name, "--device", str(setting.device), "--together", "--findings", str(findings)]
        words = ""
        try:
            ended = subprocess.run(  # noqa: S603 - this module
                [sys.executable, "-m", "benchmarks.gpu", *options],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                check=False,
                timeout=seconds,
                stdout=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            words = f"it was ended after {seconds:.0f} seconds"
        else:
            if ended.returncode not in {0, 1}:  # 1 says that a claim does not hold
                words = f"its process ended with exit status {ended.returncode}"
        found = [Finding(**one) for one in json.loads(findings.read_text("utf-8"))] if findings.exists() else []
    if not found and not words:
        words = "its process has found nothing"
    return [*found, Finding(f"{name} runs to its end", "failed", words)] if words else found


if __name__ == "__main__":
    sys.exit(main())
