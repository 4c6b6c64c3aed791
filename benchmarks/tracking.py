"""The tracked sharpness against full analyses, and its alarm in trainings that diverge and in trainings that do not.

python -m benchmarks.tracking            # about ten minutes on one core
python -m benchmarks.tracking --seeds 1 --networks MLP --out /tmp/bench
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.one_run import NETWORKS, loss_fn
from lightning_hesd import HessianSpectrumCallback, SharpnessMonitor
from lightning_hesd.training.tracked_record import TrackedRecord, gives_alarm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
BATCH_SIZE = 64
SAMPLES = 128
FULL_SAMPLES = 512
EVERY = 30
"""Steps between two measurements of the first table."""

LANCZOS_STEPS = 40

EPOCHS_BETWEEN_ANALYSES = 5
CHANCE = math.log(10)
"""Loss of ten classes at chance."""

EXPLANATION = """\
Digits, batches of {batch}, {samples} samples of the monitor, {full} of a full analysis, float32.

## Error between analyses

{steps} steps, a measurement every {every} steps, a full analysis every {epochs} epochs, {seeds} seeds. The training is
repeated with full analyses ({lanczos} Lanczos steps) at the steps of the measurements. *Products*: mean and most per
measurement, without searches. *Tracking*: distance of tracked λ_max / λ_max of the same samples from 1, and the same
for the stability ratio. *Sampling*: the same against the λ_max of {full} samples. *Calibrated*: times the `calibration`
of the last full analysis. *Held*: the error of the λ_max of the last full analysis itself. All errors: median / 90 %
quantile / maximum.
"""

ALARMS = """\
## Alarms

{seeds} seeds, a measurement every {every} steps, no full analysis. *Ramp*: the learning rate grows by 2 % in every step
until training diverges. Others: a multiple of the learning rate of the first table, constant, for 300 steps. A training
*fails* if the mean loss of ten steps exceeds {limit:.2f} (1.5 times that of chance; the training ends there), or is
still above {stuck:.2f} in the end. *Least headroom*: median over seeds, from step 8 on. *Lead*: steps from the alarm to
the failure, median (least to most). The last columns, of successful trainings by SGD: λ_max and batch sharpness over
the stability threshold, means over the last third.
"""

RULES_COMPARED = """\
### Rules

Over all of these trainings. The monitor's rule is the first: two measurements in succession.
"""


class Training(pl.LightningModule):
    """A network that learns digits, and keeps the losses of its steps."""

    def __init__(self, net: nn.Module, optimizer: Callable[..., Optimizer], factor: Callable[[int], float]) -> None:
        """Take the network, and the factor of the learning rate as a function of the step."""
        super().__init__()
        self.net, self.optimizer, self.factor = net, optimizer, factor
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ARG002 - Lightning's signature
        """Return the loss of a batch."""
        return loss_fn(self.net, batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Keep the loss, and end a training that has diverged."""
        self.losses.append(outputs["loss"].item())
        if diverged_at(self.losses) is not None:
            self.trainer.should_stop = True

    def configure_optimizers(self) -> Any:
        """Return the optimizer with its schedule by steps."""
        optimizer = self.optimizer(self.net.parameters())
        return [optimizer], [{"scheduler": LambdaLR(optimizer, self.factor), "interval": "step"}]


@dataclass(frozen=True)
class Setup:
    """A network and its optimizer.

    Attributes:
        network: Name of the network.
        optimizer: Name of the optimizer.
        make: Makes the optimizer, with a learning rate at which training is stable.
    """

    network: str
    optimizer: str
    make: Callable[..., Optimizer]

    def train(self, seed: int, steps: int, factor: Callable[[int], float], *callbacks: pl.Callback) -> list[float]:
        """Train, and return the losses of all steps."""
        digits = load_digits()
        images, classes = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
        torch.manual_seed(seed)
        module = Training(NETWORKS[self.network][0](), self.make, factor)
        data = DataLoader(TensorDataset(images[:1500], classes[:1500]), BATCH_SIZE, shuffle=True, drop_last=True)
        with tempfile.TemporaryDirectory() as folder:
            trainer = pl.Trainer(
                accelerator="cpu",
                max_steps=steps,
                logger=False,
                callbacks=list(callbacks),
                default_root_dir=folder,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, data)
        return module.losses


def diverged_at(losses: Sequence[float]) -> int | None:
    """Return the first step at which the mean of ten losses is not finite or above 1.5 times that of chance."""
    means = [math.fsum(losses[end - 10 : end]) / 10 for end in range(10, len(losses) + 1)]
    return next((10 + at for at, mean in enumerate(means) if not mean <= 1.5 * CHANCE), None)


def failed_at(losses: Sequence[float]) -> int | None:
    """Return the step at which a training diverged, or its last step if it ended at chance; None if it succeeded."""
    is_stuck = not math.fsum(losses[-10:]) / 10 < 0.9 * CHANCE
    return diverged_at(losses) or (len(losses) if is_stuck else None)


SETUPS = [
    Setup("MLP", "SGD", lambda p: SGD(p, 0.1)),
    Setup("CNN with batch norm", "SGD, momentum 0.9", lambda p: SGD(p, 0.005, momentum=0.9)),
    Setup("attention", "Adam", lambda p: Adam(p, 0.004)),
    Setup("MLP", "Adam", lambda p: Adam(p, 0.002)),
]
"""The first three are those of the first table."""

# Error between analyses -----------------------------------------------------------------------------------------------


def tracking_errors(setup: Setup, seed: int, steps: int) -> dict[str, list[float]]:
    """Return the errors at each measurement between two full analyses, by kind."""
    monitor = SharpnessMonitor(EVERY, num_samples=SAMPLES, headroom=1e-9, on_error="raise")
    options: dict[str, Any] = {"steps": LANCZOS_STEPS, "on_error": "raise"}
    of_all: dict[str, Any] = {**options, "num_samples": FULL_SAMPLES, "batch_size": FULL_SAMPLES}  # fast on the CPU
    analyses = HessianSpectrumCallback(EPOCHS_BETWEEN_ANALYSES, **of_all)
    losses = setup.train(seed, steps, constant(1.0), analyses, monitor)
    same = HessianSpectrumCallback(
        every_n_train_steps=EVERY, num_samples=SAMPLES, preconditioner="optimizer", name="same", **options
    )
    full = HessianSpectrumCallback(every_n_train_steps=EVERY, name="full", **of_all)
    if setup.train(seed, steps, constant(1.0), same, full) != losses:
        msg = "training is another one without the monitor"
        raise AssertionError(msg)
    found: dict[str, list[float]] = {}
    tracked = {record.global_step: record for record in monitor.history}
    analyzed = {r.global_step: r.spectrum.lambda_max for r in analyses.history if r.spectrum}
    for own, other in zip(same.history, full.history, strict=True):
        record, step = tracked[own.global_step], own.global_step
        last = max((at for at in analyzed if at < step), default=None)
        if step in analyzed or last is None or own.spectrum is None or other.spectrum is None:
            continue
        lambda_max, ratio = other.spectrum.lambda_max, own.stability_ratio
        errors = {
            "tracking": record.tracked_lambda_max / own.spectrum.lambda_max,
            "ratio": math.nan if ratio is None else (record.tracked_stability_ratio or math.nan) / ratio,
            "sampling": record.tracked_lambda_max / lambda_max,
            "calibrated": record.tracked_lambda_max * (record.calibration or math.nan) / lambda_max,
            "held": analyzed[last] / lambda_max,
        }
        for kind, quotient in errors.items():
            found.setdefault(kind, []).append(abs(quotient - 1))
        found.setdefault("products", []).append(record.products)
    return found


def error_row(setup: Setup, seeds: int, steps: int) -> list[str]:
    """Return the row of a training in the first table."""
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        for kind, values in tracking_errors(setup, seed, steps).items():
            found.setdefault(kind, []).extend(values)

    def quantiles(kind: str) -> str:
        return " / ".join(f"{value:.1%}" for value in np.quantile(found[kind], [0.5, 0.9, 1.0]))

    products = found.pop("products")
    parameters = sum(p.numel() for p in NETWORKS[setup.network][0]().parameters())
    return [
        *(f"{setup.network}, {setup.optimizer}", f"{parameters:,}", str(len(products))),
        f"{statistics.fmean(products):.1f}, {max(products):.0f}",
        *map(quantiles, ("tracking", "ratio", "sampling", "calibrated", "held")),
    ]


ERROR_HEADER = (
    *("training", "parameters", "measurements", "products", "tracking, λ_max", "tracking, stability ratio"),
    *("sampling", "calibrated", "held"),
)

# Alarms ---------------------------------------------------------------------------------------------------------------

MEASURED_EVERY = 10


def constant(factor: float) -> Callable[[int], float]:
    """Return the schedule of a constant learning rate."""
    return lambda _: factor


SCHEDULES: dict[str, tuple[int, Callable[[int], float]]] = {
    "1 ×": (300, constant(1.0)),
    "4 ×": (300, constant(4.0)),
    "16 ×": (300, constant(16.0)),
    "64 ×": (300, constant(64.0)),
    "ramp": (600, lambda step: 1.02**step),
}
"""Steps and factor of the learning rate."""

RULES: dict[str, Callable[[Sequence[TrackedRecord]], bool]] = {
    "twice below 1.2": lambda records: gives_alarm(records, 1.2),
    "twice below 1": lambda records: gives_alarm(records, 1.0),
    "twice below 2": lambda records: gives_alarm(records, 2.0),
    "once below 1.2": lambda records: any((record.headroom or math.inf) < 1.2 for record in records),
}


@dataclass(frozen=True)
class Run:
    """A training with the monitor.

    Attributes:
        setup: Its network and optimizer, in words.
        schedule: Name of its schedule.
        failed: Step at which it failed; None if it succeeded.
        records: The measurements.
    """

    setup: str
    schedule: str
    failed: int | None
    records: list[TrackedRecord]

    def at_end(self) -> tuple[float, float]:
        """Return λ_max and the batch sharpness over the stability threshold, means over the last third."""
        last = [record for record in self.records[-len(self.records) // 3 :] if record.tracked_stability_ratio]
        ratios = [record.tracked_stability_ratio or math.nan for record in last]
        batch = [
            ratio * (record.batch_sharpness or math.nan) / record.tracked_lambda_max
            for ratio, record in zip(ratios, last, strict=True)
        ]
        return statistics.fmean(ratios), statistics.fmean(batch)

    def alarm(self, rule: str) -> int | None:
        """Return the step of the alarm by a rule; None without one."""
        counts = range(1, len(self.records) + 1)
        return next((self.records[n - 1].global_step for n in counts if RULES[rule](self.records[:n])), None)


def alarm_runs(setup: Setup, seeds: int) -> list[Run]:
    """Train by all schedules."""
    runs = []
    for name, (steps, factor) in SCHEDULES.items():
        for seed in range(seeds):
            monitor = SharpnessMonitor(MEASURED_EVERY, num_samples=SAMPLES, headroom=1e-9)
            losses = setup.train(seed, steps, factor, monitor)
            runs.append(Run(f"{setup.network}, {setup.optimizer}", name, failed_at(losses), list(monitor.history)))
        print(runs[-1].setup, name, [run.failed for run in runs[-seeds:]], flush=True)
    return runs


def leads(runs: Sequence[Run], rule: str) -> list[int]:
    """Return how many steps before the failure a rule gave an alarm, for the runs that failed and had one before."""
    found = [(run.failed, run.alarm(rule)) for run in runs]
    return [failed - alarm for failed, alarm in found if failed is not None and alarm is not None and alarm < failed]


def alarm_row(runs: Sequence[Run]) -> list[str]:
    """Return the row of the runs of a training with one schedule."""
    rule = next(iter(RULES))
    failed, fine = [run for run in runs if run.failed is not None], [run for run in runs if run.failed is None]
    lead = leads(failed, rule)
    rooms = [
        min((r.headroom for r in run.records if r.headroom and r.global_step >= 8), default=math.nan) for run in runs
    ]
    ends = [run.at_end() for run in fine if "SGD" in run.setup]
    return [
        *(runs[0].setup, runs[0].schedule, f"{len(failed)} of {len(runs)}", f"{statistics.median(rooms):.2g}"),
        f"{len(lead)} of {len(failed)}" if failed else "",
        f"{statistics.median(lead):.0f} ({min(lead)} to {max(lead)})" if lead else "",
        f"{sum(run.alarm(rule) is not None for run in fine)} of {len(fine)}" if fine else "",
        *([f"{statistics.fmean(values):.2f}" for values in zip(*ends, strict=True)] or ["", ""]),
    ]


ALARM_HEADER = (
    *("training", "learning rate", "failed", "least headroom", "alarm before failure", "lead, steps"),
    *("alarm without failure", "λ_max / threshold", "batch sharpness / threshold"),
)


def rule_row(rule: str, runs: Sequence[Run]) -> list[str]:
    """Return the row of a rule over all runs: of the first schedule, of ramps, and of the others."""
    failed, fine = [run for run in runs if run.failed is not None], [run for run in runs if run.failed is None]
    healthy = [run for run in fine if run.schedule == "1 ×"]
    others = [run for run in fine if run.schedule != "1 ×"]
    lead = leads(failed, rule)
    return [
        *(rule, f"{len(lead)} of {len(failed)}", f"{statistics.median(lead):.0f}" if lead else ""),
        *(f"{sum(run.alarm(rule) is not None for run in some)} of {len(some)}" for some in (healthy, others)),
    ]


RULE_HEADER = ("rule", "alarm before failure", "lead, steps", "alarm, 1 ×", "alarm, faster and successful")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    setups = [setup for setup in SETUPS if setup.network in given.networks]
    errors = []
    for setup in [setup for setup in SETUPS[:3] if setup in setups]:
        errors.append(error_row(setup, given.seeds, given.steps))
        print(" | ".join(errors[-1]), flush=True)
    runs = [run for setup in setups for run in alarm_runs(setup, given.seeds)]
    groups = [runs[at : at + given.seeds] for at in range(0, len(runs), given.seeds)]
    numbers = {
        "batch": BATCH_SIZE,
        "samples": SAMPLES,
        "full": FULL_SAMPLES,
        "steps": given.steps,
        "seeds": given.seeds,
    }
    limits = {"limit": 1.5 * CHANCE, "stuck": 0.9 * CHANCE, "every": MEASURED_EVERY, "seeds": given.seeds}
    parts = [
        "# Tracked sharpness",
        EXPLANATION.format(**numbers, every=EVERY, epochs=EPOCHS_BETWEEN_ANALYSES, lanczos=LANCZOS_STEPS),
        table(ERROR_HEADER, errors),
        ALARMS.format(**limits),
        table(ALARM_HEADER, [alarm_row(group) for group in groups]),
        RULES_COMPARED,
        table(RULE_HEADER, [rule_row(rule, runs) for rule in RULES]),
    ]
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "tracking.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")


if __name__ == "__main__":
    main()
