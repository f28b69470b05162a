"""Sequences that are run for their rows alone: no search, and no event is decided. So are those of a store again, for
rows that it lacks.

Knows segments and what is asked of checkpoints; writes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from actcache.capture.asks import Forward, Steps, Whose, ran
from actcache.capture.forward import Pack
from actcache.models.regimes import Regimes
from actcache.progress import Told
from actcache.store import Segment
from actcache.store.layout import STATE_DTYPES, Sites
from actcache.store.segment_data import SiteRows

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Named:
    """A sequence, and what an error calls it."""

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
    whose = [
        Named(f"sequence {number} of segment {segment.name}", ids[start:stop].tolist())
        for number, (start, stop) in enumerate(itertools.pairwise(offsets))
    ]
    wanted = [(site, block) for site, blocks in sites.items() for block in blocks]
    empty = torch.empty(0, segment.fingerprint.width, dtype=STATE_DTYPES[segment.fingerprint.dtype])
    return (yield from rows_of(whose, _stored_places(segment), wanted, labels, empty, regimes, pack_tokens, told))


def rows_of(
    whose: Sequence[Whose],
    places: Sequence[tuple[Ints, Ints]],
    wanted: Sequence[tuple[str, int]],
    labels: Sequence[str],
    empty: torch.Tensor,
    regimes: Regimes,
    pack_tokens: int,
    told: Told,
) -> Steps[SiteRows]:
    """Rows of sequences.

    Args:
        whose: the sequences; those without tokens have no rows.
        places: of each, the positions whose rows are wanted, and where among all rows these shall lie.
        wanted: each a site and a block.
        labels, regimes, pack_tokens, told: as :func:`rows_to_add`.
        empty: ``[0, D]`` in the dtype of the rows.
    """
    lengths = np.array([len(one.sequence) for one in whose], np.int64)
    filled = np.flatnonzero(lengths)
    filled = filled[np.argsort([regimes.of(int(n)) for n in lengths[filled]], kind="stable")]
    packed = [filled[pack.start : pack.stop] for pack in regimes.packs(lengths[filled].tolist(), pack_tokens)]
    of_packs = [[whose[n] for n in numbers] for numbers in packed]
    packs = [
        Pack.of([one.sequence for one in of_pack], [places[n][0].tolist() for n in numbers], [[] for _ in numbers])
        for numbers, of_pack in zip(packed, of_packs, strict=True)
    ]
    found = yield from ran(Forward(packs, of_packs, wanted, ()))
    n_rows = sum(len(to) for _, to in places)
    keys = [(site, label, block) for site, block in wanted for label in labels]
    out = {key: empty.new_empty(n_rows, empty.shape[1]) for key in keys}
    for numbers, of_pack in zip(packed, found, strict=True):
        to = torch.from_numpy(np.concatenate([places[n][1] for n in numbers]))
        for key, rows in of_pack.rows.items():
            out[key][to] = rows[:]
        told(len(numbers))
    return out


def _stored_places(segment: Segment) -> list[tuple[Ints, Ints]]:
    """Of each sequence the positions whose rows a segment has, and where among its rows these lie."""
    offsets = segment.row_offsets
    if segment.fingerprint.has_prefix_rows:
        return [(np.arange(stop - start), np.arange(start, stop)) for start, stop in itertools.pairwise(offsets)]
    events = segment.read_table("events")
    sequence, position = events["sequence"].to_numpy(), events["position"].to_numpy()
    return [(position[own], own) for n in range(segment.n_sequences) for own in [np.flatnonzero(sequence == n)]]
