"""What every bench does: time, the machine's own ceilings, and one line of JSON at the end."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("actcache", "torch", "transformers", "numpy", "zarr", "numcodecs", "tensorstore", "zarrs", "safetensors")


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def in_turn(
    runs: dict[str, Callable[[], Any]], repeat: int, before: Callable[[str], object] = lambda name: None
) -> dict[str, list[float]]:
    """Seconds of each run, ``repeat`` times round and round, so that what disturbs the machine disturbs all alike.

    Each is run once before, untimed; so is ``before(name)`` ahead of every run.
    """
    for name, run in runs.items():
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
    """Bytes a second of a plain copy in memory, best of some: what no reader on this machine can exceed by much."""
    source = np.ones(n_bytes, np.uint8)
    target = np.zeros(n_bytes, np.uint8)
    return n_bytes / min(timed(lambda: np.copyto(target, source))[0] for _ in range(repeat))


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
