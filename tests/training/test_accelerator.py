"""The whole path on an accelerator: one that stands in for those that are not here, with float64 and without it."""

from __future__ import annotations

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

WITH_FLOAT64 = [
    *(
        "attention",
        "default_device",
        "differences_wait_once_in_a_step",
        "fit",
        "float64_is_refused_where_there_is_none",
    ),
    *("nothing_waits_in_a_step", "random_numbers_of_the_device"),
]

WITHOUT_FLOAT64 = [
    *WITH_FLOAT64,
    *("autocast", "batches_of_training_are_kept", "checkpoints_may_be_finer_than_the_device", "landscape", "layers"),
    *("metrics", "resume", "samples_are_added"),
    *("analysis_basis_on_the_cpu", "analysis_differences", "analysis_ggn", "analysis_no_basis"),
    *("analysis_preconditioned", "analysis_recomputed", "analysis_residual", "analysis_retained"),
    *("analysis_sampling_error", "analysis_training_mode", "analysis_until_accurate"),
]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """Return what one rank found, and what each of two did."""
    folder = tmp_path_factory.mktemp("accelerated")
    return processes.run_together((SCRIPT, folder / "1", 1), (SCRIPT, folder / "2", 2))


@pytest.fixture(scope="module")
def found(launched: list[list[Any]]) -> Any:
    return launched[0][0]


@pytest.mark.parametrize("case", WITH_FLOAT64)
def test_with_float64(found: Any, case: str) -> None:
    outcome = found["float64=True"][case]
    assert outcome is None, outcome


@pytest.mark.parametrize("case", WITHOUT_FLOAT64)
def test_without_float64(found: Any, case: str) -> None:
    outcome = found["float64=False"][case]
    assert outcome is None, outcome


def test_all_cases_are_listed(found: Any) -> None:
    assert sorted(found["float64=True"]) == sorted(WITH_FLOAT64)
    assert sorted(found["float64=False"]) == sorted(WITHOUT_FLOAT64)


def test_two_ranks_find_what_one_finds(found: Any, launched: list[list[Any]]) -> None:
    first, second = launched[1]
    assert first == second
    [alone], [together] = found["training"], first["training"]
    assert together == pytest.approx(alone, rel=1e-4)
