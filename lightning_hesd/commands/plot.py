"""`lightning-hesd plot`: figures of spectral densities."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_hesd.plotting import offscreen_figure, plot_density
from lightning_hesd.spectra.files import atomic_write
from lightning_hesd.spectra.spectrum import Spectrum

if TYPE_CHECKING:
    from collections.abc import Callable

    from jsonargparse import ArgumentParser, Namespace
    from matplotlib.axes import Axes


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
        save_figure(target, plot_density, spectrum, title=path.stem)
        print(target)


def save_figure(target: Path, draw: Callable[..., Axes], *arguments: object, **options: object) -> None:
    """Write the figure that a function draws, in the format that the name of the file asks for, PNG without one."""
    figure = offscreen_figure(draw, *arguments, **options)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as partial:
        figure.savefig(partial, format=target.suffix.removeprefix(".") or "png")
