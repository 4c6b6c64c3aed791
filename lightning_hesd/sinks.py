"""From a record to what each logger can show.

Scalars reach every logger through Lightning itself. Whatever goes beyond them is written by a sink, chosen by the
type of the logger. To support another logger, write a class with a `write` method and enter it in `SINKS`.
"""

from __future__ import annotations

import csv
import logging
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG, PLUGIN_NAME
from tensorboard.util.tensor_util import make_tensor_proto

from lightning_hesd.criteria import MP_THRESHOLD
from lightning_hesd.indicators import LayerIndicators, layer_indicators
from lightning_hesd.plotting import plot_decomposition, plot_density, plot_layers

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lightning.pytorch.loggers import Logger
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_hesd.history import SpectrumHistory, SpectrumRecord
    from lightning_hesd.spectrum import Spectrum

log = logging.getLogger(__name__)


def scalars(record: SpectrumRecord, name: str) -> dict[str, float]:
    """Return what is logged as scalars, without those that are undefined (NaN)."""
    values = {"c_t_threshold": MP_THRESHOLD} if record.spectra else {}
    if record.assessment is not None:
        values["delta_r_e"] = record.assessment.delta_r_e
        values["delta_k_h05"] = record.assessment.delta_k_h05
        values["verdict"] = record.assessment.value
    if record.stability_ratio is not None:
        values["stability_ratio"] = record.stability_ratio
    keyed = {f"{name}/{key}": value for key, value in values.items()}
    for suffix, spectrum in record.spectra.items():
        keyed |= {f"{name}{suffix}/{key}": value for key, value in _scalars(spectrum).items()}
    for layer, indicators in layer_indicators(record.layers or {}).items():
        keyed |= {f"{name}/layer/{layer}/{key}": value for key, value in asdict(indicators).items()}
    return {key: value for key, value in keyed.items() if not math.isnan(value)}


def _scalars(spectrum: Spectrum) -> dict[str, float]:
    low, high = spectrum.c_t_interval
    return {
        "c_t": spectrum.c_t,
        "c_t_low": low,
        "c_t_high": high,
        "mp": math.nan if spectrum.hesd_type is None else float(spectrum.hesd_type == "MP"),
        "lambda_max": spectrum.lambda_max,
        "lambda_min": spectrum.lambda_min,
        "trace": spectrum.trace,
        # With a tolerance the number of steps varies, and K_H05 with it.
        "k_h05": spectrum.k_h(0.5) if spectrum.tolerance is None else math.nan,
        "c_t_sampling_error": math.nan if spectrum.c_t_sampling_error is None else spectrum.c_t_sampling_error,
        "loss": spectrum.loss,
        "seconds": spectrum.seconds,
    }


def layer_table(layers: Mapping[str, Spectrum]) -> str:
    """Return the indicators of layers as a table in Markdown."""
    rows = [["layer", *(field.name for field in fields(LayerIndicators))]]
    rows += [[name, *(f"{v:.3g}" for v in asdict(found).values())] for name, found in layer_indicators(layers).items()]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


class Sink(Protocol):
    """Writes what a logger can show beyond scalars."""

    def write(self, history: SpectrumHistory, step: int) -> None:
        """Write the last record, which has a spectrum, at `step` of the logger's axis."""


class TensorBoardSink:
    """The densities as histograms and as figures, and what they say about generalization as text."""

    def __init__(self, logger: TensorBoardLogger, name: str) -> None:
        self._writer = logger.experiment
        self._name = name

    def write(self, history: SpectrumHistory, step: int) -> None:
        """Write the last record, which has a spectrum, at `step` of the logger's axis."""
        record = history[-1]
        title = "start" if record.epoch < 0 else f"epoch {record.epoch}"
        for suffix, spectrum in record.spectra.items():
            self._write_histogram(f"{self._name}{suffix}/density", spectrum, step)
            self._write_figure(f"{self._name}{suffix}/density_figure", plot_density(spectrum, title=title), step)
        if record.spectrum and record.ggn and record.residual:
            axes = plot_decomposition(record.spectrum, record.ggn, record.residual)
            self._write_figure(f"{self._name}/decomposition_figure", axes, step)
        if record.layers:
            by_epoch = {r.epoch: r.layers for r in history if r.layers}
            by_step = {r.global_step: r.layers for r in history if r.layers}
            one_each = len(by_epoch) == len(by_step)
            axes = plot_layers(by_epoch) if one_each else plot_layers(by_step, xlabel="step")
            self._write_figure(f"{self._name}/layers_figure", axes, step)
            self._writer.add_text(f"{self._name}/layers", layer_table(record.layers), global_step=step)
        if record.assessment is not None:
            reasons = "\n".join(f"- {reason}" for reason in record.assessment.reasons)
            text = f"**generalization: {record.assessment.verdict}** ({title})\n\n{reasons}"
            self._writer.add_text(f"{self._name}/assessment", text, global_step=step)

    def _write_figure(self, tag: str, axes: Axes, step: int) -> None:
        figure: Figure = axes.get_figure(root=True)  # type: ignore[assignment]
        self._writer.add_figure(tag, figure, global_step=step, close=False)

    def _write_histogram(self, tag: str, spectrum: Spectrum, step: int) -> None:
        mass, edges = spectrum.histogram()
        # TensorBoard drops empty buckets at the ends and lets min and max take the place of the outer edges.
        filled = mass.nonzero()[0]
        first, last = int(filled[0]), int(filled[-1]) + 1
        self._writer.add_histogram_raw(
            tag,
            min=float(edges[first]),
            max=float(edges[last]),
            num=1.0,
            sum=spectrum.moment(1),
            sum_squares=spectrum.moment(2),
            bucket_limits=edges[first + 1 : last + 1].tolist(),
            bucket_counts=mass[first:last].tolist(),
            global_step=step,
        )


class CSVSink:
    """The densities as rows of tables beside the logger's own metrics.csv."""

    COLUMNS = ("epoch", "step", "left", "right", "mass")

    def __init__(self, logger: CSVLogger, name: str) -> None:
        self._folder = Path(logger.log_dir)
        self._name = name

    def write(self, history: SpectrumHistory, step: int) -> None:
        """Write the last record, which has a spectrum, at `step` of the logger's axis."""
        record = history[-1]
        self._folder.mkdir(parents=True, exist_ok=True)
        for suffix, spectrum in record.spectra.items():
            mass, edges = spectrum.histogram()
            path = self._folder / f"{self._name}{suffix}_density.csv"
            is_new = not path.exists()
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if is_new:
                    writer.writerow(self.COLUMNS)
                writer.writerows(
                    (record.epoch, step, left, right, share)
                    for left, right, share in zip(edges[:-1], edges[1:], mass, strict=True)
                    if share > 0
                )


SINKS: dict[type[Logger], type[TensorBoardSink | CSVSink]] = {
    TensorBoardLogger: TensorBoardSink,
    CSVLogger: CSVSink,
}


def make_sinks(loggers: Iterable[Logger], name: str) -> list[Sink]:
    """Return the sinks of those loggers that have one."""
    sinks: list[Sink] = []
    for logger in loggers:
        sink = next((sink for kind, sink in SINKS.items() if isinstance(logger, kind)), None)
        if sink is None:
            log.debug("%s gets scalars only: lightning_hesd has no sink for it.", type(logger).__name__)
        else:
            sinks.append(sink(logger, name))  # type: ignore[arg-type]
    return sinks


def write_layout(loggers: Iterable[Logger], names: Sequence[str]) -> None:
    """Give TensorBoard's custom scalars tab its charts: C_t with interval and threshold, and λ_max.

    A run has one layout, so it is written once, for all callbacks of the Trainer.

    Args:
        loggers: All loggers; only TensorBoard's get the layout.
        names: The callbacks' names, each a category of charts.
    """
    layout = layout_pb2.Layout(category=[_charts(name) for name in names])
    value = Summary.Value(
        tag=CONFIG_SUMMARY_TAG,
        tensor=make_tensor_proto(layout.SerializeToString()),
        metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME)),
    )
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            # The public `add_custom_scalars` knows charts with one series only.
            logger.experiment._get_file_writer().add_summary(Summary(value=[value]))  # noqa: SLF001


def _charts(name: str) -> layout_pb2.Category:
    series = layout_pb2.MarginChartContent.Series
    threshold = f"{name}/c_t_threshold"
    margin = layout_pb2.MarginChartContent(
        series=[
            series(value=f"{name}/c_t", lower=f"{name}/c_t_low", upper=f"{name}/c_t_high"),
            series(value=threshold, lower=threshold, upper=threshold),
        ]
    )
    largest = layout_pb2.MultilineChartContent(tag=[f"^{name}/lambda_max$"])
    return layout_pb2.Category(
        title=name,
        chart=[
            layout_pb2.Chart(title="C_t with its interval, and the MP threshold", margin=margin),
            layout_pb2.Chart(title="largest eigenvalue", multiline=largest),
        ],
    )
