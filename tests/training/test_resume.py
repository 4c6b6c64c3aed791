"""Interrupted and resumed training: the same history and the same pick as without the interruption."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from lightning_hesd import HessianCheckpoint, SpectrumHistory
from tests.training.digits_run import Net, callback, data
from tests.training.modules import freeze, own_warnings
from tests.training.scripted import make_trainer

# Both are about the checkpoint callback that Lightning adds by default.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
]

EPOCHS = 4


def fit(
    folder: Path, fail_at: int | None = None, *, loader: Any = None, ckpt_path: Any = None, **options: Any
) -> tuple[Any, HessianCheckpoint]:
    """Train in `folder`; every run makes its objects anew, as a new process would."""
    torch.manual_seed(0)
    tolerance = options.pop("tolerance", 0.05)
    checkpoint = HessianCheckpoint(train_metric="train_acc", tolerance=tolerance, dirpath=folder, save_last=True)
    observer = callback(checkpoint=checkpoint, **options)
    make_trainer(folder, [observer], EPOCHS).fit(Net(fail_at), loader or data(), ckpt_path=ckpt_path)
    return observer, checkpoint


def interrupted(folder: Path, fail_at: int = 2, **options: Any) -> Path:
    """Train until an epoch fails, and return the checkpoint to resume from."""
    with pytest.raises(RuntimeError, match="power cut"):
        fit(folder, fail_at, **options)
    return folder / "last.ckpt"


def assert_same_history(first: Any, second: Any) -> None:
    assert [(r.epoch, r.global_step, r.error) for r in first] == [(r.epoch, r.global_step, r.error) for r in second]
    spectra = [[record.spectrum for record in records] for records in (first, second)]
    found = [freeze([(s.nodes, s.weights, s.c_t, s.loss) for s in each]) for each in spectra]
    assert found[0] == found[1]


def weights_in(path: str) -> Any:
    return freeze(torch.load(path, weights_only=True)["state_dict"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, HessianCheckpoint]:
    """A run without an interruption."""
    return fit(tmp_path_factory.mktemp("whole"), at_start=True)


@pytest.mark.parametrize(("fail_at", "folder"), [(1, "first"), (3, "second")])
def test_resumed_run_equals_the_uninterrupted_one(whole: Any, tmp_path: Path, fail_at: int, folder: str) -> None:
    last = interrupted(tmp_path / "first", fail_at, at_start=True)
    resumed, checkpoint = fit(tmp_path / folder, ckpt_path=last, at_start=True)
    assert [r.epoch for r in resumed.history] == [-1, *range(EPOCHS)]
    assert_same_history(whole[0].history, resumed.history)
    assert_same_history(SpectrumHistory.load(tmp_path / folder), resumed.history)
    assert len(whole[1].candidates) == len(checkpoint.candidates)
    assert weights_in(whole[1].best_model_path) == weights_in(checkpoint.best_model_path)


def test_testing_a_checkpoint_loses_nothing_that_came_after_it(tmp_path: Path) -> None:
    """Lightning loads the callbacks' states of whatever checkpoint it tests."""
    torch.manual_seed(0)
    rules = [
        HessianCheckpoint(rule, train_metric="train_acc", tolerance=1.0)  # type: ignore[arg-type]
        for rule in ("highest_c_t", "lowest_max_eigenvalue")
    ]
    observer = callback(checkpoint=rules[0])
    trainer = make_trainer(tmp_path, [observer, rules[1]], EPOCHS)
    trainer.fit(Net(), data())
    kept = [(rule.best_model_path, rule.candidates) for rule in rules]
    assert torch.load(min(rules[0].best_k_models), weights_only=True)["epoch"] < EPOCHS - 1
    for path in {"best", *rules[0].best_k_models, *rules[1].best_k_models}:
        trainer.test(dataloaders=data(), ckpt_path=path, verbose=False)
        assert [r.epoch for r in observer.history] == list(range(EPOCHS))
        assert [(rule.best_model_path, rule.candidates) for rule in rules] == kept


def test_data_without_the_samples_drawn_before(tmp_path: Path) -> None:
    """As it says, another `num_samples` draws others."""
    last = interrupted(tmp_path / "first")
    fewer = DataLoader(Subset(data().dataset, range(80)), batch_size=40)
    with own_warnings() as said:
        observer, _ = fit(tmp_path / "second", ckpt_path=last, loader=fewer)
    assert [r.error is None for r in observer.history] == [True] * 2 + [False] * 2
    assert all("draw other samples with another `num_samples`" in message for message in said[:3])
    with own_warnings() as said:
        observer, _ = fit(tmp_path / "third", ckpt_path=last, loader=fewer, num_samples=47)
    assert [r.spectrum and r.spectrum.num_samples for r in observer.history] == [48] * 2 + [47] * 2
    assert len(said) == 1


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.:UserWarning")
@pytest.mark.parametrize(
    ("whose", "field", "advice", "changes", "epochs"),
    [
        ("HessianCheckpoint", "candidates", "Resume with another `tolerance`", {"tolerance": 0.04}, 4),
        ("HessianSpectrumCallback", "history", "resume with another `name`", {"name": "again"}, 2),
    ],
)
def test_a_damaged_state_says_how_to_go_on(
    tmp_path: Path, whose: str, field: str, advice: str, changes: dict[str, Any], epochs: int
) -> None:
    path = interrupted(tmp_path / "first")
    checkpoint = torch.load(path, weights_only=True)
    (state,) = [value for key, value in checkpoint["callbacks"].items() if key.startswith(whose)]
    del state[field]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=advice):
        fit(tmp_path / "second", ckpt_path=path)
    observer, _ = fit(tmp_path / "third", ckpt_path=path, **changes)
    assert [r.error for r in observer.history] == [None] * epochs
    assert observer.checkpoint.best.epoch >= 2
    assert Path(observer.checkpoint.best_model_path).is_file()
