"""How arrays and tables of a segment lie on disk, and the root. FORMAT.md is the prose of this file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from actcache.errors import CorruptStoreError, FormatVersionError, InputError
from actcache.fingerprint import Fingerprint
from actcache.schema import EVENTS, EXCLUDED, PAIR, SEGMENT, SEQUENCES, arrow_type, types
from actcache.store.chunks import BLOSC, CODECS, ChunkCodec
from actcache.store.shard import data_file, decode_json, encode_json

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, FORMAT_VERSION)

ROOT = "zarr.json"
SEGMENTS = "segments"
COMMITS = "commits"
DROPPED = "dropped"
ROLLUP = "rollup.jsonl.gz"
TEXTS, TEXT_OFFSETS = "texts/bytes", "texts/offsets"

STATE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_NAME = 200  # characters; file systems take 255 bytes
MAX_BLOCKS = 10_000
COLUMN_TYPES = {name: arrow_type(name) for name in ("int32", "int64", "float32", "string")}
ROW_SELECTIONS = ("prefix", "divergence")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

# Columns that every such table has; more may stand beside them.
EVENT_COLUMNS = types((*EVENTS, replace(PAIR, required=True)))
EXCLUDED_COLUMNS = types(EXCLUDED)
SEQUENCE_COLUMNS = types(SEQUENCES)
TABLES = {"events": EVENT_COLUMNS, "excluded": EXCLUDED_COLUMNS, "sequences": SEQUENCE_COLUMNS}
_TABLES_OF_V1 = {"events": types(EVENTS), "excluded": EXCLUDED_COLUMNS}

STATE = "state"
SITES = {STATE: "states", "attention": "attention", "mlp": "mlp"}  # where rows are taken -> the folder of their arrays
ROW_FOLDERS = tuple(f"{folder}/" for folder in SITES.values())
Sites = dict[str, list[int]]  # site -> blocks
SEGMENT_COLUMN = SEGMENT.name  # added by the reader


def n_rows(fingerprint: Fingerprint, n_tokens: int, n_events: int) -> int:
    """N of a segment: one row per token, or one per event."""
    return n_tokens if fingerprint.has_prefix_rows else n_events


def check_name(name: str, what: str) -> None:
    """Raise InputError unless ``name`` can be a folder name everywhere: letters, digits, dash, underscore."""
    if not NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise InputError(f"{what} {name[:MAX_NAME]!r} is not made of letters, digits, '-' and '_', at most {MAX_NAME}")


def check_site(site: str) -> str:
    """The site; InputError where rows are taken at none of this name."""
    if site not in SITES:
        raise InputError(f"site is {site!r}, expected one of {', '.join(SITES)}")
    return site


def block_of(site: str) -> str:
    """What a block of a site is called, in messages."""
    return "boundary" if site == STATE else f"{site} of block"


# ---- arrays ----------------------------------------------------------------------------------------------------------


def state_path(label: str, boundary: int) -> str:
    """Where the states of a checkpoint at a boundary lie within a segment."""
    return row_path(STATE, label, boundary)


def row_path(site: str, label: str, block: int) -> str:
    """Where the rows of a checkpoint at a site of a block lie within a segment."""
    return f"{SITES[site]}/{label}/b{block:03d}"


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
    if array.startswith((*ROW_FOLDERS, "final/")):
        return ["event" if top == "final" else "row", "width"]
    if rest == ["bytes"]:
        return ["byte"]
    return [f"{_ROW_OF[top]}_offset" if rest else _ROW_OF[top]]


_NAMES_OF = {
    "token_ids": ["token"],
    "sequence_offsets": ["sequence_offset"],
    TEXTS: ["byte"],
    TEXT_OFFSETS: ["text_offset"],
}
_ROW_OF = {"events": "event", "excluded": "prompt", "sequences": "sequence"}

Arrays = dict[str, tuple[tuple[int | None, ...], str]]  # path -> shape, stored dtype; None: only the array itself knows


def expected_arrays(record: dict[str, Any], fingerprint: Fingerprint) -> Arrays:
    """Every array of a segment, or of an addition to one."""
    width, dtype = fingerprint.width, stored_dtype(fingerprint.dtype)
    shape = n_rows(fingerprint, record["n_tokens"], record["n_events"]), width
    rows: Arrays = {
        row_path(site, label, block): (shape, dtype)
        for label in fingerprint.checkpoints
        for site, blocks in recorded_sites(record, fingerprint).items()
        for block in blocks
    }
    if is_addition(record):
        return rows
    return {
        "token_ids": ((record["n_tokens"],), "int32"),
        "sequence_offsets": ((record["n_sequences"] + 1,), "int64"),
        **{final_path(label): ((record["n_events"], width), dtype) for label in fingerprint.checkpoints},
        **rows,
        **(_columns_of_v1(record) if record["format_version"] == 1 else _columns(record)),
    }


def _columns(record: dict[str, Any]) -> Arrays:
    arrays: Arrays = {
        f"{table}/{column}": ((n_of_table(record, table),), kind)
        for table, schema in record["schema"].items()
        for column, kind in schema.items()
        if kind != "string"
    }
    n_texts = sum(n_of_table(record, table) * len(text_columns(schema)) for table, schema in record["schema"].items())
    return {**arrays, TEXTS: ((None,), "uint8"), TEXT_OFFSETS: ((n_texts + 1,), "int64")}


def _columns_of_v1(record: dict[str, Any]) -> Arrays:
    arrays: Arrays = {}
    for table, schema in record["schema"].items():
        n = n_of_table(record, table)
        for column, kind in schema.items():
            if kind == "string":
                arrays[f"{table}/{column}/bytes"] = ((None,), "uint8")
                arrays[f"{table}/{column}/offsets"] = ((n + 1,), "int64")
            else:
                arrays[f"{table}/{column}"] = ((n,), kind)
    return arrays


def n_of_table(record: dict[str, Any], table: str) -> int:
    """How many rows a table of a segment has."""
    return int(record[{"events": "n_events", "excluded": "n_excluded", "sequences": "n_sequences"}[table]])


def text_columns(schema: dict[str, str]) -> list[str]:
    """The columns of texts of a table, in the order in which they lie in a segment's texts."""
    return sorted(column for column, kind in schema.items() if kind == "string")


def recorded_sites(record: dict[str, Any], fingerprint: Fingerprint) -> Sites:
    """The blocks whose rows a segment, or an addition to one, has, by site."""
    sites: Sites = record["sites"] if record["format_version"] > 1 else {}
    if is_addition(record):
        return sites
    # Whatever a record says, a segment must have the states that its store was created with.
    return {**sites, STATE: list(dict.fromkeys([*fingerprint.boundaries, *sites.get(STATE, ())]))}


def is_addition(record: dict[str, Any]) -> bool:
    """Whether a record adds rows to a segment that another record commits."""
    return "extends" in record


def expected_files(record: dict[str, Any], fingerprint: Fingerprint) -> list[str]:
    """Paths of every file that a segment may have: those of its arrays and groups."""
    arrays = expected_arrays(record, fingerprint)
    shards = [f"{path}/{data_file(len(shape))}" for path, (shape, _) in arrays.items()]
    return [*shards, *(str(PurePosixPath(path, ROOT)) for path in (*arrays, *groups_of(arrays)))]


def groups_of(arrays: Iterable[str]) -> list[str]:
    """The groups that arrays lie in, the segment itself (``.``) among them."""
    return sorted({str(parent) for path in arrays for parent in PurePosixPath(path).parents})


def codec_of(array: str, fingerprint: Fingerprint) -> ChunkCodec:
    """The codec of an array's chunks: the fingerprint's for rows and final states, Blosc for all else."""
    return CODECS[fingerprint.codec or BLOSC.name] if array.startswith((*ROW_FOLDERS, "final/")) else BLOSC


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
    for name, kind in COLUMN_TYPES.items():
        if table.schema.field(column).type == kind:
            if table[column].null_count:
                raise InputError(f"column {column!r} has {table[column].null_count} nulls")
            return name
    raise InputError(f"column {column!r} is {table.schema.field(column).type}; a store holds {', '.join(COLUMN_TYPES)}")


def encode_texts(columns: Sequence[pa.ChunkedArray]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Columns of texts as Arrow lays one: UTF-8 bytes one after another, and the offsets where each text begins."""
    texts = [text.encode() for column in columns for text in column.to_pylist()]
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    return np.frombuffer(b"".join(texts), np.uint8), offsets


def decode_text(data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> pa.Array:
    """A column of texts: text i is ``data[offsets[i]:offsets[i + 1]]``; the offsets never go down.

    Raises:
        InputError: the bytes are not UTF-8.
    """
    data, offsets = data[offsets[0] : offsets[-1]], offsets - offsets[0]
    array = pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(data))
    try:
        array.validate(full=True)
    except pa.ArrowInvalid as error:
        raise InputError(f"not UTF-8 text: {error}") from error
    return array.cast(pa.string())


def empty_column(kind: str) -> pa.Array:
    """A column of this type without rows."""
    return pa.array([], COLUMN_TYPES[kind])


# ---- the root --------------------------------------------------------------------------------------------------------


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


def with_pair(events: pa.Table, fingerprint: Fingerprint) -> pa.Table:
    """A table of events with their pair, which version 1 left to the fingerprint."""
    if PAIR.name in events.column_names:
        return events
    pairs = pa.array([",".join(fingerprint.pair or ())] * events.num_rows, pa.string())
    return events.add_column(list(EVENT_COLUMNS).index(PAIR.name), PAIR.name, pairs)


def encode_group(attributes: dict[str, Any]) -> bytes:
    """The ``zarr.json`` of a group."""
    return encode_json({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def encode_root(fingerprint: Fingerprint, version: int = FORMAT_VERSION) -> bytes:
    """The ``zarr.json`` of a store: a group whose attributes hold the fingerprint and its digest."""
    content = {
        "format_version": version,
        "fingerprint": fingerprint.to_json(),
        "fingerprint_sha256": fingerprint.digest,
    }
    return encode_group({"actcache": content})


def commit_key(segment: str) -> str:
    """Where the commit record of a segment lies."""
    return f"{COMMITS}/{segment}.json"


def committed(file: str) -> str | None:
    """The segment whose commit record a file in the folder of commit records is; None of any other file."""
    return file.removesuffix(".json") if file.endswith(".json") and not file.startswith(".") else None


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
        is_as_written = encode_root(fingerprint, content["format_version"]) == data
    except (InputError, KeyError, TypeError) as error:
        raise CorruptStoreError(f"{where}/{ROOT}: not the root of a store ({error})") from error
    if not is_as_written:
        raise CorruptStoreError(f"{where}/{ROOT}: its bytes are not those written with the store")
    return fingerprint


def columns_of(version: int) -> dict[str, dict[str, str]]:
    """The columns that every segment of a format version has at least, by table."""
    return _TABLES_OF_V1 if version == 1 else TABLES


def check_version(found: Any, where: str) -> None:
    """Raise FormatVersionError unless ``found`` is a version that this code reads."""
    if type(found) is not int or found not in READABLE_VERSIONS:
        known = " and ".join(map(str, READABLE_VERSIONS))
        raise FormatVersionError(f"{where}: format version {found}; this version of actcache reads {known}")
