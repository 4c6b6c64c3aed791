"""Chemprop: molecules. Evaluation mode unscales its targets, unless its own validation hook sets the mode."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.libraries.case import Case, Library
from benchmarks.libraries.common import QUIET
from benchmarks.libraries.trial import seed_everything

if TYPE_CHECKING:
    from pathlib import Path

SMILES = (
    *("CCO", "CCN", "CCC", "c1ccccc1", "CC(=O)O", "CCOC", "CCCl", "CCBr", "C1CCCCC1", "CC(C)O", "CCCCO", "CC#N"),
    *("c1ccccc1O", "c1ccncc1", "CCS", "COC(=O)C", "NCCO", "OCCO", "CC=CC", "c1ccccc1C", "c1ccc2ccccc2c1", "CNC"),
    *("CN(C)C", "CCOC(=O)C", "O=C1CCCN1", "C1CCOC1", "CCF", "CC(C)(C)O", "CCCCCC", "CC(N)C(=O)O"),
)


def train(callbacks: list[Any], folder: Path, *, batch_norm: bool) -> Any:
    """Train a message passing network to predict the log P of small molecules.

    Args:
        callbacks: Callbacks of the Trainer.
        folder: Output folder.
        batch_norm: Whether it normalizes batches.
    """
    import lightning.pytorch as pl
    from chemprop import data, featurizers, models, nn
    from rdkit import Chem
    from rdkit.Chem import Crippen

    seed_everything()
    points = [
        data.MoleculeDatapoint.from_smi(smiles, [Crippen.MolLogP(Chem.MolFromSmiles(smiles))]) for smiles in SMILES * 4
    ]
    order = np.random.default_rng(0).permutation(len(points))
    featurizer = featurizers.SimpleMoleculeMolGraphFeaturizer()
    training = data.MoleculeDataset([points[i] for i in order[:90]], featurizer)
    validation = data.MoleculeDataset([points[i] for i in order[90:]], featurizer)
    scaler = training.normalize_targets()
    validation.normalize_targets(scaler)
    transform = nn.UnscaleTransform.from_standard_scaler(scaler)
    model = models.MPNN(
        nn.BondMessagePassing(d_h=16, depth=2),
        nn.MeanAggregation(),
        nn.RegressionFFN(input_dim=16, hidden_dim=16, output_transform=transform),
        batch_norm=batch_norm,
    )
    best = pl.callbacks.ModelCheckpoint(folder / "best", monitor="val_loss", save_last=True)
    trainer = pl.Trainer(max_epochs=3, callbacks=[best, *callbacks], default_root_dir=folder, **QUIET)
    trainer.fit(
        model,
        data.build_dataloader(training, batch_size=32, num_workers=0, seed=0),
        data.build_dataloader(validation, batch_size=32, num_workers=0, shuffle=False),
    )
    return model


def load(path: str) -> object:
    """Load a checkpoint as Chemprop's users do."""
    from chemprop import models

    return models.MPNN.load_from_checkpoint(path)


LIBRARY = Library(
    name="chemprop",
    kind="molecules",
    requirements=("chemprop==2.3.1",),
    cases=(
        Case("MPNN", partial(train, batch_norm=False), load=load),
        Case("MPNN, batch_norm=True", partial(train, batch_norm=True), load=load),
    ),
)
