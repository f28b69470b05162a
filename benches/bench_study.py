"""Each analysis of a study beside forward hooks that do the same: same numbers first, then time per event.

    python benches/bench_study.py --pt pairs/smollm2/pt --it pairs/smollm2/it --prompts benches/prompts_smollm2.jsonl

study_cells.py, study_features.py and study_texts.py say what is compared, analysis by analysis. Two rows are sums:

late-only   the analyses of one pair that replay late blocks of a captured run, and nothing else (LATE_ONLY)
whole       all of them

Both sides begin with the events, and with models in memory. Hooks keep nothing between analyses, as the published code
does not: of every event they run a native forward of each checkpoint, and a whole forward per further cell or edit.
actcache reads its store, replays late blocks, and writes its tables and numbers. Analyses begin with the grid's cells,
steps of features with crosscoders, and those after 'rank' with its gradients. Hooks are timed on some of the events,
spread evenly, actcache on all. The third checkpoint is half-way between the two, in weights.

What both sides do first is compared, timed, and counted: the multiply-adds of the blocks' linear layers. A *pass* is as
many as an event's sequence takes through all blocks; a backward counts as one more. The *bound* is how many times fewer
passes actcache needs: the ratio if every multiply-add took the same time, and nothing else took any. A ratio above it
says that many rows at once are cheaper than a few, one below it that other work weighs.

Crosscoders, their training, and the judgement of them are left out: none belongs to an event.

The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from shutil import copytree
from typing import Any

import study_cells
import study_features
import study_texts
import torch
from bench_sweep import check
from captured import Both, Captured, Held, InMemory
from measure import Work, Workload, in_turn, print_result, print_workloads
from safetensors.torch import load_file, save_file
from study import Study, add_pair_arguments
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from actcache.cli import main as actcache
from actcache.models.checkpoint import DTYPES, Checkpoint

ANALYSES: dict[str, Both] = {**study_cells.BOTH, **study_features.BOTH, **study_texts.BOTH}

LATE_ONLY = (
    *("grid, effects", "depth", "controls", "commitment", "closure", "map", "path"),
    *("features rank", "features mediate", "features gate-test", "features rescue", "features dial"),
)
"""Those of one pair that need the rows of the plain capture and replays of late blocks, and no further upstream
forward. So 'supports', 'lineage' and 'recipes' are apart (rollouts, further checkpoints), and so are 'continuation' and
'forced' (generation), and what runs other modules from the first block of a window on ('windows', 'features handoff').
"""
TARGET = 20.0
HALF = "half"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_arguments(parser)
    parser.add_argument("--boundary", default="0.6")
    parser.add_argument("--sampled-events", type=int, default=16, help="that the hooks are timed on, of each run")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(ANALYSES), default=list(ANALYSES), metavar="ANALYSIS")
    args = parser.parse_args(argv)
    if args.smoke:
        args.sampled_events, args.repeat = 1, 1
    study = Study.open(args)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(study, Path(scratch), args)
        workloads = {name: bench.workload(name) for name in args.only}
    rows = [*workloads.values()]
    if len(workloads) == len(ANALYSES):
        late = [workloads[name] for name in LATE_ONLY]
        sums = bench.together("late-only", late, {"hooks": TARGET}), bench.together("whole", rows, {})
        rows += sums
    print_workloads(rows)
    print_bounds(rows, bench.passes)
    result = {
        "prompts": len(study.prompts),
        "events": len(bench.pair.store),
        "boundary": bench.pair.store.boundaries[0],
        "blocks": study.n_blocks,
        "width": study.lineup.width,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "sampled_events": args.sampled_events,
        "late_only": LATE_ONLY,
        "workloads": [workload.as_json() for workload in rows],
        "passes": {name: {**of, "bound": bound(of)} for name, of in bench.passes.items()},
        "largest_difference": bench.worst,
    }
    print_result("study", result)
    return 0


class Bench:
    """The runs that the analyses are answered of, and both ways to answer each.

    Attributes:
        worst: the largest difference between both, by analysis.
        passes: of each analysis and means, passes per event.
    """

    def __init__(self, study: Study, folder: Path, args: argparse.Namespace) -> None:
        """Capture the runs; score the grid of one, and rank its features."""
        self.study, self.folder, self.args = study, folder, args
        self.worst: dict[str, float] = {}
        self.passes: dict[str, dict[str, float]] = {}
        half = half_way(study, folder / HALF)
        self.places = study.folders | {HALF: half.path}
        models = study.models | {HALF: half.load(DTYPES[args.dtype])}
        for model in models.values():
            model.requires_grad_(False)  # gradients are of what modules give
        main, pair, until = args.boundary, ("pt", "it"), ("--max-new", args.max_new)
        late = f"{main},{study.n_blocks - 3},{study.n_blocks - 1}"
        self.held = Held(models)
        self.bare = self._captured("bare", pair, "--boundary", late, *until)
        rollouts = ("--support", "rollouts", "--rollout-tokens", args.max_new)
        self.rollouts = self._captured("rollouts", pair, "--boundary", main, *rollouts)
        pairs = ("--pair", "pt,it", "--pair", f"pt,{HALF}")
        self.three = self._captured("three", ("pt", HALF, "it"), "--boundary", main, *until, *pairs)
        for label in models:
            self.held.stack(label, self.bare.store.main_boundary)
        self.pair = self._after("pair", self.bare, study_cells.score_grid)
        corpus = folder / "corpus"
        site = f"mlp:{','.join(map(str, study_features.blocks_of(self.pair.store)))}"
        self._capture(pair, "--corpus", args.prompts, "--out", corpus, "--site", site)
        self.trained = self._after("trained", self.pair, lambda run: study_features.train(run, corpus))
        self.ranked = self._after("ranked", self.trained, lambda run: run.analyse("features rank"))

    def _captured(self, name: str, labels: tuple[str, ...], *words: object) -> Captured:
        """A run of its own."""
        prompts = ("--prompts", self.args.prompts)
        self._capture(labels, *prompts, "--out", self.folder / name, *words)
        captured = Captured(self.folder / name, labels, self.held, self.args.sampled_events)
        if not len(captured.store):
            sys.exit(f"no event on {len(self.study.prompts)} prompts: give more, or --max-new; no figures")
        return captured

    def _capture(self, labels: Sequence[str], *words: object) -> None:
        checkpoints = [word for label in labels for word in ("--checkpoint", f"{label}={self.places[label]}")]
        limit = ["--limit", self.args.limit] if self.args.limit else []
        every = ["capture", *checkpoints, *words, *limit, "--dtype", self.args.dtype, "--quiet"]
        with redirect_stdout(sys.stderr):
            if actcache([str(word) for word in every]):
                sys.exit("the capture failed; no figures")

    def _after(self, name: str, before: Captured, what: Callable[[InMemory], object]) -> Captured:
        """A run to which something was added."""
        run = before.copy(self.folder / name)
        what(run)
        return Captured(run.path, before.labels, before.held, before.n_sampled)

    def workload(self, name: str) -> Workload:
        """An analysis by hooks and by actcache: the first pass of both is compared and counted, all are timed."""
        one = ANALYSES[name]
        captured: Captured = getattr(self, one.of)
        of_event, values = one.hooks(captured), dict[tuple[Any, ...], float]()
        runs: list[InMemory] = []

        def before(means: str) -> None:
            if means == "actcache":
                runs[:] = [captured.copy(self.folder / "now")]

        sides: dict[str, Callable[[], object]] = {
            "hooks": lambda: values.update(one for row, event in captured.sampled for one in of_event(row, event)),
            "actcache": lambda: one.ours(runs[0]),
        }
        seconds: dict[str, list[float]] = {}
        products: dict[str, int] = {}
        for means, side in sides.items():
            with counted(self.held.models.values()) as counts:
                seconds |= in_turn({means: side}, 1, before, warm_up=False)
            products[means] = sum(counts)
        found = {key: value for key, value in one.found(runs[0]) if key in values}
        if found.keys() != values.keys():
            sys.exit(f"{name}: {len(found)} of {len(values)} values of the hooks were found; no figures")
        self.worst[name] = check(name, found, values, self.study.dtype)
        for means, further in in_turn(sides, self.args.repeat - 1, before, warm_up=False).items():
            seconds[means] += further
        events = {"hooks": captured.sampled, "actcache": captured.events}
        self.passes[name] = {
            means: products[means] / Work(self.study.matrices(), [len(event.ids) for _, event in of]).n_products
            for means, of in events.items()
        }
        return Workload.of(name, "event", seconds, {means: len(of) for means, of in events.items()}, None, {})

    def together(self, name: str, workloads: Sequence[Workload], targets: dict[str, float]) -> Workload:
        """Some analyses, one after another: one event of each."""
        means = ("hooks", "actcache")
        seconds = {by: sum(one.seconds[by] for one in workloads) for by in means}
        spread = {by: tuple(sum(one.spread_s[by][end] for one in workloads) for end in (0, 1)) for by in means}
        self.passes[name] = {by: sum(self.passes[one.name][by] for one in workloads) for by in means}
        return Workload(name, "event", seconds, None, targets, spread)  # type: ignore[arg-type]


@contextmanager
def counted(models: Collection[PreTrainedModel]) -> Iterator[list[int]]:
    """Within this context a list takes the multiply-adds of every call of a linear layer, the models' heads apart;
    twice where a gradient goes back through it."""
    products: list[int] = []  # of any thread
    heads = {model.get_output_embeddings().weight.data_ptr() for model in models}
    kinds = [kind for kind in _with_subclasses(nn.Linear) if "forward" in vars(kind)] + [Conv1D]
    own = {kind: kind.forward for kind in kinds}

    def counting(kind: type[nn.Module], forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def call(layer: Any, rows: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = forward(layer, rows)
            if type(layer).forward is kind.forward and layer.weight.data_ptr() not in heads:
                n_rows = rows.shape[:-1].numel() * (2 if found.requires_grad else 1)
                products.append(n_rows * layer.weight.numel())
            return found

        return call

    try:
        for kind, forward in own.items():
            kind.forward = counting(kind, forward)
        yield products
    finally:
        for kind, forward in own.items():
            kind.forward = forward


def _with_subclasses(kind: type[nn.Module]) -> Iterator[type[nn.Module]]:
    yield kind
    for one in kind.__subclasses__():
        yield from _with_subclasses(one)


def bound(passes: Mapping[str, float]) -> float | None:
    """How many times fewer passes actcache needs; None where it needs none."""
    return passes["hooks"] / passes["actcache"] if passes["actcache"] else None


def print_bounds(workloads: Sequence[Workload], passes: Mapping[str, Mapping[str, float]]) -> None:
    """For people: passes per event, the bound that they are, and how far the ratio is from it."""
    print(f"\n{'passes per event':<34}{'hooks':>12}{'actcache':>12}{'bound':>10}{'ratio':>10}{'of the bound':>15}")
    for one in workloads:
        of, most, ratio = passes[one.name], bound(passes[one.name]), one.ratios["hooks"]
        line = f"{one.name:<34}{of['hooks']:>12.2f}{of['actcache']:>12.3f}"
        line += f"{'':>10}" if most is None else f"{most:>9.1f}x"
        print(f"{line}{ratio:>9.1f}x" + ("" if most is None else f"{ratio / most:>15.0%}"))


def half_way(study: Study, folder: Path) -> Checkpoint:
    """A checkpoint whose weights are the means of the pair's."""
    pt, it = (study.folders[label] for label in ("pt", "it"))
    copytree(it, folder)
    of_pt = {name: tensor for path in sorted(pt.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = {
            name: ((tensor.double() + of_pt[name].double()) / 2).to(tensor.dtype)
            for name, tensor in load_file(path).items()
        }
        save_file(tensors, path, {"format": "pt"})
    return Checkpoint.open(HALF, folder)


if __name__ == "__main__":
    sys.exit(main())
