"""Copies of a callback, in this process or in others, whose results the original shows as its own.

Strategies such as ddp_spawn, ddp_fork and ddp_notebook train with copies of the callbacks, in processes that end with
the fit. The state of a copy travels to the main process with Lightning's own results of the fit, and is delivered when
it is unpickled.
"""

from __future__ import annotations

import copy
import io
import uuid
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch

from lightning_hesd.numerics.inputs.portable import deep_copied
from lightning_hesd.training.compat.strategies import add_result_of_fit

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from typing_extensions import Self

_RECIPIENTS: WeakValueDictionary[str, CopiedCallback] = WeakValueDictionary()
"""The callbacks of this process, by the address to which copies in other processes can send their state."""


class CopiedCallback:
    """A callback that shows the results of its copies.

    Libraries train with deep copies of callbacks, and some strategies with pickled copies in other processes. The user
    holds the original, and reads the results there.
    """

    _address: str
    _original: Self | None

    def begin_copies(self) -> None:
        """Make this an original; to be called by the constructor."""
        self._address = uuid.uuid4().hex
        _RECIPIENTS[self._address] = self
        self._original = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes; a pickled copy has no original in its process."""
        return {**vars(self), "_original": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy, with the original's address in another process, and a new one in the same process."""
        vars(self).update(state)
        if self._address in _RECIPIENTS:
            self._address = uuid.uuid4().hex
        _RECIPIENTS[self._address] = self

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

    def show_in_original(self) -> None:
        """Let the original, and in turn its original, show the results."""
        if self._original is not None:
            self.share_results(self._original)
            self._original.show_in_original()

    def send_results(self, trainer: pl.Trainer) -> None:
        """Send the results of rank zero to the process that started the fit, if this one ends with the fit."""
        add_result_of_fit(trainer, self._address, _SentState(self._address, self.state_dict()))


class _SentState:
    """A state that is delivered when it is unpickled."""

    def __init__(self, address: str, state: dict[str, Any]) -> None:
        self._address = address
        self._state = state

    def __reduce__(self) -> Any:
        buffer = io.BytesIO()
        torch.save(self._state, buffer)  # a tensor would be sent as shared memory, which ends with the process
        return _deliver, (self._address, buffer.getvalue())


def _deliver(address: str, data: bytes) -> None:
    recipient = _RECIPIENTS.get(address)
    if recipient is not None:
        recipient.take_results(torch.load(io.BytesIO(data), weights_only=True))
        recipient.show_in_original()
