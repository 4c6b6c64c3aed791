"""NeuralForecast: forecasting. It builds the Trainer, of `pytorch_lightning`, and trains a deep copy of the model."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.libraries.case import Case, Library
from benchmarks.libraries.trial import seed_everything

if TYPE_CHECKING:
    from pathlib import Path


def train(name: str, callbacks: list[Any], folder: Path, *, distribution: str = "", **options: Any) -> Any:
    """Train a model on four noisy sines.

    Args:
        name: The model's class.
        callbacks: For the Trainer.
        folder: Where it may write.
        distribution: What is forecast, if not just a value.
        **options: Of the model.
    """
    import pandas as pd
    from neuralforecast import NeuralForecast, models
    from neuralforecast.losses.pytorch import MAE, DistributionLoss

    seed_everything()
    random, days = np.random.default_rng(0), np.arange(120)
    series = pd.concat(
        pd.DataFrame(
            {
                "unique_id": f"{phase}",
                "ds": pd.date_range("2020-01-01", periods=120, freq="D"),
                "y": np.sin(days / 8 + phase) + 0.1 * random.standard_normal(120),
            }
        )
        for phase in range(4)
    )
    model = getattr(models, name)(
        h=4,
        input_size=16,
        max_steps=3,
        batch_size=4,
        windows_batch_size=16,
        random_seed=1,
        loss=DistributionLoss(distribution) if distribution else MAE(),
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        **options,
    )
    forecasts = NeuralForecast(models=[model], freq="D")
    forecasts.fit(series)
    return forecasts.models[0]


LIBRARY = Library(
    name="neuralforecast",
    kind="forecasting",
    requirements=("neuralforecast==3.3.0", "pytorch-lightning==2.6.6"),
    cases=(
        Case("NHITS", partial(train, "NHITS", mlp_units=[[8, 8]] * 3)),
        Case("MLP, of a distribution", partial(train, "MLP", distribution="Normal", hidden_size=8)),
        Case("LSTM", partial(train, "LSTM", encoder_hidden_size=4, encoder_n_layers=1, decoder_hidden_size=8)),
        Case("iTransformer", partial(train, "iTransformer", n_series=4, hidden_size=8, n_heads=2, d_ff=16)),
    ),
)
