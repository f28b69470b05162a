"""Gather and scatter: rows of a hidden state into a contiguous tensor and back, by the native core where it is built.

Engines: ``cpu`` (actcache._core, C++ threads), ``cuda`` (actcache._cuda, kernels), ``torch`` (index_select and
index_copy_, where the native module is not built, and on every other device). The engine of a device is chosen once a
process, by what is installed; no engine stands in for another that failed. ``ACTCACHE_ENGINE=torch`` chooses torch
everywhere. Knows tensors and the native core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from actcache.errors import InputError, KernelError
from actcache.native import MODULES, native

# Engines move bits: any dtype is gathered as the integer of its size, so no NaN payload meets an arithmetic unit.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def engine(device: torch.device | str) -> str:
    """The engine that gathers from tensors on this device: ``cpu``, ``cuda`` or ``torch``.

    Raises:
        InputError: ACTCACHE_ENGINE holds another word than ``torch``.
        KernelError: the native module is there but does not load.
    """
    kind = torch.device(device).type
    return "torch" if native(kind)[0] is None else kind


def describe_engines() -> list[str]:
    """One line for the CPU and one for CUDA: the device, its engine, and why that one. Raises as `engine` does."""
    lines = []
    for kind in MODULES:
        module, why = native(kind)
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
    """``out[i, :] = src[row_ids[i], :]``, bit for bit, outside autograd. With repeated ids it expands rows.

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
    src, row_ids = _checked_table("src", src), _checked_form(row_ids)
    # A negation that torch keeps as a flag (the imaginary part of a conjugate) is not in the bits yet.
    src = src.detach().resolve_neg()
    shape = (len(row_ids), src.shape[1])
    if out is None:
        out = torch.empty(shape, dtype=src.dtype, device=src.device)
    else:
        _check_packed("out", out, shape, src.dtype, src, "src", row_ids)
    _check_range(row_ids, len(src))

    source, target = _bits(src), _bits(out.detach())
    if native(src.device.type)[0] is not None:
        _call("gather_rows", source, row_ids, target)
        return out
    ids = row_ids.to(source.device)
    if target.device == source.device:
        torch.index_select(source, 0, ids, out=target)
    else:
        target.copy_(source.index_select(0, ids), non_blocking=True)
    return out


def scatter_rows(src: torch.Tensor, row_ids: torch.Tensor, dst: torch.Tensor) -> torch.Tensor:
    """``dst[row_ids[i], :] = src[i, :]``, bit for bit, outside autograd: the way back of ``gather_rows``.

    Args:
        src: ``[n, D]`` contiguous, of dst's dtype, on dst's device. Where dst is on CUDA it may also be page-locked
            host memory.
        row_ids: ``[n]`` int64 on the CPU, in any order, all different, each in 0..T-1.
        dst: ``[T, D]``, any dtype of 1, 2, 4 or 8 bytes but complex, any strides that give each element a place of its
            own, sharing no memory with src or row_ids.

    Returns:
        ``dst``; rows that no id names are left as they are. To CUDA, the copy is queued on dst's current stream: a
        page-locked ``src`` must be kept unchanged until the stream got there. ``row_ids`` may be changed at once.

    Raises:
        InputError: shape, dtype, layout or device does not fit, or an id is out of range or there twice; nothing was
            written then.
        KernelError: the CUDA kernel could not be launched, or a native module does not load.
    """
    _checked_table("dst", dst)
    row_ids = _checked_form(row_ids)
    if dst.is_neg() or _overlaps_itself(dst):
        found = "a negated view" if dst.is_neg() else f"strides {dst.stride()} for shape {tuple(dst.shape)}"
        raise InputError(f"dst has {found}, expected a place of its own for each element")
    _check_packed("src", src, (len(row_ids), dst.shape[1]), dst.dtype, dst, "dst", row_ids)
    _check_range(row_ids, len(dst))
    in_order, places = row_ids.sort(stable=True)
    twice = places[1:][in_order[1:] == in_order[:-1]]
    if len(twice):
        at = int(twice.min())
        raise InputError(f"row_ids[{at}] is {int(row_ids[at])} again, expected ids that are all different")

    source, target = _bits(src.detach()), _bits(dst.detach())
    if native(dst.device.type)[0] is not None:
        _call("scatter_rows", target, row_ids, source)
    else:
        target.index_copy_(0, row_ids.to(target.device), source.to(target.device))
    return dst


def _call(function: str, table: torch.Tensor, row_ids: torch.Tensor, *packed: torch.Tensor) -> None:
    """The native function of the table's device; ``packed`` are the contiguous rows on the other side."""
    module, _ = native(table.device.type)
    size = table.element_size()
    strides = [stride * size for stride in table.stride()]
    call: Callable[..., None] = getattr(module, function)
    scatters = function == "scatter_rows"

    def memory(tensor: torch.Tensor, is_written: bool) -> Any:
        return tensor.numpy() if is_written and table.device.type == "cpu" else tensor.data_ptr()

    def run(ids: torch.Tensor, how: int) -> None:
        sides = [memory(rows, not scatters) for rows in packed]
        call(memory(table, scatters), *table.shape, size, *strides, ids.data_ptr(), len(ids), *sides, how)

    try:
        if table.device.type == "cpu":
            run(row_ids, torch.get_num_threads())
        else:
            with torch.cuda.device(table.device):
                # A copy of our own: the caller may change row_ids before the stream gets to reading them.
                pinned = torch.empty(len(row_ids), dtype=torch.int64, pin_memory=True).copy_(row_ids)
                device_ids = pinned.to(table.device, non_blocking=True)
                run(device_ids, torch.cuda.current_stream().cuda_stream)
    except (ValueError, IndexError, BufferError) as error:
        raise InputError(str(error)) from error
    except RuntimeError as error:
        raise KernelError(f"{error}; ACTCACHE_ENGINE=torch does without this kernel") from error


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(_BITS[tensor.element_size()])


def _checked_table(name: str, table: torch.Tensor) -> torch.Tensor:
    """The side whose rows are chosen."""
    if table.ndim != 2 or table.layout != torch.strided:
        raise InputError(f"{name} is {table.layout} of shape {tuple(table.shape)}, expected a strided [T, D]")
    if table.dtype.itemsize not in _BITS or table.is_complex():
        raise InputError(f"{name} is {table.dtype}, expected real elements of 1, 2, 4 or 8 bytes")
    return table


def _checked_form(row_ids: torch.Tensor) -> torch.Tensor:
    if row_ids.ndim != 1 or row_ids.dtype != torch.int64 or row_ids.device.type != "cpu":
        found = f"{row_ids.dtype} {tuple(row_ids.shape)} on {row_ids.device}"
        raise InputError(f"row_ids are {found}, expected int64 [n] on cpu")
    return row_ids.contiguous()


def _check_packed(
    name: str,
    rows: torch.Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    table: torch.Tensor,
    table_name: str,
    row_ids: torch.Tensor,
) -> None:
    """The contiguous side: on the table's device, or page-locked beside a table on CUDA, and apart from the rest."""
    page_locked = table.is_cuda and rows.device.type == "cpu" and rows.is_pinned()
    fits = tuple(rows.shape) == shape and rows.dtype == dtype and (rows.device == table.device or page_locked)
    if not fits or not rows.is_contiguous() or rows.is_neg():
        form = "negated" if rows.is_neg() else "contiguous" if rows.is_contiguous() else "strided"
        where = f"{table.device} or page-locked" if table.is_cuda else str(table.device)
        raise InputError(
            f"{name} is {form} {rows.dtype} {tuple(rows.shape)} on {rows.device}, "
            f"expected contiguous {dtype} {shape} on {where}"
        )
    _check_apart(name, rows, table_name, table)
    _check_apart(name, rows, "row_ids", row_ids)


def _check_apart(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    (start, stop), (other_start, other_stop) = _span(tensor), _span(other)
    if tensor.device == other.device and start < other_stop and other_start < stop:
        raise InputError(f"{name} shares memory with {other_name}, expected memory of its own")


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte address of a tensor and the one behind its last; torch's strides are never negative."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (steps + 1) * tensor.element_size()


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements may lie in one place; interleaved axes that happen not to collide count as if they did."""
    if tensor.numel() == 0:
        return False
    reach = 0
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda axis: axis[1]):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _check_range(row_ids: torch.Tensor, n_rows: int) -> None:
    if len(row_ids) and (int(row_ids.min()) < 0 or int(row_ids.max()) >= n_rows):
        wrong = int(torch.nonzero((row_ids < 0) | (row_ids >= n_rows))[0])
        raise InputError(f"row_ids[{wrong}] is {int(row_ids[wrong])}, expected 0 <= id < {n_rows}")
