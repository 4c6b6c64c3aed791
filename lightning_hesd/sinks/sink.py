"""What sinks have in common."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lightning_hesd.history import START_EPOCH
from lightning_hesd.indicators import LayerIndicators, layer_indicators

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_hesd.history import SpectrumHistory, SpectrumRecord
    from lightning_hesd.selection import Choice
    from lightning_hesd.spectrum import Spectrum


def title(record: SpectrumRecord) -> str:
    """Return when a record was made, short."""
    return "start" if record.epoch == START_EPOCH else f"epoch {record.epoch}"


class Sink(Protocol):
    """Writes what a logger can show beyond scalars."""

    def write(self, history: SpectrumHistory, step: int) -> None:
        """Write the last record, which has a spectrum, at `step` of the logger's axis."""


@runtime_checkable
class ChoiceSink(Protocol):
    """Writes also which state of the weights a checkpoint rule takes; not every sink can."""

    def write_choice(self, choice: Choice, step: int) -> None:
        """Write what a rule made of the latest record at `step` of the logger's axis."""


def layer_table(layers: Mapping[str, Spectrum]) -> str:
    """Return the indicators of layers as a table in Markdown."""
    rows = [["layer", *(field.name for field in fields(LayerIndicators))]]
    rows += [[name, *(f"{v:.3g}" for v in asdict(found).values())] for name, found in layer_indicators(layers).items()]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
