"""A stand-in accelerator: to PyTorch a device "standin" with memory and generator of its own; its data lie on the CPU.

Operations that mix devices, or take the generator of another, fail, as on a GPU. Where `STANDIN.has_float64` is false
there is no float64, as on Apple's MPS. What makes the computer wait for an accelerator (reading a number, copies
between devices without `non_blocking`) is counted.

Importing it registers the device, once and for all in a process: import it before anything has been differentiated, in
a process of its own. It uses PyTorch's backends in Python (private, and new), and DLPack, by which two tensors, one on
each device, share memory.
"""

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "standin"
_DEVICE = 12  # `kDLExtDev`: DLPack's number for devices that are not its own
_CPU = 1
_CPU_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_DOUBLE = {torch.float64, torch.complex128}

aten = torch.ops.aten
_INDEXING = {aten.index.Tensor, aten.index.Tensor_out, aten.index_put_.default, aten._index_put_impl_.default}
"""Operations that take indices on the CPU, too, and wait for the device where these are a mask."""

_WAITING = {aten.nonzero.default, aten.masked_select.default, aten.equal.default, aten._unique2.default}
"""Operations whose result, or its size, the computer must know."""


class _Module:
    """What `torch.standin` is."""

    def __init__(self) -> None:
        self.has_float64 = True
        self.is_there = True
        self.waits: list[str] = []
        self._generator = torch.Generator().manual_seed(0)

    def is_available(self) -> bool:
        return self.is_there

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: object) -> None: ...

    def _is_in_bad_fork(self) -> bool:
        return False

    def _lazy_init(self) -> None: ...

    def manual_seed(self, seed: int) -> None:
        self._generator.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: object = None) -> Tensor:
        return self._generator.get_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        self._generator.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def synchronize(self, device: object = None) -> None:
        self.waits.append("synchronize")

    @contextlib.contextmanager
    def counted(self) -> Iterator[list[str]]:
        """Collect what makes the computer wait inside."""
        before, self.waits = self.waits, []
        try:
            yield self.waits
        finally:
            self.waits = before

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Let PyTorch's generator of the CPU stand for that of the device."""
        own = torch.get_rng_state()
        torch.set_rng_state(self._generator.get_state())
        try:
            yield
        finally:
            self._generator.set_state(torch.get_rng_state())
            torch.set_rng_state(own)


STANDIN = _Module()

_api = ctypes.pythonapi
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _recast(tensor: Tensor, device: int) -> Tensor:
    """Return a tensor in the same memory on another device."""
    capsule = torch._C._to_dlpack(tensor)
    address = _api.PyCapsule_GetPointer(capsule, b"dltensor")
    ctypes.c_int32.from_address(address + ctypes.sizeof(ctypes.c_void_p)).value = device
    return torch._C._from_dlpack(capsule)


def on_cpu(tensor: Tensor) -> Tensor:
    """Return a tensor of the device as one of the CPU in the same memory."""
    return _recast(tensor, _CPU)


def _on_device(tensor: Tensor) -> Tensor:
    if tensor.dtype in _DOUBLE and not STANDIN.has_float64:
        msg = f"Cannot convert a {NAME} Tensor to {tensor.dtype} as the {NAME} framework doesn't support float64."
        raise TypeError(msg)
    return _recast(tensor.resolve_conj().resolve_neg(), _DEVICE)


def _is_own(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _is_of(view: Tensor, storage: torch.UntypedStorage) -> bool:
    start = storage.data_ptr()
    return start <= view.data_ptr() < start + storage.nbytes()


def _view(like: Tensor, base: Tensor) -> Tensor:
    """Return a view of a tensor of the device: what `like` is of that tensor's memory on the CPU."""
    storage = base.untyped_storage()
    offset = (like.data_ptr() - storage.data_ptr()) // like.element_size()
    view = _on_device(torch.empty(0, dtype=like.dtype))
    return aten.set_.source_Storage_storage_offset.redispatch(
        _CPU_KERNELS, view, storage, offset, like.shape, like.stride()
    )


class _Call:
    """A call of an operation of the device, to be made on the CPU."""

    def __init__(self, operation: Any) -> None:
        self._operation = operation
        self._own: list[tuple[Tensor, Tensor]] = []  # tensors of the device, and the same on the CPU

    def to_cpu(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor_to_cpu(value)
        if isinstance(value, list | tuple):
            return [self.to_cpu(item) for item in value]
        return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value

    def _tensor_to_cpu(self, tensor: Tensor) -> Tensor:
        if _is_own(tensor):
            # An empty one may be for the result, and must have memory that grows.
            alias = on_cpu(tensor) if tensor.numel() else torch.empty(tensor.shape, dtype=tensor.dtype)
            self._own.append((tensor, alias))
            return alias
        if tensor.dim() and self._operation not in _INDEXING:
            msg = f"Expected all tensors to be on the same device, but {self._operation} found {NAME} and cpu!"
            raise RuntimeError(msg)
        return tensor

    def to_device(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(self.to_device(item) for item in value)
        return self._tensor_to_device(value) if isinstance(value, Tensor) else value

    def _tensor_to_device(self, result: Tensor) -> Tensor:
        for tensor, alias in self._own:
            if result is alias:
                if result.shape != tensor.shape:
                    _set(tensor, _on_device(result).untyped_storage(), 0, result.shape, result.stride())
                return tensor
        if result.numel():
            for tensor, _ in self._own:
                if _is_of(result, tensor.untyped_storage()):
                    return _view(result, tensor)
        return _on_device(result)


def _run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation of the device by that of the CPU."""
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != NAME:
        msg = f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'"
        raise RuntimeError(msg)
    call = _Call(operation)
    args = tuple(map(call.to_cpu, args))
    kwargs = {name: call.to_cpu(value) for name, value in kwargs.items()}
    is_masked = operation in _INDEXING and any(index is not None and index.dtype is torch.bool for index in args[1])
    if operation in _WAITING or is_masked:
        STANDIN.waits.append(str(operation))
    if torch.Tag.nondeterministic_seeded in operation.tags:
        with STANDIN.drawing():
            return call.to_device(operation(*args, **kwargs))
    return call.to_device(operation(*args, **kwargs))


def _item(tensor: Tensor) -> Any:
    STANDIN.waits.append("item")
    return on_cpu(tensor).item()


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if not (_is_own(source) and _is_own(target)) and not non_blocking:
        STANDIN.waits.append(f"copy to {target.device.type}")
    (on_cpu(target) if _is_own(target) else target).copy_(on_cpu(source) if _is_own(source) else source)
    return target


def _set(target: Tensor, source: Any, offset: int, size: Any, stride: Any = ()) -> Tensor:
    return aten.set_.source_Storage_storage_offset.redispatch(_CPU_KERNELS, target, source, offset, size, stride)


def _set_to_all(target: Tensor, source: Any) -> Tensor:
    return _set(target, source, 0, (source.nbytes() // target.element_size(),), (1,))


def _as_strided(tensor: Tensor, size: Any, stride: Any, storage_offset: int | None = None) -> Tensor:
    return aten.as_strided.default.redispatch(_CPU_KERNELS, tensor, size, stride, storage_offset)


def _resize(tensor: Tensor, size: Any, *, memory_format: Any = None) -> Tensor:
    fresh = torch.empty(size, dtype=tensor.dtype, device=NAME)
    kept = min(tensor.numel(), fresh.numel())
    on_cpu(fresh).flatten()[:kept] = on_cpu(tensor).flatten()[:kept]
    return _set(tensor, fresh.untyped_storage(), 0, fresh.shape, fresh.stride())


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *options: Any) -> Any:
    *geometry, mask = options
    return _run(aten.convolution_backward.default, grad, x, weight, [weight.shape[0]], *geometry, mask)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute in the type of autocast; the other operations do not know it."""
    dtype = torch.get_autocast_dtype(NAME)
    with torch.autocast(NAME, enabled=False):
        return torch.nn.functional.linear(*(t if t is None else t.to(dtype) for t in (x, weight, bias)))


_clone_storage = torch.UntypedStorage.clone


def _cloned(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Copy a storage; PyTorch's own way needs an allocator, which a backend in Python cannot have."""
    if storage.device.type != NAME:
        return _clone_storage(storage)
    everything = _set(torch.empty(0, dtype=torch.uint8, device=NAME), storage, 0, (storage.nbytes(),), (1,))
    return everything.clone().untyped_storage()


def _register() -> list[torch.library.Library]:
    _setup_privateuseone_for_python_backend(NAME, backend_module=STANDIN)
    everything, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(_run, "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    own.impl("linear", _linear, "AutocastPrivateUse1")
    kernels = {
        "_local_scalar_dense": _item,
        "_copy_from": _copy_from,
        "set_.source_Storage_storage_offset": _set,
        "set_.source_Storage": _set_to_all,
        "as_strided": _as_strided,
        "resize_": _resize,
        "convolution_overrideable": functools.partial(_run, aten.convolution.default),
        "convolution_backward_overrideable": _convolution_backward,
    }
    for name, kernel in kernels.items():
        own.impl(name, kernel, "PrivateUse1")
    torch.UntypedStorage.clone = _cloned
    return [everything, own]


_LIBRARIES = _register()
