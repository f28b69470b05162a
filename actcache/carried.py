"""Carried keys: what a prompt line says beyond its text, as JSON in a store and as columns of its tables.

Knows JSON and Arrow; knows no prompts file and no store.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

MAX_KEYS = 1000  # each is a column of a table
MAX_LEVELS = 64
MAX_KEY = 1000  # characters
MAX_BYTES = 2**30  # of all prompts: Arrow's texts have 32-bit offsets, and every table of events holds them


def encode(carried: dict[str, Any]) -> str:
    """The JSON text that a store keeps."""
    return json.dumps(carried, sort_keys=True, ensure_ascii=False)


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: a lone surrogate, which JSON can write, it cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_shallow(value: Any) -> bool:
    """Whether lists and objects lie within each other at most ``MAX_LEVELS`` deep."""
    level = [value]
    for _ in range(MAX_LEVELS):
        nested = (one.values() if type(one) is dict else one for one in level if isinstance(one, (dict, list)))
        level = [inner for of in nested for inner in of]
        if not level:
            return True
    return False


def keys_of(texts: Iterable[str]) -> frozenset[str]:
    """All keys of some prompts' JSON texts."""
    return frozenset(key for text in texts for key in json.loads(text))


def as_columns(texts: Sequence[str]) -> dict[str, pa.Array | pa.ChunkedArray]:
    """A column for every key of some prompts' JSON texts, in the order in which the keys first come.

    A column is of its values' natural type, null where a prompt lacks the key; values of mixed types, and nested ones,
    become their JSON text. More than ``MAX_KEYS`` keys are too many columns: then there is one, ``carried``, of the
    texts as they are.
    """
    records = [json.loads(text) for text in texts]
    keys = dict.fromkeys(key for record in records for key in record)
    if len(keys) > MAX_KEYS:
        return {"carried": pa.array(texts, pa.string())}
    return {key: _natural([record.get(key) for record in records]) for key in keys}


def values_of(column: pa.ChunkedArray) -> list[Any]:
    """The values of such a column. Those of mixed types, of which one is a text, are what their JSON texts say."""
    values = column.to_pylist()
    if not any(isinstance(value, str) and value.startswith('"') for value in values):
        return values
    try:
        return [None if value is None else json.loads(value) for value in values]
    except ValueError:  # texts, one of them in quotation marks
        return values


def _natural(values: list[Any]) -> pa.Array | pa.ChunkedArray:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {str} or kinds <= {bool} or kinds <= {int} or kinds <= {int, float}:
        try:
            return pa.array(values)
        except (ValueError, OverflowError):  # an integer beyond 64 bits or inexact as a float; a lone surrogate
            pass
    return pa.array([None if value is None else json.dumps(value, sort_keys=True) for value in values], pa.string())
