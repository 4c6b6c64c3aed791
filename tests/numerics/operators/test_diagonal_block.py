"""Two real ranks: what they find together, and where a failure of one of them is raised."""

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hesd.numerics.analysis.api import layer_spectra
from lightning_hesd.numerics.analysis.engine import analyze, analyze_layers
from lightning_hesd.numerics.collectives import LOCAL, Collectives, DistributedCollectives
from lightning_hesd.numerics.inputs.batches import weighted_batches
from lightning_hesd.numerics.inputs.options import analysis_options
from tests import cases
from tests.programs import SERVER

STRATEGIES = ("graph", "recompute")
WORLD_SIZE = 2
STEPS = 10
SECONDS = 120.0
"""How long two ranks may take before they count as hung."""


def all_ranks() -> Collectives:
    return DistributedCollectives(torch.device("cpu"))


def run_analysis(
    strategy: str, loss_fn: Any = cases.cross_entropy, *, batches: Any = None, ranks: Any = LOCAL, **options: Any
) -> Any:
    module, all_batches, _ = cases.make("mlp")
    if options.get("mode") == "train":
        module.insert(2, nn.Dropout(0.5))
    batches = weighted_batches(all_batches) if batches is None else batches
    return analyze(
        module, batches, loss_fn, analysis_options(steps=STEPS, strategy=strategy, **options), collectives=ranks
    )


def run_share(rank: int, strategy: str, loss_fn: Any = cases.cross_entropy, **options: Any) -> Any:
    """Analyze this rank's share of the batches, together with the other rank."""
    own = weighted_batches(cases.make("mlp").batches)[rank::WORLD_SIZE]
    return run_analysis(strategy, loss_fn, batches=own, ranks=all_ranks(), **options).to_dict()


def layers_of_shares(rank: int, strategy: str) -> Any:
    module, batches, loss_fn = cases.make("mlp")
    own, options = weighted_batches(batches)[rank::WORLD_SIZE], analysis_options(steps=STEPS, strategy=strategy)
    found = analyze_layers(module, own, loss_fn, options, "auto", collectives=all_ranks())
    return {name: spectrum.to_dict() for name, spectrum in found.items()}


def failing_loss(first_failure: int) -> Callable[[Any, Any], Tensor]:
    calls = 0

    def loss(module: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls >= first_failure:
            raise KeyError("label")
        return cases.cross_entropy(module, batch)

    return loss


def loss_is_nan(module: nn.Module, batch: Any) -> Tensor:
    return cases.cross_entropy(module, batch) * float("nan")


def product_is_nan(module: nn.Module, batch: Any) -> Tensor:
    # Finite value and gradient-free at zero, without a second derivative there.
    return cases.cross_entropy(module, batch) + (module[0].weight.square().sum() * 0).sqrt()


def on_second_rank(rank: int, strategy: str, loss_fn: Any) -> Any:
    return run_share(rank, strategy, loss_fn if rank == 1 else cases.cross_entropy)


SCENARIOS: dict[str, Callable[[int, str], Any]] = {
    "sum of shares": lambda rank, strategy: run_share(rank, strategy, probes=2),
    "layers of shares": layers_of_shares,
    "dropout masks": lambda rank, strategy: run_share(rank, strategy, mode="train"),
    "a rank without batches": lambda rank, strategy: run_analysis(
        strategy, batches=None if rank == 1 else [], ranks=all_ranks()
    ).to_dict(),
    "no rank has batches": lambda rank, strategy: run_analysis(strategy, batches=[], ranks=all_ranks()),
    "loss fails at once": lambda rank, strategy: on_second_rank(rank, strategy, failing_loss(1)),
    "loss fails in a product": lambda rank, _: on_second_rank(rank, "recompute", failing_loss(6)),
    "loss is NaN": lambda rank, strategy: on_second_rank(rank, strategy, loss_is_nan),
    "product is NaN": lambda rank, strategy: on_second_rank(rank, strategy, product_is_nan),
}


def in_process(rank: int, rendezvous: str) -> dict[tuple[str, str], Any]:
    """Run every scenario as one of two ranks; an exception is a result too."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD_SIZE)
    results: dict[tuple[str, str], Any] = {}
    for name, strategy in itertools.product(SCENARIOS, STRATEGIES):
        try:
            results[name, strategy] = SCENARIOS[name](rank, strategy)
        except Exception as error:  # noqa: BLE001 - the tests look at it
            results[name, strategy] = (type(error).__name__, str(error))
        # Whatever happened, both must be at the same point: a collective too many or too few would show here.
        if all_ranks().sum(torch.ones(1)).item() != WORLD_SIZE:
            raise RuntimeError(f"out of step after {name}")
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[tuple[str, str], Any]]]:
    """Results of every scenario on each of two ranks, which run all of them, as starting processes is slow."""
    rendezvous: Path = tmp_path_factory.mktemp("processes") / "rendezvous"
    pool = ProcessPoolExecutor(WORLD_SIZE, mp_context=SERVER)
    try:
        futures = [pool.submit(in_process, rank, str(rendezvous)) for rank in range(WORLD_SIZE)]
        yield [future.result(timeout=SECONDS) for future in futures]
    finally:
        for process in list((pool._processes or {}).values()):
            process.kill()  # a hung process would keep the interpreter from ending
        pool.shutdown(wait=False, cancel_futures=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
class TestTwoRanks:
    def test_the_sum_equals_one_rank(self, strategy, results):
        one = run_analysis(strategy, probes=2)
        first, second = (result["sum of shares", strategy] for result in results)
        slack = 1e-11 * one.lambda_max
        np.testing.assert_allclose(first["nodes"], one.nodes, rtol=0, atol=slack)
        np.testing.assert_allclose(first["residuals"], one.residuals, rtol=0, atol=slack)
        assert first["loss"] == pytest.approx(one.loss, rel=1e-14)
        assert (first["num_samples"], first["matvecs"]) == (9, 2 * STEPS)
        # Not just close: equal on every rank, or they would take different decisions.
        volatile = {"seconds", "gradient_equivalents", "verification"}
        for name in first.keys() - volatile:
            np.testing.assert_array_equal(first[name], second[name])

    def test_layers_equal_those_of_one_rank(self, strategy, results):
        one = layer_spectra(*cases.make("mlp"), steps=STEPS, strategy=strategy)
        for result in results:
            found = result["layers of shares", strategy]
            assert list(found) == list(one)
            for name, spectrum in one.items():
                slack = 1e-11 * spectrum.lambda_max
                np.testing.assert_allclose(found[name]["nodes"], spectrum.nodes, rtol=0, atol=slack)

    def test_dropout_does_not_depend_on_the_number_of_ranks(self, strategy, results):
        one = run_analysis(strategy, mode="train")
        first = results[0]["dropout masks", strategy]
        assert first["loss"] == pytest.approx(one.loss, rel=1e-14)
        np.testing.assert_allclose(first["nodes"], one.nodes, rtol=0, atol=1e-11 * one.lambda_max)

    def test_a_rank_without_batches_is_fine_and_none_with_any_is_an_error(self, strategy, results):
        one = run_analysis(strategy)
        for result in results:
            record = result["a rank without batches", strategy]
            np.testing.assert_allclose(record["nodes"], one.nodes, rtol=0, atol=1e-12 * one.lambda_max)
            assert record["num_samples"] == 9
            kind, message = result["no rank has batches", strategy]
            assert (kind, "no batches to analyze" in message) == ("ValueError", True)
        # It takes no time for a gradient; a ratio to that would be meaningless.
        cost = results[0]["a rank without batches", strategy]["gradient_equivalents"]
        assert cost is None or cost < 1000

    @pytest.mark.parametrize(
        ("scenario", "kind", "message"),
        [
            ("loss fails at once", "KeyError", "'label'"),
            ("loss fails in a product", "KeyError", "'label'"),
            ("loss is NaN", "ArithmeticError", "the loss of batch 1 is nan"),
            ("product is NaN", "ArithmeticError", "Hessian-vector product of batch 1 is NaN"),
        ],
    )
    def test_a_failure_is_raised_on_all_ranks_and_explained_where_it_happened(
        self, scenario, kind, message, strategy, results
    ):
        other, cause = results[0][scenario, strategy]
        assert other == "AnotherRankFailedError"
        assert "product" in scenario or f"rank 1: {kind}: " in cause
        found, said = results[1][scenario, strategy]
        assert (found, message in said) == (kind, True)
