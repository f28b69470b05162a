"""Runner: runs jobs one after another, reads ahead, and hands over what each gives as soon as it is there.

A killed command goes on where it stopped: what is finished is not among the jobs that a caller makes next time. Knows
that jobs read and run; knows nothing of what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from actcache.progress import Told, nobody_told
from actcache.study.engine import LateJob, LocalEngine
from actcache.study.jobs import Job, Result
from actcache.study.results import write_result

AnyJob = TypeVar("AnyJob", bound=Job[Any, Any, Any])


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
    """Run replays; the result of each is a file in ``folder``, which exists."""
    engine.expect(jobs)

    def keep(job: LateJob, result: Result) -> None:
        write_result(folder, job.key | result.notes, result.table, result.final)

    run_jobs(jobs, engine, keep, told)


def _read_ahead(jobs: Iterable[AnyJob], engine: Any) -> Iterator[tuple[AnyJob, Any]]:
    """Each job with what it reads, which is read while the job before it runs."""
    with ThreadPoolExecutor(1, thread_name_prefix="actcache-read") as pool:
        before = None
        for job in chain(jobs, [None]):
            coming = None if job is None else (job, pool.submit(job.read, engine))
            if before is not None:
                yield before[0], before[1].result()
            before = coming
