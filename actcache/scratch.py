"""Scratch: large tensors that need not be in memory, in temporary files that are gone when the process is.

Knows tensors and temporary files; knows nothing of what is in them.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Sequence

import torch

# A tensor of more bytes than this lies in a file.
IN_MEMORY = 256 << 20


def scratch(shape: Sequence[int], dtype: torch.dtype, in_memory: int | None = None) -> torch.Tensor:
    """A tensor on the CPU whose values nobody has set: in memory, or mapped from a file if it is large.

    The file has no name from the start: whatever ends the process frees it, and it is gone with the tensor. It is in
    the system's folder for temporary files (``TMPDIR``).

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        in_memory: bytes of the largest tensor that stays in memory; None for IN_MEMORY.

    Raises:
        OSError: the folder has no room for it.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes <= (IN_MEMORY if in_memory is None else in_memory):
        return torch.empty(*shape, dtype=dtype)
    with tempfile.TemporaryFile(prefix="actcache-") as file:
        _reserve(file.fileno(), n_bytes)
        mapped = mmap.mmap(file.fileno(), n_bytes)  # outlives the file's name and this descriptor
    return torch.frombuffer(mapped, dtype=dtype).view(*shape)


def _reserve(descriptor: int, n_bytes: int) -> None:
    """Have the disk refuse now, not by a signal when a page is written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, n_bytes)
    else:
        os.ftruncate(descriptor, n_bytes)
