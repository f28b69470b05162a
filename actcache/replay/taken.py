"""Taken: what parts of blocks give at the position of each event in one checkpoint's own run, put into another's.

Both happen at the scored position alone: the keys and values before it stay the host's own. Knows late stacks and
edits; knows no stores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from actcache.replay.edits import Call, Edit, Rows, Site, Variant
from actcache.replay.late_stack import LateStack
from actcache.replay.vectors import InOneLine

Place = tuple[int, Site]
"""A block and one of its sites."""


@torch.no_grad()
def take(
    late: LateStack, rows: torch.Tensor, offsets: torch.Tensor | Sequence[int], places: Sequence[Place], **how: Any
) -> Mapping[Place, torch.Tensor]:
    """What is at these places in a run over a checkpoint's own states (arguments and errors as
    :meth:`LateStack.prepare`).

    Returns:
        ``[m, W]`` of each place: at the position of each event, in the late stack's dtype, on the CPU.
    """
    taken: dict[Place, torch.Tensor] = {}

    def keeping(place: Place) -> Callable[[torch.Tensor, Rows], torch.Tensor]:
        def keep(found: torch.Tensor, at: Rows) -> torch.Tensor:
            # Whichever thread comes first: the others write their events' rows into the same tensor.
            kept = taken.setdefault(place, found.new_zeros(len(at.lengths), found.shape[1], device="cpu"))
            kept[at.sequence] = found.cpu()
            return found

        return keep

    edits = [Edit(Call(keeping(place), "keeps"), site=place[1], layers=(place[0],)) for place in places]
    for _ in late.replay(late.prepare(rows, offsets, [Variant("taken", tuple(edits), placebo=True)], **how)):
        pass
    return taken


@dataclass(frozen=True, repr=False)
class Put(InOneLine):
    """An operation: what was taken of each event, or some columns of it, in place of the host's own.

    Attributes:
        values: ``[m, W]``, of the events in their order.
        first, stop: the columns ``first..stop-1``.
    """

    values: torch.Tensor
    first: int
    stop: int

    def __call__(self, rows: torch.Tensor, at: Rows) -> torch.Tensor:
        """Put them there."""
        out, columns = rows.clone(), slice(self.first, self.stop)
        out[:, columns] = self.values[at.sequence, columns].to(rows)
        return out

    def may_stay(self, rows: torch.Tensor, at: Rows) -> torch.Tensor | bool:
        """A row that does not move has the same there already."""
        return True
