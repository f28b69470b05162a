"""Whatever order writers, readers, a compactor and a verifier act in, and wherever they are killed: nothing is lost."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import schedules

from actcache.store import records
from actcache.store.storage import Storage

FAST, SOME, ALL = 2, 25, 250  # schedules of each place: of make test-fast, of make test, of make test-deep


def seeds() -> list[object]:
    marks = [*[()] * FAST, *[pytest.mark.slow] * (SOME - FAST), *[pytest.mark.deep] * (ALL - SOME)]
    return [pytest.param(seed, marks=mark) for seed, mark in enumerate(marks)]


@pytest.mark.parametrize("seed", seeds())
def test_a_schedule_on_a_disk(seed, tmp_path):
    schedules.run(seed, schedules.Disk(tmp_path))


@pytest.mark.parametrize("seed", seeds())
def test_a_schedule_on_an_object_store(seed):
    schedules.run(seed, far(seed))


def far(seed: int) -> schedules.Place:
    pytest.importorskip("obstore")
    from far_schedules import Far

    return Far(seed)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["disk", "object store"])
def test_a_seed_gives_the_same_schedule_again(where, tmp_path):
    traces = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        place = schedules.Disk(tmp_path / name) if where == "disk" else far(7)
        schedule = schedules.Schedule(7, place)
        with schedules.in_order():
            schedule.run()
        traces.append(schedule.trace)
    assert traces[0] == traces[1]


# ---- that schedules find faults: two old ones, put back ------------------------------------------------------------


def taken_name(replaces: Sequence[str], taken: set[str]) -> str:
    """A compaction calls what it makes from its first segment to its last, whether an earlier one is called so or not:
    it is stuck where segments between these came later."""
    return f"{replaces[0]}--{replaces[-1]}"


def one_listing(storage: Storage, digest: str, known: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Records are listed once, so that those are missed which a compaction replaces before they are read."""
    names = records.committed_names(storage)
    found = [(known or {}).get(name) or records.read_if_there(storage, name, digest) for name in names]
    return [record for record in found if record is not None]


FAULTS = {
    "taken name": ("is committed already", taken_name, ["compact._free_name"]),
    "one listing": (
        "AssertionError: lost",
        one_listing,
        ["compact.read_records", "reader.read_records", "writer.read_records"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["disk", "object store"])
@pytest.mark.parametrize("fault", FAULTS)
def test_schedules_find_a_fault(fault, where, tmp_path):
    """Within those of ``make test``, in either place."""
    said, planted, places = FAULTS[fault]

    def run_all() -> None:
        for seed in range(SOME):
            folder = tmp_path / str(seed)
            folder.mkdir()
            schedules.run(seed, schedules.Disk(folder) if where == "disk" else far(seed))

    with ExitStack() as patches:
        for place in places:
            patches.enter_context(mock.patch(f"actcache.store.{place}", planted))
        with pytest.raises(AssertionError, match=said):
            run_all()
