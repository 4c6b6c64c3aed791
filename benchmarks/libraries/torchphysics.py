"""TorchPhysics: differential equations. Its conditions draw their own points, within `training_step`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.libraries.case import Case, Library
from benchmarks.libraries.common import QUIET
from benchmarks.libraries.trial import seed_everything

if TYPE_CHECKING:
    from pathlib import Path


def solver(*, resampled: bool, measured: bool) -> Any:
    """Return a solver of Poisson's equation on the unit square.

    Args:
        resampled: Whether each step draws its points, or all take the same ones.
        measured: Whether there are data, too, which the solver itself reads from a dataloader.
    """
    import torch
    import torchphysics as tp

    seed_everything()
    x, u = tp.spaces.R2("x"), tp.spaces.R1("u")
    square = tp.domains.Parallelogram(x, [0, 0], [1, 0], [0, 1])
    inside, border = (tp.samplers.RandomUniformSampler(domain, n_points=20) for domain in (square, square.boundary))
    if not resampled:
        inside, border = inside.make_static(), border.make_static()
    model = tp.models.FCN(input_space=x, output_space=u, hidden=(6, 6))
    conditions = [
        tp.conditions.PINNCondition(model, inside, lambda u, x: tp.utils.laplacian(u, x) - 1, name="inside"),
        tp.conditions.PINNCondition(model, border, lambda u: u, name="border", weight=10.0),
    ]
    if measured:
        points = torch.rand(40, 2)
        data = tp.utils.PointsDataLoader(
            (tp.spaces.Points(points, x), tp.spaces.Points(points.prod(1, keepdim=True), u)), batch_size=8
        )
        conditions.append(tp.conditions.DataCondition(model, data, norm=2, relative=False))
    return tp.solver.Solver(conditions)


def train(callbacks: list[Any], folder: Path, **options: bool) -> Any:
    """Solve it.

    Args:
        callbacks: Callbacks of the Trainer.
        folder: Output folder.
        **options: Options of the solver.
    """
    import pytorch_lightning as pl

    module = solver(**options)
    trainer = pl.Trainer(max_steps=4, callbacks=callbacks, num_sanity_val_steps=0, default_root_dir=folder, **QUIET)
    trainer.fit(module)
    return module


LIBRARY = Library(
    name="torchphysics",
    kind="differential equations",
    requirements=("pytorch-lightning==2.6.6", "matplotlib", "trimesh", "shapely", "networkx", "importlib_metadata"),
    without_dependencies=("torchphysics==1.1.2",),
    cases=(
        Case("Solver, static points", lambda *where: train(*where, resampled=False, measured=False)),
        Case("Solver, new points at each step", lambda *where: train(*where, resampled=True, measured=False)),
        Case("Solver with DataCondition", lambda *where: train(*where, resampled=True, measured=True)),
    ),
)
