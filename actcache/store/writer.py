"""Writing: segments are made whole under a folder of their own, then named by one small commit record.

Order on disk: every array file, fsync of each and of each folder, then the commit record (temporary file, fsync, link
under its final name, fsync of its folder). A reader sees a segment only through its record, so a writer that dies at
any step loses at most the segment it was writing. The link fails if the record exists: of two writers of one segment
the first wins.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
import zarr
from zarr.storage import LocalStore

from actcache.errors import IncompatibleError, InputError
from actcache.files import fsync_folder, write_atomically
from actcache.store import layout
from actcache.store.layout import SegmentData
from actcache.store.reader import read_commits, read_fingerprint


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
            OSError: the disk refuses.
        """
        self.path = Path(path)
        self.fingerprint = json.loads(layout.canonical(fingerprint))
        for field in ("checkpoints", "dtype", "boundaries", "row_selection", "width"):
            if field not in self.fingerprint:
                raise InputError(f"the fingerprint has no {field!r}")
        for label in self.fingerprint["checkpoints"]:
            layout.check_name(label, "checkpoint label")
        if (self.path / layout.ROOT).is_file():
            _check_same(self.fingerprint, read_fingerprint(self.path))
        else:
            self._create()
        self._digest = layout.fingerprint_digest(self.fingerprint)

    @property
    def committed(self) -> set[str]:
        """Names of the segments that are complete."""
        return set(read_commits(self.path))

    def append(self, name: str, segment: SegmentData) -> None:
        """Write a segment and commit it; durable when this returns.

        Args:
            name: unique in the store; letters, digits, dashes.
            segment: its content; dtype, width, checkpoints and boundaries must be the fingerprint's.

        Raises:
            InputError: the name is committed already, or the content does not fit the fingerprint.
            OSError: the disk refuses. The files of this segment are removed; the store is as it was.
        """
        layout.check_name(name, "segment name")
        self._check_fits(segment)
        if name in self.committed:
            raise InputError(f"segment {name!r} is committed already; segments are immutable")
        with self._claimed_folder(name) as folder:
            schema = self._write_arrays(folder, segment)
            _fsync_below(folder)
            self._commit(name, folder, self._record(name, folder, segment, schema))

    def _create(self) -> None:
        leftovers = {layout.SEGMENTS, layout.COMMITS}  # of a writer that died before it wrote the root
        if self.path.is_dir() and {entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")} - leftovers:
            raise InputError(f"{self.path} is not empty and not a store; give a new folder")
        for folder in (self.path, self.path / layout.SEGMENTS, self.path / layout.COMMITS):
            folder.mkdir(parents=True, exist_ok=True)
        root = {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {"actcache": {"format_version": layout.FORMAT_VERSION, "fingerprint": self.fingerprint}},
        }
        write_atomically(self.path / layout.ROOT, json.dumps(root, sort_keys=True, indent=1).encode() + b"\n")
        fsync_folder(self.path.parent)

    def _check_fits(self, segment: SegmentData) -> None:
        expected = {(label, b) for label in self.fingerprint["checkpoints"] for b in self.fingerprint["boundaries"]}
        if set(segment.states) != expected:
            raise InputError(f"states of {sorted(segment.states)}, expected {sorted(expected)}")
        if set(segment.final) != set(self.fingerprint["checkpoints"]):
            raise InputError(f"final states of {sorted(segment.final)}, expected {sorted(self.fingerprint['checkpoints'])}")
        prefix = self.fingerprint["row_selection"] == "prefix"
        n_rows = len(segment.token_ids) if prefix else segment.events.num_rows
        sizes = [(f"states {key}", rows, n_rows) for key, rows in segment.states.items()]
        sizes += [(f"final states of {label}", rows, segment.events.num_rows) for label, rows in segment.final.items()]
        for what, rows, n in sizes:
            dtype = layout.STATE_DTYPES[self.fingerprint["dtype"]]
            if rows.dtype != dtype or tuple(rows.shape) != (n, self.fingerprint["width"]):
                raise InputError(
                    f"{what}: {rows.dtype} {tuple(rows.shape)}, expected {dtype} {(n, self.fingerprint['width'])}"
                )

    @contextmanager
    def _claimed_folder(self, name: str) -> Iterator[Path]:
        """A new folder under an exclusive lock for as long as this writer lives; removed if the block raises.

        The lock is how others tell a folder that is being written from one that a dead writer left: the latter is
        removed and its name used again, so that a resumed store has the same paths as an uninterrupted one.
        """
        committed = {record["folder"] for record in read_commits(self.path).values()}
        for number in count():
            folder = self.path / layout.SEGMENTS / (f"{name}" if number == 0 else f"{name}.{number}")
            if folder.name in committed:
                continue
            folder.mkdir(exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                continue
            break
        try:
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            os.close(handle)

    def _write_arrays(self, folder: Path, segment: SegmentData) -> dict[str, dict[str, str]]:
        group = zarr.open_group(LocalStore(folder), mode="w", zarr_format=3)
        layout.write_array(group, "token_ids", segment.token_ids)
        layout.write_array(group, "sequence_offsets", segment.sequence_offsets)
        for (label, boundary), rows in segment.states.items():
            array, dtype = layout.to_numpy(rows)
            layout.write_array(group, layout.state_path(label, boundary), array, {"dtype": dtype})
        for label, rows in segment.final.items():
            array, dtype = layout.to_numpy(rows)
            layout.write_array(group, f"final/{label}", array, {"dtype": dtype})
        return {
            "events": layout.write_table(group, "events", segment.events),
            "excluded": layout.write_table(group, "excluded", segment.excluded),
        }

    def _record(
        self, name: str, folder: Path, segment: SegmentData, schema: dict[str, dict[str, str]]
    ) -> dict[str, Any]:
        files = {}
        for path in layout.files_below(folder):
            data = path.read_bytes()
            files[path.relative_to(folder).as_posix()] = [len(data), layout.crc32c(data)]
        rows = next(iter(segment.states.values()), torch.empty(0))
        return {
            "format_version": layout.FORMAT_VERSION,
            "segment": name,
            "folder": folder.name,
            "fingerprint": self._digest,
            "n_sequences": segment.n_sequences,
            "n_tokens": len(segment.token_ids),
            "n_rows": len(rows),
            "n_events": segment.events.num_rows,
            "n_excluded": segment.excluded.num_rows,
            "schema": schema,
            "raw_state_bytes": sum(rows.numel() * rows.element_size() for rows in segment.states.values()),
            "stored_state_bytes": sum(size for path, (size, _) in files.items() if path.startswith("states/")),
            "stored_bytes": sum(size for size, _ in files.values()),
            "files": files,
        }

    def _commit(self, name: str, folder: Path, record: dict[str, Any]) -> None:
        commits = self.path / layout.COMMITS
        temporary = commits / f".{folder.name}.{os.getpid()}.tmp"
        try:
            with temporary.open("wb") as stream:
                stream.write(layout.encode_record(record))
                stream.flush()
                os.fsync(stream.fileno())
            try:
                os.link(temporary, commits / f"{name}.json")
            except FileExistsError:
                shutil.rmtree(folder)  # another writer committed this segment first; its copy stands
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()
        fsync_folder(commits)


def _fsync_below(folder: Path) -> None:
    for path in layout.files_below(folder):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            fsync_folder(path)
    fsync_folder(folder)
    fsync_folder(folder.parent)


def _check_same(given: dict[str, Any], stored: dict[str, Any], prefix: str = "") -> None:
    for field in sorted(given.keys() | stored.keys()):
        a, b = stored.get(field), given.get(field)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            _check_same(b, a, f"{prefix}{field}.")
        raise IncompatibleError(
            f"the store belongs to another run: its {prefix}{field} is {a}, this run's is {b}; give another folder",
            field=f"{prefix}{field}",
        )
