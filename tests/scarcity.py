"""Losses that run out of memory, in the ways PyTorch and Python say so."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def on_the_cpu() -> None:
    """Ask for more than there is: what PyTorch says comes from its own allocator."""
    torch.empty(2**50, dtype=torch.uint8)


def on_a_gpu() -> None:
    """Raise what PyTorch raises."""
    msg = "CUDA out of memory. Tried to allocate 2.00 GiB."
    raise torch.OutOfMemoryError(msg)


def in_python() -> None:
    """Ask Python for more than there is."""
    bytearray(2**62)


EXHAUSTIONS: dict[str, Callable[[], None]] = {"CPU": on_the_cpu, "GPU": on_a_gpu, "Python": in_python}


class Scarce:
    """A loss that runs out of memory in its first `times` evaluations, holding a large tensor at that moment.

    Attributes:
        held: The large tensors, as weak references.
    """

    def __init__(self, loss: Callable[[Any, Any], Tensor], exhaust: Callable[[], None], times: float) -> None:
        self.held: list[weakref.ref[Tensor]] = []
        self._loss, self._exhaust, self._times = loss, exhaust, times

    def __call__(self, module: Any, batch: Any) -> Tensor:
        loss = self._loss(module, batch)
        if self._times > 0:
            self._times -= 1
            large = loss.expand(1000).exp()
            self.held.append(weakref.ref(large))
            self._exhaust()
        return loss


class ScarceInProducts:
    """A loss whose first `times` Hessian-vector products run out of memory."""

    def __init__(self, loss: Callable[[Any, Any], Tensor], times: float) -> None:
        self._loss, self._times = loss, times

    def __call__(self, module: Any, batch: Any) -> Tensor:
        # The logarithm makes the gradient that comes back through the function depend on the parameters.
        return _Scarce.apply(self._loss(module, batch).exp(), self).log()

    def spend(self) -> None:
        if self._times > 0:
            self._times -= 1
            on_the_cpu()


class _Scarce(torch.autograd.Function):
    """The identity, whose second derivative is costly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, purse: ScarceInProducts) -> Tensor:
        ctx.purse = purse
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _ScarceBackward.apply(gradient, ctx.purse), None


class _ScarceBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, purse: ScarceInProducts) -> Tensor:
        ctx.purse = purse
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.purse.spend()
        return gradient.clone(), None
