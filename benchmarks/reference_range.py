"""The table that spectra are compared with, and how often it calls healthy networks and planted faults unusual.

python -m benchmarks.reference_range                     # about half an hour on a quiet core; goes on where it stopped
python -m benchmarks.reference_range --quick --out /tmp/bench
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks import planted_faults
from benchmarks.reference_networks import CONFIGURATIONS, QUICK, Configuration, Size, train
from benchmarks.reference_report import Fault, Network, page
from lightning_hesd import SpectrumHistory
from lightning_hesd.spectra import reference_table
from lightning_hesd.spectra.reference_range import compare_with_reference
from lightning_hesd.spectra.reference_table import ReferenceState, phase_by_loss, quantities_of, states_text
from lightning_hesd.training.history_folder import INDEX_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning_hesd.spectra.spectrum import Spectrum

RESULTS = Path(__file__).parent / "results"
RUNS = Path(__file__).parent / ".cache" / "reference_range"
TABLE = Path(reference_table.__file__).parent / reference_table.TABLE

LEARNED = 0.5
"""Share of the loss at the start that is left at the end of a training, at most: others have not learned."""

OF_ANALYSES = {"failed", "unverified", "cost"}
"""Planted faults without another spectrum."""


def histories(
    seeds: int, size: Size, runs: Path, *, few: bool = False, trained_only: bool = False
) -> Iterator[tuple[Configuration, int, SpectrumHistory]]:
    """Train what is not in the folder yet, unless only trained networks are wanted; `few`: one of each kind.

    Yields:
        Configuration, seed and records of each network; those of one seed come before those of the next.
    """
    chosen = [c for n, c in enumerate(CONFIGURATIONS) if not few or c.kind != CONFIGURATIONS[n - 1].kind]
    for seed, configuration in itertools.product(range(seeds), chosen):
        folder = runs / f"{configuration.name}-{seed}"
        if not (folder / INDEX_NAME).exists():
            if trained_only:
                continue
            train(configuration, seed, size).save(folder)
            print(configuration.words, f"seed {seed}", flush=True)
        yield configuration, seed, SpectrumHistory.load(folder)


def states_of(
    configuration: Configuration, seed: int, history: SpectrumHistory
) -> list[tuple[ReferenceState, Spectrum]]:
    """Return the last state of each phase of a training, with its spectrum."""
    start = start_loss(history)
    found: dict[str, tuple[ReferenceState, Spectrum]] = {}
    for record in history:
        spectrum = record.spectrum
        if spectrum is None:
            continue
        phase = phase_by_loss(spectrum.loss, start)
        number = CONFIGURATIONS.index(configuration)
        plain = (number, seed, configuration.architecture, spectrum.dimension)
        found[str(phase)] = ReferenceState(*plain, str(phase), quantities_of(spectrum, start)), spectrum
    return list(found.values())


def start_loss(history: SpectrumHistory) -> float:
    """Return the loss before the first step."""
    first = history[0].spectrum
    return math.nan if first is None else first.loss


def faults(size: planted_faults.Size, states: Sequence[ReferenceState]) -> Iterator[Fault]:
    """Train with planted faults, and without.

    Yields:
        How the last record of each training compares with the table.
    """
    cases = [case for case in planted_faults.FAULTS if case.key not in OF_ANALYSES]
    for case in (*cases, *planted_faults.HEALTHY):
        for seed in range(size.seeds):
            history = planted_faults.train(case, seed, size)
            start, last = start_loss(history), history[-1].spectrum
            if last is None:
                continue
            compared = compare_with_reference(last, start_loss=start, states=states)
            print(case.name, compared.sentence, flush=True)
            yield Fault(case.name, case.key, compared)


def main() -> None:
    """Train, and write the table and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="networks of each configuration (default: %(default)s)")
    parser.add_argument("--runs", type=Path, help=f"folder of the trainings (default: {RUNS}, OUT/runs with --quick)")
    parser.add_argument("--table", type=Path, help=f"default: {TABLE}, in OUT with --quick")
    parser.add_argument("--trained-only", action="store_true", help="take the networks trained so far, train no more")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to test the program")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = QUICK if args.quick else Size()
    runs = args.runs or (args.out / "runs" if args.quick else RUNS)
    target = args.table or (args.out / reference_table.TABLE if args.quick else TABLE)
    found = histories(args.seeds, size, runs, few=args.quick, trained_only=args.trained_only)
    networks: list[Network] = []
    left_out: list[Network] = []
    for configuration, seed, history in found:
        states = states_of(configuration, seed, history)
        losses = np.array([record.spectrum.loss for record in history if record.spectrum is not None])
        network = Network(configuration, seed, states, float(losses[-1] / losses[0]))
        (networks if args.quick or network.loss_left <= LEARNED else left_out).append(network)
    table = [state for network in networks for state, _ in network.states]
    args.out.mkdir(parents=True, exist_ok=True)
    target.write_text(states_text(table), encoding="utf-8")
    size_of_faults = planted_faults.QUICK if args.quick else planted_faults.Size(seeds=2, samples=256, analyses=2)
    read = reference_table.read_states(target.read_text(encoding="utf-8"))
    text = page(networks, left_out, read, list(faults(size_of_faults, read)), size)
    (args.out / "reference_range.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
