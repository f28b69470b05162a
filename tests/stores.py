"""Small random stores, of segments that ``actcache.testing`` makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from actcache.store import SegmentData, Store, StoreWriter, open_store
from actcache.testing.content import INT_OF as INT_OF
from actcache.testing.content import make_fingerprint as make_fingerprint
from actcache.testing.content import make_rows as make_rows
from actcache.testing.content import make_segment as make_segment
from actcache.testing.content import make_site_rows as make_site_rows
from actcache.testing.content import make_table as make_table


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
