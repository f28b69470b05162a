"""PinnedGather: order, backpressure and errors, on the CPU and against a device whose clock the test turns by hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_gather import random_bits, using
from test_gather_cuda import device  # noqa: F401 (a fixture)

from actcache.errors import InputError
from actcache.models import gather
from actcache.models.gather import PinnedGather, gather_rows

WAIT_S = 10


class Device:
    """A stream that runs what is queued only when the test says so, with events as CUDA has them."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], Any]] = []
        self.waiting = 0

    def run(self, n: int | None = None) -> None:
        """The next n things in the queue, or all."""
        for work in [self.queue.pop(0) for _ in range(len(self.queue) if n is None else n)]:
            work()

    def event(self, blocking: bool) -> Any:
        assert blocking, "a waiting thread must not poll"
        return Event(self)


class Event:
    def __init__(self, on: Device) -> None:
        self.device, self.reached = on, threading.Event()

    def record(self, stream: Any) -> None:
        assert stream is self.device
        self.device.queue.append(self.reached.set)

    def synchronize(self) -> None:
        assert threading.current_thread() is not threading.main_thread(), "the hook's thread must not wait"
        self.device.waiting += 1
        assert self.reached.wait(WAIT_S)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Device:
    """torch.cuda with a fake device; whatever synchronises a stream fails the test."""
    made = Device()

    def queued(src: torch.Tensor, row_ids: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        ids = row_ids.clone()  # as the real one: the caller may change its own at once
        made.queue.append(lambda: gather_rows(src, ids, out))
        return out

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the stream was synchronised")

    empty = torch.empty
    monkeypatch.setattr(gather, "gather_rows", queued)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **rest: empty(*size, **rest))
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: made)
    monkeypatch.setattr(torch.cuda, "synchronize", forbidden)
    monkeypatch.setattr(torch.Tensor, "cpu", forbidden)
    return made


class Taker(threading.Thread):
    """Copies what it takes, and waits before each but the first until it may go on."""

    def __init__(self, pinned: PinnedGather, step: threading.Semaphore | None = None) -> None:
        super().__init__(daemon=True)
        self.pinned, self.step = pinned, step
        self.taken: list[tuple[Any, torch.Tensor]] = []
        self.start()

    def run(self) -> None:
        for tag, rows in self.pinned:
            if self.step is not None:
                assert self.step.acquire(timeout=WAIT_S)
            self.taken.append((tag, rows.clone()))

    def finish(self) -> list[tuple[Any, torch.Tensor]]:
        self.join(WAIT_S)
        assert not self.is_alive()
        return self.taken


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def batches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sources and ids of several shapes and types."""
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    return [
        (random_bits((i + 2) * 24, dtypes[i % 3], i).view(i + 2, 24), torch.arange(i + 1, -1, -(i % 2 + 1)))
        for i in range(n)
    ]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_rows_arrive_in_order() -> None:
    work = batches(40)
    for n_slots in (2, 3):
        pinned = PinnedGather("cpu", 24 * 50 * 4, n_slots)
        taker = Taker(pinned)
        for i, (src, ids) in enumerate(work):
            pinned.put(src, ids, i)
        pinned.close()
        taken = taker.finish()
        assert [tag for tag, _ in taken] == list(range(40))
        assert all(same_bits(rows, gather_rows(*given)) for (_, rows), given in zip(taken, work, strict=True))


def test_a_put_queues_and_returns(fake: Device) -> None:
    pinned = PinnedGather("cuda", 4096)
    taker = Taker(pinned)
    work = batches(2)
    for src, ids in work:
        pinned.put(src, ids)
        expected = ids.clone()
        ids.zero_()  # the caller may
        ids.copy_(expected)
    assert len(fake.queue) == 4, "two gathers and two events, none of which ran"
    until(lambda: fake.waiting == 1)
    assert taker.taken == []
    fake.run(1)  # the gather, but not its event
    time.sleep(0.01)
    assert taker.taken == [], "rows are handed over when the event says so, not before"
    fake.run(1)
    until(lambda: len(taker.taken) == 1)
    until(lambda: fake.waiting == 2)
    fake.run()
    pinned.close()
    taken = taker.finish()
    assert all(same_bits(rows, gather_rows(*given)) for (_, rows), given in zip(taken, work, strict=True))


def test_a_slot_is_not_written_while_it_is_read(fake: Device) -> None:
    may = threading.Semaphore(0)
    pinned = PinnedGather("cuda", 4096)
    taker = Taker(pinned, may)
    work = batches(4)
    pinned.put(*work[0])
    pinned.put(*work[1])
    fake.run()
    third = threading.Thread(target=lambda: pinned.put(*work[2]), daemon=True)
    third.start()
    time.sleep(0.02)
    assert third.is_alive(), "both slots are in the taker's hands"
    assert not fake.queue
    may.release()
    third.join(WAIT_S)
    assert not third.is_alive()
    fake.run()
    may.release(3)
    until(lambda: len(taker.taken) == 3)
    pinned.put(*work[3])
    fake.run()
    pinned.close()
    taken = taker.finish()
    assert all(same_bits(rows, gather_rows(*given)) for (_, rows), given in zip(taken, work, strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_any_interleaving_gives_the_rows(fake: Device, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pinned = PinnedGather("cuda", 24 * 50 * 4, n_slots=2 + seed % 2)
    taker = Taker(pinned)
    work = batches(30)
    stop = threading.Event()

    def clock() -> None:
        while not stop.is_set() or fake.queue:
            if fake.queue:
                fake.run(1)
            if torch.rand((), generator=generator) < 0.3:
                time.sleep(0.0005)

    turning = threading.Thread(target=clock, daemon=True)
    turning.start()
    for i, (src, ids) in enumerate(work):
        pinned.put(src, ids, i)
    pinned.close()
    taken = taker.finish()
    stop.set()
    turning.join(WAIT_S)
    assert [tag for tag, _ in taken] == list(range(30))
    assert all(same_bits(rows, gather_rows(*given)) for (_, rows), given in zip(taken, work, strict=True))


def test_a_taker_that_fails_wakes_the_other_side() -> None:
    pinned = PinnedGather("cpu", 4096)
    src, ids = batches(1)[0]

    def fail() -> None:
        for _ in pinned:
            break  # as an exception in the loop's body would

    taker = threading.Thread(target=fail, daemon=True)
    pinned.put(src, ids)
    taker.start()
    taker.join(WAIT_S)
    pinned.put(src, ids)  # the other slot, which was free
    for _ in range(2):
        with pytest.raises(InputError, match="nobody takes from any more"):
            pinned.put(src, ids)


def test_an_error_leaves_the_slots_free() -> None:
    pinned = PinnedGather("cpu", 100)
    src = torch.zeros(5, 3)
    for _ in range(5):
        with pytest.raises(InputError, match=r"row_ids\[0\] is 7"):
            pinned.put(src, torch.tensor([7]))
        with pytest.raises(InputError, match=r"rows \(9, 3\) of torch.float32 take 108 bytes, a slot has 100"):
            pinned.put(src, torch.zeros(9, dtype=torch.int64))
    pinned.put(src, torch.tensor([1]))
    pinned.put(src[:, :0], torch.tensor([1]))
    pinned.close()
    with pytest.raises(InputError, match="closed"):
        pinned.put(src, torch.tensor([1]))
    assert [tuple(rows.shape) for _, rows in pinned] == [(1, 3), (1, 0)]


@pytest.mark.parametrize(("slot_bytes", "n_slots"), [(0, 2), (100, 1), (-1, 3)])
def test_sizes_are_checked(slot_bytes: int, n_slots: int) -> None:
    with pytest.raises(InputError, match=f"slot_bytes {slot_bytes}, n_slots {n_slots}"):
        PinnedGather("cpu", slot_bytes, n_slots)


@pytest.mark.gpu
def test_on_the_device(device: torch.device) -> None:  # noqa: F811
    work = batches(40)
    pinned = PinnedGather(device, 24 * 50 * 4)
    with using("cuda"):
        taker = Taker(pinned)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for i, (src, ids) in enumerate(work):
                on_device = src.to(device)
                torch.cuda._sleep(1_000_000)
                pinned.put(on_device, ids, i)
                del on_device
        pinned.close()
        taken = taker.finish()
    assert [tag for tag, _ in taken] == list(range(40))
    assert all(same_bits(rows, gather_rows(*given)) for (_, rows), given in zip(taken, work, strict=True))


@pytest.mark.gpu
def test_a_put_does_not_wait_for_the_stream(device: torch.device) -> None:  # noqa: F811
    pinned = PinnedGather(device, 4096)
    src = torch.zeros(5, 3, device=device)
    pinned.put(src, torch.tensor([1]))  # what is slow once is done once
    taken = iter(pinned)
    next(taken)
    torch.cuda._sleep(2_000_000_000)
    start = time.perf_counter()
    pinned.put(src, torch.tensor([1]))
    put_s = time.perf_counter() - start
    next(taken)
    assert put_s < 0.25 * (time.perf_counter() - start)
