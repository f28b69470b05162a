"""The order of an epoch: which rows each of its batches has, whoever feeds it and however many they are.

Knows how many rows there are, and where the blocks begin that lie together; knows no store.

The order depends on (seed, epoch), the size of a batch and, with blocks, on how many batches a round has. The module
``feed`` says what that means for a trainer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

BLOCKS, ROWS, NONE = SHUFFLES = ("blocks", "rows", "none")
LANE_BLOCKS = 64  # at least: with few, a batch would be little else than some neighbourhoods of the store
_MOST_LANES = 8  # more would serve more processes at once, with batches made of fewer blocks


class Drawn(NamedTuple):
    """Batches that are read at once.

    Attributes:
        rows: ``[n]``, their rows as they are best read.
        places: where each batch finds its own among these.
    """

    rows: Ints
    places: list[Ints]


def most_lanes(pool_rows: int, round_batches: int, chunk_rows: int) -> int:
    """Into how many lanes a round is cut: as many as leave each of them two batches and whole chunks enough.

    It must not depend on how many processes there are, as the order would.
    """
    lanes = 1
    while (
        2 * lanes <= _MOST_LANES and 4 * lanes <= round_batches and pool_rows // (2 * lanes) >= LANE_BLOCKS * chunk_rows
    ):
        lanes *= 2
    return lanes


class Order:
    """The orders of all epochs of some rows, which are numbered from 0.

    Attributes:
        n_batches: of an epoch; the last one may be short.
    """

    def __init__(
        self, cuts: Ints, shuffle: str, seed: int, *, batch_rows: int, round_batches: int, lanes: int = 1
    ) -> None:
        """Of these rows.

        Args:
            cuts: ``[n_blocks + 1]``, where each block begins, and the number of rows.
            shuffle: one of ``SHUFFLES``.
            seed: of all epochs.
            batch_rows: rows of a batch.
            round_batches: batches that are read at once at most; with blocks, the order depends on it.
            lanes: of a round, with blocks.
        """
        self._cuts, self._shuffle, self._seed = cuts, shuffle, seed
        self._batch_rows, self._round_batches, self._lanes = batch_rows, round_batches, lanes
        self._n_rows = int(cuts[-1])
        self.n_batches = -(-self._n_rows // batch_rows)
        self._permuted: tuple[int, Ints, Ints] | None = None

    def pools(self, own: range) -> Iterator[range]:
        """These batches, those together that are read at once: with blocks those of a round."""
        stops = self._round_stops()
        while own:
            n = self._round_batches
            if self._shuffle == BLOCKS:
                n = len(range(own.start, stops[bisect_right(stops, own.start)], own.step))
            yield own[:n]
            own = own[n:]

    def draw(self, epoch: int, batches: range) -> Drawn:
        """The rows of batches that are read at once."""
        return self._of_lanes(epoch, batches) if self._shuffle == BLOCKS else self._of_rows(epoch, batches)

    def _of_rows(self, epoch: int, batches: range) -> Drawn:
        spans = [self._span(number) for number in batches]
        if self._shuffle == NONE:
            wanted = np.concatenate([np.arange(*span) for span in spans])
        else:
            permuted, _ = self._of_epoch(epoch)
            wanted = np.concatenate([permuted[slice(*span)] for span in spans])
        read = np.argsort(wanted, kind="stable")
        places = np.empty_like(read)
        places[read] = np.arange(len(read))
        return Drawn(wanted[read], np.split(places, np.cumsum([stop - start for start, stop in spans])[:-1]))

    def _of_lanes(self, epoch: int, batches: range) -> Drawn:
        stops = self._round_stops()
        number = bisect_right(stops, batches.start)
        start, stop = (stops[number - 1] if number else 0), stops[number]
        rows: list[Ints] = []
        places: dict[int, Ints] = {}
        lo = start * self._batch_rows
        n_read = 0
        for lane in range(self._lanes):
            of_lane = range(start + lane, stop, self._lanes)
            hi = lo + sum(b - a for a, b in map(self._span, of_lane))
            if asked := [at for at, batch in enumerate(of_lane) if batch in batches]:
                found, mixed = self._of_blocks(epoch, lo, hi), self._permutation(hi - lo, epoch, 2, lo)
                picked = [mixed[at * self._batch_rows : (at + 1) * self._batch_rows] for at in asked]
                if len(asked) < len(of_lane):  # another process has the others
                    is_own = np.zeros(hi - lo, bool)
                    is_own[np.concatenate(picked)] = True
                    found, where = found[is_own], np.cumsum(is_own) - 1
                    picked = [where[one] for one in picked]
                places |= {of_lane[at]: one + n_read for at, one in zip(asked, picked, strict=True)}
                rows.append(found)
                n_read += len(found)
            lo = hi
        return Drawn(np.concatenate(rows), [places[batch] for batch in batches])

    def _span(self, batch: int) -> tuple[int, int]:
        """Where a batch would lie if the batches had their rows one after another."""
        return batch * self._batch_rows, min(self._n_rows, (batch + 1) * self._batch_rows)

    def _round_stops(self) -> list[int]:
        """Where each round ends, in batches: all have as many, or one more."""
        n_rounds = -(-self.n_batches // self._round_batches)
        return [self.n_batches * number // n_rounds for number in range(1, n_rounds + 1)]

    def _of_blocks(self, epoch: int, start: int, stop: int) -> Ints:
        """The rows at ``start:stop`` of the blocks as they are permuted, in their own order."""
        order, ends = self._of_epoch(epoch)
        a, b = np.searchsorted(ends, [start, stop - 1], side="right")
        firsts, lasts = self._cuts[order[a : b + 1]], self._cuts[order[a : b + 1] + 1]
        firsts[0] = lasts[0] - (ends[a] - start)  # of the blocks at the edges, the lanes beside have the rest
        lasts[-1] -= ends[b] - stop
        return np.sort(np.concatenate([np.arange(*span) for span in zip(firsts, lasts, strict=True)]))

    def _of_epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """An epoch's permutation of rows or of blocks, and where each block then ends."""
        if self._permuted is None or self._permuted[0] != epoch:
            permuted = self._permutation(self._n_rows if self._shuffle == ROWS else len(self._cuts) - 1, epoch, 1)
            ends = np.cumsum(np.diff(self._cuts)[permuted]) if self._shuffle == BLOCKS else permuted[:0]
            self._permuted = epoch, permuted, ends
        return self._permuted[1:]

    def _permutation(self, n: int, *key: int) -> Ints:
        # A generator's methods may change between versions of NumPy; its raw stream may not, and nor may an epoch.
        return np.argsort(np.random.PCG64([self._seed, *key]).random_raw(n), kind="stable")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_permuted": None}
