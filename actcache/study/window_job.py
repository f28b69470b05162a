"""Window job: events behind a checkpoint's blocks, some of whose modules are another checkpoint's, from the host's own
states on.

Of each event it gives the margin and the best token by the host's readout; and what the modules of some blocks add to
the margin, as the host's readout reads the residual stream before and after each (a lens). The swapped modules begin at
the boundary or later: until then, the host computes what it always does. Knows late stacks through an engine alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from actcache.canonical import digest_of
from actcache.errors import CheckError, NotFiniteError
from actcache.models.cost import ModelShape
from actcache.progress import Told, nobody_told
from actcache.replay.swap import Module, Swap
from actcache.schema import EVENT_KEY, NATIVE, PAIR, ROLES, names
from actcache.store import Store
from actcache.study.cells import Finished, Scored, by_segment
from actcache.study.jobs import Result
from actcache.study.prefix_job import PREFIX, PrefixJob, places_of, serves
from actcache.study.replay_job import ReplayEngine, States, check_noop
from actcache.study.results import read_result
from actcache.study.scores import Scores, ScoreTable
from actcache.study.statistics import Floats, Ints
from actcache.study.work import Cost, Places


@dataclass(frozen=True, eq=False, kw_only=True)
class WindowJob(PrefixJob):
    """Some events of a segment behind ``late``, which is the host and the one upstream (see
    :class:`actcache.study.prefix_job.PrefixJob`).

    Attributes:
        events: numbers of the events in the segment.
        swap: which modules are another checkpoint's; None for the host as it is.
        module: whose margin support is read: ``mlp``, ``attention`` or ``block``.
        layers: in which blocks.
    """

    part: ClassVar[str] = "windows"

    events: tuple[int, ...]
    swap: Swap | None
    module: Module
    layers: tuple[int, ...]

    @property
    def what(self) -> dict[str, Any]:
        """The swap, whose margin support is read, and of which events."""
        return {**described(self.swap, self.module, self.layers), "events": digest_of(self.events)}

    @property
    def stacks(self) -> tuple[str, ...]:
        """Labels of the checkpoints that it runs."""
        return (self.late,) if self.swap is None else (self.late, self.swap.source)

    def cost(self, shapes: Mapping[str, ModelShape]) -> Cost:
        """A replay of every sequence, and a best token of each event."""
        shape, places = shapes[self.late], Places.of(self.lengths, self.sequences)
        replay, heads = super().cost(shapes).parts[self.part], len(self.events) * shape.head_products
        return Cost({self.part: replay + heads, "hooks": shape.products(places.events) + heads})

    def run(self, engine: ReplayEngine, read: States, told: Told = nobody_told) -> Result:
        """Replay every sequence.

        Returns:
            One row per event: the columns that cells repeat of events, ``pair``, ``boundary``, ``scope``, ``upstream``
            and ``late``, then ``margin``, ``top1_id``, and ``margin_support``, a list with a number of each block: the
            margin after its module less the one before it. Where nothing is swapped, margin and best token are the
            native ones, which the replay is held against.

        Raises:
            CheckError: the host over its own states is off its native margins by more than rounding.
            NotFiniteError: a state or logit is not finite.
            InputError, UnsupportedModelError: the modules cannot be swapped, or what they add is unknown.
        """
        host, swap = self.late, self.swap
        late = engine.late(host, self.boundary) if swap is None else engine.swapped(host, swap, self.boundary)
        every = engine.events(self.segment)
        events, tokens = every.take(pa.array(self.events, pa.int64())), _tokens(every)
        own, readout = tokens[list(self.events)], engine.readout(host)
        table = ScoreTable(1, {host: readout}, own, whole=[0], one_by_one=self.strict, own=None)
        n_layers = len(self.layers)
        support = torch.empty(len(own), n_layers)
        how: dict[str, Any] = {"strict": self.strict, "max_tokens": self.max_tokens}
        how["positions"] = read.positions[list(self.events)]
        try:
            for at, rows in late.around(read.rows[host], read.offsets, self.module, self.layers, **how):
                table.add(at, torch.zeros_like(at), rows[:, 0])
                pairs = own[at].repeat_interleave(2 * n_layers, dim=0)
                logits = readout.scores(rows[:, 1:].flatten(0, 1), pairs)
                margins = (logits[:, 1] - logits[:, 0]).view(len(at), n_layers, 2)
                support[at] = margins[..., 1] - margins[..., 0]
                told(len(at))
            table.finish()
        except NotFiniteError as error:
            swapped = "" if swap is None else f", {swap}"
            place = f"late stack of checkpoint {host} over its own states at boundary {self.boundary}{swapped}"
            raise NotFiniteError(f"{place}: {error}") from error
        scores = table.scores(0, host)
        if swap is None:
            scores = self._checked(engine, read, tokens, scores, events)
        assert scores.top1 is not None
        n = len(events)
        found = {
            **{name: events[name] for name in (*names(EVENT_KEY), PAIR.name)},
            "boundary": pa.array([self.boundary] * n, pa.int32()),
            "scope": pa.array([PREFIX] * n),
            "upstream": pa.array([host] * n),
            "late": pa.array([host] * n),
            "margin": pa.array(scores.margin.numpy(), pa.float32()),
            "top1_id": pa.array(scores.top1.numpy(), pa.int64()),
            "margin_support": pa.array(list(support.numpy()), pa.list_(pa.float32())),
        }
        return Result(pa.table(found), {"mode": "single" if self.strict else late.mode}, {})

    def _checked(
        self, engine: ReplayEngine, read: States, tokens: torch.Tensor, scores: Scores, events: pa.Table
    ) -> Scores:
        """The native scores of the events, which the replayed ones must be, to rounding."""
        chosen = list(self.events)
        every = engine.native(self.segment, self.late, self.late, read.final[self.late], tokens)
        assert every.top1 is not None
        native = Scores(every.logits[chosen], every.top1[chosen])
        what = f"{self.late} over its own states"
        check_noop(engine.dtype, events, what, self.boundary, NATIVE, native, scores.margin - native.margin)
        return native


def described(swap: Swap | None, module: Module, layers: Sequence[int]) -> dict[str, Any]:
    """What is replayed, and read, as plain values."""
    return {"swap": None if swap is None else str(swap), "module": module, "layers": list(layers)}


def _tokens(events: pa.Table) -> torch.Tensor:
    return torch.tensor([events[f"y_{role}"].to_pylist() for role in ROLES], dtype=torch.int64).T


class Found(NamedTuple):
    """Of some events, in their order.

    Attributes:
        margin: ``[n]``, by the host's readout.
        top1: ``[n]``, the best token.
        support: ``[n, k]``, the margin support of each block.
    """

    margin: npt.NDArray[np.float32]
    top1: Ints
    support: Floats


@dataclass(frozen=True)
class Windowed:
    """One window of a host with a source's modules, or a host as it is, over some events of a store.

    Attributes:
        events: numbers of the events, ascending.
        host: label of the checkpoint that is run on its own states.
        boundary: from which on.
        swap, module, layers: see :class:`WindowJob`.
        strict: see there, and so is ``max_tokens``.
    """

    events: Sequence[int]
    host: str
    boundary: int
    swap: Swap | None
    module: Module
    layers: tuple[int, ...]
    strict: bool
    max_tokens: int | None

    def jobs(self, store: Store, finished: Finished) -> list[WindowJob]:
        """What is not finished; ``finished`` is what the folder of the results holds."""
        jobs = []
        for segment, of_segment in by_segment(finished, store):
            first, last = np.searchsorted(self.events, [segment.events.start, segment.events.stop]).tolist()
            own = self.events[first:last]
            done = {event for one in self._serving(of_segment) for event in one.events.tolist()}
            if done.issuperset(own):
                continue
            jobs.append(
                WindowJob(
                    **places_of(store, segment, own),
                    upstreams=(self.host,),
                    boundary=self.boundary,
                    late=self.host,
                    swap=self.swap,
                    module=self.module,
                    layers=self.layers,
                    strict=self.strict,
                    max_tokens=self.max_tokens,
                )
            )
        return jobs

    def read(self, finished: Finished, folder: object) -> Found:
        """What finished jobs gave of its events.

        Raises:
            CheckError: an event has nothing in ``folder``, where they lie.
            CorruptFileError, NoSealError: a file is damaged.
        """
        n = len(self.events)
        found = Found(np.zeros(n, np.float32), np.zeros(n, np.int64), np.full((n, len(self.layers)), np.nan))
        left = np.ones(n, bool)
        for one in self._serving(finished):
            table = read_result(one.path).content
            at = np.searchsorted(self.events, one.events)
            own = (at < n) & (np.append(self.events, -1)[at] == one.events)
            at, table = at[own], table.filter(pa.array(own))
            found.margin[at], found.top1[at] = table["margin"].to_numpy(), table["top1_id"].to_numpy()
            found.support[at] = np.array(table["margin_support"].to_pylist(), np.float64).reshape(len(at), -1)
            left[at] = False
        if left.any():
            raise CheckError(f"{folder} lacks results: files of it are gone; give the same command again")
        return found

    def _serving(self, finished: Finished) -> list[Scored]:
        what = described(self.swap, self.module, self.layers)
        return [
            one
            for one in finished.get((self.boundary, PREFIX, self.host), [])
            if serves(one, [self.host], self.strict, self.max_tokens)
            and all(one.key.get(name) == value for name, value in what.items())
        ]
