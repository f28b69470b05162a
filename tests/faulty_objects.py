"""An object store with faults, behind the methods of obstore's: seeded, so that what went wrong goes wrong again."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from obstore.exceptions import AlreadyExistsError, GenericError
from obstore.store import MemoryStore

FAULTS = {
    "lost": "it is done, but the answer is an error",
    "late": "the answer is an error; it is done after some further calls",
    "failed": "the answer is an error, and it is never done",
    "conflict": "409: not done, send it again",
}
TOKEN = re.compile(r"\b[0-9a-f]{12,16}\b")


@dataclass(eq=False)
class FaultyObjects:
    """What :class:`actcache.store.objects.ObjectStorage` calls, over memory.

    Attributes:
        seed: of the random faults. A call's fault depends on it, on the call, its key and how often it was made.
        rates: how often a put meets each of ``FAULTS``, and a get, a listing or a delete ``lost`` or ``failed``; a
            twentieth of that for files of segments, of which there are many.
        planned: the faults of the next calls, which go before random ones, by ``(method, key)`` or
            ``(method, "/end of the key")``; a token in a key is ``*``.
        late_calls: calls until a ``late`` put lands; a writer's tries make fewer.
        ignores_conditions: puts replace what is there, whatever they ask.
        lists_late: a listing shows what there was so many calls ago.
        objects: the memory itself, for what bypasses the faults.
    """

    seed: int = 0
    rates: Mapping[str, float] = field(default_factory=dict)
    planned: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    late_calls: int = 40
    ignores_conditions: bool = False
    lists_late: int = 0
    objects: MemoryStore = field(default_factory=MemoryStore)
    met: Counter[str] = field(default_factory=Counter)
    _made: Counter[tuple[str, str]] = field(default_factory=Counter)
    _later: list[tuple[int, Callable[[], object]]] = field(default_factory=list)
    _history: list[tuple[int, set[str]]] = field(default_factory=list)
    _n_calls: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def put(self, path: str, file: bytes, *, mode: str = "overwrite", use_multipart: bool | None = None) -> Any:
        if self.ignores_conditions:
            mode = "overwrite"
        return self._call("put", path, lambda: self.objects.put(path, file, mode=mode))

    def get(self, path: str) -> Any:
        return self._call("get", path, lambda: self.objects.get(path))

    def get_ranges(self, path: str, *, starts: list[int], ends: list[int]) -> Any:
        return self._call("get", path, lambda: self.objects.get_ranges(path, starts=starts, ends=ends))

    def head(self, path: str) -> Any:
        return self._call("head", path, lambda: self.objects.head(path))

    def list(self, prefix: str) -> Any:
        return self._call("list", prefix, lambda: self.objects.list(prefix))

    def list_with_delimiter(self, prefix: str) -> Any:
        return self._call("list", prefix, lambda: self._listed(prefix))

    def delete(self, paths: list[str]) -> None:
        self._call("delete", paths[0], lambda: self.objects.delete(paths))

    def there(self) -> list[str]:
        """All that is there, whatever listings say."""
        with self._lock:
            return sorted(entry["path"] for entry in self.objects.list().collect())

    def land(self) -> None:
        """What was to be done later is done now."""
        with self._lock:
            self._land(self._n_calls + self.late_calls)

    def _call(self, method: str, key: str, act: Callable[[], Any]) -> Any:
        with self._lock:
            self._n_calls += 1
            self._land(self._n_calls)
            fault = self._fault(method, key)
            if fault is not None:
                self.met[fault] += 1
            if fault == "lost":
                act()
            elif fault == "late":
                self._later.append((self._n_calls + self.late_calls, act))
            elif fault == "conflict":
                raise AlreadyExistsError(f"409 ConditionalRequestConflict: {key}")
            if fault is not None:
                raise GenericError(f"{method} of {key} timed out")
            try:
                return act()
            finally:
                if self.lists_late and method in ("put", "delete"):
                    self._history.append((self._n_calls, set(self.there())))

    def _fault(self, method: str, key: str) -> str | None:
        key = TOKEN.sub("*", key)
        for (planned_method, end), faults in self.planned.items():
            if method == planned_method and (key == end or (end[0] == "/" and key.endswith(end))) and faults:
                return faults.pop(0)
        call = method, key
        self._made[call] += 1
        drawn = hashlib.sha256(repr((self.seed, call, self._made[call])).encode()).digest()
        at = int.from_bytes(drawn[:8], "little") / 2**64 * (20 if key.count("/") > 1 else 1)
        for fault, rate in self.rates.items():
            if at < rate:
                return fault if method == "put" or fault in ("lost", "failed") else None
            at -= rate
        return None

    def _land(self, now: int) -> None:
        due = [act for at, act in self._later if at <= now]
        self._later = [(at, act) for at, act in self._later if at > now]
        for act in due:
            try:
                act()
            except AlreadyExistsError:  # its condition does not hold any more
                continue

    def _listed(self, prefix: str) -> Any:
        found = self.objects.list_with_delimiter(prefix)
        if not self.lists_late:
            return found
        past = [keys for at, keys in self._history if at <= self._n_calls - self.lists_late]
        keys = past[-1] if past else set()
        inside = [key.removeprefix(f"{prefix}/") if prefix else key for key in keys if key.startswith(prefix)]
        folders = {key.partition("/")[0] for key in inside if "/" in key}
        return {"common_prefixes": sorted(folders), "objects": [{"path": key} for key in inside if "/" not in key]}
