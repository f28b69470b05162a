"""Reading: committed segments only, every byte checked before it is believed.

Opening reads the root and the commit records, which carry checksums. A record vouches for the metadata of each array,
and that for each chunk: so a read trusts nothing but the chunks it decodes, and checks just those.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from actcache.errors import CorruptStoreError, InputError
from actcache.store import layout, shard
from actcache.store.storage import Place, Storage, open_storage

Events = Sequence[int] | slice | None
T = TypeVar("T")

_LISTINGS = 8  # a compaction may remove records between two of them, but not without end


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


def read_fingerprint(storage: Storage) -> dict[str, Any]:
    """The fingerprint of a store (errors as :func:`open_store`)."""
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
    names = (name for name in listed if name.endswith(".json") and not name.startswith("."))
    return sorted(name.removesuffix(".json") for name in names)


def read_record(storage: Storage, name: str, digest: str) -> dict[str, Any]:
    """The commit record of a segment (errors as ``layout.decode_record``; FileNotFoundError where it is gone)."""
    return layout.decode_record(storage.read(layout.commit_key(name)), name, digest)


def without_replaced(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records that count, in the order of the store: those that no other one replaces.

    Raises:
        CorruptStoreError: two that count claim to replace the same segment, or segments replace each other.
    """
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


def check_schemas(records: Sequence[dict[str, Any]]) -> None:
    """Raise CorruptStoreError where a column is of two types in two segments, whose tables then do not join."""
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for record in records:
        for table in ("events", "excluded"):
            for column, kind in record["schema"][table].items():
                first, expected = seen.setdefault((table, column), (record["segment"], kind))
                if kind != expected:
                    raise CorruptStoreError(
                        f"column {column!r} of {table} is {kind} in segment {record['segment']!r} and {expected} in "
                        f"{first!r}{shard.ADVICE}"
                    )


@dataclass(frozen=True, eq=False)
class Segment:
    """One committed segment.

    Attributes:
        storage: that holds it.
        events: its events, as indices of the whole store.
        record: its commit record.
        fingerprint: the store's.
    """

    storage: Storage
    events: range
    record: dict[str, Any]
    fingerprint: dict[str, Any]
    _open: dict[str, shard.StoredArray] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The segment's name."""
        return str(self.record["segment"])

    @property
    def covers(self) -> set[str]:
        """Its name and those of the segments that it replaces."""
        return {self.name, *self.record["replaces"]}

    @property
    def folder(self) -> str:
        """Key of the folder that holds its arrays."""
        return f"{layout.SEGMENTS}/{self.record['folder']}"

    @property
    def n_events(self) -> int:
        """E of this segment."""
        return len(self.events)

    @property
    def n_rows(self) -> int:
        """N of this segment, for each checkpoint and boundary."""
        return layout.n_rows(self.fingerprint, self.record["n_tokens"], self.n_events)

    @property
    def n_sequences(self) -> int:
        """S of this segment."""
        return int(self.record["n_sequences"])

    @cached_property
    def arrays(self) -> dict[str, tuple[tuple[int | None, ...], str]]:
        """Path, shape and stored dtype of every array; None is a length that only the array itself knows."""
        return layout.expected_arrays(self.record, self.fingerprint)

    @cached_property
    def row_offsets(self) -> npt.NDArray[np.int64]:
        """``[S + 1]``, where each sequence begins."""
        offsets = self.read("sequence_offsets")
        with self._fitting("sequence_offsets"):
            layout.check_offsets(offsets, self.record["n_tokens"])
        return offsets

    @cached_property
    def event_rows(self) -> npt.NDArray[np.int64]:
        """``[E, 2]``, first row of each event's sequence and the row just after its position."""
        sequence, position = self.read("events/sequence"), self.read("events/position")
        with self._fitting("events"):
            layout.check_events(sequence, position, self.row_offsets)
        start = self.row_offsets[sequence]
        return np.stack([start, start + position + 1], axis=1)

    def read(self, array: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows ``start:stop`` of one of the segment's arrays, as stored (bfloat16 as uint16).

        Raises:
            InputError: the segment has no such array, or the array no such rows.
            CorruptStoreError: stored bytes are not those committed; names segment, array and chunk.
        """
        stored = self.open_array(array)
        return stored.read(start, stored.shape[0] if stop is None else stop)

    def read_table(self, name: str) -> pa.Table:
        """The ``events`` or ``excluded`` table (errors as :meth:`read`)."""
        columns: dict[str, pa.Array] = {}
        for column, kind in self.record["schema"][name].items():
            path = f"{name}/{column}"
            if kind == "string":
                data, offsets = self.read(f"{path}/bytes"), self.read(f"{path}/offsets")
                with self._fitting(path):
                    columns[column] = layout.decode_text(data, offsets)
            else:
                columns[column] = pa.array(self.read(path))
        table = pa.table(columns)
        with self._fitting(name):
            layout.check_carried(table, name)
        return table

    def open_array(self, array: str) -> shard.StoredArray:
        """One of the segment's arrays, its metadata checked against the commit record (errors as :meth:`read`)."""
        if array not in self._open:
            if array not in self.arrays:
                raise InputError(f"segment {self.name} has no array {array!r}; it has {', '.join(self.arrays)}")
            shape, dtype = self.arrays[array]
            where = f"segment {self.name}, array {array}"
            data_file, _ = self.record["files"].get(f"{array}/{shard.data_file(len(shape))}", (None, None))
            metadata = self._metadata(array, where)
            stored = shard.StoredArray(self.storage, f"{self.folder}/{array}", metadata, data_file, where)
            fits = len(stored.shape) == len(shape) and all(
                n in (None, m) for n, m in zip(shape, stored.shape, strict=True)
            )
            if not fits or stored.dtype != dtype or stored.codec is not layout.codec_of(array, self.fingerprint):
                raise CorruptStoreError(f"{where}: {stored.dtype} {stored.shape}, committed as {dtype} {shape}")
            self._open[array] = stored
        return self._open[array]

    @contextmanager
    def _fitting(self, what: str) -> Iterator[None]:
        """Content that was no one's mistake to give, as when it was written, but is damage when it is read."""
        try:
            yield
        except InputError as error:
            raise CorruptStoreError(f"segment {self.name}, {what}: {error}{shard.ADVICE}") from error

    def _metadata(self, array: str, where: str) -> bytes:
        file = f"{array}/{layout.ROOT}"
        if file not in self.record["files"]:
            raise CorruptStoreError(f"{where}: the commit record does not name its {layout.ROOT}")
        try:
            data = self.storage.read(f"{self.folder}/{file}")
        except FileNotFoundError as error:
            raise CorruptStoreError(f"{where}: its {layout.ROOT} is missing{shard.ADVICE}") from error
        if [len(data), shard.crc32c(data)] != self.record["files"][file]:
            raise CorruptStoreError(f"{where}: its {layout.ROOT} is not the one committed{shard.ADVICE}")
        return data


class Store:
    """The committed segments of a store, as one sequence of events.

    Events are numbered 0..E-1 through all segments, in segment-name order.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.fingerprint: dict[str, Any] = read_fingerprint(storage)
        self._digest = layout.fingerprint_digest(self.fingerprint)
        self.segments: list[Segment] = []
        for record in without_replaced(self._records()):
            start = self.segments[-1].events.stop if self.segments else 0
            events = range(start, start + record["n_events"])
            self.segments.append(Segment(storage, events, record, self.fingerprint))

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
        pair = self.fingerprint.get("pair", [])
        return [*pair, *sorted(set(self.fingerprint["checkpoints"]) - set(pair))]

    @property
    def boundaries(self) -> list[int]:
        """Boundaries whose states are stored."""
        return list(self.fingerprint["boundaries"])

    @property
    def dtype(self) -> torch.dtype:
        """Of states and final states."""
        return layout.STATE_DTYPES[self.fingerprint["dtype"]]

    @property
    def width(self) -> int:
        """D."""
        return int(self.fingerprint["width"])

    @property
    def uncommitted(self) -> list[str]:
        """Paths, from the store, that no commit record names *now*: being written, or left by a writer that died.

        Nothing reads them. The next writer of that segment clears them; a person may delete them once no writer runs.
        """
        drafts = self.storage.describe_drafts()
        folders = [name for name in self.storage.names(layout.SEGMENTS) if name != layout.ROOT]
        # Listed last: a segment committed meanwhile is one.
        live = {record["folder"] for record in without_replaced(self._records())}
        return sorted([*(f"{layout.SEGMENTS}/{name}" for name in folders if name not in live), *drafts])

    @cached_property
    def events(self) -> pa.Table:
        """One row an event, as captured, with the prompts' carried keys as columns and the segment's name.

        A carried key becomes a column of its natural type, null where a prompt lacks it; values of mixed types, and
        nested ones, become their JSON text.
        """
        return self._reading(lambda: self._table("events"))

    @cached_property
    def excluded(self) -> pa.Table:
        """One row a prompt without an event: prompt_id, reason, carried keys, segment."""
        return self._reading(lambda: self._table("excluded"))

    def states(self, label: str, boundary: int, events: Events = None) -> tuple[torch.Tensor, torch.Tensor]:
        """States at a boundary, in the order asked; repeats are allowed.

        Args:
            label: of the checkpoint.
            boundary: one of :attr:`boundaries`.
            events: indices (negative ones are refused), a slice, or None for all.

        Returns:
            rows ``[N, D]`` in :attr:`dtype` and offsets ``[n + 1]`` int64: event i of those asked has rows
            ``offsets[i]:offsets[i + 1]``, positions 0..p of its sequence, or the one row at p where the store was
            captured with ``divergence`` rows. Bit for bit what was captured.

        Raises:
            InputError: unknown label, boundary or event; the message lists what there is.
            CorruptStoreError: stored bytes are not those committed.
        """
        self._check_label(label)
        if boundary not in self.boundaries:
            raise InputError(f"boundary {boundary} is not in the store; it has {', '.join(map(str, self.boundaries))}")
        spans = _prefix_spans if self.fingerprint["row_selection"] == "prefix" else _event_spans
        rows, offsets = self._rows(layout.state_path(label, boundary), self._indices(events), spans)
        return layout.to_torch(rows, self.dtype), offsets

    def final(self, label: str, events: Events = None) -> torch.Tensor:
        """Last block's output, before the final norm, at each event's position: ``[n, D]`` (errors as states)."""
        self._check_label(label)
        rows, _ = self._rows(layout.final_path(label), self._indices(events), _event_spans)
        return layout.to_torch(rows, self.dtype)

    def token_ids(self, events: Events = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids of positions 0..p of each event, ``[T]`` int64, and offsets ``[n + 1]`` (errors as states)."""
        ids, offsets = self._rows("token_ids", self._indices(events), _prefix_spans)
        return torch.from_numpy(ids.astype(np.int64)), offsets

    def summary(self) -> dict[str, Any]:
        """What the store holds, as plain values."""
        records = [segment.record for segment in self.segments]
        raw = sum(record["raw_state_bytes"] for record in records)
        stored = sum(record["stored_state_bytes"] for record in records)
        return {
            "path": self.path,
            "format_version": layout.FORMAT_VERSION,
            "checkpoints": {label: self.fingerprint["checkpoints"][label] for label in self.checkpoints},
            "dtype": self.fingerprint["dtype"],
            "width": self.width,
            "boundaries": self.boundaries,
            "row_selection": self.fingerprint["row_selection"],
            "codec": layout.codec_of("states/", self.fingerprint).name,
            "segments": len(self.segments),
            "events": _counts(self.events["kind"]) | {"total": len(self)},
            "excluded_prompts": _counts(self.excluded["reason"]) | {"total": self.excluded.num_rows},
            "sequences": sum(record["n_sequences"] for record in records),
            "rows": sum(segment.n_rows for segment in self.segments) * len(self.checkpoints) * len(self.boundaries),
            "state_bytes": {"raw": raw, "stored": stored, "ratio": round(raw / stored, 3) if raw else None},
            "stored_bytes": sum(record["stored_bytes"] for record in records),
            "uncommitted": self.uncommitted,
            "fingerprint": layout.fingerprint_digest(self.fingerprint),
        }

    # ---- rows of events ----

    def _indices(self, events: Events) -> npt.NDArray[np.int64]:
        if events is None or isinstance(events, slice):
            return np.arange(len(self), dtype=np.int64)[events if events is not None else slice(None)]
        given = np.asarray(events).reshape(-1)
        if len(given) and given.dtype.kind not in "iu":  # a mask or fractions would become other events than meant
            raise InputError(f"events are {given.dtype}, expected integers: the numbers of the events wanted")
        wrong = given[(given < 0) | (given >= len(self))]
        if len(wrong):
            raise InputError(f"event {wrong[0]} is not in the store; it has {len(self)} events, counted from 0")
        return given.astype(np.int64)

    def _check_label(self, label: str) -> None:
        if label not in self.fingerprint["checkpoints"]:
            raise InputError(f"checkpoint {label!r} is not in the store; it has {', '.join(self.checkpoints)}")

    def _rows(
        self, array: str, indices: npt.NDArray[np.int64], spans_of: SpansOf
    ) -> tuple[npt.NDArray[Any], torch.Tensor]:
        """Rows of the events' spans, in the order asked; each chunk that they lie in is decoded once."""
        return self._reading(lambda: self._rows_now(array, indices, spans_of))

    def _rows_now(
        self, array: str, indices: npt.NDArray[np.int64], spans_of: SpansOf
    ) -> tuple[npt.NDArray[Any], torch.Tensor]:
        owned = list(self._by_segment(indices))
        spans = np.empty((len(indices), 2), np.int64)

        def look_up(segment: Segment, asked: npt.NDArray[np.int64]) -> None:
            spans[asked] = spans_of(segment, indices[asked] - segment.events.start)
            segment.open_array(array)

        shard.at_once(self.storage, [partial(look_up, *given) for given in owned])
        offsets = np.zeros(len(indices) + 1, np.int64)
        np.cumsum(spans[:, 1] - spans[:, 0], out=offsets[1:])
        requests = [(segment.open_array(array), spans[asked], offsets[:-1][asked]) for segment, asked in owned]
        row_shape: tuple[int, ...] = () if array == "token_ids" else (self.width,)
        dtype = "int32" if array == "token_ids" else layout.stored_dtype(self.fingerprint["dtype"])
        return shard.read_spans(requests, int(offsets[-1]), row_shape, dtype), torch.from_numpy(offsets)

    def _reading(self, read: Callable[[], T]) -> T:
        """The result of a read, which is made again where a compaction has moved what it reads."""
        while True:
            try:
                return read()
            except CorruptStoreError:
                if not self._follow_compaction():
                    raise

    def _follow_compaction(self) -> bool:
        """Take the segments that have replaced this store's, if any have: their events have the same numbers."""
        known = {name for segment in self.segments for name in segment.covers}
        moved = []
        for record in without_replaced(self._records()):
            covers = {record["segment"], *record["replaces"]}
            if covers & known:
                # Names of what a compaction made, and of what it replaced, beyond those known here: fine where they
                # hold the same events, which their number tells.
                moved.append(record)
        if [record["segment"] for record in moved] == [segment.name for segment in self.segments]:
            return False
        segments: list[Segment] = []
        for record in moved:
            start = segments[-1].events.stop if segments else 0
            segments.append(Segment(self.storage, range(start, start + record["n_events"]), record, self.fingerprint))
        if sum(segment.n_events for segment in segments) != len(self):
            raise InputError(f"{self.storage} has been compacted together with newer segments: open it again")
        self.segments = segments
        return True

    def _records(self) -> list[dict[str, Any]]:
        """All commit records; one that is removed while they are read has been replaced by another."""
        for _ in range(_LISTINGS):
            names = committed_names(self.storage)
            try:
                reads = [partial(read_record, self.storage, name, self._digest) for name in names]
                return shard.at_once(self.storage, reads)
            except FileNotFoundError:
                continue
        raise CorruptStoreError(f"{self.storage}: commit records vanish while they are read{shard.ADVICE}")

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

    def _table(self, name: str) -> pa.Table:
        columns = layout.EVENT_COLUMNS if name == "events" else layout.EXCLUDED_COLUMNS
        check_schemas([segment.record for segment in self.segments])
        tables = [pa.table({column: layout.empty_column(kind) for column, kind in columns.items()})]
        tables += shard.at_once(self.storage, [partial(segment.read_table, name) for segment in self.segments])
        rows = zip(self.segments, tables[1:], strict=True)
        names = [segment.name for segment, table in rows for _ in range(table.num_rows)]
        whole = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
        carried = [json.loads(text) for text in whole["carried"].to_pylist()]
        whole = whole.drop_columns(["carried"]).append_column(layout.SEGMENT_COLUMN, pa.array(names, pa.string()))
        keys = dict.fromkeys(key for record in carried for key in record)
        if len(keys) > layout.MAX_CARRIED_KEYS:
            raise CorruptStoreError(f"the {name} tables carry more than {layout.MAX_CARRIED_KEYS} distinct keys")
        for key in keys:
            if key in whole.column_names:
                raise CorruptStoreError(f"the {name} table has a column and a carried key {key!r}")
            whole = whole.append_column(key, _natural([record.get(key) for record in carried]))
        return whole


SpansOf = Callable[[Segment, npt.NDArray[np.int64]], npt.NDArray[np.int64]]


def _prefix_spans(segment: Segment, events: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rows of positions 0..p, ``[n, 2]``."""
    return segment.event_rows[events]


def _event_spans(segment: Segment, events: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The one row of each event in an array that has one an event, ``[n, 2]``."""
    return np.stack([events, events + 1], axis=1)


def _natural(values: list[Any]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {str} or kinds <= {bool} or kinds <= {int} or kinds <= {int, float}:
        try:
            return pa.array(values)
        except (ValueError, OverflowError):  # an integer beyond 64 bits or inexact as a float; a lone surrogate
            pass
    return pa.array([None if value is None else json.dumps(value, sort_keys=True) for value in values], pa.string())


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in column.value_counts().to_pylist()}
