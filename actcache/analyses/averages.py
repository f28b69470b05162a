"""Averages: contrasts of cells per group, with intervals over prompts, tables in, a dict out.

For the analysis effects, and whatever else averages cells. Works on any table with the columns of ``cells.parquet``;
knows no files and no models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actcache import schema
from actcache.study.contrasts import (
    CELLS,
    GROUP_COLUMNS,
    Grids,
    check_finite,
    contrast,
    contrasted,
    groups_of,
    lay_out,
    lay_out_lineup,
    readable,
)
from actcache.study.statistics import (
    DRAWS,
    LEVEL,
    NULL_DRAWS,
    NULL_SEED,
    SEED,
    Floats,
    Ints,
    Sample,
    check_draws,
    check_weights,
    draw_together,
    sign_flip_nulls,
)
from actcache.study.subsets import ALL, Bools, subsets_by

SHARES = {
    "portable_share": ("late_from_pt", "late_from_it"),
    "interaction_share": ("interaction", "native_shift"),
    "matched_ratio": ("late_from_it", "late_from_pt"),
}
"""Ratios of two mean contrasts."""

OfMeans: TypeAlias = Callable[[Mapping[str, Floats]], Floats]
"""A function of means by name, each ``[n]``."""
_CHOICES = ("y_pt", "y_it", "other")
_PAIRED = ("late_from_pt", "late_from_it", "interaction")


def effects(
    cells: pa.Table,
    *,
    pair: Sequence[str] | None = None,
    draws: int = DRAWS,
    seed: int = SEED,
    level: float = LEVEL,
    weights: str | None = None,
    by: Sequence[str] = (),
    paired: bool = False,
    null_draws: int = NULL_DRAWS,
) -> dict[str, Any]:
    """Average the contrasts per group, with percentile bootstrap intervals over prompts.

    Events of one prompt share a text and are not independent, so the bootstrap draws *prompts* with replacement and
    every event of a drawn prompt comes along. All quantities of a group use the same draws, and so do groups with
    equally many prompts: their differences are not blurred by separate noise. A share is a ratio of means, in each
    draw and in the estimate; it is neither clipped nor hidden.

    Args:
        cells: as for :func:`actcache.study.contrasts.contrasts`.
        pair: as there.
        draws: number of bootstrap draws, as :func:`actcache.study.statistics.check_draws` allows.
        seed: seed of the draws, not negative.
        level: coverage of the intervals, between 0 and 1 exclusive.
        weights: ``event``: a mean is over events, a prompt with more events weighs more. ``prompt``: every prompt
            weighs the same. None for ``event``, but ``prompt`` for the kinds of ``schema.SUPPORT_KINDS``.
        by: what further groups are of: ``step`` (0, and at least 1, 3, 5, 10), a column of the cells that is the same
            for all cells of an event, or several; then also their combinations.
        paired: whether a variant is compared with the plain grid, and a kind with first divergences, on the prompts
            that both have.
        null_draws: draws of the label-swap null; 0 for none.

    Returns:
        A dict ready for json: ``draws``, ``seed``, ``level`` and ``groups``. There is one group per (kind, pair,
        boundary, scope, readout, variant), in sorted order, each followed by its subsets. It has these six, the labels
        ``pt`` and ``it`` that are contrasted, ``subset`` (``all``, or such as ``step>=3, category=code``),
        ``share_of_events`` of the whole group, ``weights``, ``n_events``, ``n_prompts``, ``cells`` (pt_pt, pt_it,
        it_pt, it_it), the quantities of this module's table and of contrasts.py, and ``flags``: the shares whose
        numerator and denominator differ in sign. Where the cells are of more than two checkpoints, ``margins`` follows:
        the mean margin of every cell, by upstream and late label, over the events that have them all. A number is
        ``{"mean", "low", "high"}``, in logits except for the shares. ``low`` and ``high`` are None below
        ``FEWEST_PROMPTS`` prompts, and for a share whose denominator's own interval reaches 0 (the ratio then has
        no bounded interval). A share is None altogether where its denominator is 0 to rounding. ``groups`` is empty
        for a table without rows. The same for any order of the rows.

        Where every cell of a group has them, more entries follow. ``choice_rates`` gives the shares of events whose
        best token in a cell is y_pt, y_it or another (columns top1_id, y_pt, y_it), ``choices`` their means alone.
        ``kl`` gives the mean over events of column kl, in nats. A plain group has ``label_swap``: what
        :func:`actcache.study.statistics.sign_flip_null` returns of its interaction, and ``draws`` and ``seed``. A group
        that is paired has ``paired``: ``with`` what, ``n_prompts`` that both have, and ``<quantity>_difference`` and
        ``<quantity>_ratio`` of A, B and their interaction.

        With ``by``, ``empty_subsets`` names those that no event is in.

    Raises:
        InputError: as :func:`actcache.study.contrasts.contrasts`, and the same of ``kl`` and of the margins of other
            checkpoints; draws, seed, level or weights out of range; or a column of ``by`` is not there, differs within
            an event, or has too many values.
    """
    check_draws(draws, seed, level)
    if weights is not None:
        check_weights(weights)
    grids = lay_out(cells, pair)
    subsets = subsets_by(cells, grids, by)
    parts = _parts(grids, subsets, pair, weights)
    how = {"draws": draws, "seed": seed, "level": level}
    samples = [_sample(grids, part, how) for part in parts]
    rates = _choice_rates(cells, grids, pair)
    of_cells = [_cell_sample(grids, part, rates, how) for part in parts]
    draw_together([*samples, *(one for one in of_cells if one is not None)])
    margins = _lineup_margins(cells, pair, weights, how)
    at = {tuple(part.names.values()): number for number, part in enumerate(parts)}
    groups = []
    for part, sample, of_cell in zip(parts, samples, of_cells, strict=True):
        group = part.names | {"share_of_events": part.share, "weights": part.weights}
        group |= {"n_events": sample.n_events, "n_prompts": sample.n_prompts} | estimates(sample)
        key = tuple(part.names[name] for name in GROUP_COLUMNS)
        if part.is_whole and key in margins:
            group["margins"] = margins[key]
        group |= {} if of_cell is None else _of_cells(of_cell, rates)
        reference = _reference(part.names) if paired and part.is_whole else None
        if reference is not None and (other := at.get(tuple(reference[1].values()))) is not None:
            group["paired"] = {"with": reference[0]} | _compared(grids, part, parts[other], how)
        groups.append(group)
    _add_nulls(groups, samples, null_draws)
    empty = [name for name, mask in subsets if not mask.any()]
    return how | ({"empty_subsets": empty} if by else {}) | {"groups": groups}


@dataclass(frozen=True)
class _Part:
    """The events of one group or of a subset of it.

    Attributes:
        names: group columns, labels of the pair, and ``subset``.
        at: numbers of the events in the grids.
        share: of the group's events.
        weights: ``event`` or ``prompt``.
    """

    names: dict[str, Any]
    at: Ints
    share: float
    weights: str

    @property
    def is_whole(self) -> bool:
        return bool(self.names["subset"] == ALL)


def _parts(
    grids: Grids, subsets: Sequence[tuple[str, Bools]], pair: Sequence[str] | None, weights: str | None
) -> list[_Part]:
    parts = []
    for of_group in groups_of(grids.events):
        names = {name: grids.events[name][of_group.start].as_py() for name in GROUP_COLUMNS}
        names |= dict(zip(schema.ROLES, pair or contrasted(names["pair"]), strict=True))
        weighed = weights or ("prompt" if names["kind"] in schema.SUPPORT_KINDS else "event")
        whole = np.arange(of_group.start, of_group.stop)
        parts.append(_Part(names | {"subset": ALL}, whole, 1.0, weighed))
        for subset, mask in subsets:
            if (at := whole[mask[of_group]]).size:
                parts.append(_Part(names | {"subset": subset}, at, at.size / whole.size, weighed))
    return parts


def _sample(grids: Grids, part: _Part, how: Mapping[str, Any]) -> Sample:
    """The margins of the four cells, by their names."""
    values = dict(zip(CELLS, grids.margins[part.at].T, strict=True))
    return Sample.of(_prompts(grids, part), values, weights=part.weights, **how)


def _prompts(grids: Grids, part: _Part) -> pa.ChunkedArray:
    return grids.events["prompt_id"].take(pa.array(part.at))


def mean_of(name: str, prefix: str = "") -> OfMeans:
    """A contrast as a function of the means of the four cells."""
    return lambda means: contrast(name, np.stack([means[prefix + cell] for cell in CELLS], axis=-1))


def estimates(sample: Sample) -> dict[str, Any]:
    """The quantities of one group, whose sample has the margins of ``CELLS``: these, contrasts, shares, ``flags``."""
    numbers: dict[str, Any] = {"cells": {name: sample.mean(name) for name in CELLS}}
    numbers |= {column.name: sample.number(mean_of(column.name)) for column in schema.CONTRASTS}
    of_shares = {share: (mean_of(above), mean_of(below)) for share, (above, below) in SHARES.items()}
    numbers |= {share: sample.ratio(*of_share) for share, of_share in of_shares.items()}
    return numbers | {"flags": [share for share, of_share in of_shares.items() if sample.opposed(*of_share)]}


def _choice_rates(cells: pa.Table, grids: Grids, pair: Sequence[str] | None) -> dict[str, Floats]:
    """Of each cell whether its best token is y_pt, y_it or another, and its KL: ``[E, 4]`` by name, NaN where it is
    not known."""
    columns: dict[str, Any] = {}
    if {"top1_id", "y_pt", "y_it"} <= set(cells.column_names):
        best = cells["top1_id"]
        columns |= {name: pc.cast(pc.equal(best, cells[name]), pa.float64()) for name in ("y_pt", "y_it")}
        columns["other"] = pc.subtract(pc.subtract(1.0, columns["y_pt"]), columns["y_it"])
    if "kl" in cells.column_names:
        columns["kl"] = cells["kl"].cast(pa.float64())
        known = readable(cells, pair).append_column("kl", columns["kl"])
        check_finite(known.take(pa.array(grids.rows.ravel())), "kl")
    return {name: pc.fill_null(column, np.nan).to_numpy()[grids.rows] for name, column in columns.items()}


def _cell_sample(grids: Grids, part: _Part, rates: Mapping[str, Floats], how: Mapping[str, Any]) -> Sample | None:
    """What is known of every cell of the part, by ``cell.name``; None without any."""
    known = {name: of[part.at] for name, of in rates.items() if not np.isnan(of[part.at]).any()}
    if not known:
        return None
    values = {f"{cell}.{name}": of[:, i] for name, of in known.items() for i, cell in enumerate(CELLS)}
    return Sample.of(_prompts(grids, part), values, weights=part.weights, **how)


def _of_cells(sample: Sample, rates: Mapping[str, Floats]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if sample.has(f"{CELLS[0]}.y_pt"):
        of_cell = {cell: {name: sample.mean(f"{cell}.{name}") for name in _CHOICES} for cell in CELLS}
        found["choices"] = {cell: {name: one["mean"] for name, one in of.items()} for cell, of in of_cell.items()}
        found["choice_rates"] = of_cell
    if sample.has(f"{CELLS[0]}.kl"):
        found["kl"] = {cell: sample.mean(f"{cell}.kl")["mean"] for cell in CELLS}
    return found


def _reference(names: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """What a group is compared with, and the names of its group; None for what others are compared with."""
    if names["variant"] != schema.PLAIN:
        return f"variant {schema.PLAIN}", names | {"variant": schema.PLAIN}
    first = schema.FIRST_DIVERGENCE
    return None if names["kind"] == first else (f"kind {first}", names | {"kind": first})


def _compared(grids: Grids, part: _Part, other: _Part, how: Mapping[str, Any]) -> dict[str, Any]:
    """Differences and ratios of two parts on the prompts that both have, each prompt with its events of each side."""
    sides = {
        side: (_prompts(grids, one), dict(zip(CELLS, grids.margins[one.at].T, strict=True)))
        for side, one in (("this", part), ("other", other))
    }
    sample = Sample.paired(sides, weights=part.weights, **how)
    found: dict[str, Any] = {"n_prompts": sample.n_prompts}
    for name in _PAIRED:
        ours, theirs = mean_of(name, "this."), mean_of(name, "other.")
        found[f"{name}_difference"] = sample.number(_difference(ours, theirs))
        found[f"{name}_ratio"] = sample.ratio(ours, theirs)
    return found


def _difference(one: OfMeans, other: OfMeans) -> OfMeans:
    return lambda means: one(means) - other(means)


def _add_nulls(groups: Sequence[dict[str, Any]], samples: Sequence[Sample], draws: int) -> None:
    """Give each whole plain group its label-swap null."""
    if draws < 1:
        return
    plain = [at for at, group in enumerate(groups) if (group["variant"], group["subset"]) == (schema.PLAIN, ALL)]
    of_prompts = [
        contrast("interaction", np.stack([samples[at].of_prompts(cell) for cell in CELLS], axis=-1)) for at in plain
    ]
    for at, null in zip(plain, sign_flip_nulls(of_prompts, draws, NULL_SEED), strict=True):
        groups[at]["label_swap"] = null | {"draws": draws, "seed": NULL_SEED}


def _lineup_margins(
    cells: pa.Table, pair: Sequence[str] | None, weights: str | None, how: Mapping[str, Any]
) -> dict[Any, dict[str, dict[str, Any]]]:
    """Mean margins by upstream and late label, of every group whose cells are of more than two checkpoints, by its
    key; over the events that have each of these cells once."""
    table = readable(cells, pair)
    labels = sorted({label for name in ("upstream", "late") for label in pc.unique(table[name]).to_pylist()})
    if len(labels) < 3:
        return {}
    whole = lay_out_lineup(cells, labels, pair)
    parts = _parts(whole, (), pair, weights)
    names = [str(number) for number in range(len(labels) ** 2)]
    samples = [
        Sample.of(
            _prompts(whole, part), dict(zip(names, whole.margins[part.at].T, strict=True)), weights=part.weights, **how
        )
        for part in parts
    ]
    draw_together(samples)
    found = {}
    for part, sample in zip(parts, samples, strict=True):
        numbers = iter([sample.mean(name) for name in names])
        key = tuple(part.names[name] for name in GROUP_COLUMNS)
        found[key] = {up: {to: next(numbers) for to in labels} for up in labels}
    return found
