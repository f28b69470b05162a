"""The order of an epoch of a feed, batch after batch: from what the module says of it, by loops over single rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def permuted(n: int, *key: int) -> list[int]:
    """Numbers below n, in the order of as many numbers that are drawn by this key."""
    drawn = np.random.PCG64([*key]).random_raw(n).tolist()
    return sorted(range(n), key=lambda number: drawn[number])


def epoch_of_blocks(
    rows: Sequence[int],
    block_of: Callable[[int], object],
    *,
    batch_rows: int,
    round_batches: int,
    lanes: int,
    seed: int,
    epoch: int,
) -> list[list[int]]:
    """The batches of an epoch with ``shuffle="blocks"``: rows in storage order, and the block that each lies in."""
    blocks: list[list[int]] = []
    for row in rows:
        if not blocks or block_of(blocks[-1][0]) != block_of(row):
            blocks.append([])
        blocks[-1].append(row)
    line = [row for number in permuted(len(blocks), seed, epoch, 1) for row in blocks[number]]
    n_batches = -(-len(rows) // batch_rows)
    sizes = [min(batch_rows, len(rows) - number * batch_rows) for number in range(n_batches)]
    n_rounds = -(-n_batches // round_batches)
    epoch_batches: list[list[int]] = []
    taken = 0
    for number in range(n_rounds):
        start, stop = n_batches * number // n_rounds, n_batches * (number + 1) // n_rounds
        of_round: dict[int, list[int]] = {}
        for lane in range(lanes):
            of_lane = [batch for batch in range(start, stop) if (batch - start) % lanes == lane]
            n = sum(sizes[batch] for batch in of_lane)
            in_storage_order = sorted(line[taken : taken + n])
            mixed = [in_storage_order[at] for at in permuted(n, seed, epoch, 2, taken)]
            taken += n
            for batch in of_lane:
                of_round[batch], mixed = mixed[: sizes[batch]], mixed[sizes[batch] :]
        epoch_batches += [of_round[batch] for batch in range(start, stop)]
    return epoch_batches


def epoch_of_rows(rows: Sequence[int], *, batch_rows: int, seed: int | None, epoch: int) -> list[list[int]]:
    """The batches of an epoch with ``shuffle="rows"``, or unshuffled where there is no seed."""
    order = range(len(rows)) if seed is None else permuted(len(rows), seed, epoch, 1)
    line = [rows[number] for number in order]
    return [line[start : start + batch_rows] for start in range(0, len(line), batch_rows)]
