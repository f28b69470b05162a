"""Whole: every analysis that a run can serve, what is left of its work, and one after another.

Knows analyses by name, and what they say of themselves; computes no numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from actcache.analyses import ANALYSES, Named, find_analysis
from actcache.analyses.grid import GridSettings, jobs_left
from actcache.canonical import digest_of
from actcache.errors import CorruptFileError, InputError
from actcache.files import write_atomically
from actcache.models.cost import ModelShape
from actcache.progress import PartDone
from actcache.sealed import NoSealError, parquet_bytes
from actcache.store import Store
from actcache.study.analysis import Analysis, CellAnalysis
from actcache.study.cells import Finished, finished_cells
from actcache.study.dealt import Outlay
from actcache.study.engine import LateJob
from actcache.study.planned_store import PlannedStore, as_finished
from actcache.study.run import Run, check_complete
from actcache.study.run_folder import RunFolder
from actcache.study.whole_models import ModelJob
from actcache.study.work import total

Answer = Callable[[Analysis[Any]], dict[str, Any]]


@dataclass(frozen=True)
class Planned:
    """One analysis, and what is left to do for it.

    Attributes:
        analysis: itself.
        refused: why the run cannot serve it, and what would; None where it can.
        waits: for the parts of others, of which it says how many jobs are left; None where it does not.
        content: of its file, where it is answered already, under whatever options.
        jobs: what is not finished, replays and whole checkpoints, each with the folder of its result; None where its
            work is of another kind.
        outlay: what it takes where its work is no jobs, as far as that is known.
    """

    analysis: Analysis[Any]
    refused: str | None = None
    waits: str | None = None
    content: dict[str, Any] | None = None
    jobs: Sequence[tuple[Path, LateJob | ModelJob]] | None = None
    outlay: Outlay | None = None

    @property
    def runs_models(self) -> bool:
        """Whether whole checkpoints are among it, whose decoding takes more time than its multiply-adds tell."""
        return any(isinstance(job, ModelJob) for _, job in self.jobs or ())


def plan_study(run: Run, only: Collection[str] = (), also: Collection[str] = ()) -> list[Planned]:
    """What a study of a run is, with the default options of each analysis.

    Args:
        run: a captured one, with cells.
        only: names of the analyses; none for the default set, all that are not ``opt_in``.
        also: names of further ones.

    Raises:
        InputError: an unknown name, or a named one that the run cannot serve; the run is not complete or has no cells.
    """
    named = {*only, *also}
    for name in sorted(named):
        find_analysis(name)
    check_complete(run.store)
    if not run.folder.cells.is_file():
        raise InputError(f"{run.path} has no cells yet: 'actcache grid {run.path}' scores them")
    finished = finished_cells(run.folder.cell_groups, run.store)
    found = []
    for one in ANALYSES:
        if one.name in named or not only:
            planned = _plan(one, run.folder, run.store, finished)
            if planned.analysis.opt_in and one.name not in named and planned.content is None:
                continue
            if planned.refused is not None and one.name in named:
                raise InputError(f"{one.name}: {planned.refused}")
            found.append(planned)
    return found


def left_out(planned: Sequence[Planned]) -> list[str]:
    """Names of the analyses that are not in a plan."""
    chosen = {one.analysis.name for one in planned}
    return [one.name for one in ANALYSES if one.name not in chosen]


@contextmanager
def to_come(store: PlannedStore, grid: GridSettings) -> Iterator[tuple[RunFolder, Finished]]:
    """The folder of a run that has no results, and says how cells are replayed; and what its cells will be after a
    capture that leaves this store and a grid with these settings, ``of_depth``."""
    with TemporaryDirectory() as place:
        folder = RunFolder(Path(place))
        notes = {"strict": grid.strict, "max_tokens": grid.max_tokens}
        write_atomically(folder.cells, parquet_bytes(pa.table({}), notes))
        yield folder, as_finished(jobs_left(store, {}, grid), store)


def plan_before(folder: RunFolder, store: PlannedStore, finished: Finished) -> list[Planned]:
    """What every analysis will run of a store to come (:func:`to_come`), those that are ``opt_in`` too."""
    return [_plan(named, folder, store, finished) for named in ANALYSES]


def _plan(named: Named, folder: RunFolder, store: Store, finished: Finished) -> Planned:
    analysis = named.load()
    options = analysis.options()
    try:
        content = analysis.read(folder, store)
    except (CorruptFileError, NoSealError):  # it is made again
        content = None
    if content is not None:
        return Planned(analysis, content=content)
    try:
        analysis.check(store, options)
        work: dict[Path, Sequence[LateJob | ModelJob]] = {}
        if isinstance(analysis, CellAnalysis):
            work |= analysis.work(folder, store, finished, options)
        models = {} if named.of_cells else analysis.model_jobs(folder, store, options)
    except InputError as error:
        return Planned(analysis, refused=str(error))
    if models is None:
        return Planned(analysis)
    return Planned(analysis, jobs=[(place, job) for place, jobs in (work | dict(models)).items() for job in jobs])


def new_jobs(planned: Sequence[Planned]) -> list[list[LateJob | ModelJob]]:
    """Of each planned analysis, in order, its jobs but those that one before it has too."""
    seen: set[tuple[Path, str]] = set()
    found = []
    for one in planned:
        jobs = {(place, digest_of(job.key)): job for place, job in one.jobs or ()}
        found.append([job for key, job in jobs.items() if key not in seen])
        seen |= jobs.keys()
    return found


def costs(planned: Sequence[Planned], shapes: Mapping[str, ModelShape]) -> list[tuple[int, float]]:
    """Of each planned analysis, in order, replays and multiply-adds; what one before it computes counts no more."""
    found = []
    for new in new_jobs(planned):
        parts = total(job.cost(shapes) for job in new)
        found.append((sum(job.n_units for job in new), sum(n for part, n in parts.items() if part != "hooks")))
    return found


def answered(planned: Sequence[Planned], answer: Answer) -> Iterator[Planned]:
    """Each planned analysis after it was answered, or was found so; one that refuses only then is told as refused."""
    for one in planned:
        if one.refused is None and one.content is None:
            try:
                one = replace(one, content=answer(one.analysis), jobs=())
            except InputError as error:
                one = replace(one, refused=str(error))
            except PartDone as done:
                one = replace(one, waits=str(done))
        yield one
