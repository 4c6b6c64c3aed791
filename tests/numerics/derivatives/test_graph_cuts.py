from typing import Any

import torch
from torch import Tensor

from lightning_hesd.numerics.derivatives.graph_cuts import GraphCuts


def leaf() -> Tensor:
    return torch.rand(3, dtype=torch.float64).requires_grad_()


def test_the_cut_is_the_first_tensor_that_all_paths_join_in():
    w, b, other = leaf(), leaf(), leaf()
    inner = (w * 2).exp() + b
    joined = inner.sin() * inner
    loss = (joined * other).sum()
    cuts = GraphCuts(loss)
    assert cuts.after([w]).node.name() == "MulBackward0"  # w * 2
    assert cuts.after([w, b]).node is inner.grad_fn
    assert cuts.after([w, other]).node is loss.grad_fn.next_functions[0][0]
    assert cuts.common([cuts.after([w]), cuts.after([b])]).node is inner.grad_fn


def test_a_shared_parameter_is_cut_after_its_last_use():
    w = leaf()
    first = w * 2
    second = first * w
    assert GraphCuts(second.sum()).after([w]).node is second.grad_fn


def test_a_custom_function_may_keep_a_variable():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor, variables: Any) -> Tensor:
            [ctx.variable] = variables
            return w * 2

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            return 2 * g, None

    w = leaf()
    for variable in (w, [w]):
        twice = Twice.apply(w, [variable])
        loss = (twice * w).sum()
        assert GraphCuts(loss).after([w]).node is loss.grad_fn.next_functions[0][0]
    assert GraphCuts(Twice.apply(leaf(), [w]).sum()).after([w]) is None


def test_a_tensor_in_several_pieces_is_no_cut():
    w = torch.rand(4, dtype=torch.float64).requires_grad_()
    left, right = (w * 2).exp().chunk(2)
    joined = left * right
    assert GraphCuts(joined.sum()).after([w]).node.name() == "MulBackward0"
    pieces = w.chunk(2)
    joined = pieces[0] * pieces[1]
    assert GraphCuts(joined.sum()).after([w]).node is joined.grad_fn


def test_the_edge_names_the_output():
    w = torch.rand(4, dtype=torch.float64).requires_grad_()
    _, right = w.chunk(2)
    edge = GraphCuts(right.sum()).after([w])
    assert (edge.node, edge.output_nr) == (right.grad_fn, 1)
    (found,) = torch.autograd.grad([edge], [w], [torch.ones(2).double()])
    assert found.tolist() == [0, 0, 1, 1]


def test_parameters_that_are_not_used_have_no_cut():
    w, unused = leaf(), leaf()
    cuts = GraphCuts((w * 2).sum())
    assert cuts.after([unused]) is None
    assert cuts.after([w, unused]) == cuts.after([w])
    assert GraphCuts(torch.ones(())).after([w]) is None
