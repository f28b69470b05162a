"""Across: what several families of checkpoints show together, each of the same weight.

A family is a run, or a table of cells. Its means weigh its prompts the same; the *balanced* mean weighs families the
same. Shares are ratios of balanced means, not means of the families' shares. Two rules give the interval of a balanced
mean. ``reported`` (the default, that of arXiv 2605.07284): each family's own interval stands for a normal distribution,
and the balanced mean's follows from these. ``drawn``: each draw takes the prompts of every family anew, independently,
and averages the families. A share has no interval of its own in the former, and has that of the draws in both.

Beside the balanced mean stand the lowest, the highest and the median family, the mean without these two, and the mean
without each one. Knows runs and tables; loads no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actcache import schema
from actcache.analyses import ANALYSES
from actcache.analyses.averages import SHARES, estimates, mean_of
from actcache.errors import InputError
from actcache.sealed import Sealed
from actcache.study.analysis import option
from actcache.study.contrasts import CELLS, GROUP_COLUMNS, Grids, contrast, contrasted, lay_out
from actcache.study.families import balanced, balanced_draws, leave_one_out, trimmed_mean
from actcache.study.left_out import select_consistent
from actcache.study.run import Run, read_run_cells
from actcache.study.statistics import (
    CAUTION_PROMPTS,
    DRAWS,
    NULL_DRAWS,
    NULL_SEED,
    SEED,
    Number,
    Sample,
    check_draws,
    check_weights,
    number,
    ratio,
    sign_flip_null,
)
from actcache.study.subsets import ALL, Bools, subsets_by

VERSION = 1
RULES = ("reported", "drawn")
MAIN = "0.6"

_QUANTITIES = (*schema.names(schema.CONTRASTS), *SHARES)
_TERMINAL = 3  # boundaries that are no further from the end are called by their distance from it
_BINS = 20  # others by their depth, to one in so many


@dataclass(frozen=True)
class AcrossOptions:
    """What to put together, and how."""

    boundary: str = option(
        MAIN, "boundary of every family: a fraction of its depth, -3 (from its end), or a number (default %(default)s)"
    )
    scope: str = option("prefix", "scope of the cells: prefix or position (default %(default)s)")
    readout: str | None = option(
        None, "readout of the cells: native, common_pt, common_it or common_LABEL (default: common_it, else native)"
    )
    pair: str | None = option(None, "pair of the events, where a run has those of several: A,B")
    rule: str = option(
        RULES[0],
        "rule of intervals: reported (from the families' own) or drawn (from draws of all) (default %(default)s)",
    )
    weights: str = option("prompt", "which of prompt and event weigh the same in a family (default %(default)s)")
    keep_ties: bool = option(
        False, "keep the events that their own checkpoints contradict by a tie or the wrong sign, as the study does"
    )
    null: int = option(NULL_DRAWS, "draws of the label-swap null; 0 for none (default %(default)s)", type=int)
    draws: int = option(DRAWS, "bootstrap draws over prompts (default %(default)s)", type=int)
    seed: int = option(SEED, "seed of the bootstrap (default %(default)s)", type=int)


@dataclass(frozen=True)
class Family:
    """One of several: its cells, and what is known of its checkpoints.

    Attributes:
        name: what it is called.
        source: where its cells are.
        cells: one row per cell, and a seal that names them.
        n_blocks: of its checkpoints; None where a table of cells does not say.
        pairs: of its events, each two labels in the roles pt and it.
        weights: label -> digest of its weights; empty where that is not known.
        answers: what the files of its other analyses hold, by name.
    """

    name: str
    source: str
    cells: Sealed
    n_blocks: int | None = None
    pairs: Sequence[tuple[str, ...]] = ()
    weights: Mapping[str, str] = field(default_factory=dict)
    answers: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of_run(cls, name: str, path: str | Path) -> Family:
        """The run in a folder, with what its analyses found of the cells that it has.

        Raises:
            InputError, IncompatibleError, CorruptFileError: see :func:`actcache.study.run.read_run_cells`.
        """
        run = Run(path)
        fingerprint = run.store.fingerprint
        answers: dict[str, dict[str, Any]] = {}
        for named in ANALYSES:
            if not named.of_cells and (run.path / f"{named.name}.json").is_file():
                found = named.load().read(run.folder, run.store)
                answers |= {named.name: found} if found and found["groups"] else {}
        weights = {label: one.weights for label, one in fingerprint.checkpoints.items() if one.weights}
        cells = read_run_cells(run.folder, run.store)
        return cls(name, str(path), cells, fingerprint.n_blocks, fingerprint.event_pairs, weights, answers)

    @classmethod
    def of_table(cls, name: str, path: str | Path, cells: Sealed) -> Family:
        """A table of cells."""
        pairs = [",".join(schema.ROLES)]
        if "pair" in cells.content.column_names:
            pairs = [str(pair) for pair in pc.unique(cells.content["pair"]).to_pylist()]
        return cls(name, str(path), cells, pairs=[contrasted(pair) for pair in pairs])


def across(
    families: Sequence[Family],
    options: AcrossOptions | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Put families together.

    Args:
        families: at least two, under different names.
        options: see there.
        say: told, in one line, what a person should know.

    Returns:
        A dict ready for JSON: ``analysis``, ``version``, ``options``; ``families``, each with ``name``, ``source``,
        ``pt``, ``it``, ``boundary``, ``n_blocks``, ``readout``, what was left out, and ``groups`` as those of
        effects.json, per kind and subset; ``groups``, the balanced ones, with the same quantities, ``families`` (their
        names), ``spread`` (``min``, ``max``, ``median``, ``trimmed_mean`` and ``leave_one_out`` of each quantity),
        ``flags`` and ``label_swap``; and ``analyses``: by name, groups that at least two runs share.

    Raises:
        InputError: a family is given twice, or fewer than two are; they lack a common readout, scope or kind; their
            boundaries do not match in depth; or an option is none.
    """
    options = options or AcrossOptions()
    _check(options)
    _check_distinct(families, options, say)
    readout = _readout(families, options)
    chosen = [_chosen(family, options, readout) for family in families]
    _check_depths(families, [one.boundary for one in chosen], say)
    kinds = [set(one.grids.events["kind"].to_pylist()) for one in chosen]
    shared = sorted(kind for kind in set().union(*kinds) if sum(kind in of for of in kinds) > 1)
    if not shared:
        raise InputError(f"no kind of events is in two of the families; they have {'; '.join(map(_listed, kinds))}")
    groups = [group for kind in shared for group in _groups(families, chosen, kind, options)]
    _say_cautions(families, chosen, say)
    return {
        "analysis": "across",
        "version": VERSION,
        "options": asdict(options),
        "families": [
            {
                **{"name": family.name, "source": family.source},
                **dict(zip(schema.ROLES, one.pair, strict=True)),
                **{"boundary": one.boundary, "n_blocks": family.n_blocks, "readout": one.readout},
                **one.notes,
                "groups": [part.group for part in one.parts if part.group["kind"] in shared],
            }
            for family, one in zip(families, chosen, strict=True)
        ],
        "groups": groups,
        "analyses": _shared_analyses(families, chosen),
    }


def _check(options: AcrossOptions) -> None:
    check_draws(options.draws, options.seed)
    check_weights(options.weights)
    if options.rule not in RULES:
        raise InputError(f"rule {options.rule!r} is unknown; choose {' or '.join(RULES)}")
    if options.null < 0:
        raise InputError(f"{options.null} draws of the null: give 0 for none, or more")


def _check_distinct(families: Sequence[Family], options: AcrossOptions, say: Callable[[str], None]) -> None:
    if len(families) < 2:
        raise InputError(f"{len(families)} of families: give at least two runs or tables of cells")
    for at, one in enumerate(families):
        for other in families[:at]:
            if one.name == other.name:
                raise InputError(
                    f"two families are called {one.name!r}, {other.source} and {one.source}: name them, NAME=RUN"
                )
            own, others = (
                {family.weights[label] for label in _pair(family, options) if label in family.weights}
                for family in (one, other)
            )
            if one.cells.seal == other.cells.seal or (own and own == others):
                raise InputError(
                    f"{other.name} and {one.name} are one family, of the same checkpoints: give it once, so that it "
                    "counts once"
                )
            if own & others:
                say(f"{other.name} and {one.name} share a checkpoint: they are not independent, and count twice")


def _readout(families: Sequence[Family], options: AcrossOptions) -> str:
    """The readout of all, where a role's name stands for a label."""
    wanted = [options.readout] if options.readout else [schema.common_readout(schema.IT), schema.NATIVE]
    for family in families:
        if not family.cells.content.num_rows:
            raise InputError(f"{family.name} has no event, so that nothing of it can be averaged: leave it out")
    found = [set(pc.unique(family.cells.content["readout"]).to_pylist()) for family in families]
    for readout in wanted:
        named = [_of_pair(readout, family, options) for family in families]
        if all(name in of for name, of in zip(named, found, strict=True)):
            return readout
    (name, lacks, has) = next(
        (family.name, readout, of)
        for readout in wanted[:1]
        for family, of in zip(families, found, strict=True)
        if _of_pair(readout, family, options) not in of
    )
    raise InputError(
        f"the families have no common readout: {name} has no cells of {lacks}, it has {_listed(has)}; choose one with "
        "--readout, or score it with 'actcache grid RUN --readout R'"
    )


def _of_pair(readout: str, family: Family, options: AcrossOptions) -> str:
    pair = _pair(family, options)
    return schema.readouts_of((readout,), sorted({label for one in family.pairs for label in one}), pair)[0]


def _pair(family: Family, options: AcrossOptions) -> tuple[str, ...]:
    if options.pair is not None:
        pair: tuple[str, ...] = contrasted(options.pair)
        if pair in family.pairs:
            return pair
    if len(family.pairs) != 1:
        found = "; ".join(",".join(pair) for pair in family.pairs)
        raise InputError(f"{family.name} has events of the pairs {found}: choose one of them with --pair A,B")
    return family.pairs[0]


@dataclass(frozen=True)
class _Part:
    """Events of one kind and subset of a family."""

    group: dict[str, Any]
    sample: Sample


@dataclass(frozen=True)
class _Chosen:
    """The cells of a family that are put together."""

    pair: tuple[str, ...]
    boundary: int
    readout: str
    notes: dict[str, Any]
    grids: Grids
    parts: list[_Part]

    def part(self, kind: str, subset: str) -> _Part | None:
        """Of a kind and subset, if there are events."""
        return next((one for one in self.parts if (one.group["kind"], one.group["subset"]) == (kind, subset)), None)


def _chosen(family: Family, options: AcrossOptions, readout: str) -> _Chosen:
    pair = _pair(family, options)
    cells = family.cells.content
    missing = [name for name in GROUP_COLUMNS if name not in cells.column_names and name != "pair"]
    if missing:
        raise InputError(f"the cells of {family.name} have no column {', '.join(missing)}")
    of_pair = _of_pair(readout, family, options)
    kept = pc.and_(pc.equal(cells["scope"], options.scope), pc.equal(cells["readout"], of_pair))
    kept = pc.and_(kept, pc.equal(cells["variant"], schema.PLAIN))
    if "pair" in cells.column_names:
        kept = pc.and_(kept, pc.equal(cells["pair"], ",".join(pair)))
    boundary = _boundary(family, options, cells.filter(kept))
    consistent, notes = select_consistent(cells, pair, keep=options.keep_ties)
    stays = pc.is_in(cells["event_id"], value_set=pc.unique(consistent["event_id"]))
    kept = pc.and_(pc.and_(kept, stays), pc.equal(cells["boundary"], boundary))
    table = cells.filter(kept)
    if not table.num_rows:
        raise InputError(
            f"{family.name} has no plain cells of scope {options.scope}, readout {of_pair}, boundary {boundary}"
        )
    grids = lay_out(table, pair)
    return _Chosen(pair, boundary, of_pair, notes, grids, _parts(family, table, grids, options))


def _boundary(family: Family, options: AcrossOptions, cells: pa.Table) -> int:
    """The one that the options name, of those that the cells have."""
    found = sorted(pc.unique(cells["boundary"]).to_pylist())
    if not found:
        raise InputError(
            f"{family.name} has no plain cells of scope {options.scope}; 'actcache grid RUN --scope {options.scope}' "
            "scores them"
        )
    if family.n_blocks is None:
        named = int(options.boundary) if options.boundary.isdecimal() else None
        if named not in found and len(found) > 1:
            raise InputError(
                f"{family.name} is a table with boundaries {_listed(found)}, which does not say how many blocks there "
                "are: filter it to one of them, or give its run"
            )
        return found[0] if named is None else named
    from actcache.capture.settings import parse_boundaries  # which takes seconds, as it imports models

    (wanted, *more) = parse_boundaries(options.boundary, family.n_blocks)
    if more:
        raise InputError(f"boundary {options.boundary!r} names several; families are put together at one")
    if wanted not in found and options.boundary == MAIN:
        return min(found, key=lambda boundary: (abs(boundary - wanted), boundary))
    if wanted not in found:
        raise InputError(
            f"{family.name} has no cells at boundary {wanted} ({options.boundary} of {family.n_blocks} blocks); it has "
            f"{_listed(found)}"
        )
    return wanted


def _check_depths(families: Sequence[Family], boundaries: Sequence[int], say: Callable[[str], None]) -> None:
    """Equal depths, to the rounding of a block; or, near the end, equal distances from it."""
    known = [
        (family.name, boundary, family.n_blocks)
        for family, boundary in zip(families, boundaries, strict=True)
        if family.n_blocks is not None
    ]
    for name, boundary, n_blocks in known[1:]:
        first, at, of = known[0]
        apart = abs(boundary / n_blocks - at / of)
        from_end = {n_blocks - boundary, of - at}
        if apart > 0.5 / n_blocks + 0.5 / of + 1e-9 and (len(from_end) > 1 or max(from_end) > _TERMINAL):
            raise InputError(
                f"boundaries do not match in depth: that of {first} is {at} of {of} blocks ({at / of:.2f}), that of "
                f"{name} {boundary} of {n_blocks} ({boundary / n_blocks:.2f}); choose one with --boundary, such as 0.6 "
                "or -3"
            )
    unknown = {family.name: at for family, at in zip(families, boundaries, strict=True) if family.n_blocks is None}
    if unknown:
        taken = ", ".join(f"{name} at boundary {boundary}" for name, boundary in unknown.items())
        say(f"tables do not say how many blocks there are, so that depths are not compared of {taken}")


def _parts(family: Family, cells: pa.Table, grids: Grids, options: AcrossOptions) -> list[_Part]:
    parts = []
    kind = np.array(grids.events["kind"].to_pylist(), object)
    everything: list[tuple[str, Bools]] = [(ALL, np.ones(len(kind), bool)), *subsets_by(cells, grids, ["step"])]
    for one in sorted(set(kind.tolist())):
        whole = int((kind == one).sum())
        for subset, mask in everything:
            at = np.flatnonzero(mask & (kind == one))
            if not at.size:
                continue
            sample = _sample(grids, at, options, options.seed)
            group = {"kind": one, "subset": subset, "family": family.name, "share_of_events": at.size / whole}
            group |= {"n_events": sample.n_events, "n_prompts": sample.n_prompts} | estimates(sample)
            parts.append(_Part(group, sample))
    return parts


def _sample(grids: Grids, at: Any, options: AcrossOptions, seed: int) -> Sample:
    values = dict(zip(CELLS, grids.margins[at].T, strict=True))
    prompts = grids.events["prompt_id"].take(pa.array(at))
    return Sample.of(prompts, values, weights=options.weights, draws=options.draws, seed=seed)


def _groups(
    families: Sequence[Family], chosen: Sequence[_Chosen], kind: str, options: AcrossOptions
) -> list[dict[str, Any]]:
    """The balanced groups of one kind: all events, and each subset that at least two families have."""
    subsets = dict.fromkeys(part.group["subset"] for one in chosen for part in one.parts)
    groups = []
    for subset in subsets:
        found = [(family.name, one.part(kind, subset)) for family, one in zip(families, chosen, strict=True)]
        parts = {name: part for name, part in found if part is not None}
        if len(parts) > 1:
            names = {"kind": kind, "subset": subset, "families": list(parts)}
            groups.append(names | _balanced(parts, options) | _null(parts, subset, options))
    return groups


def _balanced(parts: Mapping[str, _Part], options: AcrossOptions) -> dict[str, Any]:
    """The quantities of effects.json of the families together."""
    of = [part.group for part in parts.values()]
    # Each family draws on its own: the seeds are those after the one of the families' own intervals.
    samples = [part.sample.redrawn(options.seed + 1 + number) for number, (_, part) in enumerate(sorted(parts.items()))]
    drawn = {
        name: balanced_draws([sample.draws_of(mean_of(name)) for sample in samples])
        for name in schema.names(schema.CONTRASTS)
    }

    def together(numbers: Sequence[Number], draws: Any) -> Number:
        found = balanced(numbers)
        return found if options.rule == "reported" or found["mean"] is None else number(found["mean"], draws)

    cells = {
        cell: together([group["cells"][cell] for group in of], balanced_draws([one.draws_of(cell) for one in samples]))
        for cell in CELLS
    }
    found: dict[str, Any] = {
        "n_events": sum(group["n_events"] for group in of),
        "n_prompts": sum(group["n_prompts"] for group in of),
        "cells": cells,
    }
    found |= {name: together([group[name] for group in of], drawn[name]) for name in drawn}
    scale = max(abs(one["mean"] or 0.0) for one in cells.values())
    flags = []
    for share, (above, below) in SHARES.items():
        top, bottom, both = found[above]["mean"], found[below]["mean"], (drawn[above], drawn[below])
        found[share] = ratio(top, bottom, None if both[0] is None else both, scale=scale)  # type: ignore[arg-type]
        flags += [share] if top * bottom < 0 else []
    spread = {name: spread_of(_means(parts, name)) for name in _QUANTITIES}
    for share, (above, below) in SHARES.items():  # of which no means are taken
        rest = {name: (spread[above]["leave_one_out"][name], spread[below]["leave_one_out"][name]) for name in parts}
        without = {name: top / bottom if bottom else None for name, (top, bottom) in rest.items()}
        spread[share] |= {"trimmed_mean": None, "leave_one_out": without}
    return found | {"flags": flags, "spread": spread}


def _means(parts: Mapping[str, _Part], name: str) -> dict[str, float]:
    """Of the families that have the quantity."""
    values = {family: part.group[name]["mean"] for family, part in parts.items()}
    return {family: value for family, value in values.items() if value is not None}


def spread_of(values: Mapping[str, float]) -> dict[str, Any]:
    """Lowest, highest and median of the families, the mean without these two ends, and that without each one."""
    of = list(values.values())
    return {
        "min": min(of, default=None),
        "max": max(of, default=None),
        "median": float(np.median(of)) if of else None,
        "trimmed_mean": trimmed_mean(of),
        "leave_one_out": leave_one_out(values),
    }


def _null(parts: Mapping[str, _Part], subset: str, options: AcrossOptions) -> dict[str, Any]:
    """The label-swap null of all events, whose families weigh the same."""
    if subset != ALL or not options.null:
        return {}
    of_prompts = {
        name: contrast("interaction", np.stack([part.sample.of_prompts(cell) for cell in CELLS], axis=-1))
        for name, part in parts.items()
    }
    null = sign_flip_null(of_prompts, options.null, NULL_SEED)
    return {"label_swap": null | {"draws": options.null, "seed": NULL_SEED}}


def _say_cautions(families: Sequence[Family], chosen: Sequence[_Chosen], say: Callable[[str], None]) -> None:
    for family, one in zip(families, chosen, strict=True):
        n = max(part.group["n_prompts"] for part in one.parts)
        if n < CAUTION_PROMPTS:
            say(f"{family.name} has {n} prompts: an interval of so few is narrower than it should be, if it has one")


# ---- other analyses --------------------------------------------------------------------------------------------------


def _shared_analyses(families: Sequence[Family], chosen: Sequence[_Chosen]) -> dict[str, list[dict[str, Any]]]:
    """By name the groups that at least two families share, with balanced means of their numbers."""
    found = {}
    for named in ANALYSES:
        of: dict[tuple[Any, ...], dict[str, tuple[float, dict[str, Any]]]] = {}
        for family, one in zip(families, chosen, strict=True):
            for group in family.answers.get(named.name, {}).get("groups", ()):
                names, off = _names(group, family, one)
                alike = of.setdefault(tuple(names.items()), {})
                if family.name not in alike or off < alike[family.name][0]:  # the nearest of several boundaries
                    alike[family.name] = off, group
        ratios = named.load().ratios
        shared = [
            dict(names) | _averaged({family: group for family, (_, group) in alike.items()}, ratios)
            for names, alike in of.items()
            if len(alike) > 1
        ]
        if shared:
            found[named.name] = shared
    return found


def _names(group: Mapping[str, Any], family: Family, chosen: _Chosen) -> tuple[dict[str, Any], float]:
    """What tells a group from the others of its analysis, by role and depth, so that those of families are the same;
    and how far its boundaries are from the depths that they are called by."""
    labels = dict(zip(chosen.pair, schema.ROLES, strict=True))
    labels |= {schema.common_readout(label): schema.common_readout(role) for label, role in labels.items()}
    labels[",".join(chosen.pair)] = ",".join(schema.ROLES)
    names: dict[str, Any] = {}
    off = 0.0
    for name, value in group.items():
        if name.endswith("boundary") and isinstance(value, int) and family.n_blocks is not None:
            names[name] = _depth(value, family.n_blocks)
            off += abs(value / family.n_blocks - float(names[name])) if float(names[name]) > 0 else 0.0
        elif isinstance(value, str):
            names[name] = labels.get(value, value)
        elif isinstance(value, bool | int) and not name.startswith("n_"):
            names[name] = value
    return names, off


def _depth(boundary: int, n_blocks: int) -> str:
    """A boundary as families share it: ``-3`` near the end, ``0.6`` elsewhere."""
    if n_blocks - boundary <= _TERMINAL:
        return str(boundary - n_blocks)
    return f"{round(boundary / n_blocks * _BINS) / _BINS:g}"


def _averaged(groups: Mapping[str, dict[str, Any]], ratios: Mapping[str, tuple[str, str] | None]) -> dict[str, Any]:
    """Balanced means of the numbers that all of these groups have; of a ratio, that of the balanced means of its parts,
    or none where the groups do not have these."""
    of = list(groups.values())
    shared = [name for name, value in of[0].items() if all(_is_number(group.get(name)) for group in of) and value]
    found: dict[str, Any] = {
        "families": list(groups),
        "n_events": sum(group["n_events"] for group in of),
        "n_prompts": sum(group["n_prompts"] for group in of),
    }
    for name in shared:
        if name not in ratios:
            found[name] = balanced([group[name] for group in of])
    for name in set(shared) & set(ratios):
        above, below = (found.get(part, {}).get("mean") for part in ratios[name] or ("", ""))
        found[name] = number(above / below if above is not None and below else None, None)
    values = {
        name: {family: group[name]["mean"] for family, group in groups.items() if group[name]["mean"] is not None}
        for name in shared
    }
    return found | {"spread": {name: spread_of(of_name) for name, of_name in values.items()}}


def _is_number(value: Any) -> bool:
    return isinstance(value, Mapping) and value.keys() == {"mean", "low", "high"}


def _listed(values: Any) -> str:
    return ", ".join(map(str, sorted(values)))
