"""From the Hessian as an operator to its spectrum: Lanczos processes, when they stop, and what they found."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import torch

from lightning_hesd.numerics.analysis.sampling_error import SamplingError, sampling_error
from lightning_hesd.numerics.isolation.modes import name_of_mode
from lightning_hesd.numerics.krylov.lanczos import Lanczos, NonFiniteProductError
from lightning_hesd.numerics.krylov.ritz import gauss_quadrature, tridiagonal_eigh
from lightning_hesd.numerics.operators.diagonal_block import block_products
from lightning_hesd.spectra import criteria, quadrature
from lightning_hesd.spectra.spectrum import MIN_SCALE, Spectrum

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from lightning_hesd.numerics.inputs.options import AnalysisOptions, Probe
    from lightning_hesd.numerics.operators.diagonal_block import DiagonalBlock
    from lightning_hesd.numerics.operators.memory import MemoryPlan

    Array = NDArray[np.float64]

COARSE = 0.2
"""Relative accuracy of C_t at which the extreme Ritz vectors are good enough for the sampling error."""

SHARE_OF_FORECAST = 0.7
"""Of the steps that the error is forecast to need, so many are taken before looking again."""


class Estimation:
    """Lanczos processes on an operator, and what they have found so far.

    Attributes:
        operator: The matrix.
    """

    def __init__(
        self,
        operator: DiagonalBlock,
        options: AnalysisOptions,
        plan: MemoryPlan,
        started: float,
    ) -> None:
        """Prepare the processes.

        Args:
            operator: The matrix.
            options: How many processes and steps, and how accurate.
            plan: Where the basis goes.
            started: When the analysis began, by `time.perf_counter`.
        """
        self._started = started
        self.operator = operator
        self._options = options
        self._plan = plan
        self._runs: list[Lanczos] = []
        self._sampling: SamplingError | None = None
        self._cost: float | None = None
        self._next_look = 0
        self._last_look = (0, math.inf)  # steps, and the log of how many times too large the error was
        self._squared_weight_norm = operator.squared_weight_norm()
        self._generator = torch.Generator().manual_seed(options.seed)
        self._start_run()

    def _start_run(self) -> None:
        """Start the Lanczos run of the next probe."""
        options, operator = self._options, self.operator
        run = Lanczos(
            operator.matvec,
            _start_vector(operator, self._generator, options.probe),  # without a name, so that its memory is freed
            options.steps,
            basis=self._plan.basis,
            space=operator.space,
        )
        self._runs.append(run)
        self._next_look, self._last_look = 0, (0, math.inf)

    @property
    def vector(self) -> Tensor:
        """The vector whose product comes next, shape (n,)."""
        return self._runs[-1].vector

    def update(self, product: Tensor) -> bool:
        """Take one Lanczos step, and return whether the runs of all probes have ended.

        Args:
            product: Hv of `vector`, shape (n,).
        """
        run = self._runs[-1]
        wants_accuracy = self._options.tolerance is not None
        if not run.update(product) and not (wants_accuracy and run.may_stop and self._is_accurate()):
            return False
        if len(self._runs) == self._options.probes:
            return True
        self._start_run()
        return False

    def finish(self, cost: float | None) -> None:
        """Find out what is to be known once the processes have ended.

        Args:
            cost: Of a product, in gradients; None if it was not measured.

        Raises:
            ValueError: If the samples cannot be cut into groups for the sampling error.
        """
        self._cost = cost
        if self._options.wants_sampling_error:
            self._sample(self._runs)

    def _is_accurate(self) -> bool:
        """Whether the process that is running has found C_t as accurately as asked."""
        running = self._runs[-1:]
        steps = len(running[0].alphas)
        if steps < self._next_look:
            return False
        spectrum = self.spectrum(running)
        if self._options.tolerance == "auto" and spectrum.c_t_error <= COARSE * max(abs(spectrum.c_t), MIN_SCALE):
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
            self._sampling = sampling_error(self.operator, runs)

    @property
    def epsilon(self) -> float:
        """Machine epsilon of the coarsest arithmetic behind the products: of parameters, vectors, or the loss."""
        risk = self.operator.risk
        dtypes = [risk.dtype, *(p.dtype for p in self.operator.parameters)]
        return max(risk.epsilon, *(torch.finfo(dtype).eps for dtype in dtypes))

    @property
    def asymmetry(self) -> float:
        """How far the products are from those of a symmetric matrix, relative to the norm of T: see `Spectrum`."""
        norm = max(float(np.abs(gauss_quadrature(run.alphas, run.betas)[0]).max()) for run in self._runs)
        largest = max(float(run.asymmetries.max()) for run in self._runs)
        return largest / norm if norm else 0.0

    def spectrum(self, runs: Sequence[Lanczos] | None = None) -> Spectrum:
        """Return the record of these processes, by default of all."""
        runs = runs or self._runs
        operator, options, plan = self.operator, self._options, self._plan
        nodes, weights, residuals = quadrature.stack_rules([gauss_quadrature(run.alphas, run.betas) for run in runs])
        norm = float(np.nanmax(np.abs(nodes)))
        risk, dimension, epsilon = operator.risk, operator.dimension, self.epsilon
        asymmetry = max(float(run.asymmetries.max()) for run in runs)
        # What is asymmetric in the products is their error, and what is symmetric in it is as large.
        rounding = max(criteria.rounding_threshold(norm, epsilon, dimension), risk.product_error, asymmetry)
        return Spectrum(
            nodes=nodes,
            weights=weights,
            residuals=residuals,
            steps_per_probe=tuple(len(run.alphas) for run in runs),
            dimension=dimension,
            num_samples=round(risk.num_samples),
            loss=risk.loss,
            rounding=rounding,
            matvecs=operator.matvecs,
            seconds=time.perf_counter() - self._started,
            gradient_equivalents=self._cost,
            matrix=options.matrix if options.preconditioner is None else f"preconditioned {options.matrix}",
            probe=options.probe,
            seed=options.seed,
            mode=name_of_mode(options.mode),
            strategy=risk.strategy,
            strategy_reason=risk.strategy_reason,
            basis=plan.basis,
            predicted_memory=plan.predicted(risk.graph_bytes),
            confidence=options.confidence,
            tolerance=options.tolerance,
            asymmetry=asymmetry / norm if norm else 0.0,
            verified=risk.verification.verdict(exact=risk.is_exact),
            verification=risk.verification.words,
            reason=criteria.undefined_reason(norm, risk.loss, self._squared_weight_norm, epsilon, rounding),
            **({} if self._sampling is None else asdict(self._sampling)),
        )

    def leading(self, count: int) -> tuple[Array, Tensor, Array]:
        """Return the largest Ritz values of the first process, descending, their vectors and residuals.

        Returns:
            values: Shape (count,).
            vectors: One in each row, of unit length, shape (count, n).
            residuals: ‖Hy − θy‖, shape (count,): an eigenvalue lies within this of each value.

        Raises:
            ValueError: If the process found fewer.
        """
        run = self._runs[0]
        values, coefficients = tridiagonal_eigh(run.alphas, run.betas)
        if len(values) < count:
            msg = (
                f"Lanczos found {len(values)} eigenvalues in {len(run.alphas)} steps, fewer than the {count} asked for."
            )
            raise ValueError(msg)
        last = np.arange(len(values) - 1, len(values) - count - 1, -1)
        vectors = torch.nn.functional.normalize(run.ritz_vectors(coefficients[:, last]), dim=1)
        return values[last], vectors, float(run.betas[-1]) * np.abs(coefficients[-1, last])


def run_together(estimations: Sequence[Estimation], tick: Callable[[], None] | None = None) -> None:
    """Run estimations of different blocks of one matrix, each step of all of them with one pass over the samples.

    Args:
        estimations: These; one, of all of the matrix, too.
        tick: Called after every step.

    Raises:
        ArithmeticError: If a product is NaN or infinite; the message names the batch.
        ValueError: If the samples cannot be cut into groups for the sampling error.
    """
    pending = list(estimations)
    while pending:
        products = block_products([e.operator for e in pending], [e.vector for e in pending])
        running = []
        for estimation, product in zip(pending, products, strict=True):
            try:
                has_ended = estimation.update(product)
            except NonFiniteProductError as error:
                raise estimation.operator.explain_non_finite(error.vector) from None
            if not has_ended:
                running.append(estimation)
        pending = running
        if tick is not None:
            tick()
    cost = estimations[0].operator.risk.gradient_equivalents() if len(estimations) == 1 else None
    for estimation in estimations:
        estimation.finish(cost)


def _start_vector(operator: DiagonalBlock, generator: torch.Generator, probe: Probe) -> Tensor:
    """Draw a start vector, shape (n,): the same on every device and in every process."""
    space = operator.space
    vector = space.gaussian(generator) if probe == "gaussian" else space.signs(generator)
    return vector.to(device=operator.risk.device, dtype=operator.risk.dtype)
