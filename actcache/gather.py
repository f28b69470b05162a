"""Gather: rows of a hidden state into a contiguous tensor, by the native core where it is built.

Engines: ``cpu`` (actcache._core, C++ threads), ``cuda`` (actcache._cuda, a kernel), ``torch`` (index_select, where the
native module is not built, and on every other device). The engine of a device is chosen once a process, by what is
installed; no engine stands in for another that failed. ``ACTCACHE_ENGINE=torch`` chooses torch everywhere.
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
# Engines move bits: any dtype is gathered as the integer of its size, so no NaN payload meets an arithmetic unit.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def engine(device: torch.device | str) -> str:
    """The engine that gathers from tensors on this device: ``cpu``, ``cuda`` or ``torch``.

    Raises:
        InputError: ACTCACHE_ENGINE holds another word than ``torch``.
        KernelError: the native module is there but does not load.
    """
    kind = torch.device(device).type
    return "torch" if _native(kind)[0] is None else kind


def describe_engines() -> list[str]:
    """One line for the CPU and one for CUDA: the device, its engine, and why that one. Raises as `engine` does."""
    lines = []
    for kind in _MODULES:
        module, why = _native(kind)
        if module is not None and kind == "cpu":
            why += f", up to {torch.get_num_threads()} threads"
        elif module is not None:
            try:
                why += f", devices: {module.device_count()}"
            except RuntimeError as error:
                why += f", no usable device: {error}"
        lines.append(f"{kind}: {engine(kind)} ({why})")
    return lines


def gather_rows(src: torch.Tensor, row_ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``out[i, :] = src[row_ids[i], :]``, bit for bit, outside autograd.

    Args:
        src: ``[T, D]``, any dtype of 1, 2, 4 or 8 bytes but complex, any strides.
        row_ids: ``[n]`` int64 on the CPU, in any order, repeats allowed, each in 0..T-1.
        out: ``[n, D]`` contiguous, of src's dtype, on src's device, sharing no memory with src or row_ids. Where src is
            on CUDA it may also be page-locked host memory. None makes one beside src.

    Returns:
        ``out``. From CUDA, the copy is queued on src's current stream: synchronise before reading page-locked memory,
        and keep it until then. ``row_ids`` may be changed or dropped at once.

    Raises:
        InputError: shape, dtype, layout or device does not fit, or an id is out of range; nothing was written then.
        KernelError: the CUDA kernel could not be launched, or a native module does not load.
    """
    if src.ndim != 2 or src.layout != torch.strided:
        raise InputError(f"src is {src.layout} of shape {tuple(src.shape)}, expected a strided [T, D]")
    if src.dtype.itemsize not in _BITS or src.is_complex():
        raise InputError(f"src is {src.dtype}, expected real elements of 1, 2, 4 or 8 bytes")
    if row_ids.ndim != 1 or row_ids.dtype != torch.int64 or row_ids.device.type != "cpu":
        found = f"{row_ids.dtype} {tuple(row_ids.shape)} on {row_ids.device}"
        raise InputError(f"row_ids are {found}, expected int64 [n] on cpu")
    row_ids = row_ids.contiguous()
    # A negation that torch keeps as a flag (the imaginary part of a conjugate) is not in the bits yet.
    src = src.detach().resolve_neg()
    shape = (len(row_ids), src.shape[1])
    if out is None:
        out = torch.empty(shape, dtype=src.dtype, device=src.device)
    else:
        _check_out(out, shape, src, row_ids)
    _check_ids(row_ids, len(src))

    bits = _BITS[src.dtype.itemsize]
    source, target = src.view(bits), out.detach().view(bits)
    module, _ = _native(src.device.type)
    if module is None:
        _gather_by_torch(source, row_ids, target)
    elif src.device.type == "cpu":
        _call(module, source, row_ids, target, torch.get_num_threads())
    else:
        with torch.cuda.device(src.device):
            # A copy of our own: the caller may change row_ids before the stream gets to reading them.
            pinned = torch.empty(len(row_ids), dtype=torch.int64, pin_memory=True).copy_(row_ids)
            device_ids = pinned.to(src.device, non_blocking=True)
            _call(module, source, device_ids, target, torch.cuda.current_stream().cuda_stream)
    return out


@cache
def _native(kind: str) -> tuple[ModuleType | None, str]:
    """The native module of a device kind and what it is, or None and the reason why torch serves instead."""
    wanted = os.environ.get("ACTCACHE_ENGINE", "")
    if wanted not in ("", "torch"):
        raise InputError(f"ACTCACHE_ENGINE is {wanted!r}, expected torch, or unset it to use the native core")
    if wanted == "torch":
        return None, "ACTCACHE_ENGINE=torch"
    if kind not in _MODULES:
        return None, f"no native core for {kind}"
    name = _MODULES[kind]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        return None, f"{name} is not built: {error}"
    except ImportError as error:
        raise KernelError(
            f"{name} does not load ({error}): reinstall actcache, or set ACTCACHE_ENGINE=torch"
        ) from error
    return module, f"{name} {module.version()}"


def _call(module: ModuleType, source: torch.Tensor, row_ids: torch.Tensor, target: torch.Tensor, how: int) -> None:
    """The native call; `how` is the number of threads or the stream."""
    size = source.element_size()
    strides = [stride * size for stride in source.stride()]
    geometry = (source.data_ptr(), *source.shape, size, *strides, row_ids.data_ptr(), len(row_ids), target.data_ptr())
    try:
        module.gather_rows(*geometry, how)
    except (ValueError, IndexError) as error:
        raise InputError(str(error)) from error
    except RuntimeError as error:
        raise KernelError(f"{error}; ACTCACHE_ENGINE=torch gathers without this kernel") from error


def _gather_by_torch(source: torch.Tensor, row_ids: torch.Tensor, target: torch.Tensor) -> None:
    ids = row_ids.to(source.device)
    if target.device == source.device:
        torch.index_select(source, 0, ids, out=target)
    else:
        target.copy_(source.index_select(0, ids), non_blocking=True)


def _check_out(out: torch.Tensor, shape: tuple[int, int], src: torch.Tensor, row_ids: torch.Tensor) -> None:
    page_locked = src.is_cuda and out.device.type == "cpu" and out.is_pinned()
    fits = tuple(out.shape) == shape and out.dtype == src.dtype and (out.device == src.device or page_locked)
    if not fits or not out.is_contiguous() or out.is_neg():
        found = f"{'contiguous' if out.is_contiguous() else 'strided'} {out.dtype} {tuple(out.shape)} on {out.device}"
        where = f"{src.device} or page-locked" if src.is_cuda else str(src.device)
        raise InputError(f"out is {found}, expected contiguous {src.dtype} {shape} on {where}")
    for name, other in (("src", src), ("row_ids", row_ids)):
        (start, stop), (other_start, other_stop) = _span(out), _span(other)
        if out.device == other.device and start < other_stop and other_start < stop:
            raise InputError(f"out shares memory with {name}, expected memory of its own")


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte address of a tensor and the one behind its last; torch's strides are never negative."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (steps + 1) * tensor.element_size()


def _check_ids(row_ids: torch.Tensor, n_rows: int) -> None:
    if len(row_ids) and (int(row_ids.min()) < 0 or int(row_ids.max()) >= n_rows):
        wrong = int(torch.nonzero((row_ids < 0) | (row_ids >= n_rows))[0])
        raise InputError(f"row_ids[{wrong}] is {int(row_ids[wrong])}, expected 0 <= id < {n_rows}")
