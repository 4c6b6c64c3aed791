"""One run: measure a network at initialization, train it, and measure it at the trained weights and around them."""

from __future__ import annotations

import copy
import itertools
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from examples.sample_study.data import fit, load
from examples.sample_study.outcomes import Displaced, Numbers, save
from examples.sample_study.settings import INITIAL, TRAINED
from lightning_hesd import hessian_spectrum
from lightning_hesd.sample_size.bounds import network_bound, weight_norm
from lightning_hesd.sample_size.loss_differences import differences_of
from lightning_hesd.sample_size.sample_losses import mean_loss, per_sample_losses

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from examples.sample_study.settings import Run

    Batch = tuple[Tensor, Tensor]


def loss_fn(module: Any, batch: Batch) -> Tensor:
    """Return the losses of samples, shape (batch,)."""
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def make_network(width: int, depth: int) -> nn.Sequential:
    """Return a network with ReLU after all layers but the last, without biases, as in the paper's formulas."""
    sizes = [64, *[width] * depth, 10]
    layers = [(nn.Linear(before, after, bias=False), nn.ReLU()) for before, after in itertools.pairwise(sizes)]
    return nn.Sequential(*list(itertools.chain(*layers))[:-1])


def trained_network(run: Run, x: Tensor, y: Tensor) -> tuple[nn.Module, nn.Module]:
    """Return a network at PyTorch's initialization, and the trained network."""
    torch.manual_seed(run.seed)
    network = make_network(run.width, run.depth)
    initial = copy.deepcopy(network)
    fit(network, x, y, run.setup.epochs, run.setup)
    # Measured in double precision: losses of deep networks at initialization differ in the sixth digit.
    return initial.double(), network.double()


def run(settings: Run, out: Path) -> None:
    """Train and measure, and write the outcome."""
    torch.set_num_threads(1)  # more threads hardly help here, and the other worker needs the core
    started = time.perf_counter()
    x, y = load(settings.inputs, settings.setup, out)
    initial, trained = trained_network(settings, x, y)
    batch = x.double(), y
    numbers = {INITIAL: measure(initial, batch, settings), TRAINED: measure(trained, batch, settings)}
    losses = {INITIAL: losses_of(initial, batch), TRAINED: losses_of(trained, batch)}
    moved = displaced(trained, batch, settings)
    seconds = time.perf_counter() - started
    save(settings, out, numbers=numbers, displaced=moved, losses=losses, seconds=seconds)


def losses_of(network: nn.Module, batch: Batch) -> NDArray[Any]:
    """Return the losses of all samples."""
    return per_sample_losses(network, [batch], loss_fn)


def measure(network: nn.Module, batch: Batch, settings: Run) -> Numbers:
    """Return norms and bounds of a network."""
    options: dict[str, Any] = {"steps": settings.setup.steps, "seed": settings.seed}
    hessian = hessian_spectrum(network, [batch], mean_loss(loss_fn), **options)
    ggn = hessian_spectrum(
        network,
        [batch],
        mean_loss(loss_fn),
        matrix="ggn",
        output_fn=lambda module, given: module(given[0]),
        output_loss=lambda outputs, given: F.cross_entropy(outputs, given[1]),
        **options,
    )
    x, y = batch
    with torch.no_grad():
        accuracy = float((network(x).argmax(1) == y).double().mean())
        entry = max(float(p.abs().max()) for p in network.parameters())
    return Numbers(
        accuracy=accuracy,
        ggn=ggn.lambda_max,
        hessian=max(hessian.lambda_max, -hessian.lambda_min),
        weight_norm=weight_norm(network),
        largest_entry=entry,
        published=network_bound(network, x, kind="published", matrix="ggn"),
        tight_ggn=network_bound(network, x, matrix="ggn"),
        tight_hessian=network_bound(network, x),
    )


def displaced(network: nn.Module, batch: Batch, settings: Run) -> list[Displaced]:
    """Return how the loss settles at several distances from the weights, in random directions."""
    weights = parameters_to_vector(network.parameters()).detach()
    generator, setup = torch.Generator().manual_seed(settings.seed), settings.setup
    moved, found = copy.deepcopy(network), []
    for radius in setup.radii:
        for _ in range(setup.directions if radius else 1):
            direction = torch.randn(len(weights), generator=generator, dtype=weights.dtype)
            step = direction * (radius * weights.norm() / direction.norm())
            vector_to_parameters(weights + step, moved.parameters())
            settling = differences_of(losses_of(moved, batch), orders=setup.orders, seed=settings.seed)
            largest = float((settling.mean * (settling.sample_sizes + 1)).max()) / 2
            found.append(Displaced(radius, float(step.norm()), settling.constant, largest))
    return found
