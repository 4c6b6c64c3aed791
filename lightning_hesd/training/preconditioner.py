"""The preconditioner of an optimizer: the diagonal D by which it divides its direction, and its stability threshold.

Steps along -D⁻¹m are plain descent in preconditioned coordinates, in which the Hessian is D^(-1/2) H D^(-1/2). Descent
with step length lr is stable while the largest eigenvalue of this matrix is below 2/lr, with momentum below a larger
threshold (Cohen et al. 2021, arXiv:2103.00065; 2022, arXiv:2207.14484).
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    Group = dict[str, Any]
    State = dict[str, Tensor]


YOUNG_STEPS = 8
"""Steps before which an adaptive optimizer has no stability ratio: it divides by averages of too few gradients."""


class UnreadableOptimizerError(ValueError):
    """The preconditioner of an optimizer cannot be read from its state."""


@dataclass(frozen=True)
class Preconditioner:
    """The preconditioner of the optimizers at their present state.

    Attributes:
        diagonal: D for each parameter, positive, in the shape of the parameter.
        threshold: Largest eigenvalue of D^(-1/2) H D^(-1/2) at which steps are stable, without weight decay; None if
            parameter groups differ, and if steps have length zero, which are stable at any eigenvalue.
    """

    diagonal: dict[Tensor, Tensor]
    threshold: float | None

    @property
    def is_identity(self) -> bool:
        """Whether D is 1."""
        return all(bool((d == 1).all()) for d in self.diagonal.values())

    def named(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the diagonals by parameter name."""
        return {name: self.diagonal[p] for name, p in module.named_parameters() if p in self.diagonal}


def check_readable(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers of unknown classes; their state is not needed.

    Raises:
        UnreadableOptimizerError: If the class of an optimizer is not known.
    """
    for optimizer in optimizers:
        _reader(optimizer)


def read_preconditioner(optimizers: Sequence[Optimizer]) -> Preconditioner:
    """Return the preconditioner of optimizers, each of its own parameters.

    Raises:
        UnreadableOptimizerError: If the class of an optimizer is not known, it has made no step yet, or it maximizes.
    """
    diagonal: dict[Tensor, Tensor] = {}
    thresholds = set()
    for optimizer in optimizers:
        read, stability = _reader(optimizer)
        for group in optimizer.param_groups:
            if group.get("maximize"):
                msg = (
                    f"{type(optimizer).__name__} steps along the gradient (`maximize=True`), and not against it: "
                    "return the loss with the opposite sign, and leave `maximize` out."
                )
                raise UnreadableOptimizerError(msg)
            thresholds.add(stability(group))
            for p in group["params"]:
                if p.requires_grad:
                    # A parameter that never had a gradient has no state and no curvature: any diagonal will do.
                    idle = optimizer.state and p not in optimizer.state
                    d = torch.ones_like(p) if idle else read(p, optimizer.state.get(p, {}), group)
                    diagonal[p] = _positive(d, p, optimizer)
    threshold = thresholds.pop() if len(thresholds) == 1 else math.inf
    return Preconditioner(diagonal, threshold if math.isfinite(threshold) else None)


def read_stability(optimizers: Sequence[Optimizer], steps: int) -> tuple[Preconditioner | None, str | None]:
    """Return the preconditioner, None if there is none, and the reason why no stability threshold is known.

    In their first steps, given the number of steps so far, adaptive optimizers have none, for no other reason.
    """
    names = " and ".join(sorted({type(optimizer).__name__ for optimizer in optimizers}))
    try:
        check_readable(optimizers)
    except UnreadableOptimizerError:
        return None, f"the stability threshold of {names} is not known; those of {', '.join(_READERS)} are"
    try:
        read = read_preconditioner(optimizers)
    except UnreadableOptimizerError as error:
        return None, str(error)
    if steps < YOUNG_STEPS and not read.is_identity:
        return None, None
    moves = any(float(group["lr"]) > 0 for optimizer in optimizers for group in optimizer.param_groups)
    if read.threshold is None and moves:
        return read, f"the parameter groups of {names} have different stability thresholds"
    return read, None


def _reader(optimizer: Optimizer) -> tuple[Callable[[Tensor, State, Group], Tensor], Callable[[Group], float]]:
    for kind in type(optimizer).__mro__:
        if kind.__name__ in _READERS and _steps_like(type(optimizer), kind):
            return _READERS[kind.__name__]
    msg = (
        f"the preconditioner of {type(optimizer).__name__} cannot be read; known are {', '.join(_READERS)}. Pass your "
        "own diagonals, `preconditioner={parameter name: diagonal}`, or leave `preconditioner` out."
    )
    raise UnreadableOptimizerError(msg)


def _steps_like(kind: Any, known: Any) -> bool:
    """Whether a class of optimizers leaves the step of a known one as it is; PyTorch wraps those of both."""
    return inspect.unwrap(kind.step) is inspect.unwrap(known.step)


def _positive(diagonal: Tensor, p: Tensor, optimizer: Optimizer) -> Tensor:
    if bool((diagonal > 0).all()) and bool(diagonal.isfinite().all()):
        return diagonal.detach()
    msg = (
        f"{type(optimizer).__name__} divides a parameter of shape {tuple(p.shape)} by values from "
        f"{float(diagonal.min()):.3g} to {float(diagonal.max()):.3g}; they must be positive and finite: set its `eps`."
    )
    raise UnreadableOptimizerError(msg)


def _of(state: State, key: str) -> Tensor:
    if key not in state:
        msg = f"the optimizer's state holds no {key!r}: it has made no step yet, or keeps it under another name."
        raise UnreadableOptimizerError(msg)
    return state[key]


def _sgd(p: Tensor, state: State, group: Group) -> Tensor:  # noqa: ARG001
    return torch.ones_like(p)


def _adam(p: Tensor, state: State, group: Group) -> Tensor:  # noqa: ARG001
    second = _of(state, "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq")
    correction = 1 - float(group["betas"][1]) ** float(_of(state, "step"))
    root: Tensor = (second / correction).sqrt()
    return root + float(group["eps"])


def _rmsprop(p: Tensor, state: State, group: Group) -> Tensor:  # noqa: ARG001
    second = _of(state, "square_avg")
    if group.get("centered"):
        second = second - _of(state, "grad_avg").square()
    return second.sqrt() + float(group["eps"])


def _adagrad(p: Tensor, state: State, group: Group) -> Tensor:  # noqa: ARG001
    steps_before = float(_of(state, "step")) - 1
    decay = 1 + steps_before * float(group["lr_decay"])  # of the learning rate
    return (_of(state, "sum").sqrt() + float(group["eps"])) * max(decay, 1.0)


def _adahessian(p: Tensor, state: State, group: Group) -> Tensor:  # noqa: ARG001
    """Spatial averaging, if any, is part of the state."""
    correction = 1 - float(group["betas"][1]) ** float(_of(state, "step"))
    size: Tensor = (_of(state, "exp_hessian_diag_sq") / correction) ** (float(group["hessian_power"]) / 2)
    return size + float(group["eps"])


def _heavy_ball(group: Group) -> float:
    beta, lr = float(group.get("momentum", 0.0)), float(group["lr"])
    if group.get("nesterov"):
        return _over(2 * (1 + beta), (1 + 2 * beta) * lr)
    return _over(2 * (1 + beta), (1 - float(group.get("dampening", 0.0)) * bool(beta)) * lr)


def _averaged_momentum(group: Group) -> float:
    beta, lr = float(group["betas"][0]), float(group["lr"])
    return _over(2 * (1 + beta), (1 - beta) * lr)


def _over(numerator: float, step_length: float) -> float:
    """Return a threshold; infinite if the learning rate is 0, or momentum ignores the gradient."""
    return numerator / step_length if step_length else math.inf


_READERS: dict[str, tuple[Callable[[Tensor, State, Group], Tensor], Callable[[Group], float]]] = {
    "SGD": (_sgd, _heavy_ball),
    "Adam": (_adam, _averaged_momentum),
    "AdamW": (_adam, _averaged_momentum),
    "RMSprop": (_rmsprop, _heavy_ball),
    "Adagrad": (_adagrad, _heavy_ball),
    "AdaHessian": (_adahessian, _averaged_momentum),
}
