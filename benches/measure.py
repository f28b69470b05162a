"""What every bench does: time, the machine's own ceilings, and one line of JSON at the end."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actcache.replay.workers import share_threads, side_by_side

PACKAGES = (
    "actcache",
    "torch",
    "transformers",
    "numpy",
    "zarr",
    "numcodecs",
    "tensorstore",
    "zarrs",
    "safetensors",
    "nnsight",
    "transformer-lens",
)
LIMIT = "limit"

# What torch ships to multiply rows by a weight, as a linear layer does.
LINEAR: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"torch": torch.nn.functional.linear}
if torch.backends.mkldnn.is_available():
    LINEAR["oneDNN"] = lambda rows, weight: torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def in_turn(
    runs: Mapping[str, Callable[[], Any]],
    repeat: int,
    before: Callable[[str], object] = lambda name: None,
    *,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each run, ``repeat`` times round and round, so that what disturbs the machine disturbs all alike.

    Each is run once before, untimed, unless ``warm_up`` is off; ``before(name)`` is called ahead of every run, untimed.
    """
    for name, run in runs.items() if warm_up else ():
        before(name)
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeat):
        for name, run in runs.items():
            before(name)
            seconds[name].append(timed(run)[0])
    return seconds


def median(seconds: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(seconds)


def copy_rate(n_bytes: int = 2**28, repeat: int = 5) -> float:
    """Bytes per second of a plain copy in memory, best of some: what no reader on this machine can exceed by much."""
    source = np.ones(n_bytes, np.uint8)
    target = np.zeros(n_bytes, np.uint8)
    return n_bytes / min(timed(lambda: np.copyto(target, source))[0] for _ in range(repeat))


@dataclass(frozen=True)
class Work:
    """Matrix products: each of ``packs`` (numbers of rows) with each of ``matrices`` (n_in, n_out), ``times`` over."""

    matrices: Counter[tuple[int, int]]
    packs: Sequence[int]
    times: int = 1

    @property
    def n_products(self) -> int:
        """Multiply-adds."""
        return self.times * sum(self.packs) * sum(n * n_in * n_out for (n_in, n_out), n in self.matrices.items())


class Products:
    """The machine's own rate of matrix products, shape by shape: what no forward on this machine can exceed by much.

    ``sample`` times every expected product, rows times weight, as a linear layer makes it. It does so by torch's usual
    means and by oneDNN, on all threads and as many at once as there are threads, and keeps the best. Call it all
    through a run, in turn with what it bounds, so that fast and slow spells of the machine are in both. What counts is
    the median of a product's samples, as it is of everything else that is timed.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.samples_s: dict[tuple[int, int, int], list[float]] = {}  # rows, n_in, n_out

    def expect(self, works: Iterable[Work]) -> None:
        """Have the products of this work sampled."""
        for work in works:
            for n_in, n_out in work.matrices:
                for rows in work.packs:
                    self.samples_s.setdefault((rows, n_in, n_out), [])

    @torch.no_grad()
    def sample(self) -> None:
        """Time every expected product three times in each of the ways."""
        for (rows, n_in, n_out), samples in self.samples_s.items():
            given, weight = torch.randn(rows, n_in).to(self.dtype), torch.randn(n_out, n_in).to(self.dtype)
            samples.append(min(_fastest(partial(linear, given, weight)) for linear in LINEAR.values()))

    def seconds(self, works: Sequence[Work]) -> tuple[float, float]:
        """How long this work takes at the rates sampled: by the medians, and if every product were the fastest seen."""

        def total(of: Callable[[list[float]], float]) -> float:
            return sum(
                work.times * count * of(self.samples_s[rows, n_in, n_out])
                for work in works
                for (n_in, n_out), count in work.matrices.items()
                for rows in work.packs
            )

        return total(statistics.median), total(min)

    def rates(self) -> dict[str, float]:
        """Multiply-adds per second of every product sampled, by ``rows x n_in x n_out``: the median."""
        return {
            f"{rows}x{n_in}x{n_out}": rows * n_in * n_out / statistics.median(samples)
            for (rows, n_in, n_out), samples in sorted(self.samples_s.items())
        }


def _fastest(product: Callable[[], Any]) -> float:
    """Seconds of one product: the better of one on all threads, and of one on each at once."""
    n_workers, n_threads = share_threads(torch.get_num_threads())
    start = threading.Barrier(n_workers)

    def at_once(_: int) -> Iterator[float]:
        with torch.no_grad():
            product()
            start.wait()
            yield statistics.mean(timed(product)[0] for _ in range(3))

    together = max(side_by_side([at_once] * n_workers, n_workers, n_threads)) / n_workers
    product()
    return min(together, *(timed(product)[0] for _ in range(3)))


@dataclass
class Workload:
    """The same results by several means, and how long each took.

    Attributes:
        name: what is computed.
        unit: what the seconds are of (``run``, ``cell``, ``variant``).
        seconds: by means; actcache among them.
        limit_s: its multiply-adds alone, at the machine's own rate: the median, and the best of the whole run; None
            where it makes none.
        targets: by means, how many times faster actcache must be; for ``limit``, how many times slower it may be.
        spread_s: fastest and slowest of the repeats behind ``seconds``, by means.
    """

    name: str
    unit: str
    seconds: dict[str, float]
    limit_s: tuple[float, float] | None
    targets: dict[str, float]
    spread_s: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        unit: str,
        times: dict[str, list[float]],
        per: dict[str, int],
        limit_s: tuple[float, float] | None,
        targets: dict[str, float],
    ) -> Workload:
        """From the seconds of every repeat, each of which made ``per`` units."""
        return cls(
            name,
            unit,
            {means: median(seconds) / per[means] for means, seconds in times.items()},
            limit_s,
            targets,
            {means: (min(seconds) / per[means], max(seconds) / per[means]) for means, seconds in times.items()},
        )

    @property
    def ratios(self) -> dict[str, float]:
        """How many times longer than actcache each of the others took."""
        ours = self.seconds["actcache"]
        return {means: seconds / ours for means, seconds in self.seconds.items() if means != "actcache"}

    @property
    def percent_of_limit(self) -> tuple[float, float] | None:
        """100 where actcache takes no longer than the bare multiply-adds: at the median rates, and at the best ones."""
        if self.limit_s is None:
            return None
        median_s, best_s = self.limit_s
        return 100 * median_s / self.seconds["actcache"], 100 * best_s / self.seconds["actcache"]

    def reached(self) -> bool | None:
        """Whether every target was; None where there is none that was measured."""
        met = []
        for means, target in self.targets.items():
            if means == LIMIT and self.limit_s is not None:
                met.append(self.seconds["actcache"] <= target * self.limit_s[0])
            elif means in self.ratios:
                met.append(self.ratios[means] >= target)
        return all(met) if met else None

    def as_json(self) -> dict[str, Any]:
        """Everything, for the last line."""
        about = {"ratios": self.ratios, "percent_of_limit": self.percent_of_limit, "reached": self.reached()}
        return vars(self) | about


def print_workloads(workloads: Sequence[Workload]) -> None:
    """For people: times, how many times longer than actcache each took, targets."""
    means = list(dict.fromkeys(name for workload in workloads for name in workload.seconds))
    head = f"{'':<34}" + "".join(f"{name:>27}" for name in means)
    print(f"\n{head}   {'of the limit (at its best)':>26}   target")
    for workload in workloads:
        line = f"{workload.name:<34}"
        for name in means:
            if name not in workload.seconds:
                line += f"{'':>27}"
                continue
            ratio = f"{workload.ratios[name]:.2f}x" if name in workload.ratios else ""
            line += f"{_readable(workload.seconds[name]) + '/' + workload.unit:>18}{ratio:>9}"
        wanted = ", ".join(
            f"<= {target:g}x the limit" if name == LIMIT else f">= {target:.4g}x {name}"
            for name, target in workload.targets.items()
        )
        answer = {True: ": reached", False: ": missed", None: ""}[workload.reached()]
        percent = "" if workload.percent_of_limit is None else "{:.0f}% ({:.0f}%)".format(*workload.percent_of_limit)
        print(f"{line}   {percent:>26}   {wanted}{answer}".rstrip())


def _readable(seconds: float) -> str:
    """``12.3 s``, ``4.56 ms``, ``78.9 us``."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def print_result(bench: str, result: dict[str, Any]) -> None:
    """The last line: the figures, with the machine, versions and commit that they belong to."""
    about = {
        "machine": _processor(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
    }
    print(json.dumps({"bench": bench} | result | about))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of the checkout that the bench lies in, with a mark if it is changed; None where it is not one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
