"""One array on disk: Zarr v3 metadata and, unless it is empty, one shard of checksummed chunks.

Any Zarr v3 reader takes it for an ordinary array. This module encodes and decodes the same bytes itself, for what a
general reader does not do: a chunk that is missing is an error, never a fill value; every chunk's checksum also
stands in the metadata, so that a chunk of another array in its place is noticed though it is whole in itself; and
ragged spans of many arrays are read by one pool of threads, each chunk decoded once and straight to where it belongs.
Knows arrays; knows no segments.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import google_crc32c
import numpy as np
import numpy.typing as npt

from actcache.canonical import canonical
from actcache.cpus import usable_cpus
from actcache.errors import CorruptStoreError, InputError
from actcache.store.chunks import BLOSC, CODECS, ChunkCodec
from actcache.store.storage import Storage

# One chunk before compression: small enough that one event of some tens of rows reads little it does not need, large
# enough for the codec to work at speed and for the index and the checksums to stay small.
CHUNK_BYTES = 256 * 1024

ADVICE = "; run 'actcache verify'"  # how a message about damage ends
CHECKSUMS = "chunk_crc32c"
DTYPES = ("uint8", "uint16", "int32", "int64", "float16", "float32")
_CRC_BYTES = 4
_CRC_OF_CHECKED = 0x48674BC7  # CRC-32C of any bytes followed by their own CRC-32C
_WORTH_THREADS_BYTES = 4 * CHUNK_BYTES  # starting threads costs as much as decoding some chunks
_BATCH_BYTES = 2**20  # compressed, of neighbouring chunks that are fetched with one call
_INDEX_ENTRY_BYTES = 16  # offset and length of a chunk, uint64 each

Spans = npt.NDArray[np.int64]
T = TypeVar("T")


def crc32c(data: bytes) -> int:
    """CRC-32C of bytes."""
    return int(google_crc32c.value(data))


def encode_json(value: Any) -> bytes:
    """JSON as every file of a store has it."""
    return canonical(value) + b"\n"


def decode_json(data: bytes) -> Any:
    """JSON, or InputError: also for what Python's parser takes but cannot hold (nesting, numbers of many digits)."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {str(error)[:200]}") from error


def metadata(
    shape: tuple[int, ...],
    dtype: str,
    chunk_rows: int,
    dimensions: Sequence[str],
    attributes: dict[str, Any],
    codec: ChunkCodec = BLOSC,
) -> dict[str, Any]:
    """The ``zarr.json`` of an array, as zarr-python writes it: whole rows in a chunk, all chunks in one shard."""
    little: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    typesize = np.dtype(dtype).itemsize
    shard_rows = max(1, -(-shape[0] // chunk_rows)) * chunk_rows
    sharding = {
        "chunk_shape": [chunk_rows, *shape[1:]],
        "codecs": [
            {"name": "bytes"} if typesize == 1 else little,
            {"name": codec.name, "configuration": codec.configuration(dtype, shape[1:])},
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
        "dimension_names": list(dimensions),
        "storage_transformers": [],
    }


def data_file(n_dimensions: int) -> str:
    """Where the one shard of an array lies, from the array's folder."""
    return "/".join(["c", *["0"] * n_dimensions])


def coders() -> ThreadPoolExecutor:
    """The threads on which chunks are encoded and decoded, as many as there are processors.

    They stay: starting them anew for every read costs as much as a chunk or two, and the memory that each of them then
    touches for the first time more than that. A forked child, which has none of its parent's, gets its own.
    """
    return _coders_of(os.getpid())


@cache
def _coders_of(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(usable_cpus(), thread_name_prefix="actcache-coder")


class EncodedArray:
    """An array ``[n]`` or ``[n, D]`` of one of ``DTYPES`` on its way to disk: first its parts, then its metadata.

    Chunks are compressed on the threads of :func:`coders`, never on the caller's: on the main thread Blosc would use
    threads of its own, which lay blocks down as they finish, and equal arrays would not have equal bytes.
    """

    def __init__(
        self,
        array: npt.NDArray[Any],
        dimensions: Sequence[str],
        attributes: dict[str, Any],
        codec: ChunkCodec = BLOSC,
    ) -> None:
        self._array = np.ascontiguousarray(array)
        self._dimensions, self._attributes, self._codec = dimensions, attributes, codec
        row_bytes = array.itemsize * math.prod(array.shape[1:])
        self._chunk_rows = max(1, min(len(array), CHUNK_BYTES // row_bytes))
        if self._chunk_rows * row_bytes > codec.most_bytes:
            raise InputError(f"rows of {row_bytes} bytes, {codec.name} takes at most {codec.most_bytes}")
        self._checksums: list[int] = []
        self._chunks = coders().map(self._encode_chunk, range(0, len(array), self._chunk_rows))

    def parts(self) -> Iterator[bytes]:
        """The bytes of the shard, in order, as they get ready; none where the array has no rows and so no shard."""
        lengths = []
        for chunk, checksum in self._chunks:
            yield chunk
            yield checksum.to_bytes(_CRC_BYTES, "little")
            self._checksums.append(checksum)
            lengths.append(len(chunk) + _CRC_BYTES)
        if lengths:
            index = np.empty((len(lengths), 2), "<u8")
            index[:, 1] = lengths
            index[:, 0] = np.cumsum(index[:, 1]) - index[:, 1]
            tail = index.tobytes()
            yield tail
            yield crc32c(tail).to_bytes(_CRC_BYTES, "little")

    def metadata(self) -> dict[str, Any]:
        """The ``zarr.json``; to be asked for when the last part has been taken."""
        attributes = self._attributes | {CHECKSUMS: self._checksums}
        shape, dtype = self._array.shape, self._array.dtype.name
        return metadata(shape, dtype, self._chunk_rows, self._dimensions, attributes, self._codec)

    def _encode_chunk(self, start: int) -> tuple[bytes, int]:
        rows = self._array[start : start + self._chunk_rows]
        if len(rows) < self._chunk_rows:  # Zarr's chunks are all of one shape
            rows = np.concatenate([rows, np.zeros((self._chunk_rows - len(rows), *rows.shape[1:]), rows.dtype)])
        data = self._codec.encode(rows)
        return data, crc32c(data)


class StoredArray:
    """An array on disk, every byte of which is checked before it is believed.

    Attributes:
        shape: ``(n,)`` or ``(n, D)``.
        dtype: as stored.
        chunk_rows: rows of one chunk.
        codec: of its chunks.
        where: what errors call the array.
    """

    def __init__(self, storage: Storage, folder: str, encoded: bytes, file_bytes: int | None, where: str) -> None:
        """Take the array in ``folder`` for what its metadata says.

        Args:
            storage: that holds the array.
            folder: of the array, a key.
            encoded: the content of its ``zarr.json``.
            file_bytes: size of its shard, None where there is none.
            where: what errors call the array.

        Raises:
            CorruptStoreError: the metadata is not as this format writes it.
        """
        self.where = where
        self.storage = storage
        try:
            found = decode_json(encoded)
            self.shape = tuple(found["shape"])
            sharding = found["codecs"][0]["configuration"]
            self.chunk_rows: int = sharding["chunk_shape"][0]
            self.codec = CODECS[sharding["codecs"][1]["name"]]
            self._checksums: list[int] = found["attributes"][CHECKSUMS]
            self.dtype = np.dtype(DTYPES[DTYPES.index(found["data_type"])])
            n_chunks = -(-self.shape[0] // self.chunk_rows)
            names, attributes = found["dimension_names"], found["attributes"]
            as_written = metadata(self.shape, self.dtype.name, self.chunk_rows, names, attributes, self.codec)
            # As bytes: a key that stands twice, or True for 1, would be another array to another reader.
            is_as_written = encode_json(as_written) == encoded
        except (ValueError, KeyError, TypeError, IndexError, ZeroDivisionError, RecursionError, OverflowError) as error:
            raise CorruptStoreError(f"{where}: its metadata is not that of a stored array ({error!r})") from error
        # Numbers first: a width that is a text, times many rows, is a text of many bytes.
        counts = all(type(n) is int and n >= 0 for n in (*self.shape, self.chunk_rows, *self._checksums))
        if not (counts and is_as_written and n_chunks == len(self._checksums)):
            raise CorruptStoreError(f"{where}: its metadata is not as this format writes it")
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        self._chunk_bytes = self.chunk_rows * row_bytes
        most_rows = max(1, min(self.shape[0], CHUNK_BYTES // max(1, row_bytes)))
        if self.chunk_rows > most_rows or self._chunk_bytes > self.codec.most_bytes:
            raise CorruptStoreError(f"{where}: chunks of {self.chunk_rows} rows, {self._chunk_bytes} bytes")
        if (file_bytes is None) != (n_chunks == 0):
            raise CorruptStoreError(f"{where}: {n_chunks} chunks, committed with a data file of {file_bytes} bytes")
        self._file = f"{folder}/{data_file(len(self.shape))}"
        self._file_bytes = file_bytes or 0
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
        whole = (self, np.array([[start, stop]], np.int64), np.zeros(1, np.int64))
        return read_spans([whole], stop - start, self.shape[1:], self.dtype)

    def damaged_chunks(self) -> Iterator[tuple[int, CorruptStoreError]]:
        """Number and error of every chunk that cannot be read.

        Raises:
            CorruptStoreError: none can: the file is missing, or its index is damaged.
        """
        self.index()
        for number in range(self.n_chunks):
            try:
                first = number * self.chunk_rows
                self.read(first, min(first + self.chunk_rows, self.shape[0]))
            except CorruptStoreError as error:
                yield number, error

    def index(self) -> npt.NDArray[np.uint64]:
        """Offset and length of each chunk, ``[n_chunks, 2]``; read once.

        Raises:
            CorruptStoreError: the file is missing or of another size, or its index is damaged.
        """
        if self._index is None:
            self._index = self._read_index() if self.n_chunks else np.empty((0, 2), np.uint64)
        return self._index

    def _read_index(self) -> npt.NDArray[np.uint64]:
        n_bytes = self.n_chunks * _INDEX_ENTRY_BYTES
        at = self._file_bytes - n_bytes - _CRC_BYTES
        (tail,) = self._fetch([(max(at, 0), n_bytes + _CRC_BYTES + 1)])  # one byte more: the file may be too long
        if at < 0 or len(tail) != n_bytes + _CRC_BYTES or crc32c(tail) != _CRC_OF_CHECKED:
            raise CorruptStoreError(f"{self.where}: the index of its chunks is damaged{ADVICE}")
        index = np.frombuffer(tail[:n_bytes], "<u8").reshape(-1, 2)
        # No longer than the codec makes them: so that their sum cannot wrap around, nor one claim a hole in the file.
        if (index[:, 1] > self._chunk_bytes + self.codec.overhead_bytes + _CRC_BYTES).any():
            raise CorruptStoreError(f"{self.where}: its chunks are longer than what they should hold{ADVICE}")
        ends = np.cumsum(index[:, 1], dtype=np.uint64)
        if (index[:, 0] != ends - index[:, 1]).any() or ends[-1] != at:
            raise CorruptStoreError(f"{self.where}: its chunks do not lie one after another{ADVICE}")
        if self._chunk_bytes > self.codec.most_expansion * int(index[:, 1].min()):
            raise CorruptStoreError(f"{self.where}: its chunks are too short for what they should hold{ADVICE}")
        return index

    def _fetch(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        try:
            return self.storage.read_ranges(self._file, ranges)
        except FileNotFoundError as error:
            raise CorruptStoreError(f"{self.where}: its data file is missing{ADVICE}") from error

    def _check_chunk(self, number: int, data: bytes) -> None:
        expected = self._checksums[number]
        where = f"{self.where}, chunk {number}"
        if crc32c(data) != _CRC_OF_CHECKED or int.from_bytes(data[-_CRC_BYTES:], "little") != expected:
            found = crc32c(data[:-_CRC_BYTES])
            raise CorruptStoreError(f"{where}: crc32c {found:08x}, written {expected:08x}{ADVICE}")

    def decode(self, number: int, data: bytes, pieces: Spans, out: npt.NDArray[Any]) -> None:
        """Put rows of a chunk where they belong.

        Args:
            number: of the chunk.
            data: its bytes in the shard.
            pieces: ``[n, 3]``: rows ``lo:hi`` of the chunk go to ``out[at:]``.
            out: of this array's dtype and row shape.

        Raises:
            CorruptStoreError: the chunk is not as written.
        """
        self._check_chunk(number, data)
        lo, hi, at = pieces[0].tolist()
        straight = len(pieces) == 1 and hi - lo == self.chunk_rows
        rows = out[at : at + hi - lo] if straight else np.empty((self.chunk_rows, *self.shape[1:]), self.dtype)
        try:
            self.codec.decode(data, len(data) - _CRC_BYTES, rows)
        except InputError as error:
            raise CorruptStoreError(f"{self.where}, chunk {number}: {error}{ADVICE}") from error
        if not straight:
            for lo, hi, at in pieces.tolist():
                out[at : at + hi - lo] = rows[lo:hi]

    def tasks(self, spans: Spans, at: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> Iterator[Callable[[], None]]:
        """The work of reading spans ``[n, 2]`` to where they begin in ``out``, ``[n]``; each chunk is decoded once."""
        numbers, pieces = _pieces(spans, at, self.chunk_rows)
        wanted, starts = np.unique(numbers, return_index=True)
        grouped = np.split(pieces, starts[1:])
        index = self.index()[wanted].astype(np.int64)

        def task(lo: int, hi: int) -> None:
            parts = self._fetch([(offset, length) for offset, length in index[lo:hi].tolist()])
            for i, data in zip(range(lo, hi), parts, strict=True):
                self.decode(int(wanted[i]), data, grouped[i], out)

        lo = n_bytes = 0
        for i, length in enumerate(index[:, 1].tolist()):
            n_bytes += length
            if n_bytes >= _BATCH_BYTES or i + 1 == len(wanted):
                yield lambda lo=lo, hi=i + 1: task(lo, hi)  # type: ignore[misc]
                lo, n_bytes = i + 1, 0


Request = tuple[StoredArray, Spans, npt.NDArray[np.int64]]  # what to read of an array, and where it goes


def read_spans(
    requests: Sequence[Request], n_rows: int, row_shape: tuple[int, ...], dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    """Spans of rows of several arrays of one storage, as one array ``[n_rows, *row_shape]``.

    Args:
        requests: arrays, each with the spans to read of it, ``[n, 2]``, and where in the result they begin, ``[n]``;
            together they fill the result.
        n_rows: of the result.
        row_shape: of every array.
        dtype: of every array.

    Raises:
        CorruptStoreError: a chunk is not as written; names it. Nothing is set aside for the result before it is clear
            that the bytes which it would come from are there.
    """
    if not requests:
        return np.empty((n_rows, *row_shape), dtype)
    storage = requests[0][0].storage
    at_once(storage, [array.index for array, _, _ in requests])
    out = np.empty((n_rows, *row_shape), dtype)
    tasks = [task for array, spans, at in requests for task in array.tasks(spans, at, out)]
    at_once(storage, tasks, heavy=out.nbytes >= _WORTH_THREADS_BYTES)
    return out


def at_once(storage: Storage, tasks: Sequence[Callable[[], T]], *, heavy: bool = False) -> list[T]:
    """The results of tasks that read, in order.

    Args:
        storage: that they read from; where it is far they wait for it beside each other.
        tasks: of which none calls this function with ``heavy``.
        heavy: whether they decode so much that the threads of :func:`coders` are worth waking.
    """
    if storage.is_far and len(tasks) > 1:
        with ThreadPoolExecutor(min(len(tasks), storage.parallel_reads)) as pool:
            return list(pool.map(_call, tasks))
    return list(coders().map(_call, tasks)) if heavy and len(tasks) > 1 else [task() for task in tasks]


def _call(task: Callable[[], T]) -> T:
    return task()


def _pieces(spans: Spans, at: npt.NDArray[np.int64], chunk_rows: int) -> tuple[npt.NDArray[np.int64], Spans]:
    """Spans cut at chunk limits: chunk numbers ``[m]`` in order, and ``[m, 3]``: lo, hi within the chunk, where to."""
    full = spans[:, 1] > spans[:, 0]
    spans, at = spans[full], at[full]
    first, last = spans[:, 0] // chunk_rows, (spans[:, 1] - 1) // chunk_rows
    counts = last - first + 1
    owner = np.repeat(np.arange(len(spans)), counts)
    numbers = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts) + first[owner]
    lo = np.maximum(spans[owner, 0], numbers * chunk_rows)
    hi = np.minimum(spans[owner, 1], (numbers + 1) * chunk_rows)
    to = at[owner] + lo - spans[owner, 0]
    order = np.argsort(numbers, kind="stable")
    start = numbers * chunk_rows
    return numbers[order], np.stack([lo - start, hi - start, to], axis=1)[order]
