"""RUN: the folder that one study of one pair fills, stage by stage. Knows names of files, nothing of their content.

RUN/run.json         where the checkpoints and prompts are, and the command that made it
RUN/store/           captured states and events, unless they are kept elsewhere
RUN/stability.parquet which events rounding would change
RUN/cells/           finished cell groups
RUN/cells.parquet    all of them as one table
RUN/effects.json     contrasts with intervals
RUN/report.html      the page for people
RUN/timings.json     what the stages took, of those that did their work in one go
RUN/plan.json        what was assumed of the run before it
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.errors import InputError
from actcache.files import write_atomically

if TYPE_CHECKING:
    from actcache.store import Store


def store_place(given: str | Path) -> str | Path:
    """Where a store is: what was given, or the store of the run in that folder."""
    run = RunFolder(given)
    return run.store if "://" not in str(given) and run.record_path.is_file() else given


def open_store(place: str | Path) -> Store:
    """Open a store, or the store of the run in that folder.

    Args:
        place: a folder, the folder of a run, or the address of an object store (``s3://bucket/prefix``).

    Raises:
        InputError: there is no store.
        CorruptStoreError: its root is not what was written.
        FormatVersionError: it was written in a format that this version does not read.
    """
    from actcache import store

    return store.open_store(store_place(place))


@dataclass(frozen=True)
class RunRecord:
    """What later stages need beside the store.

    Attributes:
        checkpoints: label -> model folder, absolute, as found at capture.
        prompts: the prompts file.
        device: where capture ran; later stages use it unless told otherwise.
        command: the command line, for the report.
        store: where the store is, if not in the run's folder.
    """

    checkpoints: dict[str, str]
    prompts: str
    device: str
    command: str
    store: str | None = None


class RunFolder:
    """Paths of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.record_path = self.path / "run.json"
        self.stability = self.path / "stability.parquet"
        self.cell_groups = self.path / "cells"
        self.cells = self.path / "cells.parquet"
        self.effects = self.path / "effects.json"
        self.report = self.path / "report.html"
        self.timings_path = self.path / "timings.json"
        self.plan = self.path / "plan.json"

    @property
    def store(self) -> str | Path:
        """Where the store is: ``RUN/store``, unless the run's record says otherwise."""
        elsewhere = self.record().store if self.record_path.is_file() else None
        return elsewhere or self.path / "store"

    @contextmanager
    def being_captured(self, record: RunRecord, *, alone: bool = True) -> Iterator[None]:
        """Create the folder (or go on in an earlier run's) for the time of a capture.

        If the capture fails before anything was committed, whatever it created is removed again, unless others may
        capture into it at the same time.

        Raises:
            InputError: the path is a file, or a folder with files in it that is not a run's; or the run's store is
                elsewhere than this record says.
        """
        existing = self._is_existing_run()
        made_folder = not self.path.exists()
        if existing:
            if record.store != self.record().store:
                raise InputError(f"{self.path} has its store at {self.store}; give the same --store, or a new folder")
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.record_path, json.dumps(asdict(record), indent=1).encode() + b"\n")
            yield
        except BaseException:
            if alone and record.store is None and not self._has_commits():
                self._clear(made_folder)
            raise

    def record(self) -> RunRecord:
        """The record of a captured run.

        Raises:
            InputError: the folder holds no run.
        """
        try:
            return RunRecord(**json.loads(self.record_path.read_text()))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(f"{self.path} holds no run (no run.json); make one with 'actcache run'") from error
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.record_path} is not a run record: {error}") from error

    def timings(self) -> dict[str, Any]:
        """What each stage took; see :meth:`record_timing`.

        Raises:
            InputError: the file is damaged.
        """
        try:
            return json.loads(self.timings_path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise InputError(f"{self.timings_path} is not JSON: {error}; remove it") from error

    def record_timing(self, stage: str, timing: dict[str, Any] | None) -> None:
        """Put down what a stage took (``elapsed_s`` from its first load of weights on, of which ``load_s`` loading,
        and what else it counted), or take it off the record with None."""
        timings = {name: value for name, value in self.timings().items() if name != stage}
        if timing is not None:
            timings[stage] = timing
        if timings or self.timings_path.exists():
            write_atomically(self.timings_path, json.dumps(timings, indent=1).encode() + b"\n")

    def write_plan(self, plan: dict[str, Any]) -> None:
        """Put down what is assumed of the run that shall be made here; the folder is created.

        Raises:
            InputError: the folder holds a run already, or files that are not a run's; or the path is a file.
        """
        if self._is_existing_run():
            raise InputError(
                f"{self.path} holds a run already; 'actcache plan {self.path}' puts it beside its estimate"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.plan, json.dumps(plan, indent=1).encode() + b"\n")

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

    def _has_commits(self) -> bool:
        return any((self.path / "store").glob("commits/*.json"))

    def _clear(self, made_folder: bool) -> None:
        shutil.rmtree(self.path / "store", ignore_errors=True)
        self.record_path.unlink(missing_ok=True)
        if made_folder and self.path.is_dir():
            self.path.rmdir()
