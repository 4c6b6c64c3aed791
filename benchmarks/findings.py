"""Which findings planted faults raise, and which healthy trainings raise.

python -m benchmarks.findings                                     # about ten minutes on a quiet core
python -m benchmarks.findings --recorded runs/rules               # and trainings of `python -m examples.rule_study`
python -m benchmarks.findings --quick --out /tmp/bench
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.problems import small_digits
from examples.rule_study.training import DONE
from examples.shared import Table, markdown, quiet, silent_trainer
from lightning_hesd import HessianSpectrumCallback, SpectrumHistory
from lightning_hesd.spectra.finding_kinds import KINDS
from lightning_hesd.spectra.findings import findings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning_hesd.spectra.record import SpectrumRecord

RESULTS = Path(__file__).parent / "results"
EXPLANATION = """\
Small networks learn 1,024 of scikit-learn's digits, with {seeds} seeds for each row; {samples} samples and {steps}
Lanczos steps in {analyses} analyses, unless the fault is there, with standard errors from the sample and the
preconditioner of the optimizer. A cell says in how many trainings a finding was raised at the end, with its confidence
(c: certain, l: likely, h: hint); dots mean none. **Bold** is the finding that the fault should raise. The thresholds
were chosen with the first two tables in sight; the third one, of other seeds, was made once, after that. Of {healthy}
healthy trainings each, {without} and {without_later} have no finding.
"""
RECORDED = """\
## Recorded trainings

{count} trainings of the [study of checkpoint rules](../../examples/rule_study) (an MLP, a ResNet and a ViT on digits;
AdamW with a constant learning rate, a cosine schedule, or four times as long; 256 samples, 30 steps, 12 analyses),
without a planted fault; {without} of them have no finding at the end. The last column counts trainings that had a
finding after any of their analyses. small_sample is never raised here: these records lack the resampled extremes that
it takes.
"""

HEADINGS = [key.replace("_", " ") for key in KINDS]
"""Headings of columns, which browsers break at spaces."""

Optimizer = Callable[[Any], torch.optim.Optimizer]


def sgd(lr: float, momentum: float = 0.0) -> Optimizer:
    """Return a function that makes the optimizer of parameters."""
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum)


def adam(lr: float) -> Optimizer:
    """Return a function that makes the optimizer of parameters."""
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def perceptron(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return a perceptron with two hidden layers, 3,500 parameters."""
    return nn.Sequential(nn.Linear(64, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 10))


def smooth() -> nn.Sequential:
    """Return the same with tanh."""
    return perceptron(nn.Tanh)


def convolutional() -> nn.Sequential:
    """Return two convolutions with batch normalization, 3,000 parameters."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 10)),
    )


@dataclass(frozen=True)
class Case:
    """A training, healthy or with a fault.

    Attributes:
        name: The fault, or network and optimizer.
        key: Finding that the fault should raise; None: a healthy training.
        network: Makes the network.
        optimizer: Makes the optimizer.
        epochs: Number of epochs.
        batch: Samples of a batch; None: all in one.
        analysis: Options of the callback that differ from the usual ones.
        rescaled: Whether the second layer is divided by 30 before the last epoch, and the third one multiplied by it,
            which changes no output; training stops then.
        costly: Whether analyses are taken for long and expensive ones, which these are not.
    """

    name: str
    key: str | None = None
    network: Callable[[], nn.Module] = perceptron
    optimizer: Optimizer = field(default_factory=lambda: adam(3e-3))
    epochs: int = 24
    batch: int | None = 64
    analysis: dict[str, Any] = field(default_factory=dict)
    rescaled: bool = False
    costly: bool = False


class Square(torch.autograd.Function):
    """x², with a second derivative of 3 in place of 2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Square."""
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return a derivative with the right value and a wrong derivative."""
        (x,) = ctx.saved_tensors
        return grad * (3 * x - x.detach())


def cross_entropy(module: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return the loss of training."""
    return F.cross_entropy(module(batch[0]), batch[1])


def wrong_second_derivative(module: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return a loss whose second derivative by autograd is wrong."""
    square: Tensor = Square.apply(module(batch[0]))  # type: ignore[no-untyped-call]
    return F.cross_entropy(module(batch[0]), batch[1]) + square.mean()


def no_gradient(module: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return a loss whose gradient lacks a part."""
    hidden: Tensor = (module(batch[0]) ** 2).mean().detach()
    return cross_entropy(module, batch) + hidden


def failing(module: nn.Module, batch: list[Tensor]) -> Tensor:
    """Raise an error in the second half of training.

    Raises:
        OSError: From the middle of training on.
    """
    if isinstance(module, Classifier) and module.current_epoch >= module.case.epochs // 2:
        msg = "the file of the samples is gone"
        raise OSError(msg)
    return cross_entropy(module, batch)


def concave(module: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return a loss with strong negative curvature in one layer."""
    layer: Any = dict(module.named_parameters())["network.2.weight"]
    loss: Tensor = cross_entropy(module, batch) - 100 * layer.square().sum()
    return loss


FAULTS = (
    Case("an analysis that raises", "failed", analysis={"loss_fn": failing}),
    Case(
        "a wrong second derivative", "unverified",
        analysis={"loss_fn": wrong_second_derivative, "strategy": "recompute"},
    ),
    Case("a part of the loss without gradient", "unverified", analysis={"loss_fn": no_gradient}),
    Case("three Lanczos steps", "short_run", analysis={"steps": 3}),
    Case("32 samples", "small_sample", analysis={"num_samples": 32}),
    Case("untrained weights", "mainly_negative", optimizer=sgd(1e-6)),
    Case("negative curvature in one layer", "mainly_negative", analysis={"loss_fn": concave}),
    Case(
        "large steps of gradient descent", "edge_of_stability", optimizer=sgd(0.3), epochs=400,
        batch=None,
    ),
    Case("excessive training", "quasi_singular", optimizer=adam(1e-2), epochs=240),
    Case("a layer scaled by 30", "concentrated", rescaled=True),
    Case("a tiny learning rate", "headroom", optimizer=sgd(1e-4, 0.9), epochs=60),
    Case("analyses that cost three trainings", "cost", costly=True),
)  # fmt: skip

HEALTHY = tuple(
    Case(f"{name}, {words}", network=network, optimizer=optimizer)
    for name, network in (("ReLU", perceptron), ("tanh", smooth), ("convolutions", convolutional))
    for words, optimizer in (("SGD with momentum", sgd(0.05, 0.9)), ("Adam", adam(3e-3)))
)


class Classifier(pl.LightningModule):
    """A network that learns digits."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.network = case.network()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (images, 10)."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Return the mean loss."""
        return cross_entropy(self, batch)

    def on_train_epoch_start(self) -> None:
        """Scale layers before the last epoch, and stop training, if the case asks for it."""
        if not self.case.rescaled or self.current_epoch < self.case.epochs - 1:
            return
        parameters: dict[str, Any] = dict(self.network.named_parameters())
        with torch.no_grad():
            for name, factor in (("2.weight", 1 / 30), ("2.bias", 1 / 30), ("4.weight", 30)):
                parameters[name].mul_(factor)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the case."""
        return self.case.optimizer(self.parameters())


@dataclass(frozen=True)
class Size:
    """How much is trained and analyzed."""

    seeds: int = 4
    samples: int = 512
    steps: int = 30
    analyses: int = 8
    share: int = 1
    """Divisor of the numbers of epochs."""


QUICK = Size(seeds=1, samples=64, steps=6, analyses=3, share=8)


def train(case: Case, seed: int, size: Size) -> SpectrumHistory:
    """Train, and return the records, the first one before the first step."""
    pl.seed_everything(seed, verbose=False)
    data = TensorDataset(*small_digits(torch.Generator().manual_seed(0)))
    epochs = max(case.epochs // size.share, size.analyses)
    options = {"num_samples": size.samples, "steps": size.steps, "loss_fn": None, **case.analysis}
    callback = HessianSpectrumCallback(
        epochs // size.analyses,
        at_start=True,
        sampling_error=True,
        preconditioner="optimizer",
        progress=False,
        **options,
    )
    with tempfile.TemporaryDirectory() as folder, expected_warnings():
        trainer = silent_trainer(Path(folder), max_epochs=epochs, accelerator="cpu", callbacks=[callback])
        loader = DataLoader(data, batch_size=case.batch or len(data), shuffle=case.batch is not None)
        trainer.fit(Classifier(replace(case, epochs=epochs)), loader)
    return callback.history


@contextlib.contextmanager
def expected_warnings() -> Iterator[None]:
    """Suppress the warnings of faults."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def raised(case: Case, history: Sequence[SpectrumRecord]) -> dict[str, str]:
    """Return the confidence of each finding at the end of a training, by key."""
    if not case.costly:
        return {found.key: found.confidence for found in findings(history, overhead=0.5)}
    slow = [r if r.spectrum is None else replace(r, spectrum=replace(r.spectrum, seconds=60.0)) for r in history]
    return {found.key: found.confidence for found in findings(slow, overhead=3.0)}


def cell(confidences: Sequence[str], *, is_planted: bool) -> str:
    """Return how often a finding was raised, and with which confidences."""
    if not confidences:
        return "**0**" if is_planted else "."
    letters = ", ".join(sorted({confidence[0] for confidence in confidences}))
    text = f"{len(confidences)} {letters}"
    return f"**{text}**" if is_planted else text


def recorded(case: Case, seed: int, size: Size, folder: Path) -> SpectrumHistory:
    """Return the records of a training, from its folder if it has been trained before."""
    place = folder / f"{case.name}-{seed}"
    if not place.exists():
        train(case, seed, size).save(place)
    return SpectrumHistory.load(place)


class Row(NamedTuple):
    """The row of a case.

    Attributes:
        cells: Its texts.
        words: An example of each finding.
        without: Number of trainings without findings.
    """

    cells: list[str]
    words: list[str]
    without: int


def row(case: Case, size: Size, folder: Path, first_seed: int = 0) -> Row:
    """Return the row of a case."""
    seeds = range(first_seed, first_seed + size.seeds)
    histories = [recorded(case, seed, size, folder) for seed in seeds]
    every = [raised(case, history) for history in histories]
    print(case.name, every, flush=True)
    cells = [cell([found[key] for found in every if key in found], is_planted=key == case.key) for key in KINDS]
    examples = {found.key: found for history in histories for found in findings(history)}
    words = [f"{case.name}: {found.evidence} {found.action}" for found in examples.values()]
    return Row([case.name, *cells], words, sum(not found for found in every))


def of_recorded(folder: Path) -> str:
    """Return the table of trainings that were recorded in folders <network>-<schedule>-<seed>."""
    at_end: dict[str, Counter[str]] = {}
    ever: dict[str, Counter[str]] = {}
    runs: Counter[str] = Counter()
    without = 0
    for path in sorted(folder.glob("*/hesd/index.json")):
        history = SpectrumHistory.load(path.parent)
        kind = path.parent.parent.name.rpartition("-")[0]
        if not (path.parent.parent / DONE).exists():  # still being trained
            continue
        runs[kind] += 1
        keys = {found.key for found in findings(history)}
        without += not keys
        at_end.setdefault(kind, Counter()).update(keys)
        ever.setdefault(kind, Counter()).update(
            {found.key for end in range(1, len(history) + 1) for found in findings(history[:end])}
        )
    rows = [
        [kind, str(count), *(str(at_end[kind][key] or ".") for key in KINDS), _words(ever[kind])]
        for kind, count in runs.items()
    ]
    table = Table(["trainings", "number", *HEADINGS, "at any time"], rows)
    return f"{RECORDED.format(count=sum(runs.values()), without=without)}\n{markdown(table)}\n"


def _words(counts: Counter[str]) -> str:
    return ", ".join(f"{key} {count}" for key, count in counts.items()) or "."


def main() -> None:
    """Train, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", type=Path, help="folder of recorded trainings")
    parser.add_argument("--histories", type=Path, help="folder to record the trainings in, or to read them from")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to test the program")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = QUICK if args.quick else Size()
    header = ["", *HEADINGS]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.histories or Path(temporary)
        faults, healthy = ([row(case, size, folder) for case in cases] for cases in (FAULTS, HEALTHY))
        later = [row(case, size, folder, first_seed=size.seeds) for case in HEALTHY]
    explanation = EXPLANATION.format(
        seeds=size.seeds, samples=size.samples, steps=size.steps, analyses=size.analyses,
        without=sum(each.without for each in healthy), without_later=sum(each.without for each in later),
        healthy=size.seeds * len(healthy),
    )  # fmt: skip
    parts = [
        "# Findings\n",
        explanation,
        f"## Planted faults\n\n{markdown(Table(header, [each.cells for each in faults]))}\n",
        f"## Healthy trainings\n\n{markdown(Table(header, [each.cells for each in healthy]))}\n",
        f"## Healthy trainings, other seeds\n\n{markdown(Table(header, [each.cells for each in later]))}\n",
        "## In words\n\n"
        + "\n".join(f"- {text}" for each in (*faults, *healthy, *later) for text in each.words)
        + "\n",
    ]
    if args.recorded is not None:
        parts.append(of_recorded(args.recorded))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "findings.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
