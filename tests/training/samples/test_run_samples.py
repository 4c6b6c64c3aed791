"""The samples of a run, where training changes what it trains on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.training.modules import Classifier, DataModule, Digits, callback, fit, freeze, loader

if TYPE_CHECKING:
    from pathlib import Path


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
