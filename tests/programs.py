"""Programs of the repository, run as a user runs them, but forked from a server that has loaded what loads slowly."""

import gc
import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]

TIMEOUT = 280
"""Seconds until a program counts as hanging: a few times what one takes on a busy machine."""

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        *("lightning.pytorch", "lightning.pytorch.strategies", "torch.distributed.fsdp", "torch.distributed.tensor"),
        *("lightning_hesd.training.callback", "lightning_hesd.training.loggers"),
        *("lightning_hesd.numerics.distributed.fully_sharded", "matplotlib.pyplot", "sklearn.datasets"),
    ]
)


def run_python(*arguments: str, cwd: Path = ROOT) -> str:
    """Return what Python prints, given a script or `-m` and a module; it must succeed, and warn of nothing."""
    said, errors = run_program(*arguments, cwd=cwd)
    assert "Warning" not in errors, errors
    return said


def run_program(*arguments: str, cwd: Path = ROOT) -> tuple[str, str]:
    """Return what Python writes to its output and to its errors, given the same; it must succeed."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        process = SERVER.Process(target=_run, args=(arguments, cwd, output, errors))
        process.start()
        process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
        said = errors.read_text()
        assert process.exitcode == 0, said
        return output.read_text(), said


def prepare(output: Path, errors: Path) -> None:
    """Let this process write to files, and compute on one thread, as all tests do."""
    gc.freeze()
    torch.set_num_threads(1)
    for stream, path in ((sys.stdout, output), (sys.stderr, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())


def _run(arguments: tuple[str, ...], cwd: Path, output: Path, errors: Path) -> None:
    prepare(output, errors)
    os.chdir(cwd)
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        sys.path.insert(0, str(cwd))
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
