"""`lightning-hesd report`: a run as one HTML file, with the frontend of the HESD tab and the data in the page."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_hesd.judgment.judge import judge_payloads
from lightning_hesd.spectra.decisions import rewound, run_payload
from lightning_hesd.spectra.files import atomic_write
from lightning_hesd.spectra.payload import SELECTIONS_NAME, record_payload
from lightning_hesd.spectra.payload_reading import SELECTION_FIELDS, PayloadError, read_payload
from lightning_hesd.tensorboard_plugin.assets import PLOTLY, REPORT, SHARED, STYLE, content
from lightning_hesd.training.folders import exists, fetched, joined
from lightning_hesd.training.history import SpectrumHistory

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from jsonargparse import ArgumentParser, Namespace

IMPORT = re.compile(r"^import\s[^;]*;\n", re.MULTILINE)
EXPORT = re.compile(r"^export\s+", re.MULTILINE)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("log_dir", type=Path, help="The run's log directory.")
    parser.add_argument("--name", type=str, default="hesd", help="Name of the callback in the run.")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="The file.")


def run(config: Namespace) -> None:
    """Write the report, and print the name of its file."""
    write_report(config.log_dir, config.out, config.name)
    print(config.out)


def write_report(log_dir: str | os.PathLike[str], out: str | os.PathLike[str], name: str = "hesd") -> None:
    """Write the report of a run.

    Args:
        log_dir: The run's log directory, or the folder of its history.
        out: The file to write.
        name: The callback's `name`.

    Raises:
        FileNotFoundError: If there is no history.
        ValueError: If the history is empty or damaged.
    """
    document = report(run_data(log_dir, name))
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as partial:
        # Names of files need not be text; what has no letters gets question marks.
        partial.write_text(document, encoding="utf-8", errors="replace")


def run_data(log_dir: str | os.PathLike[str], name: str = "hesd") -> dict[str, Any]:
    """Return the data of a run as the tab's backend returns them.

    Raises:
        ValueError: If the history has no record.
    """
    history = SpectrumHistory.load(log_dir, name)
    if not history:
        msg = f"the history in {log_dir} has no records yet."
        raise ValueError(msg)
    compared = [history.compare_with_reference(index) for index in range(len(history))]
    records = [record_payload(record, compared=found) for record, found in zip(history, compared, strict=True)]
    records[-1] = record_payload(history[-1], history.findings, compared[-1])
    own = joined(log_dir, name)
    with fetched(own if exists(own) else log_dir) as folder:
        selections, problems = _selections(folder / SELECTIONS_NAME)
    run = Path(log_dir).resolve()
    is_numbered = run.name.startswith("version_")  # by Lightning: the folder around it has the run's name
    title = f"{run.parent.name}/{run.name}" if is_numbered else run.name
    return {**run_payload(title, name, records, selections, problems), "color": 0}


def _selections(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    if not path.is_file():
        return [], []
    by_rule: dict[str, list[dict[str, Any]]] = {}
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            selection = read_payload(line, SELECTION_FIELDS)
            by_rule.setdefault(selection["key"], []).append(selection)
        except PayloadError as error:  # noqa: PERF203 - an interruption may have cut the last line off
            problems.append(f"{path.name}, line {number}: {error}")
    return [selection for made in by_rule.values() for selection in rewound(made)], problems


def report(*runs: dict[str, Any]) -> str:
    """Return the HTML document that shows runs.

    Its Content Security Policy allows no other scripts than its own, and no request.

    Raises:
        ValueError: If a script cannot stand in a page.
    """
    plotly = content(PLOTLY).decode()
    # Without imports and exports all modules become one script, in the order of their imports.
    modules = (content(file).decode() for file in (*SHARED, REPORT))
    script = "\n".join(EXPORT.sub("", IMPORT.sub("", module)) for module in modules)
    for code in (plotly, script):
        if "</script" in code.lower():
            msg = "a script of the report would end it early: it contains '</script'."
            raise ValueError(msg)
    # A long run of a deep network has tens of megabytes. Letters of base64 can do no harm within a script element.
    text = json.dumps({"runs": runs, "judgments": judgments(runs)}, separators=(",", ":"), allow_nan=False)
    data = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
    policy = (
        f"default-src 'none'; script-src {_digest(plotly)} {_digest(script)}; style-src 'unsafe-inline'; "
        "img-src data: blob:"
    )
    title = html.escape(f"HESD: {', '.join(run['run'] for run in runs)}")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{content(STYLE).decode()}</style>
</head>
<body>
<div id="hesd"></div>
<noscript>This report is drawn by scripts, which are switched off here.</noscript>
<script type="text/plain" id="hesd-data">{data}</script>
<script>{plotly}</script>
<script type="module">{script}</script>
</body>
</html>
"""


def judgments(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the comparison of the checkpoint rules by each metric of runs, or an `error` where there is none."""
    payloads: dict[str, Any] = {}
    for run in runs:
        payloads.setdefault(run["run"], run["records"])  # another callback of a run has seen the same training
    names = sorted({name for records in payloads.values() for record in records for name in record["metrics"]})
    return {name: _judgment(payloads, name) for name in names}


def _judgment(payloads: Mapping[str, Sequence[Mapping[str, Any]]], metric: str) -> dict[str, Any]:
    try:
        return judge_payloads(payloads, metric).to_dict()
    except ValueError as error:
        return {"error": str(error)}


def _digest(script: str) -> str:
    """Return the hash by which a Content Security Policy names a script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
