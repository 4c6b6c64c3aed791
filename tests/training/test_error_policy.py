"""Failures beside training: warnings with their consequence, or the exceptions themselves."""

import warnings
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_hesd.training.error_policy import FAULTS_OF_THE_LOSS, ErrorPolicy


def said(work: Any) -> list[str]:
    """Return the warnings that some work causes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [str(w.message) for w in caught]


def fail(policy: ErrorPolicy, error: Exception, **arguments: Any) -> str | None:
    with policy.guard("no plot", **arguments) as attempt:
        raise error
    return attempt.failure


def test_a_failure_becomes_a_warning_and_a_text() -> None:
    policy, found = ErrorPolicy("warn"), []
    assert said(lambda: found.append(fail(policy, OSError("full")))) == ["lightning_hesd: no plot. OSError: full"]
    assert found == ["OSError: full"]
    with policy.guard("no plot") as attempt:
        pass
    assert attempt.failure is None


@pytest.mark.parametrize(("policy", "guard"), [("raise", None), ("warn", "raise"), ("raise", "warn")])
def test_a_guard_overrules_the_policy(policy: Any, guard: Any) -> None:
    raises = guard != "warn"
    with pytest.raises(OSError, match="full") if raises else pytest.warns(RuntimeWarning, match="no plot"):
        assert fail(ErrorPolicy(policy), OSError("full"), on_error=guard) == "OSError: full"


@pytest.mark.parametrize("kind", FAULTS_OF_THE_LOSS)
def test_a_fault_of_the_loss_is_warned_of_once_in_a_run(kind: type[Exception]) -> None:
    policy = ErrorPolicy("warn")
    error = kind("wrong", 1.0) if kind.__name__ == "WrongDerivativeError" else kind("changed")
    for _ in range(2):
        assert [len(said(lambda: fail(policy, error))) for _ in range(3)] == [1, 0, 0]
        policy.restart()


def test_what_fails_again_is_warned_of_once_in_a_run_whatever_its_numbers() -> None:
    policy = ErrorPolicy("warn")
    texts = ["the loss of batch 0 is nan", "the loss of batch 12 is nan", "no room"]
    for _ in range(2):
        assert [len(said(lambda: fail(policy, OSError(text)))) for text in texts] == [1, 0, 1]  # noqa: B023 - at once
        policy.restart()


def test_complaints() -> None:
    policy = ErrorPolicy("warn")
    assert [len(said(lambda: policy.complain("odd", key="odd"))) for _ in range(2)] == [1, 0]
    assert [len(said(lambda: policy.complain("odd"))) for _ in range(2)] == [1, 1]
    policy.on_error = "raise"
    assert said(lambda: policy.complain("fine", harmless=True)) == ["lightning_hesd: fine"]
    cause = OSError("full")
    with pytest.raises(MisconfigurationException, match="odd") as caught:
        policy.complain("odd", cause=cause)
    assert caught.value.__cause__ is cause
