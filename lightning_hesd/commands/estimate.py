"""`lightning-hesd estimate`: the cost of one analysis before it is run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_hesd.commands.cost import Machine, Strategy, Workload, cost_lines, measured_bandwidth

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("--params", type=float, required=True, help="Number of parameters, such as 7e9.")
    parser.add_argument(
        "--gradient_seconds", type=float, required=True, help="Time of forward and backward pass per sample."
    )
    parser.add_argument("--samples", type=int, default=Workload.samples, help="Samples of the analysis.")
    parser.add_argument("--batch_size", type=int, default=Workload.batch_size, help="Samples per batch.")
    parser.add_argument("--steps", type=int, default=Workload.steps, help="Lanczos steps per probe.")
    parser.add_argument("--probes", type=int, default=Workload.probes, help="Probes.")
    parser.add_argument("--processes", type=int, default=Workload.processes, help="Ranks that share the samples.")
    parser.add_argument("--sharded", type=bool, default=False, help="Whether ranks share the parameters, too.")
    parser.add_argument("--strategy", type=Strategy, default=Workload.strategy, help="HVP strategy.")
    parser.add_argument("--basis", type=bool, default=True, help="Whether the Krylov basis is kept.")
    parser.add_argument("--value_bytes", type=int, default=Workload.value_bytes, help="Bytes of a parameter.")
    parser.add_argument(
        "--graph_bytes", type=float, default=0.0, help="Bytes of the gradient's graph per sample; 0: not counted."
    )
    parser.add_argument(
        "--memory_bandwidth", type=float | None, help="Of a device, in GB/s; default: that of this CPU, measured."
    )
    parser.add_argument("--network_bandwidth", type=float, default=100.0, help="Of a rank, in Gbit/s.")
    parser.add_argument(
        "--orthogonalizations",
        type=int,
        default=Machine.orthogonalizations,
        help="Passes of reorthogonalization: 2, on a CPU mostly 1.",
    )


def run(config: Namespace) -> None:
    """Print what an analysis will cost."""
    workload = Workload(
        parameters=round(config.params),
        samples=config.samples,
        batch_size=config.batch_size,
        steps=config.steps,
        probes=config.probes,
        processes=config.processes,
        sharded=config.sharded,
        strategy=config.strategy,
        basis=config.basis,
        value_bytes=config.value_bytes,
        graph_bytes=config.graph_bytes,
    )
    memory_bandwidth = measured_bandwidth() if config.memory_bandwidth is None else config.memory_bandwidth * 1e9
    machine = Machine(
        config.gradient_seconds, memory_bandwidth, config.network_bandwidth * 1e9 / 8, config.orthogonalizations
    )
    for line in cost_lines(workload, machine):
        print(line)
