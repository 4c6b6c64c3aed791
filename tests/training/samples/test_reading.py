"""Reading samples: through workers where the data need them, and as loaders with an `__iter__` of their own do it."""

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, default_collate, get_worker_info

from lightning_hesd.training.samples.analysis_samples import AnalysisSamples, draw_samples
from tests.training.modules import SIZE, Digits, digits, freeze, global_generators, loader, samples
from tests.training.samples.drawn import BulkDigits, DatasetOfBatches, positions


class InWorkersOnly(Digits):
    """Opens its file in `open_file`, which workers call first, and knows its part by the number of the worker."""

    file: Any = None

    def __getitem__(self, position: int) -> Any:
        image, label, _ = super().__getitem__(position)
        return image + self.file["offset"], label, position


def open_file(worker_id: int) -> None:
    info = get_worker_info()
    assert info.id == worker_id
    info.dataset.file = {"offset": 10.0}


class NeedsInfo(Digits):
    def __getitem__(self, position: int) -> Any:
        assert get_worker_info().num_workers <= 2
        return super().__getitem__(position)


class Shards(IterableDataset[Any]):
    """Every worker reads its own samples."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        return (Digits()[position] for position in range(info.id, SIZE, info.num_workers))


class WholeShards(Shards):
    def __iter__(self) -> Iterator[Any]:
        assert get_worker_info() is not None
        return iter(DatasetOfBatches())


class BulkInWorkers(BulkDigits):
    def __getitem__(self, chosen: Any) -> Any:
        assert get_worker_info() is not None
        return super().__getitem__(chosen)


WORKERS: dict[str, Callable[[], Any]] = {
    "worker_init_fn": lambda: loader(InWorkersOnly(), shuffle=True, num_workers=2, worker_init_fn=open_file),
    "worker_info": lambda: loader(NeedsInfo(), shuffle=True, num_workers=2),
    "stream": lambda: loader(Shards(), num_workers=2),
    "stream_of_batches": lambda: DataLoader(WholeShards(), batch_size=None, num_workers=1),
    "bulk": lambda: DataLoader(
        BulkInWorkers(), None, sampler=BatchSampler(RandomSampler(range(SIZE)), 8, drop_last=False), num_workers=1
    ),
}


@pytest.mark.parametrize("name", WORKERS)
def test_data_that_only_workers_can_read(name: str) -> None:
    data = WORKERS[name]()
    before = freeze(vars(data.dataset)), global_generators()
    first, again = (draw_samples(data, 16) for _ in range(2))
    assert (freeze(vars(data.dataset)), global_generators()) == before
    assert [freeze(batch.data) for batch in first.batches] == [freeze(batch.data) for batch in again.batches]
    assert sum(batch.weight for batch in first.batches) == 16
    assert not any(part.is_shared() for batch in first.batches for part in batch.data)
    for batch in first.batches:
        shift = 10.0 if name == "worker_init_fn" else 0.0
        assert torch.allclose(batch.data[0] - shift, samples(batch.data[2])[0], atol=1e-5)
    assert not multiprocessing.active_children(), "workers are gone"


class Noisy(InWorkersOnly):
    """Random in three ways, and stateful."""

    def __init__(self) -> None:
        super().__init__(augment=lambda x: x + torch.randn(64))
        self.rng = np.random.default_rng(3)

    def __getitem__(self, position: int) -> Any:
        image, *rest = super().__getitem__(position)
        return image + self.rng.normal() + np.random.normal(), *rest  # noqa: NPY002


def test_augmentation_does_not_depend_on_the_number_of_workers() -> None:
    found = []
    for workers in (1, 2):
        drawn = draw_samples(loader(Noisy(), shuffle=True, num_workers=workers, worker_init_fn=open_file), 24)
        found.append(freeze([batch.data for batch in drawn.batches]))
    assert found[0] == found[1]


def test_a_failure_here_and_in_workers_is_that_of_this_process() -> None:
    class Broken(Digits):
        def __getitem__(self, position: int) -> Any:
            raise OSError("broken in a worker" if get_worker_info() else "broken here")

    with pytest.raises(OSError, match="broken here"):
        draw_samples(loader(Broken(), num_workers=1), 16)
    with pytest.raises(AttributeError, match="num_workers"):
        draw_samples(loader(NeedsInfo()), 16)  # training has no workers either


class Scaled(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:
        for x, *rest in super().__iter__():
            yield [100 * x, *rest]


class Counting(Scaled):
    """Changes with every epoch."""

    epochs = 0

    def __iter__(self) -> Iterator[Any]:
        self.epochs += 1
        return super().__iter__()


class FromTensors:
    """A loader that is no DataLoader, fast for data in memory; it shuffles its order in place."""

    def __init__(self) -> None:
        self.tensors = (*digits(), torch.arange(len(digits()[0])))
        self.order = np.arange(SIZE)

    def __iter__(self) -> Iterator[Any]:
        np.random.shuffle(self.order)  # noqa: NPY002
        for start in range(0, SIZE, 8):
            x, *rest = (tensor[self.order[start : start + 8]] for tensor in self.tensors)
            yield [100 * x, *rest]


class Wrapped:
    """Holds a DataLoader, as timm's prefetcher does."""

    def __init__(self) -> None:
        self.loader = loader(shuffle=True, num_workers=0, generator=torch.Generator().manual_seed(4))
        self.dataset = self.loader.dataset

    def __iter__(self) -> Iterator[Any]:
        return ([100 * x, *rest] for x, *rest in self.loader)


OWN: dict[str, Callable[[], Any]] = {
    "stateful": lambda: Counting(Digits(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(4)),
    "persistent_workers": lambda: Scaled(Digits(), 8, shuffle=True, num_workers=1, persistent_workers=True),
    "worker_init_fn": lambda: Scaled(
        InWorkersOnly(), 8, shuffle=True, num_workers=1, persistent_workers=True, worker_init_fn=open_file
    ),
    "no_loader": FromTensors,
    "wrapper": Wrapped,
}


def check_scaled(drawn: AnalysisSamples, shift: float = 0.0) -> None:
    assert len(set(positions(drawn))) == 16
    for batch in drawn.batches:
        assert torch.allclose(batch.data[0], 100 * (samples(batch.data[2])[0] + shift), atol=1e-3)


@pytest.mark.parametrize("name", OWN)
def test_a_loader_with_an_iter_of_its_own_is_not_taken_apart(name: str) -> None:
    data = OWN[name]()
    if name == "persistent_workers":
        next(iter(data))
    running = getattr(data, "_iterator", None)
    before = freeze([vars(data), global_generators()]) if running is None else None
    check_scaled(draw_samples(data, 16), 10.0 if name == "worker_init_fn" else 0.0)
    if running is None:
        assert freeze([vars(data), global_generators()]) == before
        assert not multiprocessing.active_children()
    else:
        assert data._iterator is running
        running._shutdown_workers()


def filtering(kept: Callable[[int], bool]) -> Callable[[list[Any]], Any]:
    """Return a function that leaves out samples, as collate functions do with those that could not be read."""

    def collate(items: list[Any]) -> Any:
        items = [item for item in items if kept(item[2])]
        return default_collate(items) if items else None

    return collate


def test_batches_weigh_by_the_samples_in_them_and_are_left_out_where_they_are_empty() -> None:
    data = loader(shuffle=True, collate_fn=filtering(lambda position: position % 4 == 0))
    drawn = draw_samples(data, 1000)
    assert sorted(positions(drawn)) == list(range(0, SIZE, 4))
    assert [batch.weight for batch in drawn.batches] == [len(batch.data[2]) for batch in drawn.batches]
    assert sum(batch.weight for batch in draw_samples(data, 5).batches) >= 5, "it goes on until these are there"
    assert len(draw_samples(data, 5).indices) < SIZE

    data = loader(batch_size=4, sampler=list(range(SIZE)), collate_fn=filtering(lambda position: position >= 20))
    drawn = draw_samples(data, 1000)
    assert sorted(positions(drawn)) == list(range(20, SIZE))
    assert [(batch.index, batch.position) for batch in drawn.batches] == [(0, 5), (1, 6), (2, 7), (3, 8), (4, 9)]
    again = draw_samples(data, 1000, drawn=drawn.drawn)
    assert [freeze(b.data) for b in again.batches] == [freeze(b.data) for b in drawn.batches]


def two_views(items: list[Any]) -> Any:
    x, y, position = default_collate(items)
    return torch.cat([x, x + 1]), torch.cat([y, y]), torch.cat([position, position])


def test_positions_that_stand_for_several_samples_each() -> None:
    data = loader(shuffle=True, collate_fn=two_views)
    drawn = draw_samples(data, SIZE)
    assert [batch.weight for batch in drawn.batches] == [16] * 3, "as many as hold forty samples"
    assert len(drawn.indices) == 24
    assert len(draw_samples(data, 2 * SIZE).indices) == SIZE

    data = loader(DatasetOfBatches(), batch_size=1, shuffle=True, collate_fn=lambda items: items[0])
    drawn = draw_samples(data, 8)
    assert [batch.weight for batch in drawn.batches] == [4, 4]
    again = draw_samples(data, 8, drawn=drawn.drawn)
    assert freeze([batch.data for batch in again.batches]) == freeze([batch.data for batch in drawn.batches])


def time_first(items: list[Any]) -> Any:
    x, y, position = default_collate(items)
    return x.view(-1, 8, 8).transpose(0, 1), y, position


def detection(items: list[Any]) -> Any:
    images = [x.view(1, 8, 8)[:, : 4 + position % 3] for x, _, position in items]
    return images, [{"boxes": torch.zeros(1 + position % 5, 4)} for _, _, position in items]


def scalar_first(items: list[Any]) -> Any:
    x, y, position = default_collate(items)
    return {"temperature": torch.tensor(2.0), "x": x, "y": y, "position": position}


@pytest.mark.parametrize("collate", [time_first, detection, scalar_first, list])
def test_the_number_of_positions_is_the_weight_whatever_is_made_of_them(collate: Callable[[Any], Any]) -> None:
    drawn = draw_samples(loader(batch_size=7, collate_fn=collate), 20)
    assert [batch.weight for batch in drawn.batches] == [7, 7, 6]


def only_time_first(items: list[Any]) -> Any:
    x, y, _ = time_first(items)
    return x, y.repeat(8, 1)


def graphs(items: list[Any]) -> Any:
    """Put the nodes of all samples into one tensor."""
    return {"nodes": torch.zeros(3 * len(items) + 1, 2), "edges": torch.zeros(2, 11, dtype=torch.long)}


@pytest.mark.parametrize("collate", [only_time_first, graphs])
def test_a_weight_that_cannot_be_told_is_warned_of(collate: Callable[[Any], Any]) -> None:
    with pytest.warns(RuntimeWarning, match=r"taken to hold the 7 samples that it was made from.*`batch_weight=`"):
        drawn = draw_samples(loader(batch_size=7, collate_fn=collate), 14)
    assert [batch.weight for batch in drawn.batches] == [7, 7]
    settled = draw_samples(loader(batch_size=7, collate_fn=collate), 14, batch_weight=lambda batch: 3.0)
    assert [batch.weight for batch in settled.batches] == [3, 3]


class Opaque:
    def __init__(self, items: list[Any]) -> None:
        self.items = np.stack([item[0] for item in items])


def test_batches_without_tensors() -> None:
    assert [batch.weight for batch in draw_samples(loader(collate_fn=Opaque), 12).batches] == [8, 4]
    stream = [Opaque([Digits()[0]]), Opaque([Digits()[1]])]
    with pytest.raises(ValueError, match="pass `batch_weight`"):
        draw_samples(stream, 12)
    assert [b.weight for b in draw_samples(stream, 12, batch_weight=lambda b: float(len(b.items))).batches] == [1, 1]


class FromQueue(IterableDataset):
    """Takes its samples from a queue that workers share with training."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.queue.get(timeout=5)


@pytest.mark.parametrize("init", [None, print], ids=["", "worker_init_fn"])
def test_workers_take_nothing_from_what_they_would_share_with_training(init: Any) -> None:
    queue = multiprocessing.get_context("fork").Queue()
    for number in range(4):
        queue.put(number)
    data = DataLoader(FromQueue(queue), batch_size=None, num_workers=1, worker_init_fn=init)
    with pytest.raises(MisconfigurationException, match="cannot be copied"):
        draw_samples(data, 2)
    assert [queue.get(timeout=5) for _ in range(4)] == [0, 1, 2, 3]
    queue.close()
    queue.join_thread()
