"""Cells: the table that a grid makes, and the files of finished cell groups that it is made of.

A cell group is one segment at one boundary in one scope. What of it is scored in one go becomes one sealed Parquet
file: a row per event and cell, and what they were made from, the file's *key*. The key gives the file its name, so that
grids that run at once do not write over each other's files. Cells belong to events, wherever a compaction has moved
these since. Knows stores and tables; knows no models and no replay.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from actcache.errors import CheckError, CorruptFileError
from actcache.files import write_atomically
from actcache.replay.edits import PLAIN
from actcache.sealed import NoSealError, parquet_bytes, read_parquet
from actcache.store import Segment, Store, layout

# The event columns that cells repeat, before the cell's own; carried prompt columns come last.
_EVENT_COLUMNS = ("event_id", "prompt_id", "kind", "step", "position", "y_pt", "y_it")
_CELL_FIELDS = [
    ("boundary", pa.int32()),
    ("scope", pa.string()),
    ("upstream", pa.string()),
    ("late", pa.string()),
    ("readout", pa.string()),
    ("variant", pa.string()),
    ("margin", pa.float32()),
    ("top1_id", pa.int64()),
    ("noop_delta", pa.float32()),
    ("kl", pa.float32()),  # where it was asked for
]
_CELL = ("boundary", "scope", "upstream", "late", "readout", "variant")  # with an event, these name a row
# Earlier versions named files otherwise, and gave them no seal: what they hold is scored again.
_FILE = re.compile(r"b[0-9]{3,}-[a-z]+-[A-Za-z0-9_-]+\.[0-9a-f]{16}\.parquet")
_ADVICE = "remove it, and give the command again that scored it"


@dataclass(frozen=True, eq=False)
class FinishedGroup:
    """What a file holds.

    Attributes:
        path: of the file.
        key: ``store`` (digest of its fingerprint), ``segment``, ``boundary``, ``scope``, ``strict`` and ``max_tokens``,
            upon which the cells depend; ``readouts``, ``variants`` (name -> digest of its edits, the plain ``none``
            too), ``top1`` (whether variants have ``top1_id`` too) and ``kl``: what was scored; ``whole``, names of the
            variants that change more than position p, and ``mode``, how sequences shared a forward: what it took;
            ``still`` (name -> in how many cells of one readout the variant moved nothing).
        events: whose cells it has, as indices of the store: ``[n]``.
    """

    path: Path
    key: dict[str, Any]
    events: npt.NDArray[np.int64]

    @property
    def names(self) -> frozenset[str]:
        """Of its variants."""
        return frozenset(self.key["variants"])

    def has(self, what: str) -> bool:
        """Whether its variants have ``top1`` or all of its cells ``kl``."""
        return bool(self.key[what])

    def table(self) -> pa.Table:
        """Its cells: those of the first event, then those of the next one, equally many of each."""
        return read_parquet(self.path, "cells", _ADVICE).content


Finished = dict[tuple[int, str], list[FinishedGroup]]  # by boundary and scope, in the order of their files' names


def find_groups(folder: str | Path, store: Store) -> tuple[Finished, dict[str, CorruptFileError | NoSealError]]:
    """The finished groups of a store's events, and by their names the files of groups that are damaged.

    Left out are files of another store, or of events that are not in this one as they were scored.
    """
    digest = store.fingerprint.digest
    events = store.events.select(_EVENT_COLUMNS)
    ids = events["event_id"].combine_chunks()
    groups: Finished = {}
    damaged: dict[str, CorruptFileError | NoSealError] = {}
    for path in group_files(folder):
        try:
            rows, key, _ = read_parquet(path, "cells", _ADVICE, columns=list(_EVENT_COLUMNS))
        except (CorruptFileError, NoSealError) as error:
            damaged[path.name] = error
            continue
        if key["store"] != digest or not rows.num_rows:
            continue
        n_events = pc.count_distinct(rows["event_id"]).as_py()
        own = rows.take(pa.array(np.arange(n_events) * (rows.num_rows // n_events)))
        at = pc.index_in(own["event_id"].combine_chunks(), value_set=ids)
        if at.null_count == 0 and events.take(at).equals(own):
            found = FinishedGroup(path, key, at.to_numpy().astype(np.int64))
            groups.setdefault((key["boundary"], key["scope"]), []).append(found)
    return groups, damaged


def finished_groups(folder: str | Path, store: Store) -> Finished:
    """The finished groups of a store's events.

    Raises:
        CorruptFileError, NoSealError: the file of a group is damaged.
    """
    groups, damaged = find_groups(folder, store)
    for error in damaged.values():
        raise error
    return groups


def group_files(folder: str | Path) -> list[Path]:
    """The files of groups, finished by now, of whatever events."""
    return sorted(path for path in Path(folder).glob("*.parquet") if _FILE.fullmatch(path.name))


def by_segment(finished: Finished, store: Store) -> Iterator[tuple[Segment, Finished]]:
    """The segments that have events, as they are now, each with the groups that hold some of its events."""
    segments = [segment for segment in store.segments if segment.n_events]
    stops = np.array([segment.events.stop for segment in segments], np.int64)
    found: list[Finished] = [{} for _ in segments]
    for at, groups in finished.items():
        for group in groups:
            for number in np.unique(np.searchsorted(stops, group.events, side="right")):
                found[number].setdefault(at, []).append(group)
    yield from zip(segments, found, strict=True)


def has_earlier_files(folder: str | Path) -> bool:
    """Whether there are cells of an earlier version, which do not count any more."""
    return any(not _FILE.fullmatch(path.name) for path in Path(folder).glob("b[0-9]*.parquet"))


def file_name(key: dict[str, Any]) -> str:
    """Of the file of a group: what was asked gives it, which is known before anything is scored."""
    made_from = {name: value for name, value in key.items() if name not in ("mode", "still")}
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    return f"b{key['boundary']:03d}-{key['scope']}-{key['segment']}.{digest}.parquet"


def write_group(folder: str | Path, key: dict[str, Any], events: pa.Table, columns: Sequence[dict[str, Any]]) -> None:
    """Publish a finished group, whole or not at all.

    Args:
        folder: where groups lie.
        key: see :class:`FinishedGroup`.
        events: of the segment.
        columns: one for each cell of an event: the cell's fields, each a tensor over the events or the same for all.
    """
    table = _cell_table(events, columns, with_kl=key["kl"])
    write_atomically(Path(folder) / file_name(key), parquet_bytes(table, key))


def gather_cells(folder: str | Path, store: Store, *, strict: bool, max_tokens: int | None) -> pa.Table:
    """All finished groups of this store's events in ``folder`` as one table, in a fixed order.

    A cell that stands in two files (scored in two ways, or by two sweeps that overlap) is taken from the one that was
    scored with these settings, and has the most.

    Raises:
        CorruptFileError, NoSealError: the file of a group is damaged.
    """

    def has_most(group: FinishedGroup) -> tuple[bool, int, bool, bool]:
        as_asked = group.key["strict"] == strict and group.key["max_tokens"] == max_tokens
        return as_asked, len(group.key["readouts"]), group.has("kl"), group.has("top1")

    tables = []
    for _, groups in sorted(finished_groups(folder, store).items()):
        names = pa.array(sorted({name for group in groups for name in group.names}))
        readouts = pa.array(sorted({name for group in groups for name in group.key["readouts"]}))
        taken = np.zeros((len(store), len(names), len(readouts)), bool)
        parts = []
        for group in sorted(groups, key=has_most, reverse=True):
            table = group.table()
            event = np.repeat(group.events, table.num_rows // len(group.events))
            variant = pc.index_in(table["variant"], value_set=names).to_numpy()
            readout = pc.index_in(table["readout"], value_set=readouts).to_numpy()
            left = ~taken[event, variant, readout]
            taken[event, variant, readout] = True
            place = group.events[0], group.names != {PLAIN.name}, group.path.name
            parts.append((place, table.filter(pa.array(left))))
        tables += [table for _, table in sorted(parts, key=lambda part: part[0])]
    with_kl = any("kl" in table.column_names for table in tables)
    empty = _cell_table(store.events.slice(0, 0), [], with_kl=with_kl)
    return _with_carried(pa.concat_tables([empty, *tables], promote_options="permissive"), store.events)


def check_every_cell(
    cells: pa.Table, store: Store, asked: Iterable[tuple[int, str, Sequence[str]]], readouts: Sequence[str]
) -> None:
    """Raise CheckError unless every event of the store has every cell that was asked for, once.

    Args:
        cells: that :func:`gather_cells` returned.
        store: as it was when the grid began.
        asked: boundary, scope and names of variants.
        readouts: of each.
    """
    counts = cells.group_by(list(_CELL)).aggregate([("event_id", "count"), ("event_id", "count_distinct")])
    found = {
        tuple(row[name] for name in _CELL): (row["event_id_count"], row["event_id_count_distinct"])
        for row in counts.to_pylist()
    }
    for boundary, scope, variants in asked:
        for cell in product([boundary], [scope], store.checkpoints, store.checkpoints, readouts, variants):
            n_rows, n_events = found.get(cell, (0, 0))
            if not n_rows == n_events == len(store):
                words = ", ".join(f"{name} {value}" for name, value in zip(_CELL, cell, strict=True))
                raise CheckError(
                    f"{n_events} of {len(store)} events have the cell {words} ({n_rows} rows): files of it are gone or "
                    "were changed while the grid ran; give the same command again"
                )


def identity(store: Store) -> dict[str, Any]:
    """What tells a store, and the events that it holds, from every other."""
    events = json.dumps(store.events.select(_EVENT_COLUMNS).to_pydict()).encode()
    return {
        "store": store.fingerprint.digest,
        "n_events": len(store),
        "events": hashlib.sha256(events).hexdigest(),
    }


def _cell_table(events: pa.Table, columns: Sequence[dict[str, Any]], *, with_kl: bool) -> pa.Table:
    """One row per event and entry of ``columns``, event by event."""
    n_events, n_columns = events.num_rows, len(columns)
    repeated = pa.array(np.repeat(np.arange(n_events), n_columns))
    out: dict[str, pa.Array | pa.ChunkedArray] = {name: events[name].take(repeated) for name in _EVENT_COLUMNS}
    for name, kind in _CELL_FIELDS if with_kl else _CELL_FIELDS[:-1]:
        out[name] = _interleaved([column[name] for column in columns], n_events, kind)
    return pa.table(out)


def _with_carried(cells: pa.Table, events: pa.Table) -> pa.Table:
    """The cells with what their prompts carry, which is a document at times: a dictionary holds each text once."""
    columns = events.column_names
    at = pc.index_in(cells["prompt_id"], value_set=events["prompt_id"].combine_chunks()).combine_chunks()
    for name in columns[columns.index(layout.SEGMENT_COLUMN) + 1 :]:
        values = events[name].combine_chunks()
        if pa.types.is_string(values.type):
            values = values.dictionary_encode()
        cells = cells.append_column(name, values.take(at))
    return cells


def _interleaved(values: list[Any], n_events: int, kind: pa.DataType) -> pa.Array:
    """One value an event and cell, event by event; each of ``values`` is a tensor over events, or the same for all."""
    if not any(isinstance(value, torch.Tensor) for value in values):
        return pa.array(values * n_events, kind)
    dtype = kind.to_pandas_dtype()
    missing = np.array([value is None for value in values] * n_events)
    columns = [np.zeros(n_events, dtype) if value is None else value.numpy().astype(dtype) for value in values]
    return pa.array(np.stack(columns, axis=1).reshape(-1), kind, mask=missing)
