"""The records of a run: in memory, on disk and inside checkpoints.

On disk a folder has files of spectra, and an index that names them.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightning_hesd.spectra.codec import (
    FIELDS,
    Packing,
    decode_record,
    encode_record,
    load,
    pack_records,
    unpack_records,
)
from lightning_hesd.spectra.findings import findings
from lightning_hesd.spectra.record import START_EPOCH, SpectrumRecord
from lightning_hesd.spectra.run_comparison import compare_run_with_reference
from lightning_hesd.spectra.summary import summarize
from lightning_hesd.spectra.tables import layers_table, records_table
from lightning_hesd.spectra.validation import (
    FORMAT_VERSION,
    at_least,
    check_choice,
    check_fields,
    check_version,
    each,
    parsed,
    text,
    version_in,
)
from lightning_hesd.training.folders import exists, fetched, joined
from lightning_hesd.training.history_folder import INDEX_NAME, HistoryFolder, read_index
from lightning_hesd.training.run_facts import now

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    import pandas as pd
    from matplotlib.axes import Axes

    from lightning_hesd.spectra.findings import Finding
    from lightning_hesd.spectra.reference_range import ReferenceComparison

__all__ = ["SpectrumHistory", "SpectrumRecord"]


def is_plain_tensor(value: Any) -> bool:
    """Return whether a value is a tensor of float64 numbers that NumPy can take."""
    return (
        isinstance(value, torch.Tensor)
        and value.dtype == torch.float64
        and value.layout == torch.strided
        and not (value.is_meta or value.requires_grad)
    )


_STATE = {"records": text, "shapes": each(each(at_least(0))), "numbers": is_plain_tensor}


class SpectrumHistory(list[SpectrumRecord]):
    """The records of a run in the order they were made.

    Attributes:
        about: Facts about the run that wrote the records last, as plain values: `started` and `written` (times in UTC),
            `versions` by package, `device`, and `options`, the arguments of the callback that are not its defaults.
            Empty where no Trainer wrote the files. Checkpoints do not have it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.about: dict[str, Any] = {}
        self._folders: dict[str, HistoryFolder] = {}

    def __repr__(self) -> str:
        """Return the number of records and the times of the first and the last in one line."""
        first, last = (self[0].epoch, self[-1].epoch) if self else (0, 0)
        span = f", epochs {'start' if first == START_EPOCH else first} to {last}" if self else ""
        return f"<SpectrumHistory: {len(self)} record{'' if len(self) == 1 else 's'}{span}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the table of the run."""
        from lightning_hesd.plotting import summary_html  # noqa: PLC0415 - Matplotlib is slow to import

        seconds = sum(spectrum.seconds for record in self for spectrum in record.spectra.values())
        summary = summarize(self, "hesd", seconds=seconds, overhead=None, kept={})
        return html.escape(repr(self)) if summary is None else summary_html(summary)

    @property
    def findings(self) -> list[Finding]:
        """Observations in the records that deserve attention, the most important first; none about the cost."""
        return findings(self)

    def compare_with_reference(self, index: int = -1) -> ReferenceComparison | None:
        """Compare a record with similar networks that we trained, see `compare_with_reference`.

        The phase of training follows from the loss, if there is a record of the start (`at_start=True`).

        Args:
            index: Position of the record.

        Returns:
            The comparison; None if the analysis failed.

        Raises:
            IndexError: If there is no such record.
        """
        return compare_run_with_reference(self, index)

    def plot(self, kind: Literal["c_t", "density_evolution", "layers"] = "c_t", ax: Axes | None = None) -> Axes:
        """Draw C_t along the run with its interval and the picks, the densities, or the layers.

        Args:
            kind: What to draw.
            ax: Axes to draw on; default: those of a new figure.

        Raises:
            ValueError: If `kind` is unknown, or the records lack what it draws.
        """
        from lightning_hesd import plotting  # noqa: PLC0415 - Matplotlib is slow to import

        check_choice("kind", kind, ("c_t", "density_evolution", "layers"))
        draw: Callable[..., Axes] = getattr(plotting, f"plot_{kind}")
        return draw(self, ax=ax)

    def __getstate__(self) -> dict[str, Any]:
        """Return no folders: a copy looks into them anew, and file systems cannot be pickled."""
        return {"about": self.about, "_folders": {}}

    def rewind(self, global_step: int) -> None:
        """Delete the records after `global_step`, and all at step 0: a run starts, or continues, from there."""
        self[:] = [record for record in self if global_step > 0 and record.global_step <= global_step]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the spectra not yet written to `folder`, and the index of all records.

        Every file appears whole or not at all, the index last. Files of another run that the folder's index names are
        replaced or deleted. The old index is deleted before them, so that no index names files of another run.

        Args:
            folder: A path, or a URL of a filesystem that fsspec knows.
        """
        if self.about:
            self.about = {**self.about, "written": now()}
        self._folder(folder).update(self._contents(), self._rows(), self.about)

    def is_in(self, folder: str | os.PathLike[str]) -> bool:
        """Return whether a folder has the files of all these records; it may have others."""
        self._folders.pop(str(folder), None)  # another run may have written to it since
        return self._folder(folder).has(self._contents())

    def _folder(self, folder: str | os.PathLike[str]) -> HistoryFolder:
        location = str(folder)
        if location not in self._folders:
            self._folders[location] = HistoryFolder(location)
        return self._folders[location]

    def _contents(self) -> dict[str, Any]:
        """Return the spectra by the names of their files."""
        return {
            record.file_name(suffix): getattr(record, field)
            for record in self
            for field, suffix in FIELDS.items()
            if getattr(record, field)
        }

    def _rows(self) -> list[dict[str, Any]]:
        """Return the rows of the index."""
        return [
            encode_record(record, lambda field, _, record=record: record.file_name(FIELDS[field]))  # type: ignore[misc]
            for record in self
        ]

    @classmethod
    def load(cls, log_dir: str | os.PathLike[str], name: str = "hesd") -> SpectrumHistory:
        """Read the history of a run back.

        Args:
            log_dir: The run's log directory, or the folder of the history in it; a path, or a URL.
            name: The callback's `name`, which is also that of the folder.

        Raises:
            FileNotFoundError: If there is no history.
            ValueError: If its index is damaged, or was written by a newer version.
        """
        folders = [joined(log_dir, name), str(log_dir)]
        location = next((folder for folder in folders if exists(joined(folder, INDEX_NAME))), None)
        if location is None:
            msg = f"no {INDEX_NAME} in {folders[0]} or {folders[1]}: pass the log directory of a run with the callback."
            raise FileNotFoundError(msg)
        history = cls()
        with fetched(location) as directory:
            path = directory / INDEX_NAME
            rows, history.about = read_index(path)
            try:
                # The names only: an index must not point outside its own folder.
                history.extend(decode_record(r, lambda f, name: load(f, directory / Path(name).name)) for r in rows)
            except ValueError as error:
                msg = f"a record in {path} is damaged: {error}"
                raise ValueError(msg) from error
        return history

    def to_dataframe(self) -> pd.DataFrame:
        """Return a pandas table with a row for each record, in their order.

        Columns are `epoch`, `global_step` and the scalars that are logged, without the prefix of their names: `c_t`,
        `c_t_low`, `c_t_high`, `lambda_max`, ..., `loss`, `seconds`. Those of other spectra begin with `gen_`, `pre_`,
        `ggn_` or `residual_`, and are there if some record has such a spectrum; so are `delta_r_e`, `delta_k_h05` and
        `verdict` (in words), and `stability_ratio`. `metric_<key>` are the metrics of the network that were logged for
        the analyzed weights. `hesd_type` is "MP" or "MN". What is undefined, or was not found because the analysis
        failed, is missing; `error` has what failed.

        Raises:
            ImportError: If pandas is not installed.
        """
        return records_table(self)

    def layers_to_dataframe(self) -> pd.DataFrame:
        """Return a pandas table with a row for each analyzed layer of each record, and its `LayerIndicators`.

        Columns are `epoch`, `global_step`, `layer`, `c_t`, `lambda_max`, `trace`, ...; `pivot` makes a matrix of one.

        Raises:
            ImportError: If pandas is not installed.
        """
        return layers_table(self)

    def state_dict(self) -> dict[str, Any]:
        """Return the records as texts, numbers and one tensor, for checkpoints.

        Every checkpoint has all records: as tensors of their own and plain values, a few hundred would take longer to
        pickle than a small network takes to train for an epoch.
        """
        rows, packing = pack_records(self)
        return {
            "format": FORMAT_VERSION,
            "records": json.dumps(rows, separators=(",", ":")),
            "shapes": packing.shapes,
            "numbers": torch.from_numpy(packing.numbers),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the records by those of `state_dict`.

        Raises:
            ValueError: If the state is invalid or damaged.
        """
        check_version(version_in(state), "the history")
        check_fields(state, _STATE, "the history")
        packing = Packing.of(state["numbers"].cpu().numpy(), state["shapes"])
        self[:] = unpack_records(parsed(state["records"], finite=False), packing)
