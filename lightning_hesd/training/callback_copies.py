"""Copies of a callback, in this process or in others, whose results the original shows as its own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from lightning_hesd.numerics.inputs.portable import deep_copied
from lightning_hesd.training.compat import launched

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from typing_extensions import Self


class CopiedCallback:
    """A callback that shows the results of its copies.

    Libraries train with deep copies of callbacks, and strategies such as ddp_spawn with pickled copies, in processes
    that end with the fit. The user holds the original, and reads the results there.
    """

    _address: str
    _original: Self | None

    def begin_copies(self) -> None:
        """Make this an original; to be called by the constructor."""
        self._address = launched.address_of(self)
        self._original = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes; a pickled copy has no original in its process."""
        return {**vars(self), "_original": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy."""
        vars(self).update(state)
        self._address = launched.address_of_copy(self, self._address)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy whose results this callback shows, too."""
        made: Self = deep_copied(self, memo)
        made._original = self
        return made

    def __copy__(self) -> Self:
        """Return a deep copy: two runs cannot share their results."""
        return copy.deepcopy(self)

    def state_dict(self) -> dict[str, Any]:
        """Return the results, as tensors and plain values."""
        raise NotImplementedError

    def take_results(self, state: dict[str, Any]) -> None:
        """Replace the results by those of a copy's `state_dict`."""
        raise NotImplementedError

    def share_results(self, original: Self) -> None:
        """Give the results to the original."""
        original.take_results(self.state_dict())

    def receive(self, state: dict[str, Any]) -> None:
        """Take the results of a copy in a process that ends with the fit."""
        self.take_results(state)
        self.show_in_original()

    def show_in_original(self) -> None:
        """Let the original, and in turn its original, show the results."""
        if self._original is not None:
            self.share_results(self._original)
            self._original.show_in_original()

    def send_results(self, trainer: pl.Trainer) -> None:
        """Send the results to the process that started the fit, if this one ends with the fit."""
        launched.send(trainer, self._address, self.state_dict())
