"""Map job: one part of a host's states patched from another checkpoint at a time, and the margin of each patch.

A patch of the state at an earlier position changes the rows from there to p; one of a block's attention, MLP or heads
at p changes row p alone. So all of them share the keys and values of what comes before. A swap of whole blocks is a
replay of its own. Knows late stacks and readouts through an engine alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from actcache.canonical import digest_of
from actcache.errors import CheckError
from actcache.models.blocks import n_heads
from actcache.models.cost import ModelShape
from actcache.models.readout import Readout
from actcache.progress import Told, nobody_told
from actcache.replay.edits import HEADS, Edit, Replace, Site, Variant
from actcache.replay.late_stack import LateStack
from actcache.replay.swap import Swap
from actcache.replay.taken import Place, Put, take
from actcache.schema import EVENT_KEY, names
from actcache.store import Store
from actcache.study.cells import Finished, Scored, by_segment, finished_cells
from actcache.study.jobs import Result
from actcache.study.prefix_job import PREFIX, PrefixJob, places_of, serves
from actcache.study.replay_job import ReplayEngine, States
from actcache.study.results import read_result
from actcache.study.scores import ScoreTable
from actcache.study.work import Cost, Places

STATE, ATTENTION, MLP, HEAD, BLOCK = SITES = ("state", "attention", "mlp", "head", "block")
PARTS: Mapping[str, Site] = {ATTENTION: "attention", MLP: "mlp", HEAD: HEADS}
"""Sites that are parts of a block at p, and what an edit calls them."""


class MapEngine(ReplayEngine, Protocol):
    """What a map job asks of what it is run with."""

    def swapped(self, host: str, swap: Swap, boundary: int) -> LateStack:
        """The late stack of a checkpoint with some blocks of another one's."""


@dataclass(frozen=True, order=True)
class Patch:
    """What is the source's, while all else is the host's.

    Attributes:
        site: ``state`` (entering the boundary, at one position), ``attention``, ``mlp`` (what a block's part gives at
            p), ``head`` (what each head of a block gives at p, one after the other), or ``block`` (whole blocks).
        block: the boundary of a state, the block of a part, or the first one of blocks.
        back: of a state, how many positions before p it is.
        end: of blocks, the last one.
    """

    site: str
    block: int
    back: int = 0
    end: int = 0

    def __str__(self) -> str:
        more = {STATE: f":-{self.back}", BLOCK: f"..{self.end}"}
        return f"{self.site}:{self.block}{more.get(self.site, '')}"


@dataclass(frozen=True)
class _Where(Edit):
    """An edit of a position that some events do not have: they stay as they are, and have no such cell."""

    def check_positions(self, lengths: Sequence[int], name: str) -> None:
        """Nothing to refuse."""


@dataclass(frozen=True, eq=False, kw_only=True)
class MapJob(PrefixJob):
    """Some events of a segment (see :class:`actcache.study.prefix_job.PrefixJob`), patched one part at a time.

    The late stack is the host's, and the one upstream is the source.

    Attributes:
        events: numbers of the events in the segment.
        patches: states at this boundary; parts of blocks from it on; and blocks of which the first is entered here.
    """

    part: ClassVar[str] = "map"

    events: tuple[int, ...]
    patches: tuple[Patch, ...]

    @property
    def what(self) -> dict[str, Any]:
        """Which patches of which events."""
        return {"patches": [str(patch) for patch in self.patches], "map": digest_of(list(self.events))}

    @property
    def n_units(self) -> int:
        """(event, patch) combinations; all heads of a block are one."""
        return len(self.events) * len(self.patches)

    def cost(self, shapes: Mapping[str, ModelShape]) -> Cost:
        """The host's sequences once, and the source's where parts are taken from it; then each patch's own rows."""
        host, source = shapes[self.late], shapes[self.upstreams[0]]
        places, first = Places.of(self.lengths, self.sequences), self.boundary
        swaps, others = [
            [patch for patch in self.patches if (patch.site == BLOCK) == is_swap] for is_swap in (True, False)
        ]
        replayed = places.places if self.strict else places.sequences
        n_cells = {patch: host.n_heads if patch.site == HEAD else 1 for patch in self.patches}
        total = len(swaps) * host.products(replayed, first=first)
        if any(patch.site in PARTS for patch in others):
            total += source.products(replayed, first=first)
        if self.strict:
            total += sum(n_cells[patch] for patch in others) * host.products(places.events, first=first)
        elif others:
            total += host.products(replayed, first=first)
            for patch in others:
                total += n_cells[patch] * host.tail_products(places.events, patch.back + 1, first=first)
        hooks = sum(n_cells.values()) * (host.products(places.events) + len(self.events) * host.head_products)
        return Cost({self.part: total, "hooks": hooks})

    def run(self, engine: MapEngine, read: States, told: Told = nobody_told) -> Result:
        """Score every patch by the host's own readout.

        Returns:
            One row per event and cell, event by event: the columns that cells repeat of events, ``host``, ``source``,
            ``patch``, ``site``, ``boundary``, ``head``, ``end_block``, ``offset``, ``margin``, which is null where an
            event has no such position.

        Raises:
            NotFiniteError: a state or logit is not finite.
            UnsupportedModelError: the blocks have no such part.
            InputError: blocks cannot be swapped.
        """
        (source,), host = self.upstreams, self.late
        events = engine.events(self.segment).take(pa.array(self.events, pa.int64()))
        positions = read.positions[list(self.events)]
        how: dict[str, Any] = {"positions": positions, "strict": self.strict, "max_tokens": self.max_tokens}
        cells, variants = self._variants(engine, read, how)
        tokens = torch.tensor([events["y_pt"].to_pylist(), events["y_it"].to_pylist()], dtype=torch.int64).T
        late, margins = engine.late(host, self.boundary), []
        if variants:
            readout = engine.readout(host)
            table = ScoreTable(len(cells), {host: readout}, tokens, whole=[], one_by_one=self.strict, own=None)
            counted = torch.tensor([not cell.get("head") for cell in cells])  # the heads of a block are one unit
            ids = [read.keys[event] for event in self.events]
            donors = {source: read.rows[source]}
            for result in late.replay(
                late.prepare(read.rows[host], read.offsets, variants, donors=donors, keys=ids, **how)
            ):
                table.add(*result)
                told(int(counted[result[1]].sum()))
            margins += [table.scores(number, host).margin for number in range(len(cells))]
        for patch in self.patches:
            if patch.site == BLOCK:
                stack = engine.swapped(host, Swap(source, "block", patch.block, patch.end + 1), self.boundary)
                margins.append(_margins(stack.readout, stack.run(read.rows[host], read.offsets, **how), tokens))
                cells.append({"patch": patch, "end_block": patch.end, "offset": None})
                told(len(self.events))
        return Result(self._table(events, positions, cells, margins), {"mode": late.mode}, {})

    def _variants(
        self, engine: MapEngine, read: States, how: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], list[Variant]]:
        """The cells that are patched rows, and of each the variant of the host's rows."""
        (source,) = self.upstreams
        places = [(patch.block, PARTS[patch.site]) for patch in self.patches if patch.site in PARTS]
        taken: Mapping[Place, torch.Tensor] = {}
        if places:
            taken = take(engine.late(source, self.boundary), read.rows[source], read.offsets, places, **how)
        cells: list[dict[str, Any]] = []
        variants = []
        for patch in self.patches:
            if patch.site == STATE:
                edits: list[Edit] = [_Where(Replace(source), (-1 - patch.back,))]
                cells.append({"patch": patch, "offset": -patch.back})
            elif patch.site in PARTS:
                site = PARTS[patch.site]
                values = taken[patch.block, site]
                n = n_heads(engine.late(self.late, self.boundary).config, values.shape[1]) if site == HEADS else 1
                width = values.shape[1] // n
                puts = [Put(values, head * width, (head + 1) * width) for head in range(n)]
                edits = [Edit(put, site=site, layers=(patch.block,)) for put in puts]
                cells += [{"patch": patch, "head": head if site == HEADS else None, "offset": 0} for head in range(n)]
            else:
                continue
            variants += [Variant(f"{patch} of {source}", (edit,)) for edit in edits]
        return cells, variants

    def _table(
        self,
        events: pa.Table,
        positions: torch.Tensor,
        cells: Sequence[Mapping[str, Any]],
        margins: Sequence[torch.Tensor],
    ) -> pa.Table:
        n_events, n_cells = len(self.events), len(cells)
        found = torch.stack(list(margins), dim=1).numpy() if cells else np.empty((n_events, 0), np.float32)
        back = np.array([cell["patch"].back for cell in cells], np.int64)
        repeated = events.take(pa.array(np.repeat(np.arange(n_events), n_cells)))
        columns = {
            **{"host": (pa.string(), [self.late] * n_cells), "source": (pa.string(), [*self.upstreams] * n_cells)},
            "patch": (pa.string(), [str(cell["patch"]) for cell in cells]),
            "site": (pa.string(), [cell["patch"].site for cell in cells]),
            "boundary": (pa.int32(), [cell["patch"].block for cell in cells]),
            **{name: (pa.int32(), [cell.get(name) for cell in cells]) for name in ("head", "end_block", "offset")},
        }
        return pa.table(
            {
                **{name: repeated[name] for name in names(EVENT_KEY)},
                **{name: pa.array(values * n_events, kind) for name, (kind, values) in columns.items()},
                "margin": pa.array(found.reshape(-1), mask=(positions[:, 1:].numpy() < back).reshape(-1)),
            }
        )


def _margins(readout: Readout, final: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    scores = readout.scores(final, tokens)
    return scores[:, 1] - scores[:, 0]


@dataclass(frozen=True)
class MapSettings:
    """Which patches are scored, and how.

    Attributes:
        pairs: of events; both directions of each are patched.
        n_positions: how many of the last positions are patched, p among them; None for all.
        boundaries: of states.
        parts: by a part of blocks, each block and the boundary that it is run from.
        swaps: first and last block of each; the first one is a captured boundary.
        strict: see :class:`MapJob`, and so is ``max_tokens``.
    """

    pairs: Sequence[tuple[str, str]]
    n_positions: int | None
    boundaries: Sequence[int]
    parts: Mapping[str, Mapping[int, int]]
    swaps: Sequence[tuple[int, int]]
    strict: bool = False
    max_tokens: int | None = None

    @cached_property
    def at_boundaries(self) -> dict[int, list[Patch]]:
        """What is patched in replays from each boundary on, states apart."""
        found: dict[int, list[Patch]] = {boundary: [] for boundary in self.boundaries}
        for site, blocks in self.parts.items():
            for block, boundary in blocks.items():
                found.setdefault(boundary, []).append(Patch(site, block))
        for first, end in self.swaps:
            found.setdefault(first, []).append(Patch(BLOCK, first, end=end))
        return found

    def patches_at(self, boundary: int, longest: int) -> list[Patch]:
        """All patches of one boundary, of events whose longest sequence has so many positions."""
        n = longest if self.n_positions is None else min(self.n_positions, longest)
        states = [Patch(STATE, boundary, back) for back in range(n)] if boundary in self.boundaries else []
        return [*states, *self.at_boundaries[boundary]]

    def jobs(self, store: Store, finished: Finished) -> list[MapJob]:
        """What is not finished; ``finished`` is what the folder of the results holds."""
        jobs = []
        pairs = store.events["pair"].to_pylist()
        for segment, of_segment in by_segment(finished, store):
            for pair, boundary in ((pair, boundary) for pair in self.pairs for boundary in self.at_boundaries):
                own = [event for event in segment.events if pairs[event] == ",".join(pair)]
                places = places_of(store, segment, own)
                for host, source in (pair, pair[::-1]) if own else ():
                    done: dict[str, set[int]] = {}
                    for scored in of_segment.get((boundary, PREFIX, host), []):
                        for name in scored.key["patches"] if self._is_served_by(scored, source) else ():
                            done.setdefault(name, set()).update(scored.events.tolist())
                    asked = self.patches_at(boundary, max(places["lengths"]))
                    left = tuple(patch for patch in asked if not done.get(str(patch), set()).issuperset(own))
                    if left:
                        jobs.append(
                            MapJob(
                                **places,
                                upstreams=(source,),
                                boundary=boundary,
                                late=host,
                                patches=left,
                                strict=self.strict,
                                max_tokens=self.max_tokens,
                            )
                        )
        return jobs

    def read(self, folder: Path, store: Store) -> pa.Table:
        """The rows of all patches, as :meth:`MapJob.run` gives them, those without a margin apart; by event, host and
        place.

        Raises:
            CheckError: one is missing.
            CorruptFileError, NoSealError: a file is damaged.
        """
        finished = finished_cells(folder, store)
        positions, pairs = store.events["position"].to_numpy(), store.events["pair"].to_numpy(zero_copy_only=False)
        tables = []
        for pair in self.pairs:
            own = pairs == ",".join(pair)
            for boundary, (host, source) in (
                (boundary, hosted) for boundary in self.at_boundaries for hosted in (pair, pair[::-1]) if own.any()
            ):
                patches = self.patches_at(boundary, int(positions[own].max()) + 1)
                left = own[:, None] & (positions[:, None] >= np.array([patch.back for patch in patches], np.int64))
                for scored in finished.get((boundary, PREFIX, host), []):
                    if self._is_served_by(scored, source):
                        tables.append(_still_wanted(scored, patches, left))
                if left.any():
                    raise CheckError(f"{folder} lacks results: files of it are gone; give the same command again")
        if not tables:
            return pa.table({})
        found = pa.concat_tables(tables)
        site = pc.index_in(found["site"], value_set=pa.array(SITES))
        found = found.append_column("of_site", site)
        keys = ("event", "host", "of_site", "boundary", "head", "end_block", "offset")
        return found.sort_by([(name, "ascending") for name in keys]).drop_columns(["event", "of_site", "patch"])

    def _is_served_by(self, scored: Scored, source: str) -> bool:
        return serves(scored, [source], self.strict, self.max_tokens)


def _still_wanted(scored: Scored, patches: Sequence[Patch], left: npt.NDArray[np.bool_]) -> pa.Table:
    """Of a finished job the rows of these patches that are ``left`` ``[E, n]``, with the number of their event; they
    are left no more."""
    table = read_result(scored.path).content
    event = np.repeat(scored.events, table.num_rows // len(scored.events))
    patch = pc.index_in(table["patch"], value_set=pa.array([str(one) for one in patches]))
    patch = pc.fill_null(patch, -1).to_numpy()
    kept = (patch >= 0) & left[event, patch]
    left[event[kept], patch[kept]] = False
    return table.filter(pa.array(kept)).append_column("event", pa.array(event[kept]))
