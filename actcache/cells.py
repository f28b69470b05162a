"""Cells: the table that a grid makes, and the files of finished cell groups that it is made of.

A cell group is one segment at one boundary in one scope. What of it is scored in one go becomes one Parquet file: a row
an event and cell, and in the file's metadata its *key*: what the cells depend on, and what was scored. Several files
may be of one group, those of different variants. Knows stores and tables; knows no models and no replay.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from actcache.edits import PLAIN
from actcache.files import write_atomically
from actcache.store import Store

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
_PER_CHECKPOINT = ("gap_", "margin_")
_NOT_CARRIED = {*_EVENT_COLUMNS, "proposed_step", "sequence", "context", "token_pt", "token_it", "segment"}
_METADATA = b"actcache"


@dataclass(frozen=True)
class FinishedGroup:
    """What a file holds.

    Attributes:
        path: of the file.
        key: ``store`` (:func:`store_digest`), ``segment``, ``boundary``, ``scope``, ``strict`` and ``max_tokens``, upon
            which the cells depend; ``readouts``, ``variants`` (name -> digest of its edits, the plain ``none`` too),
            ``top1`` (whether variants have ``top1_id`` too) and ``kl``: what was scored; ``whole``, names of the
            variants that change more than position p, and ``mode``, how sequences shared a forward: what it took;
            ``still`` (name -> in how many cells of one readout the variant moved nothing).
            Files of earlier versions have no ``kl`` and no ``still``, and do not say what they took.
        names: the variants that count, of those in it.
    """

    path: Path
    key: dict[str, Any]
    names: frozenset[str]

    def has(self, what: str) -> bool:
        """Whether its variants have ``top1`` or all of its cells ``kl``."""
        return bool(self.key.get(what, False))

    def table(self) -> pa.Table:
        """Its cells, of the variants named."""
        table = pq.read_table(self.path)
        if self.names == set(self.key["variants"]):
            return table
        return table.filter(pc.is_in(table["variant"], pa.array(sorted(self.names))))


Finished = dict[tuple[str, int, str], list[FinishedGroup]]  # by segment, boundary and scope


def finished_groups(folder: str | Path, store: Store) -> Finished:
    """Those of the store's segments by (segment, boundary, scope), in the order of their files' names.

    Files of segments that a compaction has replaced are left out: their events are scored with the merged segment.
    """
    digest, segments = store_digest(store), {segment.name for segment in store.segments}
    groups: Finished = {}
    for path in sorted(Path(folder).glob("*.parquet")):
        metadata = (pq.read_schema(path).metadata or {}).get(_METADATA)
        key = json.loads(metadata) if metadata else {}
        # Earlier versions scored no variants and named none: scored again, their files are replaced.
        if key.get("store") == digest and key.get("segment") in segments and "variants" in key:
            found = FinishedGroup(path, key, frozenset(key["variants"]))
            groups.setdefault((key["segment"], key["boundary"], key["scope"]), []).append(found)
    return groups


def write_group(folder: str | Path, key: dict[str, Any], events: pa.Table, columns: Sequence[dict[str, Any]]) -> None:
    """Publish a finished group, whole or not at all.

    Args:
        folder: where groups lie.
        key: see :class:`FinishedGroup`.
        events: of the segment.
        columns: one for each cell of an event: the cell's fields, each a tensor over the events or the same for all.
    """
    table = _cell_table(events, columns, with_kl=key["kl"]).replace_schema_metadata(
        {_METADATA: json.dumps(key).encode()}
    )
    # Groups of one set of variants have one name.
    variant_set = hashlib.sha256(json.dumps(sorted(key["variants"].items())).encode()).hexdigest()[:16]
    suffix = "" if set(key["variants"]) == {PLAIN.name} else f"+{variant_set}"
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    path = Path(folder) / f"b{key['boundary']:03d}-{key['scope']}-{key['segment']}{suffix}.parquet"
    write_atomically(path, sink.getvalue())


def gather_cells(folder: str | Path, store: Store, *, strict: bool, max_tokens: int | None) -> pa.Table:
    """All finished groups of this store in ``folder`` as one table, in a fixed order.

    A variant that stands in two files (scored in two ways, or by two sweeps that overlap) is taken from the one that
    was scored with these settings, and has the most.
    """

    def has_most(group: FinishedGroup) -> tuple[bool, int, bool, bool]:
        as_asked = group.key["strict"] == strict and group.key["max_tokens"] == max_tokens
        return as_asked, len(group.key["readouts"]), group.has("kl"), group.has("top1")

    tables = [
        found.table()
        for groups in finished_groups(folder, store).values()
        for found in _without_repeats(sorted(groups, key=has_most, reverse=True))
        if found.names
    ]
    with_kl = any("kl" in table.column_names for table in tables)
    empty = _cell_table(store.events.slice(0, 0), [], with_kl=with_kl)
    return pa.concat_tables([empty, *tables], promote_options="permissive").replace_schema_metadata(None)


def store_digest(store: Store) -> str:
    """SHA-256 of the store's fingerprint, which names it in keys."""
    return hashlib.sha256(json.dumps(store.fingerprint, sort_keys=True).encode()).hexdigest()


def _without_repeats(groups: Sequence[FinishedGroup]) -> Iterator[FinishedGroup]:
    seen: set[str] = set()
    for group in groups:
        yield FinishedGroup(group.path, group.key, group.names - seen)
        seen |= group.names


def _cell_table(events: pa.Table, columns: Sequence[dict[str, Any]], *, with_kl: bool) -> pa.Table:
    """One row an event and entry of ``columns``, event by event."""
    carried = [
        name for name in events.column_names if name not in _NOT_CARRIED and not name.startswith(_PER_CHECKPOINT)
    ]
    n_events, n_columns = events.num_rows, len(columns)
    repeated = pa.array(np.repeat(np.arange(n_events), n_columns))
    out: dict[str, pa.Array | pa.ChunkedArray] = {name: events[name].take(repeated) for name in _EVENT_COLUMNS}
    for name, kind in _CELL_FIELDS if with_kl else _CELL_FIELDS[:-1]:
        out[name] = _interleaved([column[name] for column in columns], n_events, kind)
    for name in carried:
        out[name] = events[name].take(repeated)
    return pa.table(out)


def _interleaved(values: list[Any], n_events: int, kind: pa.DataType) -> pa.Array:
    """One value an event and cell, event by event; each of ``values`` is a tensor over events, or the same for all."""
    if not any(isinstance(value, torch.Tensor) for value in values):
        return pa.array(values * n_events, kind)
    dtype = kind.to_pandas_dtype()
    missing = np.array([value is None for value in values] * n_events)
    columns = [np.zeros(n_events, dtype) if value is None else value.numpy().astype(dtype) for value in values]
    return pa.array(np.stack(columns, axis=1).reshape(-1), kind, mask=missing)
