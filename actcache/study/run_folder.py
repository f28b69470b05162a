"""RUN: the folder that one study of one pair fills, stage by stage. Knows names of files, nothing of their content.

RUN/run.json         where the checkpoints and prompts are, which store is the run's, and the command that made it
RUN/store/           captured states and events, unless they are kept elsewhere
RUN/corpus/          rows of texts without events, of the same checkpoints
RUN/features/        crosscoders that were trained on these, and what was made of them
RUN/stability.parquet which events rounding would change
RUN/cells/           finished cell groups
RUN/cells.parquet    all of them as one table
RUN/effects.json     contrasts with intervals; effects-<filter>.json where events are left out, or of another pair
RUN/<analysis>.json  numbers of an analysis; <analysis>.parquet: the table that they are means of
RUN/<analysis>/      what it replays for itself alone: finished jobs, in folders
RUN/report.html      the page for people
RUN/timings.json     what the stages took, of those that did their work in one go
RUN/plan.json        what was assumed of the run before it

All but the store are sealed (sealed.py), and every path that is recorded is absolute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from actcache.errors import CorruptFileError, IncompatibleError, InputError
from actcache.files import remove_tree, write_atomically
from actcache.models.origin import Recorded
from actcache.sealed import NoSealError, Sealed, check_seal, json_bytes, read_json
from actcache.store.far_path import check_address, path_at
from actcache.study.holding import Holding

if TYPE_CHECKING:
    from actcache.store import Store


_RECORD_ADVICE = "put back what was there; after a change on purpose, remove its last two keys, 'made_from' and 'seal'"


def run_at(given: str | Path) -> RunFolder | None:
    """The run in a folder, or in one of an object store; None where what was given is a store's place."""
    run = RunFolder(given)
    return run if run.record_path.is_file() else None


def store_place(given: str | Path) -> str | Path:
    """Where a store is: what was given, or the store of the run in that folder."""
    run = run_at(given)
    return given if run is None else run.store


def open_store(place: str | Path) -> Store:
    """Open a store, or the store of the run in that folder.

    Args:
        place: a folder, the folder of a run, or the address of an object store (``s3://bucket/prefix``).

    Raises:
        InputError: there is no store.
        IncompatibleError: it is not the one that the run was captured into.
        CorruptStoreError: its root is not what was written.
        FormatVersionError: it was written in a format that this version does not read.
    """
    from actcache import store

    run = run_at(place)
    return store.open_store(place) if run is None else run.open_store()


@dataclass(frozen=True)
class RunRecord:
    """What later stages need beside the store.

    Attributes:
        checkpoints: label -> what opens the checkpoint again: an absolute model folder, an id of the Hub with its
            commit, or two of these as BASE+ADAPTER.
        prompts: the prompts file, absolute.
        device: where capture ran; later stages use it unless told otherwise.
        command: the command line, for the report.
        store: where the store is, if not in the run's folder: a URL or an absolute path.
        fingerprint: digest of the store's fingerprint, once something is captured.
        kept: how much of the checkpoints was in memory at once, as :attr:`Holding.kept`; later stages keep as much
            unless told otherwise.
    """

    checkpoints: Mapping[str, str]
    prompts: str
    device: str
    command: str
    store: str | None = None
    fingerprint: str | None = None
    kept: str | None = None

    @property
    def holding(self) -> Holding:
        """How later stages hold the checkpoints."""
        return Holding.of(self.device, self.kept)


class CheckedFiles(NamedTuple):
    """What :meth:`RunFolder.check_files` found.

    Attributes:
        whole: files whose bytes are those written.
        without_seal: files of an earlier version's run, which cannot be checked.
        wrong: what is wrong with each of the others, and what to do.
    """

    whole: list[Path]
    without_seal: list[Path]
    wrong: list[CorruptFileError | NoSealError]


class RunFolder:
    """Paths of one run."""

    def __init__(self, path: str | Path) -> None:
        """Of the run in a folder; ``s3://bucket/prefix`` and its like are folders on object stores."""
        self.path = path_at(path)
        self.record_path = self.path / "run.json"
        self.corpus = self.path / "corpus"
        self.features = self.path / "features"
        self.stability = self.path / "stability.parquet"
        self.cell_groups = self.path / "cells"
        self.cells = self.path / "cells.parquet"
        self.effects = self.path / "effects.json"
        self.report = self.path / "report.html"
        self.timings_path = self.path / "timings.json"
        self.plan = self.path / "plan.json"

    @property
    def on_disk(self) -> Path | None:
        """The folder, where it is one of a disk."""
        return self.path if isinstance(self.path, Path) else None

    @property
    def store(self) -> str | Path:
        """Where the store is: ``RUN/store``, unless the run's record says otherwise.

        Raises:
            InputError: the record has a relative path, as an earlier version wrote it.
        """
        elsewhere = self.record().store if self.record_path.is_file() else None
        if elsewhere and _is_relative(elsewhere):
            raise InputError(
                f"{self.record_path} has its store at {elsewhere!r}, relative to a folder that it does not name; give "
                "the capture command again where it was first given"
            )
        place = self.path / "store"
        return elsewhere or (place if self.on_disk else str(place))

    def open_store(self) -> Store:
        """The store, which must be the one that the run was captured into.

        Raises:
            InputError: there is none.
            IncompatibleError: it is another one.
        """
        from actcache.store import open_store

        store = open_store(self.store)
        self._check_fingerprint(store)
        return store

    def bind_store(self, captured: RunRecord, n_prompts: int) -> None:
        """Put down which store is the run's from now on, how checkpoints were held for the last capture into it, and of
        which file, where its prompts are of another one than they were: corrected, or more of them (errors as
        :meth:`open_store`)."""
        store = self.open_store()
        record = replace(self.record(), fingerprint=store.fingerprint.digest, kept=captured.kept)
        if record.prompts != captured.prompts and n_prompts >= store.n_prompts:
            record = replace(record, prompts=captured.prompts, command=captured.command)
        if record != self.record():
            self._write_record(record)

    @contextmanager
    def being_captured(self, record: RunRecord, *, alone: bool = True) -> Iterator[None]:
        """Create the folder (or go on in an earlier run's) for the time of a capture.

        If the capture fails before anything was committed, whatever it created is removed again, unless others capture
        into it at the same time.

        Raises:
            InputError: the path is a file, or a folder with files in it that is not a run's; or the run's store is
                elsewhere than this record says.
            IncompatibleError: another store is where the run's was.
        """
        existing = self._is_existing_run()
        made_folder = not self.path.exists()
        if existing:
            found = self.record()
            if found.store and _is_relative(found.store) and record.store == absolute_place(found.store):
                self._write_record(replace(found, store=record.store))  # an earlier version's
            elif record.store != found.store:
                raise InputError(
                    f"{self.path} has its store at {found.store or self.path / 'store'}; give the same --store, or a "
                    "new folder"
                )
            try:
                self.open_store()
            except InputError:  # the store was taken away, or never begun: what is captured now is the run's
                self._write_record(record)
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_record(record)
            yield
        except BaseException:
            if alone and record.store is None and not self._is_others():
                self._clear(made_folder)
            raise

    def record(self) -> RunRecord:
        """The record of a captured run.

        Raises:
            InputError: the folder holds no run, or a record without a seal that is none.
            CorruptFileError: the record is damaged.
        """
        try:
            content = read_json(
                self.record_path,
                "a run record",
                _RECORD_ADVICE,
                without_seal=True,
            ).content
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(f"{self.path} holds no run (no run.json); make one with 'actcache run'") from error
        if (wrong := _what_is_wrong(content)) is not None:
            raise InputError(f"{self.record_path} is not a run record: {wrong}; put back what was there")
        places = {label: Recorded(place) for label, place in content["checkpoints"].items()}
        return RunRecord(**content | {"checkpoints": places})

    def timings(self) -> dict[str, Any]:
        """What each stage took of those that made this run; see :meth:`record_timing`.

        Raises:
            NoSealError, CorruptFileError: the file is an earlier version's, or damaged.
        """
        try:
            content, made_from, _ = read_json(self.timings_path, "timings", "remove it")
        except FileNotFoundError:
            return {}
        return content if made_from == self._timed else {}

    def record_timing(self, stage: str, timing: dict[str, Any] | None) -> None:
        """Put down what a stage took, or take it off the record with None. What cannot be read is begun anew.

        ``elapsed_s`` counts from its first load of weights on, ``load_s`` of these were loading."""
        try:
            timings = self.timings()
        except (NoSealError, CorruptFileError):
            timings = {}
        timings = {name: value for name, value in timings.items() if name != stage}
        if timing is not None:
            timings[stage] = timing
        if timings or self.timings_path.exists():
            write_atomically(self.timings_path, json_bytes(timings, self._timed))

    @property
    def _timed(self) -> dict[str, Any]:
        return {"store": self.record().fingerprint}

    def write_plan(self, plan: dict[str, Any], prompts: str) -> None:
        """Put down what is assumed of the run that shall be made here; the folder is created.

        Args:
            plan: as JSON.
            prompts: digest of those that it is made for.

        Raises:
            InputError: the folder holds a run already, or files that are not a run's; or the path is a file.
        """
        if self._is_existing_run():
            raise InputError(
                f"{self.path} holds a run already; 'actcache plan {self.path}' puts it beside its estimate"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.plan, json_bytes(plan, {"prompts": prompts}))

    def read_plan(self) -> Sealed:
        """What :meth:`write_plan` put down.

        Raises:
            NoSealError, CorruptFileError: the file is an earlier version's, or damaged.
            FileNotFoundError: there is none.
        """
        return read_json(self.plan, "a plan", "remove it")

    def effects_of(
        self, *, stable_only: bool = False, min_gap: float | None = None, pair: tuple[str, str] | None = None
    ) -> Path:
        """Where effects are; those that leave out events, or contrast another pair, have a file of their own."""
        filters = ["stable-only"] * stable_only
        filters += [] if min_gap is None else [f"min-gap-{min_gap!r}".removesuffix(".0")]
        filters += [] if pair is None else [f"pair-{','.join(pair)}"]
        return self.effects.with_stem("-".join([self.effects.stem, *filters]))

    def filters_of(self, effects: Path) -> str:
        """The flags that asked for such a file of effects, each after a space; empty for all events."""
        named, separator, pair = effects.stem.removeprefix(self.effects.stem).partition("-pair-")
        filters = named.replace("-stable-only", " --stable-only").replace("-min-gap-", " --min-gap ")
        return filters + (f" --pair {pair}" if separator else "")

    def check_files(self, analyses: Sequence[str]) -> CheckedFiles:
        """Hold the files of the run, its store apart, against their seals; ``analyses`` are the names of those there
        are.

        A file without a seal is wrong in a run whose record has one. Where the record has none either, an earlier
        version made the run, and its files cannot be checked. Cell groups of such a version do not count any more.
        """
        from actcache.study.results import result_files

        checked = CheckedFiles([], [], [])
        record_has_seal = True
        for path, advice in self._files_and_ways_on(result_files(self.cell_groups), analyses):
            try:
                check_seal(path.read_bytes(), path, "a file of a run", advice)
            except FileNotFoundError:
                continue
            except NoSealError as error:
                record_has_seal = record_has_seal and path != self.record_path
                if record_has_seal:
                    checked.wrong.append(error)
                else:
                    checked.without_seal.append(path)
            except CorruptFileError as error:
                checked.wrong.append(error)
            else:
                checked.whole.append(path)
        return checked

    def _files_and_ways_on(self, groups: list[Path], analyses: Sequence[str]) -> Iterator[tuple[Path, str]]:
        """Every file that a run may have, its record first, and what to do where it is damaged."""
        from actcache.study.results import final_path, result_files

        yield self.record_path, _RECORD_ADVICE
        yield self.stability, f"remove it, and 'actcache stability {self.path}' makes it again"
        for path in groups:
            yield path, "remove it, and give the 'actcache grid' command again that scored it"
            yield final_path(path), "remove it; what needs it is replayed"
        for name in analyses:
            for path in sorted(path for place in (self.path / name).glob("*/") for path in result_files(place)):
                yield path, f"remove it, and 'actcache {name} {self.path}' makes it again"
                yield final_path(path), "remove it; what needs it is replayed"
        yield self.cells, f"'actcache grid {self.path}' makes it again"
        others = [name for name in analyses if name != self.effects.stem]
        for name, suffix in product(others, ("json", "parquet")):
            yield self.path / f"{name}.{suffix}", f"'actcache {name.replace('/', ' ')} {self.path}' makes it again"
        for path in sorted(self.features.glob("crosscoders/*/crosscoder.json")):
            yield path, f"remove {path.parent}, and 'actcache features train {self.path}' trains it again"
        kinds = ("stable-only", "min-gap-", "pair-")
        filtered = (path for kind in kinds for path in self.path.glob(f"effects-{kind}*.json"))
        for path in (self.effects, *sorted(filtered)):
            yield path, f"'actcache effects {self.path}{self.filters_of(path)}' makes it again"
        yield self.report, f"'actcache report {self.path}' makes it again"
        yield self.timings_path, "remove it; what the stages took is not known then"
        yield self.plan, "remove it; the run is put beside its own numbers then"

    def _write_record(self, record: RunRecord) -> None:
        write_atomically(self.record_path, json_bytes(asdict(record), {}))

    def _check_fingerprint(self, store: Store) -> None:
        record = self.record()
        labels, captured = sorted(record.checkpoints), sorted(store.fingerprint.checkpoints)
        if labels != captured:
            raise IncompatibleError(
                f"{self.record_path} says where {', '.join(labels) or 'no checkpoint'} is, the store at {store.path} "
                f"holds states of {', '.join(captured)}; put back the record that was there",
                field="checkpoints",
            )
        recorded, found = record.fingerprint, store.fingerprint.digest
        if recorded not in (None, found):
            raise IncompatibleError(
                f"the store at {store.path} is not the one that {self.path} was captured into: the digest of its "
                f"fingerprint is {found[:12]}, the run's {recorded[:12]}; put that store back, or capture into a new "
                "folder",
                field="fingerprint",
            )

    def _is_existing_run(self) -> bool:
        """Whether there is a run to go on with; False where one can begin."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; give a folder for the run")
        existing = self.path.is_dir() and any(
            not entry.name.startswith(".") and entry != self.plan for entry in self.path.iterdir()
        )
        if existing and not self.record_path.is_file():
            raise InputError(f"{self.path} is not empty and holds no run; give a new folder")
        return existing

    def _is_others(self) -> bool:
        """Whether something was committed, or another process is at it."""
        store = self.path / "store"
        return any(store.glob("commits/*.json")) or any(store.glob("claims/*"))

    def _clear(self, made_folder: bool) -> None:
        remove_tree(self.path / "store")
        self.record_path.unlink(missing_ok=True)
        if made_folder and self.path.is_dir():
            self.path.rmdir()


def _what_is_wrong(content: Any) -> str | None:
    """Why this is not the content of a run's record; None where it is."""
    if not isinstance(content, dict):
        return f"it holds a JSON {type(content).__name__}, expected an object"
    optional = {field.name for field in fields(RunRecord) if field.default is None}
    known = {field.name for field in fields(RunRecord)}
    if (odd := sorted(content.keys() - known)) or (odd := sorted(known - optional - content.keys())):
        return f"its keys should be {', '.join(sorted(known))}; see {odd[0]!r}"
    places = content["checkpoints"]
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        return f"'checkpoints' is {str(places)[:40]}, expected an object of folders by label"
    for name in sorted(content.keys() - {"checkpoints"}):
        if not (isinstance(content[name], str) or (name in optional and content[name] is None)):
            return f"{name!r} is {str(content[name])[:40]}, expected text"
    return None


def absolute_place(store: str | None) -> str | None:
    """A store's place as it is recorded: an absolute path, or the URL that it is (errors as ``check_address``)."""
    if store and "://" in store:
        check_address(store)
    return str(Path(store).resolve()) if store and _is_relative(store) else store


def _is_relative(store: str) -> bool:
    return "://" not in store and not Path(store).is_absolute()
