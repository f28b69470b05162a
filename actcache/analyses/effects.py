"""Contrasts and intervals: turns the table of scored cells into effects, tables in, tables out.

For whoever asks which part of the network makes a divergence, after the cells are scored. Works on any table with the
columns of ``cells.parquet``; knows arrays and pyarrow tables only, no files and no models.

The margins of one event form a 2x2 grid ``Y(U, L)``: upstream state of PT or IT, crossed with late stack of PT or IT.
Here ``pt_it`` always reads upstream PT, late IT. From the four cells:

=====================  ================================  ====================================================
``late_from_pt``       A = Y(PT, IT) - Y(PT, PT)         what IT's late stack adds to PT's state
``late_from_it``       B = Y(IT, IT) - Y(IT, PT)         what it adds to IT's own state
``interaction``        B - A                             the part that needs IT's own state
``late_main``          (A + B) / 2                       what IT's late stack adds on average
``upstream_main``      native_shift - late_main          what IT's state adds on average over both late stacks
``native_shift``       Y(IT, IT) - Y(PT, PT)             how far the diagonal's cells are apart; under the native
                                                         readout these are the two unpatched checkpoints
``portable_share``     mean(A) / mean(B)                 the part of the late effect that PT's state suffices for
``matched_ratio``      mean(B) / mean(A)                 how many times more IT's late stack adds to its own state
``interaction_share``  mean(B - A) / mean(native_shift)  the part of the native shift that is interaction
=====================  ================================  ====================================================

The two shares are the ratios that arXiv 2605.07284 reports (A +0.76, B +2.44: portable share 31.1%; the interaction
+1.68 is 33.7% of the native shift).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actcache import schema
from actcache.errors import InputError
from actcache.study.statistics import (
    DRAWS,
    LEVEL,
    SEED,
    Floats,
    Ints,
    Sample,
    check_draws,
    draw_together,
    ranks,
)

_LARGEST = float(np.finfo(np.float32).max)
"""Margins are float32; no sum or product of so many of them overflows in float64."""

Bools = npt.NDArray[np.bool_]

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
    cells = _readable(cells, pair)
    if cells.num_rows == 0:
        return _contrast_table(cells, np.empty((0, 4)))

    for name in ("pair", "upstream", "late"):  # before a cell without a label is taken for one of another pair
        _check_no_nulls(cells, name)
    cell = _cell_index(cells, pair)
    if not (cell >= 0).any():
        found = {name: sorted(map(str, pc.unique(cells[name]).to_pylist())) for name in ("upstream", "late")}
        labels = pair or contrasted(pc.unique(cells["pair"])[0].as_py())
        raise InputError(
            f"no cell belongs to the pair {labels[0]!r}, {labels[1]!r}: upstream labels are {found['upstream']}, late "
            f"labels {found['late']}; pass two of these labels as the pair"
        )
    cells, cell = cells.filter(pa.array(cell >= 0)), cell[cell >= 0]

    for name in _REQUIRED:
        _check_no_nulls(cells, name)
    _check_finite(cells, "margin")
    margin = cells["margin"].to_numpy()
    codes = [ranks(cells[name]) for name in (*GROUP_COLUMNS, "event_id")]
    order = np.lexsort((cell, *reversed(codes)))
    cells, cell, margin = cells.take(pa.array(order)), cell[order], margin[order]
    starts = _run_starts([code[order] for code in codes])
    row = np.repeat(np.arange(starts.size), np.diff(starts, append=cell.size))
    _check_complete(cells, starts, np.bincount(4 * row + cell, minlength=4 * starts.size).reshape(-1, 4), pair)
    _check_constant(cells, starts)
    return _contrast_table(cells.take(pa.array(starts)), margin.reshape(-1, 4))


def effects(
    cells: pa.Table,
    *,
    pair: Sequence[str] | None = None,
    draws: int = DRAWS,
    seed: int = SEED,
    level: float = LEVEL,
) -> dict[str, Any]:
    """Average the contrasts per group, with percentile bootstrap intervals over prompts.

    Events of one prompt share a text and are not independent, so the bootstrap draws *prompts* with replacement and
    every event of a drawn prompt comes along. All quantities of a group use the same draws, and so do groups with
    equally many prompts: their differences are not blurred by separate noise. Every mean is over events, a prompt
    with more events weighs more; a share is a ratio of such means, in each draw and in the estimate.

    Args:
        cells: as for :func:`contrasts`.
        pair: as there.
        draws: number of bootstrap draws, as :func:`check_draws` allows.
        seed: seed of the draws, not negative.
        level: coverage of the intervals, between 0 and 1 exclusive.

    Returns:
        A dict ready for json: ``draws``, ``seed``, ``level`` and ``groups``. There is one group per (kind, pair,
        boundary, scope, readout, variant), in sorted order. It has these six, the labels ``pt`` and ``it`` that are
        contrasted, ``n_events``, ``n_prompts``, ``cells`` (pt_pt, pt_it, it_pt, it_it) and the quantities of this
        module's table. Where the cells are of more than two checkpoints, ``margins`` follows: the mean margin of every
        cell, by upstream and late label, over the events that have them all. A number is
        ``{"mean", "low", "high"}``, in logits except for the shares. ``low`` and ``high`` are None below
        ``FEWEST_PROMPTS`` prompts, and for a share whose denominator's own interval reaches 0 (the ratio then has
        no bounded interval). A share is None altogether where its denominator is 0 to rounding. ``groups`` is empty
        for a table without rows. The same for any order of the rows.

        Where every cell of a group has them, two more entries follow. ``choices`` gives the shares of events whose
        best token in a cell is y_pt, y_it or another (columns top1_id, y_pt, y_it). ``kl`` gives the mean over events
        of column kl, in nats.

    Raises:
        InputError: as :func:`contrasts`, and the same of ``kl`` and of the margins of other checkpoints; or draws, seed
            or level out of range.
    """
    check_draws(draws, seed, level)
    table = contrasts(cells, pair)
    parts = _groups(table)
    samples = [_sample(events, CELLS, draws, seed, level) for events in parts]
    draw_together(samples)
    groups: list[dict[str, Any]] = []
    for events, sample in zip(parts, samples, strict=True):
        group = {name: events[name][0].as_py() for name in GROUP_COLUMNS}
        labels = dict(zip(schema.ROLES, pair or contrasted(group["pair"]), strict=True))
        groups.append(
            group | labels | {"n_events": sample.n_events, "n_prompts": sample.n_prompts} | _estimates(sample)
        )
    choices, kl = _cell_means(cells, pair)
    margins = _lineup_margins(cells, pair, draws, seed, level)
    for group in groups:
        key = tuple(group[name] for name in GROUP_COLUMNS)
        group.update(
            {name: of[key] for name, of in (("margins", margins), ("choices", choices), ("kl", kl)) if key in of}
        )
    return {"draws": draws, "seed": seed, "level": level, "groups": groups}


def select_events(
    cells: pa.Table,
    events: pa.Table,
    dtype: str,
    *,
    stability: pa.Table | None = None,
    min_gap: float | None = None,
) -> tuple[pa.Table, dict[str, Any]]:
    """Leave out the events that rounding may have made, before their effects are averaged.

    Args:
        cells: as for :func:`contrasts`.
        events: one row per event: event_id, and gap_pt and gap_it where ``min_gap`` is given.
        dtype: in which the events were captured.
        stability: rows of :func:`actcache.analyses.stability.check_stability`, among them every event of the cells in
            ``dtype``. An event stays if its strict and its packed decision are both the stored one. None keeps
            them all.
        min_gap: an event stays if both its gaps are known and at least this, in logits. None keeps them all. The gaps
            are those at the event: a near tie on the way to it does not show in them, but in ``stability``.

    Returns:
        The cells of the events that stay, and what was left out, to be put beside their effects: ``stable_only`` (True)
        and ``n_unstable`` where ``stability`` is given; ``min_gap`` and ``n_below_min_gap`` where that is;
        ``n_left_out``, the events left out for either reason.

    Raises:
        InputError: an event of the cells is not among ``events``, or not checked in ``dtype``; min_gap is negative or
            no number; no event stays.
    """
    if min_gap is not None and not 0 <= min_gap < np.inf:
        raise InputError(f"min_gap is {min_gap}: give a number of logits, from 0 on")
    ids = pc.unique(cells["event_id"].cast(pa.string()))
    left_out = np.zeros(len(ids), bool)
    notes: dict[str, Any] = {}
    reasons = []
    if stability is not None:
        checked = stability.filter(pc.equal(stability["dtype"], dtype))
        at = _positions(ids, checked)
        chosen = _chosen(cells, ids)
        if (at < 0)[chosen].any():
            raise InputError(
                f"{int((at >= 0).sum())} of {chosen.sum()} events have been checked for stability in {dtype}: to leave "
                f"out the others, check all; 'actcache stability RUN --dtype {dtype}' does"
            )
        unstable = np.zeros(len(ids), bool)
        unstable[at >= 0] = ~pc.and_(checked["stable"], checked["as_stored"]).to_numpy()[at[at >= 0]]
        left_out |= unstable
        notes |= {"stable_only": True, "n_unstable": int(unstable.sum())}
        reasons.append(f"{unstable.sum()} unstable in {dtype}")
    if min_gap is not None:
        at = _positions(ids, events)
        if (at < 0).any():
            unknown = ids[int(np.flatnonzero(at < 0)[0])].as_py()
            raise InputError(
                f"event {unknown!r} of the cells is not among the {events.num_rows} events; pass the run's"
            )
        gaps = [events[name].cast(pa.float64()).to_numpy()[at] for name in ("gap_pt", "gap_it")]
        below = ~(np.minimum(*gaps) >= min_gap)  # an unknown gap, NaN here, is not known to be large enough
        left_out |= below
        notes |= {"min_gap": min_gap, "n_below_min_gap": int(below.sum())}
        reasons.append(f"{below.sum()} with a gap below {min_gap:g}")
    if len(ids) and left_out.all():
        raise InputError(
            f"no event is left of {len(ids)}: {', '.join(reasons)}; lower --min-gap, or leave --stable-only out"
        )
    notes["n_left_out"] = int(left_out.sum())
    staying = ids.filter(pa.array(~left_out))
    return cells.filter(pc.is_in(cells["event_id"].cast(pa.string()), value_set=staying)), notes


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


def _chosen(cells: pa.Table, ids: pa.Array) -> Bools:
    """Of which events the pair chose the tokens: others are of kinds that no rounding decides."""
    of_kinds = cells.filter(pc.is_in(cells["kind"].cast(pa.string()), value_set=pa.array(schema.CHOSEN_KINDS)))
    return pc.is_in(ids, value_set=of_kinds["event_id"].cast(pa.string()).combine_chunks()).to_numpy(False)


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


def _check_finite(cells: pa.Table, name: str) -> None:
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


def _positions(ids: pa.Array, table: pa.Table) -> Ints:
    """In which row of the table each event is; -1 where in none."""
    known = table["event_id"].cast(pa.string()).combine_chunks()
    return pc.fill_null(pc.index_in(ids, value_set=known), -1).to_numpy().astype(np.int64)


def contrasted(pair: str) -> tuple[str, str]:
    """The labels of an event's pair, as its column has them."""
    labels = str(pair).split(",")
    if len(labels) != 2 or labels[0] == labels[1]:
        raise InputError(f"a contrast needs two checkpoints, the pair is {pair!r}; pass two different labels")
    return labels[0], labels[1]


def _readable(cells: pa.Table, pair: Sequence[str] | None) -> pa.Table:
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


def _cell_index(cells: pa.Table, pair: Sequence[str] | None) -> Ints:
    """Which of ``CELLS`` each row is: 2 for upstream IT and 1 for late IT, summed; -1 where a label is another's."""
    index = np.full(cells.num_rows, -1, np.int64)
    columns = [cells[name].cast(_TEXT) for name in ("upstream", "late")]
    for of_events in pc.unique(cells["pair"]).to_pylist():
        labels = pa.array(pair or contrasted(of_events))
        at = [pc.fill_null(pc.index_in(column, value_set=labels), -1).to_numpy() for column in columns]
        rows = (at[0] >= 0) & (at[1] >= 0) & pc.equal(cells["pair"], of_events).to_numpy()
        index[rows] = (2 * at[0] + at[1])[rows]
    return index


def _run_starts(codes: list[Ints]) -> Ints:
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


def _contrast_table(events: pa.Table, y: Floats) -> pa.Table:
    """The result of :func:`contrasts` from one row per event and its margins, [rows, 4] in the order of ``CELLS``."""
    table = events.select([name for name in _REQUIRED if name in (*_PLACE, *GROUP_COLUMNS)])
    margins = zip(schema.GRID_MARGINS, y.T, strict=True)
    for column, values in [*margins, *((column, _contrast(column.name, y)) for column in schema.CONTRASTS)]:
        table = table.append_column(column.name, pa.array(values, schema.arrow_type(column.type)))
    return table


def _contrast(name: str, y: Floats) -> Floats:
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


def _cell_means(cells: pa.Table, pair: Sequence[str] | None) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Shares of choices, and mean KL, of the cells of every group in which each cell has them, by the group's key."""
    columns: dict[str, Any] = {}
    if {"top1_id", "y_pt", "y_it"} <= set(cells.column_names):
        best = cells["top1_id"]
        columns |= {name: pc.cast(pc.equal(best, cells[name]), pa.float64()) for name in ("y_pt", "y_it")}
        columns["other"] = pc.subtract(pc.subtract(1.0, columns["y_pt"]), columns["y_it"])
    if "kl" in cells.column_names:
        columns["kl"] = cells["kl"].cast(pa.float64())
    choices: dict[Any, Any] = {}
    kl: dict[Any, Any] = {}
    if not columns or not cells.num_rows:
        return choices, kl
    known_types = _readable(cells, pair)
    keys = [known_types[name] for name in GROUP_COLUMNS]
    of_cell = pa.array(_cell_index(known_types, pair))
    if "kl" in columns:
        _check_finite(known_types.append_column("kl", columns["kl"]).filter(pc.greater_equal(of_cell, 0)), "kl")
    table = pa.table([*keys, of_cell, *columns.values()], [*GROUP_COLUMNS, "cell", *columns])
    # A null in any row makes the mean of that cell null: such a group has no means.
    means = (
        table.filter(pc.greater_equal(of_cell, 0))
        .group_by([*GROUP_COLUMNS, "cell"])
        .aggregate([(name, "mean", pc.ScalarAggregateOptions(skip_nulls=False)) for name in columns])
    )
    for row in means.to_pylist():
        key, name = tuple(row[column] for column in GROUP_COLUMNS), CELLS[row["cell"]]
        if "y_pt" in columns:
            choices.setdefault(key, {})[name] = {share: row[f"{share}_mean"] for share in ("y_pt", "y_it", "other")}
        if "kl" in columns:
            kl.setdefault(key, {})[name] = row["kl_mean"]
    known = {key: of for key, of in choices.items() if all(cell["other"] is not None for cell in of.values())}
    return known, {key: of for key, of in kl.items() if None not in of.values()}


def _lineup_margins(
    cells: pa.Table, pair: Sequence[str] | None, draws: int, seed: int, level: float
) -> dict[Any, dict[str, dict[str, Any]]]:
    """Mean margins by upstream and late label, of every group whose cells are of more than two checkpoints, by its
    key; over the events that have each of these cells once."""
    table = _readable(cells, pair)
    labels = pa.array(sorted({label for name in ("upstream", "late") for label in pc.unique(table[name]).to_pylist()}))
    n_cells = len(labels) ** 2
    if len(labels) < 3:
        return {}
    upstream, late = (pc.index_in(table[name], value_set=labels).to_numpy() for name in ("upstream", "late"))
    cell = len(labels) * upstream.astype(np.int64) + late
    codes = [ranks(table[name]) for name in (*GROUP_COLUMNS, "event_id")]
    order = np.lexsort((cell, *reversed(codes)))
    starts = _run_starts([code[order] for code in codes])
    starts = starts[np.diff(starts, append=cell.size) == n_cells]
    rows = starts[:, None] + np.arange(n_cells)
    rows = rows[(cell[order][rows] == np.arange(n_cells)).all(axis=1)]
    _check_finite(table.take(pa.array(order[rows.ravel()])), "margin")
    margin = table["margin"].to_numpy()[order]
    events = table.take(pa.array(order)).take(pa.array(rows[:, 0]))
    for i, values in enumerate(margin[rows].T):
        events = events.append_column(f"y_{i}", pa.array(values))
    parts = _groups(events)
    names = [str(i) for i in range(n_cells)]
    samples = [_sample(part, names, draws, seed, level) for part in parts]
    draw_together(samples)
    found = {}
    for of_group, sample in zip(parts, samples, strict=True):
        numbers = iter([sample.mean(name) for name in names])
        key = tuple(of_group[name][0].as_py() for name in GROUP_COLUMNS)
        found[key] = {up: {to: next(numbers) for to in labels.to_pylist()} for up in labels.to_pylist()}
    return found


def _groups(table: pa.Table) -> list[pa.Table]:
    """The sorted table of contrasts cut where a group column changes."""
    if table.num_rows == 0:
        return []
    starts = _run_starts([ranks(table[name]) for name in GROUP_COLUMNS])
    ends = np.append(starts[1:], table.num_rows)
    return [table.slice(start, end - start) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


_SHARES = {
    "portable_share": ("late_from_pt", "late_from_it"),
    "interaction_share": ("interaction", "native_shift"),
    "matched_ratio": ("late_from_it", "late_from_pt"),
}


def _sample(events: pa.Table, cells: Sequence[str], draws: int, seed: int, level: float) -> Sample:
    """The margins of some cells, by their names, of one group's events."""
    values = {name: events[f"y_{name}"].to_numpy() for name in cells}
    return Sample.of(events["prompt_id"], values, weights="event", draws=draws, seed=seed, level=level)


def _of_means(name: str) -> Callable[[Mapping[str, Floats]], Floats]:
    """A contrast as a function of the means of the four cells."""
    return lambda means: _contrast(name, np.stack([means[cell] for cell in CELLS], axis=-1))


def _estimates(sample: Sample) -> dict[str, Any]:
    """The quantities of one group."""
    numbers: dict[str, Any] = {"cells": {name: sample.mean(name) for name in CELLS}}
    numbers |= {column.name: sample.number(_of_means(column.name)) for column in schema.CONTRASTS}
    for share, (numerator, denominator) in _SHARES.items():
        numbers[share] = sample.ratio(_of_means(numerator), _of_means(denominator))
    return numbers
