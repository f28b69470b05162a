"""Spill: rows that wait on disk while another checkpoint takes their place in memory.

The file has no name, so that nothing is left of it however the process ends. Knows tensors and files.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch


class Spill:
    """Tensors written one after another into a temporary file, and then read off its memory map."""

    def __init__(self, folder: Path | None) -> None:
        """In this folder; None for the system's temporary one (``TMPDIR``).

        Raises:
            OSError: the disk refuses, here or when something is put.
        """
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed once it is mapped)
        self._places: list[tuple[int, torch.Size, torch.dtype]] = []
        self._end = 0

    def put(self, values: torch.Tensor) -> int:
        """Write a contiguous tensor of the CPU; its number."""
        self._places.append((self._end, values.shape, values.dtype))
        if values.numel():
            self._file.write(values.view(-1).view(torch.uint8).numpy().data)
        self._end += values.nbytes
        return len(self._places) - 1

    def read(self) -> list[torch.Tensor]:
        """All tensors, in the order in which they were put; a page is read when it is touched. Ends the writing."""
        with self._file as file:
            file.flush()
            # Private to this process, and so writable as torch wants it; nothing is written.
            mapped = np.memmap(file, np.uint8, mode="c", shape=self._end) if self._end else np.empty(0, np.uint8)
        every = torch.from_numpy(mapped)
        found = []
        for start, shape, dtype in self._places:
            values = every[start : start + shape.numel() * dtype.itemsize]
            found.append((values.view(dtype) if len(values) else torch.empty(0, dtype=dtype)).view(shape))
        return found
