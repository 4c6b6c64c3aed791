"""PyTorch Tabular: tables. It builds the Trainer, of `pytorch_lightning`, and loads the best checkpoint by itself."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.libraries.case import Case, Library
from benchmarks.libraries.trial import seed_everything

if TYPE_CHECKING:
    from pathlib import Path


def train(name: str, callbacks: list[Any], folder: Path, **options: Any) -> Any:
    """Train a model of PyTorch Tabular to classify made rows.

    Args:
        name: The configuration's class.
        callbacks: Callbacks for `fit`.
        folder: Output folder.
        **options: Options of the configuration.
    """
    import pandas as pd
    from pytorch_tabular import TabularModel, models
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
    from sklearn.datasets import make_classification

    seed_everything()
    numbers, classes = make_classification(400, 6, random_state=0)
    names = [f"number_{i}" for i in range(6)]
    table = pd.DataFrame(numbers, columns=names)
    table["kind"] = np.random.default_rng(0).integers(0, 4, 400).astype(str)
    table["class"] = classes
    model = TabularModel(
        data_config=DataConfig(target=["class"], continuous_cols=names, categorical_cols=["kind"]),
        model_config=getattr(models, name)(task="classification", **options),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            batch_size=64,
            max_epochs=3,
            accelerator="cpu",
            progress_bar="none",
            early_stopping=None,
            checkpoints="valid_loss",
            checkpoints_path=str(folder / "checkpoints"),
            load_best=True,
            trainer_kwargs={"default_root_dir": str(folder)},
            seed=0,
        ),
        verbose=False,
    )
    model.fit(train=table[:320], validation=table[320:], callbacks=callbacks or None, seed=0)
    return model.model


LIBRARY = Library(
    name="pytorch-tabular",
    kind="tables",
    requirements=("pytorch-tabular==1.2.0", "pytorch-lightning==2.6.6", "requests"),  # which it imports, undeclared
    cases=(
        Case(
            "CategoryEmbeddingModel",
            partial(train, "CategoryEmbeddingModelConfig", layers="16-8"),
            note="The weights compared are those of the library's own best checkpoint, which it loads after training.",
        ),
        Case(
            "FTTransformer",
            partial(train, "FTTransformerConfig", input_embed_dim=8, num_heads=2, num_attn_blocks=1),
        ),
        Case("GANDALF", partial(train, "GANDALFConfig", gflu_stages=2)),
        Case("NODE", partial(train, "NodeConfig", num_layers=1, num_trees=16, depth=3)),
    ),
)
