"""Counts: whole numbers, told from what Python takes for them: True and 2.0 are none."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from actcache.errors import InputError


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 on, below 2**48 as sums of such stay within 64 bits."""
    return type(value) is int and 0 <= value < 2**48


def check_whole(value: Any, what: str) -> None:
    """Raise InputError for what is no whole number, as True and 2.0 are none; ``what`` names it."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{what} is {short(value)}, expected a whole number")


def short(value: Any) -> str:
    """What an error shows of a value that may be long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
