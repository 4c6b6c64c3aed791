"""Small problems with known peculiarities: a module, unequal batches and a loss, reproducible from a seed.

Every problem is small enough for a dense Hessian, and smooth (no ReLU kink), so that the dense Hessian is exact.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NAMES = ("mlp", "conv_batchnorm", "attention", "sdpa", "tied", "frozen")


class Problem(NamedTuple):
    """What `hessian_spectrum` takes, in this order."""

    module: nn.Module
    batches: list[Any]
    loss_fn: Callable[[Any, Any], Tensor]


def make(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    """Build the problem `name`; the weights and data of float32 and float64 are equal up to rounding."""
    module, batches, loss_fn = seeded(_BUILDERS[name], seed)
    # Drawn in float64 and rounded through float32, so that both types stand for exactly the same problem.
    module.to(torch.float32).to(dtype)
    return Problem(module, [_cast(batch, dtype) for batch in batches], loss_fn)


def regression(sizes: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype, seed: int = 0) -> Problem:
    """A linear layer without bias under squared error: its Hessian is 2XᵀX/(N·outputs), positive semidefinite."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(inputs, outputs, bias=False, dtype=dtype)
    with torch.no_grad():
        module.weight.copy_(torch.randn(outputs, inputs, generator=generator))
    batches = [(_normal(generator, size, inputs), _normal(generator, size, outputs)) for size in sizes]
    return Problem(module, [_cast(batch, dtype) for batch in batches], squared_error)


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """Return what a function makes of the random numbers of a seed; the global generator stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def custom(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Tensor]:
    """Return a custom function.

    Args:
        name: That of its class, and so the beginning of that of its nodes.
        forward: Returns the result, and after it the tensors to save.
        backward: Returns the gradients on the inputs, given that on the result and the saved tensors.
    """

    def run(ctx: Any, *inputs: Tensor) -> Tensor:
        result, *saved = forward(*inputs)
        ctx.save_for_backward(*saved)
        return result

    def pull_back(ctx: Any, gradient: Tensor) -> Any:
        return backward(gradient, *ctx.saved_tensors)

    methods = {"forward": staticmethod(run), "backward": staticmethod(pull_back)}
    return type(name, (torch.autograd.Function,), methods).apply


class OnceDifferentiable(torch.autograd.Function):
    """The identity, whose derivative cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()


class Applied(nn.Module):
    """A function without parameters, as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def tied_by_data() -> nn.Module:
    """Return a network with two parameters in one memory."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    module[2].weight.data = module[0].weight.data  # type: ignore[union-attr]
    return module


def squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error over samples and outputs."""
    return F.mse_loss(module(batch[0]), batch[1])


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy over samples (and positions, where there are any)."""
    return F.cross_entropy(module(batch[0]).flatten(0, -2), batch[1].flatten())


def _cast(batch: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(part.to(torch.float32).to(dtype) if part.is_floating_point() else part for part in batch)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _perceptron(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _mlp() -> Problem:
    batches = [(torch.randn(size, 4), torch.randint(3, (size,))) for size in (5, 3, 1)]
    return Problem(_perceptron(4, 5, 3), batches, cross_entropy)


def _conv_batchnorm() -> Problem:
    module = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 2)
    )
    # Statistics unlike the initial ones: taking the batch's own instead would show.
    module[1].running_mean.copy_(torch.randn(2))
    module[1].running_var.copy_(0.5 + torch.rand(2))
    batches = [(torch.randn(size, 1, 4, 4), torch.randn(size, 2)) for size in (4, 2)]
    return Problem(module, batches, squared_error)


class _SelfAttention(nn.Module):
    """nn.MultiheadAttention, whose eval mode has a fused path of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.head((x + mixed).mean(dim=1))


class _FusedAttention(nn.Module):
    """F.scaled_dot_product_attention, whose fused kernels have no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.project(x).chunk(3, dim=-1))
        return self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))


def _attention() -> Problem:
    batches = [(torch.randn(size, 3, 4), torch.randn(size, 2)) for size in (3, 2)]
    return Problem(_SelfAttention(), batches, squared_error)


def _sdpa() -> Problem:
    batches = [(torch.randn(size, 3, 4), torch.randint(3, (size, 3))) for size in (3, 2)]
    return Problem(_FusedAttention(), batches, cross_entropy)


class _Tied(nn.Module):
    """An embedding that is also the output projection: one parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.output = nn.Linear(4, 6, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(torch.tanh(self.mix(self.embedding(tokens))))


def _tied() -> Problem:
    batches = [(torch.randint(6, (size, 3)), torch.randint(6, (size, 3))) for size in (4, 3)]
    return Problem(_Tied(), batches, cross_entropy)


def _frozen() -> Problem:
    module = _perceptron(4, 5, 4, 3)
    module[0].bias.requires_grad_(False)
    module[2].weight.requires_grad_(False)
    batches = [(torch.randn(size, 4), torch.randint(3, (size,))) for size in (5, 4)]
    return Problem(module, batches, cross_entropy)


_BUILDERS: dict[str, Callable[[], Problem]] = {
    "mlp": _mlp,
    "conv_batchnorm": _conv_batchnorm,
    "attention": _attention,
    "sdpa": _sdpa,
    "tied": _tied,
    "frozen": _frozen,
}
