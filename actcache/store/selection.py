"""Selection: which events are asked for, by number, id, mask or expression. Knows their table; reads no rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from numbers import Number
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from actcache.errors import InputError

Events: TypeAlias = (
    Sequence[int]
    | Sequence[str]
    | Sequence[bool]
    | slice
    | npt.NDArray[Any]
    | torch.Tensor
    | pa.Array
    | pa.ChunkedArray
    | pc.Expression
    | None
)
"""Events asked for: a slice; a sequence of numbers or of ids; a mask of E truth values; or an expression over the
columns of the events, which chooses those for which it is true."""


def numbers_of(asked: Events, n_events: int, table: Callable[[], pa.Table]) -> npt.NDArray[np.int64]:
    """The numbers of the events asked for: in the order asked, or in theirs where a mask or an expression chooses.

    Args:
        asked: see :data:`Events`; None for all.
        n_events: E.
        table: gives the events, where ids or an expression need them.

    Raises:
        InputError: a number or id that no event has, a mask of another length, an expression that does not fit the
            columns, or anything else.
    """
    if asked is None or isinstance(asked, slice):
        try:
            return np.arange(n_events, dtype=np.int64)[slice(None) if asked is None else asked]
        except (TypeError, ValueError) as error:
            raise InputError(f"events are {asked}: {error}") from error
    if isinstance(asked, pc.Expression):
        return _matching(asked, table())
    if isinstance(asked, str):
        raise InputError(f"events are the text {asked!r}, expected a list: of ids, [{asked!r}], or of numbers")
    if isinstance(asked, Set | Mapping | Iterator):
        hint = "sorted(...) gives their order" if isinstance(asked, Set) else "list(...) makes one"
        raise InputError(f"events are a {type(asked).__name__}, expected a list of numbers or ids; {hint}")
    if isinstance(asked, Number):
        raise InputError(f"events are the number {asked}, expected a list: [{asked}]")
    if isinstance(asked, list | tuple):
        asked = [one.as_py() if isinstance(one, pa.Scalar) else one for one in asked]
    kinds = _kinds(asked) if isinstance(asked, list) else set()
    try:
        given = np.asarray(asked.detach().cpu() if isinstance(asked, torch.Tensor) else asked)
    except (TypeError, ValueError) as error:
        raise InputError(f"events cannot be read as numbers, ids or a mask: {error}") from error
    if given.ndim != 1:
        raise InputError(f"events have the shape {list(given.shape)}, expected one value after another, [n]")
    if given.dtype == np.uint8 and len(given) == n_events and (given <= 1).all():
        raise InputError("events are uint8, all 0 or 1, one per event: give a mask as bool, or numbers as int64")
    if given.dtype == object:
        kinds = _kinds(given)
    if len(kinds) > 1:
        raise InputError(f"events mix {' and '.join(sorted(kinds))}; give numbers, ids, or one truth value per event")
    if kinds == {"ids"} or given.dtype.kind in "UT":
        return _of_ids(given.tolist(), table()["event_id"])
    if kinds == {"truth values"} or given.dtype.kind == "b":
        if len(given) != n_events:
            raise InputError(f"the mask of events has {len(given)} values, expected {n_events}: one per event")
        return np.flatnonzero(given).astype(np.int64)
    if len(given) and given.dtype.kind not in "iu":  # fractions would become other events than meant
        raise InputError(f"events are {given.dtype}, expected integers: the numbers of the events wanted; or their ids")
    wrong = given[(given < 0) | (given >= n_events)]
    if len(wrong):
        raise InputError(f"event {wrong[0]} is not in the store; it has {n_events} events, counted from 0")
    return given.astype(np.int64)


def _kinds(values: Iterable[Any]) -> set[str]:
    """What kinds of values there are; NumPy would make all of a list into one kind."""
    return {
        "truth values"
        if isinstance(value, bool | np.bool_)
        else "ids"
        if isinstance(value, str)
        else "numbers"
        if isinstance(value, Number)
        else type(value).__name__
        for value in values
    }


def _of_ids(ids: list[str], known: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    found = pc.index_in(pa.array(ids, pa.string()), value_set=known.combine_chunks())
    if found.null_count:
        wrong = ids[pc.index(found.is_null(), True).as_py()]
        such = f", with ids such as {known[0].as_py()!r}" if len(known) else ""
        raise InputError(f"event {wrong!r} is not in the store; it has {len(known)} events{such}")
    return np.asarray(found, np.int64)


def _matching(expression: pc.Expression, events: pa.Table) -> npt.NDArray[np.int64]:
    number = "number of the event"
    while number in events.column_names:  # prompts may carry any key
        number += "'"
    numbered = events.append_column(number, pa.array(np.arange(events.num_rows)))
    try:
        found = numbered.filter(expression)[number]
    except (pa.ArrowException, TypeError) as error:
        said = " ".join(str(error).split())
        raise InputError(
            f"the expression {expression} does not choose events: {said}; their columns are "
            f"{', '.join(events.column_names)}"
        ) from error
    return np.sort(found.to_numpy())  # threads may hand rows on in another order
