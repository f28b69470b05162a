"""Row gather and scatter on the CPU: same rows, one process, results equal first.

    python benches/bench_gather.py [--rows 4096 --width 4096 --threads 1]

Native core against torch (index_select, index_copy_) and NumPy (take), for rows that are aligned, misaligned by one
element, and strided. GB/s of bf16 rows moved, and their share of memcpy of as many bytes, the ceiling, measured in the
same rounds. Medians and spread. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from measure import in_turn, median, print_result

from actcache import native
from actcache.models.gather import gather_rows, scatter_rows

LAYOUTS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "aligned": lambda flat, width: flat[: flat.numel() // width * width].view(-1, width)[:-1],
    "misaligned": lambda flat, width: flat[1 : flat.numel() // width * width - width + 1].view(-1, width),
    "strided": lambda flat, width: flat[: flat.numel() // width * width].view(-1, width)[:-1, ::2],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="of the source; half of them are gathered (%(default)s)")
    parser.add_argument("--width", type=int, default=4096, help="%(default)s")
    parser.add_argument("--threads", type=int, default=1, help="for the core and for torch (%(default)s)")
    parser.add_argument("--repeat", type=int, default=15, help="rounds (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a second's worth, to see that it runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.rows, args.width, args.repeat = 64, 96, 2
    torch.set_num_threads(args.threads)
    core, which = native.native("cpu")
    if core is None:
        sys.exit(f"no native core to measure: {which}")

    generator = torch.Generator().manual_seed(0)
    flat = torch.randint(-(2**15), 2**15, ((args.rows + 2) * args.width,), dtype=torch.int16, generator=generator)
    ids = torch.randperm(args.rows, generator=generator)[: args.rows // 2]
    tables = {}
    for name, layout in LAYOUTS.items():
        tables[name] = measure_ways(layout(flat, args.width).view(torch.bfloat16), ids, args.repeat)
        print_table(f"{name}, {len(ids)} rows of {args.width // (2 if name == 'strided' else 1)} bf16", tables[name])
    result = {
        "layouts": tables,
        "rows": args.rows,
        "width": args.width,
        "threads": args.threads,
        "repeat": args.repeat,
        "engine": which,
        "isa": ["portable", "avx2", "avx512"][core.isa()],
    }
    print_result("gather", result)
    return 0


def measure_ways(src: torch.Tensor, ids: torch.Tensor, repeat: int) -> dict[str, dict[str, Any]]:
    """Rates of each way over the rows of one source. Exits where results differ."""
    shape = (len(ids), src.shape[1])
    words, numpy_ids = src.view(torch.int16), ids.numpy()
    rows, other, plain = (torch.zeros(shape, dtype=torch.bfloat16) for _ in range(3))
    target, expected = torch.zeros_like(src), torch.zeros_like(src)
    target_bytes = np.zeros(shape, np.int16)

    ways: dict[str, Callable[[], Any]] = {
        "gather: actcache": lambda: gather_rows(src, ids, rows),
        "gather: torch.index_select": lambda: torch.index_select(src, 0, ids, out=other),
        "gather: numpy.take": lambda: np.take(words.numpy(), numpy_ids, axis=0, out=target_bytes, mode="clip"),
        "scatter: actcache": lambda: scatter_rows(rows, ids, target),
        "scatter: torch.index_copy_": lambda: expected.index_copy_(0, ids, rows),
        "memcpy": lambda: ctypes.memmove(plain.data_ptr(), rows.data_ptr(), 2 * rows.numel()),
    }
    for way in ways.values():
        way()
    same = [
        torch.equal(rows.view(torch.int16), words[ids]),
        torch.equal(other.view(torch.int16), words[ids]),
        np.array_equal(target_bytes, words.numpy()[numpy_ids]),
        torch.equal(target.view(torch.int16), expected.view(torch.int16)),
    ]
    if not all(same):
        sys.exit(f"results differ: {same}")
    seconds = in_turn(ways, repeat)
    n_bytes, ceiling_s = rows.numel() * 2, median(seconds["memcpy"])
    return {
        name: {
            "gb_s": n_bytes / median(taken) / 1e9,
            "spread": [n_bytes / max(taken) / 1e9, n_bytes / min(taken) / 1e9],
            "percent_of_memcpy": 100 * ceiling_s / median(taken),
        }
        for name, taken in seconds.items()
    }


def print_table(title: str, table: dict[str, dict[str, Any]]) -> None:
    """For people."""
    print(f"\n{title:44}{'GB/s':>8} {'(spread)':>14} {'of memcpy':>10}")
    for name, row in table.items():
        low, high = row["spread"]
        print(f"{name:44}{row['gb_s']:8.2f} {f'{low:.2f}-{high:.2f}':>14} {row['percent_of_memcpy']:9.0f}%")


if __name__ == "__main__":
    sys.exit(main())
