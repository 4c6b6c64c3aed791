"""Train a case without the callback, with it, and with it and the independent computation."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import random
import sys
import time
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.libraries.independent import CheckedCallback, Extremes
from lightning_hesd import HessianSpectrumCallback

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks.libraries.case import Case
    from lightning_hesd import Spectrum


def seed_everything(seed: int = 0) -> None:
    """Seed Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the libraries draw from it
    torch.manual_seed(seed)


@dataclass(frozen=True)
class Outcome:
    """Outcome of a case, in plain values for JSON.

    Attributes:
        case: Name of the case.
        namespace: Package of the LightningModule, "lightning" or "pytorch_lightning".
        weights: "identical" with and without the callback, or the difference.
        analyses: Number of analyses.
        failed: Number of analyses without a spectrum.
        error: Message of the last failure.
        spectrum: Last spectrum in one line.
        c_t: C_t of this spectrum.
        hesd_type: Type of this spectrum.
        mode: Mode in which the loss is analyzed.
        verified: Result of verification.
        difference: Largest relative difference of the extreme eigenvalues and the loss from the independent
            computation; None without one.
        pick: Way in which the picked checkpoint loads.
        warnings: Warnings of the package.
        raised: Error that ended training, if any.
        seconds: Seconds of training without and with the callback.
        note: Note of the case.
    """

    case: str
    namespace: str = ""
    weights: str = ""
    analyses: int = 0
    failed: int = 0
    error: str | None = None
    spectrum: str = ""
    c_t: float = math.nan
    hesd_type: str = ""
    mode: str = ""
    verified: str = ""
    difference: float | None = None
    pick: str = ""
    warnings: tuple[str, ...] = ()
    raised: str = ""
    seconds: tuple[float, float] = (math.nan, math.nan)
    note: str = ""


def attempt(case: Case, folder: Path) -> Outcome:
    """Try a case.

    Args:
        case: The case.
        folder: Output folder.
    """
    options: dict[str, Any] = {"checkpoint": "highest_c_t"}
    if case.loss_fn is not None:
        options["loss_fn"] = case.loss_fn
    outcome = Outcome(case.name, note=case.note)
    module, plain_seconds = _trained(case, [], folder / "without")
    plain = _tensors(module)
    outcome = replace(outcome, namespace=_namespace(module))
    callback = HessianSpectrumCallback(**options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            module, seconds = _trained(case, [callback], folder / "with")
        except Exception as error:  # noqa: BLE001 - the table shows any failure
            return replace(outcome, raised=f"{type(error).__name__}: {error}")
    spectra = [record.spectrum for record in callback.history]
    outcome = replace(
        outcome,
        weights=_comparison(plain, _tensors(module)),
        analyses=len(spectra),
        failed=spectra.count(None),
        error=next((record.error for record in reversed(callback.history) if record.error), None),
        warnings=tuple(dict.fromkeys(str(w.message) for w in caught if "lightning_hesd" in str(w.message))),
        seconds=(plain_seconds, seconds),
        pick=_loaded(case, callback, module),
    )
    spectrum = spectra[-1] if spectra else None
    if spectrum is None:
        return outcome
    outcome = replace(
        outcome,
        spectrum=str(spectrum),
        c_t=spectrum.c_t,
        hesd_type=str(spectrum.hesd_type),
        mode=spectrum.mode,
        verified=spectrum.verified,
    )
    checked = CheckedCallback(callback.history[-1].epoch, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _trained(case, [checked], folder / "checked")
    [found] = checked.found
    if isinstance(found, str):
        how = f"The analysis used the strategy {spectrum.strategy}; the independent computation failed: {found}"
        return replace(outcome, note=f"{case.note} {how}".strip())
    return replace(outcome, difference=_difference(spectrum, found))


def _trained(case: Case, callbacks: list[Any], folder: Path) -> tuple[Any, float]:
    folder.mkdir(parents=True)
    with _working_in(folder):
        start = time.perf_counter()
        module = case.train(callbacks, folder)
        return module, time.perf_counter() - start


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = os.getcwd()  # noqa: PTH109 - and `contextlib.chdir` needs Python 3.11
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _namespace(module: Any) -> str:
    """Return the package whose LightningModule a module is."""
    return next(kind.__module__.split(".")[0] for kind in type(module).__mro__ if kind.__name__ == "LightningModule")


def _tensors(module: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def _comparison(plain: dict[str, Tensor], other: dict[str, Tensor]) -> str:
    if plain.keys() != other.keys():
        return f"other names: {', '.join(sorted(plain.keys() ^ other.keys())[:3])}"
    differing = [name for name in plain if not _is_identical(plain[name], other[name])]
    return f"{len(differing)} of {len(plain)} differ: {', '.join(differing[:3])}" if differing else "identical"


def _is_identical(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return first.cpu().numpy().tobytes() == second.cpu().numpy().tobytes()


def _loaded(case: Case, callback: HessianSpectrumCallback, module: Any) -> str:
    """Load the pick as users do, and return the result in words."""
    checkpoint = callback.checkpoint
    path = "" if checkpoint is None else checkpoint.best_model_path
    if not path:
        return "none"
    try:
        if case.load is not None:
            case.load(path)
            return "loads"
        before, how = _tensors(module), ""
        try:
            state = torch.load(path, weights_only=True)
        except pickle.UnpicklingError:  # of hyperparameters that are objects
            state, how = torch.load(path, weights_only=False), " with `weights_only=False`"
        module.load_state_dict(state["state_dict"])
        module.load_state_dict(before)
    except Exception as error:  # noqa: BLE001 - the table shows any failure
        return f"{type(error).__name__}: {error}"
    return f"loads{how}"


SMALLEST_SHARE = 0.01
"""Share of the largest eigenvalue: errors of smaller eigenvalues are relative to this."""


def _difference(spectrum: Spectrum, found: Extremes) -> float:
    """Return the largest relative difference between a spectrum and the independent computation."""
    floor = SMALLEST_SHARE * max(abs(found.lambda_min), abs(found.lambda_max))
    pairs = [
        (spectrum.loss, found.loss, sys.float_info.min),
        (spectrum.lambda_min, found.lambda_min, floor),
        (spectrum.lambda_max, found.lambda_max, floor),
    ]
    return max(abs(ours - theirs) / max(abs(theirs), least) for ours, theirs, least in pairs)
