"""Lanczos runs on curvature operators, when they stop, and the spectrum that follows from them."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_hesd.numerics.analysis.ritz_vectors import layers_of_runs, losses_along_extremes, subspace_overlap
from lightning_hesd.numerics.analysis.sampling_error import sampling_error
from lightning_hesd.numerics.analysis.stopping import COARSE, FOR_C_T, FOR_DENSITY, CheckSchedule, c_t_excess
from lightning_hesd.numerics.inputs.cuts import UnsplittableBatchError
from lightning_hesd.numerics.isolation.modes import mode_name
from lightning_hesd.numerics.krylov.lanczos import Lanczos, NonFiniteProductError
from lightning_hesd.numerics.krylov.ritz import gauss_quadrature, tridiagonal_eigh
from lightning_hesd.numerics.krylov.vectors import normalized
from lightning_hesd.numerics.operators.diagonal_block import block_products, choose_difference_step, explain_non_finite
from lightning_hesd.spectra import criteria, quadrature
from lightning_hesd.spectra.spectrum import MIN_SCALE, Spectrum

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from lightning_hesd.numerics.analysis.ritz_vectors import Layers
    from lightning_hesd.numerics.inputs.options import AnalysisOptions
    from lightning_hesd.numerics.operators.diagonal_block import DiagonalBlock
    from lightning_hesd.numerics.operators.memory import MemoryPlan

    Array = NDArray[np.float64]


def run_lanczos(
    operators: Sequence[DiagonalBlock],
    options: AnalysisOptions,
    plan: MemoryPlan,
    started: float,
    report: Callable[[int, int], None] | None = None,
) -> list[Estimation]:
    """Run Lanczos on diagonal blocks of one matrix; a step of all of them takes one pass over the samples.

    Args:
        operators: The blocks, with no parameter in two of them.
        options: Number of probes and steps, and accuracy.
        plan: Place of the Krylov basis.
        started: Time at which the analysis began, by `time.perf_counter`.
        report: Called after every step with the number of steps taken and the largest possible number.

    Returns:
        The finished runs on each block.

    Raises:
        ArithmeticError: If a product is NaN or infinite; the message names the batch.
    """
    choose_difference_step(operators)
    estimations = [Estimation(operator, options, plan, started) for operator in operators]
    running, steps = estimations, 0
    while running:
        products = block_products([e.operator for e in running], [e.vector for e in running])
        running = [e for e, product in zip(running, products, strict=True) if not _has_ended(e, product)]
        steps += 1
        if report is not None:
            report(steps, options.probes * options.steps)
    cost = operators[0].risk.gradient_equivalents() if len(operators) == 1 else None
    for estimation in estimations:
        estimation.finish(cost)
    return estimations


def _has_ended(estimation: Estimation, product: Tensor) -> bool:
    try:
        return estimation.update(product)
    except NonFiniteProductError as error:
        raise explain_non_finite(estimation.operator, error.vector) from None


class Estimation:
    """The Lanczos runs on one operator, one after the other for each probe, and the spectrum that they give."""

    def __init__(self, operator: DiagonalBlock, options: AnalysisOptions, plan: MemoryPlan, started: float) -> None:
        """Start the run of the first probe; arguments as for `run_lanczos`."""
        self._started = started
        self.operator = operator
        self._options = options
        self._plan = plan
        self._runs: list[Lanczos] = []
        self._sampling: dict[str, Any] = {}
        self._cost: float | None = None
        self._squared_weight_norm = operator.squared_weight_norm()
        self._generator = torch.Generator().manual_seed(options.seed)
        self._start_run()

    def _start_run(self) -> None:
        """Start the Lanczos run of the next probe."""
        run = Lanczos(
            self.operator.matvec,
            self._draw(),  # without a name, so that its memory is freed
            self._options.steps,
            basis=self._plan.basis,
            space=self.operator.space,
        )
        self._runs.append(run)
        self._checks = CheckSchedule()

    def _draw(self) -> Tensor:
        """Draw a random vector, shape (n,)."""
        space, risk = self.operator.space, self.operator.risk
        draw = space.gaussian if self._options.probe == "gaussian" else space.signs
        return draw(self._generator).to(risk.device, risk.dtype)

    @property
    def vector(self) -> Tensor:
        """The vector whose product comes next, shape (n,)."""
        return self._runs[-1].vector

    def update(self, product: Tensor) -> bool:
        """Take one Lanczos step with Hv of `vector`, shape (n,); return whether the runs of all probes have ended."""
        run = self._runs[-1]
        wants_accuracy = self._options.tolerance is not None
        if not run.update(product) and not (wants_accuracy and run.may_stop and self._is_accurate()):
            return False
        if len(self._runs) == self._options.probes:
            return True
        self._start_run()
        return False

    def finish(self, cost: float | None) -> None:
        """Take the cost of a product, in gradients, after all runs; estimate the sampling error if it is wanted."""
        self._cost = cost
        if self._options.wants_sampling_error:
            self._estimate_sampling_error(self._runs)

    def _is_accurate(self) -> bool:
        """Whether the present run has found C_t as accurately as the options ask for."""
        running = self._runs[-1:]
        steps = len(running[0].alphas)
        if not self._checks.is_due(steps):
            return False
        if self._options.stop == "c_t":
            excess = self._excess(running[0])
            self._checks.after(steps, excess, FOR_C_T)
            if excess > 0:
                return False
        spectrum = self.spectrum(running)
        if self._options.tolerance == "auto" and spectrum.c_t_error <= COARSE * max(abs(spectrum.c_t), MIN_SCALE):
            self._estimate_sampling_error(running)
            spectrum = self.spectrum(running)
        if spectrum.stop == "density":
            excess = math.log(spectrum.error / spectrum.allowed_error) if spectrum.allowed_error else math.inf
            self._checks.after(steps, excess, FOR_DENSITY)
        return spectrum.converged

    def _excess(self, run: Lanczos) -> float:
        """Return how far the interval of C_t is from accurate; positive if certainly not."""
        asymmetry = float(run.asymmetries.max())
        return c_t_excess(
            run,
            self._options.tolerance or 0.0,
            self._sampling.get("c_t_sampling_error"),
            lambda norm: self._rounding(norm, asymmetry),
            dimension=self.operator.dimension,
            confidence=self._options.confidence,
        )

    def _estimate_sampling_error(self, runs: Sequence[Lanczos]) -> None:
        """Estimate the sampling error, or find out why that is impossible, unless it has been tried before."""
        if self._sampling:
            return
        spectrum = self.spectrum(runs)
        if spectrum.reason is not None:
            self._sampling = {"sampling_reason": f"C_t is undefined: {spectrum.reason}"}
        elif spectrum.lambda_max <= spectrum.rounding:
            self._sampling = {"sampling_reason": "no eigenvalue is positive"}
        else:
            try:
                self._sampling = vars(sampling_error(self.operator, runs))
            except UnsplittableBatchError as error:
                self._sampling = {"sampling_reason": str(error)}

    @property
    def epsilon(self) -> float:
        """Machine epsilon of the coarsest dtype among parameters, vectors and the graph of the loss."""
        risk = self.operator.risk
        dtypes = {risk.dtype, *(p.dtype for p in self.operator.parameters)}
        return max(risk.epsilon, *(torch.finfo(dtype).eps for dtype in dtypes))

    @property
    def asymmetry(self) -> float:
        """Distance of the products from those of a symmetric matrix, relative to the norm of T: see `Spectrum`."""
        norm = max(float(np.abs(gauss_quadrature(run.alphas, run.betas)[0]).max()) for run in self._runs)
        largest = max(float(run.asymmetries.max()) for run in self._runs)
        return largest / norm if norm else 0.0

    def _rounding(self, norm: float, asymmetry: float) -> float:
        """Return the rounding of eigenvalues, given the norms of T and of the asymmetry of products."""
        rounding = criteria.rounding_threshold(norm, self.epsilon, self.operator.dimension)
        # Asymmetry is error; the symmetric part of the error, which cannot be seen, is as large.
        return max(rounding, self.operator.risk.product_error, asymmetry)

    def spectrum(self, runs: Sequence[Lanczos] | None = None) -> Spectrum:
        """Return the spectrum from some of the runs, by default from all."""
        runs = runs or self._runs
        operator, options, plan = self.operator, self._options, self._plan
        nodes, weights, residuals = quadrature.stack_rules([gauss_quadrature(run.alphas, run.betas) for run in runs])
        norm = float(np.nanmax(np.abs(nodes)))
        risk = operator.risk
        asymmetry = max(float(run.asymmetries.max()) for run in runs)
        rounding = self._rounding(norm, asymmetry)
        return Spectrum(
            nodes=nodes,
            weights=weights,
            residuals=residuals,
            steps_per_probe=tuple(len(run.alphas) for run in runs),
            dimension=operator.dimension,
            num_samples=round(risk.num_samples),
            loss=risk.loss,
            rounding=rounding,
            matvecs=operator.matvecs,
            seconds=time.perf_counter() - self._started,
            gradient_equivalents=self._cost,
            matrix=options.matrix if options.preconditioner is None else f"preconditioned {options.matrix}",
            probe=options.probe,
            seed=options.seed,
            mode=mode_name(options.mode),
            strategy=risk.strategy,
            strategy_reason=risk.strategy_reason,
            basis=plan.basis,
            predicted_memory=plan.predicted(risk.graph_bytes, risk.comparison_bytes),
            confidence=options.confidence,
            tolerance=options.tolerance,
            stop=options.stop,
            asymmetry=asymmetry / norm if norm else 0.0,
            verified=risk.verification.verdict(exact=risk.is_exact),
            verification=risk.verification.words,
            reason=criteria.undefined_reason(norm, risk.loss, self._squared_weight_norm, self.epsilon, rounding),
            squared_weight_norm=self._squared_weight_norm,
            **self._sampling,
        )

    def spectrum_and_vectors(self, layers: Layers) -> Spectrum:
        """Return the spectrum from all runs, with what the Ritz vectors tell.

        Args:
            layers: The layers whose curvature they tell.

        Raises:
            ArithmeticError: If a product is NaN or infinite; the message names the batch.
        """
        spectrum = self.spectrum()
        if spectrum.basis == "none":
            return spectrum
        operator, options = self.operator, self._options
        probes = [self._draw() for _ in range(options.layer_probes)]
        by_layer = layers_of_runs(operator, self._runs, layers, probes, spectrum)
        overlap = subspace_overlap(operator, self._runs[0], options.track_eigenvectors)
        found: dict[str, Any] = {"by_layer": by_layer, "subspace_overlap": overlap}
        # Along eigenvectors of a part of the Hessian the loss is curved as the whole Hessian is.
        if options.loss_along_eigenvectors and options.matrix == "hessian":
            limit = math.sqrt(self._squared_weight_norm)
            found["losses_along"] = losses_along_extremes(operator, self._runs, spectrum, limit)
        return replace(spectrum, **found, matvecs=operator.matvecs, seconds=time.perf_counter() - self._started)

    def leading(self, count: int) -> tuple[Array, Tensor, Array]:
        """Return the largest Ritz values of the first run, descending, their vectors and residuals.

        Returns:
            values: Shape (count,).
            vectors: One in each row, of unit length, shape (count, n).
            residuals: ‖Hy − θy‖, shape (count,): an eigenvalue lies within this of each value.

        Raises:
            ValueError: If the run found fewer.
        """
        run = self._runs[0]
        values, coefficients = tridiagonal_eigh(run.alphas, run.betas)
        if len(values) < count:
            msg = (
                f"Lanczos found {len(values)} eigenvalues in {len(run.alphas)} steps, fewer than the {count} asked for."
            )
            raise ValueError(msg)
        last = np.arange(len(values) - 1, len(values) - count - 1, -1)
        vectors = normalized(run.ritz_vectors(coefficients[:, last]))
        return values[last], vectors, float(run.betas[-1]) * np.abs(coefficients[-1, last])
