"""Small random segments: any bits, any lengths, events anywhere; and what a store that has them must say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from actcache.store import SegmentData, StoreWriter, layout, open_store
from actcache.store.compact import merge
from actcache.store.objects import ObjectStorage
from actcache.store.records import Part, parts_of
from actcache.store.storage import Storage
from actcache.testing.memory import MemoryObjects

INT_OF = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def make_fingerprint(**changes: Any) -> dict[str, Any]:
    """The fingerprint of a small store, with these fields changed."""
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
    """Rows as a table with these columns, by name and kind."""
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


class OneEvent(NamedTuple):
    """What a store says of one event: the bytes of its states, those of its final state, and its tokens."""

    states: bytes
    final: bytes
    token_ids: list[int]


@dataclass(frozen=True, eq=False)
class Content:
    """Segments of one store, and all that must come back of them.

    Attributes:
        fingerprint: of the store; with one checkpoint ``pt`` and one boundary, 1.
        segments: by name.
    """

    fingerprint: dict[str, Any]
    segments: Mapping[str, SegmentData]

    @cached_property
    def event_ids(self) -> dict[str, list[str]]:
        """Ids of the events of each segment."""
        return {name: segment.events["event_id"].to_pylist() for name, segment in self.segments.items()}

    @cached_property
    def excluded(self) -> dict[str, list[str]]:
        """Prompts of each segment without an event."""
        return {name: segment.excluded["prompt_id"].to_pylist() for name, segment in self.segments.items()}

    @cached_property
    def events(self) -> dict[str, OneEvent]:
        """What each event must read as, by its id."""
        found = {}
        for segment in self.segments.values():
            for i, event in enumerate(segment.events.to_pylist()):
                start = int(segment.sequence_offsets[event["sequence"]])
                stop = start + event["position"] + 1
                rows, final = segment.states["pt", 1][start:stop], segment.final["pt"][i]
                tokens = segment.token_ids[start:stop].tolist()
                found[event["event_id"]] = OneEvent(bytes_of(rows), bytes_of(final), tokens)
        return found

    def alone(self, names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, bytes]]:
        """What one writer makes of these segments as one, where nothing goes wrong: its record, and all its files."""
        if names not in self._alone:
            self._alone[names] = self._write(names)
        return self._alone[names]

    @cached_property
    def _alone(self) -> dict[tuple[str, ...], tuple[dict[str, Any], dict[str, bytes]]]:
        return {}

    def _write(self, names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, bytes]]:
        storage = ObjectStorage(MemoryObjects(), "memory")  # type: ignore[arg-type]
        parts: list[Part] = []
        if len(names) > 1:
            parts = [one for name in names for one in parts_of(self.alone((name,))[0])]
        replaces = sorted(names) if len(names) > 1 else []
        writer = StoreWriter(storage, self.fingerprint)
        name = "--".join(names)
        merged = merge([self.segments[one] for one in names]) if len(names) > 1 else self.segments[name]
        writer.append(name, merged, replaces=replaces, parts=parts)
        (segment,) = open_store(storage).segments
        return segment.record, files_of(storage, segment.folder)


def files_of(storage: Storage, folder: str) -> dict[str, bytes]:
    """All files below a folder, by path from it."""
    sizes = storage.sizes(folder)
    return {file: storage.read_ranges(f"{folder}/{file}", [(0, size + 1)])[0] for file, size in sizes.items()}


def bytes_of(rows: torch.Tensor) -> bytes:
    """The bytes of a tensor's values."""
    return rows.contiguous().view(torch.uint8).numpy().tobytes()


@cache
def small_content() -> Content:
    """Three segments with one or two events each: few bytes, so that a schedule takes little time."""
    fingerprint = make_fingerprint(checkpoints={"pt": {}}, pair=["pt"], boundaries=[1], width=1)
    places = [(0, 2), (1, 0)]
    return Content(
        fingerprint,
        {
            f"s-{i}": make_segment(fingerprint, [3, 1 + i % 3], places[: 1 + i % 2], name=f"e{i}", seed=i)
            for i in range(3)
        },
    )
