"""Writers, a reader, a compactor and a verifier upon one store, each killed at any step: nothing is lost or half.

Most steps read and write files of one segment, and most races are about commit records. So a turn mostly counts the
steps upon records alone: then a few change hands right after a listing, and a long one has room for a compaction.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from unittest import mock

from actcache.errors import AlreadyCommittedError, InputError
from actcache.store import Store, StoreWriter, compact, layout, open_store, shard, verify
from actcache.store.feed import RowFeed
from actcache.testing.content import Content, small_content
from actcache.testing.invariants import check_batch, check_names, check_rows, check_verified, check_whole
from actcache.testing.places import Place
from actcache.testing.schedule import Process, Schedule

T = TypeVar("T")


class StoreSchedule(Schedule):
    """A schedule of processes upon one store; which ones, and how many, is by the seed.

    Attributes:
        place: where the store lies.
        content: what is written.
        acknowledged: who wrote each segment whose ``append`` has returned: it is durable, whatever happens.
    """

    def __init__(self, seed: int, place: Place, content: Content | None = None) -> None:
        super().__init__(seed, clock=place.clock)
        self.place = place
        self.content = small_content() if content is None else content
        self.acknowledged: dict[str, str] = {}
        for i in range(self.rng.choice([1, 2, 2, 3])):
            self.add(f"writer {i}", self.write)
        for role, act, share in (
            ("reader", self.read, 0.8),
            ("compactor", self.compact, 0.8),
            ("verifier", self.verify, 0.25),
        ):
            if self.rng.random() < share:
                self.add(role, act)

    def run(self) -> None:
        """Until all are done; then look at what is left.

        Raises:
            AssertionError: something is not right; says what, the seed, how to play it again, and the last steps.
        """
        with _in_order():
            super().run()

    def advice(self) -> str:
        """How to play this schedule again."""
        return f"; play it again by: python -m actcache.testing {self.seed} --on {self.place.name}"

    def counts(self, what: str) -> bool:
        """Steps that are not about a file of a segment."""
        return "segments/" not in what

    def finish(self) -> None:
        """What was acknowledged is there, byte for byte as one writer makes it. Half of the schedules then write and
        merge the rest, and a third verify what they leave."""
        storage = self.place.storage(None)
        if self.acknowledged:
            check_whole(open_store(storage), self.content, self.acknowledged)
        self.place.clear_locks()
        if self.rng.random() < 0.5:
            writer = StoreWriter(storage, self.content.fingerprint)
            for name in sorted(self.content.segments.keys() - writer.committed):
                writer.append(name, self.content.segments[name])
            compact(storage)
            store = open_store(storage)
            assert len(store.segments) == 1, "a compaction did not merge all"
            check_whole(store, self.content, self.content.segments)
        if self.rng.random() < 0.3 and storage.size(layout.ROOT) is not None:
            check_verified(storage)
        self.place.check()

    # ---- what processes do -----------------------------------------------------------------------------------------

    def all_written(self) -> bool:
        """Whether no writer writes any more."""
        return all(process.over for process in self.processes if process.act == self.write)

    def again(self, act: Callable[[], T]) -> T | None:
        """The result of an act; None where the place refused it."""
        try:
            return act()
        except FileNotFoundError:  # nothing that counts is ever gone
            raise
        except self.place.refusals:
            return None

    def write(self, process: Process) -> None:
        """Write what is missing of some segments, which other writers write too."""
        storage = self.place.storage(process)
        segments = self.content.segments
        names = process.rng.sample(sorted(segments), process.rng.randint(1, len(segments) - 1))

        def write() -> bool:
            writer = StoreWriter(storage, self.content.fingerprint)
            for name in names:
                if name not in writer.committed:
                    process.pause()
                    try:
                        writer.append(name, segments[name])
                    except AlreadyCommittedError:
                        continue
                    assert name not in self.acknowledged, f"{name} was committed twice"
                    self.acknowledged[name] = process.role
            return True

        for _ in range(6):
            if self.again(write):
                break

    def read(self, process: Process) -> None:
        """Open stores and keep them: each stays what it was, and has what was acknowledged before it was opened."""
        storage = self.place.storage(process)
        rng = process.rng
        kept: list[tuple[Store, set[str]]] = []
        feeds: list[tuple[RowFeed, Iterator[Any], dict[int, bytes]]] = []

        def look() -> None:
            for _ in range(rng.randrange(4)):
                expected = set(self.acknowledged)
                check_names(open_store(storage), expected)
            expected = set(self.acknowledged)
            kept.append((open_store(storage), expected))
            store, expected = rng.choice(kept)
            n = len(store)
            check_rows(store, self.content, expected, [rng.randrange(n) for _ in range(4)] if n else [])
            if n and rng.random() < 0.5:
                feed = RowFeed(store, batch_rows=2, memory_bytes=8 * 4)
                feeds.append((feed, iter(feed), {}))
                feed, batches, seen = rng.choice(feeds)
                for batch in batches:
                    check_batch(feed, batch, self.content, seen)

        for _ in range(3):
            process.pause()
            if not self._where_there_is_a_store(process, look):
                process.wait(lambda: bool(self.acknowledged))

    def compact(self, process: Process) -> None:
        """Merge what there is, whenever there is more; at last, all."""
        storage = self.place.storage(process)
        n_merged = 0
        for _ in range(8):
            n_wanted = n_merged + process.rng.randint(1, 3)
            process.wait(lambda n=n_wanted: len(self.acknowledged) >= n or self.all_written())  # type: ignore[misc]
            n_merged, is_last = len(self.acknowledged), self.all_written()
            try:
                done = self.again(lambda: compact(storage, max_bytes=process.rng.choice([24, 40, 2**20, 2**20])))
                if done and is_last:
                    break
            except InputError as error:
                if "is held by another process" in str(error):  # by one that was killed
                    self.again(lambda: storage.remove(f"{layout.COMMITS}/.compaction"))
                elif "is not a store" not in str(error):
                    raise

    def verify(self, process: Process) -> None:
        """No problem is ever found."""
        storage = self.place.storage(process)

        def check() -> None:
            problems = verify(storage)
            assert problems == [], problems[0]

        for _ in range(2):
            process.pause()
            if not self._where_there_is_a_store(process, check):
                process.wait(lambda: bool(self.acknowledged))

    def _where_there_is_a_store(self, process: Process, act: Callable[[], None]) -> bool:
        """Whether there was one yet, for an act that the place may refuse."""
        try:
            self.again(act)
        except InputError as error:
            if "is not a store" not in str(error):
                raise
            return False
        return True


class _OneThread(Executor):
    """What is submitted is done at once, by the thread that submits it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Takes what a pool of threads takes."""

    def submit(self, act: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(act(*args, **options))
        except BaseException as error:
            future.set_exception(error)
        return future


@contextmanager
def _in_order() -> Iterator[None]:
    """A process is one thread, so that its steps have one order."""
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(shard, "_coders_of", _OneThread))  # whose pool outlives a schedule
        for name, module in [*sys.modules.items()]:
            if name.startswith("actcache.store.") and hasattr(module, "ThreadPoolExecutor"):
                patches.enter_context(mock.patch.object(module, "ThreadPoolExecutor", _OneThread))
        yield
