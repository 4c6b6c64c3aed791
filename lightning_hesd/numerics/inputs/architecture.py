"""The kind of a network, by the kinds of its modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Collection

ATTENTION = ("attention", "attn")
"""Words in names of modules or of their classes, lower case, by which a network is one with attention."""

CONVOLUTIONS = (nn.modules.conv._ConvNd,)  # noqa: SLF001 - of all dimensions, transposed ones, too
LAYERS_OF_PERCEPTRONS = (
    nn.Linear,
    nn.PReLU,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,  # noqa: SLF001 - batch and instance norms, of all dimensions
)


def architecture_of(module: nn.Module, analyzed: Collection[nn.Parameter]) -> str:
    """Return the kind of a network.

    Args:
        module: The network.
        analyzed: Its parameters that are analyzed.

    Returns:
        - "part": some of the parameters are not analyzed. Otherwise,
        - "attention": a module, or its class, has "attention" or "attn" in its name. Otherwise,
        - "convolution": there are convolutions, and no recurrent layers. Otherwise,
        - "perceptron": only linear layers, norms and PReLU have parameters;
        - "other": any other network.
    """
    known = set(analyzed)
    if any(parameter not in known for parameter in module.parameters()):
        return "part"
    modules = dict(module.named_modules())
    names = [f"{path} {type(each).__name__}".lower() for path, each in modules.items()]
    if any(word in name for word in ATTENTION for name in names):
        return "attention"
    if any(isinstance(each, nn.RNNBase | nn.RNNCellBase) for each in modules.values()):
        return "other"
    if any(isinstance(each, CONVOLUTIONS) for each in modules.values()):
        return "convolution"
    owners = [each for each in modules.values() if next(each.parameters(recurse=False), None) is not None]
    return "perceptron" if all(isinstance(each, LAYERS_OF_PERCEPTRONS) for each in owners) else "other"
