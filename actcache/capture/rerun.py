"""Stored sequences, run again for rows that their store lacks: no search, and no event is decided anew.

Knows segments and what is asked of checkpoints; writes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from actcache.capture.asks import Forward, Steps, ran
from actcache.capture.forward import Pack
from actcache.models.regimes import Regimes
from actcache.progress import Told
from actcache.store import Segment
from actcache.store.layout import STATE_DTYPES, Sites
from actcache.store.segment_data import SiteRows


@dataclass(frozen=True)
class _Stored:
    """A sequence of a segment."""

    name: str
    sequence: list[int]


def rows_to_add(
    segment: Segment, sites: Sites, labels: Sequence[str], regimes: Regimes, pack_tokens: int, told: Told
) -> Steps[SiteRows]:
    """Rows of further sites of a segment, at the positions whose rows it has.

    Args:
        segment: committed.
        sites: blocks, by site.
        labels: of all checkpoints of the store.
        regimes: in which sequences share a forward.
        pack_tokens: tokens of one forward; 0 for one sequence each.
        told: hears of sequences.
    """
    ids, offsets = segment.read("token_ids"), segment.row_offsets
    lengths = np.diff(offsets)
    places = _stored_places(segment)
    width, dtype = segment.fingerprint.width, STATE_DTYPES[segment.fingerprint.dtype]
    wanted = [(site, block) for site, blocks in sites.items() for block in blocks]
    filled = np.flatnonzero(lengths)  # a sequence without tokens has no rows
    filled = filled[np.argsort([regimes.of(int(n)) for n in lengths[filled]], kind="stable")]
    packed = [filled[pack.start : pack.stop] for pack in regimes.packs(lengths[filled].tolist(), pack_tokens)]
    whose = [
        [_Stored(f"sequence {n} of segment {segment.name}", ids[offsets[n] : offsets[n + 1]].tolist()) for n in numbers]
        for numbers in packed
    ]
    packs = [
        Pack.of([one.sequence for one in of_pack], [places[n][0].tolist() for n in numbers], [[] for _ in numbers])
        for numbers, of_pack in zip(packed, whose, strict=True)
    ]
    found = yield from ran(Forward(packs, whose, wanted, ()))
    keys = [(site, label, block) for site, block in wanted for label in labels]
    out = {key: torch.empty(segment.n_rows, width, dtype=dtype) for key in keys}
    for numbers, of_pack in zip(packed, found, strict=True):
        to = torch.from_numpy(np.concatenate([places[n][1] for n in numbers]))
        for key, rows in of_pack.rows.items():
            out[key][to] = rows[:]
        told(len(numbers))
    return out


def _stored_places(segment: Segment) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Of each sequence the positions whose rows a segment has, and where among its rows these lie."""
    offsets = segment.row_offsets
    if segment.fingerprint.has_prefix_rows:
        return [(np.arange(stop - start), np.arange(start, stop)) for start, stop in itertools.pairwise(offsets)]
    events = segment.read_table("events")
    sequence, position = events["sequence"].to_numpy(), events["position"].to_numpy()
    return [(position[own], own) for n in range(segment.n_sequences) for own in [np.flatnonzero(sequence == n)]]
