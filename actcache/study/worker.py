"""Worker: what an actor of a cluster is made of: a process that holds what its tasks need, and runs them one by one.

It writes results where a process that runs all jobs would write them, by the same functions, and gives back counts
alone. While one task runs, the next one reads. Knows jobs and their engines; knows no cluster, and starts no process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from actcache.cpus import settle_threads
from actcache.store.far_path import path_at
from actcache.study.holding import Holding

if TYPE_CHECKING:
    from actcache.capture.decide import Searched
    from actcache.study.capture import CaptureStage, LocalCapture
    from actcache.study.capture_job import CaptureJob, RowsJob
    from actcache.study.cells import Finished
    from actcache.study.engine import LateJob, LocalEngine
    from actcache.study.run import Run
    from actcache.study.runner import ModelJob


class Answer(NamedTuple):
    """What a task came to.

    Attributes:
        n: units that were done.
        tokens: that were run through each checkpoint.
        reason: why it failed; empty where it did not.
        is_lost: whether the worker can do nothing more: its device refuses all that comes.
        searched: of captures, what their searches did.
        content, said: of an analysis, what its file holds, and what a person should know.
    """

    n: int = 0
    tokens: int = 0
    reason: str = ""
    is_lost: bool = False
    searched: Searched | None = None
    content: Mapping[str, Any] | None = None
    said: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """What a worker has to know of the jobs of one stage of a run, whose results are files.

    Attributes:
        number: of the stage; each has an engine of its own.
        run: folder of the run.
        checkpoints: where checkpoints are that moved, by label.
        holding: of the checkpoints, on the devices that a worker sees.
        results: folder of the results.
    """

    number: int
    run: str
    checkpoints: Mapping[str, str]
    holding: Holding
    results: str

    def opened(self) -> Run:
        """The run, as it is now."""
        from actcache.study.run import Run

        return Run(self.run, checkpoints=self.checkpoints, **asdict(self.holding))

    def engine(self) -> LocalEngine:
        """With the store as it is now."""
        from actcache.study.engine import LocalEngine

        run = self.opened()
        loads: dict[str, Any] = {"load_backbone": run.load_blocks, "load_readout": run.load_readout}
        one_at_a_time, results = run.one_at_a_time, path_at(self.results).parent
        return LocalEngine(run.store, run.load_late, **loads, one_at_a_time=one_at_a_time, results=results)


class Worker:
    """Runs the tasks that it is sent, from two threads at most."""

    def __init__(self, threads: int) -> None:
        """Of so many threads of the CPU."""
        settle_threads(threads)
        self._reading, self._running = threading.Lock(), threading.Lock()
        self._stage = -1
        self._lost = ""

    def ready(self) -> None:
        """Say that the worker is there."""

    def run(self, stage: Stage, jobs: Sequence[LateJob | ModelJob], first: Mapping[str, int], kept: Finished) -> Answer:
        """Run jobs of a stage; the result of each is a file, as :meth:`Runner.run` leaves it.

        Args:
            stage: of the jobs.
            jobs: several only where they share a pass over blocks.
            first: what to hold: the boundary of each late stack that they need.
            kept: where earlier jobs kept the final states that one of them needs.
        """
        return self._answer(lambda: self._run(stage, jobs, first, kept))

    def capture(self, stage: CaptureStage, jobs: Sequence[CaptureJob | RowsJob]) -> Answer:
        """Run jobs of a capture, and commit what each gives."""
        return self._answer(lambda: self._capture(stage, jobs))

    def answer(self, stage: Stage, name: str, options: Mapping[str, Any]) -> Answer:
        """Answer a question of a run, whole: its files are written."""
        return self._answer(lambda: self._analyse(stage, name, options))

    def _answer(self, work: Callable[[], Answer]) -> Answer:
        if self._lost:
            return Answer(reason=self._lost, is_lost=True)
        try:
            found = work()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if device_is_lost(error):
                self._lost = reason
            return Answer(reason=reason, is_lost=bool(self._lost))
        return found

    def _run(
        self, stage: Stage, jobs: Sequence[LateJob | ModelJob], first: Mapping[str, int], kept: Finished
    ) -> Answer:
        from actcache.study.runner import Runner, write_result

        done = _Counted()
        with self._reading:
            if self._stage != stage.number:
                with self._running:  # what the stage before holds is not in use any more
                    self._engine = None
                    self._engine, self._stage = stage.engine(), stage.number
            engine: LocalEngine = self._engine
            for place, scored in kept.items():
                engine.finished.setdefault(place, []).extend(scored)
            job: Any = jobs[0]
            read = job.read(engine) if len(jobs) == 1 else None
        with self._running:
            engine.hold(first)
            if len(jobs) > 1:
                Runner().run(jobs, engine, path_at(stage.results), done)
            else:
                result = job.run(engine, read, done)
                write_result(path_at(stage.results), job.key | result.notes, result.table, result.final)
        return done.answer()

    def _analyse(self, stage: Stage, name: str, options: Mapping[str, Any]) -> Answer:
        said: list[str] = []
        with self._running:
            self._engine, self._stage = None, -1
            content = stage.opened().analyse(name, say=said.append, **options)
        return Answer(1, content=content, said=tuple(said))

    def _capture(self, stage: CaptureStage, jobs: Sequence[CaptureJob | RowsJob]) -> Answer:
        done = _Counted()
        with self._running:
            if self._stage != stage.number:
                self._engine = None
                self._engine, self._stage = stage.open(), stage.number
            engine: LocalCapture
            engine, writer = self._engine
            before = engine.searched
            stage.complete(engine, writer, jobs, done)
            gained = (now - then for now, then in zip(engine.searched, before, strict=True))
            return done.answer()._replace(searched=type(before)(*gained))

    _engine: Any = None


class _Counted:
    """Hears of units and tokens."""

    def __init__(self) -> None:
        self._n = self._tokens = 0

    def __call__(
        self, n: int = 0, *, found: int = 0, tokens: int = 0, doing: str = "", in_rounds: bool = False
    ) -> None:
        self._n, self._tokens = self._n + n + found, self._tokens + tokens

    def answer(self) -> Answer:
        return Answer(self._n, self._tokens)


def device_is_lost(error: BaseException) -> bool:
    """Whether a CUDA error has left the process with a device that refuses all that comes; too little memory is none
    of these."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return False
    kinds = getattr(torch, "AcceleratorError", ())  # newer versions of torch have a name for them
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))
