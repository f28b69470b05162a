"""Prompt files: the rows of a JSON Lines, CSV, TSV or Parquet file, from the first or from any later one on.

Each row becomes a JSON object. Texts may be gzipped. No file is ever held whole: what a row needs to be found again is
its offset. Knows files and their formats; knows no prompts.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import weakref
import zlib
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from actcache.errors import InputError
from actcache.strict_json import parse_object, parse_value

_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_BOM = b"\xef\xbb\xbf"
_ROWS_AT_ONCE = 1024  # of a Parquet file
_BYTES_AT_ONCE = 2**16  # of a text, and the line in which they end
_OF_JSON = ("messages", "token_ids")  # columns of a text table whose cells are JSON


class Row(NamedTuple):
    """One row of a file.

    Attributes:
        record: what it says.
        where: the file and the row, for errors.
        offset: where it is found again.
        number: of its line or row, from 1.
        n_bytes: of it in the file, about.
    """

    record: dict[str, Any]
    where: str
    offset: int
    number: int
    n_bytes: int


class PromptFile(Protocol):
    """A file of rows."""

    is_table: bool
    """Whether its columns have names of their own, so that rows need no id."""

    def rows(self, offset: int = 0, number: int = 1) -> Iterator[Row]:
        """All rows from the one on that was found at this offset with this number.

        Raises:
            InputError: a row is none; names it.
        """


def open_prompt_file(path: Path) -> PromptFile:
    """The file, by what it begins with and by the end of its name.

    Raises:
        InputError: it is of a kind that is not read; says the way on.
    """
    with path.open("rb") as stream:
        magic = stream.read(4)
    suffix = (path.with_suffix("") if magic[:2] == _GZIP else path).suffix.lower()
    if magic == _ZSTD:
        raise InputError(f"{path}: it is compressed by zstd: unpack it first, or compress it by gzip")
    if magic == _PARQUET or suffix == ".parquet":
        return _Parquet(path)
    lines = _Lines(path, gzipped=magic[:2] == _GZIP)
    return _Csv(lines, "," if suffix == ".csv" else "\t") if suffix in (".csv", ".tsv") else _JsonLines(lines)


class _Lines:
    """Lines of a text, from any of their first bytes on."""

    def __init__(self, path: Path, *, gzipped: bool) -> None:
        self.path = path
        opened = cast("io.RawIOBase", gzip.GzipFile(path) if gzipped else path.open("rb", buffering=0))
        self._stream = io.BufferedReader(opened, _BYTES_AT_ONCE)
        weakref.finalize(self, self._stream.close)
        self._at, self._ahead = 0, iter(())  # type: tuple[int, Iterator[bytes]]

    def read(self, offset: int) -> Iterator[tuple[int, str, int]]:
        """First byte, text and number of bytes of each line. One that goes on where another ended costs no seek."""
        try:
            while True:
                if self._at != offset:
                    self._stream.seek(offset)
                    self._at, self._ahead = offset, iter(())
                if (line := next(self._ahead, None)) is None:
                    self._ahead = iter(self._stream.readlines(_BYTES_AT_ONCE))
                    if (line := next(self._ahead, None)) is None:
                        return
                text = line[len(_BOM) :] if offset == 0 and line.startswith(_BOM) else line
                self._at = offset + len(line)
                yield offset, text.decode(), len(line)
                offset += len(line)
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: not UTF-8 text ({error.reason} at byte {offset + error.start})") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{self.path} is no whole gzip file ({error}): copy or download it again") from error


class _JsonLines:
    is_table = False

    def __init__(self, lines: _Lines) -> None:
        self._lines = lines

    def rows(self, offset: int = 0, number: int = 1) -> Iterator[Row]:
        path, is_first = self._lines.path, offset == 0
        place = f"{path}, line "
        for at, (start, line, n_bytes) in enumerate(self._lines.read(offset), number):
            if line.isspace() or not line:
                continue
            where = f"{place}{at}"
            kind = _what_it_is(path, line) if is_first else ""
            record = parse_object(line, where, kind, "an object with 'id' and 'prompt'")
            yield Row(record, where, start, at, n_bytes)
            is_first = False


class _Csv:
    is_table = True

    def __init__(self, lines: _Lines, delimiter: str) -> None:
        self._lines, self._delimiter = lines, delimiter
        found = next(self._records(0, 1), None)
        if found is None:
            raise InputError(f"{lines.path}: no prompts in it; give a line with the names of columns, and rows")
        self._names = [name.strip() for name in found[2]]
        if "" in self._names or len(set(self._names)) < len(self._names):
            raise InputError(f"{lines.path}, line 1: column names are {self._names}, expected distinct ones")

    def rows(self, offset: int = 0, number: int = 1) -> Iterator[Row]:
        for start, line, cells, n_bytes in self._records(offset, number):
            if start == 0:
                continue
            where = f"{self._lines.path}, line {line}"
            if len(cells) != len(self._names):
                raise InputError(f"{where}: {len(cells)} cells, expected {len(self._names)}: {', '.join(self._names)}")
            record: dict[str, Any] = dict(zip(self._names, cells, strict=True))
            for key in ("prompt", *_OF_JSON):  # a row has one of these, a table may have several
                if record.get(key) == "":
                    del record[key]
            record |= {key: parse_value(record[key], f"{where}: {key!r}") for key in _OF_JSON if key in record}
            yield Row(record, where, start, line, n_bytes)

    def _records(self, offset: int, number: int) -> Iterator[tuple[int, int, list[str], int]]:
        """First byte, first line, cells and bytes of each record, which may have several lines."""
        end, n_lines = offset, 0

        def feed() -> Iterator[str]:
            nonlocal end, n_lines
            for start, text, n_bytes in self._lines.read(offset):
                end, n_lines = start + n_bytes, n_lines + 1
                if "\0" in text:
                    raise InputError(
                        f"{self._lines.path}, line {number + n_lines - 1}: a NUL byte, expected text; write the file "
                        "again as UTF-8, without NULs"
                    )
                yield text

        csv.field_size_limit(2**31 - 1)
        reader, start, line = csv.reader(feed(), delimiter=self._delimiter, strict=True), offset, number
        try:
            for cells in reader:
                if cells:
                    yield start, line, cells, end - start
                start, line = end, number + n_lines
        except csv.Error as error:
            raise InputError(f"{self._lines.path}, line {line}: not CSV ({error})") from error


class _Parquet:
    is_table = True

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is no whole Parquet file ({' '.join(str(error).split())[:200]})") from error
        sizes = (self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups))
        self._starts = list(accumulate(sizes, initial=0))
        self._at, self._left = 0, iter(())  # type: tuple[int, Iterator[dict[str, Any]]]

    def rows(self, offset: int = 0, number: int = 1) -> Iterator[Row]:
        while offset < self._starts[-1]:
            where = f"{self.path}, row {offset + 1}"
            found = self._read(offset)
            record = {key: _as_json(value, where, key) for key, value in found.items() if value is not None}
            if type(record.get("id")) is int:
                record["id"] = str(record["id"])
            yield Row(record, where, offset, offset + 1, len(str(record)))
            offset += 1

    def _read(self, row: int) -> dict[str, Any]:
        """A row; the one after the last that was read costs least."""
        if row != self._at or row == 0:
            group = next(i for i, stop in enumerate(self._starts[1:]) if row < stop)
            groups = range(group, self._file.num_row_groups)
            batches = self._file.iter_batches(_ROWS_AT_ONCE, row_groups=list(groups))
            self._left = (one for batch in batches for one in batch.to_pylist())
            for _ in range(row - self._starts[group]):
                next(self._left)
        self._at = row + 1
        return next(self._left)


def _as_json(value: Any, where: str, key: str) -> Any:
    """A value of a column, nulls within objects left out."""
    if isinstance(value, list):
        return [_as_json(one, where, key) for one in value]
    if isinstance(value, dict):
        return {name: _as_json(one, where, key) for name, one in value.items() if one is not None}
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: {key!r} is {value}, which is not JSON; make it null, or text")
    if value is not None and not isinstance(value, str | int | float):
        raise InputError(
            f"{where}: {key!r} is a {type(value).__name__}, which is not JSON; make it text, or leave it out"
        )
    return value


def _what_it_is(path: Path, first_line: str) -> str:
    """What a file seems to be whose first line is no prompt, and the way on."""
    start = first_line.lstrip()[:1]
    if start == "[":
        return "; it is a JSON array, expected JSON Lines, one object per line (jq -c '.[]' FILE > FILE.jsonl)"
    if start == "{":
        return "; an object stands on one line (jq -c . FILE > FILE.jsonl)"
    return "; it is plain text, expected JSON Lines: one {'id': str, 'prompt': str} per line"
