"""Control groups of Linux: the folders that say what this process, and those that share its limits, may use."""

from __future__ import annotations

from pathlib import Path

MEMBERSHIPS, MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def groups_of(controller: str, memberships: Path, mounted: Path) -> list[Path]:
    """The groups of a process for a controller (``cpu``, ``memory``), and those that contain them; none where there are
    no groups.

    Args:
        controller: whose groups.
        memberships: a file like ``/proc/self/cgroup``: ``number:controllers:path`` lines.
        mounted: where groups are mounted, those of version 1 by controllers, in folders below it.
    """
    try:
        lines = memberships.read_text().splitlines()
    except OSError:
        return []
    found: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        tops = [mounted] if not controllers else [mounted / controllers, mounted / controller]
        for top in tops:
            group = top / path.lstrip("/")
            # Within a container the path may be that of the host, and the container's own group is what is mounted.
            found += [folder for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return found
