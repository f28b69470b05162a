"""Analysis: one question of the study, as one file gives it; and how any of them is answered.

An analysis says which jobs it needs, which numbers it makes of the cells, and what its section of the report shows. It
is a value of :class:`Analysis`, named once in ``analyses.ANALYSES``. Verb, files, section and tests follow from there.
Knows jobs, the runner and files; knows no command line and draws nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import pyarrow as pa

from actcache.errors import InputError
from actcache.files import write_atomically
from actcache.progress import OnProgress, Tally, untold
from actcache.replay.late_stack import LateStack
from actcache.sealed import json_bytes, parquet_bytes, read_json, read_parquet
from actcache.store import Store
from actcache.study.cells import Finished, finished_cells, gather_cells, identity, publish_cells
from actcache.study.engine import LocalEngine
from actcache.study.replay_job import ReplayJob
from actcache.study.run_folder import RunFolder
from actcache.study.runner import run_replays

Options = TypeVar("Options")
LoadLate = Callable[[str, int], LateStack]


def option(default: Any, help: str, *, flag: str | None = None, type: Callable[[str], Any] = str) -> Any:
    """A field of an analysis' options.

    Args:
        default: where it is not given.
        help: what the flag's help says, beginning with a verb or with the noun that names the value.
        flag: where it is not ``--`` and the field's name.
        type: of the value, from the text of the command line.
    """
    return field(default=default, metadata={"help": help, "flag": flag, "type": type})


@dataclass(frozen=True)
class Lines:
    """A figure: numbers with intervals over whole numbers, a line for each name.

    Attributes:
        x_label: of the axis below.
        y_label: of the axis beside, with the unit.
        lines: name -> (x, ``{"mean", "low", "high"}``) in the order of x.
        marked: the x to mark, or None.
        alt: the figure in words.
    """

    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[int, Mapping[str, float | None]]]]
    marked: int | None
    alt: str


@dataclass(frozen=True)
class Section:
    """What the report shows of an analysis.

    Attributes:
        title: of the section.
        figures: drawn one after another.
        columns: heads of the table, the first of them names the row.
        rows: of the table: texts, and numbers with their intervals.
        decimals: of the numbers.
        shows: what a reader may conclude, in one sentence or two.
        does_not_show: what a reader may not conclude.
    """

    title: str
    figures: Sequence[Lines]
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Mapping[str, float | None]]]
    shows: str
    does_not_show: str


@dataclass(frozen=True)
class Numbers:
    """What an analysis makes of cells.

    Attributes:
        table: one row per event, or finer.
        groups: means over events, ready for JSON: names, ``n_events``, ``n_prompts``, and ``{"mean", "low", "high"}``
            for each quantity.
    """

    table: pa.Table
    groups: list[dict[str, Any]]


class Analysis(ABC, Generic[Options]):
    """One question.

    Attributes:
        name: of the verb, of ``RUN/<name>.parquet`` and ``RUN/<name>.json``, of the section.
        options: a frozen dataclass of :func:`option` fields.
        version: of its numbers: raised where the same cells give others.
    """

    name: ClassVar[str]
    options: type[Options]
    version: ClassVar[int] = 1

    @abstractmethod
    def check(self, store: Store, options: Options) -> None:
        """Raise InputError for options that the store cannot serve."""

    @abstractmethod
    def jobs(self, store: Store, finished: Finished, options: Options, exactness: Mapping[str, Any]) -> list[ReplayJob]:
        """What is not finished of the cells that it needs, to be replayed as ``exactness`` says: ``strict`` and
        ``max_tokens``."""

    @abstractmethod
    def numbers(self, cells: pa.Table, store: Store, options: Options) -> Numbers:
        """Its numbers, of the cells of a run, among which are all that it needs."""

    @abstractmethod
    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """Its section, of the groups of its numbers, at least one."""

    def options_of(self, given: Mapping[str, Any]) -> Options:
        """Options from names and values; those left out are the defaults.

        Raises:
            InputError: a name is none of them.
        """
        known = [entry.name for entry in fields(self.options)]  # type: ignore[arg-type]
        if unknown := sorted(given.keys() - set(known)):
            raise InputError(f"{self.name} has no option {unknown[0]!r}; it has {', '.join(known)}")
        return self.options(**given)

    def table_path(self, folder: RunFolder) -> Path:
        """Where its table lies."""
        return folder.path / f"{self.name}.parquet"

    def path(self, folder: RunFolder) -> Path:
        """Where its numbers lie."""
        return folder.path / f"{self.name}.json"


def answer(
    analysis: Analysis[Options],
    folder: RunFolder,
    options: Options,
    load_late: LoadLate,
    *,
    on_progress: OnProgress = untold,
) -> dict[str, Any]:
    """Run what is missing, and write ``RUN/<name>.parquet`` and ``RUN/<name>.json``; ``RUN/cells.parquet`` gains the
    cells that were missing.

    Args:
        analysis: which.
        folder: of a captured run.
        options: of the analysis.
        load_late: gives the late stack of a checkpoint, by label, from a boundary on.
        on_progress: told of replays.

    Returns:
        What the JSON file holds: ``analysis``, ``version``, ``options``, ``groups``.

    Raises:
        InputError: the store cannot serve these options.
        CheckError, CorruptFileError, NotFiniteError: see :meth:`actcache.study.replay_job.ReplayJob.run`.
    """
    store = folder.open_store()
    finished = finished_cells(folder.cell_groups, store)
    analysis.check(store, options)
    exactness = exactness_of(folder)
    jobs = analysis.jobs(store, finished, options, exactness)
    if jobs:
        folder.cell_groups.mkdir(parents=True, exist_ok=True)
        tally = Tally(sum(job.n_units for job in jobs), "replays", on_progress)
        run_replays(jobs, LocalEngine(store, load_late, finished), folder.cell_groups, tally.add)
        cells = publish_cells(folder.cells, folder.cell_groups, store, **exactness)
    else:
        cells = gather_cells(folder.cell_groups, store, **exactness)
    numbers = analysis.numbers(cells, store, options)
    made_from = _made_from(analysis, folder, store)
    content = {
        "analysis": analysis.name,
        "version": analysis.version,
        "options": asdict(options),  # type: ignore[call-overload]
        "groups": numbers.groups,
    }
    notes = made_from | {"options": content["options"]}
    write_atomically(analysis.table_path(folder), parquet_bytes(numbers.table, notes))
    write_atomically(analysis.path(folder), json_bytes(content, made_from))
    return content


def read_answer(analysis: Analysis[Any], folder: RunFolder, store: Store) -> dict[str, Any] | None:
    """What :func:`answer` left; None where there is nothing, or it is of other events, of cells that were
    replayed otherwise, or of another version.

    Raises:
        CorruptFileError, NoSealError: the file is damaged, or not one of ours.
    """
    path = analysis.path(folder)
    again = f"'actcache {analysis.name} {folder.path}' makes it again"
    try:
        content, made_from, _ = read_json(path, f"the numbers of {analysis.name}", again)
    except FileNotFoundError:
        return None
    return content if made_from == _made_from(analysis, folder, store) else None


def _made_from(analysis: Analysis[Any], folder: RunFolder, store: Store) -> dict[str, Any]:
    return {**identity(store), **exactness_of(folder), "version": analysis.version}


def exactness_of(folder: RunFolder) -> dict[str, Any]:
    """How the cells of a run were replayed last: ``strict`` and ``max_tokens``; packed where nothing was."""
    if not folder.cells.is_file():
        return {"strict": False, "max_tokens": None}
    again = f"'actcache grid {folder.path}' makes it again"
    made_from = read_parquet(folder.cells, "a table of cells", again, columns=[]).made_from
    return {name: made_from[name] for name in ("strict", "max_tokens")}
