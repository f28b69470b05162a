"""Claims: several processes share the work of one folder, by small files that say who does what, each for a while.

A claim is a *lease*: it holds until its file is older than ``lease_s``, and its holder writes the file again long
before. There is no lock server. Creating a file that is not there, which every storage promises, decides who gets a
claim that is free. One that ran out is taken over by creating the file of the next number, so again one process wins.
How old a file is, the storage's own clock says: a process compares it with a file that it has written just now. So the
clocks of machines need not agree.

Claims only save work. What comes of it is published whole, and whoever publishes second changes nothing.

``FOLDER/NAME.1``   the first claim of a unit of work; ``NAME.2`` took it over, and so on; the highest number counts
``FOLDER/.now-WHO`` written to learn the storage's time
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from actcache.progress import Told, nobody_told
from actcache.store.storage import Storage

LEASE_S = 60.0
"""How long a claim holds that is not renewed: longer than a process stalls that is well."""

_RENEWALS = 3  # in the time of a lease: two may fail
_RESOLUTION_S = 1.0  # of the times that object stores give
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 5.0
_TRIES = 20  # to create a file in a folder that others make and remove

_CLAIM = re.compile(r"[^.].*\.[0-9]{1,6}")

Unit = TypeVar("Unit")


class Claims:
    """The claims of one process on the units of work of one folder.

    A context: leaving it lets go of all that is held. A process that is killed loses its claims when their lease is
    over, or at once to processes of the same machine, which see that it is gone.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str = "claims",
        *,
        lease_s: float = LEASE_S,
        sleep: Callable[[float], object] = time.sleep,
        renews: bool = True,
    ) -> None:
        """Claim nothing yet.

        Args:
            storage: where the claims lie.
            folder: of the claims, below the storage's root; it is there only while something is claimed.
            lease_s: how long a claim holds unless it is renewed.
            sleep: waits so many seconds, while all that is left is claimed by others.
            renews: whether a thread renews what is held; else :meth:`renew` is the caller's to call.
        """
        self._storage, self._folder, self._lease_s, self._sleep = storage, folder, lease_s, sleep
        self.who = secrets.token_hex(8)
        self._held: dict[str, int] = {}  # number of the claim, by unit
        self._guard = threading.Lock()
        self._renews, self._ended = renews, threading.Event()
        self._thread: threading.Thread | None = None
        self._asked_time = False

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        for name in list(self._held):
            self.let_go(name)
        self._sweep()
        if self._asked_time:
            self._forget(f".now-{self.who}")
        with contextlib.suppress(OSError):
            self._storage.remove_files(self._folder, [])  # the folder itself, if this was the last claim

    @property
    def held(self) -> list[str]:
        """Names of the units that this process has claimed."""
        return sorted(self._held)

    def rounds(
        self,
        units: Sequence[Unit],
        name: Callable[[Unit], str],
        is_done: Callable[[Unit], bool],
        told: Told = nobody_told,
        on_found: Callable[[Unit], object] = lambda unit: None,
    ) -> Iterator[Iterator[Unit]]:
        """Units to do, in rounds: each unit is claimed when it is taken, and let go when it is done.

        A round gives the units that are free, and ends; it never waits. Whoever has done all of these asks for the next
        round, which waits while all that is left is claimed by others. After the last one all units are done.

        Args:
            units: in order.
            name: of each, unlike any other's: letters, digits, ``-``, ``_`` and ``.``.
            is_done: whether what comes of a unit is there, published by whomever, since the caller made this list.
            told: hears for whom this process waits.
            on_found: told of each unit that another process has done.
        """
        left, wait_s, now = list(units), _FIRST_WAIT_S, None
        while left:
            blocked: list[Unit] = []
            mine: dict[str, Unit] = {}
            n_left = len(left)
            free = self._free(left, name, is_done, on_found, blocked, mine, now)
            first = next(free, None)
            if first is not None:
                yield itertools.chain([first], free)
            for own in mine:
                self.let_go(own)
            left = blocked
            if not left:
                return
            told(doing=f"waiting for {len(left)} of {self._holders(left, name)}")
            wait_s = _FIRST_WAIT_S if len(left) < n_left else min(2 * wait_s, _LONGEST_WAIT_S)
            self._sleep(wait_s)
            now = self._now()

    def _free(
        self,
        units: Sequence[Unit],
        name: Callable[[Unit], str],
        is_done: Callable[[Unit], bool],
        on_found: Callable[[Unit], object],
        blocked: list[Unit],
        mine: dict[str, Unit],
        now: float | None,
    ) -> Iterator[Unit]:
        """Those that this process gets, one after another; what it has is in ``mine``, by name, until it is done, and
        what others have in ``blocked``. The last ones may not have been done yet when this ends."""
        for unit in units:
            for done in [own for own, of in mine.items() if is_done(of)]:
                self.let_go(done)
                del mine[done]
            if is_done(unit):
                on_found(unit)
            elif not self.claim(name(unit), now):
                blocked.append(unit)
            elif is_done(unit):  # whoever had it has let it go meanwhile
                self.let_go(name(unit))
                on_found(unit)
            else:
                mine[name(unit)] = unit
                yield unit

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """A context that one process at a time is in: for what is read, changed and written. Waits for the others."""
        for free in self.rounds([name], str, lambda _: False):
            for _ in free:
                yield

    def claim(self, name: str, now: float | None = None) -> bool:
        """Whether this process has the claim of a unit now; never waits.

        Args:
            name: of the unit.
            now: the storage's time, by which the lease of another's claim may be over; None where that is not asked.
        """
        number = 1
        if not self._create(name, number):
            number = self._newest(name)
            if number and not self._is_over(name, number, now):
                return False
            number += 1
            if not self._create(name, number):
                return False
        with self._guard:
            self._held[name] = number
        if self._renews and self._thread is None:
            self._thread = threading.Thread(target=self._keep_renewing, name="actcache-claims", daemon=True)
            self._thread.start()
        return True

    def let_go(self, name: str) -> None:
        """Give a claim back, if this process has it: what comes of the unit is published, or will not be."""
        with self._guard:
            number = self._held.pop(name, 0)
        self._forget(*(f"{name}.{n}" for n in range(1, number + 1)))

    def renew(self) -> None:
        """Write the files of all claims anew; one that is gone, as another process took it over and ended, is lost."""
        with self._guard:
            held = dict(self._held)
        for name, number in held.items():
            with self._guard, contextlib.suppress(OSError):  # the next renewal comes before the lease is over
                if self._held.get(name) != number:
                    continue
                if self._storage.stamp(self._key(name, number)) is None:
                    del self._held[name]
                else:
                    self._storage.put(self._key(name, number), self._record())

    def _keep_renewing(self) -> None:
        while not self._ended.wait(self._lease_s / _RENEWALS):
            self.renew()

    def _sweep(self) -> None:
        """Remove what dead processes left, which no one else might ever ask for: each is taken over, and let go."""
        with contextlib.suppress(OSError):
            left = {file.rpartition(".")[0] for file in self._storage.names(self._folder) if _CLAIM.fullmatch(file)}
            now = self._now() if left else None
            for name in sorted(left):
                if self.claim(name, now):
                    self.let_go(name)

    def _create(self, name: str, number: int) -> bool:
        """Whether this process creates a claim, which nobody has."""
        key = self._key(name, number)
        for _ in range(_TRIES):
            # Another process may let go of the last claim, and of the folder with it, while this one creates the next.
            with contextlib.suppress(FileNotFoundError):
                return self._create_there(key)
        return self._create_there(key)

    def _create_there(self, key: str) -> bool:
        self._storage.make_folder(self._folder)
        try:
            with self._storage.creating(key) as publish:
                if self._storage.size(key) is not None:
                    return False
                publish(self._record())
                return True
        except FileExistsError:
            return False

    def _newest(self, name: str) -> int:
        """The number of the claim that counts; 0 where there is none."""
        numbers = re.compile(re.escape(name) + r"\.([0-9]{1,6})")
        found = map(numbers.fullmatch, self._storage.names(self._folder))
        return max((int(one[1]) for one in found if one), default=0)

    def _is_over(self, name: str, number: int, now: float | None) -> bool:
        """Whether a claim does not hold any more."""
        key = self._key(name, number)
        record = self._read(key)
        if is_gone(record):
            return True
        stamp = None if now is None else self._storage.stamp(key)
        if now is None or stamp is None:
            return False  # or it was let go just now; the next round gets it
        lease_s = record.get("lease_s")
        return now - stamp.time > (lease_s if isinstance(lease_s, int | float) else LEASE_S) + _RESOLUTION_S

    def _holders(self, units: Sequence[Unit], name: Callable[[Unit], str]) -> str:
        """In words, who has the first of these."""
        unit = name(units[0])
        record = self._read(self._key(unit, self._newest(unit)))
        return f"process {record.get('pid')} on {record.get('host')}" if record else "another process"

    def _now(self) -> float:
        """The storage's time."""
        key = f"{self._folder}/.now-{self.who}"
        self._storage.make_folder(self._folder)
        self._asked_time = True
        self._storage.put(key, b"")
        stamp = self._storage.stamp(key)
        return 0.0 if stamp is None else stamp.time

    def _read(self, key: str) -> dict[str, Any]:
        """A claim's record; nothing where it is gone, or is being written."""
        try:
            record = json.loads(self._storage.read(key))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def _record(self) -> bytes:
        here = {"who": self.who, "host": socket.gethostname(), "pid": os.getpid(), **_this_process()}
        written = datetime.now(UTC).isoformat(timespec="seconds")
        return json.dumps({**here, "lease_s": self._lease_s, "written": written}).encode() + b"\n"

    def _key(self, name: str, number: int) -> str:
        return f"{self._folder}/{name}.{number}"

    def _forget(self, *files: str) -> None:
        """Delete files of this process; one that stays is worth nothing in a while."""
        for file in files:
            with contextlib.suppress(OSError):
                self._storage.remove(f"{self._folder}/{file}")


def is_gone(record: dict[str, Any]) -> bool:
    """Whether a claim's holder was a process of this machine, and is there no more."""
    here, pid = _this_process(), record.get("pid")
    if not here or record.get("machine") != here["machine"] or not (isinstance(pid, int) and 0 < pid < 2**31):
        return False
    with contextlib.suppress(PermissionError):  # another user's, which is there
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
    found = _started(pid)
    return found is not None and found != record.get("started")


def _this_process() -> dict[str, Any]:
    """What tells this process from every other that was or will be; nothing where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        numbers = os.readlink("/proc/self/ns/pid")  # a container counts its processes for itself
    except OSError:
        return {}
    return {"machine": f"{boot} {numbers}", "started": _started(os.getpid())}


def _started(pid: int) -> int | None:
    """When a process started, in ticks since the machine did; -1 where it has ended, None where nobody says."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if words[0] in "ZX" else int(words[19])
