"""Part: one stage shared by processes that need not know of each other, as under any batch system.

Part I of N has the jobs of segments I, I + N, I + 2N and so on, counted from 1, as a capture's part has them. So which
jobs a part has depends on the store alone, whatever is finished by then. Knows jobs and their files; runs them as
runner.py does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from actcache.progress import PartDone, Told, nobody_told
from actcache.store import Store
from actcache.study.engine import LateJob, LocalEngine
from actcache.study.results import is_finished
from actcache.study.runner import FileJob, ModelJob, Runner


@dataclass(frozen=True)
class Part(Runner):
    """One part of the jobs; whoever finds all of them finished goes on to the tables.

    Attributes:
        number: from 0 on.
        of: how many parts there are.
    """

    number: int
    of: int
    has_every_job = False

    def own(self, jobs: Sequence[FileJob], store: Store) -> list[FileJob]:
        """See :class:`Runner`."""
        numbers = {segment.name: number for number, segment in enumerate(store.segments)}
        return [job for job in jobs if numbers[job.segment] % self.of == self.number]

    def run(
        self, jobs: Sequence[LateJob | ModelJob], engine: LocalEngine, folder: Path, told: Told = nobody_told
    ) -> None:
        """See :class:`Runner`; those of other parts are left out."""
        super().run(self.own(jobs, engine.store), engine, folder, told)

    def has_all(self, work: Mapping[Path, Sequence[LateJob | ModelJob]]) -> bool:
        """See :class:`Runner`."""
        return not self._left(work)

    def check_all(self, work: Mapping[Path, Sequence[LateJob | ModelJob]]) -> None:
        """See :class:`Runner`."""
        if left := self._left(work):
            raise PartDone(
                f"part {self.number + 1}/{self.of} is done; {left} jobs of other parts are not: when they are, the "
                "same command makes the tables, with or without --part"
            )

    def _left(self, work: Mapping[Path, Sequence[LateJob | ModelJob]]) -> int:
        return sum(not is_finished(folder, job.key) for folder, jobs in work.items() for job in jobs)
