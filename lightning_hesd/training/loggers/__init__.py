"""What each logger can show of a record beyond scalars, which reach every logger through Lightning itself.

A sink writes it, chosen by the type of the logger. To support another logger, write a class as `Sink` describes in a
module of this package, and enter it in `SINKS`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lightning_hesd.training.compat.namespaces import lightning_types
from lightning_hesd.training.loggers.csv_files import CSVSink
from lightning_hesd.training.loggers.mlflow_runs import MLflowSink
from lightning_hesd.training.loggers.wandb_runs import WandbSink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lightning.pytorch.loggers import Logger, TensorBoardLogger

    from lightning_hesd.training.loggers.sink import Sink

log = logging.getLogger(__name__)


def _tensorboard_sink(logger: TensorBoardLogger, name: str) -> Sink:
    from lightning_hesd.training.loggers.tensorboard import TensorBoardSink  # noqa: PLC0415 - TensorBoard is slow

    return TensorBoardSink(logger, name)


SINKS: dict[str, Callable[[Any, str], Sink]] = {
    "loggers.TensorBoardLogger": _tensorboard_sink,
    "loggers.CSVLogger": CSVSink,
    "loggers.WandbLogger": WandbSink,
    "loggers.MLFlowLogger": MLflowSink,
}
"""Makes a sink of a logger and the name of the callback; by the name of the logger's class in Lightning."""


def make_sinks(loggers: Iterable[Logger], name: str) -> list[Sink]:
    """Return the sinks of those loggers that have one."""
    sinks: list[Sink] = []
    for logger in loggers:
        sink = next((sink for kind, sink in SINKS.items() if isinstance(logger, lightning_types(kind))), None)
        if sink is None:
            log.debug("%s gets scalars only: lightning_hesd has no sink for it.", type(logger).__name__)
        else:
            sinks.append(sink(logger, name))
    return sinks
