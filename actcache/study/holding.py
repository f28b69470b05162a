"""Holding: how much of the checkpoints is in memory at once, and where: what a run records, and a worker is sent.

None of it changes a result. Plain data; knows no checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from actcache.errors import InputError

AUTO, ONE, ALL, BLOCK = "auto", "one", "all", "block"


@dataclass(frozen=True)
class Holding:
    """How checkpoints are held.

    Attributes:
        device: where they compute, as ``--device`` says it.
        resident: which are in memory at once: ``one`` after another, ``all``, or ``auto``, which is all if they fit.
        stream: whether there is one block in memory at a time, and so one checkpoint, too.
    """

    device: str = "cpu"
    resident: str = AUTO
    stream: bool = False

    def __post_init__(self) -> None:
        """InputError: it contradicts itself, or names another way."""
        if self.resident not in (AUTO, ONE, ALL):
            raise InputError(f"resident is {self.resident!r}; choose {AUTO}, {ONE} or {ALL}")
        if self.stream and self.resident == ALL:
            raise InputError(
                "--stream has one block in memory, --resident all has all checkpoints: give one of the two"
            )

    @classmethod
    def of(cls, device: str, kept: str | None) -> Holding:
        """That of which ``kept`` is what :attr:`kept` was."""
        return cls(device, stream=True) if kept == BLOCK else cls(device, kept or AUTO)

    @property
    def kept(self) -> str | None:
        """In one word: ``block``, ``one`` or ``all``; None for what fits."""
        return BLOCK if self.stream else None if self.resident == AUTO else self.resident

    def but(self, device: str | None = None, resident: str | None = None, stream: bool | None = None) -> Holding:
        """The same, but for what is given; whoever says which checkpoints are in memory means whole ones."""
        given = replace(self, device=device or self.device)
        if resident is None and stream is None:
            return given
        return replace(given, resident=resident or AUTO, stream=bool(stream))
