"""What the stages of a run took, for ``actcache plan``: each records itself if it did all its work in one go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from actcache.run_folder import RunFolder

if TYPE_CHECKING:
    from actcache.capture import CaptureSettings
    from actcache.grid import GridSettings
    from actcache.lineup import Lineup
    from actcache.replay import LateStack, Mode
    from actcache.store import Store
    from actcache.trunk import Trunk


class _Clock:
    """Runs from the first load of weights on; a stage that loads none has nothing to do."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._load_s = 0.0

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """For the time of a load."""
        start = time.perf_counter()
        self._start = start if self._start is None else self._start
        yield
        self._load_s += time.perf_counter() - start

    def _times(self) -> dict[str, float] | None:
        if self._start is None:
            return None
        return {"elapsed_s": time.perf_counter() - self._start, "load_s": self._load_s}


class CaptureClock(_Clock):
    """Times a capture and counts what its searches compute: pass :meth:`load` to it."""

    def __init__(self, lineup: Lineup, settings: CaptureSettings) -> None:
        from actcache.finished import SearchCounter

        super().__init__()
        self._lineup, self._settings, self._counter = lineup, settings, SearchCounter()

    def load(self, label: str) -> Trunk:
        """The trunk of a checkpoint, watched."""
        from actcache.capture import load_trunk
        from actcache.shape import ModelShape

        with self._loading():
            trunk = load_trunk(self._lineup, label, self._settings)
            return self._counter.watch(trunk, ModelShape.of_checkpoint(self._lineup.checkpoints[label]))

    def write(self, folder: RunFolder, n_prompts: int) -> None:
        """Record a capture of so many prompts; one of which others did a part is taken off the record."""
        times, counter = self._times(), self._counter
        if times is None:
            return
        whole = counter.n_searches >= n_prompts
        folder.record_timing("capture", times | counter.record() if whole else None)


class GridClock(_Clock):
    """Times a grid: pass :meth:`load` to it."""

    def __init__(self, folder: RunFolder, store: Store, lineup: Lineup, settings: GridSettings, device: str) -> None:
        super().__init__()
        self._folder, self._store, self._lineup, self._settings, self._device = folder, store, lineup, settings, device
        self._mode: Mode = "packed"
        self._before = self._groups()

    def load(self, label: str, boundary: int) -> LateStack:
        """The late stack of a checkpoint."""
        from actcache.replay import LateStack

        path, dtype = self._lineup.checkpoints[label].path, self._store.dtype
        with self._loading():
            late = LateStack.load(path, boundary, dtype=dtype, device=self._device)
        self._mode = "single" if self._settings.strict else late.mode
        return late

    def write(self) -> None:
        """Record the grid; one of which some cell groups were finished before is taken off the record."""
        from actcache.plan import groups_as_json, groups_of

        times = self._times()
        if times is None:
            return
        settings = self._settings
        n_segments = sum(1 for segment in self._store.segments if segment.n_events)
        n_groups = len(settings.boundaries) * len(settings.scopes) * n_segments
        whole = len(self._groups() - self._before) >= n_groups
        asked = {"groups": groups_as_json([replace(group, mode=self._mode) for group in groups_of(settings)])}
        self._folder.record_timing("grid", times | asked if whole else None)

    def _groups(self) -> set[Path]:
        return set(self._folder.cell_groups.glob("*.parquet"))
