"""Prompts: JSON Lines in, validated prompts out. Knows text; knows no tokens and no models."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actcache import carried
from actcache.errors import InputError
from actcache.files import no_file
from actcache.schema import RESERVED_NAMES, RESERVED_PREFIXES

MAX_ID = 1000  # characters: it is repeated in every cell of its events, and a path or a URL fits

_NOT_READ_YET = {
    "messages": (
        "render them with the tuned checkpoint's tokenizer, apply_chat_template(messages, tokenize=False, "
        "add_generation_prompt=True), and give the text as 'prompt'; leave out a BOS that the tokenizer adds by itself"
    ),
    "token_ids": "give the text that they stand for as 'prompt'",
}


@dataclass(frozen=True)
class Prompt:
    """One line of a prompts file: ``id``, the raw ``text``, and every further key, carried to the events."""

    id: str
    text: str
    carried: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """Read and validate a prompts file: one JSON object per line, ``{"id": str, "prompt": str, ...}``.

    The whole file is validated, also past ``limit``: what a store or a table would refuse after hours of forwards is
    refused here. Blank lines are skipped.

    Raises:
        InputError: the file is missing, not UTF-8 or empty; a line is not a JSON object; its ``id`` or ``prompt``
            is missing, empty or no text; an id comes twice or has more than ``MAX_ID`` characters; or a line carries
            what cannot be carried: a key twice, or one that names a column of the results; a number beyond a float64
            or of thousands of digits; a lone surrogate; more levels, keys or text than ``actcache.carried`` allows.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{no_file(path, 'prompts file')}; give a JSON Lines file with one prompt per line")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}){_what_it_is(path)}") from error
    prompts: list[Prompt] = []
    line_of_id: dict[str, int] = {}
    keys: set[str] = set()
    n_bytes = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        prompt = _parse_line(line, where, "" if prompts else _what_it_is(path, line))
        first = line_of_id.setdefault(prompt.id, number)
        if first != number:
            raise InputError(f"{where}: id {prompt.id!r} is already the id of line {first}; ids are unique")
        keys |= prompt.carried.keys()
        if len(keys) > carried.MAX_KEYS:
            raise InputError(
                f"{where}: the prompts to here carry {len(keys)} distinct keys, at most {carried.MAX_KEYS} can be "
                "columns; put values that differ from prompt to prompt under one key"
            )
        n_bytes += len(line if line.isascii() else line.encode()) - len(prompt.text)
        if n_bytes > carried.MAX_BYTES:
            raise InputError(
                f"{where}: the prompts to here carry more than {carried.MAX_BYTES} bytes besides their text; "
                "leave long documents out and join them to the tables by prompt_id"
            )
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"{path}: no prompts in it; give one JSON object per line")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it must be at least 1")
    return prompts[:limit]


def parse_object(line: str, where: str, kind: str = "", expected: str = "an object") -> dict[str, Any]:
    """The JSON object of a line.

    Args:
        line: of a file.
        where: the file and the number of the line, for errors.
        kind: what the file seems to be, for the same.
        expected: what the line should be, for the same.

    Raises:
        InputError: it is none, or holds what a store or a table could not.
    """
    record = _parse_json(line, where, kind)
    if not isinstance(record, dict):
        raise InputError(f"{where}: a JSON {type(record).__name__}, expected {expected}{kind}")
    if "\\u" in line:  # what is not written so has been read as UTF-8
        _check_text(record, where, "")
    return record


def check_carried(record: dict[str, Any], where: str) -> None:
    """Raise InputError unless each further key of a line can become a column of the results."""
    for key in record:
        if key in RESERVED_NAMES or key.startswith(RESERVED_PREFIXES):
            raise InputError(f"{where}: key {key!r} is the name of a result column; rename it")
        if not key.strip() or "\0" in key or len(key) > carried.MAX_KEY:
            raise InputError(
                f"{where}: key {key[:40]!r} cannot be the name of a column: it is empty, has more than "
                f"{carried.MAX_KEY} characters, or a NUL among them"
            )
    if not carried.is_shallow(record):
        raise InputError(f"{where}: lists and objects lie more than {carried.MAX_LEVELS} deep within each other")


def _parse_line(line: str, where: str, kind: str) -> Prompt:
    record = parse_object(line, where, kind, "an object with 'id' and 'prompt'")
    if "prompt" not in record:
        for key, way_on in _NOT_READ_YET.items():
            if key in record:
                raise InputError(f"{where}: {key!r} is not read yet; {way_on}")
    for key in ("id", "prompt"):
        if key not in record:
            raise InputError(f"{where}: no {key!r}; a prompt line is {{'id': str, 'prompt': str, ...}}")
        if not isinstance(record[key], str):
            raise InputError(f"{where}: {key!r} is {json.dumps(record[key])[:40]}, expected text")
        if not record[key].strip():
            raise InputError(f"{where}: {key!r} is empty")
    if len(record["id"]) > MAX_ID:
        raise InputError(f"{where}: 'id' has {len(record['id'])} characters, at most {MAX_ID} are read")
    prompt = Prompt(record.pop("id"), record.pop("prompt"), record)
    check_carried(record, where)
    return prompt


def _parse_json(line: str, where: str, kind: str) -> Any:
    """The value of a line; what Python's parser takes and JSON, or a reader of it, does not is refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise InputError(f"{where}: key {twice!r} stands twice in one object")
        return found

    def finite(text: str) -> float:
        if math.isinf(value := float(text)):
            raise InputError(f"{where}: the number {text[:40]} is beyond a float64; write it as text")
        return value

    def no_number(name: str) -> None:
        raise InputError(f"{where}: {name} is not JSON; write null, or text")

    try:
        return json.loads(line, object_pairs_hook=unique, parse_float=finite, parse_constant=no_number)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at column {error.colno}){kind}") from error
    except InputError:
        raise
    except RecursionError as error:
        raise InputError(f"{where}: lists and objects lie too deep within each other") from error
    except ValueError as error:  # Python converts integers of a few thousand digits at most
        raise InputError(f"{where}: an integer of thousands of digits; write it as text") from error


def _check_text(value: Any, where: str, path: str) -> None:
    """Refuse lone surrogates, at any depth: halves of a character, as a tool leaves that cuts text in UTF-16."""
    if isinstance(value, str):
        if not carried.is_text(value):
            at = next(i for i, character in enumerate(value) if "\ud800" <= character <= "\udfff")
            raise InputError(
                f"{where}: {path} holds a lone surrogate at character {at}: half of a character was cut off"
            )
    elif isinstance(value, list):
        for i, one in enumerate(value):
            _check_text(one, where, f"{path}[{i}]")
    elif isinstance(value, dict):
        for key, one in value.items():
            _check_text(key, where, f"key {key!r}")
            _check_text(one, where, f"{path}[{key!r}]" if path else repr(key))


def _what_it_is(path: Path, first_line: str = "") -> str:
    """What a file seems to be whose first line is no prompt, and the way on."""
    with path.open("rb") as stream:
        magic = stream.read(4)
    start, suffix = first_line.lstrip()[:1], path.suffix.lower()
    if magic[:2] == b"\x1f\x8b" or magic == b"\x28\xb5\x2f\xfd":
        return "; it is compressed: unpack it first"
    if magic == b"PAR1":
        return (
            "; it is a Parquet table: write its rows as JSON Lines (pandas: to_json(..., orient='records', lines=True))"
        )
    if start == "[":
        return "; it is a JSON array, expected JSON Lines, one object per line (jq -c '.[]' FILE > FILE.jsonl)"
    if start == "{":
        return "; an object stands on one line (jq -c . FILE > FILE.jsonl)"
    if suffix in (".csv", ".tsv"):
        return (
            f"; it is a {suffix[1:].upper()} table, expected JSON Lines with columns 'id' and 'prompt' (pandas: "
            "read_csv(...).to_json(..., orient='records', lines=True))"
        )
    return "; it is plain text, expected JSON Lines: one {'id': str, 'prompt': str} per line" if first_line else ""


def digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 over ids, texts and carried keys, in order: equal digests mean the same work."""
    return next(reversed([hashlib.sha256().hexdigest(), *digests(prompts)]))


def digests(prompts: Iterable[Prompt]) -> Iterator[str]:
    """The :func:`digest` of the first prompt, of the first two, and so on."""
    sha = hashlib.sha256()
    for prompt in prompts:
        line = json.dumps([prompt.id, prompt.text, prompt.carried], sort_keys=True, ensure_ascii=True)
        sha.update(line.encode() + b"\n")
        yield sha.hexdigest()
