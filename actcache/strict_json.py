"""Strict JSON: the objects of lines, and nothing that a store or a table could not hold.

What Python's parser takes and JSON, or a reader of it, does not is refused by name. Knows JSON; knows no files.
"""

from __future__ import annotations

import json
import math
from typing import Any

from actcache import carried
from actcache.errors import InputError


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
    record = parse_value(line, where, kind)
    if not isinstance(record, dict):
        raise InputError(f"{where}: a JSON {type(record).__name__}, expected {expected}{kind}")
    return record


def parse_value(text: str, where: str, kind: str = "") -> Any:
    """The JSON value of a text (arguments and errors as :func:`parse_object`)."""
    text = text.strip(" \t\r\n")
    try:
        value, end = _DECODER.raw_decode(text)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at column {error.colno}){kind}") from error
    except _RefusedError as error:
        raise InputError(f"{where}: {error}") from error
    except RecursionError as error:
        raise InputError(f"{where}: lists and objects lie too deep within each other") from error
    except ValueError as error:  # Python converts integers of a few thousand digits at most
        raise InputError(f"{where}: an integer of thousands of digits; write it as text") from error
    if "\\u" in text:  # what is not written so has been read as UTF-8
        _check_text(value, where, "")
    return value


class _RefusedError(Exception):
    """What the parser met and JSON has not."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise _RefusedError(f"key {twice!r} stands twice in one object")
    return found


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise _RefusedError(f"the number {text[:40]} is beyond a float64; write it as text")
    return value


def _no_number(name: str) -> None:
    raise _RefusedError(f"{name} is not JSON; write null, or text")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_no_number)


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
