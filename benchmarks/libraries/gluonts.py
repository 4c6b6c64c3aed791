"""GluonTS: probabilistic forecasting. It builds the Trainer, draws an endless stream, and loads its best checkpoint."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.case import Case, Library
from benchmarks.libraries.common import QUIET, noisy_sines
from benchmarks.libraries.trial import seed_everything

if TYPE_CHECKING:
    from pathlib import Path


def train(name: str, callbacks: list[Any], folder: Path, **options: Any) -> Any:
    """Train an estimator on six noisy sines.

    Args:
        name: The estimator's class.
        callbacks: Callbacks of the Trainer.
        folder: Output folder.
        **options: Options of the estimator.
    """
    import gluonts.torch
    from gluonts.dataset.common import ListDataset

    seed_everything()
    series = [{"start": "2020-01-01", "target": values} for values in noisy_sines(6, 120)]
    estimator = getattr(gluonts.torch, f"{name}Estimator")(
        prediction_length=4,
        context_length=12,
        batch_size=8,
        num_batches_per_epoch=3,
        trainer_kwargs={**QUIET, "max_epochs": 2, "callbacks": callbacks, "default_root_dir": folder},
        **options,
    )
    return estimator.train_model(ListDataset(series, freq="D")).trained_net


LSTM: dict[str, Any] = {"freq": "D", "num_layers": 1, "hidden_size": 4, "lags_seq": [1, 2, 7]}

LIBRARY = Library(
    name="gluonts",
    kind="probabilistic forecasting",
    requirements=("gluonts[torch]==0.17.0",),
    cases=(
        Case("SimpleFeedForward", partial(train, "SimpleFeedForward", hidden_dimensions=[8])),
        Case("PatchTST", partial(train, "PatchTST", patch_len=4, d_model=8, nhead=2, dim_feedforward=16)),
        Case("DeepAR", partial(train, "DeepAR", **LSTM)),
    ),
)
