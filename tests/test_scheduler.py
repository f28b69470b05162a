"""The scheduler under a simulated clock: every task once, none lost, workers busy, whatever dies."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.study.scheduler import MOST_DEATHS, MOST_FAILURES, Scheduler, Task
from actcache.study.simulated_cluster import Simulated


def tasks_of(seconds, labels=2):
    return {Task(f"job {number}", f"late {number % labels}"): s for number, s in enumerate(seconds)}


@pytest.mark.parametrize("n", [16, 24, 48, 64])
@pytest.mark.parametrize("labels", [1, 2, 5])
@pytest.mark.parametrize("spread", [0.0, 0.3], ids=["alike", "uneven"])
def test_workers_are_busy_95_of_100_seconds(n, labels, spread):
    """Forty jobs of ten seconds for each worker, a load of five: no more than one in forty of the time at the ends."""
    chance = random.Random(n)
    tasks = tasks_of([10 * (1 + spread * chance.uniform(-1, 1)) for _ in range(40 * n)], labels)
    simulated = Simulated(tasks, n, load_s=5.0)
    simulated.run()
    assert simulated.efficiency >= 0.95, simulated.efficiency
    assert sorted(task.name for task in simulated.finished) == sorted(task.name for task in tasks)
    assert simulated.loads <= 2 * n  # few go over to another late stack


def test_a_worker_keeps_what_it_holds():
    simulated = Simulated(tasks_of([1.0] * 120, labels=3), 3, load_s=1.0)
    simulated.run()
    assert simulated.loads == 3


CASES = st.fixed_dictionaries(
    {
        "seconds": st.lists(st.floats(0.1, 5.0), min_size=1, max_size=40),
        "labels": st.integers(1, 4),
        "n": st.integers(1, 9),
        "lives_s": st.none() | st.floats(20.0, 200.0),
        "seed": st.integers(0, 2**20),
        "bad": st.sets(st.integers(0, 39), max_size=3),
        "worse": st.sets(st.integers(0, 39), max_size=2),
    }
)


@settings(max_examples=150, deadline=None)
@given(CASES)
def test_nothing_is_lost_or_done_twice(case):
    tasks = tasks_of(case["seconds"], case["labels"])
    every = list(tasks)
    worse = frozenset(every[at] for at in case["worse"] if at < len(every))
    bad = frozenset(every[at] for at in case["bad"] if at < len(every)) - worse
    simulated = Simulated(tasks, case["n"], 0.5, case["lives_s"], bad, worse, case["seed"], begins_s=0.3)
    scheduler = simulated.run()
    given_up = set(scheduler.quarantined)
    assert len(simulated.finished) == len(set(simulated.finished)) == scheduler.n_done
    assert {*simulated.finished} | given_up == {*every}
    assert not {*simulated.finished} & given_up
    assert given_up >= bad | worse
    for task in given_up - worse - bad:  # only who was unlucky again and again
        assert task.deaths == MOST_DEATHS
    for task in bad & given_up:
        assert task.failures <= MOST_FAILURES
        assert task.reason in ("it raised", "it died")
    # Every time that a task was begun is accounted for.
    begun = Counter(task for task, _ in simulated.ran_at)
    for task in every:
        assert begun[task] >= (task in simulated.finished) + task.failures
    assert scheduler.n_requeued >= sum(task.failures + task.deaths for task in every) - len(given_up)
    assert scheduler.busy_s <= case["n"] * simulated.now * (1 + 1e-9) + 1e-9


def test_a_task_that_fails_goes_elsewhere_three_times():
    tasks = tasks_of([1.0] * 30, labels=1)
    poison = list(tasks)[4]
    simulated = Simulated(tasks, 5, raises=frozenset([poison]))
    scheduler = simulated.run()
    assert scheduler.quarantined == [poison]
    assert (poison.failures, poison.reason, scheduler.n_requeued) == (3, "it raised", 2)
    places = [worker for task, worker in simulated.ran_at if task is poison]
    assert len(set(places)) == len(places) == 3
    assert scheduler.n_done == 29


def test_a_task_that_kills_is_given_up_and_what_waited_behind_it_is_not():
    tasks = tasks_of([1.0] * 40, labels=1)
    poison = next(iter(tasks))
    simulated = Simulated(tasks, 2, kills=frozenset([poison]))
    scheduler = simulated.run()
    assert (scheduler.quarantined, poison.deaths, simulated.deaths) == ([poison], MOST_DEATHS, MOST_DEATHS)
    assert all(task.deaths == 0 for task in tasks if task is not poison)
    assert scheduler.n_done == 39


def test_alone_it_is_tried_again_where_it_failed():
    (task,) = tasks = tasks_of([1.0])
    simulated = Simulated(tasks, 1, raises=frozenset([task]))
    assert simulated.run().quarantined == [task]


def test_who_comes_later_gets_work_and_who_left_is_no_matter():
    scheduler: Scheduler[str] = Scheduler(tasks_of([1.0] * 6, labels=1), lambda: 0.0)
    assert list(scheduler.place()) == []
    scheduler.join("a")
    assert [worker for worker, _ in scheduler.place()] == ["a", "a"]
    scheduler.join("b")
    assert [worker for worker, _ in scheduler.place()] == ["b", "b"]
    assert scheduler.leave("b", "gone") == []
    assert scheduler.leave("b", "gone") == []
    assert scheduler.n_workers == 1
    assert not scheduler.is_over


def test_a_thousand_deaths_lose_nothing():
    simulated = Simulated(tasks_of([5.0] * 12_000), 32, load_s=1.0, lives_s=60.0, begins_s=2.0)
    scheduler = simulated.run()
    assert simulated.deaths >= 1000
    assert scheduler.n_done == len(set(simulated.finished)) == 12_000
