"""Whole models: jobs over full checkpoints for an analysis, whose results are files: which are left, and all in turn.

As replays are run (runner.py), but for one checkpoint after another, so that one is in memory at a time. Knows jobs and
files; knows nothing of what is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from actcache.progress import OnProgress, Tally
from actcache.study.branch_job import BranchJob
from actcache.study.engine import LocalEngine
from actcache.study.jobs import Result
from actcache.study.results import is_finished, write_result
from actcache.study.runner import run_jobs
from actcache.study.states_job import StatesJob

ModelJob = BranchJob | StatesJob
OneJob = TypeVar("OneJob", BranchJob, StatesJob)


def left(folder: Path, jobs: Sequence[OneJob]) -> list[OneJob]:
    """Those that have left no result in a folder."""
    return [job for job in jobs if not is_finished(folder, job.key)]


def run_left(work: Mapping[Path, Sequence[ModelJob]], engine: LocalEngine, on_progress: OnProgress) -> None:
    """Run what is not finished; the result of each job is a file in its folder, which is created.

    Args:
        work: jobs by folder.
        engine: that loads whole checkpoints.
        on_progress: told of the sequences, unless there are none.
    """
    ordered = [(job, folder) for folder, jobs in work.items() for job in jobs if not is_finished(folder, job.key)]
    if not ordered:
        return
    ordered.sort(key=lambda one: one[0].label)
    tally = Tally(sum(job.n_units for job, _ in ordered), "sequences", on_progress)
    folders = {id(job): folder for job, folder in ordered}

    def keep(job: ModelJob, result: Result) -> None:
        folders[id(job)].mkdir(parents=True, exist_ok=True)
        write_result(folders[id(job)], job.key | result.notes, result.table, result.final)

    run_jobs((job for job, _ in ordered), engine, keep, tally.add)
