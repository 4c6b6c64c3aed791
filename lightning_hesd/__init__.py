"""Hessian eigenvalue spectral density (HESD) of a network while it trains, for PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_hesd.judgment.judge import judge
    from lightning_hesd.judgment.judgment import Judgment
    from lightning_hesd.numerics.analysis.api import hessian_spectrum, layer_spectra
    from lightning_hesd.numerics.analysis.hessian_operator import HessianOperator
    from lightning_hesd.numerics.inputs.options import AnalysisOptions
    from lightning_hesd.numerics.krylov.eigenpairs import top_eigenpairs
    from lightning_hesd.spectra.assessment import Assessment, assess_generalization
    from lightning_hesd.spectra.criteria import hesd_type
    from lightning_hesd.spectra.differences import PairedDifference, c_t_difference, lambda_max_difference
    from lightning_hesd.spectra.layer_spectra import LayerSpectra
    from lightning_hesd.spectra.reference_range import ReferenceComparison, compare_with_reference
    from lightning_hesd.spectra.spectrum import Spectrum
    from lightning_hesd.training.callback import HessianSpectrumCallback
    from lightning_hesd.training.checkpoints.checkpoint import HessianCheckpoint
    from lightning_hesd.training.history import SpectrumHistory
    from lightning_hesd.training.sharpness_monitor import SharpnessMonitor

__all__ = [
    "AnalysisOptions",
    "Assessment",
    "HessianCheckpoint",
    "HessianOperator",
    "HessianSpectrumCallback",
    "Judgment",
    "LayerSpectra",
    "PairedDifference",
    "ReferenceComparison",
    "SharpnessMonitor",
    "Spectrum",
    "SpectrumHistory",
    "assess_generalization",
    "c_t_difference",
    "compare_with_reference",
    "hesd_type",
    "hessian_spectrum",
    "judge",
    "lambda_max_difference",
    "layer_spectra",
    "top_eigenpairs",
]

_HOMES = {
    "AnalysisOptions": "numerics.inputs.options",
    "Assessment": "spectra.assessment",
    "HessianCheckpoint": "training.checkpoints.checkpoint",
    "HessianOperator": "numerics.analysis.hessian_operator",
    "HessianSpectrumCallback": "training.callback",
    "Judgment": "judgment.judgment",
    "LayerSpectra": "spectra.layer_spectra",
    "PairedDifference": "spectra.differences",
    "ReferenceComparison": "spectra.reference_range",
    "SharpnessMonitor": "training.sharpness_monitor",
    "Spectrum": "spectra.spectrum",
    "SpectrumHistory": "training.history",
    "assess_generalization": "spectra.assessment",
    "c_t_difference": "spectra.differences",
    "compare_with_reference": "spectra.reference_range",
    "hesd_type": "spectra.criteria",
    "hessian_spectrum": "numerics.analysis.api",
    "judge": "judgment.judge",
    "lambda_max_difference": "spectra.differences",
    "layer_spectra": "numerics.analysis.api",
    "top_eigenpairs": "numerics.krylov.eigenpairs",
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
