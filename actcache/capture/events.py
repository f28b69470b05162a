"""Events with their rows, as a segment of a store has them: what a capture forward has decided, put together.

Knows tables, tokens and rows; runs no forwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from actcache import carried
from actcache.models.packing import offsets_of
from actcache.prompts import Prompt
from actcache.schema import EVENTS, OUTVOTED, ROLES, arrow_type, margin_column
from actcache.store import SegmentData
from actcache.store.layout import STATE
from actcache.store.segment_data import SiteRows

CONTEXT_TOKENS = 48  # of text kept with an event, for people to read


class Scored(NamedTuple):
    """What every checkpoint makes of a pair of tokens.

    Attributes:
        margins: ``logit(second) - logit(first)``, by label.
        outvoted: by label, the masked token that has the best logit of all there, -1 for none; empty where
            vocabularies do not differ.
    """

    margins: dict[str, float]
    outvoted: dict[str, int]


@dataclass(frozen=True)
class Event:
    """One event of a sequence.

    Attributes:
        position: in the sequence.
        kind: how it was chosen.
        pair: labels of the checkpoints in the roles pt and it.
        tokens: of the pair, by role.
        gaps: of the pair: the best logit less the next one.
        scored: what every checkpoint makes of the tokens.
        final: the last block's output there, ``[D]`` by label.
        step: tokens that were generated before it.
        proposed_step: the step that a search proposed first.
        carried: further keys of its prompt or line.
    """

    position: int
    kind: str
    pair: tuple[str, str]
    tokens: tuple[int, ...]
    gaps: tuple[float, ...]
    scored: Scored
    final: dict[str, torch.Tensor]
    step: int
    proposed_step: int
    carried: dict[str, Any] = field(default_factory=dict)


class Excluded(NamedTuple):
    """A prompt that has no event of a pair, or one event less, and why."""

    prompt: Prompt
    reason: str
    pair: tuple[str, str]


@dataclass(frozen=True)
class Captured:
    """A sequence that a capture forward ran over, its events by position, and its rows, ``[n, D]`` by site, label and
    block; ``order`` says where its prompt stands among those of the segment."""

    order: int
    prompt_id: str
    token_ids: list[int]
    events: list[Event]
    rows: SiteRows


def segment_of(
    captured: Sequence[Captured],
    excluded: Sequence[Excluded],
    *,
    labels: Sequence[str],
    of_pairs: bool,
    has_tails: bool,
    sites: Sequence[tuple[str, int]],
    empty: torch.Tensor,
    decode: Callable[[Sequence[int]], str],
    special: Collection[int],
) -> SegmentData:
    """What a segment holds of these sequences.

    Args:
        captured: in the order wanted.
        excluded: prompts, or their events, that were left out.
        labels: of all checkpoints.
        of_pairs: whether events may be of several pairs, so that their names and what is excluded tell it.
        has_tails: whether vocabularies differ, so that it is told what is never chosen and would have been.
        sites: a site and a block each, that there are rows of.
        empty: ``[0, D]`` in the store's dtype.
        decode: gives the text of tokens.
        special: ids that are special tokens.
    """
    keys = [(site, label, block) for site, block in sites for label in labels]
    rows = {key: torch.cat([empty, *(one.rows[key] for one in captured)]) for key in keys}
    final = {
        label: torch.cat([empty, *(event.final[label][None] for one in captured for event in one.events)])
        for label in labels
    }
    left_out = {
        "prompt_id": [one.prompt.id for one in excluded],
        "reason": [one.reason for one in excluded],
        "carried": [carried.encode(one.prompt.carried) for one in excluded],
    }
    if of_pairs:
        left_out["pair"] = [",".join(one.pair) for one in excluded]
    return SegmentData(
        token_ids=np.array([token for one in captured for token in one.token_ids], dtype=np.int32),
        sequence_offsets=offsets_of([len(one.token_ids) for one in captured]).numpy(),
        states={(label, block): rows.pop((site, label, block)) for site, label, block in keys if site == STATE},
        sites=rows,
        final=final,
        events=_table(captured, labels, of_pairs, has_tails, decode, special),
        excluded=pa.table({name: pa.array(values, pa.string()) for name, values in left_out.items()}),
    )


def _table(
    captured: Sequence[Captured],
    labels: Sequence[str],
    of_pairs: bool,
    has_tails: bool,
    decode: Callable[[Sequence[int]], str],
    special: Collection[int],
) -> pa.Table:
    owned = [(number, one, event) for number, one in enumerate(captured) for event in one.events]
    events = [event for _, _, event in owned]
    margins = {
        margin_column(role): [event.scored.margins[event.pair[at]] for event in events] for at, role in enumerate(ROLES)
    }
    margins |= {margin_column(label): [event.scored.margins[label] for event in events] for label in labels}
    values: dict[str, Iterable[Any]] = {
        "event_id": _distinct([_name(one.prompt_id, event, of_pairs) for _, one, event in owned]),
        "prompt_id": (one.prompt_id for _, one, _ in owned),
        "kind": (event.kind for event in events),
        "pair": (",".join(event.pair) for event in events),
        "step": (event.step for event in events),
        "proposed_step": (event.proposed_step for event in events),
        "sequence": (number for number, _, _ in owned),
        "position": (event.position for event in events),
        "context": (decode(_tail(one.token_ids, event.position)) for _, one, event in owned),
        "carried": (carried.encode(event.carried) for event in events),
        **margins,
    }
    for at, role in enumerate(ROLES):
        tokens = [event.tokens[at] for event in events]
        values[f"y_{role}"] = tokens
        values[f"token_{role}"] = (decode([token]) for token in tokens)
        values[f"special_{role}"] = (int(token in special) for token in tokens)
        values[f"gap_{role}"] = [event.gaps[at] for event in events]
        values[f"outvoted_{role}"] = [event.scored.outvoted.get(event.pair[at], -1) for event in events]
    columns = [column for column in EVENTS if has_tails or column not in OUTVOTED]
    types = {column.name: arrow_type(column.type) for column in columns}
    order = [*types, *(name for name in margins if name not in types)]
    return pa.table({name: pa.array(list(values[name]), types.get(name, pa.float32())) for name in order})


def _tail(token_ids: Sequence[int], position: int) -> Sequence[int]:
    return token_ids[max(0, position + 1 - CONTEXT_TOKENS) : position + 1]


def _name(prompt_id: str, event: Event, of_pairs: bool) -> str:
    name = f"{prompt_id}@{event.position}:{event.kind}"
    return f"{name}:{','.join(event.pair)}" if of_pairs else name


def _distinct(ids: Sequence[str]) -> list[str]:
    """Names of events, of which several of one kind may stand at one place: then with a number."""
    seen: Counter[str] = Counter()
    distinct = []
    for one in ids:
        seen[one] += 1
        distinct.append(one if seen[one] == 1 else f"{one}#{seen[one]}")
    return distinct
