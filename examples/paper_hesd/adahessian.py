"""AdaHessian (Yao et al. 2021, arXiv:2006.00719) with its spatial averaging.

State and options have the names of the implementation in pytorch-optimizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


class AdaHessian(Optimizer):
    """Adam whose squared gradient is replaced by the squared diagonal of the Hessian.

    Gradients must have a graph: call `backward(create_graph=True)`. A step removes the graph, because the graph holds
    the parameters and they hold their gradients.

    Args:
        params: Parameters or parameter groups.
        lr: Step length.
        betas: Decay rates of the averages of gradients and of squared diagonals.
        eps: Number added to the denominator.
        weight_decay: Decoupled weight decay, as in AdamW.
        hessian_power: 1 for a Newton-like step, 0 for plain momentum.
        averaged: Whether diagonals are averaged over space, see `spatial_average`.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.15,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_power: float = 1.0,
        averaged: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_power": hessian_power,
            "averaged": averaged,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Estimate the diagonal from one random vector, and take a step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        diagonals = dict(zip(parameters, hessian_diagonals(parameters), strict=True))
        for group in self.param_groups:
            for p in group["params"]:
                if p in diagonals:
                    p.grad = p.grad.detach()
                    diagonal = spatial_average(diagonals[p]) if group["averaged"] else diagonals[p].abs()
                    self._update(p, diagonal, group)
        return loss

    def _update(self, p: Tensor, diagonal: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_hessian_diag_sq"] = torch.zeros_like(p)
        state["step"] += 1
        first, second = group["betas"]
        mean = state["exp_avg"].mul_(first).add_(p.grad, alpha=1 - first)
        square = state["exp_hessian_diag_sq"].mul_(second).add_(diagonal.square(), alpha=1 - second)
        curvature = (square / (1 - second ** state["step"])) ** (group["hessian_power"] / 2)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.addcdiv_(mean, curvature + group["eps"], value=-group["lr"] / (1 - first ** state["step"]))


def hessian_diagonals(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return Hutchinson's estimate of the diagonal: z times the product of the Hessian with random signs z."""
    gradients = [p.grad for p in parameters]
    signs = [torch.randint_like(p, 2).mul(2).sub(1) for p in parameters]
    with torch.enable_grad():
        products = torch.autograd.grad(gradients, parameters, grad_outputs=signs)  # type: ignore[arg-type]
    return [sign * product for sign, product in zip(signs, products, strict=True)]


def spatial_average(diagonal: Tensor) -> Tensor:
    """Return the mean absolute diagonal over each block, in the shape of the parameter.

    Blocks are the kernels of convolutions and the rows of matrices (the weights of a linear or attention layer from its
    hidden dimension to one output). Vectors are not averaged.
    """
    size = diagonal.abs()
    if diagonal.ndim < 2:
        return size
    block = tuple(range(2, diagonal.ndim)) if diagonal.ndim > 2 else (1,)
    return size.mean(dim=block, keepdim=True).expand_as(size)
