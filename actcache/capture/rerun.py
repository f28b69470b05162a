"""Stored sequences, run again for rows that their store lacks: no search, and no event is decided anew.

Knows segments and backbones; writes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch

from actcache.capture.forward import first_wrong, forward_and_gather, said_of_site
from actcache.finite import not_finite
from actcache.models.backbone import Backbone
from actcache.models.packing import offsets_of
from actcache.models.regimes import Regimes
from actcache.progress import Told
from actcache.store import Segment
from actcache.store.layout import STATE_DTYPES, Sites
from actcache.store.segment_data import SiteRows


@torch.no_grad()
def rows_to_add(
    segment: Segment,
    sites: Sites,
    backbones: Mapping[str, Backbone],
    regimes: Regimes,
    pack_tokens: int,
    told: Told,
    between: Callable[[], None],
) -> SiteRows:
    """Rows of further sites of a segment, at the positions whose rows it has.

    Args:
        segment: committed.
        sites: blocks, by site.
        backbones: of all checkpoints of the store, by label.
        regimes: in which sequences share a forward.
        pack_tokens: tokens of one forward; 0 for one sequence each.
        told: hears of sequences.
        between: called before each forward; may raise.

    Raises:
        NotFiniteError: a checkpoint computes NaN or infinity.
    """
    ids, offsets = segment.read("token_ids"), segment.row_offsets
    lengths = np.diff(offsets)
    places = _stored_places(segment)
    width, dtype = segment.fingerprint.width, STATE_DTYPES[segment.fingerprint.dtype]
    wanted = [(site, block) for site, blocks in sites.items() for block in blocks]
    keys = [(site, label, block) for site, block in wanted for label in backbones]
    out = {key: torch.empty(segment.n_rows, width, dtype=dtype) for key in keys}
    filled = np.flatnonzero(lengths)  # a sequence without tokens has no rows
    filled = filled[np.argsort([regimes.of(int(n)) for n in lengths[filled]], kind="stable")]
    for pack in regimes.packs(lengths[filled].tolist(), pack_tokens):
        between()
        numbers = filled[pack.start : pack.stop]
        bounds = offsets_of(lengths[numbers].tolist())
        tokens = np.concatenate([ids[offsets[n] : offsets[n + 1]] for n in numbers]).astype(np.int64)
        at = np.concatenate([places[n][0] + int(start) for n, start in zip(numbers, bounds, strict=False)])
        to = torch.from_numpy(np.concatenate([places[n][1] for n in numbers]))
        for label, backbone in backbones.items():
            given = torch.from_numpy(tokens)[None]
            gathered, _ = forward_and_gather(backbone, given, bounds.tolist(), wanted, torch.from_numpy(at))
            for (site, block), rows in gathered.items():
                if (row := first_wrong(site, rows)) is not None:
                    n = int(numbers[np.searchsorted(bounds.numpy(), at[row], side="right") - 1])
                    whose = f"checkpoint {label}, sequence {n} of segment {segment.name}"
                    what = said_of_site(site, block)
                    raise not_finite(whose, what, backbone, ids[offsets[n] : offsets[n + 1]].tolist())
                out[site, label, block][to] = rows
        told(len(numbers), tokens=len(tokens))
    return out


def _stored_places(segment: Segment) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Of each sequence the positions whose rows a segment has, and where among its rows these lie."""
    offsets = segment.row_offsets
    if segment.fingerprint.has_prefix_rows:
        return [(np.arange(stop - start), np.arange(start, stop)) for start, stop in itertools.pairwise(offsets)]
    events = segment.read_table("events")
    sequence, position = events["sequence"].to_numpy(), events["position"].to_numpy()
    return [(position[own], own) for n in range(segment.n_sequences) for own in [np.flatnonzero(sequence == n)]]
