"""Reads: what a study reads of its checkpoints where they are not all in memory at once, and what memory it takes then.

One checkpoint at a time is loaded for each round of a search, and for a capture forward. One block at a time is read in
every pass over the blocks. How many rounds a search takes is an assumption, as how long it lasts is. Knows plans; knows
no files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from actcache.capture.residency import PER_LOAD
from actcache.capture.search import FIRST_LOADED_DRAFT
from actcache.study.plan import Assumptions, Study, estimate
from actcache.study.runner import ROWS_AT_ONCE

# Tokens that a pass over the blocks decides: guesses that come true add to it.
TOKENS_PER_PASS = 1.0
# Capture forwards of each checkpoint: of what was proposed, and of what moved.
_FORWARDS = 2


@dataclass(frozen=True)
class Reads:
    """How often the checkpoints of a capture, or the late stacks of a grid, are read, and how much that is.

    Attributes:
        times: passes over the blocks of one, or loads of it.
        read_bytes: read for them.
    """

    times: float
    read_bytes: float


def estimate_apart(study: Study, assumed: Assumptions, *, stream: bool) -> dict[str, float]:
    """The rows of :func:`actcache.study.plan.estimate`, and what is read, where one block (``stream``) is in memory at
    a time, or one checkpoint."""
    rows = estimate(study, assumed)
    shape, size = study.shape, study.captured.itemsize
    of_blocks, of_head = sum(shape.block_parameters) * size, shape.readout_parameters * size
    frame = shape.n_parameters * size - of_blocks
    held = frame + 2 * max(shape.block_parameters) * size if stream else shape.n_parameters * size
    rows["capture_memory_bytes"] += held - study.n_checkpoints * shape.n_parameters * size
    captured = _capture_reads(study, assumed, stream=stream)
    grid = Reads(0, 0)
    if stream:
        _recompute(rows, study, assumed)
    if study.work:
        first = min(one.boundary for one in study.work)
        late = sum(shape.block_parameters[first:]) * size
        n_late = study.n_checkpoints
        own = 2 * max(shape.block_parameters) * size if stream else late
        heads = {head for one in study.work for head in one.heads}
        # Of a list of late stacks, one is there, and the heads that score what it gives.
        rows["grid_memory_bytes"] += own + len(heads) * of_head - n_late * (late + of_head)
        at_once = rows["raw_bytes"] / max(1, len(study.capture.boundaries))
        times = n_late * (max(1, math.ceil(at_once / ROWS_AT_ONCE)) if stream else 1)
        grid = Reads(times, times * (late + of_head))
    reads = {"capture": captured, "grid": grid}
    rows |= {f"{stage}_{'passes' if stream else 'loads'}": of_stage.times for stage, of_stage in reads.items()}
    return rows | {f"{stage}_read_bytes": of_stage.read_bytes for stage, of_stage in reads.items()}


def _capture_reads(study: Study, assumed: Assumptions, *, stream: bool) -> Reads:
    """Super-shards of prompts go through each round together; it lasts until the last of them is decided."""
    shape, size = study.shape, study.captured.itemsize
    n_shards = math.ceil(len(study.lengths) / PER_LOAD)
    longest = _longest(study, assumed)
    if stream:
        rounds = math.ceil((1 + longest) / TOKENS_PER_PASS)
    else:
        rounds = 1 + max(0, math.ceil(math.log2((1 + longest) / FIRST_LOADED_DRAFT + 1)) - 1)
    times = n_shards * (study.n_paired * rounds + study.n_checkpoints * _FORWARDS)
    return Reads(times, times * shape.n_parameters * size)


def _longest(study: Study, assumed: Assumptions) -> float:
    """Tokens that the prompt of a super-shard that is decided last shares."""
    most = study.capture.max_new - 1.0
    if assumed.event_share < 1 or len(assumed.shared_counts):
        return most if assumed.event_share < 1 else len(assumed.shared_counts) - 1.0
    n = min(len(study.lengths), PER_LOAD)
    # As if each token had the same chance to be the last one shared: the longest of n grows with their logarithm.
    return min(most, assumed.shared_tokens * (math.log(max(n, 1)) + 1))


def _recompute(rows: dict[str, float], study: Study, assumed: Assumptions) -> None:
    """Without a cache each round of a search runs whole sequences."""
    prompts = np.asarray(study.lengths, np.float64)
    expected = assumed.expected
    steps = expected.searched_tokens()
    rounds = (1 + steps) / TOKENS_PER_PASS
    products = rounds * study.n_paired * study.shape.products(prompts + steps / 2)
    products += study.n_paired * len(prompts) * (1 + steps) * study.shape.head_products
    added = products - rows["search_multiply_adds"]
    rows["search_multiply_adds"] = products
    rows["multiply_adds"] += added
    if "capture_s" in rows:
        rows["capture_s"] += added / assumed.rates["search"]


def said(*, stream: bool) -> str:
    """One line of what was assumed."""
    how = (
        f"a pass decides {TOKENS_PER_PASS:g} token of each prompt"
        if stream
        else f"a round drafts {FIRST_LOADED_DRAFT} tokens, then twice as many"
    )
    return f"assumed: {how}; up to {PER_LOAD:,} prompts share {'a pass' if stream else 'a load'}"
