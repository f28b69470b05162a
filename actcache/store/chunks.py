"""How one chunk becomes bytes and rows again: Blosc by default, the bf16 planes where a store asks for them."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numcodecs.blosc as blosc
import numpy as np
import numpy.typing as npt

from actcache.errors import InputError
from actcache.store import planes

Rows = npt.NDArray[Any]


class ChunkCodec(Protocol):
    """A codec of chunks, whole rows ``[n]`` or ``[n, D]`` of one data type."""

    name: str
    """As in an array's metadata."""

    most_bytes: int
    """The largest chunk that it takes, before compression."""

    overhead_bytes: int
    """By how much a chunk may be longer than its rows."""

    most_expansion: int
    """The most bytes that one byte becomes. A reader sets no more memory aside than this allows."""

    def configuration(self, dtype: str, row_shape: tuple[int, ...]) -> dict[str, Any]:
        """As in an array's metadata."""

    def encode(self, rows: Rows) -> bytes:
        """The rows, compressed; equal rows, equal bytes."""

    def decode(self, data: bytes, n_coded: int, out: Rows) -> None:
        """The rows whose code is ``data[:n_coded]``, into contiguous ``out``; InputError where they do not fill it."""


class Blosc:
    """Core Zarr's ``blosc``: lz4 behind a bitshuffle."""

    name = "blosc"
    most_bytes = blosc.MAX_BUFFERSIZE
    overhead_bytes = 16
    most_expansion = 256  # lz4 makes at most 255 bytes out of one

    def configuration(self, dtype: str, row_shape: tuple[int, ...]) -> dict[str, Any]:
        typesize = np.dtype(dtype).itemsize
        return {"typesize": typesize, "cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}

    def encode(self, rows: Rows) -> bytes:
        return bytes(blosc.compress(rows.reshape(-1), b"lz4", 5, blosc.BITSHUFFLE, 0, rows.itemsize))

    def decode(self, data: bytes, n_coded: int, out: Rows) -> None:
        raw, coded = (int.from_bytes(data[at : at + 4], "little") for at in (4, 12))
        if n_coded < self.overhead_bytes or coded != n_coded:
            raise InputError(f"its Blosc header does not fit its {n_coded} bytes")
        if raw != out.nbytes:
            raise InputError(f"{raw} bytes, expected {out.nbytes}")
        try:
            blosc.decompress(data, out)
        except (RuntimeError, ValueError) as error:
            raise InputError(str(error)) from error


class Bf16Planes:
    """``actcache.bf16_planes``, see PLANES.md: smaller and faster, read only where actcache is installed."""

    name = "actcache.bf16_planes"
    most_bytes = 2**22
    overhead_bytes = planes.HEADER.size
    most_expansion = 2**17  # zeros at the end cost nothing, so that a chunk of most_bytes may take a header alone

    def configuration(self, dtype: str, row_shape: tuple[int, ...]) -> dict[str, Any]:
        return {"row_words": max(1, math.prod(row_shape))}

    def encode(self, rows: Rows) -> bytes:
        return planes.encode(rows, max(1, math.prod(rows.shape[1:])))

    def decode(self, data: bytes, n_coded: int, out: Rows) -> None:
        planes.decode_into(memoryview(data)[:n_coded], out)


BLOSC = Blosc()
CODECS: dict[str, ChunkCodec] = {codec.name: codec for codec in (BLOSC, Bf16Planes())}
