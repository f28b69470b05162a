"""Writing: segments are made whole in a folder of their own, then named by one small commit record.

Order on disk: every file of the segment, fsync of each and of each folder, then the commit record (a draft, fsync,
rename to its final name, fsync of its folder). A reader sees a segment only through its record, so a writer that dies
at any step loses at most the segment it was writing. The draft is also the lock: whoever holds it is the only one to
touch this segment's folder, and what a dead writer left there is cleared by the next one.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from actcache.errors import IncompatibleError, InputError
from actcache.files import fsync, fsync_tree, make_folder, sole_creator, write_durably
from actcache.store import layout, shard
from actcache.store.layout import SegmentData
from actcache.store.reader import read_fingerprint


class StoreWriter:
    """Appends segments to a store.

    Several writers, in one process or many, may append to one store at once: they share nothing but the folder.

    Attributes:
        path: the store.
        fingerprint: what identifies its content.
    """

    def __init__(self, path: str | Path, fingerprint: dict[str, Any]) -> None:
        """Create the store, or open one with the same fingerprint.

        Raises:
            InputError: the path is not a store and not empty, or the fingerprint lacks what the layout needs.
            IncompatibleError: the store has another fingerprint; names the first field that differs.
            CorruptStoreError, FormatVersionError: as ``open_store``, of the store's root.
            OSError: the disk refuses.
        """
        self.path = Path(path)
        self.fingerprint = json.loads(layout.canonical(fingerprint))
        layout.check_fingerprint(self.fingerprint)
        if not (self.path / layout.ROOT).is_file():
            self._create()
        _check_same(self.fingerprint, read_fingerprint(self.path))
        self._digest = layout.fingerprint_digest(self.fingerprint)

    @property
    def committed(self) -> set[str]:
        """Names of the segments that are complete. One listing of a folder; no record is read."""
        return {file.stem for file in (self.path / layout.COMMITS).glob("*.json")}

    def append(self, name: str, segment: SegmentData) -> None:
        """Write a segment and commit it; durable when this returns.

        Waits while another process or thread appends a segment of this name.

        Args:
            name: unique in the store; letters, digits, ``-`` and ``_``.
            segment: its content; dtype, width, checkpoints and boundaries must be the fingerprint's.

        Raises:
            InputError: the name is committed already, or the content does not fit the fingerprint.
            OSError: the disk refuses. The files of this segment are removed; the store is as it was.
        """
        layout.check_name(name, "segment name")
        self._check_fits(segment)
        committed = self.path / layout.COMMITS / f"{name}.json"
        with sole_creator(committed) as publish:
            if committed.exists():
                raise InputError(f"segment {name!r} is committed already; segments are immutable")
            folder = self.path / layout.SEGMENTS / name
            try:
                files = _write_folder(folder, segment)
                publish(layout.encode_record(self._record(name, segment, files)))
            except BaseException:
                if not committed.exists():  # it may have been interrupted just after it was published
                    shutil.rmtree(folder, ignore_errors=True)
                raise

    def _create(self) -> None:
        root = self.path / layout.ROOT
        if self.path.exists() and not (self.path.is_dir() and _is_unborn(self.path)):
            raise InputError(f"{self.path} is not empty and not a store; give a new folder")
        for folder in (self.path, self.path / layout.SEGMENTS, self.path / layout.COMMITS):
            make_folder(folder)
        with sole_creator(root) as publish:
            if not root.exists():
                write_durably(self.path / layout.SEGMENTS / layout.ROOT, layout.encode_group({}))
                fsync(self.path / layout.SEGMENTS)
                publish(layout.encode_root(self.fingerprint))

    def _check_fits(self, segment: SegmentData) -> None:
        labels, width = set(self.fingerprint["checkpoints"]), self.fingerprint["width"]
        expected = {(label, b) for label in labels for b in self.fingerprint["boundaries"]}
        if set(segment.states) != expected:
            raise InputError(f"states of {sorted(segment.states)}, expected {sorted(expected)}")
        if set(segment.final) != labels:
            raise InputError(f"final states of {sorted(segment.final)}, expected {sorted(labels)}")
        n_rows = layout.n_rows(self.fingerprint, len(segment.token_ids), segment.events.num_rows)
        sizes = [(f"states {key}", rows, n_rows) for key, rows in segment.states.items()]
        sizes += [(f"final states of {label}", rows, segment.events.num_rows) for label, rows in segment.final.items()]
        dtype = layout.STATE_DTYPES[self.fingerprint["dtype"]]
        for what, rows, n in sizes:
            if rows.dtype != dtype or tuple(rows.shape) != (n, width):
                raise InputError(f"{what}: {rows.dtype} {tuple(rows.shape)}, expected {dtype} {(n, width)}")

    def _record(self, name: str, segment: SegmentData, files: dict[str, tuple[int, int | None]]) -> dict[str, Any]:
        return {
            "format_version": layout.FORMAT_VERSION,
            "segment": name,
            "fingerprint": self._digest,
            "n_sequences": segment.n_sequences,
            "n_tokens": len(segment.token_ids),
            "n_events": segment.events.num_rows,
            "n_excluded": segment.excluded.num_rows,
            "schema": {"events": layout.schema_of(segment.events), "excluded": layout.schema_of(segment.excluded)},
            "raw_state_bytes": sum(rows.numel() * rows.element_size() for rows in segment.states.values()),
            "stored_state_bytes": sum(size for path, (size, _) in files.items() if path.startswith("states/")),
            "stored_bytes": sum(size for size, _ in files.values()),
            "files": files,
        }


def _write_folder(folder: Path, segment: SegmentData) -> dict[str, tuple[int, int | None]]:
    """Write every file of a segment, durably, in place of whatever is there.

    Returns:
        by path, the size of each file and the CRC-32C of metadata. Shards have none: their arrays' metadata has that of
        every chunk, and the CRC-32C of bytes that end in their own CRC-32C is the same whatever the bytes are.
    """
    if folder.exists():  # left by a writer that died
        shutil.rmtree(folder)
    files: dict[str, tuple[int, int | None]] = {}

    def write(path: str, parts: list[bytes], checksum: int | None) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with open(folder / path, "wb") as stream:
            for part in parts:
                stream.write(part)
        files[path] = (sum(map(len, parts)), checksum)

    def write_metadata(path: PurePosixPath, encoded: bytes) -> None:
        write(str(path / layout.ROOT), [encoded], shard.crc32c(encoded))

    groups = {PurePosixPath(".")}
    with ThreadPoolExecutor() as pool:
        for path, array, attributes in layout.arrays_of(segment):
            metadata, parts = shard.encode(array, attributes, pool)
            if parts is not None:
                write(f"{path}/{shard.data_file(array.ndim)}", parts, None)
            write_metadata(PurePosixPath(path), layout.encode_json(metadata))
            groups.update(PurePosixPath(path).parents)
    for group in sorted(groups):
        write_metadata(group, layout.encode_group({}))
    fsync_tree(folder)
    fsync(folder.parent)
    return files


def _is_unborn(folder: Path) -> bool:
    """Whether a folder holds nothing but what a writer leaves that died before it wrote the root."""
    names = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    return names <= {layout.SEGMENTS, layout.COMMITS} and not any((folder / layout.COMMITS).glob("*.json"))


def _check_same(given: dict[str, Any], stored: dict[str, Any], prefix: str = "") -> None:
    for field in sorted(given.keys() | stored.keys()):
        a, b = stored.get(field), given.get(field)
        # As bytes, which is what their digest sees: 1, 1.0 and True are equal in Python only.
        if field in stored and field in given and layout.canonical(a) == layout.canonical(b):
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            _check_same(b, a, f"{prefix}{field}.")
        raise IncompatibleError(
            f"the store belongs to another run: its {prefix}{field} is {a}, this run's is {b}; give another folder",
            field=f"{prefix}{field}",
        )
