"""Handoff job: events behind a host whose final blocks are another checkpoint's, and some of whose modules before these
may be, under variants.

The states that the final blocks read are what the host makes of its own at the boundary, with those modules. Knows late
stacks through an engine alone.
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
from actcache.replay.edits import Variant
from actcache.replay.swap import Swap
from actcache.schema import EVENT_KEY, ROLES, common_readout, names
from actcache.store import Store
from actcache.study.cells import Finished, by_segment, finished_cells
from actcache.study.jobs import Result
from actcache.study.prefix_job import PREFIX, PrefixJob, serves
from actcache.study.replay_job import ReplayEngine, States
from actcache.study.results import read_result
from actcache.study.statistics import Floats
from actcache.study.work import Cost


@dataclass(frozen=True, eq=False, kw_only=True)
class HandoffJob(PrefixJob):
    """All events of a segment behind ``late``, which is the host and the one upstream (see
    :class:`actcache.study.prefix_job.PrefixJob`).

    Attributes:
        swap: which modules before the final blocks are another checkpoint's; None for none.
        final: label of the checkpoint whose blocks are the final ones, and whose readout reads them.
        first: the first of these.
        variants: what to change.
    """

    part: ClassVar[str] = "handoff"

    swap: Swap | None
    final: str
    first: int
    variants: tuple[Variant, ...]

    @property
    def what(self) -> dict[str, Any]:
        """The swaps, and the variants."""
        of = {one.name: one.digest for one in self.variants}
        return {**_described(self.swap, self.final, self.first), "readouts": [self.readout], "variants": of}

    @property
    def readout(self) -> str:
        """Of the final blocks' checkpoint."""
        return common_readout(self.final)

    @property
    def stacks(self) -> tuple[str, ...]:
        """Labels of the checkpoints that it runs."""
        source = () if self.swap is None else (self.swap.source,)
        return tuple(dict.fromkeys([self.late, self.final, *source]))

    @property
    def n_units(self) -> int:
        """(event, variant) combinations."""
        return len(self.lengths) * len(self.variants)

    def cost(self, shapes: Mapping[str, ModelShape]) -> Cost:
        """A replay of every sequence, and a row of each variant of every event."""
        shape, found = shapes[self.late], super().cost(shapes).parts[self.part]
        rows = shape.step_products(np.array(self.lengths, np.float64), first=self.boundary)
        return Cost({self.part: found + len(self.variants) * rows})

    def run(self, engine: ReplayEngine, read: States, told: Told = nobody_told) -> Result:
        """Replay every sequence.

        Returns:
            One row per event and variant, event by event: the columns that cells repeat of events, and of a cell
            ``boundary`` to ``margin``.

        Raises:
            NotFiniteError: a state is not finite.
            InputError, UnsupportedModelError: the modules cannot be swapped.
        """
        late, host = engine.late(self.late, self.boundary), self.late
        if self.final != host:
            late = engine.swapped(host, Swap(self.final, "block", self.first, late.n_blocks), self.boundary)
        if self.swap is not None:
            late = late.swapped(engine.late(self.swap.source, self.boundary), self.swap)
        events = engine.events(self.segment)
        tokens = torch.tensor([events[f"y_{role}"].to_pylist() for role in ROLES], dtype=torch.int64).T
        margins, head = torch.empty(len(events), len(self.variants)), engine.readout(self.final)
        batch = late.prepare(
            read.rows[host],
            read.offsets,
            self.variants,
            positions=read.positions,
            keys=read.keys,
            prompts=read.prompts,
            strict=self.strict,
            max_tokens=self.max_tokens,
        )
        for at, numbers, hidden in late.replay(batch):
            scores = head.scores(hidden, tokens[at])
            margins[at, numbers] = scores[:, 1] - scores[:, 0]
            told(len(at))
        n, n_rows = len(self.variants), self.n_units
        repeated = pa.array(np.repeat(np.arange(len(events)), n))
        table = pa.table(
            {
                **{name: events[name].take(repeated) for name in names(EVENT_KEY)},
                "boundary": pa.array([self.boundary] * n_rows, pa.int32()),
                "scope": pa.array([PREFIX] * n_rows),
                "upstream": pa.array([host] * n_rows),
                "late": pa.array([host] * n_rows),
                "readout": pa.array([self.readout] * n_rows),
                "variant": pa.array([one.name for one in self.variants] * len(events), pa.string()),
                "margin": pa.array(margins.flatten().numpy(), pa.float32()),
            }
        )
        return Result(table, {"mode": "single" if self.strict else late.mode}, {})


@dataclass(frozen=True)
class Handoff:
    """One host with its swaps, under some variants, over all events of a store.

    Attributes:
        host: label of the checkpoint on whose own states it begins.
        boundary: from which on.
        swap, final, first, variants: see :class:`HandoffJob`, and so are ``strict`` and ``max_tokens``.
    """

    host: str
    boundary: int
    swap: Swap | None
    final: str
    first: int
    variants: Sequence[Variant]
    strict: bool
    max_tokens: int | None

    def jobs(self, store: Store, finished: Finished) -> list[HandoffJob]:
        """What is not finished; ``finished`` is what the folder of the results holds."""
        lengths = [position + 1 for position in store.events["position"].to_pylist()]
        sequences, jobs = store.events["sequence"].to_pylist(), []
        left = self._left(store, finished)
        for segment, _ in by_segment(finished, store):
            own = slice(segment.events.start, segment.events.stop)
            if left[own].any():
                jobs.append(
                    HandoffJob(
                        store=store.fingerprint.digest,
                        segment=segment.name,
                        lengths=tuple(lengths[own]),
                        sequences=tuple(sequences[own]),
                        upstreams=(self.host,),
                        boundary=self.boundary,
                        late=self.host,
                        swap=self.swap,
                        final=self.final,
                        first=self.first,
                        variants=tuple(self.variants),
                        strict=self.strict,
                        max_tokens=self.max_tokens,
                    )
                )
        return jobs

    def read(self, folder: Path, store: Store) -> Floats:
        """Margins ``[V, E]`` of all events, in the store's order.

        Raises:
            CheckError: an event has none.
            CorruptFileError, NoSealError: a file is damaged.
        """
        finished = finished_cells(folder, store)
        if self._left(store, finished).any():
            raise CheckError(f"{folder} lacks results: files of it are gone; give the same command again")
        found: Floats = np.zeros((len(self.variants), len(store)))
        for one in self._serving(finished):
            table = read_result(one.path, ["variant", "margin"]).content
            order = {name: column for column, name in enumerate(table["variant"][: len(self.variants)].to_pylist())}
            margins = table["margin"].to_numpy().reshape(len(one.events), -1)
            found[:, one.events] = margins[:, [order[variant.name] for variant in self.variants]].T
        return found

    def _left(self, store: Store, finished: Finished) -> Any:
        left = np.ones(len(store), bool)
        for one in self._serving(finished):
            left[one.events] = False
        return left

    def _serving(self, finished: Finished) -> list[Any]:
        wanted = _described(self.swap, self.final, self.first)
        named = {one.name for one in self.variants}
        return [
            one
            for one in finished.get((self.boundary, PREFIX, self.host), [])
            if serves(one, [self.host], self.strict, self.max_tokens)
            and wanted.items() <= one.key.items()
            and one.key["variants"].keys() == named
        ]


def _described(swap: Swap | None, final: str, first: int) -> dict[str, Any]:
    return {"swap": None if swap is None else str(swap), "final": final, "first": first}
