"""Medians and ratios of raw measurements, and the Markdown report."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.candidates import OURS, TOLERANCE
from benchmarks.measure import CANDIDATES, GRADIENT
from benchmarks.problems import RECIPES
from benchmarks.profile import PARTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

COLUMNS = [
    "problem",
    "candidate",
    "product, in gradients",
    "ms",
    "error of product",
    "C_t: products",
    "in hindsight",
    "s",
    "× ours",
    "error of C_t",
    "density: products",
    "s",
    "× ours",
    "peak memory, MiB",
    "× ours",
]
EXPLANATION = f"""\
All candidates have the same weights, the same samples, evaluation mode, and one probe.

- **product**: one Hessian-vector product, in plain gradients of the same loss over the same batches (fused attention
  allowed), and in milliseconds; its error is relative to float64. `lightning_hesd` is `strategy="auto"`.
- **C_t**: products and time to estimate C_t to {TOLERANCE:.0%}. lightning_hesd (`tolerance={TOLERANCE}`) and curvlinops
  (SciPy's `eigsh` with `tol={TOLERANCE}`) stop by themselves. The others do not, so it is the run for the density.
  *Error of C_t*: the actual relative error; bold if it exceeds {TOLERANCE:.0%}.
- **in hindsight**: number of steps of the run for the density from which C_t stayed within {TOLERANCE:.0%}. To stop
  there, one must know the true value.
- **density**: from 100 nodes of one probe, including the time to build. curvlinops needs the extremes first.
- **peak memory**: growth of the resident memory during the estimation of the density, in a process that has loaded the
  problem and computed one gradient.
- **PyHessian's loop**: retained graphs and full reorthogonalization in a Python loop. It is a lower bound for
  PyHessian, whose release does not run on current torch, and which recomputes the graphs if there is more than one
  batch.
- **hessian-eigenthings, differences**: its `method="finite_difference"`.

Where *× ours* is below 1, or the goal of 4 for C_t is missed:

- **Products with one batch** take all exact candidates about the time that PyTorch takes to differentiate the same
  graph. What lightning_hesd adds to a density is the comparison of the loss with its derivatives, once for each loss
  (*Verification* below).
- **C_t**: the gain over a run of 100 products is at most 100/m for the m products that an interval of
  {TOLERANCE:.0%} needs, and smaller by the verification. curvlinops stops nearly as early, without an interval.
- **Memory in eight batches**: they are merged, and the graph is kept as far as `memory_budget` allows, because a
  product that makes the graph anew takes 1.5 to 2 times as long (`lightning_hesd, recompute`). `strategy="recompute"`
  keeps no graph.
"""

PROFILE = f"""\
One estimate of C_t by lightning_hesd, after another one in the same process, and the shares of its
parts. *Lanczos*: orthogonalization, for the most part. *Interval*: the check whether C_t is known to {TOLERANCE:.0%}.
*Graphs*: recording the gradients and measuring their memory. *Verification*: the comparison of the loss with its
derivatives, which later analyses of the same loss need not repeat. *Layers*: their curvature from the same run. The
gain of m exact products over 100 is at most 100/m.
"""


@dataclass(frozen=True)
class Summary:
    """Medians of one candidate on one problem; None where nothing was measured.

    Attributes:
        problem: The problem and its number of batches.
        candidate: The candidate.
        gradients: Time of an HVP, in gradients.
        product: Seconds of an HVP.
        product_error: Relative error of the HVP.
        whole: Medians of the whole runs, by the names that `measure.whole` gives them.
        failure: Message of a failure.
    """

    problem: str
    candidate: str
    gradients: float | None
    product: float | None
    product_error: float | None
    whole: Mapping[str, float | None]
    failure: str | None


def title(entry: Mapping[str, Any]) -> str:
    """Return the title of a problem with its number of batches."""
    pieces = entry["pieces"]
    return f"{RECIPES[entry['problem']].title}, {pieces} batch{'es' * (pieces > 1)}"


def summarize(entry: Mapping[str, Any]) -> dict[str, Summary]:
    """Return the medians of all candidates on one problem."""
    gradient = statistics.median(entry["products"][GRADIENT]["seconds"])
    summaries = {}
    for name, candidate in CANDIDATES.items():
        product = entry["products"].get(name)
        if product is None:
            continue
        seconds = statistics.median(product["seconds"]) if product["seconds"] else None
        runs = entry["whole"].get(name, [])
        failures = [product.get("failure"), *(run.get("failure") for run in runs)]
        keys = {key for run in runs for key in run} - {"note", "failure"}
        summaries[name] = Summary(
            problem=title(entry),
            candidate=candidate.name,
            gradients=None if seconds is None else seconds / gradient,
            product=seconds,
            product_error=product.get("error"),
            whole={key: _median(run.get(key) for run in runs) for key in keys},
            failure=next((failure for failure in failures if failure), None),
        )
    return summaries


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def relative(summaries: Mapping[str, Summary], name: str, key: str) -> float | None:
    """Return a median of a candidate in units of ours."""
    own, ours = summaries[name].whole.get(key), summaries[OURS.name].whole.get(key)
    return own / ours if own is not None and ours else None


def table(entries: Iterable[Mapping[str, Any]]) -> str:
    """Return the Markdown table."""
    lines = [_line(COLUMNS), _line(["---"] * 2 + ["---:"] * (len(COLUMNS) - 2))]
    for entry in entries:
        summaries = summarize(entry)
        lines += [_line(_row(summaries, name)) for name in summaries]
    return "\n".join(lines)


def _row(summaries: Mapping[str, Summary], name: str) -> list[str]:
    row = summaries[name]
    if row.failure is not None and not row.whole and row.product is None:
        return [row.problem, row.candidate, "fails", *[""] * (len(COLUMNS) - 3)]
    error = row.whole.get("error")
    shown_error = _number(error, ".1e")
    return [
        row.problem,
        row.candidate,
        _number(row.gradients, ".2f"),
        _number(row.product and 1000 * row.product, ".3g"),
        _number(row.product_error, ".0e"),
        _number(row.whole.get("c_t_products"), ".0f") or ("fails" if row.failure else ""),
        _number(row.whole.get("hindsight"), ".0f"),
        _number(row.whole.get("c_t_seconds"), ".3g"),
        _number(relative(summaries, name, "c_t_seconds"), ".2f"),
        f"**{shown_error}**" if error is not None and error > TOLERANCE else shown_error,
        _number(row.whole.get("density_products"), ".0f"),
        _number(row.whole.get("density_seconds"), ".3g"),
        _number(relative(summaries, name, "density_seconds"), ".2f"),
        _number(_mebibytes(row.whole.get("peak_bytes")), ".0f"),
        _number(relative(summaries, name, "peak_bytes"), ".2f"),
    ]


def _mebibytes(size: float | None) -> float | None:
    return None if size is None else size / 2**20


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def remarks(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the remarks below the table: failures, and notes of candidates."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        where = title(entry)
        for name, result in entry["products"].items():
            if result.get("as_is"):
                found.setdefault(
                    f"{name} needs fused attention off (`sdpa_kernel(SDPBackend.MATH)`), and ran so: {result['as_is']}",
                    [],
                ).append(where)
            if result.get("failure"):
                found.setdefault(f"{name} fails: {result['failure']}", []).append(where)
            if name not in {GRADIENT, OURS.name} and "build" in result and result["build"] > 1:
                found.setdefault(f"{name} took {result['build']:.1f} s to build", []).append(where)
        for name, runs in entry["whole"].items():
            for remark in sorted({run.get("failure") or run["note"] for run in runs} - {""}):
                found.setdefault(f"{name}: {remark}", []).append(where)
    return [f"{remark} ({'; '.join(dict.fromkeys(places))})" for remark, places in found.items()]


def profiles(entries: Iterable[Mapping[str, Any]]) -> str:
    """Return the Markdown table of the parts of our time."""
    lines = [
        _line(["problem", "ms", "products", "ms each", *PARTS, "rest"]),
        _line(["---"] + ["---:"] * (4 + len(PARTS))),
    ]
    for entry in entries:
        profile = entry["profile"]
        whole, parts, count = profile["seconds"], profile["parts"], profile["products"]
        cells = [f"{1000 * whole:.4g}", str(count), f"{1000 * parts['products'] / count:.3g}"]
        cells += [f"{share / whole:.0%}" for share in [*parts.values(), whole - sum(parts.values())]]
        lines.append(_line([title(entry), *cells]))
    return "\n".join(lines)


def document(results: Mapping[str, Any]) -> str:
    """Return the whole report."""
    entries = results["entries"]
    problems = [_line(["problem", "parameters", "samples", "gradient, ms", "true C_t", "± at most", "whole runs"])]
    problems.append(_line(["---"] + ["---:"] * 6))
    for entry in entries:
        gradient = statistics.median(entry["products"][GRADIENT]["seconds"])
        truth = entry["truth"]
        cells = [f"{entry['parameters']:,}", f"{entry['samples']}", f"{1000 * gradient:.3g}", f"{truth['c_t']:.5f}"]
        rounds = max((len(runs) for runs in entry["whole"].values()), default=0)
        problems.append(_line([title(entry), *cells, f"{truth['relative_bound']:.0e}", str(rounds)]))
    environment = ", ".join(f"{key} {value}" for key, value in results["environment"].items())
    notes = "\n".join(f"- {remark}" for remark in remarks(entries))
    return (
        f"# Benchmark\n\n{environment}.\n\n![ratios](results.png)\n\n{table(entries)}\n\n{EXPLANATION}\n"
        f"## Where our time goes\n\n{profiles(entries)}\n\n{PROFILE}\n"
        f"## Problems\n\n{chr(10).join(problems)}\n\n## Remarks\n\n{notes}\n"
    )
