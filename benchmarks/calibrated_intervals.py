"""Whether intervals of C_t that are calibrated on known spectra would end Lanczos runs much sooner than proven ones.

python -m benchmarks.calibrated_intervals --records FOLDER    # spectra saved in training; about five minutes
python -m benchmarks.calibrated_intervals --quick --out /tmp/bench
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.coverage import Matrix, cases
from lightning_hesd import Spectrum, hessian_spectrum
from lightning_hesd.numerics.krylov.lanczos import Lanczos
from lightning_hesd.numerics.krylov.ritz import gauss_quadrature
from lightning_hesd.spectra import criteria
from lightning_hesd.spectra.eigenvalue_bounds import log_excess
from lightning_hesd.spectra.spectrum import MIN_SCALE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

TOLERANCES = (0.05, 0.01)
MISSES = 0.05
"""Share of runs that may end with an error above the tolerance."""

SETTLED = 0.1
"""Largest proven error, in tolerances, at which the C_t of the end of a recorded run counts as the truth."""

RULES = {
    "proven": "the proven interval, as `tolerance` asks for",
    "improbable": "the same interval, with a larger probability of failure",
    "residuals": "the error of C_t, to first order, if both extremes are off by their Ritz residuals",
    "change": "the relative change of C_t over the last quarter of the steps, at least four",
    "both": "the larger of residuals and change",
}
EXPLANATION = """\
A Lanczos run that is to find C_t to a relative tolerance ends here as soon as a statistic, computed after every second
step, falls below a threshold:

{rules}

The thresholds of all but the proven rule are calibrated: the largest with which no more than 5 % of the runs end with
an error above the tolerance, on all groups of runs but one. That threshold is then applied to the group left out.

- *synthetic*: the {num_spectra} spectra of [the coverage study](coverage.md), each with {seeds} start vectors, a group
- *networks*: two MLPs and a convolutional network on digits after 0, 30 and 300 steps of training; each state with
  {starts} start vectors, a group
- *recorded*: {num_records} spectra saved in trainings of MLPs, ResNets and ViTs; network and schedule are a group
- *A on B*: thresholds from the runs A, applied to B

Of networks and recorded runs T of every step follows from nodes and weights of the last. Their truth is the last C_t;
where its proven error exceeds a tenth of the tolerance the run is left out, the hardest ones ({left_out} at 1 %).

*steps*: mean; *saved*: share of the proven rule's steps; *covered*: share of runs that end within the tolerance, over
all groups left out, and in the worst of them. *hindsight*: the steps after which C_t stays within the tolerance.
"""
HEADER = ("runs", "tolerance", "rule", "steps", "hindsight", "saved", "covered", "worst group")


class Run(NamedTuple):
    """A Lanczos run with a known C_t."""

    group: str
    alphas: Array
    betas: Array
    dimension: int
    epsilon: float
    truth: float


class History(NamedTuple):
    """What each rule sees of a run, after the steps of `steps`."""

    group: str
    steps: Array
    errors: Array  # of C_t, in tolerances
    statistics: Mapping[str, Array]


def synthetic_runs(seeds: int, steps: int, spectra: int | None = None) -> Iterator[Run]:
    """Yield runs on the matrices of the coverage study."""
    for name, case in list(cases().items())[:spectra]:
        if case.probes > 1:
            continue
        matrix = Matrix(case)
        low, high = float(matrix.eigenvalues[0]), float(matrix.eigenvalues[-1])
        epsilon, n = torch.finfo(case.dtype).eps, len(matrix.eigenvalues)
        truth = criteria.c_t(low, high, criteria.rounding_threshold(matrix.norm, epsilon, n))
        if not math.isfinite(truth):
            continue
        for seed in range(seeds):
            start = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            run = Lanczos(matrix.matrix.mv, start.to(case.dtype), steps)
            run.run()
            yield Run(name, run.alphas, run.betas, n, epsilon, truth)


def network_spectra(starts: int, steps: int) -> Iterator[tuple[str, Spectrum]]:
    """Yield spectra of small networks with their groups."""
    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    batch = images[:256].float() / 16, labels[:256]
    networks: dict[str, Callable[[], nn.Module]] = {
        "MLP, ReLU": lambda: nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        ),
        "MLP, tanh": lambda: nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10)),
        "CNN": lambda: nn.Sequential(
            *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)),
        ),
    }

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    for name, build in networks.items():
        torch.manual_seed(0)
        network = build()
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
        done = 0
        for count in (0, 30, 300):
            for _ in range(count - done):
                optimizer.zero_grad()
                loss(network, batch).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            done = count
            yield f"{name}, {count}", hessian_spectrum(network, [batch], loss, steps=steps, probes=starts)


def recorded_spectra(folder: Path) -> Iterator[tuple[str, Spectrum]]:
    """Yield saved spectra, in folders NETWORK-SCHEDULE-NUMBER/hesd, with their groups."""
    for path in sorted(folder.glob("*/hesd/*.npz")):
        yield path.parts[-3].rsplit("-", 1)[0], Spectrum.load(path)


def runs_of(spectra: Iterable[tuple[str, Spectrum]], tolerance: float) -> tuple[list[Run], int]:
    """Return the Lanczos runs of spectra that end with a certain C_t, and the number of the others."""
    found: list[Run] = []
    left_out = 0
    for group, spectrum in spectra:
        is_certain = spectrum.c_t_error <= SETTLED * tolerance * max(abs(spectrum.c_t), MIN_SCALE)
        norm = float(np.nanmax(np.abs(spectrum.nodes)))
        epsilon = spectrum.rounding / criteria.rounding_threshold(norm, 1.0, spectrum.dimension)
        for rule in zip(spectrum.nodes, spectrum.weights, spectrum.residuals, strict=True):
            if is_certain:
                found.append(Run(group, *jacobi(*rule), spectrum.dimension, epsilon, spectrum.c_t))
            else:
                left_out += 1
    return found, left_out


def jacobi(nodes: Array, weights: Array, residuals: Array) -> tuple[Array, Array]:
    """Return T of a quadrature rule: that of a Lanczos run on the nodes as a matrix, from the roots of the weights."""
    present = ~np.isnan(nodes)
    diagonal, start = torch.from_numpy(nodes[present]), torch.from_numpy(np.sqrt(weights[present]))
    run = Lanczos(lambda vector: diagonal * vector, start, len(start))
    run.run()
    if len(run.alphas) == len(start):
        run.betas[-1] = np.sqrt((residuals**2).sum())  # the last components of the eigenvectors have the norm 1
    return run.alphas, run.betas


def _history(run: Run, tolerance: float) -> History:
    steps = np.arange(2, len(run.alphas) + 1, 2, dtype=np.float64)
    c_t, excess, residuals = np.array([_statistics(run, int(m), tolerance) for m in steps]).T
    earlier = np.searchsorted(steps, steps - np.maximum(4, steps // 4), side="right") - 1
    scale = tolerance * np.maximum(np.abs(c_t), MIN_SCALE)
    change = np.where(earlier >= 0, np.abs(c_t - c_t[earlier]) / scale, math.inf)
    change[~np.isfinite(c_t)] = math.inf
    errors = np.abs(c_t - run.truth) / (tolerance * max(abs(run.truth), MIN_SCALE))
    statistics = {"proven": excess, "improbable": excess, "residuals": residuals, "change": change}
    return History(run.group, steps, errors, {**statistics, "both": np.maximum(residuals, change)})


def _statistics(run: Run, steps: int, tolerance: float) -> tuple[float, float, float]:
    """Return C_t after some steps, the excess of the proven interval, and the residuals in tolerances."""
    alphas, betas = run.alphas[:steps], run.betas[:steps]
    nodes, _, residuals = gauss_quadrature(alphas, betas)
    low, high = float(nodes[0]), float(nodes[-1])
    rounding = criteria.rounding_threshold(max(-low, high), run.epsilon, run.dimension)
    c_t = criteria.c_t(low, high, rounding)
    if not math.isfinite(c_t):
        return c_t, math.inf, math.inf
    allowed = tolerance * max(abs(c_t), MIN_SCALE)
    limits = criteria.extremes_within((c_t - allowed, c_t + allowed), low, high, rounding)
    excess = log_excess(alphas, betas, limits, run.dimension, 0.025)
    error = (float(residuals[0]) + abs(c_t) * float(residuals[-1])) / high  # of C_t, to first order
    return c_t, excess, error / allowed


def end(history: History, rule: str, threshold: float) -> int:
    """Return the position at which a run ends."""
    fulfilled = np.flatnonzero(history.statistics[rule] <= threshold)
    return int(fulfilled[0]) if len(fulfilled) else len(history.steps) - 1


def calibrated(known: Sequence[History], rule: str) -> float:
    """Return the largest threshold with which few enough runs miss, and with no smaller one more."""
    if rule == "proven":
        return 0.0
    values = np.concatenate([history.statistics[rule] for history in known])
    values = values[np.isfinite(values)]
    candidates = np.unique(np.quantile(values, np.linspace(0, 1, 200)))
    best = float(candidates[0])
    for candidate in candidates:
        misses = sum(history.errors[end(history, rule, candidate)] > 1 for history in known)
        if (misses + 1) / (len(known) + 1) > MISSES:
            break
        best = float(candidate)
    return best


def rows(label: str, tolerance: float, known: Sequence[History], tested: Sequence[History]) -> Iterator[list[str]]:
    """Yield the row of each rule; where both populations are one, each group is left out of its own calibration."""
    groups = sorted({history.group for history in tested})
    hindsight = np.mean([_settled(history) for history in tested])
    proven = 0.0  # steps
    for rule in RULES:
        steps: list[float] = []
        of_all = math.nan if known is tested else calibrated(known, rule)
        covered: dict[str, list[bool]] = {}
        for group in groups:
            rest = [history for history in known if history.group != group]
            threshold = calibrated(rest, rule) if known is tested else of_all
            for history in (history for history in tested if history.group == group):
                at = end(history, rule, threshold)
                steps.append(float(history.steps[at]))
                covered.setdefault(group, []).append(bool(history.errors[at] <= 1))
        mean = float(np.mean(steps))
        proven = mean if rule == "proven" else proven
        worst = min(groups, key=lambda group: np.mean(covered[group]))
        yield [
            label, f"{tolerance:.0%}", rule, f"{mean:.1f}", f"{hindsight:.1f}", f"{1 - mean / proven:.0%}",
            f"{np.mean(np.concatenate(list(covered.values()))):.1%}", f"{np.mean(covered[worst]):.0%} ({worst})",
        ]  # fmt: skip


def _settled(history: History) -> int:
    """Return the number of steps after which the error stays within the tolerance, or the last one."""
    missed = np.flatnonzero(~(history.errors <= 1))
    return int(history.steps[min(missed[-1] + 1, len(history.steps) - 1)]) if len(missed) else 2


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, help="folder with trainings, each with saved spectra below hesd/")
    parser.add_argument("--seeds", type=int, default=20, help="start vectors (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to test the program")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds, cap, starts, long = (2, 20, 2, 60) if args.quick else (args.seeds, 200, 10, 150)
    synthetic = list(synthetic_runs(seeds, cap, 4 if args.quick else None))
    networks = list(itertools.islice(network_spectra(starts, long), 3 if args.quick else None))
    recorded = [] if args.records is None else list(recorded_spectra(args.records))
    table: list[list[str]] = []
    left_out = 0
    for tolerance in TOLERANCES:
        populations = {"synthetic": synthetic}
        left_out = 0
        for label, spectra in (("networks", networks), ("recorded", recorded)):
            runs, number = runs_of(spectra, tolerance)
            populations |= {label: runs} if runs else {}
            left_out += number
        found = {label: [_history(run, tolerance) for run in runs] for label, runs in populations.items()}
        for (source, known), (target, tested) in itertools.product(found.items(), repeat=2):
            new = list(rows(source if source == target else f"{source} on {target}", tolerance, known, tested))
            table += new if source == target else new[1:]
            for cells in new:
                print(*cells, sep=", ", flush=True)
    explanation = EXPLANATION.format(
        rules="\n".join(f"- *{rule}*: {words}" for rule, words in RULES.items()), seeds=seeds, starts=starts,
        num_spectra=len({run.group for run in synthetic}), num_records=len(recorded), left_out=left_out,
    )  # fmt: skip
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in (HEADER, ["---"] * len(HEADER), *table))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "calibrated_intervals.md").write_text(
        f"# Calibrated intervals\n\n{explanation}\n{lines}\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
