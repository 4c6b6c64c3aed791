"""`lightning-hesd assess`: the paper's criteria for generalization, by two spectra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_hesd.spectra.assessment import CAVEAT, TITLE, assess_generalization
from lightning_hesd.spectra.spectrum import Spectrum

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("train", type=Path, help="Spectrum on training data, .npz.")
    parser.add_argument("generalization", type=Path, help="Spectrum of the same weights on other data, .npz.")


def run(config: Namespace) -> None:
    """Print what the criteria do, and the reasons."""
    found = assess_generalization(Spectrum.load(config.train), Spectrum.load(config.generalization))
    print(f"{TITLE} ({CAVEAT}): {found.words}")
    for reason in found.reasons:
        print(f"- {reason}")
