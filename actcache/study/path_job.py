"""Path job: what each part of a block at p does to the margin through the final norm alone.

Where blocks add what their attention and MLP give to the residual stream, and nothing else, the final state at p is the
state at the boundary plus these. One of them is exchanged for the source's, and the host's readout reads the sum: no
later block sees the change. Knows late stacks and readouts through an engine alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from actcache.canonical import digest_of
from actcache.errors import CheckError, UnsupportedModelError
from actcache.models.backbone import rounding_of
from actcache.models.cost import ModelShape
from actcache.progress import Told, nobody_told
from actcache.replay.edits import Site
from actcache.replay.taken import Place, take
from actcache.schema import EVENT_KEY, names
from actcache.store import Store
from actcache.study.cells import Finished, by_segment, finished_cells
from actcache.study.jobs import Result
from actcache.study.prefix_job import PREFIX, PrefixJob, places_of, serves
from actcache.study.replay_job import ReplayEngine, States
from actcache.study.results import read_result
from actcache.study.work import Cost, Places

PARTS: tuple[Site, Site] = ("attention", "mlp")


@dataclass(frozen=True, eq=False, kw_only=True)
class PathJob(PrefixJob):
    """Some events of a segment (see :class:`actcache.study.prefix_job.PrefixJob`): the late stack is the host's, and
    the one upstream is the source.

    Attributes:
        events: numbers of the events in the segment.
        n_blocks: L.
    """

    part: ClassVar[str] = "path"

    events: tuple[int, ...]
    n_blocks: int

    @property
    def what(self) -> dict[str, Any]:
        """Direct effects, of which events."""
        return {"path": digest_of(list(self.events))}

    @property
    def n_units(self) -> int:
        """(event, part) combinations."""
        return len(self.events) * len(PARTS) * (self.n_blocks - self.boundary)

    def cost(self, shapes: Mapping[str, ModelShape]) -> Cost:
        """A replay of the events' sequences by each of the two."""
        places = Places.of(self.lengths, self.sequences)
        lengths = places.places if self.strict else places.sequences
        labels = self.late, *self.upstreams
        return Cost({self.part: sum(shapes[label].products(lengths, first=self.boundary) for label in labels)})

    def run(self, engine: ReplayEngine, read: States, told: Told = nobody_told) -> Result:
        """Take what the parts give in both runs, and exchange each.

        Returns:
            One row per event, block and part, event by event: the columns that cells repeat of events, ``host``,
            ``source``, ``site``, ``boundary`` (the block), ``margin``.

        Raises:
            NotFiniteError: a state or logit is not finite.
            UnsupportedModelError: the blocks have no such part, or do more than add what these give.
        """
        (source,), host = self.upstreams, self.late
        events = engine.events(self.segment).take(pa.array(self.events, pa.int64()))
        positions = read.positions[list(self.events)]
        how: dict[str, Any] = {"positions": positions, "strict": self.strict, "max_tokens": self.max_tokens}
        places: list[Place] = [(block, site) for block in range(self.boundary, self.n_blocks) for site in PARTS]
        given = {
            label: take(engine.late(label, self.boundary), read.rows[label], read.offsets, places, **how)
            for label in (source, host)
        }
        last = read.offsets[positions[:, 0]] + positions[:, 1]
        final = read.final[host][list(self.events)].float()
        self._check_sum(read.rows[host][last], given[host], final, engine.dtype)
        tokens = torch.tensor([events["y_pt"].to_pylist(), events["y_it"].to_pylist()], dtype=torch.int64).T
        readout, margins = engine.readout(host), []
        for place in places:
            exchanged = final - given[host][place].float() + given[source][place].float()
            scores = readout.scores(exchanged.to(engine.dtype), tokens)
            margins.append(scores[:, 1] - scores[:, 0])
            told(len(self.events))
        n_events = len(self.events)
        repeated = events.take(pa.array(np.repeat(np.arange(n_events), len(places))))
        n_rows = n_events * len(places)
        table = pa.table(
            {
                **{name: repeated[name] for name in names(EVENT_KEY)},
                **{"host": pa.array([host] * n_rows, pa.string()), "source": pa.array([source] * n_rows, pa.string())},
                "site": pa.array([site for _, site in places] * n_events, pa.string()),
                "boundary": pa.array([block for block, _ in places] * n_events, pa.int32()),
                "margin": pa.array(torch.stack(margins, dim=1).flatten().numpy()),
            }
        )
        return Result(table, {"mode": "single" if self.strict else engine.late(host, self.boundary).mode}, {})

    def _check_sum(
        self, state: torch.Tensor, given: Mapping[Place, torch.Tensor], final: torch.Tensor, dtype: torch.dtype
    ) -> None:
        """The parts and the state make the final state, or the blocks do more than add them."""
        total = sum((part.float() for part in given.values()), start=state.float())
        off, size = float((total - final).abs().max()), float(final.abs().max())
        if not off <= rounding_of(dtype) * size:
            raise UnsupportedModelError(
                f"checkpoint {self.late}: what attention and MLP give does not add up to the final state (off by "
                f"{off:.2g} of {size:.2g}): its blocks scale or norm it first, or have further parts; path needs "
                "blocks that add it as it is"
            )


@dataclass(frozen=True)
class PathSettings:
    """Which direct effects are computed, and how.

    Attributes:
        pairs: of events; both directions of each.
        boundary: the first block.
        strict: see :class:`PathJob`, and so is ``max_tokens``.
    """

    pairs: Sequence[tuple[str, str]]
    boundary: int
    strict: bool = False
    max_tokens: int | None = None

    def jobs(self, store: Store, finished: Finished) -> list[PathJob]:
        """What is not finished; ``finished`` is what the folder of the results holds."""
        jobs = []
        pairs = store.events["pair"].to_pylist()
        for segment, of_segment in by_segment(finished, store):
            for pair in self.pairs:
                own = [event for event in segment.events if pairs[event] == ",".join(pair)]
                for host, source in (pair, pair[::-1]) if own else ():
                    found = of_segment.get((self.boundary, PREFIX, host), [])
                    served = [one for one in found if serves(one, [source], self.strict, self.max_tokens)]
                    if {event for one in served for event in one.events.tolist()}.issuperset(own):
                        continue
                    jobs.append(
                        PathJob(
                            **places_of(store, segment, own),
                            upstreams=(source,),
                            boundary=self.boundary,
                            late=host,
                            n_blocks=store.fingerprint.n_blocks,
                            strict=self.strict,
                            max_tokens=self.max_tokens,
                        )
                    )
        return jobs

    def read(self, folder: Path, store: Store) -> pa.Table:
        """The rows of all events, as :meth:`PathJob.run` gives them; by event, host and block.

        Raises:
            CheckError: one is missing.
            CorruptFileError, NoSealError: a file is damaged.
        """
        finished = finished_cells(folder, store)
        pairs = store.events["pair"].to_numpy(zero_copy_only=False)
        tables = []
        for pair in self.pairs:
            for host, source in (pair, pair[::-1]):
                left = pairs == ",".join(pair)
                for scored in finished.get((self.boundary, PREFIX, host), []):
                    if serves(scored, [source], self.strict, self.max_tokens):
                        table = read_result(scored.path).content
                        event = np.repeat(scored.events, table.num_rows // len(scored.events))
                        kept = left[event]
                        left[scored.events] = False
                        tables.append(table.filter(pa.array(kept)).append_column("event", pa.array(event[kept])))
                if left.any():
                    raise CheckError(f"{folder} lacks results: files of it are gone; give the same command again")
        if not tables:
            return pa.table({})
        keys = [(name, "ascending") for name in ("event", "host", "boundary", "site")]
        return pa.concat_tables(tables).sort_by(keys).drop_columns(["event"])
