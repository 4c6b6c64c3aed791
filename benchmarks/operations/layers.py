"""All layers and losses of `torch.nn`."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from benchmarks.operations.case import Case, indices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ACTIVATIONS = (
    "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish ReLU ReLU6 SELU SiLU Sigmoid "
    "Softplus Softshrink Softsign Tanh Tanhshrink"
)

LAYERS: dict[str, tuple[Any, ...]] = {
    # arguments of the layer, shapes of the input
    "Identity": ((), (3, 4)),
    "Linear": ((4, 3), (3, 4)),
    "Bilinear": ((2, 3, 2), (4, 2), (4, 3)),
    "Conv1d": ((2, 3, 3), (2, 2, 5)),
    "Conv2d": ((2, 2, 2), (2, 2, 3, 3)),
    "Conv3d": ((1, 2, 2), (2, 1, 2, 3, 2)),
    "ConvTranspose1d": ((2, 2, 3), (2, 2, 3)),
    "ConvTranspose2d": ((2, 2, 2), (1, 2, 2, 2)),
    "ConvTranspose3d": ((1, 2, 2), (1, 1, 2, 2, 2)),
    "Fold": (((3, 3), 2), (1, 8, 4)),
    "Unfold": ((2,), (1, 2, 3, 3)),
    "MaxPool1d": ((2,), (2, 2, 6)),
    "MaxPool2d": ((2,), (1, 2, 4, 4)),
    "MaxPool3d": ((2,), (1, 1, 2, 4, 4)),
    "AvgPool1d": ((2,), (2, 2, 6)),
    "AvgPool2d": ((2,), (1, 2, 4, 4)),
    "AvgPool3d": ((2,), (1, 1, 2, 4, 4)),
    "LPPool1d": ((2, 2), (2, 2, 6)),
    "LPPool2d": ((2, 2), (1, 2, 4, 4)),
    "LPPool3d": ((2, 2), (1, 1, 2, 4, 4)),
    "FractionalMaxPool2d": ((2, (2, 2)), (1, 2, 4, 4)),
    "FractionalMaxPool3d": ((2, (2, 2, 2)), (1, 1, 4, 4, 4)),
    "AdaptiveMaxPool1d": ((2,), (2, 2, 6)),
    "AdaptiveMaxPool2d": ((2,), (1, 2, 4, 4)),
    "AdaptiveMaxPool3d": ((2,), (1, 1, 2, 4, 4)),
    "AdaptiveAvgPool1d": ((2,), (2, 2, 6)),
    "AdaptiveAvgPool2d": ((2,), (1, 2, 4, 4)),
    "AdaptiveAvgPool3d": ((2,), (1, 1, 2, 4, 4)),
    "ReflectionPad1d": ((1,), (1, 2, 4)),
    "ReflectionPad2d": ((1,), (1, 2, 3, 3)),
    "ReflectionPad3d": ((1,), (1, 1, 2, 3, 2)),
    "ReplicationPad1d": ((1,), (1, 2, 4)),
    "ReplicationPad2d": ((1,), (1, 2, 3, 3)),
    "ReplicationPad3d": ((1,), (1, 1, 2, 3, 2)),
    "ZeroPad1d": ((1,), (1, 2, 4)),
    "ZeroPad2d": ((1,), (1, 2, 3, 3)),
    "ZeroPad3d": ((1,), (1, 1, 2, 3, 2)),
    "ConstantPad1d": ((1, 0.5), (1, 2, 4)),
    "ConstantPad2d": ((1, 0.5), (1, 2, 3, 3)),
    "ConstantPad3d": ((1, 0.5), (1, 1, 2, 3, 2)),
    "CircularPad1d": ((1,), (1, 2, 4)),
    "CircularPad2d": ((1,), (1, 2, 3, 3)),
    "CircularPad3d": ((1,), (1, 1, 2, 3, 2)),
    "PReLU": ((2,), (3, 2)),
    "RReLU": ((), (3, 4)),
    "Threshold": ((0.1, 0.5), (3, 4)),
    "GLU": ((), (3, 4)),
    "Softmin": ((1,), (3, 4)),
    "Softmax": ((1,), (3, 4)),
    "Softmax2d": ((), (1, 3, 2, 2)),
    "LogSoftmax": ((1,), (3, 4)),
    **dict.fromkeys(ACTIVATIONS.split(), ((), (3, 4))),
    "BatchNorm1d": ((3,), (5, 3)),
    "BatchNorm2d": ((2,), (2, 2, 2, 2)),
    "BatchNorm3d": ((2,), (2, 2, 1, 2, 2)),
    "InstanceNorm1d": ((2, 1e-5, 0.1, True), (2, 2, 4)),
    "InstanceNorm2d": ((2, 1e-5, 0.1, True, True), (2, 2, 2, 2)),
    "InstanceNorm3d": ((2,), (1, 2, 2, 2, 2)),
    "GroupNorm": ((2, 4), (2, 4, 3)),
    "LayerNorm": ((4,), (3, 4)),
    "RMSNorm": ((4,), (3, 4)),
    "LocalResponseNorm": ((2, 0.5), (2, 4, 2)),
    "CrossMapLRN2d": ((3, 0.5), (1, 3, 2, 2)),
    "RNN": ((2, 2), (3, 2, 2)),
    "LSTM": ((2, 2), (3, 2, 2)),
    "GRU": ((2, 2), (3, 2, 2)),
    "RNNCell": ((2, 2), (2, 2)),
    "LSTMCell": ((2, 2), (2, 2)),
    "GRUCell": ((2, 2), (2, 2)),
    "TransformerEncoderLayer": ((4, 2, 3, 0.0), (2, 2, 4)),
    "TransformerDecoderLayer": ((4, 2, 3, 0.0), (2, 1, 4), (2, 1, 4)),
    "Transformer": ((4, 2, 1, 1, 3, 0.0), (2, 1, 4), (2, 1, 4)),
    "Dropout": ((), (3, 4)),
    "Dropout1d": ((), (2, 3, 2)),
    "Dropout2d": ((), (2, 3, 2, 2)),
    "Dropout3d": ((), (2, 3, 1, 2, 2)),
    "AlphaDropout": ((), (3, 4)),
    "FeatureAlphaDropout": ((), (3, 4)),
    "CosineSimilarity": ((), (3, 4), (3, 4)),
    "PairwiseDistance": ((), (3, 4), (3, 4)),
    "PixelShuffle": ((2,), (1, 4, 2, 2)),
    "PixelUnshuffle": ((2,), (1, 1, 4, 4)),
    "ChannelShuffle": ((2,), (1, 4, 2, 2)),
    "UpsamplingNearest2d": ((None, 2), (1, 1, 2, 2)),
    "UpsamplingBilinear2d": ((None, 2), (1, 1, 2, 2)),
    "Flatten": ((), (3, 2, 2)),
    "Unflatten": ((1, (2, 2)), (3, 4)),
}
"""Layers that need only arguments and shapes."""

LOSSES = "L1Loss MSELoss SmoothL1Loss HuberLoss MultiLabelSoftMarginLoss BCEWithLogitsLoss PoissonNLLLoss"
"""Losses of an output and a target of the same shape; losses with other targets have separate cases."""


def _targeted(loss: Callable[..., Any], *others: Any) -> Callable[..., Any]:
    """Return a loss as a function of its first argument, with fixed other arguments."""
    return lambda x: loss(x, *others)


TARGETED: dict[str, tuple[Any, ...]] = {
    "BCELoss": (
        _targeted(lambda x, y: nn.BCELoss()(x.sigmoid(), y), torch.linspace(0, 1, 12).view(3, 4).double()),
        (3, 4),
    ),
    "SoftMarginLoss": (_targeted(nn.SoftMarginLoss(), torch.tensor([1.0, -1.0, 1.0, -1.0]).expand(3, 4)), (3, 4)),
    "CrossEntropyLoss": (_targeted(nn.CrossEntropyLoss(label_smoothing=0.1), indices(3)), (3, 4)),
    "NLLLoss": (lambda x: nn.NLLLoss()(x.log_softmax(1), indices(3)), (3, 4)),
    "MultiMarginLoss": (_targeted(nn.MultiMarginLoss(2), indices(3)), (3, 4)),
    "MultiLabelMarginLoss": (_targeted(nn.MultiLabelMarginLoss(), torch.tensor([[1, 0, -1, 2]] * 3)), (3, 4)),
    "KLDivLoss": (lambda x, y: nn.KLDivLoss(reduction="sum")(x.log_softmax(1), y.softmax(1)), (3, 4), (3, 4)),
    "CTCLoss": (
        lambda x: nn.CTCLoss()(x.log_softmax(2), torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2])),
        (4, 1, 3),
    ),
    "HingeEmbeddingLoss": (_targeted(nn.HingeEmbeddingLoss(), torch.tensor([1, -1, 1, -1])), (3, 4)),
    "CosineEmbeddingLoss": (lambda x, y: nn.CosineEmbeddingLoss()(x, y, torch.tensor([1, -1, 1])), (3, 4), (3, 4)),
    "MarginRankingLoss": (lambda x, y: nn.MarginRankingLoss(0.5)(x, y, torch.ones(3)), (3,), (3,)),
    "TripletMarginLoss": (nn.TripletMarginLoss(), (3, 4), (3, 4), (3, 4)),
    "TripletMarginWithDistanceLoss": (nn.TripletMarginWithDistanceLoss(), (3, 4), (3, 4), (3, 4)),
    "GaussianNLLLoss": (lambda x, y, v: nn.GaussianNLLLoss()(x, y, v.square() + 0.1), (3, 4), (3, 4), (3, 4)),
}


def _old_weight_norm(layer: nn.Module, dim: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, but widely used
        return nn.utils.weight_norm(layer, dim=dim)


def _adaptive_loss() -> Callable[[Tensor], Any]:
    layer = nn.AdaptiveLogSoftmaxWithLoss(4, 4, [2], div_value=2.0)
    return _Applied(layer, lambda layer, x: layer(x, torch.tensor([0, 3, 1])).loss)


class _Applied(nn.Module):
    """A layer with its own way to call it."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = layer
        self.call = call

    def forward(self, *arguments: Tensor) -> Any:
        return self.call(self.layer, *arguments)


def _unpooled(dimensions: int) -> nn.Module:
    pool = getattr(nn, f"MaxPool{dimensions}d")(2, return_indices=True)
    unpool = getattr(nn, f"MaxUnpool{dimensions}d")(2)
    return _Applied(unpool, lambda unpool, x: unpool(*pool(x)))


SPECIAL: dict[str, tuple[Any, ...]] = {
    # factory of the layer, shapes of the input
    "MaxUnpool1d": (lambda: _unpooled(1), (1, 2, 4)),
    "MaxUnpool2d": (lambda: _unpooled(2), (1, 1, 4, 4)),
    "MaxUnpool3d": (lambda: _unpooled(3), (1, 1, 2, 4, 2)),
    "MultiheadAttention": (lambda: _Applied(nn.MultiheadAttention(2, 2), lambda a, x: a(x, x, x)), (3, 1, 2)),
    "MultiheadAttention without weights": (
        lambda: _Applied(nn.MultiheadAttention(2, 2), lambda a, x: a(x, x, x, need_weights=False)[0]),
        (3, 1, 2),
    ),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 3, 0.0), 1, nn.LayerNorm(4), False),
        (2, 2, 4),
    ),
    "TransformerDecoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 3, 0.0), 1),
        (2, 1, 4),
        (2, 1, 4),
    ),
    "Embedding": (lambda: _Applied(nn.Embedding(3, 2), lambda e, x: e(indices(4)).tanh() * x), (4, 2)),
    "EmbeddingBag": (lambda: _Applied(nn.EmbeddingBag(3, 2), lambda e, x: e(indices(4, 2)).tanh() * x), (4, 2)),
    "AdaptiveLogSoftmaxWithLoss": (_adaptive_loss, (3, 4)),
    "Upsample": (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), (1, 1, 2, 2)),
    "GRU, 2 layers, both directions": (
        lambda: nn.GRU(2, 1, 2, bidirectional=True),
        (2, 1, 2),
    ),
    "LSTM, projected": (lambda: nn.LSTM(2, 2, proj_size=1), (2, 1, 2)),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), (2, 3)),
    "weight_norm, dim=1": (lambda: parametrizations.weight_norm(nn.Linear(3, 3), dim=1), (2, 3)),
    "weight_norm, dim=None": (lambda: parametrizations.weight_norm(nn.Linear(3, 3), dim=None), (2, 3)),  # type: ignore[arg-type]
    "weight_norm, old": (lambda: _old_weight_norm(nn.Conv1d(2, 2, 2), 0), (1, 2, 4)),
    "weight_norm, old, dim=2": (lambda: _old_weight_norm(nn.Conv1d(2, 2, 2), 2), (1, 2, 4)),
    "weight_norm, old, dim=None": (lambda: _old_weight_norm(nn.Conv1d(2, 2, 2), None), (1, 2, 4)),
    "LinearCrossEntropyLoss": (
        lambda: _Applied(nn.LinearCrossEntropyLoss(4, 3), lambda loss, x: loss(x, indices(5))),
        (5, 4),
    ),
    **{
        f"orthogonal, {how}": (lambda how=how: parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map=how), (2, 3))
        for how in ("matrix_exp", "cayley", "householder")
    },
}
"""Layers that need a factory or a special call."""

NO_CASE = {
    **dict.fromkeys(["Module", "Container", "RNNBase", "RNNCellBase"], "a base"),
    **dict.fromkeys(["Sequential", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict"], "a container"),
    **dict.fromkeys(["Parameter", "Buffer", "UninitializedBuffer", "UninitializedParameter"], "a tensor"),
    "LinearCrossEntropyOptions": "options",
    **dict.fromkeys(["SyncBatchNorm", "DataParallel"], "for several accelerators"),
    "NLLLoss2d": "an old name",
}
"""Other names of `torch.nn`, with their kinds; its lazy layers turn into the layers above."""


def layers() -> Iterator[Case]:
    """Yield a case for each layer and loss."""
    for name, (given, *shapes) in LAYERS.items():
        yield Case(name, lambda name=name, given=given: getattr(nn, name)(*given), tuple(shapes))  # type: ignore[misc]
    for name in LOSSES.split():
        yield Case(name, getattr(nn, name), ((3, 4), (3, 4)))
    for name, (loss, *shapes) in TARGETED.items():
        yield Case(name, lambda loss=loss: loss, tuple(shapes))  # type: ignore[misc]
    for name, (make, *shapes) in SPECIAL.items():
        yield Case(name, make, tuple(shapes))
    yield Case("BatchNorm1d, no statistics", lambda: nn.BatchNorm1d(3, track_running_stats=False), ((5, 3),))
    yield Case("BatchNorm2d, evaluated", lambda: nn.BatchNorm2d(2), ((2, 2, 2, 2),), mode="eval")
    yield Case(
        "spectral_norm, evaluated", lambda: parametrizations.spectral_norm(nn.Linear(3, 3)), ((2, 3),), mode="eval"
    )
