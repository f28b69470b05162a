"""Moves: which edits moved something in which event. One that moves nothing is a mistake, unless that was to be
expected: its weight is 0, it is a declared placebo, or source and host rows are equal. Knows edits; runs none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from actcache.errors import InputError
from actcache.finite import first_no_state
from actcache.replay.edits import Edit, Rows, Variant

_NOWHERE = torch.iinfo(torch.int64).max  # behind every position


class Moves:
    """Watches the edits of one call of :meth:`actcache.replay.late_stack.LateStack.replay`."""

    def begin(self, variants: Sequence[Variant], keys: Sequence[str], lengths: Sequence[int]) -> None:
        """Watch these variants over events with these names, whose sequences have these lengths, from the start."""
        self._variants, self._keys = variants, keys
        self._last = torch.tensor(lengths, dtype=torch.int64) - 1
        most = max((len(variant.edits) for variant in variants), default=0)
        self._moved = torch.zeros(len(variants), most, len(keys), dtype=torch.bool)

    def watch(
        self, number: int, events: torch.Tensor, within: torch.Tensor
    ) -> Callable[[Edit, Rows, torch.Tensor, torch.Tensor], None]:
        """What is to be told of this variant's edits of these events (see :class:`actcache.replay.operations.Rows`).

        Args:
            number: of the variant.
            events: ``[n]``.
            within: ``[n]``, of each event the one whose rows are told of: itself, or one that goes on in its sequence.

        Raises:
            InputError: when told of an edit that left all rows of an event as they are and should not have, or that
                gave values that are not finite, or whose squares are not; names the variant and the event.
        """
        return partial(self._see, number, events, within)

    def still(self, number: int, *, after: int = 0) -> torch.Tensor:
        """``[n]`` bool: the events in which no edit of this variant, its first ``after`` apart, moved anything."""
        n_edits = len(self._variants[number].edits)
        return ~self._moved[number, after:n_edits].any(dim=0)

    def _see(
        self,
        number: int,
        events: torch.Tensor,
        within: torch.Tensor,
        edit: Edit,
        at: Rows,
        before: torch.Tensor,
        after: torch.Tensor,
    ) -> None:
        variant = self._variants[number]
        where = "the state" if at.layer is None else f"the {edit.site} of block {at.layer}"
        edited = f"variant {variant.name!r}: its edit {type(edit.operation).__name__} of {where}"
        if (row := first_no_state(after)) is not None:  # a norm behind it would make zeros of it
            raise InputError(
                f"{edited} gives {self._keys[int(at.sequence[row])]!r} values that are not finite in {after.dtype}, or "
                "whose squares are not in float32; leave it out, or make its values smaller"
            )

        def some_of(rows: torch.Tensor) -> torch.Tensor:
            """``[n]`` bool: the events that have any of these rows ``[m]`` bool."""
            first = torch.full((len(self._keys),), _NOWHERE)
            first.scatter_reduce_(0, at.sequence[rows], at.position[rows], "amin")
            return first[within] <= self._last[events]

        moved = some_of((before != after.to(before.dtype)).any(dim=1).cpu())
        index = next(index for index, one in enumerate(variant.edits) if one is edit)
        self._moved[number, index, events] |= moved  # and no others: their threads write them
        if variant.placebo or moved.all():
            return
        may_stay = edit.may_stay(before, at)
        rows = ~may_stay.cpu() if isinstance(may_stay, torch.Tensor) else torch.full((len(at),), not may_stay)
        wrong = some_of(rows) & ~moved
        if wrong.any():
            key = self._keys[int(events[wrong][0])]
            raise InputError(
                f"{edited} moves nothing at {key!r}; give it something to move, or declare the variant a placebo"
            )
