"""Functional blocks of a network, by their parameters.

Bolshim & Kugaevskikh (2025, arXiv:2510.17486) take the Hessian of each functional block by itself: a transformation
with parameters, and the activation that follows it. Activations have none, so that a block is a set of parameters here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

Layers = Iterable[type[nn.Module] | str] | type[nn.Module] | str | Callable[[str, nn.Parameter], str | None]
"""Type of the argument `layers`, see `layer_spectra`.

LightningCLI takes the first that fits: a class before text, which may be the path of one. A function is last, because
it cannot save what it tries as one; so functions cannot be given in a configuration.
"""

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)  # noqa: SLF001 - batch and instance norms, of all dimensions
GROUPED = ("attention", "mlp", "feedforward")
"""Words in names of classes, lower case without underscores, whose modules are one block with all they contain."""


Blocks = dict[str, list[nn.Parameter]]


def blocks(module: nn.Module, layers: Layers | None, analyzed: Mapping[str, nn.Parameter]) -> Blocks:
    """Return the parameters of each block, by name of the block; shared parameters belong to the first block only.

    Parameters without elements are left out. The rule for the blocks is that of `layer_spectra`.

    Raises:
        ValueError: If `layers` matches no module, or names a module inside of another one, or leaves no block.
        TypeError: If `layers` has another type.
    """
    wanted: Any = "auto" if layers is None else layers  # any: users make mistakes
    if isinstance(wanted, str) and wanted == "auto":
        found = _functional(module)
    elif isinstance(wanted, (str, type)):
        found = _chosen(module, [wanted])
    elif isinstance(wanted, Iterable):
        found = _chosen(module, list(wanted))
    elif callable(wanted):
        found = _by_function(wanted, analyzed)
    else:
        msg = f"`layers` must be 'auto', names, patterns or classes of modules, or a function, got {layers!r}."
        raise TypeError(msg)
    left = set(analyzed.values())
    result: Blocks = {}
    for block, parameters in found.items():
        own = [p for p in dict.fromkeys(parameters) if p in left and p.numel()]
        left.difference_update(own)
        if own:
            result[block] = own
    if not result:
        msg = f"`layers` leaves no block with parameters to analyze, got {layers!r}."
        raise ValueError(msg)
    return result


def _by_function(function: Callable[[str, nn.Parameter], object], analyzed: Mapping[str, nn.Parameter]) -> Blocks:
    found: Blocks = {}
    for name, parameter in analyzed.items():
        block = function(name, parameter)
        if block is not None and not isinstance(block, str):
            msg = f"`layers` must return the name of a parameter's block or None, got {block!r} for {name!r}."
            raise TypeError(msg)
        if block is not None:
            found.setdefault(block, []).append(parameter)
    return found


def _chosen(module: nn.Module, wanted: list[Any]) -> Blocks:
    modules = {name: m for name, m in module.named_modules() if name}
    chosen: dict[str, nn.Module] = {}
    for item in wanted:
        if isinstance(item, str):
            matches = {name: m for name, m in modules.items() if fnmatchcase(name, item)}
        elif isinstance(item, type) and issubclass(item, nn.Module):
            matches = {name: m for name, m in modules.items() if isinstance(m, item)}
        else:
            msg = f"`layers` must hold names, patterns and classes of modules, got {item!r}."
            raise TypeError(msg)
        if not matches:
            msg = f"`layers` has {item!r}, which is no module of this network: {', '.join(modules) or 'it has none'}."
            raise ValueError(msg)
        chosen |= matches
    # Of a module and one inside of it that match, the outer one counts, unless the inner one was asked for by name.
    outer = {name: m for name, m in chosen.items() if not any(name.startswith(f"{other}.") for other in chosen)}
    for name in wanted:
        if isinstance(name, str) and name in chosen and name not in outer:
            msg = f"`layers` has {name!r} and a module that it is part of; blocks must not overlap."
            raise ValueError(msg)
    return {name: list(m.parameters()) for name, m in outer.items()}


def _functional(module: nn.Module, name: str = "") -> Blocks:
    """Return a block for each module with parameters: norms join the layer before, attention and MLPs are one block."""
    prefix = f"{name}." if name else ""
    kind = type(module).__name__.lower().replace("_", "")
    if name and any(word in kind for word in GROUPED):
        return {name: list(module.parameters())}
    found: Blocks = {}
    for parameter_name, parameter in module.named_parameters(recurse=False):
        found.setdefault(name or parameter_name, []).append(parameter)
    before, features = "", None  # the layer that a norm may belong to, and its number of output features
    for child_name, child in module.named_children():
        if next(child.parameters(), None) is None:
            continue
        if before and features is not None and _normalized_features(child, module) == features:
            found[before] += child.parameters()
            continue
        inside = _functional(child, f"{prefix}{child_name}")
        found |= inside
        before = next(iter(inside)) if len(inside) == 1 else ""
        features = getattr(child, "out_channels", None) or getattr(child, "out_features", None)
    return found


def _normalized_features(module: nn.Module, parent: nn.Module) -> int | None:
    """Return the number of features of a norm that may belong to the layer before; None for other modules."""
    if isinstance(module, NORMS):
        return getattr(module, "num_features", None) or getattr(module, "num_channels", None)
    # Transformers register their norms in any order; in a Sequential the order is that of execution.
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and isinstance(parent, nn.Sequential):
        return module.normalized_shape[-1]
    return None
