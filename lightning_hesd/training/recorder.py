"""What one analysis of a run consists of: spectra of several data sets, and through the optimizer's eyes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from lightning_hesd.numerics.inputs.portable import LeftOut, Portable
from lightning_hesd.numerics.isolation.exact_mode import release_memory
from lightning_hesd.numerics.operators.verification import WrongDerivativeError
from lightning_hesd.training.compat.internals import check_whole
from lightning_hesd.training.history import START_EPOCH, SpectrumRecord, when
from lightning_hesd.training.preconditioner import check_readable, read_preconditioner
from lightning_hesd.training.progress import analysis_bar

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_hesd.numerics.inputs.blocks import Layers
    from lightning_hesd.spectra.spectrum import Spectrum
    from lightning_hesd.training.analyzer import TrainerAnalyzer
    from lightning_hesd.training.loss_mode import LossMode

Preconditioning = Literal["optimizer"] | Mapping[str, Tensor] | None

Attempt = Callable[[str], AbstractContextManager[list[str]]]
"""Takes what to say if the block within fails, and gives a list that then has the failure."""


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
        """Prepare.

        Args:
            training: Analyses the training data.
            generalization: Analyses other data; None: nobody does.
            preconditioner: Through whose eyes to look at the training data, too: "optimizer", or diagonals by name.
            layers: Which layers of the network to analyse by themselves, too; None: none.
            decomposition: Options with which to analyse the parts of the Hessian, too: `output_fn` and `output_loss`.
            name: What the progress bar calls it.
            progress: Whether there is one.
        """
        self._analyzers = {"training": training}
        if generalization is not None:
            generalization.mode = training.mode  # or the two could not be compared
            self._analyzers["generalization"] = generalization
        self._preconditioner = preconditioner
        self._layers = layers
        self._decomposition = decomposition
        self._readable = True
        self._name = name
        self._progress = progress

    def __getstate__(self) -> dict[str, Any]:
        """Return the options, those that are objects of the user as `Portable`."""
        portable = {"_preconditioner": "preconditioner", "_layers": "layers"}
        state = {**vars(self), **{key: Portable(name, vars(self)[key]) for key, name in portable.items()}}
        if self._decomposition is not None:
            state["_decomposition"] = {name: Portable(name, value) for name, value in self._decomposition.items()}
        return state

    def start(self, trainer: pl.Trainer, attempt: Attempt) -> None:
        """Begin with a run: let go of the samples of the last one, and look at the optimizers of this one."""
        for analyzer in self._analyzers.values():
            analyzer.restart(trainer)
        self._readable = False
        with attempt("there will be no spectra through the optimizer's eyes"):
            if self._preconditioner is not None:
                check_whole(trainer, "preconditioner")
            if self._preconditioner == "optimizer":
                check_readable(trainer.optimizers)
            self._readable = True

    @property
    def mode(self) -> LossMode:
        """The mode in which the loss is analysed."""
        return self._analyzers["training"].mode

    def draw(self, trainer: pl.Trainer) -> None:
        """Draw all samples, or begin to keep those that training will see."""
        for analyzer in self._analyzers.values():
            analyzer.prepare(trainer)

    @property
    def samples(self) -> str:
        """Which samples of training data these are, in words."""
        return self._analyzers["training"].samples.description

    def waits(self) -> bool:
        """Whether there are no samples of training data before training has seen its first batches."""
        return self._analyzers["training"].samples.waits()

    def after_batch(self) -> None:
        """Take note that training has done a step with the last batch."""
        for analyzer in self._analyzers.values():
            analyzer.samples.after_batch()

    def after_epoch(self) -> None:
        """Take note that an epoch of training has ended."""
        for analyzer in self._analyzers.values():
            analyzer.samples.after_epoch()

    def release(self) -> None:
        """Let go of the samples."""
        for analyzer in self._analyzers.values():
            analyzer.release()

    def record(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, attempt: Attempt
    ) -> SpectrumRecord:
        """Return the record of the present weights; what comes after a failure is left out."""
        found: dict[str, Any] = {"spectrum": None}
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "the analysis": lambda: {"spectrum": self._spectrum(trainer, pl_module, "training")}
        }
        if "generalization" in self._analyzers:
            parts["the analysis of generalization data"] = lambda: {
                "generalization": self._spectrum(trainer, pl_module, "generalization")
            }
        # Before the first step optimizers have no state to read.
        if self._preconditioner is not None and self._readable and epoch != START_EPOCH:
            parts["the analysis through the optimizer's eyes"] = lambda: self._preconditioned(
                trainer, pl_module, found["spectrum"]
            )
        if self._decomposition is not None:
            for matrix, title in (("ggn", "Gauss-Newton matrix"), ("residual", "residual")):
                parts[f"the analysis of the {title}"] = partial(
                    self._part, trainer, pl_module, matrix=matrix, **self._decomposition
                )
        if self._layers is not None:
            parts["the analysis of layers"] = partial(self._layer_spectra, trainer, pl_module, self._layers)
        error = None
        for part, work in parts.items():
            with attempt(f"{part} {when(epoch)} failed, training goes on") as failures:
                found |= work()
            if failures:
                release_memory()
                error = failures[0] if found["spectrum"] is None else f"{part}: {failures[0]}"
                break
        return SpectrumRecord(epoch, trainer.global_step, error=error, **found)

    def _spectrum(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        data: str,
        **changes: Any,
    ) -> Spectrum:
        with analysis_bar(trainer, self._name, shown=self._progress) as report:
            return _relied_on(self._analyzers[data].spectrum(trainer, pl_module, report, **changes))

    def _preconditioned(self, trainer: pl.Trainer, pl_module: pl.LightningModule, plain: Spectrum) -> dict[str, Any]:
        """Return the fields of a record that show the training data through the optimizer's eyes."""
        given: Any = self._preconditioner
        if isinstance(given, LeftOut):
            given.refuse()
        if self._preconditioner != "optimizer":
            return {
                "preconditioned": self._spectrum(trainer, pl_module, "training", preconditioner=self._preconditioner)
            }
        read = read_preconditioner(trainer.optimizers)
        diagonals = read.named(pl_module)
        if read.is_identity and sum(d.numel() for d in diagonals.values()) == plain.dimension:
            spectrum = replace(plain, matrix=f"preconditioned {plain.matrix}")
        else:  # frozen weights the optimizer does not see
            spectrum = self._spectrum(trainer, pl_module, "training", preconditioner=diagonals, include_frozen=False)
        return {"preconditioned": spectrum, "stability_threshold": read.threshold}

    def _part(self, trainer: pl.Trainer, pl_module: pl.LightningModule, matrix: str, **of: Any) -> dict[str, Any]:
        return {matrix: self._spectrum(trainer, pl_module, "training", matrix=matrix, **of)}

    def _layer_spectra(self, trainer: pl.Trainer, pl_module: pl.LightningModule, layers: Layers) -> dict[str, Any]:
        with analysis_bar(trainer, self._name, shown=self._progress) as report:
            found = self._analyzers["training"].layers(trainer, pl_module, layers, report)
            return {"layers": {name: _relied_on(spectrum) for name, spectrum in found.items()}}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to draw the same samples."""
        return {data: analyzer.state_dict() for data, analyzer in self._analyzers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Draw the samples of the run that is resumed.

        Raises:
            ValueError: If it does not say which.
        """
        for data, analyzer in self._analyzers.items():
            if data in state:
                analyzer.load_state_dict(state[data])


def _relied_on(spectrum: Spectrum) -> Spectrum:
    """Return a spectrum; one without numbers is a failure of the analysis.

    Raises:
        WrongDerivativeError: If products were not those of the loss.
    """
    if spectrum.verified == "no":
        raise WrongDerivativeError(spectrum.verification, spectrum.loss)
    return spectrum
