"""Verify: re-read a whole store and name everything that is not as committed, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from actcache.errors import CorruptStoreError
from actcache.store import layout, shard
from actcache.store.reader import Segment, commit_files, read_fingerprint

RECAPTURE = "delete its commit record and run the capture again: it writes this segment anew"
_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        segment: the segment, or the commit record's name.
        where: file, array or chunk within it.
        found: what is there.
        expected: what was committed.
        advice: what to do.
    """

    segment: str
    where: str
    found: str
    expected: str
    advice: str

    def __str__(self) -> str:
        return f"{self.segment}: {self.where}: found {self.found}, expected {self.expected}; {self.advice}"


def verify(path: str | Path) -> list[Problem]:
    """Check root, commit records, every file's size and bytes, every chunk, all offsets, events and texts.

    Returns:
        the problems, none when every committed byte is as written.

    Raises:
        InputError, FormatVersionError: as ``open_store``.
    """
    path = Path(path)
    try:
        fingerprint = read_fingerprint(path)
    except CorruptStoreError as error:
        advice = "the root cannot be rebuilt: capture into a new folder"
        return [Problem(layout.ROOT, layout.ROOT, str(error), "the store's fingerprint", advice)]
    digest = layout.fingerprint_digest(fingerprint)
    problems = []
    for file in commit_files(path):
        name = file.stem
        try:
            record = layout.read_record(file, digest)
        except CorruptStoreError as error:
            where = f"{layout.COMMITS}/{file.name}"
            problems.append(Problem(name, where, str(error), "the record that was committed", RECAPTURE))
        else:
            folder = path / layout.SEGMENTS / name
            problems += _check_segment(Segment(name, folder, range(record["n_events"]), record, fingerprint))
    return problems


def _check_segment(segment: Segment) -> list[Problem]:
    problems = [*_check_files(segment), *_check_chunks(segment)]
    return problems or [*_check_content(segment)]


def _check_files(segment: Segment) -> Iterator[Problem]:
    """Every file against the record, which names all there should be."""
    committed = segment.record["files"]
    for file, expected in committed.items():
        found = _size_and_checksum(segment.path / file)
        if found != expected:
            yield Problem(segment.name, file, _said(found), _said(expected), RECAPTURE)
    for path in layout.files_below(segment.path):
        file = path.relative_to(segment.path).as_posix()
        if file not in committed:
            yield Problem(segment.name, file, "a file", "no such file", "delete it: nothing reads it")


def _check_chunks(segment: Segment) -> Iterator[Problem]:
    """Every chunk, alone: which of a damaged file's chunks are lost, and that those of a sound one decode."""
    for array in segment.arrays:
        try:
            stored = segment.open_array(array)
        except CorruptStoreError as error:
            yield Problem(segment.name, f"array {array}", _said_of(error, segment), "the array committed", RECAPTURE)
            continue
        for chunk, damage in stored.damaged_chunks():
            found = _said_of(damage, segment)
            yield Problem(segment.name, f"array {array}, chunk {chunk}", found, "the chunk written", RECAPTURE)


def _check_content(segment: Segment) -> Iterator[Problem]:
    """That tables and offsets fit each other: nothing that damage can cause, as every byte is as committed."""
    try:
        _ = segment.event_rows
        for table in ("events", "excluded"):
            segment.read_table(table)
    except CorruptStoreError as error:
        yield Problem(
            segment.name, "content", _said_of(error, segment), "offsets and events that fit each other", RECAPTURE
        )


def _said_of(error: CorruptStoreError, segment: Segment) -> str:
    return str(error).removeprefix(f"segment {segment.name}, ").removesuffix(shard.ADVICE)


def _size_and_checksum(file: Path) -> list[int] | None:
    if not file.is_file():
        return None
    size = checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            size, checksum = size + len(block), shard.crc32c(block, checksum)
    return [size, checksum]


def _said(found: list[int] | None) -> str:
    return "no file" if found is None else f"{found[0]} bytes with crc32c {found[1]:08x}"
