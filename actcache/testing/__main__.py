"""Play schedules by their seeds: ``python -m actcache.testing 17``, or ``0:200``, on a simulated store or a disk."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from actcache.testing.places import Disk, ObjectPlace
from actcache.testing.store_schedule import StoreSchedule


def main(argv: Sequence[str] | None = None) -> int:
    """Play the schedules of these seeds, and say how each went."""
    parser = argparse.ArgumentParser(prog="python -m actcache.testing", description=__doc__)
    parser.add_argument("seeds", help="one seed, or FIRST:STOP")
    parser.add_argument("--on", choices=("objects", "disk"), default="objects", help="where the store lies")
    given = parser.parse_args(argv)
    first, _, stop = given.seeds.partition(":")
    for seed in range(int(first), int(stop) if stop else int(first) + 1):
        play(seed, given.on)
    print(f"{given.seeds} on {given.on}: nothing lost, nothing twice, nothing half")
    return 0


def play(seed: int, on: str = "objects") -> list[str]:
    """Play one schedule: what its processes did.

    Args:
        seed: of all that is random.
        on: ``objects``, or ``disk`` for a folder of its own.

    Raises:
        AssertionError: something is not right.
    """
    with tempfile.TemporaryDirectory() as folder:
        schedule = StoreSchedule(seed, Disk(Path(folder)) if on == "disk" else ObjectPlace(seed))
        schedule.run()
        return schedule.trace


if __name__ == "__main__":
    sys.exit(main())
