"""A program that imports `pytorch_lightning` only after this package; `test_namespaces.py` starts it."""

import argparse
import json
import sys
from pathlib import Path

import lightning_hesd.commands.analyze  # noqa: F401 - it imports most of the package
from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    early = HessianSpectrumCallback(checkpoint="highest_c_t")
    seen = {"imported by itself": [name for name in ("pytorch_lightning", "lightning_fabric") if name in sys.modules]}

    import pytorch_lightning  # noqa: PLC0415
    from pytorch_lightning.cli import LightningCLI  # noqa: F401, PLC0415 - where classes are asked for

    seen["known"] = [
        issubclass(HessianSpectrumCallback, pytorch_lightning.Callback),
        issubclass(HessianCheckpoint, pytorch_lightning.callbacks.ModelCheckpoint),
        isinstance(early, pytorch_lightning.Callback),
        isinstance(early.checkpoint, pytorch_lightning.callbacks.Checkpoint),
    ]
    (out / "rank0.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
