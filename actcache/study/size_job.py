"""Size job: how large the final states of plain cells are, over whole sequences.

A grid keeps of each cell the final state at p. What the cell computes before p is not kept, so that its sizes take a
replay of their own. Knows late stacks through an engine alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from actcache.errors import CheckError
from actcache.progress import Told, nobody_told
from actcache.replay.sizes import SIZES
from actcache.schema import EVENT_KEY, names
from actcache.store import Store
from actcache.study.cells import Finished, by_segment, finished_cells
from actcache.study.jobs import Result
from actcache.study.prefix_job import PREFIX, PrefixJob, serves
from actcache.study.replay_job import ReplayEngine, States
from actcache.study.results import read_result


@dataclass(frozen=True, eq=False, kw_only=True)
class SizeJob(PrefixJob):
    """All events of a segment (see :class:`actcache.study.prefix_job.PrefixJob`)."""

    part: ClassVar[str] = "sizes"

    @property
    def what(self) -> dict[str, Any]:
        """Which sizes."""
        return {"sizes": list(SIZES)}

    def run(self, engine: ReplayEngine, read: States, told: Told = nobody_told) -> Result:
        """Replay every sequence.

        Returns:
            One row per event and upstream, event by event: the columns that cells repeat of events, ``boundary``,
            ``scope``, ``upstream``, ``late``, and the sizes (float64).

        Raises:
            NotFiniteError: a state is not finite.
        """
        late = engine.late(self.late, self.boundary)
        found = []
        for upstream in self.upstreams:
            found.append(
                late.sizes(
                    read.rows[upstream],
                    read.offsets,
                    positions=read.positions,
                    strict=self.strict,
                    max_tokens=self.max_tokens,
                )
            )
            told(len(self.lengths))
        sizes = torch.stack(found, dim=1).flatten(0, 1).numpy()
        events, n_rows = engine.events(self.segment), self.n_units
        repeated = pa.array(np.repeat(np.arange(len(self.lengths)), len(self.upstreams)))
        table = pa.table(
            {
                **{name: events[name].take(repeated) for name in names(EVENT_KEY)},
                "boundary": pa.array([self.boundary] * n_rows, pa.int32()),
                "scope": pa.array([PREFIX] * n_rows),
                "upstream": pa.array(list(self.upstreams) * len(self.lengths), pa.string()),
                "late": pa.array([self.late] * n_rows, pa.string()),
                **{name: pa.array(sizes[:, column]) for column, name in enumerate(SIZES)},
            }
        )
        return Result(table, {"mode": "single" if self.strict else late.mode}, {})


def size_jobs(
    store: Store,
    finished: Finished,
    boundary: int,
    pair: Sequence[str],
    *,
    strict: bool,
    max_tokens: int | None,
) -> list[SizeJob]:
    """What is not finished of the sizes of a pair's four cells."""
    lengths = [position + 1 for position in store.events["position"].to_pylist()]
    sequences = store.events["sequence"].to_pylist()
    jobs = []
    for segment, of_segment in by_segment(finished, store):
        for late in pair:
            done = np.zeros(len(store), bool)
            for scored in of_segment.get((boundary, PREFIX, late), []):
                if serves(scored, pair, strict, max_tokens):
                    done[scored.events] = True
            if not done[segment.events.start : segment.events.stop].all():
                jobs.append(
                    SizeJob(
                        store=store.fingerprint.digest,
                        segment=segment.name,
                        lengths=tuple(lengths[segment.events.start : segment.events.stop]),
                        sequences=tuple(sequences[segment.events.start : segment.events.stop]),
                        upstreams=tuple(pair),
                        boundary=boundary,
                        late=late,
                        strict=strict,
                        max_tokens=max_tokens,
                    )
                )
    return jobs


def read_sizes(
    folder: Path,
    store: Store,
    boundary: int,
    pair: Sequence[str],
    *,
    strict: bool,
    max_tokens: int | None,
) -> dict[tuple[str, str], npt.NDArray[np.float64]]:
    """The sizes of a pair's four cells by (upstream, late), ``[E, 4]`` in the order of the store's events.

    Raises:
        CheckError: an event has none.
        CorruptFileError, NoSealError: a file is damaged.
    """
    finished = finished_cells(folder, store)
    found = {(upstream, late): np.full((len(store), len(SIZES)), np.nan) for upstream in pair for late in pair}
    for late in pair:
        for scored in finished.get((boundary, PREFIX, late), []):
            if serves(scored, pair, strict, max_tokens):
                table = read_result(scored.path).content
                for upstream in pair:
                    of_upstream = table.filter(pc.equal(table["upstream"], upstream))
                    values = [of_upstream[name].to_numpy() for name in SIZES]
                    found[upstream, late][scored.events] = np.stack(values, axis=1)
    if any(np.isnan(values).any() for values in found.values()):
        raise CheckError(f"{folder} lacks sizes of some events: files of it are gone; give the same command again")
    return found
