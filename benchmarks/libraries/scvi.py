"""scvi-tools: single cells. It builds the Trainer, without checkpoints; some of its models have an adversary."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.libraries.case import Case, Library
from benchmarks.libraries.trial import seed_everything

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def train(name: str, callbacks: list[Any], folder: Path, setup: dict[str, str], **options: Any) -> Any:
    """Train a model of scvi-tools on made counts of cells in two batches.

    Args:
        name: The model's class.
        callbacks: Callbacks for `train`.
        folder: Output folder.
        setup: Arguments of `setup_anndata`.
        **options: Options of the model.
    """
    import anndata
    import scvi

    seed_everything()
    scvi.settings.seed = 0
    random = np.random.default_rng(0)
    rates = random.gamma(1, 1, (1, 50)) * random.gamma(2, 0.5, (400, 1))
    cells = anndata.AnnData(random.poisson(rates).astype("float32"))
    cells.obs["batch"] = [str(i % 2) for i in range(400)]
    cells.obs["label"] = [("first", "second", "Unknown")[i % 3] for i in range(400)]
    cells.obsm["protein"] = random.poisson(3, (400, 5)).astype("float32")
    kind = getattr(scvi.model, name)
    kind.setup_anndata(cells, batch_key="batch", **setup)
    model = kind(cells, **options)
    model.train(
        max_epochs=3,
        batch_size=64,
        accelerator="cpu",
        train_size=0.9,
        callbacks=callbacks,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    return model.trainer.lightning_module


def generator_loss(plan: Any, batch: Any) -> Tensor:
    """Return the loss of the model itself, without the adversary's part, as the training plan computes it."""
    if "kl_weight" in plan.loss_kwargs:
        plan.loss_kwargs.update({"kl_weight": plan.kl_weight})
    _, _, losses = plan.forward(batch, loss_kwargs=plan.loss_kwargs)
    loss: Tensor = losses.loss
    return loss


SMALL: dict[str, Any] = {"n_hidden": 8, "n_latent": 3}
LABELS = {"labels_key": "label", "unlabeled_category": "Unknown"}
PROTEINS = {"protein_expression_obsm_key": "protein"}

LIBRARY = Library(
    name="scvi-tools",
    kind="single cells",
    requirements=("scvi-tools==1.4.2",),
    cases=(
        Case("SCVI", partial(train, "SCVI", setup={}, **SMALL)),
        Case("LinearSCVI", partial(train, "LinearSCVI", setup={}, **SMALL)),
        Case("SCANVI", partial(train, "SCANVI", setup=LABELS, **SMALL)),
        Case("PEAKVI", partial(train, "PEAKVI", setup={}, **SMALL)),
        Case("TOTALVI", partial(train, "TOTALVI", setup=PROTEINS, n_latent=3)),
        Case(
            "TOTALVI, loss_fn=",
            partial(train, "TOTALVI", setup=PROTEINS, n_latent=3),
            loss_fn=generator_loss,
            note="The loss is that of the model, whose gradient training adds to that of deceiving the adversary.",
        ),
    ),
)
