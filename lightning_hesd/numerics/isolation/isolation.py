"""Isolation of evaluations: each evaluation of the user's functions starts from the same state.

Counters, lists, running statistics, queues and power iterations advance with every call. A matvec that takes several
evaluations (by recomputation, or by finite differences) would mix several losses. So each evaluation starts from the
state in which the first one started.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from lightning_hesd.numerics.derivatives.hooks import Hooks
from lightning_hesd.numerics.derivatives.power_iterations import PowerIterations
from lightning_hesd.numerics.isolation.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn


class Isolation:
    """The state from which evaluations start.

    Attributes:
        hooks: The hooks that the user's functions register with autograd.
        power_iterations: The singular vectors of spectral norms.
    """

    def __init__(
        self, module: nn.Module, others: Sequence[object], analyzed: Sequence[Tensor], before: Snapshot
    ) -> None:
        """Prepare for the first evaluation, given a snapshot of the module and of other objects that may change.

        Values of analyzed parameters are not restored: finite differences move them, and graphs hold them.
        """
        self._module = module
        self._others = others
        self.hooks = Hooks()
        self.power_iterations = PowerIterations()
        self._analyzed = analyzed
        self._before: Snapshot | None = before
        self._start: Snapshot | None = None
        self._evaluated: set[object] = set()
        self._latest: object = None

    def restore(self, key: object) -> None:
        """Restore the state in which the first evaluation started.

        Args:
            key: Identifies the evaluation that follows. Evaluations with one key change the same objects, so after the
                first of them, later restorations are less thorough.
        """
        if self._start is None:
            self._start = Snapshot(self._module, others=self._others, earlier=self._before, excluded=self._analyzed)
        else:
            self._start.restore(thorough=self._latest not in self._evaluated, replacing=True)
            self._evaluated.add(self._latest)
        self._latest = key
        self.power_iterations.begin()

    def restart(self) -> None:
        """Let later evaluations start from the present state."""
        self._before = self._start = None
        self._evaluated = set()

    @contextlib.contextmanager
    def separate(self, analyzed: Sequence[Tensor]) -> Iterator[None]:
        """Let evaluations in this context start from a state of their own, with other analyzed parameters."""
        outside = self._analyzed, self._before, self._start, self._evaluated
        self._analyzed = analyzed
        self.restart()
        try:
            with self.power_iterations.separate():
                yield
        finally:
            if self._start is not None:
                self._start.restore()
            self._analyzed, self._before, self._start, self._evaluated = outside

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Run the user's functions in this context: hooks act, and global settings are restored on leaving."""
        dtype = torch.get_default_dtype()
        try:
            with self.hooks.acting(), torch.set_grad_enabled(torch.is_grad_enabled()):
                yield
        finally:
            torch.set_default_dtype(dtype)
