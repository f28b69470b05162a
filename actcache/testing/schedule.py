"""Processes that act in turns, one call at a time, in an order that a seed decides, each killed at any call.

A process is a thread, of which one at a time has the *turn*. It may hand it back before everything that it does to
what all share. The schedule draws whose turn is next, and for how many calls: so a seed gives the same schedule again.
One that was killed does nothing to what is shared any more, whatever handlers it still runs. Knows no object store.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable

from actcache.testing.clock import Clock

_STUCK_S = 120
_TRACE = 60  # steps that are shown of a schedule that went wrong


class Killed(BaseException):
    """What a process meets at each step after its death."""


class Process(threading.Thread):
    """One process of a schedule.

    Attributes:
        role: what it does, for the trace.
        rng: at random, by the seed and the role.
        dead: whether it was killed.
        over: whether it does nothing any more.
    """

    def __init__(self, schedule: Schedule, role: str, act: Callable[[Process], object], dies_at: int | None) -> None:
        super().__init__(name=role, daemon=True)
        self.schedule, self.role, self.act, self.dies_at = schedule, role, act, dies_at
        self.rng = random.Random(f"{schedule.seed} {role}")
        self.weight = self.rng.choice([1, 1, 3])  # of its chances to have the turn
        self.n_steps, self.dead, self.over = 0, False, False
        self.failure: BaseException | None = None
        self.until: Callable[[], bool] = _always  # it waits for this
        self.wakes_at = math.inf  # on the clock, at the latest
        self.n_left, self.every_step = 0, True  # of its turn, and whether all its steps count
        self._mine = threading.Lock()
        self._mine.acquire()

    def run(self) -> None:
        """What the thread does."""
        try:
            self._await_turn()
            if not self.dead:
                self.act(self)
        except Killed:
            pass
        except BaseException as error:
            self.failure = error
        self.over = True
        self.schedule.handed_back.release()

    def turn(self, what: str) -> None:
        """To be called before each act upon what is shared; returns when it is this process's turn to do it.

        Args:
            what: it does, for the trace.

        Raises:
            Killed: it is dead; not to be caught.
        """
        schedule = self.schedule
        if not self.dead:
            self.n_left -= self.every_step or schedule.counts(what)
            if self.n_left < 0:
                schedule.handed_back.release()
                self._await_turn()
            self.n_steps += 1
            self.dead |= self.dies_at is not None and self.n_steps >= self.dies_at
            schedule.trace.append(f"{self.role}: {'killed before ' if self.dead else ''}{what}")
        if self.dead:
            raise Killed

    def end_turn(self) -> None:
        """Let others act before the next step."""
        self.n_left = 0

    def wait(self, until: Callable[[], bool]) -> None:
        """Let others act until this is so, or until they all wait too."""
        if not until():
            self.until, self.n_left = until, 0
            self.turn("go on")
            self.until, self.wakes_at = _always, math.inf

    def sleep(self, seconds: float) -> None:
        """Let others act until so many seconds have passed on the clock, which goes on at once where all wait."""
        clock = self.schedule.clock
        wakes_at = clock.now() + seconds
        self.wakes_at = wakes_at
        self.wait(lambda: clock.now() >= wakes_at)

    def pause(self) -> None:
        """Let others act for some steps, or none."""
        trace = self.schedule.trace
        at = len(trace) + self.rng.choice([0, self.rng.randrange(300)])
        self.wait(lambda: len(trace) >= at)

    def go(self, n_steps: int, *, every_step: bool) -> None:
        """Give it a turn of so many steps, counting all or those that count; returns when it hands it back."""
        self.n_left, self.every_step = n_steps - 1, every_step
        self._mine.release()
        if not self.schedule.handed_back.acquire(timeout=_STUCK_S):
            raise RuntimeError(f"{self.role} neither goes on nor ends")

    def _await_turn(self) -> None:
        if not self._mine.acquire(timeout=_STUCK_S):
            raise RuntimeError(f"{self.role} never got its turn")


def _always() -> bool:
    return True


class Schedule:
    """Processes, and whose turn it is.

    Attributes:
        seed: of all that is random.
        clock: of all processes.
        max_deaths: how many processes may be killed; each is followed by another, which takes up its work.
        life: steps before which a process is killed that has to die: half of them at one of the first 40.
        processes: all there were.
        trace: what they did, in order.
    """

    def __init__(self, seed: int, *, clock: Clock | None = None, max_deaths: int = 4, life: int = 400) -> None:
        self.seed, self.max_deaths, self.life = seed, max_deaths, life
        self.clock = Clock() if clock is None else clock
        self.rng = random.Random(seed)
        self.processes: list[Process] = []
        self.trace: list[str] = []
        self.handed_back = threading.Lock()
        self.handed_back.acquire()
        self.n_deaths = 0

    def counts(self, what: str) -> bool:
        """Whether a step counts in the turns that do not count all of them."""
        return bool(what)

    def add(self, role: str, act: Callable[[Process], object]) -> None:
        """Have a process begin, which may have to die.

        Args:
            role: what it does, for the trace.
            act: does it; calls ``process.turn`` before all that it does to what is shared. Where a process was killed,
                another one calls it from its beginning.
        """
        # Of the steps of a life, the first ones are as interesting as all others together.
        dies_at = self.rng.choice([None, self.rng.randrange(1, 40), self.rng.randrange(1, self.life)])
        mortal = self.n_deaths < self.max_deaths
        process = Process(self, f"{role}#{len(self.processes)}", act, dies_at if mortal else None)
        self.processes.append(process)
        process.start()

    def run(self) -> None:
        """Let them act until all are done; what one of them raises is raised, with the seed and the last steps.

        Raises:
            AssertionError: something went wrong; its cause is the error itself.
        """
        try:
            while living := [process for process in self.processes if not process.over]:
                self._step(living)
            self.finish()
        except BaseException as error:
            self.close()
            steps = "\n".join(self.trace[-_TRACE:])
            what = f"{type(error).__name__}: {error}"
            raise AssertionError(f"seed {self.seed}: {what}{self.advice()}; its last steps:\n{steps}") from error

    def finish(self) -> None:
        """What is done when all processes are: nothing, unless a kind of schedules says it."""

    def advice(self) -> str:
        """How to play this schedule again, for the error."""
        return ""

    def close(self) -> None:
        """End all processes."""
        for process in self.processes:
            if not process.over:
                process.dead = True
                process.go(1, every_step=True)

    def _step(self, living: list[Process]) -> None:
        ready = [process for process in living if process.until()]
        if not ready:
            wakes_at = min(process.wakes_at for process in living)
            if wakes_at < math.inf:
                self.clock.sleep(wakes_at - self.clock.now())
                return
            ready = living
        (process,) = self.rng.choices(ready, [process.weight for process in ready])
        # Some go on for long while the others stand still: the races of slow machines.
        process.go(self.rng.choice([1, 1, 3, 30, 200]), every_step=self.rng.random() < 0.2)
        if process.failure is not None:
            raise process.failure
        if process.over and process.dead:
            self.n_deaths += 1
            self.add(process.role.partition("#")[0], process.act)
