import pytest
import torch
from torch import Tensor

from lightning_hesd.numerics.derivatives.graph_cuts import GraphCuts


def leaf() -> Tensor:
    return torch.rand(4, dtype=torch.float64).requires_grad_()


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


@pytest.mark.parametrize(
    "function", [lambda w: (w * 2) * w, lambda w: torch.mul(*w.chunk(2))], ids=["shared", "in pieces"]
)
def test_a_parameter_is_cut_after_its_last_use(function):
    w = leaf()
    joined = function(w)
    assert GraphCuts(joined.sum()).after([w]).node is joined.grad_fn


def test_parameters_that_are_not_used_have_no_cut():
    w, unused = leaf(), leaf()
    cuts = GraphCuts((w * 2).sum())
    assert cuts.after([unused]) is None
    assert cuts.after([w, unused]) == cuts.after([w])
    assert GraphCuts(torch.ones(())).after([w]) is None
