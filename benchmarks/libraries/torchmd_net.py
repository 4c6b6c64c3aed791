"""TorchMD-Net: force fields. Forces are derivatives of the energy, and `training_step` collects the losses."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.case import Case, Library
from benchmarks.libraries.common import QUIET
from benchmarks.libraries.trial import seed_everything

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS: dict[str, Any] = {
    "load_model": None,
    "output_model": "Scalar",
    "embedding_dimension": 8,
    "num_layers": 1,
    "num_rbf": 8,
    "rbf_type": "expnorm",
    "trainable_rbf": False,
    "activation": "silu",
    "attn_activation": "silu",
    "num_heads": 2,
    "distance_influence": "both",
    "neighbor_embedding": False,
    "vector_cutoff": False,
    "aggr": "add",
    "equivariance_invariance_group": "O(3)",
    "cutoff_lower": 0.0,
    "cutoff_upper": 5.0,
    "max_z": 10,
    "max_num_neighbors": 32,
    "atom_filter": -1,
    "prior_model": None,
    "reduce_op": "add",
    "derivative": True,
    "precision": 32,
    "remove_ref_energy": False,
    "y_weight": 1.0,
    "neg_dy_weight": 10.0,
    "ema_alpha_y": 1.0,
    "ema_alpha_neg_dy": 1.0,
    "lr": 1e-3,
    "lr_factor": 0.8,
    "lr_patience": 10,
    "lr_min": 1e-6,
    "lr_warmup_steps": 2,
    "weight_decay": 0.0,
    "train_loss": "mse_loss",
}


def molecules() -> list[Any]:
    """Return molecules of four atoms with springs between all of them."""
    import torch
    from torch_geometric.data import Data

    made = []
    for _ in range(24):
        at = torch.randn(4, 3)
        length = torch.pdist(at.requires_grad_())
        energy = (length - 1.5).square().sum()
        [slope] = torch.autograd.grad(energy, at)
        made.append(Data(z=torch.tensor([6, 1, 8, 1]), pos=at.detach(), y=energy.detach().view(1, 1), neg_dy=-slope))
    return made


def train(callbacks: list[Any], folder: Path, **options: Any) -> Any:
    """Train a potential.

    Args:
        callbacks: Callbacks of the Trainer.
        folder: Output folder.
        **options: Options of the model that differ.
    """
    import lightning.pytorch as pl
    from torch_geometric.loader import DataLoader
    from torchmdnet.module import LNNP

    seed_everything()
    data = molecules()
    module = LNNP({**OPTIONS, **options})
    best = pl.callbacks.ModelCheckpoint(folder / "best", monitor="val_total_mse_loss")
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[best, *callbacks],
        inference_mode=False,
        default_root_dir=folder,
        **QUIET,
    )
    trainer.fit(module, DataLoader(data[:16], batch_size=8, shuffle=True), DataLoader(data[16:], batch_size=8))
    return module


def load(path: str) -> object:
    """Load a checkpoint as the users of the library do."""
    from torchmdnet.models.model import load_model

    return load_model(path)


LIBRARY = Library(
    name="torchmd-net",
    kind="force fields",
    requirements=("torchmd-net==3.1.0", "ase"),
    cases=(
        Case("graph network", partial(train, model="graph-network"), load=load),
        Case("equivariant transformer", partial(train, model="equivariant-transformer"), load=load),
    ),
)
