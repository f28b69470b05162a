"""States job: the states of given sequences at a boundary, by one forward of a full checkpoint over each.

For analyses whose sequences go on beyond those of the store. What is kept are the rows from some position on: those
before it are in the store already. Knows forwarders through an engine alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from actcache.canonical import digest_of
from actcache.capture.forward import Pack
from actcache.models.cost import ModelShape
from actcache.progress import Told, nobody_told
from actcache.store.layout import STATE
from actcache.study.forward_job import ModelEngine
from actcache.study.jobs import Result
from actcache.study.work import Cost

ROWS = "rows"


@dataclass(frozen=True, eq=False, kw_only=True)
class StatesJob:
    """A full checkpoint over sequences that begin as a segment's do.

    Attributes:
        store: digest of the store's fingerprint.
        segment: its name.
        boundary: whose states are kept.
        checkpoint: digest of the checkpoint's fingerprint.
        label: by which an engine knows the checkpoint.
        dtype: of weights and states.
        sequences: token ids of each.
        first: of each, the first position whose row is kept.
        strict: one sequence per forward.
        max_tokens: tokens per forward otherwise. Packs hold the sequences in this order.
    """

    store: str
    segment: str
    boundary: int
    checkpoint: str
    label: str
    dtype: str
    sequences: tuple[tuple[int, ...], ...]
    first: tuple[int, ...]
    strict: bool
    max_tokens: int

    @property
    def key(self) -> dict[str, Any]:
        """All that its rows depend on."""
        return {
            "job": "states",
            "store": self.store,
            "segment": self.segment,
            "boundary": self.boundary,
            "checkpoint": self.checkpoint,
            "dtype": self.dtype,
            "sequences": digest_of([self.sequences, self.first]),
            "strict": self.strict,
            "max_tokens": None if self.strict else self.max_tokens,
        }

    @property
    def n_units(self) -> int:
        """Sequences."""
        return len(self.sequences)

    @property
    def n_rows(self) -> list[int]:
        """Of each sequence, how many rows are kept."""
        return [len(ids) - first for ids, first in zip(self.sequences, self.first, strict=True)]

    def cost(self, shapes: Mapping[str, ModelShape]) -> Cost:
        """What it takes: all blocks over every sequence once."""
        lengths = np.array([len(ids) for ids in self.sequences], np.float64)
        return Cost({"states": shapes[self.label].products(lengths)})

    def read(self, engine: ModelEngine) -> None:
        """Nothing: the job has its sequences."""

    @torch.no_grad()
    def run(self, engine: ModelEngine, read: None = None, told: Told = nobody_told) -> Result:
        """Run every sequence.

        Returns:
            One row per sequence, in order: its number, and how many ``rows`` it has; beside it ``rows`` ``[N, D]``, in
            this order. The note ``mode`` says how sequences shared forwards: ``packed`` or ``single``.
        """
        reader = engine.forwarder(self.label, self.dtype)
        is_single = self.strict or reader.why_not_packable() is not None
        lengths = [len(ids) for ids in self.sequences]
        packs = [
            Pack.of(
                [self.sequences[n] for n in numbers],
                [range(self.first[n], lengths[n]) for n in numbers],
                [[] for _ in numbers],
            )
            for numbers in reader.regimes.packs(lengths, 0 if is_single else self.max_tokens)
        ]
        rows = []
        for pack, ran in zip(packs, reader.run(packs, ((STATE, self.boundary),)), strict=True):
            rows.append(ran.rows[STATE, self.boundary].clone())
            told(len(pack.bounds) - 1, tokens=pack.bounds[-1])
        table = pa.table({"sequence": pa.array(range(len(lengths)), pa.int64()), ROWS: pa.array(self.n_rows)})
        return Result(table, {"mode": "single" if is_single else "packed"}, {ROWS: torch.cat(rows)})
