"""When analyses run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_hesd import HessianSpectrumCallback
from lightning_hesd.training.schedule import Schedule
from tests.training.scripted import Epoch, run_script


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [(0, 2), (1, 4), (2, 6), (3, 8), (4, 10)]),
        ({"every_n_epochs": 2}, [(1, 4), (3, 8)]),
        ({"epochs": range(0, 100, 3)}, [(0, 2), (3, 8)]),
        ({"epochs": []}, []),
        ({"at_start": True, "every_n_epochs": 3}, [(-1, 0), (2, 6)]),
        ({"every_n_train_steps": 3}, [(1, 3), (2, 6), (4, 9)]),
        ({"every_n_train_steps": 1, "accumulate_grad_batches": 2}, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
    ],
)
def test_records_of_a_run(tmp_path: Path, arguments: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    trainer_arguments = {key: arguments.pop(key) for key in ("accumulate_grad_batches",) if key in arguments}
    callback = HessianSpectrumCallback(loss_fn=lambda module, _: module.weight**2, num_samples=2, **arguments)
    run_script(tmp_path, [Epoch(None)] * 5, [callback], **trainer_arguments)
    assert [(record.epoch, record.global_step) for record in callback.history] == expected


@pytest.mark.parametrize(
    ("arguments", "sparse"),
    [
        ({}, False),
        ({"every_n_epochs": 2}, True),
        ({"epochs": [1]}, True),
        ({"every_n_train_steps": 5}, True),
        ({"max_overhead": 0.1}, True),
    ],
)
def test_is_sparse(arguments: dict[str, Any], sparse: bool) -> None:
    assert Schedule(**arguments).is_sparse is sparse
