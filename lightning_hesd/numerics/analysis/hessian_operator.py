"""`HessianOperator`: the Hessian of a mean loss, its Gauss-Newton matrix or the residual, as a linear operator."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_hesd.numerics.analysis.preparation import opened_operators
from lightning_hesd.numerics.inputs.batches import weighted_batches
from lightning_hesd.numerics.inputs.options import AnalysisOptions, MatrixName, StrategyName
from lightning_hesd.numerics.inputs.parameters import select_parameters, vector_dtype
from lightning_hesd.numerics.isolation.snapshot import restore_state
from lightning_hesd.numerics.operators.diagonal_block import DiagonalBlock, choose_difference_step
from lightning_hesd.numerics.operators.losses_along import losses_along
from lightning_hesd.numerics.operators.strategies import AnalysisCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from lightning_hesd.numerics.analysis.evaluation import LossFunction
    from lightning_hesd.numerics.isolation.modes import Mode


class HessianOperator:
    """The Hessian of a mean loss, or its Gauss-Newton matrix or residual, known by its products with vectors.

    H = ∇²_w Σ_b (w_b/W) ℓ_b with ℓ_b the mean loss over batch b, w_b its weight and W = Σ w_b. Vectors have shape (n,):
    the analyzed parameters, flattened and joined in the order of `module.named_parameters()`, tied ones once.

    As a context manager it keeps the gradient graphs of the batches, as far as the memory budget allows, so that a
    product costs about two gradients. Inside, the module is in the state of the analysis (`mode`, no autocast, no
    fused attention, own gradients set aside), and its parameters must not be changed; on leaving, also by an exception,
    all of that is put back. Outside of the context, each call of `matvec` or `matmat` enters it by itself, so that the
    product belongs to the parameters of that moment, and takes the time of building the graphs on top.

    Loss and derivatives are compared with differences when the context is first entered, as in `hessian_spectrum`.
    The options are those of `hessian_spectrum` that define the matrix and its products: see `AnalysisOptions`.

    Attributes:
        shape: Number of rows and columns, (n, n).
        dtype: Floating-point type of the products.
        loss: Mean loss when the context was last entered; None before.
        strategy: How the products were computed then, and `strategy_reason` why; None before.
        verified: Whether the products agree with differences of the loss: "yes" or "unknown"; None before.

    Args:
        module: The module, on the device of the batches.
        batches: As for `hessian_spectrum`; read once and kept.
        loss_fn: `loss_fn(module, batch)` -> mean loss over the batch, a scalar tensor.

    Raises:
        ValueError: If an argument is out of range, or there is no parameter to analyze.

    Examples:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> data = (torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))
        >>> hessian = HessianOperator(model, [data], lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]))
        >>> with hessian:
        ...     hessian @ torch.tensor([1.0, 1.0])
        tensor([1., 4.])
    """

    __array_ufunc__ = None  # `operator @ array` is a TypeError; `to_scipy()` multiplies NumPy arrays

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        loss_fn: LossFunction,
        *,
        matrix: MatrixName = AnalysisOptions.matrix,
        output_fn: Callable[[Any, Any], Any] | None = AnalysisOptions.output_fn,
        output_loss: Callable[[Any, Any], Any] | None = AnalysisOptions.output_loss,
        parameters: Callable[[str, nn.Parameter], bool] | None = AnalysisOptions.parameters,
        include_frozen: bool = AnalysisOptions.include_frozen,
        mode: Mode = "eval",
        strategy: StrategyName = AnalysisOptions.strategy,
        batch_weight: Literal["tokens"] | Callable[[Any], float] | None = AnalysisOptions.batch_weight,
        seed: int = AnalysisOptions.seed,
        dtype: torch.dtype | None = AnalysisOptions.dtype,
        memory_budget: int | None = AnalysisOptions.memory_budget,
        preconditioner: Mapping[str, Tensor] | None = AnalysisOptions.preconditioner,
    ) -> None:
        self._options = options = AnalysisOptions(
            matrix=matrix,
            output_fn=output_fn,
            output_loss=output_loss,
            parameters=parameters,
            include_frozen=include_frozen,
            mode=mode,
            strategy=strategy,
            batch_weight=batch_weight,
            seed=seed,
            dtype=dtype,
            memory_budget=memory_budget,
            preconditioner=preconditioner,
            basis="none",
        )
        self._module = module
        self._loss_fn = loss_fn
        self._parameters = list(select_parameters(module, options).values())
        self._batches = weighted_batches(batches, batch_weight)
        n = sum(p.numel() for p in self._parameters)
        self.shape = (n, n)
        self.dtype = dtype or vector_dtype(self._parameters)
        self.loss: float | None = None
        self.strategy: str | None = None
        self.strategy_reason: str | None = None
        self.verified: str | None = None
        self._cache = AnalysisCache()
        self._entered = 0
        self._versions: list[int] = []
        self._contexts = contextlib.ExitStack()
        self._operator: DiagonalBlock | None = None

    @property
    def device(self) -> torch.device:
        """Device of the parameters and of vectors."""
        return self._parameters[0].device

    def __repr__(self) -> str:
        return f"{type(self).__name__}(matrix={self._options.matrix!r}, shape={self.shape}, dtype={self.dtype})"

    def __enter__(self) -> Self:
        if not self._entered:
            with restore_state(), contextlib.ExitStack() as stack:  # evaluations seed the global generators
                opened = opened_operators(
                    self._module, self._batches, self._loss_fn, self._options, [self._parameters], cache=self._cache
                )
                [operator], _ = stack.enter_context(opened)
                choose_difference_step([operator])
                self._contexts, self._operator = stack.pop_all(), operator
                self._versions = self._counted()
            risk = operator.risk
            self.loss, self.strategy, self.strategy_reason = risk.loss, risk.strategy, risk.strategy_reason
            self.verified = risk.verification.verdict(exact=risk.is_exact)
        self._entered += 1
        return self

    def _counted(self) -> list[int]:
        """Return how often each parameter was changed in place."""
        return [p._version for p in self._parameters]  # noqa: SLF001

    def __exit__(self, *error: object) -> None:
        self._entered -= 1
        if not self._entered:
            self._operator = None
            with restore_state():  # keep what the caller has drawn meanwhile
                self._contexts.close()

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with a vector, shape (n,), in the dtype of the operator.

        Args:
            vector: Shape (n,), finite; moved to the device and dtype of the operator.

        Raises:
            ValueError: If the vector has another shape or is not finite.
            ArithmeticError: If the loss or the product is NaN or infinite; the message names the batch.
            RuntimeError: If the loss cannot be differentiated twice, its derivatives are wrong, or the parameters were
                changed inside the context.
        """
        vector = self._checked(vector)
        # Evaluations seed the global generators: a caller who draws vectors between products would get the same again.
        with self, restore_state(), torch.inference_mode(mode=False), torch.enable_grad():
            assert self._operator is not None  # noqa: S101 - the context sets it
            if self._counted() != self._versions:
                msg = (
                    "the parameters were changed inside the context of the operator, whose graphs belong to the values "
                    "before: leave the context, which puts these back, and change them outside."
                )
                raise RuntimeError(msg)
            return self._operator.finite_matvec(vector)

    def _checked(self, vector: Tensor) -> Tensor:
        """Return a vector on the device and in the dtype of the operator.

        Raises:
            ValueError: If it has another shape or is not finite.
        """
        if vector.shape != self.shape[:1]:
            msg = f"`vector` must have shape {self.shape[:1]}, got {tuple(vector.shape)}; `matmat` takes columns."
            raise ValueError(msg)
        vector = vector.detach().to(self.device, self.dtype)
        if not bool(vector.isfinite().all()):
            msg = "`vector` must be finite, got NaN or infinite elements."
            raise ValueError(msg)
        return vector

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return the products with the columns of a matrix, shape (n, k), one after the other.

        Args:
            vectors: Columns, shape (n, k).

        Raises:
            ValueError: If the columns have another length or are not finite.
        """
        if vectors.ndim != 2 or len(vectors) != self.shape[0]:
            msg = f"`vectors` must have shape ({self.shape[0]}, k), got {tuple(vectors.shape)}."
            raise ValueError(msg)
        products = torch.empty(vectors.shape, dtype=self.dtype, device=self.device)
        with self:
            for column, vector in zip(products.T, vectors.T, strict=True):
                column.copy_(self.matvec(vector))
        return products

    def losses_along(self, direction: Tensor, distances: Iterable[float]) -> list[float]:
        """Return the mean loss at the weights plus each multiple of a direction, one evaluation of all batches each.

        Along a unit eigenvector v with eigenvalue λ the loss is L + (g·v)t + ½λt² for small t. The weights are restored
        bit by bit.

        Args:
            direction: Shape (n,), finite; in the coordinates of the preconditioner, if there is one.
            distances: Multiples of the direction.

        Returns:
            The losses; NaN where the loss function raises a ValueError or an ArithmeticError.

        Raises:
            ValueError: If the direction has another shape or is not finite.
        """
        direction = self._checked(direction)
        with self, restore_state(), torch.inference_mode(mode=False), torch.enable_grad():
            assert self._operator is not None  # noqa: S101 - the context sets it
            return losses_along(self._operator, direction, list(distances))

    def __matmul__(self, vectors: Tensor) -> Tensor:
        if not isinstance(vectors, Tensor):
            return NotImplemented
        return self.matvec(vectors) if vectors.ndim == 1 else self.matmat(vectors)

    def __rmatmul__(self, vectors: Tensor) -> Tensor:
        """Return vᵀH, which is (Hv)ᵀ."""
        if not isinstance(vectors, Tensor):
            return NotImplemented
        return self.matvec(vectors) if vectors.ndim == 1 else self.matmat(vectors.T).T

    def to_scipy(self) -> Any:
        """Return the operator as a `scipy.sparse.linalg.LinearOperator` on NumPy arrays.

        Use it inside the context of this operator, so that the graphs are built once.

        Raises:
            ImportError: If SciPy is not installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator  # noqa: PLC0415 - optional
        except ImportError as error:
            msg = "`to_scipy` needs SciPy, which is not installed: pip install scipy."
            raise ImportError(msg) from error

        def matvec(vector: Any) -> Any:
            return self.matvec(torch.as_tensor(vector).reshape(-1)).cpu().numpy()

        def matmat(vectors: Any) -> Any:
            return self.matmat(torch.as_tensor(vectors)).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype, device="cpu").numpy().dtype
        return LinearOperator(self.shape, matvec, rmatvec=matvec, matmat=matmat, rmatmat=matmat, dtype=dtype)
