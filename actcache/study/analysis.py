"""Analysis: one question of the study, as one file gives it; and how any of them is answered.

An analysis is a value of :class:`Analysis`, named once in ``analyses.ANALYSES``. Verb, files, section and tests follow
from there. Most are of cells, :class:`CellAnalysis`: they say which jobs they need, which numbers they make of the
cells, and what their section of the report shows. Knows jobs, the runner and files; knows no command line and draws
nothing.
"""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import pyarrow as pa

from actcache.errors import InputError
from actcache.files import write_atomically
from actcache.progress import OnProgress, Tally, untold
from actcache.sealed import Sealed, json_bytes, parquet_bytes, read_json, read_parquet
from actcache.study.run_folder import RunFolder
from actcache.study.section import Section, lines_of

# Models take seconds to import, which an analysis of a table of cells does without.
if TYPE_CHECKING:
    from actcache.store import Store
    from actcache.study.cells import Finished
    from actcache.study.engine import LateJob
    from actcache.study.replay_job import ReplayJob
    from actcache.study.run import Run
    from actcache.study.whole_models import ModelJob

Options = TypeVar("Options")


def option(
    default: Any, help: str, *, flag: str | None = None, type: Callable[[str], Any] = str, repeats: bool = False
) -> Any:
    """A field of an analysis' options.

    Args:
        default: where it is not given.
        help: what the flag's help says, beginning with a verb or with the noun that names the value.
        flag: where it is not ``--`` and the field's name.
        type: of the value, from the text of the command line.
        repeats: whether the flag, of a text that lists things with commas between, may be given for each of them.
    """
    return field(default=default, metadata={"help": help, "flag": flag, "type": type, "repeats": repeats})


def flag_of(entry: Field[Any]) -> str:
    """The flag of an option."""
    return entry.metadata["flag"] or f"--{entry.name.replace('_', '-')}"


@dataclass(frozen=True)
class Answered:
    """A section, and what it was made of.

    Attributes:
        section: itself.
        groups: of numbers.
        command: that gives them.
    """

    section: Section
    groups: Sequence[Mapping[str, Any]]
    command: str


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
        name: of the verb, of ``RUN/<name>.parquet`` and ``RUN/<name>.json``, of the section; of a step, the name of
            its analysis and its own.
        options: a frozen dataclass of :func:`option` fields.
        version: of its numbers: raised where the same run gives others.
        has_parts: whether its work is jobs whose results are files, so that it can be shared.
        opt_in: whether ``actcache study`` leaves it out unless it is named, as it costs more than the rest.
        needs_less: what a person may do where its memory is not enough.
        ratios: those of its numbers that are ratios of two others of their group, which these are; None where they are
            not there. Over several families no mean of ratios is taken.
    """

    name: ClassVar[str]
    options: type[Options]
    version: ClassVar[int] = 1
    has_parts: ClassVar[bool] = False
    opt_in: ClassVar[bool] = False
    needs_less: ClassVar[str] = "a run captured with --dtype bfloat16 needs less"
    ratios: ClassVar[Mapping[str, tuple[str, str] | None]] = MappingProxyType({})

    @abstractmethod
    def check(self, store: Store, options: Options) -> None:
        """Raise InputError for options that the store cannot serve; it says what to capture."""

    @abstractmethod
    def answer(
        self,
        run: Run,
        options: Options,
        *,
        on_progress: OnProgress = untold,
        say: Callable[[str], None] = lambda line: None,
    ) -> dict[str, Any]:
        """Run what is missing, and write its files.

        Args:
            run: a captured one; it loads what is asked for.
            options: of the analysis.
            on_progress: told of what is run.
            say: told, in one line, what a person should know.

        Returns:
            What its JSON file holds: ``analysis``, ``version``, ``options``, ``groups``. A group has names,
            ``n_events``, ``n_prompts``, and ``{"mean", "low", "high"}`` for each quantity.

        Raises:
            InputError: the store cannot serve these options.
        """

    def model_jobs(self, folder: RunFolder, store: Store, options: Options) -> Mapping[Path, Sequence[ModelJob]] | None:
        """What is not finished of the jobs that run whole checkpoints, by the folder of their results, as far as it is
        known before any has run; None where they are of another kind, so that nobody knows what they take."""
        return None

    def leaves_out(self, store: Store, options: Options) -> str:
        """What of its question such a store does not serve, and what would; nothing where it serves all."""
        return ""

    def of_table(self, cells: Sealed, options: Options, *, say: Callable[[str], None] = lambda line: None) -> Sealed:
        """Its answer of a table of cells that is no run's, for those that ``ANALYSES`` names as ``of_cells``."""
        raise InputError(f"{self.name} needs the folder of a run, RUN")

    @abstractmethod
    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """Its section, of the groups of its numbers, at least one."""

    def lines(self, found: Mapping[str, Any], store: Store | None = None) -> list[str]:
        """What a terminal shows.

        Args:
            found: what the file holds; by default the table of its section is shown.
            store: of the run, if it is one's.
        """
        if not found["groups"]:
            return ["no event to analyse"]
        return lines_of(self.section(found["groups"]))

    def answered(self, content: Mapping[str, Any], run: str) -> Answered:
        """The section of what :meth:`answer` gave, of at least one group; ``run`` is what the command calls the run."""
        return Answered(self.section(content["groups"]), content["groups"], self.command(run, content["options"]))

    def command(self, run: str, options: Mapping[str, Any]) -> str:
        """The command that answers with these options, those that are the defaults left out."""
        words = ["actcache", *self.name.split(), run]
        for entry in fields(self.options):  # type: ignore[arg-type]
            value, default = options.get(entry.name, entry.default), entry.default
            if value is True and default is False:
                words.append(flag_of(entry))
            elif value != (list(default) if isinstance(default, tuple) else default):
                words.append(f"{flag_of(entry)}={','.join(map(str, value)) if isinstance(value, list) else value}")
        return shlex.join(words)

    def notes(self, found: Mapping[str, Any]) -> list[str]:
        """What a person should know who is shown the file alone."""
        return []

    def what_next(self, folder: RunFolder, options: Options) -> str:
        """Where the answer is, and what a person may do with it."""
        return f"{self.path(folder, options)} holds them; next: actcache report {folder.path}"

    def read(self, folder: RunFolder, store: Store) -> dict[str, Any] | None:
        """What :meth:`answer` left; None where there is nothing, or it is of other events, of cells that were replayed
        otherwise, of files that have changed since, or of another version.

        Raises:
            CorruptFileError, NoSealError: the file is damaged, or not one of ours.
        """
        again = f"'actcache {self.name} {folder.path}' makes it again"
        try:
            content, made_from, _ = read_json(self.path(folder), f"the numbers of {self.name}", again)
        except FileNotFoundError:
            return None
        return content if self._holds(made_from, folder, store, content["options"]) else None

    def options_of(self, given: Mapping[str, Any]) -> Options:
        """Options from names and values; those left out are the defaults.

        Raises:
            InputError: a name is none of them, or a value is not what the command line would take.
        """
        known = {entry.name: entry for entry in fields(self.options)}  # type: ignore[arg-type]
        if unknown := sorted(given.keys() - known.keys()):
            raise InputError(f"{self.name} has no option {unknown[0]!r}; it has {', '.join(known)}")
        return self.options(**{name: self._value_of(known[name], value) for name, value in given.items()})

    def _value_of(self, entry: Field[Any], given: Any) -> Any:
        """The value of an option, read as the command line reads it; a list is its values with commas between."""
        default, read = entry.default, entry.metadata["type"]
        if type(given) is type(default) and (given == default or isinstance(given, bool)):
            return given
        text = ",".join(map(str, given)) if isinstance(given, list | tuple) else str(given)
        try:
            if given is None or isinstance(given, bool) or isinstance(default, bool):
                raise ValueError
            return read(text)
        except (ValueError, ArgumentTypeError) as error:
            raise InputError(f"{self.name}: {entry.name} is {given!r}, which {flag_of(entry)} does not take") from error

    def table_path(self, folder: RunFolder) -> Path:
        """Where its table lies."""
        return folder.path / f"{self.name}.parquet"

    def path(self, folder: RunFolder, options: Options | None = None) -> Path:
        """Where its numbers lie; those of some options may lie elsewhere."""
        return folder.path / f"{self.name}.json"

    def made_from(self, folder: RunFolder, store: Store) -> dict[str, Any]:
        """What its numbers depend on beside its options: they are shown as long as this is the same."""
        from actcache.study.cells import identity

        return {**identity(store), "version": self.version}

    def beside(self, folder: RunFolder, options: Mapping[str, Any]) -> dict[str, str]:
        """Digests of what its options name outside of the run's store, of what is there: files, or a corpus.

        Its numbers are no longer shown where one has changed. What is gone cannot be held against them.
        """
        return {}

    def made_with(self, folder: RunFolder, store: Store, beside: Mapping[str, str]) -> dict[str, Any]:
        """All that its numbers were made from, to be kept beside them."""
        return self.made_from(folder, store) | ({"beside": dict(beside)} if beside else {})

    def _holds(self, made_with: Mapping[str, Any], folder: RunFolder, store: Store, options: Mapping[str, Any]) -> bool:
        """Whether what numbers were made from is there now."""
        beside = made_with.get("beside", {})
        same = made_with == self.made_with(folder, store, beside)
        return same and all(beside.get(name, now) == now for name, now in self.beside(folder, options).items())

    def write(
        self, folder: RunFolder, options: Options, groups: list[dict[str, Any]], made_from: dict[str, Any]
    ) -> dict[str, Any]:
        """Write its JSON file, and return what it holds."""
        content = {
            "analysis": self.name,
            "version": self.version,
            "options": asdict(options),  # type: ignore[call-overload]
            "groups": groups,
        }
        write_atomically(self.path(folder), json_bytes(content, made_from))
        return content


class CellAnalysis(Analysis[Options]):
    """One question to cells: of replays, and of what is made of their table."""

    has_parts = True

    @abstractmethod
    def jobs(self, store: Store, finished: Finished, options: Options, exactness: Mapping[str, Any]) -> list[ReplayJob]:
        """What is not finished of the cells that it needs, to be replayed as ``exactness`` says: ``strict`` and
        ``max_tokens``."""

    def own_jobs(
        self, folder: RunFolder, store: Store, options: Options, exactness: Mapping[str, Any]
    ) -> Mapping[Path, Sequence[LateJob]]:
        """What is not finished of replays whose results are no cells of the run, by the folder below ``RUN/<name>``
        where they shall lie; by default none."""
        return {}

    def model_jobs(self, folder: RunFolder, store: Store, options: Options) -> Mapping[Path, Sequence[ModelJob]] | None:
        """See :meth:`Analysis.model_jobs`; by default there are none."""
        return {}

    def prepare(self, run: Run, store: Store, options: Options, on_progress: OnProgress) -> None:
        """Run those jobs, before any replay; by default there are none."""

    def work(
        self, folder: RunFolder, store: Store, finished: Finished, options: Options
    ) -> dict[Path, Sequence[LateJob]]:
        """All that is not finished of its replays, by the folder of their results, cells first."""
        exactness = exactness_of(folder)
        jobs: dict[Path, Sequence[LateJob]] = {folder.cell_groups: self.jobs(store, finished, options, exactness)}
        jobs |= self.own_jobs(folder, store, options, exactness)
        return {place: of for place, of in jobs.items() if of}

    def announce(self, run: Run, jobs: Sequence[LateJob], say: Callable[[str], None]) -> None:
        """Say what a person should know before these jobs run; by default nothing."""

    @abstractmethod
    def numbers(self, cells: pa.Table, run: Run, options: Options) -> Numbers:
        """Its numbers, of the cells of a run, among which are all that it needs."""

    def made_from(self, folder: RunFolder, store: Store) -> dict[str, Any]:
        """As of every analysis, and how the cells were replayed."""
        return super().made_from(folder, store) | exactness_of(folder)

    def read(self, folder: RunFolder, store: Store) -> dict[str, Any] | None:
        """See :meth:`Analysis.read`; the table must be there too, and whole."""
        content = super().read(folder, store)
        if content is None:
            return None
        again = f"'actcache {self.name} {folder.path}' makes it again"
        try:
            table = read_parquet(self.table_path(folder), f"the table of {self.name}", again, columns=[])
        except FileNotFoundError:
            return None
        made_with = dict(table.made_from)
        same = made_with.pop("options", None) == content["options"]
        return content if same and self._holds(made_with, folder, store, content["options"]) else None

    def answer(
        self,
        run: Run,
        options: Options,
        *,
        on_progress: OnProgress = untold,
        say: Callable[[str], None] = lambda line: None,
    ) -> dict[str, Any]:
        """See :meth:`Analysis.answer`; ``RUN/cells.parquet`` gains the cells that were missing.

        Raises:
            InputError: the store cannot serve these options.
            CheckError, CorruptFileError, NotFiniteError: see :meth:`actcache.study.replay_job.ReplayJob.run`.
            PartDone: the run's runner has a part of the jobs, and those of others are not finished.
        """
        from actcache.study.cells import finished_cells, gather_cells, publish_cells
        from actcache.study.engine import LocalEngine

        folder = run.folder
        store = folder.open_store()
        finished = finished_cells(folder.cell_groups, store)
        self.check(store, options)
        exactness, beside = exactness_of(folder), self.beside(folder, asdict(options))  # type: ignore[call-overload]
        self.prepare(run, store, options, on_progress)
        work = self.work(folder, store, finished, options)
        self.announce(run, [job for jobs in work.values() for job in jobs], say)
        own = [job for jobs in work.values() for job in run.runner.own(jobs, store)]
        tally = Tally(sum(job.n_units for job in own), "replays", on_progress)
        one_at_a_time = run.one_at_a_time
        engine = LocalEngine(
            store,
            run.load_late,
            finished,
            load_readout=run.load_readout,
            one_at_a_time=one_at_a_time,
            results=folder.path / self.name,
        )
        cells = None
        for place, jobs in work.items():
            run.runner.run(jobs, engine, place, tally.add)
            # At once: a command that is killed later will not find them missing.
            if place == folder.cell_groups and run.runner.has_all({place: jobs}):
                cells = publish_cells(folder.cells, folder.cell_groups, store, **exactness)
        run.runner.check_all(work)
        if cells is None:
            cells = gather_cells(folder.cell_groups, store, **exactness)
        numbers = self.numbers(cells, run, options)
        made_from = self.made_with(folder, store, beside)
        notes = made_from | {"options": asdict(options)}  # type: ignore[call-overload]
        write_atomically(self.table_path(folder), parquet_bytes(numbers.table, notes))
        return self.write(folder, options, numbers.groups, made_from)


def exactness_of(folder: RunFolder) -> dict[str, Any]:
    """How the cells of a run were replayed last: ``strict`` and ``max_tokens``; packed where nothing was."""
    if not folder.cells.is_file():
        return {"strict": False, "max_tokens": None}
    again = f"'actcache grid {folder.path}' makes it again"
    made_from = read_parquet(folder.cells, "a table of cells", again, columns=[]).made_from
    return {name: made_from[name] for name in ("strict", "max_tokens")}
