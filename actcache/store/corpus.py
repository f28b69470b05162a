"""Corpus: of a store of texts without events, which rows count, and which texts are held out.

A corpus has a row for every token, so that its sequences can run again for rows of further sites. The rows of special
tokens count for nothing: a feed leaves them out. Knows segments; reads no rows.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from actcache.store.segment import Segment

CORPUS = "corpus"
"""What a fingerprint calls the support of a store without events."""

HELD_OUT = "SHA-256 of 'corpus:ID', its first 8 bytes as a number, is divisible by 10"
HELD_OUT_SHARE = 0.1
TRAIN, VALIDATION = "train", "held_out"
SPLITS = (TRAIN, VALIDATION)


def held_out(prompt_id: str) -> bool:
    """Whether a text is held out for validation, as one in ten is: by its id alone, in whatever corpus it stands."""
    return int.from_bytes(hashlib.sha256(f"corpus:{prompt_id}".encode()).digest()[:8], "big") % 10 == 0


def rows_of_split(segment: Segment, split: str) -> npt.NDArray[np.bool_]:
    """Which rows of a segment are of texts that are held out, or of the others: ``[n_rows]``."""
    ids = segment.read_table("sequences")["prompt_id"].to_pylist()
    wanted = np.array([held_out(one) == (split == VALIDATION) for one in ids], bool)
    return np.repeat(wanted, np.diff(segment.row_offsets))


def rows_that_count(segment: Segment) -> npt.NDArray[np.bool_] | None:
    """Which rows of a segment are not of special tokens, ``[n_rows]``; None of a store that is no corpus."""
    dropped = segment.fingerprint.dropped
    return None if dropped is None else ~np.isin(segment.read("token_ids"), dropped)
