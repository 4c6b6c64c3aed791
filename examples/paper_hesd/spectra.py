"""Figures 1 to 6 and section 3.4: types of spectra, and the causes of MN."""

from __future__ import annotations

from typing import TYPE_CHECKING

from examples.paper_hesd import figures
from examples.paper_hesd.figures import SEED_0
from examples.paper_hesd.verdicts import (
    ALWAYS_MP,
    MORE_OFTEN,
    OF_TRAINED,
    Section,
    always_mp,
    counted,
    kind,
    mn_when_trained,
    more_often,
)
from examples.shared import AGREES, NOT_RUN, UNSEEN, Finding

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from examples.paper_hesd.outcomes import Outcome, Point
    from examples.shared import Verdict
    from lightning_hesd import Spectrum

    Outcomes = Mapping[str, Outcome]

LEARNING_RATE_OF_ADAHESSIAN = (
    "The learning rate of AdaHessian, its default of 0.15, was chosen after 0.05, 0.15 and 0.5 had been tried on one "
    "seed: only with this rate was any epoch MN. So the findings below were made with hindsight, on one network."
)


def _known(outcomes: Outcomes, names: Mapping[str, str]) -> dict[str, Outcome]:
    return {title: outcomes[name] for title, name in names.items() if name in outcomes}


def lowest_c_t(points: Iterable[Point]) -> Point | None:
    return min(points, key=lambda point: point.spectrum.c_t, default=None)


def _mp(claim: str, spectra: Sequence[Spectrum | None]) -> Finding:
    return Finding(claim, ALWAYS_MP, counted(spectra), always_mp(spectra))


def trained_networks(outcomes: Outcomes) -> Section:
    spectra = {title: outcome.last.spectrum for title, outcome in _known(outcomes, SEED_0).items()}
    return Section(
        "Figure 1. Trained networks",
        "MP-HESDs of ResNet18 and ViT small trained on ImageNet.",
        findings=[_mp("Trained networks are MP.", list(spectra.values()))],
        figure=figures.densities(spectra) if spectra else None,
        caption="Spectra after the last epoch with AdamW.",
    )


def clipped_vit(outcomes: Outcomes) -> Section:
    clipped = [o for o in outcomes.values() if o.experiment.clip is not None]
    points = {(o.experiment.name, p.epoch): p for o in clipped for p in o.trained}
    lowest = lowest_c_t(points.values())
    where = next((f"{name}, epoch {epoch}" for (name, epoch), p in points.items() if p is lowest), "")
    evidence, figure = "no clipped network was trained", None
    if lowest is not None:
        evidence = (
            f"{counted(p.spectrum for p in points.values())}; the lowest C_t is {lowest.spectrum.c_t:.3f} ({where}, "
            f"training {lowest.train_acc:.1%}, generalization {lowest.gen_acc:.1%})"
        )
        figure = figures.densities({where: lowest.spectrum})
    found = any(kind(point.spectrum) == "MN" for point in points.values())
    verdict: Verdict = AGREES if found else UNSEEN if clipped else NOT_RUN
    return Section(
        "Figure 2. An MN-HESD",
        "MN-HESD of a ViT for ImageNet (88 % training, 82 % generalization accuracy) whose gradients were clipped.",
        findings=[
            Finding(
                "A well trained ViT can be MN.",
                f"{OF_TRAINED} of ViTs trained with clipped gradients: agrees if one is MN with all of its C_t "
                "interval; else it cannot be seen, because the claim is about one network that we do not have",
                evidence,
                verdict,
            )
        ],
        figure=figure,
        caption="The trained and clipped ViT with the lowest C_t. From as many steps as that needs, hence coarse.",
    )


def throughout_training(outcomes: Outcomes) -> Section:
    runs = _known(outcomes, {"ResNet, AdamW": SEED_0["ResNet"], "ViT, SGD with momentum": "vit-sgd-momentum"})
    findings = [
        _mp(f"{title}: MP at every epoch.", [p.spectrum for p in outcome.points]) for title, outcome in runs.items()
    ]
    return Section(
        "Figure 3. C_t during training",
        "C_t of ResNet18 (AdamW) and ViT small (SGD with momentum) lies above -0.6 at every epoch.",
        findings=findings,
        figure=figures.c_t_curves(runs) if runs else None,
        caption="C_t with its 95 % interval, hardly larger than the points where it is not seen; dashed: the threshold "
        "of -0.6.",
    )


def fine_tuned(outcomes: Outcomes) -> Section:
    names = {"all weights": "vit-sgd-momentum-tuned", "input layer and classifier": "vit-sgd-momentum-frozen"}
    runs = _known(outcomes, names)
    spectra = {title: outcome.last.spectrum for title, outcome in runs.items()}
    verdict: Verdict = NOT_RUN
    evidence = ""
    if len(spectra) == 2:
        (low, high), (other_low, other_high) = (spectrum.c_t_interval for spectrum in spectra.values())
        verdict = AGREES if high < other_low or other_high < low else UNSEEN
        evidence = "; ".join(f"{t}: C_t = {s.c_t:.3f}, λ_max = {s.lambda_max:.3g}" for t, s in spectra.items())
        whole = runs["input layer and classifier"].other("all").spectrum
        if whole is not None:
            spectra["frozen ones included"] = whole
    return Section(
        "Figure 4. Fine-tuned networks",
        "HESDs differ when pre-trained weights are frozen, compared to full fine-tuning.",
        findings=[
            Finding(
                "The spectra differ.",
                "agrees if their C_t intervals are disjoint, else unseen",
                evidence,
                verdict,
            )
        ],
        figure=figures.densities(spectra) if spectra else None,
        caption="ViT fine-tuned by SGD with momentum: all weights; only input layer and classifier, and the spectrum "
        "of these; the same network, and the spectrum of all its weights.",
    )


def resnet_adahessian(outcomes: Outcomes) -> Section:
    outcome = outcomes.get("resnet-adahessian")
    spectra = [p.spectrum for p in outcome.points] if outcome else []
    return Section(
        "Figure 5. ResNet with AdaHessian",
        "MP-HESD of ResNet20 trained with AdaHessian, and C_t above -0.6 at every epoch.",
        findings=[_mp("MP at every epoch.", spectra)],
        figure=figures.density_and_curve({"last epoch": outcome.last.spectrum}, outcome) if outcome else None,
    )


def vit_adahessian(outcomes: Outcomes) -> Section:
    outcome, *others = (outcomes.get(f"vit-{name}") for name in ("adahessian", "adahessian-unaveraged", "adamw-dense"))
    findings = [mn_when_trained("MN at some epochs.", [outcome] if outcome else [])]
    for claim, control in zip(
        (
            "Averaging over the hidden dimension is what makes it MN (section 3.4).",
            "AdaHessian is what makes it MN: with AdamW it is not.",
        ),
        others,
        strict=True,
    ):
        with_it, without = ([p.spectrum for p in o.trained] if o else [] for o in (outcome, control))
        findings.append(
            Finding(
                claim,
                f"{OF_TRAINED}: {MORE_OFTEN}",
                f"with {counted(with_it)}; without {counted(without)}",
                more_often(with_it, without) if outcome and control else NOT_RUN,
            )
        )
    figure = None
    if outcome:
        points = outcome.trained or outcome.points
        high, low = max(points, key=lambda p: p.spectrum.c_t), min(points, key=lambda p: p.spectrum.c_t)
        spectra = {f"epoch {p.epoch}": p.spectrum for p in (high, low)}
        figure = figures.density_and_curve(spectra, outcome, *(o for o in others if o))
    return Section(
        "Figure 6. ViT with AdaHessian",
        "ViT trained with AdaHessian: MP at epoch 86, MN at epoch 87; C_t falls below -0.6 at many epochs.",
        findings=findings,
        figure=figure,
        caption="The trained epochs with the highest and with the lowest C_t; and C_t over all epochs, beside that of "
        "AdaHessian without averaging and of AdamW. Spectra from as many steps as C_t needs, hence coarse.",
        notes=[LEARNING_RATE_OF_ADAHESSIAN],
    )
