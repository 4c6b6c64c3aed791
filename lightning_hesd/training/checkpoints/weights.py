"""The analyzed weights, kept until they are saved or beaten: other code may change those of the module in between."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch.nn.parameter import is_lazy

from lightning_hesd.numerics.derivatives.patches import patched
from lightning_hesd.numerics.dtensors import is_dtensor, local_shard
from lightning_hesd.training.compat.strategies import collectives_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import lightning.pytorch as pl
    from torch import Tensor, nn

    from lightning_hesd.training.error_policy import ErrorPolicy

MARK = "lightning_hesd_candidate"
"""Key of a checkpoint under which its candidate's mark stands: a text that no other file has."""

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


# Checkpoints with the analyzed weights --------------------------------------------------------------------------------

UNCHANGED = Changes(names=(), restructured=False, lost=False)


class AnalyzedSaving:
    """Keeps the analyzed weights until they are saved or beaten.

    In between, Lightning calls `on_train_batch_end` and `on_train_epoch_end` of other callbacks and of the module,
    which may prune, average, clip or initialize the weights.
    """

    def __init__(self, errors: ErrorPolicy) -> None:
        self._errors = errors
        self._weights: AnalyzedWeights | None = None
        self._changes = UNCHANGED

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes without weights."""
        return {**vars(self), "_weights": None, "_changes": UNCHANGED}

    def keep(self, weights: AnalyzedWeights) -> None:
        """Keep the weights of the latest analysis."""
        self._weights = weights

    def drop(self) -> None:
        """Release the weights."""
        self._weights, self._changes = None, UNCHANGED

    def compare(self, trainer: pl.Trainer, epoch: int) -> Changes:
        """Return how the weights have changed since their analysis, the same on all ranks, and report it."""
        if self._weights is not None:
            self._changes = self._weights.changes(trainer.lightning_module)
        if not collectives_of(trainer).any(bool(self._changes.names)):
            return self._changes
        lost = collectives_of(trainer).any(self._changes.lost)
        outcome = (
            "the analyzed weights cannot be restored, so HessianCheckpoint does not rank them"
            if lost
            else "HessianCheckpoint saves the analyzed weights, and training goes on with the changed ones"
        )
        self._errors.complain(
            f"the weights of epoch {epoch} were changed after their analysis ({self._changes}): {outcome}. To analyze "
            "the changed weights, change them in a callback that stands before HessianSpectrumCallback.",
            key="lost" if lost else "changed",
            harmless=not lost,
        )
        return Changes(self._changes.names or ("on another rank",), self._changes.restructured, lost)

    def save(self, trainer: pl.Trainer, mark: str, write: Callable[[], None]) -> None:
        """Let `write`, which makes the Trainer write a checkpoint, write one with the analyzed weights and a mark."""
        weights, restructured, strategy = self._weights, self._changes.restructured, trainer.strategy
        save = strategy.save_checkpoint

        def save_edited(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:  # after all hooks
            checkpoint[MARK] = mark
            if weights is not None and restructured:
                checkpoint["state_dict"] = weights.state_dict()
            elif weights is not None:
                self._check(checkpoint, weights)
            save(checkpoint, *args, **kwargs)

        swap = weights is not None and bool(self._changes.names) and not restructured
        with (
            patched(strategy, "save_checkpoint", save_edited),
            weights.put_back(trainer.lightning_module) if weights and swap else contextlib.nullcontext(),
        ):
            write()

    def _check(self, checkpoint: dict[str, Any], weights: AnalyzedWeights) -> None:
        """Report a hook that has replaced the weights in the `state_dict` of a checkpoint."""
        missed = weights.missed_by(checkpoint["state_dict"])
        if missed is None:
            return
        places = [k for k, v in checkpoint.items() if isinstance(v, dict) and missed in v and not weights.missed_by(v)]
        whereabouts = f"in the same file, as `{places[0]}`" if places else "not in the file"
        self._errors.complain(
            f"the `state_dict` of checkpoints has other weights than the analyzed ones (first {missed!r}): a hook "
            "`on_save_checkpoint` replaces them, as that of WeightAveraging does with averages. The analyzed weights "
            f"are {whereabouts}.",
            key="replaced",
            harmless=True,
        )
