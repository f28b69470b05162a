"""Lens: what a readout makes of states in the middle of the network. Knows stores and readouts; loads nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache

import pyarrow as pa
import torch

from actcache.counts import check_whole
from actcache.errors import InputError, NotFiniteError
from actcache.models.readout import Readout
from actcache.schema import ROLES
from actcache.store import Store
from actcache.store.selection import Events


def lens(
    store: Store,
    label: str,
    readout: Readout,
    decode: Callable[[Sequence[int]], str],
    *,
    boundaries: Iterable[int],
    k: int,
    events: Events,
) -> pa.Table:
    """One row per boundary and event, see :meth:`actcache.Run.lens`.

    Args:
        store: with the states.
        label: of the checkpoint that they are of.
        readout: reads them.
        decode: gives the text of tokens.
        boundaries: to read at; L, the number of blocks, for the last block's output.
        k: how many of the best tokens to name.
        events: see :class:`Store`.
    """
    if isinstance(boundaries, str) or not isinstance(boundaries, Iterable):
        raise InputError(f"boundaries are {boundaries!r}, expected a list of whole numbers, such as [18]")
    boundaries = list(boundaries)
    if not boundaries:
        raise InputError("the lens has no boundary to read at; give one, or None for all that are stored")
    numbers = store.numbers(events)
    table = store.events.take(pa.array(numbers))
    pair_ids = torch.tensor([table[f"y_{role}"].to_pylist() for role in ROLES], dtype=torch.int64).T
    text_of = cache(lambda token: decode([token]))
    parts = []
    for boundary in boundaries:
        check_whole(boundary, "boundary")
        if boundary == store.fingerprint.n_blocks:
            rows = store.final(label, numbers)
        else:
            rows, _ = store.states(label, boundary, numbers, positions="event")
        try:
            read, scores = readout.read(rows, pair_ids, k), readout.scores(rows, pair_ids)
        except NotFiniteError as error:
            of = "" if error.row is None else f", event {table['event_id'][error.row]}"
            raise NotFiniteError(f"states of {label} at boundary {boundary}{of}: {error}", row=error.row) from error
        top_ids = read.top_ids.tolist()
        part: dict[str, pa.Array | pa.ChunkedArray] = {
            "event_id": table["event_id"],
            "boundary": pa.array([boundary] * len(numbers), pa.int32()),
            **{f"rank_{role}": pa.array(of.numpy()) for role, of in zip(ROLES, read.ranks.T, strict=True)},
            "margin": pa.array((scores[:, 1] - scores[:, 0]).numpy()),
            "entropy": pa.array(read.entropy.numpy()),
            "top_ids": pa.array(top_ids, pa.list_(pa.int64())),
            "top_texts": pa.array([[text_of(token) for token in ids] for ids in top_ids], pa.list_(pa.string())),
            "top_logits": pa.array(read.top_logits.tolist(), pa.list_(pa.float32())),
        }
        parts.append(pa.table(part))
    return pa.concat_tables(parts)
