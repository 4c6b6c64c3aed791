"""The analysis samples: drawn as promised, the same every time, and from nothing that training still needs."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_hesd import HessianSpectrumCallback
from lightning_hesd.numerics.collectives import Collectives
from lightning_hesd.training.samples.analysis_samples import draw_samples
from lightning_hesd.training.samples.epochs import PlannedBatch
from tests.training import modules
from tests.training.modules import (
    NOISES,
    SIZE,
    Classifier,
    DataModule,
    Digits,
    SeenByLoss,
    fit,
    freeze,
    global_generators,
    loader,
    noise_of_all,
    plain_loss,
    samples,
    seed,
)
from tests.training.samples.drawn import BulkDigits, Counted, DatasetOfBatches, FiniteStream, positions

callback = functools.partial(modules.callback, batch_size=None)  # batches are analyzed as they were read

TRAINING = [1, 3, 4, 7, 9, 12, 20, 31]
"""Positions of the training samples where the others are for validation."""


# Which samples --------------------------------------------------------------------------------------------------------


class CustomSampler(Sampler[int]):
    """Knows its positions under a name of its own; `epochs` counts how often it was started."""

    def __init__(self, *, endless: bool = False) -> None:
        self.endless = endless
        self.epochs = 0

    def __iter__(self) -> Iterator[int]:
        self.epochs += 1
        yield from itertools.cycle(TRAINING) if self.endless else TRAINING


class CustomBatches:
    """A batch sampler that derives from nothing and has no `sampler`."""

    def __iter__(self) -> Iterator[list[int]]:
        yield TRAINING[:3]
        yield TRAINING[3:]

    def __len__(self) -> int:
        return 2


class ChoosingBatches(BatchSampler):
    """Has a `sampler` as every BatchSampler has, and leaves most of what it offers out."""

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield [position for position in batch if position in TRAINING]


def training_weights() -> Tensor:
    weights = torch.zeros(SIZE)
    weights[TRAINING] = torch.arange(1.0, 1.0 + len(TRAINING))
    return weights


WHOLE = range(SIZE)

LOADERS: dict[str, tuple[dict[str, Any], Sequence[int]]] = {
    # The options of the loader, and the positions that it can draw.
    "subset_sampler": ({"sampler": SubsetRandomSampler(TRAINING)}, TRAINING),
    "list_as_sampler": ({"sampler": TRAINING}, TRAINING),
    "custom_sampler": ({"sampler": CustomSampler()}, TRAINING),
    "batches_of_subset": ({"batch_sampler": BatchSampler(SubsetRandomSampler(TRAINING), 3, drop_last=False)}, TRAINING),
    "list_of_batches": ({"batch_sampler": [TRAINING[:4], TRAINING[4:]]}, TRAINING),
    "custom_batches": ({"batch_sampler": CustomBatches()}, TRAINING),
    "choosing_batches": ({"batch_sampler": ChoosingBatches(SequentialSampler(WHOLE), 8, drop_last=False)}, TRAINING),
    "weighted": ({"sampler": WeightedRandomSampler(training_weights(), len(TRAINING), replacement=False)}, TRAINING),
    "first_positions_at_random": ({"sampler": RandomSampler(range(10))}, range(10)),
    "first_positions_in_order": ({"sampler": SequentialSampler(range(10))}, range(10)),
    "first_positions_as_range": ({"sampler": range(10)}, range(10)),
    "default": ({}, WHOLE),
    "shuffle": ({"shuffle": True}, WHOLE),
    "distributed": ({"sampler": DistributedSampler(Digits(), num_replicas=3, rank=1)}, WHOLE),
    "batches": ({"batch_sampler": BatchSampler(RandomSampler(WHOLE), 4, drop_last=True)}, WHOLE),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_samples_that_the_sampler_can_draw(name: str) -> None:
    """Each once, although more are asked for."""
    options, expected = LOADERS[name]
    drawn = draw_samples(loader(**options), 1000)
    assert positions(drawn) == list(drawn.indices)
    assert sorted(drawn.indices) == list(expected)


def test_samplers_that_repeat_positions() -> None:
    endless = draw_samples(loader(sampler=CustomSampler(endless=True)), SIZE)
    assert sorted(endless.indices) == sorted(5 * TRAINING), "as many as there are samples"
    weighted = draw_samples(loader(sampler=WeightedRandomSampler(training_weights(), 100)), SIZE)
    assert set(weighted.indices) <= set(TRAINING)


def test_the_draw_is_random_and_decided_by_the_seed_alone() -> None:
    def draw(number: int) -> Any:
        seed(number)
        return [draw_samples(loader(shuffle=True), 10, seed=s).indices for s in (0, 1)]

    first, again = draw(1), draw(2)
    assert first == again
    assert set(first[0]) != set(first[1])
    assert list(first[0]) != sorted(first[0])


def test_batches_are_as_large_as_in_training_or_as_asked_and_of_the_same_samples() -> None:
    expected = draw_samples(loader(shuffle=True), 10)
    for batch_size, weights in ((1, [1] * 10), (3, [3, 3, 3, 1]), (8, [8, 2]), (100, [10])):
        drawn = draw_samples(loader(shuffle=True), 10, batch_size=batch_size)
        assert positions(drawn) == list(expected.indices)
        assert [batch.weight for batch in drawn.batches] == weights
    assert [batch.weight for batch in draw_samples(loader(batch_size=5), 10).batches] == [5, 5]
    batches = BatchSampler(RandomSampler(WHOLE), 7, drop_last=False)
    assert draw_samples(loader(batch_sampler=batches), 10).batches[0].weight == 7


def test_given_positions_in_the_given_order() -> None:
    batches = [PlannedBatch([5, 2, 9], 7), PlannedBatch([2], 3)]
    drawn = draw_samples(loader(shuffle=True), 3, drawn=batches)
    assert positions(drawn) == [5, 2, 9, 2]
    assert [(batch.weight, batch.position) for batch in drawn.batches] == [(3, 7), (1, 3)]
    assert drawn.drawn == tuple(batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": []}, "because the training dataset or its sampler is empty"),
        ({"batch_size": SIZE + 1, "drop_last": True}, "empty.*`drop_last=True`"),
        ({"collate_fn": lambda items: None}, "returned None or an empty batch"),
        ({"dataset": [], "sampler": None}, "because the training dataset or its sampler is empty"),
    ],
)
def test_nothing_to_draw(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_samples(loader(**options), 10)


# Nothing of the user's is disturbed -----------------------------------------------------------------------------------


class LazyDigits(Digits):
    """Opens its file when the first sample is read, counts, and draws from generators of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.handle: list[str] | None = None
        self.reads = 0
        self.rng = np.random.default_rng(5)
        self.generator = torch.Generator().manual_seed(5)
        self.cache: dict[int, Tensor] = {}

    def __getitem__(self, position: int) -> Any:
        if self.handle is None:
            self.handle = ["open"]
        self.reads += 1
        x, y, _ = super().__getitem__(position)
        x += self.rng.normal() + torch.randn(1, generator=self.generator)
        self.cache[position] = x
        return x, y, position


@pytest.mark.parametrize("case", ["succeeds", "fails", "is nested"])
def test_dataset_generators_and_sampler_are_restored(case: str) -> None:
    dataset: Any = LazyDigits()
    dataset.augment = noise_of_all
    if case == "fails":
        dataset.size = 3  # reading further fails
    sampler = CustomSampler()
    generator = torch.Generator().manual_seed(9)
    whole = ConcatDataset([Subset(dataset, range(SIZE))]) if case == "is nested" else dataset
    train_loader = loader(whole, sampler=sampler, generator=generator, worker_init_fn=print)
    before = freeze([vars(dataset), generator, vars(sampler)]), global_generators()
    with pytest.raises(IndexError) if case == "fails" else contextlib.nullcontext():
        assert len(draw_samples(train_loader, 10).indices) == len(TRAINING)
    assert (freeze([vars(dataset), generator, vars(sampler)]), global_generators()) == before
    assert dataset.handle is None


# Random augmentation, and any number of ranks -------------------------------------------------------------------------


class Scripted(Collectives):
    """One of several ranks, which runs by itself; functions take what it contributes to sums, and give the sums."""

    def __init__(
        self, contribute: Callable[[list[float]], None], total: Callable[[], list[float]], rank: int = 0, size: int = 1
    ) -> None:
        self.rank, self.size = rank, size
        self._contribute, self._total = contribute, total

    def sum_values(self, values: Sequence[float]) -> list[float]:
        self._contribute(list(values))
        return self._total()


def dealt(make_loader: Callable[[], Any], world_size: int, num_samples: int = 21, **kwargs: Any) -> list[Any]:
    """Draw on every rank, and put the batches together in the order of their index."""
    shares, own = [], []
    sums: list[list[float]] = []  # as one rank finds them; several must find the same sums
    draw_samples(make_loader(), num_samples, collectives=Scripted(sums.append, lambda: sums[-1]), **kwargs)
    for rank in range(world_size):
        seed(rank)  # ranks may differ in their random streams
        found: list[list[float]] = []
        ranks = Scripted(found.append, functools.partial(next, iter(sums)), rank, world_size)
        shares.append(draw_samples(make_loader(), num_samples, collectives=ranks, **kwargs))
        own.append(found)
    assert [[sum(parts) for parts in zip(*rounds, strict=True)] for rounds in zip(*own, strict=True)] == sums
    assert len({share.indices for share in shares}) == 1
    assert max(len(share.batches) for share in shares) - min(len(share.batches) for share in shares) <= 1
    batches = sorted((batch for share in shares for batch in share.batches), key=lambda batch: batch.index)
    return [(batch.index, batch.weight, batch.position, freeze(batch.data)) for batch in batches]


class EndlessStream(IterableDataset[Any]):
    """Yields random samples for ever."""

    def __iter__(self) -> Iterator[Any]:
        return map(Digits(10**9, NOISES["torch"]).__getitem__, itertools.count())


DEALT: dict[str, Callable[[], Any]] = {
    "augmentation": lambda: loader(Digits(augment=noise_of_all), shuffle=True),
    "generator_of_the_dataset": lambda: loader(LazyDigits(), shuffle=True),
    "stream": lambda: loader(EndlessStream()),
    "weighted": lambda: loader(sampler=WeightedRandomSampler(training_weights(), 40)),
}


@pytest.mark.parametrize("name", DEALT)
def test_the_same_batches_for_any_number_of_ranks(name: str) -> None:
    alone = dealt(DEALT[name], 1)
    assert [index for index, *_ in alone] == [0, 1, 2]
    assert [weight for _, weight, *_ in alone] == [8, 8, 5]
    for world_size in (2, 3):
        assert dealt(DEALT[name], world_size) == alone


@pytest.mark.parametrize("make_loader", [DEALT["augmentation"], DEALT["stream"]], ids=["dataset", "stream"])
def test_more_ranks_than_batches(make_loader: Callable[[], Any]) -> None:
    ranks = [Scripted(lambda own: None, lambda: [0.0, 8.0, 2.0], rank, 4) for rank in range(4)]
    shares = [draw_samples(make_loader(), 10, collectives=each) for each in ranks]
    assert [[batch.index for batch in share.batches] for share in shares] == [[0], [1], [], []]
    assert len({share.indices for share in shares}) == 1


def test_batches_are_augmented_differently() -> None:
    dataset = Digits(augment=torch.randn_like)
    first, second = (batch.data[0] for batch in draw_samples(loader(dataset), 16).batches)
    assert not torch.equal(first, second)


# Streams --------------------------------------------------------------------------------------------------------------


class GeneratorStream(IterableDataset[Any]):
    """Holds a generator, which cannot be copied."""

    def __init__(self) -> None:
        self.source = (Digits()[position] for position in range(20))

    def __iter__(self) -> Iterator[Any]:
        return self.source


@pytest.mark.parametrize("batch_size", [None, 1, 6, 50])
def test_a_stream_gives_its_first_samples_and_keeps_its_place(batch_size: int | None) -> None:
    endless = draw_samples(loader(EndlessStream()), 13, batch_size=batch_size)
    assert positions(endless) == list(range(13))
    assert endless.indices is None
    stream = FiniteStream()
    assert positions(draw_samples(loader(stream), 50, batch_size=batch_size)) == list(range(20))
    next(iter(stream))
    assert positions(draw_samples(loader(stream), 5)) == [1, 2, 3, 4, 5]
    assert stream.cursor == 1


@pytest.mark.parametrize("make_loader", [loader, lambda stream: stream.source], ids=["dataset", "generator"])
def test_a_stream_that_cannot_be_copied_is_refused_and_skipped(make_loader: Callable[[Any], Any]) -> None:
    stream = GeneratorStream()
    with pytest.raises(MisconfigurationException, match=r"cannot be copied.*pass the callback `dataloader=`"):
        draw_samples(make_loader(stream), 5)
    assert len(list(stream)) == 20


# Whole batches --------------------------------------------------------------------------------------------------------


class StreamOfBatches(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(DatasetOfBatches())


WHOLE_BATCHES: dict[str, Callable[[], Any]] = {
    "dataset": lambda: DataLoader(DatasetOfBatches(), batch_size=None),
    "stream": lambda: DataLoader(StreamOfBatches(), batch_size=None),
    "iterable": lambda: Counted(DatasetOfBatches()),
    "list": lambda: list(DatasetOfBatches()),
    "combined_loader": lambda: CombinedLoader([DataLoader(StreamOfBatches(), batch_size=None)], "sequential"),
}


@pytest.mark.parametrize("name", WHOLE_BATCHES)
def test_whole_batches_are_taken_from_the_beginning(name: str) -> None:
    source = WHOLE_BATCHES[name]()
    drawn = draw_samples(source, 10)
    assert positions(drawn) == list(range(12)), "whole batches, as few as hold ten samples"
    assert [batch.weight for batch in drawn.batches] == [4, 4, 4]
    assert positions(draw_samples(source, 1000)) == list(range(20))
    if name == "iterable":
        assert source.given == 0


def test_a_batch_sampler_in_the_place_of_the_sampler() -> None:
    """The idiom of PyTorch's documentation for data sets that read in bulk: only the sampler knows the batches."""
    batches = BatchSampler(SubsetRandomSampler(TRAINING), 3, drop_last=False)
    drawn = draw_samples(DataLoader(BulkDigits(), sampler=batches, batch_size=None), SIZE)
    assert sorted(positions(drawn)) == TRAINING
    assert [batch.weight for batch in drawn.batches] == [3, 3, 2]


# In the Trainer -------------------------------------------------------------------------------------------------------


def drawn_by(observer: HessianSpectrumCallback) -> Any:
    """Return the positions of the samples that a callback has drawn."""
    return observer.state_dict()["samples"]["training"]["indices"]


class Seen(SeenByLoss):
    """Sorts the batches by the step at which they were analyzed."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen: dict[int, list[Any]] = {}

    def by_analysis(self) -> list[Any]:
        return list(self.frozen.values())

    def __call__(self, module: pl.LightningModule, batch: Any) -> Tensor:
        self.step = module.global_step
        return super().__call__(module, batch)

    def keep(self, batch: Any) -> None:
        batches = self.frozen.setdefault(self.step, [])
        if (frozen := freeze(batch)) not in batches:
            batches.append(frozen)
        super().keep(batch)


def test_the_same_samples_at_every_analysis(tmp_path: Path) -> None:
    seen = Seen()
    observer = callback(at_start=True, loss_fn=seen, num_samples=20)
    fit(tmp_path, observer, data=loader(Digits(augment=NOISES["torch"]), shuffle=True))
    first, *others = seen.by_analysis()
    assert len(first) == 3
    assert others == [first, first]
    assert sorted(drawn_by(observer)) == sorted({int(p) for batch in seen.batches for p in batch[2]})


def test_the_same_samples_after_resume_unless_their_number_is_another(tmp_path: Path) -> None:
    """Although the dataset has grown since, which changes what would be drawn from it."""
    seen, saved = Seen(), tmp_path / "saved.ckpt"
    before, data = callback(loss_fn=seen), loader(Digits(SIZE, NOISES["torch"]), shuffle=True)
    fit(tmp_path, before, data=data, max_epochs=1).save_checkpoint(saved)

    after, data = callback(loss_fn=seen), loader(Digits(SIZE + 20, NOISES["torch"]), shuffle=True)
    fit(tmp_path, after, data=data, ckpt_path=saved, max_epochs=2)
    assert [record.epoch for record in after.history] == [0, 1]
    assert drawn_by(after) == drawn_by(before)
    assert seen.by_analysis()[1] == seen.by_analysis()[0]
    fresh = draw_samples(loader(Digits(SIZE + 20), shuffle=True), 16)
    assert list(fresh.indices) != drawn_by(before), "or resuming would have shown nothing"

    other, data = callback(num_samples=24), loader(Digits(SIZE + 20), shuffle=True)
    with pytest.warns(RuntimeWarning, match="16 samples, and `num_samples` is 24 now: other samples are drawn"):
        fit(tmp_path, other, data=data, ckpt_path=saved, max_epochs=2)
    assert [record.spectrum.num_samples for record in other.history] == [16, 24]
    assert drawn_by(other) == list(draw_samples(data, 24).indices)


class Buckets(Sampler[list[int]]):
    """Batches of one or of five, in an order that changes with every epoch."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = [[0], *[list(range(start, start + 5)) for start in range(5, SIZE, 5)]]
        return iter([np.array(batches[number]) for number in torch.randperm(len(batches)).tolist()])


@pytest.mark.filterwarnings("ignore:.*other samples are drawn:RuntimeWarning")
def test_batches_and_their_positions_stay_after_resume(tmp_path: Path) -> None:
    saved, seen = tmp_path / "saved.ckpt", Seen()
    before, data = callback(loss_fn=seen, num_samples=20), loader(batch_sampler=Buckets())
    fit(tmp_path, before, data=data, max_epochs=1).save_checkpoint(saved)
    after = callback(loss_fn=seen, num_samples=20, seed=5)
    fit(tmp_path, after, data=data, ckpt_path=saved, max_epochs=2)
    first, second = seen.by_analysis()
    assert first == second
    state = [observer.state_dict()["samples"]["training"] for observer in (before, after)]
    assert state[0] == state[1]
    assert len(state[0]["lengths"]) == len(first)
    assert sum(state[0]["lengths"]) == len(state[0]["indices"])


def test_a_callback_used_again_draws_from_the_new_data(tmp_path: Path) -> None:
    observer = callback(num_samples=SIZE)
    fit(tmp_path, observer, max_epochs=1)
    fit(tmp_path, observer, data=loader(Digits(12)), max_epochs=1)
    assert sorted(drawn_by(observer)) == list(range(12))
    assert len(observer.history) == 1


class Skipping(Classifier):
    """Skips batches in which the first sample is of an odd class, or all."""

    def __init__(self, *, everything: bool = False) -> None:
        super().__init__()
        self.everything = everything

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if self.everything or batch[1][0] % 2 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.")
def test_batches_that_training_step_skips_are_left_out(tmp_path: Path) -> None:
    observer = callback(num_samples=SIZE)
    fit(tmp_path, observer, module=Skipping(), data=loader(batch_size=4), max_epochs=1)
    drawn = draw_samples(loader(batch_size=4), SIZE)
    skipped = sum(int(batch.data[1][0] % 2) for batch in drawn.batches)
    assert 0 < skipped < 10
    assert observer.history[0].spectrum.num_samples == SIZE - 4 * skipped
    assert f"{skipped} of 10 batches left out" in observer.history[0].spectrum.strategy_reason

    refused, advised = callback(on_error="warn"), callback(name="advised", loss_fn=plain_loss)
    with pytest.warns(RuntimeWarning, match=r"skipped all 2 batches.*Pass a `loss_fn`"):
        fit(tmp_path, refused, advised, module=Skipping(everything=True), max_epochs=1)
    assert refused.history[0].spectrum is None
    assert advised.history[0].spectrum is not None


class Rewrapped(Digits):
    """Gives each sample a value of a baseline, too."""

    def __getitem__(self, i: int) -> Any:
        return *super().__getitem__(i), 0.5


class Rewrapping(DataModule):
    """Has a baseline after the first epoch."""

    def train_dataloader(self) -> Any:
        kind = Digits if self.trainer.current_epoch == 0 else Rewrapped
        return loader(kind(), shuffle=True)


class WithBaseline(Classifier):
    """Needs the baseline as soon as there is one."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        baseline = batch[3].mean() if self.current_epoch > 0 else 0.0
        return super().training_step(batch[:3], batch_idx) - baseline


def test_samples_that_fail_are_replaced_where_training_has_replaced_its_dataloader(tmp_path: Path) -> None:
    untouched, module, observer = WithBaseline(), WithBaseline(), callback(num_samples=16)
    options = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}
    fit(tmp_path, module=untouched, data=Rewrapping(), **options)
    with pytest.warns(
        RuntimeWarning, match=r"replaced its dataloader.*\(list index out of range\).*different samples"
    ) as said:
        fit(tmp_path, observer, module=module, data=Rewrapping(), **options)
    assert len([w for w in said if "lightning_hesd" in str(w.message)]) == 1
    assert [record.spectrum.num_samples for record in observer.history] == [16, 16, 16]
    assert freeze(module.state_dict()) == freeze(untouched.state_dict())


# Transfer hooks -------------------------------------------------------------------------------------------------------


def shift_noisily_in_place(batch: Any) -> Any:
    batch[0] += 1 + 0.1 * torch.randn(batch[0].shape)
    return batch


class Hooked:
    """The transfer hooks, one of which changes batches."""

    hook = "on_before_batch_transfer"

    def _changed(self, hook: str, batch: Any) -> Any:
        return shift_noisily_in_place(batch) if hook == self.hook else batch

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._changed("on_before_batch_transfer", batch)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return self._changed("transfer_batch_to_device", batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._changed("on_after_batch_transfer", batch)


class HookedModule(Hooked, Classifier): ...


class HookedData(Hooked, DataModule): ...


@pytest.mark.parametrize("where", ["module", "datamodule"])
@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"])
def test_transfer_hooks(hook: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are applied, once to each batch, with the same result at every analysis."""
    monkeypatch.setattr(Hooked, "hook", hook)
    seen = Seen()
    observer = callback(loss_fn=seen, at_start=True)
    module, data = (HookedModule(), loader()) if where == "module" else (Classifier(), HookedData())
    fit(tmp_path, observer, module=module, data=data, max_epochs=1, limit_train_batches=2)
    first, second = seen.by_analysis()
    assert len(first) == 2
    assert second == first
    for batch in seen.batches:
        noise = batch[0] - 1 - samples(batch[2])[0]
        assert noise.mean().abs() < 0.05
        assert 0.05 < noise.std() < 0.12


def test_the_users_own_batches_are_not_changed(tmp_path: Path) -> None:
    batches = [samples([0, 1, 2]), samples([3, 4])]
    before = freeze(batches)
    observer = callback(dataloader=batches)
    fit(tmp_path, observer, module=HookedModule(), max_epochs=1)
    assert observer.history[0].spectrum.num_samples == 5
    assert freeze(batches) == before
