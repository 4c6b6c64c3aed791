"""Hessian eigenvalue spectral density (HESD) of a network while it trains, for PyTorch Lightning."""

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
