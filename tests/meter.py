"""A meter of memory for our own networks, as a dispatch mode, which also sees what other threads free."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CountingMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations make inside it, on any device, views and inputs not.

    Attributes:
        live: Bytes that are there now.
        peak: The most there have been.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._count(value, is_new=False)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value, is_new=True)
        self.peak = max(self.peak, self.live)
        return result

    def _count(self, tensor: Tensor, *, is_new: bool) -> None:
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if is_new else 0
        self.live += size
        self._known[key] = weakref.ref(storage, self._forgetting(key, size))

    def _forgetting(self, key: int, size: int) -> Callable[[object], None]:
        def forget(_: object) -> None:
            self._known.pop(key, None)
            self.live -= size

        return forget
