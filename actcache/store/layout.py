"""What a segment holds, and how arrays, tables and commit records lie on disk. FORMAT.md is the prose of this file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from actcache.errors import CorruptStoreError, FormatVersionError, InputError

FORMAT_VERSION = 1

ROOT = "zarr.json"
SEGMENTS = "segments"
COMMITS = "commits"

# One compressed chunk: small enough that one event of some tens of rows reads little it does not need, large enough
# for the codec to work at speed and for the shard's index (16 bytes a chunk) to stay small.
CHUNK_BYTES = 256 * 1024

STATE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_COLUMN_TYPES = {"int32": pa.int32(), "int64": pa.int64(), "float32": pa.float32(), "string": pa.string()}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

# Columns that every events table has; more may stand beside them.
EVENT_COLUMNS = {
    "event_id": "string",
    "prompt_id": "string",
    "kind": "string",
    "step": "int32",
    "sequence": "int64",
    "position": "int64",
    "y_pt": "int64",
    "y_it": "int64",
    "carried": "string",
}
EXCLUDED_COLUMNS = {"prompt_id": "string", "reason": "string", "carried": "string"}


@dataclass(frozen=True)
class SegmentData:
    """Everything that one segment holds: S sequences of T tokens, E events, N rows of width D.

    Attributes:
        token_ids: ``[T]`` int32, the sequences' token ids one after another.
        sequence_offsets: ``[S + 1]`` int64, where each sequence begins in ``token_ids``.
        states: ``(label, boundary) -> [N, D]`` in the store's dtype. With ``row_selection`` ``prefix`` row i is the
            state at token i, N = T; with ``divergence`` it is the state at event i, N = E.
        final: ``label -> [E, D]``, the last block's output (before the final norm) at each event's position.
        events: one row an event, at least the columns of ``EVENT_COLUMNS``; ``sequence`` counts within the segment,
            ``carried`` is a JSON object.
        excluded: prompts without an event: prompt_id, reason, carried.

    Raises:
        InputError: a shape, dtype, column or index does not fit the others.
    """

    token_ids: npt.NDArray[np.int32]
    sequence_offsets: npt.NDArray[np.int64]
    states: dict[tuple[str, int], torch.Tensor]
    final: dict[str, torch.Tensor]
    events: pa.Table
    excluded: pa.Table

    def __post_init__(self) -> None:
        if self.token_ids.dtype != np.int32 or self.token_ids.ndim != 1:
            raise InputError(f"token_ids are {self.token_ids.dtype} {self.token_ids.shape}, expected int32 [T]")
        check_offsets(self.sequence_offsets, len(self.token_ids))
        for table, columns, name in (
            (self.events, EVENT_COLUMNS, "events"),
            (self.excluded, EXCLUDED_COLUMNS, "excluded"),
        ):
            for column, kind in columns.items():
                if column not in table.column_names or table.schema.field(column).type != _COLUMN_TYPES[kind]:
                    raise InputError(f"the {name} table needs a column {column!r} of type {kind}")
            for column in table.column_names:
                column_type(table, column)
        check_events(self.events, self.sequence_offsets)
        for label, rows in self.final.items():
            if len(rows) != self.events.num_rows:
                raise InputError(f"final states of {label}: {len(rows)} rows for {self.events.num_rows} events")

    @property
    def n_sequences(self) -> int:
        """S."""
        return len(self.sequence_offsets) - 1


def check_offsets(offsets: npt.NDArray[np.int64], total: int) -> None:
    """Raise InputError unless offsets run from 0 to ``total``, never down."""
    if offsets.dtype != np.int64 or offsets.ndim != 1 or len(offsets) == 0:
        raise InputError(f"offsets are {offsets.dtype} {offsets.shape}, expected int64 [n + 1]")
    if offsets[0] != 0 or offsets[-1] != total or (np.diff(offsets) < 0).any():
        raise InputError(f"offsets must run from 0 to {total} and never down")


def check_events(events: pa.Table, sequence_offsets: npt.NDArray[np.int64]) -> None:
    """Raise InputError unless every event lies within its sequence."""
    sequence = events["sequence"].to_numpy()
    position = events["position"].to_numpy()
    n_sequences = len(sequence_offsets) - 1
    if ((sequence < 0) | (sequence >= n_sequences)).any():
        raise InputError(f"an event names a sequence outside 0..{n_sequences - 1}")
    if ((position < 0) | (position >= np.diff(sequence_offsets)[sequence])).any():
        raise InputError("an event's position lies outside its sequence")


def check_name(name: str, what: str) -> None:
    """Raise InputError unless ``name`` can be a folder name everywhere: letters, digits, dash, underscore."""
    if not _NAME.fullmatch(name):
        raise InputError(f"{what} {name!r} is not made of letters, digits, '-' and '_'")


# ---- arrays -----------------------------------------------------------------------------------------------------------


def state_path(label: str, boundary: int) -> str:
    """Where the states of a checkpoint at a boundary lie within a segment."""
    return f"states/{label}/b{boundary:03d}"


def write_array(group: zarr.Group, path: str, array: npt.NDArray[Any], attributes: dict[str, Any] | None = None) -> None:
    """Store one array as one shard: one file whose inner chunks are compressed and checksummed each for itself."""
    row_bytes = int(np.prod(array.shape[1:], dtype=np.int64)) * array.itemsize
    rows = max(1, min(len(array), CHUNK_BYTES // max(1, row_bytes)))
    chunk = (rows, *array.shape[1:])
    shard = (max(1, -(-len(array) // rows)) * rows, *array.shape[1:])
    stored = group.create_array(
        path,
        shape=array.shape,
        dtype=array.dtype,
        chunks=chunk,
        shards=shard,
        compressors=[
            BloscCodec(typesize=array.itemsize, cname="lz4", clevel=5, shuffle="bitshuffle"),
            Crc32cCodec(),
        ],
        filters=None,
        fill_value=0,
        attributes=attributes or {},
        # An all-zero chunk would otherwise not be written, and -0.0 counts as zero: read back as +0.0.
        config={"write_empty_chunks": True},
    )
    if array.size:
        stored[...] = array


def to_numpy(rows: torch.Tensor) -> tuple[npt.NDArray[Any], str]:
    """The rows as Zarr can hold them (bfloat16 as its uint16 words), and their true dtype's name."""
    name = str(rows.dtype).removeprefix("torch.")
    if name not in STATE_DTYPES:
        raise InputError(f"states are {name}; a store holds {', '.join(STATE_DTYPES)}")
    rows = rows.detach().cpu().contiguous()
    return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy(), name


def to_torch(array: npt.NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """The inverse of :func:`to_numpy`."""
    rows = torch.from_numpy(np.ascontiguousarray(array))
    return rows.view(torch.bfloat16) if dtype == torch.bfloat16 else rows


# ---- tables -----------------------------------------------------------------------------------------------------------


def column_type(table: pa.Table, column: str) -> str:
    """The name of a column's type; InputError where a store cannot hold it."""
    check_name(column, "column")
    for name, kind in _COLUMN_TYPES.items():
        if table.schema.field(column).type == kind:
            if table[column].null_count:
                raise InputError(f"column {column!r} has {table[column].null_count} nulls")
            return name
    raise InputError(f"column {column!r} is {table.schema.field(column).type}; a store holds {', '.join(_COLUMN_TYPES)}")


def write_table(group: zarr.Group, path: str, table: pa.Table) -> dict[str, str]:
    """Store a table column by column; returns its schema. Text lies as in Arrow: UTF-8 bytes and offsets."""
    schema = {column: column_type(table, column) for column in table.column_names}
    for column, kind in schema.items():
        if kind == "string":
            texts = [text.encode() for text in table[column].to_pylist()]
            offsets = np.zeros(len(texts) + 1, np.int64)
            np.cumsum([len(text) for text in texts], out=offsets[1:])
            write_array(group, f"{path}/{column}/bytes", np.frombuffer(b"".join(texts), np.uint8))
            write_array(group, f"{path}/{column}/offsets", offsets)
        else:
            write_array(group, f"{path}/{column}", table[column].to_numpy())
    return schema


def decode_text(data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> pa.Array:
    """Arrow text from UTF-8 bytes and offsets.

    Raises:
        InputError: the offsets do not fit the bytes, or these are not UTF-8.
    """
    check_offsets(offsets, len(data))
    array = pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(data))
    try:
        array.validate(full=True)
    except pa.ArrowInvalid as error:
        raise InputError(f"not UTF-8 text: {error}") from error
    return array.cast(pa.string())


def empty_column(kind: str) -> pa.Array:
    """A column of this type without rows."""
    return pa.array([], _COLUMN_TYPES[kind])


# ---- commit records ---------------------------------------------------------------------------------------------------


def crc32c(data: bytes) -> int:
    """Checksum of whole files and commit records."""
    return int(google_crc32c.value(data))


def fingerprint_digest(fingerprint: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a fingerprint."""
    return hashlib.sha256(canonical(fingerprint)).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values, equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def encode_record(record: dict[str, Any]) -> bytes:
    """A commit record as it lies on disk: one JSON object that ends in the CRC-32C of the rest of it."""
    return json.dumps(record | {"crc32c": crc32c(canonical(record))}, sort_keys=True, indent=1).encode() + b"\n"


def read_record(path: Path) -> dict[str, Any]:
    """A commit record, its checksum and version checked.

    Raises:
        CorruptStoreError: not JSON, or the checksum does not match.
        FormatVersionError: written by a newer version.
    """
    data = path.read_bytes()
    try:
        record = json.loads(data)
        checksum = record.pop("crc32c")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptStoreError(f"commit record {path.name}: not a commit record ({error})") from error
    if checksum != crc32c(canonical(record)) or encode_record(record) != data:
        raise CorruptStoreError(f"commit record {path.name}: its checksum does not match its content")
    check_version(record["format_version"], path)
    return record


def check_version(found: Any, path: Path) -> None:
    """Raise FormatVersionError unless ``found`` is a version that this code reads."""
    if found != FORMAT_VERSION:
        raise FormatVersionError(f"{path}: format version {found}; this version of actcache reads {FORMAT_VERSION}")


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, in a fixed order."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
