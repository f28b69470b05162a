"""An object store that misbehaves: faults that a store has to bear, and promises that it cannot do without."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from obstore.exceptions import AlreadyExistsError, GenericError

from actcache.testing.clock import Clock
from actcache.testing.faults import Faults
from actcache.testing.memory import Got, Listed, MemoryObjects, folded

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PROMISES = {
    "conditions": "a put on condition that nothing is there replaces what is there",
    "listings": "a listing shows what there was some calls ago",
    "durability": "a put is answered, and its object is not there",
    "wholeness": "half of an object is there, put on condition or not",
    "bits": "a read gives another byte than was put",
}
"""What a server breaks that no store can stand on, by the name of the promise: a check has to find it."""

_Later: TypeAlias = "list[tuple[int, Callable[[], object]]]"  # when, and what
_History: TypeAlias = "list[tuple[int, Sequence[dict[str, Any]]]]"
_SHARE_BROKEN = 0.2  # of the puts or reads that a promise is about
_CALL_S, _TIMEOUT_S = 0.02, 30.0


class SimulatedObjects:
    """The methods of an obstore store, with faults; ``open_store`` and ``StoreWriter`` take it for one.

    Attributes:
        faults: which calls go wrong, and how.
        inner: the objects themselves, for what bypasses the faults; a real server's, to have it meet them too.
        clock: goes on with every call.
        late_calls: calls until a ``late`` put is done.
        busy_s: seconds for which a server is ``busy``.
        broken: promises of :data:`PROMISES` that are not kept.
        lists_late: a listing that is broken shows what there was so many calls ago.
    """

    def __init__(
        self,
        faults: Faults | None = None,
        inner: MemoryObjects | ObjectStore | None = None,
        clock: Clock | None = None,
        *,
        late_calls: int = 40,
        busy_s: float = 3.0,
        broken: Iterable[str] = (),
        lists_late: int = 40,
    ) -> None:
        """With these attributes; None is a new one of its kind: no faults, no objects, a clock at its beginning."""
        self.faults, self.clock = faults or Faults(), clock or Clock()
        self.inner: MemoryObjects | ObjectStore = MemoryObjects() if inner is None else inner
        self.late_calls, self.busy_s, self.broken, self.lists_late = late_calls, busy_s, set(broken), lists_late
        self._later: _Later = []
        self._history: _History = []
        self._n_calls, self._busy_until = 0, 0.0
        self._lock = threading.RLock()
        self._rng = random.Random(self.faults.seed)  # of broken promises
        if isinstance(self.inner, MemoryObjects):
            self.inner.clock = self.clock

    def put(
        self, path: str, file: bytes, *, mode: str | dict[str, Any] = "overwrite", use_multipart: bool | None = None
    ) -> Any:
        """As obstore's."""
        if "conditions" in self.broken:
            mode = "overwrite"
        if self._breaks("durability"):
            return {"e_tag": None, "version": None}
        if self._breaks("wholeness"):
            file = file[: len(file) // 2]

        def put(data: bytes = file) -> Any:
            return self.inner.put(path, data, mode=mode, use_multipart=use_multipart)  # type: ignore[arg-type]

        def tear() -> None:
            if may_tear(mode, use_multipart):
                put(file[: len(file) // 2])

        return self._call("put", path, put, tear)

    def get(self, path: str) -> Any:
        """As obstore's."""
        found = self._call("get", path, lambda: self.inner.get(path))
        return Got(_changed(bytes(found.bytes())), found.meta) if self._breaks("bits") else found

    def get_ranges(self, path: str, *, starts: Sequence[int], ends: Sequence[int]) -> Any:
        """As obstore's."""
        found = self._call("get", path, lambda: self.inner.get_ranges(path, starts=starts, ends=ends))
        return [_changed(bytes(part)) for part in found] if self._breaks("bits") else found

    def head(self, path: str) -> Any:
        """As obstore's."""
        return self._call("head", path, lambda: self.inner.head(path))

    def list(self, prefix: str = "") -> Any:
        """As obstore's."""
        return self._call("list", prefix, lambda: Listed(self._listed(prefix)))

    def list_with_delimiter(self, prefix: str = "") -> Any:
        """As obstore's."""
        return self._call("list", prefix, lambda: folded(prefix, self._listed(prefix)))

    def delete(self, paths: str | Sequence[str]) -> None:
        """As obstore's."""
        first = paths if isinstance(paths, str) else paths[0]
        self._call("delete", first, lambda: self.inner.delete(paths))

    def there(self) -> Sequence[str]:
        """All keys that are there, whatever listings say, in order."""
        return sorted(entry["path"] for entry in self.inner.list("").collect())

    def land(self) -> None:
        """What was to be done later is done now."""
        with self._lock:
            self._land(self._n_calls + self.late_calls)

    def _call(self, method: str, key: str, act: Callable[[], Any], tear: Callable[[], None] | None = None) -> Any:
        with self._lock:
            self._n_calls += 1
            self.clock.sleep(_CALL_S)
            self._land(self._n_calls)
            fault = self.faults.next(method, key)
            if fault == "busy":
                self._busy_until = self.clock.now() + self.busy_s
            if self.clock.now() < self._busy_until:
                raise GenericError(f"{method} of {key}: Server returned non-2xx status code: 503 Slow Down")
            if fault == "twice":
                act()
            elif fault is not None:
                self._fail(fault, method, key, act, tear)
            found = act()
            if "listings" in self.broken and method in ("put", "delete"):
                self._history.append((self._n_calls, [*self.inner.list("").collect()]))
            return found

    def _fail(self, fault: str, method: str, key: str, act: Callable[[], Any], tear: Callable[[], None] | None) -> None:
        """Do what a fault leaves of a call, and raise its error."""
        if fault == "conflict":
            raise AlreadyExistsError(f"{method} of {key}: 409 ConditionalRequestConflict")
        if fault == "late":
            self._later.append((self._n_calls + self.late_calls, act))
        elif fault == "lost":
            act()
        elif fault == "torn" and tear is not None:
            tear()
        if fault == "failed":
            self.clock.sleep(_TIMEOUT_S)
        raise GenericError(f"{method} of {key}: HTTP error: operation timed out")

    def _land(self, now: int) -> None:
        due = [act for at, act in self._later if at <= now]
        self._later = [(at, act) for at, act in self._later if at > now]
        for act in due:
            try:
                act()
            except AlreadyExistsError:  # its condition does not hold any more
                continue

    def _listed(self, prefix: str) -> Sequence[dict[str, Any]]:
        if "listings" not in self.broken:
            return self.inner.list(prefix).collect()  # type: ignore[return-value]
        past = [entries for at, entries in self._history if at <= self._n_calls - self.lists_late]
        entries = past[-1] if past else []
        return [entry for entry in entries if not prefix or entry["path"].startswith(f"{prefix}/")]

    def _breaks(self, promise: str) -> bool:
        return promise in self.broken and self._rng.random() < _SHARE_BROKEN


def may_tear(mode: str | dict[str, Any], use_multipart: bool | None) -> bool:
    """Whether half of a put may be left: not of one on a condition, nor of one that is sent by a single request."""
    return mode == "overwrite" and use_multipart is not False


def _changed(data: bytes) -> bytes:
    """The same but for one bit."""
    return data[:-1] + bytes([data[-1] ^ 1]) if data else data
