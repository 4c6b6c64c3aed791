"""The checkpoint rules: the quantity that each goes by, and its sign."""

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from lightning_hesd.spectra.layer_curvature import LayerCurvature
from lightning_hesd.spectra.record import SpectrumRecord
from lightning_hesd.spectra.rules import RULES, RuleName
from tests.training.scripted import make_spectrum


def record(**fields: object) -> SpectrumRecord:
    """A record with all that any rule asks for."""
    bounds = (0.0, 1.0)
    layers = {
        name: LayerCurvature(2, trace, 0.1, 0.5, 0.5, 0.5, 0.5, bounds, bounds, squared_norm)
        for name, trace, squared_norm in (("first", 3.0, 2.0), ("second", -1.0, 10.0))
    }
    spectrum = replace(make_spectrum(-0.25), by_layer=layers, squared_weight_norm=4.0, loss=0.5)
    values = {
        "spectrum": spectrum,
        "generalization": make_spectrum(-0.1),
        "preconditioned": replace(make_spectrum(-0.5), matrix="preconditioned hessian"),
        "metrics": {"val_loss": 0.75, "train_loss": 0.5},
    }
    return SpectrumRecord(3, 40, **{**values, **fields})  # type: ignore[arg-type]


def test_scores() -> None:
    analyzed = record()
    spectrum, assessment = analyzed.spectrum, analyzed.assessment
    assert spectrum is not None
    assert assessment is not None
    assert analyzed.preconditioned is not None
    expected = {
        "highest_c_t": spectrum.c_t,
        "lowest_max_eigenvalue": -spectrum.lambda_max,
        "lowest_trace": -spectrum.trace,
        "lowest_scaled_max_eigenvalue": -4.0 * spectrum.lambda_max,
        "lowest_scaled_trace": -4.0 * spectrum.trace,
        "lowest_relative_flatness": -(3.0 * 2.0 - 1.0 * 10.0),
        "lowest_k_h05": -spectrum.k_h(0.5),
        "lowest_delta_r_e": -assessment.delta_r_e,
        "lowest_preconditioned_max_eigenvalue": -analyzed.preconditioned.lambda_max,
        "last": 40,
        "lowest_train_loss": -0.5,
        "lowest_validation_loss": -0.75,
    }
    assert {name: rule.score(analyzed) for name, rule in RULES.items()} == pytest.approx(expected, rel=1e-15)
    assert set(get_args(RuleName)) == set(RULES)
    assert {name for name, rule in RULES.items() if rule.is_baseline} == set(list(expected)[-3:])


@pytest.mark.parametrize(
    ("missing", "rules"),
    [
        ({"generalization": None}, {"lowest_delta_r_e"}),
        ({"preconditioned": None}, {"lowest_preconditioned_max_eigenvalue"}),
        ({"metrics": {"train_loss": 0.5}}, {"lowest_validation_loss"}),
        (
            {"spectrum": make_spectrum(-0.25)},
            {"lowest_scaled_max_eigenvalue", "lowest_scaled_trace", "lowest_relative_flatness"},
        ),
        (  # The steps vary.
            {"spectrum": replace(record().spectrum, tolerance=0.1), "generalization": None},
            {"lowest_k_h05", "lowest_delta_r_e"},
        ),
        ({"spectrum": None}, set(RULES) - {"last", "lowest_validation_loss", "lowest_preconditioned_max_eigenvalue"}),
    ],
)
def test_without_what_a_rule_needs_it_has_no_score(missing: dict[str, object], rules: set[str]) -> None:
    analyzed = record(**missing)
    assert {name for name, rule in RULES.items() if math.isnan(rule.score(analyzed))} == rules


def test_relative_flatness_does_not_change_when_a_relu_network_is_rescaled() -> None:
    """Weights of one layer times c, those of the next divided by c: traces go with 1/c² and c²."""
    analyzed = record()
    assert analyzed.spectrum is not None
    factors = np.array([3.0, 1 / 3.0])
    layers = {
        name: replace(layer, trace=layer.trace / factor**2, squared_norm=layer.squared_norm * factor**2)
        for (name, layer), factor in zip(analyzed.spectrum.by_layer.items(), factors, strict=True)
    }
    rule = RULES["lowest_relative_flatness"]
    rescaled = replace(analyzed, spectrum=replace(analyzed.spectrum, by_layer=layers))
    assert rule.score(rescaled) == pytest.approx(rule.score(analyzed), rel=1e-14)


def test_what_to_do_where_a_rule_lacks_what_it_needs() -> None:
    lacking = record(metrics={}, preconditioned=None)
    said = RULES["lowest_preconditioned_max_eigenvalue"].complaint(lacking)
    assert said is not None
    assert "Pass `preconditioner` to HessianSpectrumCallback" in said
    said = RULES["lowest_validation_loss"].complaint(lacking)
    assert said is not None
    assert "it needs `validation_loss`, which the record lacks. Log it as 'val_loss' in a validation" in said
    assert RULES["highest_c_t"].complaint(lacking) is None
