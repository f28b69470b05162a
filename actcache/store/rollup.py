"""The roll-up: what all commit records say, in one file, so that a store of many segments opens with a few reads.

Nothing needs it. Of each record it has the *mark* that a listing of the records gave: its size, and the tag of the
object or the time at which the file was written. A reader takes from it only what a listing shows with the same mark,
and reads the other records. So a roll-up that is stale costs reads, and one that is damaged is as good as none. Knows
storage and records; knows no segments.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import google_crc32c

from actcache.canonical import canonical
from actcache.errors import ActcacheError, CorruptStoreError
from actcache.fingerprint import Fingerprint
from actcache.store import layout, shard
from actcache.store.commit_record import CommitRecord, LateFiles, check_own, check_shape, decode_record
from actcache.store.storage import Mark, Storage

_VERSION = 1
_SHARED = ("fingerprint", "format_version", "replaces", "schema", "sites")  # said alike by many records
_AT_ONCE = 1024  # records that are in memory, and lie in one member of the gzip file
_READ_BYTES = 2**23
_MOST_PACKED = 100  # times its size: more than JSON of digests and checksums can be packed
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Rolled(NamedTuple):
    """A record in the roll-up, and the mark that it had when it was read."""

    mark: Mark
    record: CommitRecord


def committed_marks(storage: Storage) -> dict[str, Mark]:
    """The mark of each commit record, by the name of its segment (errors as ``committed_names``)."""
    try:
        return {name: mark for key, mark in storage.marks(layout.COMMITS).items() if (name := layout.committed(key))}
    except NotADirectoryError as error:
        raise CorruptStoreError(f"{storage}: {layout.COMMITS} is not a folder") from error


def read_rollup(storage: Storage, digest: str) -> dict[str, Rolled]:
    """What the roll-up of a store says, by name; nothing where there is none.

    Args:
        storage: of the store.
        digest: of its fingerprint.

    Raises:
        CorruptStoreError: it is damaged, or another store's; nothing depends on it.
    """
    size = storage.size(layout.ROLLUP)
    if size is None:
        return {}
    starts = range(0, size, _READ_BYTES)
    reads = [partial(storage.read_ranges, layout.ROLLUP, [(at, min(_READ_BYTES, size - at))]) for at in starts]
    try:
        parts = shard.at_once(storage, reads)
    except FileNotFoundError:  # a repair was faster
        return {}
    return decode_rollup(b"".join(part for (part,) in parts), digest)


def write_rollup(storage: Storage, fingerprint: Fingerprint) -> None:
    """Write the roll-up anew: every record is read and checked again, whatever the one before it said.

    Raises:
        CorruptStoreError: as ``decode_record``.
    """
    digest, marks = fingerprint.digest, committed_marks(storage)

    def entries() -> Iterator[tuple[str, Rolled]]:
        left = iter(marks)
        while names := list(islice(left, _AT_ONCE)):
            records = shard.at_once(storage, [partial(read_if_there, storage, name, digest) for name in names])
            for name, record in zip(names, records, strict=True):
                if record is not None and marks[name][1] is not None:
                    yield name, Rolled(marks[name], record)

    storage.replace(layout.ROLLUP, encode_rollup(entries(), digest))


def read_if_there(storage: Storage, name: str, digest: str) -> CommitRecord | None:
    """A commit record, or None where it is gone (errors as ``decode_record``)."""
    try:
        return decode_record(storage.read(layout.commit_key(name)), name, digest)
    except FileNotFoundError:
        return None


def encode_rollup(entries: Iterator[tuple[str, Rolled]], digest: str) -> bytes:
    """The file of these records, in this order: JSON lines, gzipped. FORMAT.md says what they are."""
    shapes: dict[bytes, int] = {}
    checksum, n, members = 0, 0, []

    def pack(lines: Sequence[bytes]) -> None:
        nonlocal checksum
        text = b"".join(lines)
        checksum = google_crc32c.extend(checksum, text)
        packer = zlib.compressobj(wbits=31)
        members.append(packer.compress(text) + packer.flush())

    pack([shard.encode_json({"fingerprint": digest, "rollup": _VERSION})])
    while some := list(islice(entries, _AT_ONCE)):
        lines = []
        for name, (mark, record) in some:
            shared = {field: record[field] for field in _SHARED if field in record}
            if record["replaces"]:
                del shared["replaces"]
            shape = canonical([sorted(record["files"]), shared])
            if shape not in shapes:
                shapes[shape] = len(shapes)
                lines.append(b'{"shape":' + shape + b"}\n")
            own = {field: value for field, value in record.items() if field not in (*shared, "files", "segment")}
            head = canonical([name, *mark, record.digest, shapes[shape], own])
            files = canonical([record["files"][path] for path in sorted(record["files"])])
            lines.append(b"%b\t%b\n" % (head, files))
            n += 1
        pack(lines)
    pack([shard.encode_json({"crc32c": checksum, "n": n})])
    return b"".join(members)


def decode_rollup(data: bytes, digest: str) -> dict[str, Rolled]:
    """What a roll-up says, by name; ``files`` of its records are decoded when they are asked for.

    Raises:
        CorruptStoreError: a byte of it is not as written, or it is that of another store or of a newer version.
    """
    try:
        return _decode(data, digest)
    except (ActcacheError, ValueError, KeyError, TypeError, AttributeError, IndexError, zlib.error) as error:
        raise CorruptStoreError(f"{layout.ROLLUP}: not a roll-up of this store ({error!r})") from error


def _decode(data: bytes, digest: str) -> dict[str, Rolled]:
    members = list(_unpacked(data))
    first, last = shard.decode_json(members[0]), shard.decode_json(members[-1])
    if first != {"fingerprint": digest, "rollup": _VERSION}:
        raise CorruptStoreError(f"it begins with {first!r}, of this store it would be version {_VERSION}")
    checksum = 0
    for text in members[:-1]:
        checksum = google_crc32c.extend(checksum, text)
    shapes: list[tuple[tuple[str, ...], dict[str, Any]]] = []
    found: dict[str, Rolled] = {}
    for text in members[1:-1]:
        for line in text.splitlines():
            if line.startswith(b"{"):
                shapes.append(_checked_shape(*shard.decode_json(line)["shape"]))
                continue
            head, _, files = line.partition(b"\t")
            name, size, tag, of_record, number, own = shard.decode_json(head)
            paths, shared = shapes[number]
            record = {**own, **shared, "segment": name, "files": LateFiles(paths, files)}
            check_own(record)
            if not _DIGEST.fullmatch(of_record):
                raise CorruptStoreError(f"the digest of record {name} is {of_record!r}")
            found[name] = Rolled((size, tag), CommitRecord(record, of_record))
    if last != {"crc32c": checksum, "n": len(found)}:
        raise CorruptStoreError(f"it ends in {last!r}, expected {len(found)} records and checksum {checksum}")
    return found


def _checked_shape(paths: list[str], shared: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """What many records say alike."""
    layout.check_version(shared["format_version"], layout.ROLLUP)
    check_shape({**shared, "files": paths})
    return tuple(paths), shared


def _unpacked(data: bytes) -> Iterator[bytes]:
    """The members of a gzip file, each unpacked."""
    left = _MOST_PACKED * len(data)
    while data:
        member = zlib.decompressobj(wbits=31)
        text = member.decompress(data, left)
        left -= len(text)
        if not member.eof or left <= 0:
            raise CorruptStoreError("it is cut off, or longer than records can be")
        data = member.unused_data
        yield text
