"""One array on disk: a folder with Zarr v3 metadata and, unless it is empty, one shard of checksummed chunks.

Any Zarr v3 reader takes it for an ordinary array. This module encodes and decodes the same bytes itself, for what a
general reader does not do: a chunk that is missing is an error, never a fill value; every chunk's checksum also
stands in the metadata, so that a chunk of another array in its place is noticed though it is whole in itself; and
opening an array costs microseconds, which a store of many small columns needs. Knows arrays; knows no segments.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs.blosc as blosc
import numpy as np
import numpy.typing as npt

from actcache.errors import CorruptStoreError, InputError

# One chunk before compression: small enough that one event of some tens of rows reads little it does not need, large
# enough for the codec to work at speed and for the index and the checksums to stay small.
CHUNK_BYTES = 256 * 1024

ADVICE = "; run 'actcache verify'"  # how a message about damage ends
CHECKSUMS = "chunk_crc32c"
DTYPES = ("uint8", "uint16", "int32", "int64", "float16", "float32")
_CRC_BYTES = 4
_WORTH_THREADS_BYTES = 4 * CHUNK_BYTES  # starting threads costs as much as decoding some chunks
_INDEX_ENTRY_BYTES = 16  # offset and length of a chunk, uint64 each


def crc32c(data: bytes) -> int:
    """CRC-32C of bytes."""
    return int(google_crc32c.value(data))


def metadata(shape: tuple[int, ...], dtype: str, chunk_rows: int, attributes: dict[str, Any]) -> dict[str, Any]:
    """The ``zarr.json`` of an array, as zarr-python writes it: whole rows in a chunk, all chunks in one shard."""
    little: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    typesize = np.dtype(dtype).itemsize
    shard_rows = max(1, -(-shape[0] // chunk_rows)) * chunk_rows
    blosc_codec = {"typesize": typesize, "cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
    sharding = {
        "chunk_shape": [chunk_rows, *shape[1:]],
        "codecs": [
            {"name": "bytes"} if typesize == 1 else little,
            {"name": "blosc", "configuration": blosc_codec},
            {"name": "crc32c"},
        ],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_rows, *shape[1:]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if dtype.startswith("float") else 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": attributes,
        "storage_transformers": [],
    }


def data_file(n_dimensions: int) -> str:
    """Where the one shard of an array lies, from the array's folder."""
    return "/".join(["c", *["0"] * n_dimensions])


def encode(
    array: npt.NDArray[Any], attributes: dict[str, Any], pool: Executor
) -> tuple[dict[str, Any], list[bytes] | None]:
    """An array ``[n]`` or ``[n, D]`` of one of ``DTYPES`` as its metadata and the parts of its shard.

    Chunks are compressed on the pool's threads, never on the caller's: on the main thread Blosc would use threads of
    its own, which lay blocks down as they finish, and equal arrays would not have equal bytes.

    Returns:
        the metadata, and the parts of the shard in order, or None where the array has no rows and so no shard.
    """
    array = np.ascontiguousarray(array)
    row_bytes = array.itemsize * math.prod(array.shape[1:])
    chunk_rows = max(1, min(len(array), CHUNK_BYTES // row_bytes))

    def encode_chunk(start: int) -> bytes:
        rows = array[start : start + chunk_rows]
        if len(rows) < chunk_rows:  # Zarr's chunks are all of one shape
            rows = np.concatenate([rows, np.zeros((chunk_rows - len(rows), *rows.shape[1:]), rows.dtype)])
        data = blosc.compress(rows.reshape(-1), b"lz4", 5, blosc.BITSHUFFLE, 0, array.itemsize)
        return data + crc32c(data).to_bytes(_CRC_BYTES, "little")

    chunks = list(pool.map(encode_chunk, range(0, len(array), chunk_rows)))
    checksums = [_stored_crc(chunk) for chunk in chunks]
    described = metadata(array.shape, array.dtype.name, chunk_rows, attributes | {CHECKSUMS: checksums})
    if not chunks:
        return described, None
    index = np.empty((len(chunks), 2), "<u8")
    index[:, 1] = [len(chunk) for chunk in chunks]
    index[:, 0] = np.cumsum(index[:, 1]) - index[:, 1]
    tail = index.tobytes()
    return described, [*chunks, tail, crc32c(tail).to_bytes(_CRC_BYTES, "little")]


class StoredArray:
    """An array on disk, every byte of which is checked before it is believed.

    Attributes:
        shape: ``(n,)`` or ``(n, D)``.
        dtype: as stored.
        chunk_rows: rows of one chunk.
    """

    def __init__(self, folder: Path, encoded: bytes, where: str) -> None:
        """Take the array in ``folder`` for what its metadata says.

        Args:
            folder: of the array.
            encoded: the content of its ``zarr.json``.
            where: what errors call the array.

        Raises:
            CorruptStoreError: the metadata is not as this format writes it.
        """
        self.where = where
        try:
            found = json.loads(encoded)
            self.shape = tuple(found["shape"])
            sharding = found["codecs"][0]["configuration"]
            self.chunk_rows: int = sharding["chunk_shape"][0]
            self._checksums: list[int] = found["attributes"][CHECKSUMS]
            self.dtype = np.dtype(DTYPES[DTYPES.index(found["data_type"])])
            n_chunks = -(-self.shape[0] // self.chunk_rows)
            as_written = found == metadata(self.shape, found["data_type"], self.chunk_rows, found["attributes"])
        except (ValueError, KeyError, TypeError, IndexError, ZeroDivisionError) as error:
            raise CorruptStoreError(f"{where}: its metadata is not that of a stored array ({error!r})") from error
        self._chunk_bytes = self.chunk_rows * math.prod(self.shape[1:]) * self.dtype.itemsize
        counts = all(type(n) is int and n >= 0 for n in (*self.shape, self.chunk_rows, *self._checksums))
        if not (
            counts and as_written and n_chunks == len(self._checksums) and self._chunk_bytes <= blosc.MAX_BUFFERSIZE
        ):
            raise CorruptStoreError(f"{where}: its metadata is not as this format writes it")
        self._file = folder / data_file(len(self.shape))
        self._index: npt.NDArray[np.uint64] | None = None

    @property
    def n_chunks(self) -> int:
        """Chunks, the last one perhaps filled up with zeros."""
        return len(self._checksums)

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows ``start:stop``, bit for bit as encoded.

        Raises:
            InputError: the range lies outside the array.
            CorruptStoreError: a chunk is not as written; names it.
        """
        if not 0 <= start <= stop <= self.shape[0]:
            raise InputError(f"{self.where}: rows {start}:{stop} asked, it has {self.shape[0]}")
        if start == stop:
            return np.empty((0, *self.shape[1:]), self.dtype)
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        handle = self._open()
        try:
            index = self._index_of(handle)

            def copy(number: int) -> None:
                first = number * self.chunk_rows
                lo, hi = max(start, first), min(stop, first + self.chunk_rows)
                out[lo - start : hi - start] = self._chunk(handle, index, number)[lo - first : hi - first]

            numbers = range(start // self.chunk_rows, -(-stop // self.chunk_rows))
            if out.nbytes < _WORTH_THREADS_BYTES:
                for number in numbers:
                    copy(number)
            else:
                with ThreadPoolExecutor(min(len(numbers), os.cpu_count() or 1)) as pool:
                    deque(pool.map(copy, numbers), maxlen=0)
        finally:
            os.close(handle)
        return out

    def damaged_chunks(self) -> Iterator[tuple[int, CorruptStoreError]]:
        """Number and error of every chunk that cannot be read.

        Raises:
            CorruptStoreError: none can: the file is missing, or its index is damaged.
        """
        if self.n_chunks:
            handle = self._open()
            try:
                self._index_of(handle)
            finally:
                os.close(handle)
        for number in range(self.n_chunks):
            try:
                first = number * self.chunk_rows
                self.read(first, min(first + self.chunk_rows, self.shape[0]))
            except CorruptStoreError as error:
                yield number, error

    def _open(self) -> int:
        try:
            return os.open(self._file, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorruptStoreError(f"{self.where}: its data file is missing{ADVICE}") from error

    def _index_of(self, handle: int) -> npt.NDArray[np.uint64]:
        """Offset and length of each chunk, ``[n_chunks, 2]``; read once."""
        if self._index is None:
            n_bytes = self.n_chunks * _INDEX_ENTRY_BYTES
            at = os.fstat(handle).st_size - n_bytes - _CRC_BYTES
            tail = os.pread(handle, n_bytes + _CRC_BYTES, max(at, 0))
            if at < 0 or _stored_crc(tail) != crc32c(tail[:n_bytes]):
                raise CorruptStoreError(f"{self.where}: the index of its chunks is damaged{ADVICE}")
            index = np.frombuffer(tail[:n_bytes], "<u8").reshape(-1, 2)
            ends = np.cumsum(index[:, 1], dtype=np.uint64)
            if (index[:, 0] != ends - index[:, 1]).any() or ends[-1] != at:
                raise CorruptStoreError(f"{self.where}: its chunks do not lie one after another{ADVICE}")
            self._index = index
        return self._index

    def _chunk(self, handle: int, index: npt.NDArray[np.uint64], number: int) -> npt.NDArray[Any]:
        offset, length = index[number].tolist()
        data = os.pread(handle, length, offset)
        payload = data[:-_CRC_BYTES]
        found, expected = crc32c(payload), self._checksums[number]
        where = f"{self.where}, chunk {number}"
        if not found == _stored_crc(data) == expected:
            raise CorruptStoreError(f"{where}: crc32c {found:08x}, written {expected:08x}{ADVICE}")
        shape = (self.chunk_rows, *self.shape[1:])
        try:
            raw = blosc.decompress(payload)
        except RuntimeError as error:
            raise CorruptStoreError(f"{where}: {error}{ADVICE}") from error
        if len(raw) != self._chunk_bytes:
            raise CorruptStoreError(f"{where}: {len(raw)} bytes, expected {self._chunk_bytes}{ADVICE}")
        return np.frombuffer(raw, self.dtype).reshape(shape)


def _stored_crc(data: bytes) -> int:
    return int.from_bytes(data[-_CRC_BYTES:], "little")
