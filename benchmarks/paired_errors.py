"""Standard errors of differences between two epochs, compared with resampled data.

python -m benchmarks.paired_errors      # a quarter of an hour on two quiet cores
python -m benchmarks.paired_errors --draws 10 --networks MLP --out /tmp/bench
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from benchmarks.one_run import convolutional, loss_fn, perceptron
from examples.shared import Table, markdown
from lightning_hesd import c_t_difference, hessian_spectrum, lambda_max_difference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_hesd import PairedDifference

RESULTS = Path(__file__).parent / "results"
EXPLANATION = """\
Digits, {samples} samples drawn with replacement from all 1,797, {draws} times; float64, {steps} steps. Two states of
one training are analyzed on the same samples. *scatter*: standard deviation of the difference over the draws;
*estimate*: mean of the standard error that each draw gives by itself, with its groups of samples paired; *unpaired*:
what it would be for two different samples; *gain*: how much smaller the paired one is.
"""
HEADER = ("network", "epochs", "quantity", "difference", "scatter", "estimate", "ratio", "unpaired", "gain")
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "MLP": (perceptron, (10, 14)),
    "MLP, neighbors": (perceptron, (13, 14)),
    "CNN with batch norm": (convolutional, (4, 8)),
}
"""Network, and the epochs whose states are compared, by name."""

DIFFERENCES = {"C_t": c_t_difference, "λ_max": lambda_max_difference}


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--draws", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in args.networks for row in measure(name, args.draws, args.samples, args.steps)]
    text = EXPLANATION.format(samples=args.samples, draws=args.draws, steps=args.steps)
    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / "paired_errors.md"
    target.write_text(f"# Errors of differences\n\n{text}\n{markdown(Table(HEADER, rows))}\n")
    print(target.read_text())


def measure(name: str, draws: int, samples: int, steps: int) -> list[tuple[str, ...]]:
    """Return a row for each quantity."""
    make, epochs = NETWORKS[name]
    states = trained(make, epochs)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16), torch.tensor(digits.target)
    found: dict[str, list[PairedDifference]] = {quantity: [] for quantity in DIFFERENCES}
    generator = torch.Generator().manual_seed(1)
    for _ in range(draws):
        chosen = torch.randint(len(x), (samples,), generator=generator)
        batch = [(x[chosen], y[chosen])]
        later, earlier = (
            hessian_spectrum(net, batch, loss_fn, steps=steps, sampling_error=True) for net in reversed(states)
        )
        for quantity, difference in DIFFERENCES.items():
            found[quantity].append(difference(later, earlier))
    when = "{} and {}".format(*epochs)
    return [(name, when, quantity, *_numbers(differences)) for quantity, differences in found.items()]


def trained(make: Callable[[], nn.Module], epochs: Sequence[int]) -> list[nn.Module]:
    """Train a network, and return copies after some of the epochs."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16), torch.tensor(digits.target)
    torch.manual_seed(0)
    net = make().double()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    states = []
    for epoch in range(1, max(epochs) + 1):
        net.train()
        for chosen in torch.split(torch.randperm(1500), 50):
            optimizer.zero_grad()
            F.cross_entropy(net(x[chosen]), y[chosen]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if epoch in epochs:
            states.append(copy.deepcopy(net).eval())
    return states


def _numbers(differences: Sequence[PairedDifference]) -> tuple[str, ...]:
    values, errors, unpaired = (
        np.array([getattr(d, key) for d in differences]) for key in ("value", "standard_error", "unpaired_error")
    )
    scatter, estimate, separate = float(values.std(ddof=1)), float(errors.mean()), float(unpaired.mean())
    cells = (values.mean(), scatter, estimate, estimate / scatter, separate, separate / estimate)
    return tuple(f"{value:.3g}" for value in cells)


if __name__ == "__main__":
    main()
