"""Whole models: jobs over full checkpoints for an analysis, whose results are files: which are left, and all in turn.

As replays are run (runner.py), but for one checkpoint after another, so that one is in memory at a time. Knows jobs and
files; knows nothing of what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from actcache.progress import OnProgress, Tally
from actcache.study.branch_job import BranchJob
from actcache.study.engine import LocalEngine
from actcache.study.results import is_finished
from actcache.study.runner import ModelJob, Runner
from actcache.study.states_job import StatesJob

OneJob = TypeVar("OneJob", BranchJob, StatesJob)


def left(folder: Path, jobs: Sequence[OneJob]) -> list[OneJob]:
    """Those that have left no result in a folder."""
    return [job for job in jobs if not is_finished(folder, job.key)]


def run_left(
    jobs: Sequence[ModelJob], folder: Path, engine: LocalEngine, on_progress: OnProgress, runner: Runner
) -> None:
    """Run what is not finished; the result of each job is a file in a folder, which is created.

    Args:
        jobs: all of them.
        folder: where their results lie.
        engine: that loads whole checkpoints.
        on_progress: told of the sequences, unless there are none.
        runner: that runs them, or its part of them.
    """
    jobs = [job for job in jobs if not is_finished(folder, job.key)]
    if own := runner.own(jobs, engine.store):
        tally = Tally(sum(job.n_units for job in own), "sequences", on_progress)
        runner.run(jobs, engine, folder, tally.add)
