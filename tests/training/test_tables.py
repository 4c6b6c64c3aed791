"""The history as tables of pandas."""

import math
import sys
from dataclasses import replace
from typing import Any

import pytest

from lightning_hesd.spectra.indicators import layer_indicators
from lightning_hesd.spectra.scalars import scalars
from lightning_hesd.training.history import SpectrumRecord
from tests.training.scripted import history, make_spectrum

pd = pytest.importorskip("pandas")

FAILED = SpectrumRecord(1, 20, None, "RuntimeError: no luck")
SPECTRUM_COLUMNS = [
    *("c_t", "c_t_low", "c_t_high", "lambda_max", "lambda_min", "trace", "negative_count_low", "negative_count_high"),
    *("k_h05", "c_t_sampling_error", "squared_weight_norm", "subspace_overlap", "loss", "seconds"),
]
DESCRIPTION = ["hesd_type", "type_certain", "verified", "steps", "num_samples"]


def full_record() -> SpectrumRecord:
    spectrum = make_spectrum(-0.25, lambda_max=4.0)
    return SpectrumRecord(
        3,
        40,
        spectrum,
        generalization=make_spectrum(-0.9, lambda_max=6.0, loss=1.5),
        layers={"a": make_spectrum(-0.5), "b": make_spectrum(-0.1, lambda_max=3.0)},
        preconditioned=replace(spectrum, matrix="preconditioned hessian"),
        stability_threshold=8.0,
    )


def test_a_row_has_the_scalars_that_are_logged() -> None:
    record = full_record()
    row = history(record).to_dataframe().iloc[0].to_dict()
    logged = scalars(record, "x")
    named = {key: f"x/{key}" for key in SPECTRUM_COLUMNS}
    named |= {f"{kind}_{key}": f"x_{kind}/{key}" for kind in ("gen", "pre") for key in SPECTRUM_COLUMNS}
    named |= {key: f"x/{key}" for key in ("delta_r_e", "delta_k_h05", "stability_ratio")}
    for column, key in named.items():
        assert row[column] == logged[key] if key in logged else math.isnan(row[column]), column
    assert (row["c_t"], row["gen_c_t"], row["stability_ratio"]) == (-0.25, -0.9, 0.5)
    assert (row["epoch"], row["global_step"]) == (3, 40)
    assert (row["hesd_type"], row["type_certain"], row["steps"], row["num_samples"]) == ("MP", True, 2, 8)
    assert row["verdict"] == "poor"
    assert pd.isna(row["error"])
    assert set(row) == {"epoch", "global_step", *named, *DESCRIPTION, "verdict", "error"}


def test_a_failed_analysis_is_a_row_of_nothing_but_its_error() -> None:
    table = history(SpectrumRecord(-1, 0, make_spectrum(-0.9)), FAILED).to_dataframe()
    assert table.epoch.tolist() == [-1, 1]
    assert table.c_t.tolist()[0] == -0.9
    assert table.loc[1, [*SPECTRUM_COLUMNS, *DESCRIPTION]].isna().all()
    assert table.error.isna().tolist() == [True, False]
    assert table.error[1] == "RuntimeError: no luck"


def test_an_undefined_c_t_is_missing_and_without_positive_curvature_it_is_minus_infinity() -> None:
    negative = SpectrumRecord(1, 20, replace(make_spectrum(-0.5), nodes=[[-2.0, -1.0]]))
    table = history(SpectrumRecord(0, 10, make_spectrum(math.nan)), negative).to_dataframe()
    assert table.loc[0, ["c_t", "c_t_low", "c_t_high", "hesd_type", "type_certain"]].isna().all()
    assert table.loss[0] == 0.5
    assert table.c_t[1] == -math.inf


@pytest.mark.parametrize("records", [(), (FAILED,), (SpectrumRecord(0, 10, make_spectrum(-0.2)), FAILED)])
def test_columns_and_their_kinds_do_not_depend_on_what_was_found(records: tuple[SpectrumRecord, ...]) -> None:
    table = history(*records).to_dataframe()
    kinds: dict[str, Any] = {column: str(kind) for column, kind in table.dtypes.items()}
    assert kinds == {
        **dict.fromkeys(["epoch", "global_step"], "int64"),
        **dict.fromkeys(SPECTRUM_COLUMNS, "float64"),
        **dict.fromkeys(["hesd_type", "verified", "error"], "string"),
        **dict.fromkeys(["steps", "num_samples"], "Int64"),
        "type_certain": "boolean",
    }
    assert len(table) == len(records)


def test_layers_have_a_row_each() -> None:
    record = full_record()
    table = history(FAILED, record, replace(record, epoch=4)).layers_to_dataframe()
    assert list(zip(table.epoch, table.layer, strict=True)) == [(3, "a"), (3, "b"), (4, "a"), (4, "b")]
    assert table.lambda_max.tolist() == [1.0, 3.0, 1.0, 3.0]
    assert table.trace_share.tolist()[:2] == [found.trace_share for found in layer_indicators(record.layers).values()]
    assert table.pivot(index="layer", columns="epoch", values="c_t").loc["b"].tolist() == pytest.approx([-0.1, -0.1])
    assert history(FAILED).layers_to_dataframe().columns.tolist() == table.columns.tolist()


def test_without_pandas_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    for method in ("to_dataframe", "layers_to_dataframe"):
        with pytest.raises(ImportError, match="pip install pandas"):
            getattr(history(FAILED), method)()
