"""Reading: committed segments only, every byte checked before it is believed.

Opening reads the root and the commit records. An array is checked against its record when it is first touched (its
metadata by checksum, its data file by presence and size); its chunks carry checksums of their own, which the codec
checks at every read. A missing chunk, which Zarr would fill in silently, is therefore always an error.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import zarr
from zarr.storage import LocalStore

from actcache.errors import CorruptStoreError, InputError
from actcache.store import layout

Events = Sequence[int] | slice | None


def open_store(path: str | Path) -> Store:
    """Open a store for reading; needs neither models nor prompts.

    Raises:
        InputError: there is no store at ``path``.
        CorruptStoreError: the root or a commit record is damaged.
        FormatVersionError: written by a newer version.
    """
    return Store(Path(path))


def read_fingerprint(path: Path) -> dict[str, Any]:
    """The fingerprint of the store at ``path`` (errors as :func:`open_store`)."""
    root = path / layout.ROOT
    if not root.is_file():
        raise InputError(f"{path} is not a store (no {layout.ROOT}); give the folder of a store, or of a run")
    try:
        attributes = json.loads(root.read_bytes())["attributes"]["actcache"]
        version, fingerprint = attributes["format_version"], attributes["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptStoreError(f"{root}: not the root of a store ({error})") from error
    layout.check_version(version, root)
    return fingerprint


def read_commits(path: Path) -> dict[str, dict[str, Any]]:
    """Commit records by segment name, in name order (errors as :func:`open_store`)."""
    records = {}
    for file in sorted((path / layout.COMMITS).glob("*.json")):
        record = layout.read_record(file)
        if record["segment"] != file.stem:
            raise CorruptStoreError(f"commit record {file.name} is that of segment {record['segment']!r}")
        records[file.stem] = record
    return records


@dataclass(frozen=True)
class Segment:
    """One committed segment.

    Attributes:
        name: of the segment.
        events: its events, as indices of the whole store.
        n_events, n_rows, n_sequences: counts.
        record: its commit record.
    """

    name: str
    path: Path
    events: range
    record: dict[str, Any]
    _checked: set[str] = field(default_factory=set, compare=False, repr=False)

    @property
    def n_events(self) -> int:
        """E of this segment."""
        return len(self.events)

    @property
    def n_rows(self) -> int:
        """N of this segment, for each checkpoint and boundary."""
        return int(self.record["n_rows"])

    @property
    def n_sequences(self) -> int:
        """S of this segment."""
        return int(self.record["n_sequences"])

    @cached_property
    def row_offsets(self) -> npt.NDArray[np.int64]:
        """``[S + 1]``, where each sequence begins."""
        return self.read("sequence_offsets")

    def read(self, array: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows ``start:stop`` of one of the segment's arrays.

        Raises:
            CorruptStoreError: names segment, array and rows.
        """
        stored = self._open(array)
        stop = stored.shape[0] if stop is None else stop
        if stop <= start:
            return np.empty((0, *stored.shape[1:]), stored.dtype)
        try:
            return np.asarray(stored[start:stop])
        except (OSError, MemoryError):
            raise
        except Exception as error:  # whatever a codec makes of damaged bytes
            raise CorruptStoreError(
                f"segment {self.name}, array {array}, rows {start}:{stop}: {error}; run 'actcache verify'"
            ) from error

    def read_table(self, name: str) -> pa.Table:
        """The ``events`` or ``excluded`` table (errors as :meth:`read`)."""
        columns: dict[str, pa.Array] = {}
        for column, kind in self.record["schema"][name].items():
            path = f"{name}/{column}"
            if kind == "string":
                try:
                    columns[column] = layout.decode_text(self.read(f"{path}/bytes"), self.read(f"{path}/offsets"))
                except InputError as error:
                    raise CorruptStoreError(f"segment {self.name}, column {path}: {error}") from error
            else:
                columns[column] = pa.array(self.read(path))
        return pa.table(columns)

    def _open(self, array: str) -> zarr.Array:
        if array not in self._checked:
            metadata = self._check_file(f"{array}/{layout.ROOT}", whole=True)
            if int(np.prod(json.loads(metadata)["shape"], dtype=np.int64)):
                for name in self.record["files"]:
                    if name.startswith(f"{array}/c/"):
                        self._check_file(name)
            self._checked.add(array)
        return zarr.open_array(LocalStore(self.path), path=array, mode="r", zarr_format=3)

    def _check_file(self, name: str, *, whole: bool = False) -> bytes:
        """Presence and size of a file as committed; of its bytes too where it is small enough to read whole."""
        where = f"segment {self.name}, file {name}"
        if name not in self.record["files"]:
            raise CorruptStoreError(f"{where}: the commit record does not name it")
        size, checksum = self.record["files"][name]
        path = self.path / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "missing" if found is None else f"{found} bytes"
            raise CorruptStoreError(f"{where}: {state}, committed with {size} bytes; run 'actcache verify'")
        data = path.read_bytes() if whole else b""
        if whole and layout.crc32c(data) != checksum:
            raise CorruptStoreError(f"{where}: its bytes are not those committed; run 'actcache verify'")
        return data


class Store:
    """The committed segments of a store, as one sequence of events.

    Events are numbered 0..E-1 through all segments, in segment-name order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fingerprint: dict[str, Any] = read_fingerprint(path)
        digest = layout.fingerprint_digest(self.fingerprint)
        self.segments: list[Segment] = []
        for name, record in read_commits(path).items():
            if record["fingerprint"] != digest:
                raise CorruptStoreError(f"segment {name} was committed under another fingerprint than the store's")
            start = self.segments[-1].events.stop if self.segments else 0
            folder = path / layout.SEGMENTS / record["folder"]
            self.segments.append(Segment(name, folder, range(start, start + record["n_events"]), record))

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
        """Folders that no commit record names: being written now, or left by a writer that died."""
        committed = {segment.path.name for segment in self.segments}
        return sorted(p.name for p in (self.path / layout.SEGMENTS).iterdir() if p.name not in committed)

    @cached_property
    def events(self) -> pa.Table:
        """One row an event, as captured, with the prompts' carried keys as columns and the segment's name.

        A carried key becomes a column of its natural type, null where a prompt lacks it; values of mixed types, and
        nested ones, become their JSON text.
        """
        return self._table("events")

    @cached_property
    def excluded(self) -> pa.Table:
        """One row a prompt without an event: prompt_id, reason, carried keys, segment."""
        return self._table("excluded")

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
        indices = self._indices(events)
        spans = self._prefix_spans if self.fingerprint["row_selection"] == "prefix" else self._event_spans
        return self._gather(layout.state_path(label, boundary), indices, spans)

    def final(self, label: str, events: Events = None) -> torch.Tensor:
        """Last block's output, before the final norm, at each event's position: ``[n, D]`` (errors as states)."""
        self._check_label(label)
        return self._gather(f"final/{label}", self._indices(events), self._event_spans)[0]

    def token_ids(self, events: Events = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids of positions 0..p of each event, ``[T]`` int64, and offsets ``[n + 1]``."""
        ids, offsets = self._ragged("token_ids", self._indices(events), self._prefix_spans)
        return torch.from_numpy(ids.astype(np.int64)), offsets

    def summary(self) -> dict[str, Any]:
        """What the store holds, as plain values."""
        records = [segment.record for segment in self.segments]
        raw = sum(record["raw_state_bytes"] for record in records)
        stored = sum(record["stored_state_bytes"] for record in records)
        return {
            "path": str(self.path),
            "format_version": layout.FORMAT_VERSION,
            "checkpoints": {label: self.fingerprint["checkpoints"][label] for label in self.checkpoints},
            "dtype": self.fingerprint["dtype"],
            "width": self.width,
            "boundaries": self.boundaries,
            "row_selection": self.fingerprint["row_selection"],
            "segments": len(self.segments),
            "events": _counts(self.events["kind"]) | {"total": len(self)},
            "excluded_prompts": _counts(self.excluded["reason"]) | {"total": self.excluded.num_rows},
            "sequences": sum(record["n_sequences"] for record in records),
            "rows": sum(record["n_rows"] for record in records) * len(self.checkpoints) * len(self.boundaries),
            "state_bytes": {"raw": raw, "stored": stored, "ratio": round(raw / stored, 3) if raw else None},
            "stored_bytes": sum(record["stored_bytes"] for record in records),
            "uncommitted": self.uncommitted,
            "fingerprint": layout.fingerprint_digest(self.fingerprint),
        }

    # ---- rows of events ----

    def _indices(self, events: Events) -> npt.NDArray[np.int64]:
        if events is None or isinstance(events, slice):
            return np.arange(len(self), dtype=np.int64)[events if events is not None else slice(None)]
        indices = np.asarray(events, dtype=np.int64).reshape(-1)
        wrong = indices[(indices < 0) | (indices >= len(self))]
        if len(wrong):
            raise InputError(f"event {wrong[0]} is not in the store; it has {len(self)} events, counted from 0")
        return indices

    def _check_label(self, label: str) -> None:
        if label not in self.fingerprint["checkpoints"]:
            raise InputError(f"checkpoint {label!r} is not in the store; it has {', '.join(self.checkpoints)}")

    @cached_property
    def _event_places(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return self.events["sequence"].to_numpy(), self.events["position"].to_numpy()

    def _prefix_spans(self, segment: Segment, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        sequence, position = (column[indices] for column in self._event_places)
        start = segment.row_offsets[sequence]
        return np.stack([start, start + position + 1], axis=1)

    def _event_spans(self, segment: Segment, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        start = indices - segment.events.start
        return np.stack([start, start + 1], axis=1)

    def _gather(self, array: str, indices: npt.NDArray[np.int64], spans: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows, offsets = self._ragged(array, indices, spans)
        if not len(indices):
            numpy_dtype = layout.to_numpy(torch.empty(0, dtype=self.dtype))[0].dtype
            rows = np.empty((0, self.width), numpy_dtype)
        return layout.to_torch(rows, self.dtype), offsets

    def _ragged(self, array: str, indices: npt.NDArray[np.int64], spans: Any) -> tuple[npt.NDArray[Any], torch.Tensor]:
        """Rows of the events' spans, in the order asked, read in as few pieces as lie close together."""
        parts: list[npt.NDArray[Any]] = [np.empty(0, np.int32)] * len(indices)
        for segment, where in self._by_segment(indices):
            wanted = spans(segment, indices[where])
            for start, stop, members in _merge(wanted):
                piece = segment.read(array, start, stop)
                for member in members:
                    parts[where[member]] = piece[wanted[member, 0] - start : wanted[member, 1] - start]
        offsets = torch.zeros(len(indices) + 1, dtype=torch.int64)
        if parts:
            torch.cumsum(torch.tensor([len(part) for part in parts]), 0, out=offsets[1:])
        return np.concatenate(parts) if parts else np.empty(0, np.int32), offsets

    def _by_segment(self, indices: npt.NDArray[np.int64]) -> Iterator[tuple[Segment, npt.NDArray[np.int64]]]:
        starts = [segment.events.start for segment in self.segments if segment.n_events]
        filled = [segment for segment in self.segments if segment.n_events]
        owner = np.array([bisect_right(starts, index) - 1 for index in indices.tolist()], dtype=np.int64)
        for number in np.unique(owner):
            yield filled[number], np.flatnonzero(owner == number)

    def _table(self, name: str) -> pa.Table:
        columns = layout.EVENT_COLUMNS if name == "events" else layout.EXCLUDED_COLUMNS
        tables = [pa.table({column: layout.empty_column(kind) for column, kind in columns.items()})]
        names: list[str] = []
        for segment in self.segments:
            tables.append(segment.read_table(name))
            names += [segment.name] * tables[-1].num_rows
        whole = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
        carried = [json.loads(text) for text in whole["carried"].to_pylist()]
        whole = whole.drop_columns(["carried"]).append_column("segment", pa.array(names, pa.string()))
        for key in dict.fromkeys(key for record in carried for key in record):
            whole = whole.append_column(key, _natural([record.get(key) for record in carried]))
        return whole


def _merge(spans: npt.NDArray[np.int64]) -> Iterator[tuple[int, int, list[int]]]:
    """Group spans into (start, stop, members) so that spans which touch or overlap are read once."""
    members: list[int] = []
    start = stop = 0
    for index in np.argsort(spans[:, 0], kind="stable").tolist():
        a, b = int(spans[index, 0]), int(spans[index, 1])
        if members and a <= stop:
            stop = max(stop, b)
        else:
            if members:
                yield start, stop, members
            start, stop, members = a, b, []
        members.append(index)
    if members:
        yield start, stop, members


def _natural(values: list[Any]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {str} or kinds <= {bool} or kinds <= {int} or kinds <= {int, float}:
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, OverflowError):  # an integer beyond 64 bits, or too large to be a float exactly
            pass
    return pa.array([None if value is None else json.dumps(value, sort_keys=True) for value in values], pa.string())


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in column.value_counts().to_pylist()}
