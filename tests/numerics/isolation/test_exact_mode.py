import contextlib
import copy
import random
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_hesd import hessian_spectrum
from lightning_hesd.numerics.isolation.snapshot import restore_state
from tests import cases

Tamper = Callable[[nn.Module], object]
Run = Callable[..., None]


class Boom(Exception):
    """Raised by a loss function."""


class Net(nn.Module):
    """A module with a submodule, to be given attributes."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(3, 4)
            self.norm = nn.BatchNorm1d(4)
            self.drop = nn.Dropout(0.5)
            self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


def make_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, generator=generator), torch.randn(6, 2, generator=generator)


@pytest.fixture(params=["success", "failure at once", "failure in a product"])
def run(request: pytest.FixtureRequest) -> Run:
    """Analyze a module with a loss function that tampers with it, and that may fail."""

    batch = make_batch()

    def analyze(module: nn.Module, tamper: Tamper = lambda module: None, **options: Any) -> None:
        calls = 0

        def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            nonlocal calls
            calls += 1
            tamper(module)
            if request.param == "failure at once" or (request.param == "failure in a product" and calls >= 5):
                raise Boom
            return cases.squared_error(module, batch)

        with contextlib.nullcontext() if request.param == "success" else pytest.raises(Boom):
            hessian_spectrum(module, [batch], loss, steps=4, strategy="recompute", **options)
        assert calls == 1 if request.param == "failure at once" else calls > 5

    return analyze


def describe(value: Any) -> Any:
    """Return something that compares equal exactly if two values have the same type and content."""
    if isinstance(value, Tensor):
        return "tensor", value.dtype, value.requires_grad, value.detach().tolist()
    if isinstance(value, np.ndarray):
        return "array", value.dtype, value.tolist()
    if isinstance(value, dict):
        return [(key, describe(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [describe(item) for item in value]
    return value


def states_of_generators() -> tuple[Any, ...]:
    return random.getstate(), describe(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002


def test_global_generators_are_restored(run):
    random.seed(11)
    np.random.seed(12)  # noqa: NPY002 - users may draw from the legacy generator
    torch.manual_seed(13)
    before = states_of_generators()

    def tamper(module: nn.Module) -> None:
        assert states_of_generators() != before  # seeded for the analysis
        random.random()
        np.random.random()  # noqa: NPY002
        torch.rand(1)

    run(Net(), tamper, mode="train")
    assert states_of_generators() == before


def test_reading_a_loader_draws_nothing_either():
    loader = DataLoader(TensorDataset(*make_batch()), batch_size=2, shuffle=True)
    before = states_of_generators()
    hessian_spectrum(Net(), loader, cases.squared_error, steps=2)
    assert states_of_generators() == before


MODES = {"eval": [False] * 5, "train": [True] * 5, "keep": [True, True, False, True, True]}


@pytest.mark.parametrize("mode", MODES)
def test_the_mode_holds_in_every_submodule_and_mixed_modes_are_restored(mode, run):
    module, seen = Net().train(), []
    module.norm.eval()

    def tamper(module: nn.Module) -> None:
        seen.append([m.training for m in module.modules()])
        module.last.train(not module.last.training)

    run(module, tamper, mode=mode)
    assert all(modes == MODES[mode] for modes in seen)
    assert [m.training for m in module.modules()] == MODES["keep"]


class TestTensors:
    @pytest.mark.parametrize(
        "tamper",
        [
            lambda module: module.first.weight.detach().mul_(1.5),
            lambda module: module.first.weight.data.mul_(1.5),  # does not count as a change to autograd
            lambda module: module.first.weight.detach().numpy().__imul__(1.5),  # nor does this
            lambda module: setattr(module.first.weight, "data", module.first.weight.data * 1.5),
            lambda module: setattr(module.first, "weight", nn.Parameter(1.5 * module.first.weight.detach())),
            lambda module: torch.optim.SGD([module.first.weight.requires_grad_()], lr=1.0).step(
                lambda: cases.squared_error(module, make_batch()).backward()
            ),
        ],
        ids=["in place", "through .data", "through NumPy", "new .data", "new parameter", "an optimizer's step"],
    )
    def test_parameters_are_restored(self, tamper, run):
        module = Net()
        weight, bias = module.first.weight, module.first.bias
        address = weight.data_ptr()
        before = copy.deepcopy(module.state_dict())
        run(module, tamper)
        assert module.first.weight is weight
        assert weight.data_ptr() == address  # an optimizer's state, or a tied weight, may refer to this storage
        assert module.first.bias is bias
        assert describe(dict(module.state_dict())) == describe(dict(before))

    def test_requires_grad_is_restored(self, run):
        module = Net()
        module.last.bias.requires_grad_(False)
        before = [p.requires_grad for p in module.parameters()]

        def tamper(module: nn.Module) -> None:
            # As `toggle_optimizer` does with the parameters of the other optimizers.
            module.norm.weight.requires_grad_(False)
            module.last.bias.requires_grad_(True)

        run(module, tamper, parameters=lambda name, p: name != "norm.weight")
        assert [p.requires_grad for p in module.parameters()] == before

    @pytest.mark.parametrize(
        "tamper",
        [
            lambda module: cases.squared_error(module, make_batch()).backward(),
            lambda module: module.zero_grad(),
            lambda module: setattr(module.first.weight, "grad", torch.ones(4, 3)),
        ],
        ids=["backward", "zero_grad", "assignment"],
    )
    def test_gradients_are_absent_inside_and_restored(self, tamper, run):
        module = Net()
        module.last.bias.requires_grad_(False)
        for number, p in enumerate(module.parameters()):
            p.grad = torch.full_like(p, float(number))
        module.norm.weight.grad = None
        objects = [p.grad for p in module.parameters()]
        values = describe(objects)

        def look_and_tamper(module: nn.Module) -> None:
            assert all(p.grad is None for p in module.parameters())
            tamper(module)

        run(module, look_and_tamper)
        assert all(p.grad is then for p, then in zip(module.parameters(), objects, strict=True))
        assert describe(objects) == values

    def test_unchanged_tensors_are_not_written(self, run):
        # Writing would invalidate graphs that the user holds.
        module = Net()
        held = (module.first.weight**2).sum()
        run(module)
        held.backward()
        assert torch.equal(module.first.weight.grad, 2 * module.first.weight)


class TestAttributes:
    def test_assignments_additions_and_deletions_are_undone(self, run):
        module = Net()
        module.count, module.name, module.cache, module.last.best = 3, "before", [1], torch.ones(2)
        cache, best = module.cache, module.last.best
        before = set(vars(module)), set(module.state_dict())

        def tamper(module: nn.Module) -> None:
            module.count += 1
            module.name = "after"
            module.__dict__.pop("cache", None)
            module.last.best = module.last.best * 2
            module.last.new_cache = []
            module.new_layer = nn.Linear(1, 1)
            module.register_buffer("new_buffer", torch.zeros(1))

        run(module, tamper)
        assert (module.count, module.name) == (3, "before")
        assert module.cache is cache
        assert module.last.best is best
        assert best.tolist() == [1.0, 1.0]
        assert (set(vars(module)), set(module.state_dict())) == before
        assert not hasattr(module.last, "new_cache")
        assert not hasattr(module, "new_layer")

    def test_objects_that_hold_a_lock_are_skipped(self, run):
        module, service = Net(), SimpleNamespace(lock=(lock := threading.Lock()), sent=[])
        module.service, module.services = service, [service]

        def tamper(module: nn.Module) -> None:
            with module.service.lock:
                module.service.sent.append(1)
            module.services.append(None)

        run(module, tamper)
        assert module.service is service
        assert service.lock is lock
        assert not lock.locked()
        assert len(service.sent) > 0  # not undone: the object may stand for a resource outside this process
        assert module.services == [service]  # the list is the module's own


def reference() -> np.ndarray:
    return hessian_spectrum(Net(), [make_batch()], cases.squared_error, steps=5).nodes


class Halved(torch.autograd.Function):
    """The identity, in half precision where autocast is on."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class TestSurroundings:
    """What the caller has switched on has no effect inside, and is on again afterwards."""

    def test_autocast(self, run):
        seen = []
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run(Net(), lambda module: seen.append(torch.is_autocast_enabled("cpu")))
            assert torch.is_autocast_enabled("cpu")
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16
            nodes = hessian_spectrum(Net(), [make_batch()], cases.squared_error, steps=5).nodes
        assert not any(seen)
        np.testing.assert_array_equal(nodes, reference())

    @pytest.mark.parametrize("how", ["context", "decorator", "object", "nested", "custom function"])
    def test_autocast_that_the_loss_switches_on(self, how):
        module = Net()
        kept = torch.autocast("cpu", dtype=torch.bfloat16)
        seen = []

        def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            def forward(x: Tensor) -> Tensor:
                seen.append(torch.is_autocast_enabled("cpu"))
                return module(x)

            if how == "decorator":
                output = torch.autocast("cpu", dtype=torch.bfloat16)(forward)(batch[0])
            elif how == "nested":
                with torch.autocast("cpu", enabled=False), torch.amp.autocast("cpu"):
                    output = forward(batch[0])
            else:
                with kept if how == "object" else torch.autocast("cpu", dtype=torch.bfloat16):
                    output = forward(Halved.apply(batch[0]) if how == "custom function" else batch[0])
            return cases.squared_error(lambda _: output.float(), batch)

        found = hessian_spectrum(module, [make_batch()], loss, steps=5)
        expected = hessian_spectrum(module, [make_batch()], cases.squared_error, steps=5)
        np.testing.assert_array_equal(found.nodes, expected.nodes)
        assert seen
        assert not any(seen)
        with kept:
            assert torch.is_autocast_enabled("cpu")
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert not torch.is_autocast_enabled("cpu")

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_disabled_gradients(self, context, run):
        module = Net()
        module.norm.running_mean.fill_(0.25)
        module.cache = [torch.zeros(1)]
        before = copy.deepcopy(module.state_dict())

        def tamper(module: nn.Module) -> None:
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            module.cache[0].add_(1.0)
            module.last.bias.requires_grad_(False)
            module.first.weight.detach().add_(1.0)

        plain, batch = Net(), make_batch()
        with context():
            run(module, tamper, mode="train", parameters=lambda name, p: name == "last.weight")
            assert not torch.is_grad_enabled()
            assert torch.is_inference_mode_enabled() is (context is torch.inference_mode)
            nodes = hessian_spectrum(plain, [batch], cases.squared_error, steps=5).nodes
        assert describe(dict(module.state_dict())) == describe(dict(before))
        assert module.cache[0].item() == 0.0
        assert module.last.bias.requires_grad
        np.testing.assert_array_equal(nodes, reference())

    def test_batches_made_in_inference_mode(self):
        # As everything is that a data loader makes inside `trainer.validate` or `trainer.test`.
        module = Net()
        with torch.inference_mode():
            batch = make_batch()
            assert batch[0].is_inference()
            nodes = hessian_spectrum(module, [batch], cases.squared_error, steps=5).nodes
        np.testing.assert_array_equal(nodes, reference())

    def test_attention_backends(self, run):
        before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
        seen = []
        run(Net(), lambda module: seen.append(torch.backends.cuda.flash_sdp_enabled()))
        assert not any(seen)
        assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()) == before

    def test_the_loss_function_may_change_its_batch(self):
        def loss(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            target = batch.pop("y")
            batch["x"].mul_(2.0)
            return cases.squared_error(module, (batch["x"], target))

        x, y = make_batch()
        spectra = [
            hessian_spectrum(Net(), [{"x": x, "y": y}], loss, steps=5, mode="train", strategy=strategy)
            for strategy in ("graph", "recompute")
        ]
        np.testing.assert_allclose(spectra[0].nodes, spectra[1].nodes, rtol=0, atol=1e-6)
        assert torch.equal(x, make_batch()[0])


def backends() -> list[Any]:
    if hasattr(torch.backends.cudnn, "conv"):
        cudnn, cpu = torch.backends.cudnn, torch.backends.mkldnn
        return [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, cpu.matmul, cpu.conv, cpu.rnn]
    return [torch.backends.cuda.matmul, torch.backends.cudnn]


def precisions() -> list[Any]:
    name = "fp32_precision" if hasattr(torch.backends.cudnn, "conv") else "allow_tf32"
    return [getattr(backend, name) for backend in backends()]


@pytest.fixture
def _settings_of_precision() -> Iterator[None]:
    """Put all settings back."""
    initial = precisions()
    yield
    torch.set_float32_matmul_precision("highest")
    if hasattr(torch.backends.cudnn, "conv"):
        torch.backends.fp32_precision = "none"
        for backend, value in zip(backends(), initial, strict=True):
            backend.fp32_precision = value


@pytest.mark.usefixtures("_settings_of_precision")
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_precision_is_exact_inside_and_its_old_settings_can_be_read_and_written(precision, run):
    def read() -> list[Any]:
        cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        return [torch.get_float32_matmul_precision(), cuda.allow_tf32, cudnn.allow_tf32, *precisions()]

    def inside(module: nn.Module) -> None:
        seen.append(read())
        with torch.backends.cudnn.flags(enabled=False):  # for second derivatives of recurrent networks
            module(make_batch()[0])
        seen.append(read())

    torch.set_float32_matmul_precision(precision)
    before, seen = read(), list[list[Any]]()
    run(Net(), inside)
    exact = ["ieee"] * 6 if hasattr(torch.backends.cudnn, "conv") else [False] * 2
    assert [found[:3] for found in seen] == [["highest", False, False]] * len(seen)
    assert seen[0][3:] == exact
    assert "tf32" not in seen[-1]
    assert read() == before


@pytest.mark.usefixtures("_settings_of_precision")
@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="no settings for all backends together")
def test_backends_go_on_following_the_setting_for_all_of_them(run):
    for backend in backends():
        backend.fp32_precision = "none"
    torch.backends.fp32_precision, seen = "tf32", list[str]()
    run(Net(), lambda module: seen.extend(precisions()))
    assert set(seen) == {"ieee"}
    assert set(precisions()) == {"tf32"}
    torch.backends.fp32_precision = "ieee"
    assert set(precisions()) == {"ieee"}


def test_products_of_16_bit_numbers_are_added_up_in_32_bits_inside(run):
    settings, seen = torch.backends.cuda.matmul, set[bool]()
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("fp16", "bf16")]
    names = [name for name in names if hasattr(settings, name)]
    before = [getattr(settings, name) for name in names]
    run(Net(), lambda module: seen.update(bool(getattr(settings, name)) for name in names))
    assert names
    assert seen == {False}
    assert [getattr(settings, name) for name in names] == before == [True] * len(names)


def test_global_settings_that_the_loss_changes_are_restored(run):
    def settings() -> list[Any]:
        own = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        return [torch.get_num_threads(), torch.is_anomaly_enabled(), torch.backends.cudnn.benchmark, *own, np.geterr()]

    def change(_: nn.Module) -> None:
        torch.set_num_threads(before[0] + 1)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = not before[2]
        np.seterr(under="raise")

    before = settings()
    run(Net(), change)
    assert settings() == before


class Cached(Dataset[Tensor]):
    """A dataset with a cache and a generator of its own."""

    def __init__(self) -> None:
        self.data, self.cache = torch.zeros(4), dict[int, Tensor]()
        self.rng = np.random.default_rng(0)

    def __getitem__(self, index: int) -> Tensor:
        return self.cache.setdefault(index, self.data[index] + self.rng.random())


@pytest.mark.parametrize("tensors", [True, False])
def test_a_dataset_with_its_tensors_or_in_another_without_them(tensors):
    dataset = Cached()
    state = dataset.rng.bit_generator.state
    with restore_state(dataset if tensors else torch.utils.data.Subset(dataset, [0, 1]), tensors=tensors):
        dataset[0]
        dataset.data.add_(1.0)
    assert dataset.cache == {}
    assert dataset.rng.bit_generator.state == state
    assert dataset.data.tolist() == [0.0 if tensors else 1.0] * 4
