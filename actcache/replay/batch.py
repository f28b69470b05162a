"""Batch: what one call of a late stack replays, checked before anything runs. Knows tensors and edits; runs nothing."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from actcache.errors import InputError
from actcache.finite import first_no_state
from actcache.models.backbone import Backbone
from actcache.replay.around import Around
from actcache.replay.edits import Variant
from actcache.replay.forwards import Forwards, Mode
from actcache.replay.modes import tokens_of_pack
from actcache.replay.moves import Moves

# Sequence and position of each event, [m, 2] whole numbers.
Positions = torch.Tensor | Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Batch:
    """What one call replays, and how.

    Attributes:
        rows: ``[N, D]`` states.
        spans: of each event, the rows from its sequence's first position to its own.
        keys: what names each event.
        prompts: what names each event's prompt.
        donors: label -> rows of another checkpoint beside ``rows``.
        variants: what to change; layers are block indices.
        moves: is told which edits moved something.
        mode: how sequences share a forward.
        budget: tokens of one forward.
        boundary: first block that runs.
        sizes: whether how large the outputs at every position are is wanted, in place of the output at p.
        together: whether events of one sequence share its forward also where each sequence has one of its own.
        around: inside which blocks the residual stream at p is wanted, beside the output there.
        entering: the block of which the state that enters it is wanted, at every position, in place of the output at p.
    """

    rows: torch.Tensor
    spans: Sequence[range]
    keys: Sequence[str]
    prompts: Sequence[str]
    donors: Mapping[str, torch.Tensor]
    variants: Sequence[Variant]
    moves: Moves
    mode: Mode
    budget: int
    boundary: int = 0
    sizes: bool = False
    together: bool = False
    around: Around | None = None
    entering: int | None = None

    @classmethod
    def of(
        cls,
        forwards: Forwards,
        mode: Mode,
        max_tokens: int | None,
        rows: torch.Tensor,
        offsets: torch.Tensor | Sequence[int],
        variants: Sequence[Variant],
        positions: Positions | None,
        donors: Mapping[str, torch.Tensor] | None,
        keys: Sequence[str] | None,
        prompts: Sequence[str] | None,
        moves: Moves | None,
        **wanted: Any,
    ) -> Batch:
        """What a call of :meth:`LateStack.prepare` is given, checked (see there); ``wanted`` is ``sizes``,
        ``together``, ``around`` or ``entering``."""
        backbone = forwards.backbone
        bounds = _check_rows(backbone, rows, offsets)
        spans = _spans(bounds, positions)
        donors = donors or {}
        for label, other in donors.items():
            if other.shape != rows.shape:
                raise InputError(f"donor {label!r} has shape {tuple(other.shape)}, the rows have {tuple(rows.shape)}")
            if other.dtype != rows.dtype:
                raise InputError(f"donor {label!r} is {other.dtype}, the rows are {rows.dtype}")
            if other is not rows:
                _check_finite(f"donor {label!r}", other, bounds)
        for what, names in (("keys", keys), ("prompts", prompts)):
            if names is not None and len(names) != len(spans):
                of_what = "sequences" if positions is None else "positions"
                raise InputError(f"{len(names)} {what} are given for {len(spans)} {of_what}")
        keys = [str(number) for number in range(len(spans))] if keys is None else list(keys)
        prompts = _prompts(spans, bounds, prompts)
        lengths = [len(span) for span in spans]
        for variant in variants:
            for edit in variant.edits:
                edit.check_layers(forwards.boundary, backbone.n_blocks, variant.name)
                edit.check_positions(lengths, variant.name)
                edit.check_vectors(backbone.width, backbone.dtype, keys, variant.name)
        variants = [variant.of_depth(backbone.n_blocks) for variant in variants]
        moves = moves or Moves()
        moves.begin(variants, keys, lengths)
        budget = tokens_of_pack(backbone.device, max_tokens)
        of = (rows, spans, keys, prompts, donors, variants, moves, mode, budget)
        return cls(*of, forwards.boundary, **wanted)

    @cached_property
    def lengths(self) -> torch.Tensor:
        """``[n]`` int64, of the events' sequences, each cut after its position."""
        return torch.tensor([len(span) for span in self.spans], dtype=torch.int64)


def _check_rows(backbone: Backbone, rows: torch.Tensor, offsets: torch.Tensor | Sequence[int]) -> list[int]:
    bounds = [int(offset) for offset in offsets]
    width, dtype, most = backbone.width, backbone.dtype, backbone.max_positions
    if rows.dtype != dtype:
        raise InputError(f"rows are {rows.dtype}, this late stack is {dtype}; load it with dtype={rows.dtype}")
    if rows.ndim != 2 or rows.shape[1] != width:
        raise InputError(f"rows have shape {tuple(rows.shape)}, expected [N, {width}]")
    if not bounds or bounds[0] != 0 or bounds[-1] != len(rows):
        raise InputError(
            f"offsets must run from 0 to the number of rows, {len(rows)}; found {bounds[:1]}..{bounds[-1:]}"
        )
    for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if stop <= start:
            raise InputError(f"sequence {index} has {stop - start} rows; each needs at least one")
        if most is not None and stop - start > most:
            raise InputError(f"sequence {index} has {stop - start} rows; the model has {most} positions")
    _check_finite("the states given", rows, bounds)
    return bounds


def _check_finite(what: str, rows: torch.Tensor, bounds: Sequence[int]) -> None:
    if (row := first_no_state(rows)) is not None:
        sequence = bisect_right(bounds, row) - 1
        raise InputError(
            f"{what}: row {row} (sequence {sequence}, position {row - bounds[sequence]}) holds values that are not "
            "finite, or whose squares are not; a store of an earlier version that does must be captured again"
        )


def _spans(bounds: Sequence[int], positions: Positions | None) -> list[range]:
    """The rows of each event: of its sequence, up to its position."""
    if positions is None:
        return [range(start, stop) for start, stop in itertools.pairwise(bounds)]
    expected = "expected [m, 2] whole numbers, the sequence and the position of each event"
    try:
        given = torch.as_tensor(positions)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"positions are {str(positions)[:60]}, {expected}") from error
    if not given.numel():
        return []
    is_whole = not given.is_floating_point() and not given.is_complex() and given.dtype != torch.bool
    if not is_whole or given.ndim != 2 or given.shape[1] != 2:
        raise InputError(f"positions have shape {list(given.shape)} and dtype {given.dtype}, {expected}")
    spans = []
    for event, (sequence, position) in enumerate(given.tolist()):
        if not 0 <= sequence < len(bounds) - 1:
            raise InputError(f"event {event} is in sequence {sequence}; there are {len(bounds) - 1}, from 0 on")
        start, stop = bounds[sequence], bounds[sequence + 1]
        if not 0 <= position < stop - start:
            raise InputError(
                f"event {event} is at position {position} of sequence {sequence}, which has {stop - start}, from 0 on"
            )
        spans.append(range(start, start + position + 1))
    return spans


def _prompts(spans: Sequence[range], bounds: Sequence[int], given: Sequence[str] | None) -> list[str]:
    """What names each event's prompt: that of its sequence."""
    sequences = [bisect_right(bounds, span.start) - 1 for span in spans]
    if given is None:
        return [str(sequence) for sequence in sequences]
    of_sequence: dict[int, str] = {}
    for sequence, prompt in zip(sequences, given, strict=True):
        if of_sequence.setdefault(sequence, prompt) != prompt:
            raise InputError(
                f"sequence {sequence} has events of the prompts {of_sequence[sequence]!r} and {prompt!r}; a sequence "
                "is of one prompt"
            )
    return list(given)
