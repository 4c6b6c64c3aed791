"""Modes of a module during an analysis; one of them is training mode without randomness."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Mode = Literal["eval", "train", "keep"]
ModeName = Literal["eval", "deterministic", "train", "keep"]


@dataclass(frozen=True)
class ModuleModes:
    """The mode of each module of a network.

    Attributes:
        name: Name of the mode in records.
        training: Module -> whether it is in training mode.
    """

    name: ModeName
    training: Mapping[nn.Module, bool] = field(repr=False)

    @classmethod
    def of(cls, module: nn.Module, name: ModeName) -> ModuleModes:
        """Return the present modes of a module and its submodules."""
        return cls(name, {m: m.training for m in module.modules()})


def mode_name(mode: Mode | ModuleModes) -> ModeName:
    """Return the name of a mode in records."""
    return mode.name if isinstance(mode, ModuleModes) else mode


def set_mode(module: nn.Module, mode: Mode | ModuleModes) -> None:
    """Bring a module and its submodules into a mode."""
    if isinstance(mode, ModuleModes):
        for submodule, training in mode.training.items():
            submodule.training = training
    elif mode != "keep":
        try:
            module.train(mode == "train")
        except NotImplementedError as error:  # of programs from `torch.export`
            msg = f"the module cannot be brought into mode {mode!r} ({error}): analyze it with mode='keep'."
            raise NotImplementedError(msg) from error


def without_randomness(module: nn.Module, name: ModeName) -> ModuleModes:
    """Return the present modes, but evaluation mode for modules that are random or use statistics of the batch.

    Those are: PyTorch's own layers, whose mode has no other effect; subclasses of its dropout, normalization, recurrent
    and attention layers; other layers with running statistics; and layers named dropout, drop path, stochastic depth or
    noise. Use it with `WithoutRandomness`.
    """
    return ModuleModes(name, {m: m.training and not _is_random(m) for m in module.modules()})


_RANDOM = (_DropoutNd, _NormBase, nn.RReLU, nn.RNNBase, nn.MultiheadAttention)

_NAMES = re.compile(r"drop_?out|drop_?path|drop_?block|drop_?connect|stochastic_?depth|noise", re.IGNORECASE)


def _is_random(module: nn.Module) -> bool:
    kind = type(module)
    if isinstance(module, _RANDOM) or kind.__module__.startswith("torch.nn."):
        return True
    if next(module.children(), None) is not None:
        return False
    if any(name in {"running_mean", "running_var"} for name, _ in module.named_buffers(recurse=False)):
        return True
    return _NAMES.search(kind.__name__) is not None and next(module.parameters(), None) is None


_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)

_DROPOUT_KERNELS: tuple[Any, ...] = (
    *(torch.dropout, torch.dropout_, torch.feature_dropout, torch.feature_dropout_),
    *(torch.alpha_dropout, torch.alpha_dropout_, torch.feature_alpha_dropout, torch.feature_alpha_dropout_),
)

_SWITCHES: dict[Any, tuple[str, int, object]] = {
    **dict.fromkeys(_DROPOUTS, ("training", 2, False)),
    **dict.fromkeys(_DROPOUT_KERNELS, ("train", 2, False)),
    F.rrelu: ("training", 3, False),
    torch.rrelu: ("training", 3, False),
    F.batch_norm: ("training", 5, False),
    F.instance_norm: ("use_input_stats", 5, False),
    F.multi_head_attention_forward: ("training", 13, False),
    F.scaled_dot_product_attention: ("dropout_p", 4, 0.0),
}
"""Functions with an argument that makes them random or dependent on the batch: its name, position and off value."""

_NORMS = {F.batch_norm, F.instance_norm}
"""Functions that need statistics of the batch if there are no running ones."""


class WithoutRandomness(TorchFunctionMode):
    """Runs PyTorch's functions without dropout and without statistics of the batch, regardless of their arguments."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function with its random part off."""
        kwargs = dict(kwargs or {})
        switch, running_mean = _SWITCHES.get(func), args[1] if len(args) > 1 else kwargs.get("running_mean")
        if switch is not None and (func not in _NORMS or running_mean is not None):
            name, position, off = switch
            if position < len(args):
                args = (*args[:position], off, *args[position + 1 :])
            else:
                kwargs[name] = off
        return func(*args, **kwargs)
