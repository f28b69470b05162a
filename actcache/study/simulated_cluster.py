"""Simulated cluster: one that takes no time, for what a stage will take on one, and for tests of the scheduler itself.

Workers load what they do not hold, run, die and come back by a clock that jumps from event to event. Knows the
scheduler; knows no jobs.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import dataclass, field

from actcache.study.scheduler import Scheduler, Task


@dataclass
class Simulated:
    """Workers that run what a scheduler gives them, one task after another.

    Attributes:
        tasks: with the seconds that each takes.
        n: workers.
        load_s: seconds to load what a worker does not hold.
        lives_s: how long each worker lives, on average; None for ever.
        raises: tasks that raise wherever they run.
        kills: tasks in which the worker dies.
        seed: of the lives.
        begins_s: seconds before a worker that died is there again.
        now: seconds since the beginning.
        finished: tasks, as they were.
        ran_at: tasks as they were begun, each with its worker.
        loads, deaths: how many there were.
    """

    tasks: dict[Task, float]
    n: int
    load_s: float = 0.0
    lives_s: float | None = None
    raises: frozenset[Task] = frozenset()
    kills: frozenset[Task] = frozenset()
    seed: int = 0
    begins_s: float = 0.0
    now: float = 0.0
    finished: list[Task] = field(default_factory=list)
    ran_at: list[tuple[Task, int]] = field(default_factory=list)
    loads: int = 0
    deaths: int = 0

    def run(self) -> Scheduler[int]:
        """Until every task is finished or given up."""
        chance = random.Random(self.seed)
        scheduler: Scheduler[int] = Scheduler(self.tasks, lambda: self.now)
        events: list[tuple[float, int, str, int, int]] = []  # when, order, what, worker, its life
        waiting: dict[int, list[Task]] = {}
        held: dict[int, object] = {}
        life, order = Counter[int](), iter(range(10**9))

        def at(seconds: float, what: str, worker: int) -> None:
            heapq.heappush(events, (self.now + seconds, next(order), what, worker, life[worker]))

        def begin(worker: int) -> None:
            """Run the first task that waits."""
            task = waiting[worker][0]
            seconds = self.tasks[task]
            if held.get(worker) != task.needs:
                held[worker], seconds, self.loads = task.needs, seconds + self.load_s, self.loads + 1
            self.ran_at.append((task, worker))
            at(seconds, "die" if task in self.kills else "end", worker)

        for worker in range(self.n):
            at(0.0, "join", worker)
        while not scheduler.is_over:
            self.now, _, what, worker, of_life = heapq.heappop(events)
            if of_life != life[worker]:
                continue  # it died before
            if what == "join":
                scheduler.join(worker)
                waiting[worker] = []
                held.pop(worker, None)
                if self.lives_s is not None:
                    at(chance.expovariate(1 / self.lives_s), "die", worker)
            elif what == "end":
                task = waiting[worker].pop(0)
                if task in self.raises:
                    scheduler.failed(worker, task, "it raised")
                else:
                    scheduler.done(worker, task)
                    self.finished.append(task)
                if waiting[worker]:
                    begin(worker)
            else:
                life[worker] += 1
                self.deaths += 1
                scheduler.leave(worker, "it died")
                at(self.begins_s, "join", worker)
            for to, task in scheduler.place():
                waiting[to].append(task)
                if len(waiting[to]) == 1:
                    begin(to)
        return scheduler

    @property
    def efficiency(self) -> float:
        """Seconds of tasks that count, of all seconds of all workers."""
        return sum(self.tasks[task] for task in self.finished) / (self.n * self.now)
