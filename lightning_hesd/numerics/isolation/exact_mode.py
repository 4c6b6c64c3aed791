"""Exact mode: no autocast, TF32, fused kernels or hooks during an analysis; everything is restored afterwards.

In it, each evaluation of the user's functions starts from the same state. Counters, lists, running statistics, queues
and power iterations advance with every call, and a matvec that takes several evaluations (by recomputation, or by
finite differences) would mix several losses. So each evaluation starts from the state in which the first one started.
"""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_hesd.numerics.derivatives.hooks import Hooks, no_hooks_in_backward
from lightning_hesd.numerics.derivatives.patches import patched
from lightning_hesd.numerics.derivatives.power_iterations import PowerIterations
from lightning_hesd.numerics.isolation.modes import set_mode
from lightning_hesd.numerics.isolation.settings import kept_settings
from lightning_hesd.numerics.isolation.snapshot import Snapshot, restoring

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from lightning_hesd.numerics.isolation.modes import Mode, ModuleModes


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
    def separate(self, copies: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """Let evaluations in this context start from a state of their own, with copies of the parameters."""
        outside = self._analyzed, self._before, self._start, self._evaluated
        self._analyzed = [copies[p] for p in self._analyzed if p in copies]
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


@contextlib.contextmanager
def exact_mode(
    module: nn.Module,
    mode: Mode | ModuleModes = "eval",
    analyzed: Sequence[nn.Parameter] = (),
    others: Sequence[object] = (),
) -> Iterator[Isolation]:
    """Bring `module` and PyTorch into the state in which second derivatives are exact; restore everything on leaving.

    Gradients are enabled. Disabled are autocast, TF32, and operations without a second derivative: fused attention,
    compiled code (it runs eagerly) and cuDNN for recurrent networks (in evaluation mode it has not even a first one).
    Gradients that the user has accumulated and hooks on parameters are removed. Other hooks do not act when the
    analysis differentiates (see `hooks`).

    Args:
        module: The module to analyze.
        mode: Mode of the module in this context; "keep" leaves each submodule in its mode.
        analyzed: Parameters that require grad in this context, even if they are frozen.
        others: Other objects that the user's functions may change.

    Yields:
        The isolation of evaluations of the user's functions from each other.

    Raises:
        ValueError: If a norm would wait for other ranks.
    """
    snapshot = Snapshot(module, others=others)
    isolation = Isolation(module, others, analyzed, snapshot)
    device_types = {p.device.type for p in module.parameters()} | {"cpu"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept_settings())
        stack.enter_context(restoring(snapshot))
        snapshot.clear_gradients()
        for p in (p for p in analyzed if not p.requires_grad):
            _set(stack, p, "requires_grad", True)
        stack.enter_context(isolation.hooks.limited())
        stack.enter_context(isolation.power_iterations.cached())
        stack.enter_context(no_hooks_in_backward(list(module.parameters())))
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_without_autocast(device_types))
        stack.enter_context(_exact_number_formats())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:  # or nothing is compiled; it takes a second to import
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(m, nn.RNNBase) for m in module.modules()):
            _set(stack, torch.backends.cudnn, "enabled", False)
        set_mode(module, mode)
        _check_norms(module)
        yield isolation


@contextlib.contextmanager
def _without_autocast(device_types: Iterable[str]) -> Iterator[None]:
    """Disable autocast, also in contexts that would enable it."""
    enter = torch.autocast.__enter__

    def enter_disabled(self: torch.autocast) -> object:
        with patched(self, "_enabled", False):
            return enter(self)  # type: ignore[no-untyped-call]

    with contextlib.ExitStack() as stack:
        for device_type in device_types:
            if torch.amp.is_autocast_available(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(patched(torch.autocast, "__enter__", enter_disabled))
        yield


def _check_norms(module: nn.Module) -> None:
    """Refuse norms that wait for the statistics of other ranks, which have other numbers of batches.

    Raises:
        ValueError: If the module has one, and there are several ranks.
    """
    is_initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not is_initialized or torch.distributed.get_world_size() == 1:
        return
    if any(isinstance(m, nn.SyncBatchNorm) and m.training for m in module.modules()):
        msg = (
            "in training mode SyncBatchNorm waits for the batches of all ranks, and an analysis gives each rank "
            "another number of batches: analyze with mode='eval'."
        )
        raise ValueError(msg)


def _set(stack: contextlib.ExitStack, owner: Any, name: str, value: object) -> None:
    """Set an attribute until the stack of contexts is left."""
    before = getattr(owner, name)
    if name == "fp32_precision":
        stack.callback(_inherit, owner, before)  # after the next one
    stack.callback(setattr, owner, name, before)
    setattr(owner, name, value)


def _inherit(backend: Any, before: str) -> None:
    """Let a backend follow the precision of all backends again, if it has the same: it cannot be seen if it did."""
    if getattr(torch.backends, "fp32_precision", None) == before:
        backend.fp32_precision = "none"


_REDUCED_SUMS = (
    *("allow_fp16_accumulation", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"),
)
"""Settings that let GPUs add up products of 16-bit numbers in 16 bits."""


@contextlib.contextmanager
def _exact_number_formats() -> Iterator[None]:
    """Set the formats of matrix products and convolutions to exact ones in this context.

    Since 2.9, PyTorch has two settings for each format, old and new, and reading the old one is an error where they
    differ: users' code does so by `torch.backends.cudnn.flags`. So both are set, unless they differ outside already.
    """
    formats, old_ones = _number_formats(), _old_settings()
    with contextlib.ExitStack() as stack:
        for backend, name, exact in formats:
            _set(stack, backend, name, exact)
        for write, before, exact in old_ones:
            stack.callback(write, before)
            write(exact)
        for backend, name, exact in formats:  # an old setting changes the new ones
            setattr(backend, name, exact)
        yield


def _old_settings() -> list[tuple[Callable[[Any], None], object, object]]:
    """Return functions that write the old settings, each with the present value and the exact one."""
    cudnn: Any = torch.backends.cudnn
    settings: list[tuple[Callable[[], object], Callable[[Any], None], object]] = [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        (partial(getattr, cudnn, "allow_tf32"), partial(setattr, cudnn, "allow_tf32"), False),
    ]
    found = []
    for read, write, exact in settings:
        with contextlib.suppress(RuntimeError):
            found.append((write, read(), exact))
    return found


def _number_formats() -> list[tuple[Any, str, object]]:
    """Return the settings of matrix products and convolutions without TF32 and similar formats."""
    cuda, cudnn, cpu = cast("Any", torch.backends.cuda), torch.backends.cudnn, cast("Any", torch.backends.mkldnn)
    sums = [(cuda.matmul, name, False) for name in _REDUCED_SUMS if hasattr(cuda.matmul, name)]
    if hasattr(cudnn, "conv"):  # torch >= 2.9; mixing the old flags with the new ones is an error there
        backends = [cuda.matmul, cudnn.conv, cudnn.rnn, cpu.matmul, cpu.conv, cpu.rnn]
        return [*sums, *((backend, "fp32_precision", "ieee") for backend in backends)]
    return [*sums, *((backend, "allow_tf32", False) for backend in (cuda.matmul, cudnn))]
