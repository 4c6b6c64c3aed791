"""The checkpoint rules, which rank the analyzed states of a run. New ones are entered in `RULES` and `RuleName`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning_hesd.spectra.differences import are_comparable, c_t_difference, lambda_max_difference
from lightning_hesd.spectra.record import RECORDED_BY, VALIDATION_LOSSES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lightning_hesd.spectra.differences import PairedDifference
    from lightning_hesd.spectra.record import SpectrumRecord
    from lightning_hesd.spectra.spectrum import Spectrum


@dataclass(frozen=True)
class CheckpointRule:
    """A rule that ranks records by a criterion.

    Attributes:
        name: Name in the code, in configurations and in names of files.
        title: Name in sentences, such as "highest C_t".
        short_title: Name in cells of a table.
        criterion: Function of the fields in `needs`; the record with the highest value wins.
        needs: Fields or properties of the record that the criterion is computed from, in the order of its arguments.
        scalar: Key of the scalar that the criterion is made from: charts of this scalar mark the picks.
        marker: Matplotlib's code of the mark of a pick.
        difference: Function of two spectra on the same samples that returns the difference of the scalar and its error;
            None: the errors of this rule are not known.
        is_baseline: Whether it is a usual choice that knows nothing of curvature: other rules are compared with it.
        is_shown: Whether summaries, figures and the tab show what it would pick, even if no callback uses it.
    """

    name: str
    title: str
    short_title: str
    criterion: Callable[..., float]
    needs: tuple[str, ...] = ("spectrum",)
    scalar: str | None = None
    marker: str = "D"
    difference: Callable[[Spectrum, Spectrum], PairedDifference] | None = None
    is_baseline: bool = False
    is_shown: bool = True

    def score(self, record: SpectrumRecord) -> float:
        """Return the criterion of a record, higher is better; NaN if the record lacks a field that the rule needs."""
        found: list[Any] = [getattr(record, field) for field in self.needs]
        return math.nan if any(value is None for value in found) else float(self.criterion(*found))

    def rivals(self, pick: SpectrumRecord, records: Iterable[SpectrumRecord]) -> list[SpectrumRecord]:
        """Return the records, the pick left out, whose criterion is not evidently different from the pick's.

        Empty, too, where that cannot be told: it takes the sampling errors of both (`sampling_error=True`).
        """
        best = pick.spectrum
        if self.difference is None or best is None:
            return []
        found: list[SpectrumRecord] = []
        for record in records:
            other = record.spectrum
            if record is pick or other is None or not are_comparable(best, other):
                continue
            if not self.difference(best, other).is_evident:
                found.append(record)
        return found

    def complaint(self, record: SpectrumRecord) -> str | None:
        """Return what the rule needs that the run does not record, and what to do; None if a record lacks nothing.

        None also for a record of which a part failed: its `error` says what is missing.
        """
        missing = next((field for field in self.needs if getattr(record, field) is None), None)
        if missing is None or record.error is not None:
            return None
        if missing == "validation_loss":
            remedy = f"Log it as {VALIDATION_LOSSES[0]!r} in a validation that runs right before the analysis"
        else:
            remedy = f"Pass `{RECORDED_BY.get(missing, missing)}` to HessianSpectrumCallback, which records it"
        return (
            f"the rule {self.name!r} does not rank the analysis of epoch {record.epoch}, nor later ones like it: it "
            f"needs `{missing}`, which the record lacks. {remedy}, or choose another rule."
        )


def _scaled(value: float, spectrum: Spectrum) -> float:
    """Return a quantity of curvature times the squared norm of the weights, NaN if that is unknown."""
    return value * (math.nan if spectrum.squared_weight_norm is None else spectrum.squared_weight_norm)


def relative_flatness(spectrum: Spectrum) -> float:
    """Return Σ ‖w_l‖² tr H_l over layers l; NaN if the spectrum has no values of layers.

    The relative flatness of Petzka et al. (2021, arXiv:2001.00939), summed over layers, without the terms between
    neurons of a layer. It stays the same when a ReLU network is rescaled from layer to layer.
    """
    terms = [layer.squared_norm * layer.trace for layer in spectrum.by_layer.values()]
    return sum(terms) if terms else math.nan


_PAPER = (
    CheckpointRule(
        "highest_c_t",
        "highest C_t",
        "C_t",
        lambda spectrum: spectrum.c_t,
        scalar="c_t",
        marker="^",
        difference=c_t_difference,
    ),
    CheckpointRule(
        "lowest_max_eigenvalue",
        "lowest λ_max",
        "λ_max",
        lambda spectrum: -spectrum.lambda_max,
        scalar="lambda_max",
        marker="v",
        difference=lambda_max_difference,
    ),
)
"""The rule of Gabdullin (2025), section 4.2, and the one it is compared with there."""


def _further(name: str, title: str, criterion: Callable[..., float], *needs: str) -> CheckpointRule:
    short_title = title.removeprefix("lowest ")
    return CheckpointRule(name, title, short_title, criterion, needs or ("spectrum",), is_shown=False)


_FURTHER = (
    # Measures of flatness in use: see Jiang et al. (2020, arXiv:1912.02178) and Andriushchenko et al. (2023,
    # arXiv:2302.07011), which find little in them.
    _further("lowest_trace", "lowest trace", lambda spectrum: -spectrum.trace),
    # Scaling all weights of a network with norms by c divides its curvature by c² (Dinh et al. 2017, arXiv:1703.04933).
    _further(
        "lowest_scaled_max_eigenvalue", "lowest λ_max·‖w‖²", lambda spectrum: -_scaled(spectrum.lambda_max, spectrum)
    ),
    _further("lowest_scaled_trace", "lowest trace·‖w‖²", lambda spectrum: -_scaled(spectrum.trace, spectrum)),
    _further("lowest_relative_flatness", "lowest relative flatness", lambda spectrum: -relative_flatness(spectrum)),
    # Criteria of Gabdullin (2025), sections 3.4 and 4.3, that the paper does not use to pick checkpoints.
    _further("lowest_k_h05", "lowest K_H05", lambda spectrum: math.nan if spectrum.tolerance else -spectrum.k_h(0.5)),
    _further("lowest_delta_r_e", "lowest Δr_e", lambda assessment: -assessment.delta_r_e, "assessment"),
    # Sharpness as the optimizer meets it (Cohen et al. 2022, arXiv:2207.14484).
    _further(
        "lowest_preconditioned_max_eigenvalue",
        "lowest preconditioned λ_max",
        lambda spectrum: -spectrum.lambda_max,
        "preconditioned",
    ),
)

_BASELINES = tuple(
    CheckpointRule(name, title, title, criterion, needs, is_baseline=True, is_shown=False)
    for name, title, criterion, needs in (
        ("last", "last epoch", lambda step: step, ("global_step",)),
        ("lowest_train_loss", "lowest training loss", lambda spectrum: -spectrum.loss, ("spectrum",)),
        ("lowest_validation_loss", "lowest validation loss", lambda loss: -loss, ("validation_loss",)),
    )
)

RuleName = Literal[
    "highest_c_t",
    "lowest_max_eigenvalue",
    "lowest_trace",
    "lowest_scaled_max_eigenvalue",
    "lowest_scaled_trace",
    "lowest_relative_flatness",
    "lowest_k_h05",
    "lowest_delta_r_e",
    "lowest_preconditioned_max_eigenvalue",
    "last",
    "lowest_train_loss",
    "lowest_validation_loss",
]
"""The names of the rules, for type checkers and configurations."""

RULES: dict[str, CheckpointRule] = {rule.name: rule for rule in (*_PAPER, *_FURTHER, *_BASELINES)}
"""The rules by name."""


def rule_title(name: str) -> str:
    """Return the title of a rule; of a function that the user gave as rule, its name."""
    return RULES[name].title if name in RULES else name


def rule_short_title(name: str) -> str:
    """Return the short title of a rule; of a function that the user gave as rule, its name."""
    return RULES[name].short_title if name in RULES else name
