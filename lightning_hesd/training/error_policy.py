"""What happens when an analysis or its output fails: a warning, and training goes on; or the exception."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lightning_hesd.numerics.operators.verification import WrongDerivativeError
from lightning_hesd.training.compat import messages
from lightning_hesd.training.compat.namespaces import MisconfigurationException
from lightning_hesd.training.isolation.training_snapshot import DisturbedTrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator

OnError = Literal["warn", "raise"]

FAULTS_OF_THE_LOSS = (DisturbedTrainingError, WrongDerivativeError)
"""Failures that later analyses of the same loss most likely repeat: a run warns once of each."""


@dataclass
class Attempt:
    """A block that may fail.

    Attributes:
        failure: Text of the failure; None: the block has not failed.
    """

    failure: str | None = None


class ErrorPolicy:
    """Turns failures into warnings, or lets the exceptions through.

    Attributes:
        on_error: "warn" or "raise"; another value is a ValueError.
    """

    def __init__(self, on_error: OnError = "warn") -> None:
        if on_error not in {"warn", "raise"}:
            msg = f"`on_error` must be 'warn' or 'raise', got {on_error!r}."
            raise ValueError(msg)
        self.on_error: OnError = on_error
        self._warned: set[object] = set()

    @property
    def raises(self) -> bool:
        """Whether exceptions are let through."""
        return self.on_error == "raise"

    def restart(self) -> None:
        """Begin a run: warn again of all that was warned of once."""
        self._warned.clear()

    @contextlib.contextmanager
    def guard(self, consequence: str, on_error: OnError | None = None) -> Iterator[Attempt]:
        """Turn an exception in a block into a warning, unless exceptions are to be raised.

        The warning begins with the consequence for the user. `on_error` replaces that of the policy.

        Yields:
            The attempt, which has the text of the failure afterwards.
        """
        attempt = Attempt()
        try:
            yield attempt
        except Exception as error:
            if (on_error or self.on_error) == "raise":
                raise
            attempt.failure = self.describe(error)
            self.report(f"{consequence}. {attempt.failure}", error)

    def complain(
        self, message: str, *, key: str | None = None, harmless: bool = False, cause: Exception | None = None
    ) -> None:
        """Warn of a problem that is no exception, or raise one; of all problems with the same key, warn once in a run.

        Raises:
            MisconfigurationException: If exceptions are to be raised, and the problem is not harmless.
        """
        if self.raises and not harmless:
            raise MisconfigurationException(message) from cause
        if key is None or key not in self._warned:
            messages.warn(message)
        self._warned.add(key)

    def describe(self, error: Exception) -> str:
        """Return the text of a failure, for records and warnings."""
        return f"{type(error).__name__}: {error}"

    def report(self, message: str, error: Exception) -> None:
        """Warn of a failure; information only if a message in this run has differed in its numbers at most.

        So does one of another fault of the loss of the same type.
        """
        key = type(error) if isinstance(error, FAULTS_OF_THE_LOSS) else re.sub(r"\d+", "", message)
        say = messages.inform if key in self._warned else messages.warn
        self._warned.add(key)
        say(message)
