"""Vectors that edits are given: one, or one for each event, from whatever holds numbers. Knows tensors only."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from actcache.errors import InputError

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MOST_SHOWN = 32  # values of a tuple
_ROWS_AT_ONCE = 1 << 14  # of a table of vectors that is looked through


def as_tensor(given: Any, what: str) -> torch.Tensor:
    """Finite real numbers as a tensor of floats without gradient: of a tensor on any device, an array, or lists.

    Whole numbers become float64; floats keep their dtype, and the tensor or array that holds them may be shared.

    Raises:
        InputError: it holds no numbers, complex ones, truth values, masked ones, or one that is not finite.
    """
    if isinstance(given, torch.Tensor):
        tensor = given.detach()
    else:
        if isinstance(given, np.ma.MaskedArray):
            raise InputError(f"{what} is a masked array, expected one without a mask; fill it first (.filled(0), say)")
        if isinstance(given, np.ndarray):  # torch expects the native byte order, rows that go on, and may write
            whole = np.float64 if given.dtype.kind in "iu" else given.dtype.newbyteorder("=")
            given = np.require(given, whole, ["C", "W"])
        try:
            tensor = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InputError(f"{what} is {_short(given)}, expected a tensor, an array or a list of numbers") from error
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise InputError(f"{what} is {str(tensor.dtype).removeprefix('torch.')}, expected real numbers")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise InputError(f"{what} is a sparse, quantized or meta tensor, expected a dense one with its values")
    if tensor.dtype not in _FLOATS:
        tensor = tensor.double()
    if not all(torch.isfinite(part).all() for part in torch.atleast_1d(tensor).split(_ROWS_AT_ONCE)):
        raise InputError(f"{what} holds values that are not finite")
    return tensor


def as_number(given: Any, what: str) -> float:
    """A finite real number (InputError: it is none)."""
    try:
        number = float(given) if not isinstance(given, bool | str | bytes) else float("nan")
    except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor of several
        number = float("nan")
    if not np.isfinite(number):
        raise InputError(f"{what} is {_short(given)}, expected a finite number")
    return number


class InOneLine:
    """A dataclass that shows the fields that are not at their defaults; tensors by their shape and dtype alone."""

    def __repr__(self) -> str:
        given = [(each, getattr(self, each.name)) for each in fields(self)]  # type: ignore[arg-type]
        shown = [f"{each.name}={_shown(value)}" for each, value in given if _shown(value) != _shown(each.default)]
        return f"{type(self).__name__}({', '.join(shown)})"


def _shown(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"<{list(value.shape)} {str(value.dtype).removeprefix('torch.')}>"
    if isinstance(value, tuple) and len(value) > _MOST_SHOWN:
        return f"<{len(value)} values>"
    return repr(value)


@dataclass(frozen=True, eq=False, repr=False)
class EventVectors(InOneLine):
    """A vector for each event, found by the event's id.

    Attributes:
        vectors: ``[E, D]``.
        events: their ids, E of them, each once, in any order.
    """

    vectors: torch.Tensor
    events: tuple[str, ...]

    @classmethod
    def of(cls, given: Any, events: Sequence[str] | None, what: str) -> EventVectors:
        """Of a mapping from event id to vector ``[D]``, or of an array ``[E, D]`` and the ids of its rows.

        Raises:
            InputError: it is neither, or ids and rows are not of one number, or an id comes twice.
        """
        if isinstance(given, Mapping):
            if events is not None:
                raise InputError(f"{what} is a mapping, whose keys are the event ids; leave 'events' out")
            rows = [as_vector(vector, f"{what} of event {event!r}") for event, vector in given.items()]
            events = list(given)
            if len({(len(row), row.device) for row in rows}) != 1:
                raise InputError(f"{what}: expected a vector [D] for each event, all of one width and on one device")
            same = len({row.dtype for row in rows}) == 1
            vectors = torch.stack(rows if same else [row.double() for row in rows])
        elif events is None:
            raise InputError(f"{what}: one vector per event is a mapping from event id to vector, or needs 'events'")
        else:
            vectors, events = as_tensor(given, what), list(events)
        if vectors.ndim != 2 or len(vectors) != len(events):
            raise InputError(f"{what} has shape {list(vectors.shape)}, expected [{len(events)}, D] for its events")
        if wrong := [event for event in events if not isinstance(event, str)]:
            raise InputError(f"{what}: event {wrong[0]!r} is no id, expected a text")
        found = cls(vectors, tuple(events))
        if len(found._row) < len(events):
            twice = next(event for number, event in enumerate(events) if found._row[event] != number)
            raise InputError(f"{what} has two vectors for event {twice!r}")
        return found

    @functools.cached_property
    def _row(self) -> dict[str, int]:
        return {event: number for number, event in enumerate(self.events)}

    def missing(self, events: Sequence[str]) -> str | None:
        """The first of these events that has no vector."""
        return next((event for event in events if event not in self._row), None)

    def of_events(self, events: Sequence[str]) -> torch.Tensor:
        """``[n, D]``, in the order of these events."""
        return self.vectors[torch.tensor([self._row[event] for event in events], dtype=torch.int64)]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the vectors by event, in whatever order they were given."""
        order = sorted(self.events)
        digest = hashlib.sha256(json.dumps(order).encode())
        for first in range(0, len(order), _ROWS_AT_ONCE):
            digest.update(bytes_of(self.of_events(order[first : first + _ROWS_AT_ONCE])))
        return digest.hexdigest()


def as_vector(given: Any, what: str) -> torch.Tensor:
    """A vector ``[D]`` of finite numbers (InputError: it is none; see :func:`as_tensor`)."""
    tensor = as_tensor(given, what)
    if tensor.ndim != 1:
        raise InputError(f"{what} has shape {list(tensor.shape)}, expected [D]; one vector per event needs per='event'")
    return tensor


def take_vector(given: Any, per: str | None, events: Sequence[str] | None, what: str) -> torch.Tensor | EventVectors:
    """One vector ``[D]`` for all events, or one per event if ``per`` is ``event`` (see :meth:`EventVectors.of`)."""
    if per not in (None, "event"):
        raise InputError(f"{what}: per is {per!r}; leave it out for one vector [D], or choose 'event'")
    if isinstance(given, EventVectors):
        return given
    if per is None:
        if events is not None or isinstance(given, Mapping):
            raise InputError(f"{what}: one vector per event needs per='event'")
        return as_vector(given, what)
    return EventVectors.of(given, events, what)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The bytes of its values, in order."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _short(given: Any) -> str:
    shown = repr(given)
    return f"{type(given).__name__} {shown if len(shown) <= 40 else shown[:40] + '...'}"
