"""Gradient job: what modules of late blocks give at each event's position, and how its margin changes with that.

Its rows are kept beside the table, as final states are beside one of cells. Knows late stacks through an engine alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from actcache.errors import CheckError
from actcache.models.cost import ModelShape
from actcache.progress import Told, nobody_told
from actcache.replay.gradients import Gradients
from actcache.schema import EVENT_KEY, ROLES, names
from actcache.store import Store
from actcache.study.cells import Finished, by_segment, finished_cells
from actcache.study.jobs import Result
from actcache.study.prefix_job import PREFIX, PrefixJob, serves
from actcache.study.replay_job import ReplayEngine, States
from actcache.study.results import read_final
from actcache.study.scores import whose_head
from actcache.study.work import Cost, Places

_OUTPUTS, _GRADIENTS, _MARGINS = "outputs", "gradients", "margins"


@dataclass(frozen=True, eq=False, kw_only=True)
class GradientJob(PrefixJob):
    """All events of a segment (see :class:`actcache.study.prefix_job.PrefixJob`). Each sequence is a forward of its
    own, strict or not.

    Attributes:
        site: ``mlp`` or ``attention``.
        layers: block indices, ascending.
        readout: ``native`` or ``common_<label>``, of the margin.
    """

    part: ClassVar[str] = "gradients"

    site: str
    layers: tuple[int, ...]
    readout: str

    @property
    def what(self) -> dict[str, Any]:
        """Of which modules, by which readout."""
        return _described(self.site, self.layers, self.readout)

    def cost(self, shapes: Mapping[str, ModelShape]) -> Cost:
        """A forward of every event's sequence, and a backward through the blocks from the first module on."""
        lengths, shape = Places.of(self.lengths, self.sequences).events, shapes[self.late]
        products = shape.products(lengths, first=self.boundary) + shape.products(lengths, first=self.layers[0])
        return Cost({self.part: len(self.upstreams) * products})

    def run(self, engine: ReplayEngine, read: States, told: Told = nobody_told) -> Result:
        """Forward and backward of every event.

        Returns:
            One row per event and upstream, event by event: the columns that cells repeat of events, ``boundary``,
            ``scope``, ``upstream``, ``late``. Beside it ``outputs/<upstream>`` and ``gradients/<upstream>``, ``[n, k,
            D]``, and ``margins/<upstream>``, ``[n]``.

        Raises:
            NotFiniteError: a state is not finite.
        """
        late, events = engine.late(self.late, self.boundary), engine.events(self.segment)
        tokens = torch.tensor([events[f"y_{role}"].to_pylist() for role in ROLES], dtype=torch.int64).T
        kept: dict[str, torch.Tensor] = {}
        for upstream in self.upstreams:
            found = late.gradients(
                read.rows[upstream],
                read.offsets,
                tokens,
                self.layers,
                positions=read.positions,
                site=self.site,
                readout=engine.readout(whose_head(self.readout, self.late)),
                told=told,
            )
            parts = zip((_MARGINS, _OUTPUTS, _GRADIENTS), found, strict=True)
            kept |= {f"{name}/{upstream}": rows.contiguous() for name, rows in parts}
        n_rows, repeated = self.n_units, pa.array(np.repeat(np.arange(len(events)), len(self.upstreams)))
        table = pa.table(
            {
                **{name: events[name].take(repeated) for name in names(EVENT_KEY)},
                "boundary": pa.array([self.boundary] * n_rows, pa.int32()),
                "scope": pa.array([PREFIX] * n_rows),
                "upstream": pa.array(list(self.upstreams) * len(events), pa.string()),
                "late": pa.array([self.late] * n_rows, pa.string()),
            }
        )
        return Result(table, {"mode": "single"}, kept)


@dataclass(frozen=True)
class GradientsOf:
    """Whose modules' outputs and gradients are wanted.

    Attributes:
        boundary: first late block.
        late: label of the late stack.
        upstreams: labels.
        layers: of the modules, ascending.
        readout: see :class:`GradientJob`, and so is ``site``.
    """

    boundary: int
    late: str
    upstreams: Sequence[str]
    layers: Sequence[int]
    readout: str
    site: str = "mlp"

    def jobs(self, store: Store, finished: Finished) -> list[GradientJob]:
        """What is not finished; ``finished`` is what the folder of the results holds."""
        lengths = [position + 1 for position in store.events["position"].to_pylist()]
        sequences, jobs = store.events["sequence"].to_pylist(), []
        for segment, of_segment in by_segment(finished, store):
            own = slice(segment.events.start, segment.events.stop)
            job = GradientJob(
                store=store.fingerprint.digest,
                segment=segment.name,
                lengths=tuple(lengths[own]),
                sequences=tuple(sequences[own]),
                upstreams=tuple(self.upstreams),
                boundary=self.boundary,
                late=self.late,
                site=self.site,
                layers=tuple(self.layers),
                readout=self.readout,
            )
            done = np.zeros(len(store), bool)
            for scored in of_segment.get((self.boundary, PREFIX, self.late), []):
                if serves(scored, self.upstreams, False, None) and job.what.items() <= scored.key.items():
                    done[scored.events] = True
            if not done[own].all():
                jobs.append(job)
        return jobs

    def read(self, folder: Path, store: Store) -> dict[str, Gradients]:
        """By upstream, of all events in the store's order.

        Raises:
            CheckError: an event has none.
            CorruptFileError, NoSealError: a file is damaged.
        """
        left = np.ones(len(store), bool)
        shape = len(store), len(self.layers), store.width
        found = {
            upstream: Gradients(torch.zeros(shape[0]), *(torch.zeros(shape, dtype=store.dtype) for _ in range(2)))
            for upstream in self.upstreams
        }
        wanted = _described(self.site, self.layers, self.readout)
        for scored in finished_cells(folder, store).get((self.boundary, PREFIX, self.late), []):
            if serves(scored, self.upstreams, False, None) and wanted.items() <= scored.key.items():
                rows, at = read_final(scored.path), torch.from_numpy(scored.events)
                for upstream, every in found.items():
                    for name, one in zip((_MARGINS, _OUTPUTS, _GRADIENTS), every, strict=True):
                        one[at] = rows[f"{name}/{upstream}"]
                left[scored.events] = False
        if left.any():
            raise CheckError(f"{folder} lacks gradients of some events: files of it are gone; give the command again")
        return found


def _described(site: str, layers: Sequence[int], readout: str) -> dict[str, Any]:
    return {"gradients": site, "layers": list(layers), "readout": readout}
