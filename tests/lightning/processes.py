"""Training programs run as several real processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT = 240


def environment(script: Path) -> dict[str, str]:
    """Return what the processes of one run of a script need to find the project and each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {**os.environ, "PYTHONPATH": str(script.parents[2]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def run(script: Path, folder: Path, devices: int, **options: Any) -> None:
    """Run a script with that many processes; it must succeed, and hang nowhere."""
    folder.mkdir(parents=True)
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", *str(value).split())]
    done = subprocess.run(
        [sys.executable, str(script), "--devices", str(devices), "--out", str(folder), *flags],
        env=environment(script),
        timeout=TIMEOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def read(folder: Path) -> list[dict[str, Any]]:
    """What each process saw, by rank."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
