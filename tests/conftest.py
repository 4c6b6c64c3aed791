import functools
import gc
import math
import os
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points

# On matrices this small several threads only wait for each other, many times longer than they work. NumPy reads this
# when it is imported, and so do the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from lightning_utilities.core.rank_zero import WarningCache

LONG = ("test_sharded", "test_ddp", "test_accelerator", "test_examples", "test_cli", "test_tracking")
LONG += ("test_browser", "test_export", "test_runs", "test_state")  # one browser, in one worker
"""Files whose tests share a long run. They come first: workers steal tests from the end of each other's lists, and the
second half of such a file would make another worker repeat its run."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked `slow`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes long: --slow"))


@pytest.fixture(autouse=True)
def no_figures_left() -> Iterator[None]:
    """Close the figures that pyplot keeps, as a notebook does at the end of a cell."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@functools.lru_cache(maxsize=1)
def warning_caches(_imported: int) -> list[WarningCache]:
    """What Lightning's modules have warned of; to look through all modules takes longer than many a test."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("lightning.")]
    found = [vars(module).get("warning_cache") for module in modules]
    return [cache for cache in found if isinstance(cache, WarningCache)]


@pytest.fixture(autouse=True)
def warnings_anew() -> None:
    """Forget what Lightning has warned of, so that no test depends on those that ran before it in its process."""
    for cache in warning_caches(len(sys.modules)):
        cache.clear()


@pytest.fixture(autouse=True, scope="session")
def settings_of_all_tests() -> Iterator[None]:
    """Save time where it is long for all, and let every test have every warning but those of long analyses."""
    torch.set_warn_always(True)  # PyTorch gives some warnings only to the first test of a process
    with pytest.MonkeyPatch.context() as patch:
        # The first Trainer looks for callbacks of installed packages: for each it takes as long as a short training.
        patch.setattr("lightning.fabric.utilities.registry.entry_points", functools.cache(entry_points))
        # Analyses of the tests take longer than their trainings of a few steps.
        patch.setattr("lightning_hesd.training.cost_notice.WARNED", math.inf)
        gc.collect()
        gc.freeze()  # leaves out what was imported: a failed analysis begins a collection, which took half a second
        yield
        gc.unfreeze()
    torch.set_warn_always(False)


@pytest.fixture(autouse=True)
def single_thread() -> None:
    """Compute on one thread, whatever a test or a program before has set."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def problem_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what benchmarks store of their problems in a folder of the tests, and to one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.problems.CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(torch, "set_num_threads", lambda _: None)  # two threads wait for each other where all are busy
        yield
