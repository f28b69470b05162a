"""Progress: how far a stage is, told after each step to whoever asked. Knows counts; draws nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias


@dataclass(frozen=True)
class Progress:
    """What a stage has done so far.

    Attributes:
        done: units finished, ``found`` among them.
        total: units in all.
        unit: what is counted, in the plural: ``prompts``.
        found: units that were finished before, or by others. They say nothing of this stage's rate.
        tokens: run through each checkpoint here; 0 where the stage runs none.
        doing: what is under way between two units, for people to read; empty where the units say enough.
        in_rounds: whether many units go through rounds together, nobody knows how many: then what is done tells nothing
            of when the rest is.
    """

    done: int
    total: int
    unit: str
    found: int = 0
    tokens: int = 0
    doing: str = ""
    in_rounds: bool = False


OnProgress: TypeAlias = Callable[[Progress], object]


def untold(progress: Progress) -> None:
    """Tell nobody: the default of every stage."""


class Told(Protocol):
    """What hears how far a piece of a stage is: :meth:`Tally.add`."""

    def __call__(
        self, n: int = 0, *, found: int = 0, tokens: int = 0, doing: str = "", in_rounds: bool = False
    ) -> object:
        """``n`` units more are done here, ``found`` by others, and ``tokens`` were run."""


def nobody_told(n: int = 0, *, found: int = 0, tokens: int = 0, doing: str = "", in_rounds: bool = False) -> None:
    """Tell nobody."""


class PartDone(Exception):
    """The jobs of one part are done, and some of other parts are not: no table can be made of all yet."""


class Tally:
    """Counts the steps of one stage, and tells a listener the state after each."""

    def __init__(self, total: int, unit: str, on_progress: OnProgress) -> None:
        """Begin at nothing; the listener is told at once."""
        self._now, self._tell = Progress(0, total, unit), on_progress
        self._tell(self._now)

    def add(self, n: int = 0, *, found: int = 0, tokens: int = 0, doing: str = "", in_rounds: bool = False) -> None:
        """Count ``n`` units done here, ``found`` ones that were done already, and tokens; what once goes in rounds does
        so to the end."""
        now = self._now
        done, found, tokens = now.done + n + found, now.found + found, now.tokens + tokens
        in_rounds = in_rounds or now.in_rounds
        self._now = replace(now, done=done, found=found, tokens=tokens, doing=doing, in_rounds=in_rounds)
        self._tell(self._now)
