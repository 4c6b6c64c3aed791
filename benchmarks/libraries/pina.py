"""PINA: differential equations. A batch has points of each condition, whose derivatives are part of the loss."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.libraries.case import Case, Library
from benchmarks.libraries.common import QUIET
from benchmarks.libraries.trial import seed_everything

if TYPE_CHECKING:
    from pathlib import Path


def poisson(points: Any, found: Any) -> Any:
    """Return the residuals of Poisson's equation with a unit source."""
    from pina.operator import laplacian

    return laplacian(found, points, components=["u"], d=["x", "y"]) - 1


def problem() -> Any:
    """Return Poisson's problem on the unit square, with zeros at two sides."""
    from pina import Condition
    from pina.domain import CartesianDomain
    from pina.equation import Equation
    from pina.equation.zoo import FixedValue
    from pina.problem import SpatialProblem

    class Poisson(SpatialProblem):  # type: ignore[misc]
        output_variables = ["u"]  # noqa: RUF012 - as the library wants it
        spatial_domain = CartesianDomain({"x": [0, 1], "y": [0, 1]})
        domains = {  # noqa: RUF012 - the library's way
            "inside": spatial_domain,
            "top": CartesianDomain({"x": [0, 1], "y": 1.0}),
            "bottom": CartesianDomain({"x": [0, 1], "y": 0.0}),
        }
        conditions = {  # noqa: RUF012 - the library's way
            "inside": Condition(domain="inside", equation=Equation(poisson)),
            "top": Condition(domain="top", equation=FixedValue(0.0)),
            "bottom": Condition(domain="bottom", equation=FixedValue(0.0)),
        }

    made = Poisson()
    made.discretise_domain(n=20, mode="random")
    return made


def train(name: str, callbacks: list[Any], folder: Path, *, batch_size: int | None = None) -> Any:
    """Solve it.

    Args:
        name: The solver's class.
        callbacks: Callbacks of the Trainer.
        folder: Output folder.
        batch_size: Points in a batch; None: all.
    """
    import pina
    import pina.solver
    import torch
    from pina.model import FeedForward

    seed_everything()
    network = FeedForward(input_dimensions=2, output_dimensions=1, layers=[8], func=torch.nn.Tanh)
    module = getattr(pina.solver, name)(problem=problem(), model=network)
    trainer = pina.Trainer(
        module,
        max_epochs=2,
        batch_size=batch_size,
        train_size=1.0,
        val_size=0.0,
        test_size=0.0,
        callbacks=callbacks,
        default_root_dir=folder,
        **QUIET,
    )
    trainer.train()
    return module


LIBRARY = Library(
    name="pina-mathlab",
    kind="differential equations",
    requirements=("pina-mathlab==0.3.2.post2610",),
    cases=(
        Case("physics-informed", partial(train, "PhysicsInformedSingleModelSolver")),
        Case("physics-informed, in batches", partial(train, "PhysicsInformedSingleModelSolver", batch_size=8)),
        Case("gradient-enhanced", partial(train, "GradientPhysicsInformedSingleModelSolver")),
        Case("self-adaptive, two optimizers", partial(train, "SelfAdaptivePhysicsInformedSolver")),
        Case("residual-based weights", partial(train, "RBAPhysicsInformedSingleModelSolver")),
    ),
)
