"""`lightning-hesd report`: runs as one HTML file, with the frontend of the HESD tab and the data in the page."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import os
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_hesd.commands.report_summary import glossary_html, summary_html
from lightning_hesd.commands.reported_run import ReportedRun
from lightning_hesd.judgment.judge import judge_payloads
from lightning_hesd.judgment.runs import run_folders, short_names
from lightning_hesd.spectra.decisions import rewound, run_payload
from lightning_hesd.spectra.files import save_text
from lightning_hesd.spectra.findings import findings
from lightning_hesd.spectra.payload import SELECTIONS_NAME, record_payload
from lightning_hesd.spectra.payload_reading import SELECTION_FIELDS, PayloadError, read_payload
from lightning_hesd.tensorboard_plugin.assets import PLOTLY, REPORT, REPORT_STYLE, SHARED, STYLE, content
from lightning_hesd.training.folders import exists, fetched, is_remote, joined
from lightning_hesd.training.history import SpectrumHistory
from lightning_hesd.training.history_folder import INDEX_NAME

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jsonargparse import ArgumentParser, Namespace

    Location = str | os.PathLike[str]

IMPORT = re.compile(r"^import\s[^;]*;\n", re.MULTILINE)
EXPORT = re.compile(r"^export\s+", re.MULTILINE)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("runs", nargs="+", type=str, help="Log directories of runs, or folders of such.")
    parser.add_argument("--name", type=str, default="hesd", help="Name of the callback in the runs.")
    parser.add_argument("-o", "--out", type=Path, default=Path("report.html"), help="The file.")


def run(config: Namespace) -> None:
    """Write the report, and print the name of its file."""
    write_report(config.runs, config.out, config.name)
    print(config.out)


def write_report(runs: Location | Sequence[Location], out: str | os.PathLike[str], name: str = "hesd") -> None:
    """Write the report of one or several runs.

    Args:
        runs: The log directory of a run, or a folder with runs below it; or several of these.
        out: The file to write.
        name: The callback's `name`.

    Raises:
        FileNotFoundError: If there is no history.
        ValueError: If all histories are empty or damaged; the report names those that are left out.
    """
    found, left_out = _read_all([runs] if isinstance(runs, str | os.PathLike) else runs, name)
    payloads = [{**run.payload, "color": color} for color, run in enumerate(found)]
    document = report(*payloads, summary=summary_html(found, left_out))
    save_text(out, document, errors="replace")  # names of files need not be text: what has no letters gets "?"


def _read_all(locations: Sequence[Location], name: str) -> tuple[list[ReportedRun], list[str]]:
    """Return the runs in these folders, and messages about those that cannot be read.

    Raises:
        FileNotFoundError: If there is no history.
        ValueError: If none can be read.
    """
    folders = list(dict.fromkeys(folder for location in locations for folder in run_folders(location, name)))
    found, problems = [], []
    for folder, title in zip(folders, short_names(folders), strict=True):
        try:
            found.append(_read(folder, name, title))
        except (FileNotFoundError, ValueError) as error:  # noqa: PERF203 - one bad run must not cost the others
            if len(folders) == 1:
                raise
            problems.append(str(error))
    if not found:
        raise ValueError(" ".join(problems))
    return found, problems


def run_data(log_dir: Location, name: str = "hesd") -> dict[str, Any]:
    """Return the data of a run as the tab's backend returns them.

    Raises:
        ValueError: If the history has no record.
    """
    folder = str(log_dir) if is_remote(log_dir) else str(Path(log_dir).resolve())
    return {**_read(folder, name, *short_names([folder])).payload, "color": 0}


def _read(log_dir: str, name: str, title: str) -> ReportedRun:
    """Return a run.

    Raises:
        ValueError: If the history has no record.
    """
    history = SpectrumHistory.load(log_dir, name)
    if not history:
        msg = f"the history in {log_dir} has no records yet."
        raise ValueError(msg)
    # The findings of each state are those that training had then: they explain its badges.
    records = [
        record_payload(record, findings(history[: index + 1]), history.compare_with_reference(index))
        for index, record in enumerate(history)
    ]
    own = joined(log_dir, name)
    location = own if exists(joined(own, INDEX_NAME)) else log_dir
    with fetched(location) as folder:
        selections, problems = _selections(folder / SELECTIONS_NAME)
        seconds = None if is_remote(location) else (folder / INDEX_NAME).stat().st_mtime
    payload = run_payload(title, name, records, selections, problems) | {"folder": log_dir}
    changed = None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc)
    return ReportedRun(title, log_dir, history, payload, changed)


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


def report(*runs: Mapping[str, Any], summary: str = "") -> str:
    """Return the HTML document that shows runs, below a summary in HTML.

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
{content(STYLE).decode()}
{content(REPORT_STYLE).decode()}</style>
</head>
<body>
{summary}
<div id="hesd"></div>
<noscript><p class="page">The figures are drawn by scripts, which are switched off here.</p></noscript>
{glossary_html()}
<script type="text/plain" id="hesd-data">{data}</script>
<script>{plotly}</script>
<script type="module">{script}</script>
</body>
</html>
"""


def judgments(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
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
