"""The object store as one process of a schedule sees it: others act between any two of its calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actcache.testing.faults import without_tokens
from actcache.testing.memory import Listed, folded
from actcache.testing.objects import SimulatedObjects, may_tear
from actcache.testing.schedule import Killed, Process

_SHARE_SLOW = 0.3  # of the listings


class ProcessObjects:
    """The methods of an obstore store, with a turn before each call, and one more before a process learns of a put.

    A listing may be *slow*: it comes in pages, and of what others put or delete meanwhile it has what happened to the
    pages that were still to come. Where a process is killed, half of what it put without a condition may be there.
    """

    def __init__(self, objects: SimulatedObjects, process: Process) -> None:
        self.objects, self.process = objects, process

    def put(self, path: str, file: bytes, **options: Any) -> Any:
        """As obstore's."""
        was_dead = self.process.dead
        try:
            self._turn(f"put {path}")
        except Killed:
            torn = may_tear(options.get("mode", "overwrite"), options.get("use_multipart"))
            if torn and "torn" in self.objects.faults.rates and not was_dead and self.process.rng.random() < 0.5:
                self.objects.inner.put(path, file[: len(file) // 2])
            raise
        try:
            return self._call("put", path, file, **options)
        finally:
            if not self.process.dead:
                self._turn(f"go on after {path}")

    def get(self, path: str) -> Any:
        """As obstore's."""
        self._turn(f"get {path}")
        return self._call("get", path)

    def get_ranges(self, path: str, **ranges: Sequence[int]) -> Any:
        """As obstore's."""
        self._turn(f"get_ranges {path}")
        return self._call("get_ranges", path, **ranges)

    def head(self, path: str) -> Any:
        """As obstore's."""
        self._turn(f"head {path}")
        return self._call("head", path)

    def list(self, prefix: str = "") -> Any:
        """As obstore's."""
        return Listed(self._pages(prefix))

    def list_with_delimiter(self, prefix: str = "") -> Any:
        """As obstore's."""
        return folded(prefix, self._pages(prefix))

    def delete(self, paths: Any) -> None:
        """As obstore's."""
        self._turn(f"delete {paths}")
        self._call("delete", paths)

    def _pages(self, prefix: str) -> Sequence[dict[str, Any]]:
        self._turn(f"list {prefix}")
        found = self._call("list", prefix).collect()
        rng = self.process.rng
        if found and rng.random() < _SHARE_SLOW:
            self.process.end_turn()
            self._turn(f"list {prefix}, the rest")
            last = rng.choice(found)["path"]
            rest = self._call("list", prefix).collect()
            found = [*(one for one in found if one["path"] <= last), *(one for one in rest if one["path"] > last)]
        if rng.random() < 0.5:
            self.process.end_turn()  # so that others act before it reads what it has found
        return found

    def _turn(self, what: str) -> None:
        self.process.turn(without_tokens(what))

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        n_met = self.objects.faults.met.total()
        try:
            return getattr(self.objects, method)(*args, **options)
        finally:
            if self.objects.faults.met.total() > n_met:
                self.process.schedule.trace.append(f"{self.process.role}: which goes wrong")
