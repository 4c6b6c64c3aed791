"""What devices differ in, with modules of PyTorch's that stand in for those of devices that are not here."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from lightning_hesd.numerics.devices import accelerators, finest_dtype, in_float64, release_memory
from lightning_hesd.numerics.isolation.snapshot import restore_state, seed_everything
from lightning_hesd.numerics.operators.memory import SHARE_OF_FREE_MEMORY, default_budget


class Accelerator:
    """What PyTorch offers for a kind of accelerator."""

    def __init__(self, *, is_initialized: bool = True) -> None:
        self._generator = torch.Generator().manual_seed(3)
        self._is_initialized = is_initialized
        self.has_cache = True

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return self._is_initialized

    def get_rng_state(self) -> Tensor:
        assert self._is_initialized, "asking would initialize it"
        return self._generator.get_state()

    def set_rng_state(self, state: Tensor) -> None:
        self._generator.set_state(state)

    def manual_seed(self, seed: int) -> None:
        assert self._is_initialized, "the seed would wait for it"
        self._generator.manual_seed(seed)

    manual_seed_all = manual_seed

    def draw(self) -> float:
        return torch.rand((), generator=self._generator).item()

    def mem_get_info(self, device: object) -> tuple[int, int]:
        return 1000, 5000

    def memory_reserved(self, device: object) -> int:
        return 700

    def memory_allocated(self, device: object) -> int:
        return 500

    def empty_cache(self) -> None:
        self.has_cache = False


Provide = Callable[[str, Accelerator], Accelerator]


@pytest.fixture
def provide(monkeypatch: pytest.MonkeyPatch) -> Provide:
    return lambda name, module: monkeypatch.setattr(torch, name, module) or module


def test_generators_of_all_kinds_of_accelerators_are_kept(provide: Provide) -> None:
    modules = [provide(name, Accelerator()) for name in ("cuda", "mps", "mtia")]
    expected = [Accelerator().draw() for _ in modules]
    drawn = []
    with restore_state():
        for _ in range(2):
            seed_everything(7)
            drawn.append([module.draw() for module in modules])
    assert drawn[0] == drawn[1]
    assert [module.draw() for module in modules] == expected


def test_an_accelerator_that_is_not_in_use_is_left_alone(provide: Provide) -> None:
    """In a forked process it could not even be initialized, and a seed would wait until it is."""
    provide("cuda", Accelerator(is_initialized=False))
    with restore_state():
        seed_everything(7)
    assert accelerators() == []


def test_memory_is_that_of_the_device_or_what_the_process_allows_itself_and_is_given_back(provide: Provide) -> None:
    module = provide("xpu", Accelerator())
    assert default_budget(torch.device("xpu", 0)) == SHARE_OF_FREE_MEMORY * (1000 + 700 - 500)
    assert default_budget(torch.device("mps")) > 2000, "shared with the computer"
    # Limited to a share, so far with nothing else on the device.
    module.get_per_process_memory_fraction = lambda _: 0.2
    module.mem_get_info = lambda _: (5000 - 700, 5000)
    assert default_budget(torch.device("xpu", 0)) == SHARE_OF_FREE_MEMORY * (0.2 * 5000 - 700 + 700 - 500)
    release_memory()
    assert not module.has_cache


def test_the_finest_type() -> None:
    assert finest_dtype(torch.device("cpu")) is torch.float64
    assert finest_dtype(torch.device("mps")) is torch.float32
    assert in_float64(torch.ones(1)).dtype is torch.float64


def test_a_device_may_refuse_arithmetic_only(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = mock.Mock(side_effect=RuntimeError("Required aspect fp64 is not supported on the device"))
    monkeypatch.setattr(torch, "ones", lambda *_, **__: mock.Mock(add_=refusing))
    assert finest_dtype(torch.device("xpu")) is torch.float32
