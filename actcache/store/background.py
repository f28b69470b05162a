"""Background writing: segments are encoded and committed beside the computation of the next ones."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from actcache.errors import AlreadyCommittedError
from actcache.store.layout import SegmentData
from actcache.store.writer import StoreWriter

_AT_ONCE = 2  # while one waits for the disk, the other's chunks are encoded


class BackgroundWriter:
    """Commits segments while the next ones are computed, each as soon as it is durable.

    At most two segments are being written; who is faster than the disk waits in ``append``. A write that fails ends the
    run: its error is raised by the next call, whichever that is, and nothing that has not begun by then is written. Use
    it as a context: leaving it waits until all that was handed over is durable.
    """

    def __init__(
        self,
        writer: StoreWriter,
        *,
        on_committed: Callable[[str], object] = lambda name: None,
        on_lost: Callable[[str], object] = lambda name: None,
    ) -> None:
        """Start the threads.

        Args:
            writer: that commits.
            on_committed: called on a thread with each name when its segment is durable.
            on_lost: called on a thread with the name of a segment that another writer committed first: as good.
        """
        self._writer = writer
        self._on_committed, self._on_lost = on_committed, on_lost
        self._room = threading.Semaphore(_AT_ONCE)
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="actcache-writer")
        self._begun: list[Future[None]] = []

    def __enter__(self) -> BackgroundWriter:
        return self

    def append(self, name: str, segment: SegmentData) -> None:
        """Hand a segment over, which must not be changed from then on; waits while two are being written.

        Raises:
            what ``StoreWriter.append`` raised for this segment's forerunners.
        """
        self._room.acquire()
        self.check()
        self._begun.append(self._pool.submit(self._write, name, segment))

    def check(self) -> None:
        """Raise the error of a write that has failed; returns at once."""
        for written in [future for future in self._begun if future.done()]:
            written.result()
            self._begun.remove(written)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if error is None:
            self.check()

    def _write(self, name: str, segment: SegmentData) -> None:
        try:
            self._writer.append(name, segment)
            self._on_committed(name)
        except AlreadyCommittedError:
            self._on_lost(name)
        finally:
            self._room.release()
