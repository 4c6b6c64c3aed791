"""The whole path on an accelerator: one that stands in for those that are not here, with float64 and without it."""

from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

from tests.training import processes

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this version of PyTorch has no backends in Python",
)

SCRIPT = Path(__file__).with_name("accelerated.py")


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """Return what one rank found, and what each of two did."""
    folder = tmp_path_factory.mktemp("accelerated")
    return processes.run_together((SCRIPT, folder / "1", 1), (SCRIPT, folder / "2", 2))


@pytest.fixture(scope="module")
def found(launched: list[list[Any]]) -> Any:
    return launched[0][0]


@pytest.mark.parametrize(("float64", "cases"), [(True, 4), (False, 20)])
def test_every_case_passes(found: Any, float64: bool, cases: int) -> None:
    outcomes = found[f"float64={float64}"]
    assert len(outcomes) >= cases
    for case, trouble in outcomes.items():
        assert trouble is None, f"{case}: {trouble}"


def test_two_ranks_find_what_one_finds(found: Any, launched: list[list[Any]]) -> None:
    first, second = launched[1]
    assert first == second
    [alone], [together] = found["training"], first["training"]
    assert together == pytest.approx(alone, rel=1e-4)
