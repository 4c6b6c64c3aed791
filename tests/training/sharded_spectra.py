"""Spectra with sharded parameters, without a Trainer; `test_sharded.py` starts this as several processes.

Every process writes what it found to `<out>/rank<rank>.json`; process zero adds what an ordinary copy of the
network gives.
"""

import argparse
import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from lightning_hesd import Spectrum, hessian_spectrum
from lightning_hesd.numerics.analysis.engine import analyze
from lightning_hesd.numerics.distributed.checked_collectives import CheckedCollectives
from lightning_hesd.numerics.distributed.fully_sharded import FullySharded
from lightning_hesd.numerics.inputs.batches import WeightedBatch
from lightning_hesd.numerics.inputs.options import analysis_options
from tests.meter import CountingMeter
from tests.training.broken import out_of_memory

Batch = tuple[Tensor, Tensor]

STEPS = 3


class Net(nn.Module):
    """With a block that is evaluated anew in the backward pass, and a layer of one unit, smaller than the processes."""

    def __init__(self, *, checkpointed: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.first = nn.Linear(6, 5)
        self.block = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 1, bias=False))
        self.last = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        hidden = checkpoint(self.block, hidden, use_reentrant=False) if self.checkpointed else self.block(hidden)
        return self.last(torch.tanh(hidden))


def loss_fn(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def split_loss(matrix: str) -> dict[str, Any]:
    """The options for a part of the Hessian."""
    return {
        "matrix": matrix,
        "output_fn": lambda module, batch: module(batch[0]),
        "output_loss": lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
    }


ANALYSES: dict[str, dict[str, Any]] = {
    "graph": {"steps": 7},
    "recompute": {"strategy": "recompute", "basis": "none"},
    "differences": {"strategy": "finite_difference", "steps": 2},
    "random signs": {"probe": "rademacher", "probes": 2, "steps": 2, "loss_along_eigenvectors": True},
    "stopped early": {"steps": 7, "tolerance": 0.9},
    "ggn": split_loss("ggn"),
    "residual": split_loss("residual"),
}


class Times(torch.autograd.Function):
    """A product with a weight that no operation of PyTorch sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return slope @ weight, slope.T @ x


class Process:
    """What one process does."""

    def __init__(self, rank: int, devices: int, *, thorough: bool) -> None:
        self.rank = rank
        self.thorough = thorough
        self.devices = devices
        self.mesh = init_device_mesh("cpu", (devices,))

    def sharded(self, module: nn.Module, parts: list[nn.Module]) -> nn.Module:
        # The policy would have the analysis done in half precision.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        for part in [*parts, module]:
            fully_shard(part, mesh=self.mesh, mp_policy=policy)
        return module

    def network(self, dtype: torch.dtype, *, checkpointed: bool = True) -> nn.Module:
        net = Net(checkpointed=checkpointed).to(dtype)
        return self.sharded(net, [net.first, net.block])

    def own(self, batches: list[Batch]) -> list[WeightedBatch]:
        """This process's share, or a padding batch."""
        weighted = [WeightedBatch(batch, float(len(batch[1])), index) for index, batch in enumerate(batches)]
        padding = WeightedBatch(batches[0], float(len(batches[0][1])), 0, is_padding=True)
        return weighted[self.rank :: self.devices] or [padding]

    def analyze(self, module: nn.Module, batches: list[Batch], loss: Callable[..., Tensor], **options: Any) -> Spectrum:
        ranks = CheckedCollectives(torch.device("cpu"))
        chosen = analysis_options(**{"steps": STEPS, **options})
        sharding = FullySharded(module, ranks)
        return ranks.run_together(lambda: analyze(module, self.own(batches), loss, chosen, sharding=sharding))

    def findings(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        data = [(torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)) for n in (8, 5)]
        result: dict[str, Any] = {"spectra": {}, "expected": {}}
        batches = [(x.double(), y) for x, y in data]

        def compare(name: str, plain: nn.Module, sharded: nn.Module, data: list[Batch], **options: Any) -> None:
            if self.rank == 0:
                found = hessian_spectrum(plain, data, loss_fn, **{"steps": STEPS, **options})
                result["expected"][name] = describe(found)
            result["spectra"][name] = describe(self.analyze(sharded, data, loss_fn, **options))

        net, plain = self.network(torch.float64), Net().double()
        for name, options in ANALYSES.items() if self.thorough else [("graph", ANALYSES["graph"])]:
            compare(name, plain, net, batches, **options)
        if not self.thorough:
            return result
        compare("float32", Net(), self.network(torch.float32), [(x, y) for x, y in data])
        # Graphs that were retained before a comparison moved the weights: their backward pass needs the present ones.
        whole = Net(checkpointed=False).double()
        compare("without checkpoints", whole, self.network(torch.float64, checkpointed=False), batches)
        # The last weight that was gathered is the first that is needed after it was moved.
        single = nn.Linear(6, 3, bias=False).double()
        weight = self.sharded(copy.deepcopy(single), [])
        compare("differences of a single weight", single, weight, batches, strategy="finite_difference")
        return {**result, "failures": self.failures(batches), "untouched": self.untouched(batches), **self.memory()}

    def failures(self, batches: list[Batch]) -> dict[str, str]:
        """What comes of losses that go wrong in the last process, or in all; and that the processes stay in step."""
        net = self.network(torch.float64)
        is_last = self.rank == self.devices - 1

        def shortcut(module: Any, batch: Batch) -> Tensor:
            hidden = torch.tanh(module.first(batch[0]))
            hidden = hidden[:, :1] if is_last else module.block(hidden)
            return F.cross_entropy(module.last(hidden), batch[1])

        def broken(module: Any, batch: Batch) -> Tensor:
            hidden = module.first(batch[0])
            if is_last:
                out_of_memory()
            try:
                hidden = module.block(hidden)
            except RuntimeError:  # also that of the other process
                hidden = hidden[:, :1]
            return F.cross_entropy(module.last(hidden), batch[1])

        def infinite(module: Any, batch: Batch) -> Tensor:
            loss = loss_fn(module, batch)
            return loss / 0 if len(batch[1]) == 5 else loss

        def kinked(module: Any, batch: Batch) -> Tensor:
            zero = module(batch[0]).sum() * 0
            return loss_fn(module, batch) + (zero + (len(batch[1]) != 5)).abs().sqrt()

        def opaque(module: Any, batch: Batch) -> Tensor:
            return F.cross_entropy(Times.apply(batch[0], next(module.parameters()))[:, :3], batch[1])

        failures = {}
        for loss in (shortcut, broken, infinite, kinked, opaque):
            with pytest.raises(Exception) as caught:  # noqa: PT011 - which one it is, is what is noted
                self.analyze(net, batches, loss, steps=1)
            failures[loss.__name__] = f"{type(caught.value).__name__}: {caught.value}"
        failures["afterwards"] = repr(self.analyze(net, batches, loss_fn, **ANALYSES["graph"]).c_t)
        return failures

    def untouched(self, batches: list[Batch]) -> bool:
        """Whether an analysis between two training steps leaves no trace, down to the last bit."""

        def train(analyzes: bool) -> list[Tensor]:
            torch.manual_seed(7)
            net: Any = self.network(torch.float64)
            net.block.add_module("dropout", nn.Dropout(0.5))
            optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
            for step in range(3):
                net(batches[0][0]).float().square().mean().backward()
                if step != 1:  # gradients that are there stay
                    optimizer.step()
                    optimizer.zero_grad()
                with torch.no_grad():
                    net(batches[0][0])  # leaves the outermost parameters gathered
                if analyzes and step == 1:
                    self.analyze(net, batches, loss_fn, mode="train", steps=1)
            net.reshard()
            return [p.to_local() for p in net.parameters()]

        return all(map(torch.equal, train(analyzes=True), train(analyzes=False)))

    def memory(self) -> dict[str, Any]:
        """Most bytes that an analysis holds here, and, in process zero, with ordinary parameters."""

        def network() -> nn.Sequential:
            torch.manual_seed(0)
            return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.Tanh())))

        batches = [(torch.randn(2, 64), torch.zeros(2, dtype=torch.long))]
        net = network()
        with CountingMeter() as meter:
            self.analyze(self.sharded(net, list(net)[::2]), batches, loss_fn, steps=1)
        result = {"parameters": sum(p.numel() for p in net.parameters()) * 4, "bytes": meter.peak}
        if self.rank == 0:
            with CountingMeter() as meter:
                hessian_spectrum(network(), batches, loss_fn, steps=1)
            result["expected bytes"] = meter.peak
        return result


def describe(spectrum: Spectrum) -> dict[str, Any]:
    names = ("c_t", "lambda_max", "lambda_min", "loss", "rounding", "steps", "strategy", "num_samples", "dimension")
    return {
        **{name: getattr(spectrum, name) for name in names},
        "layers": {name: [layer.trace, layer.lambda_max_weight] for name, layer in spectrum.by_layer.items()},
        "losses along": spectrum.losses_along[:, 1].ravel().tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--thorough", type=int, default=0, help="1: everything, not only one way of making products")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    findings = Process(rank, dist.get_world_size(), thorough=bool(options.thorough)).findings()
    (options.out / f"rank{rank}.json").write_text(json.dumps(findings))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
