"""How arrays, tables and commit records lie on disk. FORMAT.md is the prose of this file."""

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

from actcache.canonical import canonical, digest_of
from actcache.counts import is_count
from actcache.errors import CorruptStoreError, FormatVersionError, InputError
from actcache.fingerprint import Fingerprint
from actcache.schema import EVENTS, EXCLUDED, PAIR, SEGMENT, SEQUENCES, arrow_type, types
from actcache.store.chunks import BLOSC, CODECS, ChunkCodec
from actcache.store.shard import crc32c, data_file, decode_json, encode_json

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, FORMAT_VERSION)

ROOT = "zarr.json"
SEGMENTS = "segments"
COMMITS = "commits"
DROPPED = "dropped"
TEXTS, TEXT_OFFSETS = "texts/bytes", "texts/offsets"

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
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME:
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
    for name, kind in _COLUMN_TYPES.items():
        if table.schema.field(column).type == kind:
            if table[column].null_count:
                raise InputError(f"column {column!r} has {table[column].null_count} nulls")
            return name
    raise InputError(
        f"column {column!r} is {table.schema.field(column).type}; a store holds {', '.join(_COLUMN_TYPES)}"
    )


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
    if record["format_version"] > 1:
        _check_sites(record["sites"])
    if is_addition(record):
        _check_addition(record)
    elif record["schema"].keys() != columns_of(record["format_version"]).keys():
        raise InputError(f"schema has the tables {', '.join(record['schema'])}")
    for table, schema in record["schema"].items():
        columns = columns_of(record["format_version"])[table]
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
    stored = sum(size for file, size in sizes.items() if file.startswith(ROW_FOLDERS))
    if (record["stored_bytes"], record["stored_state_bytes"]) != (sum(sizes.values()), stored):
        raise InputError("stored_bytes or stored_state_bytes is not the sum of the files' sizes")
    if not is_count(record["raw_state_bytes"]) or (record["raw_state_bytes"] and not stored):
        raise InputError(f"raw_state_bytes is {record['raw_state_bytes']!r}, stored in {stored}")


def columns_of(version: int) -> dict[str, dict[str, str]]:
    """The columns that every segment of a format version has at least, by table."""
    return _TABLES_OF_V1 if version == 1 else TABLES


def _check_sites(sites: Any) -> None:
    if not isinstance(sites, dict) or not sites.keys() <= SITES.keys():
        raise InputError(f"sites is {sites!r}, expected an object with some of {', '.join(SITES)}")
    for site, blocks in sites.items():
        _check_blocks(blocks, f"the blocks of site {site}")


def _check_blocks(blocks: Any, what: str) -> None:
    if (
        not isinstance(blocks, list)
        or not all(is_count(b) and b < MAX_BLOCKS for b in blocks)
        or len(set(blocks)) < len(blocks)
    ):
        raise InputError(f"{what} are {blocks!r}, expected a list of distinct block indices")


def _check_addition(record: dict[str, Any]) -> None:
    extends = record["extends"]
    if record["format_version"] == 1 or record["schema"] or record["replaces"] or "parts" in record:
        raise InputError("extends is said of more than rows")
    if extends.keys() != {"segment", "record"} or not isinstance(extends["record"], str):
        raise InputError(f"extends is {extends!r}, expected a segment and the digest of its record")
    check_name(extends["segment"], "extended segment")


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
    if record["prompts"].keys() | {"n"} != {"all", "of", "n"} or not all(isinstance(one, str) for one in digests):
        raise InputError("prompts is not made of digests")
    if not is_count(record["prompts"].get("n", 0)):
        raise InputError(f"prompts has an n of {record['prompts']['n']!r}, expected a count")
    if not record["prompts"]["of"].keys() <= {record["segment"], *record["replaces"]}:
        raise InputError("prompts names a segment that is not merged into this one")


def check_version(found: Any, where: str) -> None:
    """Raise FormatVersionError unless ``found`` is a version that this code reads."""
    if type(found) is not int or found not in READABLE_VERSIONS:
        known = " and ".join(map(str, READABLE_VERSIONS))
        raise FormatVersionError(f"{where}: format version {found}; this version of actcache reads {known}")
