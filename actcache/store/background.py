"""Background writing: segments are encoded and committed on a thread of their own while the next ones are computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType

from actcache.errors import AlreadyCommittedError
from actcache.store.layout import SegmentData
from actcache.store.writer import StoreWriter


class BackgroundWriter:
    """Commits segments in the order given, one behind the one that is being computed.

    At most ``depth`` segments wait beside the one that is being written; whoever is faster than the disk waits. A write
    that fails ends the run: its error is raised by the next call, whichever that is, and nothing after it is written.
    Use it as a context: leaving it waits until all is durable, or, when an error is what ends the block, only for the
    segment that is being written; those that wait are given up.
    """

    def __init__(
        self,
        writer: StoreWriter,
        *,
        on_committed: Callable[[str], object] = lambda name: None,
        on_lost: Callable[[str], object] = lambda name: None,
        depth: int = 1,
    ) -> None:
        """Start the thread.

        Args:
            writer: that commits; nobody else appends with it meanwhile.
            on_committed: called on the thread with each name when its segment is durable.
            on_lost: called on the thread with the name of a segment that another writer committed first, which is as
                good.
            depth: segments that may wait.
        """
        self._writer = writer
        self._on_committed, self._on_lost = on_committed, on_lost
        self._waiting: queue.Queue[tuple[str, SegmentData] | None] = queue.Queue(depth)
        self._failure: BaseException | None = None
        self._given_up = False
        self._thread = threading.Thread(target=self._write_all, name="actcache-writer", daemon=True)

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def append(self, name: str, segment: SegmentData) -> None:
        """Hand a segment over, which must not be changed from then on; waits while ``depth`` others wait.

        Raises:
            what ``StoreWriter.append`` raised for this segment's forerunners.
        """
        self.check()
        self._waiting.put((name, segment))
        self.check()

    def check(self) -> None:
        """Raise the error of a write that has failed; returns at once."""
        if self._failure is not None:
            raise self._failure

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._given_up = error is not None
        self._waiting.put(None)
        self._thread.join()
        if error is None:
            self.check()

    def _write_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            if self._given_up or self._failure is not None:
                continue  # taken from the queue all the same, so that nobody waits for room in it
            name, segment = item
            try:
                self._writer.append(name, segment)
                self._on_committed(name)
            except AlreadyCommittedError:
                self._on_lost(name)
            except BaseException as failure:  # whatever it is, the thread that computes must hear of it
                self._failure = failure
            del item, segment
