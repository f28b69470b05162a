"""Linear layers in float32: the native core's matrix tiles beside torch's product and oneDNN's, results compared first.

    python benches/bench_linear.py [--shapes 576x192,576x576,576x1536,1536x576 --rows 64,128,256,1024]
                                   [--stored-as bfloat16]

Shown are G multiply-adds per second of every number of rows with every n_in x n_out (the defaults are a SmolLM2
block's), and their share of a ceiling. That is the rate at matrices of 2048 x 2048: of float32, torch's or oneDNN's,
whichever is faster; for tiles, a sixth of torch's of bfloat16, as they make six such products for one of float32 (three
where the weights were stored as bfloat16, five for float16). All of these take turns, and medians are taken. How near
each comes to the sums in float64: the root of the mean squared difference, over that of the sums themselves. Without
tiles only torch and oneDNN are measured. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from measure import LINEAR, in_turn, median, print_result

from actcache.models.linear import describe_products, linear_in_core, tiles_are_there

PRODUCTS = {"float32": 6, "float16": 5, "bfloat16": 3}  # of bfloat16, for one of float32, by what the weights were
TOLERANCE = 1e-6  # of the size of the sums


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="576x192,576x576,576x1536,1536x576", help="n_in x n_out (%(default)s)")
    parser.add_argument("--rows", default="64,128,256,1024", help="numbers of rows (%(default)s)")
    parser.add_argument("--stored-as", choices=list(PRODUCTS), default="float32", help="the weights (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="%(default)s")
    parser.add_argument("--repeat", type=int, default=25, help="rounds (%(default)s)")
    parser.add_argument("--ceiling-size", type=int, default=2048, help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="a second's worth, to see that it runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.shapes, args.rows, args.repeat, args.ceiling_size = "40x70,70x40", "33", 2, 64
    torch.set_num_threads(args.threads)
    print(describe_products(), file=sys.stderr)
    tables = []
    for n_rows in map(int, args.rows.split(",")):
        for n_in, n_out in (map(int, shape.split("x")) for shape in args.shapes.split(",")):
            ways = measure(n_rows, n_in, n_out, args.stored_as, args.repeat, args.ceiling_size)
            tables.append({"rows": n_rows, "n_in": n_in, "n_out": n_out, "ways": ways})
            print_table(tables[-1])
    about = {"stored_as": args.stored_as, "threads": args.threads, "repeat": args.repeat}
    print_result("linear", {"products": tables, **about, "in_packs": describe_products()})
    return 0


@torch.no_grad()
def measure(
    n_rows: int, n_in: int, n_out: int, stored_as: str, repeat: int, ceiling_size: int
) -> dict[str, dict[str, Any]]:
    """Rates and errors of each way to one product. Exits where a result is not the product."""
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, n_in, generator=generator) for n in (n_rows, n_out))
    weight = weight.to(getattr(torch, stored_as)).float()
    ways = {name: partial(way, rows, weight) for name, way in LINEAR.items()}
    if tiles_are_there():
        ways["tiles"] = partial(linear_in_core, rows, weight, None)
    truth = rows.double() @ weight.double().t()
    size = truth.square().mean()
    errors = {name: ((way() - truth).square().mean() / size).sqrt().item() for name, way in ways.items()}
    if not max(errors.values()) <= TOLERANCE:
        sys.exit(f"results differ from the product: {errors}, allowed {TOLERANCE}")
    large = torch.randn(ceiling_size, ceiling_size, generator=generator)
    ceilings = {f"{name}, large": partial(way, large, large) for name, way in LINEAR.items()}
    ceilings["bfloat16, large"] = partial(LINEAR["torch"], large.bfloat16(), large.bfloat16())
    seconds = in_turn(ways | ceilings, repeat)
    most = {name: ceiling_size**3 / median(seconds[name]) for name in ceilings}
    of_tiles = most.pop("bfloat16, large") / PRODUCTS[stored_as]
    of_float32 = max(most.values())
    n_products = n_rows * n_in * n_out
    table: dict[str, dict[str, Any]] = {}
    for name in ways:
        rate = n_products / median(seconds[name])
        table[name] = {
            "multiply_adds_per_s": rate,
            "spread": [n_products / max(seconds[name]), n_products / min(seconds[name])],
            "times_torch": median(seconds["torch"]) / median(seconds[name]),
            "percent_of_ceiling": 100 * rate / (of_tiles if name == "tiles" else of_float32),
            "error": errors[name],
        }
    return table


def print_table(table: dict[str, Any]) -> None:
    """For people."""
    title = f"{table['rows']} rows, {table['n_in']} x {table['n_out']}"
    print(f"\n{title:26}{'G/s':>7} {'(spread)':>13} {'of torch':>9} {'of the ceiling':>15} {'error':>9}")
    for name, way in table["ways"].items():
        low, high = (rate / 1e9 for rate in way["spread"])
        print(
            f"{name:26}{way['multiply_adds_per_s'] / 1e9:7.1f} {f'{low:.0f}-{high:.0f}':>13}"
            f" {way['times_torch']:8.2f}x {way['percent_of_ceiling']:14.0f}% {way['error']:9.1e}"
        )


if __name__ == "__main__":
    sys.exit(main())
