"""Prompts: a file in, validated prompts out. Knows texts and messages; knows no tokens and no models.

A small file's prompts are held. Those of a large one are read once, so that all are valid and their places are known;
afterwards they are read again where they are asked for.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from actcache import carried
from actcache.errors import InputError
from actcache.files import no_file
from actcache.prompt_files import PromptFile, Row, open_prompt_file
from actcache.schema import RESERVED_NAMES, RESERVED_PREFIXES

MAX_ID = 1000  # characters: it is repeated in every cell of its events, and a path or a URL fits
MAX_HELD = 20_000  # prompts of a file that are held, and encoded before anything runs
MAX_HELD_BYTES = 2**26  # of them in the file
PART = 64  # prompts of a segment, unless told otherwise

_HASHED_AT_ONCE = 2**16  # bytes
_STRIDE = 64  # rows of a large file, of which it is known where one lies
_FORMS = ("prompt", "messages", "token_ids")


@dataclass(frozen=True)
class Prompt:
    """One row of a prompts file.

    Attributes:
        id: its name.
        text: raw text; empty where it is one of the next two.
        carried: every further key, carried to the events.
        messages: of a chat, each with its ``role`` and ``content``; None where it is none.
        token_ids: used as they are; None where text gives them.
        where: the file and the row, for errors.
    """

    id: str
    text: str
    carried: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] | None = None
    token_ids: list[int] | None = None
    where: str = field(default="", compare=False, repr=False)

    @property
    def named(self) -> str:
        """What an error calls it."""
        return f"{self.where}: prompt {self.id!r}" if self.where else f"prompt {self.id!r}"

    @property
    def content(self) -> Any:
        """What its digest is made of, as JSON: text is its own, as in earlier versions."""
        return _content(self.text, self.messages, self.token_ids)


class Prompts(Sequence[Prompt]):
    """The prompts of a large file, by number; a slice is read, and is a list.

    Where one row in ``_STRIDE`` lies is known; the others are found from there. So a file of many millions takes little
    memory.

    Attributes:
        n_messages: how many are messages.
        known: digests of some of them.
    """

    def __init__(
        self, file: PromptFile, path: Path, n: int, places: Sequence[int], n_messages: int, known: Digests
    ) -> None:
        """Of a file that was read once.

        Args:
            file: gives the rows.
            path: of it.
            n: how many of its rows count.
            places: of every ``_STRIDE``-th row its offset and its number, one after another.
            n_messages: see there.
            known: see there.
        """
        self._file, self._path, self._n, self._places = file, path, n, places
        self.n_messages, self.known = n_messages, known
        self._next: tuple[int, Iterator[Row]] | None = None  # where the last slice ended, and the rows from there on
        self._stamp = _stamp(path)

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, at: int) -> Prompt: ...
    @overload
    def __getitem__(self, at: slice) -> list[Prompt]: ...
    def __getitem__(self, at: int | slice) -> Prompt | list[Prompt]:
        numbers = range(len(self))[at]
        if isinstance(numbers, int):
            return self._read(range(numbers, numbers + 1))[0]
        if numbers.step == 1:
            return self._read(numbers)
        return [self._read(range(number, number + 1))[0] for number in numbers]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompt(*one) for one in zip(range(len(self)), self._rows(0), strict=False))

    def _read(self, numbers: range) -> list[Prompt]:
        if not numbers:
            return []
        rows = self._rows(numbers.start)
        # In this order, so that no row is read beyond the last one.
        found = [self._prompt(*one) for one in zip(numbers, rows, strict=False)]
        self._next = numbers.stop, rows
        return found

    def _prompt(self, number: int, row: Row) -> Prompt:
        return Prompt(*_checked(row.record, row.where, number, is_table=self._file.is_table), row.where)

    def _rows(self, number: int) -> Iterator[Row]:
        """The rows from this one on."""
        if _stamp(self._path) != self._stamp:
            raise InputError(f"{self._path} has changed since it was read; start again")
        kept, self._next = self._next, None  # by whoever takes it, alone
        at = number - number % _STRIDE
        if kept is not None and at <= kept[0] <= number:
            at, rows = kept
        else:
            place = 2 * (number // _STRIDE)
            rows = self._file.rows(self._places[place], self._places[place + 1])
        for _ in range(number - at):
            next(rows)
        return rows


def _stamp(path: Path) -> tuple[int, int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns, state.st_ino


def read_prompts(path: str | Path, limit: int | None = None, part: int = PART) -> Sequence[Prompt]:
    """Read and validate a prompts file: JSON Lines, one object per line, or a CSV, TSV or Parquet table with these
    columns.

    A row has an ``id`` and one of ``prompt`` (text), ``messages`` (a chat) and ``token_ids``. A table without ids has
    the numbers of its rows, from 0. JSON Lines, CSV and TSV may be gzipped. The whole file is validated, also past
    ``limit``: what a store or a table would refuse after hours of forwards is refused here. Blank lines are skipped.

    Args:
        path: of the file.
        limit: how many of the first prompts to take; None for all.
        part: of so many prompts each, digests are known afterwards without reading again.

    Returns:
        a list, or :class:`Prompts` where there are more than ``MAX_HELD``, or they are long.

    Raises:
        InputError: the file is missing, not UTF-8, damaged or empty; a row is not a JSON object; its ``id`` or its
            prompt is missing, empty or of another type, or it has two of them; an id comes twice or has more than
            ``MAX_ID`` characters; or a row carries what cannot be carried: a key twice, or one that names a column of
            the results; a number beyond a float64 or of thousands of digits; a lone surrogate; more levels, keys or
            text than ``actcache.carried`` allows.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{no_file(path, 'prompts file')}; give a JSON Lines file with one prompt per line")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it must be at least 1")
    file = open_prompt_file(path)
    places, hashes = array("q"), array("q")
    held: list[Prompt] | None = []
    digests = Digests(part)
    keys: set[str] = set()
    n_bytes = n_carried = n_messages = 0
    for at, (record, where, offset, number, size) in enumerate(file.rows()):
        checked = name, text, further, messages, ids = _checked(record, where, at, is_table=file.is_table, known=keys)
        keys.update(further)
        if len(keys) > carried.MAX_KEYS:
            raise InputError(
                f"{where}: the prompts to here carry {len(keys)} distinct keys, at most {carried.MAX_KEYS} can be "
                "columns; put values that differ from prompt to prompt under one key"
            )
        n_carried += size - len(text) if text else len(carried.encode(further))
        if n_carried > carried.MAX_BYTES:
            raise InputError(
                f"{where}: the prompts to here carry more than {carried.MAX_BYTES} bytes besides their text; "
                "leave long documents out and join them to the tables by prompt_id"
            )
        if at % _STRIDE == 0:
            places.extend((offset, number))
        hashes.append(hash(name))
        if limit is None or at < limit:
            n_messages += messages is not None
            digests.add(_line(name, _content(text, messages, ids), further))
            n_bytes += size
            if held is not None:
                held.append(Prompt(*checked, where))
                held = None if at >= MAX_HELD or n_bytes > MAX_HELD_BYTES else held
    if not hashes:
        raise InputError(f"{path}: no prompts in it; give one JSON object per line")
    digests.end()
    _check_distinct(Prompts(file, path, len(hashes), places, n_messages, digests), np.frombuffer(hashes, np.int64))
    if held is not None:
        return held
    return Prompts(file, path, digests.n, places, n_messages, digests)


def n_messages(prompts: Sequence[Prompt]) -> int:
    """How many prompts are messages."""
    if isinstance(prompts, Prompts):
        return prompts.n_messages
    return sum(prompt.messages is not None for prompt in prompts)


def _check_distinct(prompts: Prompts, hashes: np.ndarray) -> None:
    """That no id comes twice: those whose hashes do are read again."""
    ordered = np.sort(hashes)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    if not len(twice):
        return
    at_twice = np.flatnonzero(np.isin(hashes, twice))
    order = at_twice[hashes[at_twice].argsort(kind="stable")]
    same = np.flatnonzero(np.diff(hashes[order]) == 0)
    for at, before in sorted((int(order[i + 1]), int(order[i])) for i in same):
        first, second = prompts[before], prompts[at]
        if first.id == second.id:
            line = first.where.rpartition(", ")[2]
            raise InputError(f"{second.where}: id {second.id!r} is already the id of {line}; ids are unique")


def check_carried(record: dict[str, Any], where: str, known: Collection[str] = ()) -> None:
    """Raise InputError unless each further key of a line can become a column of the results; ``known`` ones can."""
    is_nested = False
    for key, value in record.items():
        is_nested = is_nested or isinstance(value, (dict, list))
        if key in known:
            continue
        if key in RESERVED_NAMES or key.startswith(RESERVED_PREFIXES):
            raise InputError(f"{where}: key {key!r} is the name of a result column; rename it")
        if not key.strip() or "\0" in key or len(key) > carried.MAX_KEY:
            raise InputError(
                f"{where}: key {key[:40]!r} cannot be the name of a column: it is empty, has more than "
                f"{carried.MAX_KEY} characters, or a NUL among them"
            )
    if is_nested and not carried.is_shallow(record):
        raise InputError(f"{where}: lists and objects lie more than {carried.MAX_LEVELS} deep within each other")


def _content(text: str, messages: list[dict[str, str]] | None, token_ids: list[int] | None) -> Any:
    """See :attr:`Prompt.content`."""
    if messages is not None:
        return {"messages": messages}
    return text if token_ids is None else {"token_ids": token_ids}


def _checked(
    record: dict[str, Any], where: str, number: int, *, is_table: bool, known: Collection[str] = ()
) -> tuple[str, str, dict[str, Any], list[dict[str, str]] | None, list[int] | None]:
    """The fields of a row's prompt but where it is; most rows of a large file are checked, and held as nothing more."""
    given = [key for key in _FORMS if key in record]
    if len(given) > 1:
        raise InputError(f"{where}: {' and '.join(map(repr, given))}; a line has one of {', '.join(map(repr, _FORMS))}")
    if not given:
        filled = f" among its filled columns, {', '.join(map(repr, record)) or 'none'}" if is_table else ""
        raise InputError(
            f"{where}: no 'prompt'{filled}; a prompt line is {{'id': str, 'prompt': str, ...}}, or has 'messages' or "
            "'token_ids' in its place"
        )
    if is_table and "id" not in record:
        record["id"] = str(number)
    name = _text(record, "id", where)
    if len(name) > MAX_ID:
        raise InputError(f"{where}: 'id' has {len(name)} characters, at most {MAX_ID} are read")
    text, messages, ids = "", None, None
    if given == ["prompt"]:
        text = _text(record, "prompt", where)
    elif given == ["messages"]:
        messages = _messages(record.pop("messages"), where)
    else:
        ids = record.pop("token_ids")
        if not isinstance(ids, list) or not ids or not all(type(one) is int and 0 <= one < 2**31 for one in ids):
            raise InputError(f"{where}: 'token_ids' is {json.dumps(ids)[:40]}, expected a list of whole numbers")
    check_carried(record, where, known)
    return name, text, record, messages, ids


def _text(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise InputError(f"{where}: no {key!r}; a prompt line is {{'id': str, 'prompt': str, ...}}")
    value = record.pop(key)
    if not isinstance(value, str):
        raise InputError(f"{where}: {key!r} is {json.dumps(value)[:40]}, expected text")
    if not value or value.isspace():
        raise InputError(f"{where}: {key!r} is empty")
    return value


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    """Those of a chat that waits for an answer."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: 'messages' is {json.dumps(value)[:40]}, expected [{{'role': str, 'content': str}}]")
    for number, one in enumerate(value, 1):
        which = f"{where}: message {number} of {len(value)}"
        if not isinstance(one, dict):
            raise InputError(f"{which} is {json.dumps(one)[:40]}, expected {{'role': str, 'content': str}}")
        if unknown := [key for key in one if key not in ("role", "content")]:
            raise InputError(f"{which} has {unknown[0]!r}, which is not rendered; a message has 'role' and 'content'")
        for key in ("role", "content"):
            if not isinstance(one.get(key), str):
                raise InputError(f"{which}: {key!r} is {json.dumps(one.get(key))[:40]}, expected text")
            if not one[key].strip():
                raise InputError(f"{which}: {key!r} is empty")
    if value[-1]["role"] == "assistant":
        raise InputError(f"{where}: the last message is the assistant's own; end with what it shall answer")
    return value


# ---- digests ----


class Digests:
    """Digests of equal parts of some prompts, and of all, made as they come."""

    def __init__(self, part: int) -> None:
        """Of parts of so many prompts."""
        self.n, self._part, self._known = 0, part, bytearray()
        self._all, self._own, self._lines = hashlib.sha256(), hashlib.sha256(), bytearray()

    def add(self, line: bytes) -> None:
        """Go on by the line of one prompt."""
        self._lines += line
        self.n += 1
        is_whole = self.n % self._part == 0
        if is_whole or len(self._lines) >= _HASHED_AT_ONCE:
            self._take()
        if is_whole:
            self._end_part()

    def end(self) -> None:
        """These were all."""
        self._take()
        self._end_part()

    def of(self, start: int, stop: int) -> str | None:
        """The digest of prompts from ``start`` to ``stop``, where they are all or a part."""
        if (start, stop) == (0, self.n):
            return self._all.hexdigest()
        number, within = divmod(start, self._part)
        if within or not start < stop == min(start + self._part, self.n):
            return None
        return self._known[number * 32 : (number + 1) * 32].hex()

    def _take(self) -> None:
        self._all.update(self._lines)
        self._own.update(self._lines)
        self._lines.clear()

    def _end_part(self) -> None:
        self._known += self._own.digest()
        self._own = hashlib.sha256()


def digest(prompts: Sequence[Prompt], start: int = 0, stop: int | None = None) -> str:
    """SHA-256 over ids, prompts and carried keys, in order: equal digests mean the same work.

    Args:
        prompts: some of which it is of.
        start, stop: which; all by default.
    """
    stop = len(prompts) if stop is None else stop
    if isinstance(prompts, Prompts) and (known := prompts.known.of(start, stop)):
        return known
    sha = hashlib.sha256()
    for prompt in prompts if (start, stop) == (0, len(prompts)) else prompts[start:stop]:
        sha.update(_line(prompt.id, prompt.content, prompt.carried))
    return sha.hexdigest()


def digests(prompts: Iterable[Prompt]) -> Iterator[str]:
    """The :func:`digest` of the first prompt, of the first two, and so on."""
    sha = hashlib.sha256()
    for prompt in prompts:
        sha.update(_line(prompt.id, prompt.content, prompt.carried))
        yield sha.hexdigest()


def _line(name: str, content: Any, further: Mapping[str, Any]) -> bytes:
    """``[name, content, further]`` as JSON with sorted keys, put together of its parts: the encoder has texts at once,
    and takes longer to begin with a list or an object than most of these take."""
    pairs = [f"{_ENCODE(key)}: {_JSON_OF.get(type(value), _ENCODE)(value)}" for key, value in sorted(further.items())]
    return f"[{_ENCODE(name)}, {_ENCODE(content)}, {{{', '.join(pairs)}}}]\n".encode()


_ENCODE = json.JSONEncoder(sort_keys=True).encode
_JSON_OF: dict[type, Callable[[Any], str]] = {str: _ENCODE, int: str}
