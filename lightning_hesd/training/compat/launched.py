"""The results of processes that end with the fit: those of ddp_spawn, ddp_fork and ddp_notebook.

Such a strategy trains with copies of the callbacks. Lightning brings weights, logged metrics and the path of the best
checkpoint to the main process; the state of a callback travels with them, and is delivered when it is unpickled.
"""

from __future__ import annotations

import io
import uuid
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

import torch

from lightning_hesd.training.compat.namespaces import lightning_types

if TYPE_CHECKING:
    import lightning.pytorch as pl


class Recipient(Protocol):
    """A callback of the main process."""

    def receive(self, state: dict[str, Any]) -> None:
        """Take the state of a copy in another process."""


_RECIPIENTS: WeakValueDictionary[str, Recipient] = WeakValueDictionary()


def address_of(recipient: Recipient) -> str:
    """Return an address to which copies of a callback in other processes can send their state."""
    address = uuid.uuid4().hex
    _RECIPIENTS[address] = recipient
    return address


def address_of_copy(recipient: Recipient, address: str) -> str:
    """Return the address of a copy: in another process that of the original, in the same process a new one."""
    if address in _RECIPIENTS:
        return address_of(recipient)
    _RECIPIENTS[address] = recipient
    return address


def send(trainer: pl.Trainer, address: str, state: dict[str, Any]) -> None:
    """Send the state of rank zero to the process that started the fit, if that is another process.

    It is one of the results of the fit, whose processes end with it.
    """
    launcher = trainer.strategy.launcher
    kind = lightning_types("strategies.launchers.multiprocessing._MultiProcessingLauncher")
    if not trainer.is_global_zero or not isinstance(launcher, kind):
        return
    collect = launcher.get_extra_results

    def extended(trainer: pl.Trainer) -> dict[str, Any]:
        return {**collect(trainer), address: _Letter(address, state)}

    launcher.get_extra_results = extended  # of this process, which ends


class _Letter:
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
        recipient.receive(torch.load(io.BytesIO(data), weights_only=True))
