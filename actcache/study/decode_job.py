"""Decode job: a full model's own greedy continuation of given sequences.

For supports and analyses that need what a checkpoint would write by itself. It decodes as the search does: with a cache
where that gives what full forwards give. Knows backbones through an engine alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from actcache.canonical import digest_of
from actcache.capture.forward import Resident
from actcache.capture.residency import AllResident
from actcache.capture.search import Outcome, Proposal, SearchLimits, propose
from actcache.models.cost import ModelShape
from actcache.progress import Told, nobody_told
from actcache.study.forward_job import ModelEngine
from actcache.study.jobs import Result
from actcache.study.work import Cost

CONTINUATIONS = pa.schema(
    [
        ("sequence", pa.int64()),
        ("token_ids", pa.list_(pa.int64())),
        ("ended_by", pa.string()),
        ("end_id", pa.int64()),
    ]
)

# Why a continuation ends, in the words of its table.
_ENDED_BY = {
    Outcome.ENDED: "end_token",
    Outcome.NO_DIVERGENCE: "max_new",
    Outcome.POSITION_LIMIT: "position_limit",
}


@dataclass(frozen=True)
class DecodeJob:
    """What a checkpoint writes after given sequences, choosing its best token each time.

    Attributes:
        checkpoint: digest of the checkpoint's fingerprint.
        label: by which an engine knows the checkpoint.
        dtype: of weights and states.
        sequences: token ids of each, at least one.
        max_new: tokens to write at most, at least one.
        end_ids: tokens that end a continuation, in order.
        max_positions: longest sequence that the model takes, or None.
        max_tokens: tokens of one batch's prompts, padded to the longest.
        names: what an error calls each sequence; by default its number.
    """

    checkpoint: str
    label: str
    dtype: str
    sequences: tuple[tuple[int, ...], ...]
    max_new: int
    end_ids: tuple[int, ...]
    max_positions: int | None
    max_tokens: int
    names: tuple[str, ...] = ()

    @property
    def key(self) -> dict[str, Any]:
        """All that its rows depend on."""
        limits = {"max_new": self.max_new, "end_ids": sorted(self.end_ids), "max_positions": self.max_positions}
        of = {"checkpoint": self.checkpoint, "dtype": self.dtype, "sequences": digest_of(self.sequences)}
        return of | limits | {"max_tokens": self.max_tokens}

    @property
    def n_units(self) -> int:
        """Sequences."""
        return len(self.sequences)

    def cost(self, shapes: Mapping[str, ModelShape]) -> Cost:
        """What it takes at most, where every continuation has ``max_new`` tokens; padding is not counted."""
        shape, lengths = shapes[self.label], np.array([len(ids) for ids in self.sequences], np.float64)
        products = shape.products(lengths) + len(lengths) * self.max_new * shape.head_products
        products += sum(shape.step_products(lengths + step) for step in range(self.max_new - 1))
        return Cost({"decode": products})

    def read(self, engine: ModelEngine) -> None:
        """Nothing: the job has its sequences."""

    def run(self, engine: ModelEngine, read: None = None, told: Told = nobody_told) -> Result:
        """Decode every sequence.

        Returns:
            One row per sequence, in order: its number; ``token_ids``, without an end token; and ``ended_by``, which is
            ``end_token``, ``max_new`` or ``position_limit``; and ``end_id``, the end token, or null. The note
            ``decoding`` says how it was decoded.

        Raises:
            NotFiniteError: a logit is NaN or infinite; names the sequence and the first block.
        """
        backbone = engine.backbone(self.label, self.dtype)
        reader = Resident(backbone, self.max_tokens)
        limits = SearchLimits(self.max_new, frozenset(self.end_ids), self.max_positions)
        written: list[list[int]] = [[] for _ in self.sequences]
        ended_by: list[str | None] = [None] * len(self.sequences)
        end_ids: list[int | None] = [None] * len(self.sequences)
        names = self.names or tuple(f"sequence {number}" for number in range(len(self.sequences)))
        going = list(range(len(self.sequences)))
        while going:  # anew for each regime that a sequence grows into
            proposals = propose(
                AllResident({self.label: reader}),
                [self.label],
                [[*self.sequences[number], *written[number]] for number in going],
                [len(written[number]) for number in going],
                limits,
                max_tokens=self.max_tokens,
                on_step=lambda tokens, step, n_open: told(tokens=tokens, doing=f"step {step}, {n_open} go on"),
                names=[names[number] for number in going],
            )
            for number, proposal in zip(going, proposals, strict=True):
                written[number] += _tokens(proposal)
                ended_by[number] = _ENDED_BY.get(proposal.outcome)
                end_ids[number] = proposal.last if proposal.outcome is Outcome.ENDED else None
            told(sum(ended_by[number] is not None for number in going))
            going = [number for number in going if ended_by[number] is None]
        columns = [
            pa.array(range(len(written)), pa.int64()),
            pa.array(written, pa.list_(pa.int64())),
            pa.array(ended_by, pa.string()),
            pa.array(end_ids, pa.int64()),
        ]
        return Result(pa.table(columns, schema=CONTINUATIONS), {"decoding": str(reader.decoding.decoding)}, {})


def _tokens(proposal: Proposal) -> list[int]:
    """What was written; the token at which it ended is part of it unless it is an end token."""
    last = [] if proposal.last is None or proposal.outcome is Outcome.ENDED else [proposal.last]
    return [*proposal.shared, *last]
