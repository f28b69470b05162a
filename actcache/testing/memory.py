"""An object store in memory, behind the methods of obstore's stores that this package calls."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from obstore.exceptions import AlreadyExistsError, GenericError, PreconditionError

from actcache.testing.clock import Clock


class _Held(NamedTuple):
    """An object: its bytes, which one it is of all that were put, and when it was put, in whole seconds."""

    data: bytes
    number: int
    time_s: int


class Got(NamedTuple):
    """What ``get`` gives."""

    data: bytes
    meta: dict[str, Any]

    def bytes(self) -> bytes:
        """The whole object."""
        return self.data


class Listed(list[dict[str, Any]]):
    """What ``list`` gives."""

    def collect(self) -> list[dict[str, Any]]:
        """All entries."""
        return self


class MemoryObjects:
    """Objects by key. Each call is done at once and whole, also where several threads make them.

    Attributes:
        clock: says when an object was put.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = Clock() if clock is None else clock
        self._held: dict[str, _Held] = {}
        self._n_puts = 0
        self._lock = threading.RLock()

    def __iter__(self) -> Iterator[str]:
        """All keys, in order."""
        with self._lock:
            return iter(sorted(self._held))

    def put(
        self, path: str, file: bytes, *, mode: str | dict[str, Any] = "overwrite", use_multipart: bool | None = None
    ) -> dict[str, Any]:
        """Put an object.

        Args:
            path: its key.
            file: its bytes.
            mode: ``overwrite``; ``create``, on condition that it is not there; or ``{"e_tag": ...}`` of the one that it
                is to replace.
            use_multipart: makes no difference here.

        Raises:
            AlreadyExistsError, PreconditionError: the condition does not hold.
        """
        with self._lock:
            there = self._held.get(path)
            if mode == "create" and there is not None:
                raise AlreadyExistsError(f"Object at location {path} already exists: 412 Precondition Failed")
            if isinstance(mode, dict) and (there is None or mode.get("e_tag") != _tag(there)):
                raise PreconditionError(f"Request precondition failure for path {path}: 412 Precondition Failed")
            self._n_puts += 1
            self._held[path] = put = _Held(bytes(file), self._n_puts, int(self.clock.now()))
            return {"e_tag": _tag(put), "version": None}

    def get(self, path: str) -> Got:
        """An object (FileNotFoundError where there is none)."""
        with self._lock:
            return Got(self._found(path).data, self.head(path))

    def get_ranges(self, path: str, *, starts: Sequence[int], ends: Sequence[int]) -> Sequence[bytes]:
        """Ranges of an object, the last of which may come back short (GenericError where one begins at its end)."""
        data = self._found(path).data
        if any(start >= len(data) for start in starts):
            raise GenericError(f"Server returned non-2xx status code: 416 Range Not Satisfiable: {path}")
        return [data[start:end] for start, end in zip(starts, ends, strict=True)]

    def head(self, path: str) -> dict[str, Any]:
        """Size, tag and time of an object (FileNotFoundError where there is none)."""
        return _entry(path, self._found(path))

    def list(self, prefix: str = "") -> Listed:
        """Every object below a prefix, by key."""
        with self._lock:
            return Listed(_entry(key, self._held[key]) for key in sorted(self._held) if _below(prefix, key))

    def list_with_delimiter(self, prefix: str = "") -> dict[str, Any]:
        """The objects that lie directly below a prefix, and the prefixes of the others."""
        return folded(prefix, self.list(prefix))

    def delete(self, paths: str | Sequence[str]) -> None:
        """Delete objects; no error where one is not there."""
        with self._lock:
            for path in [paths] if isinstance(paths, str) else paths:
                self._held.pop(path, None)

    def _found(self, path: str) -> _Held:
        try:
            return self._held[path]
        except KeyError as error:
            raise FileNotFoundError(f"Object at location {path} not found: 404 Not Found") from error


def folded(prefix: str, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Entries below a prefix as ``list_with_delimiter`` gives them."""
    start = len(prefix) + 1 if prefix else 0
    here = [entry for entry in entries if "/" not in entry["path"][start:]]
    folders = {entry["path"][: entry["path"].index("/", start)] for entry in entries if "/" in entry["path"][start:]}
    return {"common_prefixes": sorted(folders), "objects": here}


def _below(prefix: str, key: str) -> bool:
    return not prefix or key.startswith(f"{prefix}/")


def _tag(held: _Held) -> str:
    return f'"{held.number}"'


def _entry(key: str, held: _Held) -> dict[str, Any]:
    time = datetime.fromtimestamp(held.time_s, UTC)
    return {"path": key, "last_modified": time, "size": len(held.data), "e_tag": _tag(held), "version": None}
