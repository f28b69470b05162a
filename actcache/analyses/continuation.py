"""Continuation: whether the interaction survives over the tokens that follow an event.

Behind each event go *candidates*, lists of tokens, and every cell of the 2x2 scores them teacher-forced: the upstream
gives the state at the boundary of all positions of the extended sequence, each candidate's own.

- `desc_primary`: y_it, then what IT greedily goes on with; `base_primary`: y_pt, then what PT goes on with.
- `base_forced_desc`: y_it, then what PT goes on with behind that token.
- `desc_shuffled`: y_it, then what IT went on with behind the y_it of another prompt: one of the same pair, kind,
  class of y_it and category, where prompts carry one.

`Y_n` is the sum of the log-probabilities of the first n + 1 tokens of one candidate, less that of another: *primary*
compares desc_primary with base_primary, *same forced* desc_primary with base_forced_desc, *shuffled* desc_shuffled with
base_primary. Log-probabilities are over the whole vocabulary. At n = 0, primary and shuffled are the margin of the
grid, and same forced is 0. The interaction of Y_n is `interaction`. The *tail* is what it has beyond that of the same
events at n = 0, which is told beside it as `interaction_0`: as n grows, fewer events are left.

An event counts at n where both candidates have n + 1 tokens, none before the last of them ends a text, and none is
another special token. How far Y_0 is from the grid's margin is told as `drift`: rounding alone.

In arXiv 2605.07284 (four descendants of Llama 3.1 8B, common_it) the interaction is 1.50 at n = 0 and 2.71 at n = 8,
where that of the same events is 1.17 at n = 0. Same forced has 2.46 there, shuffled 0.87.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actcache.analyses.grid import GridSettings, check_settings, events_of_pair, jobs_left, one_boundary, pairs_of
from actcache.canonical import digest_of
from actcache.capture.token_class import TokenClasses, read_token_classes
from actcache.errors import InputError
from actcache.files import digests_of_files
from actcache.progress import OnProgress
from actcache.replay.edits import PLAIN
from actcache.schema import CELL_KEY, EVENT_KEY, FIRST_DIVERGENCE, PAIR, names
from actcache.store import Store
from actcache.study.analysis import CellAnalysis, Numbers, exactness_of, option
from actcache.study.branch_job import BranchJob, Limits, branch_jobs, read_branches
from actcache.study.cells import Finished
from actcache.study.continuation_job import (
    CANDIDATES,
    CONTINUED,
    CONTRASTS,
    STATES,
    Candidates,
    ContinuationJob,
    distinct,
)
from actcache.study.contrasts import contrasts
from actcache.study.engine import LateJob, LocalEngine
from actcache.study.replay_job import ReplayJob
from actcache.study.results import file_name, is_finished, read_result
from actcache.study.run_folder import RunFolder
from actcache.study.section import Interval, Lines, Section
from actcache.study.states_job import StatesJob
from actcache.study.statistics import DRAWS, SEED, Sample, check_draws, check_weights
from actcache.study.whole_models import ModelJob, left, run_left

if TYPE_CHECKING:
    from actcache.study.run import Run

Pair = tuple[str, str]

NO_LIMITS = Limits()

TAILS, REPLAYS = "tails", "replays"
"""Folders of results, beside that of the states."""

_MEANS = ("late_from_pt", "late_from_it", "interaction")
_SURVIVORS = "primary, the same events at n = 0"


@dataclass(frozen=True)
class ContinuationOptions:
    """Which cells, how far, and what is alike in shuffled candidates."""

    boundary: str = option("", "boundary of the cells: 18, a fraction, or -3 (of L) (default: the main one)")
    readout: str = option(
        "common_it",
        "readout of the cells: native, common_LABEL, or common_pt and common_it of each pair (default common_it)",
    )
    n: str = option("0,1,2,4,8", "tokens after the event's own to sum over, a list (default %(default)s)")
    alike: str = option(
        "category", "columns of the prompts that shuffled candidates share, where there are such (default %(default)s)"
    )
    classes: str = option("", "file of patterns that tell layout and discourse, .toml (default: built-in ones)")
    weights: str = option("prompt", "what weighs the same in a mean: prompt or event (default %(default)s)")
    draws: int = option(DRAWS, "bootstrap draws over prompts (default %(default)s)", type=int)
    seed: int = option(SEED, "seed of the bootstrap, and of the shuffling (default %(default)s)", type=int)

    @property
    def steps(self) -> list[int]:
        """The numbers of tokens, 0 among them, in order.

        Raises:
            InputError: they are no list of whole numbers.
        """
        parts = [part.strip() for part in self.n.split(",")]
        if not all(part.isdecimal() for part in parts):
            raise InputError(f"n is {self.n!r}: give a list of whole numbers from 0 on, such as 0,1,2,4,8")
        return sorted({0, *map(int, parts)})

    @property
    def columns(self) -> list[str]:
        """Of the prompts, that shuffled candidates share."""
        return [part.strip() for part in self.alike.split(",") if part.strip()]


@dataclass
class _Jobs:
    """All jobs, finished or not.

    Attributes:
        tails: what checkpoints write behind events.
        states: of the extended sequences, at the boundary.
        replays: of these.
    """

    tails: list[BranchJob] = field(default_factory=list)
    states: list[StatesJob] = field(default_factory=list)
    replays: list[ContinuationJob] = field(default_factory=list)


class Continuation(CellAnalysis[ContinuationOptions]):
    """The interaction over following tokens."""

    name = "continuation"
    options = ContinuationOptions
    opt_in = True  # whole checkpoints write, and run over what they wrote

    def check(self, store: Store, options: ContinuationOptions) -> None:
        """Steps, columns, cells, draws and weights."""
        check_draws(options.draws, options.seed)
        check_weights(options.weights)
        _ = options.steps, _classes(options)
        given = options.columns != [ContinuationOptions.alike]
        for name in options.columns:
            if given and len(store) and name not in store.events.column_names:
                raise InputError(f"the prompts have no column {name!r}, which --alike names")
        check_settings(store, _settings(store, options, pairs_of(store)))

    def beside(self, folder: RunFolder, options: Mapping[str, Any]) -> dict[str, str]:
        """The file of classes."""
        return digests_of_files({"classes": options.get("classes", "")})

    def jobs(
        self, store: Store, finished: Finished, options: ContinuationOptions, exactness: Mapping[str, Any]
    ) -> list[ReplayJob]:
        """The plain cells, by the readouts of all pairs: what n = 0 is held against."""
        settings = _settings(store, options, pairs_of(store))
        return jobs_left(store, finished, replace(settings, **exactness))

    def model_jobs(
        self, folder: RunFolder, store: Store, options: ContinuationOptions
    ) -> Mapping[Path, Sequence[ModelJob]]:
        """Tails, and states of what they extend; before there are tails, as if each were as long as can be."""
        every, place = _all(folder, store, options), folder.path / self.name
        return {place / TAILS: left(place / TAILS, every.tails), place / STATES: left(place / STATES, every.states)}

    def own_jobs(
        self, folder: RunFolder, store: Store, options: ContinuationOptions, exactness: Mapping[str, Any]
    ) -> Mapping[Path, Sequence[LateJob]]:
        """The replays of the extended sequences; before there are tails, as if each were as long as can be."""
        place = folder.path / self.name / REPLAYS
        return {place: [job for job in _all(folder, store, options).replays if not is_finished(place, job.key)]}

    def prepare(self, run: Run, store: Store, options: ContinuationOptions, on_progress: OnProgress) -> None:
        """Write the tails, then run both checkpoints of each pair over the extended sequences."""
        if not len(store):
            return
        place, limits = run.folder.path / self.name, Limits.of(run.lineup)
        engine = LocalEngine(store, load_backbone=run.load_blocks)
        tails = _all(run.folder, store, options, limits).tails
        run_left(tails, place / TAILS, engine, on_progress, run.runner)
        run.runner.check_all({place / TAILS: tails})  # events are given the tails of others
        run_left(_all(run.folder, store, options, limits).states, place / STATES, engine, on_progress, run.runner)

    def numbers(self, cells: pa.Table, run: Run, options: ContinuationOptions) -> Numbers:
        """One row per event, cell, contrast and n; groups for each kind, pair, contrast and n."""
        store, place = run.store, run.folder.path / self.name / REPLAYS
        jobs = _all(run.folder, store, options).replays
        table = _sorted(
            pa.concat_tables(
                [CONTINUED.empty_table(), *(read_result(place / file_name(job.key)).content for job in jobs)]
            ),
            store,
        )
        boundary = one_boundary(store, options.boundary)
        effects = _effects(table, store, boundary)
        drifts = _drifts(table, cells, boundary)
        groups: list[dict[str, Any]] = []
        for kind, pair in sorted(set(zip(effects["kind"].to_pylist(), effects["pair"].to_pylist(), strict=True))):
            of = effects.filter(pc.and_(pc.equal(effects["kind"], kind), pc.equal(effects["pair"], pair)))
            group = {name: of[name][0].as_py() for name in ("kind", "pair", "boundary", "readout")}
            drift = drifts.filter(pc.is_in(drifts["event_id"], value_set=of["event_id"].combine_chunks()))
            groups += [group | one for one in groups_of(of, drift["drift"].to_numpy(), options)]
        return Numbers(table, groups)

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """The interaction over n."""
        several = [name for name in ("kind", "pair") if len({one[name] for one in groups}) > 1]

        def of_whom(group: Mapping[str, Any]) -> str:
            return "".join(f"{group[name]}: " for name in several)

        kinds = sorted({one["kind"] for one in groups})
        first = min(groups, key=lambda one: (one["kind"] != FIRST_DIVERGENCE, one["kind"], one["pair"]))
        drawn = [one for one in groups if (one["kind"], one["pair"]) == (first["kind"], first["pair"])]
        lines: dict[str, list[tuple[float, Interval]]] = {}
        for one in drawn:
            lines.setdefault(_named(one["contrast"]), []).append((one["n"], one["interaction"]))
            if one["contrast"] == "primary":
                lines.setdefault(_SURVIVORS, []).append((one["n"], one["interaction_0"]))
        last = ([one for one in drawn if one["contrast"] == "primary"] or drawn)[-1]
        said = f"{last['interaction']['mean']:+.2f} at n = {last['n']}, {last['interaction_0']['mean']:+.2f} at n = 0"
        of_other = f" Of {len(kinds)} kinds, {first['kind']} is drawn." if len(kinds) > 1 else ""
        return Section(
            title="Constrained continuation",
            figures=[
                Lines(
                    "n: tokens after the event's own",
                    "interaction of Y_n, nats",
                    lines,
                    None,
                    f"The interaction over following tokens; of the events that are left: {said}.{of_other}",
                )
            ],
            columns=["contrast, n", "events", "prompts", "A", "B", "interaction", "same events, n = 0", "tail"],
            rows=[
                [
                    f"{of_whom(one)}{_named(one['contrast'])}, {one['n']}",
                    one["n_events"],
                    one["n_prompts"],
                    *(one[name] for name in (*_MEANS, "interaction_0", "tail")),
                ]
                for one in groups
            ],
            shows=(
                "Y_n sums the log-probabilities of n + 1 tokens of IT's continuation, less those of PT's. A tail above "
                "0 says that the interaction goes on behind the event's token. Same forced lets both begin with y_it; "
                "shuffled takes another prompt's tail. "
                f"Y_0 is off the grid's margin by {first['drift_max']:.1g} at most."
            ),
            does_not_show=(
                "The curve is not of one population: events drop out as n grows, so the interaction of those left is "
                "told at n = 0 too. Each checkpoint's own continuation is likelier under itself by construction."
            ),
        )


def groups_of(effects: pa.Table, drift: Any, options: ContinuationOptions) -> Iterator[dict[str, Any]]:
    """The groups of one kind and pair, for each contrast and n that has events.

    Args:
        effects: one row per event, contrast and n: ``event_id``, ``prompt_id``, ``contrast``, ``n``, ``late_from_pt``,
            ``late_from_it`` and ``interaction``.
        drift: how far each cell's Y_0 is from its margin, ``[m]``.
        options: weights, draws and seed.
    """
    how: dict[str, Any] = {"weights": options.weights, "draws": options.draws, "seed": options.seed}
    off = np.abs(np.asarray(drift, np.float64))
    of_drift = {"drift_median": float(np.median(off)) if len(off) else 0.0, "drift_max": float(off.max(initial=0.0))}
    for contrast in CONTRASTS:
        of = effects.filter(pc.equal(effects["contrast"], contrast))
        at_0 = of.filter(pc.equal(of["n"], 0))
        for n in options.steps:
            own = of.filter(pc.equal(of["n"], n))
            if not own.num_rows:
                continue
            same = at_0.take(pc.index_in(own["event_id"], value_set=at_0["event_id"].combine_chunks()))
            values = {name: own[name].to_numpy() for name in _MEANS}
            values["interaction_0"] = same["interaction"].to_numpy()
            values["tail"] = values["interaction"] - values["interaction_0"]
            sample = Sample.of(own["prompt_id"], values, **how)
            counts = {"n_events": sample.n_events, "n_prompts": sample.n_prompts}
            means = {name: sample.mean(name) for name in values}
            yield {"contrast": contrast, "n": n, **counts, **means, **of_drift}


def _named(contrast: str) -> str:
    return contrast.replace("_", " ")


def _effects(table: pa.Table, store: Store, boundary: int) -> pa.Table:
    """The contrasts of every event, contrast and n."""
    at = pc.index_in(table["event_id"], value_set=store.events["event_id"].combine_chunks())
    of_event = store.events.select([*names(EVENT_KEY), PAIR.name]).take(at)
    n = table["n"].cast(pa.string())
    cell = {
        "boundary": pa.array([boundary] * table.num_rows, pa.int32()),
        "scope": pa.array(["prefix"] * table.num_rows, pa.string()),
        **{name: table[name] for name in ("upstream", "late", "readout")},
        "variant": pc.binary_join_element_wise(table["contrast"], n, " "),
        "margin": table["y"],
    }
    assert [*cell][:-1] == [*names(CELL_KEY)]
    effects = contrasts(pa.table({**{name: of_event[name] for name in of_event.column_names}, **cell}))
    parts = pc.split_pattern(effects["variant"], " ")
    effects = effects.append_column("contrast", pc.list_element(parts, 0))
    return effects.append_column("n", pc.list_element(parts, 1).cast(pa.int32()))


def _drifts(table: pa.Table, cells: pa.Table, boundary: int) -> pa.Table:
    """How far Y_0 is from the margin of the grid: ``event_id`` and ``drift`` of every cell."""
    keys = ["event_id", "upstream", "late", "readout"]
    own = table.filter(pc.and_(pc.equal(table["n"], 0), pc.equal(table["contrast"], "primary")))
    plain = pc.equal(cells["boundary"], boundary)
    for name, value in (("scope", "prefix"), ("variant", PLAIN.name)):
        plain = pc.and_(plain, pc.equal(cells[name], value))
    margins = cells.filter(plain).select([*keys, "margin"])
    found = own.select([*keys, "y"]).join(margins, keys)
    drift = pc.subtract(found["y"], found["margin"].cast(pa.float64()))
    return pa.table({"event_id": found["event_id"], "drift": drift})


def _sorted(table: pa.Table, store: Store) -> pa.Table:
    """By event, as the store has them, then by cell, contrast and n: whatever segments there were."""
    orders = {
        "event_id": store.events["event_id"].combine_chunks(),
        "upstream": pa.array(store.checkpoints),
        "late": pa.array(store.checkpoints),
        "contrast": pa.array(list(CONTRASTS)),
    }
    columns = [pc.index_in(table[name], value_set=order).to_numpy() for name, order in orders.items()]
    return table.take(pa.array(np.lexsort([table["n"].to_numpy(), *reversed(columns)])))


# ---- candidates ----


def _all(
    folder: RunFolder,
    store: Store,
    options: ContinuationOptions,
    limits: Limits = NO_LIMITS,
) -> _Jobs:
    """All jobs of all pairs. Where a tail is not written yet, candidates are as long as can be."""
    every, place = _Jobs(), folder.path / Continuation.name / TAILS
    for pair in pairs_of(store) if len(store) else ():
        tails = _tails(store, options, pair, limits)
        every.tails += [job for jobs in tails.values() for job in jobs]
        if all(is_finished(place, job.key) for jobs in tails.values() for job in jobs):
            candidates = _candidates(place, store, options, pair, tails)
        else:
            longest = options.steps[-1] + 1
            assumed = tuple((number, *[0] * (longest - 1)) for number in range(len(CANDIDATES)))
            candidates = dict.fromkeys(events_of_pair(store, pair), assumed)
        states, replays = _replays(folder, store, options, pair, candidates)
        every.states += states
        every.replays += replays
    return every


def _tails(store: Store, options: ContinuationOptions, pair: Pair, limits: Limits) -> dict[str, list[BranchJob]]:
    """The jobs that write what follows y_it by IT, y_pt by PT, and y_it by PT: by candidate."""
    # For n = 0 alone, too: so the same events count there as where more is asked.
    longest, (pt, it) = max(1, options.steps[-1]), pair
    own = events_of_pair(store, pair)
    tokens = {role: {number: store.events[f"y_{role}"][number].as_py() for number in own} for role in ("pt", "it")}
    who = {"desc_primary": ("it", it), "base_primary": ("pt", pt), "base_forced_desc": ("it", pt)}
    return {
        name: branch_jobs(store, f"y_{role}", tokens[role], label, longest, limits)
        for name, (role, label) in who.items()
    }


def _candidates(
    place: Path, store: Store, options: ContinuationOptions, pair: Pair, jobs: Mapping[str, Sequence[BranchJob]]
) -> dict[int, Candidates]:
    """The candidates of every event of a pair that has some, of the tails that were written."""
    length = options.steps[-1] + 1
    own = events_of_pair(store, pair)
    events = store.events
    ids = events["event_id"].to_pylist()
    written = {
        name: {row["event_id"]: row for row in read_branches(place, of).to_pylist()} for name, of in jobs.items()
    }
    rooms: dict[str, int] = {}
    for row in (row for of in written.values() for row in of.values()):
        room = length if row["room"] is None else min(length, row["room"])
        rooms[row["event_id"]] = min(room, rooms.get(row["event_id"], room))

    def tokens_of(row: Mapping[str, Any], room: int) -> tuple[int, ...]:
        return tuple([row["token"], *row["tail"]][: min(room, row["n_plain"])])

    found = {}
    donors = _donors(store, options, own, {id_ for id_, row in written["desc_primary"].items() if row["n_plain"]})
    for number in own:
        name, room = ids[number], rooms[ids[number]]
        of = {candidate: tokens_of(rows[name], room) for candidate, rows in written.items()}
        desc, donor = of["desc_primary"], donors.get(number)
        shuffled: tuple[int, ...] = ()
        if desc and donor is not None:
            shuffled = desc[:1] + tokens_of(written["desc_primary"][ids[donor]], room)[1:]
            if not written["desc_primary"][name]["tail"]:  # y_it ends a text: nothing follows it
                shuffled = desc
        candidates = (*(of[candidate] for candidate in CANDIDATES[:3]), shuffled)
        if any(candidates):
            found[number] = candidates
    return found


def _donors(store: Store, options: ContinuationOptions, own: Sequence[int], whole: set[str]) -> dict[int, int]:
    """Of each event another one of its pair, from another prompt, that is alike; by numbers.

    Args:
        store: of the events.
        options: what is alike, and the seed.
        own: numbers of the pair's events.
        whole: ids of those that may give their tail.
    """
    events, classes = store.events, _classes(options)
    ids, prompts = events["event_id"].to_pylist(), events["prompt_id"].to_pylist()
    none = [None] * len(ids)
    texts, special = (
        events[name].to_pylist() if name in events.column_names else none for name in ("token_it", "special_it")
    )
    columns = [events[name].to_pylist() for name in ("kind", *options.columns) if name in events.column_names]
    groups: dict[tuple[Any, ...], list[int]] = {}
    alike = {}
    for number in own:
        text = texts[number]
        kind = None if text is None else classes.of(text, special=bool(special[number]))
        alike[number] = (kind, *(str(column[number]) for column in columns))
        if ids[number] in whole:
            groups.setdefault(alike[number], []).append(number)
    found = {}
    for number in own:
        group = groups.get(alike[number], [])
        drawn = int(hashlib.sha256(f"{options.seed}:{ids[number]}".encode()).hexdigest()[:12], 16)
        for step in range(len(group)):
            donor = group[(drawn + step) % len(group)]
            if prompts[donor] != prompts[number]:
                found[number] = donor
                break
    return found


def _replays(
    folder: RunFolder, store: Store, options: ContinuationOptions, pair: Pair, candidates: Mapping[int, Candidates]
) -> tuple[list[StatesJob], list[ContinuationJob]]:
    """The states and the replays of these candidates, by segment."""
    captured, settings = store.fingerprint, _settings(store, options, [pair])
    (boundary,), exactness = settings.boundaries, exactness_of(folder)
    every_state, every_replay = [], []
    for segment in store.segments:
        own = [number for number in segment.events if number in candidates]
        if not own:
            continue
        of = tuple(candidates[number] for number in own)
        ids, offsets = store.token_ids(own)
        starts, sequences, first, lengths = offsets.tolist(), [], [], []
        for event, tokens in distinct(of):
            prefix = ids[starts[event] : starts[event + 1]].tolist()
            lengths.append(len(prefix) + len(tokens) - 1)
            if len(tokens) > 1:
                sequences.append((*prefix, *tokens[:-1]))
                first.append(len(prefix))
        states = [
            StatesJob(
                store=captured.digest,
                segment=segment.name,
                boundary=boundary,
                checkpoint=digest_of(captured.checkpoints[label].to_json()),
                label=label,
                dtype=captured.dtype,
                sequences=tuple(sequences),
                first=tuple(first),
                strict=exactness["strict"],
                max_tokens=captured.max_tokens,
            )
            for label in (pair if sequences else ())
        ]
        every_state += states
        every_replay += [
            ContinuationJob(
                store=captured.digest,
                segment=segment.name,
                lengths=tuple(lengths),
                sequences=tuple(range(len(lengths))),
                upstreams=pair,
                boundary=boundary,
                late=late,
                **exactness,
                events=tuple(number - segment.events.start for number in own),
                candidates=of,
                steps=tuple(options.steps),
                readouts=settings.readouts,
                states=tuple(states),
            )
            for late in pair
        ]
    return every_state, every_replay


def _classes(options: ContinuationOptions) -> TokenClasses:
    return read_token_classes(options.classes) if options.classes else TokenClasses()


def _settings(store: Store, options: ContinuationOptions, pairs: Sequence[Pair]) -> GridSettings:
    boundary = one_boundary(store, options.boundary)
    return GridSettings((boundary,), readouts=(options.readout,)).of_pair(store.checkpoints, pairs)


ANALYSIS = Continuation()
