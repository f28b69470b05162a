"""Spill: rows that wait on disk while others take their place in memory.

The file has no name, so that nothing is left of it however the process ends. What is read of it is a copy: memory holds
what is worked on, whatever waits. Knows tensors and files; knows nothing of what is in them.
"""

from __future__ import annotations

import os
import tempfile
from functools import cached_property
from pathlib import Path
from typing import IO, Protocol

import torch

# Bytes that a spill leaves in memory unless it is told another number: what is small need not wait on disk.
IN_MEMORY = 256 << 20


class Waiting(Protocol):
    """Rows ``[n, D]`` in memory, or on disk."""

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """These, one after another."""


class Spill:
    """Tensors of which the first stay in memory, and the others are in a temporary file."""

    def __init__(self, folder: Path | None = None, in_memory: int | None = None) -> None:
        """A file in this folder, None for the system's temporary one (``TMPDIR``); so many bytes stay in memory, None
        for IN_MEMORY."""
        self._folder, self._end, self._room = folder, 0, IN_MEMORY if in_memory is None else in_memory

    @cached_property
    def _file(self) -> IO[bytes]:
        return tempfile.TemporaryFile(prefix="actcache-", dir=self._folder, buffering=0)

    def put(self, rows: torch.Tensor, over: Waiting | None = None) -> Waiting:
        """Have ``[n, D]`` wait, in the place of earlier ones of this shape, if there are any, which are gone then.

        What is given must not change from here on.

        Raises:
            OSError: the disk refuses.
        """
        rows = rows.cpu().contiguous()
        if over is None and rows.nbytes <= self._room:
            self._room -= rows.nbytes
            over = rows
        if isinstance(over, torch.Tensor):
            return rows
        start = over.start if isinstance(over, Spilled) else self._end
        self._end = max(self._end, start + rows.nbytes)
        left = memoryview(rows.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        spilled = Spilled(self, start, tuple(rows.shape), rows.dtype)
        while len(left):
            n_written = os.pwrite(self._file.fileno(), left, start)
            left, start = left[n_written:], start + n_written
        return spilled

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
        self.start = start
        self._spill, self._shape, self._dtype = spill, shape, dtype

    def __getitem__(self, rows: slice) -> torch.Tensor:
        first, stop, _ = rows.indices(self._shape[0])
        out = torch.empty(max(0, stop - first), *self._shape[1:], dtype=self._dtype)
        self._spill.read_into(out, self.start + first * self._shape[1] * self._dtype.itemsize)
        return out
