"""A small event folder with one state of every kind: for the HESD tab's part about one state."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_hesd import Spectrum
from lightning_hesd.spectra.layer_curvature import LayerCurvature
from lightning_hesd.training.history import SpectrumHistory, SpectrumRecord
from lightning_hesd.training.loggers.tensorboard import TensorBoardOutput
from tests.example_spectra import analyze

FAILURE = "RuntimeError: <b>no memory</b> for the products"

TRAINING = np.concatenate([-np.geomspace(1e-4, 0.016, 60), np.geomspace(1e-5, 0.1, 430), np.linspace(0.3, 1.35, 10)])
GENERALIZATION = np.concatenate([-np.geomspace(1e-3, 15, 120), np.geomspace(1e-4, 30, 370), np.geomspace(60, 549, 10)])
EIGENVALUES = {"spectrum": TRAINING, "generalization": GENERALIZATION}
"""The true eigenvalues of the state at epoch 0."""

LAYERS = {
    "model.encoder.block0.attention": 4.0,
    "model.encoder.block0.mlp": 0.2,
    "model.encoder.block1.attention": 0.05,
    "model.encoder.block1.mlp": -0.01,
    "model.encoder.norm": 0.002,
}
"""Names of layers and their traces."""


def history_of(*records: SpectrumRecord) -> SpectrumHistory:
    """Return a history of these records."""
    history = SpectrumHistory()
    history.extend(records)
    return history


def found(eigenvalues: np.ndarray, loss: float = 0.2, **fields: Any) -> Spectrum:
    """Return what a Lanczos run on a diagonal matrix finds, as the verified spectrum of a network."""
    options = {"verified": "yes", "verification": "differences of loss and gradient agree to 1e-9", **fields}
    return replace(analyze(eigenvalues, steps=(40,)), loss=loss, num_samples=512, **options)


def curvatures(factor: float = 1.0) -> dict[str, LayerCurvature]:
    """Return what a spectrum tells of each layer."""
    total = factor * sum(LAYERS.values())
    return {
        name: LayerCurvature(
            dimension=100,
            trace=factor * trace,
            trace_error=0.0123,
            trace_share=factor * trace / total,
            negative_share=1 / len(LAYERS),
            lambda_max_weight=abs(trace) / sum(map(abs, LAYERS.values())),
            lambda_min_weight=1 / len(LAYERS),
            lambda_max_bounds=(abs(trace) / 2, 2 * abs(trace)),
            lambda_min_bounds=(-0.016, 0.0),
        )
        for name, trace in LAYERS.items()
    }


def full_record() -> SpectrumRecord:
    """Return the record of epoch 0, which has every spectrum."""
    rest = np.concatenate([-np.geomspace(1e-5, 0.02, 250), np.geomspace(1e-5, 0.02, 250)])
    return SpectrumRecord(
        0,
        10,
        found(TRAINING, c_t_sampling_error=0.0031, by_layer=curvatures()),
        generalization=found(GENERALIZATION, loss=0.9),
        preconditioned=found(40 * TRAINING, matrix="preconditioned hessian"),
        stability_threshold=38.0,
        ggn=found(np.concatenate([np.zeros(400), np.geomspace(1e-3, 1.34, 100)]), matrix="ggn"),
        residual=found(rest, matrix="residual"),
        gradients={"steps": 16, "clipped_share": 0.0, "clip_factor": 1.0, "gradient_cosine": 1.0, "update_cosine": 0.7},
    )


def states() -> list[SpectrumRecord]:
    """Return records: random weights, every spectrum, a failure, clipped gradients, quasi-singular, unverified."""
    clipped = {"steps": 16, "clipped_share": 0.75, "clip_factor": 0.4, "gradient_cosine": 0.93, "update_cosine": 0.6}
    negative = np.concatenate([-np.geomspace(1e-3, 2, 250), np.geomspace(1e-3, 1, 250)])
    unknown = {"verified": "unknown", "verification": "kinks of the loss hide it", "sampling_reason": "only 3 groups"}
    return [
        SpectrumRecord(-1, 0, found(np.linspace(-1, 1, 500), loss=2.3, by_layer=curvatures())),
        full_record(),
        SpectrumRecord(2, 30, None, error=FAILURE),
        SpectrumRecord(5, 60, found(negative, by_layer=curvatures(2)), gradients=clipped),
        SpectrumRecord(8, 90, found(TRAINING / 70, by_layer=curvatures(0.1))),
        SpectrumRecord(10, 110, found(TRAINING / 3, by_layer=curvatures(0.3), **unknown)),
    ]


def other_states() -> list[SpectrumRecord]:
    """Return the records of a run whose layers have spectra of their own."""
    layers = {name: found(abs(trace) * TRAINING) for name, trace in LAYERS.items()}
    return [SpectrumRecord(epoch, 10 * (epoch + 1), found(TRAINING * (epoch + 2)), layers=layers) for epoch in (0, 5)]


def write_states(folder: Path) -> dict[str, SpectrumHistory]:
    """Write the event files of two runs as training does, and return their histories."""
    histories = {}
    for run, records in (("every_kind", states()), ("other", other_states())):
        logger = TensorBoardLogger(folder, name=run, version="")
        output = TensorBoardOutput(logger, "hesd")
        histories[run] = SpectrumHistory()
        for record in records:
            histories[run].append(record)
            (output.rewrite if record.spectra else output.write_failure)(histories[run], record.global_step)
        histories[run].save(folder / run / "hesd")
        logger.finalize("success")
        logger.experiment.close()
    return histories
