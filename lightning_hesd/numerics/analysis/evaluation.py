"""Evaluations of the user's loss and output functions, each from the same state and with its batch unchanged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_hesd.numerics.derivatives.checkpointing import recomputed_under
from lightning_hesd.numerics.derivatives.patches import patched
from lightning_hesd.numerics.derivatives.replacements import Replacements
from lightning_hesd.numerics.devices import finest_dtype
from lightning_hesd.numerics.isolation.precision import InPrecision
from lightning_hesd.numerics.isolation.snapshot import seed_everything
from lightning_hesd.numerics.operators.curvature import MATRICES, OutputMatrix

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.inputs.options import AnalysisOptions
    from lightning_hesd.numerics.inputs.parameter_sharding import ParameterSharding
    from lightning_hesd.numerics.isolation.exact_mode import Isolation
    from lightning_hesd.numerics.operators.curvature import CurvatureMatrix

LossFunction = Callable[[Any, Any], Any]
"""loss_fn(module, batch) -> mean loss over the batch, a scalar tensor.

With `Tensor` for the result, LightningCLI would refuse functions that do not say what they return.
"""


@dataclass(eq=False)
class Evaluator:
    """Calls the user's functions on batches.

    Attributes:
        module: First argument of the functions.
        loss_fn: Loss of a batch.
        options: Options of the analysis, with `output_fn`, `output_loss` and the seed.
        sharding: How the parameters are distributed over ranks.
        isolation: Restores the state before each evaluation.
        batches: All batches of the analysis; None if other ranks have some of them.
    """

    module: nn.Module
    loss_fn: LossFunction
    options: AnalysisOptions
    sharding: ParameterSharding
    isolation: Isolation
    batches: Sequence[WeightedBatch] | None = field(default=None, kw_only=True)
    _dtype: torch.dtype | None = field(default=None, init=False)
    _throughout: bool = field(default=False, init=False)
    _copies: dict[Tensor, Tensor] = field(default_factory=dict, init=False)  # of parameters, in the finest precision
    _known: dict[str, bool] = field(default_factory=dict, init=False)  # arguments of `Replacements`, found earlier

    def loss(self, batch: WeightedBatch) -> Tensor:
        """Return the mean loss of a batch, a scalar with a graph."""
        loss = self._evaluate(lambda data: self.loss_fn(self.module, data), batch)
        return self.sharding.mean_loss(_checked_loss(loss, "loss_fn"), batch)

    def outputs(self, batch: WeightedBatch) -> Any:
        """Return the outputs of the network for a batch."""
        output_fn = cast("Callable[[Any, Any], Any]", self.options.output_fn)  # checked with the options
        return self._evaluate(lambda data: output_fn(self.module, data), batch)

    def loss_of_outputs(self, outputs: Any, batch: WeightedBatch) -> Tensor:
        """Return the mean loss of outputs that were computed right before, a scalar with a graph."""
        output_loss = cast("Callable[[Any, Any], Tensor]", self.options.output_loss)  # checked with the options
        loss = self._evaluate(lambda data: output_loss(outputs, data), batch, from_start=False)
        return self.sharding.mean_loss(_checked_loss(loss, "output_loss"), batch)

    def matrix(self, parameters: Sequence[Tensor], blocks: Sequence[slice]) -> CurvatureMatrix:
        """Return the curvature matrix of a batch that the options ask for; blocks are ranges of the parameters."""
        kind = MATRICES[self.options.matrix]
        steps_of_the_loss = (self.outputs, self.loss_of_outputs) if issubclass(kind, OutputMatrix) else ()
        return kind(self.loss, parameters, *steps_of_the_loss, blocks=blocks)

    @contextlib.contextmanager
    def in_finest(self, *, throughout: bool = False) -> Iterator[Callable[[Tensor], Tensor]]:
        """Replace the module's parameters and buffers, and batches, by copies in the finest precision of the device.

        The parameters themselves stay as they are: if one changes its dtype, PyTorch forgets the hooks on its gradient,
        such as those of DistributedDataParallel.

        Args:
            throughout: Replace data of any structure, constants and casts of the loss, too.

        Yields:
            A function that returns the copy of a parameter.
        """
        copies: dict[Tensor, Tensor] = {}
        dtype = finest_dtype(next(self.module.parameters()).device)
        self.isolation.restore(None)
        with contextlib.ExitStack() as stack:
            for owner in self.module.modules():
                for name, parameter in list(owner._parameters.items()):  # noqa: SLF001 - `parameters` hides ties
                    if parameter is not None and parameter.is_floating_point():
                        if parameter not in copies:
                            copies[parameter] = _converted(parameter, dtype)
                        stack.callback(setattr, owner, name, parameter)
                        setattr(owner, name, copies[parameter])  # recurrent networks keep lists of them, too
                for name, buffer in list(owner._buffers.items()):  # noqa: SLF001
                    if buffer is not None and buffer.is_floating_point():
                        stack.callback(owner._buffers.__setitem__, name, buffer)  # noqa: SLF001
                        owner._buffers[name] = buffer.to(dtype, copy=True)  # noqa: SLF001
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(dtype)
            stack.enter_context(patched(self, "_dtype", dtype))
            stack.enter_context(patched(self, "_throughout", throughout))
            stack.enter_context(patched(self, "_copies", copies))
            stack.enter_context(self.isolation.separate(copies))
            yield copies.__getitem__

    def _evaluate(self, function: Callable[[Any], Any], batch: WeightedBatch, *, from_start: bool = True) -> Any:
        """Return the value of a function of a batch, called again if replacements were missing."""
        while True:
            replacements = Replacements(**self._known)
            try:
                result = self._evaluate_under(replacements, function, batch, from_start=from_start)
            except Exception:
                if not replacements.missed:
                    raise
            if not replacements.missed:
                return result
            if replacements.renormalizations:
                self._renormalize()
            self._known |= dict.fromkeys(replacements.missed, True)

    def _evaluate_under(
        self,
        replacements: Replacements,
        function: Callable[[Any], Any],
        batch: WeightedBatch,
        *,
        from_start: bool = True,
    ) -> Any:
        if from_start:
            self.isolation.restore(batch.index)
        # The same dropout mask at every evaluation of this batch, and not the random numbers of the start vectors.
        seed_everything(self.options.seed + 1 + batch.index)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.isolation.evaluation())
            if self._dtype is not None and self._throughout:
                precise = InPrecision(self._dtype)
                stack.enter_context(precise)
                stack.enter_context(recomputed_under(precise))
            for context in (
                replacements,
                recomputed_under(replacements),
                self.sharding.evaluation(),
                batch.evaluated(),
            ):
                stack.enter_context(context)
            data = batch.copy(self._own_objects()).data
            return function(data if self._dtype is None else tree_map_only(Tensor, self._cast, data))

    def _own_objects(self) -> dict[int, object]:
        """Return the objects that a batch may refer to, but does not own: the module and its parameters, by id."""
        own: list[object] = [self.module, *self.module.parameters()]
        return {**{id(value): value for value in own}, **{id(p): copy for p, copy in self._copies.items()}}

    def _renormalize(self) -> None:
        """Bring the embeddings that the losses of all batches use within their `max_norm`, in place.

        Raises:
            RuntimeError: If other ranks have batches, too: their parameters would then differ from this rank's.
        """
        if self.batches is None:
            msg = (
                "the loss renormalizes embeddings (`max_norm`) in place, each process those of its own batches, so "
                "that the weights of the ranks differ: analyze on a single rank, or without `max_norm`."
            )
            raise RuntimeError(msg)
        replacements = Replacements()
        for batch in self.batches:
            self._evaluate_under(replacements, lambda data: self.loss_fn(self.module, data), batch)
        self.isolation.restore(None)
        for renormalization in replacements.renormalizations:
            torch.embedding_renorm_(*renormalization)
        self.isolation.restart()

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


def _converted(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    converted = nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=parameter.requires_grad)
    vars(converted).update(vars(parameter))  # attributes that the user has set
    return converted


def _checked_loss(loss: Any, name: str) -> Tensor:
    if not isinstance(loss, Tensor):
        msg = f"`{name}` must return a scalar tensor, got {type(loss).__name__}."
        raise TypeError(msg)
    if loss.numel() != 1:
        msg = f"`{name}` must return a scalar tensor, the mean over the batch; got shape {tuple(loss.shape)}."
        raise TypeError(msg)
    if loss.is_complex():
        msg = f"`{name}` must return a real number, got {loss.dtype}: return its real part, or its absolute value."
        raise TypeError(msg)
    return loss.reshape(())
