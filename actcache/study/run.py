"""Run: one study from Python. Its store, its cells and effects as flat tables, and its analyses.

    run = actcache.Run("RUN")
    run.cells.to_pandas()
    run.analyse("depth", boundaries="all")

Knows the folder of a run and its checkpoints; prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.errors import IncompatibleError, InputError
from actcache.progress import OnProgress, untold
from actcache.sealed import Sealed, read_json, read_parquet
from actcache.study.run_folder import RunFolder

if TYPE_CHECKING:
    import pyarrow as pa

    from actcache.models.lineup import Lineup
    from actcache.replay.late_stack import LateStack
    from actcache.store import Store

# What cells are joined with: the texts of the two choices, and how sure each checkpoint was of its own.
_OF_EVENTS = ("token_pt", "token_it", "gap_pt", "gap_it")


class Run:
    """A captured run.

    Attributes:
        path: its folder.
        folder: names of its files.
    """

    def __init__(self, path: str | Path, *, checkpoints: Mapping[str, str | Path] | None = None) -> None:
        """Open the run in a folder.

        Args:
            path: the folder.
            checkpoints: label -> where a checkpoint is now, of those that moved since capture.

        Raises:
            InputError: the folder holds no run.
            CorruptFileError: its record is damaged.
        """
        self.folder = RunFolder(path)
        self.path = self.folder.path
        self._record = self.folder.record()
        self._moved = {label: str(place) for label, place in (checkpoints or {}).items()}

    def __repr__(self) -> str:
        return f"<Run {self.path}: {len(self.store)} events of {', '.join(self.store.checkpoints)}>"

    def _repr_html_(self) -> str:
        from actcache.store.reader import as_html

        rows = {
            "folder": str(self.path),
            "checkpoints": ", ".join(self.store.checkpoints),
            "boundaries": ", ".join(map(str, self.store.boundaries)),
            "events": f"{len(self.store):,}",
            "prompts without one": f"{self.store.excluded.num_rows:,}",
        }
        return as_html(rows)

    @cached_property
    def store(self) -> Store:
        """The store, as it was when it was first asked for."""
        return self.folder.open_store()

    @property
    def cells(self) -> pa.Table:
        """One row per cell, as in ``cells.parquet``, and the text and gap of each choice: token_pt, token_it, gap_pt,
        gap_it.

        Raises:
            InputError, IncompatibleError, CorruptFileError: see :func:`read_run_cells`.
        """
        cells, events = read_run_cells(self.folder, self.store).content, self.store.events
        import pyarrow.compute as pc

        at = pc.index_in(cells["event_id"], value_set=events["event_id"].combine_chunks())
        for name in _OF_EVENTS:
            if name in events.column_names and name not in cells.column_names:
                cells = cells.append_column(name, events[name].take(at))
        return cells

    @property
    def effects(self) -> pa.Table:
        """One row per group of ``effects.json``: its names and counts, and for each quantity columns of its mean (the
        quantity's own name), ``<quantity>_low`` and ``<quantity>_high``.

        Raises:
            InputError: nothing was averaged yet.
            CorruptFileError: the file is damaged.
        """
        import pyarrow as pa

        path = self.folder.effects
        again = f"'actcache effects {self.path}' makes it"
        try:
            groups = read_json(path, "effects", again).content["groups"]
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file; {again}") from error
        return pa.Table.from_pylist([_flat(group) for group in groups])

    @cached_property
    def lineup(self) -> Lineup:
        """The checkpoints; no weights are loaded.

        Raises:
            InputError: a folder is not there, or not a model's.
            IncompatibleError: they are not those captured.
        """
        from actcache.models.lineup import Lineup

        lineup = Lineup.open(self._record.checkpoints | self._moved)
        check_same_checkpoints(self.store, lineup)
        return lineup

    def load_late(self, label: str, boundary: int, device: str | None = None) -> LateStack:
        """The late stack of a checkpoint, in the store's dtype.

        Raises:
            InputError: no such label, or a boundary that is none.
            IncompatibleError: the checkpoint is not the one captured.
        """
        from actcache.replay.late_stack import LateStack

        if label not in self.lineup.checkpoints:
            raise InputError(f"the run has no checkpoint {label!r}; it has {', '.join(self.lineup.labels)}")
        path = self.lineup.checkpoints[label].path
        late = LateStack.load(path, boundary, dtype=self.store.dtype, device=device or self._record.device)
        check_same_checkpoints(self.store, self.lineup)  # what was loaded lies between two looks at the files
        return late

    def analyse(
        self,
        name: str,
        *,
        on_progress: OnProgress = untold,
        load_late: Callable[[str, int], LateStack] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Answer one question, replaying what is missing for it, and write ``RUN/<name>.json`` and its table.

        Args:
            name: of one of ``actcache.analyses.ANALYSES``.
            on_progress: told of replays.
            load_late: loads a late stack; by default :meth:`load_late`.
            options: of the analysis, by the names of its options.

        Returns:
            What the JSON file holds: ``analysis``, ``version``, ``options``, ``groups``.

        Raises:
            InputError: there is no such analysis or option, or the store cannot serve it.
            CheckError: a replay is not what it should be.
        """
        from actcache.analyses import find_analysis
        from actcache.study.analysis import answer

        analysis = find_analysis(name)
        check_complete(self.store)
        given = analysis.options_of(options)
        return answer(analysis, self.folder, given, load_late or self.load_late, on_progress=on_progress)


def read_run_cells(folder: RunFolder, store: Store) -> Sealed:
    """The cells of a run, whose store this is.

    Raises:
        InputError: there are none, or an earlier version's, which have no seal.
        IncompatibleError: they are of another store, or of other events than it holds.
        CorruptFileError: the table is damaged.
    """
    from actcache.study.cells import identity

    again = f"'actcache grid {folder.path}' makes it again"
    try:
        found = read_parquet(folder.cells, "a table of cells", again)
    except FileNotFoundError as error:
        raise InputError(f"{folder.cells}: no such table of cells; 'actcache grid RUN' makes one") from error
    for field, value in identity(store).items():
        if found.made_from.get(field) != value:
            raise IncompatibleError(
                f"{folder.cells} was made from another store, or other events, than {store.path} holds; {again}",
                field=field,
            )
    return found


def check_complete(store: Store) -> None:
    """Fewer prompts than were asked for would give other means, and nobody would see why."""
    found = len({*store.events["prompt_id"].to_pylist(), *store.excluded["prompt_id"].to_pylist()})
    store.fingerprint.check_captured()
    asked = store.n_prompts
    if found != asked:
        raise InputError(
            f"{store.path} holds {found} of {asked} prompts: give the capture command again until all are captured"
        )
    store.check_prompts()


def check_same_checkpoints(store: Store, lineup: Lineup) -> None:
    """Raise IncompatibleError, naming the field, where a checkpoint is not the one whose states are stored."""
    for label, captured in store.fingerprint.checkpoints.items():
        checkpoint = lineup.checkpoints[label]
        now = checkpoint.fingerprint
        field = captured.differs_in(now)
        if field is not None:
            raise IncompatibleError(
                f"checkpoint {label} at {checkpoint.path} is not the one captured: its {field} is "
                f"{str(getattr(now, field, None))[:12]}, the store has {captured.to_json()[field][:12]}; "
                f"point --checkpoint {label}=DIR at the captured one",
                field=f"checkpoints.{label}.{field}",
            )


def _flat(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with its numbers side by side."""
    flat: dict[str, Any] = {}
    for name, value in group.items():
        if isinstance(value, Mapping) and value.keys() == {"mean", "low", "high"}:
            flat |= {name: value["mean"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
        elif name == "cells":
            flat |= _flat({f"y_{cell}": of for cell, of in value.items()})
        elif not isinstance(value, Mapping):
            flat[name] = value
    return flat
