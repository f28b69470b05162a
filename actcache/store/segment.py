"""A committed segment: its arrays and tables, every byte checked before it is believed.

A segment trusts the commit record that it was opened with and nothing else: the record vouches for the metadata of each
array, and that for each chunk. So it gives what was committed or an error, whatever has come to lie in its place; and
where a compaction has put its content into another segment, it reads it there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actcache.carried import keys_of
from actcache.errors import CorruptStoreError, InputError
from actcache.fingerprint import Fingerprint
from actcache.store import layout, shard
from actcache.store.commit_record import CommitRecord, record_digest
from actcache.store.records import Counts, Part, parts_of
from actcache.store.segment_data import check_carried, check_events, check_offsets, check_pairs, sequences_of
from actcache.store.storage import Storage


class Segment:
    """One committed segment.

    Attributes:
        storage: that holds it.
        events: its events, as indices of the whole store.
        record: its commit record.
        fingerprint: the store's.
        parts: what writers committed of its content, in its order: itself alone, unless a compaction made it.
        additions: segments of rows alone, whose arrays count as this one's.
    """

    def __init__(
        self,
        storage: Storage,
        events: range,
        record: CommitRecord,
        fingerprint: Fingerprint,
        additions: Sequence[CommitRecord] = (),
    ) -> None:
        """Take what the commit record of a segment, or of an addition, says; ``additions`` are such records."""
        self.storage, self.events, self.record, self.fingerprint = storage, events, record, fingerprint
        self.additions = tuple(Segment(storage, events, addition, fingerprint) for addition in additions)
        self.parts = parts_of(record)
        self._open: dict[str, shard.StoredArray] = {}
        self._tables: dict[str, pa.Table] = {}  # read for segments whose content lies in this one
        self._row_offsets: npt.NDArray[np.int64] | None = None
        self._event_rows: npt.NDArray[np.int64] | None = None
        self._carried_keys: frozenset[str] | None = None
        self._home: tuple[Segment, Counts] = self, _NOTHING  # where the content lies, and what lies before it there

    @property
    def name(self) -> str:
        """The segment's name."""
        return str(self.record["segment"])

    @property
    def covers(self) -> set[str]:
        """Its name, and those of its additions and of the segments that it replaces."""
        return {self.name, *self.record["replaces"], *(addition.name for addition in self.additions)}

    @property
    def folder(self) -> str:
        """Key of the folder that holds its arrays."""
        return f"{layout.SEGMENTS}/{self.record['folder']}"

    @property
    def n_events(self) -> int:
        """E of this segment."""
        return len(self.events)

    @property
    def n_rows(self) -> int:
        """N of this segment, for each checkpoint and boundary."""
        return layout.n_rows(self.fingerprint, self.record["n_tokens"], self.n_events)

    @property
    def n_sequences(self) -> int:
        """S of this segment."""
        return int(self.record["n_sequences"])

    @cached_property
    def arrays(self) -> layout.Arrays:
        """Every array of its own, those of additions apart."""
        return layout.expected_arrays(self.record, self.fingerprint)

    @cached_property
    def sites(self) -> layout.Sites:
        """The blocks whose rows it has, by site, those of additions last."""
        found: layout.Sites = {}
        for one in (self, *self.additions):
            for site, blocks in layout.recorded_sites(one.record, self.fingerprint).items():
                found[site] = list(dict.fromkeys([*found.get(site, []), *blocks]))
        return found

    # Not cached properties: those of Python 3.11 let only one segment at a time read, whatever its storage.

    @property
    def row_offsets(self) -> npt.NDArray[np.int64]:
        """``[S + 1]``, where each sequence begins."""
        if self._row_offsets is None:
            self._row_offsets = self._read_row_offsets()
        return self._row_offsets

    @property
    def event_rows(self) -> npt.NDArray[np.int64]:
        """``[E, 2]``, first row of each event's sequence and the row just after its position."""
        if self._event_rows is None:
            self._event_rows = self._read_event_rows()
        return self._event_rows

    @property
    def carried_keys(self) -> frozenset[str]:
        """Keys that the prompts of its tables carry (errors as :meth:`read`)."""
        if self._carried_keys is None:
            tables = [self.read_table(name) for name in layout.TABLES]
            self._carried_keys = keys_of(text for table in tables for text in table["carried"].to_pylist())
        return self._carried_keys

    def read(self, array: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows ``start:stop`` of one of the segment's arrays, as stored (bfloat16 as uint16).

        Raises:
            InputError: the segment has no such array, or the array no such rows; or its content lies in a merged
                segment, and the array has no row for each token, event or prompt.
            CorruptStoreError: stored bytes are not those committed; names segment, array and chunk.
        """
        home, before = self._home
        if home is self:
            stored = self.open_array(array)
            return stored.read(start, stored.shape[0] if stop is None else stop)
        first, n = self._rows_of(array, before)
        stop = n if stop is None else stop
        if not 0 <= start <= stop <= n:
            raise InputError(f"segment {self.name}, array {array}: rows {start}:{stop} asked, it has {n}")
        return home.read(array, first + start, first + stop)

    def request(self, array: str, spans: shard.Spans, at: npt.NDArray[np.int64]) -> shard.Request:
        """For ``shard.read_spans``: rows ``spans`` of an array with a row for each token or event (errors as read)."""
        home, before = self._home
        if home is self:
            return self.open_array(array), spans, at
        return home.open_array(array), spans + self._rows_of(array, before)[0], at

    def read_table(self, name: str) -> pa.Table:
        """The ``events``, ``excluded`` or ``sequences`` table, as written (errors as :meth:`read`).

        A segment of version 1 has no ``sequences``: then it is what its events say of them.
        """
        home, before = self._home
        if home is not self:
            return self._table_at(home, before, name)
        if name not in self.record["schema"]:
            return sequences_of(self.read_table("events"), self.n_sequences)
        texts = self._read_texts(name) if self.record["format_version"] > 1 else self._read_texts_of_v1(name)
        kinds = self.record["schema"][name].items()
        table = pa.table(
            {column: texts[column] if kind == "string" else self.read(f"{name}/{column}") for column, kind in kinds}
        )
        with self._fitting(name):
            check_carried(table, name)
            if name == "events" and self.record["format_version"] > 1:
                check_pairs(table, self.fingerprint.checkpoints)
        return table

    def settle(self, live: Segments) -> bool:
        """Read from where the content lies among the segments that there are now; whether they have it at all.

        It is the same content where the parts are the same, which their records' digests prove.
        """
        found = live.find(self.parts)
        if found is None:
            return False
        digest = record_digest(found[0].record)
        if digest != record_digest(self.home.record):
            self._home = (self, _NOTHING) if digest == record_digest(self.record) else found
        return True

    @property
    def home(self) -> Segment:
        """The segment whose files hold the content, as far as is known: this one until :meth:`settle` finds another."""
        return self._home[0]

    def open_array(self, array: str) -> shard.StoredArray:
        """One of the segment's own arrays, its metadata checked against the commit record (errors as :meth:`read`)."""
        if array not in self._open:
            if array not in self.arrays:
                for addition in self.additions:
                    if array in addition.arrays:
                        return addition.open_array(array)
                raise InputError(f"segment {self.name} has no array {array!r}; it has {', '.join(self.arrays)}")
            shape, dtype = self.arrays[array]
            where = f"segment {self.name}, array {array}"
            data_file, _ = self.record["files"].get(f"{array}/{shard.data_file(len(shape))}", (None, None))
            metadata = self._metadata(array, where)
            stored = shard.StoredArray(self.storage, f"{self.folder}/{array}", metadata, data_file, where)
            fits = len(stored.shape) == len(shape) and all(
                n in (None, m) for n, m in zip(shape, stored.shape, strict=True)
            )
            if not fits or stored.dtype != dtype or stored.codec is not layout.codec_of(array, self.fingerprint):
                raise CorruptStoreError(f"{where}: {stored.dtype} {stored.shape}, committed as {dtype} {shape}")
            self._open[array] = stored
        return self._open[array]

    def _read_texts(self, name: str) -> dict[str, pa.Array]:
        """The columns of texts of a table."""
        offsets = self.read(layout.TEXT_OFFSETS)
        with self._fitting(layout.TEXT_OFFSETS):
            check_offsets(offsets, self.open_array(layout.TEXTS).shape[0])
        first = 0
        for table, schema in sorted(self.record["schema"].items()):
            n, columns = layout.n_of_table(self.record, table), layout.text_columns(schema)
            if table == name:
                break
            first += n * len(columns)
        offsets = offsets[first : first + n * len(columns) + 1]
        start = offsets[0]
        data = self.read(layout.TEXTS, int(start), int(offsets[-1]))
        with self._fitting(name):
            return {
                column: layout.decode_text(data, offsets[i * n : (i + 1) * n + 1] - start)
                for i, column in enumerate(columns)
            }

    def _read_texts_of_v1(self, name: str) -> dict[str, pa.Array]:
        texts = {}
        for column in layout.text_columns(self.record["schema"][name]):
            path = f"{name}/{column}"
            data, offsets = self.read(f"{path}/bytes"), self.read(f"{path}/offsets")
            with self._fitting(path):
                check_offsets(offsets, len(data))
                texts[column] = layout.decode_text(data, offsets)
        return texts

    @contextmanager
    def _fitting(self, what: str) -> Iterator[None]:
        """Content that was no one's mistake to give, as when it was written, but is damage when it is read."""
        try:
            yield
        except InputError as error:
            raise CorruptStoreError(f"segment {self.name}, {what}: {error}{shard.ADVICE}") from error

    def _metadata(self, array: str, where: str) -> bytes:
        file = f"{array}/{layout.ROOT}"
        if file not in self.record["files"]:
            raise CorruptStoreError(f"{where}: the commit record does not name its {layout.ROOT}")
        try:
            data = self.storage.read(f"{self.folder}/{file}")
        except FileNotFoundError as error:
            raise CorruptStoreError(f"{where}: its {layout.ROOT} is missing{shard.ADVICE}") from error
        if [len(data), shard.crc32c(data)] != self.record["files"][file]:
            raise CorruptStoreError(f"{where}: its {layout.ROOT} is not the one committed{shard.ADVICE}")
        return data

    def _read_row_offsets(self) -> npt.NDArray[np.int64]:
        home, before = self._home
        if home is not self:
            first = before.n_sequences
            return home.row_offsets[first : first + self.n_sequences + 1] - before.n_tokens
        offsets = self.read("sequence_offsets")
        with self._fitting("sequence_offsets"):
            check_offsets(offsets, self.record["n_tokens"])
        return offsets

    def _read_event_rows(self) -> npt.NDArray[np.int64]:
        home, before = self._home
        if home is not self:
            return home.event_rows[before.n_events : before.n_events + self.n_events] - before.n_tokens
        sequence, position = self.read("events/sequence"), self.read("events/position")
        with self._fitting("events"):
            check_events(sequence, position, self.row_offsets)
        start = self.row_offsets[sequence]
        return np.stack([start, start + position + 1], axis=1)

    def _rows_of(self, array: str, before: Counts) -> tuple[int, int]:
        """Where the segment's rows of an array begin in one that holds ``before`` too, and how many there are."""
        axis = layout.dimension_names(array)[0]
        if axis == "row":
            axis = "token" if self.fingerprint.has_prefix_rows else "event"
        field = {"token": "n_tokens", "event": "n_events", "prompt": "n_excluded"}.get(axis)
        if field is None:
            raise InputError(f"segment {self.name} has been merged into {self.home.name}: it has no {array} there")
        return int(getattr(before, field)), int(self.record[field])

    def _table_at(self, home: Segment, before: Counts, name: str) -> pa.Table:
        if name not in home._tables:
            home._tables[name] = home.read_table(name)
        n = layout.n_of_table(self.record, name)
        table = home._tables[name].slice(layout.n_of_table(before._asdict(), name), n)
        if name in self.record["schema"]:  # a compaction gives segments of version 1 a column more
            table = table.select(list(self.record["schema"][name]))
        if name != "events":
            return table
        column = table.column_names.index("sequence")
        return table.set_column(column, "sequence", pa.array(table["sequence"].to_numpy() - before.n_sequences))


class Segments:
    """Segments, to be searched for content."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._at = {part: (segment, i) for segment in segments for i, part in enumerate(segment.parts)}
        self._before: dict[str, list[Counts]] = {}

    def find(self, parts: Sequence[Part]) -> tuple[Segment, Counts] | None:
        """The segment that holds exactly these parts side by side, and what lies before them in it."""
        segment, first = self._at.get(parts[0], (None, 0))
        if segment is None or segment.parts[first : first + len(parts)] != tuple(parts):
            return None
        if segment.name not in self._before:
            counts = (part.counts for part in segment.parts)
            self._before[segment.name] = [*accumulate(counts, Counts.plus, initial=_NOTHING)]
        return segment, self._before[segment.name][first]


_NOTHING = Counts(0, 0, 0, 0)
