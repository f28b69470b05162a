"""Reading: committed segments only, every byte checked before it is believed.

Opening reads the root and the commit records, which carry checksums. A record vouches for the metadata of each array,
and that for each chunk: so a read trusts nothing but the chunks it decodes, and checks just those.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from html import escape
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from actcache.canonical import digest_of
from actcache.carried import as_columns
from actcache.counts import check_whole
from actcache.errors import CorruptStoreError, IncompatibleError, InputError
from actcache.fingerprint import Fingerprint
from actcache.schema import PAIR
from actcache.store import layout, shard
from actcache.store.commit_record import CommitRecord
from actcache.store.records import (
    additions_to,
    check_schemas,
    merge_prompts,
    read_fingerprint,
    read_records,
    without_replaced,
)
from actcache.store.segment import Segment, Segments
from actcache.store.selection import Events, numbers_of
from actcache.store.storage import Place, Storage, open_storage

T = TypeVar("T")


def open_store(place: Place) -> Store:
    """Open a store for reading; needs neither models nor prompts.

    Args:
        place: a local folder, the URL of one on an object store (``s3://bucket/prefix``), or an obstore store.

    Raises:
        InputError: there is no store at ``place``, or obstore, which a URL needs, is not installed.
        CorruptStoreError: the root or a commit record is damaged.
        FormatVersionError: written by a newer version.
    """
    return Store(open_storage(place))


class Store:
    """The committed segments of a store, as one sequence of events, as they were when it was opened.

    Events are numbered 0..E-1 through all segments, in segment-name order. It is a snapshot: segments, events, their
    numbers and rows stay the same for as long as it lives, whatever writers, compactions and repairs do meanwhile.
    Newer segments are not part of it. Where a compaction has put rows into another segment, they are read there, and
    the commit records prove that they are the same. It may be pickled: each process then has the same snapshot.

    Whatever takes ``events`` takes any of these, or None for all:

    - a slice, or numbers in any order, repeats too; negative numbers are refused.
    - ids, as the column ``event_id`` has them.
    - a mask: one truth value per event, as a list, or an array of NumPy, torch, pyarrow or pandas.
    - an expression over the columns of :attr:`events`, as ``pyarrow.compute.field("step") > 3``, which chooses the
      events for which it is true. One that is null is not.

    Every read raises:
        IncompatibleError: another store lies at its place now.
        InputError: a segment is gone, has been captured again, or was merged by an earlier version: open it again.
    """

    def __init__(self, storage: Storage) -> None:
        fingerprint = read_fingerprint(storage)
        self._hold(storage, fingerprint, _records(storage, fingerprint))

    def _hold(self, storage: Storage, fingerprint: Fingerprint, records: Sequence[CommitRecord]) -> None:
        self.storage, self.fingerprint = storage, fingerprint
        self.segments = _segments(storage, fingerprint, records)
        self._tables: dict[str, pa.Table] = {}
        self._lock = threading.Lock()
        self._n_moves = 0

    def __getstate__(self) -> tuple[Storage, Fingerprint, list[CommitRecord]]:
        records = [one.record for segment in self.segments for one in (segment, *segment.additions)]
        return self.storage, self.fingerprint, records

    def __setstate__(self, state: tuple[Storage, Fingerprint, list[CommitRecord]]) -> None:
        self._hold(*state)

    @property
    def path(self) -> str:
        """Where it lies: a folder, or a URL."""
        return str(self.storage)

    def __len__(self) -> int:
        """E, the number of events."""
        return self.segments[-1].events.stop if self.segments else 0

    @property
    def checkpoints(self) -> list[str]:
        """Labels of the checkpoints, in lineup order."""
        return self.fingerprint.labels

    @property
    def boundaries(self) -> list[int]:
        """Boundaries whose states are stored, those first that the store was created with."""
        return list(self._sites.get(layout.STATE, ()))

    @property
    def main_boundary(self) -> int:
        """The boundary that a study leads with: the first that was listed at capture. Where all were captured, it is
        the one at 0.6 L."""
        boundaries, n_blocks = self.boundaries, self.fingerprint.n_blocks
        is_all = boundaries == list(range(1, n_blocks)) if n_blocks else False
        return round(0.6 * n_blocks) if is_all else boundaries[0]

    @property
    def sites(self) -> layout.Sites:
        """The blocks whose rows all segments have, by site; see :meth:`states`."""
        return {site: list(blocks) for site, blocks in self._sites.items()}

    @cached_property
    def _sites(self) -> layout.Sites:
        if not self.segments:
            return {layout.STATE: list(self.fingerprint.boundaries)}
        first, *others = (segment.sites for segment in self.segments)
        common = {
            site: [block for block in blocks if all(block in other.get(site, ()) for other in others)]
            for site, blocks in first.items()
        }
        return {site: blocks for site, blocks in common.items() if blocks or site == layout.STATE}

    @property
    def n_prompts(self) -> int:
        """How many prompts were asked for, by the capture that asked for the most; 0 where none has told."""
        known = merge_prompts([segment.record for segment in self.segments])["n"]
        return max(known, self.fingerprint.n_prompts or 0)

    @property
    def dtype(self) -> torch.dtype:
        """Of states and final states."""
        return layout.STATE_DTYPES[self.fingerprint.dtype]

    @property
    def width(self) -> int:
        """D."""
        return self.fingerprint.width

    def __repr__(self) -> str:
        labels, boundaries = ", ".join(self.checkpoints), ", ".join(map(str, self.boundaries))
        return (
            f"<Store {self.path}: {len(self)} events, states of {labels} at {boundaries}, "
            f"{self.fingerprint.dtype}, width {self.width}>"
        )

    def _repr_html_(self) -> str:
        return as_html(
            {
                "store": self.path,
                "checkpoints": ", ".join(self.checkpoints),
                **{f"{site} of blocks": ", ".join(map(str, blocks)) for site, blocks in self.sites.items()},
                "rows": f"{self.fingerprint.dtype}, width {self.width}",
                "events": f"{len(self):,}",
                "prompts without one": f"{self.n_without_event:,}",
            }
        )

    @property
    def uncommitted(self) -> list[str]:
        """Paths, from the store, that no commit record names *now*: being written, or left by a writer that died.

        Nothing reads them. The next writer of that segment clears them; a person may delete them once no writer runs.
        """
        drafts = self.storage.describe_drafts()
        folders = [name for name in self.storage.names(layout.SEGMENTS) if name != layout.ROOT]
        # Listed last: a segment committed meanwhile is one.
        records = _records(self.storage, self.fingerprint)
        segments = without_replaced(records)
        added = additions_to(segments, records).values()
        live = {record["folder"] for record in (*segments, *itertools.chain.from_iterable(added))}
        return sorted([*(f"{layout.SEGMENTS}/{name}" for name in folders if name not in live), *drafts])

    @property
    def prompts(self) -> dict[str, str]:
        """A digest of the prompts of each segment that a capture has committed, where it has told."""
        return dict(merge_prompts([segment.record for segment in self.segments])["of"])

    def check_prompts(self) -> None:
        """Raise IncompatibleError unless all segments are of one prompts file, as far as they tell.

        Only of a store that is complete: captures of two files may have committed to it at once.
        """
        found = merge_prompts([segment.record for segment in self.segments])
        complete = found["of"].keys() == {part.segment for segment in self.segments for part in segment.parts}
        if complete and found["all"] and digest_of(found["of"]) not in found["all"]:
            raise IncompatibleError(
                f"{self.path} holds segments of two prompts files, captured at once; capture again into another folder",
                field="prompts",
            )

    @property
    def events(self) -> pa.Table:
        """One row per event, as captured, with the prompts' carried keys as columns and the segment's name.

        A carried key becomes a column of its natural type, null where a prompt lacks it; values of mixed types, and
        nested ones, become their JSON text. More than 1000 keys in all stay together in a column ``carried``, as JSON.
        """
        return self._kept_table("events")

    @property
    def excluded(self) -> pa.Table:
        """One row per prompt without an event, or with one less than it might have: prompt_id, reason, carried keys,
        segment; and the pair, where events are of several."""
        return self._kept_table("excluded")

    @property
    def n_without_event(self) -> int:
        """How many prompts have no event at all."""
        return len({*self.excluded["prompt_id"].to_pylist()} - {*self.events["prompt_id"].to_pylist()})

    @property
    def sequences(self) -> pa.Table:
        """One row per sequence, those without events too: prompt_id, carried keys, segment.

        An event's ``sequence`` counts within its segment.
        """
        return self._kept_table("sequences")

    def numbers(self, events: Events = None) -> npt.NDArray[np.int64]:
        """The numbers of the events asked for, ``[n]`` int64 (see :class:`Store`).

        Raises:
            InputError: no event has such a number or id, a mask has another length than E, or an expression names a
                column that is none.
        """
        return numbers_of(events, len(self), lambda: self.events)

    def states(
        self,
        label: str,
        boundary: int,
        events: Events = None,
        *,
        site: str = layout.STATE,
        positions: Literal["all", "event"] = "all",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States at a boundary, or rows of another site, in the order asked; repeats are allowed.

        Args:
            label: of the checkpoint.
            boundary: one of :attr:`boundaries`; of other sites, the index of the block.
            events: see :class:`Store`.
            site: ``state``; ``attention`` or ``mlp`` for what that part of the block gives, before it is added.
            positions: ``all`` stored ones up to p, or ``event``, the one row at p.

        Returns:
            rows ``[N, D]`` in :attr:`dtype` and offsets ``[n + 1]`` int64: event i of those asked has rows
            ``offsets[i]:offsets[i + 1]``, positions 0..p of its sequence, or the one row at p where that is asked or
            the store was captured with ``divergence`` rows. Bit for bit what was captured.

        Raises:
            InputError: unknown label, site, boundary or event; the message lists what there is.
            CorruptStoreError: stored bytes are not those committed.
        """
        if positions not in ("all", "event"):
            raise InputError(f"positions is {positions!r}, expected 'all' or 'event'")
        self._check_label(label)
        self._check_block(site, boundary)
        rows, offsets = self._rows(layout.row_path(site, label, boundary), events, at_p=positions == "event")
        return layout.to_torch(rows, self.dtype), offsets

    def sequence_states(
        self, label: str, boundary: int, events: Events = None, *, site: str = layout.STATE
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As :meth:`states`, but what events share is read once: the rows of each distinct sequence of theirs.

        Returns:
            rows ``[N, D]`` in :attr:`dtype` and offsets ``[s + 1]`` int64: sequence j, in the order of the first event
            asked of it, has rows ``offsets[j]:offsets[j + 1]``, up to the last position asked. And positions ``[n, 2]``
            int64: the sequence and the position in it of each event asked, as :meth:`actcache.LateStack.run` takes
            them.

        Raises:
            InputError: as :meth:`states`; or the store was captured with ``divergence`` rows, and has no sequences.
            CorruptStoreError: stored bytes are not those committed.
        """
        if not self.fingerprint.has_prefix_rows:
            raise InputError(f"{self.path} has the rows of events alone, not of sequences: read them by states()")
        indices = self.numbers(events)
        furthest, positions = self.reading(lambda: self._by_sequence(indices))
        return *self.states(label, boundary, indices[furthest], site=site), torch.from_numpy(positions)

    def final(self, label: str, events: Events = None) -> torch.Tensor:
        """Last block's output, before the final norm, at each event's position: ``[n, D]`` (errors as states)."""
        self._check_label(label)
        return layout.to_torch(self._rows(layout.final_path(label), events)[0], self.dtype)

    def token_ids(self, events: Events = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids of positions 0..p of each event, ``[T]`` int64, and offsets ``[n + 1]`` (errors as states)."""
        ids, offsets = self._rows("token_ids", events)
        return torch.from_numpy(ids.astype(np.int64)), offsets

    def summary(self) -> dict[str, Any]:
        """What the store holds, as plain values."""
        records = [one.record for segment in self.segments for one in (segment, *segment.additions)]
        raw = sum(record["raw_state_bytes"] for record in records)
        stored = sum(record["stored_state_bytes"] for record in records)
        captured = self.fingerprint
        of_corpus = {name: getattr(captured, name) for name in ("context", "dropped", "held_out")}
        return {
            "path": self.path,
            "format_version": max((r["format_version"] for r in records), default=layout.FORMAT_VERSION),
            "checkpoints": {label: self.fingerprint.checkpoints[label].to_json() for label in self.checkpoints},
            "dtype": self.fingerprint.dtype,
            "width": self.width,
            "boundaries": self.boundaries,
            "sites": {site: blocks for site, blocks in self.sites.items() if site != layout.STATE},
            "row_selection": self.fingerprint.row_selection,
            "codec": layout.codec_of("states/", self.fingerprint).name,
            "segments": len(self.segments),
            "vocabulary": self.fingerprint.vocabulary,
            "events": _counts(self.events["kind"]) | {"total": len(self)},
            "excluded_prompts": _counts(self.excluded["reason"]) | {"total": self.excluded.num_rows},
            "sequences": sum(segment.n_sequences for segment in self.segments),
            "rows": sum(s.n_rows * sum(map(len, s.sites.values())) for s in self.segments) * len(self.checkpoints),
            "state_bytes": {"raw": raw, "stored": stored, "ratio": round(raw / stored, 3) if raw else None},
            "stored_bytes": sum(record["stored_bytes"] for record in records),
            **({} if captured.dropped is None else {"corpus": of_corpus}),
            "uncommitted": self.uncommitted,
            "fingerprint": self.fingerprint.digest,
        }

    # ---- rows of events ----

    def _check_label(self, label: str) -> None:
        if label not in self.fingerprint.checkpoints:
            raise InputError(f"checkpoint {label!r} is not in the store; it has {', '.join(self.checkpoints)}")

    def _check_block(self, site: str, block: int) -> None:
        stored, what = self._sites, layout.block_of(layout.check_site(site))
        check_whole(block, what)
        if block in stored.get(site, ()):
            return
        n = sum(block in segment.sites.get(site, ()) for segment in self.segments)
        some = f" in {n} of {len(self.segments)} segments only: give the command again that adds it" if n else ""
        ordered = sorted(stored.items(), key=lambda item: item[0] != layout.STATE)
        has = []
        for name, blocks in ordered:
            words = layout.block_of(name)
            if len(blocks) > 1:
                words = "boundaries" if name == layout.STATE else f"{words}s"
            has += [f"{words} {', '.join(map(str, blocks))}"] if blocks else []
        said = "; ".join(has) if len(has) > 1 else ", ".join(map(str, self.boundaries))
        raise InputError(f"{what} {block} is {'' if n else 'not '}in the store{some}; it has {said}")

    def _rows(self, array: str, events: Events, *, at_p: bool = False) -> tuple[npt.NDArray[Any], torch.Tensor]:
        """Rows of events, in the order asked, or the last of each; each chunk that they lie in is decoded once."""
        indices = self.numbers(events)
        return self.reading(lambda: self._rows_now(array, indices, at_p))

    def _rows_now(
        self, array: str, indices: npt.NDArray[np.int64], at_p: bool
    ) -> tuple[npt.NDArray[Any], torch.Tensor]:
        owned = list(self._by_segment(indices))
        spans = np.empty((len(indices), 2), np.int64)

        def look_up(segment: Segment, asked: npt.NDArray[np.int64]) -> None:
            spans[asked] = self._spans(array, segment, indices[asked] - segment.events.start)
            segment.home.open_array(array)

        shard.at_once(self.storage, [partial(look_up, *given) for given in owned])
        if at_p:
            spans[:, 0] = spans[:, 1] - 1
        offsets = np.zeros(len(indices) + 1, np.int64)
        np.cumsum(spans[:, 1] - spans[:, 0], out=offsets[1:])
        requests = [segment.request(array, spans[asked], offsets[:-1][asked]) for segment, asked in owned]
        row_shape: tuple[int, ...] = () if array == "token_ids" else (self.width,)
        dtype = "int32" if array == "token_ids" else layout.stored_dtype(self.fingerprint.dtype)
        return shard.read_spans(requests, int(offsets[-1]), row_shape, dtype), torch.from_numpy(offsets)

    def _by_sequence(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Which of the events asked goes furthest in each distinct sequence, ``[s]``, and of each event its sequence
        and the position in it, ``[n, 2]``; sequences are in the order of their first event."""
        place = np.empty((len(indices), 2), np.int64)  # the segment, and the sequence's first row in it
        position = np.empty(len(indices), np.int64)

        def look_up(segment: Segment, asked: npt.NDArray[np.int64]) -> None:
            first, stop = segment.event_rows[indices[asked] - segment.events.start].T
            place[asked, 0], place[asked, 1], position[asked] = segment.events.start, first, stop - first - 1

        shard.at_once(self.storage, [partial(look_up, *given) for given in self._by_segment(indices)])
        _, first_event, which = np.unique(place, axis=0, return_index=True, return_inverse=True)
        sequence = np.argsort(np.argsort(first_event))[which.reshape(-1)]
        order = np.lexsort((position, sequence))
        furthest = order[np.diff(sequence[order], append=-1) != 0]
        return furthest, np.stack([sequence, position], axis=1)

    def _spans(self, array: str, segment: Segment, events: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where an array has the rows of a segment's events, ``[n, 2]``: those of positions 0..p, or one per event."""
        axis = layout.dimension_names(array)[0]
        if axis == "event" or (axis == "row" and not self.fingerprint.has_prefix_rows):
            return np.stack([events, events + 1], axis=1)
        return segment.event_rows[events]

    def reading(self, read: Callable[[], T]) -> T:
        """The result of a read of the segments, which is made again where a compaction has moved what it reads."""
        while True:
            n_moves = self._n_moves
            try:
                return read()
            except CorruptStoreError:
                if not self._follow(n_moves):
                    raise

    def _follow(self, n_moves: int) -> bool:
        """Find where the segments lie now; whether any has moved since ``n_moves`` had been counted."""
        with self._lock:
            if self._n_moves > n_moves:  # another thread was here
                return True
            found = read_fingerprint(self.storage)
            if found != self.fingerprint:
                field, *_ = next(self.fingerprint.differences(found))
                raise IncompatibleError(
                    f"{self.storage} is not the store any more that was opened: its {field} is another; open it again",
                    field=field,
                )
            live = Segments(_segments(self.storage, self.fingerprint, _records(self.storage, self.fingerprint)))
            before = [segment.home for segment in self.segments]
            lost = [segment for segment in self.segments if not segment.settle(live)]
            if [segment.home for segment in self.segments] != before:
                self._n_moves += 1
                return True
        if lost:
            raise InputError(f"segment {lost[0].name} is not in {self.storage} any more as it was; open it again")
        return False

    def _by_segment(self, indices: npt.NDArray[np.int64]) -> Iterator[tuple[Segment, npt.NDArray[np.int64]]]:
        """Segments that own some of the events, each with where in ``indices`` they stand."""
        if not len(indices):
            return
        stops = np.array([segment.events.stop for segment in self.segments], np.int64)
        owner = np.searchsorted(stops, indices, side="right")
        order = np.argsort(owner, kind="stable")
        numbers, starts = np.unique(owner[order], return_index=True)
        for number, asked in zip(numbers, np.split(order, starts[1:]), strict=True):
            yield self.segments[number], asked

    def _kept_table(self, name: str) -> pa.Table:
        if name not in self._tables:
            self._tables[name] = self.reading(lambda: self._table(name))
        return self._tables[name]

    def _table(self, name: str) -> pa.Table:
        check_schemas([segment.record for segment in self.segments])
        columns = layout.TABLES[name]
        tables = [pa.table({column: layout.empty_column(kind) for column, kind in columns.items()})]
        tables += shard.at_once(self.storage, [partial(segment.read_table, name) for segment in self.segments])
        rows = zip(self.segments, tables[1:], strict=True)
        names = [segment.name for segment, table in rows for _ in range(table.num_rows)]
        if name == "events":
            tables = [layout.with_pair(table, self.fingerprint) for table in tables]
        texts = [text for table in tables for text in table["carried"].to_pylist()]
        tables = [table.drop_columns(["carried"]) for table in tables]
        whole = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
        whole = whole.append_column(layout.SEGMENT_COLUMN, pa.array(names, pa.string()))
        for key, column in as_columns(texts).items():
            if key == PAIR.name:  # prompts of an earlier version could carry one
                key = f"carried_{key}"
            if key in whole.column_names:
                raise CorruptStoreError(f"the {name} table has a column and a carried key {key!r}")
            whole = whole.append_column(key, column)
        return whole


def as_html(rows: Mapping[str, str]) -> str:
    """Names and values as a notebook shows them."""
    lines = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return f"<table>{''.join(lines)}</table>"


def _records(storage: Storage, fingerprint: Fingerprint) -> list[CommitRecord]:
    return read_records(storage, fingerprint.digest)


def _segments(storage: Storage, fingerprint: Fingerprint, records: Sequence[CommitRecord]) -> list[Segment]:
    """The segments that count of these records, with their additions, their events numbered through."""
    segments: list[Segment] = []
    live = without_replaced(records)
    added = additions_to(live, records)
    for record in live:
        start = segments[-1].events.stop if segments else 0
        events = range(start, start + record["n_events"])
        segments.append(Segment(storage, events, record, fingerprint, added.get(record["segment"], ())))
    return segments


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in column.value_counts().to_pylist()}
