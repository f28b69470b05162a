"""Verify: re-read a whole store and name everything that is not as committed, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actcache.errors import ActcacheError, CorruptStoreError, InputError
from actcache.store import layout
from actcache.store.reader import Segment, read_fingerprint

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
    return [problem for file in sorted((path / layout.COMMITS).glob("*.json")) for problem in _check(path, file, digest)]


def _check(path: Path, file: Path, digest: str) -> Iterator[Problem]:
    name = file.stem
    try:
        record = layout.read_record(file)
    except CorruptStoreError as error:
        yield Problem(name, f"{layout.COMMITS}/{file.name}", str(error), "a whole commit record", RECAPTURE)
        return
    for what, found, expected in (
        ("segment name", record["segment"], name),
        ("fingerprint", record["fingerprint"], digest),
    ):
        if found != expected:
            yield Problem(name, f"{layout.COMMITS}/{file.name}: {what}", found, expected, RECAPTURE)
            return
    folder = path / layout.SEGMENTS / record["folder"]
    files = record["files"]
    damaged = set()
    for relative, (size, checksum) in files.items():
        problem = _check_file(name, folder, relative, size, checksum)
        if problem is not None:
            damaged.add(relative)
            yield problem
    for extra in layout.files_below(folder):
        relative = extra.relative_to(folder).as_posix()
        if relative not in files:
            yield Problem(name, relative, "a file", "no such file", "delete it: nothing reads it")
    segment = Segment(name, folder, range(record["n_events"]), record)
    if not damaged:
        yield from _check_content(segment)
        return
    for relative in sorted(damaged):
        if "/c/" in relative:  # the file differs: say which of its chunks do
            yield from _check_chunks(segment, relative.partition("/c/")[0])


def _check_file(name: str, folder: Path, relative: str, size: int, checksum: int) -> Problem | None:
    file = folder / relative
    if not file.is_file():
        return Problem(name, relative, "no file", f"{size} bytes", RECAPTURE)
    data = file.read_bytes()
    if len(data) != size:
        return Problem(name, relative, f"{len(data)} bytes", f"{size} bytes", RECAPTURE)
    found = layout.crc32c(data)
    if found != checksum:
        return Problem(name, relative, f"crc32c {found:08x}", f"{checksum:08x}", RECAPTURE)
    return None


def _check_content(segment: Segment) -> Iterator[Problem]:
    for relative in segment.record["files"]:
        if relative.endswith(f"/{layout.ROOT}") and f"{relative[: -len(layout.ROOT)]}c" in _parents(segment):
            yield from _check_chunks(segment, relative.removesuffix(f"/{layout.ROOT}"))
    try:
        offsets = segment.row_offsets
        layout.check_offsets(offsets, len(segment.read("token_ids")))
        layout.check_events(segment.read_table("events"), offsets)
        segment.read_table("excluded")
    except ActcacheError as error:
        yield Problem(segment.name, "content", str(error), "offsets and events that fit each other", RECAPTURE)


def _parents(segment: Segment) -> set[str]:
    return {f"{file.partition('/c/')[0]}/c" for file in segment.record["files"] if "/c/" in file}


def _check_chunks(segment: Segment, array: str) -> Iterator[Problem]:
    try:
        stored = segment._open(array)
    except (CorruptStoreError, InputError):
        return  # the file itself is already named
    rows = stored.chunks[0]
    for start in range(0, stored.shape[0], rows):
        try:
            np.asarray(segment.read(array, start, min(start + rows, stored.shape[0])))
        except CorruptStoreError as error:
            where = f"array {array}, chunk {start // rows}"
            yield Problem(segment.name, where, str(error.__cause__), "a chunk whose checksum matches", RECAPTURE)
