"""An analysis that is ready to run: a computation, and the module, samples and loss to run it on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from lightning_hesd.numerics.analysis.engine import analyze, analyze_layers
from lightning_hesd.numerics.collectives import LOCAL
from lightning_hesd.training.compat.strategies import collectives_of, parameter_sharding_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import lightning.pytorch as pl

    from lightning_hesd.numerics.analysis.engine import Report
    from lightning_hesd.numerics.analysis.evaluation import LossFunction
    from lightning_hesd.numerics.inputs.batches import WeightedBatch
    from lightning_hesd.numerics.inputs.blocks import Layers
    from lightning_hesd.numerics.inputs.options import AnalysisOptions
    from lightning_hesd.numerics.operators.strategies import AnalysisCache
    from lightning_hesd.spectra.spectrum import Spectrum
    from lightning_hesd.training.isolation.isolation import Evaluating

Result = TypeVar("Result")


@dataclass(frozen=True)
class Analysis(Generic[Result]):
    """A computation on the samples of an analyzer.

    Attributes:
        name: Its name; analyses of one name share a cache for each curvature matrix and mode.
        compute: A function with the signature of `analyze` of the engine.
    """

    name: str
    compute: Callable[..., Result]


SPECTRUM = Analysis("spectrum", analyze)


def layers_analysis(layers: Layers) -> Analysis[dict[str, Spectrum]]:
    """Return the analysis of layers, given as for `layer_spectra`."""
    return Analysis("layers", partial(analyze_layers, layers=layers))


@dataclass(frozen=True)
class AnalysisSession:
    """An analysis, ready to run.

    Attributes:
        batches: This rank's share of the samples, on the device.
        options: The options to begin with.
        cache: The cache of analyses of this kind.
        report: Called after every Lanczos step.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    batches: list[WeightedBatch]
    loss_fn: LossFunction
    options: AnalysisOptions
    cache: AnalysisCache
    report: Report | None

    def attempt(self, compute: Callable[..., Result], options: AnalysisOptions, reason: str | None) -> Result:
        """Run the analysis once, on all ranks together; `reason`: why the options differ from those of the session."""
        ranks = collectives_of(self.trainer)
        sharding = parameter_sharding_of(self.trainer, self.module)
        run = partial(
            compute,
            self.module,
            self.batches,
            self.loss_fn,
            options=options,
            collectives=LOCAL if sharding.is_sharded else ranks,
            sharding=sharding,
            report=self.report,
            cache=self.cache,
            local_ranks=self.trainer.num_devices,
            reason=reason,
        )
        return ranks.run_together(partial(sharding.collectives.run_together, run))


def within(evaluating: Evaluating, function: Callable[..., Result] | None) -> Callable[..., Result] | None:
    """Return a function that runs in the context of an evaluation."""

    def within(*arguments: Any) -> Result:
        with evaluating():
            return cast("Callable[..., Result]", function)(*arguments)

    return None if function is None else within
