"""Gather: rows of a hidden state into a contiguous tensor, by the native core where it is built.

Engines: ``cpu`` (actcache._core, C++ threads), ``cuda`` (actcache._cuda, a kernel), ``torch`` (index_select, where the
native module is not built). The engine of a device is chosen once. ``ACTCACHE_ENGINE=torch`` chooses torch for both.
Knows tensors and the native core.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

import torch

from actcache.errors import InputError, KernelError

_MODULES = {"cpu": "actcache._core", "cuda": "actcache._cuda"}


def engine(device: torch.device | str) -> str:
    """The engine that gathers from tensors on this device: ``cpu``, ``cuda`` or ``torch``."""
    kind = torch.device(device).type
    return kind if kind in _MODULES and _native(kind)[0] is not None else "torch"


def describe_engines() -> list[str]:
    """One line a device: which engine serves it, and why where that is torch."""
    lines = []
    for kind in _MODULES:
        module, reason = _native(kind)
        lines.append(f"{kind}: {_MODULES[kind]}" if module is not None else f"{kind}: torch ({reason})")
    if not torch.cuda.is_available():
        lines.append("this torch sees no CUDA device")
    return lines


def gather_rows(src: torch.Tensor, row_ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``out[i, :] = src[row_ids[i], :]``, bit for bit.

    Args:
        src: ``[T, D]``, any dtype of 1, 2, 4 or 8 bytes, any strides.
        row_ids: ``[n]`` int64 on the CPU, in any order, repeats allowed, each in 0..T-1.
        out: ``[n, D]`` contiguous, of src's dtype, on src's device; where src is on CUDA also page-locked host memory
            (the copy is then queued on the current stream: synchronise before reading). None makes one beside src.

    Returns:
        ``out``.

    Raises:
        InputError: shape, dtype or device does not fit, or an id is out of range; nothing was written then.
        KernelError: the CUDA kernel could not be launched.
    """
    src = src.detach()
    if src.ndim != 2:
        raise InputError(f"src has shape {tuple(src.shape)}, expected [T, D]")
    if row_ids.ndim != 1 or row_ids.dtype != torch.int64 or row_ids.device.type != "cpu":
        raise InputError(
            f"row_ids are {row_ids.dtype} {tuple(row_ids.shape)} on {row_ids.device}, expected int64 [n] on cpu"
        )
    if src.dtype.itemsize not in (1, 2, 4, 8) or src.is_complex():
        raise InputError(f"src is {src.dtype}; elements of 1, 2, 4 or 8 bytes can be gathered")
    row_ids = row_ids.contiguous()
    shape = (len(row_ids), src.shape[1])
    if out is None:
        out = torch.empty(shape, dtype=src.dtype, device=src.device)
    elif tuple(out.shape) != shape or out.dtype != src.dtype or not out.is_contiguous() or not _reachable(src, out):
        raise InputError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}, expected contiguous {src.dtype} {shape} on {src.device}"
        )
    _check_ids(row_ids, len(src))
    module, _ = _native(src.device.type) if src.device.type in _MODULES else (None, "")
    if module is None:
        rows = src[row_ids.to(src.device)]
        return out.copy_(rows, non_blocking=src.device.type == "cuda")
    geometry = (src.data_ptr(), *src.shape, src.dtype.itemsize, *(s * src.dtype.itemsize for s in src.stride()))
    if src.device.type == "cpu":
        module.gather_rows(*geometry, row_ids.data_ptr(), len(row_ids), out.data_ptr(), torch.get_num_threads())
        return out
    device_ids = row_ids.pin_memory().to(src.device, non_blocking=True)
    with torch.cuda.device(src.device):
        stream = torch.cuda.current_stream().cuda_stream
        try:
            module.gather_rows(*geometry, device_ids.data_ptr(), len(row_ids), out.data_ptr(), stream)
        except RuntimeError as error:
            raise KernelError(str(error)) from error
    return out


@cache
def _native(kind: str) -> tuple[ModuleType | None, str]:
    """The native module of a device kind, or None and the reason why torch serves instead."""
    if os.environ.get("ACTCACHE_ENGINE") == "torch":
        return None, "ACTCACHE_ENGINE=torch"
    try:
        return importlib.import_module(_MODULES[kind]), ""
    except ModuleNotFoundError:
        return None, f"{_MODULES[kind]} was not built"


def _reachable(src: torch.Tensor, out: torch.Tensor) -> bool:
    return out.device == src.device or (src.is_cuda and out.device.type == "cpu" and out.is_pinned())


def _check_ids(row_ids: torch.Tensor, n_rows: int) -> None:
    if len(row_ids) and (int(row_ids.min()) < 0 or int(row_ids.max()) >= n_rows):
        wrong = int(torch.nonzero((row_ids < 0) | (row_ids >= n_rows))[0])
        raise InputError(f"row_ids[{wrong}] is {int(row_ids[wrong])}, outside 0..{n_rows - 1}")
