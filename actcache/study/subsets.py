"""Subsets: events of one step or more, or with one value of what their prompts carry.

For whatever averages events and asks where a mean comes from. Knows tables and arrays only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actcache import schema
from actcache.errors import InputError
from actcache.study.contrasts import Grids

ALL = "all"
"""The subset that is all events of a group."""

LEAST_STEPS = (1, 3, 5, 10)
"""Subsets by step are those at 0, and those at least at one of these."""

MOST_VALUES = 50
"""A column with more distinct values tells events apart, and makes no subsets."""

Bools = npt.NDArray[np.bool_]
_STEP = "step"
_OF_CELLS = frozenset(schema.names(schema.CELLS))


def subsets_by(cells: pa.Table, grids: Grids, by: Sequence[str]) -> list[tuple[str, Bools]]:
    """Subsets of the events of all groups.

    Args:
        cells: one row per cell.
        grids: of these cells.
        by: ``step``, columns of the cells that are not of their schema, or several of both.

    Returns:
        Names, as ``step>=3`` and ``category=code``, each with a mask ``[E]`` of the events: the subsets of each of
        ``by``, then those of all of them together, as ``step>=3, category=code``. Some may have no event.

    Raises:
        InputError: a column is not carried, differs within an event, or has more than ``MOST_VALUES`` values.
    """
    of_each = [_steps(grids) if name == _STEP else _values(cells, grids, name) for name in dict.fromkeys(by)]
    found = [subset for of_one in of_each for subset in of_one]
    for several in product(*of_each) if len(of_each) > 1 else ():
        found.append((", ".join(name for name, _ in several), np.logical_and.reduce([mask for _, mask in several])))
    return found


def _steps(grids: Grids) -> list[tuple[str, Bools]]:
    step = grids.events[_STEP].to_numpy()
    return [("step=0", step == 0), *((f"step>={least}", step >= least) for least in LEAST_STEPS)]


def _values(cells: pa.Table, grids: Grids, name: str) -> list[tuple[str, Bools]]:
    carried = [column for column in cells.column_names if column not in _OF_CELLS]
    if name not in carried:
        raise InputError(f"column {name!r} is not carried by the prompts; there are {', '.join([_STEP, *carried])}")
    try:
        texts = pc.fill_null(cells[name].combine_chunks().cast(pa.string()), "null")
    except pa.ArrowException as error:
        raise InputError(f"column {name!r} is {cells[name].type}: subsets need texts or whole numbers") from error
    values = texts.dictionary_encode()
    code = values.indices.to_numpy()[grids.rows]
    differs = np.flatnonzero((code != code[:, :1]).any(axis=1))
    if differs.size:
        event = grids.events["event_id"][int(differs[0])].as_py()
        raise InputError(f"the cells of event {event!r} differ in {name!r}: expected one value for each event")
    used = np.unique(code[:, 0])
    if used.size > MOST_VALUES:
        raise InputError(f"column {name!r} has {used.size} values; subsets are of at most {MOST_VALUES}")
    named = sorted((values.dictionary[int(one)].as_py(), one) for one in used)
    return [(f"{name}={value}", code[:, 0] == one) for value, one in named]
