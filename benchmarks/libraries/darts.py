"""darts: forecasting. The library builds the Trainer, of `pytorch_lightning`, and takes arguments for it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.case import Case, Library
from benchmarks.libraries.common import noisy_sines
from benchmarks.libraries.trial import seed_everything

if TYPE_CHECKING:
    from pathlib import Path


def train(name: str, callbacks: list[Any], folder: Path, *, save_checkpoints: bool = False, **options: Any) -> Any:
    """Train a model of darts on a noisy sine.

    Args:
        name: The model's class.
        callbacks: Callbacks of the Trainer.
        folder: Output folder.
        save_checkpoints: Whether darts adds a ModelCheckpoint of its own.
        **options: Options of the model.
    """
    from darts import TimeSeries, models

    seed_everything()
    series = TimeSeries.from_values(noisy_sines(1, 200)[0].astype("float32"))
    model = getattr(models, name)(
        input_chunk_length=16,
        output_chunk_length=4,
        n_epochs=2,
        batch_size=32,
        random_state=0,
        save_checkpoints=save_checkpoints,
        work_dir=str(folder),
        model_name="model",
        force_reset=True,
        pl_trainer_kwargs={"callbacks": callbacks, "accelerator": "cpu", "enable_progress_bar": False},
        **options,
    )
    model.fit(series[:160], val_series=series[160:])
    return model.model


LIBRARY = Library(
    name="darts",
    kind="forecasting",
    requirements=("darts==0.48.1", "pytorch-lightning==2.6.6"),
    cases=(
        Case("NHiTSModel", partial(train, "NHiTSModel", layer_widths=16)),
        Case("NHiTSModel, save_checkpoints=True", partial(train, "NHiTSModel", layer_widths=16, save_checkpoints=True)),
        Case("TCNModel", partial(train, "TCNModel", num_filters=4)),
        Case("RNNModel", partial(train, "RNNModel", model="LSTM", hidden_dim=8, training_length=20)),
        Case(
            "TiDEModel",
            partial(train, "TiDEModel", hidden_size=16, temporal_width_past=0, temporal_width_future=0),
        ),
    ),
)
