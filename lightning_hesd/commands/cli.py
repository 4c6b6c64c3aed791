"""`lightning-hesd`: analyse checkpoints, estimate what that costs, assess generalization, draw and report."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import re
import sys
import warnings
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_hesd.commands.cost import Machine, Strategy, Workload, cost_lines, measured_bandwidth
from lightning_hesd.commands.posthoc import PosthocAnalysis, sample_size
from lightning_hesd.commands.project import Blueprint, CheckpointError, Project, imported
from lightning_hesd.commands.report import write_report
from lightning_hesd.commands.results import RESULTS, Results, ResultsError, Row, candidates, draw, picked, table_line
from lightning_hesd.numerics.analysis.api import analysis_options, hessian_spectrum
from lightning_hesd.sample_size.recommendation import Stability, pilot_options, recommend_sample_size
from lightning_hesd.spectra.assessment import assess_generalization
from lightning_hesd.spectra.spectrum import Spectrum
from lightning_hesd.training.compat.internals import is_first_process
from lightning_hesd.training.compat.namespaces import FABRIC, PYTORCH, lightning_types
from lightning_hesd.training.loss_mode import AnalysisMode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from jsonargparse import Namespace

WIDTH_OF_FILES = 240
"""Characters in a line of a table that goes to a file or another program."""

NOT_OF_THE_COMMAND_LINE: set[str | int] = {
    *("module", "batches", "loss_fn", "batch_weight", "matrix", "output_fn", "output_loss", "parameters"),
    *("dtype", "preconditioner"),
}
MODE = "Mode of the module, as for HessianSpectrumCallback; 'auto' goes on with what the run chose."
BATCH_WEIGHT = "'tokens', or a function batch -> its weight, as package.function; default: its samples."
SEPARATE = {"model": "model_args", "data": "data_args", "generalization": "generalization_args"}


class CommandError(Exception):
    """What the user asked for cannot be done; the message says why."""


REPORTED = (
    *(CommandError, CheckpointError, ResultsError),
    *(ValueError, OSError, ArithmeticError, RuntimeError, TypeError),
)
"""Exceptions that end the command with their message, in one line; so do those of Lightning."""


class OneLineParser(ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # noqa: ARG002
        """Say what is wrong and where to look, and exit with code 2."""
        sys.stderr.write(f"lightning-hesd: error: {' '.join(message.split())} (--help explains the arguments)\n")
        sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with code 1 if what it asks for fails, 2 if it cannot be understood."""
    sys.path.insert(0, str(Path.cwd()))  # where `python` itself would look for the user's modules
    parser = _parser()
    config = parser.parse_args([_separated(a) for a in (sys.argv[1:] if arguments is None else arguments)])
    try:
        COMMANDS[config.subcommand](config[config.subcommand])
    except (*REPORTED, *lightning_types("utilities.exceptions.MisconfigurationException", of=FABRIC)) as error:
        sys.stderr.write(f"lightning-hesd: error: {' '.join(str(error).split())}\n")
        sys.exit(1)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="lightning-hesd", description=__doc__)
    commands = parser.add_subcommands()

    sub = OneLineParser(description="Analyse the Hessian's spectrum at the weights of checkpoints.")
    _add_project(sub)
    sub.add_argument("--devices", type=int | str, default=1, help="Processes of each node, as for the Trainer.")
    sub.add_argument("--num_nodes", type=int, default=1, help="Nodes, as for the Trainer.")
    sub.add_argument("--strategy", type=str, default="auto", help="How they work together, as for the Trainer.")
    sub.add_argument("--generalization", type=str | None, help="'val' or 'test' data of --data, or a data module.")
    sub.add_argument("--generalization_args", type=dict[str, Any], default={}, help="Arguments of that data module.")
    sub.add_argument(
        "--preconditioned",
        type=bool,
        default=False,
        help="Also analyze the Hessian preconditioned by the optimizer, D^(-1/2) H D^(-1/2).",
    )
    sub.add_argument(
        "--tolerance_of_loss",
        type=float | None,
        help="Candidates of both rules have a loss within this of the lowest; default: 5 % of its drop.",
    )
    sub.add_argument(
        "--out", type=Path, default=Path("hesd"), help="Folder of the results; an interrupted run goes on."
    )
    sub.add_function_arguments(hessian_spectrum, "analysis", skip={*NOT_OF_THE_COMMAND_LINE, "mode"})
    sub.add_argument("--analysis.mode", type=AnalysisMode, default="auto", help=MODE)
    sub.add_argument("--analysis.batch_weight", type=str | None, help=BATCH_WEIGHT)
    commands.add_subcommand("analyze", sub, help="analyse checkpoints")

    sub = OneLineParser(description="Assess generalization (Gabdullin 2025, Fig. 10).")
    sub.add_argument("train", type=Path, help="Spectrum on training data, .npz.")
    sub.add_argument("generalization", type=Path, help="Spectrum of the same weights on other data, .npz.")
    commands.add_subcommand("assess", sub, help="assess generalization by two spectra")

    sub = OneLineParser(description="Draw spectral densities.")
    sub.add_argument("spectra", nargs="+", type=Path, help="Spectra, .npz.")
    sub.add_argument("--out", type=Path, default=None, help="Folder of the figures; default: beside the spectra.")
    commands.add_subcommand("plot", sub, help="draw densities")

    sub = OneLineParser(description="Write what TensorBoard's HESD tab shows of a run as one HTML file.")
    sub.add_argument("log_dir", type=Path, help="The run's log directory.")
    sub.add_argument("--name", type=str, default="hesd", help="Name of the callback in the run.")
    sub.add_argument("--out", type=Path, default=Path("report.html"), help="The file.")
    commands.add_subcommand("report", sub, help="write a run as one HTML file")

    sub = OneLineParser(
        description="Ask how many samples are enough at the weights of checkpoints; those analysed are the pilot."
    )
    _add_project(sub)
    sub.add_function_arguments(recommend_sample_size, skip={"module", "batches", "loss_fn", "mode"})
    sub.add_argument("--mode", type=AnalysisMode, default="auto", help=MODE)
    commands.add_subcommand("sample-size", sub, help="ask how many samples are enough")

    sub = OneLineParser(description="Estimate what one analysis will cost: time, memory and communication.")
    _add_workload(sub)
    commands.add_subcommand("estimate", sub, help="estimate the cost of an analysis")
    return parser


def _add_project(parser: OneLineParser) -> None:
    """Add what checkpoints are of."""
    parser.add_argument(
        "checkpoints", nargs="+", type=str, help="Lightning checkpoints, or patterns such as 'runs/*.ckpt'."
    )
    parser.add_argument("--config", type=str | None, help="A LightningCLI config.yaml to take `model` and `data` from.")
    parser.add_argument(
        "--model", type=str | None, help="LightningModule, as package.Class; --model.ARGUMENT for its own."
    )
    parser.add_argument("--model_args", type=dict[str, Any], default={}, help="Arguments of the module.")
    parser.add_argument(
        "--data", type=str | None, help="LightningDataModule, as package.Class; --data.ARGUMENT for its own."
    )
    parser.add_argument("--data_args", type=dict[str, Any], default={}, help="Arguments of the data module.")
    parser.add_argument("--num_samples", type=int | None, help="Samples; default: those of the run, or 512.")
    parser.add_argument("--batch_size", type=int | None, help="Samples per batch; default: the data module's.")
    parser.add_argument(
        "--loss_fn", type=str | None, help="Function (module, batch) -> mean loss, as package.function."
    )
    parser.add_argument("--name", type=str, default="hesd", help="Name of the callback in the run.")
    parser.add_argument("--accelerator", type=str, default="auto", help="As for the Trainer.")
    parser.add_argument("--unsafe", type=bool, default=False, help="Load checkpoints with objects of any class.")


def _add_workload(parser: OneLineParser) -> None:
    """Add what an analysis is of, and what it runs on."""
    parser.add_argument("--params", type=float, required=True, help="Number of parameters, such as 7e9.")
    parser.add_argument(
        "--gradient_seconds", type=float, required=True, help="Time of forward and backward pass per sample."
    )
    parser.add_argument("--samples", type=int, default=Workload.samples, help="Samples of the analysis.")
    parser.add_argument("--batch_size", type=int, default=Workload.batch_size, help="Samples per batch.")
    parser.add_argument("--steps", type=int, default=Workload.steps, help="Lanczos steps per probe.")
    parser.add_argument("--probes", type=int, default=Workload.probes, help="Probes.")
    parser.add_argument("--processes", type=int, default=Workload.processes, help="Processes that share the samples.")
    parser.add_argument("--sharded", type=bool, default=False, help="Whether they share the parameters, too.")
    parser.add_argument("--strategy", type=Strategy, default=Workload.strategy, help="How products are made.")
    parser.add_argument("--basis", type=bool, default=True, help="Whether the Krylov basis is kept.")
    parser.add_argument("--value_bytes", type=int, default=Workload.value_bytes, help="Bytes of a parameter.")
    parser.add_argument(
        "--graph_bytes", type=float, default=0.0, help="Bytes of the gradient's graph per sample; 0: not counted."
    )
    parser.add_argument(
        "--memory_bandwidth", type=float | None, help="Of a device, in GB/s; default: as measured here on the CPU."
    )
    parser.add_argument("--network_bandwidth", type=float, default=100.0, help="Of a process, in Gbit/s.")
    parser.add_argument(
        "--orthogonalisations", type=int, default=Machine.orthogonalisations, help="2, on a CPU mostly 1."
    )


def _separated(argument: str) -> str:
    """Turn --model.x, and --model.init_args.x, into what dictionaries take on the command line: --model_args.x."""
    return re.sub(rf"^--({'|'.join(SEPARATE)})\.(init_args\.)?", lambda match: f"--{SEPARATE[match[1]]}.", argument)


# assess and plot ----------------------------------------------------------------------------------------------------


def assess(config: Namespace) -> None:
    """Print the verdict and its reasons."""
    found = assess_generalization(Spectrum.load(config.train), Spectrum.load(config.generalization))
    print(f"generalization: {found.verdict}")
    for reason in found.reasons:
        print(f"- {reason}")


def plot(config: Namespace) -> None:
    """Draw the densities."""
    for path, spectrum in [(path, Spectrum.load(path)) for path in config.spectra]:
        target = (config.out or path.parent) / f"{path.stem}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        draw(spectrum, path.stem, target)
        print(target)


# report -------------------------------------------------------------------------------------------------------------


def write_html(config: Namespace) -> None:
    """Write the report."""
    write_report(config.log_dir, config.out, config.name)
    print(config.out)


# sample-size --------------------------------------------------------------------------------------------------------


def ask_sample_size(config: Namespace) -> None:
    """Print how many samples are enough at each checkpoint, and why."""
    project = _project(config)
    stability = Stability(config.tolerance, config.loss_tolerance)
    names = [name for name in inspect.signature(pilot_options).parameters if name != "mode"]
    options = pilot_options(**{name: config[name] for name in names}, mode="eval")  # which the mode replaces
    for path in _checkpoints(config.checkpoints).values():
        with _without_advice():
            found = sample_size(project, path, stability, options, config.mode)
        print(f"{path}: {found}", flush=True)


# estimate -----------------------------------------------------------------------------------------------------------


def estimate(config: Namespace) -> None:
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
        config.gradient_seconds, memory_bandwidth, config.network_bandwidth * 1e9 / 8, config.orthogonalisations
    )
    for line in cost_lines(workload, machine):
        print(line)


# analyze ------------------------------------------------------------------------------------------------------------


def analyze(config: Namespace) -> None:
    """Analyse checkpoints, those left over from an interrupted run, and write table, files and figures.

    Raises:
        CommandError: If a checkpoint failed, or there is none.
    """
    analysis = _analysis(config)
    paths = _checkpoints(config.checkpoints)
    store = Results(config.out, _plain(config))
    writes = is_first_process()  # all processes run this command, with Lightning or torchrun to start them
    rows: list[Row] = []
    for number, (name, path) in enumerate(paths.items(), start=1):
        record = store.known(name, path)
        again = record is not None
        if record is None:
            with _without_advice():
                record = analysis.record(path)
            if writes:
                store.keep(name, path, record)
        rows.append(Row(name, path, record))
        found = record.error or str(record.spectrum)
        if writes:
            print(f"[{number}/{len(paths)}] {path}{' (known)' if again else ''}: {found}", flush=True)
    if not writes:
        return
    picks = picked(rows, config.tolerance_of_loss)
    among = candidates(rows, config.tolerance_of_loss)
    lines = [table_line(row, picks, among) for row in rows]
    store.finish(lines)
    _print_table(lines)
    print(f"Spectra, figures, {RESULTS} and results.csv are in {config.out}")
    failed = [row for row in rows if row.record.error is not None]
    if failed:
        msg = f"{len(failed)} of {len(rows)} analyses failed; the first, of {failed[0].path}: {failed[0].record.error}"
        raise CommandError(msg)


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Keep Lightning from saying which devices there are, and from advice that is meant for training."""
    with contextlib.ExitStack() as stack:
        for name in PYTORCH:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.WARNING)
        stack.enter_context(warnings.catch_warnings())
        for category in lightning_types("utilities.warnings.PossibleUserWarning", of=FABRIC):
            warnings.filterwarnings("ignore", category=category)
        yield


def _analysis(config: Namespace) -> PosthocAnalysis:
    generalization: Any = config.generalization
    if generalization not in {None, "val", "test"}:
        generalization = Blueprint(generalization, config.generalization_args)
    options = {key: value for key, value in config.analysis.as_dict().items() if key != "mode"}
    if options["batch_weight"] not in {None, "tokens"}:
        options["batch_weight"] = imported(options["batch_weight"])
    return PosthocAnalysis(
        replace(_project(config), devices=config.devices, num_nodes=config.num_nodes, strategy=config.strategy),
        analysis_options(**options),
        generalization,
        config.preconditioned,
        config.analysis.mode,
    )


def _project(config: Namespace) -> Project:
    given = {} if config.config is None else _lightning_config(Path(config.config))
    return Project(
        model=_blueprint("model", config, given),
        data=_blueprint("data", config, given),
        num_samples=config.num_samples,
        batch_size=config.batch_size,
        loss_fn=None if config.loss_fn is None else imported(config.loss_fn),
        name=config.name,
        accelerator=config.accelerator,
        unsafe=config.unsafe,
    )


def _lightning_config(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        msg = f"cannot read the configuration {path}: {error}"
        raise CommandError(msg) from error
    if not isinstance(found, dict):
        msg = f"{path} is no configuration of LightningCLI: it must have `model` and `data`."
        raise CommandError(msg)
    return found


def _blueprint(part: str, config: Namespace, given: Mapping[str, Any]) -> Blueprint:
    """Return the class from the command line, else from the configuration, and the arguments from both.

    Raises:
        CommandError: If neither names a class.
    """
    configured = given.get(part) or {}
    is_subclass = isinstance(configured, dict) and "class_path" in configured
    class_path = config[part] or (configured["class_path"] if is_subclass else None)
    if class_path is None:
        msg = f"there is no {part}: pass --{part} package.Class, or --config with a `class_path` for it."
        raise CommandError(msg)
    imported(class_path)  # now, so that `_without_advice` knows which namespaces of Lightning there are
    arguments = configured.get("init_args") or {} if is_subclass else configured
    return Blueprint(class_path, {**arguments, **config[SEPARATE[part]]})


def _checkpoints(patterns: Sequence[str]) -> dict[str, Path]:
    """Return the checkpoints by name: their stems, and their folders' where stems alone would be the same.

    Raises:
        CommandError: If a file does not exist, or a pattern matches none.
    """
    paths: dict[Path, None] = {}
    for pattern in patterns:
        found = sorted(glob(pattern, recursive=True)) if re.search(r"[*?\[]", pattern) else [pattern]  # noqa: PTH207
        found = found or ([pattern] if Path(pattern).exists() else [])
        if not found:
            msg = f"no file matches {pattern!r}."
            raise CommandError(msg)
        paths.update((Path(path), None) for path in found)
    for path in paths:
        if not path.is_file():
            msg = f"{path} is no file." if path.exists() else f"{path} does not exist."
            raise CommandError(msg)
    names: dict[str, Path] = {}
    for path in paths:
        parts = path.resolve().with_suffix("").parts
        name = parts[-1]
        for count in range(2, len(parts)):
            if name not in names:
                break
            name = "_".join(parts[-count:])
        names[name] = path
    return names


def _plain(config: Namespace) -> dict[str, Any]:
    """Return what results depend on, as JSON has it."""
    irrelevant = {
        "checkpoints",
        "out",
        "tolerance_of_loss",
        "unsafe",
        "accelerator",
        "devices",
        "num_nodes",
        "strategy",
    }
    options = {key: value for key, value in config.as_dict().items() if key not in irrelevant}
    plain: dict[str, Any] = json.loads(json.dumps(options, default=str))
    return plain


def _print_table(lines: Sequence[Mapping[str, Any]]) -> None:
    shown = [key for key in lines[0] if key != "error" and any(line[key] not in {None, ""} for line in lines)]
    table = Table(*(key.replace("_by", " by") for key in shown))
    for line in lines:
        table.add_row(*(Text(_cell(line[key])) for key in shown))  # names of files are no markup
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_OF_FILES
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


COMMANDS = {
    "analyze": analyze,
    "assess": assess,
    "plot": plot,
    "report": write_html,
    "sample-size": ask_sample_size,
    "estimate": estimate,
}
