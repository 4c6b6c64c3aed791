"""Tables 1 to 4: types and accuracies of networks trained in different ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

from examples.paper_hesd.figures import SEED_0
from examples.paper_hesd.verdicts import (
    ALWAYS_MP,
    HIGHER,
    Section,
    always_mp,
    combined,
    counted,
    higher,
    kind,
    mn_when_trained,
    standard_error,
)
from examples.shared import Finding, Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from examples.paper_hesd.outcomes import Outcome

    Outcomes = Mapping[str, Outcome]

DIGITS, COLORED, DISTORTED = "digits", "colored digits", "distorted digits"
ENDING = ("HESD type", "Train acc., %", "Gen. acc., %")
OURS = ("HESD type", "C_t", "Train acc., %", "Gen. acc., %")
TRAINED = ("Model", "Training dataset", "Test dataset", "Optimizer")
TUNED = ("Model", "Training dataset", "Tuning dataset", "Test dataset", "Optimizer", "Frozen weights")
UNTRAINED = (-1 / 0.73, -0.73)
"""Range of C_t at random initialization: the paper reports up to -0.73, and either sign may be the larger one."""


def row(outcome: Outcome, *labels: str) -> list[str]:
    """Return the row of a network after training."""
    point, setup = outcome.last, outcome.experiment.setup
    folders = {DIGITS: setup.train_folder, COLORED: f"colored {setup.train_folder}", DISTORTED: setup.gen_folder}
    return [
        *(folders.get(label) or label if setup.train_folder else label for label in labels),
        kind(point.spectrum),
        f"{point.spectrum.c_t:.3f}",
        f"{100 * point.train_acc:.1f}",
        f"{100 * point.gen_acc:.1f}",
    ]


def table(outcomes: Outcomes, rows: Sequence[Sequence[str]], header: Sequence[str]) -> Table:
    """Return our table; a row is the name of an experiment and its labels."""
    known = [row(outcomes[name], *labels) for name, *labels in rows if name in outcomes]
    return Table((*header, *OURS), known)


def all_mp(outcomes: Outcomes, names: Sequence[str]) -> Finding:
    """Judge whether all trained networks are MP."""
    spectra = [outcomes[name].last.spectrum for name in names if name in outcomes]
    return Finding("All trained networks are MP.", ALWAYS_MP, counted(spectra), always_mp(spectra))


def better(outcomes: Outcomes, claim: str, pairs: Sequence[tuple[str, str]]) -> Finding:
    """Judge whether the first of each pair generalizes better than the second."""
    known = [(outcomes[a], outcomes[b]) for a, b in pairs if a in outcomes and b in outcomes]
    evidence = "; ".join(
        f"{a.experiment.name} {a.last.gen_acc:.1%}, {b.experiment.name} {b.last.gen_acc:.1%} "
        f"(standard error of the difference {standard_error(a, b):.1%})"
        for a, b in known
    )
    return Finding(claim, f"For every pair: {HIGHER}.", evidence, combined(higher(a, b) for a, b in known))


def optimizers(outcomes: Outcomes) -> Section:
    rows = [
        ("resnet-adamw-seed0", "ResNet", DIGITS, DISTORTED, "AdamW"),
        ("resnet-sgd-momentum", "ResNet", DIGITS, DISTORTED, "SGD mom"),
        ("vit-adamw-seed0", "ViT", DIGITS, DISTORTED, "AdamW"),
        ("vit-sgd", "ViT", DIGITS, DISTORTED, "SGD"),
        ("vit-sgd-momentum", "ViT", DIGITS, DISTORTED, "SGD mom"),
    ]
    paper = [
        ("ResNet20", "cinic", "cifar", "AdamW", "MP", "99", "55"),
        ("ResNet20", "cinic", "cifar", "SGD mom", "MP", "99", "54"),
        ("VIT small", "cinic", "cifar", "AdamW", "MP", "99", "54"),
        ("VIT small", "cinic", "cifar", "SGD", "MP", "99", "43"),
        ("VIT small", "cinic", "cifar", "SGD mom", "MP", "99", "50"),
    ]
    pairs = [("vit-adamw-seed0", "vit-sgd-momentum"), ("vit-sgd-momentum", "vit-sgd")]
    return Section(
        "Table 1. Datasets and optimizers",
        Table((*TRAINED, *ENDING), paper),
        [table(outcomes, rows, TRAINED)],
        [
            all_mp(outcomes, [name for name, *_ in rows]),
            better(outcomes, "The ViT generalizes best with AdamW, then SGD with momentum, then SGD.", pairs),
        ],
    )


def fine_tuning(outcomes: Outcomes) -> Section:
    names = {
        (optimizer, frozen): f"vit-{key}-{'frozen' if frozen == 'yes' else 'tuned'}"
        for optimizer, key in (("SGD", "sgd"), ("SGD mom", "sgd-momentum"))
        for frozen in ("no", "yes")
    }
    data = ("ViT", COLORED, DIGITS, DISTORTED)
    paper = [
        ("VIT", "1k", "cinic", "cifar", "SGD", "no", "MP", "99", "35"),
        ("VIT", "1k", "cinic", "cifar", "SGD", "yes", "MP", "84", "30"),
        ("VIT", "1k", "cinic", "cifar", "SGD mom", "no", "MP", "99", "40"),
        ("VIT", "1k", "cinic", "cifar", "SGD mom", "yes", "MP", "91", "31"),
    ]
    frozen = [outcomes[name].other("all").spectrum for (_, f), name in names.items() if f == "yes" and name in outcomes]
    return Section(
        "Table 2. Fine-tuning",
        Table((*TUNED, *ENDING), paper),
        [table(outcomes, [(name, *data, *labels) for labels, name in names.items()], TUNED)],
        [
            all_mp(outcomes, list(names.values())),
            better(
                outcomes,
                "Fine-tuning all weights generalizes better than only those of input layer and classifier.",
                [(names[optimizer, "no"], names[optimizer, "yes"]) for optimizer in ("SGD", "SGD mom")],
            ),
            Finding(
                "So are the spectra of all weights of the networks of which a part was frozen (our question).",
                ALWAYS_MP,
                counted(frozen) + "".join(f", C_t = {s.c_t:.3f}" for s in frozen if s),
                always_mp(frozen),
            ),
        ],
        notes=["The spectra are those of the weights that were trained, except in the last finding."],
    )


def augmentation(outcomes: Outcomes) -> Section:
    names = {"AdamW": "vit-adamw", "SGD": "vit-sgd", "SGD mom": "vit-sgd-momentum"}
    rows = [(f"{key}-augmented", "ViT", DIGITS, DISTORTED, name) for name, key in names.items()]
    without = {key: "vit-adamw-seed0" if key == "vit-adamw" else key for key in names.values()}
    paper = [
        ("VIT small", "cinic", "cifar", "AdamW", "MP", "99", "75"),
        ("VIT small", "cinic", "cifar", "SGD", "MP", "95", "60"),
        ("VIT small", "cinic", "cifar", "SGD mom", "MP", "97", "73"),
        ("VIT small", "1k", "iv2", "AdamW", "MP", "89", "46"),
    ]
    return Section(
        "Table 3. Augmentation",
        Table((*TRAINED, *ENDING), paper),
        [table(outcomes, rows, TRAINED)],
        [
            all_mp(outcomes, [name for name, *_ in rows]),
            better(
                outcomes,
                "Generalization accuracy increases when training data are augmented (54 to 75, 43 to 60, 50 to 73 %).",
                [(f"{key}-augmented", plain) for key, plain in without.items()],
            ),
        ],
        notes=[
            "Training accuracies are those on augmented images, here as in the analyzed loss.",
            "The row of ImageNet (1k, iv2) has no counterpart here.",
        ],
    )


def adahessian(outcomes: Outcomes) -> Section:
    rows = [
        ("vit-adamw-seed0", "ViT", DIGITS, DISTORTED, "AdamW"),
        ("vit-sgd", "ViT", DIGITS, DISTORTED, "SGD"),
        ("vit-sgd-momentum", "ViT", DIGITS, DISTORTED, "SGD mom"),
        ("vit-adahessian", "ViT", DIGITS, DISTORTED, "AdaHessian"),
    ]
    paper = [
        ("VIT small", "cinic", "cifar", "AdamW", "MP", "99", "54"),
        ("VIT small", "cinic", "cifar", "SGD", "MP", "99", "43"),
        ("VIT small", "cinic", "cifar", "SGD mom", "MP", "99", "50"),
        ("VIT small", "cinic", "cifar", "AdaHessian", "MN", "99", "49"),
    ]
    runs = [outcomes[name] for name, *_ in rows[3:] if name in outcomes]
    return Section(
        "Table 4. ViTs by optimizer",
        Table((*TRAINED, *ENDING), paper),
        [table(outcomes, rows, TRAINED)],
        [
            mn_when_trained("The ViT trained with AdaHessian is MN (at some epochs, Fig. 6).", runs),
            all_mp(outcomes, [name for name, *_ in rows[:3]]),
            better(outcomes, "AdaHessian generalizes worse than AdamW.", [("vit-adamw-seed0", "vit-adahessian")]),
        ],
    )


def initialization(outcomes: Outcomes) -> Section:
    """Judge the claims of section 2 about networks before training."""
    low, high = UNTRAINED
    found = {n: outcomes[name].start for n, name in SEED_0.items() if name in outcomes}
    findings = []
    for network, spectrum in found.items():
        if spectrum is not None:
            inside = low <= spectrum.c_t <= high
            findings.append(
                Finding(
                    f"The {network} is symmetric at random initialization, C_t from -1 to -0.73.",
                    f"agrees if C_t lies in [{low:.2f}, {high:.2f}], as either side may be the larger one",
                    f"C_t = {spectrum.c_t:.3f}",
                    "agrees" if inside else "differs",
                )
            )
    return Section(
        "Section 2. Random initialization",
        "Spectra are symmetric at random initialization: C_t is about -1, up to -0.73 for ResNet18 in evaluation mode.",
        findings=findings,
    )
