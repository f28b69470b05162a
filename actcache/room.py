"""Room: how many bytes this process may still take, of the machine's memory or of a device's; and room given back.

Knows the operating system's limits; loads torch only for a device.
"""

from __future__ import annotations

import gc
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from actcache.cgroups import MEMBERSHIPS, MOUNTED, groups_of

_MEMINFO = Path("/proc/meminfo")


def free_bytes(device: str = "cpu") -> float:
    """What is free on a device (``cpu``, ``cuda``, ``cuda:1``); infinite where nobody says."""
    if device.partition(":")[0] == "cuda":
        import torch

        return float(torch.cuda.mem_get_info(torch.device(device))[0])
    return free_memory(_MEMINFO, MEMBERSHIPS, MOUNTED)


class Loads:
    """Large objects that are loaded and let go, again and again, and freed at once whatever refers to one another among
    them. Objects older than a load are not looked at, which may take longer than the load: they are frozen meanwhile.
    """

    def begin(self) -> None:
        """Call it before a load."""
        gc.freeze()

    def give_back(self) -> None:
        """Free what was loaded since the last :meth:`begin` and is let go, and what torch keeps of devices' memory."""
        gc.collect()
        gc.unfreeze()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __del__(self) -> None:
        gc.unfreeze()


def free_memory(meminfo: Path, memberships: Path, mounted: Path) -> float:
    """Bytes of memory that are available, within what control groups leave (arguments as in :mod:`actcache.cgroups`).

    Args:
        meminfo: a file like ``/proc/meminfo``.
        memberships, mounted: see :func:`actcache.cgroups.groups_of`.
    """
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    except OSError:
        found = None
    available = math.inf if found is None else 1024.0 * int(found[1])
    left = (left for group in groups_of("memory", memberships, mounted) for left in _left_of(group))
    return min([available, *left])


def _left_of(group: Path) -> Iterator[float]:
    """What a group may still take; pages of files that it has read or written can be dropped, and do not count."""
    version_1 = (group / "memory.limit_in_bytes").is_file()
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version_1 else ("memory.max", "memory.current")
    try:
        most, used = ((group / name).read_text().strip() for name in names)
        if most == "max":
            return
        stat = (group / "memory.stat").read_text()
        files = re.search(r"^(?:total_)?inactive_file (\d+)", stat, re.MULTILINE)
        yield float(max(0, int(most) - int(used) + (int(files[1]) if files else 0)))
    except (OSError, ValueError):  # no such group here
        return
