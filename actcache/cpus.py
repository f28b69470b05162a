"""CPUs: how many of them this process may use, and how torch's threads wait for each other.

The operating system's limits, which torch does not ask for: CPUs that a process is bound to, and the quota that a
container or a batch system gives it. Knows no tensors, and never loads torch.
"""

from __future__ import annotations

import math
import os
import sys
from functools import cache
from pathlib import Path

from actcache.cgroups import MEMBERSHIPS, MOUNTED, groups_of


@cache
def usable_cpus() -> int:
    """How many CPUs this process may keep busy: at least 1, at most those that it is bound to and its quota, rounded
    up (cgroups of version 1 and 2, with those that contain them)."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(bound, quota(MEMBERSHIPS, MOUNTED))))


def quota(memberships: Path, mounted: Path) -> float:
    """CPUs' worth of time that the groups of a process may use; infinite where nothing limits it.

    Args:
        memberships, mounted: see :func:`actcache.cgroups.groups_of`.
    """
    return min([math.inf, *map(_limit_of, groups_of("cpu", memberships, mounted))])


def _limit_of(group: Path) -> float:
    try:
        if (group / "cpu.max").is_file():
            most, period = (group / "cpu.max").read_text().split()
        else:
            most, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        limited = most.strip() not in ("max", "-1")
        return int(most) / int(period) if limited else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # no such group here, or a kernel that keeps no quota
        return math.inf


def settle_threads(n_threads: int | None = None) -> None:
    """Have torch's threads be as many as asked for, and sleep while they wait; call it before torch is loaded.

    OpenMP's threads spin while they wait for each other: on a busy machine each spins away the time that the others
    need. What the environment says already (OMP_WAIT_POLICY, OMP_NUM_THREADS) stays, but for a number asked for here.

    Args:
        n_threads: how many; None for what torch takes by itself, or fewer where a quota gives fewer.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if n_threads is None and "OMP_NUM_THREADS" not in os.environ and usable_cpus() < (os.cpu_count() or 1):
        n_threads = usable_cpus()
    if n_threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(n_threads)
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(n_threads)
