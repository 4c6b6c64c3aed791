"""Copies of analyzed weights: compared bit by bit, put back and taken away again."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

from lightning_hesd.training.checkpoints.weights import AnalyzedWeights
from tests.training.broken import out_of_luck

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
DTYPES += [torch.complex64, torch.complex128]


def buffer_name(dtype: torch.dtype) -> str:
    return str(dtype).replace(".", "_")


class Module(nn.Module):
    """Tied weights, buffers of many kinds, values that do not equal themselves, a frozen and a lazy parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.arange(6.0).reshape(2, 3).T, requires_grad=False)
        self.lazy = nn.LazyLinear(2)
        for dtype in DTYPES:
            self.register_buffer(buffer_name(dtype), torch.tensor([0, 1, 2, 0]).to(dtype))
        self.register_buffer("undefined", torch.tensor([float("nan"), float("-inf"), -0.0]))
        with torch.inference_mode():
            self.register_buffer("inferred", torch.zeros(2))
        self.register_buffer("shown", torch.ones(2), persistent=False)
        self.register_buffer("sparse", torch.eye(2).to_sparse())


def test_an_unchanged_module_is_unchanged_and_its_state_dict_may_leave_out_and_round() -> None:
    module = Module()
    kept = AnalyzedWeights(module)
    assert kept.changes(module).names == ()
    assert kept.missed_by(module.state_dict()) is None
    rounded = module.first.weight.detach().half()
    assert kept.missed_by({"first.weight": rounded, "other": torch.zeros(1), "first.bias": "none"}) is None
    assert kept.missed_by({"first.weight": rounded + 1}) == "first.weight"
    assert not {name.partition(".")[0] for name in kept.state_dict()} & {"lazy", "shown", "sparse"}


@pytest.mark.parametrize("name", ["first.weight", "first.bias", "undefined", "inferred", *map(buffer_name, DTYPES)])
def test_a_changed_value_is_put_back_and_taken_away_again(name: str) -> None:
    module = Module()
    kept = AnalyzedWeights(module)
    tensor = module.state_dict(keep_vars=True)[name]
    before = tensor.detach().clone()
    with torch.inference_mode():
        flat = tensor.data.reshape(-1)
        flat[0] = ~flat[0] if tensor.dtype == torch.bool else 3
    after, version = tensor.detach().clone(), None if tensor.is_inference() else tensor._version
    changes = kept.changes(module)
    assert name in changes.names
    assert (changes.restructured, changes.lost) == (False, False)
    with contextlib.suppress(OSError), kept.put_back(module):
        torch.testing.assert_close(tensor.detach(), before, rtol=0, atol=0, equal_nan=True)
        assert kept.missed_by(module.state_dict()) is None
        out_of_luck()
    torch.testing.assert_close(tensor.detach(), after, rtol=0, atol=0, equal_nan=True)
    assert version is None or tensor._version == version
    assert kept.missed_by(module.state_dict()) in changes.names


CHANGES: dict[str, tuple[Callable[[Module], object], bool, bool]] = {
    # The change, whether it restructures the module, and whether the analyzed values are lost.
    "sign of zero": (lambda m: m.undefined[2].neg_(), False, False),
    "another object": (lambda m: setattr(m.first, "bias", nn.Parameter(torch.zeros(3))), False, False),
    "frozen": (lambda m: m.frozen.data.mul_(2), False, True),
    "frozen object": (lambda m: setattr(m, "frozen", nn.Parameter(torch.zeros(3, 2))), True, False),
    "pruned": (lambda m: l1_unstructured(m.first, "bias", 1), True, False),
    "new layer": (lambda m: setattr(m, "third", nn.Linear(1, 1)), True, False),
    "lost layer": (lambda m: delattr(m, "second"), True, False),
    "another shape": (lambda m: setattr(m.first, "bias", nn.Parameter(torch.zeros(4))), True, False),
    "another precision": (lambda m: m.first.half(), True, False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_all_kinds(name: str) -> None:
    change, restructured, lost = CHANGES[name]
    module = Module()
    before = {k: v.clone() for k, v in module.state_dict().items() if not k.startswith(("lazy", "sparse"))}
    kept = AnalyzedWeights(module)
    change(module)
    changes = kept.changes(module)
    assert changes.names
    assert (changes.restructured, changes.lost) == (restructured, lost)
    if restructured and not lost:
        torch.testing.assert_close(kept.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_a_module_with_a_state_dict_of_its_own_cannot_be_restructured() -> None:
    class Own(nn.Linear):
        def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
            return {"mine": self.weight + 1}

    module = Own(2, 2)
    kept = AnalyzedWeights(module)
    l1_unstructured(module, "weight", 1)
    assert kept.changes(module).lost
