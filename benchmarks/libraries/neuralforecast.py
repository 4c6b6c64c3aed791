"""NeuralForecast: forecasting. It builds the Trainer, of `pytorch_lightning`, and trains a deep copy of the model."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.case import Case, Library
from benchmarks.libraries.common import QUIET, noisy_sines
from benchmarks.libraries.trial import seed_everything

if TYPE_CHECKING:
    from pathlib import Path


def train(name: str, callbacks: list[Any], folder: Path, *, distribution: str = "", **options: Any) -> Any:
    """Train a model on four noisy sines.

    Args:
        name: The model's class.
        callbacks: Callbacks of the Trainer.
        folder: Output folder.
        distribution: Distribution to forecast; empty: a value.
        **options: Options of the model.
    """
    import pandas as pd
    from neuralforecast import NeuralForecast, models
    from neuralforecast.losses.pytorch import MAE, DistributionLoss

    seed_everything()
    days = pd.date_range("2020-01-01", periods=120, freq="D")
    series = pd.concat(
        pd.DataFrame({"unique_id": f"{i}", "ds": days, "y": values}) for i, values in enumerate(noisy_sines(4, 120))
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
        default_root_dir=str(folder),
        **QUIET,
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
