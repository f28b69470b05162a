"""What the stages of a run took, for ``actcache plan``: each records itself if it did all its work in one go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from actcache.progress import OnProgress, Progress
from actcache.study.run_folder import RunFolder

if TYPE_CHECKING:
    from actcache.capture.decide import Searched
    from actcache.models.lineup import Lineup
    from actcache.store import Store
    from actcache.study.analysis import Analysis
    from actcache.study.runner import Runner


ON_RAY = " on ray"  # behind the name of a stage


class _Clock:
    """Runs from the first load of weights on; a stage that loads none has nothing to do."""

    _from_nothing = True
    """Whether all that is timed was done here."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._load_s = 0.0

    def hearing(self, on_progress: OnProgress) -> OnProgress:
        """Tell this listener, and notice what others have done."""

        def tell(progress: Progress) -> None:
            self._from_nothing = self._from_nothing and not progress.found
            on_progress(progress)

        return tell

    @contextmanager
    def loading(self) -> Iterator[None]:
        """For the time of a load."""
        start = time.perf_counter()
        self._start = start if self._start is None else self._start
        yield
        self._load_s += time.perf_counter() - start

    def _times(self) -> dict[str, float] | None:
        if self._start is None:
            return None
        return {"elapsed_s": time.perf_counter() - self._start, "load_s": self._load_s}


def write_taken(folder: RunFolder, stage: str, runner: Runner) -> None:
    """Record what the workers of a cluster took for a stage."""
    if (taken := runner.taken()) is not None:
        folder.record_timing(f"{stage}{ON_RAY}", taken)


class CaptureClock(_Clock):
    """Times a capture and counts what its searches compute: pass :meth:`watch` to it."""

    def __init__(self, lineup: Lineup, held: str) -> None:
        """Of this lineup; ``held`` as :func:`actcache.cli.arguments.held_asked` gives it."""
        from actcache.capture.counter import SearchCounter

        super().__init__()
        self._lineup, self._held, self._counter = lineup, held, SearchCounter()

    def watch(self, label: str, load: Callable[[], Any]) -> Any:
        """What this loads of a checkpoint, timed and watched."""
        from actcache.models.backbone import Backbone
        from actcache.models.cost import ModelShape

        with self.loading():
            loaded = load()
            if isinstance(loaded, Backbone) and label in self._lineup.paired:  # others are not searched
                self._counter.watch(loaded, ModelShape.of_checkpoint(self._lineup.checkpoints[label]))
            return loaded

    def write(self, folder: RunFolder, n_prompts: int, searched: Searched) -> None:
        """Record a capture of so many prompts; one of which others did a part is taken off the record."""
        times = self._times()
        if times is None:
            return
        record = times | self._counter.record(searched.n_sequences, searched.n_choices) | {"held": self._held}
        folder.record_timing("capture", record if searched.n_sequences >= n_prompts else None)


class AnalysisClock(_Clock):
    """Times an analysis: put its loads under :meth:`loading`."""

    def __init__(self, folder: RunFolder, analysis: Analysis[Any], *, shared: bool = False) -> None:
        """Of a run; ``shared`` with processes that do a part of its work."""
        super().__init__()
        self._folder, self._name = folder, analysis.name
        self._from_nothing = not shared and not analysis.table_path(folder).exists()

    def write(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Record an answer of so many events in each group; one before which something was there is taken off the
        record."""
        if (times := self._times()) is not None:
            events = {"n_events": [group["n_events"] for group in groups]}
            self._folder.record_timing(self._name, times | events if self._from_nothing else None)


class GridClock(_Clock):
    """Times a grid: put its loads under :meth:`loading`."""

    def __init__(self, folder: RunFolder, store: Store, *, shared: bool = False) -> None:
        """Of a run; ``shared`` with processes that do a part of its work."""
        super().__init__()
        self._folder, self._store = folder, store
        self._from_nothing = not shared and not any(folder.cell_groups.glob("*.parquet"))

    def write(self, lineup: Lineup) -> None:
        """Record the grid, with what it scored; one of which something was finished before is taken off the record."""
        from actcache.study.cells import finished_cells
        from actcache.study.finished import digest_of_results, replay_costs
        from actcache.study.plan import multiply_adds_of, shapes_of

        times = self._times()
        if times is None:
            return
        finished = finished_cells(self._folder.cell_groups, self._store)
        costs = replay_costs(next(iter(shapes_of(lineup).values())), self._store, finished)
        scored = {"results": digest_of_results(finished), "multiply_adds": multiply_adds_of(costs)["multiply_adds"]}
        self._folder.record_timing("grid", times | scored if self._from_nothing else None)
