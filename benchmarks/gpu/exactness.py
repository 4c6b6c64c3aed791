"""Spectra on the device against dense Hessians in float64, whatever is allowed outside of the analysis."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.finding import Finding, Setting, judged, on_cuda_only
from benchmarks.gpu.problems import MAKERS, Problem, dense_hessian, loss, make
from lightning_hesd import HessianOperator, hessian_spectrum

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_hesd import Spectrum

ROUNDING = 128.0
"""Units of rounding by which eigenvalues and products may differ, relative to the norm: sums run in another order."""

STEPS = {False: 80, True: 50}
"""Lanczos steps after which the extremes of these networks are exact to rounding, for large and small ones."""


class Truth:
    """A dense Hessian, and the distances of results from it, relative to its norm."""

    def __init__(self, problem: Problem) -> None:
        self.hessian = dense_hessian(problem.to(problem.batches[0][0].device, torch.float64))
        eigenvalues = torch.linalg.eigvalsh(self.hessian)
        self.low, self.high = float(eigenvalues[0]), float(eigenvalues[-1])
        self.norm = max(-self.low, self.high)

    def of_spectrum(self, spectrum: Spectrum) -> float:
        """Return the larger error of the extreme eigenvalues."""
        return max(abs(spectrum.lambda_max - self.high), abs(spectrum.lambda_min - self.low)) / self.norm

    def of_product(self, product: Tensor, vector: Tensor) -> float:
        """Return the error of a product with a vector."""
        expected = self.hessian @ vector.double()
        return float((product.double() - expected).norm() / (self.norm * vector.double().norm()))


def exactness(setting: Setting) -> Iterator[Finding]:
    """Compare extremes, C_t and a product with those of dense Hessians."""
    for name in ("attention",) if setting.is_small else MAKERS:
        on_cpu = make(name, is_small=setting.is_small)
        truth = Truth(on_cpu.to(setting.device))
        for dtype in (torch.float64, torch.float32):
            problem = on_cpu.to(setting.device, dtype)
            yield _compared(
                f"{name}, {_name(dtype)}: spectrum of the dense Hessian", problem, truth, STEPS[setting.is_small]
            )


def _compared(title: str, problem: Problem, truth: Truth, steps: int) -> Finding:
    epsilon = torch.finfo(next(problem.module.parameters()).dtype).eps
    spectrum = hessian_spectrum(problem.module, problem.batches, loss, steps=steps)
    vector = torch.randn(problem.dimension, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with HessianOperator(problem.module, problem.batches, loss) as hessian:
        product = hessian @ vector
    errors = truth.of_spectrum(spectrum), truth.of_product(product, vector.to(product.device))
    figures = (
        f"n = {problem.dimension}, C_t {spectrum.c_t:.6f}; relative to ‖H‖: extremes {errors[0]:.1e}, "
        f"product {errors[1]:.1e}, limit {ROUNDING * epsilon:.1e}; {spectrum.strategy}, verified: {spectrum.verified}"
    )
    holds = max(errors) <= ROUNDING * epsilon and spectrum.strategy != "finite_difference"
    return judged(title, holds and spectrum.verified == "yes", figures)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def reduced_precision(device: torch.device) -> Iterator[None]:
    """Allow TF32 and bfloat16 in float32 operations wherever PyTorch can, and enable autocast."""
    backends: Any = torch.backends
    before = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("medium")
    backends.cudnn.allow_tf32 = True
    try:
        with torch.autocast(device.type, torch.bfloat16):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        backends.cudnn.allow_tf32 = before[1]


def precision(setting: Setting) -> Iterator[Finding]:
    """Allow reduced precision outside, see that it does not leak in, and that it is allowed again afterwards."""
    for name in ("convolutions and batch norm",) if setting.is_small else [*MAKERS][:3]:
        problem = make(name, is_small=setting.is_small).to(setting.device)
        truth = Truth(problem)
        seen: set[str] = set()

        def watched(module: nn.Module, batch: Any, seen: set[str] = seen) -> Tensor:
            seen.add(_precision_of(setting.device))
            return loss(module, batch)

        with reduced_precision(setting.device):
            outside = _precision_of(setting.device)
            spectrum = hessian_spectrum(problem.module, problem.batches, watched, steps=STEPS[setting.is_small])
            after = _precision_of(setting.device)
            with torch.autocast(setting.device.type, enabled=False):  # the rest is what an analysis may catch
                leaked = truth.of_product(*_plain_product(problem))
        error, limit = truth.of_spectrum(spectrum), ROUNDING * torch.finfo(torch.float32).eps
        figures = (
            f"error {error:.1e} of ‖H‖, limit {limit:.1e}; a plain product with TF32 has {leaked:.1e}; in the loss: "
            f"{', '.join(sorted(seen))}; outside: {outside}"
        )
        yield judged(f"{name}: TF32 and autocast outside do not leak in", error <= limit and after == outside, figures)


def _precision_of(device: torch.device) -> str:
    """Describe the settings of reduced precision in words."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):
        words = f"{backends.cuda.matmul.fp32_precision}/{backends.cudnn.conv.fp32_precision}"
    else:
        words = f"TF32 {backends.cuda.matmul.allow_tf32}/{backends.cudnn.allow_tf32}"
    return f"{words}, autocast {'on' if torch.is_autocast_enabled(device.type) else 'off'}"


def _plain_product(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return a product by automatic differentiation alone, and the vector."""
    parameters = list(problem.module.parameters())
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
    total = sum(len(x) for x, _ in problem.batches)
    with sdpa_kernel(SDPBackend.MATH):
        mean: Any = sum(loss(problem.module, batch) * len(batch[0]) / total for batch in problem.batches)
        gradients = torch.autograd.grad(mean, parameters, create_graph=True)
        product = torch.autograd.grad(gradients, parameters, directions)
    flat, vector = (torch.cat([part.flatten() for part in parts]) for parts in (product, directions))
    return flat, vector


SHAPES = {False: (2, 8, 1024, 64), True: (1, 2, 512, 8)}
"""Samples, heads, tokens and width of a head for attention with long contexts; the second where problems are small."""


class Heads(nn.Module):
    """Attention alone, with queries, keys and values that are parameters."""

    def __init__(self, shape: tuple[int, ...], *, causal: bool, grouped: bool, masked: bool) -> None:
        super().__init__()
        samples, heads, tokens, width = shape
        few = max(1, heads // 2) if grouped else heads
        generator = torch.Generator().manual_seed(0)
        self.query, self.key, self.value = (
            nn.Parameter(torch.randn(samples, count, tokens, width, generator=generator)) for count in (heads, few, few)
        )
        mask = (torch.rand(tokens, tokens, generator=generator) < 0.8) | torch.eye(tokens, dtype=torch.bool)
        self.mask: Tensor | None
        self.register_buffer("mask", mask if masked else None)
        self.options = {"is_causal": causal, "enable_gqa": grouped}

    def forward(self) -> Tensor:
        """Return a nonlinear mean of the heads' outputs."""
        attended = F.scaled_dot_product_attention(self.query, self.key, self.value, self.mask, **self.options)
        return attended.sin().square().mean()


VARIANTS = {
    "causal": {"causal": True, "grouped": False, "masked": False},
    "masked": {"causal": False, "grouped": False, "masked": True},
    "grouped": {"causal": True, "grouped": True, "masked": False},
}


def attention(setting: Setting) -> Iterator[Finding]:
    """Compare products through attention with long contexts with those of plain attention in float64."""
    for name, options in VARIANTS.items():
        heads = Heads(SHAPES[setting.is_small], **options).to(setting.device)
        vector = torch.randn(sum(p.numel() for p in heads.parameters()), generator=torch.Generator().manual_seed(2))
        vector = (vector / vector.norm()).to(setting.device)
        batches = [torch.zeros(1, device=setting.device)]
        with HessianOperator(heads, batches, lambda module, _: module()) as hessian:
            product = hessian @ vector
        expected = _plain_attention_product(heads, vector)
        error = float((product.double() - expected).norm() / expected.norm())
        limit = ROUNDING * torch.finfo(torch.float32).eps
        words = "×".join(map(str, SHAPES[setting.is_small]))
        yield judged(
            f"fused attention, {name}: HVP of plain attention in float64",
            error <= limit,
            f"samples × heads × tokens × width {words}: relative error {error:.1e}, limit {limit:.1e}",
        )
    yield _fused_kernels(setting)


def _plain_attention_product(heads: Heads, vector: Tensor) -> Tensor:
    exact = Heads(heads.query.shape, causal=False, grouped=False, masked=False)  # overwritten below
    exact.query, exact.key, exact.value = (nn.Parameter(p.detach().double()) for p in heads.parameters())
    exact.mask, exact.options = heads.mask, heads.options
    parameters = list(exact.parameters())
    sizes = [p.numel() for p in parameters]
    directions = [v.view_as(p) for v, p in zip(torch.split(vector.double(), sizes), parameters, strict=True)]
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(exact(), parameters, create_graph=True)
        return torch.cat([part.flatten() for part in torch.autograd.grad(gradients, parameters, directions)])


def _fused_kernels(setting: Setting) -> Finding:
    """Report which of PyTorch's fused kernels take a bfloat16 problem, and that none differentiates twice."""
    found = []
    holds = True
    heads = Heads(SHAPES[setting.is_small], causal=True, grouped=False, masked=False).to(setting.device, torch.bfloat16)
    for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
        try:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                [gradient, *_] = torch.autograd.grad(heads(), list(heads.parameters()), create_graph=True)
        except (AttributeError, RuntimeError) as error:
            found.append(f"{backend.lower()}: not here ({str(error).splitlines()[0][:60]})")
            continue
        try:
            torch.autograd.grad(gradient.float().square().sum(), heads.query)
            found.append(f"{backend.lower()}: differentiates twice")
        except RuntimeError as error:
            found.append(f"{backend.lower()}: {str(error).splitlines()[0][:80]}")
    batches = [torch.zeros(1, device=setting.device)]
    spectrum = hessian_spectrum(heads, batches, lambda module, _: module().float(), steps=4)
    found.append(f"the analysis: {spectrum.strategy}, verified: {spectrum.verified}")
    holds = spectrum.strategy != "finite_difference"
    return on_cuda_only(
        setting, "bfloat16 parameters under fused kernels: exact products all the same", holds, "; ".join(found)
    )
