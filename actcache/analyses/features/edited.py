"""Edited: cells whose late blocks lose, gain or move features at position p, and what that does to the margin.

Features are read and moved while the descendant's late blocks run, in its own cells alone: the cells of the base's late
blocks are plain ones. So an interaction B - A changes by what the two edited cells change, and all of that is paired,
event by event. Features are of one ranking, and read as they were for it.
"""

from __future__ import annotations

from abc import abstractmethod
from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from actcache.analyses.controls import aligned
from actcache.analyses.features.before import Before
from actcache.analyses.features.cell_step import CellStep
from actcache.analyses.features.crosscoder import Crosscoder
from actcache.analyses.features.rank import ranking_seal, read_gradients, read_ranked
from actcache.analyses.features.ranked import Features, Ranked, Reading, only
from actcache.analyses.features.step import load_crosscoders
from actcache.analyses.grid import GridSettings, jobs_left
from actcache.canonical import digest_of
from actcache.errors import InputError
from actcache.replay.edits import PLAIN, Add, Edit, Variant
from actcache.replay.features import Instead, MoveFeatures
from actcache.replay.vectors import EventVectors
from actcache.store import Store
from actcache.study.analysis import Numbers, Options, exactness_of, option
from actcache.study.cells import Finished, finished_cells, gather_cells
from actcache.study.contrasts import contrasts
from actcache.study.engine import LateJob
from actcache.study.prefix_job import PREFIX
from actcache.study.run_folder import RunFolder
from actcache.study.statistics import DRAWS, SEED, Floats, Ints, Number, Sample, check_draws, check_weights

if TYPE_CHECKING:
    from actcache.study.run import Run

TESTED = ("held_out", "all")
SETS = {
    "top": "top",
    "random": "matched random",
    "same_norm": "random direction",
    "active": "most active others",
}
"""Names of sets, and what a reader is told of them."""


@dataclass(frozen=True)
class EditOptions:
    """What all steps that edit features share."""

    tested: str = option(
        "held_out",
        "prompts that test: held_out (those that did not rank) or all (as published for gate and rescue) (default "
        "%(default)s)",
    )
    seeds: int = option(3, "random controls of each kind, with seeds 0, 1, ... (default %(default)s)", type=int)
    weights: str = option("prompt", "what weighs the same in a mean: prompt or event (default %(default)s)")
    draws: int = option(DRAWS, "bootstrap draws over prompts (default %(default)s)", type=int)
    seed: int = option(SEED, "seed of the bootstrap (default %(default)s)", type=int)


def sizes(text: str) -> tuple[int, ...]:
    """Sizes of sets, as the command line has them."""
    return tuple(size(one) for one in text.split(","))


def size(text: str) -> int:
    """The size of a set, at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a number of features, 1 or more")
    return int(text)


def amounts(text: str) -> tuple[float, ...]:
    """How far features are moved, as the command line has it."""
    try:
        found = tuple(float(one) for one in text.split(","))
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not a list of numbers") from error
    if not all(np.isfinite(found)) or len(set(found)) < len(found):
        raise ArgumentTypeError(f"{text!r}: expected finite numbers, each once")
    return found


def check_edits(options: EditOptions) -> None:
    """Raise InputError for draws, weights, seeds, or who tests."""
    check_draws(options.draws, options.seed)
    check_weights(options.weights)
    if options.tested not in TESTED:
        raise InputError(f"tested is {options.tested!r}; choose {' or '.join(TESTED)}")
    if not 1 <= options.seeds < 1000:
        raise InputError(f"seeds is {options.seeds}; expected 1 to 999 random controls of each kind")


@dataclass(frozen=True)
class Moved:
    """One set of features that is moved, and how far.

    Attributes:
        set: which set, of ``SETS``.
        k: how many features the set stands for, or is a control of.
        features: by block.
        amount: 1 removes them, or moves them all the way.
        to_native: whether they are moved to what they are where the descendant runs on its own state, not removed.
        instead: a random direction in place of theirs.
        seed: of what is random.
    """

    set: str
    k: int
    features: Features = field(compare=False)
    amount: float = 1.0
    to_native: bool = False
    instead: Instead | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        """Of the variant."""
        seed = "" if self.seed is None else f",seed={self.seed}"
        return f"{self.set}[k={self.k},amount={self.amount}{seed}]"

    @property
    def n(self) -> int:
        """How many features it moves."""
        return sum(map(len, self.features.values()))

    @property
    def described(self) -> list[Any]:
        """All that its cells depend on, beside the ranking."""
        features = {str(block): of.tolist() for block, of in self.features.items()}
        return [self.name, features, self.to_native, self.instead]


def with_controls(
    ranked: Ranked, rows: Ints, seeds: int, controls: Sequence[str], *, instead: Instead = "random", **how: Any
) -> Iterator[Moved]:
    """A set of rows of the ranking, and these controls of it; those that have no features are left out."""
    k, own = len(rows), ranked.features(rows)
    every = [Moved("top", k, own, **how)]
    for seed in range(seeds):
        if "random" in controls:
            every.append(Moved("random", k, ranked.features(ranked.matched(rows, seed)), seed=seed, **how))
        if "same_norm" in controls:
            every.append(Moved("same_norm", k, own, instead=instead, seed=seed, **how))
    if "active" in controls:
        every.append(Moved("active", k, ranked.features(ranked.most_active(rows)), **how))
    yield from (moved for moved in every if moved.n)


@dataclass(frozen=True)
class Tested:
    """The events of one kind that test, and their margins.

    Attributes:
        effects: of the plain cells, one row per event.
        plain: by upstream, ``[E]``: the descendant's late blocks on its states, as replayed with the edits.
        edited: by upstream and the number of a :class:`Moved`, the same under it.
    """

    effects: pa.Table
    plain: Mapping[str, Floats]
    edited: Mapping[tuple[str, int], Floats]

    @property
    def prompts(self) -> pa.ChunkedArray:
        """Of the events."""
        return self.effects["prompt_id"]

    def lost(self, upstream: str, number: int) -> Floats:
        """``[E]``: how much less the margin is under an edit."""
        found: Floats = self.plain[upstream] - self.edited[upstream, number]
        return found


class EditStep(CellStep[Options]):
    """A step that edits features."""

    roles: ClassVar[slice] = slice(0, 2)
    """Of the pair: on whose states the edited cells are."""

    def check(self, store: Store, options: Any) -> None:
        """See :func:`check_edits`."""
        check_edits(options)

    def made_from(self, folder: RunFolder, store: Store) -> dict[str, Any]:
        """As of every step, and the ranking."""
        return super().made_from(folder, store) | {"ranking": ranking_seal(folder)}

    @abstractmethod
    def moved(self, ranked: Ranked, options: Options) -> list[Moved]:
        """What is edited."""

    @abstractmethod
    def of_kind(self, tested: Tested, moved: Sequence[Moved], ranked: Ranked, run: Run, options: Options) -> Numbers:
        """Numbers of the events of one kind: a table whose rows are events, and groups."""

    def asked(
        self, folder: RunFolder, store: Store, finished: Finished, options: Options
    ) -> dict[Path, Sequence[LateJob]]:
        """The plain cells at the ranking's boundary, and the edited ones."""
        ranked = read_ranked(folder, store)
        moved = self.moved(ranked, options) if len(store) else []
        edited = variants_of(moved, ranked, folder, store, ranked.reading.pair[self.roles])
        return self._work(folder, store, finished, ranked, moved, edited)

    def planned(self, before: Before, folder: RunFolder, finished: Finished) -> Mapping[Path, Sequence[LateJob]]:
        """The same, of a ranking to come."""
        ranked = Ranked.before(before)
        moved = self.moved(ranked, self.options())
        edited = dict.fromkeys(ranked.reading.pair[self.roles], stand_ins(moved, before.store.width))
        return self._work(folder, before.store, finished, ranked, moved, edited)

    def _work(
        self,
        folder: RunFolder,
        store: Store,
        finished: Finished,
        ranked: Ranked,
        moved: Sequence[Moved],
        edited: Mapping[str, tuple[Variant, ...]],
    ) -> dict[Path, Sequence[LateJob]]:
        """What is not finished of the plain cells, and of the edited ones of each upstream."""
        reading = ranked.reading
        plain = GridSettings((reading.boundary,), readouts=(reading.readout,), **exactness_of(folder))
        work: dict[Path, Sequence[LateJob]] = {folder.cell_groups: jobs_left(store, finished, plain)}
        for upstream, variants in edited.items():
            place = self._place(folder, ranked, moved, upstream)
            settings = replace(plain, upstreams=(upstream,), lates=reading.pair[1:], variants=variants)
            work[place] = jobs_left(store, finished_cells(place, store), settings)
        return work

    def numbers(self, cells: pa.Table, run: Run, options: Any) -> Numbers:
        """One row per event and set; groups for each kind of events and set."""
        folder, store = run.folder, run.store
        ranked = read_ranked(folder, store)
        reading, moved = ranked.reading, self.moved(ranked, options) if len(store) else []
        of = {"pair": ",".join(reading.pair), "boundary": reading.boundary, "scope": PREFIX}
        chosen = [pc.equal(cells[name], value) for name, value in (of | _read_by(reading)).items()]
        effects = contrasts(cells.filter(_every(chosen)))
        if options.tested == "held_out":
            ranking = pc.is_in(effects["prompt_id"], value_set=pa.array(sorted(ranked.prompts), pa.string()))
            effects = effects.filter(pc.invert(ranking))
        tables, groups = [], []
        for kind in sorted(set(effects["kind"].to_pylist())):
            of_kind = effects.filter(pc.equal(effects["kind"], kind))
            found = self.of_kind(self._tested(of_kind, moved, ranked, run), moved, ranked, run, options)
            named = {"kind": kind, **of, "readout": reading.readout, "encoding": reading.encoding}
            groups += [named | one for one in found.groups]
            tables.append(found.table)
        empty = effects.select(["event_id", "prompt_id"]).slice(0, 0)
        return Numbers(pa.concat_tables([empty, *tables], promote_options="default"), groups)

    def _tested(self, effects: pa.Table, moved: Sequence[Moved], ranked: Ranked, run: Run) -> Tested:
        reading, names = ranked.reading, [PLAIN.name, *(one.name for one in moved)]
        axes = {"variant": names, "event_id": effects["event_id"].to_pylist()}
        plain: dict[str, Floats] = {}
        edited: dict[tuple[str, int], Floats] = {}
        for upstream in reading.pair[self.roles]:
            place = self._place(run.folder, ranked, moved, upstream)
            cells = gather_cells(place, run.store, **exactness_of(run.folder))
            of = {"boundary": reading.boundary, "late": reading.pair[1], "upstream": upstream}
            cells = cells.filter(_every([pc.equal(cells[name], value) for name, value in of.items()]))
            # As replayed, on the diagonal too: what is compared went through the late blocks together.
            found = aligned(cells, axes, "margin") + aligned(cells, axes, "noop_delta")
            plain[upstream] = found[0]
            edited |= {(upstream, number): one for number, one in enumerate(found[1:])}
        return Tested(effects, plain, edited)

    def _place(self, folder: RunFolder, ranked: Ranked, moved: Sequence[Moved], upstream: str) -> Path:
        """Where the cells of an upstream lie: those of other sets lie elsewhere."""
        digest = digest_of([ranked.made, [one.described for one in moved]])
        return folder.features / self.step / f"{digest[:16]}-{upstream}"


def variants_of(
    moved: Sequence[Moved], ranked: Ranked, folder: RunFolder, store: Store, upstreams: Sequence[str]
) -> dict[str, tuple[Variant, ...]]:
    """By upstream, the edits of its cells behind the descendant's late blocks; none where nothing is moved."""
    if not moved:
        return {}
    reading, events = ranked.reading, tuple(store.events["event_id"].to_pylist())
    pt, it = reading.pair
    needed = reading.encoding == "joint" or any(one.to_native for one in moved)
    found = read_gradients(folder, store, reading, ranked.blocks) if needed else {}
    edits: dict[tuple[str, int], list[Edit]] = {}
    for number, block in enumerate(ranked.blocks):
        (crosscoder,) = load_crosscoders(folder, [block]).values()
        rows = {at: EventVectors(of.outputs[:, number], events) for at, of in found.items()}
        for which, one in enumerate(moved):
            if not len(one.features.get(block, ())):
                continue
            part = only(crosscoder, one.features[block])
            for upstream in upstreams:
                target = (rows[it, it], rows.get((it, pt))) if one.to_native else (None, None)
                operation = operation_of(part, reading, one, rows.get((upstream, pt)), target)
                edit = Edit(operation, site="mlp", layers=(block,))
                edits.setdefault((upstream, which), []).append(edit)
    return {
        upstream: tuple(Variant(one.name, tuple(edits[upstream, which])) for which, one in enumerate(moved))
        for upstream in upstreams
    }


def stand_ins(moved: Sequence[Moved], width: int) -> tuple[Variant, ...]:
    """Edits of position p that replay as those of features do, before there is a crosscoder: none is run."""
    return tuple(Variant(one.name, (Edit(Add(torch.zeros(width))),)) for one in moved)


def operation_of(
    crosscoder: Crosscoder,
    reading: Reading,
    moved: Moved,
    other: EventVectors | None,
    target: tuple[EventVectors | None, EventVectors | None],
) -> MoveFeatures:
    """What moves all features of a crosscoder that has no more than these.

    Args:
        crosscoder: of the block.
        reading: how rows are read.
        moved: how far, and where to.
        other: the base's rows, where they are read jointly.
        target: the descendant's and the base's rows of the target; of what is removed, none.
    """
    pt, it = reading.pair
    own, base = crosscoder.branch(it), None if other is None else crosscoder.branch(pt)
    return MoveFeatures(
        encoder=crosscoder.encoder[own].T.contiguous(),
        decoder=crosscoder.decoder_of(it).contiguous(),
        mean=crosscoder.mean[own],
        bias=tuple(crosscoder.b_enc.tolist()),
        scale=tuple(crosscoder.scale.tolist()),
        threshold=crosscoder.threshold,
        amount=moved.amount,
        instead=moved.instead,
        seed=moved.seed or 0,
        target=target[0],
        other_encoder=None if base is None else crosscoder.encoder[base].T.contiguous(),
        other_mean=None if base is None else crosscoder.mean[base],
        other=other,
        target_other=target[1],
    )


def over_seeds(moved: Sequence[Moved], values: Sequence[Floats]) -> dict[tuple[str, int, float], Floats]:
    """By set, k and amount, the mean of each event's values ``[E]`` over the seeds."""
    found: dict[tuple[str, int, float], list[Floats]] = {}
    for one, of in zip(moved, values, strict=True):
        found.setdefault((one.set, one.k, one.amount), []).append(of)
    return {key: np.mean(of, axis=0) for key, of in found.items()}


def numbered(moved: Sequence[Moved]) -> dict[tuple[str, int, float], int]:
    """By set, k and amount, how many features are moved; the most, of several seeds."""
    found: dict[tuple[str, int, float], int] = {}
    for one in moved:
        key = one.set, one.k, one.amount
        found[key] = max(one.n, found.get(key, 0))
    return found


def event_table(tested: Tested, moved: Sequence[Moved], columns: Mapping[str, Sequence[Floats]]) -> pa.Table:
    """One row per event and :class:`Moved`.

    Args:
        tested: the events.
        moved: what was edited.
        columns: by name, of each of these the values ``[E]``.
    """
    names = ("event_id", "prompt_id", "kind", "pair", "boundary", "scope", "readout")
    n, tables = len(tested.effects), []
    for number, one in enumerate(moved):
        table = tested.effects.select(names)
        of: dict[str, pa.Array] = {
            "set": pa.array([one.set] * n, pa.string()),
            "k": pa.array([one.k] * n, pa.int32()),
            "features": pa.array([one.n] * n, pa.int32()),
            "amount": pa.array([one.amount] * n, pa.float64()),
            "seed": pa.array([one.seed] * n, pa.int32()),
            **{name: pa.array(values[number], pa.float64()) for name, values in columns.items()},
        }
        for name, values in of.items():
            table = table.append_column(name, values)
        tables.append(table)
    return pa.concat_tables(tables)


def drops(tested: Tested, moved: Sequence[Moved], reading: Reading) -> list[Floats]:
    """Of each edit, how much less the interaction is under it: ``[E]``."""
    pt, it = reading.pair
    return [tested.lost(it, number) - tested.lost(pt, number) for number in range(len(moved))]


def drop_groups(
    tested: Tested, moved: Sequence[Moved], reading: Reading, options: Any, more: Mapping[str, Floats] | None = None
) -> tuple[Sample, list[dict[str, Any]]]:
    """A sample of the events with their interaction and drops (and ``more``); and a group for each set, k and amount,
    with drop, share, and what the set loses more than each of its controls."""
    of = over_seeds(moved, drops(tested, moved, reading))
    values = {str(key): one for key, one in of.items()} | dict(more or {})
    values["interaction"] = tested.effects["interaction"].to_numpy()
    how: dict[str, Any] = {"weights": options.weights, "draws": options.draws, "seed": options.seed}
    sample, n = Sample.of(tested.prompts, values, **how), numbered(moved)
    groups = []
    for (name, k, amount), features in n.items():
        key = str((name, k, amount))
        group: dict[str, Any] = {"set": name, "k": k, "amount": amount, "features": features}
        group |= {"n_events": sample.n_events, "n_prompts": sample.n_prompts}
        group |= {"interaction": sample.mean("interaction"), "drop": sample.mean(key)}
        group["share"] = sample.ratio(key, "interaction")
        group |= minus(sample, key, {other: str((other, k, amount)) for other in SETS if (other, k, amount) in n})
        groups.append(group)
    return sample, groups


def of_what(groups: Sequence[Mapping[str, Any]], kind: str) -> str:
    """A warning where shares of the interaction of these events say nothing, as it may be 0; else nothing."""
    of = next(one["interaction"] for one in groups if one["kind"] == kind)
    if of["low"] is None or not of["low"] <= 0 <= of["high"]:
        return ""
    interval = f"{of['mean']:+.3f} [{of['low']:+.3f}, {of['high']:+.3f}]"
    return f"The interaction of these events may be 0, {interval}: its shares say nothing then, and drops do. "


def minus(sample: Sample, key: str, others: Mapping[str, str]) -> dict[str, Any]:
    """What a top set does more than each of its controls, by the names of these."""
    if others.get("top") != key:
        return {}

    def more_than(other: str) -> Number:
        return sample.number(lambda means: means[key] - means[other])

    return {f"minus_{name}": more_than(other) for name, other in others.items() if name != "top"}


def _read_by(reading: Reading) -> dict[str, Any]:
    return {"readout": reading.readout, "variant": PLAIN.name}


def _every(chosen: Sequence[Any]) -> Any:
    found = chosen[0]
    for one in chosen[1:]:
        found = pc.and_(found, one)
    return found
