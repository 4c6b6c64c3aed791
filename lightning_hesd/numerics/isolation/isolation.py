"""Isolation: what one evaluation of the user's functions leaves behind does not reach the next.

Counters, lists, running statistics, queues and power iterations go on with every call, and a product that is computed
from several evaluations (recomputed, or by differences) would be one of several losses. So each evaluation starts from
the state that the first one found.
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
        hooks: What the user's functions register with autograd.
        power_iterations: What spectral norms have found.
    """

    def __init__(
        self, module: nn.Module, others: Sequence[object], analysed: Sequence[Tensor], before: Snapshot
    ) -> None:
        """Prepare for the first evaluation, which finds the state.

        Args:
            module: The module.
            others: Other objects that evaluations may change.
            analysed: Parameters whose values stay as they are: central differences move them, and graphs hold them.
            before: A snapshot of all of these.
        """
        self._module = module
        self._others = others
        self.hooks = Hooks()
        self.power_iterations = PowerIterations()
        self._analysed = analysed
        self._before: Snapshot | None = before
        self._start: Snapshot | None = None
        self._evaluated: set[object] = set()
        self._latest: object = None

    def restore(self, what: object) -> None:
        """Go back to the state that the first evaluation found.

        Args:
            what: What is to be evaluated. The same from the same state does the same: what its first evaluation has not
                changed is not looked at as thoroughly after a later one.
        """
        if self._start is None:
            self._start = Snapshot(self._module, others=self._others, known=self._before, without=self._analysed)
        else:
            self._start.restore(thorough=self._latest not in self._evaluated, replacing=True)
            self._evaluated.add(self._latest)
        self._latest = what
        self.power_iterations.begin()

    def start_here(self) -> None:
        """Take the present state for the one from which evaluations start."""
        self._before = self._start = None
        self._evaluated = set()

    @contextlib.contextmanager
    def afresh(self, analysed: Sequence[Tensor]) -> Iterator[None]:
        """Let evaluations inside start from a state of their own, for which others are analysed."""
        outside = self._analysed, self._before, self._start, self._evaluated
        self._analysed, self._before, self._start, self._evaluated = analysed, None, None, set()
        try:
            with self.power_iterations.afresh():
                yield
        finally:
            self._end()
            self._analysed, self._before, self._start, self._evaluated = outside

    def _end(self) -> None:
        if self._start is not None:
            self._start.restore()

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Call the user's functions in here."""
        dtype = torch.get_default_dtype()
        try:
            with self.hooks.acting(), torch.set_grad_enabled(torch.is_grad_enabled()):
                yield
        finally:
            torch.set_default_dtype(dtype)
