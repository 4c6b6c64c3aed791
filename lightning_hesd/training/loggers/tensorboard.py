"""TensorBoardLogger: histograms, figures, text, and the layout of charts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG, PLUGIN_NAME
from tensorboard.util.tensor_util import make_tensor_proto

from lightning_hesd.spectra.payload import PLUGIN_NAME as PAYLOADS
from lightning_hesd.spectra.payload import RECORD, SELECTION, record_payload, selection_payload, to_json
from lightning_hesd.training.compat.logged_metrics import tag_prefix
from lightning_hesd.training.compat.namespaces import lightning_types
from lightning_hesd.training.loggers.output import LoggerOutput, figures, layer_table, title, verdict_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lightning.pytorch.loggers import Logger, TensorBoardLogger

    from lightning_hesd.spectra.selection import SelectionEvent
    from lightning_hesd.spectra.spectrum import Spectrum
    from lightning_hesd.training.history import SpectrumHistory


class TensorBoardOutput(LoggerOutput):
    """Writes densities as histograms and figures, and assessments and layers as text; TensorBoard takes no files."""

    def __init__(self, logger: TensorBoardLogger, name: str) -> None:
        self._writer = logger.experiment
        self._name = name

    def write(self, history: SpectrumHistory, step: int) -> None:
        """Write the last record, which has a spectrum, at `step` of the logger's axis."""
        record = history[-1]
        self.rewrite(history, step)
        for suffix, spectrum in record.spectra.items():
            self._write_histogram(f"{self._name}{suffix}/density", spectrum, step)
        for tag, image in figures(history):
            self._writer.add_image(f"{self._name}{tag}", image[:, :, :3], global_step=step, dataformats="HWC")
        if record.layers:
            self._writer.add_text(f"{self._name}/layers", layer_table(record), global_step=step)
        if record.assessment is not None:
            text = verdict_text(record.assessment, title(record))
            self._writer.add_text(f"{self._name}/assessment", text, global_step=step)

    def rewrite(self, history: SpectrumHistory, step: int) -> None:
        """Write the payload of the last record; of two with the same step, readers take the later one."""
        payload = record_payload(history[-1], history.findings, history.compare_with_reference())
        self._write_payload(RECORD, to_json(payload), step)

    def write_selection(self, event: SelectionEvent, step: int) -> None:
        """Write a rule's decision after the latest record at `step` of the logger's axis."""
        self._write_payload(f"{SELECTION}/{event.key}", to_json(selection_payload(event)), step)

    def _write_payload(self, tag: str, text: str, step: int) -> None:
        """Write a payload for the HESD tab."""
        # Without the class of the data the data provider does not list the tag.
        summary = _summary(PAYLOADS, f"{self._name}/{tag}", text, data_class=DATA_CLASS_TENSOR)
        self._writer._get_file_writer().add_summary(summary, global_step=step)  # noqa: SLF001

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


def write_layout(loggers: Iterable[Logger], names: Sequence[str]) -> None:
    """Write the charts of TensorBoard's custom scalars tab: C_t with interval and threshold, and λ_max.

    A run has one layout: it is written once to each TensorBoard logger, with a category of charts for each callback.
    """
    for logger in loggers:
        if not isinstance(logger, lightning_types("loggers.TensorBoardLogger")):
            continue
        layout = layout_pb2.Layout(category=[_charts(name, tag_prefix(logger)) for name in names])
        # The public `add_custom_scalars` knows charts with one series only.
        summary = _summary(PLUGIN_NAME, CONFIG_SUMMARY_TAG, layout.SerializeToString())
        logger.experiment._get_file_writer().add_summary(summary)  # noqa: SLF001


def _summary(plugin: str, tag: str, content: str | bytes, **metadata: Any) -> Summary:
    """Return a text or bytes for a plugin of TensorBoard."""
    metadata["plugin_data"] = SummaryMetadata.PluginData(plugin_name=plugin)
    value = Summary.Value(tag=tag, tensor=make_tensor_proto(content), metadata=SummaryMetadata(**metadata))
    return Summary(value=[value])


def _charts(name: str, tag_prefix: str) -> layout_pb2.Category:
    """Return the charts of a callback, given the prefix that the logger puts before tags."""
    series = layout_pb2.MarginChartContent.Series
    tag = f"{tag_prefix}{name}"
    threshold = f"{tag}/c_t_threshold"
    margin = layout_pb2.MarginChartContent(
        series=[
            series(value=f"{tag}/c_t", lower=f"{tag}/c_t_low", upper=f"{tag}/c_t_high"),
            series(value=threshold, lower=threshold, upper=threshold),
        ]
    )
    largest = layout_pb2.MultilineChartContent(tag=[f"^{re.escape(tag)}/lambda_max$"])
    return layout_pb2.Category(
        title=name,
        chart=[
            layout_pb2.Chart(title="C_t with its interval, and the MP threshold", margin=margin),
            layout_pb2.Chart(title="largest eigenvalue", multiline=largest),
        ],
    )
