"""Continuation job: candidates that go on behind events, teacher-forced through the cells of a pair.

A candidate is a list of tokens behind an event's sequence. The cell reads the upstream's states at the boundary over
all of it: those up to the event's position are in the store, those of the candidate are what a states job kept
(states_job.py). One run through a sequence scores all of its tokens. Knows late stacks through an engine alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from actcache.canonical import digest_of
from actcache.models.cost import ModelShape
from actcache.progress import Told, nobody_told
from actcache.study.jobs import Result
from actcache.study.prefix_job import PrefixJob
from actcache.study.replay_job import ReplayEngine, States, check_noop
from actcache.study.scores import Scores, whose_head
from actcache.study.states_job import ROWS, StatesJob
from actcache.study.work import Cost

CANDIDATES = ("desc_primary", "base_primary", "base_forced_desc", "desc_shuffled")
CONTRASTS = {
    "primary": ("desc_primary", "base_primary"),
    "same_forced": ("desc_primary", "base_forced_desc"),
    "shuffled": ("desc_shuffled", "base_primary"),
}
"""Which two candidates a contrast compares: the first one's log-probability, less the second one's."""

STATES = "states"
"""The folder of the states that these jobs read, in that of their analysis."""

Candidates = tuple[tuple[int, ...], ...]
"""The tokens of an event's candidates, in the order of ``CANDIDATES``; none of one that there is not."""

CONTINUED = pa.schema(
    [
        ("event_id", pa.string()),
        ("prompt_id", pa.string()),
        ("upstream", pa.string()),
        ("late", pa.string()),
        ("readout", pa.string()),
        ("contrast", pa.string()),
        ("n", pa.int32()),
        ("y", pa.float64()),
    ]
)


def distinct(candidates: Sequence[Candidates]) -> list[tuple[int, tuple[int, ...]]]:
    """The different candidates of each event, with the event's number here: what is run is run once."""
    return [(number, tokens) for number, of in enumerate(candidates) for tokens in dict.fromkeys(of) if tokens]


class ContinuationEngine(ReplayEngine, Protocol):
    """What these jobs ask of what they are run with."""

    def left(self, what: str, key: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors that an earlier job of the same analysis kept."""


class Continued(NamedTuple):
    """What a job reads: the states of its segment, and of each upstream the rows behind them, ``[N, D]``."""

    states: States
    further: list[torch.Tensor]


@dataclass(frozen=True)
class _Reads:
    """Where sequences are read.

    Attributes:
        positions: ``[m, 2]``, sequence and position of each final state.
        tokens: ``[m, 2]``, those scored there: y_pt and y_it at an event's position, then one token twice.
        at_event: of each event, which of the m is at its position.
        after: of each sequence, those of the m behind it.
    """

    positions: torch.Tensor
    tokens: torch.Tensor
    at_event: list[int]
    after: list[range]


@dataclass(frozen=True, eq=False, kw_only=True)
class ContinuationJob(PrefixJob):
    """Some events of a segment and a pair (see :class:`actcache.study.prefix_job.PrefixJob`; a sequence is an event's
    with one candidate behind it, but for the last token, which nothing follows).

    Attributes:
        events: numbers of the events in the segment.
        candidates: of each event.
        steps: how many tokens come before the last one that is counted: 0 is the event's own two tokens.
        readouts: ``native``, ``common_<label>``.
        states: the jobs that keep the states of the candidates, one per upstream; none where no candidate goes on.
    """

    part: ClassVar[str] = "continuation"

    events: tuple[int, ...]
    candidates: tuple[Candidates, ...]
    steps: tuple[int, ...]
    readouts: tuple[str, ...]
    states: tuple[StatesJob, ...]

    @property
    def what(self) -> dict[str, Any]:
        """Readouts, steps, and which candidates of which events."""
        candidates = digest_of([self.events, self.candidates])
        return {"readouts": sorted(self.readouts), "steps": list(self.steps), "candidates": candidates}

    def cost(self, shapes: Mapping[str, ModelShape]) -> Cost:
        """A replay per sequence and upstream, and a row of whole-vocabulary logits per position that is read and
        readout."""
        shape = shapes[self.late]
        n_read = len(self.events) + sum(len(tokens) - 1 for _, tokens in self._distinct)
        products = shape.products(np.array(self.lengths, np.float64), first=self.boundary)
        heads = len(self.readouts) * n_read * shape.head_products
        return Cost({self.part: len(self.upstreams) * (products + heads)})

    @cached_property
    def _distinct(self) -> list[tuple[int, tuple[int, ...]]]:
        return distinct(self.candidates)

    def read(self, engine: ContinuationEngine) -> Continued:  # type: ignore[override]
        """The states of its segment, from the store, and those behind, as the states jobs kept them."""
        further = [engine.left(STATES, job.key)[ROWS] for job in self.states]
        return Continued(engine.rows(self.segment, self.boundary), further)

    def run(self, engine: ContinuationEngine, read: Continued, told: Told = nobody_told) -> Result:
        """Replay every sequence behind every upstream.

        Returns:
            One row per event, upstream, readout, contrast and step that both of its candidates have: ``y``, the sum of
            the log-probabilities of the first candidate's tokens up to there, less that of the second one's, in nats.

        Raises:
            CheckError: the late checkpoint's own states give other margins than its own forward, by more than rounding.
            NotFiniteError: a state or logit is not finite.
        """
        late = engine.late(self.late, self.boundary)
        events = engine.events(self.segment).take(pa.array(self.events, pa.int64()))
        reads = self._reads(events)
        rows: list[dict[str, Any]] = []
        names = list(zip(events["event_id"].to_pylist(), events["prompt_id"].to_pylist(), strict=True))
        for number, upstream in enumerate(self.upstreams):
            further = read.further[number] if read.further else None
            states, offsets = self._assembled(read.states, upstream, further)
            how: dict[str, Any] = {"strict": self.strict, "max_tokens": self.max_tokens, "together": True}
            final = late.run(states, offsets, positions=reads.positions, **how)
            for readout in self.readouts:
                whose = whose_head(readout, self.late)
                log_probs = engine.readout(whose).log_probs(final, reads.tokens).numpy()
                if upstream == self.late:
                    self._check(engine, events, read.states, readout, final[reads.at_event], reads)
                cell = {"upstream": upstream, "late": self.late, "readout": readout}
                for (event, contrast, n), y in self._contrasts(log_probs, reads):
                    of = dict(zip(("event_id", "prompt_id"), names[event], strict=True))
                    rows.append(of | cell | {"contrast": contrast, "n": n, "y": y})
            told(len(self.lengths))
        return Result(pa.Table.from_pylist(rows, CONTINUED), {"mode": "single" if self.strict else late.mode}, {})

    def _reads(self, events: pa.Table) -> _Reads:
        """The event's position is read once, whatever follows it: at 0 its two tokens share a normaliser."""
        pairs = list(zip(events["y_pt"].to_pylist(), events["y_it"].to_pylist(), strict=True))
        at_event = [-1] * len(pairs)
        positions: list[tuple[int, int]] = []
        tokens: list[tuple[int, int]] = []
        after: list[range] = []
        for sequence, (length, (event, of)) in enumerate(zip(self.lengths, self._distinct, strict=True)):
            position = length - len(of)
            if at_event[event] < 0:
                at_event[event] = len(positions)
                positions.append((sequence, position))
                tokens.append(pairs[event])
            after.append(range(len(positions), len(positions) + len(of) - 1))
            positions += [(sequence, position + n) for n in range(1, len(of))]
            tokens += [(token, token) for token in of[1:]]
        return _Reads(torch.tensor(positions), torch.tensor(tokens), at_event, after)

    def _assembled(
        self, states: States, upstream: str, further: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of every sequence, and where each begins: those of the store, then those behind."""
        places = states.positions[list(self.events)].tolist()
        starts, parts, done = states.offsets.tolist(), [], 0
        for event, tokens in self._distinct:
            sequence, position = places[event]
            parts.append(states.rows[upstream][starts[sequence] : starts[sequence] + position + 1])
            if len(tokens) > 1 and further is not None:
                parts.append(further[done : done + len(tokens) - 1])
                done += len(tokens) - 1
        return torch.cat(parts), torch.tensor([0, *np.cumsum(self.lengths)])

    def _contrasts(self, log_probs: npt.NDArray[np.float64], reads: _Reads) -> list[tuple[tuple[int, str, int], float]]:
        """Y at every step, of log-probabilities ``[m, 2]``."""
        sums: dict[tuple[int, tuple[int, ...]], npt.NDArray[np.float64]] = {}
        for (event, tokens), after in zip(self._distinct, reads.after, strict=True):
            at = reads.at_event[event]
            first = log_probs[at, 0 if tokens[0] == int(reads.tokens[at, 0]) else 1]
            sums[event, tokens] = np.cumsum([first, *log_probs[after.start : after.stop, 0]])
        found = []
        for event, candidates in enumerate(self.candidates):
            of = dict(zip(CANDIDATES, candidates, strict=True))
            for contrast, (one, other) in CONTRASTS.items():
                length = min(len(of[one]), len(of[other]))
                for n in self.steps:
                    if n < length:
                        y = float(sums[event, of[one]][n] - sums[event, of[other]][n])
                        found.append(((event, contrast, n), y))
        return found

    def _check(
        self,
        engine: ContinuationEngine,
        events: pa.Table,
        states: States,
        readout: str,
        final: torch.Tensor,
        reads: _Reads,
    ) -> None:
        """Behind its own states, the late checkpoint gives the margins of its own forward."""
        whose = whose_head(readout, self.late)
        every = engine.events(self.segment)
        pair_ids = torch.tensor([every["y_pt"].to_pylist(), every["y_it"].to_pylist()]).T
        native = engine.native(self.segment, self.late, whose, states.final[self.late], pair_ids)
        native = Scores(native.logits[list(self.events)], None)
        scores = engine.readout(whose).scores(final, reads.tokens[reads.at_event])
        what = f"{self.late} over its own states, with candidates behind events,"
        noop = scores[:, 1] - scores[:, 0] - native.margin
        check_noop(engine.dtype, events, what, self.boundary, readout, native, noop)
