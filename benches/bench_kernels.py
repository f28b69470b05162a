"""The native core's kernels beside short rivals that torch ships, on a whole replay of a store.

    python benches/bench_kernels.py --pt pairs/smollm2/pt --it pairs/smollm2/it --prompts benches/prompts_smollm2.jsonl

A run replays all four (upstream, late) cells of every event, reading included. Its parts are exchanged one at a time:

    packed attention    one call of the core per pack and block; beside it
                        right-padded   a pack's sequences padded to the longest, and one causal call of torch's
                                       scaled_dot_product_attention
                        one by one     the model's own attention for each sequence, as without a native core
    matrix tiles        the core's linear layers, where the CPU has tiles (Intel's AMX); beside them torch's

Margins are compared first. Then all take turns; shown are medians, and how many times longer a run takes with the
rival, by the clock and by the CPU time of this process, which other load disturbs less. A kernel is worth its code
where every rival takes 3% more; one that is not, on Intel with AMX and on AMD alike, shall go. The last line of stdout
is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import Workload, in_turn, median, print_result, print_workloads
from study import TOLERANCE, Ours, Study, add_pair_arguments

from actcache.capture.settings import parse_boundaries
from actcache.models import linear, packing
from actcache.models.linear import describe_products, tiles_are_there

WORTH = 1.03  # times that a rival must take at least

TOLD = "a replay with {rival} takes {times:.3f} times as long, and {cpu_times:.3f} times the CPU time"

Exchanged = Callable[[], AbstractContextManager[Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_arguments(parser)
    parser.add_argument("--boundary", default="0.6", help="%(default)s")
    parser.add_argument("--repeat", type=int, default=7, help="rounds (%(default)s)")
    args = parser.parse_args(argv)
    if args.dtype != "float32":
        parser.error("the core's kernels compute float32")
    if args.smoke:
        args.repeat = 1
    study = Study.open(args)
    (boundary,) = parse_boundaries(args.boundary, study.n_blocks)
    rivals: dict[str, dict[str, Exchanged]] = {
        "packed attention": {
            "right-padded": lambda: mock.patch.object(packing, "attend_in_core", attend_padded),
            "one by one": lambda: mock.patch.object(packing, "takes_core", takes_nothing),
        }
    }
    if tiles_are_there():
        rivals["matrix tiles"] = {"torch": lambda: mock.patch.object(linear, "_fastest_means", takes_nothing)}
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as scratch:
        ours = Ours(study, study.capture(Path(scratch) / "store", [boundary]))
        worst = compare(ours, boundary, rivals)
        workloads, cpu_s = measure(ours, boundary, rivals, args.repeat)
        n_tokens = len(ours.store.token_ids()[0])
        n_events = len(ours.store)
    print_workloads(workloads)
    kernels = [row for workload in workloads for row in rows_of(workload, cpu_s)]
    if not tiles_are_there():
        kernels.append({"kernel": "matrix tiles", "not_measured": "this CPU has none"})
    for one in kernels:
        print(f"{one['kernel']}: {one.get('not_measured') or TOLD.format(**one)}")
    result = {
        "prompts": len(study.prompts),
        "events": n_events,
        "tokens": n_tokens,
        "blocks": study.n_blocks,
        "boundary": boundary,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "repeat": args.repeat,
        "load": {"before": load_before, "after": os.getloadavg()},
        "in_packs": describe_products(),
        "largest_difference": worst,
        "cpu_seconds": cpu_s,
        "workloads": [workload.as_json() for workload in workloads],
        "kernels": kernels,
    }
    print_result("kernels", result)
    return 0


def takes_nothing(*given: Any) -> None:
    """In place of what chooses a kernel. No Mock stands here, which would keep every tensor that it is given."""


def compare(ours: Ours, boundary: int, rivals: dict[str, dict[str, Exchanged]]) -> float:
    """The largest difference between margins by our kernels and by each rival; exits where it is no rounding."""

    def margins() -> torch.Tensor:
        final = ours.replay(boundary, ours.read(boundary))
        return torch.stack([ours.margins(late, boundary, states) for (_, late), states in final.items()])

    attend, calls = packing.attend_in_core, 0

    def counted(*given: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return attend(*given)

    with mock.patch.object(packing, "attend_in_core", counted):
        own, worst = margins(), 0.0
    if not calls:
        sys.exit("the native core attends to no pack of this pair here ('actcache inspect --engine'); no figures")
    for name, exchanged in ((name, how) for of in rivals.values() for name, how in of.items()):
        with exchanged():
            off = float((margins() - own).abs().max())
        if not off <= TOLERANCE["float32"]:
            sys.exit(f"{name}: a margin differs by {off}, allowed {TOLERANCE['float32']}; no figures")
        worst = max(worst, off)
    print(f"{own.numel()} margins equal by all means; largest difference {worst:.1e}", file=sys.stderr)
    return worst


def measure(
    ours: Ours, boundary: int, rivals: dict[str, dict[str, Exchanged]], repeat: int
) -> tuple[list[Workload], dict[str, float]]:
    """A whole replay by our kernels, and with each of them exchanged for each of its rivals; and the median CPU time of
    each."""
    means: dict[str, Exchanged] = {"actcache": nullcontext}
    means |= {name: how for of in rivals.values() for name, how in of.items()}
    cpu_s: dict[str, list[float]] = {name: [] for name in means}

    def run(name: str) -> None:
        start = time.process_time()
        with means[name]():
            ours.replay(boundary, ours.read(boundary))
        cpu_s[name].append(time.process_time() - start)

    seconds = in_turn({name: partial(run, name) for name in means}, repeat)
    workloads = []
    for kernel, of in rivals.items():
        times = {name: seconds[name] for name in ("actcache", *of)}
        workloads.append(Workload.of(kernel, "replay", times, dict.fromkeys(times, 1), None, dict.fromkeys(of, WORTH)))
    return workloads, {name: median(of[1:]) for name, of in cpu_s.items()}  # the first was to warm up


def rows_of(workload: Workload, cpu_s: dict[str, float]) -> list[dict[str, Any]]:
    """One kernel beside each rival: how many times longer a replay takes with the rival."""
    return [
        {"kernel": workload.name, "rival": rival, "times": times, "cpu_times": cpu_s[rival] / cpu_s["actcache"]}
        for rival, times in workload.ratios.items()
    ]


# ---- attention within a pack, right-padded ----


def attend_padded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: Sequence[int],
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """What :func:`actcache.models.packing.attend_in_core` computes, by one call of torch's attention."""
    shape, index, mask = _padding(tuple(bounds), window)

    def padded(one: torch.Tensor) -> torch.Tensor:
        rows = one[0].transpose(0, 1)  # [T, H, d]
        out = rows.new_zeros(shape[0] * shape[1], *rows.shape[1:])
        out[index] = rows
        return out.view(*shape, *rows.shape[1:]).transpose(1, 2)

    attended = torch.nn.functional.scaled_dot_product_attention(
        padded(query),
        padded(key),
        padded(value),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.transpose(1, 2).flatten(0, 1)[index][None]


@lru_cache(maxsize=16)
def _padding(bounds: tuple[int, ...], window: int | None) -> tuple[tuple[int, int], torch.Tensor, torch.Tensor | None]:
    """Number and length of the padded sequences, where each row lies among them, and a mask where there is a window."""
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    longest = max(lengths)
    index = torch.cat([torch.arange(length) + number * longest for number, length in enumerate(lengths)])
    if window is None:
        return (len(lengths), longest), index, None
    distance = torch.arange(longest)[:, None] - torch.arange(longest)
    return (len(lengths), longest), index, (distance >= 0) & (distance < window)


if __name__ == "__main__":
    sys.exit(main())
