"""TensorBoardLogger: histograms, figures, text, and the payloads of the HESD tab."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.util.tensor_util import make_tensor_proto

from lightning_hesd.spectra.analysis_lines import time_title
from lightning_hesd.spectra.payload import PLUGIN_NAME as PAYLOADS
from lightning_hesd.spectra.payload import RECORD, SELECTION, record_payload, selection_payload, to_json
from lightning_hesd.training.loggers.output import LoggerOutput, figures, layer_table, verdict_text

if TYPE_CHECKING:
    from lightning.pytorch.loggers import TensorBoardLogger
    from numpy.typing import ArrayLike, NDArray

    from lightning_hesd.spectra.selection import SelectionEvent
    from lightning_hesd.spectra.spectrum import Spectrum
    from lightning_hesd.training.history import SpectrumHistory


SMALLEST = 1e-6
"""Eigenvalues of this size begin to differ from zero in histograms: the same in all runs, to compare them."""

BIN = 0.1
"""Width of a bin of histograms, in decades."""


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
            text = verdict_text(record.assessment, time_title(record))
            self._writer.add_text(f"{self._name}/assessment", text, global_step=step)

    def write_failure(self, history: SpectrumHistory, step: int) -> None:
        """Write the payload of the last record, which has no spectrum: the HESD tab shows where analyses failed."""
        self.rewrite(history, step)

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
        payload = summary(PAYLOADS, f"{self._name}/{tag}", text, data_class=DATA_CLASS_TENSOR)
        self._writer._get_file_writer().add_summary(payload, global_step=step)  # noqa: SLF001

    def _write_histogram(self, tag: str, spectrum: Spectrum, step: int) -> None:
        """Write the share of eigenvalues in bins of equal width in `places`."""
        first, last = (float(places(value)) / BIN for value in (spectrum.lambda_min, spectrum.lambda_max))
        edges = np.arange(math.floor(first) - 1, math.ceil(last) + 2) * BIN
        mass, _ = spectrum.histogram(eigenvalues(edges))
        # TensorBoard drops empty buckets at the ends and lets min and max take the place of the outer edges.
        filled = mass.nonzero()[0]
        left, right = int(filled[0]), int(filled[-1]) + 1
        middles = (edges[1:] + edges[:-1]) / 2
        self._writer.add_histogram_raw(
            tag,
            min=float(edges[left]),
            max=float(edges[right]),
            num=1.0,
            sum=float(mass @ middles),
            sum_squares=float(mass @ middles**2),
            bucket_limits=edges[left + 1 : right + 1].tolist(),
            bucket_counts=mass[left:right].tolist(),
            global_step=step,
        )


def places(values: ArrayLike) -> NDArray[np.float64]:
    """Return where eigenvalues are in histograms: p for 10^(p - 6), -p for its negative, and 0 for zero.

    TensorBoard draws thirty bins of equal width. On an axis of eigenvalues nearly all would be in the one at zero.
    """
    found = np.asarray(values, dtype=np.float64)
    return np.sign(found) * np.log10(1 + np.abs(found) / SMALLEST)


def eigenvalues(at: ArrayLike) -> NDArray[np.float64]:
    """Return the eigenvalues at places, the inverse of `places`."""
    found = np.asarray(at, dtype=np.float64)
    return np.sign(found) * SMALLEST * np.expm1(np.abs(found) * math.log(10))


def summary(plugin: str, tag: str, content: str | bytes, **metadata: Any) -> Summary:
    """Return a text or bytes for a plugin of TensorBoard."""
    metadata["plugin_data"] = SummaryMetadata.PluginData(plugin_name=plugin)
    value = Summary.Value(tag=tag, tensor=make_tensor_proto(content), metadata=SummaryMetadata(**metadata))
    return Summary(value=[value])
