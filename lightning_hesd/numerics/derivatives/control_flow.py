"""PyTorch's higher-order operations (`cond`, `scan`, `flex_attention`, ...) as ordinary branches and loops.

PyTorch differentiates these operations with respect to their arguments only. Closure variables of their functions, such
as the weights of a layer, become arguments when they are compiled. An analysis runs without compilation, so derivatives
with respect to closure variables would silently be zero.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lightning_hesd.numerics.derivatives.patches import patched

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Function = Callable[..., Any]


def is_control_flow(function: object) -> bool:
    """Whether a function is an operation that `run_eagerly` can run."""
    return isinstance(function, HigherOrderOperator) and _name(function) in _EAGER


def run_eagerly(operation: HigherOrderOperator, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Run a higher-order operation as plain Python, so that autograd records its functions.

    Raises:
        RuntimeError: If this version of PyTorch calls the operation with other arguments.
    """
    eager = _EAGER[_name(operation)]
    try:
        bound = inspect.signature(eager).bind(*arguments, **options)
    except TypeError as error:
        msg = (
            f"the derivatives of `{_name(operation)}` need PyTorch 2.7 or later: version {torch.__version__} calls it "
            f"differently ({error}). Write the loop or branch out in the loss function."
        )
        raise RuntimeError(msg) from error
    return eager(*bound.args, **bound.kwargs)


def _name(operation: HigherOrderOperator) -> str:
    return str(operation.name())  # type: ignore[no-untyped-call]


def _cond(pred: Any, true_fn: Function, false_fn: Function, operands: Sequence[Any] = ()) -> Any:
    return (true_fn if pred else false_fn)(*operands)


def _while_loop(cond_fn: Function, body_fn: Function, carried: Sequence[Any], additional: Sequence[Any]) -> Any:
    result = carried
    while cond_fn(*tree_leaves(result), *additional):
        result = body_fn(*tree_leaves(result), *additional)
    return tuple(result)


def _scan(combine_fn: Function, init: Sequence[Tensor], xs: Sequence[Tensor], additional_inputs: Sequence[Any]) -> Any:
    results, carry = [], list(init)
    for slices in zip(*xs, strict=True):
        results.append(combine_fn(*carry, *slices, *additional_inputs))
        carry = tree_leaves(results[-1])[: len(init)]
    if all(isinstance(leaf, Tensor) for leaf in results[0]):
        return (*carry, *_stacked([result[len(init) :] for result in results]))
    return results[-1][0], _stacked([outputs for _, outputs in results])  # nested: a carry, and outputs


def _associative_scan(combine_fn: Function, xs: Sequence[Tensor], additional_inputs: Sequence[Any]) -> Any:
    first, *others = zip(*xs, strict=True)
    results: list[Any] = []
    for slices in others:
        before = tree_leaves(results[-1]) if results else first
        results.append(combine_fn(*before, *slices, *additional_inputs))
    structure = tree_flatten(results[0])[1] if results else tree_flatten(list(xs))[1]
    return _stacked([tree_unflatten(first, structure), *results])


def _map(f: Function, xs: Sequence[Tensor], pos_args: Sequence[Any]) -> Any:
    return _stacked([f(*slices, *pos_args) for slices in zip(*xs, strict=True)])


def _stacked(results: Sequence[Any]) -> Any:
    """Stack the tensors at the same positions of equal structures."""
    return tree_map(lambda *parts: None if parts[0] is None else torch.stack(parts), *results)


def _flex_attention(*arguments: Any, **options: Any) -> Any:
    from torch._dynamo import _trace_wrapped_higher_order_op as indexing  # noqa: PLC0415 - slow to import
    from torch._higher_order_ops.flex_attention import math_attention  # noqa: PLC0415

    # PyTorch indexes biases, `bias[h]`, by an operation for the compiler, without a second derivative.
    with patched(indexing, "mod_index", torch.ops.aten.index):
        return math_attention(*arguments, **options)


_EAGER: dict[str, Function] = {
    "cond": _cond,
    "while_loop": _while_loop,
    "scan": _scan,
    "associative_scan": _associative_scan,
    "map_impl": _map,
    "flex_attention": _flex_attention,
}
