"""The extreme eigenvalues of the Hessian by an independent computation, which shares no code with the package's HVPs.

The batches and their weights are those of the callback, because its numbers must be right for them; only
`analyzed_batches` uses internals of the package.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from lightning_hesd import HessianSpectrumCallback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

DENSE = 300
"""Maximum number of parameters for which the Hessian is computed column by column; ARPACK and HVPs beyond."""

ARPACK_TOLERANCE = 1e-4
"""Ritz residual relative to the eigenvalue; the eigenvalue's error is of second order in it."""


@dataclass(frozen=True)
class Extremes:
    """Results of the independent computation.

    Attributes:
        dimension: Number of parameters.
        loss: The loss.
        lambda_min: Smallest eigenvalue.
        lambda_max: Largest eigenvalue.
    """

    dimension: int
    loss: float
    lambda_min: float
    lambda_max: float


class CheckedCallback(HessianSpectrumCallback):
    """The callback for one epoch; after the analysis, it computes the extreme eigenvalues independently.

    Attributes:
        epoch: The epoch.
        found: Extreme eigenvalues, or the reason why there are none.
    """

    def __init__(self, epoch: int, **kwargs: Any) -> None:
        super().__init__(epochs=[epoch], **kwargs)
        self.epoch = epoch
        self.found: list[Extremes | str] = _Shared()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Analyze, then check."""
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.current_epoch != self.epoch:
            return
        spectrum = self.history[-1].spectrum
        if spectrum is not None:
            batches = analyzed_batches(self, trainer, pl_module)
            try:
                self.found.append(extremes(pl_module, batches, self.loss_fn, spectrum.mode))
            except RuntimeError as error:  # not every loss has a plain double backward pass
                self.found.append(str(error).partition("\n")[0])


class _Shared(list[Any]):
    """A list that copies of its owner share, because libraries train with copies of callbacks."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


@dataclass(frozen=True)
class Batch:
    """A batch on the device.

    Attributes:
        data: Argument of `training_step`.
        share: Weight of the batch's mean loss in the loss.
        index: Seed of the batch's random numbers.
        position: `batch_idx` of `training_step`.
    """

    data: Any
    share: float
    index: int
    position: int


def analyzed_batches(callback: HessianSpectrumCallback, trainer: Any, module: Any) -> list[Batch]:
    """Return the batches that the callback analyzes."""
    samples = callback._recorder._analyzers["training"].draw(trainer)  # noqa: SLF001 - there is no public way
    total = sum(batch.weight for batch in samples.batches)
    return [
        Batch(
            copy.deepcopy(batch.data) if samples.transferred else _moved(trainer, module, batch.data, batch.index),
            batch.weight / total,
            batch.index,
            batch.position or 0,
        )
        for batch in samples.batches
    ]


def _moved(trainer: Any, module: Any, data: Any, index: int) -> Any:
    """Apply Lightning's transfer hooks between the loader and `training_step` to a batch."""
    _seed(index)
    data = trainer.precision_plugin.convert_input(copy.deepcopy(data))
    data = module._on_before_batch_transfer(data, dataloader_idx=0)  # noqa: SLF001 - as Lightning's loop does
    return trainer.strategy.batch_to_device(data, dataloader_idx=0)


def extremes(module: Any, batches: Sequence[Batch], loss_fn: Callable[[Any, Any], Any] | None, mode: str) -> Extremes:
    """Return the extreme eigenvalues of the Hessian of the mean loss, by double backward.

    Args:
        module: The LightningModule.
        batches: The samples.
        loss_fn: The loss; None: that of `training_step`.
        mode: "eval", or "deterministic": training mode with dropout and normalization in evaluation mode.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    dimension = sum(p.numel() for p in parameters)

    def gradient(batch: Batch) -> tuple[float, Tensor]:
        # Attention's fused kernels have no second derivative.
        with _in_mode(module, mode), _unlogged(module), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss = _loss(module, batch, loss_fn).reshape(())
            return loss.item(), _flat(torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True))

    total = sum(batch.share * gradient(batch)[0] for batch in batches)

    def product(vector: NDArray[Any]) -> NDArray[Any]:
        direction = torch.as_tensor(vector.reshape(-1), dtype=parameters[0].dtype)
        found = torch.zeros(dimension, dtype=torch.float64)
        for batch in batches:  # a new graph each time: some backward passes change their saved tensors
            _, flat = gradient(batch)
            if flat.requires_grad:
                rows = torch.autograd.grad(flat, parameters, direction, materialize_grads=True)
                found += batch.share * _flat(rows).double()
        return found.numpy()

    return Extremes(dimension, total, *_ends(product, dimension))


def _ends(product: Callable[[NDArray[Any]], NDArray[Any]], dimension: int) -> tuple[float, float]:
    """Return the smallest and the largest eigenvalue; NaN for one that does not converge."""
    if dimension <= DENSE:
        hessian = np.stack([product(column) for column in np.eye(dimension)])
        eigenvalues = np.linalg.eigvalsh((hessian + hessian.T) / 2)
        return float(eigenvalues[0]), float(eigenvalues[-1])
    operator = LinearOperator((dimension, dimension), matvec=product, dtype=np.float64)
    start = np.random.default_rng(7).standard_normal(dimension)
    found = []
    for end in ("SA", "LA"):
        try:
            [eigenvalue] = eigsh(
                operator, k=1, which=end, ncv=60, v0=start, tol=ARPACK_TOLERANCE, return_eigenvectors=False
            )
        except ArpackNoConvergence:
            eigenvalue = np.nan
        found.append(float(eigenvalue))
    return found[0], found[1]


def _loss(module: Any, batch: Batch, loss_fn: Callable[[Any, Any], Any] | None) -> Tensor:
    _seed(1 + batch.index)
    data = copy.deepcopy(batch.data)
    if loss_fn is not None:
        output = loss_fn(module, data)
    else:
        takes = [p for p in inspect.signature(module.training_step).parameters.values() if p.kind <= p.VAR_POSITIONAL]
        output = module.training_step(data, batch.position) if len(takes) > 1 else module.training_step(data)
    loss: Tensor = output if isinstance(output, Tensor) else output["loss"]
    return loss


@contextlib.contextmanager
def _in_mode(module: Any, mode: str) -> Iterator[None]:
    """Set a module to a mode, and restore its modes afterwards."""
    before = {part: part.training for part in module.modules()}
    kinds = (_DropoutNd, _NormBase, nn.RNNBase, nn.MultiheadAttention)
    with contextlib.ExitStack() as stack:
        if mode == "eval":
            module.on_validation_model_eval()
        else:
            for part in module.modules():
                part.training = before[part] and not isinstance(part, kinds)
            stack.enter_context(mock.patch("torch.nn.functional.dropout", lambda x, *_, **__: x))
        yield
    for part, training in before.items():
        part.training = training


@contextlib.contextmanager
def _unlogged(module: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in ("log", "log_dict", "print"):
            stack.enter_context(mock.patch.object(module, name, return_value=None))
        yield


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the libraries draw from it
    torch.manual_seed(seed)
