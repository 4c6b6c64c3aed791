from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_hesd import HessianSpectrumCallback
from tests.browser import Page, start
from tests.tab import Server, train
from tests.training.digits_run import data


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HessianSpectrumCallback]:
    """A folder with one training, net/version_0, and its callback."""
    folder = tmp_path_factory.mktemp("runs")
    _, callback = train(folder, at_start=True, layers="auto", generalization_dataloader=data())
    return folder, callback


@pytest.fixture(scope="session")
def driver() -> Iterator[Any]:
    found = start()
    yield found
    found.quit()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


@pytest.fixture
def page(driver: Any) -> Iterator[Page]:
    """A page for one test."""
    yield Page(driver)
    driver.get("about:blank")
    driver.set_window_size(1400, 1000)
