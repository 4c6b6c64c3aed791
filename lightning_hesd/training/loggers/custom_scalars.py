"""The charts of TensorBoard's Custom Scalars: C_t with interval and threshold, and λ_max."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG, PLUGIN_NAME

from lightning_hesd.training.compat.logged_metrics import tag_prefix
from lightning_hesd.training.compat.namespaces import lightning_types
from lightning_hesd.training.folders import is_remote
from lightning_hesd.training.loggers.tensorboard import summary

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lightning.pytorch.loggers import Logger


def write_layout(loggers: Iterable[Logger], names: Sequence[str]) -> None:
    """Add a category of charts for each callback to the layout of each TensorBoard logger.

    A run has one layout, of which TensorBoard shows the version that was written last. So what the user has written
    stays in it, also a category with the name of a callback. On remote filesystems it cannot be read; there nothing is
    written.
    """
    for logger in loggers:
        if not isinstance(logger, lightning_types("loggers.TensorBoardLogger")) or is_remote(logger.log_dir):
            continue
        logger.experiment.flush()
        layout = _last_layout(Path(logger.log_dir))
        present = {category.title for category in layout.category}
        added = [_charts(name, tag_prefix(logger)) for name in names if name not in present]
        if added:
            layout.category.extend(added)
            # The public `add_custom_scalars` knows charts with one series only.
            written = summary(PLUGIN_NAME, CONFIG_SUMMARY_TAG, layout.SerializeToString())
            logger.experiment._get_file_writer().add_summary(written)  # noqa: SLF001


def _last_layout(folder: Path) -> layout_pb2.Layout:
    """Return the layout that was written last to a folder; an empty one if there is none."""
    last = layout_pb2.Layout()
    tag = CONFIG_SUMMARY_TAG.encode()
    for path in sorted(folder.glob("*tfevents*")):
        for record in _records(path):
            for value in Event.FromString(record).summary.value if tag in record else ():
                if value.tag == CONFIG_SUMMARY_TAG:
                    last = layout_pb2.Layout.FromString(value.tensor.string_val[0])
    return last


def _records(path: Path) -> Iterator[bytes]:
    """Yield the records of an event file; TensorBoard's own reader computes checksums in Python, a second for a MB."""
    with path.open("rb") as file:
        while len(header := file.read(12)) == 12:  # length and its checksum
            length = int.from_bytes(header[:8], "little")
            if len(record := file.read(length)) < length:
                return  # it is still being written
            file.seek(4, 1)  # checksum
            yield record


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
