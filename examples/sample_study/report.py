"""The report: claims of the paper and our results, as Markdown with figures."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import platform
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

from examples.sample_study import figures
from examples.sample_study.data import features, load
from examples.sample_study.measuring import loss_fn, trained_network
from examples.sample_study.settings import DEPTH, INITIAL, INPUTS, PIXELS, STATES, SWEEPS, TRAINED, WIDTH, Run
from examples.sample_study.statements import QUANTITIES, at_initialization, follow_up, statements
from examples.sample_study.trends import logarithm, student
from examples.shared import Table, markdown
from lightning_hesd.sample_size.directions import dominant_directions
from lightning_hesd.sample_size.subspace import subspace_stabilization

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from examples.sample_study.outcomes import Outcomes
    from examples.sample_study.statements import Statement
    from lightning_hesd.sample_size.subspace import SubspaceStabilization

PACKAGES = ("lightning-hesd", "torch", "numpy", "scikit-learn")
DIRECTIONS, SIGMAS = 10, (0.01, 0.2)
INTRODUCTION = """\
Kiselev & Grabovoy (2024, [arXiv:2409.11995](https://arxiv.org/abs/2409.11995)) measure how much the mean loss L_k of
the first k samples changes with one more sample, for several widths and depths, with one network each, on MNIST and
three other data sets. This study uses scikit-learn's digits and {seeds} networks each, so every statement has an
uncertainty. The program makes every verdict from the numbers, by a rule that was fixed in advance. *Differs* holds for
this scale, and does not refute the paper.
"""
METHOD = """\
- **Data**: all 1,797 digits, 8x8, scaled into [0, 1]; the networks are trained on all of them, as in the paper.
- **Networks**: fully connected, ReLU after all layers but the last, PyTorch's initialization. No biases, as in the
  paper's formulas. Hidden sizes {widths} with {depth} hidden layers; {depths} hidden layers of size {width}. Our copy
  of the paper lacks the number of layers in the sweep of sizes, and the learning rate.
- **Training**: Adam, learning rate {learning_rate:g}, batches of {batch_size}, {epochs} epochs, {steps_taken:,} steps
  (ten epochs of the paper's 10,000 images are 1,570).
- **Features**: no pre-trained ViT was available. A convolutional network of three layers (16, 32 and 16 channels) was
  trained for {extractor_epochs} epochs to predict by how many right angles a digit is rotated (accuracy
  {extractor:.1%}), and frozen; its 64 outputs, scaled into [0, 1], are the inputs. It differs from the paper's in kind
  and size, and was trained on the same images, but not on their classes. All seeds share it.
- **Differences**: {orders} random orders for each network; c is the constant of the fit c/√(k(k + 1)), about c/k.
- **Norms**: largest absolute eigenvalue of G and H of the mean loss, by {steps} Lanczos steps, hence lower bounds.
- **Distance**: {directions} random directions from the trained weights; distances are shares of the norm of the
  weights.
- **Intervals**: 95 %, Student's, over the {seeds} seeds. They cover other initializations and batches, but not other
  data. The slopes of a sweep are fitted to each seed separately. They are not corrected for the number of statements.
"""
READING = """\
- **The exponent does not depend on the network.** L_(k+1) - L_k is the new sample's deviation from the mean divided by
  k + 1, and falls as 1/k for any losses of finite variance. Networks differ only in c, the spread of the losses over
  samples.
- **The moving average** starts at the first and largest difference, and its weight decays by 1 % per step: in the
  figures the average lies above the values for the first thousand samples. It is linear in the curves, so it keeps
  their order.
- **c and the loss**: c is the mean absolute deviation of the losses. If few samples have most of the loss, c is of the
  order of the mean loss, up to twice it (see the numbers): then comparing c compares how well networks are trained. At
  initialization all mean losses are about log 10, and c shows how much the outputs differ.
- **Depth at initialization**: PyTorch's initialization shrinks the signal in every ReLU layer, so outputs, spread of
  the losses and curvature fall exponentially with depth. The bounds contain only the largest norm, M_W, and grow.
"""
LIMITS = """\
- One small data set, one optimizer, one number of epochs: deep and narrow networks are not fully trained.
- w is not a local minimum of L_k for small k (Assumption 1), and only nearly one of L_N; Lemma 2's proof needs both.
- Theorem 1 is about every sample; the measured norms are those of the mean, which is at most the largest of these.
"""


def write(data: Outcomes, out: Path) -> Path:
    """Write report and figures, and return the report's path."""
    measured = dominant_subspace(data, out)
    drawn = {
        "differences-trained": figures.differences(data, TRAINED),
        "differences-initial": figures.differences(data, INITIAL),
        "trends": figures.tendencies(data),
        "bounds": figures.bounds(data),
        "subspace": figures.subspace(measured),
    }
    for name, figure in drawn.items():
        figure.savefig(out / f"{name}.png")
    found = [*statements(data), *(one for each in measured for one in follow_up(each))]
    before = at_initialization(data)
    parts = [
        f"# How the loss settles with the sample size\n\n{introduction(data)}",
        f"## Summary\n\n{counts(found)}\n\n{summary(found)}",
        f"## Figures\n\n{picture('differences-trained', 'As Figure 2 of the paper: means over seeds.')}",
        picture("differences-initial", "The same networks before training."),
        picture("trends", "Geometric means over seeds with 95 % intervals."),
        picture("bounds", "Left and center: measured norms and bounds. Right: Lemma 2 and one network."),
        picture("subspace", f"One trained network, {DIRECTIONS} leading directions: the quadratic model and draws."),
        f"## The same rules at initialization\n\nThe paper makes no claims about it.\n\n{summary(before)}",
        f"## How to read it\n\n{READING.strip()}",
        f"## Method\n\n{method(data, out)}",
        f"## Rules\n\n{rules([*found, *before])}",
        *(f"## Numbers, {state}\n\n{numbers(data, state)}" for state in STATES),
        f"## Limits\n\n{LIMITS.strip()}",
    ]
    path = out / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def dominant_subspace(data: Outcomes, out: Path) -> list[SubspaceStabilization]:
    """Return the follow-up paper's criterion for one trained network, at several distances from the weights."""
    study = data.study
    x, y = load(PIXELS, study.setup, out)
    _, network = trained_network(Run(PIXELS, study.width, study.depth, 0, study.setup), x, y)
    batch = x.double(), y
    directions = dominant_directions(network, [batch], loss_fn, DIRECTIONS, steps=60).directions
    orders = study.setup.orders
    return [
        subspace_stabilization(network, [batch], loss_fn, directions, sigma=sigma, orders=orders) for sigma in SIGMAS
    ]


def introduction(data: Outcomes) -> str:
    """Return the introduction, with versions and duration."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return (
        f"{INTRODUCTION.format(seeds=data.study.seeds).strip()}\n\n"
        f"- {dt.datetime.now(tz=dt.timezone.utc).date()}; Python {platform.python_version()}, {versions}\n"
        f"- {len(data.study.runs())} networks, {data.seconds / 60:.1f} minutes on one thread each"
    )


def method(data: Outcomes, out: Path) -> str:
    """Return the method of the study."""
    study = data.study
    x, _ = load(PIXELS, study.setup, out)
    fields = {**asdict(study), **asdict(study.setup)}
    fields["widths"], fields["depths"] = (", ".join(map(str, study.sizes(sweep))) for sweep in SWEEPS)
    steps_taken = study.setup.epochs * -(-len(x) // study.setup.batch_size)
    return METHOD.format(**fields, steps_taken=steps_taken, extractor=features(x, study.setup, out)[1]).strip()


def summary(found: Iterable[Statement]) -> str:
    """Return a table of statements."""
    header = ("The paper says", "Inputs", "We see", "Evidence", "Verdict")
    rows = [(s.finding.claim, s.inputs, s.seen, s.finding.evidence, f"**{s.finding.verdict}**") for s in found]
    return markdown(Table(header, rows))


def counts(found: Iterable[Statement]) -> str:
    """Return the count of each verdict."""
    given = Counter(s.finding.verdict for s in found)
    return (
        f"Of {given.total()} statements: " + ", ".join(f"{verdict} {count}" for verdict, count in given.items()) + "."
    )


def rules(found: Iterable[Statement]) -> str:
    """Return the rule of each claim, once."""
    by_claim = {s.finding.claim: s.finding.rule for s in found}
    return "\n".join(f"- {claim} *Rule: {rule}.*" for claim, rule in by_claim.items())


def picture(name: str, caption: str) -> str:
    return f"![{name}]({name}.png)\n\n*{caption}*"


def numbers(data: Outcomes, state: str) -> str:
    """Return a table of all configurations."""
    rows = []
    for inputs in INPUTS:
        for sweep in SWEEPS:
            for width, depth in data.study.configurations(sweep):
                if sweep == DEPTH and (width, depth) in data.study.configurations(WIDTH):
                    continue
                found = data.find(inputs, state, width, depth)
                geometric = {
                    name: student(logarithm([quantity(s) for s in found])) for name, quantity in QUANTITIES.items()
                }
                accuracy = student([s.numbers.accuracy for s in found])
                rate = student([s.settling.rate for s in found])
                norm = student([s.numbers.weight_norm for s in found])
                rows.append(
                    (inputs, str(width), str(depth), accuracy.shown(".3f"), rate.shown(".3f"),
                     *(geometric[name].factor() for name in ("mean loss", "c", "c/mean loss", "‖G‖", "‖H‖")),
                     norm.shown(".3g"), geometric["Theorem 1"].factor())
                )  # fmt: skip
    header = ("Inputs", "Width", "Depth", "Accuracy", "Exponent", "Mean loss", "c", "c/mean loss", "‖G‖", "‖H‖", "M_W",
              "Theorem 1")  # fmt: skip
    caption = "Means over seeds with 95 % intervals; geometric from the mean loss on, but for M_W."
    return f"{caption}\n\n{markdown(Table(header, rows))}"
