"""Workers: threads that run packs side by side on the CPU, each with its own part of torch's threads.

One forward on all threads makes them meet at the end of every small operation between two matrix products, and wait for
the slowest; two packs on half of the threads each do not. Knows threads; knows no models and no tensors.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")

# Python runs one thread at a time, and a small model's pack keeps it busy for some hundredths of the time it takes.
MOST_WORKERS = 8

_END = object()

# While workers start, torch's number of threads is theirs for every thread that has not asked for it yet.
_starting = threading.Lock()


def share_threads(n_tasks: int) -> tuple[int, int]:
    """How many workers suit this many tasks of like size, and how many of torch's threads each has."""
    with _starting:
        n_threads = torch.get_num_threads()
    each = -(-n_threads // max(1, min(n_tasks, n_threads, MOST_WORKERS)))
    return n_threads // each, each


def side_by_side(tasks: Iterable[Callable[[int], Iterator[T]]], n_workers: int, n_threads: int) -> Iterator[T]:
    """Results of all tasks as they come, in no fixed order.

    Args:
        tasks: each is called with the number of its worker, ``0..n_workers - 1``, and iterated by that worker alone.
        n_workers: how many tasks are under way at once.
        n_threads: torch's threads within each.

    Each worker is at most one result ahead of who reads them, so memory stays bounded. Iterations that overlap share
    the threads, never two at once in one. An exception of a task is raised here; no further task is begun after it.
    """
    with _starting:
        executors = _executors(n_workers, n_threads, os.getpid())
    left = deque(tasks)

    def stream(number: int) -> Iterator[T]:
        while left:
            try:
                task = left.popleft()
            except IndexError:  # another worker was faster
                return
            yield from task(number)

    under_way: dict[Future[T], tuple[int, Iterator[T]]] = {}

    def step(number: int, results: Iterator[T]) -> None:
        under_way[executors[number].submit(next, results, _END)] = number, results  # type: ignore[arg-type]

    try:
        for number in range(n_workers):
            step(number, stream(number))
        while under_way:
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                number, results = under_way.pop(future)
                result = future.result()
                if result is not _END:
                    step(number, results)
                    yield result
    finally:
        for future in under_way:
            future.cancel()
        wait(under_way)


@lru_cache
def _executors(n_workers: int, n_threads: int, process: int) -> list[ThreadPoolExecutor]:
    """Executors of one thread each, kept for the life of the process (a fork has its own)."""
    own = torch.get_num_threads()
    executors = [
        ThreadPoolExecutor(1, f"actcache-{number}", _take_threads, (n_threads,)) for number in range(n_workers)
    ]
    for executor in executors:
        executor.submit(int).result()  # the thread has started
    torch.set_num_threads(own)
    return executors


def _take_threads(n_threads: int) -> None:
    """Give this thread its own number of torch threads: torch keeps it from the first question after it was set."""
    torch.set_num_threads(n_threads)
    torch.get_num_threads()
