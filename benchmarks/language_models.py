"""Time and memory of HVPs of language models: with large vocabularies, with long contexts, and small ones.

python -m benchmarks.language_models            # about a minute on a quiet machine
python -m benchmarks.language_models --quick --out /tmp/bench
"""

from __future__ import annotations

import argparse
import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.isolation import PeakMemory, in_fresh_process
from benchmarks.networks import GPT
from lightning_hesd.numerics.derivatives import fast_derivatives
from lightning_hesd.numerics.derivatives.replacements import Replacements
from lightning_hesd.numerics.inputs.batches import WeightedBatch
from lightning_hesd.numerics.operators.curvature import HessianMatrix
from lightning_hesd.numerics.operators.memory import MemoryMeter

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_hesd.numerics.operators.curvature import Matvec

EXPLANATION = """\
HVPs of a GPT of width 64 with four heads, float32, one CPU thread, each row in a new process; times are the minimum of
{rounds} HVPs. *PyTorch*: plain automatic differentiation. *Kept*: bytes that the gradient's graph holds; *largest*: the
largest tensor saved for it. *Product*: peak bytes of an HVP above that. *Growth*: growth of the process from before the
loss to the end. All columns except seconds are multiples of *the unit*: the logits in the rows of vocabularies, the
scores of one head (context × context) in the others.
"""
HEADER = ("problem", "unit, MB", "by", "kept", "largest", "product", "both", "growth", "graph, s", "product, s")


@dataclass(frozen=True)
class Setting:
    """A model and its text.

    Attributes:
        name: Title of the row.
        vocabulary: Number of tokens.
        context: Length of a sequence.
        depth: Number of transformer blocks.
        sequences: Number of sequences.
    """

    name: str
    vocabulary: int
    context: int
    depth: int = 1
    sequences: int = 1

    @property
    def unit(self) -> int:
        """The unit of the row: bytes of the logits, or of a head's scores."""
        return 4 * self.context * (self.vocabulary if self.name.startswith("vocabulary") else self.context)


SETTINGS = {
    "full": (
        Setting("vocabulary 50,000, context 1,024", 50_000, 1024),
        Setting("context 4,096", 256, 4096, depth=2),
        Setting("context 1,024", 256, 1024, depth=2),
        Setting("context 512", 256, 512, depth=2, sequences=4),
        Setting("context 256", 256, 256, depth=2, sequences=8),
        Setting("context 64", 256, 64, depth=2, sequences=16),
        Setting("vocabulary 10,000, context 256", 10_000, 256),
        Setting("vocabulary 1,000, context 256", 1000, 256),
    ),
    "quick": (Setting("vocabulary 2,000, context 64", 2000, 64), Setting("context 512", 16, 512)),
}


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="products to time (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to test the program")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rows = []
    for setting in SETTINGS["quick" if args.quick else "full"]:
        for plain in (True, False):
            rows.append(row(setting, in_fresh_process(measure, setting, args.rounds, plain), plain=plain))
            print(*rows[-1], sep=", ", flush=True)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (HEADER, ["---"] * len(HEADER), *rows))
    args.out.mkdir(parents=True, exist_ok=True)
    text = f"# Language models\n\n{EXPLANATION.format(rounds=args.rounds)}\n{table}\n"
    (args.out / "language_models.md").write_text(text, encoding="utf-8")


def row(setting: Setting, found: dict[str, Any], *, plain: bool) -> list[str]:
    """Return the row of a measurement."""
    sizes = (found["kept"], found["largest"], found["product"], found["kept"] + found["product"], found["growth"])
    return [
        setting.name,
        f"{setting.unit / 1e6:.1f}",
        "PyTorch" if plain else "lightning_hesd",
        *("-" if size is None else f"{size / setting.unit:.2f}" for size in sizes),
        f"{found['graph_seconds']:.3g}",
        f"{found['product_seconds']:.3g}",
    ]


def measure(setting: Setting, rounds: int, plain: bool) -> dict[str, Any]:  # noqa: FBT001 - passed to a process
    """Return memory and time of a setting's gradient graph and of HVPs, in bytes and seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = GPT(setting.vocabulary, setting.context, width=64, depth=setting.depth, heads=4)
    ids = torch.randint(setting.vocabulary, (setting.sequences, setting.context))
    ones = [torch.ones_like(p) for p in net.parameters()]
    largest = 0

    def saved(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.untyped_storage().nbytes())
        return tensor

    by = mock.patch.dict(fast_derivatives.SLOW, clear=True) if plain else contextlib.nullcontext()
    with by, sdpa_kernel(SDPBackend.MATH):
        small = GPT(8, 8, width=16, depth=1)  # imports all modules before memory is measured
        hessian_product(small, torch.zeros(1, 8, dtype=torch.long))([torch.ones_like(p) for p in small.parameters()])
        memory = PeakMemory()
        started = time.perf_counter()
        with MemoryMeter(torch.device("cpu")) as building, torch.autograd.graph.saved_tensors_hooks(saved, _same):
            product = hessian_product(net, ids)
        graph_seconds = time.perf_counter() - started
        with MemoryMeter(torch.device("cpu")) as multiplying:
            product(ones)
        growth = memory.growth()
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            product(ones)
            times.append(time.perf_counter() - started)
    return {
        "kept": building.live or 0,
        "largest": largest,
        "product": multiplying.peak,
        "growth": growth,
        "graph_seconds": graph_seconds,
        "product_seconds": min(times),
    }


def hessian_product(net: GPT, ids: Tensor) -> Matvec:
    """Return the product with the Hessian of the loss that predicts each token's successor."""

    def loss(_: WeightedBatch) -> Tensor:
        with Replacements():
            return F.cross_entropy(net(ids), ids.roll(-1).flatten())

    return HessianMatrix(loss, list(net.parameters())).make_matvec(WeightedBatch(ids, 1.0, 0), retain=True)[1]


def _same(tensor: Tensor) -> Tensor:
    return tensor


if __name__ == "__main__":
    main()
