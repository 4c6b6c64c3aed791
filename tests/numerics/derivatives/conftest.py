"""Fixtures of the tests of derivatives."""

from collections.abc import Callable
from typing import Any

import pytest

from lightning_hesd.numerics.derivatives import fast_derivatives


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the replacements that were made, of tensors however small."""
    monkeypatch.setattr(fast_derivatives, "_LARGE", 0)
    made: list[str] = []
    for function, replacement in fast_derivatives.SLOW.items():

        def spy(*args: Any, replacement: Callable[..., Any] = replacement, **kwargs: Any) -> Any:
            result = replacement(*args, **kwargs)
            if result is not None:
                made.append(replacement.__name__)
            return result

        monkeypatch.setitem(fast_derivatives.SLOW, function, spy)
    return made
