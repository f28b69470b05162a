"""Runner: runs jobs one after another, reads ahead, and keeps what each gives.

A killed command goes on where it stopped: a finished job is one file, and is not among the jobs that a caller makes
next time (``jobs_left`` of the grid). Knows jobs and results; knows nothing of what jobs compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from actcache.progress import Tally
from actcache.study.engine import LocalEngine
from actcache.study.jobs import ReplayJob
from actcache.study.results import write_result


def run_jobs(jobs: Sequence[ReplayJob], engine: LocalEngine, folder: Path, tally: Tally) -> None:
    """Run jobs that are not done, in this order, and publish the result of each as soon as it is there.

    Args:
        jobs: what to run.
        engine: with what.
        folder: where results go; it exists.
        tally: hears of their units.
    """
    engine.expect(jobs)
    for job, read in _read_ahead(jobs, engine):
        result = job.run(engine, read, tally.add)
        write_result(folder, job.key | result.notes, result.table, result.final)


def _read_ahead(jobs: Sequence[ReplayJob], engine: LocalEngine) -> Iterator[tuple[ReplayJob, Any]]:
    """Each job with what it reads, which is read while the job before it runs."""
    with ThreadPoolExecutor(1, thread_name_prefix="actcache-read") as pool:
        coming = pool.submit(jobs[0].read, engine) if jobs else None
        for number, job in enumerate(jobs):
            assert coming is not None
            read = coming.result()
            if number + 1 < len(jobs):
                coming = pool.submit(jobs[number + 1].read, engine)
            yield job, read
