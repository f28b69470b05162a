"""Devices that are not there: tensors on the CPU that say they are on one, and refuse each other as those of two would.

torch's own fake tensors have no values, and a capture decides by values. These have: what is computed on pretended
devices is what the CPU computes, bit for bit, so that a store of theirs is held against a plain one. Streams are not
pretended, nor is what other threads do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_GETTERS: dict[Any, Any] = {
    torch.Tensor.device.__get__: lambda device, tensor: device,  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__: lambda device, tensor: device.type == "cuda",  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: lambda device, tensor: device.type == "cpu",  # type: ignore[attr-defined]
    torch.Tensor.is_pinned: lambda device, tensor: getattr(tensor, "pinned", False),
}
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
# Copies go from one device to another; ids on the CPU choose rows on any.
_OF_FIRST = {torch.Tensor.copy_, torch.Tensor.__setitem__, torch.Tensor.__deepcopy__, _SET_DATA}
_OF_FIRST |= {torch._has_compatible_shallow_copy_type}
_CHOICES = {torch.Tensor.__getitem__}
_ON_CPU = {torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__}


def device_of(tensor: torch.Tensor) -> torch.device:
    """Where a tensor says that it is."""
    return getattr(tensor, "pretended", CPU)


def _named(device: Any) -> torch.device:
    found = torch.device(device)
    return torch.device("cuda", 0) if found == torch.device("cuda") else found


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class Pretended(TorchFunctionMode):
    """Within this context devices are pretended, in the thread that entered it.

    Attributes:
        products: how many linear layers ran on each device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[str] = Counter()

    def __enter__(self) -> Pretended:
        made = torch.nn.Parameter.__new__

        def make(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
            parameter = made(cls, data, requires_grad)
            parameter.pretended = CPU if data is None else device_of(data)  # no mode hears of it
            return parameter

        self._patch = mock.patch.object(torch.nn.Parameter, "__new__", make)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _GETTERS:
            return _GETTERS[func](device_of(args[0]), args[0])
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            return self._moved(func, args, kwargs)
        pinned = kwargs.pop("pin_memory", False)
        wanted = _named(kwargs.pop("device")) if kwargs.get("device") is not None else None
        device = self._common(func, args, kwargs) if wanted is None else wanted
        if func in _ON_CPU and device != CPU:
            raise TypeError(f"a tensor on {device} is no array: copy it to the CPU first")
        if func is torch.nn.functional.linear:
            self.products[str(device)] += 1
        found = func(*args, **kwargs)
        if func == _SET_DATA:
            args[0].pretended = device_of(args[1])
        for tensor in _tensors(found):
            tensor.pretended, tensor.pinned = device, pinned  # type: ignore[attr-defined]
        return found

    @staticmethod
    def _moved(func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        tensor, wanted, dtype = args[0], device_of(args[0]), kwargs.get("dtype")
        for one in (*args[1:], kwargs.get("device")):
            if isinstance(one, torch.Tensor):
                wanted, dtype = device_of(one), one.dtype
            elif isinstance(one, torch.dtype):
                dtype = one
            elif isinstance(one, str | torch.device):
                wanted = _named(one)
        wanted = CPU if func is torch.Tensor.cpu else wanted
        copy = kwargs.get("copy", False) or wanted != device_of(tensor)
        found = tensor.to(dtype=tensor.dtype if dtype is None else dtype, copy=copy)
        found.pretended = wanted
        return found

    @staticmethod
    def _common(func: Any, args: Any, kwargs: Any) -> torch.device:
        """The one device of all that is given."""
        given = list(_tensors((args, kwargs)))
        if func in _OF_FIRST:
            return device_of(given[0])
        where = {device_of(one) for one in given if one.dim() or device_of(one) != CPU}
        if func in _CHOICES:
            where -= {CPU} if device_of(given[0]) != CPU else set()
        if len(where) > 1:
            raise RuntimeError(f"{getattr(func, '__name__', func)} is given tensors on {', '.join(map(str, where))}")
        return next(iter(where), device_of(given[0]) if given else CPU)
