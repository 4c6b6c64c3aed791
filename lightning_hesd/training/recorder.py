"""The record of one analysis: the spectrum on the training samples, and the other spectra that the user asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from torch import Tensor

from lightning_hesd.numerics.analysis.engine import analyze, analyze_layers
from lightning_hesd.numerics.devices import release_memory
from lightning_hesd.numerics.inputs.options import analysis_options
from lightning_hesd.numerics.inputs.portable import LeftOut, Portable
from lightning_hesd.numerics.operators.verification import WrongDerivativeError
from lightning_hesd.spectra.record import START_EPOCH, SpectrumRecord, when
from lightning_hesd.spectra.spectrum import Spectrum
from lightning_hesd.training.analyzer import Analysis
from lightning_hesd.training.compat.strategies import check_whole
from lightning_hesd.training.preconditioner import check_readable, read_preconditioner
from lightning_hesd.training.terminal import analysis_bar

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_hesd.numerics.inputs.blocks import Layers
    from lightning_hesd.training.analyzer import TrainerAnalyzer
    from lightning_hesd.training.error_policy import ErrorPolicy
    from lightning_hesd.training.loss_mode import LossMode
    from lightning_hesd.training.samples.first_batches import FirstBatches

Preconditioning = Literal["optimizer"] | Mapping[str, Tensor] | None

Result = TypeVar("Result", Spectrum, dict[str, Spectrum])

SPECTRUM = Analysis("spectrum", analyze)


class Part(NamedTuple):
    """One part of a record.

    Attributes:
        name: Its name in messages.
        field: The field of the record that it fills.
        analyzer: Makes the analysis.
        analysis: What is computed.
        options: Options that differ for it; those of the preconditioned spectrum depend on the weights.
    """

    name: str
    field: str
    analyzer: TrainerAnalyzer
    analysis: Analysis[Any]
    options: Mapping[str, Any] = {}


class Recorder:
    """Makes the records of a run."""

    def __init__(
        self,
        training: TrainerAnalyzer,
        generalization: TrainerAnalyzer | None = None,
        *,
        preconditioner: Preconditioning = None,
        layers: Layers | None = None,
        decomposition: Mapping[str, Any] | None = None,
        name: str = "hesd",
        progress: bool = False,
    ) -> None:
        """Take the analyzers of the samples and the other parts of a record, as for the callback.

        `decomposition` has the options of the spectra of GGN and residual: `output_fn`, `output_loss`.
        """
        self._analyzers = {"training": training}
        if generalization is not None:
            generalization.mode = training.mode  # spectra in different modes cannot be compared
            self._analyzers["generalization"] = generalization
        self._preconditioner = preconditioner
        self._layers = layers
        self._decomposition = decomposition
        self._is_readable = True
        self._name = name
        self._progress = progress

    def __getstate__(self) -> dict[str, Any]:
        """Return the options, with the user's objects as `Portable`."""
        portable = {"_preconditioner": "preconditioner", "_layers": "layers"}
        state = {**vars(self), **{key: Portable(name, vars(self)[key]) for key, name in portable.items()}}
        if self._decomposition is not None:
            state["_decomposition"] = {name: Portable(name, value) for name, value in self._decomposition.items()}
        return state

    def start(self, trainer: pl.Trainer, errors: ErrorPolicy) -> None:
        """Begin a run: release the samples of the last one, and check that the optimizers can be read."""
        for analyzer in self._analyzers.values():
            analyzer.restart(trainer)
        with errors.guard("there will be no preconditioned spectra") as attempt:
            if self._preconditioner is not None:
                check_whole(trainer, "preconditioner")
            if self._preconditioner == "optimizer":
                check_readable(trainer.optimizers)
        self._is_readable = attempt.failure is None

    @property
    def mode(self) -> LossMode:
        """The mode in which the loss is analyzed."""
        return self._analyzers["training"].mode

    def draw(self, trainer: pl.Trainer) -> None:
        """Draw all samples, or begin to keep the first training batches as samples."""
        for analyzer in self._analyzers.values():
            analyzer.prepare(trainer)

    @property
    def samples(self) -> str:
        """The training samples that are analyzed, in words."""
        return self._analyzers["training"].samples.description

    def waits(self) -> bool:
        """Whether there are no training samples before training has used its first batches."""
        return self._analyzers["training"].samples.first_batches is not None

    @property
    def first_batches(self) -> list[FirstBatches]:
        """The copies of the first training batches, of samples that cannot be drawn."""
        every = [analyzer.samples.first_batches for analyzer in self._analyzers.values()]
        return [batches for batches in every if batches is not None]

    def release(self) -> None:
        """Release the samples."""
        for analyzer in self._analyzers.values():
            analyzer.release()

    def record(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, errors: ErrorPolicy
    ) -> SpectrumRecord:
        """Return the record of the present weights; the parts after one that fails are left out."""
        found: dict[str, Any] = {"spectrum": None}
        error = None
        for part in self._parts(epoch):
            with (
                errors.guard(f"{part.name} {when(epoch)} failed, training goes on") as attempt,
                analysis_bar(trainer, self._name, shown=self._progress) as report,
            ):
                options = part.options
                if part.field == "preconditioned":
                    options = self._preconditioning(trainer, pl_module, found)
                if found.get(part.field) is None:
                    result = part.analyzer.analyze(trainer, pl_module, report, analysis=part.analysis, **options)
                    found[part.field] = _verified(result)
            if attempt.failure is not None:
                release_memory()
                error = attempt.failure if found["spectrum"] is None else f"{part.name}: {attempt.failure}"
                break
        return SpectrumRecord(epoch, trainer.global_step, error=error, **found)

    def _parts(self, epoch: int) -> list[Part]:
        """Return the parts of the record of an epoch, in the order in which they are computed."""
        training, layers = self._analyzers["training"], self._layers
        parts = [Part("the analysis", "spectrum", training, SPECTRUM)]
        if (other := self._analyzers.get("generalization")) is not None:
            parts.append(Part("the analysis of generalization data", "generalization", other, SPECTRUM))
        # Before the first step optimizers have no state to read.
        if self._preconditioner is not None and self._is_readable and epoch != START_EPOCH:
            parts.append(Part("the preconditioned analysis", "preconditioned", training, SPECTRUM))
        if self._decomposition is not None:
            for matrix, title in (("ggn", "Gauss-Newton matrix"), ("residual", "residual")):
                options = {"matrix": matrix, **self._decomposition}
                parts.append(Part(f"the analysis of the {title}", matrix, training, SPECTRUM, options))
        if layers is not None:
            analysis = Analysis("layers", partial(analyze_layers, layers=layers))
            parts.append(Part("the analysis of layers", "layers", training, analysis))
        return parts

    def _preconditioning(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, found: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the options of the preconditioned analysis, after entering into `found` what needs no analysis.

        That is the stability threshold of the optimizers, and the spectrum where D is 1.
        """
        given: Any = self._preconditioner
        if isinstance(given, LeftOut):
            given.refuse()
        if given != "optimizer":
            return {"preconditioner": given}
        plain: Spectrum = found["spectrum"]
        read = read_preconditioner(trainer.optimizers)
        diagonals = read.named(pl_module)
        found["stability_threshold"] = read.threshold
        if read.is_identity and sum(d.numel() for d in diagonals.values()) == plain.dimension:
            found["preconditioned"] = replace(plain, matrix=f"preconditioned {plain.matrix}")
        # An optimizer has no diagonal for frozen parameters.
        return {"preconditioner": diagonals, "include_frozen": False}

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which a resumed run draws the same samples."""
        return {data: analyzer.state_dict() for data, analyzer in self._analyzers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the samples of the run that is resumed.

        Raises:
            ValueError: If the state does not say which samples they are.
        """
        for data, analyzer in self._analyzers.items():
            if data in state:
                analyzer.load_state_dict(state[data])


def _verified(result: Result) -> Result:
    """Return spectra; one whose HVPs were refuted by differences of the loss is a failure of the analysis.

    Raises:
        WrongDerivativeError: If HVPs are not those of the loss.
    """
    for spectrum in result.values() if isinstance(result, dict) else [result]:
        if spectrum.verified == "no":
            raise WrongDerivativeError(spectrum.verification, spectrum.loss)
    return result


def decomposition_options(analysis: dict[str, Any]) -> dict[str, Any]:
    """Take the options for the parts of the Hessian out of those for all of it, checked.

    Raises:
        ValueError: If one is missing.
    """
    if analysis.get("matrix", "hessian") != "hessian":
        msg = f"`decompose=True` is about the parts of the Hessian: leave `matrix` out, got {analysis['matrix']!r}."
        raise ValueError(msg)
    if analysis.get("strategy") == "finite_difference":
        msg = "`decompose=True` needs exact products: use another `strategy` than 'finite_difference'."
        raise ValueError(msg)
    parts = {name: analysis.pop(name, None) for name in ("output_fn", "output_loss")}
    analysis_options(matrix="ggn", **parts)
    return parts
