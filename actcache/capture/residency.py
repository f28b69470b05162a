"""Residency: which checkpoints of a capture are in memory, all of them or one at a time.

Knows how checkpoints are let go; loads them by functions that it is given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from actcache.capture.forward import Forwarder
from actcache.models.readout import Readout
from actcache.room import Loads

# Prompts whose segments are computed together. Where all checkpoints are in memory, their searches share batches, which
# would run half empty otherwise. Where one is, they share each load of it.
TOGETHER, PER_LOAD = 512, 4096

LoadForwarder = Callable[[str], Forwarder]
LoadReadout = Callable[[str], Readout]


class Checkpoints(Protocol):
    """The checkpoints of a capture, by label."""

    @property
    def labels(self) -> Sequence[str]:
        """In the order of the lineup."""

    @property
    def together(self) -> bool:
        """Whether all are in memory at once: then segments are computed one after another. Otherwise many segments
        share each load, and their rows wait on disk."""

    @property
    def resident(self) -> str | None:
        """The label of the one that is in memory, where one is; what is asked of it first costs no load."""

    def forwarder(self, label: str) -> Forwarder:
        """One of them, for now: unless all are together, asking for another one lets it go. So keep it no longer."""

    def why_not_packable(self, label: str) -> str | None:
        """What the forwarder says of it, which is asked once."""

    def readout(self, label: str) -> Readout:
        """The final norm and head of one; unless all are together, loaded alone, and no other one stays."""

    def rest(self) -> None:
        """Let go what need not stay."""


class _Asked(ABC):
    """Answers once what forwards are needed for."""

    def __init__(self) -> None:
        self._not_packable: dict[str, str | None] = {}

    @abstractmethod
    def forwarder(self, label: str) -> Forwarder:
        """As :class:`Checkpoints`."""

    def why_not_packable(self, label: str) -> str | None:
        """As :class:`Checkpoints`."""
        if label not in self._not_packable:
            self._not_packable[label] = self.forwarder(label).why_not_packable()
        return self._not_packable[label]


class AllResident(_Asked):
    """All stay, once loaded."""

    together, resident = True, None

    def __init__(self, forwarders: Mapping[str, Forwarder]) -> None:
        """These, by label."""
        super().__init__()
        self.labels = list(forwarders)
        self._held = forwarders

    def forwarder(self, label: str) -> Forwarder:
        """As :class:`Checkpoints`."""
        return self._held[label]

    def readout(self, label: str) -> Readout:
        """As :class:`Checkpoints`."""
        return self._held[label].readout

    def rest(self) -> None:
        """As :class:`Checkpoints`: all stay."""


class OneResident(_Asked):
    """One at a time, or the head of one."""

    together = False

    def __init__(self, labels: Sequence[str], load: LoadForwarder, load_readout: LoadReadout) -> None:
        """Loads none before it is asked for.

        Args:
            labels: of the checkpoints.
            load: gives one.
            load_readout: gives the final norm and head of one alone.
        """
        super().__init__()
        self.labels = list(labels)
        self._load, self._load_readout, self._loads = load, load_readout, Loads()
        self.resident: str | None = None
        self._held: Forwarder | None = None
        self._head: tuple[str, Readout] | None = None

    def forwarder(self, label: str) -> Forwarder:
        """As :class:`Checkpoints`."""
        if self._held is None or self.resident != label:
            self.rest()
            self._loads.begin()
            self._held, self.resident = self._load(label), label
        return self._held

    def readout(self, label: str) -> Readout:
        """As :class:`Checkpoints`."""
        if self._held is not None and self.resident == label:
            return self._held.readout
        if self._head is None or self._head[0] != label:
            self.rest()
            self._loads.begin()
            self._head = label, self._load_readout(label)
        return self._head[1]

    def rest(self) -> None:
        """As :class:`Checkpoints`: none stays."""
        if self._held is None and self._head is None:
            return
        self._held = self._head = self.resident = None
        self._loads.give_back()  # modules and their hooks refer to one another
