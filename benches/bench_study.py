"""Each analysis of a study beside forward hooks that do the same: same numbers first, then time per event.

    python benches/bench_study.py --pt pairs/smollm2/pt --it pairs/smollm2/it --prompts benches/prompts_smollm2.jsonl

grid, effects   the four cells by three readouts, and their contrasts
depth           the grid again at three blocks before the end, and at the last one
windows         the MLPs of one checkpoint in each window of the other that begins late, and their margin supports
controls        interpolated, permuted, equally long random and unmoved states behind both late stacks, and the sizes of
                final states over whole sequences
commitment      what a head makes of the states at the boundary
closure         what is added to PT's state at p, of every rank and scale, and its controls
supports        the four cells of events along both checkpoints' own rollouts
lineage         all cells of three checkpoints, by two readouts
recipes         the four cells of two descendants of one base, each on its own events
map             states at the last four positions of every boundary, and each late block's attention and MLP at p
path            what each late block's attention and MLP adds to the final state, exchanged
whole           all of these

Both begin with the events, and with models in memory. Hooks keep nothing between analyses, as the published code does
not: of every event they run a native forward of each checkpoint, and a whole forward per further cell or edit.
actcache reads its store, replays late blocks, and writes its tables and numbers; depth, windows, controls and
commitment begin with the grid's cells. Hooks are timed on some of the events, spread evenly, actcache on all. The third
checkpoint is half-way between the two, in weights.

The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import hooks
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bench_sweep import check
from hooks import HookEvent
from measure import Workload, in_turn, print_result, print_workloads
from safetensors.torch import load_file, save_file
from study import READOUTS, Study, add_pair_arguments
from torch import nn
from transformers import PreTrainedModel

from actcache.analyses.closure import ANALYSIS as CLOSURE
from actcache.analyses.closure import injected
from actcache.analyses.controls import ANALYSIS as CONTROLS
from actcache.analyses.controls import controlled
from actcache.analyses.grid import GridSettings, run_grid
from actcache.analyses.windows import windows_of
from actcache.cli import main as actcache
from actcache.models.blocks import find_site
from actcache.models.checkpoint import DTYPES, Checkpoint
from actcache.models.readout import Readout
from actcache.replay.edits import Rows
from actcache.replay.late_stack import LateStack
from actcache.replay.sizes import SIZES, sizes_of
from actcache.store import Store
from actcache.study.cells import publish_cells
from actcache.study.run import Run

Values = dict[tuple[Any, ...], float]
WHOLE_TARGET = 20.0
HALF = "half"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_arguments(parser)
    parser.add_argument("--boundary", default="0.6")
    parser.add_argument("--sampled-events", type=int, default=16, help="that the hooks are timed on, of each run")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args(argv)
    if args.smoke:
        args.sampled_events, args.repeat = 2, 1
    study = Study.open(args)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bench = Bench(study, folder, args)
        workloads = [bench.workload(name) for name in ANALYSES]
    workloads.append(whole(workloads))
    print_workloads(workloads)
    result = {
        "prompts": len(study.prompts),
        "events": len(bench.pair.store),
        "boundary": bench.pair.store.boundaries[0],
        "blocks": study.n_blocks,
        "width": study.lineup.width,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "sampled_events": args.sampled_events,
        "workloads": [workload.as_json() for workload in workloads],
        "largest_difference": bench.worst,
    }
    print_result("study", result)
    return 0


class InMemory(Run):
    """A run whose late stacks are parts of models in memory, as those of the hooks are."""

    models: Mapping[str, PreTrainedModel]
    stacks: dict[str, LateStack]

    def load_late(self, label: str, boundary: int, device: str | None = None) -> LateStack:
        """From the first boundary of the store on, once per checkpoint."""
        if label not in self.stacks:
            self.stacks[label] = LateStack.load(self.models[label], min(self.store.boundaries))
        return self.stacks[label].at(boundary)

    def load_readout(self, label: str, device: str | None = None) -> Readout:
        """Of the late stack."""
        return self.load_late(label, max(self.store.boundaries)).readout


@dataclass
class Captured:
    """A captured run, as every repeat begins with it, and the models of its checkpoints.

    Attributes:
        path: of its folder.
        models: by label.
        n_sampled: events that the hooks are timed on.
    """

    path: Path
    models: dict[str, PreTrainedModel]
    n_sampled: int

    @cached_property
    def store(self) -> Store:
        """Of the run."""
        return Run(self.path).store

    @cached_property
    def sampled(self) -> list[tuple[dict[str, Any], HookEvent]]:
        """Some events: their rows, and what hooks need of them."""
        n = min(self.n_sampled, len(self.store))
        ids, offsets = self.store.token_ids()
        rows = self.store.events.to_pylist()
        chosen = [i * len(rows) // n for i in range(n)]
        return [
            (rows[i], HookEvent(ids[offsets[i] : offsets[i + 1]].tolist(), rows[i]["y_pt"], rows[i]["y_it"]))
            for i in chosen
        ]

    def run(self, path: Path, stacks: dict[str, LateStack]) -> InMemory:
        """One that begins anew in a copy of the folder."""
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.path, path)
        run = InMemory(path)
        run.models, run.stacks = self.models, stacks
        return run


class Bench:
    """The two runs that the analyses are answered of, and both ways to answer each."""

    def __init__(self, study: Study, folder: Path, args: argparse.Namespace) -> None:
        """Capture both, and score the grid of the first."""
        self.study, self.folder = study, folder
        self.worst: dict[str, float] = {}
        half = half_way(study, folder / HALF)
        models = study.models | {HALF: half.load(DTYPES[args.dtype])}
        places = study.folders | {HALF: half.path}
        n_blocks = study.n_blocks
        boundaries = f"{args.boundary},{n_blocks - 3},{n_blocks - 1}"
        self.bare = self._capture("bare", ("pt", "it"), [("pt", "it")], places, boundaries, args, models)
        along = ["--support", "rollouts", "--rollout-tokens", str(args.max_new)]
        self.rollouts = self._capture(
            "rollouts", ("pt", "it"), [("pt", "it")], places, args.boundary, args, models, along
        )
        pairs = [("pt", "it"), ("pt", HALF)]
        self.three = self._capture("three", ("pt", HALF, "it"), pairs, places, args.boundary, args, models)
        self.stacks: dict[str, LateStack] = {}
        run = self.bare.run(folder / "pair", self.stacks)
        score_grid(run)
        self.pair = Captured(run.path, self.bare.models, args.sampled_events)
        self.repeat = args.repeat

    def _capture(
        self,
        name: str,
        labels: Sequence[str],
        pairs: Sequence[tuple[str, str]],
        places: Mapping[str, Path],
        boundaries: str,
        args: argparse.Namespace,
        models: dict[str, PreTrainedModel],
        how: Sequence[str] = (),
    ) -> Captured:
        words = ["capture", *(word for label in labels for word in ("--checkpoint", f"{label}={places[label]}"))]
        words += [word for pair in pairs for word in ("--pair", ",".join(pair))]
        words += ["--prompts", str(args.prompts), "--out", str(self.folder / name)]
        words += how or ["--max-new", str(args.max_new)]
        words += ["--boundary", boundaries, "--dtype", args.dtype, "--quiet"]
        words += ["--limit", str(args.limit)] if args.limit else []
        with redirect_stdout(sys.stderr):
            if actcache(words):
                sys.exit("the capture failed; no figures")
        captured = Captured(self.folder / name, {label: models[label] for label in labels}, args.sampled_events)
        if not len(captured.store):
            sys.exit(f"no event on {len(self.study.prompts)} prompts: give more, or --max-new; no figures")
        return captured

    def workload(self, name: str) -> Workload:
        """An analysis by hooks and by actcache: equal first, then timed."""
        one = ANALYSES[name]
        captured: Captured = getattr(self, one.of)
        place = self.folder / "now"
        runs: list[InMemory] = []

        def before(means: str) -> None:
            if means == "actcache":
                runs[:] = [captured.run(place, self.stacks)]

        def ours() -> None:
            one.ours(runs[0])

        def theirs() -> Values:
            return {key: value for row, event in captured.sampled for key, value in one.hooks(captured, row, event)}

        before("actcache")
        ours()
        expected = theirs()
        found = {key: value for key, value in one.found(runs[0]) if key in expected}
        if found.keys() != expected.keys():
            sys.exit(f"{name}: {len(found)} of {len(expected)} values of the hooks were found; no figures")
        self.worst[name] = check(name, found, expected, self.study.dtype)
        seconds = in_turn({"hooks": theirs, "actcache": ours}, self.repeat, before, warm_up=False)
        per = {"hooks": len(captured.sampled), "actcache": len(captured.store)}
        return Workload.of(name, "event", seconds, per, None, {})


def whole(workloads: Sequence[Workload]) -> Workload:
    """All analyses, one after another."""
    means = workloads[0].seconds
    seconds = {name: sum(one.seconds[name] for one in workloads) for name in means}
    spread = {name: tuple(sum(one.spread_s[name][end] for one in workloads) for end in (0, 1)) for name in means}
    return Workload("whole", "event", seconds, None, {"hooks": WHOLE_TARGET}, spread)  # type: ignore[arg-type]


def half_way(study: Study, folder: Path) -> Checkpoint:
    """A checkpoint whose weights are the means of the pair's."""
    pt, it = (study.folders[label] for label in ("pt", "it"))
    shutil.copytree(it, folder)
    of_pt = {name: tensor for path in sorted(pt.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = {
            name: ((tensor.double() + of_pt[name].double()) / 2).to(tensor.dtype)
            for name, tensor in load_file(path).items()
        }
        save_file(tensors, path, {"format": "pt"})
    return Checkpoint.open(HALF, folder)


# ---- both ways, analysis by analysis ----


@dataclass(frozen=True)
class Both:
    """An analysis, by actcache and by hooks.

    Attributes:
        of: which run it is answered of.
        ours: answers it.
        hooks: of one event, its values by hooks, by key.
        found: the same values as actcache left them, of all events.
    """

    of: str
    ours: Callable[[InMemory], Any]
    hooks: Callable[[Captured, Mapping[str, Any], HookEvent], Iterator[tuple[tuple[Any, ...], float]]]
    found: Callable[[InMemory], Iterator[tuple[tuple[Any, ...], float]]]


def score_grid(run: InMemory) -> None:
    """The plain cells of the main boundary, as a table."""
    store, folder = run.store, run.folder
    settings = GridSettings(tuple(store.boundaries[:1]), readouts=READOUTS)
    run_grid(store, run.load_late, folder.cell_groups, settings, load_readout=run.load_readout)
    publish_cells(folder.cells, folder.cell_groups, store, strict=False, max_tokens=None)


def _grid_and_effects(run: InMemory) -> None:
    score_grid(run)
    run.analyse("effects")


def _cells(run: InMemory, name: str = "cells") -> Iterator[tuple[tuple[Any, ...], float]]:
    key = ("event_id", "boundary", "upstream", "late", "readout", "variant")
    table = pq.read_table(run.path / f"{name}.parquet")
    for row in table.to_pylist():
        yield tuple(row[column] for column in key), row["margin"] + (row["noop_delta"] or 0.0)
        if row.get("rms") is not None:
            for size in SIZES:
                yield (*(row[column] for column in key[:4]), size), row[size]


def _native(captured: Captured, event: HookEvent, boundaries: Sequence[int]) -> dict[str, Any]:
    """Of every checkpoint: states at the boundaries, and the last block's output at all positions."""
    ids = torch.tensor([event.ids])
    return {label: hooks.native(model, ids, boundaries, whole=True) for label, model in captured.models.items()}


def _margin(captured: Captured, head: str, outputs: torch.Tensor, event: HookEvent) -> float:
    return float(hooks.margins(captured.models[head], outputs[:, -1], event))


def _grid_by_hooks(
    captured: Captured,
    row: Mapping[str, Any],
    event: HookEvent,
    *,
    boundaries: Sequence[int],
    labels: Sequence[str],
    readouts: Sequence[str],
) -> Iterator[tuple[tuple[Any, ...], float]]:
    """All cells of these checkpoints."""
    ids = torch.tensor([event.ids])
    native = {label: hooks.native(captured.models[label], ids, boundaries, whole=True) for label in labels}
    for boundary in boundaries:
        for upstream in labels:
            for late in labels:
                states, outputs = native[upstream]
                if upstream != late:
                    outputs = hooks.replay(captured.models[late], ids, boundary, states[boundary], whole=True)
                for readout in readouts:
                    head = late if readout == "native" else readout.removeprefix("common_")
                    key = row["event_id"], boundary, upstream, late, readout, "none"
                    yield key, _margin(captured, head, outputs, event)


def _plain(captured: Captured, row: Mapping[str, Any], event: HookEvent) -> Iterator[tuple[tuple[Any, ...], float]]:
    return _grid_by_hooks(
        captured, row, event, boundaries=captured.store.boundaries[:1], labels=("pt", "it"), readouts=READOUTS
    )


def _depth(captured: Captured, row: Mapping[str, Any], event: HookEvent) -> Iterator[tuple[tuple[Any, ...], float]]:
    return _grid_by_hooks(
        captured, row, event, boundaries=captured.store.boundaries[1:], labels=("pt", "it"), readouts=["common_it"]
    )


def _windows(captured: Captured, row: Mapping[str, Any], event: HookEvent) -> Iterator[tuple[tuple[Any, ...], float]]:
    """Each host as it is, then with the source's MLPs in each window."""
    for host, source in (("pt", "it"), ("it", "pt")):
        model = captured.models[host]
        blocks, others = (_blocks(captured.models[label]) for label in (host, source))
        _, own = _mlp_supports(model, event)
        for name, first, stop in windows_of(captured.store, ""):
            mlps = [block.mlp for block in blocks]
            for block in range(first, stop):
                blocks[block].mlp = others[block].mlp
            try:
                margin, given = _mlp_supports(model, event)
            finally:
                for block, mlp in zip(blocks, mlps, strict=True):
                    block.mlp = mlp
            values = margin, float(given[first:stop].mean()), float(own[first:stop].mean())
            for column, value in zip(_WINDOW_COLUMNS, values, strict=True):
                yield (row["event_id"], host, name, column), value


_WINDOW_COLUMNS = ("margin", "margin_support", "own_margin_support")


def _blocks(model: PreTrainedModel) -> Any:
    return model.get_submodule(hooks.path_of(model, hooks.BLOCKS))


def _mlp_supports(model: PreTrainedModel, event: HookEvent) -> tuple[float, torch.Tensor]:
    """The margin, and of each block the margin of what it writes less that without what its MLP added."""
    added: list[torch.Tensor] = []
    written: list[torch.Tensor] = []

    def keeping(kept: list[torch.Tensor]) -> Any:
        return lambda _, args, out: kept.append((out[0] if isinstance(out, tuple) else out)[0, -1])

    handles = []
    for block in _blocks(model):
        last = getattr(block, "post_feedforward_layernorm", block.mlp)
        handles += [last.register_forward_hook(keeping(added)), block.register_forward_hook(keeping(written))]
    try:
        hooks.native(model, torch.tensor([event.ids]), [])
    finally:
        for handle in handles:
            handle.remove()
    after, before = torch.stack(written), torch.stack(written) - torch.stack(added)
    margins = [hooks.margins(model, states, event) for states in (after, before)]
    return float(margins[0][-1]), margins[0] - margins[1]


def _windows_found(run: InMemory) -> Iterator[tuple[tuple[Any, ...], float]]:
    for row in pq.read_table(run.path / "windows.parquet").to_pylist():
        for column in _WINDOW_COLUMNS:
            yield (row["event_id"], row["host"], row["window"], column), row[column]


def _supports(captured: Captured, row: Mapping[str, Any], event: HookEvent) -> Iterator[tuple[tuple[Any, ...], float]]:
    return _grid_by_hooks(
        captured, row, event, boundaries=captured.store.boundaries, labels=("pt", "it"), readouts=["common_it"]
    )


def _lineage(captured: Captured, row: Mapping[str, Any], event: HookEvent) -> Iterator[tuple[tuple[Any, ...], float]]:
    return _grid_by_hooks(
        captured,
        row,
        event,
        boundaries=captured.store.boundaries,
        labels=list(captured.models),
        readouts=["common_it", "native"],
    )


def _recipes(captured: Captured, row: Mapping[str, Any], event: HookEvent) -> Iterator[tuple[tuple[Any, ...], float]]:
    pair = row["pair"].split(",")
    return _grid_by_hooks(
        captured, row, event, boundaries=captured.store.boundaries, labels=pair, readouts=["common_it"]
    )


def _controls(captured: Captured, row: Mapping[str, Any], event: HookEvent) -> Iterator[tuple[tuple[Any, ...], float]]:
    """Variants of PT's states, and the sizes of all four cells."""
    boundary, ids = captured.store.boundaries[0], torch.tensor([event.ids])
    native = _native(captured, event, [boundary])
    places = torch.arange(len(event.ids))
    at = Rows(
        torch.zeros_like(places),
        places,
        places,
        torch.tensor([len(places)]),
        [row["event_id"]],
        {"it": native["it"][0][boundary][0]},
        prompts=[row["prompt_id"]],
    )
    for late, model in captured.models.items():
        for upstream, (states, outputs) in native.items():
            if upstream != late:
                outputs = hooks.replay(model, ids, boundary, states[boundary], whole=True)
            for name, size in zip(SIZES, sizes_of(outputs[0]).tolist(), strict=True):
                yield (row["event_id"], boundary, upstream, late, name), size
        for variant in controlled(captured.store, CONTROLS.options(), ("pt", "it")):
            states = variant.edit_states(native["pt"][0][boundary][0], at)[None]
            outputs = hooks.replay(model, ids, boundary, states, whole=True)
            key = row["event_id"], boundary, "pt", late, "common_it", variant.name
            yield key, _margin(captured, "it", outputs, event)


def _closure(captured: Captured, row: Mapping[str, Any], event: HookEvent) -> Iterator[tuple[tuple[Any, ...], float]]:
    """What is added to PT's state at p, behind IT's late blocks, beside that state itself."""
    ids, pair = torch.tensor([event.ids]), ("pt", "it")
    native = _native(captured, event, captured.store.boundaries)
    places = torch.arange(len(event.ids))
    for boundary in captured.store.boundaries:
        own, donor = (native[label][0][boundary][0] for label in pair)
        lengths = torch.tensor([len(places)])
        at = Rows(torch.zeros_like(places), places, places, lengths, [row["event_id"]], {"it": donor})

        def margin(states: torch.Tensor, boundary: int = boundary) -> float:
            outputs = hooks.replay(captured.models["it"], ids, boundary, states[None], whole=True)
            return _margin(captured, "it", outputs, event)

        floor = margin(own)
        variants, meant = injected(captured.store, boundary, pair, CLOSURE.options())
        for variant in variants:
            yield (row["event_id"], boundary, *meant[variant.name]), margin(variant.edit_states(own, at)) - floor


def _closure_found(run: InMemory) -> Iterator[tuple[tuple[Any, ...], float]]:
    for row in pq.read_table(run.path / "closure.parquet").to_pylist():
        yield (row["event_id"], row["boundary"], row["what"], row["rank"], row["scale"]), row["gain"]


def _commitment(
    captured: Captured, row: Mapping[str, Any], event: HookEvent
) -> Iterator[tuple[tuple[Any, ...], float]]:
    boundary = captured.store.boundaries[0]
    for label, (states, _) in _native(captured, event, [boundary]).items():
        yield (row["event_id"], label), _margin(captured, "it", states[boundary], event)


def _margins_found(run: InMemory) -> Iterator[tuple[tuple[Any, ...], float]]:
    table: pa.Table = pq.read_table(run.path / "commitment.parquet")
    for row in table.to_pylist():
        for label in ("pt", "it"):
            yield (row["event_id"], label), row[f"boundary_margin_{label}"]


def _parts(captured: Captured, label: str) -> dict[tuple[str, int], nn.Module]:
    """Attention and MLP of each block from the main boundary on."""
    model = captured.models[label]
    blocks = list(model.get_submodule(hooks.path_of(model, hooks.BLOCKS)).children())
    late = range(captured.store.boundaries[0], len(blocks))
    return {(site, block): find_site(blocks[block], site) for site in ("attention", "mlp") for block in late}


def _taken(captured: Captured, event: HookEvent) -> dict[str, Any]:
    """Of every checkpoint: what these give at p, and the final state there."""
    ids = torch.tensor([event.ids])
    found = {}
    for label, model in captured.models.items():
        found[label] = hooks.taken(model, ids, {name: (of, False) for name, of in _parts(captured, label).items()})
    return found


def _map(captured: Captured, row: Mapping[str, Any], event: HookEvent) -> Iterator[tuple[tuple[Any, ...], float]]:
    """One forward per patch, after two of each checkpoint: for its states, and for what its parts give."""
    boundaries, ids = captured.store.boundaries, torch.tensor([event.ids])
    native, taken = _native(captured, event, boundaries), _taken(captured, event)
    for host, source in (("pt", "it"), ("it", "pt")):
        model = captured.models[host]
        for boundary in boundaries:
            for back in range(min(4, len(event.ids))):
                states = native[host][0][boundary].clone()
                states[0, -1 - back] = native[source][0][boundary][0, -1 - back]
                outputs = hooks.replay(model, ids, boundary, states, whole=True)
                yield (row["event_id"], host, "state", boundary, -back), _margin(captured, host, outputs, event)
        for (site, block), module in _parts(captured, host).items():
            last = hooks.put(model, ids, module, taken[source][0][site, block], slice(None), False)
            yield (row["event_id"], host, site, block, 0), float(hooks.margins(model, last, event))


def _map_found(run: InMemory) -> Iterator[tuple[tuple[Any, ...], float]]:
    for row in pq.read_table(run.path / "map.parquet").to_pylist():
        yield (row["event_id"], row["host"], row["site"], row["boundary"], row["offset"]), row["margin"]


def _path(captured: Captured, row: Mapping[str, Any], event: HookEvent) -> Iterator[tuple[tuple[Any, ...], float]]:
    taken = _taken(captured, event)
    for host, source in (("pt", "it"), ("it", "pt")):
        given, final = taken[host]
        for (site, block), own in given.items():
            exchanged = final - own + taken[source][0][site, block]
            key = row["event_id"], host, site, block
            yield key, float(hooks.margins(captured.models[host], exchanged, event))


def _path_found(run: InMemory) -> Iterator[tuple[tuple[Any, ...], float]]:
    for row in pq.read_table(run.path / "path.parquet").to_pylist():
        yield (row["event_id"], row["host"], row["site"], row["boundary"]), row["margin"]


ANALYSES = {
    "grid, effects": Both("bare", _grid_and_effects, _plain, _cells),
    "depth": Both("pair", lambda run: run.analyse("depth"), _depth, _cells),
    "windows": Both("pair", lambda run: run.analyse("windows"), _windows, _windows_found),
    "controls": Both("pair", lambda run: run.analyse("controls"), _controls, lambda run: _cells(run, "controls")),
    "commitment": Both("pair", lambda run: run.analyse("commitment"), _commitment, _margins_found),
    "closure": Both("pair", lambda run: run.analyse("closure"), _closure, _closure_found),
    "supports": Both("rollouts", lambda run: run.analyse("supports"), _supports, _cells),
    "lineage": Both("three", lambda run: run.analyse("lineage"), _lineage, _cells),
    "recipes": Both("three", lambda run: run.analyse("recipes"), _recipes, _cells),
    "map": Both("pair", lambda run: run.analyse("map"), _map, _map_found),
    "path": Both("pair", lambda run: run.analyse("path"), _path, _path_found),
}


if __name__ == "__main__":
    sys.exit(main())
