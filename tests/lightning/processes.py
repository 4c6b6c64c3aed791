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


def run(script: Path, folder: Path, devices: int, **options: Any) -> None:
    """Run a script with that many processes; it must succeed, and hang nowhere."""
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", *str(value).split())]
    environment = {
        **os.environ,
        "PYTHONPATH": str(script.parents[2]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    done = subprocess.run(
        [sys.executable, str(script), "--devices", str(devices), "--out", str(folder), *flags],
        env=environment,
        timeout=TIMEOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def read(folder: Path) -> list[dict[str, Any]]:
    """What each process saw, by rank."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
