"""The scalars of a record: key, value, title and unit of each, and where it is shown. To add a scalar, add an entry.

Every scalar is logged. Tables, payloads, the summary, the command line, the tab and the figures read the same entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

from lightning_hesd.spectra.criteria import MP_THRESHOLD
from lightning_hesd.spectra.record import SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from lightning_hesd.spectra.record import SpectrumRecord
    from lightning_hesd.spectra.spectrum import Spectrum

Place = Literal["data", "summary", "command line", "tab", "tab of generalization"]

CURVATURE = "loss / parameter²"


@dataclass(frozen=True)
class Scalar:
    """One number of a record, of one of its spectra, or of one of its layers.

    Attributes:
        key: Last part of the key in logs; name of the column in tables, and of the field in payloads.
        value: Function of the record, the spectrum or the layer's indicators; None or NaN where it is undefined.
        title: Name in sentences, headings and figures.
        unit: Unit; empty: a ratio, a share or a number without unit.
        is_logarithmic: Whether figures show it on a logarithmic axis.
        shown: Places other than logs: "data" (pandas tables, payloads), "summary" (the table at the end of training),
            "command line" (the table of checkpoints), "tab" (the data table of the HESD tab), and "tab of
            generalization" (the same, for the spectrum on generalization data).
    """

    key: str
    value: Callable[[Any], float | None]
    title: str
    unit: str = ""
    is_logarithmic: bool = False
    shown: tuple[Place, ...] = ("data", "summary", "command line", "tab")

    def of(self, source: Any) -> float:
        """Return the value; NaN where it is undefined."""
        value = self.value(source)
        return math.nan if value is None else float(value)


def _keyed(*scalars: Scalar) -> dict[str, Scalar]:
    return {scalar.key: scalar for scalar in scalars}


def _field(key: str, title: str, unit: str = "", **options: Any) -> Scalar:
    return Scalar(key, attrgetter(key), title, unit, **options)


def _k_h05(spectrum: Spectrum) -> float | None:
    # With a tolerance the number of steps varies, and K_H05 with it.
    return spectrum.k_h(0.5) if spectrum.tolerance is None else None


DATA: tuple[Place, ...] = ("data",)


def _negative_count(spectrum: Spectrum, end: int) -> float | None:
    return None if spectrum.verified == "no" else spectrum.negative_count[end]


def _is_mp(spectrum: Spectrum) -> float | None:
    return None if spectrum.hesd_type is None else float(spectrum.hesd_type == "MP")


SPECTRUM_SCALARS: dict[str, Scalar] = _keyed(
    _field("c_t", "C_t", shown=("data", "command line", "tab", "tab of generalization")),
    Scalar(
        "c_t_low", lambda s: s.c_t_interval[0], "lower end of C_t's interval", shown=("data", "command line", "tab")
    ),
    Scalar(
        "c_t_high", lambda s: s.c_t_interval[1], "upper end of C_t's interval", shown=("data", "command line", "tab")
    ),
    Scalar("verified", lambda s: float(s.verified == "yes"), "verified: 1 for yes, else 0", shown=()),
    Scalar("mp", _is_mp, "type: 1 for MP, 0 for MN", shown=()),
    _field("lambda_max", "λ_max", CURVATURE, is_logarithmic=True),
    _field("lambda_min", "λ_min", CURVATURE, shown=("data", "command line", "tab")),
    _field("trace", "trace", CURVATURE, is_logarithmic=True, shown=("data", "tab")),
    Scalar("negative_count_low", partial(_negative_count, end=0), "least number of negative eigenvalues", shown=DATA),
    Scalar(
        "negative_count_high", partial(_negative_count, end=1), "largest number of negative eigenvalues", shown=DATA
    ),
    Scalar("k_h05", _k_h05, "K_H05", shown=("data", "tab")),
    _field("c_t_sampling_error", "standard error of C_t from the finite sample", shown=("data",)),
    _field("squared_weight_norm", "squared norm of the weights", "parameter²", is_logarithmic=True, shown=DATA),
    _field("subspace_overlap", "overlap of the leading eigenvectors with those before", shown=("data",)),
    _field(
        "loss", "loss", "loss", is_logarithmic=True,
        shown=("data", "summary", "command line", "tab", "tab of generalization"),
    ),
    _field("seconds", "duration of the analysis", "s", is_logarithmic=True, shown=("data",)),
)  # fmt: skip
"""The scalars of each spectrum of a record."""

RECORD_SCALARS: dict[str, Scalar] = _keyed(
    Scalar(
        "delta_r_e", lambda r: r.assessment and r.assessment.delta_r_e, "Δr_e", is_logarithmic=True,
        shown=("data", "command line", "tab"),
    ),
    Scalar(
        "delta_k_h05", lambda r: r.assessment and r.assessment.delta_k_h05, "ΔK_H05", is_logarithmic=True,
        shown=("data", "command line", "tab"),
    ),
    Scalar(
        "verdict", lambda r: r.assessment and r.assessment.value,
        "criteria for generalization: 1 hold, 0.5 undecided, 0 fail, -1 do not apply", shown=(),
    ),
    _field("stability_ratio", "preconditioned λ_max over the optimizer's threshold", shown=("data", "command line")),
)  # fmt: skip
"""The scalars that compare the spectra of a record with each other and with thresholds."""

RUN_SCALARS: dict[str, Scalar] = _keyed(
    _field("overhead", "time of all analyses over the training time", "× the training time", shown=()),
)
"""The scalars of a run so far, from its `Budget`."""

LAYER_SCALARS: dict[str, Scalar] = _keyed(
    _field("c_t", "C_t"),
    _field("lambda_max", "λ_max", CURVATURE, is_logarithmic=True),
    _field("trace", "trace", CURVATURE, is_logarithmic=True),
    _field("trace_share", "share of the trace"),
    _field("effective_rank", "effective rank", "directions", is_logarithmic=True),
    _field("near_zero_share", "share of directions near zero"),
    _field("negative_share", "share of negative curvature"),
    _field("lambda_max_weight", "share of the eigenvector of λ_max"),
    _field("lambda_min_weight", "share of the eigenvector of λ_min"),
)
"""The scalars of each layer, from its `LayerIndicators`."""


def as_factor(overhead: float) -> str:
    """Return an overhead, or another factor on the training time, in words.

    Examples:
        >>> as_factor(0.046), as_factor(4.76), as_factor(234.5)
        ('0.046×', '4.8×', '234×')
    """
    return f"{overhead:.2g}×" if overhead < 99.5 else f"{overhead:,.0f}×"


def shown_in(place: Place, table: Mapping[str, Scalar]) -> list[Scalar]:
    """Return the scalars of a table that are shown in a place."""
    return [scalar for scalar in table.values() if place in scalar.shown]


LAYER_SUFFIX = "_layer"
"""Follows the name of the callback in the keys of layers, which are a group of their own in TensorBoard, then."""


def metric_prefixes(name: str) -> tuple[str, ...]:
    """Return the beginnings of all keys in the logs of a callback of this name."""
    return tuple(f"{name}{suffix}/" for suffix in (*SUFFIXES.values(), LAYER_SUFFIX))


def scalars(record: SpectrumRecord, name: str) -> dict[str, float]:
    """Return all scalars of a record that are defined, with the keys they have in logs, which begin with `name`."""
    keyed = {f"{name}/c_t_threshold": MP_THRESHOLD} if record.spectra else {}
    keyed |= _values(f"{name}/", RECORD_SCALARS.values(), record)
    for suffix, spectrum in record.spectra.items():
        keyed |= _values(f"{name}{suffix}/", SPECTRUM_SCALARS.values(), spectrum)
    for layer, indicators in record.layer_indicators.items() if record.layers else ():  # else hundreds, unasked
        keyed |= _values(f"{name}{LAYER_SUFFIX}/{layer}/", LAYER_SCALARS.values(), indicators)
    return {key: value for key, value in keyed.items() if not math.isnan(value)}


def data_of_spectrum(spectrum: Spectrum, prefix: str = "") -> dict[str, float]:
    """Return the scalars of a spectrum for tables and payloads; NaN: undefined."""
    return _values(prefix, shown_in("data", SPECTRUM_SCALARS), spectrum)


def data_of_record(record: SpectrumRecord) -> dict[str, float]:
    """Return the scalars that compare a record's spectra, for tables and payloads; NaN: undefined."""
    return _values("", shown_in("data", RECORD_SCALARS), record)


def _values(prefix: str, table: Iterable[Scalar], source: Any) -> dict[str, float]:
    return {f"{prefix}{scalar.key}": scalar.of(source) for scalar in table}


def descriptions() -> dict[str, list[dict[str, Any]]]:
    """Return titles and units for the tab: of the columns of its data table, and of the quantities of layers."""
    spectrum, other = shown_in("tab", SPECTRUM_SCALARS), shown_in("tab of generalization", SPECTRUM_SCALARS)
    return {
        "spectrum": _described(spectrum),
        "generalization": _described(other),
        "record": _described(shown_in("tab", RECORD_SCALARS)),
        "layers": _described(shown_in("tab", LAYER_SCALARS)),
    }


def _described(table: Sequence[Scalar]) -> list[dict[str, Any]]:
    return [{"key": s.key, "title": s.title, "unit": s.unit, "is_logarithmic": s.is_logarithmic} for s in table]
