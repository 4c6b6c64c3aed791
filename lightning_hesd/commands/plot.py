"""`lightning-hesd plot`: figures of spectral densities."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_hesd.plotting import offscreen, plot_density
from lightning_hesd.spectra.files import atomic_write
from lightning_hesd.spectra.spectrum import Spectrum

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("spectra", nargs="+", type=Path, help="Spectra, .npz.")
    parser.add_argument(
        "-o", "--out", type=Path, default=None, help="Folder of the figures; default: beside the spectra."
    )


def run(config: Namespace) -> None:
    """Draw the densities, and print the names of the files."""
    for path, spectrum in [(path, Spectrum.load(path)) for path in config.spectra]:
        target = (config.out or path.parent) / f"{path.stem}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        draw(spectrum, path.stem, target)
        print(target)


def draw(spectrum: Spectrum, title: str, target: Path) -> None:
    """Write the density as a PNG."""
    with offscreen():
        figure = plot_density(spectrum, title=title).get_figure(root=True)
    with atomic_write(target) as partial:
        figure.savefig(partial, format="png")  # type: ignore[union-attr]
