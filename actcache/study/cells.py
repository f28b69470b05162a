"""Cells: the table that a grid makes, and which finished jobs it is made of.

The table is the union of the results of finished replay jobs (results.py): one row per event and cell. Cells belong to
events, wherever a compaction has moved these since. Knows stores and tables; knows no models and no replay.
"""

from __future__ import annotations

import hashlib
import json
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
from actcache.files import as_path, write_atomically
from actcache.replay.edits import PLAIN
from actcache.schema import CELL_KEY, CELL_VALUES, CELLS, EVENT_KEY, PAIR, arrow_type, names
from actcache.sealed import NoSealError, Sealed, parquet_bytes
from actcache.store import Segment, Store, layout
from actcache.store.storage import Stamp, open_storage
from actcache.study.results import final_path, read_final, read_result, read_results, result_files, scopes_of
from actcache.study.scores import readout_order

# The event columns that cells repeat, before the cell's own; carried prompt columns come last.
_EVENT_COLUMNS = names(EVENT_KEY)
# The last one, kl, only where it was asked for.
_CELL_FIELDS = [(column.name, arrow_type(column.type)) for column in (*CELL_KEY, *CELL_VALUES)]
_CELL = names(CELL_KEY)  # with an event, these name a row


@dataclass(frozen=True, eq=False)
class Scored:
    """What one finished replay job holds.

    Attributes:
        path: of its table.
        key: of the job, see :class:`actcache.study.replay_job.ReplayJob`; and of how it went: ``mode``, how sequences
            shared a forward, and ``still`` (name -> in how many cells of one readout the variant moved nothing).
        events: whose cells it has, as indices of the store: ``[n]``.
    """

    path: Path
    key: dict[str, Any]
    events: npt.NDArray[np.int64]

    @property
    def names(self) -> frozenset[str]:
        """Of its variants."""
        return frozenset(self.key["variants"])

    @property
    def readouts(self) -> frozenset[str]:
        """By which its cells are scored."""
        return frozenset(self.key["readouts"])

    def has(self, what: str) -> bool:
        """Whether its variants have ``top1`` or all of its cells ``kl``."""
        return bool(self.key[what])

    def table(self, scope: str, late: str) -> pa.Table:
        """Its cells in one scope behind one late stack: the first event's, then the next one's, as many of each."""
        table = read_result(self.path).content
        return table.filter(pc.and_(pc.equal(table["scope"], scope), pc.equal(table["late"], late)))

    @property
    def has_plain(self) -> bool:
        """Whether it has plain cells."""
        return PLAIN.name in self.names

    @property
    def has_final(self) -> bool:
        """Whether the final states of its plain cells were kept."""
        return self.has_plain and final_path(self.path).is_file()

    def final(self) -> dict[str, torch.Tensor]:
        """Final states of its plain cells by ``scope/upstream``, ``[n, D]`` in the order of its events.

        Raises:
            CorruptFileError: they are damaged.
        """
        return read_final(self.path)


Place = tuple[int, str, str]  # boundary, scope, late
Finished = dict[Place, list[Scored]]  # in the order of their files' names


def find_finished(folder: str | Path, store: Store) -> tuple[Finished, dict[str, CorruptFileError | NoSealError]]:
    """What is finished of a store's events; and by their names the files that are damaged.

    Left out are files of another store, or of events that are not in this one as they were scored.
    """
    digest = store.fingerprint.digest
    events = store.events.select(_EVENT_COLUMNS)
    finished: Finished = {}
    damaged: dict[str, CorruptFileError | NoSealError] = {}
    for path, found in read_results(folder, list(_EVENT_COLUMNS)):
        if not isinstance(found, Sealed):
            damaged[path.name] = found
            continue
        key = found.made_from
        if key["store"] == digest and (at := _events_of(found.content, events)) is not None:
            scored = Scored(path, key, at)
            lates = [key["late"]] if "late" in key else store.checkpoints  # earlier versions had one file for all
            for scope, late in product(scopes_of(key), lates):
                finished.setdefault((key["boundary"], scope, late), []).append(scored)
    return finished, damaged


def _events_of(rows: pa.Table, events: pa.Table) -> npt.NDArray[np.int64] | None:
    """Which events these are the rows of; None where they are not of these events as they are now."""
    if not rows.num_rows:
        return None
    n_events = pc.count_distinct(rows["event_id"]).as_py()
    own = rows.take(pa.array(np.arange(n_events) * (rows.num_rows // n_events)))
    at = pc.index_in(own["event_id"].combine_chunks(), value_set=events["event_id"].combine_chunks())
    if at.null_count or not events.take(at).equals(own):
        return None
    found: npt.NDArray[np.int64] = at.to_numpy().astype(np.int64)
    return found


def of_no_use(folder: str | Path, store: Store, names: Iterable[str]) -> dict[str, Stamp]:
    """Of these files, those that are there and that :func:`find_finished` would leave out or call damaged."""
    events, storage = store.events.select(_EVENT_COLUMNS), open_storage(folder)
    there, found = set(storage.names("")), {}
    for name in there.intersection(names):
        stamp = storage.stamp(name)
        try:
            whole = _events_of(read_result(as_path(folder) / name, list(_EVENT_COLUMNS)).content, events) is not None
        except (CorruptFileError, NoSealError, FileNotFoundError):
            whole = False
        if stamp is not None and not whole:
            found[name] = stamp
    return found


def finished_cells(folder: str | Path, store: Store) -> Finished:
    """What is finished of a store's events.

    Raises:
        CorruptFileError, NoSealError: a file is damaged.
    """
    finished, damaged = find_finished(folder, store)
    for error in damaged.values():
        raise error
    return finished


def by_segment(finished: Finished, store: Store) -> Iterator[tuple[Segment, Finished]]:
    """The segments that have events, as they are now, each with what is finished of its events."""
    segments = [segment for segment in store.segments if segment.n_events]
    stops = np.array([segment.events.stop for segment in segments], np.int64)
    found: list[Finished] = [{} for _ in segments]
    for at, scored in finished.items():
        for one in scored:
            for number in np.unique(np.searchsorted(stops, one.events, side="right")):
                found[number].setdefault(at, []).append(one)
    yield from zip(segments, found, strict=True)


def gather_cells(folder: str | Path, store: Store, *, strict: bool, max_tokens: int | None) -> pa.Table:
    """The cells of all finished jobs of this store's events in ``folder`` as one table, in a fixed order: by boundary,
    scope, event, variant (the plain one first), upstream, late and readout.

    A cell may stand in two files: scored in two ways, or by two sweeps that overlap. It is taken from the file that was
    scored with these settings and has the most.

    Raises:
        CorruptFileError, NoSealError: the file of a job is damaged.
    """

    def has_most(scored: Scored) -> tuple[bool, int, bool, bool]:
        as_asked = scored.key["strict"] == strict and scored.key["max_tokens"] == max_tokens
        return as_asked, len(scored.readouts), scored.has("kl"), scored.has("top1")

    finished = finished_cells(folder, store)
    every = [scored for of_place in finished.values() for scored in of_place]
    names = [PLAIN.name, *sorted({name for scored in every for name in scored.names} - {PLAIN.name})]
    readouts = sorted({name for scored in every for name in scored.readouts}, key=readout_order)
    value_sets = {
        "variant": pa.array(names),
        "upstream": pa.array(store.checkpoints),
        "late": pa.array(store.checkpoints),
        "readout": pa.array(readouts),
    }
    tables: dict[tuple[int, str], list[tuple[pa.Table, npt.NDArray[np.int64]]]] = {}
    for (boundary, scope, late), of_place in sorted(finished.items()):
        taken = np.zeros((len(store), len(names), len(store.checkpoints), len(readouts)), bool)
        for scored in sorted(of_place, key=has_most, reverse=True):
            table = scored.table(scope, late)
            event = np.repeat(scored.events, table.num_rows // len(scored.events))
            code = [pc.index_in(table[name], value_set=of).to_numpy() for name, of in value_sets.items()]
            cell = event, code[0], code[1], code[-1]
            left = ~taken[cell]
            taken[cell] = True
            kept = np.stack([event, *code])[:, left]
            tables.setdefault((boundary, scope), []).append((table.filter(pa.array(left)), kept))
    with_kl = any("kl" in table.column_names for parts in tables.values() for table, _ in parts)
    sorted_tables = [cell_table(store.events.slice(0, 0), [], with_kl=with_kl)]
    for _, parts in sorted(tables.items()):
        table = pa.concat_tables([table for table, _ in parts], promote_options="permissive")
        order = np.lexsort(np.concatenate([codes for _, codes in parts], axis=1)[::-1])
        sorted_tables.append(table.take(pa.array(order)))
    return _with_carried(pa.concat_tables(sorted_tables, promote_options="permissive"), store.events)


def publish_cells(path: Path, folder: str | Path, store: Store, *, strict: bool, max_tokens: int | None) -> pa.Table:
    """Write the table of :func:`gather_cells` (arguments and errors there), and return it; again where others have
    finished jobs meanwhile, who write it too."""
    how = {"strict": strict, "max_tokens": max_tokens}
    while True:
        files = result_files(folder)
        cells = gather_cells(folder, store, strict=strict, max_tokens=max_tokens)
        write_atomically(path, parquet_bytes(cells, {**identity(store), **how}))
        if result_files(folder) == files:
            return cells


def kept_final(
    scored: Iterable[Scored], scope: str, upstream: str, events: npt.NDArray[np.int64], like: torch.Tensor
) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
    """Final states of plain cells that finished jobs kept: of each event from the first job that has it.

    Args:
        scored: jobs of one boundary, scope and late stack.
        scope, upstream: of the cells.
        events: numbers of those wanted, ``[n]``.
        like: ``[0, D]``, in the dtype of the states.

    Returns:
        states ``[n, D]``, and which events no job kept one of, ``[n]``.

    Raises:
        CorruptFileError: a file of them is damaged.
    """
    final, left = like.new_empty(len(events), like.shape[1]), np.ones(len(events), bool)
    for one in scored:
        found = np.flatnonzero(left & np.isin(events, one.events))
        if len(found) and one.has_final:
            order = np.argsort(one.events)
            rows = order[np.searchsorted(one.events, events[found], sorter=order)]
            final[found] = one.final()[f"{scope}/{upstream}"][rows]
            left[found] = False
    return final, left


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


def cell_table(events: pa.Table, columns: Sequence[dict[str, Any]], *, with_kl: bool) -> pa.Table:
    """One row per event and entry of ``columns``, event by event."""
    n_events, n_columns = events.num_rows, len(columns)
    repeated = pa.array(np.repeat(np.arange(n_events), n_columns))
    out: dict[str, pa.Array | pa.ChunkedArray] = {name: events[name].take(repeated) for name in _EVENT_COLUMNS}
    for name, kind in _CELL_FIELDS if with_kl else _CELL_FIELDS[:-1]:
        out[name] = _interleaved([column[name] for column in columns], n_events, kind)
    return pa.table(out)


def _with_carried(cells: pa.Table, events: pa.Table) -> pa.Table:
    """The cells with the pair of their events, and with what their prompts carry, which is a document at times: a
    dictionary holds each text once."""
    event = pc.index_in(cells["event_id"], value_set=events["event_id"].combine_chunks()).combine_chunks()
    cells = cells.add_column(names(CELLS).index(PAIR.name), PAIR.name, events[PAIR.name].combine_chunks().take(event))
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
