"""Left out: events that rounding may have made, and events that contradict their own checkpoints; tables in and out.

For whatever averages cells. What is left out is counted and told beside the numbers. Knows tables only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actcache import schema
from actcache.errors import InputError
from actcache.study.contrasts import contrasted, lay_out, readable
from actcache.study.statistics import Ints

_COMMON = schema.common_readout("")
Bools = npt.NDArray[np.bool_]


def select_consistent(
    cells: pa.Table, pair: Sequence[str] | None = None, *, keep: bool = False
) -> tuple[pa.Table, dict[str, Any]]:
    """Leave out the events whose two checkpoints do not choose what the event says that they chose.

    The margins of the two unpatched checkpoints must be ``Y(PT, PT) < 0 < Y(IT, IT)``, each by its own head. A margin
    of 0 is a tie, as bfloat16 logits have them often. Judged are events of kinds whose tokens the pair itself chooses,
    by their plain native cells; in a table without these, by the common readout that is the checkpoint's own. The
    events of a run never contradict their checkpoints: capture leaves such prompts out.

    Args:
        cells: as for :func:`actcache.study.contrasts.contrasts`.
        pair: as there, for a table that does not name the pair of its events.
        keep: whether such events stay, and are counted only.

    Returns:
        The cells of the events that stay; and ``keep_ties``, ``n_ties`` (events with a margin of 0) and
        ``n_wrong_sign`` (other events that contradict).

    Raises:
        InputError: a column is missing or unreadable; no event stays.
    """
    read = readable(cells, pair)
    chosen = pc.is_in(read["kind"].cast(pa.string()), value_set=pa.array(schema.CHOSEN_KINDS))
    plain = pc.and_(pc.equal(read["variant"].cast(pa.string()), schema.PLAIN), pc.equal(read["upstream"], read["late"]))
    ids = read["event_id"].cast(pa.string())
    own = read.append_column("of", ids).filter(pc.and_(chosen, plain))
    native = pc.equal(own["readout"].cast(pa.string()), schema.NATIVE)
    if not pc.any(native).as_py():
        native = pc.equal(own["readout"], pc.binary_join_element_wise(_COMMON, own["late"].cast(pa.string()), ""))
    own = own.filter(native)
    sign = np.zeros(own.num_rows)
    for of_events in pc.unique(own["pair"].drop_null()).to_pylist():
        for label, wanted in zip(contrasted(of_events), (-1.0, 1.0), strict=True):
            rows = pc.and_(pc.equal(own["pair"], of_events), pc.equal(own["late"], label))
            sign[pc.fill_null(rows, False).to_numpy()] = wanted
    margin = own["margin"].to_numpy() * sign
    tied = pc.unique(own["of"].filter(pa.array((margin == 0) & (sign != 0))))
    wrong = pc.unique(own["of"].filter(pa.array(margin < 0)))
    wrong = wrong.filter(pc.invert(pc.is_in(wrong, value_set=tied)))
    notes = {"keep_ties": keep, "n_ties": len(tied), "n_wrong_sign": len(wrong)}
    if keep or not (len(tied) or len(wrong)):
        return cells, notes
    stays = pc.invert(pc.is_in(ids, value_set=pa.concat_arrays([tied, wrong])))
    if not pc.any(stays).as_py():
        lay_out(cells, pair)  # what is wrong with the cells is said first
        raise InputError(
            f"no event is left of {pc.count_distinct(ids).as_py()}: {len(tied)} have a tie and {len(wrong)} the wrong "
            "sign on their own checkpoints' cells; --keep-ties keeps them"
        )
    return cells.filter(stays), notes


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
        cells: as for :func:`actcache.study.contrasts.contrasts`.
        events: one row per event: event_id, and gap_pt and gap_it where ``min_gap`` is given.
        dtype: in which the events were captured.
        stability: rows of :func:`actcache.study.decisions.check_stability`, among them every event of the cells in
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


def _chosen(cells: pa.Table, ids: pa.Array) -> Bools:
    """Of which events the pair chose the tokens: others are of kinds that no rounding decides."""
    of_kinds = cells.filter(pc.is_in(cells["kind"].cast(pa.string()), value_set=pa.array(schema.CHOSEN_KINDS)))
    return pc.is_in(ids, value_set=of_kinds["event_id"].cast(pa.string()).combine_chunks()).to_numpy(False)


def _positions(ids: pa.Array, table: pa.Table) -> Ints:
    """In which row of the table each event is; -1 where in none."""
    known = table["event_id"].cast(pa.string()).combine_chunks()
    return pc.fill_null(pc.index_in(ids, value_set=known), -1).to_numpy().astype(np.int64)
