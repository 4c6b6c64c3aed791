"""Pickling of the user's objects: small ones are pickled, others are replaced by a stand-in that names the object."""

from __future__ import annotations

import copy
import pickle
from multiprocessing.context import get_spawning_popen
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_PICKLED_BYTES = 2**16
"""Largest pickle of one object: functions and configurations are smaller, data sets and models larger."""


class LeftOutError(RuntimeError):
    """A pickled copy lacks an argument of the original."""


class LeftOut:
    """A stand-in for an argument that was not pickled; every use of it raises a LeftOutError.

    Args:
        name: Name of the argument.
        reason: Why it was not pickled.
        title: The `__qualname__` of a function, which is part of names of checkpoints; None for other objects.
    """

    def __init__(self, name: str, reason: str, title: str | None = None) -> None:
        self._name = name
        self._reason = reason
        if title is not None:
            self.__qualname__ = title

    def __repr__(self) -> str:
        return f"<`{self._name}`, not pickled: {self._reason}>"

    def refuse(self) -> NoReturn:
        """Raise the error that names the argument.

        Raises:
            LeftOutError: Always.
        """
        msg = (
            f"`{self._name}` is missing in this pickled copy of the callback, because {self._reason}: make a new "
            f"callback with `{self._name}`, or pass a function defined at the top level of a module, which can be "
            "pickled."
        )
        raise LeftOutError(msg)

    def __call__(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Raise the error, in place of a function."""
        self.refuse()

    def __iter__(self) -> Iterator[Any]:
        self.refuse()


class Portable:
    """A wrapper of an argument in the state of an object: unpickled or deep-copied, it becomes the argument itself.

    A deep copy shares the argument. A pickle contains the argument if that takes at most `MAX_PICKLED_BYTES`, or if the
    pickle goes to a process that is being started; otherwise it contains a `LeftOut`.
    """

    def __init__(self, name: str, value: Any) -> None:
        self._name = name
        self._value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._value

    def __reduce__(self) -> Any:
        max_bytes = MAX_PICKLED_BYTES if get_spawning_popen() is None else None
        reason = unpicklable_reason(self._value, max_bytes)
        if reason is None:
            return _itself, (self._value,)
        title = getattr(self._value, "__qualname__", None)
        return LeftOut, (self._name, reason, title if isinstance(title, str) else None)


def unpicklable_reason(value: object, max_bytes: int | None = MAX_PICKLED_BYTES) -> str | None:
    """Return why an object is not pickled: it cannot be, or takes more than `max_bytes`; None if it is."""
    try:
        _Pickler(_Meter(max_bytes), max_bytes).dump(value)
    except _TooLargeError:
        return f"it takes more than {MAX_PICKLED_BYTES // 1024} KiB"
    except Exception as error:  # noqa: BLE001 - the user's objects may raise anything
        return f"it cannot be pickled ({type(error).__name__}: {str(error)[:200]})"
    return None


class _TooLargeError(Exception):
    """The pickle is too large already."""


class _Meter:
    """A file that counts the bytes written to it, and stores none."""

    def __init__(self, max_bytes: int | None) -> None:
        self._max_bytes = max_bytes
        self._written = 0

    def write(self, data: Any) -> int:
        self._written += len(data)
        if self._max_bytes is not None and self._written > self._max_bytes:
            raise _TooLargeError
        return len(data)


class _Pickler(pickle.Pickler):
    """A pickler that stops at a large tensor or array, before it copies the values."""

    def __init__(self, file: Any, max_bytes: int | None) -> None:
        super().__init__(file, protocol=2)  # that of `torch.save`
        self._max_bytes = max_bytes

    def reducer_override(self, obj: Any) -> Any:
        if self._max_bytes is not None and issubclass(type(obj), (Tensor, np.ndarray)):
            size = obj.untyped_storage().nbytes() if isinstance(obj, Tensor) else obj.nbytes
            if size > self._max_bytes:
                raise _TooLargeError
        return NotImplemented


def _itself(value: Any) -> Any:
    return value


def deep_copied(original: Any, memo: dict[int, Any]) -> Any:
    """Return a deep copy of an object that has `__getstate__` and `__setstate__`, for its `__deepcopy__`."""
    kind: Any = type(original)
    made = kind.__new__(kind)
    memo[id(original)] = made
    made.__setstate__(copy.deepcopy(original.__getstate__(), memo))
    return made
