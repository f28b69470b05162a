"""Capture: the segments and rows that a store lacks, as jobs; run, and committed as they come.

A store grows by the same call that makes it. Loads the checkpoints only where something is left to do.
"""

from __future__ import annotations

import functools
import itertools
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np

from actcache import prompts as prompts_module
from actcache.capture.asks import Steps
from actcache.capture.continuations import N_COMPARED, Known, check_beginnings
from actcache.capture.corpus import Texts
from actcache.capture.decide import Decider, Searched
from actcache.capture.forward import Forwarder, Resident
from actcache.capture.given import FIXED, GivenPrompt
from actcache.capture.growth import (
    digests_of_segments,
    existing,
    joined,
    missing_of,
    name_of_addition,
    said_of_sites,
    segments_of,
    sites_of_store,
)
from actcache.capture.residency import PER_LOAD, TOGETHER, AllResident, Checkpoints, OneResident
from actcache.capture.settings import CaptureSettings
from actcache.capture.streams import Streaming
from actcache.errors import InputError
from actcache.fingerprint import Fingerprint, order_of_labels
from actcache.models.backbone import Backbone
from actcache.models.blocks import check_boundary, find_site
from actcache.models.checkpoint import DTYPES
from actcache.models.lineup import Lineup
from actcache.models.probe import check_reads_back, check_replayable, check_text_alone
from actcache.models.prompt_ids import PromptIds
from actcache.models.readout import Readout
from actcache.models.streamed import Streamed
from actcache.models.templates import PLAIN, Rendering
from actcache.progress import OnProgress, Tally, Told, nobody_told, untold
from actcache.prompts import Prompt
from actcache.schema import FIRST_DIVERGENCE
from actcache.store import BackgroundWriter, Place, Segment, StoreWriter, open_store
from actcache.store.claims import Claims
from actcache.store.corpus import CORPUS, HELD_OUT
from actcache.store.layout import commit_key
from actcache.study.capture_job import CaptureJob, RowsJob
from actcache.study.held import Held
from actcache.study.holding import Holding

Unit = TypeVar("Unit")
Watch: TypeAlias = Callable[[str, Callable[[], Any]], Any]


def unwatched(label: str, load: Callable[[], Any]) -> Any:
    """Load a checkpoint, and do nothing else."""
    return load()


@dataclass(frozen=True)
class CaptureStage:
    """What another process has to know to run jobs of a capture.

    Attributes:
        number: of the stage; each has an engine of its own.
        checkpoints, pairs: what :meth:`Lineup.open` opened.
        settings, holding, known, folder: see :class:`LocalCapture`.
        store: where the store is.
        fingerprint, prompts: what :class:`StoreWriter` was given.
    """

    number: int
    checkpoints: Mapping[str, str]
    pairs: Sequence[tuple[str, str]] | None
    settings: CaptureSettings
    holding: Holding
    known: Known | None
    folder: Path | None
    store: Place
    fingerprint: Fingerprint
    prompts: Mapping[str, str]

    def open(self) -> tuple[LocalCapture, StoreWriter]:
        """An engine, and what commits into the store."""
        lineup = Lineup.open(self.checkpoints, self.pairs, dequantize=True)
        writer = StoreWriter(self.store, self.fingerprint, self.prompts)
        lineup.follow(writer.fingerprint.vocabulary)
        held = Held(lineup, self.holding)
        engine = LocalCapture(lineup, self.settings, held=held, known=self.known, folder=self.folder)
        return engine, writer

    def complete(
        self, engine: LocalCapture, writer: StoreWriter, jobs: Sequence[CaptureJob | RowsJob], told: Told
    ) -> None:
        """Run jobs and commit what they give; what others have committed meanwhile is as good."""
        left = [job for job in jobs if isinstance(job, RowsJob) or not writer.is_committed(job.segment)]
        rows = [job for job in left if isinstance(job, RowsJob)]
        if rows:
            engine.hold(open_store(self.store).segments)
        with BackgroundWriter(writer) as background:
            engine.between = background.check
            engine.complete(left, functools.partial(_commit, engine, background), told)


def _commit(engine: LocalCapture, background: BackgroundWriter, job: CaptureJob | RowsJob, given: Any) -> None:
    """Hand over what a job gave."""
    if isinstance(job, CaptureJob):
        background.append(job.segment, given)
    else:
        segment = engine.segment(job.segment)
        missing = {site: list(blocks) for site, blocks in job.sites}
        background.add_rows(name_of_addition(segment, missing), segment.record, given)


class Elsewhere(Protocol):
    """Other processes that run the jobs of a capture."""

    def capture(
        self,
        stage: CaptureStage,
        names: Sequence[str],
        jobs_of: Callable[[Sequence[str]], Sequence[CaptureJob | RowsJob]],
        told: Told,
    ) -> Searched:
        """Run jobs of the segments named, which are made when they are sent: many at once."""


class LocalCapture:
    """What capture jobs are run with in this process: checkpoints, loaded when the first job runs or as it is asked."""

    def __init__(
        self,
        lineup: Lineup,
        settings: CaptureSettings,
        watch: Watch = unwatched,
        say: Callable[[str], None] = lambda line: None,
        *,
        held: Held | None = None,
        known: Known | None = None,
        folder: Path | None = None,
    ) -> None:
        """Of these checkpoints.

        Args:
            lineup: the checkpoints.
            settings: what to compute.
            watch: runs each load of a checkpoint.
            say: told, in one line, what a person should know.
            held: how the checkpoints are held; None for the settings' device, and all of them if they fit.
            known: see :class:`Decider`.
            folder: where rows wait, if one checkpoint is in memory at a time.
        """
        self._lineup, self._settings, self._say = lineup, settings, say
        self._watch = watch
        self._held, self._known, self._folder = held or Held(lineup, Holding(settings.device)), known, folder
        self._told: Told = nobody_told
        self._said: set[str] = set()
        self._passes = itertools.count(1)
        self._segments: dict[str, Segment] = {}
        self.between: Callable[[], None] = lambda: None

    @functools.cached_property
    def decider(self) -> Decider:
        """With all checkpoints; calls ``between`` before each forward."""
        labels = self._lineup.labels
        if self.is_together:
            checkpoints: Checkpoints = AllResident({label: self._forwarder(label) for label in labels})
        else:
            checkpoints = OneResident(labels, self._forwarder, self._readout)
        of = self._lineup, checkpoints, self._settings, self._say, lambda: self.between()
        return Decider(*of, known=self._known, folder=self._folder)

    @property
    def searched(self) -> Searched:
        """What the searches did so far; nothing where no job has run."""
        return self.decider.searches if "decider" in vars(self) else Searched()

    @functools.cached_property
    def is_together(self) -> bool:
        """Whether all checkpoints are in memory at once."""
        return self._held.are_together(self._settings.dtype, say=self._say)

    def complete(self, jobs: Iterable[CaptureJob | RowsJob], publish: Callable[..., object], told: Told) -> None:
        """Run jobs, many together, and hand over what each gives as soon as it is there.

        Args:
            jobs: what to run; as many are taken as are computed together.
            publish: told of each job and what it gave.
            told: hears of their units.
        """
        jobs = iter(jobs)
        while first := next(jobs, None):
            most = TOGETHER if self.is_together else PER_LOAD
            self._told = functools.partial(told, in_rounds=not self.is_together)
            together = [first, *itertools.islice(jobs, max(1, most // max(1, first.n_units)) - 1)]
            steps: list[Steps[Any]] = [job.steps(self, self._told) for job in together]
            for number, given in self.decider.complete(steps, self._told):
                publish(together[number], given)

    def hold(self, segments: Iterable[Segment]) -> None:
        """Know these stored segments, whose sequences run again."""
        self._segments = {segment.name: segment for segment in segments}

    def segment(self, name: str) -> Segment:
        """A stored one."""
        return self._segments[name]

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)

    def _forwarder(self, label: str) -> Forwarder:
        if self._held.holding.stream:
            streamed = self._watch(label, functools.partial(self._load_streamed, label))
            return Streaming(label, streamed, lambda words: self._told(doing=words), self._passes)
        own = self._lineup, label, self._settings, self._held.placement.of[label]
        backbone = self._watch(label, functools.partial(load_backbone, *own))
        return Resident(backbone, self._settings.max_tokens, self._say_once)

    def _load_streamed(self, label: str) -> Streamed:
        settings, checkpoint = self._settings, self._lineup.checkpoints[label]
        streamed = self._held.streamed(label, DTYPES[settings.dtype])
        with checkpoint.named():
            for site, block in settings.sites:
                find_site(streamed.empty_block(block), site)
        return streamed

    def _readout(self, label: str) -> Readout:
        return self._held.readout(label, DTYPES[self._settings.dtype])


def capture(
    lineup: Lineup,
    prompts: Sequence[Prompt],
    store: Place,
    settings: CaptureSettings,
    *,
    rendering: Rendering = PLAIN,
    given: Sequence[GivenPrompt] | None = None,
    texts: Texts | None = None,
    part: tuple[int, int] = (0, 1),
    elsewhere: Elsewhere | None = None,
    watch: Watch = unwatched,
    on_progress: OnProgress = untold,
    say: Callable[[str], None] = lambda line: None,
    held: Held | None = None,
    known: Known | None = None,
    folder: Path | None = None,
) -> Searched:
    """Find the events of every prompt and store what their replay needs; resumable by the same call.

    Processes that do this at once, for one part, share its segments by claims (see :mod:`actcache.store.claims`).

    A store grows by it too. Prompts that follow those it was made from become new segments. For boundaries or sites
    that it lacks, its sequences run again, without a search. What it has stays as it is.

    Args:
        lineup: the checkpoints. Its pair defines the events; the states of all are stored.
        prompts: validated prompts; of no account where events or texts are given.
        store: where the store is or shall be, as in ``open_store``; new, or left by an earlier run of the same capture.
        settings: what to compute.
        rendering: how prompts become texts.
        given: events to store instead of those that a search finds (see :mod:`actcache.capture.given`).
        texts: to store rows of, and no events at all (see :mod:`actcache.capture.corpus`).
        part: ``(i, n)`` leaves all segments but every n-th, from the i-th on, to others that capture at the same time.
        elsewhere: what runs the jobs, if not this process.
        watch: runs each load of a checkpoint, given its label and what loads it: a :class:`Backbone`, or a
            :class:`Streamed` where its blocks are streamed.
        on_progress: told of prompts decided (or found committed), after every step of a search and every pack; then
            of sequences that run again.
        say: told, in one line, what a person should know (packing not possible, for example).
        held: see :class:`LocalCapture`; the store does not depend on it.
        known: what others say that checkpoints write, by prompt id and label, for the search to propose.
        folder: where rows wait if one checkpoint is in memory at a time; None for the system's temporary one.

    Returns:
        What its searches did.

    Raises:
        InputError: see :class:`PromptIds`, a boundary out of range, or a lineup of one checkpoint.
        IncompatibleError: the store belongs to another run; names the field. Prompts may have changed since, those that
            are not captured yet.
        UnsupportedModelError: see :func:`load_backbone`.
        OSError: the disk refuses; nothing half-written stays. Writing goes on beside the forwards, up to two segments
            behind; its failure stops them before the next one.
    """
    for boundary in settings.boundaries:
        check_boundary(boundary, lineup.n_blocks)
    if len(lineup.labels) < 2 and texts is None:
        raise InputError(f"events need two checkpoints, there is {lineup.labels[0]} alone: give another one")
    if texts is not None:
        prompts, settings = texts.prompts, replace(settings, support=CORPUS, max_new=0, context=texts.context)
    before = existing(store)
    captured = {} if before is None else before.prompts  # a store without events is false
    of_whom = prompts if given is None else [one.as_prompt() for one in given]
    segments = segments_of(of_whom, settings.shard_prompts, captured)
    shards = list(segments.items())[part[0] :: part[1]]
    prompt_ids: PromptIds | Texts | None = texts
    if given is None and texts is None:
        own = None if part == (0, 1) else [shard for _, shard in shards]
        prompt_ids = PromptIds(lineup, prompts, rendering, say, own=own)
    if known and prompt_ids is not None:
        first = prompts[:N_COMPARED]
        check_beginnings(known, first, prompt_ids.of(0, first))
    prompts = of_whom
    settings = settings if given is None else replace(settings, support=FIXED)
    if before is not None:
        lineup.follow(before.fingerprint.vocabulary)
    found = fingerprint(lineup, prompts, settings, rendering)
    digests = digests_of_segments(prompts, settings.shard_prompts, captured)
    writer = StoreWriter(store, found, digests)
    if before is not None:
        stored, asked = sites_of_store(before), settings.wanted
        kept = {
            site: [block for block in blocks if block not in asked.get(site, ())] for site, blocks in stored.items()
        }
        if any(kept.values()):
            say(f"the store has {said_of_sites(kept)} too, which stay")
        settings = settings.with_sites(joined(stored, asked))
    engine = LocalCapture(lineup, settings, watch, say, held=held, known=known, folder=folder)
    committed = writer.committed
    tally = Tally(sum(len(shard) for _, shard in shards), "prompts", on_progress)
    tally.add(found=sum(len(shard) for name, shard in shards if name in committed))

    def job_of(name: str) -> CaptureJob:
        shard = segments[name]
        own = slice(shard.start, shard.stop)
        of_segment = tuple(prompts[own])  # of a large file, read once
        return CaptureJob(
            store=found.digest,
            segment=name,
            settings=settings,
            prompts=of_segment,
            ids=tuple(map(tuple, prompt_ids.of(shard.start, of_segment))) if prompt_ids is not None else (),
            given=tuple(given or ())[own],
            n_pairs=len(lineup.pairs),
            n_paired=len(lineup.paired),
        )

    def jobs(free: Iterable[str]) -> Iterator[CaptureJob]:
        for name in free:
            if writer.is_committed(name):  # by another process meanwhile
                tally.add(found=len(segments[name]))
                continue
            yield job_of(name)

    left = [name for name, _ in shards if name not in committed]
    if elsewhere is None:
        _complete(engine, writer, left, str, lambda name: len(segments[name]), jobs, tally)
        searched = engine.searched
    else:
        held = held or Held(lineup, Holding(settings.device))
        stage = CaptureStage(
            number=0,
            checkpoints={label: one.place for label, one in lineup.checkpoints.items()},
            pairs=lineup.pairs if len(lineup.labels) > 1 else None,
            settings=settings,
            holding=held.holding,
            known=known,
            folder=folder and folder.resolve(),
            store=Path(store).resolve() if isinstance(store, str | Path) and "://" not in str(store) else store,
            fingerprint=found,
            prompts=digests,
        )
        searched = elsewhere.capture(stage, left, lambda names: [job_of(name) for name in names], tally.add)
    writer.check_prompts()
    there = list(open_store(store).segments)[part[0] :: part[1]]
    missing = {segment.name: sites for segment in there if (sites := missing_of(segment, settings.wanted))}
    if not missing:
        return searched
    gained = said_of_sites(functools.reduce(joined, missing.values()))
    say(f"the store gains {gained}: stored sequences run again, without a search")
    lacking = {segment.name: segment for segment in there if segment.name in missing}
    rows = {name: _rows_job(segment, missing[name]) for name, segment in lacking.items()}
    tally = Tally(sum(job.n_units for job in rows.values()), "sequences", on_progress)
    if elsewhere is None:
        engine.hold(lacking.values())

        def name_of(job: RowsJob) -> str:
            return name_of_addition(lacking[job.segment], missing[job.segment])

        _complete(engine, writer, [*rows.values()], name_of, lambda job: job.n_units, lambda free: free, tally)
    else:
        elsewhere.capture(stage, [*rows], lambda names: [rows[name] for name in names], tally.add)
    return searched


def _rows_job(segment: Segment, missing: Mapping[str, Sequence[int]]) -> RowsJob:
    """Of rows that are wanted and that a stored segment lacks."""
    return RowsJob(
        store=segment.fingerprint.digest,
        segment=segment.name,
        lengths=tuple(np.diff(segment.row_offsets).tolist()),
        sites=tuple((site, tuple(blocks)) for site, blocks in missing.items()),
    )


def _complete(
    engine: LocalCapture,
    writer: StoreWriter,
    units: Sequence[Unit],
    name: Callable[[Unit], str],
    size: Callable[[Unit], int],
    jobs: Callable[[Iterator[Unit]], Iterable[CaptureJob | RowsJob]],
    tally: Tally,
) -> None:
    """Run the jobs of these units here and commit what they give, each by its name, in rounds that other processes
    share: see :meth:`Claims.rounds`."""

    def is_done(unit: Unit) -> bool:
        return writer.storage.size(commit_key(name(unit))) is not None

    with Claims(writer.storage) as claims:
        for free in claims.rounds(units, name, is_done, tally.add, lambda unit: tally.add(found=size(unit))):
            with BackgroundWriter(writer) as background:
                engine.between = background.check
                engine.complete(jobs(free), functools.partial(_commit, engine, background), tally.add)


def load_backbone(lineup: Lineup, label: str, settings: CaptureSettings, device: str | None = None) -> Backbone:
    """A checkpoint's backbone, from its folder, on a device (None: of the settings' kind); one that could not be
    replayed is refused before anything is captured.

    Raises:
        UnsupportedModelError: the model does more to text than its decoder, or reads it both ways; the architecture
            cannot be replayed from its states, and prefix rows are asked for; or it has no such site.
    """
    checkpoint = lineup.checkpoints[label]
    model = checkpoint.load(DTYPES[settings.dtype], device or settings.device)
    with checkpoint.named():
        if settings.row_selection == "prefix" and settings.support != CORPUS:
            for boundary in sorted({min(settings.boundaries), max(settings.boundaries)}):
                check_replayable(model, boundary)
        check_text_alone(model)
        check_reads_back(model)
        backbone = Backbone(model)
        backbone.readout.mask(lineup.masked_ids)
        for site, block in settings.sites:
            find_site(backbone.blocks[block], site)
        return backbone


def fingerprint(
    lineup: Lineup, prompts: Sequence[Prompt], settings: CaptureSettings, rendering: Rendering = PLAIN
) -> Fingerprint:
    """Everything that the bytes of the store depend on; two equal fingerprints name the same work."""
    libraries = ["actcache", "torch", "transformers"]
    if any(checkpoint.adapter is not None for checkpoint in lineup.checkpoints.values()):
        libraries.append("peft")
    is_corpus = settings.support == CORPUS
    pair: Any = None if is_corpus else lineup.pair  # nobody's choices are events
    return Fingerprint(
        checkpoints={label: checkpoint.fingerprint for label, checkpoint in lineup.checkpoints.items()},
        pair=pair,
        pairs=None if len(lineup.pairs) == 1 else tuple(",".join(pair) for pair in lineup.pairs),
        lineup=order_of_labels(lineup.labels, pair or ()),
        # Only where the store would differ from one of an earlier version, which resumes otherwise.
        vocabulary=lineup.rule,
        support=None if settings.support == FIRST_DIVERGENCE else settings.support,
        prompts=prompts_module.digest(prompts),
        template=rendering.identity,
        special_tokens=None if rendering.add_special_tokens else "no",
        n_prompts=len(prompts),
        dtype=settings.dtype,
        boundaries=settings.boundaries,
        row_selection=settings.row_selection,
        width=lineup.width,
        n_blocks=lineup.n_blocks,
        max_new=settings.max_new,
        context=settings.context,
        dropped=tuple(sorted(lineup.special_ids)) if is_corpus else None,
        held_out=HELD_OUT if is_corpus else None,
        strict=settings.strict,
        max_tokens=settings.max_tokens,
        shard_prompts=settings.shard_prompts,
        codec=settings.codec,
        device=settings.device,
        processor=platform.machine(),
        versions={name: version(name) for name in libraries},
    )
