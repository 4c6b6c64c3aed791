"""The table of findings as a page, and the words for device and versions."""

from __future__ import annotations

import datetime as dt
import platform
from collections import Counter
from typing import TYPE_CHECKING, Any

import lightning
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.gpu.finding import Finding, Setting

EXPLANATION = """\
Each line is a claim, whether it holds on this device, and the measurements behind it. *Needs CUDA*: this device cannot
tell. *For information*: figures without a claim of ours, such as those of other packages (× ours: their time as a
multiple of ours).
"""


def document(setting: Setting, findings: Sequence[Finding], seconds: float) -> str:
    """Return the page."""
    counts = Counter(finding.status for finding in findings)
    form = ", small form" if setting.is_small else ""
    today = dt.datetime.now(tz=dt.timezone.utc).date()
    rows = [["claim", "", "figures"], ["---"] * 3, *([f.title, _mark(f), f.figures] for f in findings)]
    return "\n".join(
        [
            "# On a GPU",
            "",
            f"Made by `python -m benchmarks.gpu` on {today} in {seconds:.0f} seconds{form}. {environment(setting)}.",
            "",
            EXPLANATION,
            f"{', '.join(f'{count} {status}' for status, count in counts.items())}.",
            "",
            *(f"| {' | '.join(map(_cell, row))} |" for row in rows),
            "",
        ]
    )


def environment(setting: Setting) -> str:
    """Describe the device, and name the versions."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}"
    if not setting.is_cuda:
        return f"Device: {setting.device} ({platform.machine()}); {versions}"
    backends: Any = torch.backends
    properties = torch.cuda.get_device_properties(setting.device)
    return (
        f"Device: {properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB; {versions}, CUDA {torch.version.cuda or torch.version.hip}, "
        f"cuDNN {backends.cudnn.version()}"
    )


def _mark(finding: Finding) -> str:
    return "**FAILED**" if finding.status == "failed" else finding.status


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
