"""Spectra of each kind, and two that should not be trusted, with small networks on digits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from examples.gallery.networks import TRAIN_SIZE, Classifier, DecayedClassifier, HalfPrecisionClassifier, digits, train
from lightning_hesd import HessianSpectrumCallback, hessian_spectrum
from lightning_hesd.plotting import plot_density

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from lightning_hesd import Spectrum

WIDTH, HEIGHT = 4.0, 3.2
"""Size of a picture in inches: three of them stand side by side."""


EPOCHS, MANY_EPOCHS = 12, 400
"""Of a usual and of an excessive training."""


def draw_cases(folder: Path, epochs: int = EPOCHS, many_epochs: int = MANY_EPOCHS) -> None:
    """Draw the density of each case, and print what it says."""
    found = {
        **of_one_training(epochs, many_epochs),
        "mn-trained": of_samples(DecayedClassifier, epochs),
        "unverified": of_samples(HalfPrecisionClassifier, epochs, 512),
        **of_two_samples(epochs),
    }
    for name, spectrum in found.items():
        print(f"{name}: {spectrum}")
        figure = Figure((WIDTH, HEIGHT), dpi=150, layout="constrained")
        plot_density(spectrum, figure.add_subplot())
        figure.savefig(folder / f"{name}.png")


def of_one_training(epochs: int, many_epochs: int) -> dict[str, Spectrum]:
    """Return the spectra of one network before its training, after some epochs and after many."""
    torch.manual_seed(0)
    callback = HessianSpectrumCallback(
        epochs=(epochs - 1, many_epochs - 1), at_start=True, num_samples=TRAIN_SIZE, progress=False
    )
    train(Classifier(), many_epochs, [callback])
    start, trained, late = (record.spectrum for record in callback.history)
    assert start is not None
    assert trained is not None
    assert late is not None
    return {"mn": start, "mp": trained, "qs": late}


def of_samples(network: type[Classifier], epochs: int, size: int = TRAIN_SIZE) -> Spectrum:
    """Return the spectrum of a network after its training; `size`: the number of samples."""
    torch.manual_seed(0)
    module = network()
    train(module, epochs)
    return hessian_spectrum(module, [samples(size)], mean_loss)


def of_two_samples(epochs: int) -> dict[str, Spectrum]:
    """Return the spectra of a few and of many samples, at the same weights."""
    torch.manual_seed(0)
    module = Classifier()
    train(module, epochs)
    return {
        name: hessian_spectrum(module, [samples(size)], mean_loss, sampling_error=True)
        for name, size in (("few-samples", 48), ("many-samples", TRAIN_SIZE))
    }


def samples(size: int) -> tuple[Tensor, Tensor]:
    """Return a batch of the first training samples."""
    images, labels = digits().training.tensors
    return images[:size], labels[:size]


def mean_loss(module: Classifier, batch: Sequence[Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])
