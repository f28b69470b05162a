"""Patience: how fast and for how long an object store is asked again. Knows no object store."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """Pauses between tries double, up to a longest; each is cut at random, so that many processes do not come back at
    the same moment to a server that has too much to do.

    Attributes:
        total_s: no try begins later than so many seconds after the first one. A try may itself take minutes.
        first_s: the first pause, in seconds, at most.
        longest_s: any pause, in seconds, at most.
        now: the time, in seconds from anywhere.
        sleep: pauses for so many seconds.
        between: a number at random between two others.
    """

    total_s: float = 120.0
    first_s: float = 0.1
    longest_s: float = 15.0
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], object] = time.sleep
    between: Callable[[float, float], float] = random.uniform

    def ask(self, act: Callable[[], T], *again: type[OSError]) -> T:
        """The result of what may be done twice, done again while it raises one of these errors.

        Raises:
            OSError: the last one's; where patience is at its end, it says after how many tries and seconds.
        """
        began, longest_s = self.now(), self.first_s
        n_tries = 0
        while True:
            n_tries += 1
            try:
                return act()
            except again as error:
                pause_s = self.between(longest_s / 2, longest_s)
                taken_s = self.now() - began
                if taken_s + pause_s > self.total_s:
                    said = f"{error.strerror}; given up after {n_tries} tries in {taken_s:.0f} s"
                    raise type(error)(error.errno, said, error.filename) from error
            self.sleep(pause_s)
            longest_s = min(2 * longest_s, self.longest_s)
