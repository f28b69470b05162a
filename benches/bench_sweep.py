"""A study's work on one pair by forward hooks, nnsight, TransformerLens and actcache: same events, results equal first.

    python benches/bench_sweep.py --pt pairs/smollm2/pt --it pairs/smollm2/it --prompts benches/prompts_smollm2.jsonl

    cold grid         from models in memory to scored 2x2 cells: search, states, cells. The rivals share one search
                      (cached greedy decoding, a prompt at a time); each then runs two native passes and two replays an
                      event. actcache also writes its store to disk and reads it again. "in lockstep" is actcache with
                      the search of earlier versions: drafts of one token, the prompts of one segment in a batch, padded
                      to the longest.
    actcache run      each stage of the whole command, from files to the report, beside its own limit: a search and a
                      forward their multiply-adds, what is read or written its bytes on this disk
    replay            the final states of all four cells, from states in the store, at the boundary and at three blocks
                      before the end: against the multiply-adds alone
    added boundary    the cells of a second boundary whose states are there already: in the store for actcache, in
                      memory for the rivals
    added readout     the cells again, read by IT's norm and head after they were read by each stack's own
    prefix-wide edit  the crossed cells with a vector added to the state of every position
    position edits    the state of an event's own position moved towards the other checkpoint's, or a random vector
                      added to it

Hooks run every replay as a full forward at batch one. nnsight and TransformerLens start at the boundary (rivals.py;
TransformerLens 4, whose bridge runs the early blocks too, is named TransformerBridge) and run up to 16 position edits
of one event in one batch. Times are per replayed cell or variant, by the median of repeats that take turns. Rivals are
timed on some of the position edits of some events, spread evenly: what a variant costs them does not depend on how many
there are.

The limit is a count of multiply-adds. Each matrix product counts at the rate that this machine has for its very shape
and number of rows, by torch's usual means or by oneDNN, whichever is faster: the median of samples taken in turn with
the rest, and in brackets the best of them all. For a cell those are the late blocks over every position; for the cold
grid also one plain forward of both checkpoints over the final sequences; for position edits the late blocks over the
earlier positions once per event, and over one position per variant. actcache runs the last block only where its output
is read, so that a replay of few blocks may fall below it. An added readout replays nothing: final states are kept, so
that it has no limit of this kind.

The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import hooks
import torch
from hooks import HookEvent
from measure import LIMIT, Products, Workload, in_turn, print_result, print_workloads
from rivals import Cells, Rival, available, grid
from stages import time_stages
from study import (
    CROSSED,
    REPLAY_TARGET,
    TOLERANCE,
    Ours,
    PositionEdit,
    Study,
    add_pair_arguments,
    events_of,
    position_edits,
)

from actcache.capture import search as search_module
from actcache.capture.settings import parse_boundaries
from actcache.models.checkpoint import DTYPES
from actcache.models.linear import describe_products
from actcache.store import Store
from actcache.study import capture as capture_module

COLD_TARGETS = {"hooks": 4.0, "nnsight": 3.5}
EDIT_TARGET = 100.0
HEADROOM = 1.25  # over what running only the late blocks saves
EDIT_SIZE = 0.5  # of an added vector, in mean lengths of the states
SEARCH, LOCKSTEP = "search", "in lockstep"
Runs = Mapping[str, Callable[[], Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_arguments(parser)
    parser.add_argument("--boundary", default="0.6")
    parser.add_argument("--added", default="0.8", help="the second boundary")
    parser.add_argument("--variants", type=int, default=512, help="position edits of every event")
    parser.add_argument("--sampled-events", type=int, default=32, help="whose position edits the rivals are timed on")
    parser.add_argument("--hook-variants", type=int, default=2, help="of each sampled event, for the hooks")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--cold-repeat", type=int, default=3)
    parser.add_argument("--replay-repeat", type=int, default=7, help="of what no rival takes part in")
    args = parser.parse_args(argv)
    if args.smoke:
        args.variants, args.sampled_events, args.hook_variants = 24, 2, 2
        args.repeat = args.cold_repeat = args.replay_repeat = 1
    study = Study.open(args)
    (boundary,) = parse_boundaries(args.boundary, study.n_blocks)
    (added,) = parse_boundaries(args.added, study.n_blocks)
    if boundary == added:
        sys.exit(f"--boundary and --added are both {boundary}")
    rivals = available(study.models, study.folders)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        products = Products(DTYPES[args.dtype])
        cold, store = bench_cold(study, rivals, boundary, folder, products, args.cold_repeat)
        late = study.n_blocks - 3
        swept = study.capture(folder / "swept", sorted({boundary, added, late}))
        sweep = Sweep(study, rivals, swept, boundary, folder, products, args)
        stages = time_stages(study, args.prompts, boundary, folder, products, args.cold_repeat)
        workloads = [cold, *stages, *(sweep.replay(one) for one in dict.fromkeys((boundary, late)))]
        workloads += [sweep.added_boundary(added), sweep.added_readout(), sweep.prefix_edit(), sweep.position_edits()]
        summary = store.summary()
    print_workloads(workloads)
    result = {
        "prompts": len(study.prompts),
        "events": len(sweep.events),
        "tokens": sum(len(event.ids) for event in sweep.events),
        "boundary": boundary,
        "added": added,
        "blocks": study.n_blocks,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "variants": args.variants,
        "sampled_events": len(sweep.sampled),
        "hook_variants": args.hook_variants,
        "workloads": [workload.as_json() for workload in workloads],
        "largest_difference": sweep.worst,
        "multiply_adds_per_s": products.rates(),
        "in_packs": describe_products(),
        "bytes_per_event": {kind: summary["state_bytes"][kind] / len(sweep.events) for kind in ("raw", "stored")},
    }
    print_result("sweep", result)
    return 0


def bench_cold(
    study: Study, rivals: dict[str, Rival], boundary: int, folder: Path, products: Products, repeat: int
) -> tuple[Workload, Store]:
    """Search, states and cells by all; the store of the last repeat."""
    found: dict[str, list[HookEvent | None]] = {}
    cells: dict[str, Any] = {}

    def search(n_prompts: int | None = None) -> None:
        end_ids = study.lineup.end_ids
        ids = study.prompt_ids[:n_prompts]
        found[SEARCH] = [hooks.search(study.models, one, study.max_new, end_ids) for one in ids]

    def score(rival: Rival) -> Callable[[], None]:
        def run() -> None:
            cells[rival.name] = [grid(rival, study.models, event, boundary) for event in found[SEARCH] if event]

        return run

    def ours() -> None:
        store = study.capture(folder / "store", [boundary])
        cells["actcache"] = Ours(study, store).grid(boundary, folder / "cells")

    def in_lockstep() -> None:
        def padded(lengths: Sequence[int]) -> list[range]:
            return [range(len(lengths))]

        earlier = (
            (search_module, "_LONGEST_DRAFT", 1),
            (search_module, "evenly", padded),
            (capture_module, "TOGETHER", 1),
        )
        with ExitStack() as stack:
            for module, name, value in earlier:
                stack.enter_context(mock.patch.object(module, name, value))
            ours()

    def clean(name: str) -> None:
        if name in ("actcache", LOCKSTEP):
            for part in ("store", "cells"):
                shutil.rmtree(folder / part, ignore_errors=True)

    search(2)  # the first trace or pass of a framework costs more than the later ones
    for rival in rivals.values():
        score(rival)()
    store = study.capture(folder / "first", [boundary])
    work = Ours(study, store).cold_work(boundary)
    products.expect(work)
    products.sample()

    runs = {SEARCH: search, **{name: score(rival) for name, rival in rivals.items()}}
    runs |= {LOCKSTEP: in_lockstep, "actcache": ours}
    seconds = in_turn({**runs, LIMIT: products.sample}, repeat, clean, warm_up=False)
    check_cold(study, store, found[SEARCH], cells)
    times = {name: [a + b for a, b in zip(seconds[SEARCH], seconds[name], strict=True)] for name in rivals}
    times |= {name: seconds[name] for name in (LOCKSTEP, "actcache")}
    return Workload.of(
        f"cold grid, boundary {boundary} of {study.n_blocks}",
        "run",
        times,
        dict.fromkeys(times, 1),
        products.seconds(work),
        COLD_TARGETS,
    ), store


def check_cold(study: Study, store: Store, found: list[HookEvent | None], cells: dict[str, Any]) -> None:
    """Same events by both searches, and every margin of everybody equal to the hooks'; exits otherwise."""
    ours = events_of(store)
    theirs = {prompt.id: event for prompt, event in zip(study.prompts, found, strict=True) if event}
    if ours != theirs:
        differ = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        sys.exit(f"events differ from those of the hooks: {differ}")
    of_hooks: dict[str, Cells] = dict(zip(theirs, cells["hooks"], strict=True))
    for name in cells.keys() - {"hooks", "actcache"}:
        of_rival = dict(zip(theirs, cells[name], strict=True))
        check(name, {(p, *c): v for p, of in of_rival.items() for c, v in of.items()}, flat(of_hooks), study.dtype)
    table = {
        (cell["prompt_id"], cell["upstream"], cell["late"], cell["readout"]): cell["margin"]
        for cell in cells["actcache"].to_pylist()
    }
    check("actcache", table, flat(of_hooks), study.dtype)


class Sweep:
    """Everything after the cold run: the states are there, and each further cell or variant is timed."""

    def __init__(
        self,
        study: Study,
        rivals: dict[str, Rival],
        store: Store,
        boundary: int,
        folder: Path,
        products: Products,
        args: argparse.Namespace,
    ) -> None:
        self.study, self.rivals, self.store, self.boundary, self.folder = study, rivals, store, boundary, folder
        self.products, self.args = products, args
        self.ours = Ours(study, store)
        self.events = list(events_of(store).values())
        self.states = [
            {label: rivals["hooks"].native(label, as_batch(event), store.boundaries)[0] for label in study.models}
            for event in self.events
        ]
        self.n_crossed = len(CROSSED) * len(self.events)
        n_sampled = min(args.sampled_events, len(self.events))
        self.sampled = [i * len(self.events) // n_sampled for i in range(n_sampled)]
        self.worst: dict[str, float] = {}

        lengths = torch.cat([states["pt"][boundary][0].norm(dim=1) for states in self.states])
        self.size = EDIT_SIZE * float(lengths.float().mean())

    # ---- the rivals' side of it ----

    def crossed(
        self, rival: Rival, boundary: int, readout: str | None = None, vector: torch.Tensor | None = None
    ) -> dict[tuple[int, str, str], float]:
        """(event, upstream, late) -> margin of every crossed cell, with ``vector`` added at every position if given."""
        found: dict[tuple[int, str, str], float] = {}
        for i, event in enumerate(self.events):
            ids = as_batch(event)
            for upstream, late in CROSSED:
                state = self.states[i][upstream][boundary]
                last = rival.replay(late, ids, boundary, state if vector is None else state + vector)
                found[i, upstream, late] = float(hooks.margins(self.study.models[readout or late], last, event))
        return found

    def edited(self, rival: Rival, edits: Sequence[PositionEdit], n: int) -> dict[tuple[int, int], float]:
        """(event, edit) -> margin of ``n`` edits, evenly spread over all, of every sampled event."""
        found: dict[tuple[int, int], float] = {}
        chosen = [i * len(edits) // n for i in range(n)]
        for event in self.sampled:
            ids = as_batch(self.events[event])
            own, other = (self.states[event][label][self.boundary] for label in ("pt", "it"))
            for batch in (chosen[i : i + rival.batch] for i in range(0, n, rival.batch)):
                states = torch.cat([edits[k].apply(own, other) for k in batch])
                last = rival.replay("it", ids, self.boundary, states)
                margins = hooks.margins(self.study.models["it"], last, self.events[event]).tolist()
                found.update({(event, k): margin for k, margin in zip(batch, margins, strict=True)})
        return found

    def by_rivals(self, what: Callable[..., Any], *given: Any) -> Runs:
        """``what(rival, *given)``, of every rival."""
        return {name: partial(what, rival, *given) for name, rival in self.rivals.items()}

    # ---- workloads ----

    def replay(self, boundary: int) -> Workload:
        """All cells of a boundary, from the store to the final states."""

        def ours() -> dict[tuple[str, str], torch.Tensor]:
            return self.ours.replay(boundary, self.ours.read(boundary))

        final = ours()
        found = {
            (i, upstream, late): margin
            for upstream, late in CROSSED
            for i, margin in enumerate(self.ours.margins(late, boundary, final[upstream, late]).tolist())
        }
        self._check(f"replay at {boundary}", found, {}, self.crossed(self.rivals["hooks"], boundary))
        work = self.ours.replay_work(boundary, len(final))
        per = {"actcache": 2 * self.n_crossed}
        name = f"replay, boundary {boundary} of {self.study.n_blocks}"
        return self._timed(name, "cell", {}, ours, work, per, {LIMIT: REPLAY_TARGET})

    def added_boundary(self, added: int) -> Workload:
        """The cells of another boundary."""
        cells = self.folder / "added"

        def ours() -> Any:
            return self.ours.grid(added, cells, ["native"])

        found = self._crossed_of(ours(), "native")
        runs = self.by_rivals(self.crossed, added)
        return self._cells(f"added boundary {added}", runs, ours, found, added, lambda: remove(cells))

    def added_readout(self) -> Workload:
        """The cells of the first boundary by a readout more."""
        readout, done, cells = "it", self.folder / "native", self.folder / "readout"
        self.ours.grid(self.boundary, done, ["native"])

        def again() -> None:
            remove(cells)
            shutil.copytree(done, cells)

        def ours() -> Any:
            return self.ours.grid(self.boundary, cells, [f"common_{readout}"])

        again()
        found = self._crossed_of(ours(), f"common_{readout}")
        runs = self.by_rivals(self.crossed, self.boundary, readout)
        return self._cells("added readout", runs, ours, found, self.boundary, again, replays=False)

    def prefix_edit(self) -> Workload:
        """A vector added to every position's state."""
        generator = torch.Generator().manual_seed(0)
        direction = torch.nn.functional.normalize(torch.randn(self.study.lineup.width, generator=generator), dim=0)
        vector = (direction * self.size).to(self.store.dtype)

        def ours() -> Any:
            return self.ours.prefix_edit(self.boundary, vector)

        found = {(i, *cell): m for cell, of in ours().items() for i, m in enumerate(of.tolist())}
        runs = self.by_rivals(self.crossed, self.boundary, None, vector)
        return self._cells("prefix-wide edit", runs, ours, found, self.boundary, n_ours=self.n_crossed)

    def position_edits(self) -> Workload:
        """Many edits of the state at each event's position."""
        n = self.args.variants
        edits = position_edits(n, self.size, self.study.lineup.width, self.store.dtype)
        n_of = {name: min(n, max(r.batch, self.args.hook_variants)) for name, r in self.rivals.items()}

        def ours() -> torch.Tensor:
            return self.ours.position_edits(self.boundary, edits)

        runs = {name: partial(self.edited, rival, edits, n_of[name]) for name, rival in self.rivals.items()}
        expected = self.edited(self.rivals["hooks"], edits, max(n_of.values()))
        margins = ours()
        self._check("position edits", {(i, k): float(margins[i, k]) for i, k in expected}, runs, expected)

        work = self.ours.edits_work(self.boundary, n)
        per = {name: len(self.sampled) * n for name, n in n_of.items()} | {"actcache": len(self.events) * n}
        return self._timed(f"position edits, {n} an event", "variant", runs, ours, work, per, {"hooks": EDIT_TARGET})

    # ---- how each is checked and timed ----

    def _cells(
        self,
        name: str,
        runs: Runs,
        ours: Callable[[], Any],
        found: dict[tuple[int, str, str], float],
        boundary: int,
        before: Callable[[], None] = lambda: None,
        n_ours: int | None = None,
        replays: bool = True,
    ) -> Workload:
        """Check and time a workload of cells; ``n_ours`` says how many actcache makes, by default all four. Cells that
        are not replayed have no limit."""
        self._check(name, found, runs, runs["hooks"]())
        n_cells = n_ours or 2 * self.n_crossed
        work = self.ours.replay_work(boundary, n_cells // len(self.events)) if replays else []
        per = dict.fromkeys(runs, self.n_crossed) | {"actcache": n_cells}
        late_fraction = (self.study.n_blocks - boundary) / self.study.n_blocks
        return self._timed(name, "cell", runs, ours, work, per, {"hooks": HEADROOM / late_fraction}, before)

    def _timed(
        self,
        name: str,
        unit: str,
        runs: Runs,
        ours: Callable[[], Any],
        work: list[Any],
        per: dict[str, int],
        targets: dict[str, float],
        before: Callable[[], None] = lambda: None,
    ) -> Workload:
        self.products.expect(work)  # an empty one has nothing that could be the limit
        seconds = in_turn(
            {**runs, "actcache": ours, LIMIT: self.products.sample},
            self.args.repeat if runs else self.args.replay_repeat,
            lambda means: before() if means == "actcache" else None,
        )
        del seconds[LIMIT]
        limit = None
        if work:
            median_s, best_s = (seconds / per["actcache"] for seconds in self.products.seconds(work))
            limit = median_s, best_s
        return Workload.of(name, unit, seconds, per, limit, targets)

    def _crossed_of(self, table: Any, readout: str) -> dict[tuple[int, str, str], float]:
        order = {name: i for i, name in enumerate(events_of(self.store))}
        return {
            (order[cell["prompt_id"]], cell["upstream"], cell["late"]): cell["margin"]
            for cell in table.to_pylist()
            if cell["readout"] == readout and (cell["upstream"], cell["late"]) in CROSSED
        }

    def _check(self, what: str, found: Any, runs: Runs, expected: dict[Any, float]) -> None:
        for name, run in runs.items():
            if name != "hooks":
                check(f"{name}, {what}", run(), expected, self.study.dtype)
        self.worst[what] = check(f"actcache, {what}", found, expected, self.study.dtype)


def as_batch(event: HookEvent) -> torch.Tensor:
    """``[1, T]`` ids."""
    return torch.tensor([event.ids])


def flat(of_prompts: dict[str, Cells]) -> dict[tuple[str, ...], float]:
    """(prompt, upstream, late, readout) -> margin."""
    return {(prompt, *cell): margin for prompt, cells in of_prompts.items() for cell, margin in cells.items()}


def check(what: str, found: dict[Any, float], expected: dict[Any, float], dtype: str) -> float:
    """Exits unless every margin found is the hooks', within the tolerance; returns the largest difference."""
    missing = found.keys() - expected.keys()
    worst = max((abs(margin - expected[key]) for key, margin in found.items() if key not in missing), default=0.0)
    if missing or not found or not worst <= TOLERANCE[dtype]:
        sys.exit(f"{what}: a margin differs from the hooks' by {worst}, allowed {TOLERANCE[dtype]}; no figures")
    print(f"{what}: {len(found)} margins equal to the hooks'; largest difference {worst:.1e}", file=sys.stderr)
    return worst


def remove(folder: Path) -> None:
    """What an earlier turn left."""
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
