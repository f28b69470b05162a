"""Before: what the steps of features will find, before there is a corpus, a crosscoder or a ranking; for a plan.

Knows the store to come and the shapes of models; makes no jobs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from actcache.capture.corpus import CONTEXT
from actcache.models.checkpoint import DTYPES
from actcache.models.cost import ModelShape
from actcache.store import Store
from actcache.study.dealt import Outlay

TOKENS = 2_000_000
"""Rows of the published corpus."""
N_BLOCKS = 3
"""Final blocks that have a crosscoder in the study, of most families."""
BATCH_BYTES = 20
"""Per row of a batch and feature: activations, what is kept of them, and copies of both."""
_FLOAT = 4  # bytes; crosscoders are float32, whatever the rows are


@dataclass(frozen=True)
class Before:
    """What there will be.

    Attributes:
        store: of the run.
        n_rows: of the corpus, of each block and checkpoint.
        n_features: of each crosscoder.
    """

    store: Store
    n_rows: int
    n_features: int

    @property
    def blocks(self) -> list[int]:
        """That have a crosscoder: the final ones."""
        n_blocks = self.store.fingerprint.n_blocks
        return [*range(max(0, n_blocks - N_BLOCKS), n_blocks)]

    @property
    def labels(self) -> tuple[str, str]:
        """Whose rows a crosscoder encodes together."""
        pt, it = self.store.fingerprint.event_pairs[0]
        return pt, it

    @property
    def n_values(self) -> int:
        """Of the encoder of a crosscoder, and of its decoder: multiply-adds of each per row."""
        return len(self.labels) * self.store.width * self.n_features

    @property
    def crosscoder_bytes(self) -> int:
        """Of one crosscoder."""
        return 2 * _FLOAT * self.n_values

    def row_bytes(self, n_rows: float) -> float:
        """Of so many rows of a block, by both checkpoints."""
        return n_rows * len(self.labels) * self.store.width * DTYPES[self.store.fingerprint.dtype].itemsize

    def corpus(self, shapes: Mapping[str, ModelShape]) -> Outlay:
        """What ``capture --corpus`` takes, of whole texts of the longest context."""
        fingerprint, n_texts = self.store.fingerprint, math.ceil(self.n_rows / CONTEXT)
        texts = np.full(n_texts, CONTEXT, np.float64)
        of_segment = len(self.blocks) * self.row_bytes(min(n_texts, fingerprint.shard_prompts) * CONTEXT)
        return Outlay(
            multiply_adds=sum(shapes[label].products(texts) for label in self.labels),
            n_jobs=math.ceil(n_texts / fingerprint.shard_prompts) * len(self.labels),
            memory_bytes=4 * of_segment,  # as of states: one is computed and concatenated while up to two are written
            stored_bytes=len(self.blocks) * self.row_bytes(self.n_rows),
            runs_models=True,
        )

    def passes(self, n_rows: float, n_products: int, batch: int, n_read: int = 1, n_bytes: int = BATCH_BYTES) -> Outlay:
        """What rows of every block take where each goes through so many products with an encoder or decoder.

        Args:
            n_rows: of each block.
            n_products: encoders and decoders that a row goes through.
            batch: rows at once.
            n_read: how often the rows are read.
            n_bytes: per row of a batch and feature.
        """
        n_blocks = len(self.blocks)
        return Outlay(
            multiply_adds=float(n_blocks) * n_products * self.n_values * n_rows,
            n_jobs=n_blocks,
            memory_bytes=self.crosscoder_bytes + float(n_bytes) * batch * self.n_features,
            read_bytes=n_blocks * (n_read * self.row_bytes(n_rows) + self.crosscoder_bytes),
        )
