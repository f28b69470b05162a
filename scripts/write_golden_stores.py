"""Write the golden stores: small ones, kept in the repository for ever, that every later version must read.

    python scripts/write_golden_stores.py        into tests/golden/vN, N today's format version

A folder that is there is never written again: a golden store is evidence of what a version wrote. Beside the stores
lies ``expected.json`` with what they hold, taken from the content that went in and not read back from what came out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numcodecs.blosc
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from actcache.store import SegmentData, StoreWriter, open_store
from actcache.store.segment_data import SiteRows

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
FORMAT_VERSION = 2
# name -> content, and names of those that it replaces; or rows, and the name of the segment that they are added to
Segments = dict[str, tuple[SegmentData, list[str]] | tuple[SiteRows, str]]
KINDS = ("first_divergence", "fixed")
N_FIRST = 4  # values of each array that stand in expected.json in full


def words(shape: tuple[int, ...], salt: int) -> npt.NDArray[np.uint32]:
    """Reproducible 32-bit words in no order (no library's generator, which may change)."""
    index = np.arange(np.prod(shape, dtype=np.int64), dtype=np.uint64).reshape(shape) + np.uint64(salt << 32)
    mixed = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # wraps around, as meant
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return (mixed >> np.uint64(32)).astype(np.uint32)


def rows(n: int, width: int, dtype: str, salt: int) -> torch.Tensor:
    """Any bits at all, NaNs with payloads among them; many rows of zeros, so that a long array is small on disk."""
    bits = words((n, width), salt)
    bits[8:-1] = 0
    if dtype == "float32":
        return torch.from_numpy(bits.view(np.float32))
    return torch.from_numpy((bits >> 16).astype(np.uint16)).view(getattr(torch, dtype))


def text_table(table: list[dict[str, Any]], types: dict[str, pa.DataType]) -> pa.Table:
    """A table of these rows."""
    return pa.table({name: pa.array([row[name] for row in table], kind) for name, kind in types.items()})


def segment(
    fingerprint: dict[str, Any],
    lengths: list[int],
    places: list[tuple[int, int]],
    *,
    name: str,
    n_excluded: int,
    salt: int,
    blocks: Sequence[tuple[str, int]] = (),
) -> SegmentData:
    """Sequences of these lengths with events at these (sequence, position) places, and rows of these other sites."""
    n_tokens, dtype, width = sum(lengths), fingerprint["dtype"], fingerprint["width"]
    n_rows = n_tokens if fingerprint["row_selection"] == "prefix" else len(places)
    keys = [(label, b) for label in fingerprint["checkpoints"] for b in fingerprint["boundaries"]]
    events = [
        {
            "event_id": f"{name}-{sequence}@{position}:{KINDS[i % 2]}",
            "prompt_id": f"prompt {sequence} é\n",
            "kind": KINDS[i % 2],
            "pair": ["pt,it", "it,pt"][i // 2 % 2],
            "step": i,
            "sequence": sequence,
            "position": position,
            "y_pt": 2**40 + i,
            "y_it": i,
            "gap_pt": i / 3,
            "carried": json.dumps({"category": ["math", "code"][i % 2], "level": i}),
        }
        for i, (sequence, position) in enumerate(places)
    ]
    excluded = [{"prompt_id": f"{name}-x{i}", "reason": "no divergence", "carried": "{}"} for i in range(n_excluded)]
    text, number = pa.string(), pa.int64()
    event_types = {"event_id": text, "prompt_id": text, "kind": text, "pair": text, "step": pa.int32()}
    event_types |= {
        "sequence": number,
        "position": number,
        "y_pt": number,
        "y_it": number,
        "gap_pt": pa.float32(),
        "carried": text,
    }
    sequences = [
        {"prompt_id": f"prompt {i} é\n", "carried": json.dumps({"length": length}), "continuation": "ab"[i % 2]}
        for i, length in enumerate(lengths)
    ]
    return SegmentData(
        token_ids=(np.arange(n_tokens, dtype=np.int32) * 7) % 31,
        sequence_offsets=np.cumsum([0, *lengths], dtype=np.int64),
        states={key: rows(n_rows, width, dtype, salt + i) for i, key in enumerate(keys)},
        final={
            label: rows(len(places), width, dtype, salt + 100 + i) for i, label in enumerate(fingerprint["checkpoints"])
        },
        events=text_table(events, event_types),
        excluded=text_table(excluded, {"prompt_id": text, "reason": text, "carried": text}),
        sequences=text_table(sequences, {"prompt_id": text, "carried": text, "continuation": text}),
        sites=site_rows(fingerprint, n_rows, blocks, salt + 200),
    )


def site_rows(fingerprint: dict[str, Any], n_rows: int, blocks: Sequence[tuple[str, int]], salt: int) -> SiteRows:
    """Rows of both checkpoints at these sites of these blocks."""
    keys = [(site, label, block) for site, block in blocks for label in fingerprint["checkpoints"]]
    return {key: rows(n_rows, fingerprint["width"], fingerprint["dtype"], salt + i) for i, key in enumerate(keys)}


def contents() -> dict[str, tuple[dict[str, Any], Segments]]:
    """What the golden stores of this format version hold: fingerprint and segments, by name."""

    def fingerprint(**fields: Any) -> dict[str, Any]:
        given = {"checkpoints": {"pt": {"weights": "a1"}, "it": {"weights": "b2"}}, "pair": ["pt", "it"], "seed": 0}
        return given | fields

    prefix32 = fingerprint(dtype="float32", boundaries=[3], row_selection="prefix", width=64)
    prefix16 = fingerprint(dtype="bfloat16", boundaries=[2, 1000], row_selection="prefix", width=7)
    single = fingerprint(dtype="float32", boundaries=[5], row_selection="divergence", width=16)
    grown = fingerprint(dtype="float32", boundaries=[5], row_selection="prefix", width=12)
    first, second = [(0, 4), (2, 1099), (2, 3)], [(1, 2)]
    return {
        # Several chunks an array, the last one filled up; an empty sequence; a segment in which nothing was found.
        "float32-prefix": (
            prefix32,
            {
                "s-0": (segment(prefix32, [5, 0, 1100], first, name="s-0", n_excluded=1, salt=1), []),
                "s-1": (segment(prefix32, [], [], name="s-1", n_excluded=0, salt=2), []),
            },
        ),
        "bfloat16-prefix": (
            prefix16,
            {"only": (segment(prefix16, [9, 4], [(0, 8), (1, 0)], name="only", n_excluded=2, salt=3), [])},
        ),
        # The second segment replaces the first, which no longer counts.
        "float32-divergence": (
            single,
            {
                "a": (segment(single, [4, 3], second, name="a", n_excluded=0, salt=4), []),
                "b": (segment(single, [4, 3, 2], [*second, (2, 1)], name="b", n_excluded=1, salt=5), ["a"]),
            },
        ),
        # Sequences without events, several events at one position, other sites; and two additions to a segment.
        "float32-grown": (
            grown,
            {
                "s-0": (
                    segment(
                        *(grown, [6, 3, 2], [(0, 5), (0, 5), (0, 1), (2, 0)]),
                        name="s-0",
                        n_excluded=1,
                        salt=6,
                        blocks=[("mlp", 4)],
                    ),
                    [],
                ),
                "s-0-more": (site_rows(grown, 11, [("state", 2), ("attention", 0)], 7), "s-0"),
                "s-0-still-more": (site_rows(grown, 11, [("state", 1)], 8), "s-0"),
            },
        ),
    }


def write(path: Path, fingerprint: dict[str, Any], segments: Segments) -> None:
    """Write one store with today's writer."""
    writer = StoreWriter(path, fingerprint)
    for name, (data, other) in segments.items():
        if isinstance(data, SegmentData):
            writer.append(name, data, replaces=other)
        else:
            base = next(segment for segment in open_store(path).segments if segment.name == other)
            writer.add_rows(name, base.record, data)


# ---- what to expect, by loops over what goes in ----------------------------------------------------------------------


def expected(fingerprint: dict[str, Any], segments: Segments) -> dict[str, Any]:
    """Every array as any Zarr reader must see it, and every answer as ``Store`` must give it."""
    whole = {name: data for name, (data, _) in segments.items() if isinstance(data, SegmentData)}
    replaced = {name for name, (data, other) in segments.items() if name in whole for name in other}
    live = {name: data for name, data in whole.items() if name not in replaced}
    arrays = {
        f"segments/{name}/{path}": described(array)
        for name, (data, _) in segments.items()
        for path, array in (stored(data) if isinstance(data, SegmentData) else stored_rows(data)).items()
    }
    rows_of = {name: dict(data.rows) for name, data in live.items()}
    for data, other in segments.values():
        if not isinstance(data, SegmentData):
            rows_of[str(other)] |= data
    answers: dict[str, Any] = {}
    for key in next(iter(rows_of.values())):
        parts = [
            part
            for name, data in live.items()
            for part in rows_of_events(data, rows_of[name][key], fingerprint["row_selection"])
        ]
        answers[" ".join(["rows", *map(str, key)])] = described(np.concatenate(parts))
    for label in fingerprint["checkpoints"]:
        answers[f"final {label}"] = described(np.concatenate([bits(data.final[label]) for data in live.values()]))
    answers["token ids"] = described(
        np.concatenate([ids for data in live.values() for ids in tokens_of(data)]).astype(np.int64)
    )
    return {
        "arrays": arrays,
        "answers": answers,
        **{
            table: [row for data in live.values() for row in data.tables[table].to_pylist()]
            for table in ("events", "excluded", "sequences")
        },
    }


def bits(states: torch.Tensor) -> npt.NDArray[Any]:
    """Rows as Zarr holds them: bfloat16 as its words."""
    return (states.view(torch.uint16) if states.dtype == torch.bfloat16 else states).numpy()


def described(array: npt.NDArray[Any]) -> dict[str, Any]:
    """Shape, dtype, digest of the little-endian bytes, and the first values, as the hex of their bytes."""
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    return {
        "shape": list(array.shape),
        "dtype": array.dtype.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "first": [
            data[i : i + array.itemsize].hex()
            for i in range(0, min(len(data), N_FIRST * array.itemsize), array.itemsize)
        ],
    }


def stored(data: SegmentData) -> dict[str, npt.NDArray[Any]]:
    """Every array of a segment, by its path (see FORMAT.md)."""
    arrays: dict[str, npt.NDArray[Any]] = {"token_ids": data.token_ids, "sequence_offsets": data.sequence_offsets}
    arrays |= stored_rows(data.rows)
    arrays |= {f"final/{label}": bits(states) for label, states in data.final.items()}
    texts: list[bytes] = []
    for name in ("events", "excluded", "sequences"):
        table = data.tables[name]
        for column in sorted(table.column_names):
            if table.schema.field(column).type == pa.string():
                texts += [text.encode() for text in table[column].to_pylist()]
            else:
                arrays[f"{name}/{column}"] = table[column].to_numpy()
    arrays["texts/bytes"] = np.frombuffer(b"".join(texts), np.uint8)
    arrays["texts/offsets"] = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return arrays


def stored_rows(rows_of: SiteRows) -> dict[str, npt.NDArray[Any]]:
    """The arrays of rows, by their paths."""
    folders = {"state": "states", "attention": "attention", "mlp": "mlp"}
    return {f"{folders[site]}/{label}/b{block:03d}": bits(states) for (site, label, block), states in rows_of.items()}


def tokens_of(data: SegmentData) -> list[npt.NDArray[np.int32]]:
    """Token ids of positions 0..p of each event."""
    return [data.token_ids[start : start + p + 1] for start, p in places_of(data)]


def rows_of_events(data: SegmentData, of: torch.Tensor, row_selection: str) -> list[npt.NDArray[Any]]:
    """The rows of each event."""
    if row_selection == "prefix":
        return [bits(of)[start : start + p + 1] for start, p in places_of(data)]
    return [bits(of)]


def places_of(data: SegmentData) -> list[tuple[int, int]]:
    """Where each event's sequence begins, and its position."""
    return [(int(data.sequence_offsets[row["sequence"]]), row["position"]) for row in data.events.to_pylist()]


def main(argv: Sequence[str] | None = None) -> int:
    """Write what is not there yet; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=GOLDEN, help="default: tests/golden")
    folder = parser.parse_args(argv).out / f"v{FORMAT_VERSION}"
    if folder.exists():
        print(f"{folder} is there already, and golden stores are never written again", file=sys.stderr)
        return 2
    said: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "written_by": {"actcache": version("actcache"), "blosc": numcodecs.blosc.VERSION_STRING},
        "stores": {},
    }
    for name, (fingerprint, segments) in contents().items():
        write(folder / name, fingerprint, segments)
        said["stores"][name] = expected(fingerprint, segments)
        n_bytes = sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file())
        print(f"{folder / name}: {n_bytes} bytes")
    (folder / "expected.json").write_text(json.dumps(said, indent=1, ensure_ascii=True) + "\n", encoding="ascii")
    return 0


if __name__ == "__main__":
    sys.exit(main())
