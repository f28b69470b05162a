"""Commit records: how one lies on disk, and what is checked of it before it is believed. Knows no storage."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from actcache.canonical import canonical, digest_of
from actcache.counts import is_count
from actcache.errors import CorruptStoreError, InputError
from actcache.store.layout import (
    COLUMN_TYPES,
    MAX_BLOCKS,
    MAX_NAME,
    NAME,
    ROW_FOLDERS,
    SEGMENT_COLUMN,
    SEGMENTS,
    SITES,
    check_name,
    check_version,
    columns_of,
    is_addition,
)
from actcache.store.shard import crc32c, decode_json, encode_json

_COUNTS = ("n_sequences", "n_tokens", "n_events", "n_excluded")
_BYTES = ("raw_state_bytes", "stored_state_bytes", "stored_bytes")
_FOLDER = re.compile(rf"{NAME.pattern}(\.[0-9a-f]+)?")
_FILE = re.compile(rf"({NAME.pattern}/)*(zarr\.json|[0-9]+)")


class CommitRecord(dict[str, Any]):
    """What a record says, without its checksum.

    Attributes:
        digest: SHA-256 of that: what proves that a segment is the same one, byte for byte.
    """

    __slots__ = ("digest",)

    def __init__(self, fields: Mapping[str, Any], digest: str) -> None:
        """Of these fields, whose digest this is."""
        super().__init__(fields)
        self.digest = digest


def record_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record without its checksum."""
    return record.digest if isinstance(record, CommitRecord) else digest_of(record)


class LateFiles(Mapping[str, list[Any]]):
    """The ``files`` of a record in a roll-up, which are many times what else it says: decoded when they are asked for.

    Every other use of a record that needs them as JSON fails, so that none takes the record for one without files.
    """

    __slots__ = ("_found", "_paths", "_text")

    def __init__(self, paths: tuple[str, ...], text: bytes) -> None:
        """Of these paths, in the order of ``text``: a JSON list of ``[size, CRC-32C]`` each."""
        self._paths, self._text = paths, text
        self._found: dict[str, list[Any]] | None = None

    def __getitem__(self, path: str) -> list[Any]:
        return self._decoded()[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def _decoded(self) -> dict[str, list[Any]]:
        if self._found is None:
            found = dict(zip(self._paths, json.loads(self._text), strict=True))
            for path, (size, checksum) in found.items():
                if not is_count(size) or not (checksum is None or is_count(checksum)):
                    raise CorruptStoreError(f"the roll-up gives {path} the size {size!r} and checksum {checksum!r}")
            self._found = found
        return self._found


def encode_record(record: dict[str, Any]) -> bytes:
    """A commit record as it lies on disk: one JSON object with the CRC-32C of the rest of it."""
    return encode_json(record | {"crc32c": crc32c(canonical(record))})


def decode_record(data: bytes, segment: str, digest: str) -> CommitRecord:
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
        content = canonical(record)
        is_as_written = checksum == crc32c(content) and encode_json(record | {"crc32c": checksum}) == data
    except (InputError, KeyError, TypeError, AttributeError) as error:
        raise CorruptStoreError(f"{where}: not a commit record ({error!r})") from error
    if not is_as_written:
        raise CorruptStoreError(f"{where}: its checksum does not match its content")
    try:
        check_own(record)
        check_shape(record)
        _check_files(record)
    except (InputError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise CorruptStoreError(
            f"{where}: its checksum holds, but it is not as this format writes it ({error!r})"
        ) from error
    if record["segment"] != segment:
        raise CorruptStoreError(f"{where} is that of segment {record['segment']!r}")
    if record["fingerprint"] != digest:
        raise CorruptStoreError(f"{where}: committed under another fingerprint than the store's")
    return CommitRecord(record, hashlib.sha256(content).hexdigest())


def check_own(record: dict[str, Any]) -> None:
    """Raise InputError, or what Python does of values of wrong kinds, unless what a record alone says can be so."""
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
    for field in (*_COUNTS, *_BYTES):
        if not is_count(record[field]):
            raise InputError(f"{field} is {record[field]!r}, expected a count")
    if "parts" in record:
        _check_parts(record)
    if "prompts" in record:
        _check_prompts(record)
    if is_addition(record):
        _check_addition(record)
    elif record["schema"].keys() != columns_of(record["format_version"]).keys():
        raise InputError(f"schema has the tables {', '.join(record['schema'])}")


def check_shape(record: dict[str, Any]) -> None:
    """As :func:`check_own`, of what many records say alike: sites, schema and the paths of files."""
    if record["format_version"] > 1:
        _check_sites(record["sites"])
    for table, schema in record["schema"].items():
        columns = columns_of(record["format_version"])[table]
        for column, kind in schema.items():
            check_name(column, "column")
            if column == SEGMENT_COLUMN:
                raise InputError(f"column {column!r} of {table} is the reader's own")
            if kind not in COLUMN_TYPES or columns.get(column, kind) != kind:
                raise InputError(f"column {column!r} of {table} is of type {kind!r}")
        if not schema.keys() >= columns.keys():
            raise InputError(f"the {table} table lacks {', '.join(sorted(columns.keys() - schema.keys()))}")
    for file in record["files"]:
        if not _FILE.fullmatch(file):
            raise InputError(f"file {file!r} does not lie in the segment")


def _check_files(record: dict[str, Any]) -> None:
    for file, (size, checksum) in record["files"].items():
        if not is_count(size) or not (checksum is None or is_count(checksum)):
            raise InputError(f"file {file!r} has size {size!r} and checksum {checksum!r}")
    sizes = {file: size for file, (size, _) in record["files"].items()}
    stored = sum(size for file, size in sizes.items() if file.startswith(ROW_FOLDERS))
    if (record["stored_bytes"], record["stored_state_bytes"]) != (sum(sizes.values()), stored):
        raise InputError("stored_bytes or stored_state_bytes is not the sum of the files' sizes")
    if record["raw_state_bytes"] and not stored:
        raise InputError(f"raw_state_bytes is {record['raw_state_bytes']!r}, stored in {stored}")


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
