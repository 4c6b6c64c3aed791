"""The analyzed weights, kept until they are saved: other code may change those of the module in between."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch.nn.parameter import is_lazy

from lightning_hesd.numerics.dtensors import is_dtensor, local_shard

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Changes:
    """The changes of weights since their analysis.

    Attributes:
        names: Names of parameters and buffers that were changed, removed or added.
        restructured: Whether any were removed or added, as by the first pruning.
        lost: Whether the analyzed values of any cannot be restored.
    """

    names: tuple[str, ...]
    restructured: bool
    lost: bool

    def __str__(self) -> str:
        """Return the first names."""
        more = len(self.names) - 2
        return ", ".join(self.names[:2]) + (f" and {more} more" if more > 0 else "")


class AnalyzedWeights:
    """The parameters and buffers of a module at its analysis.

    Trainable parameters and buffers are copied, which takes the memory of one vector of the analysis. Frozen parameters
    may be far larger than all others, so only their checksums are kept.
    """

    def __init__(self, module: nn.Module) -> None:
        self._saved = {name for name, value in module.state_dict().items() if _is_plain(value)}
        self._copies: dict[str, Tensor] = {}
        self._frozen: dict[str, tuple[Tensor, int]] = {}
        frozen = {id(p) for p in module.parameters() if not p.requires_grad}
        for name, tensor in _tensors(module).items():
            if id(tensor) in frozen:
                self._frozen[name] = (tensor, _checksum(tensor))
            else:
                self._copies[name] = local_shard(tensor.detach()).clone()

    def changes(self, module: nn.Module) -> Changes:
        """Return the changes of the module since its analysis, compared bit by bit."""
        now = _tensors(module)
        then = {**self._copies, **{name: local_shard(tensor) for name, (tensor, _) in self._frozen.items()}}
        moved = {name for name in now.keys() | then.keys() if not _alike(now.get(name), then.get(name))}
        frozen = {name for name, (tensor, known) in self._frozen.items() if _checksum(tensor) != known}
        replaced = {name for name, (tensor, _) in self._frozen.items() if now.get(name) is not tensor} - moved
        changed = {name for name, copy in self._copies.items() if name not in moved and not _equal(now[name], copy)}
        restructured = bool(moved or replaced)
        is_known = self._saved <= then.keys() and not any(map(is_dtensor, now.values()))
        return Changes(
            tuple(sorted(moved | frozen | replaced | changed)),
            restructured,
            lost=bool(frozen) or (restructured and not is_known),
        )

    @contextlib.contextmanager
    def put_back(self, module: nn.Module) -> Iterator[None]:
        """Give the module its analyzed values for a block, and its present ones again afterwards."""
        now = _tensors(module)
        later: list[tuple[Tensor, Tensor]] = []
        try:
            with torch.inference_mode():  # which may change inference tensors, too
                for name, copy in self._copies.items():
                    if not _equal(now[name], copy):
                        part = local_shard(now[name]).data  # without a new version of the tensor, which graphs may hold
                        later.append((part, part.clone()))
                        part.copy_(copy)
            yield
        finally:
            with torch.inference_mode():
                for part, values in reversed(later):  # tensors may share memory
                    part.copy_(values)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the `state_dict` at the analysis, for a restructured module, which cannot take the values back."""
        known = {**self._copies, **{name: tensor.detach() for name, (tensor, _) in self._frozen.items()}}
        return {name: value for name, value in known.items() if name in self._saved}

    def missed_by(self, state_dict: Mapping[str, Any]) -> str | None:
        """Return the name of the first tensor whose values in a state dict differ; None if all are the same.

        The state dict may lack tensors, or have them in another precision.
        """
        for name, copy in self._copies.items():
            saved = state_dict.get(name)
            if _is_plain(saved) and not is_dtensor(saved) and saved.shape == copy.shape:
                converted = copy.to(saved.device).to(saved.dtype)  # the device of the copy may not have that precision
                if not _equal(saved, converted):
                    return name
        return None


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that can be copied and compared, under all their names."""
    every = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in every if _is_plain(tensor)}


def _is_plain(value: object) -> TypeGuard[Tensor]:
    return (
        isinstance(value, torch.Tensor)
        and not is_lazy(value)
        and value.layout == torch.strided
        and not value.is_meta
        and not value.is_quantized
        and not value.is_nested
    )


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether both exist, and the values of one can be copied into the other."""
    if a is None or b is None:
        return False
    a, b = local_shard(a), local_shard(b)
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of the same shape and dtype have the same bits; NaN equals itself."""
    return torch.equal(_bits(a), _bits(b))


def _checksum(tensor: Tensor) -> int:
    return int(_bits(tensor).sum(dtype=torch.int64))


def _bits(tensor: Tensor) -> Tensor:
    tensor = local_shard(tensor.detach())
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg().view(_INTEGERS[tensor.element_size()])
