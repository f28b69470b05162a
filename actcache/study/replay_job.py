"""Replay job: stored rows of one segment, behind one late stack, scored.

Its ``key`` names the file of its result (results.py). Knows late stacks and readouts through an engine alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import pyarrow as pa
import torch

from actcache.errors import CheckError, NotFiniteError
from actcache.models.cost import ModelShape
from actcache.models.readout import Readout
from actcache.progress import Told, nobody_told
from actcache.replay.batch import Batch
from actcache.replay.edits import PLAIN, Edit, Replace, Variant
from actcache.replay.late_stack import LateStack
from actcache.replay.moves import Moves
from actcache.replay.swap import Swap
from actcache.study.cells import cell_table
from actcache.study.jobs import Result
from actcache.study.scores import Scores, ScoreTable, readout_order, whose_head
from actcache.study.work import Cost, Places, ReplayWork

# How far a replayed diagonal margin may lie from the native one: absolute, and per unit of the larger of the two
# logits, whose rounding it is. float32 leaves two decimal digits of room over what was seen; bfloat16 keeps 8 bits of
# each state, and a margin is a difference of two sums over D of them.
NOOP_TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (0.1, 0.05), torch.float16: (0.02, 0.01)}


@dataclass(frozen=True)
class States:
    """What a job reads of one segment at one boundary, all but the rows in the order of its events.

    Attributes:
        keys: event ids.
        prompts: prompt ids.
        rows: of each checkpoint, ``[N, D]``, those of each distinct sequence once; none where nothing is replayed.
        offsets: ``[s + 1]``, where each sequence's rows begin.
        positions: ``[n, 2]``, the sequence and the position in it of each event.
        final: of each checkpoint's own forward, ``[n, D]``.
        kept: final states of the job's own cells by ``scope/upstream``, ``[n, D]``, where an earlier one left them.
    """

    keys: list[str]
    prompts: list[str]
    rows: dict[str, torch.Tensor]
    offsets: torch.Tensor
    positions: torch.Tensor
    final: dict[str, torch.Tensor]
    kept: dict[str, torch.Tensor] | None = None


class ReplayEngine(Protocol):
    """What a replay job asks of what it is run with."""

    @property
    def dtype(self) -> torch.dtype:
        """Of states and weights."""

    def events(self, segment: str) -> pa.Table:
        """Of a segment."""

    def states(self, job: ReplayJob) -> States:
        """What a job reads."""

    def rows(self, segment: str, boundary: int | None) -> States:
        """The states of a segment at a boundary."""

    def late(self, label: str, boundary: int) -> LateStack:
        """The late stack of a checkpoint from a boundary on."""

    def swapped(self, host: str, swap: Swap, boundary: int) -> LateStack:
        """The same, with some modules of another checkpoint's."""

    def readout(self, label: str) -> Readout:
        """The final norm and head of a checkpoint."""

    def native(self, segment: str, late: str, whose: str, final: torch.Tensor, pair_ids: torch.Tensor) -> Scores:
        """What a head makes of a checkpoint's own final states."""


@dataclass(frozen=True)
class _Replay:
    """One replay of all events of a segment, and the cells that it serves: (scope, upstream)."""

    variant: Variant  # as it is replayed
    name: str  # of the variant asked for
    cells: tuple[tuple[str, str], ...]
    n_of_scope: int = 0  # how many of its first edits are the scope's own, not the variant's


@dataclass
class Part:
    """What a job replays from one checkpoint's rows.

    Attributes:
        base: label of the checkpoint.
        replays: all of them; a replay's number is that of its variant in the batch.
        table: where scores go.
        plain: final states of the plain replays, ``[n, D]`` by number; filled as they come in.
        moves: of the edits; None where nothing is replayed, and so is ``batch``, what is replayed.
    """

    base: str
    replays: Sequence[_Replay]
    table: ScoreTable
    plain: Mapping[int, torch.Tensor]
    moves: Moves | None = None
    batch: Batch | None = None

    def take(self, result: tuple[torch.Tensor, torch.Tensor, torch.Tensor], told: Told) -> None:
        """Score final states: events and replays ``[m]``, and ``[m, D]``."""
        of_events, numbers, hidden = result
        self.table.add(of_events, numbers, hidden)
        for number, states in self.plain.items():
            of_replay = numbers == number
            states[of_events[of_replay]] = hidden[of_replay]
        told(sum(len(self.replays[number].cells) for number in numbers.tolist()))

    def take_kept(self, kept: Mapping[str, torch.Tensor], told: Told) -> None:
        """Score the final states that an earlier job kept, by ``scope/upstream``."""
        for number, states in self.plain.items():
            scope, upstream = self.replays[number].cells[0]
            states.copy_(kept[f"{scope}/{upstream}"])
            at = torch.arange(len(states))
            self.table.add(at, torch.full_like(at, number), states)
            told(len(self.replays[number].cells) * len(states))


@dataclass(frozen=True)
class Begun:
    """A job whose replays are prepared.

    Attributes:
        events: of its segment.
        whose: the label of the checkpoint whose head a readout is.
        natives: what heads make of the late checkpoint's own final states, by label.
        parts: by the checkpoint whose rows are replayed.
    """

    events: pa.Table
    whose: Mapping[str, str]
    natives: Mapping[str, Scores]
    parts: Sequence[Part]


@dataclass(frozen=True, eq=False)
class ReplayJob:
    """The events of one segment at one boundary behind one late stack: every upstream in some scopes, plain or under
    variants, scored by some readouts.

    Attributes:
        store: digest of the store's fingerprint.
        segment: its name.
        lengths: tokens of every event's sequence, up to position p.
        sequences: number of every event's sequence.
        checkpoints: labels of all upstreams, in the store's order.
        boundary: first late block.
        late: label of the late stack.
        scopes: of ``prefix`` and ``position``.
        readouts: ``native``, ``common_<label>``.
        variants: what to change; :data:`actcache.replay.edits.PLAIN` is the plain grid.
        top1: whether variants get ``top1_id`` too; plain cells always do.
        kl: whether cells get ``kl``.
        strict: one sequence per forward.
        max_tokens: tokens per forward otherwise; None for what suits the device.
        upstreams: the only upstreams to score, in the store's order; None for all checkpoints.
    """

    store: str
    segment: str
    lengths: tuple[int, ...]
    sequences: tuple[int, ...]
    checkpoints: tuple[str, ...]
    boundary: int
    late: str
    scopes: tuple[str, ...]
    readouts: tuple[str, ...]
    variants: tuple[Variant, ...]
    top1: bool = False
    kl: bool = False
    strict: bool = False
    max_tokens: int | None = None
    upstreams: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Put everything in one order: equal jobs give equal bytes."""
        object.__setattr__(self, "scopes", tuple(sorted(self.scopes)))
        object.__setattr__(self, "readouts", tuple(sorted(self.readouts, key=readout_order)))
        by_name = sorted(self.variants, key=lambda variant: (variant.name != PLAIN.name, variant.name))
        object.__setattr__(self, "variants", tuple(by_name))

    @cached_property
    def key(self) -> dict[str, Any]:
        """All that its rows depend on. In packs, their rounding depends on the segment and ``max_tokens`` too."""
        return {
            "store": self.store,
            "segment": self.segment,
            "boundary": self.boundary,
            "late": self.late,
            "scopes": sorted(self.scopes),
            "readouts": sorted(self.readouts),
            "variants": {variant.name: variant.digest for variant in self.variants},
            "top1": self.top1,
            "kl": self.kl,
            "whole": sorted(variant.name for variant in self.variants if not variant.at_last_only),
            **({} if self.upstreams is None else {"upstreams": list(self.upstreams)}),
            **self.exactness,
        }

    @property
    def scored(self) -> tuple[str, ...]:
        """The upstreams whose cells are scored."""
        return self.checkpoints if self.upstreams is None else self.upstreams

    @property
    def _changed(self) -> dict[str, Any]:
        """Notes of the variants that change more than p, where there are any: those that change the last positions
        alone, by how many; and those of which each event takes a replay of its own."""
        more = [one for one in self.variants if not one.at_last_only]
        tails = {one.name: one.tail for one in more if one.tail is not None}
        apart = sorted(one.name for one in more if one.name not in tails and one.depends_on_event)
        return {name: of for name, of in (("apart", apart), ("tails", tails)) if of}

    @property
    def exactness(self) -> dict[str, Any]:
        """What the rounding of its cells depends on, beside the segment."""
        return {"strict": self.strict, "max_tokens": self.max_tokens}

    @property
    def n_events(self) -> int:
        """Of the segment."""
        return len(self.lengths)

    @property
    def n_units(self) -> int:
        """(event, scope, upstream, variant) combinations."""
        return self.n_events * len(self.scopes) * len(self.scored) * len(self.variants)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is edited: final states that were kept serve it without a replay."""
        return all(variant.name == PLAIN.name for variant in self.variants)

    @property
    def work(self) -> ReplayWork:
        """What it computes where its sequences can be packed, or each alone where it is strict."""
        return ReplayWork.of_key(self.key | self._changed, self.late, "single" if self.strict else "packed")

    def cost(self, shapes: Mapping[str, ModelShape]) -> Cost:
        """What that takes."""
        places = Places.of(self.lengths, self.sequences, self.segment)
        return self.work.cost(shapes[self.late], len(self.scored), places)

    def read(self, engine: ReplayEngine) -> States:
        """The states of its segment, from the store; or the final states that an earlier job kept."""
        return engine.states(self)

    def run(self, engine: ReplayEngine, read: States, told: Told = nobody_told) -> Result:
        """Replay and score every cell.

        Raises:
            CheckError: a diagonal cell is off its native margin by more than rounding, or that is off what capture
                stored.
            NotFiniteError: a state or logit is NaN or infinite.
            InputError: an edit that moves nothing, or whose vectors do not fit.
        """
        begun = self.begin(engine, read)
        for part in begun.parts:
            if part.batch is not None:
                with self.naming(part):
                    for result in engine.late(self.late, self.boundary).replay(part.batch):
                        part.take(result, told)
        return self.end(engine, read, begun, told)

    def begin(self, engine: ReplayEngine, read: States) -> Begun:
        """What is to be replayed of each checkpoint's rows, prepared, and where scores go (errors as :meth:`run`)."""
        late = engine.late(self.late, self.boundary) if read.kept is None else None
        events = engine.events(self.segment)
        pair_ids = torch.tensor([events["y_pt"].to_pylist(), events["y_it"].to_pylist()]).T
        whose = {name: whose_head(name, self.late) for name in self.readouts}
        readouts = {one: engine.readout(one) for one in whose.values()}  # one head may go by two names
        natives = {one: self._native(engine, events, pair_ids, one, read) for one in readouts}
        parts = []
        for base in self.checkpoints:
            if not (replays := self._replays(base)):
                continue
            table = ScoreTable(
                len(replays),
                readouts,
                pair_ids,
                whole=[n for n, replay in enumerate(replays) if replay.name == PLAIN.name or self.top1 or self.kl],
                one_by_one=self.strict,
                own=read.final[self.late] if self.kl else None,
            )
            plain = [number for number, replay in enumerate(replays) if replay.name == PLAIN.name]
            states = {number: torch.empty_like(read.final[base]) for number in plain}
            part = Part(base, replays, table, states)
            if late is not None:
                part.moves = Moves()
                part.batch = late.prepare(
                    read.rows[base],
                    read.offsets,
                    [replay.variant for replay in replays],
                    positions=read.positions,
                    donors=read.rows,
                    keys=read.keys,
                    prompts=read.prompts,
                    strict=self.strict,
                    max_tokens=self.max_tokens,
                    moves=part.moves,
                )
            parts.append(part)
        return Begun(events, whose, natives, parts)

    def end(self, engine: ReplayEngine, read: States, begun: Begun, told: Told = nobody_told) -> Result:
        """The table, of parts that have all their final states, or as an earlier job kept them (errors as
        :meth:`run`)."""
        columns: list[dict[str, Any]] = []
        final: dict[str, torch.Tensor] = {}
        still: Counter[str] = Counter()
        mode = "kept" if read.kept is not None else "single" if self.strict else None
        for part in begun.parts:
            if read.kept is not None:
                part.take_kept(read.kept, told)
            elif mode is None:
                mode = engine.late(self.late, self.boundary).mode
            with self.naming(part):
                part.table.finish()
            for number, replay in enumerate(part.replays):
                if replay.name == PLAIN.name:
                    final |= {f"{scope}/{upstream}": part.plain[number].clone() for scope, upstream in replay.cells}
                elif part.moves is not None:
                    n_still = int(part.moves.still(number, after=replay.n_of_scope).sum())
                    still[replay.name] += len(replay.cells) * n_still
                for (scope, upstream), name in ((cell, name) for cell in replay.cells for name in self.readouts):
                    scored, noop = part.table.scores(number, begun.whose[name]), None
                    if upstream == self.late and replay.name == PLAIN.name:
                        native = begun.natives[begun.whose[name]]
                        noop = scored.margin - native.margin
                        self._check_noop(engine.dtype, begun.events, name, native, noop)
                        scored = native
                    column = {"boundary": self.boundary, "scope": scope, "upstream": upstream, "late": self.late}
                    column |= {"readout": name, "variant": replay.name, "kl": scored.kl}
                    columns.append(column | {"margin": scored.margin, "top1_id": scored.top1, "noop_delta": noop})
        notes = {"mode": mode, "still": {name: n for name, n in sorted(still.items()) if n}, **self._changed}
        return Result(cell_table(begun.events, sorted(columns, key=self._place), with_kl=self.kl), notes, final)

    @contextmanager
    def naming(self, part: Part) -> Iterator[None]:
        """Within this context a value that is not finite is said to be of this late stack, over a checkpoint's rows."""
        try:
            yield
        except NotFiniteError as error:
            place = f"late stack of checkpoint {self.late}, states of {part.base} at boundary {self.boundary}"
            variant = "" if error.row is None else f", variant {part.replays[error.row].name!r}"
            raise NotFiniteError(f"{place}{variant}: {error}") from error

    def _replays(self, base: str) -> list[_Replay]:
        """What is replayed from one checkpoint's rows.

        Scope ``prefix`` replays the upstream's rows. Scope ``position`` replays the late checkpoint's own rows with
        row p replaced: an edit of the last position like any other, which shares the keys and values of the rest. On
        the diagonal both are one and the same.
        """
        replays: list[_Replay] = []
        for variant in self.variants:
            own = [(scope, base) for scope in self.scopes if scope == "prefix" or base == self.late]
            if own and base in self.scored:
                replays.append(_Replay(variant, variant.name, tuple(own)))
            if "position" in self.scopes and base == self.late:
                for upstream in self.scored:
                    if upstream != self.late:
                        edits = (Edit(Replace(upstream), positions="last"), *variant.edits)
                        edited = Variant(variant.name, edits, variant.placebo)
                        replays.append(_Replay(edited, variant.name, (("position", upstream),), 1))
        return replays

    def _place(self, column: Mapping[str, Any]) -> tuple[int, ...]:
        """Where a column stands among those of its event."""
        return (
            self.scopes.index(column["scope"]),
            self._numbers[column["variant"]],
            self.checkpoints.index(column["upstream"]),
            self.readouts.index(column["readout"]),
        )

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {variant.name: number for number, variant in enumerate(self.variants)}

    def _native(
        self, engine: ReplayEngine, events: pa.Table, pair_ids: torch.Tensor, whose: str, read: States
    ) -> Scores:
        """What a head makes of the late checkpoint's own final states, which capture stored."""
        native = engine.native(self.segment, self.late, whose, read.final[self.late], pair_ids)
        if whose == self.late:
            self._check_capture(engine.dtype, events, native)
        return native

    def _check_capture(self, dtype: torch.dtype, events: pa.Table, native: Scores) -> None:
        """What a checkpoint's head makes of its stored final states is what it made of them when they were captured."""
        captured = torch.tensor(events[f"margin_{self.late}"].to_pylist(), dtype=torch.float32)
        for first, allowed, n in _beyond(dtype, native, native.margin - captured):
            raise CheckError(
                f"the final norm and head of {self.late} are not those of the capture: event "
                f"{events['event_id'][first]} has a margin of {native.margin[first]:.6g}, captured was "
                f"{captured[first]:.6g} (allowed {allowed:.2g} apart); {n} of {len(captured)} events are; use the "
                "captured checkpoint"
            )

    def _check_noop(
        self, dtype: torch.dtype, events: pa.Table, readout: str, native: Scores, noop: torch.Tensor
    ) -> None:
        check_noop(dtype, events, f"{self.late} over its own states", self.boundary, readout, native, noop)


def check_noop(
    dtype: torch.dtype,
    events: pa.Table,
    what: str,
    boundary: int,
    readout: str,
    native: Scores,
    noop: torch.Tensor,
) -> None:
    """Raise CheckError where a replayed diagonal is off the native margins of these events by more than rounding."""
    for first, allowed, n in _beyond(dtype, native, noop):
        raise CheckError(
            f"replaying {what} is not a no-op: event {events['event_id'][first]} at boundary {boundary}, readout "
            f"{readout}, is off its native margin {native.margin[first]:.6g} by {noop[first]:.3g} (allowed "
            f"{allowed:.2g}); {n} of {len(noop)} events are"
        )


def _beyond(dtype: torch.dtype, native: Scores, delta: torch.Tensor) -> Iterator[tuple[int, float, int]]:
    """The first event that is off by more than rounding, what was allowed there, and how many are; at most once."""
    absolute, relative = NOOP_TOLERANCE[dtype]
    allowed = absolute + relative * native.logits.abs().amax(dim=1)
    wrong = torch.nonzero(~(delta.abs() <= allowed)).flatten().tolist()
    if wrong:
        yield wrong[0], float(allowed[wrong[0]]), len(wrong)
