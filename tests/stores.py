"""Small random stores: any bits, any lengths, events anywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from actcache.store import SegmentData, Store, StoreWriter, layout, open_store

INT_OF = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def make_fingerprint(**changes: Any) -> dict[str, Any]:
    given = {
        "checkpoints": {"pt": {"weights": "a1"}, "it": {"weights": "b2"}},
        "pair": ["pt", "it"],
        "dtype": "float32",
        "boundaries": [1, 2],
        "row_selection": "prefix",
        "width": 3,
        "seed": 0,
    }
    return given | changes


def make_rows(n: int, fingerprint: dict[str, Any], kind: str, rng: np.random.Generator) -> torch.Tensor:
    """Any bit pattern at all: NaNs with payloads, infinities, subnormals; or all zeros, or all negative zeros."""
    dtype = layout.STATE_DTYPES[fingerprint["dtype"]]
    if kind != "any bits":
        return torch.full((n, fingerprint["width"]), -0.0 if kind == "-0" else 0.0, dtype=dtype)
    info = torch.iinfo(INT_OF[dtype])
    words = rng.integers(info.min, info.max, (n, fingerprint["width"]), endpoint=True)
    return torch.from_numpy(words).to(INT_OF[dtype]).view(dtype)


def make_table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> pa.Table:
    types = {name: layout.empty_column(kind).type for name, kind in columns.items()}
    return pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in types.items()})


def make_segment(
    fingerprint: dict[str, Any],
    lengths: Sequence[int],
    places: Sequence[tuple[int, int]],
    *,
    name: str = "s",
    kinds: Sequence[str] = ("any bits",),
    carried: Sequence[dict[str, Any]] | None = None,
    n_excluded: int = 1,
    sites: Sequence[tuple[str, int]] = (),
    seed: int = 0,
) -> SegmentData:
    """A segment of sequences of these lengths with events at these (sequence, position) places.

    Beside states it has rows of ``sites``, each a site and a block. Its events are of two kinds and of two pairs.
    """
    rng = np.random.default_rng(seed)
    n_rows = sum(lengths) if fingerprint["row_selection"] == "prefix" else len(places)
    labels = list(fingerprint["checkpoints"])
    pairs = f"{labels[0]},{labels[-1]}", f"{labels[-1]},{labels[0]}"
    keys = [(label, b) for label in fingerprint["checkpoints"] for b in fingerprint["boundaries"]]
    events = [
        {
            "event_id": f"{name}-{i}",
            "prompt_id": f"prompt é {i}\x00\n",
            "kind": "first_divergence" if i % 3 else "later",
            "pair": pairs[i % 2],
            "step": i,
            "sequence": sequence,
            "position": position,
            "y_pt": 2**40 + i,
            "y_it": i,
            "carried": json.dumps(carried[i] if carried else {}),
            "gap_pt": i / 3,
        }
        for i, (sequence, position) in enumerate(places)
    ]
    excluded = [{"prompt_id": f"{name}-x{i}", "reason": "no divergence", "carried": "{}"} for i in range(n_excluded)]
    return SegmentData(
        token_ids=rng.integers(0, 2**31 - 1, sum(lengths), dtype=np.int32),
        sequence_offsets=np.cumsum([0, *lengths], dtype=np.int64),
        states={key: make_rows(n_rows, fingerprint, kinds[i % len(kinds)], rng) for i, key in enumerate(keys)},
        final={label: make_rows(len(places), fingerprint, kinds[0], rng) for label in fingerprint["checkpoints"]},
        events=make_table(events, layout.EVENT_COLUMNS | {"gap_pt": "float32"}),
        excluded=make_table(excluded, layout.EXCLUDED_COLUMNS),
        sites=make_site_rows(fingerprint, n_rows, sites, seed + 1),
    )


def make_site_rows(
    fingerprint: dict[str, Any], n_rows: int, sites: Sequence[tuple[str, int]], seed: int
) -> dict[tuple[str, str, int], torch.Tensor]:
    """Rows of all checkpoints at these sites of these blocks."""
    rng = np.random.default_rng(seed)
    keys = [(site, label, block) for site, block in sites for label in fingerprint["checkpoints"]]
    return {key: make_rows(n_rows, fingerprint, "any bits", rng) for key in keys}


def write_store(path: Path, fingerprint: dict[str, Any], segments: dict[str, SegmentData]) -> Path:
    writer = StoreWriter(path, fingerprint)
    for name, segment in segments.items():
        writer.append(name, segment)
    return path


def bits(rows: torch.Tensor) -> tuple[Any, ...]:
    return rows.dtype, tuple(rows.shape), rows.contiguous().view(INT_OF.get(rows.dtype, rows.dtype)).numpy().tobytes()


def read_tree(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# A store of seven segments.
FINGERPRINT = make_fingerprint(checkpoints={"pt": {}, "it": {}}, boundaries=[1])
SEGMENTS = {
    f"s-{i}": make_segment(FINGERPRINT, [4, 2 + i], [(0, 3), (1, i)][: 1 + i % 2], name=f"e{i}", seed=i)
    for i in range(7)
}


def fill(place: str, names: list[str] | None = None) -> Store:
    writer = StoreWriter(place, FINGERPRINT)
    for name in SEGMENTS if names is None else names:
        writer.append(name, SEGMENTS[name])
    return open_store(place)
