"""Contrasts: lays the four cells of each event side by side, tables in, tables out.

For whatever asks how cells differ, after they are scored. Works on any table with the columns of ``cells.parquet``;
knows arrays and pyarrow tables only, no files and no models.

The margins of one event form a 2x2 grid ``Y(U, L)``: upstream state of PT or IT, crossed with late stack of PT or IT.
Here ``pt_it`` always reads upstream PT, late IT. From the four cells:

==================  ================================  ====================================================
``late_from_pt``    A = Y(PT, IT) - Y(PT, PT)         what IT's late stack adds to PT's state
``late_from_it``    B = Y(IT, IT) - Y(IT, PT)         what it adds to IT's own state
``interaction``     B - A                             the part that needs IT's own state
``late_main``       (A + B) / 2                       what IT's late stack adds on average
``upstream_main``   native_shift - late_main          what IT's state adds on average over both late stacks
``native_shift``    Y(IT, IT) - Y(PT, PT)             how far the diagonal's cells are apart; under the native readout
                                                      these are the two unpatched checkpoints
==================  ================================  ====================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actcache import schema
from actcache.errors import InputError
from actcache.study.statistics import Floats, Ints, ranks

_LARGEST = float(np.finfo(np.float32).max)
"""Margins are float32; no sum or product of so many of them overflows in float64."""

GROUP_COLUMNS = schema.names(schema.EFFECT_KEY)
"""The columns whose values, taken together, name one group of events that may be averaged."""

CELLS = schema.GRID
"""The four cells in table order: upstream first, late second."""

_TEXT, _WHOLE, _REAL = pa.string(), pa.int64(), pa.float64()
# What is read, as which type (whole numbers are names, too). Other tools write the same values as dictionaries, large
# strings, decimals, halves.
_READ_AS = {"string": _TEXT, "int32": _WHOLE, "int64": _WHOLE, "float32": _REAL}
_PLACE = ("event_id", "prompt_id", "step")  # what beside a group's columns names an event
_REQUIRED = {
    column.name: _READ_AS[column.type]
    for column in schema.CELLS
    if column.name in {*_PLACE, *GROUP_COLUMNS, "upstream", "late", "margin"}
}
_NAMES = [name for name in _REQUIRED if name in (*_PLACE, *GROUP_COLUMNS)]


class Grids(NamedTuple):
    """The four cells of each event side by side.

    Attributes:
        events: one row per event and group: event_id, prompt_id, kind, pair, step, boundary, scope, readout, variant
            (text, or int64 for whole numbers). Sorted by the group columns, then event_id.
        rows: ``[E, 4]``, in which row of the cells each of the four is, in the order of ``CELLS``.
        margins: ``[E, 4]``, in logits.
    """

    events: pa.Table
    rows: Ints
    margins: Floats


def lay_out(cells: pa.Table, pair: Sequence[str] | None = None) -> Grids:
    """Lay the four cells of each event side by side; arguments and errors as :func:`contrasts`."""
    read = readable(cells, pair)
    if read.num_rows == 0:
        return Grids(read.select(_NAMES), np.empty((0, 4), np.int64), np.empty((0, 4)))
    for name in ("pair", "upstream", "late"):  # before a cell without a label is taken for one of another pair
        _check_no_nulls(read, name)
    cell = cell_index(read, pair)
    if not (cell >= 0).any():
        found = {name: sorted(map(str, pc.unique(read[name]).to_pylist())) for name in ("upstream", "late")}
        labels = pair or contrasted(pc.unique(read["pair"])[0].as_py())
        raise InputError(
            f"no cell belongs to the pair {labels[0]!r}, {labels[1]!r}: upstream labels are {found['upstream']}, late "
            f"labels {found['late']}; pass two of these labels as the pair"
        )
    row = np.flatnonzero(cell >= 0)
    read, cell = read.take(pa.array(row)), cell[row]

    for name in _REQUIRED:
        _check_no_nulls(read, name)
    check_finite(read, "margin")
    margin = read["margin"].to_numpy()
    codes = [ranks(read[name]) for name in (*GROUP_COLUMNS, "event_id")]
    order = np.lexsort((cell, *reversed(codes)))
    read, cell = read.take(pa.array(order)), cell[order]
    starts = run_starts([code[order] for code in codes])
    event = np.repeat(np.arange(starts.size), np.diff(starts, append=cell.size))
    _check_complete(read, starts, np.bincount(4 * event + cell, minlength=4 * starts.size).reshape(-1, 4), pair)
    _check_constant(read, starts)
    at_starts = read.take(pa.array(starts)).select(_NAMES)
    return Grids(at_starts, row[order].reshape(-1, 4), margin[order].reshape(-1, 4))


def lay_out_lineup(cells: pa.Table, labels: Sequence[str], pair: Sequence[str] | None = None) -> Grids:
    """Lay the cells of K checkpoints side by side, of the events of a group that have each of them once.

    Args:
        cells: as for :func:`contrasts`.
        labels: of the checkpoints, every label of the cells among them.
        pair: as there.

    Returns:
        As :func:`lay_out`, with ``rows`` and ``margins`` ``[E, K * K]``: upstream before late, in the order of the
        labels.

    Raises:
        InputError: a column is missing or of other values; a margin is not finite.
    """
    read = readable(cells, pair)
    value_set = pa.array(labels, pa.string())
    upstream, late = (
        pc.index_in(read[name].cast(pa.string()), value_set=value_set).to_numpy() for name in ("upstream", "late")
    )
    n_cells = len(labels) ** 2
    cell = len(labels) * upstream.astype(np.int64) + late
    codes = [ranks(read[name]) for name in (*GROUP_COLUMNS, "event_id")]
    order = np.lexsort((cell, *reversed(codes)))
    starts = run_starts([code[order] for code in codes])
    starts = starts[np.diff(starts, append=cell.size) == n_cells]
    rows = starts[:, None] + np.arange(n_cells)
    rows = order[rows[(cell[order][rows] == np.arange(n_cells)).all(axis=1)]]
    check_finite(read.take(pa.array(rows.ravel())), "margin")
    return Grids(read.take(pa.array(rows[:, 0])).select(_NAMES), rows, read["margin"].to_numpy()[rows])


def contrasts(cells: pa.Table, pair: Sequence[str] | None = None) -> pa.Table:
    """Lay the four cells of each event side by side, with their differences.

    Args:
        cells: one row per cell, columns as in ``cells.parquet``, of any Arrow type that holds the same values; rows in
            any order. Rows whose upstream or late label is not of the pair (a lineup of more than two checkpoints) are
            left out.
        pair: labels of the checkpoints that stand for PT and for IT. None for each event's own, which its column
            ``pair`` names; those of a table without it are ``pt`` and ``it``.

    Returns:
        One row per event and group: event_id, prompt_id, kind, pair, step, boundary, scope, readout, variant (text, or
        int64 for whole numbers), then float64 logits y_pt_pt, y_pt_it, y_it_pt, y_it_it (``Y(U, L)``), late_from_pt,
        late_from_it, interaction, late_main, upstream_main, native_shift. Sorted by the group columns, then event_id:
        the result does not depend on the order of the rows given. No rows in, no rows out.

    Raises:
        InputError: a column is missing, there twice, of other values or has nulls; the pair is not two labels, or none
            of the rows has them; a margin is NaN, infinite or larger than float32 holds; a cell of an event is missing
            or there twice; the cells of an event disagree on its prompt or step.
    """
    grids = lay_out(cells, pair)
    table = grids.events
    margins = zip(schema.GRID_MARGINS, grids.margins.T, strict=True)
    of_margins = ((column, contrast(column.name, grids.margins)) for column in schema.CONTRASTS)
    for column, values in [*margins, *of_margins]:
        table = table.append_column(column.name, pa.array(values, schema.arrow_type(column.type)))
    return table


def groups_of(events: pa.Table) -> list[slice]:
    """Where a sorted table of events is cut: one slice per group."""
    if events.num_rows == 0:
        return []
    starts = run_starts([ranks(events[name]) for name in GROUP_COLUMNS])
    ends = np.append(starts[1:], events.num_rows)
    return [slice(start, end) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def read_by(cells: pa.Table, readout: str, labels: Sequence[str]) -> pa.Array:
    """Which cells are scored by a readout, of those that it names: ``common_it`` is that of each event's own pair.

    Args:
        cells: as for :func:`contrasts`.
        readout: ``native``, ``common_<label>``, or ``common_pt`` and ``common_it`` where no checkpoint is called so.
        labels: of the checkpoints.
    """
    pairs = (
        cells["pair"]
        if "pair" in cells.column_names
        else pa.chunked_array([pa.repeat(",".join(schema.ROLES), cells.num_rows)])
    )
    chosen = np.zeros(cells.num_rows, bool)
    for pair in pc.unique(pairs).to_pylist():
        (of_pair,) = schema.readouts_of((readout,), labels, contrasted(pair))
        chosen |= pc.and_(pc.equal(pairs, pair), pc.equal(cells["readout"], of_pair)).to_numpy()
    return pa.array(chosen)


def contrasted(pair: str) -> tuple[str, str]:
    """The labels of an event's pair, as its column has them."""
    labels = str(pair).split(",")
    if len(labels) != 2 or labels[0] == labels[1]:
        raise InputError(f"a contrast needs two checkpoints, the pair is {pair!r}; pass two different labels")
    return labels[0], labels[1]


def readable(cells: pa.Table, pair: Sequence[str] | None) -> pa.Table:
    """The columns that are read, as the types that they are read as."""
    if pair is not None and (len(pair) != 2 or pair[0] == pair[1]):
        raise InputError(f"a contrast needs two checkpoints, the pair is {', '.join(pair)}; pass two different labels")
    if "pair" not in cells.column_names:  # of an earlier version, or another tool's
        own = pa.nulls(cells.num_rows, _TEXT)
        cells = cells.append_column("pair", pc.fill_null(own, ",".join(pair or schema.ROLES)))
    missing = [name for name in _REQUIRED if name not in cells.column_names]
    if missing:
        raise InputError(f"the table of cells has no column {', '.join(missing)}; its columns: {cells.column_names}")
    return pa.table({name: _as_type(cells, name, kind) for name, kind in _REQUIRED.items()})


def cell_index(cells: pa.Table, pair: Sequence[str] | None) -> Ints:
    """Which of ``CELLS`` each row is: 2 for upstream IT and 1 for late IT, summed; -1 where a label is another's."""
    index = np.full(cells.num_rows, -1, np.int64)
    columns = [cells[name].cast(_TEXT) for name in ("upstream", "late")]
    for of_events in pc.unique(cells["pair"]).to_pylist():
        labels = pa.array(pair or contrasted(of_events))
        at = [pc.fill_null(pc.index_in(column, value_set=labels), -1).to_numpy() for column in columns]
        rows = (at[0] >= 0) & (at[1] >= 0) & pc.equal(cells["pair"], of_events).to_numpy()
        index[rows] = (2 * at[0] + at[1])[rows]
    return index


def run_starts(codes: list[Ints]) -> Ints:
    """First index of every run of equal tuples (one entry of each array); none for empty arrays."""
    changed = np.zeros(codes[0].size, bool)
    changed[:1] = True
    for code in codes:
        changed[1:] |= code[1:] != code[:-1]
    return np.flatnonzero(changed)


def _describe(cells: pa.Table, index: int) -> str:
    group = ", ".join(f"{name} {cells[name][index].as_py()}" for name in GROUP_COLUMNS)
    return f"event {cells['event_id'][index].as_py()!r} ({group})"


def _cell_name(cells: pa.Table, index: int, cell: int, pair: Sequence[str] | None) -> str:
    labels = pair or contrasted(cells["pair"][index].as_py())
    return f"upstream {labels[cell // 2]}, late {labels[cell % 2]}"


def _check_complete(cells: pa.Table, starts: Ints, tally: Ints, pair: Sequence[str] | None) -> None:
    wrong = np.flatnonzero((tally != 1).any(axis=1))
    if wrong.size == 0:
        return
    counts, at = tally[wrong[0]], int(starts[wrong[0]])
    event, called = _describe(cells, at), [_cell_name(cells, at, i, pair) for i in range(4)]
    lacking = "; ".join(called[i] for i in range(4) if counts[i] == 0)
    repeated = "; ".join(f"{called[i]} ({counts[i]} times)" for i in range(4) if counts[i] > 1)
    found = " and ".join(
        part for part in (lacking and f"lacks the cell {lacking}", repeated and f"repeats the cell {repeated}") if part
    )
    more = f" ({wrong.size - 1} more like it)" if wrong.size > 1 else ""
    raise InputError(
        f"{event} {found}{more}: a contrast needs each of the four cells once; complete the grid, or filter the table"
    )


def _check_constant(cells: pa.Table, starts: Ints) -> None:
    for name in ("prompt_id", "step"):
        found = ranks(cells[name]).reshape(-1, 4)
        wrong = np.flatnonzero((found != found[:, :1]).any(axis=1))
        if wrong.size:
            at = int(starts[wrong[0]])
            values = sorted({str(value) for value in cells[name].slice(at, 4).to_pylist()})
            raise InputError(f"{_describe(cells, at)} has cells with different {name} {values}: expected one; rescore")


def contrast(name: str, y: Floats) -> Floats:
    """One of ``schema.CONTRASTS`` from margins ``[..., 4]`` in the order of ``CELLS``."""
    pt_pt, pt_it, it_pt, it_it = (y[..., i] for i in range(4))
    found: Floats = {
        "late_from_pt": pt_it - pt_pt,
        "late_from_it": it_it - it_pt,
        "interaction": (it_it - it_pt) - (pt_it - pt_pt),
        "late_main": ((it_it - it_pt) + (pt_it - pt_pt)) / 2,
        "upstream_main": ((it_pt - pt_pt) + (it_it - pt_it)) / 2,
        "native_shift": it_it - pt_pt,
    }[name]
    return found


def _as_type(cells: pa.Table, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    """A column of the cells as the type that its values are read as."""
    if cells.column_names.count(name) > 1:
        raise InputError(f"the table of cells has {cells.column_names.count(name)} columns {name}; expected one")
    column, given = cells[name], cells.schema.field(name).type
    if pa.types.is_dictionary(given):
        column = column.cast(given.value_type)
    number = any(of(column.type) for of in (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal))
    if kind == _TEXT and pa.types.is_integer(column.type):
        kind = _WHOLE  # as which they sort
    try:
        if kind == _REAL and not (number or pa.types.is_null(given)):
            raise pa.ArrowInvalid("not numbers")
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(
            f"column {name} of the cells is {given}, which cannot be read as {kind} ({str(error).splitlines()[0]}); "
            f"write it as {kind}"
        ) from error


def _check_no_nulls(cells: pa.Table, name: str) -> None:
    if cells[name].null_count:
        raise InputError(f"column {name} of the cells has {cells[name].null_count} nulls; every cell needs a value")


def check_finite(cells: pa.Table, name: str) -> None:
    """Raise InputError for a number in a column whose sums could not be told from infinity; nulls are none."""
    values = cells[name].to_numpy()
    wrong = ~(np.abs(values) <= _LARGEST) & cells[name].is_valid().to_numpy()
    if wrong.any():
        bad = int(np.flatnonzero(wrong)[0])
        variants = sorted(map(str, pc.unique(cells["variant"].filter(pa.array(wrong))).to_pylist()))
        upstream, late = (cells[label][bad].as_py() for label in ("upstream", "late"))
        raise InputError(
            f"{_describe(cells, bad)} has {name} {values[bad]} in the cell upstream {upstream}, late {late}; "
            f"{int(wrong.sum())} of {wrong.size} values of {name} are not finite in float32, of variants "
            f"{', '.join(variants)}: filter them out; in a run, move the files of cells that hold them away and give "
            "'actcache grid RUN' again, which scores the rest"
        )
