"""What a segment holds, and how arrays, tables and commit records lie on disk. FORMAT.md is the prose of this file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from actcache.carried import MAX_KEYS as MAX_CARRIED_KEYS
from actcache.carried import MAX_LEVELS as MAX_CARRIED_LEVELS
from actcache.carried import is_shallow, is_text
from actcache.errors import CorruptStoreError, FormatVersionError, InputError
from actcache.schema import EVENTS, EXCLUDED, SEGMENT, Fingerprint, arrow_type, canonical, digest_of, is_count, types
from actcache.store.chunks import BLOSC, CODECS, ChunkCodec
from actcache.store.shard import crc32c, data_file, decode_json, encode_json

FORMAT_VERSION = 1

ROOT = "zarr.json"
SEGMENTS = "segments"
COMMITS = "commits"
DROPPED = "dropped"

STATE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_NAME = 200  # characters; file systems take 255 bytes
MAX_BLOCKS = 10_000
_COLUMN_TYPES = {name: arrow_type(name) for name in ("int32", "int64", "float32", "string")}
ROW_SELECTIONS = ("prefix", "divergence")
_COUNTS = ("n_sequences", "n_tokens", "n_events", "n_excluded")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_FOLDER = re.compile(rf"{_NAME.pattern}(\.[0-9a-f]+)?")
_FILE = re.compile(rf"({_NAME.pattern}/)*(zarr\.json|[0-9]+)")

# Columns that every such table has; more may stand beside them.
EVENT_COLUMNS = types(EVENTS)
EXCLUDED_COLUMNS = types(EXCLUDED)
SEGMENT_COLUMN = SEGMENT.name  # added by the reader


@dataclass(frozen=True, eq=False)
class SegmentData:
    """Everything that one segment holds: S sequences of T tokens, E events, N rows of width D.

    Attributes:
        token_ids: ``[T]`` int32, the sequences' token ids one after another.
        sequence_offsets: ``[S + 1]`` int64, where each sequence begins in ``token_ids``.
        states: ``(label, boundary) -> [N, D]`` in the store's dtype. With ``row_selection`` ``prefix`` row i is the
            state at token i, N = T; with ``divergence`` it is the state at event i, N = E.
        final: ``label -> [E, D]``, the last block's output (before the final norm) at each event's position.
        events: one row an event, at least the columns of ``EVENT_COLUMNS``; ``sequence`` counts within the segment,
            ``carried`` is a JSON object, none of whose keys names a column.
        excluded: prompts without an event, at least the columns of ``EXCLUDED_COLUMNS``.

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
            check_carried(table, name)
        check_events(self.events["sequence"].to_numpy(), self.events["position"].to_numpy(), self.sequence_offsets)
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


def check_events(
    sequence: npt.NDArray[np.int64], position: npt.NDArray[np.int64], sequence_offsets: npt.NDArray[np.int64]
) -> None:
    """Raise InputError unless every event lies within its sequence."""
    n_sequences = len(sequence_offsets) - 1
    if ((sequence < 0) | (sequence >= n_sequences)).any():
        raise InputError(f"an event names a sequence outside 0..{n_sequences - 1}")
    if ((position < 0) | (position >= np.diff(sequence_offsets)[sequence])).any():
        raise InputError("an event's position lies outside its sequence")


def n_rows(fingerprint: Fingerprint, n_tokens: int, n_events: int) -> int:
    """N of a segment: one row a token, or one an event."""
    return n_tokens if fingerprint.has_prefix_rows else n_events


def check_carried(table: pa.Table, name: str) -> None:
    """Raise InputError unless ``carried`` of every row is a JSON object whose keys can be further columns."""
    taken = {*table.column_names, *(EVENT_COLUMNS if name == "events" else EXCLUDED_COLUMNS), SEGMENT_COLUMN}
    keys: set[str] = set()
    for text in set(table["carried"].to_pylist()):
        try:
            carried = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the {name} table's carried {text[:40]!r} is not JSON: {str(error)[:200]}") from error
        if not isinstance(carried, dict):
            raise InputError(f"the {name} table's carried {text[:40]!r} is not a JSON object")
        if not is_shallow(carried):
            raise InputError(f"the {name} table's carried {text[:40]!r} has more than {MAX_CARRIED_LEVELS} levels")
        keys.update(carried)
        if len(keys) > MAX_CARRIED_KEYS:
            raise InputError(f"the {name} table's carried has more than {MAX_CARRIED_KEYS} distinct keys")
        for key in carried:
            if key in taken or "\0" in key or not is_text(key):
                raise InputError(
                    f"carried key {key!r} cannot be a column of the {name} table: it is one already, or not text"
                )


def check_name(name: str, what: str) -> None:
    """Raise InputError unless ``name`` can be a folder name everywhere: letters, digits, dash, underscore."""
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise InputError(f"{what} {name[:MAX_NAME]!r} is not made of letters, digits, '-' and '_', at most {MAX_NAME}")


# ---- arrays ----------------------------------------------------------------------------------------------------------


def state_path(label: str, boundary: int) -> str:
    """Where the states of a checkpoint at a boundary lie within a segment."""
    return f"states/{label}/b{boundary:03d}"


def final_path(label: str) -> str:
    """Where the final hidden states of a checkpoint lie within a segment."""
    return f"final/{label}"


def stored_dtype(dtype: str) -> str:
    """The Zarr data type that holds states of this dtype: bfloat16, which core Zarr lacks, as its uint16 words."""
    return "uint16" if dtype == "bfloat16" else dtype


def dimension_names(array: str) -> list[str]:
    """What the axes of an array are called; readers that align arrays by name (xarray) go by these."""
    if array in _NAMES_OF:
        return _NAMES_OF[array]
    top, _, *rest = array.split("/")
    if top in ("states", "final"):
        return ["row" if top == "states" else "event", "width"]
    if rest == ["bytes"]:
        return ["byte"]
    return [f"{_ROW_OF[top]}_offset" if rest else _ROW_OF[top]]


_NAMES_OF = {"token_ids": ["token"], "sequence_offsets": ["sequence_offset"]}
_ROW_OF = {"events": "event", "excluded": "prompt"}


def expected_arrays(record: dict[str, Any], fingerprint: Fingerprint) -> dict[str, tuple[tuple[int | None, ...], str]]:
    """Path, shape and stored dtype of every array of a segment; None is a length that only the array itself knows."""
    width, dtype = fingerprint.width, stored_dtype(fingerprint.dtype)
    rows = n_rows(fingerprint, record["n_tokens"], record["n_events"])
    arrays: dict[str, tuple[tuple[int | None, ...], str]] = {
        "token_ids": ((record["n_tokens"],), "int32"),
        "sequence_offsets": ((record["n_sequences"] + 1,), "int64"),
    }
    for label in fingerprint.checkpoints:
        arrays[final_path(label)] = ((record["n_events"], width), dtype)
        for boundary in fingerprint.boundaries:
            arrays[state_path(label, boundary)] = ((rows, width), dtype)
    for table, n in (("events", record["n_events"]), ("excluded", record["n_excluded"])):
        for column, kind in record["schema"][table].items():
            if kind == "string":
                arrays[f"{table}/{column}/bytes"] = ((None,), "uint8")
                arrays[f"{table}/{column}/offsets"] = ((n + 1,), "int64")
            else:
                arrays[f"{table}/{column}"] = ((n,), kind)
    return arrays


def expected_files(record: dict[str, Any], fingerprint: Fingerprint) -> list[str]:
    """Paths of every file that a segment may have: those of its arrays and groups."""
    arrays = expected_arrays(record, fingerprint)
    shards = [f"{path}/{data_file(len(shape))}" for path, (shape, _) in arrays.items()]
    return [*shards, *(str(PurePosixPath(path, ROOT)) for path in (*arrays, *groups_of(arrays)))]


def groups_of(arrays: Iterable[str]) -> list[str]:
    """The groups that arrays lie in, the segment itself (``.``) among them."""
    return sorted({str(parent) for path in arrays for parent in PurePosixPath(path).parents})


def codec_of(array: str, fingerprint: Fingerprint) -> ChunkCodec:
    """The codec of an array's chunks: the fingerprint's for states and final states, Blosc for all else."""
    return CODECS[fingerprint.codec or BLOSC.name] if array.startswith(("states/", "final/")) else BLOSC


def arrays_of(segment: SegmentData) -> Iterator[tuple[str, npt.NDArray[Any], dict[str, Any]]]:
    """Path, content and attributes of every array of a segment."""
    yield "token_ids", segment.token_ids, {}
    yield "sequence_offsets", segment.sequence_offsets, {}
    states = {state_path(label, boundary): rows for (label, boundary), rows in segment.states.items()}
    for path, rows in (states | {final_path(label): rows for label, rows in segment.final.items()}).items():
        yield path, to_numpy(rows), {"dtype": str(rows.dtype).removeprefix("torch.")}
    for name, table in (("events", segment.events), ("excluded", segment.excluded)):
        for column, kind in schema_of(table).items():
            if kind == "string":
                data, offsets = encode_text(table[column])
                yield f"{name}/{column}/bytes", data, {}
                yield f"{name}/{column}/offsets", offsets, {}
            else:
                yield f"{name}/{column}", table[column].to_numpy(), {}


def to_numpy(rows: torch.Tensor) -> npt.NDArray[Any]:
    """The rows as Zarr can hold them."""
    rows = rows.detach().cpu().contiguous()
    return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()


def to_torch(array: npt.NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """The inverse of :func:`to_numpy`."""
    rows = torch.from_numpy(array)
    return rows.view(torch.bfloat16) if dtype == torch.bfloat16 else rows


# ---- tables ----------------------------------------------------------------------------------------------------------


def schema_of(table: pa.Table) -> dict[str, str]:
    """The type of each column, by name."""
    return {column: column_type(table, column) for column in table.column_names}


def column_type(table: pa.Table, column: str) -> str:
    """The name of a column's type; InputError where a store cannot hold it."""
    check_name(column, "column")
    if column == SEGMENT_COLUMN:
        raise InputError(f"a column cannot be called {column!r}: the reader adds one of that name")
    for name, kind in _COLUMN_TYPES.items():
        if table.schema.field(column).type == kind:
            if table[column].null_count:
                raise InputError(f"column {column!r} has {table[column].null_count} nulls")
            return name
    raise InputError(
        f"column {column!r} is {table.schema.field(column).type}; a store holds {', '.join(_COLUMN_TYPES)}"
    )


def encode_text(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Text as Arrow lays it: UTF-8 bytes one after another, and the offsets where each text begins."""
    texts = [text.encode() for text in column.to_pylist()]
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    return np.frombuffer(b"".join(texts), np.uint8), offsets


def decode_text(data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> pa.Array:
    """The inverse of :func:`encode_text`.

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


# ---- root and commit records -----------------------------------------------------------------------------------------


def check_fingerprint(fingerprint: Fingerprint) -> None:
    """Raise InputError unless the layout has a place for what a fingerprint names."""
    for label in fingerprint.checkpoints:
        check_name(label, "checkpoint label")
    if any(boundary >= MAX_BLOCKS for boundary in fingerprint.boundaries):
        raise InputError(f"the fingerprint's boundaries are {fingerprint.boundaries}, expected below {MAX_BLOCKS}")
    for field, found, known in (
        ("dtype", fingerprint.dtype, tuple(STATE_DTYPES)),
        ("row_selection", fingerprint.row_selection, ROW_SELECTIONS),
        ("codec", fingerprint.codec or BLOSC.name, tuple(CODECS)),
    ):
        if found not in known:
            raise InputError(f"the fingerprint's {field} is {found!r}, expected one of {', '.join(known)}")
    if fingerprint.codec not in (None, BLOSC.name) and fingerprint.dtype != "bfloat16":
        raise InputError(f"codec {fingerprint.codec} holds bfloat16 states, not {fingerprint.dtype}; use {BLOSC.name}")


def encode_group(attributes: dict[str, Any]) -> bytes:
    """The ``zarr.json`` of a group."""
    return encode_json({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def encode_root(fingerprint: Fingerprint) -> bytes:
    """The ``zarr.json`` of a store: a group whose attributes hold the fingerprint and its digest."""
    content = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint.to_json(),
        "fingerprint_sha256": fingerprint.digest,
    }
    return encode_group({"actcache": content})


def commit_key(segment: str) -> str:
    """Where the commit record of a segment lies."""
    return f"{COMMITS}/{segment}.json"


def decode_root(data: bytes, where: str) -> Fingerprint:
    """The fingerprint in the root file of the store that a person calls ``where``, checked.

    Raises:
        CorruptStoreError: not a root, or a byte of it is not as written.
        FormatVersionError: written by a newer version.
    """
    try:
        content = decode_json(data)["attributes"]["actcache"]
        check_version(content["format_version"], where)
        fingerprint = Fingerprint.from_json(content["fingerprint"])
        check_fingerprint(fingerprint)
        is_as_written = encode_root(fingerprint) == data
    except (InputError, KeyError, TypeError) as error:
        raise CorruptStoreError(f"{where}/{ROOT}: not the root of a store ({error})") from error
    if not is_as_written:
        raise CorruptStoreError(f"{where}/{ROOT}: its bytes are not those written with the store")
    return fingerprint


def encode_record(record: dict[str, Any]) -> bytes:
    """A commit record as it lies on disk: one JSON object with the CRC-32C of the rest of it."""
    return encode_json(record | {"crc32c": crc32c(canonical(record))})


def record_digest(record: dict[str, Any]) -> str:
    """SHA-256 of a record without its checksum: what proves that a segment is the same one, byte for byte."""
    return digest_of(record)


def decode_record(data: bytes, segment: str, digest: str) -> dict[str, Any]:
    """A commit record, checked as far as it goes without the files that it names.

    Args:
        data: of the file.
        segment: the one that the file's name stands for.
        digest: of the store's fingerprint.

    Raises:
        CorruptStoreError: not a commit record, a byte of it is not as written, or it is another segment's or store's.
        FormatVersionError: written by a newer version.
    """
    where = f"commit record {segment}.json"
    try:
        record: dict[str, Any] = decode_json(data)
        check_version(record["format_version"], where)
        checksum = record.pop("crc32c")
        is_as_written = checksum == crc32c(canonical(record)) and encode_record(record) == data
    except (InputError, KeyError, TypeError, AttributeError) as error:
        raise CorruptStoreError(f"{where}: not a commit record ({error!r})") from error
    if not is_as_written:
        raise CorruptStoreError(f"{where}: its checksum does not match its content")
    try:
        _check_record(record)
    except (InputError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise CorruptStoreError(
            f"{where}: its checksum holds, but it is not as this format writes it ({error!r})"
        ) from error
    if record["segment"] != segment:
        raise CorruptStoreError(f"{where} is that of segment {record['segment']!r}")
    if record["fingerprint"] != digest:
        raise CorruptStoreError(f"{where}: committed under another fingerprint than the store's")
    return record


def _check_record(record: dict[str, Any]) -> None:
    check_name(record["segment"], "segment name")
    if not (isinstance(record["folder"], str) and _FOLDER.fullmatch(record["folder"])):
        raise InputError(f"folder {record['folder']!r} is not one below {SEGMENTS}/")
    if record["folder"].partition(".")[0] != record["segment"] or len(record["folder"]) > 2 * MAX_NAME:
        raise InputError(f"folder {record['folder'][:MAX_NAME]!r} is not that of segment {record['segment']!r}")
    if not isinstance(record["replaces"], list) or record["replaces"] != sorted(set(record["replaces"])):
        raise InputError(f"replaces is {record['replaces']!r}, expected distinct segment names in order")
    for name in record["replaces"]:
        check_name(name, "replaced segment")
    if record["segment"] in record["replaces"]:
        raise InputError(f"segment {record['segment']!r} replaces itself")
    for field in _COUNTS:
        if not is_count(record[field]):
            raise InputError(f"{field} is {record[field]!r}, expected a count")
    if "parts" in record:
        _check_parts(record)
    if "prompts" in record:
        _check_prompts(record)
    for table, columns in (("events", EVENT_COLUMNS), ("excluded", EXCLUDED_COLUMNS)):
        schema = record["schema"][table]
        for column, kind in schema.items():
            check_name(column, "column")
            if column == SEGMENT_COLUMN:
                raise InputError(f"column {column!r} of {table} is the reader's own")
            if kind not in _COLUMN_TYPES or columns.get(column, kind) != kind:
                raise InputError(f"column {column!r} of {table} is of type {kind!r}")
        if not schema.keys() >= columns.keys():
            raise InputError(f"the {table} table lacks {', '.join(sorted(columns.keys() - schema.keys()))}")
    for file, (size, checksum) in record["files"].items():
        if not _FILE.fullmatch(file):
            raise InputError(f"file {file!r} does not lie in the segment")
        if not is_count(size) or not (checksum is None or is_count(checksum)):
            raise InputError(f"file {file!r} has size {size!r} and checksum {checksum!r}")
    sizes = {file: size for file, (size, _) in record["files"].items()}
    stored = sum(size for file, size in sizes.items() if file.startswith("states/"))
    if (record["stored_bytes"], record["stored_state_bytes"]) != (sum(sizes.values()), stored):
        raise InputError("stored_bytes or stored_state_bytes is not the sum of the files' sizes")
    if not is_count(record["raw_state_bytes"]) or (record["raw_state_bytes"] and not stored):
        raise InputError(f"raw_state_bytes is {record['raw_state_bytes']!r}, stored in {stored}")


def _check_parts(record: dict[str, Any]) -> None:
    if not isinstance(record["parts"], list) or not record["parts"]:
        raise InputError("parts is not a list of what the segment was merged from")
    for part in record["parts"]:
        if part.keys() != {"segment", "record", *_COUNTS} or part["segment"] not in record["replaces"]:
            raise InputError(f"part {part!r} is not one of a segment that was replaced")
        if not isinstance(part["record"], str) or not all(is_count(part[field]) for field in _COUNTS):
            raise InputError(f"part {part['segment']!r} has no digest, or no counts")
    for field in _COUNTS:
        if sum(part[field] for part in record["parts"]) != record[field]:
            raise InputError(f"{field} is {record[field]}, that of its parts another")


def _check_prompts(record: dict[str, Any]) -> None:
    digests = [*record["prompts"]["all"], *record["prompts"]["of"].values()]
    if record["prompts"].keys() != {"all", "of"} or not all(isinstance(one, str) for one in digests):
        raise InputError("prompts is not made of digests")
    if not record["prompts"]["of"].keys() <= {record["segment"], *record["replaces"]}:
        raise InputError("prompts names a segment that is not merged into this one")


def check_version(found: Any, where: str) -> None:
    """Raise FormatVersionError unless ``found`` is a version that this code reads."""
    if found != FORMAT_VERSION:
        raise FormatVersionError(f"{where}: format version {found}; this version of actcache reads {FORMAT_VERSION}")
