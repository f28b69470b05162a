"""What must hold of a store, whatever went wrong while it was written: each check names what it found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from actcache.store import Store, verify
from actcache.store.feed import RowBatch, RowFeed
from actcache.store.storage import Storage
from actcache.testing.content import Content, bytes_of, files_of

_DIFFERS = ("segment", "folder", "replaces", "crc32c", "parts")  # in the records of equal content


def names_in(store: Store) -> set[str]:
    """What writers committed of a store's content."""
    return {part.segment for segment in store.segments for part in segment.parts}


def check_names(store: Store, acknowledged: Iterable[str]) -> None:
    """All that was acknowledged before a store was opened is in it."""
    if lost := set(acknowledged) - names_in(store):
        raise AssertionError(f"lost: {', '.join(sorted(lost))}")


def check_rows(store: Store, content: Content, acknowledged: Iterable[str], picked: Sequence[int]) -> None:
    """Whole segments, each once, with all that was acknowledged; and picked events read as they were written.

    Args:
        store: open.
        content: what writers may have written.
        acknowledged: segments that must be there.
        picked: numbers of events; those that the store has not are left out.
    """
    ids = store.events["event_id"].to_pylist()
    there = {name for name, events in content.event_ids.items() if set(events) & set(ids)}
    if sorted(ids) != sorted(event for name in there for event in content.event_ids[name]):
        raise AssertionError(f"events twice, or half of a segment: {ids}")
    if lost := set(acknowledged) - there:
        raise AssertionError(f"lost: {', '.join(sorted(lost))}")
    if sorted(store.excluded["prompt_id"].to_pylist()) != sorted(p for name in there for p in content.excluded[name]):
        raise AssertionError("excluded prompts twice, or lost")
    picked = [number for number in picked if number < len(ids)]
    rows, offsets = store.states("pt", 1, picked)
    final, (tokens, _) = store.final("pt", picked), store.token_ids(picked)
    for i, number in enumerate(picked):
        start, stop = offsets[i : i + 2].tolist()
        found = bytes_of(rows[start:stop]), bytes_of(final[i]), tokens[start:stop].tolist()
        if found != content.events[ids[number]]:
            raise AssertionError(f"event {ids[number]} has other rows or tokens")


def check_batch(feed: RowFeed, batch: RowBatch, content: Content, seen: dict[int, bytes]) -> None:
    """Each row of a feed once, and that of its place.

    Args:
        feed: of one epoch.
        batch: the next one.
        content: what writers may have written.
        seen: rows so far, by number; those of the batch are added.
    """
    segments, sequences, positions = (np.asarray(one) for one in feed.locate(batch.rows)[:3])
    for i, number in enumerate(batch.rows.tolist()):
        if number in seen:
            raise AssertionError(f"row {number} twice")
        seen[number] = bytes_of(batch.states[i])
        sequence = int(sequences[i])
        for part in feed.chosen.store.segments[int(segments[i])].parts:
            if sequence < part.counts.n_sequences:
                break
            sequence -= part.counts.n_sequences
        data = content.segments[part.segment]
        expected = data.states["pt", 1][int(data.sequence_offsets[sequence]) + int(positions[i])]
        if seen[number] != bytes_of(expected):
            raise AssertionError(f"row {number} is another row")


def check_whole(store: Store, content: Content, acknowledged: Iterable[str]) -> None:
    """All that was acknowledged is there and nothing twice, in the records and files that one writer makes where
    nothing goes wrong, byte for byte."""
    names = [part.segment for segment in store.segments for part in segment.parts]
    if len(set(names)) < len(names):
        raise AssertionError(f"twice: {', '.join(names)}")
    check_names(store, acknowledged)
    for segment in store.segments:
        record, files = content.alone(tuple(part.segment for part in segment.parts))
        if _same_of(record) != _same_of(segment.record):
            raise AssertionError(f"the record of segment {segment.name} is not that of one writer")
        if files_of(store.storage, segment.folder) != files:
            raise AssertionError(f"the files of segment {segment.name} are not those of one writer")


def check_verified(storage: Storage) -> None:
    """``verify`` finds nothing."""
    if problems := verify(storage):
        raise AssertionError(f"verify: {problems[0]}")


def _same_of(record: dict[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in record.items() if field not in _DIFFERS}
