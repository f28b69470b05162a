"""The main job against forward hooks at batch one: same pair, same prompts, same process, results equal first.

    python benches/bench_run.py --pt pairs/smollm2/pt --it pairs/smollm2/it --prompts benches/prompts_smollm2.jsonl

Cold run: search, capture and the 2x2 grid, from models in memory to scored cells on disk. Replay only: the grid again,
from the store. The ceiling is the late blocks' multiply-adds over the rate of this machine's own matrix product at the
shape of the widest of their weights, measured in the same run. Memory: peak resident set of fresh processes that load
and run the whole model, and the late stack alone. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hooks import HookEvent, grid, search
from measure import median, print_result, timed
from transformers.utils import logging

from actcache.capture import CaptureSettings, capture, parse_boundaries
from actcache.grid import GridSettings, run_grid
from actcache.lineup import DTYPES, Lineup
from actcache.prompts import read_prompts
from actcache.replay import LateStack
from actcache.store import Store, open_store
from actcache.trunk import Trunk

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pt", type=Path, required=True)
    parser.add_argument("--it", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--boundary", default="0.6")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--max-new", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3, help="of the replay, median taken")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # run in a child: print its own peak memory
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if args.peak_of:
        return print_peak(args)

    lineup = Lineup.open({"pt": args.pt, "it": args.it})
    prompts = read_prompts(args.prompts, args.limit)
    (boundary,) = parse_boundaries(args.boundary, lineup.n_blocks)
    models = {label: c.load(DTYPES[args.dtype]) for label, c in lineup.checkpoints.items()}
    prompt_ids = lineup.encode(prompts)
    settings = CaptureSettings((boundary,), dtype=args.dtype, max_new=args.max_new)
    for checkpoint in lineup.checkpoints.values():
        _ = checkpoint.fingerprint  # digests are made once and cached, as in 'actcache run'
    warm_up(models, prompt_ids[0])

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        trunks = {label: Trunk(model) for label, model in models.items()}
        capture_s, _ = timed(lambda: capture(lineup, prompts, folder / "store", settings, load=trunks.__getitem__))
        store = open_store(folder / "store")
        lates = {label: LateStack.load(model, boundary) for label, model in models.items()}
        replays = []
        for number in range(args.repeat):
            group_folder = folder / f"cells-{number}"
            start = time.perf_counter()
            cells = run_grid(store, lambda label, b: lates[label], group_folder, GridSettings((boundary,)))
            replays.append(time.perf_counter() - start)
        replay_s = median(replays)

        def search_all() -> list[HookEvent | None]:
            return [search(models, ids, args.max_new, lineup.end_ids) for ids in prompt_ids]

        search_s, found = timed(search_all)
        events = [event for event in found if event is not None]
        hooks_s, margins = timed(lambda: [grid(models, event, boundary) for event in events])
        check_equal(store, cells, [p.id for p in prompts], found, margins, TOLERANCE[args.dtype])

        n_tokens = int(store.token_ids()[1][-1])
        ceiling_s = late_multiply_adds(lates, 2 * n_tokens) / matmul_rate(lates, DTYPES[args.dtype], n_tokens)
        summary = store.summary()
    result = {
        "prompts": len(prompts),
        "events": len(events),
        "tokens": n_tokens,
        "boundary": boundary,
        "blocks": lineup.n_blocks,
        "dtype": args.dtype,
        "capture_s": capture_s,
        "replay_s": replay_s,
        "replay_spread_s": [min(replays), max(replays)],
        "hooks_search_s": search_s,
        "hooks_cells_s": hooks_s,
        "cold_ratio": (search_s + hooks_s) / (capture_s + replays[0]),
        "replay_ratio": hooks_s / replay_s,
        "ceiling_s": ceiling_s,
        "replay_percent_of_ceiling": 100 * ceiling_s / replay_s,
        "peak_bytes": {what: peak_of(what, args) for what in ("imports", "model", "late")},
        "bytes_per_event_raw": summary["state_bytes"]["raw"] / len(events),
        "bytes_per_event_stored": summary["state_bytes"]["stored"] / len(events),
        "threads": torch.get_num_threads(),
    }
    print_table(result)
    print_result("run", result)
    return 0


def warm_up(models: dict[str, Any], ids: list[int]) -> None:
    """Touch every weight, so that no timing includes reading them from disk."""
    with torch.no_grad():
        for model in models.values():
            model(input_ids=torch.tensor([ids]))


def check_equal(
    store: Store,
    cells: Any,
    ids: list[str],
    found: list[HookEvent | None],
    margins: list[dict[tuple[str, str, str], float]],
    tolerance: float,
) -> None:
    """Same events, and every margin within ``tolerance``; exits otherwise."""
    token_ids, offsets = store.token_ids()
    ours = {
        event["prompt_id"]: (token_ids[offsets[i] : offsets[i + 1]].tolist(), event["y_pt"], event["y_it"])
        for i, event in enumerate(store.events.to_pylist())
    }
    theirs = {name: (event.ids, event.y_pt, event.y_it) for name, event in zip(ids, found, strict=True) if event}
    if ours != theirs:
        differ = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        sys.exit(f"events differ from those of the hooks: {differ}")
    of_prompt = dict(zip(theirs, margins, strict=True))
    worst = max(
        abs(cell["margin"] - of_prompt[cell["prompt_id"]][cell["upstream"], cell["late"], cell["readout"]])
        for cell in cells.to_pylist()
    )
    if not worst <= tolerance:
        sys.exit(f"a margin differs from the hooks' by {worst}, allowed {tolerance}")
    print(f"{len(ours)} events and {cells.num_rows} cells equal to the hooks'; largest difference {worst:.2e}")


def late_multiply_adds(lates: dict[str, LateStack], n_tokens: int) -> float:
    """Of all matrices of the late blocks, for ``n_tokens`` through each late stack."""
    return float(sum(n_tokens * matrix.numel() for late in lates.values() for matrix in matrices(late)))


def matmul_rate(lates: dict[str, LateStack], dtype: torch.dtype, n_tokens: int) -> float:
    """Multiply-adds a second of a plain matrix product with the late blocks' largest matrix, best of several."""
    weight = max(matrices(next(iter(lates.values()))), key=torch.Tensor.numel)
    weight = torch.randn(weight.shape).to(dtype)
    rows = torch.randn(min(n_tokens, 2048), weight.shape[1]).to(dtype)
    best = min(timed(lambda: torch.nn.functional.linear(rows, weight))[0] for _ in range(20))
    return rows.shape[0] * weight.numel() / best


def matrices(late: LateStack) -> list[torch.Tensor]:
    """Every matrix of the late blocks."""
    return [parameter for block in late.blocks for parameter in block.parameters() if parameter.ndim == 2]


def peak_of(what: str, args: argparse.Namespace) -> int:
    """Peak resident bytes of a fresh process that loads and runs ``what``."""
    given = [f"--{name}={getattr(args, name)}" for name in ("pt", "it", "prompts", "boundary", "dtype")]
    child = [sys.executable, __file__, *given, f"--peak-of={what}"]
    return int(subprocess.run(child, check=True, capture_output=True, text=True).stdout)


def print_peak(args: argparse.Namespace) -> int:
    """In a child: load the whole model, the late stack, or nothing; run 64 tokens; print the peak."""
    dtype = DTYPES[args.dtype]
    lineup = Lineup.open({"pt": args.pt})
    (boundary,) = parse_boundaries(args.boundary, lineup.n_blocks)
    if args.peak_of == "model":
        model = lineup.checkpoints["pt"].load(dtype)
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 64, dtype=torch.int64), logits_to_keep=1)
    elif args.peak_of == "late":
        late = LateStack.load(args.pt, boundary, dtype=dtype)
        late.readout.top2(late.run(torch.zeros(64, late.width, dtype=dtype), [0, 64]))
    # Not getrusage: its peak is inherited from the process that forked this one.
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024)  # type: ignore[index]
    return 0


def print_table(result: dict[str, Any]) -> None:
    """For people."""
    peak = {name: value / 1e6 for name, value in result["peak_bytes"].items()}
    print(
        f"\n{result['events']} events of {result['prompts']} prompts, {result['tokens']} tokens, boundary "
        f"{result['boundary']} of {result['blocks']}, {result['dtype']}, {result['threads']} threads\n\n"
        f"                          hooks, batch 1     actcache     ratio\n"
        f"cold run                  {result['hooks_search_s'] + result['hooks_cells_s']:12.2f} s "
        f"{result['capture_s'] + result['replay_s']:10.2f} s {result['cold_ratio']:8.2f}x\n"
        f"four cells, replay only   {result['hooks_cells_s']:12.2f} s {result['replay_s']:10.2f} s "
        f"{result['replay_ratio']:8.2f}x\n\n"
        f"replay: {result['replay_percent_of_ceiling']:.0f}% of the ceiling (late multiply-adds at the machine's "
        f"matrix product rate: {result['ceiling_s']:.2f} s)\n"
        f"peak memory: whole model {peak['model']:.0f} MB, late stack {peak['late']:.0f} MB, imports alone "
        f"{peak['imports']:.0f} MB\n"
        f"stored: {result['bytes_per_event_raw'] / 1e3:.1f} kB an event raw, "
        f"{result['bytes_per_event_stored'] / 1e3:.1f} kB compressed"
    )


if __name__ == "__main__":
    sys.exit(main())
