"""Map: what one part of a checkpoint's states does, patched from the other checkpoint, part by part.

The *host* runs on its own states, and one part of them is the *source*'s; its late blocks run on to the end, and its
own readout gives the margin (activation patching). Both checkpoints of a pair are host and source in turn. The parts:

- *state*: the state that enters a captured boundary at one position. *Offset* 0 is p, -1 the position before it;
- *attention*, *mlp*: what that part of a block gives at p, as the source gives it in its own run;
- *head*: the same of one attention head, as the output projection reads it;
- *block*: whole blocks in a row, by the source's weights at every position, on the host's own states.

The *effect* is the margin less the host's own, and its *share* is the mean effect over the mean difference of the two
checkpoints' own margins: 1 where the patch makes of the host what the source is. Beside the map stands what all
positions of a boundary do together, which are plain cells of the grid (*prefix*).

A patch at p alone costs one row through the late blocks, one before it the rows from there on: what comes before is
shared. The shape of such maps is the field's own (no number of arXiv 2605.07284 is of this kind).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actcache.analyses.grid import GridSettings, check_settings, jobs_left, pairs_of
from actcache.analyses.windows import check_together
from actcache.capture.settings import parse_boundaries
from actcache.errors import InputError
from actcache.models.blocks import span_of
from actcache.progress import OnProgress, untold
from actcache.replay.edits import PLAIN
from actcache.schema import FIRST_DIVERGENCE, NATIVE
from actcache.store import Store
from actcache.study.analysis import CellAnalysis, Numbers, exactness_of, option
from actcache.study.cells import Finished, finished_cells
from actcache.study.engine import LateJob
from actcache.study.map_job import ATTENTION, BLOCK, HEAD, MLP, PARTS, SITES, STATE, MapSettings
from actcache.study.prefix_job import PREFIX
from actcache.study.replay_job import ReplayJob
from actcache.study.run_folder import RunFolder
from actcache.study.section import Figure, Heat, Interval, Lines, Section
from actcache.study.statistics import DRAWS, SEED, Floats, Sample, check_draws, check_weights

if TYPE_CHECKING:
    from actcache.study.run import Run

COLUMNS = ("event_id", "prompt_id", "host", "source", "site", "boundary", "head", "end_block", "offset", "margin")
_PLACE = ("site", "boundary", "head", "end_block", "offset")
_QUANTITIES = ("margin", "effect", "share")
_NOTHING: Interval = {"mean": None, "low": None, "high": None}
_MOST_POSITIONS, _MOST_ROWS = 16, 40  # drawn, and in the table


@dataclass(frozen=True)
class MapOptions:
    """Which parts are patched."""

    boundaries: str = option(
        "all", "boundaries of the states: 18, a fraction, -3 (of L), a list (default: all captured)", flag="--boundary"
    )
    positions: str = option("4", "how many of the last positions are patched, or all (default %(default)s)")
    sites: str = option(
        "attention,mlp", "parts of blocks to patch at p: of attention, mlp, head; or none (default %(default)s)"
    )
    layers: str = option(
        "", "blocks of these parts: 18, -1 (the last), 0.6..-1, a list (default: from the main boundary on)"
    )
    swaps: str = option("", "blocks to run by the source's weights: a..b, a list, a a captured boundary (default none)")
    event: str = option("", "event ids, a list, to show a map of each as well (default none)")
    weights: str = option("prompt", "what weighs the same in a mean: prompt or event (default %(default)s)")
    draws: int = option(DRAWS, "bootstrap draws over prompts (default %(default)s)", type=int)
    seed: int = option(SEED, "seed of the bootstrap (default %(default)s)", type=int)


class Map(CellAnalysis[MapOptions]):
    """The map of patches over boundaries and positions, and over parts of blocks."""

    name = "map"
    options = MapOptions
    ratios: ClassVar[Mapping[str, tuple[str, str] | None]] = {"share": ("effect", "difference")}

    def check(self, store: Store, options: MapOptions) -> None:
        """Boundaries, positions, parts, swaps, events, draws and weights."""
        check_draws(options.draws, options.seed)
        check_weights(options.weights)
        check_settings(store, _cells(store, options))
        _settings(store, options)
        known = set(store.events["event_id"].to_pylist()) if options.event else set()
        if unknown := [event for event in _listed(options.event) if event not in known]:
            raise InputError(f"event {unknown[0]!r} is not in the store; 'actcache inspect STORE' names them")

    def jobs(
        self, store: Store, finished: Finished, options: MapOptions, exactness: Mapping[str, Any]
    ) -> list[ReplayJob]:
        """The plain cells by the native readout: what all positions of each boundary do together."""
        return jobs_left(store, finished, replace(_cells(store, options), **exactness))

    def own_jobs(
        self, folder: RunFolder, store: Store, options: MapOptions, exactness: Mapping[str, Any]
    ) -> Mapping[Path, Sequence[LateJob]]:
        """The patches."""
        place = _place(folder)
        return {place: replace(_settings(store, options), **exactness).jobs(store, finished_cells(place, store))}

    def answer(
        self,
        run: Run,
        options: MapOptions,
        *,
        on_progress: OnProgress = untold,
        say: Callable[[str], None] = lambda line: None,
    ) -> dict[str, Any]:
        """See :meth:`CellAnalysis.answer`.

        Raises:
            InputError: also where blocks are swapped and one checkpoint is in memory at a time.
        """
        if _listed(options.swaps):
            check_together(run)
        return super().answer(run, options, on_progress=on_progress, say=say)

    def numbers(self, cells: pa.Table, run: Run, options: MapOptions) -> Numbers:
        """One row per event and patch; a group for each kind, pair, host and patch."""
        store = run.store
        settings = replace(_settings(store, options), **exactness_of(run.folder))
        patches = settings.read(_place(run.folder), store)
        if not len(patches):
            return Numbers(pa.table({name: pa.nulls(0) for name in COLUMNS}), [])
        table = pa.concat_tables([patches, _prefix(cells, settings)], promote_options="permissive")
        groups: list[dict[str, Any]] = []
        ids = store.events["event_id"].combine_chunks()
        own = {label: store.events[f"margin_{label}"].to_numpy() for label in store.checkpoints}
        at = pc.index_in(table["event_id"], value_set=ids).to_numpy()
        pairs = store.events["pair"].to_numpy(zero_copy_only=False)[at]
        whose = set(zip(table["kind"].to_pylist(), pairs, table["host"].to_pylist(), strict=True))
        for kind, pair, host in sorted(whose):
            of = pc.and_(pc.equal(table["kind"], kind), pc.equal(table["host"], host))
            mine = table.filter(pc.and_(of, pa.array(pairs == pair)))
            source = mine["source"][0].as_py()
            names = {"kind": kind, "pair": pair, "host": host, "source": source}
            groups += [names | group for group in _groups(mine, ids, own[host], own[source], options)]
        return Numbers(patches.select(COLUMNS), groups)

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """A heat map of states and of heads, and lines over blocks, for each host."""
        kinds = sorted({one["kind"] for one in groups})
        drawn = FIRST_DIVERGENCE if FIRST_DIVERGENCE in kinds else kinds[0]  # others are in the table
        figures: list[Figure] = []
        whole = [one for one in groups if "event_id" not in one]
        by_host: dict[tuple[str | None, ...], list[Mapping[str, Any]]] = {}
        for one in (one for one in groups if one["kind"] == drawn or "event_id" in one):
            by_host.setdefault((one.get("event_id"), one["pair"], one["host"]), []).append(one)
        for of_host in by_host.values():
            figures += _figures(of_host)
        largest = sorted(whole, key=lambda one: -abs(one["effect"]["mean"] or 0.0))[:_MOST_ROWS]
        shown = [one for one in whole if any(one is other for other in largest)]
        best = _largest([one for one in whole if one["kind"] == drawn])
        return Section(
            title="Patching map",
            figures=figures,
            columns=["patch", "events", "prompts", "margin", "effect", "share"],
            rows=[
                [
                    _patch_in_words(one, with_kind=len(kinds) > 1),
                    one["n_events"],
                    one["n_prompts"],
                    *(one[name] for name in _QUANTITIES),
                ]
                for one in shown
            ],
            shows=(
                f"The single patches with the largest mean effects: {'; '.join(best) or 'none'}. "
                "A share of 1 would make of the host what the source is."
            ),
            does_not_show=(
                "Effects of single patches do not add up: parts may stand in for one another, or need one another. A "
                "patched state is one that neither checkpoint makes. The intervals are over these prompts alone."
                + (f" The table has the {_MOST_ROWS} largest of {len(whole)}." if len(shown) < len(whole) else "")
            ),
            shares=("share",),
        )


def _groups(
    table: pa.Table, ids: pa.Array, own: Floats, others: Floats, options: MapOptions
) -> Iterator[dict[str, Any]]:
    """Of one kind, pair and host: a group per patch, those of single events last.

    Args:
        table: one row per event and patch.
        ids: of the store's events.
        own, others: ``[E]``, the host's and the source's own margins of the store's events.
        options: of the analysis.
    """
    how: dict[str, Any] = {"weights": options.weights, "draws": options.draws, "seed": options.seed}
    places = [tuple(row.values()) for row in table.select(_PLACE).to_pylist()]
    number = {place: at for at, place in enumerate(sorted(set(places), key=_order))}
    events = pc.unique(table["event_id"])
    row = pc.index_in(table["event_id"], value_set=events).to_numpy()
    margins = np.full((len(events), len(number)), np.nan)
    margins[row, [number[place] for place in places]] = table["margin"].to_numpy()
    prompts = np.empty(len(events), object)
    prompts[row] = table["prompt_id"].to_pylist()
    at = pc.index_in(events, value_set=ids).to_numpy()
    effects, differences, has = margins - own[at, None], (others - own)[at], ~np.isnan(margins)
    found: dict[int, dict[str, Any]] = {}
    for pattern in np.unique(has, axis=1).T:  # patches of the same events share their draws
        columns = np.flatnonzero((has == pattern[:, None]).all(axis=0)).tolist()
        values = {"difference": differences[pattern]}
        values |= {f"margin {column}": margins[pattern, column] for column in columns}
        values |= {f"effect {column}": effects[pattern, column] for column in columns}
        sample = Sample.of(prompts[pattern].tolist(), values, **how)
        counts = {"n_events": sample.n_events, "n_prompts": sample.n_prompts}
        whole = sample.mean("difference")
        for column in columns:
            of = {name: sample.mean(f"{name} {column}") for name in ("margin", "effect")}
            share = sample.ratio(f"effect {column}", "difference")
            found[column] = {**counts, **of, "share": share, "difference": whole}
    for place, column in number.items():
        yield dict(zip(_PLACE, place, strict=True)) | found[column]
    for event in _listed(options.event):
        one = pc.index(events, event).as_py()
        for place, column in number.items() if one >= 0 else ():
            if has[one, column]:
                effect, difference = float(effects[one, column]), float(differences[one])
                means: dict[str, float | None] = {"margin": float(margins[one, column]), "effect": effect}
                means |= {"difference": difference, "share": effect / difference if difference else None}
                group: dict[str, Any] = {
                    "event_id": event,
                    **dict(zip(_PLACE, place, strict=True)),
                    "n_events": 1,
                    "n_prompts": 1,
                }
                yield group | {name: {**_NOTHING, "mean": mean} for name, mean in means.items()}


def _order(place: Sequence[Any]) -> tuple[Any, ...]:
    site, *numbers = place
    return (*SITES, PREFIX).index(site), *(-1 if number is None else number for number in numbers)


def _figures(groups: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    """Of one pair and host, over all events or of one: the map of states, lines over blocks, the map of heads, and
    swaps."""
    first = groups[0]
    whose = f"{first['source']} into {first['host']}" + (f", {first['event_id']}" if "event_id" in first else "")
    effects = {tuple(one[name] for name in _PLACE): one["effect"] for one in groups}

    def heat(title: str, column_label: str, cells: Mapping[tuple[int, int], Interval], alt: str) -> Heat:
        rows, columns = (sorted({place[axis] for place in cells}) for axis in (0, 1))
        columns = columns[-_MOST_POSITIONS:] if column_label == "position" else columns
        numbers = [[cells.get((row, column), _NOTHING) for column in columns] for row in rows]
        names = [_position(column) if column_label == "position" else f"{column}" for column in columns]
        label = "boundary" if column_label == "position" else "block"
        return Heat(f"{title}: {whose}", label, column_label, [f"{row}" for row in rows], names, numbers, alt)

    states = {(block, offset): effect for (site, block, _, _, offset), effect in effects.items() if site == STATE}
    if states:
        yield heat("state", "position", states, "Effect of the state at each boundary and position.")
    lines = {
        site: [(block, effect) for (of, block, _, _, offset), effect in effects.items() if of == site and offset == 0]
        for site in (STATE, ATTENTION, MLP)
    }
    lines["all positions"] = [(block, effect) for (of, block, *_), effect in effects.items() if of == PREFIX]
    lines = {name: sorted(of, key=lambda one: one[0]) for name, of in lines.items() if of}
    if lines:
        yield Lines("block", f"effect, logits: {whose}", lines, None, f"Effect at p of each block's parts: {whose}.")
    heads = {(block, head): effect for (site, block, head, _, _), effect in effects.items() if site == HEAD}
    if heads:
        yield heat("head", "head", heads, "Effect of each head at p.")
    swaps: dict[str, list[tuple[float, Interval]]] = {}
    for (site, block, _, end, _), effect in effects.items():
        if site == BLOCK:
            swaps.setdefault(f"from block {block}", []).append((end, effect))
    if swaps:
        said = f"Effect of blocks that run by the source's weights: {whose}."
        yield Lines("last block swapped", f"effect, logits: {whose}", swaps, None, said)


def _position(offset: int) -> str:
    return f"p{offset or ''}"


def _patch_in_words(group: Mapping[str, Any], *, with_kind: bool = False) -> str:
    block, offset = group["boundary"], group["offset"]
    what = {
        STATE: f"state at {block}, {_position(offset or 0)}",
        PREFIX: f"states at {block}, all positions",
        HEAD: f"head {group['head']} of block {block}",
        BLOCK: f"blocks {block}..{group['end_block']}",
    }.get(group["site"], f"{group['site']} of block {block}")
    kind = f"{group['kind']}: " if with_kind else ""
    return f"{kind}{group['source']} into {group['host']}: {what}"


def _largest(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each host and source, the single patch with the largest effect, in words."""
    largest: dict[tuple[str, str], Mapping[str, Any]] = {}
    for one in sorted(groups, key=lambda one: -abs(one["effect"]["mean"] or 0.0)):
        if one["site"] not in (PREFIX, BLOCK):
            largest.setdefault((one["pair"], one["host"]), one)
    return [f"{_patch_in_words(one)} ({one['effect']['mean']:+.2f})" for one in largest.values()]


def _prefix(cells: pa.Table, settings: MapSettings) -> pa.Table:
    """Of the plain cells, those that patch all positions of a boundary from the other checkpoint of the event's pair,
    as rows of a map."""
    kept = pc.and_(pc.equal(cells["variant"], PLAIN.name), pc.equal(cells["readout"], NATIVE))
    kept = pc.and_(kept, pc.equal(cells["scope"], PREFIX))
    kept = pc.and_(kept, pc.is_in(cells["boundary"], value_set=pa.array(settings.boundaries, pa.int32())))
    hosted = {f"{','.join(pair)}: {one[0]} into {one[1]}" for pair in settings.pairs for one in (pair, pair[::-1])}
    whose = pc.binary_join_element_wise(
        pc.binary_join_element_wise(cells["pair"], cells["upstream"], ": "), cells["late"], " into "
    )
    table = cells.filter(pc.and_(kept, pc.is_in(whose, value_set=pa.array(sorted(hosted), pa.string()))))
    columns = {name: table[name] for name in ("event_id", "prompt_id", "kind", "boundary", "margin")}
    columns |= {"host": table["late"], "source": table["upstream"]}
    return pa.table(columns | {"site": pa.array([PREFIX] * len(table), pa.string())})


def _cells(store: Store, options: MapOptions) -> GridSettings:
    return GridSettings(_boundaries(store, options), (PREFIX,), (NATIVE,))


def _boundaries(store: Store, options: MapOptions) -> tuple[int, ...]:
    given = options.boundaries
    return tuple(store.boundaries) if given == "all" else parse_boundaries(given, store.fingerprint.n_blocks)


def _settings(store: Store, options: MapOptions) -> MapSettings:
    """Which patches are asked for.

    Raises:
        InputError: one that the store cannot serve.
    """
    captured, n_blocks = sorted(store.boundaries), store.fingerprint.n_blocks
    if options.positions != "all" and not (options.positions.isdecimal() and int(options.positions)):
        raise InputError(f"positions {options.positions!r}: give how many of the last ones, such as 4, or all")
    sites = [] if options.sites == "none" else _listed(options.sites)
    if unknown := [site for site in sites if site not in PARTS]:
        raise InputError(f"site {unknown[0]!r} is unknown; choose of {', '.join(PARTS)}, or none")
    blocks: dict[int, int] = {}
    for given in _listed(options.layers) or [f"{store.main_boundary}..-1"]:
        first, last = _span(given, n_blocks)
        if first < captured[0]:
            raise InputError(
                f"layers {given!r}: block {first} is before {captured[0]}, the first boundary that was captured"
            )
        blocks |= {block: max(one for one in captured if one <= block) for block in range(first, last + 1)}
    swaps = [_span(given, n_blocks) for given in _listed(options.swaps)]
    for first, last in swaps:
        if first not in captured:
            raise InputError(
                f"swap {first}..{last}: block {first} is no boundary of the store; it has "
                f"{', '.join(map(str, captured))}"
            )
    return MapSettings(
        pairs=pairs_of(store),
        n_positions=None if options.positions == "all" else int(options.positions),
        boundaries=_boundaries(store, options),
        parts=dict.fromkeys(sites, blocks),
        swaps=swaps,
    )


def _span(given: str, n_blocks: int) -> tuple[int, int]:
    """The first and the last block of a text as ``18``, ``-1`` or ``0.6..-1`` (InputError: none of the model's)."""
    text = given if ".." in given else f"{given}..{given}"
    first, last = span_of(text, n_blocks)
    if not 0 <= first <= last < n_blocks:
        raise InputError(f"blocks {given!r}: expected some of 0..{n_blocks - 1}, in order")
    return first, last


def _listed(given: str) -> list[str]:
    return [part.strip() for part in given.split(",") if part.strip()]


def _place(folder: RunFolder) -> Path:
    return folder.path / Map.name / "patches"


ANALYSIS = Map()
