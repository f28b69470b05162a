"""Streams: a checkpoint of a capture whose blocks are in memory one at a time: all packs go through one block, then
through the next one.

States between two blocks, and rows that are kept, lie in memory or in a temporary file. What is not known is guessed: a
pass over the blocks decides many tokens at the price of one. Knows models and rows; knows no events and no stores.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from actcache.capture.forward import Pack, PackRows, Places, gathering
from actcache.errors import NotFiniteError
from actcache.finite import are_states, said_not_finite, said_of_block
from actcache.models.gather import gather_rows
from actcache.models.streamed import Streamed
from actcache.spill import Spill, Waiting

Saying = Callable[[str], object]

# Tokens of one guess; what a wrong one costs is the forward of so many.
GUESSED = 8


class Streaming:
    """A checkpoint as a capture runs it (see :class:`actcache.capture.forward.Forwarder`)."""

    backbone, guesses = None, True

    def __init__(
        self, label: str, streamed: Streamed, doing: Saying = lambda words: None, passes: Iterator[int] | None = None
    ) -> None:
        """Of a checkpoint.

        Args:
            label: of it.
            streamed: its blocks.
            doing: told what is under way, for people to read, at every block.
            passes: gives the number of each pass; None to count from 1 on.
        """
        self._label, self._streamed, self._doing = label, streamed, doing
        self._passes = itertools.count(1) if passes is None else passes
        self.readout, self.regimes = streamed.readout, streamed.regimes

    def why_not_packable(self) -> str | None:
        """As :class:`Forwarder`; one block of each kind is looked at."""
        return self._streamed.why_not_packable()

    @torch.no_grad()
    def run(self, packs: Sequence[Pack], places: Places) -> Iterator[PackRows]:
        """As :class:`Forwarder`: all packs in one pass over the blocks."""
        if not packs:
            return
        streamed = self._streamed
        spill = Spill()
        states: dict[int, Waiting] = {}
        kept: dict[tuple[str, int], list[Waiting]] = {place: [] for place in places}
        for index in self._pass_over():
            own = [place for place in places if place[1] == index]
            for number, pack in enumerate(packs):
                given = states[number][:] if index else pack.ids[0]
                with gathering(lambda _: streamed.backbone.blocks[0], own, pack.kept, streamed.device) as gathered:
                    output = streamed.forward(pack.bounds, given)
                states[number] = spill.put(output, over=states.get(number))
                for place, rows in gathered.items():
                    kept[place].append(spill.put(rows))
        for number, pack in enumerate(packs):
            final = gather_rows(states[number][:], pack.compared).to(streamed.device)
            yield PackRows({place: rows[number][:] for place, rows in kept.items()}, final)

    def write(
        self, sequences: Sequence[Sequence[int]], n_new: Sequence[int], end_ids: frozenset[int]
    ) -> list[list[int]]:
        """As :class:`Forwarder`, but guessed."""
        return [guess(ids, min(n, GUESSED)) for ids, n in zip(sequences, n_new, strict=True)]

    @torch.no_grad()
    def not_finite(self, whose: str, what: str, ids: Sequence[int]) -> NotFiniteError:
        """As :class:`Forwarder`."""
        found, state = None, torch.tensor(list(ids))
        for index in self._pass_over():
            state = self._streamed.forward([0, len(ids)], state)
            if not are_states(state):
                found = index
                break
        return said_not_finite(whose, what, len(ids), said_of_block(found), self._streamed.dtype)

    def _pass_over(self) -> Iterator[int]:
        place = f"{self._label}: pass {next(self._passes)}"
        return self._streamed.pass_over(doing=lambda words: self._doing(f"{place}, {words}"))


def guess(ids: Sequence[int], n: int) -> list[int]:
    """1 to ``n`` tokens that may follow: what followed the longest equal end of the sequence, of up to three tokens,
    the last time; the last token again where no end was there before."""
    for length in range(min(3, len(ids) - 1), 0, -1):
        end = list(ids[-length:])
        for start in range(len(ids) - length - 1, -1, -1):
            if list(ids[start : start + length]) == end:
                return list(ids[start + length : start + length + n])
    return [ids[-1]]
