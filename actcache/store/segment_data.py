"""What a segment holds, checked: sequences, rows of their sites, events and the other tables. Knows no files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from actcache.carried import MAX_KEYS as MAX_CARRIED_KEYS
from actcache.carried import MAX_LEVELS as MAX_CARRIED_LEVELS
from actcache.carried import is_shallow, is_text
from actcache.errors import InputError
from actcache.store.layout import (
    MAX_NAME,
    SEGMENT_COLUMN,
    SITES,
    STATE,
    TABLES,
    TEXT_OFFSETS,
    TEXTS,
    Sites,
    column_type,
    empty_column,
    encode_texts,
    final_path,
    row_path,
    schema_of,
    text_columns,
    to_numpy,
)


@dataclass(frozen=True, eq=False)
class SegmentData:
    """Everything that one segment holds: S sequences of T tokens, E events, N rows of width D per site and block.

    Attributes:
        token_ids: ``[T]`` int32, the sequences' token ids one after another.
        sequence_offsets: ``[S + 1]`` int64, where each sequence begins in ``token_ids``.
        states: ``(label, boundary) -> [N, D]`` in the store's dtype. With ``row_selection`` ``prefix`` row i is the
            state at token i, N = T; with ``divergence`` it is the state at event i, N = E.
        final: ``label -> [E, D]``, the last block's output (before the final norm) at each event's position.
        events: one row per event, at least the columns of ``EVENT_COLUMNS``; ``sequence`` counts within the segment,
            ``pair`` names two labels, ``carried`` is a JSON object, none of whose keys names a column.
        excluded: prompts without an event, at least the columns of ``EXCLUDED_COLUMNS``.
        sequences: one row per sequence, at least the columns of ``SEQUENCE_COLUMNS``. Where None is given, it is what
            the events say of their sequences.
        sites: ``(site, label, block) -> [N, D]``: rows of other sites, as ``states``.

    Raises:
        InputError: a shape, dtype, column or index does not fit the others.
    """

    token_ids: npt.NDArray[np.int32]
    sequence_offsets: npt.NDArray[np.int64]
    states: dict[tuple[str, int], torch.Tensor]
    final: dict[str, torch.Tensor]
    events: pa.Table
    excluded: pa.Table
    sequences: pa.Table = None
    sites: dict[tuple[str, str, int], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.token_ids.dtype != np.int32 or self.token_ids.ndim != 1:
            raise InputError(f"token_ids are {self.token_ids.dtype} {self.token_ids.shape}, expected int32 [T]")
        check_offsets(self.sequence_offsets, len(self.token_ids))
        _check_table(self.events, "events")
        check_events(self.events["sequence"].to_numpy(), self.events["position"].to_numpy(), self.sequence_offsets)
        if self.sequences is None:
            object.__setattr__(self, "sequences", sequences_of(self.events, self.n_sequences))
        _check_table(self.excluded, "excluded")
        _check_table(self.sequences, "sequences")
        if self.sequences.num_rows != self.n_sequences:
            raise InputError(f"the sequences table has {self.sequences.num_rows} rows for {self.n_sequences} sequences")
        for label, rows in self.final.items():
            if len(rows) != self.events.num_rows:
                raise InputError(f"final states of {label}: {len(rows)} rows for {self.events.num_rows} events")

    @property
    def n_sequences(self) -> int:
        """S."""
        return len(self.sequence_offsets) - 1

    @property
    def tables(self) -> dict[str, pa.Table]:
        """By name, in the order of their texts."""
        return {"events": self.events, "excluded": self.excluded, "sequences": self.sequences}

    @property
    def rows(self) -> SiteRows:
        """The rows of all sites."""
        return {(STATE, *key): rows for key, rows in self.states.items()} | self.sites


SiteRows = dict[tuple[str, str, int], torch.Tensor]  # (site, label, block) -> [N, D]


def sites_of(rows: Iterable[tuple[str, str, int]], labels: Iterable[str]) -> Sites:
    """Which blocks some rows are of, by site, in the order given.

    Raises:
        InputError: a site is none, or a block's rows are there of some labels only, or of others.
    """
    keys = list(rows)
    found: Sites = {}
    for site, _, block in keys:
        if site not in SITES:
            raise InputError(f"site {site!r} is none of {', '.join(SITES)}")
        blocks = found.setdefault(site, [])
        if block not in blocks:
            blocks.append(block)
    expected = {(site, label, block) for site, blocks in found.items() for block in blocks for label in labels}
    if set(keys) != expected or len(keys) != len(expected):
        what = "states" if found.keys() == {STATE} else "rows"
        raise InputError(f"{what} of {sorted(keys)}, expected {sorted(expected)}")
    return found


def sequences_of(events: pa.Table, n_sequences: int) -> pa.Table:
    """What events say of their sequences: prompt and carried keys of the first event; nothing where there is none."""
    columns = {"prompt_id": [""] * n_sequences, "carried": ["{}"] * n_sequences}
    places = events["sequence"].to_pylist()
    for name, values in columns.items():
        for sequence, value in zip(reversed(places), reversed(events[name].to_pylist()), strict=True):
            values[sequence] = value
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def _check_table(table: pa.Table, name: str) -> None:
    for column, kind in TABLES[name].items():
        if column not in table.column_names or table.schema.field(column).type != empty_column(kind).type:
            raise InputError(f"the {name} table needs a column {column!r} of type {kind}")
    for column in table.column_names:
        column_type(table, column)
    check_carried(table, name)


def check_offsets(offsets: npt.NDArray[np.int64], total: int) -> None:
    """Raise InputError unless offsets run from 0 to ``total``, never down."""
    if offsets.dtype != np.int64 or offsets.ndim != 1 or len(offsets) == 0:
        raise InputError(f"offsets are {offsets.dtype} {offsets.shape}, expected int64 [n + 1]")
    if offsets[0] != 0 or offsets[-1] != total or (np.diff(offsets) < 0).any():
        raise InputError(f"offsets must run from 0 to {total} and never down")


def check_events(
    sequence: npt.NDArray[np.int64], position: npt.NDArray[np.int64], sequence_offsets: npt.NDArray[np.int64]
) -> None:
    """Raise InputError unless every event lies within its sequence."""
    n_sequences = len(sequence_offsets) - 1
    if ((sequence < 0) | (sequence >= n_sequences)).any():
        raise InputError(f"an event names a sequence outside 0..{n_sequences - 1}")
    if ((position < 0) | (position >= np.diff(sequence_offsets)[sequence])).any():
        raise InputError("an event's position lies outside its sequence")


def check_pairs(events: pa.Table, labels: Iterable[str]) -> None:
    """Raise InputError where the pair of an event names others than two of these checkpoints; it may be empty."""
    known = set(labels)
    for pair in set(events["pair"].to_pylist()):
        names = pair.split(",") if pair else []
        if len(names) > 2 or not known.issuperset(names):
            raise InputError(f"an event's pair is {pair[:MAX_NAME]!r}, expected two of {', '.join(sorted(known))}")


def check_carried(table: pa.Table, name: str) -> None:
    """Raise InputError unless ``carried`` of every row is a JSON object whose keys can be further columns."""
    taken = {*table.column_names, SEGMENT_COLUMN}
    keys: set[str] = set()
    for text in set(table["carried"].to_pylist()):
        try:
            carried = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the {name} table's carried {text[:40]!r} is not JSON: {str(error)[:200]}") from error
        if not isinstance(carried, dict):
            raise InputError(f"the {name} table's carried {text[:40]!r} is not a JSON object")
        if not is_shallow(carried):
            raise InputError(f"the {name} table's carried {text[:40]!r} has more than {MAX_CARRIED_LEVELS} levels")
        keys.update(carried)
        if len(keys) > MAX_CARRIED_KEYS:
            raise InputError(f"the {name} table's carried has more than {MAX_CARRIED_KEYS} distinct keys")
        for key in carried:
            if key in taken or "\0" in key or not is_text(key):
                raise InputError(
                    f"carried key {key!r} cannot be a column of the {name} table: it is one already, or not text"
                )


Content = tuple[str, npt.NDArray[Any], dict[str, Any]]  # path, content and attributes of an array


def arrays_of(segment: SegmentData) -> Iterator[Content]:
    """Every array of a segment."""
    yield "token_ids", segment.token_ids, {}
    yield "sequence_offsets", segment.sequence_offsets, {}
    yield from arrays_of_rows({row_path(*key): rows for key, rows in segment.rows.items()})
    yield from arrays_of_rows({final_path(label): rows for label, rows in segment.final.items()})
    texts: list[pa.ChunkedArray] = []
    for name, table in segment.tables.items():
        schema = schema_of(table)
        texts += [table[column] for column in text_columns(schema)]
        for column, kind in schema.items():
            if kind != "string":
                yield f"{name}/{column}", table[column].to_numpy(), {}
    data, offsets = encode_texts(texts)
    yield TEXTS, data, {}
    yield TEXT_OFFSETS, offsets, {}


def arrays_of_rows(rows: dict[str, torch.Tensor]) -> Iterator[Content]:
    """The arrays that hold rows, by their paths."""
    for path, values in rows.items():
        yield path, to_numpy(values), {"dtype": str(values.dtype).removeprefix("torch.")}
