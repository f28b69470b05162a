"""Whatever order writers, readers, a compactor and a verifier act in, and wherever they are killed: nothing is lost."""

from __future__ import annotations

import pytest
import schedules

pytestmark = pytest.mark.usefixtures("no_fsync")

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
