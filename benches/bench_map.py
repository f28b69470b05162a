"""A patching map by forward hooks, nnsight, TransformerLens and actcache: same cells, results equal first.

    python benches/bench_map.py --pt pairs/smollm2/pt --it pairs/smollm2/it --prompts benches/prompts_smollm2.jsonl

    states    the state of one checkpoint at one position of a boundary, in a run of the other: each boundary, the last
              positions, both ways round
    parts     what one block's attention, MLP or one of its heads gives at p, in a run of the other

All begin with the events, and with models in memory: actcache with its store, the rivals with the states (for the
parts, with what each part gives) that one native pass of each checkpoint left. Hooks run every cell as a full forward
at batch one. nnsight and TransformerLens start at the boundary (rivals.py) and run up to 16 positions of one event in a
batch; parts are timed by hooks alone. Times are per cell, by the median of repeats that take turns; rivals are timed on
some of the events, spread evenly.

The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hooks
import torch
from bench_sweep import as_batch, check
from hooks import HookEvent
from measure import Workload, in_turn, print_result, print_workloads
from rivals import Rival, available
from study import CROSSED, Study, add_pair_arguments

from actcache.capture.settings import parse_boundaries
from actcache.models.blocks import find_projection, find_site, n_heads
from actcache.replay.late_stack import LateStack
from actcache.store import Store
from actcache.study.engine import LocalEngine
from actcache.study.map_job import ATTENTION, HEAD, MLP, MapSettings

Key = tuple[str, str, str, int, int | None, int]  # event, host, site, boundary, head, offset
Values = dict[Key, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_arguments(parser)
    parser.add_argument("--boundary", default="0.6,0.8,-1", help="of the states; parts are of the first one's block on")
    parser.add_argument("--positions", type=int, default=8, help="how many of the last ones")
    parser.add_argument("--sampled-events", type=int, default=8, help="whose cells the rivals are timed on")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args(argv)
    if args.smoke:
        args.positions, args.sampled_events, args.repeat = 3, 2, 1
    study = Study.open(args)
    boundaries = parse_boundaries(args.boundary, study.n_blocks)
    rivals = available(study.models, study.folders)
    with tempfile.TemporaryDirectory() as scratch:
        store = study.capture(Path(scratch) / "store", boundaries)
        bench = Bench(study, rivals, store, boundaries, args)
        workloads = [bench.states(), bench.parts()]
    print_workloads(workloads)
    result = {
        "prompts": len(study.prompts),
        "events": len(bench.events),
        "boundaries": list(boundaries),
        "positions": args.positions,
        "blocks": study.n_blocks,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "sampled_events": len(bench.sampled),
        "workloads": [workload.as_json() for workload in workloads],
        "largest_difference": bench.worst,
    }
    print_result("map", result)
    return 0


class Bench:
    """Both maps, by all."""

    def __init__(
        self,
        study: Study,
        rivals: dict[str, Rival],
        store: Store,
        boundaries: Sequence[int],
        args: argparse.Namespace,
    ) -> None:
        self.study, self.rivals, self.store, self.boundaries, self.args = study, rivals, store, boundaries, args
        ids, offsets = store.token_ids()
        self.events = {
            event["event_id"]: HookEvent(ids[offsets[n] : offsets[n + 1]].tolist(), event["y_pt"], event["y_it"])
            for n, event in enumerate(store.events.to_pylist())
        }
        n = min(args.sampled_events, len(self.events))
        names = list(self.events)
        self.sampled = [names[i * len(names) // n] for i in range(n)]
        self.worst: dict[str, float] = {}
        self.blocks = range(boundaries[0], study.n_blocks)
        self.modules = {label: self._modules(label) for label in study.models}
        self.taken = {name: {label: self._native(label, name) for label in study.models} for name in self.sampled}
        stacks = {label: LateStack.load(model, min(boundaries)) for label, model in study.models.items()}
        self.engine = LocalEngine(store, lambda label, boundary: stacks[label].at(boundary))

    def _modules(self, label: str) -> dict[tuple[str, int], torch.nn.Module]:
        """By site and block, the module that gives it, or that reads the heads."""
        model = self.study.models[label]
        blocks: Any = model.get_submodule(hooks.path_of(model, hooks.BLOCKS))
        found: dict[tuple[str, int], torch.nn.Module] = {}
        for block in self.blocks:
            found |= {(site, block): find_site(blocks[block], site) for site in (ATTENTION, MLP)}
            found[HEAD, block] = find_projection(blocks[block])
        return found

    def _native(self, label: str, name: str) -> tuple[dict[int, torch.Tensor], dict[tuple[str, int], torch.Tensor]]:
        """States at the boundaries, and what each part gives at p."""
        model, ids = self.study.models[label], as_batch(self.events[name])
        states, _ = hooks.native(model, ids, self.boundaries)
        given, _ = hooks.taken(model, ids, {name: (of, name[0] == HEAD) for name, of in self.modules[label].items()})
        return states, given

    def states(self) -> Workload:
        """States at the last positions."""
        settings = MapSettings([("pt", "it")], self.args.positions, self.boundaries, {}, [])
        runs = {name: partial(self._states_by, rival) for name, rival in self.rivals.items()}
        return self._workload("states", settings, runs)

    def _states_by(self, rival: Rival) -> Values:
        found: Values = {}
        for name in self.sampled:
            event, ids = self.events[name], as_batch(self.events[name])
            n = min(self.args.positions, len(event.ids))
            for source, host in CROSSED:
                for boundary in self.boundaries:
                    own, other = (self.taken[name][label][0][boundary] for label in (host, source))
                    for backs in (range(n)[i : i + rival.batch] for i in range(0, n, rival.batch)):
                        states = own.repeat(len(backs), 1, 1)
                        for row, back in enumerate(backs):
                            states[row, -1 - back] = other[0, -1 - back]
                        last = rival.replay(host, ids, boundary, states)
                        margins = hooks.margins(self.study.models[host], last, event).tolist()
                        for back, margin in zip(backs, margins, strict=True):
                            found[name, host, "state", boundary, None, -back] = margin
        return found

    def parts(self) -> Workload:
        """Attention, MLP and heads at p."""
        blocks = {block: max(one for one in self.boundaries if one <= block) for block in self.blocks}
        settings = MapSettings([("pt", "it")], 1, [], dict.fromkeys((ATTENTION, MLP, HEAD), blocks), [])
        return self._workload("parts", settings, {"hooks": self._parts_by_hooks})

    def _parts_by_hooks(self) -> Values:
        found: Values = {}
        for name in self.sampled:
            event, ids = self.events[name], as_batch(self.events[name])
            for source, host in CROSSED:
                model = self.study.models[host]
                for (site, block), given in self.taken[name][source][1].items():
                    n = n_heads(model.config, len(given)) if site == HEAD else 1
                    width = len(given) // n
                    for head in range(n):
                        columns = slice(head * width, (head + 1) * width)
                        module = self.modules[host][site, block]
                        last = hooks.put(model, ids, module, given, columns, site == HEAD)
                        key = name, host, site, block, head if site == HEAD else None, 0
                        found[key] = float(hooks.margins(model, last, event))
        return found

    def _ours(self, settings: MapSettings) -> Values:
        """All cells of all events."""
        found: Values = {}
        for job in settings.jobs(self.store, {}):
            table = job.run(self.engine, job.read(self.engine)).table
            names = ("event_id", "host", "site", "boundary", "head", "offset")
            keys = zip(*(table[name].to_pylist() for name in names), strict=True)
            cells = zip(keys, table["margin"].to_pylist(), strict=True)
            found |= {key: margin for key, margin in cells if margin is not None}
        return found

    def _workload(self, what: str, settings: MapSettings, runs: Mapping[str, Callable[[], Values]]) -> Workload:
        ours = partial(self._ours, settings)
        found, expected = ours(), runs["hooks"]()
        for name, run in runs.items():
            if name != "hooks":
                check(f"{name}, {what}", run(), expected, self.study.dtype)
        of_sampled = {key: margin for key, margin in found.items() if key[0] in self.sampled}
        if of_sampled.keys() != expected.keys():
            sys.exit(f"{what}: {len(of_sampled)} cells where the hooks have {len(expected)}; no figures")
        self.worst[what] = check(f"actcache, {what}", of_sampled, expected, self.study.dtype)
        seconds = in_turn({**runs, "actcache": ours}, self.args.repeat)
        per = dict.fromkeys(runs, len(expected)) | {"actcache": len(found)}
        return Workload.of(f"map, {what}", "cell", seconds, per, None, {})


if __name__ == "__main__":
    sys.exit(main())
