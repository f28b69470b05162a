"""Commit records: which segments a store has, in which order, and what each of them was merged from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from actcache.errors import CorruptStoreError, InputError
from actcache.fingerprint import Fingerprint
from actcache.store import layout, shard
from actcache.store.commit_record import CommitRecord, decode_record, record_digest
from actcache.store.rollup import Rolled, committed_marks, read_if_there, read_rollup
from actcache.store.storage import Storage

_LISTINGS = 100  # each finds records that are new, of which a broken one may be without end


class Counts(NamedTuple):
    """How much a segment holds, or what of a merged one lies before it: S, T, E and prompts without an event."""

    n_sequences: int
    n_tokens: int
    n_events: int
    n_excluded: int

    def plus(self, other: Counts) -> Counts:
        """The sum, count by count."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


class Part(NamedTuple):
    """A segment as a writer committed it, wherever compactions have put its content since.

    Attributes:
        segment: its name.
        record: SHA-256 of its commit record, which vouches for every byte.
        counts: of its content.
    """

    segment: str
    record: str
    counts: Counts


def read_fingerprint(storage: Storage) -> Fingerprint:
    """The fingerprint of a store (errors as ``open_store``)."""
    try:
        data = storage.read(layout.ROOT)
    except FileNotFoundError as error:
        raise InputError(
            f"{storage} is not a store (no {layout.ROOT}); give the folder of a store, or of a run"
        ) from error
    return layout.decode_root(data, str(storage))


def committed_names(storage: Storage) -> list[str]:
    """Names of the segments that have a commit record, in order."""
    try:
        listed = storage.names(layout.COMMITS)
    except NotADirectoryError as error:
        raise CorruptStoreError(f"{storage}: {layout.COMMITS} is not a folder") from error
    return sorted(name for file in listed if (name := layout.committed(file)))


def read_record(storage: Storage, name: str, digest: str) -> CommitRecord:
    """The commit record of a segment (errors as ``decode_record``; FileNotFoundError where it is gone)."""
    return decode_record(storage.read(layout.commit_key(name)), name, digest)


def read_records(storage: Storage, digest: str, known: dict[str, CommitRecord] | None = None) -> list[CommitRecord]:
    """All commit records, while writers and a compaction go on: none that counts is missing, some may count no more.

    A listing that is made while a compaction commits and deletes may lack both the new record and the old ones. But
    what it lacks of the old ones was deleted before it ended, so the next listing has the new one. Hence records are
    listed again until nothing is new. Where nothing is known, the roll-up gives all that the first listing shows as it
    was when the roll-up was made; where it is damaged, every record is read.

    Args:
        storage: of the store.
        digest: of its fingerprint.
        known: records by name that need not be read again; those read are added.

    Raises:
        CorruptStoreError: as ``decode_record``; or a record is listed and cannot be read.
    """
    known = {} if known is None else known
    before: list[str] | None = None
    rolled = {} if known else _rolled(storage, digest)
    for _ in range(_LISTINGS):
        if rolled:
            marks = committed_marks(storage)
            known |= {name: one.record for name, one in rolled.items() if marks.get(name) == one.mark}
            names, rolled = sorted(marks), {}
        else:
            names = committed_names(storage)
        new = [name for name in names if name not in known]
        if before is not None and not new:
            return [known[name] for name in sorted({*before, *names}) if name in known]
        records = shard.at_once(storage, [partial(read_if_there, storage, name, digest) for name in new])
        known |= {name: record for name, record in zip(new, records, strict=True) if record is not None}
        before = names
    raise CorruptStoreError(f"{storage}: commit records vanish while they are read{shard.ADVICE}")


def _rolled(storage: Storage, digest: str) -> dict[str, Rolled]:
    try:
        return read_rollup(storage, digest)
    except CorruptStoreError:  # which verify names; nothing depends on it
        return {}


def without_replaced(records: Sequence[CommitRecord]) -> list[CommitRecord]:
    """The records of segments that count, in the order of the store: those that no other one replaces.

    Raises:
        CorruptStoreError: two that count claim to replace the same segment, or segments replace each other.
    """
    records = [record for record in records if not layout.is_addition(record)]
    replaced_by = {record["segment"]: record["replaces"] for record in records}
    for name, older in replaced_by.items():
        # What a segment replaces, it holds whole: so it names all that those replaced, and never what replaces it.
        if any(not set(replaced_by.get(other, ())) <= set(older) for other in older):
            raise CorruptStoreError(f"segment {name!r} replaces one that replaces others than it does{shard.ADVICE}")
    replaced: dict[str, str] = {}
    for record in sorted(records, key=lambda record: -len(record["replaces"])):
        if record["segment"] in replaced:
            continue
        for name in record["replaces"]:
            if name in replaced:
                raise CorruptStoreError(
                    f"segments {replaced[name]!r} and {record['segment']!r} both replace {name!r}{shard.ADVICE}"
                )
            replaced[name] = record["segment"]
    live = [record for record in records if record["segment"] not in replaced]
    return sorted(live, key=lambda record: min([record["segment"], *record["replaces"]]))


def additions_to(segments: Sequence[CommitRecord], records: Sequence[CommitRecord]) -> dict[str, list[CommitRecord]]:
    """The records of additions that count, by the name of the segment that they add to, in the order of their names.

    Args:
        segments: records of segments that count.
        records: all there are.

    Raises:
        CorruptStoreError: an addition counts other rows than its segment.
    """
    found: dict[str, list[CommitRecord]] = {}
    additions = sorted((one for one in records if layout.is_addition(one)), key=lambda record: record["segment"])
    by_name = {record["segment"]: record for record in segments} if additions else {}
    for addition in additions:
        base = by_name.get(addition["extends"]["segment"])
        if base is None or record_digest(base) != addition["extends"]["record"]:
            continue  # of a segment that was merged, or captured anew, meanwhile
        if counts_of(base) != counts_of(addition):
            raise CorruptStoreError(
                f"commit record {addition['segment']}.json adds to segment {base['segment']!r}, and counts other rows"
                f"{shard.ADVICE}"
            )
        found.setdefault(base["segment"], []).append(addition)
    return found


def check_schemas(records: Sequence[dict[str, Any]]) -> None:
    """Raise CorruptStoreError where a column is of two types in two segments, whose tables then do not join."""
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for record in records:
        for table, schema in record["schema"].items():
            for column, kind in schema.items():
                first, expected = seen.setdefault((table, column), (record["segment"], kind))
                if kind != expected:
                    raise CorruptStoreError(
                        f"column {column!r} of {table} is {kind} in segment {record['segment']!r} and {expected} in "
                        f"{first!r}{shard.ADVICE}"
                    )


def counts_of(record: dict[str, Any]) -> Counts:
    """What a record, or an entry of its ``parts``, counts."""
    return Counts(*(record[field] for field in Counts._fields))


def parts_of(record: dict[str, Any]) -> tuple[Part, ...]:
    """What writers committed of a segment's content, in its order: the segment itself unless it was merged."""
    if "parts" in record:
        return tuple(Part(part["segment"], part["record"], counts_of(part)) for part in record["parts"])
    return (Part(record["segment"], record_digest(record), counts_of(record)),)


def encode_parts(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The ``parts`` of a record."""
    return [{"segment": part.segment, "record": part.record, **part.counts._asdict()} for part in parts]


def merge_prompts(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The ``prompts`` of several records as one: digests of each segment's prompts and of all files, and the most."""
    given = [record["prompts"] for record in records if "prompts" in record]
    return {
        "all": sorted({whole for one in given for whole in one["all"]}),
        "of": {name: digest for one in given for name, digest in one["of"].items()},
        "n": max((one.get("n", 0) for one in given), default=0),
    }
