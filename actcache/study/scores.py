"""Scores: what final hidden states say of an event's two tokens, of the best one, and of how far they are from others.

For the cells of a grid, which replays fill in any order. Knows readouts; knows no stores and no tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from actcache.errors import NotFiniteError
from actcache.finite import first_not_finite
from actcache.models.readout import Readout
from actcache.schema import NATIVE, common_readout

_WHOLE_AT_ONCE = 256  # states whose whole-vocabulary logits are made together: enough for a matrix product at its rate


def readout_names(checkpoints: Sequence[str]) -> list[str]:
    """All readouts that there are for these checkpoints."""
    return [NATIVE, *map(common_readout, checkpoints)]


def readout_order(name: str) -> tuple[bool, str]:
    """Sorts names of readouts: ``native`` first."""
    return name != NATIVE, name


def whose_head(readout: str, late: str) -> str:
    """The checkpoint whose final norm and head a readout is, behind the late stack of this one."""
    return late if readout == NATIVE else readout.removeprefix(common_readout(""))


@dataclass(frozen=True)
class Scores:
    """Of all events, by one readout."""

    logits: torch.Tensor  # [n, 2] float32, of y_pt and y_it
    top1: torch.Tensor | None  # [n] int64
    kl: torch.Tensor | None = None  # [n] float32

    @property
    def margin(self) -> torch.Tensor:
        """``[n]`` float32."""
        return self.logits[:, 1] - self.logits[:, 0]


def score(readout: Readout, final_hidden: torch.Tensor, pair_ids: torch.Tensor) -> Scores:
    """Those of ``[n, D]`` final hidden states that are a checkpoint's own, by the whole vocabulary."""
    best, kl = readout.best(final_hidden), torch.zeros(len(final_hidden))  # nothing is nearer than itself
    return Scores(readout.scores(final_hidden, pair_ids), best, kl)


class ScoreTable:
    """Scores of several replays of the same events by several checkpoints' readouts, filled as final hidden states come
    in."""

    def __init__(
        self,
        n_replays: int,
        readouts: dict[str, Readout],
        pair_ids: torch.Tensor,
        *,
        whole: Sequence[int],
        one_by_one: bool,
        own: torch.Tensor | None,
    ) -> None:
        """The replays ``whole`` are scored by the whole vocabulary, many final states at once unless ``one_by_one``;
        they are compared with the late checkpoint's ``own`` ``[n, D]``, if given."""
        self._readouts, self._pair_ids, self._own = readouts, pair_ids, own
        shape = n_replays, len(pair_ids)
        self._logits = {name: torch.full((*shape, 2), torch.nan) for name in readouts}
        self._whole, self._one_by_one = frozenset(whole), one_by_one
        self._top1 = {name: torch.full(shape, -1, dtype=torch.int64) for name in readouts}
        self._kl = {name: torch.full(shape, torch.nan) for name in readouts}
        self._waiting: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, events: torch.Tensor, replays: torch.Tensor, final_hidden: torch.Tensor) -> None:
        """Take ``[m, D]`` final hidden states of so many (event, replay) pairs.

        Raises:
            NotFiniteError: a score is NaN or infinite; its ``row`` is the replay.
        """
        for name, readout in self._readouts.items():
            scores = readout.scores(final_hidden, self._pair_ids[events])
            if (row := first_not_finite(scores)) is not None:
                raise NotFiniteError(f"the logits that the head of {name} makes are not finite", row=int(replays[row]))
            self._logits[name][replays, events] = scores
        chosen = torch.isin(replays, torch.tensor(sorted(self._whole), dtype=torch.int64))
        if chosen.any():
            self._waiting.append((events[chosen], replays[chosen], final_hidden[chosen]))
            if self._one_by_one or sum(len(part[0]) for part in self._waiting) >= _WHOLE_AT_ONCE:
                self.finish()

    def finish(self) -> None:
        """Score what waits for it by the whole vocabulary: the head's whole weight is read for each lot."""
        waiting = [torch.cat(parts) for parts in zip(*self._waiting, strict=True)]
        lots = zip(*(part.split(1) if self._one_by_one else [part] for part in waiting), strict=True)
        for events, replays, final_hidden in lots:
            for name, readout in self._readouts.items():
                if self._own is None:
                    try:
                        self._top1[name][replays, events] = readout.best(final_hidden)
                    except NotFiniteError as error:
                        raise NotFiniteError(str(error), row=int(replays[error.row or 0])) from error
                else:
                    best, kl = readout.compare(final_hidden, self._own, events)
                    self._top1[name][replays, events], self._kl[name][replays, events] = best, kl
        self._waiting = []

    def scores(self, replay: int, whose: str) -> Scores:
        """Those of one replay by one checkpoint's readout."""
        logits, whole = self._logits[whose][replay], replay in self._whole
        kl = self._kl[whose][replay] if whole and self._own is not None else None
        return Scores(logits, self._top1[whose][replay] if whole else None, kl)
