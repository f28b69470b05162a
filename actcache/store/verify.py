"""Verify: re-read a whole store and name everything that is not as committed, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from actcache.errors import CorruptStoreError
from actcache.store import layout, shard
from actcache.store.reader import Segment, commit_files, read_fingerprint

RECAPTURE = "delete its commit record and run the capture again: it writes this segment anew"


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
    for file, (size, checksum) in committed.items():
        path = segment.path / file
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            said = "no file" if found is None else f"{found} bytes"
            yield Problem(segment.name, file, said, f"{size} bytes", RECAPTURE)
        elif checksum is not None and (crc := shard.crc32c(path.read_bytes())) != checksum:
            yield Problem(segment.name, file, f"crc32c {crc:08x}", f"{checksum:08x}", RECAPTURE)
    for path in layout.files_below(segment.path):
        file = path.relative_to(segment.path).as_posix()
        if file not in committed:
            yield Problem(segment.name, file, "a file", "no such file", "delete it: nothing reads it")


def _check_chunks(segment: Segment) -> Iterator[Problem]:
    """Every chunk of every array."""
    for array in segment.arrays:
        try:
            for chunk, damage in segment.open_array(array).damaged_chunks():
                found = _said_of(damage, segment)
                yield Problem(segment.name, f"array {array}, chunk {chunk}", found, "the chunk written", RECAPTURE)
        except CorruptStoreError as error:
            yield Problem(segment.name, f"array {array}", _said_of(error, segment), "the array committed", RECAPTURE)


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
