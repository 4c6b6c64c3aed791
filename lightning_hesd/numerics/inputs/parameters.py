"""The analyzed parameters of a module, and the coordinates of a preconditioner."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING

import torch
from torch.nn.parameter import is_lazy

from lightning_hesd.numerics.devices import in_float64
from lightning_hesd.numerics.dtensors import local_shard
from lightning_hesd.numerics.isolation.tensor_memory import has_memory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from lightning_hesd.numerics.inputs.options import AnalysisOptions


def select_parameters(module: nn.Module, options: AnalysisOptions) -> dict[str, nn.Parameter]:
    """Return the parameters to analyze by name, each once.

    Raises:
        ValueError: If there is no such parameter, one is complex, sparse or without a shape yet, none has elements,
            some share memory, or they are on several devices.
    """
    wanted = options.parameters
    trainable = {
        name: p
        for name, p in module.named_parameters()
        if p.requires_grad or (options.include_frozen and (p.is_floating_point() or p.is_complex()))
    }
    if not trainable:
        hint = "" if options.include_frozen else " (`include_frozen=True` includes those that do not)"
        msg = f"`module` ({type(module).__name__}) has no parameter that requires grad{hint}: nothing to analyze."
        raise ValueError(msg)
    selected = {name: p for name, p in trainable.items() if wanted is None or wanted(name, p)}
    if not selected:
        msg = f"the filter `parameters` leaves none of the {len(trainable)} parameters: {', '.join(trainable)}."
        raise ValueError(msg)
    for name, p in selected.items():
        has_no_shape: bool = is_lazy(p)  # by a name: to mypy no parameter can be lazy
        if has_no_shape:
            # The first forward pass draws the initial weights: if it were ours, training would start from other ones.
            msg = f"parameter {name!r} is lazy, and no forward pass has given it a shape yet: analyze after the first."
            raise ValueError(msg)
        if p.is_complex():
            msg = (
                f"parameter {name!r} is complex ({p.dtype}); only real parameters can be analyzed: leave it out by "
                "`parameters`."
            )
            raise ValueError(msg)
        if p.layout != torch.strided:
            msg = (
                f"parameter {name!r} is sparse ({p.layout}); only dense parameters can be analyzed: leave it out by "
                "`parameters`."
            )
            raise ValueError(msg)
    if not any(p.numel() for p in selected.values()):
        msg = f"the parameters to analyze have no elements (such as {next(iter(selected))!r}): nothing to analyze."
        raise ValueError(msg)
    _check_memory(selected)
    devices = sorted({str(p.device) for p in selected.values()})
    if len(devices) > 1:
        msg = (
            f"the parameters to analyze must be on one device, got {', '.join(devices)}: move the module to one of "
            f"them, or choose some, for example by `parameters=lambda name, p: str(p.device) == {devices[-1]!r}`."
        )
        raise ValueError(msg)
    return selected


def _check_memory(parameters: Mapping[str, Tensor]) -> None:
    """Refuse different parameters in the same memory, as `decoder.weight.data = encoder.weight.data` makes them.

    A step in one of them is a step in both, so the loss is no function of the two.

    Raises:
        ValueError: If there are some.
    """
    spans = []
    for name, p in parameters.items():
        shard = local_shard(p)
        if has_memory(shard) and shard.layout == torch.strided and shard.numel():
            extent = 1 + sum((size - 1) * stride for size, stride in zip(shard.shape, shard.stride(), strict=True))
            if extent < shard.numel():
                msg = (
                    f"the elements of parameter {name!r} share memory, as `expand` makes them, so that no step can "
                    "change them one by one: make it of a `clone()`."
                )
                raise ValueError(msg)
            if extent == shard.numel():  # else elements of other parameters may lie between its own
                spans.append((shard.data_ptr(), shard.data_ptr() + shard.nbytes, name))
    for (_, stop, name), (start, _, other) in itertools.pairwise(sorted(spans)):
        if start < stop:
            msg = (
                f"the parameters {name!r} and {other!r} are different ones in the same memory, so that a change of one "
                "changes the other: tie them by one `nn.Parameter` in both places."
            )
            raise ValueError(msg)


def inverse_root(
    module: nn.Module, parameters: Sequence[Tensor], preconditioner: Mapping[str, Tensor] | None, dtype: torch.dtype
) -> Tensor | None:
    """Return D^(-1/2) as a flat vector, shape (n,); None without a preconditioner D.

    Raises:
        ValueError: If D does not fit the parameters.
    """
    if preconditioner is None:
        return None
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    unknown = sorted(set(preconditioner) - set(names.values()))
    missing = [names[p] for p in parameters if names[p] not in preconditioner]
    if unknown or missing:
        trouble = f"names {unknown[0]!r}, which is no parameter" if unknown else f"has no diagonal for {missing[0]!r}"
        msg = f"`preconditioner` {trouble}; it must have one for each analyzed parameter of `module`."
        raise ValueError(msg)
    for p in parameters:
        shape = tuple(preconditioner[names[p]].shape)
        if shape != p.shape:
            msg = f"`preconditioner[{names[p]!r}]` must have the shape of the parameter, {tuple(p.shape)}, got {shape}."
            raise ValueError(msg)
    return torch.cat([in_float64(preconditioner[names[p]]).rsqrt().to(p.device, dtype).flatten() for p in parameters])


def vector_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """Return the smallest dtype that holds the values of all parameters, at least float32."""
    return functools.reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
