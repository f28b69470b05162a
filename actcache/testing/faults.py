"""What may go wrong with the calls to an object store, by a seed: so what went wrong goes wrong again."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from zlib import crc32

KINDS = {
    "lost": "it is done, but the answer is an error",
    "twice": "it is done, and sent again by the client: 412, it exists",
    "late": "the answer is an error; it is done after some further calls, behind what is put meanwhile",
    "failed": "the answer is a time-out, and it is never done",
    "torn": "the answer is an error; half is there of a put without a condition that may go in several requests",
    "conflict": "409: not done, send it again",
    "busy": "503, slow down: neither this nor any other call is done for some seconds",
}
"""Faults of calls that a store has to bear, by name."""

OF_READS = ("failed", "busy")  # those that a call has which changes nothing
OF_DELETES = ("lost", *OF_READS)
_TOKEN = re.compile(r"\b[0-9a-f]{12,16}\b")


def without_tokens(key: str) -> str:
    """A key with ``*`` for each random token in it."""
    return _TOKEN.sub("*", key)


_COUNTING = threading.Lock()  # one for all, so that faults are plain data


@dataclass(eq=False)
class Faults:
    """Which calls meet which fault.

    Attributes:
        seed: of the random ones. The fault of a call depends on it, on method and key, and on how often both were
            asked for: so threads that run in another order meet the same faults.
        rates: the share of calls that meet each of :data:`KINDS`, by name; a twentieth of it for keys with more than
            one slash. Those are the files of segments, of which there are many.
        planned: the faults of the next calls, which go before random ones, by ``(method, key)`` or
            ``(method, "/end of the key")``; a random token in a key is ``*``. Methods are ``put``, ``get``, ``head``,
            ``list`` and ``delete``.
        met: how often each was met.
    """

    seed: int = 0
    rates: Mapping[str, float] = field(default_factory=dict)
    planned: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    met: Counter[str] = field(default_factory=Counter)
    _made: Counter[tuple[str, str]] = field(default_factory=Counter)

    def next(self, method: str, key: str) -> str | None:
        """The fault of this call, if it meets one."""
        if not self.planned and not self.rates:
            return None
        with _COUNTING:
            key = without_tokens(key)
            fault = self._planned(method, key) or self._drawn(method, key)
            if fault is not None:
                self.met[fault] += 1
            return fault

    def _planned(self, method: str, key: str) -> str | None:
        for (planned_method, end), faults in self.planned.items():
            if method == planned_method and (key == end or (end[0] == "/" and key.endswith(end))) and faults:
                return faults.pop(0)
        return None

    def _drawn(self, method: str, key: str) -> str | None:
        self._made[method, key] += 1
        at = crc32(f"{self.seed} {method} {key} {self._made[method, key]}".encode()) / 2**32
        at *= 20 if key.count("/") > 1 else 1
        for fault, rate in self.rates.items():
            if at < rate:
                known = KINDS if method == "put" else OF_DELETES if method == "delete" else OF_READS
                return fault if fault in known else None
            at -= rate
        return None
