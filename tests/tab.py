"""Runs for the HESD tab: a real training, payloads of any content, and a TensorBoard that serves them."""

import base64
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.application import TensorBoardWSGI
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.serving import make_server
from werkzeug.test import Client

from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback
from lightning_hesd.spectra.payload import to_json
from lightning_hesd.tensorboard_plugin.plugin import HESDLoader
from lightning_hesd.training.loggers.tensorboard import TensorBoardOutput
from tests.training.digits_run import Net, data
from tests.training.scripted import make_trainer

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 3


class ValidatedNet(Net):
    """A classifier whose accuracy is also logged on other digits than those it is trained on."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_acc", (self.net(x).argmax(1) == y).float().mean())


def train(folder: Path, seed: int = 0, **arguments: Any) -> tuple[str, HessianSpectrumCallback]:
    """Train and return the log directory and the callback, whose checkpoint looks at the training accuracy."""
    torch.manual_seed(seed)
    logger = TensorBoardLogger(folder, name="net")
    callback = HessianSpectrumCallback(
        steps=8,
        num_samples=48,
        batch_size=16,
        checkpoint=HessianCheckpoint("highest_c_t", train_metric="train_acc", tolerance=0.2),
        progress=False,
        **arguments,
    )
    with patch("lightning_hesd.training.loggers.tensorboard.figures", return_value=()):  # the tab draws its own
        make_trainer(folder, [callback], EPOCHS, logger=logger, log_every_n_steps=4).fit(
            ValidatedNet(), data(), data(160)
        )
    return str(logger.log_dir), callback


def write_payloads(folder: Path, payloads: list[Any], tag: str = "record", name: str = "hesd") -> None:
    """Write payloads of any content, texts or objects, at steps 0, 1, ..."""
    logger = TensorBoardLogger(folder, name="", version="")
    output = TensorBoardOutput(logger, name)
    for step, payload in enumerate(payloads):
        output._write_payload(tag, payload if isinstance(payload, str) else to_json(payload), step)
    logger.finalize("success")
    logger.experiment.close()


def plugin_path(folder: Path) -> str:
    """Return a PYTHONPATH with which TensorBoard finds the tab, also where the package is not installed anew."""
    if not any(point.name == "hesd" for point in entry_points(group="tensorboard_plugins")):
        info = folder / "hesd_tab-0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hesd-tab\nVersion: 0\n")
        pyproject = (ROOT / "pyproject.toml").read_text()
        (point,) = re.findall(r'^hesd = "(.*)"$', pyproject, re.MULTILINE)
        (info / "entry_points.txt").write_text(f"[tensorboard_plugins]\nhesd = {point}\n")
    return os.pathsep.join([str(ROOT), str(folder), os.environ.get("PYTHONPATH", "")])


def data_of_report(document: str) -> str:
    """Return the data in a report, as JSON."""
    compressed = document.split('id="hesd-data">')[1].split("</script>", maxsplit=1)[0]
    return gzip.decompress(base64.b64decode(compressed)).decode()


@contextmanager
def tensorboard(log_dir: Path, folder: Path, *flags: str) -> Iterator[str]:
    """Serve a log directory as a user would, on a free port.

    Yields:
        The address.
    """
    log = folder / f"tensorboard-{log_dir.name}.log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir), "--port", "0", *flags]
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": plugin_path(folder), "PYTHONWARNINGS": "default"},
            start_new_session=True,  # its data server is a process of its own
        )
    try:
        for _ in range(600):
            if found := re.search(r"http://\S+?:\d+/", log.read_text()):
                break
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        else:
            raise TimeoutError(log.read_text())
        yield found[0]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(10)


class Tab:
    """The plugin in TensorBoard's application, in this process."""

    def __init__(self, folder: Path) -> None:
        self.events = EventMultiplexer(tensor_size_guidance={"hesd": 1000})
        self.folder = folder
        provider = MultiplexerDataProvider(self.events, str(folder))
        plugin = HESDLoader().load(TBContext(data_provider=provider))
        self.application = TensorBoardWSGI([plugin], data_provider=provider)
        self.client = Client(self.application)
        self.reload()

    def reload(self) -> None:
        self.events.AddRunsFromDirectory(str(self.folder))
        self.events.Reload()

    def get(self, route: str, **query: str | list[str]) -> tuple[int, Any]:
        answer = self.client.get(f"/data/plugin/hesd/{route}", query_string=query)
        return answer.status_code, json.loads(answer.get_data())


class Server:
    """One address for all tabs of a process, at which the browser has Plotly compiled after the first."""

    def __init__(self) -> None:
        self._server = make_server("localhost", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def show(self, tab: Tab) -> str:
        """Serve a tab instead of that before, and return the address."""
        self._tab = tab
        return f"http://localhost:{self._server.port}/"

    def _answer(self, environ: Any, start_response: Any) -> Any:
        return self._tab.application(environ, start_response)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
