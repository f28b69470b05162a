"""Which rows of a store, and where they lie: numbers through all segments, and back to sequence, position and token.

A *row* here is one stored position with the states of all checkpoints and boundaries there; rows are numbered from 0
through the segments in their order. Knows stores; reads no states.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from actcache.errors import InputError
from actcache.store import Segment, Store, corpus, layout, open_store
from actcache.store.selection import Events

Ints = npt.NDArray[np.int64]

_CHUNK_BYTES = 256 * 1024  # of one array, before compression: FORMAT.md


class RowPlaces(NamedTuple):
    """Where rows come from, each ``[n]`` int64: the number of the segment, the sequence in it, position and token."""

    segment: Ints
    sequence: Ints
    position: Ints
    token_id: Ints


Positions = str | Sequence[int] | Callable[[RowPlaces], npt.NDArray[np.bool_]]


class StoreRows:
    """The chosen rows of the segments that a store has now; segments committed later are not part of it.

    It may be pickled or forked: each process opens the store for itself, as it was when the rows were chosen.

    Attributes:
        storage: where the store lies.
        segments: names of the segments.
        firsts: ``[segments + 1]`` int64, the number of each segment's first row.
        chosen: the numbers of the chosen rows, in order; None for all.
        chunk_rows: rows of one stored chunk.
        n_rows: N, the rows chosen.
    """

    def __init__(self, store: Store | str | Path, positions: Positions, events: Events = None) -> None:
        """Choose rows.

        Args:
            store: an open store or its path.
            positions: ``all`` rows; ``train`` and ``held_out``, those of the nine texts in ten that are to train on,
                and of the others (see :func:`actcache.store.corpus.held_out`); ``event``, the rows at an event's
                position, each once however many events share it; the positions wanted in every sequence, negative ones
                from its end; or a function of :class:`RowPlaces` (called once per segment, here) that says with a
                boolean each which rows it wants. Of a corpus, rows of special tokens are never chosen.
            events: whose rows to choose from, those of their positions 0..p, see :class:`Store`; None for all rows.

        Raises:
            InputError: no store, positions that are none of these, or nothing chosen.
            CorruptStoreError: stored offsets, events or token ids are not those committed.
        """
        self._store = store if isinstance(store, Store) else open_store(store)
        self._pid = os.getpid()
        self.storage = self._store.storage
        self.segments = tuple(segment.name for segment in self._store.segments)
        self.firsts = np.cumsum([0, *(segment.n_rows for segment in self._store.segments)], dtype=np.int64)
        self.chunk_rows = max(1, _CHUNK_BYTES // (self._store.width * self._store.dtype.itemsize))
        self.chosen = self._choose(positions, events)
        self.n_rows = int(self.firsts[-1]) if self.chosen is None else len(self.chosen)
        if not self.n_rows:
            raise InputError(
                f"no row of {self.storage} is chosen; it has {self.firsts[-1]}, positions are {positions!r}"
            )

    @property
    def is_local(self) -> bool:
        """Whether the store lies on a file system."""
        return not self.storage.is_far

    @property
    def store(self) -> Store:
        """The store as it was when rows were chosen, opened by this process."""
        if self._pid != os.getpid():
            self._store, self._pid = copy.copy(self._store), os.getpid()
        return self._store

    def locate(self, rows: torch.Tensor | npt.ArrayLike) -> RowPlaces:
        """Segment, sequence, position and token of rows, in the order given (InputError: the store has no such row)."""
        given = np.asarray(rows, np.int64).reshape(-1)
        wrong = given[(given < 0) | (given >= self.firsts[-1])]
        if len(wrong):
            raise InputError(f"row {wrong[0]} is not in the store; it has {self.firsts[-1]}, counted from 0")
        owner = np.searchsorted(self.firsts, given, side="right") - 1
        places = RowPlaces(owner, *(np.empty_like(given) for _ in range(3)))
        for number in np.unique(owner).tolist():
            here = owner == number
            found = self.store.reading(partial(_places, self.store.segments[number], given[here] - self.firsts[number]))
            for column, values in zip(places[1:], found, strict=True):
                column[here] = values
        return places

    def cut(self, block_rows: int) -> Ints:
        """The chosen rows cut into blocks, each of those among ``block_rows`` stored ones that lie side by side.

        Returns:
            ``[n_blocks + 1]``, where each block begins among the chosen rows, and their number.
        """
        if self.chosen is None:
            spans = itertools.pairwise(self.firsts.tolist())
            return np.concatenate([*(np.arange(*span, block_rows) for span in spans), self.firsts[-1:]])
        owner = np.searchsorted(self.firsts, self.chosen, side="right") - 1
        block = (self.chosen - self.firsts[owner]) // block_rows
        starts = np.flatnonzero((np.diff(owner, prepend=-1) != 0) | (np.diff(block, prepend=-1) != 0))
        return np.append(starts, len(self.chosen))

    def digest(self) -> str:
        """SHA-256 of which rows these are."""
        digest = hashlib.sha256(repr((self.segments, self.firsts.tolist())).encode())
        digest.update(b"" if self.chosen is None else self.chosen.tobytes())
        return digest.hexdigest()

    @property
    def segment_parts(self) -> dict[str, int]:
        """The segments in order, and of how many parts, each as a writer committed it, each is."""
        return {segment.name: len(segment.parts) for segment in self.store.segments}

    def laid_out(self, segments: Mapping[str, int]) -> StoreRows:
        """The same rows as those of a store whose :attr:`segment_parts` were these, before a compaction."""
        parts = [part.counts for segment in self.store.segments for part in segment.parts]
        counts = [layout.n_rows(self.store.fingerprint, part.n_tokens, part.n_events) for part in parts]
        if sum(segments.values()) != len(parts):
            return self
        found = copy.copy(self)
        found.segments = tuple(segments)
        found.firsts = np.cumsum([0, *counts], dtype=np.int64)[np.cumsum([0, *segments.values()])]
        return found

    def _choose(self, positions: Positions, events: Events) -> Ints | None:
        if isinstance(positions, str) and positions not in ("all", "event", *corpus.SPLITS):
            raise InputError(
                f"positions is {positions!r}, expected 'all', 'train', 'held_out', 'event', a list of positions or a "
                "function"
            )
        every = isinstance(positions, str) and positions == "all" and events is None
        if every and self._store.fingerprint.dropped is None:
            return None
        numbers = None if events is None else np.unique(self._store.numbers(events))
        chosen = [np.empty(0, np.int64)]
        for number, segment in enumerate(self._store.segments):
            own = None
            if numbers is not None:
                start, stop = np.searchsorted(numbers, [segment.events.start, segment.events.stop])
                own = numbers[start:stop] - segment.events.start
            if own is None or len(own):
                wanted = partial(_wanted, positions, number, segment, own)
                chosen.append(self.store.reading(wanted) + self.firsts[number])
        return np.concatenate(chosen)


def records_digest(store: Store) -> str:
    """SHA-256 of the records of what writers committed: what proves that the rows themselves are the same."""
    parts = (part for segment in store.segments for part in segment.parts)
    return hashlib.sha256(repr([part.record for part in parts]).encode()).hexdigest()


def _wanted(positions: Any, number: int, segment: Segment, events: Ints | None) -> Ints:
    """The rows of a segment that are chosen, by positions and by events of its own."""
    if isinstance(positions, str) and positions == "event":
        return np.flatnonzero(_of_events(segment, events, at_p=True))
    if not isinstance(positions, str):
        rows = _at_positions(positions, number, segment)
    elif positions in corpus.SPLITS:
        rows = np.flatnonzero(_of_split(segment, positions))
    else:
        rows = np.arange(segment.n_rows)
    counting = corpus.rows_that_count(segment)
    rows = rows if counting is None else rows[counting[rows]]
    return rows if events is None else rows[_of_events(segment, events, at_p=False)[rows]]


def _of_split(segment: Segment, split: str) -> npt.NDArray[np.bool_]:
    """Which rows of a segment are of texts of a split: ``[n_rows]``."""
    of_tokens = corpus.rows_of_split(segment, split)
    return of_tokens[segment.event_rows[:, 1] - 1] if _one_an_event(segment) else of_tokens


def _of_events(segment: Segment, events: Ints | None, *, at_p: bool) -> npt.NDArray[np.bool_]:
    """Which rows of a segment are those of some events, or of all: ``[n_rows]``."""
    found = np.zeros(segment.n_rows, bool)
    if _one_an_event(segment):
        found[slice(None) if events is None else events] = True
        return found
    starts, stops = segment.event_rows[slice(None) if events is None else events].T
    if at_p:
        found[stops - 1] = True
        return found
    edges = np.zeros(segment.n_rows + 1, np.int64)
    np.add.at(edges, starts, 1)
    np.add.at(edges, stops, -1)
    return np.cumsum(edges[:-1]) > 0


def _at_positions(positions: Any, number: int, segment: Segment) -> Ints:
    """The rows of a segment that a list of positions, or a function, chooses."""
    n = segment.n_rows
    sequence, position, token_ids = _places(segment, np.arange(n))
    if callable(positions):
        wanted = np.asarray(positions(RowPlaces(np.full(n, number), sequence, position, token_ids)))
        if wanted.shape != (n,) or wanted.dtype != bool:
            raise InputError(f"positions(...) gave {wanted.dtype} {wanted.shape}, expected bool {(n,)}")
        return np.flatnonzero(wanted)
    listed = np.asarray(positions).reshape(-1)
    if len(listed) and listed.dtype.kind not in "iu":  # a mask or fractions would become other positions than meant
        raise InputError(f"positions are {listed.dtype}, expected integers")
    from_end = position - np.diff(segment.row_offsets)[sequence]
    return np.flatnonzero(np.isin(position, listed) | np.isin(from_end, listed))


def _places(segment: Segment, local: Ints) -> tuple[Ints, Ints, Ints]:
    """Sequence, position and token of rows of one segment, counted within it."""
    token = segment.event_rows[local, 1] - 1 if _one_an_event(segment) else local
    sequence = np.searchsorted(segment.row_offsets, token, side="right") - 1
    first, stop = (int(token.min()), int(token.max()) + 1) if len(token) else (0, 0)
    token_ids = segment.read("token_ids", first, stop)[token - first].astype(np.int64)
    return sequence, token - segment.row_offsets[sequence], token_ids


def _one_an_event(segment: Segment) -> bool:
    return not segment.fingerprint.has_prefix_rows
