"""From the Hessian as an operator to its spectrum: Lanczos processes, when they stop, and what they found."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import torch

from lightning_hesd import criteria, quadrature
from lightning_hesd.lanczos import Lanczos, gauss_quadrature
from lightning_hesd.sampling import SamplingError, sampling_error
from lightning_hesd.spectrum import SMALLEST_SCALE, Spectrum

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lightning_hesd.memory import MemoryPlan
    from lightning_hesd.operators import HessianOperator
    from lightning_hesd.options import AnalysisOptions, Probe

COARSE = 0.2
"""Relative accuracy of C_t at which the extreme Ritz vectors are good enough for the sampling error."""

SHARE_OF_FORECAST = 0.7
"""Of the steps that the error is forecast to need, so many are taken before looking again."""


class Estimation:
    """Lanczos processes on an operator, and what they have found so far."""

    def __init__(
        self,
        operator: HessianOperator,
        parameters: Sequence[Tensor],
        options: AnalysisOptions,
        plan: MemoryPlan,
        started: float,
    ) -> None:
        """Prepare the processes.

        Args:
            operator: The Hessian.
            parameters: The analysed parameters.
            options: How many processes and steps, and how accurate.
            plan: Where the basis goes.
            started: When the analysis began, by `time.perf_counter`.
        """
        self._started = started
        self._operator = operator
        self._parameters = parameters
        self._options = options
        self._plan = plan
        self._runs: list[Lanczos] = []
        self._sampling: SamplingError | None = None
        self._cost: float | None = None
        self._next_look = 0
        self._last_look = (0, math.inf)  # steps, and the log of how many times too large the error was
        self._squared_weight_norm = operator.squared_weight_norm()

    def run(self, tick: Callable[[], None] | None = None) -> None:
        """Run the processes of all probes, and whatever is to be known about their errors.

        Args:
            tick: Called after every step.

        Raises:
            NonFiniteProductError: If a product is NaN or infinite.
            ValueError: If the samples cannot be cut into groups for the sampling error.
        """
        options, operator = self._options, self._operator
        stop = None if options.tolerance is None else self._is_accurate
        generator = torch.Generator().manual_seed(options.seed)
        n, device = sum(p.numel() for p in self._parameters), self._parameters[0].device
        for _ in range(options.probes):
            process = Lanczos(
                operator.matvec,
                _start_vector(n, generator, options.probe, device, operator.dtype),  # unnamed: nobody else keeps it
                options.steps,
                storage=self._plan.storage,
            )
            self._runs.append(process)
            self._next_look, self._last_look = 0, (0, math.inf)
            process.run(stop, report=tick)
        self._cost = _gradient_equivalents(operator, device)
        if options.wants_sampling_error:
            self._sample(self._runs)

    def _is_accurate(self) -> bool:
        """Whether the process that is running has found C_t as accurately as asked."""
        running = self._runs[-1:]
        steps = len(running[0].alphas)
        if steps < self._next_look:
            return False
        spectrum = self.spectrum(running)
        if self._options.tolerance == "auto" and spectrum.c_t_error <= COARSE * max(abs(spectrum.c_t), SMALLEST_SCALE):
            self._sample(running)
            spectrum = self.spectrum(running)
        if spectrum.converged:
            return True
        self._schedule_look(steps, spectrum)
        return False

    def _schedule_look(self, steps: int, spectrum: Spectrum) -> None:
        """Look again when the error, which falls geometrically on the whole, may have come most of the way.

        A look takes an eigendecomposition and two bounds: a millisecond, but tens of them on a busy machine.
        """
        excess = math.log(spectrum.c_t_error / spectrum.allowed_error) if spectrum.allowed_error else math.inf
        before, self._last_look = self._last_look, (steps, excess)
        pause = 0.0
        if self._options.tolerance != "type" and before[0] < steps and math.inf > before[1] > excess > 0:
            pause = min(SHARE_OF_FORECAST * excess * (steps - before[0]) / (before[1] - excess), steps / 2)
        self._next_look = steps + int(pause)

    def _sample(self, runs: Sequence[Lanczos]) -> None:
        spectrum = self.spectrum(runs)
        if self._sampling is None and spectrum.reason is None and spectrum.lambda_max > spectrum.rounding:
            self._sampling = sampling_error(self._operator, runs)

    def spectrum(self, runs: Sequence[Lanczos] | None = None) -> Spectrum:
        """Return the record of these processes, by default of all."""
        runs = runs or self._runs
        operator, options, plan = self._operator, self._options, self._plan
        nodes, weights, residuals = quadrature.stack_rules([gauss_quadrature(run.alphas, run.betas) for run in runs])
        norm = float(np.nanmax(np.abs(nodes)))
        # The result is no more accurate than the coarser of the parameters' and the vectors' arithmetic.
        epsilon = max(torch.finfo(dtype).eps for dtype in [operator.dtype, *(p.dtype for p in self._parameters)])
        dimension = sum(p.numel() for p in self._parameters)
        return Spectrum(
            nodes=nodes,
            weights=weights,
            residuals=residuals,
            steps_per_probe=tuple(len(run.alphas) for run in runs),
            dimension=dimension,
            num_samples=round(operator.weight),
            loss=operator.loss,
            rounding=max(criteria.rounding_threshold(norm, epsilon, dimension), operator.product_error),
            matvecs=operator.matvecs,
            seconds=time.perf_counter() - self._started,
            gradient_equivalents=self._cost,
            matrix=options.matrix if options.preconditioner is None else "preconditioned hessian",
            probe=options.probe,
            seed=options.seed,
            mode=options.mode,
            strategy=operator.maker.strategy,
            strategy_reason=operator.maker.reason,
            basis=plan.storage,
            predicted_memory=plan.predicted(operator.maker.graph_bytes),
            confidence=options.confidence,
            tolerance=options.tolerance,
            reason=criteria.undefined_reason(norm, operator.loss, self._squared_weight_norm, epsilon),
            **({} if self._sampling is None else asdict(self._sampling)),
        )


def _start_vector(n: int, generator: torch.Generator, probe: Probe, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Draw a start vector, shape (n,): the same on every device and in every process."""
    if probe == "gaussian":
        vector = torch.randn(n, generator=generator, dtype=torch.float64)
    else:
        vector = torch.randint(0, 2, (n,), generator=generator).double().mul_(2).sub_(1)
    return vector.to(device=device, dtype=dtype)


def _gradient_equivalents(operator: HessianOperator, device: torch.device) -> float | None:
    """Return seconds per product over seconds per gradient, on the CPU; calls on other devices return early."""
    if device.type != "cpu" or not operator.batches:
        return None
    # The last thing measured, so that the caches are as warm as they were for the products.
    seconds = operator.time_gradient()
    return operator.seconds_per_product / seconds if seconds > 0 else None
