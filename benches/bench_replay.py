"""Replay against what bounds it: the late blocks' multiply-adds in time, the late blocks' weights in memory.

    python benches/bench_replay.py --pt pairs/smollm2/pt --it pairs/smollm2/it --prompts benches/prompts_smollm2.jsonl

Time, at each of ``--boundaries``, for all four (upstream, late) cells of every event:

    read       the states of both checkpoints, from the store
    run        the late stacks alone, over states in memory
    replay     both
    grid       run_grid: both, three readouts of every cell with its best token, and the table of cells on disk

The limit is the late blocks' multiply-adds over every position. Each matrix product counts at the rate that this
machine has for its very shape and number of rows, by torch's usual means or by oneDNN, whichever is faster. The
last block is run only where its output is read, so that a replay of few blocks may fall below it. All of these take
turns, and medians are taken; in brackets stands the limit at the best rate that every product had in the whole run.
Margins are compared with those of forward hooks first.

On a busy machine: the replay of the first boundary again, in fresh processes, alone and beside one busy process per
CPU; with threads that sleep while they wait, as in the command line, and with threads that spin, as torch's do.

Memory: peak resident set of fresh processes that import everything; that load the whole model and run 64 tokens; that
load and run only the late stack, at each of ``--memory-boundaries``.

bench_sweep.py has the other frameworks beside it. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hooks import HookEvent
from measure import LIMIT, Products, Workload, in_turn, print_result, print_workloads
from rivals import Hooks, grid
from study import REPLAY_TARGET, TOLERANCE, Ours, Study, add_pair_arguments, events_of

from actcache.capture.settings import parse_boundaries
from actcache.cpus import usable_cpus
from actcache.models.checkpoint import DTYPES
from actcache.models.linear import describe_products
from actcache.models.lineup import Lineup
from actcache.replay.late_stack import LateStack
from actcache.store import Store, open_store

MEMORY_TOKENS = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_arguments(parser)
    parser.add_argument("--boundaries", help="default: 0.6 of the depth, and three blocks before the end")
    parser.add_argument("--memory-boundaries", default="0.3,0.6,0.9")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--compared-events", type=int, default=8, help="with the hooks")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # run in a child: print its own peak memory
    parser.add_argument("--replay-of", type=Path, help=argparse.SUPPRESS)  # run in a child: time replays of a store
    args = parser.parse_args(argv)
    if args.peak_of:
        return print_peak(args)
    if args.replay_of:
        return print_replays(args)
    if args.smoke:
        args.repeat, args.compared_events, args.memory_boundaries = 1, 2, "0.6"
    study = Study.open(args)
    boundaries = parse_boundaries(args.boundaries or f"0.6,{study.n_blocks - 3}", study.n_blocks)
    products = Products(DTYPES[args.dtype])
    with tempfile.TemporaryDirectory() as scratch:
        store = study.capture(Path(scratch) / "store", boundaries)
        bench = Bench(study, Ours(study, store), products, Path(scratch) / "cells", args.repeat)
        worst = bench.check(args.compared_events)
        workloads = [workload for boundary in boundaries for workload in bench.replay(boundary)]
        workloads += waiting(args, Path(scratch) / "store", boundaries[0])
        about = bench.about(store)
    print_workloads(workloads)
    peaks = peak_bytes(args, study.n_blocks)
    print_peaks(peaks)
    result = {
        **about,
        "boundaries": list(boundaries),
        "workloads": [workload.as_json() for workload in workloads],
        "largest_difference": worst,
        "multiply_adds_per_s": products.rates(),
        "in_packs": describe_products(),
        "peak_bytes": peaks,
    }
    print_result("replay", result)
    return 0


class Bench:
    """The four timings of a boundary, and the comparison before them."""

    def __init__(self, study: Study, ours: Ours, products: Products, cells: Path, repeat: int) -> None:
        self.study, self.ours, self.products, self.cells, self.repeat = study, ours, products, cells, repeat
        self.events: list[HookEvent] = list(events_of(ours.store).values())

    def check(self, n_events: int) -> float:
        """Cells of the first events at every boundary, against the hooks'; exits where they differ."""
        rival, worst = Hooks(self.study.models, self.study.folders), 0.0
        expected = {
            (boundary, i): grid(rival, self.study.models, event, boundary)
            for boundary in self.ours.store.boundaries
            for i, event in enumerate(self.events[:n_events])
        }
        order = {name: i for i, name in enumerate(events_of(self.ours.store))}
        for boundary in self.ours.store.boundaries:
            for cell in self.ours.grid(boundary, self.cells).to_pylist():
                of_hooks = expected.get((cell["boundary"], order[cell["prompt_id"]]), {})
                margin = of_hooks.get((cell["upstream"], cell["late"], cell["readout"]))
                worst = max(worst, abs(cell["margin"] - margin) if margin is not None else 0.0)
        if not worst <= TOLERANCE[self.study.dtype]:
            sys.exit(f"a margin differs from the hooks' by {worst}, allowed {TOLERANCE[self.study.dtype]}; no figures")
        n_cells = sum(len(cells) for cells in expected.values())
        print(f"{n_cells} cells equal to the hooks'; largest difference {worst:.1e}", file=sys.stderr)
        return worst

    def replay(self, boundary: int) -> list[Workload]:
        """Read, run, both, and the whole grid, of one boundary."""
        states = self.ours.read(boundary)

        def clean(name: str) -> None:
            if name == "grid":
                shutil.rmtree(self.cells, ignore_errors=True)

        runs: dict[str, Callable[[], Any]] = {
            "read": lambda: self.ours.read(boundary),
            "run": lambda: self.ours.replay(boundary, states),
            "replay": lambda: self.ours.replay(boundary, self.ours.read(boundary)),
            "grid": lambda: self.ours.grid(boundary, self.cells),
        }
        work = self.ours.replay_work(boundary, 4)
        self.products.expect(work)
        seconds = in_turn({**runs, LIMIT: self.products.sample}, self.repeat, clean)
        limit_s = self.products.seconds(work)
        return [
            Workload.of(
                f"{name}, boundary {boundary} of {self.study.n_blocks}",
                "run",
                {"actcache": seconds[name]},
                {"actcache": 1},
                None if name == "read" else limit_s,
                {LIMIT: REPLAY_TARGET} if name == "replay" else {},
            )
            for name in runs
        ]

    def about(self, store: Store) -> dict[str, Any]:
        """What was replayed."""
        state_bytes = store.summary()["state_bytes"]
        return {
            "prompts": len(self.study.prompts),
            "events": len(self.events),
            "tokens": sum(len(event.ids) for event in self.events),
            "blocks": self.study.n_blocks,
            "dtype": self.study.dtype,
            "threads": torch.get_num_threads(),
            "bytes_per_event": {kind: state_bytes[kind] / len(self.events) for kind in ("raw", "stored")},
        }


# ---- other load ----------------------------------------------------------------------------------------------------


def waiting(args: argparse.Namespace, store: Path, boundary: int) -> list[Workload]:
    """Replays alone and beside busy processes, by threads that sleep while they wait and by threads that spin."""
    policies = {"actcache": "PASSIVE"} if args.smoke else {"actcache": "PASSIVE", "spinning threads": None}
    return [
        Workload.of(
            f"replay, boundary {boundary}, {'alone' if not n_busy else f'beside {n_busy} busy'}",
            "run",
            {means: replays_of(args, store, boundary, policy, n_busy) for means, policy in policies.items()},
            dict.fromkeys(policies, 1),
            None,
            {},
        )
        for n_busy in (0, usable_cpus())
    ]


def replays_of(args: argparse.Namespace, store: Path, boundary: int, policy: str | None, n_busy: int) -> list[float]:
    """Seconds of each replay in a fresh process, whose OpenMP threads wait so (None: as torch leaves it)."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": policy} if policy else {}
    child = [sys.executable, __file__, f"--pt={args.pt}", f"--it={args.it}", f"--prompts={args.prompts}"]
    child += [f"--dtype={args.dtype}", f"--repeat={args.repeat}", f"--replay-of={store}", f"--boundaries={boundary}"]
    with subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as ran:
        assert ran.stdout is not None
        ran.stdout.readline()  # it has loaded what it replays: only now do the others keep the CPUs busy
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_busy)]
        try:
            found, _ = ran.communicate("go\n")
        finally:
            for process in busy:
                process.kill()
                process.wait()
    if ran.returncode:
        sys.exit(f"{' '.join(child)} failed")
    seconds: list[float] = json.loads(found)
    return seconds


def print_replays(args: argparse.Namespace) -> int:
    """In a child: replay every cell of a store, reading included, some times over, once a line comes; print the seconds
    of each."""
    study, store = Study.open(args), open_store(args.replay_of)
    ours, boundary = Ours(study, store), int(args.boundaries)
    print("ready", flush=True)
    sys.stdin.readline()
    seconds = in_turn({"replay": lambda: ours.replay(boundary, ours.read(boundary))}, args.repeat)
    print(json.dumps(seconds["replay"]))
    return 0


# ---- memory --------------------------------------------------------------------------------------------------------


def peak_bytes(args: argparse.Namespace, n_blocks: int) -> dict[str, int]:
    """Peak resident bytes of fresh processes: ``imports``, ``model``, and ``late b``."""
    peaks = {what: peak_of(what, args) for what in ("imports", "model")}
    for boundary in parse_boundaries(args.memory_boundaries, n_blocks):
        peaks[f"late {boundary}"] = peak_of(str(boundary), args)
    return peaks


def peak_of(what: str, args: argparse.Namespace) -> int:
    """Peak resident bytes of a fresh process that loads and runs ``what``: a boundary, ``model`` or ``imports``."""
    child = [sys.executable, __file__, f"--pt={args.pt}", f"--dtype={args.dtype}", f"--peak-of={what}"]
    ran = subprocess.run(child, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"{' '.join(child)} failed:\n{ran.stderr}")
    return int(ran.stdout)


def print_peak(args: argparse.Namespace) -> int:
    """In a child: load the whole model, a late stack, or nothing; run some tokens; print the peak."""
    dtype = DTYPES[args.dtype]
    if args.peak_of == "model":
        model = Lineup.open({"pt": args.pt}).checkpoints["pt"].load(dtype)
        with torch.no_grad():
            model(input_ids=torch.zeros(1, MEMORY_TOKENS, dtype=torch.int64), logits_to_keep=1)
    elif args.peak_of != "imports":
        late = LateStack.load(args.pt, int(args.peak_of), dtype=dtype)
        late.readout.top2(late.run(torch.zeros(MEMORY_TOKENS, late.width, dtype=dtype), [0, MEMORY_TOKENS]))
    # Not getrusage: its peak is inherited from the process that forked this one.
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024)  # type: ignore[index]
    return 0


def print_peaks(peaks: dict[str, int]) -> None:
    """For people: above the imports, and as a part of the whole model."""
    above = {what: peak - peaks["imports"] for what, peak in peaks.items() if what != "imports"}
    print(f"\npeak memory above the imports' {peaks['imports'] / 1e6:.0f} MB")
    for what, n_bytes in above.items():
        print(f"  {what:<10}{n_bytes / 1e6:8.0f} MB{100 * n_bytes / above['model']:6.0f}% of the whole model's")


if __name__ == "__main__":
    sys.exit(main())
