"""The attacker's tools: change anything in a store and make every checksum above it fit again.

Written from FORMAT.md, without actcache: an attacker does not ask the library, and what the library refuses to write
would not be tried.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs.blosc as blosc
import numpy as np

Change = Callable[[Any], Any]
STATES = "states/pt/b001"
FINAL = "final/pt"


def crc(data: bytes) -> int:
    return int(google_crc32c.value(data))


def sealed(data: bytes) -> bytes:
    """Bytes and their CRC-32C."""
    return data + crc(data).to_bytes(4, "little")


def dumps(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def compressed(rows: np.ndarray) -> bytes:
    """A chunk before its checksum."""
    return blosc.compress(np.ascontiguousarray(rows).reshape(-1), b"lz4", 5, blosc.BITSHUFFLE, 0, rows.itemsize)


@dataclass
class Forger:
    """A store of two segments, ``a`` and ``b``, and the folder beside it that must stay as it is."""

    path: Path
    outside: Path

    # ---- records and root ----

    def record_file(self, segment: str = "a") -> Path:
        return self.path / f"commits/{segment}.json"

    def record(self, change: Change, segment: str = "a") -> None:
        """Change a commit record."""
        record = json.loads(self.record_file(segment).read_bytes())
        del record["crc32c"]
        sums = record["stored_bytes"], record["stored_state_bytes"]
        change(record)
        if (record.get("stored_bytes"), record.get("stored_state_bytes")) == sums:
            with contextlib.suppress(
                TypeError, ValueError, AttributeError
            ):  # where the attack is on the files themselves
                sizes = {file: size for file, (size, _) in record["files"].items()}
                record["stored_bytes"] = sum(sizes.values())
                record["stored_state_bytes"] = sum(sizes[file] for file in sizes if file.startswith("states/"))
        self.write_record(dumps(record), segment)

    def write_record(self, text: bytes, segment: str = "a") -> None:
        """Put JSON without its last key in place of a commit record, with a checksum that fits the text as it is."""
        with_sum = text.replace(b"{", b'{"crc32c":%d,' % crc(text), 1)
        self.record_file(segment).write_bytes(with_sum + b"\n")

    def copy_segment(self, segment: str, change: Change) -> None:
        """A further segment with the content of ``a`` in a folder of its own, and a record that is changed."""
        shutil.copytree(self.path / "segments/a", self.path / "segments" / segment)
        self.record_file(segment).write_bytes(self.record_file().read_bytes())
        self.record(lambda r: (r.update(segment=segment, folder=segment), change(r)), segment)

    def fingerprint(self, change: Change) -> None:
        """Change the fingerprint, its digest, and the records that name it."""
        root = json.loads((self.path / "zarr.json").read_bytes())
        content = root["attributes"]["actcache"]
        change(content["fingerprint"])
        content["fingerprint_sha256"] = hashlib.sha256(dumps(content["fingerprint"])).hexdigest()
        (self.path / "zarr.json").write_bytes(dumps(root) + b"\n")
        for segment in ("a", "b"):
            self.record(lambda r: r.update(fingerprint=content["fingerprint_sha256"]), segment)

    def root(self, change: Change) -> None:
        """Change the root beside the fingerprint."""
        root = json.loads((self.path / "zarr.json").read_bytes())
        change(root)
        (self.path / "zarr.json").write_bytes(dumps(root) + b"\n")

    # ---- arrays of segment a ----

    def array(self, array: str) -> Path:
        return self.path / "segments/a" / array

    def metadata(self, array: str, change: Change) -> None:
        """Change an array's metadata; the record vouches for it."""
        content = json.loads((self.array(array) / "zarr.json").read_bytes())
        change(content)
        self.write_metadata(array, dumps(content) + b"\n")

    def write_metadata(self, array: str, data: bytes) -> None:
        (self.array(array) / "zarr.json").write_bytes(data)
        self.record(lambda r: r["files"].update({f"{array}/zarr.json": [len(data), crc(data)]}))

    def shard_file(self, array: str) -> Path:
        n_axes = len(json.loads((self.array(array) / "zarr.json").read_bytes())["shape"])
        return self.array(array) / "/".join(["c", *["0"] * n_axes])

    def chunks(self, array: str) -> list[bytes]:
        """The chunks of an array, each with its checksum, in order."""
        data = self.shard_file(array).read_bytes()
        n = len(json.loads((self.array(array) / "zarr.json").read_bytes())["attributes"]["chunk_crc32c"])
        index = np.frombuffer(data[-4 - 16 * n : -4], "<u8").reshape(n, 2).tolist()
        return [data[offset : offset + length] for offset, length in index]

    def write_shard(self, array: str, data: bytes) -> None:
        """Bytes in place of a shard; the record gives their number."""
        file = self.shard_file(array)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        self.commit_size(array, len(data))

    def commit_size(self, array: str, n_bytes: int) -> None:
        file = self.shard_file(array).relative_to(self.path / "segments/a").as_posix()
        self.record(lambda r: r["files"].update({file: [n_bytes, None]}))

    def write_chunks(self, array: str, payloads: list[bytes], index: list[tuple[int, int]] | None = None) -> None:
        """Chunks without their checksums, which are added here and to the metadata; and an index of one's own."""
        chunks = [sealed(payload) for payload in payloads]
        if index is None:
            ends = np.cumsum([len(chunk) for chunk in chunks]).tolist()
            index = [(end - len(chunk), len(chunk)) for end, chunk in zip(ends, chunks, strict=True)]
        tail = b"".join((n % 2**64).to_bytes(8, "little") for entry in index for n in entry)
        self.write_shard(array, b"".join(chunks) + sealed(tail))
        self.metadata(array, lambda m: m["attributes"].update(chunk_crc32c=[crc(payload) for payload in payloads]))

    def write_index(self, array: str, index: list[tuple[int, int]]) -> None:
        """Another index behind the same chunks."""
        self.write_chunks(array, [chunk[:-4] for chunk in self.chunks(array)], index)

    def write_values(self, array: str, values: np.ndarray, chunk_rows: int | None = None) -> None:
        """Other content of a well-formed array."""
        row_bytes = values.itemsize * math.prod(values.shape[1:])
        chunk_rows = chunk_rows or max(1, min(len(values), 262144 // row_bytes))
        n_chunks = -(-len(values) // chunk_rows)
        padded = np.zeros((n_chunks * chunk_rows, *values.shape[1:]), values.dtype)
        padded[: len(values)] = values

        def change(metadata: dict[str, Any]) -> None:
            metadata["shape"] = list(values.shape)
            metadata["chunk_grid"]["configuration"]["chunk_shape"] = [
                max(1, n_chunks) * chunk_rows,
                *values.shape[1:],
            ]
            metadata["codecs"][0]["configuration"]["chunk_shape"] = [chunk_rows, *values.shape[1:]]

        self.metadata(array, change)
        chunks = padded.reshape(n_chunks, chunk_rows, *values.shape[1:])
        self.write_chunks(array, [compressed(rows) for rows in chunks])
        if not n_chunks:
            file = self.shard_file(array)
            file.unlink()
            self.record(lambda r: r["files"].pop(file.relative_to(self.path / "segments/a").as_posix()))

    def texts(self) -> dict[tuple[str, str], list[bytes]]:
        """All texts of segment a, by table and column, in their order."""
        record = json.loads(self.record_file().read_bytes())
        counts = {"events": record["n_events"], "excluded": record["n_excluded"], "sequences": record["n_sequences"]}
        data, offsets = self.values("texts/bytes").tobytes(), self.values("texts/offsets").tolist()
        texts = [data[start:stop] for start, stop in itertools.pairwise(offsets)]
        found = {}
        for table, schema in sorted(record["schema"].items()):
            for column in sorted(column for column, kind in schema.items() if kind == "string"):
                found[table, column] = texts[: counts[table]]
                texts = texts[counts[table] :]
        return found

    def values(self, array: str) -> np.ndarray:
        """The content of an array of one axis."""
        metadata = json.loads((self.array(array) / "zarr.json").read_bytes())
        chunks = [np.frombuffer(blosc.decompress(chunk[:-4]), metadata["data_type"]) for chunk in self.chunks(array)]
        return np.concatenate([np.zeros(0, metadata["data_type"]), *chunks])[: metadata["shape"][0]]

    def write_all_texts(self, texts: dict[tuple[str, str], list[bytes]]) -> None:
        """Other texts in place of all, UTF-8 or not."""
        flat = [text for _, column in sorted(texts.items()) for text in column]
        self.write_values("texts/bytes", np.frombuffer(b"".join(flat), np.uint8))
        self.write_values("texts/offsets", np.cumsum([0, *map(len, flat)], dtype=np.int64))

    def write_texts(self, table: str, column: str, texts: list[bytes]) -> None:
        """Other content of a string column, UTF-8 or not."""
        self.write_all_texts(self.texts() | {(table, column): texts})

    def write_text_offset(self, table: str, column: str, i: int, value: int) -> None:
        """Another beginning of text i of a column."""
        texts = self.texts()
        before = sum(len(texts[key]) for key in texts if key < (table, column))
        offsets = self.values("texts/offsets").copy()
        offsets[before + i] = value
        self.write_values("texts/offsets", offsets)
