"""Earlier job: an earlier position of each event's sequence, scored with the event's two tokens.

At that position the tokens are of a future step: what the late blocks make of them before the checkpoints disagree. The
rows are there, as those of every position are. No final state is stored there, so that the diagonal is replayed like
every cell and there is nothing to check it against. Knows late stacks through an engine alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from actcache.canonical import digest_of
from actcache.errors import CheckError
from actcache.progress import Told, nobody_told
from actcache.replay.edits import PLAIN
from actcache.schema import EVENT_KEY, PAIR, names
from actcache.store import Store
from actcache.study.cells import Finished, Scored, by_segment, finished_cells
from actcache.study.jobs import Result
from actcache.study.prefix_job import PREFIX, PrefixJob, serves
from actcache.study.replay_job import ReplayEngine, States
from actcache.study.results import read_result
from actcache.study.scores import whose_head

EARLIER = "earlier_step"
"""The column that says how many tokens come between the prompt and the position that is scored."""


@dataclass(frozen=True, eq=False, kw_only=True)
class EarlierJob(PrefixJob):
    """Some events of a segment (see :class:`actcache.study.prefix_job.PrefixJob`), each read at an earlier step.

    Attributes:
        events: numbers of the events in the segment.
        steps: of each, the earlier one.
        readouts: ``native``, ``common_<label>``.
    """

    part: ClassVar[str] = "earlier"

    events: tuple[int, ...]
    steps: tuple[int, ...]
    readouts: tuple[str, ...]

    @property
    def what(self) -> dict[str, Any]:
        """Readouts, and which step of which event."""
        return {"readouts": sorted(self.readouts), "earlier": digest_of([self.events, self.steps])}

    def run(self, engine: ReplayEngine, read: States, told: Told = nobody_told) -> Result:
        """Replay every sequence.

        Returns:
            One row per event, upstream and readout, event by event: the columns that cells repeat of events, ``pair``,
            ``earlier_step``, and of a cell ``boundary`` to ``margin``.

        Raises:
            NotFiniteError: a state or logit is not finite.
        """
        late = engine.late(self.late, self.boundary)
        events = engine.events(self.segment).take(pa.array(self.events, pa.int64()))
        back = torch.from_numpy(events["step"].to_numpy().astype(np.int64) - np.array(self.steps, np.int64))
        positions = read.positions[list(self.events)].clone()
        positions[:, 1] -= back
        tokens = torch.tensor([events["y_pt"].to_pylist(), events["y_it"].to_pylist()], dtype=torch.int64).T
        margins = []
        for upstream in self.upstreams:
            how: dict[str, Any] = {"positions": positions, "strict": self.strict, "max_tokens": self.max_tokens}
            final = late.run(read.rows[upstream], read.offsets, **how)
            for readout in self.readouts:
                scores = engine.readout(whose_head(readout, self.late)).scores(final, tokens)
                margins.append(scores[:, 1] - scores[:, 0])
            told(len(self.events))
        n_events, n_cells = len(self.events), len(margins)
        events = events.take(pa.array(np.repeat(np.arange(n_events), n_cells)))
        cells = [(upstream, readout) for upstream in self.upstreams for readout in self.readouts]
        n_rows = n_events * n_cells
        table = pa.table(
            {
                **{name: events[name] for name in (*names(EVENT_KEY), PAIR.name)},
                EARLIER: pa.array(np.repeat(self.steps, n_cells), pa.int32()),
                "boundary": pa.array([self.boundary] * n_rows, pa.int32()),
                "scope": pa.array([PREFIX] * n_rows),
                "upstream": pa.array([upstream for upstream, _ in cells] * n_events, pa.string()),
                "late": pa.array([self.late] * n_rows, pa.string()),
                "readout": pa.array([readout for _, readout in cells] * n_events, pa.string()),
                "variant": pa.array([PLAIN.name] * n_rows),
                "margin": pa.array(torch.stack(margins, dim=1).flatten().numpy() if n_rows else [], pa.float32()),
            }
        )
        return Result(table, {"mode": "single" if self.strict else late.mode}, {})


@dataclass(frozen=True)
class Earlier:
    """Which earlier positions are scored, and how.

    Attributes:
        steps: number of an event -> its earlier step.
        boundary: first late block.
        labels: of the upstreams and late stacks.
        readouts: by label.
        strict: see :class:`EarlierJob`, and so is ``max_tokens``.
    """

    steps: Mapping[int, int]
    boundary: int
    labels: Sequence[str]
    readouts: Sequence[str]
    strict: bool
    max_tokens: int | None

    def jobs(self, store: Store, finished: Finished) -> list[EarlierJob]:
        """What is not finished; ``finished`` is what the folder of the results holds."""
        jobs = []
        columns = {name: store.events[name].to_pylist() for name in ("position", "step", "sequence")}
        for segment, of_segment in by_segment(finished, store):
            own = [event for event in segment.events if event in self.steps]
            for late in self.labels if own else ():
                scored = of_segment.get((self.boundary, PREFIX, late), [])
                done = {event for one in scored if self._is_served_by(one) for event in one.events.tolist()}
                if done.issuperset(own):
                    continue
                jobs.append(
                    EarlierJob(
                        store=store.fingerprint.digest,
                        segment=segment.name,
                        events=tuple(event - segment.events.start for event in own),
                        steps=tuple(self.steps[event] for event in own),
                        lengths=tuple(columns["position"][n] - columns["step"][n] + self.steps[n] + 1 for n in own),
                        sequences=tuple(columns["sequence"][event] for event in own),
                        upstreams=tuple(self.labels),
                        boundary=self.boundary,
                        late=late,
                        readouts=tuple(self.readouts),
                        strict=self.strict,
                        max_tokens=self.max_tokens,
                    )
                )
        return jobs

    def read(self, folder: Path, store: Store) -> pa.Table:
        """The rows of all its events, as :meth:`EarlierJob.run` gives them.

        Raises:
            CheckError: an event has none.
            CorruptFileError, NoSealError: a file is damaged.
        """
        finished = finished_cells(folder, store)
        tables = []
        for late in self.labels:
            left = np.zeros(len(store), bool)
            left[list(self.steps)] = True
            for scored in finished.get((self.boundary, PREFIX, late), []):
                if self._is_served_by(scored):
                    ids = store.events["event_id"].take(pa.array(scored.events[left[scored.events]]))
                    table = read_result(scored.path).content
                    chosen = pc.is_in(table["event_id"], value_set=ids.combine_chunks())
                    tables.append(table.filter(chosen))
                    left[scored.events] = False
            if left.any():
                raise CheckError(f"{folder} lacks results: files of it are gone; give the same command again")
        return pa.concat_tables(tables)

    def _is_served_by(self, scored: Scored) -> bool:
        return serves(scored, self.labels, self.strict, self.max_tokens) and set(self.readouts) <= set(
            scored.key["readouts"]
        )
