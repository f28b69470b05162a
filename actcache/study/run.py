"""Run: one study from Python. Its store, its cells and effects as flat tables, and its analyses.

    run = actcache.Run("RUN")
    run.cells.to_pandas()
    run.analyse("depth", boundaries="all")

Knows the folder of a run and its checkpoints; prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from actcache.counts import check_whole
from actcache.errors import IncompatibleError, InputError
from actcache.progress import OnProgress, untold
from actcache.sealed import Sealed, read_json, read_parquet
from actcache.study.holding import ONE, Holding
from actcache.study.run_folder import RunFolder

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from actcache.capture.streams import Streaming
    from actcache.models.backbone import Backbone
    from actcache.models.devices import Placement
    from actcache.models.lineup import Lineup
    from actcache.models.readout import Readout
    from actcache.replay.late_stack import LateStack
    from actcache.store import Store
    from actcache.store.selection import Events
    from actcache.study.held import Held
    from actcache.study.runner import Runner

# What cells are joined with: the texts of the two choices, and how sure each checkpoint was of its own.
_OF_EVENTS = ("token_pt", "token_it", "gap_pt", "gap_it")


class Run:
    """A captured run.

    Attributes:
        path: its folder.
        folder: names of its files.
        holding: how its checkpoints are held in memory when they are loaded.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        checkpoints: Mapping[str, str | Path] | None = None,
        device: str | None = None,
        resident: str | None = None,
        stream: bool | None = None,
    ) -> None:
        """Open the run in a folder.

        Args:
            path: the folder.
            checkpoints: label -> where a checkpoint is now, of those that moved since capture.
            device: to load models on, such as ``cuda:0,cuda:1`` or ``auto``; None for the one of the capture.
            resident, stream: see :class:`Holding`; None for both is what the capture was told.

        Raises:
            InputError: the folder holds no run, or a holding contradicts itself.
            CorruptFileError: its record is damaged.
        """
        self.folder = RunFolder(path)
        self.path = self.folder.path
        self._record = self.folder.record()
        self._moved = {label: str(place) for label, place in (checkpoints or {}).items()}
        self.holding = self._record.holding.but(device, resident, stream)

    def __repr__(self) -> str:
        return f"<Run {self.path}: {len(self.store)} events of {', '.join(self.store.checkpoints)}>"

    def _repr_html_(self) -> str:
        from actcache.store.reader import as_html

        rows = {
            "folder": str(self.path),
            "checkpoints": ", ".join(self.store.checkpoints),
            "boundaries": ", ".join(map(str, self.store.boundaries)),
            "events": f"{len(self.store):,}",
            "prompts without one": f"{self.store.n_without_event:,}",
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
        return pa.Table.from_pylist([flat(group) for group in groups])

    @cached_property
    def lineup(self) -> Lineup:
        """The checkpoints; no weights are loaded.

        Raises:
            InputError: a folder is not there, or not a model's.
            IncompatibleError: they are not those captured.
        """
        from actcache.models.lineup import Lineup

        lineup = Lineup.open({**self._record.checkpoints, **self._moved}, dequantize=True)
        lineup.check_captured(self.store.fingerprint)
        return lineup.follow(self.store.fingerprint.vocabulary)

    @property
    def masked_ids(self) -> list[int]:
        """Ids that no readout of this run chooses."""
        return self.lineup.masked_ids

    @cached_property
    def placement(self) -> Placement:
        """The device of each checkpoint.

        Raises:
            InputError: the holding names a device that is not there, or more than there are checkpoints.
            CheckError: what is copied between two of them changes.
        """
        from actcache.models.devices import placed

        return placed(self._holding_here.device, self.store.checkpoints)

    @property
    def _holding_here(self) -> Holding:
        """How this process holds what it loads itself. Where other processes run the jobs, it reads heads at most, for
        which a CPU will do."""
        from actcache.models.devices import CPU, CUDA, kind_of

        if self.runner.is_elsewhere and kind_of(self.holding.device) == CUDA:
            import torch

            return self.holding if torch.cuda.is_available() else replace(self.holding, device=CPU)
        return self.holding

    @cached_property
    def held(self) -> Held:
        """The checkpoints, as :attr:`holding` says."""
        from actcache.study.held import Held

        return Held.of(self.store, self.lineup, self._holding_here)

    @cached_property
    def runner(self) -> Runner:
        """Where its jobs run: here, unless it is set to another one."""
        from actcache.study.runner import Runner

        return Runner()

    @cached_property
    def one_at_a_time(self) -> bool:
        """Whether a late stack is let go before another checkpoint's is loaded."""
        if self.runner.is_elsewhere:  # whose memory nobody knows here
            return self.holding.stream or self.holding.resident == ONE
        return not self.held.are_together(self.store.fingerprint.dtype, min(self.store.boundaries))

    def load_late(self, label: str, boundary: int, device: str | None = None) -> LateStack:
        """The late stack of a checkpoint, in the store's dtype.

        Raises:
            InputError: no such label, or a boundary that is none; or no such device.
            IncompatibleError: the checkpoint is not the one captured.
            CheckError: what is copied between two devices changes.
        """
        self._check_label(label)
        return self.held.late(label, boundary, self.store.dtype, device)

    def load_backbone(self, label: str, dtype: torch.dtype | None = None) -> Backbone:
        """All blocks of a checkpoint, and its readout, in a dtype; None for the store's (errors as
        :meth:`load_late`)."""
        self._check_label(label)
        return self.held.backbone(label, dtype or self.store.dtype)

    def load_blocks(self, label: str, dtype: torch.dtype | None = None) -> Backbone | Streaming:
        """The same, or, where this run streams, a checkpoint whose blocks are in memory one at a time."""
        if not self.holding.stream:
            return self.load_backbone(label, dtype)
        self._check_label(label)
        return self.held.blocks(label, dtype or self.store.dtype)

    def load_readout(self, label: str, device: str | None = None) -> Readout:
        """The final norm and head of a checkpoint, in the store's dtype; no block is loaded (errors as
        :meth:`load_late`)."""
        self._check_label(label)
        return self.held.readout(label, self.store.dtype, device)

    def final(
        self,
        *,
        upstream: str,
        late: str,
        boundary: int | None = None,
        scope: str = "prefix",
        events: Events = None,
    ) -> torch.Tensor:
        """Final states of a plain cell, as the grid kept them: nothing is loaded and nothing replayed.

        Args:
            upstream: label of the checkpoint that gives the state at the boundary.
            late: label of the checkpoint whose late blocks read it. Where both are one, the states are the capture's.
            boundary: first late block; None for the main one, the first that was captured.
            scope: ``prefix`` or ``position``.
            events: see :class:`actcache.Store`; None for all.

        Returns:
            ``[n, D]``: the last block's output, before the final norm, at each event's position, in the store's dtype.
            The methods of :class:`actcache.models.readout.Readout` read them.

        Raises:
            InputError: the run has no such label, boundary, scope or event; or the grid has not scored the cell, or
                kept nothing of it, and then the message names the command that does.
            CorruptFileError: what was kept is damaged.
        """
        from actcache.replay.sweep import SCOPES
        from actcache.study.cells import finished_cells, kept_final

        store = self.store
        for label in (upstream, late):
            self._check_label(label)
        boundary = store.main_boundary if boundary is None else boundary
        check_whole(boundary, "boundary")
        if boundary not in store.boundaries:
            raise InputError(f"boundary {boundary} is not in the store; it has {', '.join(map(str, store.boundaries))}")
        if scope not in SCOPES:
            raise InputError(f"scope {scope!r} is unknown; choose {' or '.join(SCOPES)}")
        numbers = store.numbers(events)
        if upstream == late:
            return store.final(late, numbers)
        found = finished_cells(self.folder.cell_groups, store).get((boundary, scope, late), [])
        # Where a cell was scored in two ways, the one that the table of cells has comes first.
        how = read_run_cells(self.folder, store).made_from
        scored = sorted(found, key=lambda one: any(one.key[name] != how.get(name) for name in ("strict", "max_tokens")))
        final, left = kept_final(scored, scope, upstream, numbers, store.final(late, []))
        if left.any():
            bare = [one.path.name for one in found if one.has_plain and not one.has_final]
            some = ", ".join(bare[:3]) + (f" and {len(bare) - 3} more" if len(bare) > 3 else "")
            raise InputError(
                f"no final states are kept of {left.sum()} of {len(left)} events ({upstream} behind {late}, boundary "
                f"{boundary}, scope {scope}); 'actcache grid {self.path} --boundary {boundary} --scope {scope}' keeps "
                f"them" + (f", once {some} of {self.folder.cell_groups} are moved away" if bare else "")
            )
        return final

    def lens(
        self,
        label: str,
        *,
        readout: str | Readout | None = None,
        k: int = 5,
        events: Events = None,
        boundaries: Sequence[int] | None = None,
    ) -> pa.Table:
        """The logit lens: what a readout makes of a checkpoint's states at each event's position.

        It reads the states at every boundary that is stored, and the last block's output.

        Args:
            label: of the checkpoint whose states are read.
            readout: label of the checkpoint whose norm and head read them (by default its own), loaded here; or one
                that :meth:`load_readout` gave.
            k: how many of the best tokens to name.
            events: see :class:`actcache.Store`; None for all.
            boundaries: to read at; L, the number of blocks, is the last block's output. None for all, in their order.

        Returns:
            One row per boundary and event:

            - ``event_id`` and ``boundary``.
            - ``rank_pt`` and ``rank_it``: how many tokens come before the event's y_pt and y_it; 0 is the best.
            - ``margin``: logit(y_it) - logit(y_pt).
            - ``entropy`` of the next token, in nats.
            - ``top_ids``, ``top_texts`` and ``top_logits``: lists of the k best tokens, best first.

        Raises:
            InputError: the run has no such label, boundary or event, or the vocabulary fewer than k tokens.
            NotFiniteError: a state or its logits are not finite; names the event.
        """
        from actcache.study.lens import lens

        self._check_label(label)
        check_whole(k, "k")  # before anything is loaded
        if readout is None or isinstance(readout, str):
            readout = self.load_readout(readout or label)
        n_blocks = self.store.fingerprint.n_blocks
        at = [*sorted(self.store.boundaries), n_blocks] if boundaries is None else boundaries
        return lens(self.store, label, readout, self.lineup.decode, boundaries=at, k=k, events=events)

    def _check_label(self, label: str) -> None:
        if label not in self.store.checkpoints:
            raise InputError(f"the run has no checkpoint {label!r}; it has {', '.join(self.store.checkpoints)}")

    def analyse(
        self,
        name: str,
        *,
        on_progress: OnProgress = untold,
        say: Callable[[str], None] = lambda line: None,
        **options: Any,
    ) -> dict[str, Any]:
        """Answer one question, running what is missing for it, and write ``RUN/<name>.json`` and its table.

        Args:
            name: of one of ``actcache.analyses.ANALYSES``.
            on_progress: told of replays, or of what else is run.
            say: told, in one line, what a person should know.
            options: of the analysis, by the names of its options.

        Returns:
            What the JSON file holds: ``analysis``, ``version``, ``options``, ``groups``.

        Raises:
            InputError: there is no such analysis or option, or the store cannot serve it.
            CheckError: a replay is not what it should be.
        """
        from actcache.analyses import find_analysis

        analysis = find_analysis(name)
        check_complete(self.store)
        return self.runner.answer(analysis, self, analysis.options_of(options), on_progress, say)

    def study(
        self,
        *,
        only: str | Collection[str] = (),
        also: str | Collection[str] = (),
        on_progress: OnProgress = untold,
        say: Callable[[str], None] = lambda line: None,
    ) -> Studied:
        """Answer every question that the run can serve, each with its default options, and write the report.

        What is answered already, under whatever options, is not answered again. A killed study goes on from there.

        Args:
            only: name or names of the analyses; none for the default set, which leaves out those that are ``opt_in``.
            also: name or names of further ones.
            on_progress: told of replays, or of what else is run.
            say: told, in one line, what a person should know.

        Raises:
            InputError: an unknown name, or a named one that the run cannot serve; the run has not all prompts, or no
                cells.
            CheckError: a replay is not what it should be.
        """
        from actcache.analyses import whole
        from actcache.report.written import write_report

        how: dict[str, Any] = {"on_progress": on_progress, "say": say}
        only, also = ([one] if isinstance(one, str) else one for one in (only, also))
        planned = whole.plan_study(self, only, also)
        found = list(whole.answered(planned, lambda one: one.answer(self, one.options(), **how)))
        write_report(self.folder, self.folder.open_store(), say=say)
        answers = {one.analysis.name: one.content for one in found if one.content is not None}
        return Studied(answers, {one.analysis.name: one.refused for one in found if one.refused is not None})


class Studied(NamedTuple):
    """What :meth:`Run.study` found.

    Attributes:
        answers: by name of the analysis, what its JSON file holds.
        refused: why the run cannot serve the others, and what would.
    """

    answers: dict[str, dict[str, Any]]
    refused: dict[str, str]


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


def flat(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with its numbers side by side: of each its mean, under its name, ``<name>_low`` and ``<name>_high``."""
    found: dict[str, Any] = {}
    for name, value in group.items():
        if isinstance(value, Mapping) and value.keys() == {"mean", "low", "high"}:
            found |= {name: value["mean"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
        elif name == "cells":
            found |= flat({f"y_{cell}": of for cell, of in value.items()})
        elif not isinstance(value, Mapping):
            found[name] = value
    return found
