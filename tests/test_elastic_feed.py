"""An epoch is the same batches for any number of ranks and workers, and goes on with another number of each."""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import bits, write_store
from test_feed import make_feed, make_twin, run_worker
from twins import feed as twin

import actcache.store.feed
import actcache.store.order
import actcache.store.rows
from actcache.errors import IncompatibleError, InputError
from actcache.store import StoreWriter, compact, open_store
from actcache.store.feed import SHUFFLES, RowBatch, RowFeed
from actcache.store.order import Order, most_lanes

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def dealt(feeds: Sequence[RowFeed], workers: int, n: int | None = None) -> tuple[list[RowBatch], dict[str, Any]]:
    """The next n batches of an epoch, as the ranks of these feeds and their workers give them step by step, and the
    state of the last rank that drew one."""
    world, before = len(feeds), feeds[0].state_dict()["batches"]
    of_rank = [[run_worker(copy.copy(feed), worker, workers) for worker in range(workers)] for feed in feeds]
    streams = [
        iter([batch for step in itertools.zip_longest(*of) for batch in step if batch is not None])
        if workers
        else iter(feed)
        for of, feed in zip(of_rank, feeds, strict=True)
    ]
    found: list[RowBatch] = []
    for at in itertools.count():
        if n is not None and at >= n:
            break
        batch = next(streams[at % world], None)
        if batch is None:
            break
        found.append(batch)
    state = (
        feeds[0].state_dict(batches=before + len(found)) if workers else feeds[(len(found) - 1) % world].state_dict()
    )
    return found, json.loads(json.dumps(state))


def numbers(batches: Sequence[RowBatch]) -> list[list[int]]:
    return [batch.rows.tolist() for batch in batches]


LENGTHS = st.lists(st.lists(st.integers(0, 30), max_size=5), min_size=1, max_size=4).filter(
    lambda lengths: sum(map(sum, lengths)) > 0
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    LENGTHS,
    st.sampled_from(SHUFFLES),
    st.sampled_from(["all", "event", [0, -1, 3]]),
    st.integers(1, 7),
    st.integers(1, 40),
    st.integers(0, 3),
    st.data(),
)
def test_an_epoch_is_that_of_the_twin_for_any_number_of_processes(
    lengths, shuffle, positions, batch_rows, batches_held, epoch, data
):
    """Dealt to some ranks and workers, left after some batches, and gone on with by others, who leave it too."""
    stored = make_twin(lengths)
    shapes = st.tuples(st.integers(1, 4), st.integers(0, 3))
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(actcache.store.rows, "_CHUNK_BYTES", 40),
        mock.patch.object(actcache.store.feed, "LANE_BLOCKS", 2),
        mock.patch.object(actcache.store.order, "LANE_BLOCKS", 2),
    ):
        path = write_store(Path(folder) / "store", stored.fingerprint, stored.segments)
        options = {"positions": positions, "shuffle": shuffle, "batch_rows": batch_rows, "seed": 5, "epoch": epoch}

        def feeds(world: int) -> list[RowFeed]:
            opened = open_store(path)
            row_bytes = 2 * 2 * 5 * 2
            held = {"memory_bytes": batches_held * batch_rows * row_bytes}
            return [RowFeed(opened, rank=rank, world=world, **held, **options) for rank in range(world)]

        try:
            (feed,) = feeds(1)
        except InputError:
            assert positions == "event", "no row is chosen"
            return
        chosen = feed.chosen
        rows = np.arange(chosen.firsts[-1]) if chosen.chosen is None else chosen.chosen
        owner = np.searchsorted(chosen.firsts, rows, side="right") - 1
        block = {int(row): (o, (row - chosen.firsts[o]) // feed.block_rows) for row, o in zip(rows, owner, strict=True)}
        if shuffle == "blocks":
            how = {"batch_rows": batch_rows, "round_batches": batches_held, "lanes": feed.lanes}
            expected = twin.epoch_of_blocks(rows.tolist(), block.__getitem__, seed=5, epoch=epoch, **how)
        else:
            seed = 5 if shuffle == "rows" else None
            expected = twin.epoch_of_rows(rows.tolist(), batch_rows=batch_rows, seed=seed, epoch=epoch)
        assert numbers([*feed]) == expected
        found: list[RowBatch] = []
        state: dict[str, Any] | None = None
        while len(found) < len(expected):
            world, workers = data.draw(shapes, label="ranks and workers")
            ranks = feeds(world)
            for rank in ranks if state is not None else ():
                rank.load_state_dict(state)
            n_left = len(expected) - len(found)
            # Whole steps, as ranks that draw equally often leave together.
            n = min(n_left, world * data.draw(st.integers(1, max(1, n_left)), label="steps"))
            more, state = dealt(ranks, workers, n)
            assert len(more) == n
            found += more
            assert state["batches"] == len(found)
        assert numbers(found) == expected
        assert [bits(batch.states) for batch in found] == [bits(batch.states) for batch in feeds(1)[0]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    stored = make_twin([[9, 14, 1], [], [31, 0, 8], [5] * 4])
    with mock.patch("actcache.store.shard.CHUNK_BYTES", 40):
        return write_store(tmp_path / "store", stored.fingerprint, stored.segments)


@pytest.mark.slow
def test_worker_processes_of_another_number_go_on(path):
    whole = numbers([*make_feed(path)])
    left = make_feed(path)
    begun = numbers(itertools.islice(left.batches(2), 5))
    state = json.loads(json.dumps(left.state_dict()))
    assert state == left.state_dict(batches=5), "also right for a plain DataLoader"
    resumed = make_feed(path)
    resumed.load_state_dict(state)
    assert begun + numbers([*resumed.batches(3)]) == whole
    assert resumed.state_dict() == make_feed(path).state_dict(batches=len(whole))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_all_ranks_have_as_many_batches_where_the_last_are_dropped(path, world):
    feeds = [make_feed(path, rank=rank, world=world, drop_last=True) for rank in range(world)]
    n = 83 // 5 // world
    assert [len(feed) for feed in feeds] == [n] * world
    found, state = dealt(feeds, 0)
    assert numbers(found) == numbers([*make_feed(path)])[: n * world]
    assert state["batches"] == n * world


def test_the_end_of_an_epoch_is_the_same_for_all_ranks(path):
    """17 batches, of two ranks: the second one has none in the last step."""
    states = []
    for rank in range(2):
        feed = make_feed(path, rank=rank, world=2)
        assert len([*feed]) == 9 - rank
        states.append(feed.state_dict())
    assert states[0] == states[1]
    feed = make_feed(path)
    feed.load_state_dict(states[1])
    assert [*feed] == []


def test_a_store_that_has_grown_is_said_to_have(path):
    feed = make_feed(path)
    batches = iter(feed)
    next(batches)
    state = feed.state_dict()
    stored = make_twin([[4]])
    StoreWriter(path, stored.fingerprint).append("s-9", stored.segments["s-0"])
    with pytest.raises(IncompatibleError, match=r"the store has grown since .*, from 4 segments to 5") as found:
        make_feed(path).load_state_dict(state)
    assert found.value.field == "rows"
    rest = numbers([*batches])
    feed.load_state_dict(state)
    assert numbers([*feed]) == rest, "a feed that was made before goes on"
    compact(path)
    with pytest.raises(IncompatibleError, match="the store has grown since"):
        make_feed(path).load_state_dict(state)


def test_a_state_of_an_earlier_version_is_refused_by_name(path):
    state = make_feed(path).state_dict()
    of_feed = {name: value for name, value in state["feed"].items() if name not in ("order", "lanes")}
    earlier = {"epoch": 3, "next": 2, "workers": 1, "worker": None, "segments": state["segments"], "feed": of_feed}
    with pytest.raises(IncompatibleError, match=r"another version of actcache, .*begin its epoch 3 again") as found:
        make_feed(path).load_state_dict(earlier)
    assert found.value.field == "order"


def test_lanes_share_the_reading_and_leave_chunks_whole():
    """Two processes, or eight, of a round of eight lanes: each block is read by one of them but for those at edges."""
    pool_rows, chunk = 8 * 64 * 64, 64
    lanes = most_lanes(pool_rows, 32, chunk)
    assert lanes == 8
    assert most_lanes(pool_rows - 1, 32, chunk) == 4
    assert most_lanes(pool_rows, 7, chunk) == 2, "each lane has two batches at least"
    assert most_lanes(1000, 32, chunk) == 1
    n = 2 * pool_rows
    order = Order(np.arange(0, n + 1, chunk), "blocks", 3, batch_rows=1024, round_batches=32, lanes=lanes)
    for processes in (1, 2, 4, 8):
        read = [
            len({*(order.draw(0, together).rows // chunk).tolist()})
            for process in range(processes)
            for together in order.pools(range(process, order.n_batches, processes))
        ]
        assert n // chunk <= sum(read) <= n // chunk + 2 * lanes
    three = [
        len({*(order.draw(0, together).rows // chunk).tolist()})
        for process in range(3)
        for together in order.pools(range(process, order.n_batches, 3))
    ]
    assert sum(three) > 2 * n // chunk, "three processes read all of it, nearly"


def test_a_worker_of_another_number_says_whose_state_it_is(path):
    feed = make_feed(path)
    info = mock.Mock(id=1, num_workers=2)
    with mock.patch.object(actcache.store.feed, "get_worker_info", return_value=info):
        next(iter(feed))
        state = feed.state_dict()
    feed.load_state_dict(state)
    with pytest.raises(InputError, match="the state is that of worker 1 of 2, this is 0 of 1"):
        next(iter(feed))
