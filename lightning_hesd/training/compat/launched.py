"""What comes back from processes that end with the fit: those of ddp_spawn, ddp_fork and ddp_notebook.

Such a strategy trains with copies of the callbacks. Lightning brings back weights, logged metrics and the path of the
best checkpoint; the state of a callback travels with them, and is delivered when the main process unpickles it.
"""

from __future__ import annotations

import io
import uuid
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

import torch

from lightning_hesd.training.compat.internals import add_to_results

if TYPE_CHECKING:
    import lightning.pytorch as pl


class Recipient(Protocol):
    """A callback of the main process."""

    def receive(self, state: dict[str, Any]) -> None:
        """Take over the state of its copy in another process."""


_RECIPIENTS: WeakValueDictionary[str, Recipient] = WeakValueDictionary()


def address_of(recipient: Recipient) -> str:
    """Return an address for what is sent to a callback, also by its copies in other processes."""
    address = uuid.uuid4().hex
    _RECIPIENTS[address] = recipient
    return address


def address_of_copy(recipient: Recipient, address: str) -> str:
    """Return the address of a copy: that of the original in another process, one of its own beside the original."""
    if address in _RECIPIENTS:
        return address_of(recipient)
    _RECIPIENTS[address] = recipient
    return address


def send(trainer: pl.Trainer, address: str, state: dict[str, Any]) -> None:
    """Send the state of process zero to the process that started the fit, if that is another one."""
    if trainer.is_global_zero:
        add_to_results(trainer, address, _Letter(address, state))


class _Letter:
    """Delivers itself when it is unpickled."""

    def __init__(self, address: str, state: dict[str, Any]) -> None:
        self._address = address
        self._state = state

    def __reduce__(self) -> Any:
        buffer = io.BytesIO()
        torch.save(self._state, buffer)  # a tensor would be sent as shared memory, which goes with the process
        return _deliver, (self._address, buffer.getvalue())


def _deliver(address: str, data: bytes) -> None:
    recipient = _RECIPIENTS.get(address)
    if recipient is not None:
        recipient.receive(torch.load(io.BytesIO(data), weights_only=True))
