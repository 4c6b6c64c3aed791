"""The output of records to loggers beyond scalars, which reach every logger through Lightning.

The type of the logger decides on the class. To support another logger, write a subclass of `LoggerOutput` in a module
of this package, and enter it in `OUTPUTS`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lightning_hesd.training.compat.namespaces import lightning_types
from lightning_hesd.training.loggers.csv_files import CSVOutput
from lightning_hesd.training.loggers.trackers import MLflowOutput, WandbOutput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lightning.pytorch.loggers import Logger, TensorBoardLogger

    from lightning_hesd.training.loggers.output import LoggerOutput

log = logging.getLogger(__name__)


def _tensorboard_output(logger: TensorBoardLogger, name: str) -> LoggerOutput:
    from lightning_hesd.training.loggers.tensorboard import TensorBoardOutput  # noqa: PLC0415 - TensorBoard is slow

    return TensorBoardOutput(logger, name)


OUTPUTS: dict[str, Callable[[Any, str], LoggerOutput]] = {
    "loggers.TensorBoardLogger": _tensorboard_output,
    "loggers.CSVLogger": CSVOutput,
    "loggers.WandbLogger": WandbOutput,
    "loggers.MLFlowLogger": MLflowOutput,
}
"""Makes the output from a logger and the name of the callback; by the name of the logger's class in Lightning."""


def make_outputs(loggers: Iterable[Logger], name: str) -> list[LoggerOutput]:
    """Return the outputs of the callback of this name to the loggers that can show more than scalars."""
    outputs: list[LoggerOutput] = []
    for logger in loggers:
        make = next((make for kind, make in OUTPUTS.items() if isinstance(logger, lightning_types(kind))), None)
        if make is None:
            log.debug("%s gets scalars only: lightning_hesd knows no other output for it.", type(logger).__name__)
        else:
            outputs.append(make(logger, name))
    return outputs
