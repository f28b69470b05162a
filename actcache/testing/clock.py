"""A clock that goes on when somebody sleeps, and at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Clock:
    """A time that all of a test shares.

    Attributes:
        time_s: seconds since 1970.
    """

    time_s: float = 1.7e9

    def now(self) -> float:
        """The time, in seconds."""
        return self.time_s

    def sleep(self, seconds: float) -> None:
        """Let so many seconds pass."""
        self.time_s += seconds
