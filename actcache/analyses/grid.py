"""Grid: every upstream crossed with every late stack, at each boundary and scope, plain or under variants.

The question of it: at the first token where checkpoints choose differently, how much of the difference do the late
layers make on each upstream state? Its numbers are the cells (cells.py); effects averages them. What is not scored yet
becomes replay jobs, one per segment, boundary and late stack. Knows stores, jobs and tables; loads no models itself.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from actcache.capture.settings import parse_boundaries
from actcache.errors import InputError
from actcache.files import as_path, check_own_folder
from actcache.progress import OnProgress, Tally, untold
from actcache.replay.edits import PLAIN, Variant
from actcache.replay.late_stack import LateStack
from actcache.replay.sweep import SCOPES, VariantsAt
from actcache.schema import NATIVE, ROLES, common_readout, readouts_of
from actcache.store import Segment, Store
from actcache.study.cells import (
    Finished,
    Scored,
    by_segment,
    check_every_cell,
    find_finished,
    finished_cells,
    gather_cells,
)
from actcache.study.engine import LoadReadout, LocalEngine, nothing_given
from actcache.study.replay_job import ReplayJob
from actcache.study.results import file_name, has_earlier_files
from actcache.study.runner import Runner
from actcache.study.scores import readout_names
from actcache.study.work import ReplayWork


@dataclass(frozen=True)
class GridSettings:
    """What to score.

    Attributes:
        boundaries: a subset of the store's.
        scopes: of ``prefix`` (every position's state comes from U) and ``position`` (only position p's does).
        readouts: ``native``, ``common_<label>``; ``common_pt`` and ``common_it`` also name the roles of the pair, or of
            every pair, where no checkpoint is called so.
        variants: scored beside the plain grid; the same at every boundary, or a function of the boundary. Their edits
            change the rows that the cell replays, and name checkpoints of the store as donors.
        top1: whether variants get ``top1_id``, which takes the whole vocabulary, too; plain cells always do.
        kl: whether cells get ``kl``, how far their next-token distribution is from what the late checkpoint makes of
            its own states (read by the same readout): KL(own || cell) in nats. Variants then get ``top1_id`` too.
        strict: one sequence per forward; bit-identical to a hooked full forward, whatever else is scored with it.
        max_tokens: tokens of one forward otherwise; None for what suits the device.
        upstreams: labels of the only upstreams to score; None for all.
        lates: labels of the only late stacks to score by; None for all.
    """

    boundaries: tuple[int, ...]
    scopes: tuple[str, ...] = ("prefix",)
    readouts: tuple[str, ...] = (NATIVE, *map(common_readout, reversed(ROLES)))
    variants: Sequence[Variant] | VariantsAt = ()
    top1: bool = False
    kl: bool = False
    strict: bool = False
    max_tokens: int | None = None
    upstreams: tuple[str, ...] | None = None
    lates: tuple[str, ...] | None = None

    @property
    def wants_top1(self) -> bool:
        """Whether variants are scored by the whole vocabulary."""
        return self.top1 or self.kl

    def variants_at(self, boundary: int) -> tuple[Variant, ...]:
        """Everything to score at a boundary, the plain grid first."""
        return (PLAIN, *(self.variants(boundary) if callable(self.variants) else self.variants))

    def of_pair(self, labels: Sequence[str], pair: Sequence[str] | Sequence[Sequence[str]]) -> GridSettings:
        """The same settings with every readout by its label; ``pair`` is one pair, or several."""
        return replace(self, readouts=readouts_of(self.readouts, labels, pair))

    def of_depth(self, n_blocks: int) -> GridSettings:
        """The same settings with the layers of all variants as block indices."""

        @functools.cache
        def variants_at(boundary: int) -> tuple[Variant, ...]:
            return tuple(variant.of_depth(n_blocks) for variant in self.variants_at(boundary)[1:])

        return replace(self, variants=variants_at)


def run_grid(
    store: Store,
    load_late: Callable[[str, int], LateStack],
    folder: str | Path,
    settings: GridSettings,
    *,
    load_readout: LoadReadout = nothing_given,
    one_at_a_time: bool = False,
    runner: Runner | None = None,
    on_progress: OnProgress = untold,
    say: Callable[[str], None] = lambda line: None,
) -> pa.Table:
    """Score every cell that is not scored yet.

    Args:
        store: with prefix rows.
        load_late: gives the late stack of a checkpoint, by label, from a boundary on, in the store's dtype; called
            once per label.
        folder: where the results of jobs lie; created.
        settings: what to score.
        load_readout: gives the final norm and head of a checkpoint alone, by label: of one whose late stack replays
            nothing, or is not in memory.
        one_at_a_time: whether a late stack is let go before another checkpoint's is loaded.
        runner: where jobs run; None for here.
        on_progress: told of replays, an (event, scope, upstream, late, variant) each, after every pack.
        say: told, in one line, what a person should know.

    Returns:
        The cells of all jobs in ``folder``, these settings' and earlier ones', one row per cell. On the plain diagonal
        ``margin`` is the capture forward's own and ``noop_delta`` is the replayed one minus it; elsewhere
        ``noop_delta`` is null. Every event that the store had at the start has every cell asked for.

    Raises:
        InputError: settings that the store cannot serve; a variant whose name stands for other edits in ``folder``; an
            edit that moves nothing (see :class:`actcache.replay.moves.Moves`).
        CheckError: a replayed diagonal margin is off its native one by more than rounding, or that is off the one that
            capture stored; a cell asked for is missing at the end, as files of finished jobs went away meanwhile.
        CorruptFileError: the file of a finished job is damaged, and not one that is scored again here.
        PartDone: the runner has a part of the jobs, and those of others are not finished.
    """
    runner = runner or Runner()
    settings = settings.of_pair(store.checkpoints, store.fingerprint.event_pairs)
    check_settings(store, settings)
    settings = settings.of_depth(store.fingerprint.n_blocks)
    folder = as_path(folder)
    check_own_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    finished, damaged = find_finished(folder, store)
    _check_names(finished, settings)
    if has_earlier_files(folder):
        say(f"cells of an earlier version in {folder} have no checksum: they are scored again where they are asked for")
    jobs = jobs_left(store, finished, settings)
    replaced = {file_name(job.key) for job in jobs}
    for name, error in damaged.items():
        if name not in replaced:
            raise error
        say(f"{folder / name} is damaged; its cells are scored again")
    before = count_replays(store, settings) - sum(job.n_units for job in jobs)
    tally = Tally(before + sum(job.n_units for job in runner.own(jobs, store)), "replays", on_progress)
    tally.add(found=before)

    def load(label: str, boundary: int) -> LateStack:
        late = load_late(label, boundary)
        if late.not_packable and not settings.strict and not said:
            said.append(late.not_packable)
            say(f"{late.mode} sequences, not packed: {late.not_packable}")
        return late

    said: list[str] = []
    engine = LocalEngine(store, load, finished, load_readout=load_readout, one_at_a_time=one_at_a_time)
    runner.run(jobs, engine, folder, tally.add)
    runner.check_all({folder: jobs})
    cells = gather_cells(folder, store, strict=settings.strict, max_tokens=settings.max_tokens)
    asked = (
        (boundary, scope, [variant.name for variant in settings.variants_at(boundary)])
        for boundary in settings.boundaries
        for scope in settings.scopes
    )
    check_every_cell(cells, store, asked, settings.readouts)
    if (line := _without_displacement(finished_cells(folder, store), store, settings)) is not None:
        say(line)
    return cells


def jobs_left(store: Store, finished: Finished, settings: GridSettings) -> list[ReplayJob]:
    """What of these settings, ``of_depth``, is not finished: one job per segment, boundary and late stack, or more
    where scopes lack different cells. Jobs that read the same states follow one another."""
    jobs = []
    lengths = [position + 1 for position in store.events["position"].to_pylist()]
    sequences = store.events["sequence"].to_pylist()
    for segment, of_segment in by_segment(finished, store):
        for boundary in settings.boundaries:
            for late in settings.lates or store.checkpoints:
                left: dict[_Left, list[str]] = {}
                for scope in settings.scopes:
                    of_scope = _left(segment, of_segment.get((boundary, scope, late), []), settings, boundary)
                    if of_scope.variants:
                        left.setdefault(of_scope, []).append(scope)
                variants = {variant.name: variant for variant in settings.variants_at(boundary)}
                jobs += [
                    ReplayJob(
                        store=store.fingerprint.digest,
                        segment=segment.name,
                        lengths=tuple(lengths[segment.events.start : segment.events.stop]),
                        sequences=tuple(sequences[segment.events.start : segment.events.stop]),
                        checkpoints=tuple(store.checkpoints),
                        boundary=boundary,
                        late=late,
                        scopes=tuple(scopes),
                        readouts=tuple(one.readouts),
                        variants=tuple(variants[name] for name in one.variants),
                        top1=one.top1,
                        kl=one.kl,
                        strict=settings.strict,
                        max_tokens=settings.max_tokens,
                        upstreams=settings.upstreams,
                    )
                    for one, scopes in left.items()
                ]
    return jobs


class _Left(NamedTuple):
    """What is to be scored of one segment, boundary, scope and late stack."""

    variants: tuple[str, ...]
    readouts: frozenset[str]
    top1: bool
    kl: bool


def _left(segment: Segment, finished: Sequence[Scored], settings: GridSettings, boundary: int) -> _Left:
    """What no finished job has. A cell that is scored again gets all that it has, so that nothing is lost."""
    names = [variant.name for variant in settings.variants_at(boundary)]
    columns = {name: column for column, name in enumerate(names)}
    readouts, top1, kl = set(settings.readouts), settings.wants_top1, settings.kl
    done = np.zeros((segment.n_events, len(names)), bool)
    for scored in finished:
        if (scored.key["strict"], scored.key["max_tokens"]) != (settings.strict, settings.max_tokens):
            continue
        enough = _enough(scored, settings)
        events = scored.events[np.isin(scored.events, np.array(segment.events))] - segment.events.start
        done[np.ix_(events, np.array([columns[name] for name in enough & columns.keys()], np.int64))] = True
        if columns.keys() & (scored.names - enough):
            readouts |= scored.readouts
            top1 |= scored.has("top1")
            kl |= scored.has("kl")
    left = tuple(name for name in names if not done[:, columns[name]].all())
    return _Left(left, frozenset(readouts), top1, kl)


def _enough(scored: Scored, settings: GridSettings) -> frozenset[str]:
    """The variants of a finished job that have all that is asked."""
    if not set(settings.readouts) <= scored.readouts or (settings.kl and not scored.has("kl")):
        return frozenset()
    only = scored.key.get("upstreams")
    if only is not None and (settings.upstreams is None or not set(settings.upstreams) <= set(only)):
        return frozenset()
    return scored.names if scored.has("top1") or not settings.wants_top1 else scored.names & {PLAIN.name}


def planned_work(settings: GridSettings, checkpoints: Sequence[str]) -> list[ReplayWork]:
    """What a grid with these settings scores, of an architecture whose sequences can be packed."""
    work = []
    for boundary in settings.boundaries:
        variants = settings.variants_at(boundary)[1:]  # the plain one apart
        n_last = sum(variant.at_last_only for variant in variants)
        more = [variant for variant in variants if not variant.at_last_only]
        tails = tuple(sorted(variant.tail for variant in more if variant.tail is not None))
        others = [variant for variant in more if variant.tail is None]
        for late in checkpoints:
            one = ReplayWork(
                boundary,
                late,
                tuple(sorted(settings.scopes)),
                tuple(sorted(settings.readouts)),
                n_last=n_last,
                tails=tails,
                n_whole=len(others),
                n_apart=sum(one.depends_on_event for one in others),
                top1=settings.wants_top1,
                kl=settings.kl,
                mode="single" if settings.strict else "packed",
            )
            work.append(one)
    return work


def count_replays(store: Store, settings: GridSettings) -> int:
    """How many (event, scope, upstream, late, variant) combinations a grid scores."""
    n_variants = sum(len(settings.variants_at(boundary)) for boundary in settings.boundaries)
    return len(store) * len(settings.scopes) * len(store.checkpoints) ** 2 * n_variants


def pairs_of(store: Store) -> list[tuple[str, str]]:
    """The pairs of a store's events, each in the roles pt and it; those of the capture where there is no event."""
    pairs = sorted(set(store.events["pair"].to_pylist())) or [",".join(pair) for pair in store.fingerprint.event_pairs]
    return [(pt, it) for pt, it in (pair.split(",") for pair in pairs)]


def events_of_pair(store: Store, pair: Sequence[str]) -> list[int]:
    """Numbers of the events of a pair, ascending."""
    name = ",".join(pair)
    return [number for number, of in enumerate(store.events["pair"].to_pylist()) if of == name]


def one_boundary(store: Store, given: str) -> int:
    """The boundary that a text names as ``--boundary`` does; the main one where it is empty.

    Raises:
        InputError: it names none, or several.
    """
    found = parse_boundaries(given, store.fingerprint.n_blocks) if given else (store.main_boundary,)
    if len(found) != 1:
        raise InputError(f"boundary {given!r} is not one boundary; choose among {_listed(store.boundaries)}")
    return found[0]


def check_settings(store: Store, settings: GridSettings) -> None:
    """Raise InputError for a boundary, scope, readout or variant that the store cannot serve."""
    if settings.kl and "kl" in store.events.column_names:
        raise InputError("the prompts of this store carry a column 'kl', which would be the cells': leave kl out")
    if not store.fingerprint.has_prefix_rows:
        raise InputError("the store keeps rows of event positions only; the grid needs prefix rows: capture again")
    check_servable(settings, store.checkpoints, store.boundaries, store.fingerprint.n_blocks)
    lengths = [position + 1 for position in store.events["position"].to_pylist()]
    events = store.events["event_id"].to_pylist()
    for variant in (variant for boundary in settings.boundaries for variant in settings.variants_at(boundary)):
        for edit in variant.edits if lengths else ():
            edit.check_positions(lengths, variant.name)
            edit.check_vectors(store.width, store.dtype, events, variant.name)


def check_servable(
    settings: GridSettings, checkpoints: Sequence[str], boundaries: Sequence[int], n_blocks: int
) -> None:
    """Raise InputError for what no capture of these checkpoints at these boundaries can serve."""
    for boundary in settings.boundaries:
        if boundary not in boundaries:
            raise InputError(f"boundary {boundary} is not in the store; it has {_listed(boundaries)}")
    for scope in settings.scopes:
        if scope not in SCOPES:
            raise InputError(f"scope {scope!r} is unknown; choose {' or '.join(SCOPES)}")
    known = readout_names(checkpoints)
    for readout in settings.readouts:
        if readout not in known:
            raise InputError(f"readout {readout!r} is unknown; choose from {', '.join(known)}")
    for boundary in settings.boundaries:
        variants = settings.variants_at(boundary)
        twice = [name for name, count in Counter(variant.name for variant in variants).items() if count > 1]
        if twice:
            raise InputError(
                f"two variants at boundary {boundary} are named {twice[0]!r}; each needs a name of its own"
            )
        for variant in variants:
            for edit in variant.edits:
                donor = getattr(edit.operation, "donor", None)
                if donor is not None and donor not in checkpoints:
                    raise InputError(
                        f"variant {variant.name!r} names the donor {donor!r}; name one of the store's, "
                        f"{', '.join(checkpoints)}"
                    )
                edit.check_layers(boundary, n_blocks, variant.name)


def _check_names(finished: Finished, settings: GridSettings) -> None:
    """A name that stands for one thing in some cells and for another in others would be averaged over both."""
    for boundary in settings.boundaries:
        digests = {variant.name: variant.digest for variant in settings.variants_at(boundary)}
        for (of_boundary, _, _), of_place in finished.items():
            for scored in of_place if of_boundary == boundary else ():
                for name, digest in scored.key["variants"].items():
                    if digests.get(name, digest) != digest:
                        raise InputError(
                            f"variant {name!r} at boundary {boundary} has been scored with other edits "
                            f"({scored.path}); give it another name, or move that file away"
                        )


def _without_displacement(finished: Finished, store: Store, settings: GridSettings) -> str | None:
    """One line: in how many (event, scope, upstream, late) of all boundaries variants moved nothing; None if none did
    nowhere."""
    still: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    counted: set[Path] = set()  # a file of several scopes, or of an earlier version, stands in several places
    n_scopes = len(settings.scopes)
    for (boundary, scope, _), of_place in finished.items():
        if boundary in settings.boundaries and scope in settings.scopes:
            for name in {variant.name for variant in settings.variants_at(boundary)[1:]}:
                of_events: Counter[int] = Counter()  # by the first one: the same may be scored in several files
                for scored in of_place:
                    if scored.path not in counted:
                        first, n_still = int(scored.events[0]), scored.key["still"].get(name, 0)
                        of_events[first] = max(of_events[first], n_still)
                still[name] += of_events.total()
            counted |= {scored.path for scored in of_place}
    for boundary in settings.boundaries:
        for variant in settings.variants_at(boundary)[1:]:
            asked[variant.name] += len(store) * n_scopes * len(store.checkpoints) ** 2
    moved_less = [f"{name!r} in {n} of {asked[name]}" for name, n in still.most_common() if n]
    if not moved_less:
        return None
    some = ", ".join(moved_less[:3]) + (f" and {len(moved_less) - 3} more variants" if len(moved_less) > 3 else "")
    return (
        "some cells equal the plain ones, which is no error: there the edits met the donor's own rows, have weight 0, "
        f"or are a placebo ({some})"
    )


def _listed(boundaries: Sequence[int]) -> str:
    return ", ".join(str(boundary) for boundary in boundaries)
