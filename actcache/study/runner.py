"""Runner: runs jobs one after another, reads ahead, and hands over what each gives as soon as it is there.

Stages and analyses are given a :class:`Runner`, and leave to it where their jobs run: here, or a part of them here
(part.py).

A killed command goes on where it stopped: what is finished is not among the jobs that a caller makes next time. Knows
that jobs read and run; knows nothing of what they compute.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, cast

from actcache.progress import OnProgress, Told, nobody_told
from actcache.replay.streamed_late import StreamedLate
from actcache.store import Store
from actcache.study.branch_job import BranchJob
from actcache.study.cells import of_no_use
from actcache.study.engine import LateJob, LocalEngine
from actcache.study.jobs import Job, Result
from actcache.study.replay_job import ReplayJob
from actcache.study.results import file_name, shared, write_result
from actcache.study.states_job import StatesJob

AnyJob = TypeVar("AnyJob", bound=Job[Any, Any, Any])
ModelJob = BranchJob | StatesJob
FileJob = TypeVar("FileJob", bound=LateJob | ModelJob)


class Answering(Protocol):
    """What a runner knows of an analysis."""

    name: ClassVar[str]
    has_parts: ClassVar[bool]

    def answer(self, run: Any, options: Any, *, on_progress: OnProgress, say: Callable[[str], None]) -> dict[str, Any]:
        """See ``Analysis``."""


class Runner:
    """Where the jobs run whose results are files: here, all of them."""

    is_elsewhere = False
    """Whether other processes load the checkpoints."""
    has_every_job = True
    """Whether it runs all jobs of a stage."""

    def own(self, jobs: Sequence[FileJob], store: Store) -> list[FileJob]:
        """Those of a stage's jobs that :meth:`run` will run."""
        return list(jobs)

    def run(
        self, jobs: Sequence[LateJob | ModelJob], engine: LocalEngine, folder: Path, told: Told = nobody_told
    ) -> None:
        """Run jobs of one kind, replays or those of whole checkpoints; the result of each is a file in ``folder``,
        which is created."""
        folder.mkdir(parents=True, exist_ok=True)
        late = [job for job in jobs if not isinstance(job, ModelJob)]
        run_replays(late, engine, folder, told)
        run_models([job for job in jobs if isinstance(job, ModelJob)], engine, folder, told)

    def has_all(self, work: Mapping[Path, Sequence[LateJob | ModelJob]]) -> bool:
        """Whether every one of these jobs, by folder, is finished, now that :meth:`run` has run its own."""
        return True

    def answer(
        self, analysis: Answering, run: Any, options: Any, on_progress: OnProgress, say: Callable[[str], None]
    ) -> dict[str, Any]:
        """Answer a question of a run (arguments and result as :meth:`Analysis.answer`)."""
        return analysis.answer(run, options, on_progress=on_progress, say=say)

    def taken(self) -> dict[str, Any] | None:
        """What other processes took for the last stage, to be recorded once; None where there are none."""
        return None

    def close(self) -> None:
        """Let go of what it runs jobs with."""

    def check_all(self, work: Mapping[Path, Sequence[LateJob | ModelJob]]) -> None:
        """Raise PartDone where :meth:`has_all` says no."""


def run_jobs(
    jobs: Iterable[AnyJob], engine: Any, publish: Callable[[AnyJob, Any], object], told: Told = nobody_told
) -> None:
    """Run jobs in this order.

    Args:
        jobs: what to run; each is taken when the one before it begins.
        engine: with what.
        publish: told of each job and what it gave, before the next one runs.
        told: hears of their units.
    """
    for job, read in _read_ahead(jobs, engine):
        publish(job, job.run(engine, read, told))


def run_replays(jobs: Sequence[LateJob], engine: LocalEngine, folder: Path, told: Told = nobody_told) -> None:
    """Run replays, shared with other processes that run them here too; the result of each is a file in ``folder``,
    which exists. All are there when this returns.

    Where the engine keeps one late stack at a time, those of one stack follow one another. Where its blocks are in
    memory one at a time, as many jobs share a pass over them as their rows are in memory.
    """
    engine.expect(jobs)

    def in_passes(job: LateJob) -> bool:
        return isinstance(job, ReplayJob) and not engine.has_kept(job)

    def keep(job: LateJob, result: Result) -> None:
        write_result(folder, job.key | result.notes, result.table, result.final)

    if engine.one_at_a_time:
        jobs = sorted(jobs, key=lambda job: (job.late, not in_passes(job)))
    before = of_no_use(folder, engine.store, (file_name(job.key) for job in jobs))
    with shared(folder, jobs, told, before) as rounds:
        for free in rounds:
            if not engine.one_at_a_time:
                run_jobs(free, engine, keep, told)
                continue
            for (late, replays), own in itertools.groupby(free, key=lambda job: (job.late, in_passes(job))):
                if replays and isinstance(stack := engine.expected(late), StreamedLate):
                    for group in groups_of(cast(Iterator[ReplayJob], own), engine):
                        for job, result in _in_one_pass(group, engine, stack, told):
                            keep(job, result)
                else:
                    run_jobs(own, engine, keep, told)


def run_models(jobs: Sequence[ModelJob], engine: LocalEngine, folder: Path, told: Told = nobody_told) -> None:
    """Run jobs of whole checkpoints, of one checkpoint after another; results as of :func:`run_replays`."""

    def keep(job: ModelJob, result: Result) -> None:
        write_result(folder, job.key | result.notes, result.table, result.final)

    with shared(folder, sorted(jobs, key=lambda job: job.label), told) as rounds:
        for free in rounds:
            run_jobs(free, engine, keep, told)


# Bytes of the rows of jobs that share a pass over blocks: these are in memory, what becomes of them need not be.
ROWS_AT_ONCE = 512 << 20


def groups_of(jobs: Iterable[ReplayJob], engine: LocalEngine) -> Iterator[list[ReplayJob]]:
    """Jobs in their order, in groups whose rows fit into memory."""
    group: list[ReplayJob] = []
    n_bytes = 0
    for job in jobs:
        longest: dict[int, int] = {}
        for sequence, length in zip(job.sequences, job.lengths, strict=True):
            longest[sequence] = max(length, longest.get(sequence, 0))
        own = sum(longest.values()) * engine.store.width * engine.dtype.itemsize * len(job.checkpoints)
        if group and n_bytes + own > ROWS_AT_ONCE:
            yield group
            group, n_bytes = [], 0
        group.append(job)
        n_bytes += own
    if group:
        yield group


def _in_one_pass(
    jobs: Sequence[ReplayJob], engine: LocalEngine, stack: StreamedLate, told: Told
) -> Iterator[tuple[ReplayJob, Result]]:
    """Jobs of one late stack, in one pass over its blocks."""
    begun = [(job, read := job.read(engine), job.begin(engine, read)) for job in jobs]
    parts = [(job, part) for job, _, one in begun for part in one.parts]
    batches = [part.batch for _, part in parts if part.batch is not None]
    label = jobs[0].late
    for number, result in stack.replay_all(batches, lambda words: told(doing=f"late stack of {label}: {words}")):
        job, part = parts[number]
        with job.naming(part):
            part.take(result, told)
    for job, read, one in begun:
        yield job, job.end(engine, read, one, told)


def _read_ahead(jobs: Iterable[AnyJob], engine: Any) -> Iterator[tuple[AnyJob, Any]]:
    """Each job with what it reads, which is read while the job before it runs."""
    with ThreadPoolExecutor(1, thread_name_prefix="actcache-read") as pool:
        before = None
        for job in chain(jobs, [None]):
            coming = None if job is None else (job, pool.submit(job.read, engine))
            if before is not None:
                yield before[0], before[1].result()
            before = coming
