"""A program that imports `pytorch_lightning` only after this package; `test_namespaces.py` starts it."""

import json
import sys

import lightning_hesd.commands.analyze  # noqa: F401 - it imports most of the package
from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback


def main() -> None:
    early = HessianSpectrumCallback(checkpoint="highest_c_t")
    by_itself = [name for name in ("pytorch_lightning", "lightning_fabric") if name in sys.modules]

    import pytorch_lightning  # noqa: PLC0415
    from pytorch_lightning.cli import LightningCLI  # noqa: F401, PLC0415 - where classes are asked for

    known = [
        issubclass(HessianSpectrumCallback, pytorch_lightning.Callback),
        issubclass(HessianCheckpoint, pytorch_lightning.callbacks.ModelCheckpoint),
        isinstance(early, pytorch_lightning.Callback),
        isinstance(early.checkpoint, pytorch_lightning.callbacks.Checkpoint),
    ]
    json.dump({"imported by itself": by_itself, "known": known}, sys.stdout)


if __name__ == "__main__":
    main()
