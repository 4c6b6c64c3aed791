"""Functions of PyTorch: about two hundred that have derivatives."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operations.case import Case, indices

if TYPE_CHECKING:
    from collections.abc import Iterator

SMOOTH = (
    "asinh atan cos cosh erf erfc exp exp2 expm1 mean norm prod sigmoid sin sinc sinh square std sum tan tanh var "
    "relu selu celu abs neg positive deg2rad rad2deg nan_to_num ravel t tril triu diag diagonal diag_embed diff "
    "trapezoid fliplr flipud rot90 msort median amax amin aminmax sgn trunc sign round frac ceil floor angle "
    "special.bessel_j0 special.bessel_j1 special.erfcx special.expit special.i0 special.i0e special.i1 special.i1e "
    "special.log_ndtr special.ndtr special.modified_bessel_i0 special.modified_bessel_i1 special.spherical_bessel_j0 "
    "special.airy_ai linalg.norm linalg.vector_norm linalg.svdvals linalg.pinv linalg.cond "
    "fft.fft fft.ifft fft.rfft fft.irfft fft.hfft fft.ihfft fft.fft2 fft.rfft2 fft.irfft2 fft.fftn fft.fftshift"
)
"""Functions of one tensor with any elements."""

POSITIVE = (
    "log log10 log1p log2 sqrt rsqrt reciprocal lgamma digamma special.entr special.gammaln special.psi "
    "special.bessel_y0 special.bessel_y1 special.modified_bessel_k0 special.modified_bessel_k1 "
    "special.scaled_modified_bessel_k0"
)

BINARY = "add sub mul div atan2 maximum minimum fmax fmin logaddexp logaddexp2 hypot dist"

UNIT = "acos asin atanh logit erfinv special.ndtri special.logit"


def _spd(a: Tensor) -> Tensor:
    return a @ a.mT + torch.eye(len(a), dtype=a.dtype)


def _squared_singular_values(a: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(a, full_matrices=False)
    result: Tensor = (u * s.square()) @ v
    return result


FUNCTIONS: dict[str, tuple[Any, ...]] = {
    # function, shapes of its arguments
    **{
        f"torch.{name}": (lambda x, y, name=name: getattr(torch, name)(x, y), (3, 4), (3, 4)) for name in BINARY.split()
    },
    "torch.addmm": (torch.addmm, (3, 2), (3, 4), (4, 2)),
    "torch.baddbmm": (torch.baddbmm, (2, 2, 2), (2, 2, 3), (2, 3, 2)),
    "torch.addcmul": (torch.addcmul, (3, 4), (3, 4), (3, 4)),
    "torch.addcdiv": (lambda x, y, z: torch.addcdiv(x, y, z.cosh()), (3, 4), (3, 4), (3, 4)),
    "torch.lerp": (torch.lerp, (3, 4), (3, 4), (3, 4)),
    "torch.matmul": (torch.matmul, (2, 2, 3), (3, 2)),
    "torch.mv, torch.dot, torch.outer": (lambda a, x: torch.outer(torch.mv(a, x), x) * x.dot(x), (3, 3), (3,)),
    "torch.kron": (torch.kron, (2, 2), (2, 2)),
    "torch.einsum": (lambda x, y, z: torch.einsum("ij,jk,ki->i", x, y, z), (2, 3), (3, 2), (2, 2)),
    "torch.tensordot": (lambda x, y: torch.tensordot(x, y, 2), (2, 3, 2), (3, 2, 2)),
    "torch.cdist": (torch.cdist, (3, 4), (2, 4)),
    "torch.cdist, p=1": (lambda x, y: torch.cdist(x, y, 1.0), (3, 4), (2, 4)),
    "torch.cdist, p=3": (lambda x, y: torch.cdist(x, y, 3.0), (3, 4), (2, 4)),
    "torch.cross": (torch.linalg.cross, (2, 3), (2, 3)),
    "torch.pow": (lambda x, y: x.square().add(0.5).pow(y), (3, 4), (3, 4)),
    "torch.float_power": (lambda x: x.abs().float_power(1.5), (3, 4)),
    "torch.xlogy": (lambda x, y: torch.xlogy(x, y.square() + 0.5), (3, 4), (3, 4)),
    "torch.special.xlog1py": (lambda x, y: torch.special.xlog1py(x, y.square()), (3, 4), (3, 4)),
    "torch.special.zeta": (lambda y: torch.special.zeta(2.5, y.square() + 1), (3, 4)),
    "torch.special.gammainc": (lambda y: torch.special.gammainc(torch.ones((), dtype=y.dtype), y.square()), (3, 4)),
    "torch.special.polygamma": (lambda x: torch.special.polygamma(1, x.square() + 1), (3, 4)),
    "torch.special.multigammaln": (lambda x: torch.special.multigammaln(x.square() + 2, 2), (3, 4)),
    "torch.special.chebyshev_polynomial_t": (lambda x: torch.special.chebyshev_polynomial_t(x, 3), (3, 4)),
    "torch.special.hermite_polynomial_h": (lambda x: torch.special.hermite_polynomial_h(x, 3), (3, 4)),
    "torch.acosh": (lambda x: (x.square() + 1.2).acosh(), (3, 4)),
    "torch.copysign, torch.fmod, torch.remainder": (
        lambda x, y: x.copysign(y) + x.fmod(1.5) + x.remainder(1.5),
        (3, 4),
        (3, 4),
    ),
    "torch.heaviside": (torch.heaviside, (3, 4), (3, 4)),
    "torch.ldexp, torch.frexp": (lambda x: torch.frexp(x)[0] + torch.ldexp(x, torch.tensor(2)), (3, 4)),
    "torch.clamp": (lambda x: x.clamp(-0.5, 0.5), (3, 4)),
    "torch.renorm": (lambda x: x.renorm(2, 0, 1.0), (3, 4)),
    "torch.cumsum": (lambda x: x.cumsum(0), (3, 4)),
    "torch.cumprod": (lambda x: x.cumprod(0), (3, 4)),
    "torch.cumprod with zeros": (lambda x: (x * (x > 0)).cumprod(0), (3, 4)),
    "torch.prod with zeros": (lambda x: (x * (x > 0)).prod(0), (3, 4)),
    "torch.cummax": (lambda x: x.cummax(0), (3, 4)),
    "torch.logcumsumexp": (lambda x: x.logcumsumexp(0), (3, 4)),
    "torch.logsumexp": (lambda x: x.logsumexp(0), (3, 4)),
    "torch.cumulative_trapezoid": (torch.cumulative_trapezoid, (3, 4)),
    "torch.gradient": (torch.gradient, (4,)),
    "torch.cov": (torch.cov, (3, 4)),
    "torch.corrcoef": (torch.corrcoef, (3, 4)),
    "torch.std_mean, torch.var_mean": (lambda x: (*torch.std_mean(x, 0), *torch.var_mean(x, 1)), (3, 4)),
    "torch.sort, torch.topk, torch.kthvalue": (
        lambda x: x.sort()[0] + x.topk(4)[0] * x.kthvalue(2)[0][:, None],
        (3, 4),
    ),
    "torch.quantile": (lambda x: x.quantile(0.3, 0), (3, 4)),
    "torch.mode": (lambda x: x.mode(0)[0], (3, 4)),
    "torch.gather, torch.take_along_dim": (
        lambda x: x.gather(0, indices(3, 4)) * x.take_along_dim(indices(3, 4), 0),
        (3, 4),
    ),
    "torch.index_select, torch.take": (lambda x: x.index_select(0, indices(4)).sum() * x.take(indices(5)), (3, 4)),
    "torch.index_add, torch.index_copy": (
        lambda x, y: x.index_add(0, indices(3), y) * x.index_copy(0, torch.arange(3), y),
        (3, 4),
        (3, 4),
    ),
    "torch.index_put": (lambda x, y: x.index_put((indices(2), indices(2)), y, accumulate=True), (3, 4), (2,)),
    "torch.scatter, torch.scatter_add": (
        lambda x, y: x.scatter(0, torch.arange(3)[:, None], y[:, :1]) * x.scatter_add(0, indices(3, 4), y),
        (3, 4),
        (3, 4),
    ),
    **{
        f"torch.scatter_reduce, {how}": (
            lambda x, y, how=how: x.scatter_reduce(0, indices(3, 4), y, how),
            (3, 4),
            (3, 4),
        )
        for how in ("sum", "prod", "mean", "amax")
    },
    **{
        f"torch.index_reduce, {how}": (
            lambda x, y, how=how: x.index_reduce(0, indices(3), y, how),
            (3, 4),
            (3, 4),
        )
        for how in ("prod", "mean", "amax")
    },
    "torch.segment_reduce": (lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([1, 2])), (3, 4)),
    "torch.masked_fill, torch.where": (
        lambda x, y: torch.where(x > 0, x, y).masked_fill(y > 0, 0.5) * x,
        (3, 4),
        (3, 4),
    ),
    "torch.masked_select, torch.masked_scatter": (
        lambda x, y: x.masked_select(x > 0).sum() * x.masked_scatter(x > 0, y),
        (3, 4),
        (3, 4),
    ),
    "torch.cat, torch.stack, torch.split": (
        lambda x, y: torch.cat([x, y]) * torch.stack([x, y]).view(4, 2),
        (2, 2),
        (2, 2),
    ),
    "torch.repeat, torch.tile, torch.expand": (lambda x: x.repeat(2, 1) * x.tile(2, 1) * x[:1].expand(6, 4), (3, 4)),
    "torch.repeat_interleave": (lambda x: x.repeat_interleave(2, 0), (3, 4)),
    "torch.permute, torch.movedim, torch.flip": (lambda x: x.movedim(0, 1) * x.flip(0).permute(1, 0), (3, 4)),
    "torch.roll, torch.unfold, torch.as_strided": (
        lambda x: x.roll(1).sum() * x.unfold(1, 2, 1).sum() * x.as_strided((2, 2), (1, 1)),
        (3, 4),
    ),
    "torch.complex, torch.polar": (lambda x, y: torch.complex(x, y) * torch.polar(x.square(), y), (3, 4), (3, 4)),
    "torch.view_as_complex": (lambda x: torch.view_as_complex(x.view(3, 2, 2)).exp(), (3, 4)),
    "torch.stft, torch.istft": (
        lambda x: torch.istft(torch.stft(x, 4, window=torch.hann_window(4).double(), return_complex=True).exp(), 4),
        (8,),
    ),
    "torch.block_diag": (torch.block_diag, (2, 2), (2, 2)),
    "torch.combinations, torch.cartesian_prod": (
        lambda x, y: (torch.combinations(x), torch.cartesian_prod(x, y)),
        (3,),
        (3,),
    ),
    "torch.bucketize": (lambda x, y: x * torch.bucketize(x, y.detach().sort()[0]), (4,), (3,)),
    "torch.trace, torch.chain_matmul": (lambda x, y: torch.linalg.multi_dot([x, y, x]).trace(), (3, 3), (3, 3)),
    "torch.norm, p=1, 3, inf": (lambda x: x.norm(1) + x.norm(3) + x.norm(torch.inf) + x.norm("nuc"), (3, 4)),
    "torch._weight_norm": (lambda v, g: torch._weight_norm(v, g, 0), (3, 4), (3, 1)),  # noqa: SLF001
    "torch.linalg.cholesky": (lambda a: torch.linalg.cholesky(_spd(a)), (3, 3)),
    "torch.cholesky_solve": (lambda a, b: torch.cholesky_solve(b, torch.linalg.cholesky(_spd(a))), (3, 3), (3, 2)),
    "torch.cholesky_inverse": (lambda a: torch.cholesky_inverse(torch.linalg.cholesky(_spd(a))), (3, 3)),
    "torch.linalg.det": (torch.linalg.det, (3, 3)),
    "torch.linalg.slogdet": (torch.linalg.slogdet, (3, 3)),
    "torch.logdet": (lambda a: torch.logdet(_spd(a)), (3, 3)),
    "torch.linalg.solve": (torch.linalg.solve, (3, 3), (3, 2)),
    "torch.linalg.solve of a vector": (torch.linalg.solve, (3, 3), (3,)),
    "torch.linalg.inv": (torch.linalg.inv, (3, 3)),
    "torch.linalg.lstsq": (lambda a, b: torch.linalg.lstsq(a, b)[0], (4, 2), (4, 1)),
    "torch.linalg.lu": (torch.linalg.lu, (3, 3)),
    "torch.linalg.lu_solve": (lambda a, b: torch.linalg.lu_solve(*torch.linalg.lu_factor(a), b), (3, 3), (3, 2)),
    "torch.linalg.qr": (torch.linalg.qr, (4, 3)),
    "torch.linalg.eigh": (lambda a: torch.linalg.eigh(a + a.mT)[0], (3, 3)),
    "torch.linalg.eigvalsh": (lambda a: torch.linalg.eigvalsh(_spd(a)), (3, 3)),
    "torch.linalg.eig": (lambda a: torch.linalg.eig(a)[0].abs(), (3, 3)),
    "torch.linalg.svd": (
        _squared_singular_values,
        (3, 2),
    ),
    "torch.linalg.matrix_exp": (torch.linalg.matrix_exp, (3, 3)),
    "torch.linalg.matrix_power": (lambda a: torch.linalg.matrix_power(a, 3), (3, 3)),
    "torch.linalg.matrix_norm": (lambda a: torch.linalg.matrix_norm(a) + torch.linalg.matrix_norm(a, "nuc"), (3, 3)),
    "torch.linalg.solve_triangular": (
        lambda a, b: torch.linalg.solve_triangular(_spd(a), b, upper=True),
        (3, 3),
        (3, 2),
    ),
    "torch.linalg.householder_product": (lambda a, t: torch.linalg.householder_product(a.tril(-1), t), (3, 2), (2,)),
    "torch.ormqr": (lambda a, t, c: torch.ormqr(a.tril(-1), t, c), (3, 3), (3,), (3, 2)),
    "torch.linalg.tensorsolve, torch.linalg.tensorinv": (
        lambda a, b: torch.linalg.tensorsolve(a, b) + torch.linalg.tensorinv(a, 1).sum(),
        (3, 3),
        (3,),
    ),
    "torch.linalg.vander, torch.linalg.vecdot": (lambda x: torch.linalg.vander(x) * torch.linalg.vecdot(x, x), (3,)),
    "torch.lobpcg": (lambda a: torch.lobpcg(_spd(a), 1, method="basic")[0], (4, 4)),
    "torch.pca_lowrank": (lambda a: torch.pca_lowrank(a, 2)[1], (4, 3)),
    "torch.rms_norm": (lambda x, w: F.rms_norm(x, (4,), w), (3, 4), (4,)),
    "torch.lstm_cell": (lambda x, h, c, w, u: torch.lstm_cell(x, (h, c), w, u), (1, 2), (1, 2), (1, 2), (8, 2), (8, 2)),
    "F.scaled_dot_product_attention": (F.scaled_dot_product_attention, (2, 3, 2), (2, 3, 2), (2, 3, 2)),
    "F.scaled_dot_product_attention, causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        *[(2, 3, 2)] * 3,
    ),
    "F.normalize": (F.normalize, (3, 4)),
    "F.pdist": (F.pdist, (3, 4)),
    "F.gumbel_softmax": (F.gumbel_softmax, (3, 4)),
    "F.grid_sample": (lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False), (1, 1, 3, 3), (1, 2, 2, 2)),
    "F.grid_sample, bicubic": (
        lambda x, g: F.grid_sample(x, g.tanh(), mode="bicubic", align_corners=False),
        (1, 1, 4, 4),
        (1, 2, 2, 2),
    ),
    "F.grid_sample of volumes": (
        lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False),
        (1, 1, 2, 2, 2),
        (1, 1, 2, 2, 3),
    ),
    "F.affine_grid": (lambda t: F.affine_grid(t, [1, 1, 2, 2], align_corners=False), (1, 2, 3)),
    **{
        f"F.interpolate, {mode}": (
            lambda x, mode=mode: F.interpolate(x, scale_factor=2, mode=mode),
            (1, 1, *[2] * dimensions),
        )
        for mode, dimensions in [
            ("nearest", 2),
            ("linear", 1),
            ("bilinear", 2),
            ("bicubic", 2),
            ("trilinear", 3),
            ("area", 2),
        ]
    },
    "F.interpolate, antialias": (
        lambda x: F.interpolate(x, size=2, mode="bilinear", antialias=True),
        (1, 1, 4, 4),
    ),
    "F.conv_tbc": (F.conv_tbc, (4, 1, 2), (2, 2, 2), (2,)),
    "F.pad, circular": (lambda x: F.pad(x, (1, 1), "circular"), (1, 2, 3)),
    "F.softplus, beta and threshold": (lambda x: F.softplus(x, 3.0, 1.0), (3, 4)),
    "F.kl_div, log target": (
        lambda x, y: F.kl_div(x.log_softmax(1), y.log_softmax(1), log_target=True),
        (3, 4),
        (3, 4),
    ),
    "F.cross_entropy of probabilities": (
        lambda x, y: F.cross_entropy(x, y.softmax(1), label_smoothing=0.1),
        (3, 4),
        (3, 4),
    ),
    "F.nll_loss of images": (lambda x: F.nll_loss(x.log_softmax(1), indices(1, 2, 2)), (1, 3, 2, 2)),
    "F.ctc_loss": (
        lambda x: F.ctc_loss(x.log_softmax(2), torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2])),
        (4, 1, 3),
    ),
}
"""Functions with the shapes of their arguments, normal numbers."""


def functions() -> Iterator[Case]:
    """Yield a case for each function."""
    for names, bounds in ((SMOOTH, None), (POSITIVE, (0.3, 2.0)), (UNIT, (0.1, 0.9))):
        for name in names.split():
            yield Case(f"torch.{name}", lambda name=name: operator.attrgetter(name)(torch), ((3, 4),), bounds)  # type: ignore[misc]
    for name, (function, *shapes) in FUNCTIONS.items():
        yield Case(name, lambda function=function: function, tuple(shapes))  # type: ignore[misc]
