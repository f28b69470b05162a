"""Scheduler: which worker gets which task next. Pure logic: no process, no network, and a clock that is given.

A task names what its worker has to hold, a late stack for example. It goes to a worker that holds that already. A
worker that runs out goes over to what has the most left per worker. A second task waits at a worker only while there is
enough for all, so that none waits at the end behind another.

A task that raises goes to another worker, and after three times to the *quarantine*, with its reason. When a worker
dies, what it ran is suspected of it, and what waited there is not. Machines are taken away at random too, so that more
deaths than failures are forgiven.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

W = TypeVar("W", bound=Hashable)

IN_FLIGHT = 2  # at a worker: one runs, one reads what it needs
MOST_FAILURES = 3
# Where a machine lives for an hour, a job of a minute dies with it five times in a row once in 10^9.
MOST_DEATHS = 5


@dataclass(eq=False)
class Task:
    """A unit that is placed.

    Attributes:
        name: for people.
        needs: what a worker has to hold for it.
        failures, deaths: how often it raised, or its worker died while it ran.
        reason: of the last one.
        failed_at: workers at which it raised or died.
    """

    name: str
    needs: Hashable
    failures: int = 0
    deaths: int = 0
    reason: str = ""
    failed_at: set[Hashable] = field(default_factory=set)


@dataclass
class _Worker:
    holds: Hashable = None
    tasks: list[Task] = field(default_factory=list)  # the first one runs


class Scheduler(Generic[W]):
    """Places tasks on workers that come and go.

    Attributes:
        n_done, n_requeued: tasks that are finished; and how often one was taken back.
        quarantined: tasks that are not tried again.
        busy_s: seconds of all workers in which they had a task.
    """

    def __init__(self, tasks: Iterable[Task], clock: Callable[[], float] = time.monotonic) -> None:
        """Of these tasks, which are begun in this order as far as what they need allows it."""
        self._queues: OrderedDict[Hashable, list[Task]] = OrderedDict()
        for task in tasks:
            self._queues.setdefault(task.needs, []).append(task)
        for queue in self._queues.values():
            queue.reverse()  # the next one is the last
        self._n_queued = sum(map(len, self._queues.values()))
        self._workers: dict[W, _Worker] = {}
        self._clock, self._since = clock, dict[W, float]()
        self.n_done = self.n_requeued = 0
        self.quarantined: list[Task] = []
        self.busy_s = 0.0

    @property
    def n_workers(self) -> int:
        """How many are alive."""
        return len(self._workers)

    @property
    def is_over(self) -> bool:
        """Whether every task is finished, or given up."""
        return not self._n_queued and not any(worker.tasks for worker in self._workers.values())

    def join(self, worker: W) -> None:
        """A worker is there, and holds nothing."""
        self._workers[worker] = _Worker()

    def leave(self, worker: W, reason: str, *, blamed: bool = True) -> list[Task]:
        """A worker is gone: what it had goes to others.

        Args:
            worker: that :meth:`join` told of; one that is not there any more is no matter.
            reason: for people.
            blamed: whether what it ran is suspected.

        Returns:
            What is in quarantine by that.
        """
        gone = self._workers.pop(worker, _Worker())
        self._rest(worker)
        given_up = []
        for number, task in enumerate(gone.tasks):
            if number == 0 and blamed:
                task.deaths += 1
                given_up += self._again(task, worker, reason)
            else:
                self._requeue(task)
        return given_up

    def place(self) -> Iterable[tuple[W, Task]]:
        """Tasks to send, each with its worker, which has it from now on. One round gives each worker one at most, so
        that the first tasks are spread."""
        for _ in range(IN_FLIGHT):
            for name, worker in sorted(self._workers.items(), key=lambda item: len(item[1].tasks)):
                if not self._n_queued:
                    return
                enough = self._n_queued > len(self._workers)
                if len(worker.tasks) < (IN_FLIGHT if enough else 1) and (task := self._next(name, worker)):
                    worker.tasks.append(task)
                    self._since.setdefault(name, self._clock())
                    yield name, task

    def done(self, worker: W, task: Task) -> None:
        """A task is finished."""
        self._take(worker, task)
        self.n_done += 1

    def failed(self, worker: W, task: Task, reason: str) -> list[Task]:
        """A task raised (returns as :meth:`leave`)."""
        self._take(worker, task)
        task.failures += 1
        return self._again(task, worker, reason)

    def _next(self, name: W, worker: _Worker) -> Task | None:
        """The best task for a worker, taken off its queue."""
        holders: dict[Hashable, int] = {}
        for one in self._workers.values():
            holders[one.holds] = holders.get(one.holds, 0) + 1
        left = {needs: queue for needs, queue in self._queues.items() if queue}
        # Those held first; then what has the most tasks for each worker that would hold it.
        order = sorted(left, key=lambda needs: (needs != worker.holds, -len(left[needs]) / (1 + holders.get(needs, 0))))
        for needs in order:
            queue = left[needs]
            if needs != worker.holds:
                if worker.tasks:
                    return None  # what it holds is in use
                if len(queue) <= holders.get(needs, 0) and not any(task.failed_at for task in queue):
                    continue  # those that hold it will have begun all of it before it is loaded here
            for at in reversed(range(len(queue))):
                if self._may(name, queue[at]):
                    worker.holds = needs
                    self._n_queued -= 1
                    return queue.pop(at)
        return None

    def _may(self, worker: W, task: Task) -> bool:
        """Whether a task did not fail at this worker, or did at all that there are."""
        return worker not in task.failed_at or all(one in task.failed_at for one in self._workers)

    def _take(self, worker: W, task: Task) -> None:
        of = self._workers[worker]
        of.tasks.remove(task)
        if not of.tasks:
            self._rest(worker)

    def _rest(self, worker: W) -> None:
        if (since := self._since.pop(worker, None)) is not None:
            self.busy_s += self._clock() - since

    def _again(self, task: Task, worker: W, reason: str) -> list[Task]:
        task.reason = reason
        task.failed_at.add(worker)
        if task.failures >= MOST_FAILURES or task.deaths >= MOST_DEATHS:
            self.quarantined.append(task)
            return [task]
        self._requeue(task)
        return []

    def _requeue(self, task: Task) -> None:
        """Behind all others of its kind: what makes workers die shall not do so before the rest is done."""
        self._queues[task.needs].insert(0, task)
        self._n_queued += 1
        self.n_requeued += 1
