"""Further runs: what an analysis makes of other runs of the same checkpoints, to stand beside its own numbers.

A run has the events of its pairs. Where those of another pair were captured on their own, their run is answered with
the same options, and its table joins. Knows runs and analyses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from actcache.errors import IncompatibleError, InputError
from actcache.sealed import read_parquet
from actcache.store import Store
from actcache.study.analysis import CellAnalysis
from actcache.study.run import Run, check_complete


def with_further(
    analysis: CellAnalysis[Any], options: Any, run: Run, table: pa.Table, places: str, labels: Sequence[str]
) -> pa.Table:
    """The table of an answer, and those of the same question to further runs below it.

    Args:
        analysis: which.
        options: for the further runs.
        run: whose table it is.
        table: with columns ``kind`` and ``pair``.
        places: folders of the further runs, parted by commas; may be empty.
        labels: of the checkpoints that must be the same in all.

    Raises:
        InputError: a folder holds no run, or one without these checkpoints, or one that cannot serve the options; or
            two of the runs have events of one kind and pair.
        IncompatibleError: a checkpoint is another one there; names the field.
    """
    for place in filter(None, map(str.strip, places.split(","))):
        further = Run(place, **asdict(run.holding))
        for label in labels:
            _check_same(label, run.store, further.store)
        check_complete(further.store)
        analysis.answer(further, options)
        again = f"'actcache {analysis.name} {place}' makes it again"
        found = read_parquet(analysis.table_path(further.folder), f"a table of {analysis.name}", again).content
        if twice := _supports(table) & _supports(found):
            kind, pair = min(twice)
            raise InputError(f"{place} has events of {pair} ({kind}), which another of the runs has too; leave one out")
        table = pa.concat_tables([table, found])
    return table


def _supports(table: pa.Table) -> set[tuple[str, str]]:
    """Kinds and pairs of the events."""
    return set(zip(table["kind"].to_pylist(), table["pair"].to_pylist(), strict=True))


def _check_same(label: str, here: Store, there: Store) -> None:
    known = there.fingerprint.checkpoints
    if label not in known:
        raise InputError(f"there is no checkpoint {label!r} in {there.path}; it has {', '.join(there.checkpoints)}")
    field = here.fingerprint.checkpoints[label].differs_in(known[label])
    if field is None and here.fingerprint.dtype != there.fingerprint.dtype:
        field = "dtype"
    if field is not None:
        raise IncompatibleError(
            f"checkpoint {label} of {there.path} is not that of {here.path}: its {field} is another; give runs of the "
            "same checkpoints",
            field=f"checkpoints.{label}.{field}",
        )
