"""Closure: is what a descendant's state at the boundary has more than the base's low-dimensional, and is it enough?

Of every event, delta is the descendant's state at p minus the base's. A principal component analysis (PCA) of it is
fitted on the events of training prompts: their mean m, and the directions along which delta - m varies most. Of rank k,
r = m + P_k (delta - m). It is added to the base's state *at p alone*, as it enters the descendant's late blocks; every
earlier position stays the base's. *Closure* is the share of the missing margin that this returns, by the descendant's
own readout:

    closure = (Y(base + scale r, late of the descendant) - Y(base, late)) / (Y(descendant, late) - Y(base, late))

The ceiling below the line moves the whole prefix. So the full delta, at scale 1, closes all of it only where later
attention reads nothing of earlier positions. Two means are told: of closures per event, where the missing margin is
more than 1e-8 (as published; a few small denominators may carry it), and beside it the ratio of means.

Training prompts are those whose SHA-256 of ``exp48:`` and the prompt's id falls into the lowest 70%, as published. The
numbers are of the other events, unless ``--events`` says otherwise. Controls at scale 1, of each rank: the sign
flipped; a random direction as long as delta; one as long as r; a random one among the components, as long as r; another
event's r; the mean m alone; and what another descendant's delta of the same event gives in these components.

In arXiv 2605.07284 (five descendants of one base, rank 256) closure is 0.63 at block 29 and 0.71 at block 31, the full
delta 0.93 and 0.97; random directions of its length -0.02, the flipped one -0.82 and -0.79.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from actcache.analyses.grid import GridSettings, check_settings, events_of_pair, jobs_left, pairs_of
from actcache.canonical import digest_of
from actcache.capture.settings import parse_boundaries
from actcache.errors import CheckError, InputError
from actcache.replay.edits import PLAIN, Add, Edit, Inject, Interpolate, MatchedNorm, Operation, Variant
from actcache.replay.vectors import EventVectors
from actcache.store import Store
from actcache.study.analysis import CellAnalysis, Numbers, exactness_of, option
from actcache.study.cells import Finished, finished_cells, gather_cells, identity
from actcache.study.engine import LateJob
from actcache.study.replay_job import ReplayJob
from actcache.study.run_folder import RunFolder
from actcache.study.section import Bars, Interval, Lines, Section
from actcache.study.statistics import DRAWS, SEED, Sample, check_draws, check_weights

if TYPE_CHECKING:
    from actcache.study.run import Run

FULL = "full"
INJECTED, MEAN = "injected", "mean"
SPLITS = ("held_out", "train", "all")
_MISSING = 1e-8  # logits; the least margin that closure is told of


@dataclass(frozen=True)
class ClosureOptions:
    """Where, of which rank, and of which events."""

    boundaries: str = option(
        "all", "boundaries: 18, a fraction, -3 (of L), or a list (default: all captured)", flag="--boundary"
    )  # fmt: skip
    ranks: str = option(
        "1,4,16,64,256", "ranks, a list; those beyond what training events span are left out (default %(default)s)"
    )
    scales: str = option("0.25,0.5,1,1.5", "scales of what is added, a list with 1 (default %(default)s)")
    events: str = option("held_out", "events to average: held_out, train or all (default %(default)s)")
    share: float = option(0.7, "share of the prompts that train (default %(default)s)", type=float)
    weights: str = option("prompt", "what weighs the same in a mean: prompt or event (default %(default)s)")
    draws: int = option(DRAWS, "bootstrap draws over prompts (default %(default)s)", type=int)
    seed: int = option(SEED, "seed of the bootstrap, and of random directions (default %(default)s)", type=int)


class Closure(CellAnalysis[ClosureOptions]):
    """Closure by boundary, rank and scale, and of every control."""

    name = "closure"
    options = ClosureOptions
    ratios: ClassVar[Mapping[str, tuple[str, str] | None]] = {"closure": None, "closure_of_means": ("gain", "missing")}

    def check(self, store: Store, options: ClosureOptions) -> None:
        """Boundaries, ranks, scales, the split and draws."""
        check_draws(options.draws, options.seed)
        check_weights(options.weights)
        _ = _ranks(options), _scales(options)
        if options.events not in SPLITS:
            raise InputError(f"events is {options.events!r}; choose {', '.join(SPLITS)}")
        if not 0 < options.share < 1:
            raise InputError(f"share is {options.share}; expected more than 0 and less than 1")
        check_settings(store, GridSettings(tuple(_boundaries(store, options)), readouts=("native",)))

    def jobs(
        self, store: Store, finished: Finished, options: ClosureOptions, exactness: Mapping[str, Any]
    ) -> list[ReplayJob]:
        """The plain cells of every boundary."""
        settings = GridSettings(tuple(_boundaries(store, options)), readouts=("native",))
        return jobs_left(store, finished, replace(settings, **exactness))

    def own_jobs(
        self, folder: RunFolder, store: Store, options: ClosureOptions, exactness: Mapping[str, Any]
    ) -> Mapping[Path, Sequence[LateJob]]:
        """Of every pair, what is added to the base's states, behind the descendant's late stack."""
        jobs: dict[Path, Sequence[LateJob]] = {}
        for pair in pairs_of(store):
            if events_of_pair(store, pair):
                place = _place(folder, store, pair, options)
                settings = replace(_settings(store, options, pair), **exactness)
                jobs[place] = jobs_left(store, finished_cells(place, store), settings)
        return jobs

    def numbers(self, cells: pa.Table, run: Run, options: ClosureOptions) -> Numbers:
        """One row per event, boundary and variant; groups for each pair, kind, boundary, rank, scale and control."""
        store, exactness = run.store, exactness_of(run.folder)
        tables = [pa.schema(_COLUMNS).empty_table()]
        groups: list[dict[str, Any]] = []
        for pair in pairs_of(store):
            if not events_of_pair(store, pair):
                continue
            varied = gather_cells(_place(run.folder, store, pair, options), store, **exactness)
            settings = _settings(store, options, pair)
            for boundary in settings.boundaries:
                table = _table(store, cells, varied, pair, boundary, options)
                tables.append(table)
                groups += _groups(table, options)
        return Numbers(pa.concat_tables(tables), groups)

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """Closure over ranks, and of the controls at the largest."""
        several = [name for name in ("kind", "pair") if len({one[name] for one in groups}) > 1]
        whole = [one for one in groups if one["scale"] == 1]

        def of_whom(group: Mapping[str, Any]) -> str:
            return ", ".join([*(group[name] for name in several), f"boundary {group['boundary']}"])

        lines: dict[str, list[tuple[float, Interval]]] = {}
        for one in whole:
            if one["what"] == INJECTED and one["rank"] != FULL:
                lines.setdefault(of_whom(one), []).append((float(one["rank"]), one["closure_of_means"]))
        # Ranks come in order: the last is the largest.
        largest = {of_whom(one): one["rank"] for one in whole if one["what"] == INJECTED and one["rank"] != FULL}
        bars: dict[str, list[tuple[str, Interval]]] = {}
        for one in whole:
            if one["rank"] in (FULL, largest.get(of_whom(one))) or one["what"] == MEAN:
                bars.setdefault(of_whom(one), []).append((_named(one), one["closure_of_means"]))
        said = ", ".join(
            f"{of_whom(one)} {one['closure_of_means']['mean']:.0%}"
            for one in whole
            if one["what"] == INJECTED and one["rank"] == FULL and one["closure_of_means"]["mean"] is not None
        )
        return Section(
            title="Closure of the boundary state",
            figures=[
                Lines("rank", "closure (ratio of means)", lines, None, "Closure over the rank of what is added."),
                Bars("closure (ratio of means)", bars, 0.0, f"Closure and its controls; full: {said}.", shares=True),
            ],
            columns=[
                "what is added",
                "events",
                "prompts",
                "missing",
                "gain",
                "closure",
                "mean of closures",
                "left out",
            ],
            rows=[
                [
                    f"{of_whom(one)}: {_named(one)}" + (f", scale {one['scale']:g}" if one["scale"] != 1 else ""),
                    one["n_events"],
                    one["n_prompts"],
                    *(one[name] for name in ("missing", "gain", "closure_of_means", "closure")),
                    one["n_left_out"],
                ]
                for one in groups
            ],
            shows=(
                "Closure is the share of the missing margin that a change of the state at p returns. Where few "
                "components close as much as the full difference, and random directions of the same length do not, the "
                "difference that matters is low-dimensional."
            ),
            does_not_show=(
                "Only the state at p is moved, while the ceiling moves every position: less than all is expected of "
                "the full difference, too. Components are of these prompts and checkpoints."
            ),
            shares=("closure", "mean of closures"),
        )


@dataclass(frozen=True)
class Fit:
    """Principal components of delta.

    Attributes:
        mean: ``[D]`` float64, of training events.
        components: ``[k, D]`` float64, orthonormal, those of the largest variance first; k is at most what the training
            events span.
    """

    mean: torch.Tensor
    components: torch.Tensor

    @classmethod
    def of(cls, deltas: torch.Tensor) -> Fit:
        """Of training events ``[n, D]``, at least one."""
        mean = deltas.mean(dim=0)
        _, sizes, components = torch.linalg.svd(deltas - mean, full_matrices=False)
        # Rounding leaves directions of no size, along which nothing varies.
        spanned = sizes > sizes.max() * max(deltas.shape) * torch.finfo(deltas.dtype).eps
        return cls(mean, components[spanned])


def is_training(prompt_id: str, share: float) -> bool:
    """Whether events of a prompt are fitted on: by the place of a digest among all, as published."""
    digest = hashlib.sha256(f"exp48:{prompt_id}".encode()).digest()
    return int.from_bytes(digest, "big") < share * 2**256


class _Asked(NamedTuple):
    """What a variant stands for."""

    what: str  # injected, or a control
    rank: str
    scale: float


@functools.lru_cache(maxsize=16)
def injected(
    store: Store, boundary: int, pair: tuple[str, str], options: ClosureOptions
) -> tuple[tuple[Variant, ...], Mapping[str, _Asked]]:
    """What is replayed of the base's states, and what each name stands for."""
    base, late = pair
    ids, prompts = (store.events[name].to_pylist() for name in ("event_id", "prompt_id"))
    trained = [event for event in events_of_pair(store, pair) if is_training(prompts[event], options.share)]
    states = {label: store.states(label, boundary, positions="event")[0].double() for label in pair}
    deltas = states[late] - states[base]
    others_event = deltas[_others_event(prompts, options.seed)].float()
    shuffled = EventVectors.of(others_event, ids, "the differences of other events")
    found: dict[_Asked, Operation] = {
        _Asked(INJECTED, FULL, scale): Interpolate(late, scale) for scale in _scales(options)
    }
    found[_Asked("flipped", FULL, 1.0)] = Interpolate(late, -1.0)
    found[_Asked("random", FULL, 1.0)] = MatchedNorm(options.seed, late)
    found[_Asked("shuffled", FULL, 1.0)] = Inject(None, None, 1.0, None, shuffled)
    if trained:
        fit = Fit.of(deltas[trained])
        mean, components = fit.mean.float(), fit.components.float()
        for rank in [one for one in _ranks(options) if one <= len(components)]:
            basis, name = components[:rank], str(rank)
            for scale in _scales(options):
                found[_Asked(INJECTED, name, scale)] = Inject(basis, mean, scale, late)
            found[_Asked("flipped", name, 1.0)] = Inject(basis, mean, -1.0, late)
            found[_Asked("random", name, 1.0)] = Inject(basis, mean, 1.0, late, None, "random", options.seed)
            found[_Asked("in span", name, 1.0)] = Inject(basis, mean, 1.0, late, None, "in_span", options.seed)
            found[_Asked("shuffled", name, 1.0)] = Inject(basis, mean, 1.0, None, shuffled)
            for label in (one for one in store.checkpoints if one not in pair):
                found[_Asked(f"of {label}", name, 1.0)] = Inject(basis, mean, 1.0, label)
        if mean.any():
            found[_Asked(MEAN, "0", 1.0)] = Add(mean)
    names = {f"{one.what}[rank={one.rank},scale={one.scale:g}]": one for one in found}
    return tuple(Variant(name, (Edit(found[one]),)) for name, one in names.items()), names


def _others_event(prompts: Sequence[str], seed: int) -> torch.Tensor:
    """``[E]``: of each event another one, of another prompt where there is one, drawn at random."""
    rng = np.random.default_rng(seed)
    drawn = []
    for event, prompt in enumerate(prompts):
        others = [other for other, of in enumerate(prompts) if of != prompt] or [event]
        drawn.append(others[rng.integers(len(others))])
    return torch.tensor(drawn, dtype=torch.int64)


def _table(
    store: Store,
    cells: pa.Table,
    varied: pa.Table,
    pair: tuple[str, str],
    boundary: int,
    options: ClosureOptions,
) -> pa.Table:
    """One row per event and variant of a pair and boundary (see ``_COLUMNS``)."""
    base, late = pair
    _, meant = injected(store, boundary, pair, options)
    of = {"pair": ",".join(pair), "boundary": boundary, "scope": "prefix", "readout": "native", "late": late}
    ceilings = _margins(cells, of | {"upstream": late, "variant": PLAIN.name})
    # Held against the plain replay that ran with them: packs of another shape round otherwise.
    own = {name: _margins(varied, of | {"upstream": base, "variant": name}) for name in (PLAIN.name, *meant)}
    floors = own[PLAIN.name]
    events = store.events.take(pa.array(events_of_pair(store, pair), pa.int64()))
    ids, prompts, kinds = (events[name].to_pylist() for name in ("event_id", "prompt_id", "kind"))
    rows = []
    for name, asked in meant.items():
        for event, prompt, kind in zip(ids, prompts, kinds, strict=True):
            missing, gain = ceilings[event] - floors[event], own[name][event] - floors[event]
            closure = gain / missing if abs(missing) > _MISSING else None
            trains = is_training(prompt, options.share)
            rows.append((event, prompt, kind, of["pair"], boundary, *asked, trains, missing, gain, closure))
    columns = zip(*rows, strict=True) if rows else [[] for _ in _COLUMNS]
    return pa.table(
        [pa.array(one, field.type) for one, field in zip(columns, _COLUMNS, strict=True)], pa.schema(_COLUMNS)
    )


_COLUMNS = [
    *(pa.field(name, pa.string()) for name in ("event_id", "prompt_id", "kind", "pair")),
    pa.field("boundary", pa.int32()),
    *(pa.field(name, pa.string()) for name in ("what", "rank")),
    pa.field("scale", pa.float64()),
    pa.field("trains", pa.bool_()),
    *(pa.field(name, pa.float64()) for name in ("missing", "gain", "closure")),
]


def _margins(cells: pa.Table, of: Mapping[str, Any]) -> dict[str, float]:
    """By event; those of the diagonal as the capture's own forward gave them.

    Raises:
        CheckError: there are none.
    """
    found = cells.filter(functools.reduce(pc.and_, (pc.equal(cells[name], value) for name, value in of.items())))
    margins = dict(zip(found["event_id"].to_pylist(), found["margin"].to_pylist(), strict=True))
    if not margins:
        raise CheckError("cells of closure are missing: files of them are gone; give the same command again")
    return margins


def _groups(table: pa.Table, options: ClosureOptions) -> Iterator[dict[str, Any]]:
    """Of the rows of one pair and boundary."""
    kept = {"held_out": pc.invert(table["trains"]), "train": table["trains"]}.get(options.events)
    table = table if kept is None else table.filter(kept)
    how: dict[str, Any] = {"weights": options.weights, "draws": options.draws, "seed": options.seed}
    for kind in sorted(set(table["kind"].to_pylist())):
        of_kind = table.filter(pc.equal(table["kind"], kind))
        names = ("what", "rank", "scale")
        for values in dict.fromkeys(zip(*(of_kind[name].to_pylist() for name in names), strict=True)):
            asked = dict(zip(names, values, strict=True))
            chosen = (pc.equal(of_kind[name], value) for name, value in asked.items())
            rows = of_kind.filter(functools.reduce(pc.and_, chosen))
            sample = Sample.of(rows["prompt_id"], {name: rows[name].to_numpy() for name in ("missing", "gain")}, **how)
            closed = rows.filter(rows["closure"].is_valid())
            per_event = Sample.of(closed["prompt_id"], {"closure": closed["closure"].to_numpy()}, **how)
            yield {
                **{name: rows[name][0].as_py() for name in ("kind", "pair", "boundary")},
                **asked,
                "events": options.events,
                **{"n_events": sample.n_events, "n_prompts": sample.n_prompts, "n_left_out": len(rows) - len(closed)},
                "missing": sample.mean("missing"),
                "gain": sample.mean("gain"),
                "closure_of_means": sample.ratio("gain", "missing"),
                "closure": per_event.mean("closure"),
            }


def _named(group: Mapping[str, Any]) -> str:
    rank = "full difference" if group["rank"] == FULL else f"rank {group['rank']}"
    what = group["what"]
    return "mean alone" if what == MEAN else rank if what == INJECTED else f"{rank}, {what}"


def _settings(store: Store, options: ClosureOptions, pair: tuple[str, str]) -> GridSettings:
    """What is replayed of the base's states."""
    return GridSettings(
        tuple(_boundaries(store, options)),
        readouts=("native",),
        variants=lambda boundary: injected(store, boundary, pair, options)[0],
        upstreams=pair[:1],
        lates=pair[1:],
    )


def _boundaries(store: Store, options: ClosureOptions) -> list[int]:
    if options.boundaries == "all":
        return sorted(store.boundaries)
    return list(parse_boundaries(options.boundaries, store.fingerprint.n_blocks))


def _ranks(options: ClosureOptions) -> list[int]:
    """Ranks asked for (InputError: one is none)."""
    try:
        found = sorted({int(part) for part in options.ranks.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise InputError(f"ranks {options.ranks!r}: give a list of whole numbers from 1 on, such as 1,4,16")
    return found


def _scales(options: ClosureOptions) -> list[float]:
    """Scales asked for (InputError: one is none, or 1 is not among them)."""
    try:
        found = sorted({float(part) for part in options.scales.split(",")})
    except ValueError:
        found = []
    if 1.0 not in found or not np.isfinite(found).all() or 0.0 in found:
        raise InputError(f"scales {options.scales!r}: give a list of numbers other than 0, with 1, such as 0.5,1")
    return found


def _place(folder: RunFolder, store: Store, pair: tuple[str, str], options: ClosureOptions) -> Path:
    """Where the cells of its variants are. Components are of the events that there are, and of the options."""
    of = [identity(store), options.share, options.seed]
    return folder.path / Closure.name / f"cells-{','.join(pair)}-{digest_of(of)[:12]}"


ANALYSIS = Closure()
