"""Redraw the figures of the documentation: those of its gallery, of "Read a spectrum" and of the README.

    python -m examples.gallery          # about a minute

The gallery's figures are made by the code on its page.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path

import torch
from PIL import Image

from examples.gallery.cases import draw_cases
from examples.gallery.networks import Classifier, digits, loader
from examples.shared import quiet

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "gallery.md"
IMAGES = ROOT / "docs" / "images" / "gallery"
COLORS = 256
"""Colors of a picture: a palette takes a third of the space."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures (default: %(default)s)")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        draw_page(Path(folder))
        draw_cases(Path(folder))
        for picture in sorted(Path(folder).glob("*.png")):
            Image.open(picture).convert("RGB").quantize(COLORS).save(out / picture.name, optimize=True)
            print(f"{out / picture.name}: {(out / picture.name).stat().st_size / 1024:.0f} KiB")


def draw_page(folder: Path) -> None:
    """Run the code of the gallery's page in a folder, with a network on digits as its model."""
    torch.manual_seed(0)
    names = {"model": Classifier(), "train_dataloader": loader(digits().training)}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102 - our own page
    finally:
        os.chdir(before)


if __name__ == "__main__":
    main()
