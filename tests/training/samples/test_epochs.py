"""Which batches of an epoch are analyzed: those that training sees, from all over the epoch."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler, Sampler

from lightning_hesd.training.samples.analysis_samples import draw_samples
from lightning_hesd.training.samples.positions import spread_positions
from tests.line_count import counted_lines
from tests.training.broken import raising
from tests.training.modules import SIZE, Classifier, Digits, callback, fit, freeze, loader, seed
from tests.training.samples.drawn import positions


def shares(chosen: list[int], period: int) -> list[float]:
    return [sum(position % period == rest for position in chosen) / len(chosen) for rest in range(period)]


@pytest.mark.parametrize("total", [10, 48, 64, 100, 391, 782, 5005])
@pytest.mark.parametrize("count", [2, 4, 8, 32])
def test_a_term_in_every_kth_batch_has_its_share(count: int, total: int) -> None:
    chosen = spread_positions(count, total)
    assert len(set(chosen)) == count or count >= total
    assert 0 <= min(chosen) <= max(chosen) < total
    for period in range(2, 17):
        for share, expected in zip(shares(chosen, period), shares(list(range(total)), period), strict=True):
            assert abs(share - expected) * count <= 3.0, "where chance would make it five"


def test_positions_cover_the_epoch() -> None:
    for count, total in ((3, 8), (4, 48), (16, 100), (32, 391), (32, 100_000), (300, 1000)):
        for evenness, most in ((0.3, 0.4), (2.0, 1.0 / count)):
            chosen = np.array(spread_positions(count, total, evenness=evenness))
            assert np.abs((chosen + 0.5) / total - (np.arange(count) + 0.5) / count).max() <= most
            assert sorted(set(chosen)) == chosen.tolist()
    for total in (1, 3, 16):
        assert spread_positions(16, total) == list(range(total))


class Regularized(Classifier):
    """Regularizes in every nth batch, n-fold."""

    every = 1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        penalty = sum((p**2).sum() for p in self.parameters()) if batch_idx % self.every == 0 else 0.0
        return super().training_step(batch, batch_idx) + 0.01 * self.every * penalty


def test_batch_idx_is_the_position_in_the_epoch(tmp_path: Path) -> None:
    found = []
    for every in (1, 4):
        observer, module = callback(steps=8, num_samples=32, at_start=True, epochs=[]), Regularized()
        module.every = every
        fit(tmp_path, observer, module=module, data=loader(Digits(32), batch_size=4, shuffle=True), max_epochs=1)
        found.append(observer.history[0].spectrum)
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-5)
    assert found[0].lambda_min == pytest.approx(found[1].lambda_min, rel=1e-4)
    assert found[0].lambda_max == pytest.approx(found[1].lambda_max, rel=1e-4)


def test_positions_are_those_that_training_reaches() -> None:
    reached = {batch.position for batch in draw_samples(loader(batch_size=1, shuffle=True), 4, max_batches=6).batches}
    assert reached <= set(range(6))
    assert len(reached) == 4
    distributed = loader(batch_size=1, sampler=DistributedSampler(Digits(), num_replicas=4, rank=1))
    assert {batch.position for batch in draw_samples(distributed, SIZE).batches} == set(range(10))


def test_batches_in_order_are_those_of_training_if_all_are_analyzed(tmp_path: Path) -> None:
    """Also if training ends within its first epoch."""
    for options, batches in (({"max_epochs": 1}, 5), ({"max_steps": 2, "accumulate_grad_batches": 2}, 4)):
        observer = callback(steps=2, num_samples=SIZE)
        fit(tmp_path, observer, data=loader(batch_size=8), **options)
        drawn = observer._recorder.state_dict()["training"]["indices"]
        assert drawn == list(range(8 * batches))
    part = draw_samples(loader(batch_size=8), 16)
    assert part.indices != tuple(range(16)), "of more samples, random ones"


class Identities(Sampler[int]):
    """Positions in the order P x K: four identities (position modulo ten), two samples of each, per batch of eight."""

    indices = (0, 1, 2)  # no positions

    def __iter__(self) -> Iterator[int]:
        for _ in range(5):
            for identity in torch.randperm(10)[:4].tolist():
                yield from (identity + 10 * n for n in torch.randperm(4)[:2].tolist())

    def __len__(self) -> int:
        return SIZE


class Buckets(Sampler[list[int]]):
    """Batches of positions with one remainder modulo four, in place of one length."""

    def __init__(self) -> None:
        self.buckets = [list(range(rest, SIZE, 4)) for rest in range(4)]

    def __iter__(self) -> Iterator[list[int]]:
        batches = []
        for bucket in self.buckets:
            np.random.shuffle(bucket)  # noqa: NPY002 - in place, as many do
            batches += [bucket[start : start + 4] for start in range(0, 10, 4)]
        return iter([batches[number] for number in torch.randperm(12).tolist()])

    def __len__(self) -> int:
        return 12


def one_bucket_only(items: list[Any]) -> Any:
    if len({item[2] % 4 for item in items}) > 1:
        raising(RuntimeError("stack expects each tensor to be equal size"))()
    return torch.utils.data.default_collate(items)


def test_drawing_with_replacement_repeats() -> None:
    data = loader(sampler=RandomSampler(range(SIZE), replacement=True, num_samples=100))
    drawn = draw_samples(data, 1000)
    assert len(drawn.indices) == 100
    assert len(set(drawn.indices)) < SIZE
    assert [batch.weight for batch in draw_samples(data, 30).batches] == [8, 8, 8, 6]


@pytest.mark.parametrize("num_samples", [1, 12, 1000])
@pytest.mark.parametrize("drop_last", [False, True])
def test_identities_stay_together(num_samples: int, drop_last: bool) -> None:
    drawn = draw_samples(loader(sampler=Identities(), drop_last=drop_last), num_samples)
    assert len(drawn.batches) == min(-(-num_samples // 8), 5)
    for batch in drawn.batches:
        _, counts = np.unique(batch.data[2] % 10, return_counts=True)
        assert counts.tolist() == [2, 2, 2, 2]


def test_a_batch_size_of_the_analysis_regroups_what_a_sampler_draws() -> None:
    for size, weights, positions_in_epoch in (
        (None, [8] * 5, [0, 1, 2, 3, 4]),
        (16, [16, 16, 8], [0, 2, 4]),
        (4, [4] * 10, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
    ):
        drawn = draw_samples(loader(sampler=list(range(SIZE))), 1000, batch_size=size)
        assert drawn.indices == tuple(range(SIZE))
        assert [batch.weight for batch in drawn.batches] == weights
        assert [batch.position for batch in drawn.batches] == positions_in_epoch


def test_batches_that_can_only_be_put_together_by_their_sampler() -> None:
    sampler = Buckets()
    before = freeze(sampler.buckets)
    drawn = draw_samples(loader(batch_sampler=sampler, collate_fn=one_bucket_only), 1000)
    assert sorted(drawn.indices) == list(range(SIZE))
    assert {len(batch.data[2]) for batch in drawn.batches} == {4, 2}
    assert freeze(sampler.buckets) == before
    pieces = draw_samples(loader(batch_sampler=sampler, collate_fn=one_bucket_only), 1000, batch_size=3)
    assert sorted(pieces.indices) == list(range(SIZE))
    assert max(batch.weight for batch in pieces.batches) == 3


class Sorted(Digits):
    """Neighbors can be put together: ten samples of each kind follow each other."""

    def __getitem__(self, position: int) -> Any:
        return (*super().__getitem__(position)[:2], position // 10)


def test_data_sorted_so_that_neighbors_fit_together() -> None:
    drawn = draw_samples(loader(Sorted(), batch_size=5, collate_fn=one_bucket_only), 15)
    assert len(drawn.batches) == 3
    assert len({position // 10 for position in drawn.indices}) == 3, "from all over the epoch"
    with pytest.raises(RuntimeError, match=r"`collate_fn` fails for a batch of 5 samples .*equal size"):
        draw_samples(loader(Sorted(), batch_size=5, shuffle=True, collate_fn=one_bucket_only), 15)


def only_full(items: list[Any]) -> Any:
    assert len(items) == 16, "a memory bank of fixed size"
    return torch.utils.data.default_collate(items)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("num_samples", [8, 20, 1000])
def test_full_batches_where_the_rest_is_dropped(num_samples: int, shuffle: bool) -> None:
    data = loader(batch_size=16, drop_last=True, shuffle=shuffle, collate_fn=only_full)
    drawn = draw_samples(data, num_samples)
    assert len(drawn.batches) == (1 if num_samples == 8 else 2)
    smaller = draw_samples(loader(batch_size=16, drop_last=True, shuffle=shuffle), num_samples, batch_size=8)
    assert sum(batch.weight for batch in smaller.batches) == min(num_samples, SIZE), "as asked"


class Curriculum(Sampler[int]):
    """From easy to hard samples, and one epoch further each time."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(range(SIZE))


def test_batches_from_all_over_the_epoch_of_a_sampler() -> None:
    sampler = Curriculum()
    drawn = draw_samples(loader(sampler=sampler, batch_size=4), 16)
    assert len(drawn.indices) == 16
    assert abs(np.mean(drawn.indices) - (SIZE - 1) / 2) < 4
    for batch in drawn.batches:
        assert batch.data[2].tolist() == list(range(4 * batch.position, 4 * batch.position + 4))
    assert sampler.epoch == 0
    early = draw_samples(loader(sampler=sampler, batch_size=4), 1000, max_batches=3)
    assert list(early.indices) == list(range(12)), "training sees no more"


class Named(Dataset[Any]):
    """Samples have names."""

    def __getitem__(self, name: str) -> Any:
        return Digits()[int(name)]


def test_keys_of_any_kind(tmp_path: Path) -> None:
    def named() -> DataLoader[Any]:
        return DataLoader(Named(), batch_size=8, sampler=[str(number) for number in range(SIZE)])

    drawn = draw_samples(named(), 16)
    assert list(drawn.indices) == [str(position) for position in positions(drawn)]
    observer = callback()
    fit(tmp_path, observer, data=named(), max_epochs=1)
    assert observer.history[0].spectrum.num_samples == 16
    assert observer.state_dict()["samples"]["training"]["indices"] is None


class Pairs(BatchSampler):
    """Makes batches in its own way, of what its sampler gives."""

    def __iter__(self) -> Iterator[list[int]]:
        positions = list(self.sampler)
        return iter([positions[start : start + 2] for start in range(0, len(positions), 2)])

    def __len__(self) -> int:
        return len(self.sampler) // 2


def test_batches_of_all_ranks() -> None:
    """A sampler that Lightning or the user distributes gives one rank a part of the epoch only."""
    whole = draw_samples(loader(batch_sampler=Pairs(range(SIZE), 8, drop_last=False)), 1000)
    for rank in (0, 1):
        sampler = DistributedSampler(range(SIZE), num_replicas=2, rank=rank, shuffle=False)
        drawn = draw_samples(loader(batch_sampler=Pairs(sampler, 8, drop_last=False)), 1000)
        assert drawn.indices == whole.indices
        assert [batch.position for batch in drawn.batches] == [n // 2 for n in range(20)]


MANY = 100_000


class Paths(Dataset[Any]):
    """As ImageFolder: a list of many pairs."""

    def __init__(self) -> None:
        self.samples = [(f"{number}.jpg", number % 1000) for number in range(MANY)]

    def __len__(self) -> int:
        return MANY

    def __getitem__(self, position: int) -> Any:
        if position >= MANY:
            raise IndexError(position)
        return torch.zeros(2), self.samples[position][1], position

    __deepcopy__ = raising(AssertionError("a copy of the data"))


class Holder(Sampler[int]):
    """Holds the data set, and its labels again."""

    def __init__(self, dataset: Paths) -> None:
        self.dataset = dataset
        self.pairs = dataset.samples
        self.order = list(range(MANY))

    def __iter__(self) -> Iterator[int]:
        self.order.reverse()
        return iter(self.order)

    def __len__(self) -> int:
        return MANY


class Forever:
    """Repeats a batch sampler without end, as timm, yolov5 and mmseg do."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield from iter(self.sampler)


class Repeating(DataLoader[Any]):
    """The loader of those: it keeps an iterator, and takes an epoch from it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        object.__setattr__(self, "batch_sampler", Forever(self.batch_sampler))
        self.iterator = super().__iter__()

    def __len__(self) -> int:
        return len(self.batch_sampler.sampler)

    def __iter__(self) -> Iterator[Any]:
        for _ in range(len(self)):
            yield next(self.iterator)


class Virtual(Dataset[Any]):
    def __len__(self) -> int:
        return 10**10

    def __getitem__(self, position: int) -> Any:
        return torch.zeros(2), 0, position


BIG: dict[str, Callable[[Any], Any]] = {
    "shuffled": lambda data: loader(data, shuffle=True),
    "sampler_that_holds_the_data": lambda data: loader(data, sampler=Holder(data)),
    "endless_batches": lambda data: loader(data, batch_sampler=Forever(BatchSampler(RandomSampler(data), 8, False))),
    "endless_loader": lambda data: Repeating(data, batch_size=8, shuffle=True),
    "virtual": lambda data: loader(Virtual()),
}


@pytest.mark.parametrize("name", BIG)
def test_samples_are_drawn_without_python_code_for_each_sample(name: str) -> None:
    data = BIG[name](Paths())
    with counted_lines() as count:
        drawn = draw_samples(data, 32)
    assert count.lines < 2 * MANY, "samplers run a line per sample at most; deep copies run several"
    assert [batch.weight for batch in drawn.batches] == [8, 8, 8, 8]
    if name == "sampler_that_holds_the_data":
        assert data.sampler.order[0] == 0


def test_drawing_takes_no_batches_from_an_endless_loader() -> None:
    batches = []
    for draws in (False, True):
        seed(3)
        data = Repeating(Digits(), batch_size=8, shuffle=True)
        batches.append([next(data.iterator)[2].tolist()])
        if draws:
            drawn = draw_samples(data, 16)
            assert len(set(positions(drawn))) == 16
        batches[-1] += [batch[2].tolist() for batch in itertools.islice(data, 3)]
    assert batches[0] == batches[1]
