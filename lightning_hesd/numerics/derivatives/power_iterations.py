"""Spectral normalization in training mode: singular vectors are constants, as in evaluation mode.

The spectral norm of a weight W with singular vectors u and v is uᵀWv. In training mode each use of the weight improves
u and v by a power iteration outside of autograd. At displaced weights the iteration gives other vectors, so that HVPs
by finite differences would belong to another function than exact HVPs. So the vectors of the k-th use of a weight are
computed in the first evaluation, and used again in all others.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any

from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from lightning_hesd.numerics.derivatives.patches import patched

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn


class PowerIterations:
    """A cache of the singular vectors that power iterations have found."""

    def __init__(self) -> None:
        self._uses: Counter[object] = Counter()
        self._vectors: dict[tuple[object, int], tuple[Tensor, Tensor]] = {}

    def begin(self) -> None:
        """Begin an evaluation: count the uses of each weight from zero."""
        self._uses.clear()

    def separate(self) -> contextlib.AbstractContextManager[None]:
        """Return a context with another cache, where weights have another dtype."""
        return patched(self, "_vectors", {})

    @contextlib.contextmanager
    def cached(self) -> Iterator[None]:
        """Let both kinds of spectral norms use the cached vectors in this context."""
        iterate: Any = _SpectralNorm._power_method  # noqa: SLF001 - of the parametrization
        compute: Any = SpectralNorm.compute_weight  # of the older hook, which keeps its vectors in the module

        def power_method(norm: Any, matrix: Tensor, iterations: int) -> None:
            use = self._use(norm)
            if use in self._vectors:
                norm._u, norm._v = _copies(*self._vectors[use])  # noqa: SLF001
            else:
                iterate(norm, matrix, iterations)
                self._vectors[use] = _copies(norm._u, norm._v)  # noqa: SLF001

        def compute_weight(norm: SpectralNorm, module: nn.Module, do_power_iteration: bool) -> Any:  # noqa: FBT001
            if not do_power_iteration:
                return compute(norm, module, do_power_iteration)
            use, names = self._use(norm), (f"{norm.name}_u", f"{norm.name}_v")
            if use not in self._vectors:
                weight = compute(norm, module, do_power_iteration)
                self._vectors[use] = _copies(*(getattr(module, name) for name in names))
                return weight
            for name, vector in zip(names, _copies(*self._vectors[use]), strict=True):
                setattr(module, name, vector)
            return compute(norm, module, do_power_iteration=False)

        with (
            patched(_SpectralNorm, "_power_method", power_method),
            patched(SpectralNorm, "compute_weight", compute_weight),
        ):
            yield

    def _use(self, norm: object) -> tuple[object, int]:
        self._uses[norm] += 1
        return norm, self._uses[norm]


def _copies(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return u.detach().clone(), v.detach().clone()
