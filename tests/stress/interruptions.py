"""Runs that are interrupted, by signals or by being killed, and then resumed."""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor

from lightning_hesd import HessianCheckpoint, Spectrum, SpectrumHistory
from tests.stress.harness import FORK, Case, Program, quiet
from tests.training.modules import callback, fit, freeze, loader, plain_loss

EPOCHS = 5
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# A run that can be resumed, and what is left of it ------------------------------------------------------------------


def train(folder: Path, *beside: pl.Callback, last: Path | None = None, **options: Any) -> dict[str, Any]:
    """Train in a folder, going on from a checkpoint if there is one, and return what came out."""
    checkpoint = HessianCheckpoint(dirpath=folder, save_last=True, tolerance=1.0, require_mp=False)
    observer = callback(on_error="warn", checkpoint=checkpoint, **options)
    with quiet():
        trainer = fit(
            folder,
            *beside,
            observer,
            data=loader(),  # in order: Lightning does not restore the random state that shuffling depends on
            max_epochs=EPOCHS,
            enable_checkpointing=True,
            ckpt_path=last,
        )
    best = checkpoint.best
    assert best is not None
    return {
        "history": [(r.epoch, r.global_step, r.error, r.spectrum and r.spectrum.c_t.hex()) for r in observer.history],
        "pick": (best.epoch, best.global_step, best.criterion.hex()),
        "weights of the pick": _digest(torch.load(best.path, weights_only=True)["state_dict"]),
        "weights": _digest(trainer.lightning_module.state_dict()),
    }


def _digest(weights: Any) -> str:
    return hashlib.sha256(repr(freeze(dict(weights))).encode()).hexdigest()


def readable(path: Path) -> bool:
    """Return whether a file of a run is whole."""
    try:
        if path.suffix == ".npz":
            Spectrum.load(path)
        elif path.suffix == ".ckpt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        elif path.name == "index.json":
            SpectrumHistory.load(path.parent)
    except Exception:  # noqa: BLE001 - whatever a torn file makes the readers raise
        return False
    return True


def unreadable(folder: Path) -> list[str]:
    """Return the names of the files that are not whole; those still being written are not counted."""
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix != ".partial" and not readable(p))


def newest(folder: Path) -> Path | None:
    """Return the checkpoint to go on from: the last one, else the newest that can be read."""
    last = folder / "last.ckpt"
    others = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True)
    return next((path for path in [last, *others] if path.is_file() and readable(path)), None)


# Signals --------------------------------------------------------------------------------------------------------------


class SignalsAt:
    """A loss that sends its own process a signal in the second analysis."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, module: Any, batch: Any) -> Tensor:
        if module.current_epoch == 1:
            os.kill(os.getpid(), self.number)
            self.number = 0  # which does nothing
            time.sleep(0.01)
        return plain_loss(module, batch)


def interrupted(folder: Path, number: int, records: int) -> str:
    """Send a signal during an analysis: training ends gracefully, and a resumed run is as it should be."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have switched it off
    whole = train(folder / "whole", loss_fn=plain_loss)
    seen: list[pl.LightningModule] = []
    keeping = LambdaCallback(on_exception=lambda trainer, module, exception: seen.append(module))
    first = folder / "first"
    ended = "not at all"
    try:
        train(first, keeping, loss_fn=SignalsAt(number))
    except BaseException as error:  # noqa: BLE001 - SystemExit, or Lightning's own
        ended = type(error).__name__
    [module] = seen
    assert module.training, "the module was left in evaluation mode"
    assert not {"log", "log_dict", "print"} & set(vars(module)), "the module was left muted"
    assert not unreadable(first), unreadable(first)
    assert not list(first.rglob("*.partial"))
    found = len(SpectrumHistory.load(first))
    assert found == records, found
    resumed = train(first, last=first / "last.ckpt", loss_fn=plain_loss)
    different = [key for key, value in whole.items() if resumed[key] != value]
    assert not different, different
    return f"ends with {ended}; {found} analyses on disk; resumed to the same history, pick and weights"


# Kills ----------------------------------------------------------------------------------------------------------------


def run_and_kill(folder: Path, *, after: float | None = None, at_write: int | None = None) -> bool:
    """Train in a process, resuming what there is, and return whether it was done before it was killed.

    It is killed after so many seconds, or before that change to a file, counted from 1.
    """
    process = FORK.Process(target=_train_and_tell, args=(folder, at_write))
    process.start()
    process.join(after)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode in {0, -signal.SIGKILL}, f"exit code {process.exitcode}"
    return process.exitcode == 0


def _train_and_tell(folder: Path, at_write: int | None) -> None:
    counted = _count_writes(at_write)
    result = train(folder, last=newest(folder))
    (folder / "result.json").write_text(json.dumps({"writes": counted(), **result}), encoding="utf-8")


def _count_writes(fatal: int | None) -> Callable[[], int]:
    """Count changes to files from now on, and do not survive the one with that number."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if writes or event in {"os.rename", "os.remove", "os.symlink", "os.link"}:
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: count


def result(folder: Path) -> dict[str, Any]:
    """Return what a run that was done has told."""
    told: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return told


def kills(folder: Path, *, count: int, seed: int, by: str) -> str:
    """Kill run after run, and resume each: the result is that of the uninterrupted one, and every file can be read."""
    started = time.perf_counter()
    assert run_and_kill(folder / "whole")
    duration = time.perf_counter() - started
    whole = result(folder / "whole")
    chance = random.Random(seed)
    unread: list[str] = []
    killed = 0
    for number in range(count):
        run = folder / str(number)
        share = (number + chance.random()) / count  # spread over the whole, but anywhere within each part
        if by == "time":
            done = run_and_kill(run, after=duration * share)
        else:
            done = run_and_kill(run, at_write=1 + int(share * whole["writes"]))
        killed += not done
        unread += unreadable(run)
        assert len(list(run.rglob("*.partial"))) <= 1
        if not done:
            assert run_and_kill(run)
        _check(run, whole)
    assert not unread, f"not readable: {', '.join(unread)}"
    assert killed >= count // 2, f"only {killed} of {count} were killed before they were done"
    return ALL_THE_SAME


ALL_THE_SAME = "all resumed to the same history, pick and weights; every file readable; none left half-written"


def killed_again_and_again(folder: Path, *, seed: int) -> str:
    """Kill one run after every epoch or two that it gets through, until it is done."""
    assert run_and_kill(folder / "whole")
    whole = result(folder / "whole")
    chance = random.Random(seed)
    run = folder / "run"
    times = 0
    while not run_and_kill(run, at_write=int(whole["writes"] / EPOCHS * (1.2 + chance.random()))):
        times += 1
        assert not unreadable(run), unreadable(run)
        assert len(list(run.rglob("*.partial"))) <= 1, "half-written files pile up"
    assert times > 1, f"killed {times} times only"
    _check(run, whole)
    return ALL_THE_SAME


def _check(run: Path, whole: dict[str, Any]) -> None:
    """Check a run that is done against the uninterrupted one."""
    told = result(run)
    different = [key for key, value in whole.items() if key != "writes" and told[key] != value]
    assert not different, f"{run.name}: {', '.join(different)} differ"
    assert not unreadable(run), unreadable(run)
    left = [path.name for path in run.rglob("*.partial")]
    assert not left, left


def cases(*, kills_each_way: int, seed: int) -> list[Case]:
    resumed = "resumed to the same history, pick and weights"
    signals = (("Ctrl-C", signal.SIGINT, "SystemExit", 1), ("SIGTERM", signal.SIGTERM, "SIGTERMException", 2))
    return [
        *(
            Program(
                f"{name} during an analysis",
                f"ends with {ended}; {records} analyses on disk; {resumed}",
                partial(interrupted, number=number, records=records),
            )
            for name, number, ended, records in signals
        ),
        *(
            Program(
                f"killed at {kills_each_way} {what}",
                ALL_THE_SAME,
                partial(kills, count=kills_each_way, seed=seed, by=by),
                seconds=60 + 30.0 * kills_each_way,
            )
            for what, by in (("moments", "time"), ("changes to files", "write"))
        ),
        Program("killed again and again", ALL_THE_SAME, partial(killed_again_and_again, seed=seed), seconds=600.0),
    ]
