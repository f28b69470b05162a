"""Engine: what jobs are run with in this process. It holds a store, gives late stacks and readouts, and keeps what
several jobs need.

A job says what to compute; an engine knows where things are. Knows stores and late stacks; loads models by a function
that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import torch

from actcache.capture.forward import Forwarder, Resident
from actcache.capture.streams import Streaming
from actcache.errors import IncompatibleError, InputError
from actcache.models.backbone import Backbone
from actcache.models.checkpoint import DTYPES
from actcache.models.lineup import Lineup
from actcache.models.readout import Readout
from actcache.replay.late_stack import LateStack
from actcache.replay.swap import Swap
from actcache.room import Loads
from actcache.store import Segment, Store
from actcache.study.cells import Finished, Scored
from actcache.study.continuation_job import ContinuationJob
from actcache.study.earlier_job import EarlierJob
from actcache.study.gradient_job import GradientJob
from actcache.study.handoff_job import HandoffJob
from actcache.study.held import Held
from actcache.study.holding import Holding
from actcache.study.map_job import MapJob
from actcache.study.path_job import PathJob
from actcache.study.replay_job import ReplayJob, States
from actcache.study.results import file_name, read_final
from actcache.study.scores import Scores, score
from actcache.study.size_job import SizeJob
from actcache.study.window_job import WindowJob

LateJob = ReplayJob | SizeJob | EarlierJob | MapJob | PathJob | WindowJob | ContinuationJob | GradientJob | HandoffJob
LoadLate = Callable[[str, int], LateStack]
LoadBackbone = Callable[[str, torch.dtype], Backbone | Streaming]
LoadReadout = Callable[[str], Readout]


def stacks_of(job: LateJob) -> tuple[str, ...]:
    """Labels of the late stacks that a job replays."""
    return tuple(job.stacks) if isinstance(job, WindowJob | HandoffJob) else (job.late,)


_STATES_KEPT = 2  # those that are replayed, and those read ahead


def nothing_given(label: str, *what: object) -> NoReturn:
    """Stands for a way to load that an engine does not need."""
    raise TypeError("the engine was given nothing to load this kind of model by")


class LocalEngine:
    """Runs jobs over one store in this process.

    Attributes:
        store: a snapshot: what is committed later is not in it.
        finished: what was scored before, whose final states need no replay.
    """

    def __init__(
        self,
        store: Store,
        load_late: LoadLate = nothing_given,
        finished: Finished | None = None,
        *,
        load_backbone: LoadBackbone = nothing_given,
        load_readout: LoadReadout = nothing_given,
        one_at_a_time: bool = False,
        results: Path | None = None,
    ) -> None:
        """Over this store.

        Args:
            store: with prefix rows, where late stacks are asked for.
            load_late: gives the late stack of a checkpoint, by label, from a boundary on, in the store's dtype.
            finished: see :class:`LocalEngine`.
            load_backbone: gives the backbone of a checkpoint, by label, in a dtype; or its blocks, one at a time.
            load_readout: gives the final norm and head of a checkpoint alone, by label, in the store's dtype.
            one_at_a_time: whether a late stack is let go before another checkpoint's is loaded; heads stay.
            results: the folder of the analysis whose jobs these are, where earlier ones left what they kept.
        """
        self.one_at_a_time, self._loads, self._results = one_at_a_time, Loads(), results
        self._heads: dict[str, Readout] = {}
        self.store, self.finished, self._load_late = store, finished or {}, load_late
        self._load_backbone, self._load_readout = load_backbone, load_readout
        self._backbone: tuple[tuple[str, str], Backbone | Streaming] | None = None
        self._segments: dict[str, Segment] = {segment.name: segment for segment in store.segments}
        self._first: dict[str, int] = {}  # the boundary to load a late stack from, where it is known
        self._lates: dict[str, LateStack] = {}
        self._natives: dict[tuple[str, str, str], Scores] = {}
        self._states: dict[tuple[str, int | None], States] = {}

    @classmethod
    def of(cls, store: Store, checkpoints: Mapping[str, str | Path], holding: Holding | None = None) -> LocalEngine:
        """One that loads models from the folders of the checkpoints, by label, as a worker does that has no more than a
        job, these places, and how a run holds its checkpoints.

        Raises:
            InputError, IncompatibleError: they are not those that the store was captured from.
        """
        lineup = Lineup.open(checkpoints, dequantize=True)
        lineup.check_captured(store.fingerprint)
        held = Held.of(store, lineup, holding or Holding())
        dtype = store.dtype
        return cls(
            store,
            lambda label, boundary: held.late(label, boundary, dtype),
            load_backbone=held.blocks,
            load_readout=lambda label: held.readout(label, dtype),
            one_at_a_time=not held.are_together(store.fingerprint.dtype, min(store.boundaries, default=0)),
        )

    def expect(self, jobs: Iterable[LateJob]) -> None:
        """Hear of jobs before they are run: each late stack is loaded once, from the first boundary that replays it."""
        for job in jobs:
            if not (isinstance(job, ReplayJob) and self.has_kept(job)):
                for label in stacks_of(job):
                    self._first[label] = min(job.boundary, self._first.get(label, job.boundary))

    @property
    def first(self) -> dict[str, int]:
        """The boundary to load each late stack from, of those that are expected."""
        return dict(self._first)

    def hold(self, first: Mapping[str, int]) -> None:
        """Expect these late stacks from these boundaries on and no others, which are let go."""
        if any(label not in first for label in (*self._lates, *self._first)):
            self._lates = {label: late for label, late in self._lates.items() if label in first}
            self._backbone = None
            self._loads.give_back()
        self._first = dict(first)

    def finished_of(self, job: ReplayJob) -> Finished:
        """Of what is finished that which has kept all final states of a job; nothing where some are to be replayed."""
        places = {(job.boundary, scope, job.late): self._keeping(job, scope) for scope in job.scopes}
        return {place: [one] for place, one in places.items() if one is not None} if self.has_kept(job) else {}

    @property
    def dtype(self) -> torch.dtype:
        """Of states and weights."""
        return self.store.dtype

    def segment(self, name: str) -> Segment:
        """One of the store's.

        Raises:
            IncompatibleError: the store has none of this name, as it is another, or was compacted since.
        """
        if name not in self._segments:
            raise IncompatibleError(
                f"the store at {self.store.path} has no segment {name!r}, which a job names: it is another store, or "
                "was compacted since; make the jobs anew",
                field="segment",
            )
        return self._segments[name]

    def events(self, segment: str) -> pa.Table:
        """Of a segment."""
        of = self.segment(segment)
        return self.store.events.slice(of.events.start, of.n_events)

    def states(self, job: ReplayJob) -> States:
        """What a job reads (errors as :meth:`rows`).

        Raises:
            CorruptFileError: final states that were kept are damaged.
        """
        kept = self._kept(job) if self.has_kept(job) else None
        return replace(self.rows(job.segment, job.boundary if kept is None else None), kept=kept)

    def rows(self, segment: str, boundary: int | None) -> States:
        """Of a segment the states at a boundary, or none of them; several jobs in a row share what is read once. May be
        called from a thread."""
        place = segment, boundary
        found = self._states.get(place)
        if found is None:
            store, labels, indices = self.store, self.store.checkpoints, self.segment(segment).events
            read = {label: store.sequence_states(label, boundary, indices) for label in labels if boundary is not None}
            rows = {label: rows for label, (rows, *_) in read.items()}
            nowhere = torch.empty(0, dtype=torch.int64), torch.empty(0, 2, dtype=torch.int64)
            offsets, positions = next((places for _, *places in read.values()), nowhere)
            final = {label: store.final(label, indices) for label in labels}
            ids, prompts = (self.events(segment)[name].to_pylist() for name in ("event_id", "prompt_id"))
            found = States(ids, prompts, rows, offsets, positions, final)
            while len(self._states) >= _STATES_KEPT:
                self._states.pop(next(iter(self._states)))
            self._states[place] = found
        return found

    def left(self, what: str, key: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors that an earlier job of the same analysis kept, in the folder ``what`` of its results.

        Raises:
            CorruptFileError: they are damaged.
            FileNotFoundError: there is no such job.
        """
        if self._results is None:
            raise TypeError("the engine was given no folder of results")
        return read_final(self._results / what / file_name(key))

    def late(self, label: str, boundary: int) -> LateStack:
        """The late stack of a checkpoint from a boundary on."""
        first = min(boundary, self._first.get(label, boundary))
        if label not in self._lates or self._lates[label].boundary > first:
            self._let_go(label)  # before another is loaded
            self._lates[label] = self._load_late(label, first)
        return self._lates[label].at(boundary)

    def expected(self, label: str) -> LateStack:
        """The late stack of a checkpoint from the first boundary on of the jobs that :meth:`expect` heard of."""
        return self.late(label, self._first[label])

    def swapped(self, host: str, swap: Swap, boundary: int) -> LateStack:
        """The late stack of a checkpoint from a boundary on, with some modules of another one's.

        Raises:
            InputError, UnsupportedModelError: see :meth:`actcache.replay.late_stack.LateStack.swapped`.
        """
        return self.late(host, boundary).swapped(self.late(swap.source, boundary), swap)

    def _let_go(self, label: str) -> None:
        """Have room for the late stack of a checkpoint."""
        if not self.one_at_a_time:
            self._lates.pop(label, None)
            return
        self._heads.pop(label, None)
        if self._lates:
            self._lates.clear()
            self._loads.give_back()  # modules and their hooks refer to one another
        self._loads.begin()

    def backbone(self, label: str, dtype: str) -> Backbone:
        """The backbone of a checkpoint.

        Raises:
            InputError: its blocks are in memory one at a time.
        """
        found = self._whole(label, dtype)
        if isinstance(found, Streaming):
            raise InputError(
                f"checkpoint {label} decodes token by token, for which it is read whole: leave out --stream, or "
                "give --resident one where the run was captured with it"
            )
        return found

    def forwarder(self, label: str, dtype: str) -> Forwarder:
        """What runs sequences through a checkpoint."""
        found = self._whole(label, dtype)
        return found if isinstance(found, Streaming) else Resident(found)

    def _whole(self, label: str, dtype: str) -> Backbone | Streaming:
        """One is let go before another is loaded, so that memory holds one model."""
        if self._backbone is None or self._backbone[0] != (label, dtype):
            self._backbone = None
            self._backbone = (label, dtype), self._load_backbone(label, DTYPES[dtype])
        return self._backbone[1]

    def readout(self, label: str) -> Readout:
        """The final norm and head of a checkpoint: those of its late stack, if that is there or to come."""
        if label in self._first and not self.one_at_a_time:
            self.late(label, self._first[label])
        if label in self._lates:
            return self._lates[label].readout
        if label not in self._heads:
            self._heads[label] = self._load_readout(label)
        return self._heads[label]

    def native(self, segment: str, late: str, whose: str, final: torch.Tensor, pair_ids: torch.Tensor) -> Scores:
        """What a head makes of a checkpoint's own final states: the same at every boundary."""
        place = segment, late, whose
        if place not in self._natives:
            self._natives[place] = score(self.readout(whose), final, pair_ids)
        return self._natives[place]

    def has_kept(self, job: ReplayJob) -> bool:
        """Whether all final states that a job gives were kept by earlier ones, so that nothing is replayed."""
        return job.is_plain and all(self._keeping(job, scope) is not None for scope in job.scopes)

    def _kept(self, job: ReplayJob) -> dict[str, torch.Tensor]:
        read: dict[Path, dict[str, torch.Tensor]] = {}  # one file may serve several scopes
        states: dict[str, torch.Tensor] = {}
        for scope in job.scopes:
            scored = self._keeping(job, scope)
            assert scored is not None
            found = read.get(scored.path) or read.setdefault(scored.path, scored.final())
            states |= {name: state for name, state in found.items() if name.startswith(f"{scope}/")}
        return states

    def _keeping(self, job: ReplayJob, scope: str) -> Scored | None:
        """The earlier job that kept the final states of the same plain cells."""
        events = self.segment(job.segment).events
        for scored in self.finished.get((job.boundary, scope, job.late), []):
            same = all(scored.key[name] == value for name, value in job.exactness.items())
            if same and scored.has_final and np.array_equal(scored.events, np.arange(events.start, events.stop)):
                return scored
        return None
