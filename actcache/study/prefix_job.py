"""Prefix job: what kinds of replay share that are no cells of a run: size jobs, earlier jobs, continuation jobs.

All read the whole prefix of some upstreams, plain, behind one late stack. Their results lie in a folder of their own,
one sealed table per job (results.py), as those of cells do. Knows late stacks through an engine alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from actcache.models.cost import ModelShape
from actcache.store import Segment, Store
from actcache.study.cells import Scored
from actcache.study.replay_job import ReplayEngine, States
from actcache.study.work import Cost, Places

PREFIX = "prefix"
"""The scope of what they replay."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PrefixJob(ABC):
    """Events of one segment at one boundary behind one late stack, with the whole prefix of some upstreams.

    Attributes:
        store: digest of the store's fingerprint.
        segment: its name.
        lengths: tokens of every event's sequence, up to the position that is read.
        sequences: number of every event's sequence.
        upstreams: labels of checkpoints.
        boundary: first late block.
        late: label of the late stack.
        strict: one sequence per forward.
        max_tokens: tokens per forward otherwise; None for what suits the device.
        part: under which name a plan counts what it takes.
    """

    part: ClassVar[str]

    store: str
    segment: str
    lengths: tuple[int, ...]
    sequences: tuple[int, ...]
    upstreams: tuple[str, ...]
    boundary: int
    late: str
    strict: bool = False
    max_tokens: int | None = None

    @property
    @abstractmethod
    def what(self) -> dict[str, Any]:
        """What its rows depend on beside where it replays."""

    @property
    def key(self) -> dict[str, Any]:
        """All that its rows depend on."""
        return {
            "store": self.store,
            "segment": self.segment,
            "boundary": self.boundary,
            "late": self.late,
            "scopes": [PREFIX],
            "upstreams": list(self.upstreams),
            **self.what,
            "strict": self.strict,
            "max_tokens": self.max_tokens,
        }

    @property
    def n_units(self) -> int:
        """(event, upstream) combinations."""
        return len(self.lengths) * len(self.upstreams)

    def cost(self, shapes: Mapping[str, ModelShape]) -> Cost:
        """A replay of every sequence per upstream; where it is strict, of every distinct place."""
        places = Places.of(self.lengths, self.sequences)
        lengths = places.places if self.strict else places.sequences
        return Cost({self.part: len(self.upstreams) * shapes[self.late].products(lengths, first=self.boundary)})

    def read(self, engine: ReplayEngine) -> States:
        """The states of its segment, from the store."""
        return engine.rows(self.segment, self.boundary)


def places_of(store: Store, segment: Segment, own: Sequence[int]) -> dict[str, Any]:
    """Fields of a job over some events of a segment, ``own``, each read at its own position: ``store``, ``segment``,
    ``events`` (numbers in the segment), ``lengths`` and ``sequences``."""
    of = store.events.select(["position", "sequence"]).take(pa.array(own, pa.int64()))
    return {
        "store": store.fingerprint.digest,
        "segment": segment.name,
        "events": tuple(event - segment.events.start for event in own),
        "lengths": tuple(position + 1 for position in of["position"].to_pylist()),
        "sequences": tuple(of["sequence"].to_pylist()),
    }


def serves(scored: Scored, upstreams: Sequence[str], strict: bool, max_tokens: int | None) -> bool:
    """Whether a finished one has these upstreams, replayed as asked."""
    found = (scored.key["upstreams"], scored.key["strict"], scored.key["max_tokens"])
    return found == (list(upstreams), strict, max_tokens)
