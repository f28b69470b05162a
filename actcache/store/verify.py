"""Verify: re-read a whole store, name everything that is not as committed, and drop what cannot be read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from actcache.errors import CorruptStoreError
from actcache.fingerprint import Fingerprint
from actcache.progress import OnProgress, Tally, untold
from actcache.store import layout, shard
from actcache.store.commit_record import CommitRecord, record_digest
from actcache.store.records import (
    additions_to,
    check_schemas,
    committed_names,
    read_fingerprint,
    read_record,
    without_replaced,
)
from actcache.store.rollup import committed_marks, read_if_there, read_rollup
from actcache.store.segment import Segment
from actcache.store.storage import Place, Storage, open_storage

RECAPTURE = "'actcache verify --repair' drops this segment; the same capture command then writes it anew"


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


def verify(place: Place, on_progress: OnProgress = untold) -> list[Problem]:
    """Check root, commit records, every file's size and bytes, every chunk, all offsets, events and texts.

    Args:
        place: as in ``open_store``.
        on_progress: told of arrays.

    Returns:
        the problems, none when every committed byte is as written.

    Raises:
        InputError, FormatVersionError: as ``open_store``.
    """
    storage = open_storage(place)
    try:
        fingerprint = read_fingerprint(storage)
    except CorruptStoreError as error:
        advice = "the root cannot be rebuilt: capture into a new folder"
        return [Problem(layout.ROOT, layout.ROOT, str(error), "the store's fingerprint", advice)]
    problems_of_rollup = [*_check_rollup(storage, fingerprint)]
    checked: dict[str, list[Problem]] = {}  # by the digest of the record
    known: set[str] | None = None  # the segments that were there when this began: it may take long
    while True:
        records, problems = _live_records(storage, fingerprint)
        segments = [Segment(storage, range(record["n_events"]), record, fingerprint) for record in records]
        if known is None:
            known = {name for segment in segments for name in segment.covers}
        # A compaction may have deleted what was being checked: then the segment that has it now is checked instead.
        to_check = [one for one in segments if known & one.covers and record_digest(one.record) not in checked]
        if not to_check:
            break
        tally = Tally(sum(len(segment.arrays) for segment in to_check), "arrays", on_progress)
        for segment in to_check:
            checked[record_digest(segment.record)] = _check_segment(segment, tally)
    of_segments = (checked.get(record_digest(record), ()) for record in records)
    return [*problems_of_rollup, *problems, *itertools.chain.from_iterable(of_segments)]


def repair(place: Place, on_progress: OnProgress = untold) -> list[Problem]:
    """Drop each segment that :func:`verify` finds damaged: its commit record moves to ``dropped/``, nothing is deleted.

    What is left reads without errors, and the roll-up is gone; the same capture command writes the dropped segments
    anew. Files that no record names are left alone: nothing reads them.

    Args:
        place, on_progress: as :func:`verify`.

    Returns:
        the problems found, in whose segments nothing is read any more.

    Raises:
        CorruptStoreError: the root is damaged, without which nothing else can be believed.
        InputError, FormatVersionError: as ``open_store``.
    """
    storage = open_storage(place)
    read_fingerprint(storage)
    problems = verify(storage, on_progress)
    damaged = {problem.segment for problem in problems if problem.advice == RECAPTURE}
    if problems:
        storage.remove(layout.ROLLUP)  # first, so that none tells of a record that was set aside
    for name in sorted(damaged & set(committed_names(storage))):
        key = layout.commit_key(name)
        taken = set(storage.names(layout.DROPPED))
        free = next(i for i in itertools.count(1) if f"{name}.{i}.json" not in taken)
        storage.move(key, f"{layout.DROPPED}/{name}.{free}.json")
    return problems


def _live_records(storage: Storage, fingerprint: Fingerprint) -> tuple[list[CommitRecord], list[Problem]]:
    """The records that count, those of additions too, and what is wrong with the others."""
    digest = fingerprint.digest
    problems: list[Problem] = []
    records = []
    try:
        names = committed_names(storage)
    except CorruptStoreError as error:
        expected = "the folder of the commit records"
        return [], [Problem(layout.COMMITS, layout.COMMITS, str(error), expected, RECAPTURE)]
    for name in names:
        try:
            records.append(read_record(storage, name, digest))
        except CorruptStoreError as error:
            problems.append(_record_problem(name, str(error)))
        except FileNotFoundError:
            if name in committed_names(storage):  # else replaced meanwhile by a compaction
                problems.append(_record_problem(name, "not an ordinary file"))
    try:
        segments = without_replaced(records)
        check_schemas(segments)
        records = [*segments, *itertools.chain.from_iterable(additions_to(segments, records).values())]
    except CorruptStoreError as error:
        problems.append(Problem(layout.COMMITS, layout.COMMITS, str(error), "one record per segment", RECAPTURE))
    return records, problems


def _check_rollup(storage: Storage, fingerprint: Fingerprint) -> Iterator[Problem]:
    """The roll-up against the records that it has as they are."""
    expected, advice = "what the commit records say", "'actcache compact' writes it anew; nothing else depends on it"
    try:
        rolled = read_rollup(storage, fingerprint.digest)
    except CorruptStoreError as error:
        yield Problem(layout.ROLLUP, layout.ROLLUP, str(error), expected, advice)
        return
    marks = committed_marks(storage) if rolled else {}
    for name, one in rolled.items():
        if marks.get(name) != one.mark:
            continue
        try:
            record = read_if_there(storage, name, fingerprint.digest)
        except CorruptStoreError:  # which is named as the record's
            continue
        if record is not None and (record.digest != one.record.digest or record != one.record):
            yield Problem(layout.ROLLUP, f"entry {name}", "another record", expected, advice)


def _record_problem(name: str, found: str) -> Problem:
    return Problem(name, layout.commit_key(name), found, "the record that was committed", RECAPTURE)


def _check_segment(segment: Segment, tally: Tally) -> list[Problem]:
    problems = [*_check_files(segment), *_check_chunks(segment, tally)]
    return problems or [*_check_content(segment)]


def _check_files(segment: Segment) -> Iterator[Problem]:
    """Every file against the record, which names all there should be."""
    committed = segment.record["files"]
    found = segment.storage.sizes(segment.folder)
    for file, (size, checksum) in committed.items():
        if found.get(file) != size:
            said = f"{found[file]} bytes" if file in found else "no file"
            yield Problem(segment.name, file, said, f"{size} bytes", RECAPTURE)
        elif checksum is not None:
            try:
                crc = shard.crc32c(segment.storage.read(f"{segment.folder}/{file}"))
            except FileNotFoundError:
                yield Problem(segment.name, file, "no ordinary file", f"{size} bytes", RECAPTURE)
                continue
            if crc != checksum:
                yield Problem(segment.name, file, f"crc32c {crc:08x}", f"{checksum:08x}", RECAPTURE)
    for file in sorted(found.keys() - committed.keys()):
        yield Problem(segment.name, file, "a file", "no such file", "delete it: nothing reads it")


def _check_chunks(segment: Segment, tally: Tally) -> Iterator[Problem]:
    """Every chunk of every array."""
    for array in segment.arrays:
        try:
            for chunk, damage in segment.open_array(array).damaged_chunks():
                found = _said_of(damage, segment)
                yield Problem(segment.name, f"array {array}, chunk {chunk}", found, "the chunk written", RECAPTURE)
        except CorruptStoreError as error:
            yield Problem(segment.name, f"array {array}", _said_of(error, segment), "the array committed", RECAPTURE)
        tally.add(1)


def _check_content(segment: Segment) -> Iterator[Problem]:
    """That tables and offsets fit each other: nothing that damage can cause, as every byte is as committed."""
    if layout.is_addition(segment.record):
        return
    try:
        _ = segment.event_rows
        for table in segment.record["schema"]:
            segment.read_table(table)
    except CorruptStoreError as error:
        yield Problem(
            segment.name, "content", _said_of(error, segment), "offsets and events that fit each other", RECAPTURE
        )


def _said_of(error: CorruptStoreError, segment: Segment) -> str:
    return str(error).removeprefix(f"segment {segment.name}, ").removesuffix(shard.ADVICE)
