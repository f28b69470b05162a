"""Threads that run packs side by side: every result once, little ahead of who reads, no thread of torch lost."""

from __future__ import annotations

import multiprocessing
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.replay.workers import MOST_WORKERS, share_threads, side_by_side


@pytest.fixture
def n_threads():
    """``n_threads(n)`` sets torch's threads; they are as before after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16, 61, 64])
@pytest.mark.parametrize("n_tasks", [0, 1, 2, 3, 5, 8, 100])
def test_threads_are_shared_out_without_rest_as_far_as_whole_numbers_go(n_threads, n, n_tasks):
    n_threads(n)
    n_workers, each = share_threads(n_tasks)
    assert 1 <= n_workers <= min(MOST_WORKERS, max(1, n_tasks))
    assert n_workers * each <= n < (n_workers + 1) * each or n_workers == max(1, n_tasks)
    assert n_workers * each > n / 2
    if n_tasks <= 1:
        assert (n_workers, each) == (1, n)


@given(st.lists(st.integers(0, 4), max_size=12), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_every_result_comes_once_each_task_in_its_order_and_in_one_thread(sizes, n_workers):
    where: dict[int, set[tuple[int, str]]] = {}

    def task(index):
        def run(worker):
            for number in range(sizes[index]):
                where.setdefault(index, set()).add((worker, threading.current_thread().name))
                yield index, number

        return run

    results = list(side_by_side(map(task, range(len(sizes))), n_workers, 1))
    assert sorted(results) == [(index, number) for index, size in enumerate(sizes) for number in range(size)]
    for index, size in enumerate(sizes):
        assert [number for one, number in results if one == index] == list(range(size))
    assert all(len(places) == 1 for places in where.values())
    names: dict[int, set[str]] = {}
    for ((worker, name),) in where.values():
        names.setdefault(worker, set()).add(name)
    assert all(len(threads) == 1 for threads in names.values())
    assert set(names) <= set(range(n_workers))


def _that_meet(n):
    """Tasks that yield the number of their worker, once all have begun."""
    meeting = threading.Barrier(n, timeout=60)

    def meet(worker):
        meeting.wait()
        yield worker

    return [meet] * n


def test_workers_run_at_once():
    assert sorted(side_by_side(_that_meet(3), 3, 1)) == [0, 1, 2]


def test_each_worker_has_its_part_of_torchs_threads_and_nobody_else_loses_any(n_threads):
    n_threads(6)

    def count(worker):
        yield torch.get_num_threads()

    assert list(side_by_side([count] * 9, 3, 2)) == [2] * 9
    assert torch.get_num_threads() == 6
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [6]


def test_no_worker_is_more_than_one_result_ahead():
    made = []

    def count(worker):
        for number in range(50):
            made.append(number)
            yield number

    for taken, _ in enumerate(side_by_side([count] * 4, 2, 1), 1):
        time.sleep(0.001)
        assert len(made) <= taken + 2


def test_an_error_is_raised_here_and_nothing_is_begun_after_it():
    begun = []

    def task(index):
        def run(worker):
            begun.append(index)
            if index == 3:
                raise KeyError("three")
            yield index

        return run

    with pytest.raises(KeyError, match="three"):
        list(side_by_side(map(task, range(100)), 2, 1))
    n_begun = len(begun)
    assert n_begun < 10
    assert sorted(side_by_side(_that_meet(2), 2, 1)) == [0, 1], "the workers go on"
    assert len(begun) == n_begun


def test_one_who_stops_reading_stops_the_work():
    begun, running = [], threading.Semaphore(2)

    def task(worker):
        begun.append(worker)
        for number in range(3):
            assert running.acquire(blocking=False)
            yield number
            running.release()

    results = side_by_side([task] * 100, 2, 1)
    next(results)
    results.close()
    n_begun = len(begun)
    assert n_begun <= 3
    time.sleep(0.05)
    assert len(begun) == n_begun


def test_iterations_that_overlap_share_the_workers():
    busy, together = [threading.Lock() for _ in range(2)], []

    def count(worker):
        for number in range(20):
            together.append(not busy[worker].acquire(blocking=False))
            time.sleep(0.0005)
            busy[worker].release()
            yield number

    first, second = (side_by_side([count] * 2, 2, 1) for _ in range(2))
    results = list(zip(first, second, strict=True))
    assert len(results) == 40
    assert not any(together)


def _in_a_fork(queue):
    queue.put(sorted(side_by_side(_that_meet(2), 2, 1)))


def test_a_fork_has_workers_of_its_own():
    list(side_by_side([lambda worker: iter([worker])] * 2, 2, 1))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_in_a_fork, args=(queue,))
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0
    assert queue.get() == [0, 1]
