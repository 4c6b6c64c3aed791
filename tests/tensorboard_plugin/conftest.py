from pathlib import Path

import pytest

from lightning_hesd import HessianSpectrumCallback
from tests.tab import train
from tests.training.digits_run import data


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HessianSpectrumCallback]:
    """A folder with one training, net/version_0, and its callback."""
    folder = tmp_path_factory.mktemp("runs")
    _, callback = train(folder, at_start=True, layers="auto", generalization_dataloader=data())
    return folder, callback
