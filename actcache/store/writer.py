"""Writing: segments are made whole in a folder of their own, then named by one small commit record.

Order: every file of the segment, made durable, then the commit record, which appears whole or not at all. A reader sees
a segment only through its record, so a writer that dies at any step loses at most the segment it was writing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

import torch

from actcache.canonical import canonical, digest_of
from actcache.errors import AlreadyCommittedError, IncompatibleError, InputError
from actcache.fingerprint import MISSING, UNSAID, Fingerprint
from actcache.store import commit_record, layout, shard
from actcache.store.chunks import ChunkCodec
from actcache.store.commit_record import CommitRecord
from actcache.store.records import (
    Part,
    committed_names,
    counts_of,
    encode_parts,
    merge_prompts,
    parts_of,
    read_fingerprint,
    read_record,
    read_records,
    without_replaced,
)
from actcache.store.segment_data import (
    Content,
    SegmentData,
    SiteRows,
    arrays_of,
    arrays_of_rows,
    check_pairs,
    sites_of,
)
from actcache.store.storage import Place, Storage, Write, open_storage

Files = dict[str, tuple[int, int | None]]
CodecOf = Callable[[str], ChunkCodec]

_FEW = 200  # records that are looked at whenever one is committed
_LOOKS = 100  # while the records of a larger store become twice as many, about
_ARRAYS_AT_ONCE = 4  # many are small, and then it is opening and closing files that takes the time


class StoreWriter:
    """Appends segments to a store.

    Several writers, in one process, many, or on many machines, may append to one store at once: they share nothing but
    the store.

    Attributes:
        storage: of the store.
        fingerprint: what identifies its content.
    """

    def __init__(
        self,
        place: Place,
        fingerprint: Fingerprint | Mapping[str, Any],
        prompts: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Create the store, or open one with the same fingerprint.

        Args:
            place: as in ``open_store``.
            fingerprint: of its content, or the JSON object of one.
            prompts: of every segment that the store shall have, a digest of its prompts, by name. Then the store may
                have been created with other prompts and boundaries, but its segments were committed with these prompts.

        Raises:
            InputError: the place is not a store and not empty, or the fingerprint lacks what the layout needs.
            IncompatibleError: the store has another fingerprint; names the first field that differs.
            CorruptStoreError, FormatVersionError: as ``open_store``, of the store's root.
            OSError: the disk or the net refuses.
        """
        self.storage: Storage = open_storage(place)
        content = fingerprint.to_json() if isinstance(fingerprint, Fingerprint) else fingerprint
        self.fingerprint = Fingerprint.from_json(json.loads(canonical(content)))
        layout.check_fingerprint(self.fingerprint)
        if self.storage.size(layout.ROOT) is None:
            self._create()
        stored = read_fingerprint(self.storage)
        self._prompts = dict(prompts)
        self._all_prompts = digest_of(self._prompts)
        # Of an earlier state of the prompts file, if not of this one; what is committed tells whether it matters.
        _check_same(self.fingerprint.as_grown_from(stored) if prompts else self.fingerprint, stored)
        self._given, self.fingerprint = self.fingerprint, stored
        self._digest = self.fingerprint.digest
        self._encoding = threading.Lock()
        self._known: dict[str, CommitRecord] = {}  # records seen so far, by name
        self._seen: set[str] = set()  # names that these commit, or replace
        self._n_unseen = 0  # segments committed here since others' were looked at
        if prompts:
            self.check_prompts()

    @property
    def committed(self) -> set[str]:
        """Names of the segments that are complete, those included that a compaction has merged into others."""
        return set(self._look()[1])

    def is_committed(self, name: str) -> bool:
        """Whether a segment is complete. Looks at its own record alone: one that a compaction has merged since the
        last look at all of them may seem to be missing."""
        return name in self._seen or self.storage.size(layout.commit_key(name)) is not None

    def append(
        self, name: str, segment: SegmentData, *, replaces: Sequence[str] = (), parts: Sequence[Part] = ()
    ) -> None:
        """Write a segment and commit it; durable when this returns.

        On a local disk, waits while another process or thread appends a segment of this name.

        Args:
            name: unique in the store; letters, digits, ``-`` and ``_``.
            segment: its content; dtype, width, checkpoints and boundaries must be the fingerprint's.
            replaces: names of committed segments whose content this one holds, and that no longer count.
            parts: what writers committed of that content, in its order; by them, open readers find it.

        Raises:
            AlreadyCommittedError: a segment of this name is committed, or was while this one was being written; the
                committed one is as it was.
            IncompatibleError: another writer has committed, before or just now, segments of other prompts.
            InputError: the content does not fit the fingerprint, or the name is none.
            OSError: the disk or the net refuses. The files of this segment are removed and the store is as it was; but
                where an object store did not say whether the segment was committed, it may still become so, whole.
        """
        layout.check_name(name, "segment name")
        rows = segment.rows
        described: dict[str, Any] = {
            "sites": self._check_fits(segment),
            "replaces": sorted(replaces),
            "n_sequences": segment.n_sequences,
            "n_tokens": len(segment.token_ids),
            "n_events": segment.events.num_rows,
            "n_excluded": segment.excluded.num_rows,
            "schema": {name: layout.schema_of(table) for name, table in segment.tables.items()},
        }
        if parts:
            described["parts"] = encode_parts(parts)
        self._commit(name, described, rows, list(arrays_of(segment)))

    def add_rows(self, name: str, to: dict[str, Any], rows: SiteRows) -> None:
        """Commit an addition: rows of further blocks or sites of a segment's sequences; durable when this returns.

        Args:
            name: of the addition, unique in the store, as a segment's.
            to: the commit record of the segment, which stays as it is.
            rows: ``(site, label, block) -> [N, D]``, of all checkpoints; N as in that segment.

        Raises:
            as :meth:`append`.
        """
        layout.check_name(name, "segment name")
        n_rows = layout.n_rows(self.fingerprint, to["n_tokens"], to["n_events"])
        described = {
            "extends": {"segment": to["segment"], "record": commit_record.record_digest(to)},
            "sites": self._check_rows(rows, n_rows),
            "replaces": [],
            "schema": {},
            **counts_of(to)._asdict(),
        }
        arrays = arrays_of_rows({layout.row_path(*key): values for key, values in rows.items()})
        self._commit(name, described, rows, list(arrays))

    def _commit(self, name: str, described: dict[str, Any], rows: SiteRows, arrays: list[Content]) -> None:
        try:
            self._append(name, described, rows, arrays)
            if self._is_due():  # again: of two writers that were at it at once, the later one sees both
                self.check_prompts()
        except FileNotFoundError as error:
            if self.storage.size(layout.ROOT) is None:
                gone = "the store has been removed; give the command again to make it anew"
                raise FileNotFoundError(errno.ENOENT, gone, str(self.storage)) from error
            raise

    def _append(self, name: str, described: dict[str, Any], rows: SiteRows, arrays: list[Content]) -> None:
        with self.storage.creating(layout.commit_key(name)) as publish:
            if described["replaces"] or self._is_due():
                self.check_prompts()
            if self.is_committed(name):
                raise AlreadyCommittedError(f"segment {name!r} is committed already; segments are immutable")
            folder = self.storage.folder_for(name)
            codecs = partial(layout.codec_of, fingerprint=self.fingerprint)
            record = {
                "format_version": layout.FORMAT_VERSION,
                "segment": name,
                "folder": folder,
                "fingerprint": self._digest,
                **described,
            }
            if prompts := self._prompts_of(name, described["replaces"]):
                record["prompts"] = prompts
            to_write = layout.expected_files(record, self.fingerprint)
            discard = partial(self._discard, f"{layout.SEGMENTS}/{folder}", to_write)
            try:
                with self.storage.new_folder(f"{layout.SEGMENTS}/{folder}", to_write) as write:
                    files = _write_files(write, arrays, codecs, self._encoding)
            except BaseException:
                discard()
                raise
            record |= _describe_files(files, rows)
            try:
                publish(commit_record.encode_record(record))
            except FileExistsError as error:
                discard()
                raise AlreadyCommittedError(f"segment {name!r} was committed by another writer meanwhile") from error
            except BaseException:
                # The record may be there, or on an object store appear at any later time: then its files must be too.
                if not self.storage.is_far and not self._published(name, folder):
                    discard()
                raise
            self._known[name] = CommitRecord(record, digest_of(record))
            self._seen.add(name)
            self._n_unseen += 1

    def _is_due(self) -> bool:
        """Whether to look at what others have committed: always in a small store. In one of many segments, a look at
        each commit would take most of the time in the end."""
        return self._n_unseen >= len(self._known) // _LOOKS or len(self._known) < _FEW

    def _look(self) -> tuple[list[CommitRecord], set[str]]:
        """The records of all, and the names that they commit or replace."""
        records = read_records(self.storage, self._digest, self._known)
        self._seen = {name for record in records for name in (record["segment"], *record["replaces"])}
        self._n_unseen = 0
        return records, self._seen

    def check_prompts(self) -> None:
        """Look at what all writers have committed.

        Raises:
            IncompatibleError: a committed segment is of other prompts than those of this writer.
        """
        records = without_replaced(self._look()[0])
        if not self._prompts:
            return
        committed = merge_prompts(records)["of"]
        if any(part.segment not in committed for record in records for part in parts_of(record)):
            # An earlier version knew of all prompts together only.
            _check_same(replace(self._given, boundaries=self.fingerprint.boundaries), self.fingerprint)
        for name, digest in committed.items():
            if self._prompts.get(name) != digest:
                raise IncompatibleError(
                    f"the store belongs to another run: the prompts of its segment {name} are not this run's; prompts "
                    "may change until they are captured, and be added behind those that are; give another folder",
                    field="prompts",
                )

    def _prompts_of(self, name: str, replaces: Sequence[str]) -> dict[str, Any] | None:
        """What the record of a segment says of its prompts, if anything is known of them."""
        if name in self._prompts:
            n = self._given.n_prompts or 0
            return {"all": [self._all_prompts], "of": {name: self._prompts[name]}, "n": n}
        merged = merge_prompts([self._known[old] for old in replaces if old in self._known])
        return merged if merged["of"] else None

    def _discard(self, folder: str, files: Sequence[str]) -> None:
        """Remove files that no record can name; where that fails they stay, listed as uncommitted."""
        with contextlib.suppress(OSError, InputError):
            self.storage.remove_files(folder, files)

    def _published(self, name: str, folder: str) -> bool:
        try:
            return bool(read_record(self.storage, name, self._digest)["folder"] == folder)
        except FileNotFoundError:
            return False

    def _create(self) -> None:
        self._check_unborn()
        self.storage.prepare((layout.SEGMENTS, layout.COMMITS))
        with self.storage.creating(layout.ROOT) as publish:
            if self.storage.size(layout.ROOT) is None:
                self.storage.put(f"{layout.SEGMENTS}/{layout.ROOT}", layout.encode_group({}))
                with contextlib.suppress(FileExistsError):  # another was first; with which fingerprint is seen next
                    publish(layout.encode_root(self.fingerprint))

    def _check_unborn(self) -> None:
        """That the place holds nothing but what a writer leaves that died before it wrote the root."""
        try:
            names = {name for name in self.storage.names("") if not name.startswith(".")}
        except NotADirectoryError:
            names = {"a file"}
        unborn = names <= {layout.SEGMENTS, layout.COMMITS} and not committed_names(self.storage)
        if not unborn and self.storage.size(layout.ROOT) is None:  # another writer may have made it just now
            raise InputError(f"{self.storage} is not empty and not a store; give a new folder")

    def _check_fits(self, segment: SegmentData) -> layout.Sites:
        """Raise InputError unless a segment is one of this store; the blocks that it has rows of."""
        labels, boundaries = set(self.fingerprint.checkpoints), set(self.fingerprint.boundaries)
        missing = {(label, b) for label in labels for b in boundaries} - segment.states.keys()
        if missing:
            raise InputError(f"states of {sorted(segment.states)}, expected {sorted(missing)} too")
        n_rows = layout.n_rows(self.fingerprint, len(segment.token_ids), segment.events.num_rows)
        sites = self._check_rows(segment.rows, n_rows)
        if set(segment.final) != labels:
            raise InputError(f"final states of {sorted(segment.final)}, expected {sorted(labels)}")
        for label, rows in segment.final.items():
            self._check_shape(f"final states of {label}", rows, segment.events.num_rows)
        check_pairs(segment.events, labels)
        return {layout.STATE: [], **sites}

    def _check_rows(self, rows: SiteRows, n_rows: int) -> layout.Sites:
        for (site, label, block), values in rows.items():
            what = "states" if site == layout.STATE else f"rows of site {site}"
            self._check_shape(f"{what} {(label, block)}", values, n_rows)
        return sites_of(rows, self.fingerprint.checkpoints)

    def _check_shape(self, what: str, rows: torch.Tensor, n: int) -> None:
        dtype, shape = layout.STATE_DTYPES[self.fingerprint.dtype], (n, self.fingerprint.width)
        if rows.dtype != dtype or tuple(rows.shape) != shape:
            raise InputError(f"{what}: {rows.dtype} {tuple(rows.shape)}, expected {dtype} {shape}")


def _write_files(write: Write, arrays: list[Content], codecs: CodecOf, encoding: threading.Lock) -> Files:
    """Write every file of a segment; holds ``encoding`` while it uses the processor, not while it waits.

    Returns:
        by path, the size of each file and the CRC-32C of metadata. Shards have none: their arrays' metadata has that of
        every chunk, and the CRC-32C of bytes that end in their own CRC-32C is the same whatever the bytes are.
    """
    # The largest first: the small ones, which cost opening and closing files, fill the gaps beside it.
    arrays = sorted(arrays, key=lambda array: -array[1].nbytes)
    files: Files = {}

    def write_metadata(path: str, content: bytes) -> Files:
        file = str(PurePosixPath(path, layout.ROOT))
        return {file: (write(file, [content]), shard.crc32c(content))}

    def write_array(given: Content) -> Files:
        path, array, attributes = given
        encoded = shard.EncodedArray(array, layout.dimension_names(path), attributes, codecs(path))
        file = f"{path}/{shard.data_file(array.ndim)}"
        files: Files = {file: (write(file, encoded.parts()), None)} if len(array) else {}
        return files | write_metadata(path, layout.encode_json(encoded.metadata()))

    with encoding, ThreadPoolExecutor(_ARRAYS_AT_ONCE) as pool:
        for written in pool.map(write_array, arrays):
            files |= written
    for group in layout.groups_of(path for path, _, _ in arrays):
        files |= write_metadata(group, layout.encode_group({}))
    return files


def _describe_files(files: Files, rows: SiteRows) -> dict[str, Any]:
    """What a commit record says of the segment's bytes."""
    return {
        "raw_state_bytes": sum(values.numel() * values.element_size() for values in rows.values()),
        "stored_state_bytes": sum(size for path, (size, _) in files.items() if path.startswith(layout.ROW_FOLDERS)),
        "stored_bytes": sum(size for size, _ in files.values()),
        "files": files,
    }


def _check_same(given: Fingerprint, stored: Fingerprint) -> None:
    """Raise IncompatibleError, naming the first field that differs, unless both fingerprints are the same."""
    for field, *values in stored.differences(given):
        unsaid = UNSAID.get(field.rpartition(".")[2], "not recorded")
        of_store, shown = (unsaid if value is MISSING else value for value in values)
        if of_store == "not recorded":
            raise IncompatibleError(
                f"the store belongs to another run, or to one of an earlier version: its {field} is not recorded, this "
                f"run's is {shown}; give another folder, or score what is captured with 'actcache grid'",
                field=field,
            )
        raise IncompatibleError(
            f"the store belongs to another run: its {field} is {of_store}, this run's is {shown}; give another folder",
            field=field,
        )
