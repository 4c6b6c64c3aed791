"""Time of whole trainings with the callback, over the time of the same training without it.

python -m benchmarks.overhead            # about twenty minutes on a quiet core
python -m benchmarks.overhead --quick --out /tmp/bench
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import networks, problems
from examples.paper_hesd.networks import ViT, resnet
from lightning_hesd import HessianSpectrumCallback, SharpnessMonitor
from lightning_hesd.numerics.inputs.options import AnalysisOptions
from lightning_hesd.spectra.scalars import as_factor
from lightning_hesd.training.callback import DEFAULT_NUM_SAMPLES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXPLANATION = """\
Trainings of {epochs} epochs with AdamW and the Trainer's TensorBoard logger, one CPU thread, CPU times, medians
of {rounds} rounds in which all variants alternate. Analyses of {num_samples} samples, with {steps} steps at most. The
digits are 1024 images of 8×8 pixels, the text 512 sequences of 64 characters. A cell has the time of the whole training
over that without callback: 2× takes twice as long. Behind it: the number of analyses, and of Hessian-vector products in
each on average. The first analysis runs in any case. The networks are small and their training is short, so that
analyses cost many times as much: compare the columns, or let the line after the first analysis of your own training
say what it costs there. `SharpnessMonitor` takes 128 samples, and measures after 1, 2, 4, ..., 64, 100, 200, ... steps.
"""

VARIANTS: dict[str, Callable[..., HessianSpectrumCallback | SharpnessMonitor]] = {
    "defaults": HessianSpectrumCallback,
    "`tolerance=0.05`": partial(HessianSpectrumCallback, tolerance=0.05),
    "`max_overhead=0.1`": partial(HessianSpectrumCallback, max_overhead=0.1),
    "`SharpnessMonitor()`": SharpnessMonitor,
}


@dataclass(frozen=True)
class Training:
    """A network and its data.

    Attributes:
        title: Name in the table.
        build: Makes the network.
        data: Makes inputs and labels.
    """

    title: str
    build: Callable[[], nn.Module]
    data: Callable[[torch.Generator], problems.Batch]


def digits(generator: torch.Generator) -> problems.Batch:
    """Return the 8×8 digits as images with one channel."""
    images, labels = problems.small_digits(generator)
    return images.view(-1, 1, 8, 8), labels


TRAININGS = {
    "resnet": Training("digits, ResNet", lambda: resnet(1, 10, width=16, blocks=1), digits),
    "vit": Training("digits, ViT", lambda: ViT(1, 16, 10, width=64, depth=3, heads=4, patch=2), digits),
    "gpt": Training(
        "text, GPT",
        lambda: networks.GPT(len(problems.CHARACTERS), problems.CONTEXT, width=64, depth=2, heads=4),
        problems.text,
    ),
}


class Module(pl.LightningModule):
    """A network with a cross-entropy."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: problems.Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the mean cross-entropy."""
        loss = F.cross_entropy(self.network(batch[0]), batch[1].flatten())
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainings", nargs="+", default=list(TRAININGS), choices=TRAININGS)
    parser.add_argument("--epochs", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to test the program")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # that analyses take longer than the training is in the table
    size = None
    options: dict[str, Any] = {"num_samples": DEFAULT_NUM_SAMPLES, "steps": AnalysisOptions.steps}
    if args.quick:
        args.epochs, args.rounds, options = 2, 1, {"num_samples": 16, "steps": 5}
        size = 32
    header = ("training", "parameters", "without, s", *VARIANTS)
    rows = []
    for name in args.trainings:
        rows.append(row(TRAININGS[name], args.epochs, args.rounds, size, options))
        print(*rows[-1], sep=", ", flush=True)
    table = "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))
    args.out.mkdir(parents=True, exist_ok=True)
    explanation = EXPLANATION.format(epochs=args.epochs, rounds=args.rounds, **options)
    text = f"# Whole trainings\n\n{explanation}\n{table}\n"
    (args.out / "overhead.md").write_text(text, encoding="utf-8")


def row(training: Training, epochs: int, rounds: int, size: int | None, options: dict[str, Any]) -> list[str]:
    """Return the row of a training on all samples, or on the first ones."""
    plain: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    analyses: dict[str, str] = {}
    for _ in range(rounds):
        plain.append(seconds_of(training, epochs, size, []))
        for name, make in VARIANTS.items():
            callback = make() if make is SharpnessMonitor else make(progress=False, **options)
            seconds[name].append(seconds_of(training, epochs, size, [callback]))
            analyses[name] = analyses_of(callback)
    without = statistics.median(plain)
    cells = [f"{as_factor(statistics.median(times) / without)}{analyses[name]}" for name, times in seconds.items()]
    parameters = sum(p.numel() for p in training.build().parameters())
    return [training.title, f"{parameters:,}", f"{without:.2f}", *cells]


def seconds_of(training: Training, epochs: int, size: int | None, callbacks: Sequence[pl.Callback]) -> float:
    """Return the CPU time of a training."""
    torch.manual_seed(0)
    module = Module(training.build())
    data = TensorDataset(*(part[:size] for part in training.data(torch.Generator().manual_seed(0))))
    loader: DataLoader[Any] = DataLoader(data, batch_size=32, shuffle=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=epochs, callbacks=list(callbacks), default_root_dir=folder, accelerator="cpu",
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        started = time.process_time()
        trainer.fit(module, loader)
        return time.process_time() - started


def analyses_of(callback: HessianSpectrumCallback | SharpnessMonitor) -> str:
    """Return the number of analyses of a training, and of their products, in words."""
    if isinstance(callback, SharpnessMonitor):
        return f" ({len(callback.history)} measurements)"
    products = [record.spectrum.matvecs for record in callback.history if record.spectrum is not None]
    return f" ({len(products)} × {statistics.mean(products):.0f})" if products else " (none)"


if __name__ == "__main__":
    main()
