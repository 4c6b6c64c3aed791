"""Helpers of the studies of papers: runs in parallel, findings, tables in Markdown, and known warnings turned off."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import lightning.pytorch as pl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

Run = TypeVar("Run")

Verdict = Literal["agrees", "differs", "cannot be seen at this scale", "not run"]
AGREES: Verdict = "agrees"
DIFFERS: Verdict = "differs"
UNSEEN: Verdict = "cannot be seen at this scale"
NOT_RUN: Verdict = "not run"


class Table(NamedTuple):
    """A table with its header."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Finding:
    """One claim of a paper, with our evidence and verdict."""

    claim: str
    rule: str
    evidence: str
    verdict: Verdict


def markdown(table: Table) -> str:
    """Return a table in Markdown."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress messages and warnings that are known and harmless here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers",  # the data are in memory
            ".*smaller than the logging interval",  # nothing is logged by step
            ".*LeafSpec.*deprecated",  # Lightning 2.6 with torch 2.13
            ".*gradient_checkpointing.* is deprecated",  # transformers 5.24, which has renamed it
            ".*backward\\(\\) with create_graph=True",  # AdaHessian frees the graphs
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


def silent_trainer(folder: Path, **options: Any) -> pl.Trainer:
    """Return a Trainer that writes nothing but what its callbacks write to `folder`, and shows nothing."""
    return pl.Trainer(
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def run_all(
    runs: Sequence[Run], run: Callable[[Run, Path], object], out: Path, *, is_done: Callable[[Run], bool], jobs: int
) -> None:
    """Do the unfinished runs, several at a time, and print the progress."""
    if not runs:
        return
    todo = [settings for settings in runs if not is_done(settings)]
    print(f"{len(todo)} runs to do, {len(runs) - len(todo)} finished earlier", flush=True)
    if not todo:
        return
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        if jobs == 1:  # a single worker needs no other process
            done: Iterable[object] = (run(settings, out) for settings in todo)
        else:
            pool = stack.enter_context(ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")))
            done = (future.result() for future in as_completed([pool.submit(run, settings, out) for settings in todo]))
        for number, _ in enumerate(done, start=1):
            if number % 10 == 0 or number == len(todo):
                print(f"[{(time.perf_counter() - started) / 60:5.1f} min] {number}/{len(todo)}", flush=True)
