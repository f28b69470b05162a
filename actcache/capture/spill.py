"""Spill: rows that wait on disk while another checkpoint takes their place in memory.

The file has no name, so that nothing is left of it however the process ends. What is read of it is a copy: memory holds
the rows of one segment, whatever waits. Knows tensors and files.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Protocol

import torch


class Rows(Protocol):
    """Rows ``[n, D]`` in memory, or on disk."""

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """These, one after another."""


class Spill:
    """A temporary file of tensors."""

    def __init__(self, folder: Path | None = None) -> None:
        """In this folder; None for the system's temporary one (``TMPDIR``)."""
        self._file = tempfile.TemporaryFile(prefix="actcache-", dir=folder, buffering=0)  # noqa: SIM115 (open to its end)
        self._end = 0

    def put(self, rows: torch.Tensor) -> Spilled:
        """Write ``[n, D]``, contiguous on the CPU.

        Raises:
            OSError: the disk refuses.
        """
        start, left = self._end, memoryview(rows.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        self._end += len(left)
        while len(left):
            left = left[self._file.write(left) :]
        return Spilled(self, start, tuple(rows.shape), rows.dtype)

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """Fill a contiguous tensor from a byte of the file on."""
        left = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        while len(left):
            n_read = os.preadv(self._file.fileno(), [left], start)
            if n_read == 0:
                raise OSError("a temporary file of rows is shorter than what was written to it")
            left, start = left[n_read:], start + n_read


class Spilled:
    """Rows ``[n, D]`` of a spill; a slice reads its own from the disk."""

    def __init__(self, spill: Spill, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._spill, self._start, self._shape, self._dtype = spill, start, shape, dtype

    def __getitem__(self, rows: slice) -> torch.Tensor:
        first, stop, _ = rows.indices(self._shape[0])
        out = torch.empty(max(0, stop - first), *self._shape[1:], dtype=self._dtype)
        self._spill.read_into(out, self._start + first * self._shape[1] * self._dtype.itemsize)
        return out
