"""Asks: what the capture of a segment needs of checkpoints, as data, so that many segments can be answered together.

A segment is computed by *steps*: a generator that asks, is sent the answer, and returns what the segment holds. It does
not know whether it is alone: where one checkpoint is in memory at a time, a load serves what all segments ask of it
(answers.py). Knows no checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from actcache.capture.events import Scored
from actcache.capture.forward import Pack, Places
from actcache.capture.search import Proposal
from actcache.spill import Waiting
from actcache.store.segment_data import SiteRows

T = TypeVar("T")


class Whose(Protocol):
    """What an error names a sequence by."""

    @property
    def name(self) -> str:
        """Whose it is: ``prompt 'p7'``."""

    @property
    def sequence(self) -> Sequence[int]:
        """Its token ids."""


@dataclass(frozen=True)
class GoOn:
    """How do these checkpoints go on from sequences (see :func:`actcache.capture.search.propose`)?

    Attributes:
        labels: of the checkpoints, the one that writes first.
        sequences: token ids.
        n_compared: how many choices of each were compared before.
        names: what an error calls each.
        known: for each, what checkpoints wrote after its prompt according to others, by label, and so the tokens that
            follow its first ``n_compared``.
        doing: says what is done at a step, with so many sequences open.
    """

    labels: tuple[str, ...]
    sequences: Sequence[list[int]]
    n_compared: Sequence[int]
    names: Sequence[str]
    known: Sequence[Mapping[str, Sequence[int]]]
    doing: Callable[[int, int], str]


@dataclass(frozen=True)
class Forward:
    """What does every checkpoint make of these packs? Answered by a :class:`Ran` for each, in order.

    Attributes:
        packs: of sequences.
        whose: the sequences of each.
        places: sites and blocks whose rows are kept.
        read: labels of the checkpoints whose choices are wanted where they are compared.
    """

    packs: Sequence[Pack]
    whose: Sequence[Sequence[Whose]]
    places: Places
    read: Sequence[str]


@dataclass(frozen=True)
class Ran:
    """What every checkpoint makes of a pack.

    Attributes:
        rows: by site, label and block: ``[n_kept, D]``, on the CPU or on disk.
        final: by label: ``[n_compared, D]``, the last block's output, likewise.
        best: by label: the two best tokens there, ``[n_compared, 2]`` int64, and their logits.
    """

    rows: dict[tuple[str, str, int], Waiting]
    final: dict[str, Waiting]
    best: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def rows_of(self, rows: range, only: Sequence[int] | None = None) -> SiteRows:
        """Those of one sequence of the pack; or of them only some, counted in it."""
        own = {key: kept[rows.start : rows.stop] for key, kept in self.rows.items()}
        return own if only is None else {key: values[list(only)] for key, values in own.items()}

    def final_of(self, row: int) -> dict[str, torch.Tensor]:
        """One final state of every checkpoint, ``[D]`` by label."""
        return {label: final[row : row + 1][0] for label, final in self.final.items()}


@dataclass(frozen=True)
class Score:
    """What does every checkpoint make of pairs of tokens? Answered by a :class:`Scored` for each.

    Attributes:
        final: by label: a final state for each pair, ``[n, D]``.
        tokens: the pairs.
        whose: the sequence of each.
    """

    final: dict[str, torch.Tensor]
    tokens: Sequence[tuple[int, ...]]
    whose: Sequence[Whose]


Ask = GoOn | Forward | Score
Steps = Generator[Ask, Any, T]


def proposals(ask: GoOn) -> Steps[list[Proposal]]:
    """Ask, where there is something to ask for."""
    return (yield ask) if ask.sequences else []


def ran(ask: Forward) -> Steps[Iterable[Ran]]:
    """Ask. The answer may be computed as it is read: read it to its end before the next question."""
    return (yield ask) if ask.packs else []


def scored(ask: Score) -> Steps[list[Scored]]:
    """Ask, where there is something to ask for."""
    return (yield ask) if ask.tokens else []
