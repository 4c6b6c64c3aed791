"""Try the cases of one library, in an environment that has it.

python -m benchmarks.libraries.run darts --out outcomes.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.libraries.trial import Outcome, attempt


def main() -> None:
    """Try the cases, and write their outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", help="name of the module")
    parser.add_argument("--only", default="", help="a part of the names of cases")
    parser.add_argument("--out", type=Path, help="file for the outcomes; default: print them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    library = importlib.import_module(f"benchmarks.libraries.{args.library}").LIBRARY
    outcomes = []
    for case in library.cases:
        if args.only not in case.name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = attempt(case, Path(folder))
            except Exception as error:  # noqa: BLE001 - the other cases are still tried
                traceback.print_exc()
                outcome = Outcome(case.name, raised=f"{type(error).__name__}: {error}")
        print(json.dumps(asdict(outcome), indent=1), flush=True)
        outcomes.append(asdict(outcome))
    if args.out is not None:
        args.out.write_text(json.dumps(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
