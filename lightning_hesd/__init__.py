"""Hessian eigenvalue spectral density (HESD) of a network while it trains, for PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_hesd.analysis import hessian_spectrum, layer_spectra
    from lightning_hesd.assessment import Assessment, assess_generalization
    from lightning_hesd.callback import HessianSpectrumCallback
    from lightning_hesd.checkpoint import HessianCheckpoint
    from lightning_hesd.criteria import hesd_type
    from lightning_hesd.history import SpectrumHistory
    from lightning_hesd.spectrum import Spectrum

__all__ = [
    "Assessment",
    "HessianCheckpoint",
    "HessianSpectrumCallback",
    "Spectrum",
    "SpectrumHistory",
    "assess_generalization",
    "hesd_type",
    "hessian_spectrum",
    "layer_spectra",
]

_HOMES = {
    "Assessment": "assessment",
    "HessianCheckpoint": "checkpoint",
    "HessianSpectrumCallback": "callback",
    "Spectrum": "spectrum",
    "SpectrumHistory": "history",
    "assess_generalization": "assessment",
    "hesd_type": "criteria",
    "hessian_spectrum": "analysis",
    "layer_spectra": "analysis",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: every start of TensorBoard imports this package, without torch.

    Raises:
        AttributeError: If there is no such name.
    """
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
