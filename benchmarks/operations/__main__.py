"""Analyze every layer, loss and function of PyTorch in small losses, and write the table.

python -m benchmarks.operations                     # a few minutes on one core
python -m benchmarks.operations --only Norm         # operations with this in their name; prints only
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import platform
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch

from benchmarks.operations.functions import functions
from benchmarks.operations.judge import ACCURACY, SETTINGS, Outcome, Setting, Verdict, judge, without_compositions
from benchmarks.operations.layers import layers

if TYPE_CHECKING:
    from benchmarks.operations.case import Case

EXPLANATION = f"""\
Each operation is part of three small losses in float64: alone; with the squared norm of its
gradient (*gradient penalty*, as in WGAN-GP and physics-informed networks); and with a squared directional derivative by
`torch.func.jvp`. `hessian_spectrum` analyzes the loss with three probes v. Its nodes and weights give vᵀHv, which is
compared with second differences of the loss. These use no derivatives of PyTorch, so they also show wrong derivatives.

- **exact**: exact HVPs, right to {ACCURACY:g} of their size;
- **differences**: there is no exact HVP, or a wrong one; central differences of the gradient are right;
- **refused**: no value, and a reason;
- **unverified**: wrong, but not called verified; **wrong**: wrong, and called verified;
- **kink**: the loss has a jump or a kink near the weights, so differences show nothing;
- **no loss**: PyTorch cannot evaluate the loss itself.
"""

ALONE = """\
## Effect of the replacements

PyTorch has wrong derivatives of these operations, or none, so an analysis replaces them by plain operations. Without
the replacements, verification finds the error and uses differences, or refuses:
"""


def main() -> None:
    """Judge all cases, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of a name: print the verdicts, and write nothing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [case for case in [*layers(), *functions()] if args.only in case.name]
    found = {(case.name, setting): judge(case, setting) for case in chosen for setting in SETTINGS}
    for (name, setting), verdict in found.items():
        if args.only or verdict.outcome != "exact":
            print(name, setting, verdict.outcome, f"{verdict.gap:.1e}", verdict.remark, sep=" | ", flush=True)
    if not args.only:
        with without_compositions():
            alone = {(case.name, setting): judge(case, setting) for case in chosen for setting in SETTINGS}
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "operations.md").write_text(document(chosen, found, alone), encoding="utf-8")


Verdicts = dict[tuple[str, Setting], Verdict]


def document(cases: list[Case], found: Verdicts, alone: Verdicts) -> str:
    """Return the report."""
    outcomes = get_args(Outcome)
    counts = {setting: Counter(v.outcome for (_, s), v in found.items() if s == setting) for setting in SETTINGS}
    summary = [["part of", *outcomes], *([s, *(str(counts[s][o]) for o in outcomes)] for s in SETTINGS)]
    odd = [c.name for c in cases if any(found[c.name, s].outcome != "exact" for s in SETTINGS)]
    changed = [c.name for c in cases if any(found[c.name, s].outcome != alone[c.name, s].outcome for s in SETTINGS)]
    smooth = [case.name for case in cases if case.name not in odd]
    today, package = dt.datetime.now(tz=dt.timezone.utc).date(), importlib.metadata.version("lightning-hesd")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, lightning-hesd {package}"
    return "\n".join(
        [
            "# Operations",
            "",
            f"Made by `python -m benchmarks.operations` on {today}, {versions}, on a CPU. {len(cases)} operations.",
            "",
            EXPLANATION,
            _table(summary),
            "",
            "## Exceptions",
            "",
            _by_operation(odd, found),
            "",
            ALONE,
            _by_operation(changed, alone),
            "",
            "## Exact everywhere",
            "",
            ", ".join(f"`{name}`" for name in smooth) + ".",
            "",
        ]
    )


def _by_operation(names: list[str], verdicts: Verdicts) -> str:
    rows = [["operation", *SETTINGS, "why (the first that is not exact)"]]
    for name in names:
        own = [verdicts[name, setting] for setting in SETTINGS]
        remark = next((verdict.remark for verdict in own if verdict.outcome != "exact"), "")
        rows.append([name, *(verdict.outcome for verdict in own), _cell(remark)])
    return _table(rows)


def _cell(text: str) -> str:
    short = text if len(text) <= 160 else text[:157] + "..."
    return short.replace("|", "\\|")


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


if __name__ == "__main__":
    main()
