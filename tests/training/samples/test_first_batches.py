"""The first batches of training as analysis samples, for loaders that cannot be read by position."""

import functools
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler

from lightning_hesd.training.samples import first_batches
from tests.training import modules
from tests.training.modules import (
    SIZE,
    Classifier,
    DataModule,
    Digits,
    fit,
    freeze,
    global_generators,
    loader,
    plain_loss,
    samples,
)
from tests.training.samples.drawn import BulkDigits, Counted, DatasetOfBatches, FiniteStream

callback = functools.partial(modules.callback, batch_size=None)  # batches are analyzed as they were read


def loss_of(module: pl.LightningModule, batch: Any) -> Any:
    """Return the loss of a batch of one loader or of several."""
    parts = list(batch.values()) if isinstance(batch, dict) else batch
    if not isinstance(parts[0], torch.Tensor):
        return sum(loss_of(module, part) for part in parts)
    return plain_loss(module, [parts[0].reshape(-1, 64), parts[1].reshape(-1)])


class Observed(Classifier):
    """Records the batches that `training_step` gets from training, and changes them in place if asked to."""

    def __init__(self, *, in_place: bool = False) -> None:
        super().__init__()
        self.in_place = in_place
        self.trained: list[Any] = []
        self.transfers = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trained.append(freeze(batch))
        return loss_of(self, [batch[0].mul_(0), batch[1]] if self.in_place else batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.transfers += 1
        return batch


class Seen:
    """A `loss_fn` that records the batches of the analyses, once each."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def __call__(self, module: pl.LightningModule, batch: Any) -> Any:
        frozen = freeze(batch)
        if torch.get_default_dtype() == torch.float32 and frozen not in self.batches:
            self.batches.append(frozen)
        return loss_of(module, batch)


class OwnIter(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:
        for x, *rest in super().__iter__():
            yield [x / 100, *rest]


class OwnIterator(DataLoader[Any]):
    def _get_iterator(self) -> Any:
        return iter([[x / 100, *rest] for x, *rest in super()._get_iterator()])


class OwnIndices(DataLoader[Any]):
    @property
    def _index_sampler(self) -> Any:
        return [[3, 2], [1, 0], [5, 4]]


class MapFromQueue(Dataset[Any]):
    """Has positions, and gives the next sample whatever the position."""

    def __init__(self) -> None:
        self.sources = {"train": queue.Queue[int]()}
        for position in range(2 * SIZE):
            self.sources["train"].put(position % SIZE)

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, position: int) -> Any:
        return [part[0] for part in samples([self.sources["train"].get(timeout=1)])]


class LockedSampler(Sampler[int]):
    """Cannot be copied, and remembers in which order it gave its positions last."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.epochs = 0

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[int]:
        self.epochs += 1
        with self.lock:
            return iter(torch.randperm(SIZE).tolist())


class LockedLoader(Counted):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__(DatasetOfBatches(8))
        self.lock = threading.Lock()


def batches(count: int = 5) -> Iterator[Any]:
    return (samples(list(range(8 * n % SIZE, 8 * n % SIZE + 8))) for n in range(count))


LOADERS: dict[str, Callable[[], Any]] = {
    "own_iter": lambda: OwnIter(Digits(), batch_size=8, shuffle=True),
    "own_get_iterator": lambda: OwnIterator(Digits(), batch_size=8, shuffle=True),
    "own_indices": lambda: OwnIndices(Digits(), batch_size=8),
    "whole_batches": lambda: DataLoader(
        BulkDigits(), sampler=BatchSampler(RandomSampler(range(SIZE)), 8, drop_last=False), batch_size=None
    ),
    "stream": lambda: loader(FiniteStream(99)),
    "map_style_queue": lambda: loader(MapFromQueue()),
    "single_pass": lambda: batches(15),
    "uncopyable": LockedLoader,
    "uncopyable_sampler": lambda: loader(sampler=LockedSampler()),
    "combined": lambda: CombinedLoader({"a": loader(shuffle=True), "b": loader()}, "min_size"),
    "datamodule": lambda: DataModule(lambda: [OwnIter(Digits(), batch_size=8), loader(shuffle=True)]),
}


@pytest.mark.filterwarnings("ignore:You have overridden")
@pytest.mark.parametrize("name", LOADERS)
def test_the_samples_are_the_first_batches_of_training(name: str, tmp_path: Path) -> None:
    """Bit by bit, with no more of the loader used, and training the same."""
    ends = []
    for observers in ([], [callback(loss_fn=(seen := Seen()), num_samples=16)]):
        module = Observed()
        data = LOADERS[name]()
        counted = Counted(data) if name == "single_pass" else data
        trainer = fit(tmp_path, *observers, module=module, data=counted, limit_train_batches=3)
        left = [getattr(counted, "given", None), getattr(getattr(data, "dataset", None), "cursor", None)]
        left.append(getattr(getattr(data, "sampler", None), "epochs", None))
        ends.append((freeze(module.state_dict()), global_generators(), module.transfers, left, module.trained))
        assert "on_train_batch_start" not in vars(trainer.strategy), "nothing is left behind"
    assert ends[0] == ends[1]
    spectra = [record.spectrum for record in observers[0].history]
    assert len(spectra) == 2
    assert spectra[0].num_samples == spectra[1].num_samples
    count = 3 if name == "own_indices" else 2
    assert sorted(map(str, seen.batches)) == sorted(map(str, module.trained[:count]))


def test_to_lightning_a_list_of_batches_is_several_loaders(tmp_path: Path) -> None:
    """Each yields its rows, which is what is trained, and hardly what was meant."""
    seen, module = Seen(), Observed()
    with pytest.warns(RuntimeWarning, match=r"entry of a list .* batch_size=None"):
        fit(tmp_path, callback(loss_fn=seen, num_samples=128), module=module, data=list(batches(2)), max_epochs=1)
    assert len(module.trained) == 8
    assert seen.batches[:2] == module.trained[:2]  # and, in the comparison with differences, samples of these


def test_batches_are_copied_after_all_hooks(tmp_path: Path) -> None:
    """Transfer hooks are applied once, hooks at the start of a batch are seen, and changes in place are not."""

    class Mixes(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batch[0].mul_(3)

    class Changed(Observed):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] + 1, *batch[1:]]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] + torch.randn_like(batch[0]), *batch[1:]]

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            batch[0].add_(1)
            return -1 if batch_idx == 2 and self.current_epoch == 0 else None

    seen, module = Seen(), Changed(in_place=True)
    fit(tmp_path, callback(loss_fn=seen, num_samples=64), Mixes(), module=module, data=OwnIter(Digits(), batch_size=8))
    assert seen.batches == module.trained[:2], "the third is not trained, and ends the epoch"


def test_analyses_between_steps_use_the_batches_so_far_and_one_at_the_start_is_left_out(tmp_path: Path) -> None:
    observer = callback(every_n_train_steps=1, num_samples=24, at_start=True)
    with pytest.warns(RuntimeWarning, match=r"`at_start`.* is left out.*a loader or a list of batches"):
        fit(tmp_path, observer, data=loader(FiniteStream(99)), limit_train_batches=5, max_epochs=1)
    assert [record.spectrum.num_samples for record in observer.history] == [8, 16, 24, 24, 24]


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer` in `LightningModule`:UserWarning")
def test_samples_stay_when_data_are_made_anew_and_are_those_of_one_epoch(tmp_path: Path) -> None:
    sizes = iter([4, 2, 1, 1])

    class Shrinking(DataModule):
        def train_dataloader(self) -> Any:
            return OwnIter(Digits(8 * next(sizes)), batch_size=8, shuffle=True)

    seen, module = Seen(), Observed()
    observer = callback(num_samples=SIZE, loss_fn=seen)
    fit(tmp_path, observer, module=module, data=Shrinking(), max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert [record.spectrum.num_samples for record in observer.history] == [32, 32, 32]
    assert seen.batches == module.trained[:4]


def test_more_samples_come_from_the_epoch_they_began_with(tmp_path: Path) -> None:
    observer = callback(num_samples="auto", tolerance=1e-9, steps=4)
    fit(tmp_path, observer, data=OwnIter(Digits(600), batch_size=100), max_epochs=2)
    assert [record.spectrum.num_samples for record in observer.history] == [600, 600]


def test_a_resumed_run_copies_its_own_first_batches(tmp_path: Path) -> None:
    data = OwnIter(Digits(), batch_size=8, shuffle=True)
    trainer = fit(tmp_path, callback(), data=data, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]
    assert [s["samples"]["training"]["indices"] for key, s in state.items() if "Hessian" in key] == [None]
    seen, module = Seen(), Observed()
    observer = callback(loss_fn=seen)
    with pytest.warns(RuntimeWarning, match="spectra before and after belong to different samples"):
        fit(tmp_path, observer, module=module, data=data, ckpt_path=tmp_path / "a.ckpt")
    assert [record.epoch for record in observer.history] == [0, 1]
    assert seen.batches == module.trained[:2]


@pytest.mark.parametrize(("batches_kept", "room"), [(1, 0.5), (2, 2.5)], ids=["one at least", "two"])
def test_the_memory_of_copied_batches_is_bounded(
    batches_kept: int, room: float, tmp_path: Path, monkeypatch: Any
) -> None:
    size = sum(part.nbytes for part in samples(list(range(8))))
    monkeypatch.setattr(first_batches, "MAX_COPIED_BYTES", int(room * size))
    observer = callback(num_samples=32)
    with pytest.warns(RuntimeWarning, match=rf"{8 * batches_kept} samples .* instead of 32, .* more than 0 MiB"):
        fit(tmp_path, observer, data=LockedLoader(), max_epochs=1)
    assert observer.history[0].spectrum.num_samples == 8 * batches_kept


def test_a_view_is_copied_without_the_memory_around_it() -> None:
    whole = torch.randn(1000, 4)
    batch = {"x": whole[:2], "y": [whole[5, :1]], "long": list(range(1000))}
    copy = first_batches._copied(batch)
    assert freeze(copy) == freeze(batch)
    assert copy["x"].untyped_storage().nbytes() == copy["x"].nbytes
    assert copy["y"][0].untyped_storage().nbytes() == 4
    whole.zero_()
    assert copy["x"].abs().sum() > 0


class Attached(Classifier):
    """Batches that have passed through a layer are of the module's graph: a copy would be another function."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [self.net[0].weight.sum() * batch[0], *batch[1:]]


def test_batches_that_cannot_be_copied(tmp_path: Path) -> None:
    observer = callback(on_error="warn")
    with pytest.warns(RuntimeWarning, match=r"cannot be copied .*RuntimeError.*pass the callback `dataloader=`"):
        trainer = fit(tmp_path, observer, module=Attached(), data=LockedLoader(), max_epochs=1)
    assert trainer.global_step == 5
    assert observer.history[0].spectrum is None


class Empty(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def test_training_without_batches(tmp_path: Path) -> None:
    observer = callback(on_error="warn")
    with pytest.warns(RuntimeWarning, match="drawn from a DataLoader like the training dataloader .*none so far"):
        fit(tmp_path, observer, data=DataLoader(Empty()), max_epochs=1)
    assert observer.history[0].spectrum is None


def test_batches_of_unknown_size(tmp_path: Path) -> None:
    class Takes(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return plain_loss(self, [torch.tensor(part) for part in batch.items])

    data = Counted([SimpleNamespace(items=[part.numpy() for part in samples([0, 1, 2])])] * 3)
    weighed = callback(name="weighed", batch_weight=lambda batch: float(len(batch.items[0])), num_samples=6)
    with pytest.warns(RuntimeWarning, match="NoBatchesError: the training batches cannot be analyzed: .* samples.$"):
        fit(tmp_path, callback(on_error="warn"), weighed, module=Takes(), data=data, max_epochs=1)
    assert weighed.history[0].spectrum.num_samples == 6


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter`", "ignore:Found `dataloader_iter`")
def test_a_step_that_fetches_its_batches(tmp_path: Path) -> None:
    class Fetches(Classifier):
        def training_step(self, dataloader_iter: Any) -> Any:
            return plain_loss(self, next(dataloader_iter)[0])

    message = r"`dataloader_iter`.*no samples .*pass the callback `dataloader=`"
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, callback(loss_fn=plain_loss), module=Fetches(), data=loader(FiniteStream(99)))


class Share(IterableDataset[Any]):
    """Every rank has the batches of eight whose numbers leave its rank as the remainder."""

    def __iter__(self) -> Iterator[Any]:
        distributed = torch.distributed.is_initialized()
        rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
        return (Digits()[p] for p in range(SIZE) if p // 8 % world == rank)


class Still(Observed):
    """Does not learn, so that the weights are the same on any number of ranks."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning", "ignore:It is recommended to use `self.log")
def test_two_ranks_keep_half_of_the_samples_each(tmp_path: Path) -> None:
    spectra = []
    for world in (1, 2):
        observer = callback(num_samples=32, steps=10, loss_fn=loss_of)
        strategy = DDPStrategy(start_method="fork", process_group_backend="gloo") if world == 2 else "auto"
        options = {"devices": world, "strategy": strategy, "precision": "64-true", "max_epochs": 1}
        fit(tmp_path, observer, module=Still(), data=loader(Share()), limit_train_batches=4 // world, **options)
        spectra.append(observer.history[0].spectrum)
    alone, both = spectra
    assert both.num_samples == alone.num_samples == 32
    assert both.lambda_max == pytest.approx(alone.lambda_max, rel=1e-9)
    assert both.c_t == pytest.approx(alone.c_t, rel=1e-9)


def test_a_dataloader_of_the_users_that_cannot_be_copied_is_iterated(tmp_path: Path) -> None:
    for own in (LockedLoader(), source := batches()):
        observer = callback(dataloader=own)
        fit(tmp_path, observer)
        assert [record.spectrum.num_samples for record in observer.history] == [16, 16]
    assert len(list(source)) == 3, "of five batches two were taken"

    data = LockedLoader()
    observer = callback(dataloader=data)
    fit(tmp_path, observer, data=data, max_epochs=1)
    assert data.given == 5, "it is the loader of training, which is not iterated once more"
    assert observer.history[0].spectrum.num_samples == 16


@pytest.mark.parametrize("kind", ["list", "dict", "combined"])
def test_several_dataloaders_of_the_users_beside_several_of_training(kind: str, tmp_path: Path) -> None:
    def several() -> Any:
        both = {"a": loader(), "b": loader()}
        return {"list": [*both.values()], "dict": both, "combined": CombinedLoader(both, "min_size")}[kind]

    seen = Seen()
    observer = callback(dataloader=several(), loss_fn=seen)
    fit(tmp_path, observer, module=Observed(), data=several(), max_epochs=1)
    assert len(seen.batches) == 2
    assert observer.state_dict()["samples"]["training"]["indices"] is None
