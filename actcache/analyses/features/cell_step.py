"""Cell step: a step of features that replays cells, or gradients at them, and answers of these."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.analyses.features.step import Step
from actcache.files import make_folder
from actcache.store import Store
from actcache.study.analysis import CellAnalysis, Options
from actcache.study.cells import Finished
from actcache.study.engine import LateJob
from actcache.study.plan import shapes_of
from actcache.study.replay_job import ReplayJob
from actcache.study.run_folder import RunFolder
from actcache.study.work import total

if TYPE_CHECKING:
    from actcache.study.run import Run


class CellStep(Step[Options], CellAnalysis[Options]):
    """One such step."""

    def jobs(self, store: Store, finished: Finished, options: Options, exactness: Mapping[str, Any]) -> list[ReplayJob]:
        """None that a store alone tells: what a step needs depends on the run's crosscoders."""
        return []

    @abstractmethod
    def asked(
        self, folder: RunFolder, store: Store, finished: Finished, options: Options
    ) -> dict[Path, Sequence[LateJob]]:
        """All that is not finished of its replays, by the folder of their results."""

    def work(
        self, folder: RunFolder, store: Store, finished: Finished, options: Options
    ) -> dict[Path, Sequence[LateJob]]:
        """As of every analysis."""
        make_folder(folder.features)
        return {place: of for place, of in self.asked(folder, store, finished, options).items() if of}

    def announce(self, run: Run, jobs: Sequence[LateJob], say: Callable[[str], None]) -> None:
        """What the replays take."""
        if jobs:
            shapes = shapes_of(run.lineup)
            products = sum(n for part, n in total(job.cost(shapes) for job in jobs).items() if part != "hooks")
            say(f"{sum(job.n_units for job in jobs):,} replays: {products:.3g} multiply-adds")
