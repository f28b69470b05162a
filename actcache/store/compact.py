"""Compact: merge small neighbouring segments into larger ones while readers go on reading, and write the roll-up anew.

A merged segment's commit record names those that it replaces; from that moment they no longer count, and their records
and files are deleted. A reader that has them open finds the same events, under the same numbers, in the merged one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from actcache.carried import MAX_KEYS as MAX_CARRIED_KEYS
from actcache.fingerprint import Fingerprint
from actcache.progress import OnProgress, Tally, untold
from actcache.store import layout
from actcache.store.reader import open_store
from actcache.store.records import read_records, without_replaced
from actcache.store.rollup import write_rollup
from actcache.store.segment import Segment
from actcache.store.segment_data import SegmentData
from actcache.store.storage import Place, Storage
from actcache.store.writer import StoreWriter

_LOCK = f"{layout.COMMITS}/.compaction"


def compact(place: Place, max_bytes: int = 2**30, on_progress: OnProgress = untold) -> tuple[int, int]:
    """Merge runs of neighbouring segments whose states together take at most ``max_bytes`` before compression.

    Events, rows and their order stay as they are, bit for bit. Needs memory for one merged segment. Every byte that is
    merged is checked as it is read; so is every record that goes into the roll-up, which is written anew in the end.
    Run by one process at a time; what an interrupted one leaves, the next one clears.

    Args:
        place: as in ``open_store``.
        max_bytes: of a merged segment.
        on_progress: told of segments, those that are merged and those that stay as they are.

    Returns:
        how many segments there were, and how many there are.

    Raises:
        InputError: another compaction is under way, or died; says what to do.
        CorruptStoreError: a segment is damaged; it and what is not merged yet stay as they are.
    """
    store = open_store(place)
    storage, fingerprint = store.storage, store.fingerprint
    with storage.exclusively(_LOCK):
        writer = StoreWriter(storage, fingerprint)
        n_before = len(store.segments)
        _clear_replaced(storage, fingerprint)
        groups = list(_groups(store.segments, max_bytes))
        tally = Tally(n_before, "segments", on_progress)
        tally.add(found=n_before - sum(map(len, groups)))
        for group in groups:
            replaces = sorted(name for segment in group for name in segment.covers)
            parts = [part for segment in group for part in segment.parts]
            merged = merge([read_segment(segment) for segment in group])
            writer.append(_free_name(replaces, writer.committed), merged, replaces=replaces, parts=parts)
            _clear(storage, [one.record for segment in group for one in (*segment.additions, segment)])
            tally.add(len(group))
        n_after = _clear_replaced(storage, fingerprint)
        write_rollup(storage, fingerprint)
        return n_before, n_after


def read_segment(segment: Segment) -> SegmentData:
    """All of a committed segment, as it was appended, with what was added to it since."""
    fingerprint = segment.fingerprint
    dtype = layout.STATE_DTYPES[fingerprint.dtype]
    labels = fingerprint.checkpoints

    def rows(array: str) -> torch.Tensor:
        return layout.to_torch(segment.read(array), dtype)

    sites = {
        (site, label, block): rows(layout.row_path(site, label, block))
        for site, blocks in segment.sites.items()
        for label in labels
        for block in blocks
    }
    return SegmentData(
        token_ids=segment.read("token_ids"),
        sequence_offsets=segment.row_offsets,
        states={
            (label, block): sites.pop((site, label, block)) for site, label, block in [*sites] if site == layout.STATE
        },
        final={label: rows(layout.final_path(label)) for label in labels},
        events=layout.with_pair(segment.read_table("events"), fingerprint),
        excluded=segment.read_table("excluded"),
        sequences=segment.read_table("sequences"),
        sites=sites,
    )


def merge(parts: Sequence[SegmentData]) -> SegmentData:
    """Several segments as one, their events in the same order."""
    n_sequences = np.cumsum([0, *(part.n_sequences for part in parts)])
    n_tokens = np.cumsum([0, *(len(part.token_ids) for part in parts)])
    offsets: list[npt.NDArray[np.int64]] = [np.zeros(1, np.int64)]
    offsets += [part.sequence_offsets[1:] + start for part, start in zip(parts, n_tokens[:-1], strict=True)]
    events = []
    for part, start in zip(parts, n_sequences[:-1].tolist(), strict=True):
        column = part.events.column_names.index("sequence")
        moved = pa.array(part.events["sequence"].to_numpy() + start, pa.int64())
        events.append(part.events.set_column(column, "sequence", moved))
    return SegmentData(
        token_ids=np.concatenate([part.token_ids for part in parts]),
        sequence_offsets=np.concatenate(offsets),
        states={key: torch.cat([part.states[key] for part in parts]) for key in parts[0].states},
        final={key: torch.cat([part.final[key] for part in parts]) for key in parts[0].final},
        events=pa.concat_tables(events),
        excluded=pa.concat_tables([part.excluded for part in parts]),
        sequences=pa.concat_tables([part.sequences for part in parts]),
        sites={key: torch.cat([part.sites[key] for part in parts]) for key in parts[0].sites},
    )


def _groups(segments: Sequence[Segment], max_bytes: int) -> Iterator[list[Segment]]:
    """Neighbours worth merging: two or more, of the same columns, within the limits."""
    group: list[Segment] = []
    n_bytes = 0
    keys: frozenset[str] = frozenset()
    for segment in segments:
        size = sum(int(one.record["raw_state_bytes"]) for one in (segment, *segment.additions))
        if group and (
            n_bytes + size > max_bytes
            or segment.record["schema"] != group[0].record["schema"]
            or segment.sites != group[0].sites
            or len(keys | segment.carried_keys) > MAX_CARRIED_KEYS
        ):
            if len(group) > 1:
                yield group
            group, n_bytes, keys = [], 0, frozenset()
        group.append(segment)
        n_bytes += size
        keys |= segment.carried_keys
    if len(group) > 1:
        yield group


def _free_name(replaces: Sequence[str], taken: set[str]) -> str:
    """A name for what replaces these: from the first to the last, and a number where an earlier merge is called so."""
    stem = f"{replaces[0]}--{replaces[-1]}"[: layout.MAX_NAME - 8]
    return next(name for name in (stem, *(f"{stem}-{n}" for n in range(2, len(taken) + 3))) if name not in taken)


def _clear_replaced(storage: Storage, fingerprint: Fingerprint) -> int:
    """Clear replaced segments and their additions; how many segments count."""
    records = read_records(storage, fingerprint.digest)
    segments = without_replaced(records)
    live = {record["segment"] for record in segments}
    replaced = {name for record in segments for name in record["replaces"]}
    # An addition to a segment that was set aside counts again once that is captured again.
    goes = [
        record
        for record in records
        if (record["extends"]["segment"] in replaced if layout.is_addition(record) else record["segment"] not in live)
    ]
    _clear(storage, goes)
    return len(segments)


def _clear(storage: Storage, records: Iterable[dict[str, Any]]) -> None:
    """Delete what these records list, then the records: all else stays.

    Records last: an interrupted compaction leaves those that say what is still to delete. No reader minds, as the
    record of what replaces them is there all the time.
    """
    for record in records:
        storage.remove_files(f"{layout.SEGMENTS}/{record['folder']}", record["files"])
        storage.remove(layout.commit_key(record["segment"]))
