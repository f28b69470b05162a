"""Print the worked example of FORMAT.md: the smallest store that makes sense, byte by byte, as Markdown.

python scripts/format_example.py             print it
python scripts/format_example.py --write     put it between the marks in actcache/store/FORMAT.md
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from actcache.store import SegmentData, StoreWriter

FORMAT = Path(__file__).parent.parent / "actcache" / "store" / "FORMAT.md"
START, END = "<!-- example -->\n", "<!-- /example -->"
FINGERPRINT = {
    "boundaries": [1],
    "checkpoints": {"it": {}, "pt": {}},
    "dtype": "bfloat16",
    "pair": ["pt", "it"],
    "row_selection": "prefix",
    "width": 4,
}
ARRAY = "states/pt/b001"
WIDTH = 112  # of a line of the example


def example_segment() -> SegmentData:
    """Two sequences of three and two tokens, one event at the end of the first."""
    states = torch.tensor(
        [[1, 2, 3, 4], [0.5, -0.5, 0.25, -0.25], [100, 200, 300, 400], [0, 0, 0, 0], [-1, -2, -3, -4]],
        dtype=torch.bfloat16,
    )
    event = {
        "event_id": "p0@2:first_divergence",
        "prompt_id": "p0",
        "kind": "first_divergence",
        "pair": "pt,it",
        "step": np.int32(0),
        "sequence": 0,
        "position": 2,
        "y_pt": 17,
        "y_it": 42,
        "carried": "{}",
    }
    text = {name: pa.array([], pa.string()) for name in ("prompt_id", "reason", "carried")}
    return SegmentData(
        token_ids=np.array([5, 6, 7, 5, 8], np.int32),
        sequence_offsets=np.array([0, 3, 5], np.int64),
        states={("pt", 1): states, ("it", 1): -states},
        final={"pt": states[2:3], "it": states[4:5]},
        events=pa.table({name: pa.array([value]) for name, value in event.items()}),
        excluded=pa.table(text),
    )


def example() -> str:
    """The example as Markdown."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "store"
        StoreWriter(path, FINGERPRINT).append("s0", example_segment())
        root = (path / "zarr.json").read_bytes()
        record = (path / "commits/s0.json").read_bytes()
        metadata = (path / f"segments/s0/{ARRAY}/zarr.json").read_bytes()
        shard = (path / f"segments/s0/{ARRAY}/c/0/0").read_bytes()
    n_files = len(json.loads(record)["files"]) + 3
    folder = f"segments/s0/{ARRAY}"
    parts = [
        "A store of one segment, `s0`: two sequences of 3 and 2 tokens, one event at the end of the first, width 4, "
        f"bfloat16, {n_files} files. JSON is one line in a file and broken into several here; `...` leaves something "
        "out.",
        f"The root, `zarr.json` ({len(root)} bytes), says what everything belongs to:",
        fenced(broken(root)),
        f"The commit record, `commits/s0.json` ({len(record)} bytes), vouches for the metadata of each array by size "
        "and CRC-32C, and gives the size of each shard. Its own `crc32c` is that of its line without this key and "
        "without the newline:",
        fenced(broken(abridged(record))),
        f"An array's metadata, `{folder}/zarr.json` ({len(metadata)} bytes, as the record says), vouches for each "
        "chunk:",
        fenced(broken(metadata)),
        f"Its shard, `{folder}/c/0/0` ({len(shard)} bytes, as the record says). The one chunk is so short that Blosc "
        "keeps the rows as they are; a longer one has its bits shuffled and is compressed by lz4:",
        fenced("\n".join(annotated(shard, json.loads(metadata)))),
    ]
    return "\n\n".join(wrapped(part) for part in parts) + "\n"


def fenced(text: str) -> str:
    """As a block of code."""
    return f"```\n{text}\n```"


def wrapped(part: str) -> str:
    """Prose in lines of the page's width; code as it is."""
    if part.startswith("```"):
        return part
    lines, line = [], ""
    for word in part.split(" "):
        if line and len(line) + 1 + len(word) > WIDTH:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "\n".join([*lines, line])


def abridged(record: bytes) -> bytes:
    """The record with the files of one array only."""
    content = json.loads(record)
    files = {file: entry for file, entry in content["files"].items() if file.startswith(ARRAY)}
    content["files"] = files | {"...": "..."}
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def broken(text: bytes) -> str:
    """JSON in its own order and spelling, in lines that break after commas."""
    lines, line = [], ""
    for piece in text.decode().strip().replace(",", ",\0").replace('"...":"..."', "...").split("\0"):
        if line and len(line) + len(piece) > WIDTH:
            lines.append(line)
            line = "  "
        line += piece
    return "\n".join([*lines, line])


def annotated(shard: bytes, metadata: dict[str, Any]) -> Iterator[str]:
    """Every byte of a shard of one uncompressed chunk, a line per field."""
    offset, length = struct.unpack("<QQ", shard[-20:-4])
    chunk = shard[offset : offset + length]
    version, versionlz, flags, typesize, nbytes, blocksize, ctbytes = struct.unpack("<BBBBIII", chunk[:16])
    if offset or flags != 0x36 or ctbytes != length - 4 or len(shard) != length + 20:
        raise AssertionError("the example is no longer one chunk that Blosc stores as it is")
    at = 0

    def field(n_bytes: int, said: str) -> str:
        nonlocal at
        data = shard[at : at + n_bytes]
        at += n_bytes
        return f"{at - n_bytes:04x}  {data.hex(' '):<24} {said}"

    yield field(1, f"Blosc: version of the format, {version}")
    yield field(1, f"version of the codec's format, {versionlz}")
    yield field(1, f"flags {flags:#04x}: lz4 (32), blocks not split (16), bit shuffle (4), stored as it is (2)")
    yield field(1, f"typesize, {typesize}: a bfloat16")
    yield field(4, f"bytes before compression, {nbytes} = 5 rows of 4 values")
    yield field(4, f"bytes of a block, {blocksize}")
    yield field(4, f"bytes of the chunk with this header, {ctbytes}")
    values = torch.frombuffer(bytearray(chunk[16:-4]), dtype=torch.bfloat16).reshape(-1, 4)
    for row, sequence, position in zip(values.tolist(), (0, 0, 0, 1, 1), (0, 1, 2, 0, 1), strict=True):
        event = ", the event's" if (sequence, position) == (0, 2) else ""
        yield field(8, f"sequence {sequence}, position {position}{event}: {', '.join(f'{value:g}' for value in row)}")
    (checksum,) = metadata["attributes"]["chunk_crc32c"]
    yield field(4, f"CRC-32C of the {at} bytes so far, {checksum}: as in the metadata")
    yield field(8, f"index: the chunk begins at {offset}")
    yield field(8, f"and has {length} bytes")
    yield field(4, "CRC-32C of the index's 16 bytes")


def replaced(page: str) -> str:
    """The page with the example between its marks."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"{FORMAT} has no place for the example between {START.strip()} and {END}")
    return before + start + "\n" + example() + "\n" + end + after


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into FORMAT.md, in place of the example there")
    if parser.parse_args(argv).write:
        FORMAT.write_text(replaced(FORMAT.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(example(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
