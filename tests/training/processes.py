"""Programs run as several real processes, with the environment that torchrun would give each rank."""

import json
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed import TCPStore

from tests.programs import SERVER, prepare

TIMEOUT = 240
"""Seconds until processes count as hanging: a few times what they take on a busy machine."""


@dataclass(frozen=True)
class Rank:
    """One of the processes, and where it writes to."""

    process: BaseProcess
    log: Path

    @property
    def said(self) -> str:
        """What it has written so far."""
        return self.log.read_text() if self.log.exists() else ""

    def wait(self) -> int:
        """Return its exit code."""
        self.process.join(TIMEOUT)
        assert self.process.exitcode is not None, f"hangs\n{self.said}"
        return self.process.exitcode


@contextmanager
def started(script: Path, folder: Path, count: int, *arguments: object) -> Iterator[list[Rank]]:
    """Run a script with that many processes, by rank, which write to a folder, and leave none of them behind."""
    folder.mkdir(parents=True, exist_ok=True)
    # The store by which ranks find each other is here, as with torchrun: a port that the first rank would open later
    # might be taken by then, by a rank of another launch for example.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(count)}
    launch = {"RUN_ID": "tests", "USE_AGENT_STORE": "True", "RESTART_COUNT": "0"}
    shared |= {f"TORCHELASTIC_{name}": value for name, value in launch.items()}
    flags = [*map(str, arguments), "--out", str(folder)]
    ranks = []
    for number in range(count):
        log = folder / f"rank{number}.log"
        variables = {**shared, "RANK": str(number), "LOCAL_RANK": str(number)}
        ranks.append(Rank(SERVER.Process(target=_be_rank, args=(script, flags, variables, log)), log))
    try:
        for rank in ranks:
            rank.process.start()
        yield ranks
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.join()


def run(script: Path, folder: Path, count: int, *arguments: object) -> list[Any]:
    """Run a script on that many ranks, and return what each saw; it must succeed, and hang nowhere."""
    (found,) = run_together((script, folder, count, *arguments))
    return found


def run_together(*launches: tuple[Any, ...]) -> list[list[Any]]:
    """Do the same with several scripts at the same time, as ranks mostly wait for each other."""
    with ExitStack() as stack:
        for ranks in [stack.enter_context(started(*launch)) for launch in launches]:
            for rank in ranks:
                assert rank.wait() == 0, rank.said
    return [read(folder) for _, folder, *_ in launches]


def read(folder: Path) -> list[Any]:
    """What each process saw, by rank."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


def _be_rank(script: Path, flags: list[str], variables: dict[str, str], log: Path) -> None:
    os.environ.update(variables)
    rank_zero_only.rank = int(variables["RANK"])  # Lightning reads it when it is imported, which the server has done
    prepare(log, log)
    sys.argv = [str(script), *flags]
    runpy.run_path(str(script), run_name="__main__")
