"""PyTorch Forecasting: forecasting. Its users load the best checkpoint of the Trainer with the model's own function."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.case import Case, Library
from benchmarks.libraries.common import QUIET, noisy_sines
from benchmarks.libraries.trial import seed_everything

if TYPE_CHECKING:
    from pathlib import Path


def train(name: str, callbacks: list[Any], folder: Path, **options: Any) -> Any:
    """Train a model on four noisy sines.

    Args:
        name: The model's class.
        callbacks: Callbacks of the Trainer.
        folder: Output folder.
        **options: Options of the model.
    """
    import lightning.pytorch as pl
    import pandas as pd
    import pytorch_forecasting as pf

    seed_everything()
    table = pd.concat(
        pd.DataFrame({"series": str(i), "day": range(60), "value": values})
        for i, values in enumerate(noisy_sines(4, 60))
    )
    data = pf.TimeSeriesDataSet(
        table.reset_index(drop=True),
        time_idx="day",
        target="value",
        group_ids=["series"],
        max_encoder_length=12,
        max_prediction_length=3,
        time_varying_unknown_reals=["value"],
        target_normalizer=pf.EncoderNormalizer(),
    )
    module = getattr(pf, name).from_dataset(
        data, loss=pf.metrics.QuantileLoss(), learning_rate=0.01, log_interval=-1, **options
    )
    best = pl.callbacks.ModelCheckpoint(folder / "best", monitor="val_loss")
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[best, *callbacks],
        limit_train_batches=3,
        limit_val_batches=2,
        gradient_clip_val=0.1,
        default_root_dir=folder,
        **QUIET,
    )
    trainer.fit(module, data.to_dataloader(batch_size=8), data.to_dataloader(train=False, batch_size=8))
    kind = type(module)
    kind.load_from_checkpoint(best.best_model_path, weights_only=False)
    return module


LIBRARY = Library(
    name="pytorch-forecasting",
    kind="forecasting",
    requirements=("pytorch-forecasting==1.8.0",),
    cases=(Case("NHiTS", partial(train, "NHiTS", hidden_size=8)),),
)
