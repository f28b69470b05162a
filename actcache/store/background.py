"""Background writing: segments are encoded and committed beside the computation of the next ones."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any

from actcache.errors import AlreadyCommittedError
from actcache.store.segment_data import SegmentData, SiteRows
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
        self._begin(name, partial(self._writer.append, name, segment))

    def add_rows(self, name: str, to: dict[str, Any], rows: SiteRows) -> None:
        """As :meth:`append`, of what ``StoreWriter.add_rows`` takes."""
        self._begin(name, partial(self._writer.add_rows, name, to, rows))

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

    def _begin(self, name: str, commit: Callable[[], None]) -> None:
        self._room.acquire()
        self.check()
        self._begun.append(self._pool.submit(self._write, name, commit))

    def _write(self, name: str, commit: Callable[[], None]) -> None:
        try:
            commit()
            self._on_committed(name)
        except AlreadyCommittedError:
            self._on_lost(name)
        finally:
            self._room.release()
