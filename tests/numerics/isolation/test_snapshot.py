"""Snapshots restore state of every kind or skip it, and a failure affects no other state."""

import array
import collections
import contextlib
import dataclasses
import functools
import itertools
import random
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.masked import masked_tensor

from lightning_hesd import hessian_spectrum
from lightning_hesd.numerics.isolation import snapshot as limits
from lightning_hesd.numerics.isolation.snapshot import Snapshot, restore_state
from tests import cases

# Tensors --------------------------------------------------------------------------------------------------------------


class Labeled(torch.Tensor):
    """A tensor with an attribute that its copies insist on."""

    labels: list[str]

    def clone(self, *arguments: Any, **options: Any) -> Any:
        copy = super().clone(*arguments, **options)
        copy.labels = list(self.labels)
        return copy


class Silent(torch.Tensor):
    """A tensor that refuses all functions."""

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        raise NotImplementedError


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, that refuses all operations."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise NotImplementedError


class Mute(Wrapper):
    """The same with memory of its own."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return torch.Tensor._make_subclass(cls, inner)


def labeled() -> Tensor:
    tensor = torch.ones(3).as_subclass(Labeled)
    tensor.labels = ["a"]
    return tensor


def caught(transform: Any, x: Tensor) -> Tensor:
    """Return a tensor that a function transform made, and that has outlived it."""
    found: list[Tensor] = []
    transform(lambda x: after(found.append(x), x.sum()))(x)
    return found[0]


def inferred() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3)


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(3)


def nested(layout: Any) -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


def times_three(tensor: Tensor) -> object:
    with torch.no_grad():
        return tensor.mul_(3)


def no_change(tensor: Tensor) -> None:
    """Leave it alone: nothing can be done with it."""


def read(tensor: Any) -> Any:
    """Return what is in a tensor, whatever its kind."""
    if isinstance(tensor, Wrapper):
        return tensor.inner.tolist()
    with torch._C.DisableTorchFunction():
        if tensor.layout is torch.jagged or type(tensor).__name__ == "MaskedTensor":
            return [part.tolist() for part in vars(tensor).values() if type(part) is Tensor]
        if tensor.is_nested:
            return [part.tolist() for part in tensor.unbind()]
        if tensor.layout is not torch.strided:
            return tensor.to_dense().tolist(), tensor._nnz() if tensor.is_sparse else 0
        return tensor.int_repr().tolist() if tensor.is_quantized else bytes(tensor.untyped_storage().tolist())


KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "COO": (lambda: torch.eye(4).to_sparse(), times_three),
    "COO, more elements": (lambda: torch.eye(4).to_sparse(), lambda t: t.add_(torch.ones(4, 4).to_sparse())),
    "COO, not coalesced": (lambda: torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0]), times_three),
    "CSR": (lambda: torch.eye(4).to_sparse_csr(), times_three),
    "CSR, more elements": (lambda: torch.eye(4).to_sparse_csr(), lambda t: t.add_(torch.ones(4, 4).to_sparse_csr())),
    "CSC": (lambda: torch.eye(4).to_sparse_csc(), times_three),
    "BSR": (lambda: torch.eye(4).to_sparse_bsr((2, 2)), times_three),
    "frozen and sparse": (lambda: nn.Parameter(torch.eye(4).to_sparse(), requires_grad=False), times_three),
    "nested": (lambda: nested(torch.strided), times_three),
    "jagged": (lambda: nested(torch.jagged), times_three),
    "oneDNN": (lambda: torch.ones(3, 3).to_mkldnn(), lambda t: t.mul_(t.clone().add_(t))),
    "masked": (lambda: masked_tensor(torch.ones(3), torch.eye(3)[0].bool()), lambda t: t._masked_data.mul_(3)),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), lambda t: t.fill_(0.5)),
    "inference": (inferred, lambda t: t.numpy().__imul__(3)),
    "float8": (lambda: torch.ones(3).to(torch.float8_e4m3fn), lambda t: t.fill_(2.0)),
    "conjugate": (lambda: torch.ones(3, dtype=torch.complex64).conj(), times_three),
    "NaN": (lambda: torch.full((3,), torch.nan), lambda t: t.fill_(1.0)),
    "minus zero": (lambda: torch.full((3,), -0.0), lambda t: t.abs_()),
    "expanded": (lambda: torch.ones(1).expand(4), lambda t: t[:1].mul_(3)),
    "not contiguous": (lambda: torch.ones(4, 4)[:, 1:3].T, times_three),
    "leaf": (lambda: torch.ones(3, requires_grad=True), times_three),
    "labeled": (labeled, lambda t: after(t.labels.append("b"), t.mul_(3))),
    "without its label": (lambda: torch.ones(3).as_subclass(Labeled), times_three),
    "silent": (lambda: torch.ones(3).as_subclass(Silent), lambda t: t.__dict__.update(new=1)),
    "wrapper": (lambda: Wrapper(torch.ones(3)), lambda t: t.inner.mul_(3)),
    "mute": (lambda: Mute(torch.ones(3)), lambda t: t.inner.mul_(3)),
    "meta": (lambda: torch.ones(3, device="meta"), no_change),
    "fake": (fake, no_change),
    "of torch.func.grad": (lambda: caught(torch.func.grad, torch.ones(3)), no_change),
    "of torch.func.vmap": (lambda: caught(torch.func.vmap, torch.ones(3, 2)), no_change),
    "zero": (lambda: torch._efficientzerotensor(3), no_change),
    "empty": (lambda: torch.empty(0), no_change),
    "freed": (lambda: after(None, torch.ones(5).resize_(0)), no_change),
}
PLACES: dict[str, Callable[[nn.Module, Any], object]] = {
    "buffer": lambda module, tensor: module._buffers.update(thing=tensor),
    "attribute": lambda module, tensor: setattr(module, "thing", tensor),
    "tuple": lambda module, tensor: setattr(module, "things", (tensor, 1)),
    "object": lambda module, tensor: setattr(module, "thing", types.SimpleNamespace(tensor=[tensor])),
}


def after(change: object, value: Any) -> Any:
    """Return the second argument: the first has been evaluated before."""
    return value


BATCHES = [(torch.ones(4, 3), torch.ones(4, 2)), (torch.zeros(4, 3), torch.ones(4, 2))]


def linear() -> nn.Linear:
    return cases.seeded(lambda: nn.Linear(3, 2))


@functools.cache
def expected_loss() -> float:
    return hessian_spectrum(linear(), BATCHES, cases.squared_error, steps=2, batch_size=None).loss


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:.*beta", "ignore:.*prototype", "ignore:.*deprecated")
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_any_kind(kind):
    make, change = KINDS[kind]
    for place, put in PLACES.items():
        tensor, module = make(), linear()
        put(module, tensor)
        before = None if change is no_change else read(tensor)
        labels, generator = vars(tensor).copy(), torch.get_rng_state()

        def loss(module: Any, batch: Any, tensor: Any = tensor) -> Tensor:
            change(tensor)
            module.calls = getattr(module, "calls", 0) + 1
            torch.rand(1)
            return cases.squared_error(module, batch) * module.calls

        strategy = "recompute" if place == "tuple" else "auto"
        # Only some places, to save time, with the products.
        if place in {"buffer", "tuple"}:
            found = hessian_spectrum(module, BATCHES, loss, steps=2, strategy=strategy, batch_size=None)
            assert found.loss == expected_loss()
        else:
            with restore_state(module):
                loss(module, BATCHES[0])
        assert before is None or read(tensor) == before
        assert vars(tensor) == labels
        assert module.training
        assert not hasattr(module, "calls")
        assert torch.equal(torch.get_rng_state(), generator)


def test_operations_on_wrappers_work_afterwards():
    with restore_state(nn.Linear(2, 2)):
        pass
    assert nested(torch.jagged).shape[0] == 2
    with pytest.raises(NotImplementedError):
        Wrapper(torch.ones(2)) + 1


SHAPES: dict[str, Callable[[Tensor], object]] = {
    "size": lambda t: t.resize_(2),
    "shape": lambda t: t.unsqueeze_(0),
    "type": lambda t: setattr(t, "data", t.data.half()),
    "freed memory": lambda t: t.untyped_storage().resize_(0),
}


@pytest.mark.parametrize("change", SHAPES.values(), ids=SHAPES)
def test_shapes_and_types_that_were_changed(change):
    tensor = torch.arange(6.0)
    address = tensor.data_ptr()
    with restore_state([tensor]):
        change(tensor)
        is_freed = tensor.untyped_storage().size() == 0
    assert (tensor.tolist(), tensor.dtype) == ([0, 1, 2, 3, 4, 5], torch.float32)
    assert is_freed or tensor.data_ptr() == address


# Objects --------------------------------------------------------------------------------------------------------------


class Pair(tuple):
    """A tuple that is made in another way, and whose own methods fail."""

    def __new__(cls, first: Any, second: Any) -> Any:
        return super().__new__(cls, (first, second))

    def __len__(self) -> int:
        raise NotImplementedError

    __iter__ = __len__


class OddDict(dict):
    """A dict whose own methods fail."""

    def items(self) -> Any:
        raise NotImplementedError

    __iter__ = clear = keys = values = items

    def __setitem__(self, key: Any, value: Any) -> None:
        raise NotImplementedError


class AttributeDict(dict):
    """A dict whose items are its attributes."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.__dict__ = self


class Shy:
    """An object whose attributes cannot be read."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


class Liar:
    """An object that will not say what it is."""

    @property
    def __class__(self) -> Any:
        raise RuntimeError

    def __bool__(self) -> bool:
        raise RuntimeError

    __eq__ = __bool__
    __hash__ = None


class Slotted:
    """An object with slots, of which one is not filled, and one is private."""

    __slots__ = ("__private", "__weakref__", "filled", "open")

    def __init__(self) -> None:
        self.filled, self.__private = [1], [1]

    def grow(self) -> None:
        self.filled.append(2)
        self.__private.append(2)
        self.open = 3

    def state(self) -> Any:
        return self.filled, self.__private, hasattr(self, "open")


def looped() -> list[Any]:
    ring: list[Any] = [1]
    ring.append(ring)
    return ring


def chained() -> Any:
    """Return objects that refer to one another, a thousand deep."""
    return functools.reduce(lambda chain, _: types.SimpleNamespace(next=chain), range(1000), {"n": 0})


def end_of(chain: Any) -> dict[str, int]:
    while isinstance(chain, types.SimpleNamespace):
        chain = chain.next
    return chain


Settings = dataclasses.make_dataclass("Settings", ["rate", "names"])
Slots = dataclasses.make_dataclass("Slots", ["rate", "names"], slots=True)


class Plain:
    """An object whose attributes may all be replaced at once."""

    def __init__(self) -> None:
        self.a = [1]

    def replace(self) -> None:
        self.__dict__ = {"a": 5}


# How the object is made, how it changes, and how its state is read.
OBJECTS: dict[str, tuple[Callable[[], Any], Callable[[Any], object], Callable[[Any], Any]]] = {
    "dict of lists": (lambda: {"a": [1], "b": []}, lambda v: (v["a"].append(2), v.pop("b")), repr),
    "full deque": (lambda: collections.deque([1, 2, 3], maxlen=3), lambda v: v.append(4), repr),
    "set": (set, lambda v: v.add(len(v)), repr),
    "bytearray": (bytearray, lambda v: v.append(0), repr),
    "long list": (lambda: [0] * 2000, lambda v: v.append(0), len),
    "array": (lambda: np.zeros(1), lambda v: v.__iadd__(1), repr),
    "array of objects": (lambda: np.array([[0]], dtype=object), lambda v: v.__iadd__(1), repr),
    "random numbers": (lambda: random.Random(3), lambda v: v.random(), random.Random.getstate),
    "NumPy's generator": (lambda: np.random.default_rng(3), lambda v: v.random(), lambda v: v.bit_generator.state),
    "NumPy's old generator": (lambda: np.random.RandomState(3), lambda v: v.random_sample(), lambda v: v.get_state()),
    "PyTorch's generator": (
        lambda: torch.Generator().manual_seed(3),
        lambda v: torch.rand((), generator=v),
        lambda v: v.get_state().tolist(),
    ),
    "ordered dict": (lambda: collections.OrderedDict(a=1, b=2), lambda v: v.move_to_end("a"), repr),
    "list of tensors": (lambda: [torch.zeros(2)], lambda v: (v[0].add_(1.0), v.append(torch.ones(2))), repr),
    "dataclass": (
        lambda: [Settings(0.1, {"a": Settings([1], 2)})],
        lambda v: (setattr(v[0], "rate", torch.ones(1)), v[0].names["a"].rate.clear()),
        repr,
    ),
    "slotted dataclass": (lambda: Slots(1, ["a"]), lambda v: (setattr(v, "rate", 2), v.names.clear()), repr),
    "odd tuple": (lambda: Pair([1], 2), lambda v: v[0].append(3), lambda v: v[0]),
    "odd dict": (lambda: OddDict(a=[1]), lambda v: dict.__setitem__(v, "b", 2), dict.__repr__),
    "attribute dict": (lambda: AttributeDict(a=[1]), lambda v: (v.a.append(2), setattr(v, "b", 2)), dict.__repr__),
    "slots": (Slotted, Slotted.grow, Slotted.state),
    "namespace": (lambda: types.SimpleNamespace(a=[1]), lambda v: (v.a.append(2), setattr(v, "b", 2)), repr),
    "new __dict__": (Plain, Plain.replace, vars),
    "ChainMap": (lambda: collections.ChainMap({}, {"a": 1}), lambda v: v.update(b=2), repr),
    "numbers": (lambda: array.array("d", [1.0]), lambda v: v.append(2.0), repr),
    "ring": (looped, lambda v: v[1].append(2), len),
    "chain": (chained, lambda v: end_of(v).update(n=1), end_of),
    "count": (lambda: types.SimpleNamespace(n=itertools.count(2, 3)), lambda v: next(v.n), lambda v: repr(v.n)),
    "iterator": (lambda: iter([1, 2, 3]), next, lambda v: v.__reduce__()[2]),
    "frozen array": (lambda: np.broadcast_to(np.ones(1), 3), no_change, repr),
}
LEFT_ALONE: dict[str, Callable[[], Any]] = {
    "shy": Shy,
    "liar": Liar,
    "mock": mock.Mock,
    "mock of a tensor": lambda: mock.MagicMock(spec=Tensor),
    "mock of a module": lambda: mock.MagicMock(spec=nn.Module),
    "dead proxy": lambda: weakref.proxy(Slotted()),
    "lock": threading.Lock,
    "generator": lambda: (i for i in range(3)),
    "view of bytes": lambda: memoryview(bytearray(3)),
    "weak keys": weakref.WeakKeyDictionary,
    "cached function": lambda: functools.lru_cache(len),
    "exhausted iterator": lambda: after(None, iter([])),
    "random numbers without a state": random.SystemRandom,
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_of_any_kind(kind):
    make, change, state = OBJECTS[kind]
    module = nn.Linear(1, 1)
    thing = make()
    vars(module).update(thing=thing, calls=0)
    before = repr(state(thing))
    with restore_state(module) as restore:
        for _ in range(3):
            change(thing)
            module.calls += 1
            assert change is no_change or repr(state(thing)) != before
            restore()
            assert (repr(state(thing)), module.calls) == (before, 0)
            assert vars(module)["thing"] is thing


class Scriptable(nn.Module):
    """A module with attributes of the types that scripts know."""

    seen: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout()
        self.calls, self.rates, self.seen = 0, {"a": 1.0}, []
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.rates["a"] += 1.0
        self.seen.append(x)
        self.total += x.sum()
        return self.dropout(x)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_modes_and_attributes_of_scripted_modules():
    module = torch.jit.script(Scriptable())
    with restore_state(module) as restore:
        for _ in range(2):
            module.eval()
            module(torch.ones(2))
            restore()
            assert (module.training, module.dropout.training) == (True, True)
            assert (module.calls, module.rates, module.seen, module.total.item()) == (0, {"a": 1.0}, [], 0.0)


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_objects_that_cannot_be_read_are_skipped(kind):
    module = nn.Linear(3, 2)
    vars(module).update(thing=LEFT_ALONE[kind](), calls=0)
    thing = vars(module)["thing"]

    def loss(module: Any, batch: Any) -> Tensor:
        module.calls += 1
        return cases.squared_error(module, batch)

    hessian_spectrum(module, BATCHES[:1], loss, steps=2)
    assert vars(module)["thing"] is thing
    assert (module.calls, module.training) == (0, True)


# Failures -------------------------------------------------------------------------------------------------------------


def lock(module: Any) -> None:
    if module.array.flags.writeable:
        module.array += 1
        module.array.flags.writeable = False


@pytest.mark.parametrize(
    ("change", "named"), [(lock, "an array"), (lambda module: list(module.iterator), "a list_iterator")]
)
@pytest.mark.parametrize("fails", [False, True])
def test_a_restoration_that_fails_goes_on_with_the_rest(change, named, fails):
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    module.array, module.iterator, module.calls, module.last = np.zeros(2), iter([1, 2]), 0, [1]
    next(module.iterator)
    before, generator = module[1].running_mean.clone(), torch.get_rng_state()

    def loss(module: Any, batch: Any) -> Tensor:
        change(module)
        module.calls += 1
        module.last.append(2)
        module[1].running_mean += 1
        torch.rand(1)
        if fails:
            raise ZeroDivisionError
        return cases.squared_error(module, batch)

    batches = [(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.ones(4, 2))]

    said = pytest.warns(RuntimeWarning, match=f"could not restore everything that the analysis changed: {named} ")
    with said, contextlib.suppress(ZeroDivisionError), restore_state(module):
        hessian_spectrum(module, batches, loss, mode="eval", strategy="recompute", steps=2)
    assert module.training
    assert (module.calls, module.last) == (0, [1])
    assert torch.equal(module[1].running_mean, before)
    assert torch.equal(torch.get_rng_state(), generator)


# Data -----------------------------------------------------------------------------------------------------------------


class Images(torch.utils.data.Dataset[Any]):
    """A dataset with many samples."""

    def __init__(self) -> None:
        self.samples = [(f"{i}.png", i) for i in range(20_000)]
        self.tensors = [torch.zeros(1) for _ in range(limits.MAX_COPIED + 10)]
        self.large = torch.zeros(limits.MAX_COPIED_BYTES // 4 + 1)
        self.asked, self.objects = 0, [types.SimpleNamespace(n=0) for _ in range(limits.MAX_COMPARED_STATES)]


def test_data_are_not_copied():
    images = Images()
    snapshot = Snapshot(nn.Linear(1, 1), others=[images])
    images.asked += 1
    images.samples.append(("new.png", 0))
    images.objects[7].n += 1
    for tensor in (*images.tensors, images.large):
        tensor.add_(1)
    snapshot.restore(replacing=True)
    assert (images.asked, len(images.samples), images.objects[7].n) == (0, 20_000, 0)
    assert sum(tensor.item() for tensor in images.tensors) == 10
    assert images.large[0] == 1
    images.asked += 1  # has been found changed before: looked at again even where there is much else
    images.objects[8].n += 1
    snapshot.restore(replacing=True, thorough=False)
    assert (images.asked, images.objects[8].n) == (0, 1)
    snapshot.restore()
    assert images.objects[8].n == 0


class Kind(type):
    """A metaclass."""

    made = 0


class Apart:
    """A class that is reached itself, not an object of it."""

    count = 0
    seen: list[int] = []  # noqa: RUF012 - a default that all share


class InBody:
    """The value of a class attribute."""

    count = 0


class Counting(nn.Module, metaclass=Kind):
    """Keeps state in its own class, and in classes that none of its objects belongs to."""

    state = InBody
    counts: ClassVar[dict[str, int]] = {"n": 0}
    calls = 0
    tensor: ClassVar[Tensor] = torch.zeros(())
    record = types.SimpleNamespace(count=0)

    class Nested:
        """Stays in its place."""

        count = 0

    def __init__(self) -> None:
        super().__init__()
        self.apart = Apart

    @property
    def doubled(self) -> int:
        return 2 * type(self).calls


class Inherited(Counting):
    """Finds state in the class above, and binds some of it in its own."""


@pytest.mark.parametrize("cls", [Counting, Inherited])
def test_state_of_classes_is_restored(cls: Any) -> None:
    module = cls()
    names = [dict(vars(c)) for c in (Counting, Inherited)]
    with restore_state(module) as restore:
        for _ in range(2):
            for owner in (InBody, Counting.Nested, Apart, module.record):
                owner.count += 1
            Kind.made += 1
            Apart.seen.append(1)
            cls.counts["n"] += 1
            cls.calls += 1
            cls.tensor.add_(1)
            cls.fresh = 1
            restore()
            assert [dict(vars(c)) for c in (Counting, Inherited)] == names
            assert (Kind.made, InBody.count, Counting.Nested.count, Apart.count, Apart.seen) == (0, 0, 0, 0, [])
            counts = (Counting.counts, Counting.tensor.item(), Counting.record.count, module.doubled)
            assert counts == ({"n": 0}, 0.0, 0, 0)
