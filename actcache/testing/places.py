"""Where a schedule's store lies: an object store that misbehaves, or a folder."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from actcache.files import draft_of
from actcache.store import layout
from actcache.store.objects import ObjectStorage
from actcache.store.patience import Patience
from actcache.store.storage import MAX_JSON_BYTES, LocalStorage, Mark, Publish, Stamp, Storage, Write
from actcache.testing.clock import Clock
from actcache.testing.faults import KINDS, Faults
from actcache.testing.memory import MemoryObjects
from actcache.testing.objects import SimulatedObjects
from actcache.testing.schedule import Killed, Process
from actcache.testing.views import ProcessObjects

if TYPE_CHECKING:
    from obstore.store import ObjectStore


class Place(Protocol):
    """Where a schedule's store lies."""

    name: str
    """As ``python -m actcache.testing --on`` takes it."""

    clock: Clock

    refusals: tuple[type[Exception], ...]
    """What an act may meet there and do again."""

    def storage(self, process: Process | None) -> Storage:
        """The storage as a process sees it, with a turn before each step; None is who looks when all is over."""

    def clear_locks(self) -> None:
        """What a person does who knows that no process runs any more."""

    def check(self) -> None:
        """That nothing outside was touched."""


class ObjectPlace:
    """An object store whose calls go wrong in all ways of ``KINDS``, each often, seldom or never, by the seed."""

    name = "objects"
    refusals: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, seed: int, objects: ObjectStore | None = None) -> None:
        """Hold nothing yet.

        Args:
            seed: of the faults.
            objects: a prefix of a real object store, with nothing in it; None takes one in memory.
        """
        rng = random.Random(seed)
        rates = {fault: rng.choice([0, 0, 0.02, 0.06]) for fault in KINDS}
        self.objects = SimulatedObjects(
            Faults(seed, {fault: rate for fault, rate in rates.items() if rate}),
            MemoryObjects() if objects is None else objects,
            late_calls=rng.choice([3, 40, 2000]),
            busy_s=rng.choice([0.5, 3.0, 30.0]),
        )
        self.clock = self.objects.clock

    def storage(self, process: Process | None) -> Storage:
        """As a process sees it; who looks when all is over meets no faults."""
        if process is None:
            self.objects.land()
            return _SeededStorage(self.objects.inner, self.clock.sleep, random.Random(0), self.clock)
        return _SeededStorage(ProcessObjects(self.objects, process), process.sleep, process.rng, self.clock)

    def clear_locks(self) -> None:
        """A lock whose holder was killed, or whose put landed when it had been given back, says whose it is."""
        storage = self.storage(None)
        for key in storage.describe_drafts():
            assert key.startswith((".probe-", f"{layout.COMMITS}/.compaction")), key
            storage.remove(key)

    def check(self) -> None:
        """Nothing lies outside of an object store's prefix."""


class _SeededStorage(ObjectStorage):
    """Whose folders are called the same in each run of a schedule, and whose pauses are on its clock."""

    def __init__(self, objects: Any, sleep: Any, rng: random.Random, clock: Clock) -> None:
        super().__init__(objects, "simulated", Patience(now=clock.now, sleep=sleep, between=rng.uniform))
        self.rng = rng

    def folder_for(self, segment: str) -> str:
        return f"{segment}.{self.rng.randbytes(6).hex()}"


class Disk:
    """A store in a folder, with other folders around it."""

    name = "disk"
    refusals: tuple[type[Exception], ...] = ()

    def __init__(self, folder: Path) -> None:
        """Make the folders around it.

        Args:
            folder: an empty one, on the file system to test.
        """
        self.root, self.clock = folder / "home/store", Clock()
        self.held: dict[str, Process] = {}
        for name in ("segments", "commits", "s-0"):
            (folder / name).mkdir()
            (folder / name / "s-0.json").write_text("a user's")
        (folder / "home").mkdir()
        self.outside = {path: _seen(path) for path in folder.rglob("*.json")}

    def storage(self, process: Process | None) -> Storage:
        """As a process sees it."""
        return LocalStorage(self.root) if process is None else _TurnedDisk(self.root, process, self.held)

    def clear_locks(self) -> None:
        """``flock`` ends with its process."""

    def check(self) -> None:
        """What others have around the store is as it was, and the store has nothing else than its own."""
        for path, before in self.outside.items():
            assert _seen(path) == before, path
        files = {layout.ROOT, layout.ROLLUP}
        found = {path.name for path in self.root.iterdir()}
        assert found <= {*files, *(f".{name}.tmp" for name in files), layout.SEGMENTS, layout.COMMITS}, found


def _seen(path: Path) -> tuple[int, int, str]:
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, path.read_text()


class _TurnedDisk(LocalStorage):
    """A disk upon which a process takes turns."""

    def __init__(self, root: Path, process: Process, held: dict[str, Process]) -> None:
        super().__init__(root)
        self.process, self.held = process, held

    def read(self, key: str, at_most: int | None = MAX_JSON_BYTES) -> bytes:
        self.process.turn(f"read {key}")
        return super().read(key, at_most)

    def read_ranges(self, key: str, ranges: Any) -> list[bytes]:
        self.process.turn(f"read_ranges {key}")
        return super().read_ranges(key, ranges)

    def size(self, key: str) -> int | None:
        self.process.turn(f"size {key}")
        return super().size(key)

    def stamp(self, key: str) -> Stamp | None:
        self.process.turn(f"stamp {key}")
        return super().stamp(key)

    def names(self, folder: str) -> list[str]:
        """Of what comes or goes while a folder is listed, a listing may have any part."""
        rng = self.process.rng
        self.process.turn(f"list {folder}")
        before = set(super().names(folder))
        if rng.random() < 0.5:
            self.process.end_turn()
        self.process.turn(f"list {folder}, second half")
        after = set(super().names(folder))
        if rng.random() < 0.5:
            self.process.end_turn()
        return sorted((before & after) | {name for name in sorted(before ^ after) if rng.random() < 0.5})

    def marks(self, folder: str) -> dict[str, Mark]:
        self.process.turn(f"list {folder}, with marks")
        return super().marks(folder)  # which lists the names in two halves

    def sizes(self, folder: str) -> dict[str, int]:
        self.process.turn(f"sizes {folder}")
        return super().sizes(folder)

    def prepare(self, folders: Iterable[str]) -> None:
        for folder in folders:
            self.process.turn(f"prepare {folder}")
            super().prepare([folder])

    def put(self, key: str, data: bytes) -> None:
        self.process.turn(f"put {key}")
        super().put(key, data)

    @contextmanager
    def creating(self, key: str) -> Iterator[Publish]:
        self.process.turn(f"lock {key}")
        while not self.free(key):  # which flock would wait for
            self.process.wait(lambda: self.free(key))
        self.held[key] = self.process
        try:
            with super().creating(key) as publish:

                def publish_in_turn(data: bytes) -> None:
                    self.process.turn(f"publish {key}")
                    publish(data)
                    self.process.turn(f"go on after {key}")

                yield publish_in_turn
                self.process.turn(f"unlock {key}")
        except Killed:
            draft_of(self.root / key).write_bytes(b'{"half": ')  # what a process that is gone leaves
            raise
        finally:
            del self.held[key]

    exclusively = creating

    def free(self, key: str) -> bool:
        """Whether nobody holds a lock who lives."""
        holder = self.held.get(key)
        return holder is None or holder.over

    @contextmanager
    def new_folder(self, folder: str, files: Sequence[str]) -> Iterator[Write]:
        self.process.turn(f"make {folder}")
        with super().new_folder(folder, files) as write:

            def write_in_turn(path: str, parts: Iterable[bytes]) -> int:
                data = b"".join(parts)
                try:
                    self.process.turn(f"write {folder}/{path}")
                except Killed:
                    write(path, [data[: len(data) // 2]])
                    raise
                return write(path, [data])

            yield write_in_turn

    def remove_files(self, folder: str, files: Iterable[str]) -> None:
        for file in files:
            self.process.turn(f"delete {folder}/{file}")
            super().remove_files(folder, [file])

    def remove(self, key: str) -> None:
        self.process.turn(f"delete {key}")
        super().remove(key)

    def move(self, key: str, to: str) -> None:
        self.process.turn(f"move {key} to {to}")
        super().move(key, to)
