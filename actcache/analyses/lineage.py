"""Lineage: how much of the final checkpoint's interaction do the earlier stages of its training have?

The events are those of a pair (base, final), with their tokens; the stages in between are scored on the same sequences.
The score of a stage s is the interaction of the 2x2 of base and s, all of it under the final's readout:

    I_s = [Y(s, s) - Y(s, base)] - [Y(base, s) - Y(base, base)]

Its *fraction* is mean I_s over mean I_final, on draws that both share; it is told only where the interval of mean
I_final leaves 0 out. Beside it stand the same interaction under the readouts of base and s themselves, the share of
events at which s, unpatched, chooses y_it, and the null of random signs per prompt.

Events of base and final favour the final by construction. So each score is also taken on the events of base and an
earlier stage, with the tokens of these, where the run or further ones have them.

It needs one capture of all checkpoints, with the pair of base and final: `--checkpoint LABEL=DIR` for each, and
`--pair base,final`. A further `--pair base,stage` adds the events of that stage.

In arXiv 2605.07284 (Tulu-3 8B) SFT has 29% of the final's interaction and DPO 84%.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actcache.analyses.grid import GridSettings, check_settings, jobs_left, one_boundary
from actcache.errors import InputError
from actcache.replay.edits import PLAIN
from actcache.schema import NATIVE, common_readout
from actcache.store import Store
from actcache.study.analysis import CellAnalysis, Numbers, option
from actcache.study.cells import Finished
from actcache.study.contrasts import lay_out_lineup
from actcache.study.further import with_further
from actcache.study.replay_job import ReplayJob
from actcache.study.section import Bars, Figure, Heat, Section
from actcache.study.statistics import DRAWS, SEED, Floats, Sample, check_draws, check_weights, number, sign_flip_null
from actcache.study.subsets import ALL

if TYPE_CHECKING:
    from actcache.study.run import Run

_KEPT = ("event_id", "prompt_id", "kind", "pair", "step")
_SCORES = ("late_from_pt", "late_from_it", "interaction", "native_interaction", "chooses_y_it")


@dataclass(frozen=True)
class LineageOptions:
    """Which checkpoints, and which cells."""

    base: str = option("", "label of the checkpoint that all others come from (default: the first of the pair)")
    final: str = option("", "label of the last stage (default: the second of the pair)")
    stages: str = option("", "labels of the stages before the final, in order (default: those between in the lineup)")
    further: str = option(
        "", "folders of further runs of the same checkpoints, whose pairs are base and an earlier stage"
    )
    boundary: str = option("", "boundary of the cells: 18, a fraction, or -3 (of L) (default: the main one)")
    scope: str = option("prefix", "scope of the cells: prefix or position (default %(default)s)")
    later: int = option(3, "least step of the events of the later subset (default %(default)s)", type=int)
    weights: str = option("prompt", "what weighs the same: prompt or event (default %(default)s)")
    draws: int = option(DRAWS, "bootstrap draws over prompts (default %(default)s)", type=int)
    seed: int = option(SEED, "seed of the bootstrap (default %(default)s)", type=int)


class _Asked(NamedTuple):
    """Options as labels and numbers."""

    base: str
    final: str
    stages: tuple[str, ...]  # the final is the last of them
    boundary: int
    scope: str

    @property
    def readout(self) -> str:
        """The final's."""
        return common_readout(self.final)


class Lineage(CellAnalysis[LineageOptions]):
    """The interaction of each stage on the final's events, and what it is of the final's."""

    name = "lineage"
    options = LineageOptions
    ratios: ClassVar[Mapping[str, tuple[str, str] | None]] = {"fraction": None}

    def check(self, store: Store, options: LineageOptions) -> None:
        """Labels, cells, draws, and whether there is an event of the pair."""
        check_draws(options.draws, options.seed)
        check_weights(options.weights)
        asked = _asked(store, options)
        check_settings(store, _settings(asked))
        pairs = {*map(",".join, store.fingerprint.event_pairs), *pc.unique(store.events["pair"]).to_pylist()}
        if not any(_is_support(pair, asked) for pair in pairs):
            raise InputError(
                f"{store.path} has events of {'; '.join(sorted(pairs))}, and none of {asked.base} and a stage of it; "
                f"capture with --pair {asked.base},{asked.final}"
            )

    def jobs(
        self, store: Store, finished: Finished, options: LineageOptions, exactness: Mapping[str, Any]
    ) -> list[ReplayJob]:
        """The plain cells of all checkpoints."""
        return jobs_left(store, finished, replace(_settings(_asked(store, options)), **exactness))

    def numbers(self, cells: pa.Table, run: Run, options: LineageOptions) -> Numbers:
        """One row per event and stage. Groups of two parts: ``stage`` for each support, subset and stage, and ``map``
        for each support and cell."""
        store = run.store
        asked = _asked(store, options)
        table, groups = _scored(cells, store.checkpoints, asked, options)
        given = replace(options, base=asked.base, final=asked.final, boundary=str(asked.boundary), further="")
        given = replace(given, stages=",".join(asked.stages))
        table = with_further(self, given, run, table, options.further, (asked.base, *asked.stages))
        names = {"base": asked.base, "final": asked.final, "boundary": asked.boundary, "scope": asked.scope}
        return Numbers(table, [names | group for group in [*_stage_groups(table, asked, options), *groups]])

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """Fractions by stage and support, the map of the final's events, and the scores."""
        stages = [one for one in groups if one["part"] == "stage"]
        base, final = groups[0]["base"], groups[0]["final"]
        whole = [one for one in stages if one["subset"] == ALL]
        supports = list(dict.fromkeys(_support(one) for one in whole))
        bars = {of: [(one["stage"], one["fraction"]) for one in whole if _support(one) == of] for of in supports}
        said = ", ".join(f"{one['stage']} {_percent(one['fraction']['mean'])}" for one in whole)
        own = f"{base},{final}"
        labels = list(dict.fromkeys(one["upstream"] for one in groups if one["part"] == "map"))
        cells = {(one["upstream"], one["late"]): one["margin"] for one in groups if _is_map_of(one, own)}
        figures: list[Figure] = [
            Bars(f"share of the interaction of {final}", bars, 1.0, f"Fractions by stage: {said}.", shares=True),
        ]
        if cells:
            numbers = [[cells[upstream, late] for late in labels] for upstream in labels]
            alt = f"Mean margin in each cell, at the events of {own}."
            figures.append(Heat(f"events of {own}", "upstream", "late", labels, labels, numbers, alt))
        missing = [stage for stage in dict.fromkeys(one["stage"] for one in stages) if f"{base},{stage}" not in
                   {one["pair"] for one in stages}]  # fmt: skip
        return Section(
            title="Stages of a lineage",
            figures=figures,
            columns=[
                *("events of, subset, stage", "events", "prompts", "A", "B", "interaction", "fraction"),
                *("top-1 is y_it", "native interaction", "null's 99.9%", "p"),
            ],
            rows=[
                [
                    f"{_support(one)}, {one['subset']}, {one['stage']}",
                    one["n_events"],
                    one["n_prompts"],
                    *(one[name] for name in ("late_from_pt", "late_from_it", "interaction", "fraction")),
                    *(one[name] for name in ("chooses_y_it", "native_interaction")),
                    *(one[name] for name in ("null_q99.9", "p")),
                ]
                for one in stages
            ],
            shows=(
                f"The fraction is the mean interaction of {base} and a stage over that of {base} and {final}, on the "
                f"same events and under the readout of {final}."
            ),
            does_not_show=(
                f"Events of {base} and {final} have tokens that these two chose, so that {final} is favoured by "
                "construction. "
                + (
                    f"Events of {base} and {', '.join(missing)} are not among those shown; they would be a check."
                    if missing
                    else "The events of earlier stages are the check."
                )
            ),
            shares=("fraction", "top-1 is y_it"),
        )


def _asked(store: Store, options: LineageOptions) -> _Asked:
    """Options with their defaults filled in; InputError for labels that are none."""
    labels, pair = store.checkpoints, store.fingerprint.pair
    base, final = options.base or pair[0], options.final or pair[-1]
    given = [label.strip() for label in options.stages.split(",")] if options.stages else None
    for label in (base, final, *(given or ())):
        if label not in labels:
            raise InputError(f"there is no checkpoint {label!r} in {store.path}; it has {', '.join(labels)}")
    between = labels[labels.index(base) + 1 : labels.index(final)]
    stages = tuple(label for label in (between if given is None else given) if label != final)
    if base == final or base in stages or len(set(stages)) < len(stages):
        named = f"base {base}, stages {', '.join(stages) or 'none'}, final {final}"
        raise InputError(f"{named}: each must be another checkpoint")
    if options.later < 1:
        raise InputError(f"later is {options.later}: give the least step of the later events, from 1 on")
    if not stages:
        raise InputError(
            f"{store.path} has no stage between {base} and {final}, but {', '.join(labels)}: name some by --stages, or "
            f"capture with --checkpoint STAGE=DIR and --pair {base},{final} too"
        )
    boundary = one_boundary(store, options.boundary)
    return _Asked(base, final, (*stages, final), boundary, options.scope)


def _settings(asked: _Asked) -> GridSettings:
    return GridSettings((asked.boundary,), (asked.scope,), (asked.readout, NATIVE))


def _is_support(pair: str, asked: _Asked) -> bool:
    base, _, stage = pair.partition(",")
    return base == asked.base and stage in asked.stages


def _scored(
    cells: pa.Table, labels: Sequence[str], asked: _Asked, options: LineageOptions
) -> tuple[pa.Table, list[dict[str, Any]]]:
    """One row per event and stage, and the groups of the map."""
    chosen = pc.and_(pc.equal(cells["boundary"], asked.boundary), pc.equal(cells["variant"], PLAIN.name))
    chosen = pc.and_(chosen, pc.equal(cells["scope"], asked.scope))
    cells = cells.filter(chosen)
    pairs = [pair for pair in pc.unique(cells["pair"]).to_pylist() if _is_support(pair, asked)]
    cells = cells.filter(pc.is_in(cells["pair"], value_set=pa.array(pairs, pa.string())))
    events, y, _ = _by_event(cells, labels, asked.readout)
    _, native, best = _by_event(cells, labels, NATIVE)
    at = {label: index for index, label in enumerate(labels)}
    base = at[asked.base]
    parts = []
    for stage in asked.stages:
        s = at[stage]
        columns = {
            "late_from_pt": y[:, base, s] - y[:, base, base],
            "late_from_it": y[:, s, s] - y[:, s, base],
            "interaction": _interaction(y, base, s),
            "native_interaction": _interaction(native, base, s),
            "chooses_y_it": (best[:, s, s] == events["y_it"].to_numpy()).astype(np.float64),
        }
        part = events.select(_KEPT).append_column("stage", pa.array([stage] * len(events), pa.string()))
        for name in _SCORES:
            part = part.append_column(name, pa.array(columns[name]))
        parts.append(part)
    return pa.concat_tables(parts), list(_map_groups(events, y, labels, asked, options))


def _interaction(y: Floats, base: int, stage: int) -> Floats:
    return (y[:, stage, stage] - y[:, stage, base]) - (y[:, base, stage] - y[:, base, base])


def _by_event(cells: pa.Table, labels: Sequence[str], readout: str) -> tuple[pa.Table, Floats, Any]:
    """One row per event of plain cells of one boundary and scope, sorted by kind, pair and id; their margins ``[E, K,
    K]``, upstream before late; and the ids of the best tokens ``[E, K, K]``.

    Raises:
        InputError: an event lacks a cell, or has one twice.
    """
    cells = cells.filter(pc.equal(cells["readout"], readout))
    grids, n = lay_out_lineup(cells, labels), len(labels)
    if len(grids.rows) != pc.count_distinct(cells["event_id"]).as_py():
        raise InputError(f"not every event has each of the {n**2} cells under {readout} once; complete the grid")
    best = cells["top1_id"].to_numpy()[grids.rows]
    events = cells.take(pa.array(grids.rows[:, 0]))
    return events, grids.margins.reshape(-1, n, n), best.reshape(-1, n, n)


def _map_groups(
    events: pa.Table, y: Floats, labels: Sequence[str], asked: _Asked, options: LineageOptions
) -> Iterator[dict[str, Any]]:
    """The mean margin of every cell of each support."""
    names = list(product(range(len(labels)), repeat=2))
    for kind, pair, chosen in _supports(events):
        values = {f"{u} {v}": y[chosen, u, v] for u, v in names}
        sample = _sample(events.filter(pa.array(chosen)), values, options)
        for u, v in names:
            yield {
                **{"part": "map", "kind": kind, "pair": pair, "readout": asked.readout},
                **{"upstream": labels[u], "late": labels[v]},
                **{"n_events": sample.n_events, "n_prompts": sample.n_prompts, "margin": sample.mean(f"{u} {v}")},
            }


def _stage_groups(table: pa.Table, asked: _Asked, options: LineageOptions) -> Iterator[dict[str, Any]]:
    """The scores of every stage, of each support and subset; all stages of one share its draws."""
    for kind, pair, chosen in _supports(table):
        of_support = table.filter(pa.array(chosen))
        for subset, first in ((ALL, 0), (f"step>={options.later}", options.later)):
            events = of_support.filter(pc.greater_equal(of_support["step"], first))
            if not len(events):
                continue
            of_stage = {stage: events.filter(pc.equal(events["stage"], stage)) for stage in asked.stages}
            values = {f"{name} {stage}": of[name].to_numpy() for stage, of in of_stage.items() for name in _SCORES}
            sample = _sample(of_stage[asked.final], values, options)
            whole = sample.mean(f"interaction {asked.final}")
            for stage in asked.stages:
                null = sign_flip_null(sample.of_prompts(f"interaction {stage}"))
                fraction = sample.ratio(f"interaction {stage}", f"interaction {asked.final}")
                if whole["low"] is not None and whole["high"] is not None and whole["low"] <= 0 <= whole["high"]:
                    fraction = number(None, None)
                yield {
                    **{"part": "stage", "kind": kind, "pair": pair, "subset": subset, "stage": stage},
                    **{"readout": asked.readout, "n_events": sample.n_events, "n_prompts": sample.n_prompts},
                    **{name: sample.mean(f"{name} {stage}") for name in _SCORES},
                    **{"fraction": fraction, "p": null["p"]},
                    **{name: null[name] for name in ("null_sd", "null_q99.9")},
                }


def _supports(table: pa.Table) -> Iterator[tuple[str, str, Any]]:
    """Kind and pair of each support, and which rows are of it."""
    for kind, pair in sorted(set(zip(table["kind"].to_pylist(), table["pair"].to_pylist(), strict=True))):
        yield kind, pair, pc.and_(pc.equal(table["kind"], kind), pc.equal(table["pair"], pair)).to_numpy()


def _sample(events: pa.Table, values: Mapping[str, Floats], options: LineageOptions) -> Sample:
    return Sample.of(events["prompt_id"], values, weights=options.weights, draws=options.draws, seed=options.seed)


def _support(group: Mapping[str, Any]) -> str:
    """The events of a group, in words."""
    return str(group["pair"]) if group["kind"] == "first_divergence" else f"{group['pair']} {group['kind']}"


def _is_map_of(group: Mapping[str, Any], pair: str) -> bool:
    return group["part"] == "map" and _support(group) == pair


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.0%}"


ANALYSIS = Lineage()
