"""Grid: the cells of a store, scored by replaying late stacks over its states.

One cell group is one segment at one boundary and scope: every upstream crossed with every late stack, scored by every
readout. A finished group is one Parquet file, so a killed grid goes on where it stopped; ``cells.parquet`` is all
groups together. Knows store, replay and tables; loads no models itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from actcache.errors import CheckError, InputError
from actcache.files import write_atomically
from actcache.readout import Readout
from actcache.replay import MAX_TOKENS, LateStack
from actcache.store import Segment, Store

SCOPES = ("prefix", "position")
COMMON = "common_"  # readout name prefix: common_it is IT's own norm and head for every cell

# How far a replayed diagonal margin may lie from the native one: absolute, and per unit of the larger of the two
# logits, whose rounding it is. float32 leaves two decimal digits of room over what was seen; bfloat16 keeps 8 bits of
# each state, and a margin is a difference of two sums over D of them.
NOOP_TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (0.1, 0.05), torch.float16: (0.02, 0.01)}

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
]


@dataclass(frozen=True)
class GridSettings:
    """What to score.

    Attributes:
        boundaries: a subset of the store's.
        scope: ``prefix`` (every position's state comes from U) or ``position`` (only position p's does).
        readouts: ``native``, ``common_<label>``.
        strict: one sequence a forward; bit-identical to a hooked full forward.
        max_tokens: tokens of one pack otherwise.
    """

    boundaries: tuple[int, ...]
    scope: str = "prefix"
    readouts: tuple[str, ...] = ("native", "common_it", "common_pt")
    strict: bool = False
    max_tokens: int = MAX_TOKENS


def run_grid(
    store: Store,
    load_late: Callable[[str, int], LateStack],
    folder: str | Path,
    settings: GridSettings,
    *,
    on_cells: Callable[[int], None] = lambda n: None,
    say: Callable[[str], None] = lambda line: None,
) -> pa.Table:
    """Score every cell that is not scored yet.

    Args:
        store: with prefix rows.
        load_late: gives the late stack of a checkpoint, by label and boundary, in the store's dtype.
        folder: where finished groups lie; created.
        settings: what to score.
        on_cells: called with the number of (event, upstream, late) replays finished or found finished.
        say: told, in one line, what a person should know.

    Returns:
        The cells of all groups in ``folder``, these settings' and earlier ones', one row a cell. On the diagonal
        ``margin`` is the capture forward's own and ``noop_delta`` is the replayed one minus it; elsewhere
        ``noop_delta`` is null.

    Raises:
        InputError: settings that the store cannot serve.
        CheckError: a replayed diagonal margin is off its native one by more than rounding.
    """
    check_settings(store, settings)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for boundary in settings.boundaries:
        groups = [_Group(store, segment, boundary, settings, folder) for segment in store.segments if segment.n_events]
        todo = [group for group in groups if not group.is_done()]
        on_cells(sum(group.n_replays for group in groups if group not in todo))
        if not todo:
            continue
        lates = {label: load_late(label, boundary) for label in store.checkpoints}
        for late in lates.values():
            if late.not_packable and not settings.strict:
                say(f"one sequence a forward: {late.not_packable}")
                break
        for group in todo:
            group.score(lates)
            on_cells(group.n_replays)
    return read_cells(store, folder)


def check_settings(store: Store, settings: GridSettings) -> None:
    """Raise InputError for a boundary, scope or readout that the store cannot serve."""
    if store.fingerprint["row_selection"] != "prefix":
        raise InputError("the store keeps rows of event positions only; the grid needs prefix rows: capture again")
    for boundary in settings.boundaries:
        if boundary not in store.boundaries:
            raise InputError(f"boundary {boundary} is not in the store; it has {_listed(store.boundaries)}")
    if settings.scope not in SCOPES:
        raise InputError(f"scope {settings.scope!r} is unknown; choose {' or '.join(SCOPES)}")
    known = ["native", *(COMMON + label for label in store.checkpoints)]
    for readout in settings.readouts:
        if readout not in known:
            raise InputError(f"readout {readout!r} is unknown; choose from {', '.join(known)}")


def read_cells(store: Store, folder: str | Path) -> pa.Table:
    """All finished groups of this store in ``folder`` as one table, in a fixed order.

    Those of segments that a compaction has replaced are left out: their events are scored with the merged segment.
    """
    digest, segments = _digest(store), {segment.name for segment in store.segments}
    tables = []
    for path in sorted(Path(folder).glob("*.parquet")):
        table = pq.read_table(path)
        key = _key_of(table)
        if key.get("store") == digest and key.get("segment") in segments:
            tables.append(table)
    empty = _cell_table(store.events.slice(0, 0), [])
    return pa.concat_tables([empty, *tables], promote_options="permissive").replace_schema_metadata(None)


class _Group:
    """The cells of one segment at one boundary and scope."""

    def __init__(self, store: Store, segment: Segment, boundary: int, settings: GridSettings, folder: Path) -> None:
        self.store, self.segment, self.boundary, self.settings = store, segment, boundary, settings
        self.path = folder / f"b{boundary:03d}-{settings.scope}-{segment.name}.parquet"
        self.n_replays = segment.n_events * len(store.checkpoints) ** 2
        self.readouts = settings.readouts

    @property
    def key(self) -> dict[str, Any]:
        """What the cells depend on."""
        return {
            "store": _digest(self.store),
            "segment": self.segment.name,
            "strict": self.settings.strict,
            "max_tokens": self.settings.max_tokens,
            "readouts": sorted(self.readouts),
        }

    def is_done(self) -> bool:
        """Whether the group's file holds what is asked; one with other readouts is scored again with both."""
        if not self.path.is_file():
            return False
        found = _key_of(pq.read_table(self.path))
        if any(found.get(name) != value for name, value in self.key.items() if name != "readouts"):
            return False
        if set(self.readouts) <= set(found["readouts"]):
            return True
        self.readouts = (*self.readouts, *(set(found["readouts"]) - set(self.readouts)))
        return False

    def score(self, lates: dict[str, LateStack]) -> None:
        """Replay and score every cell; publish the file."""
        indices = range(self.segment.events.start, self.segment.events.stop)
        events = self.store.events.slice(indices.start, len(indices))
        states = {label: self.store.states(label, self.boundary, indices) for label in lates}
        final = {label: self.store.final(label, indices) for label in lates}
        pair_ids = torch.tensor([events["y_pt"].to_pylist(), events["y_it"].to_pylist()]).T
        columns: list[dict[str, Any]] = []
        for upstream in lates:
            for late_label, late in lates.items():
                rows, offsets = self._rows(states, upstream, late_label)
                replayed = late.run(rows, offsets, strict=self.settings.strict, max_tokens=self.settings.max_tokens)
                for name, readout in self._readouts_for(late_label, lates):
                    scores, noop = _score(readout, replayed, pair_ids), None
                    if upstream == late_label:
                        native = _score(readout, final[late_label], pair_ids)
                        noop = scores.margin - native.margin
                        self._check_noop(events, late_label, name, native, noop)
                        scores = native
                    columns.append(
                        {
                            "boundary": self.boundary,
                            "scope": self.settings.scope,
                            "upstream": upstream,
                            "late": late_label,
                            "readout": name,
                            "variant": "none",
                            "margin": scores.margin,
                            "top1_id": scores.top1,
                            "noop_delta": noop,
                        }
                    )
        table = _cell_table(events, columns).replace_schema_metadata({b"actcache": json.dumps(self.key).encode()})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        write_atomically(self.path, sink.getvalue())

    def _rows(
        self, states: dict[str, tuple[torch.Tensor, torch.Tensor]], upstream: str, late: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, offsets = states[upstream]
        if self.settings.scope == "prefix" or upstream == late:
            return rows, offsets
        last = offsets[1:] - 1
        own = states[late][0].clone()
        own[last] = rows[last]
        return own, offsets

    def _readouts_for(self, late: str, lates: dict[str, LateStack]) -> Iterator[tuple[str, Readout]]:
        for name in self.readouts:
            yield name, lates[late if name == "native" else name.removeprefix(COMMON)].readout

    def _check_noop(self, events: pa.Table, label: str, readout: str, native: _Scores, noop: torch.Tensor) -> None:
        absolute, relative = NOOP_TOLERANCE[self.store.dtype]
        allowed = absolute + relative * native.logits.abs().amax(dim=1)
        wrong = torch.nonzero(~(noop.abs() <= allowed)).flatten().tolist()
        if wrong:
            first = wrong[0]
            raise CheckError(
                f"replaying {label} over its own states is not a no-op: event {events['event_id'][first]} at boundary "
                f"{self.boundary}, readout {readout}, is off its native margin {native.margin[first]:.6g} by "
                f"{noop[first]:.3g} (allowed {allowed[first]:.2g}); {len(wrong)} of {len(noop)} events are"
            )


@dataclass(frozen=True)
class _Scores:
    logits: torch.Tensor  # [n, 2] float32, of y_pt and y_it
    margin: torch.Tensor  # [n] float32
    top1: torch.Tensor  # [n] int64


def _score(readout: Readout, final_hidden: torch.Tensor, pair_ids: torch.Tensor) -> _Scores:
    logits = readout.scores(final_hidden, pair_ids)
    return _Scores(logits, logits[:, 1] - logits[:, 0], readout.top2(final_hidden)[0][:, 0])


def _cell_table(events: pa.Table, columns: Sequence[dict[str, Any]]) -> pa.Table:
    """One row an event and entry of ``columns``, event by event."""
    carried = [
        name for name in events.column_names if name not in _NOT_CARRIED and not name.startswith(_PER_CHECKPOINT)
    ]
    n_events, n_columns = events.num_rows, len(columns)
    repeated = pa.array(np.repeat(np.arange(n_events), n_columns))
    out: dict[str, pa.Array | pa.ChunkedArray] = {name: events[name].take(repeated) for name in _EVENT_COLUMNS}
    for name, kind in _CELL_FIELDS:
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


_PER_CHECKPOINT = ("gap_", "margin_")
_NOT_CARRIED = {*_EVENT_COLUMNS, "proposed_step", "sequence", "context", "token_pt", "token_it", "segment"}


def _key_of(table: pa.Table) -> dict[str, Any]:
    metadata = (table.schema.metadata or {}).get(b"actcache")
    return json.loads(metadata) if metadata else {}


def _digest(store: Store) -> str:
    return hashlib.sha256(json.dumps(store.fingerprint, sort_keys=True).encode()).hexdigest()


def _listed(boundaries: Sequence[int]) -> str:
    return ", ".join(str(boundary) for boundary in boundaries)
