"""`lightning-hesd estimate`: what an analysis will cost, in words, and whether it fits into the memory of a device."""

from __future__ import annotations

import math
import textwrap
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from lightning_hesd.numerics.analysis.cost_model import (
    EVALUATION,
    GRADIENTS_PER_PRODUCT,
    PREPARATION,
    Machine,
    Workload,
    analysis_cost,
    measured_bandwidth,
)
from lightning_hesd.numerics.operators.memory import VECTORS
from lightning_hesd.spectra.analysis_lines import WIDTH

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
"""What the letter behind a number of parameters stands for, such as that of 7B."""

MAX_PROCESSES = 1024
"""Largest number of processes that a sentence proposes."""


def parameter_count(text: str | float) -> int:
    """Return the number that "7B", "1.5e9", "125M" or "350k" means; a number is returned as it is.

    Raises:
        ValueError: If the text is no number.

    Examples:
        >>> parameter_count("7B"), parameter_count("0.5M"), parameter_count("1e6")
        (7000000000, 500000, 1000000)
    """
    digits, factor = str(text).strip().upper(), 1.0
    if digits[-1:] in SUFFIXES:
        digits, factor = digits[:-1], SUFFIXES[digits[-1]]
    try:
        return round(float(digits) * factor)
    except (ValueError, OverflowError):
        msg = f"`params` must be a number of parameters, such as 7B, 125M or 2.5e6, got {text!r}."
        raise ValueError(msg) from None


def cost_lines(workload: Workload, machine: Machine, device_memory: float | None = None) -> list[str]:
    """Return the estimate in words, in lines of at most `WIDTH` columns.

    Args:
        workload: The analysis.
        machine: The machine.
        device_memory: Bytes of the device of a process; None: nothing is said of whether the analysis fits.
    """
    cost = analysis_cost(workload, machine)
    samples, each = f"{workload.local_samples:,} samples", _duration(machine.gradient_seconds)
    where = " per process" if workload.processes > 1 else ""
    graphs = "not counted: pass --graph_bytes, those of one sample"
    if workload.graph_bytes:
        graphs = "gradient graphs, and an HVP beside them"
    elif workload.strategy == "finite_difference":
        graphs = "central differences keep none"
    table = [
        ("time", _duration(cost.seconds), f"{cost.gradients:.0f} gradients of {samples}{where}, and vectors"),
        ("  products", _duration(cost.product_seconds), f"a gradient of a sample takes {each}"),
        (
            "  recurrence",
            _duration(cost.recurrence_seconds),
            f"vectors are read and written at {machine.memory_bandwidth / 1e9:,.0f} GB/s",
        ),
        ("memory", _size(cost.memory), f"beyond the network's {_size(workload.vector_bytes)}{where}"),
        ("  basis", _size(cost.basis_memory), _basis_words(workload)),
        ("  vectors", _size(cost.vector_memory), f"{VECTORS} vectors of a step, and a copy of the parameters"),
        ("  graphs", _size(cost.graph_memory) if workload.graph_bytes else "", graphs),
    ]
    if cost.comparison_memory == cost.memory:
        words = "loss and derivatives compared in float64, at first"
        table.append(("  comparison", _size(cost.comparison_memory), words))
    if workload.processes > 1:
        speed = f"{machine.network_bandwidth * 8 / 1e9:,.3g} Gbit/s"
        moved = "parameters and gradients are exchanged" if workload.sharded else "products are added up"
        table.insert(3, ("  reductions", _duration(cost.communication_seconds), f"{moved} at {speed}"))
        table.append(("sent", _size(cost.sent), "by each process"))
    lines = [
        *_wrapped(_work_words(workload)),
        "",
        *(f"{name:<14}{value:>10}   {words}".rstrip() for name, value, words in table),
    ]
    if device_memory is not None:
        lines += ["", *_wrapped(_fit_words(workload, machine, device_memory))]
    return lines


def _work_words(workload: Workload) -> str:
    """Say how the work follows from the options."""
    probes = f" from each of {workload.probes} random vectors" if workload.probes > 1 else ""
    steps = workload.products // workload.probes
    strategy = workload.strategy
    words = (
        f"{steps:,} Lanczos steps{probes} are {workload.products:,} Hessian-vector products. With the strategy "
        f"{strategy!r} one costs as much as {GRADIENTS_PER_PRODUCT[strategy]:g} gradients, and the preparation costs "
        f"{PREPARATION[strategy]:g}"
    )
    if workload.evaluations:
        words += (
            f"; {workload.evaluations} evaluations of the loss along eigenvectors, without derivatives, cost "
            f"{workload.evaluations * EVALUATION:.0f}"
        )
    return f"{words}: in all {workload.gradients:,.0f} gradients. With a `tolerance` it may stop earlier."


def _basis_words(workload: Workload) -> str:
    if not workload.basis:
        return "no Krylov basis, and no reorthogonalization"
    return f"the Krylov basis: {workload.products} vectors of {_size(workload.vector_bytes)}"


def _fit_words(workload: Workload, machine: Machine, device_memory: float) -> str:
    """Say whether the analysis and the network fit into a device, and if not, what makes them fit."""
    room = f"{device_memory / 1e9:,.4g} GB"
    not_counted = "Gradients, states of the optimizer and the samples are not counted."
    if not workload.graph_bytes and workload.strategy != "finite_difference":
        not_counted = "Graphs, gradients, states of the optimizer and the samples are not counted."

    def needed(changed: Workload) -> float:
        return analysis_cost(changed, machine).memory + changed.vector_bytes

    if needed(workload) <= device_memory:
        return f"It fits in {room}: it takes {_size(needed(workload))} with the network. {not_counted}"
    words = f"It does not fit in {room}: it takes {_size(needed(workload))} with the network."
    for option, changed in _leaner(workload):
        if needed(changed) <= device_memory:
            words += f" With {option} it takes {_size(needed(changed))}, and fits."
            if workload.basis and not changed.basis and changed.processes == workload.processes:
                basis = _size(analysis_cost(workload, machine).basis_memory)
                words += f" It also fits with `basis='cpu'`, which takes {basis} of the computer's memory instead."
            return f"{words} {not_counted}"
    option, leanest = _leaner(workload)[-1] if _leaner(workload) else ("these options", workload)
    return f"{words} With {option} it takes {_size(needed(leanest))}, which does not fit either. {not_counted}"


def _leaner(workload: Workload) -> list[tuple[str, Workload]]:
    """Return leaner analyses with the same result, each after the option that makes it, the cheapest first."""
    found: list[tuple[str, Workload]] = []
    recomputed = replace(workload, strategy="recompute") if workload.strategy == "graph" else workload
    if workload.strategy == "graph" and workload.graph_bytes:
        found.append(("`strategy='recompute'`", recomputed))
    if workload.basis:
        found.append(("`basis='none'`", replace(workload, basis=False)))
        if workload.strategy == "graph" and workload.graph_bytes:
            found.append(("`basis='none'` and `strategy='recompute'`", replace(recomputed, basis=False)))
    leanest = found[-1][1] if found else workload
    without = "`basis='none'` and " if workload.basis else ""
    processes = 2 * workload.processes if workload.sharded else max(2, workload.processes)
    while processes <= MAX_PROCESSES:
        words = f"{without}parameters sharded over {processes} processes"
        found.append((words, replace(leanest, processes=processes, sharded=True)))
        processes *= 2
    return found


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False)


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    if 0 < seconds < 1:
        return f"{1000 * seconds:.2g} ms"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _size(size: float) -> str:
    for power, name in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power:
            return f"{size / 1024**power:,.1f} {name}"
    return f"{size:.0f} B"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("--params", type=str | float, required=True, help="Number of parameters, such as 7B or 7e9.")
    parser.add_class_arguments(Workload, skip={"parameters"})
    parser.add_class_arguments(Machine, skip={"memory_bandwidth", "network_bandwidth"})
    parser.add_argument(
        "--memory_bandwidth",
        type=float | None,
        help="Bandwidth of the memory of a device, in GB/s; default: that of this CPU, measured.",
    )
    parser.add_argument(
        "--network_bandwidth", type=float, default=100.0, help="Bandwidth of the network of a rank, in Gbit/s."
    )
    parser.add_argument(
        "--device_memory",
        type=float | None,
        help="Memory of a device, in GB: the output says whether the analysis fits, and what makes it fit.",
    )


def run(config: Namespace) -> None:
    """Print what an analysis will cost.

    Raises:
        ValueError: If a number is out of range.
    """
    sizes = {field.name: config[field.name] for field in fields(Workload) if field.name in config}
    memory = config.device_memory
    if memory is not None and not 0 < memory < math.inf:
        msg = f"`device_memory` must be a positive number of GB, got {memory!r}."
        raise ValueError(msg)
    memory_bandwidth = measured_bandwidth() if config.memory_bandwidth is None else config.memory_bandwidth * 1e9
    machine = Machine(
        config.gradient_seconds, memory_bandwidth, config.network_bandwidth * 1e9 / 8, config.orthogonalizations
    )
    workload = Workload(parameters=parameter_count(config.params), **sizes)
    for line in cost_lines(workload, machine, None if memory is None else memory * 1e9):
        print(line)
