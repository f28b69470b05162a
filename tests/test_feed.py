"""The feed against an obvious twin in memory: every row once, whatever the shuffle, workers, ranks, interruptions."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import bits, make_fingerprint, make_segment, write_store
from torch.utils.data import DataLoader
from twins.store import Twin, twins

import actcache.store.feed
import actcache.store.rows
from actcache.errors import CorruptStoreError, IncompatibleError, InputError
from actcache.store import StoreWriter, open_store, shard
from actcache.store.feed import SHUFFLES, ActivationBuffer, RowBatch, RowFeed

# As many workers as asked for: torch warns where that is more than the machine has processors.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Row(NamedTuple):
    """One stored row, found by loops."""

    states: torch.Tensor  # [K, n_boundaries, D]
    place: tuple[int, int, int, int]
    length: int  # of its sequence
    is_event: bool


def rows_of(twin: Twin, labels: Sequence[str], boundaries: Sequence[int]) -> list[Row]:
    """Every row of what was appended, in the store's order."""
    rows = []
    for number, name in enumerate(sorted(twin.segments)):
        segment = twin.segments[name]
        offsets = segment.sequence_offsets.tolist()
        events = [(event["sequence"], event["position"]) for event in segment.events.to_pylist()]
        everywhere = [(s, p) for s in range(len(offsets) - 1) for p in range(offsets[s + 1] - offsets[s])]
        stored = everywhere if twin.fingerprint["row_selection"] == "prefix" else events
        for i, (sequence, position) in enumerate(stored):
            states = torch.stack([torch.stack([segment.states[k, b][i] for b in boundaries]) for k in labels])
            token = int(segment.token_ids[offsets[sequence] + position])
            length = offsets[sequence + 1] - offsets[sequence]
            rows.append(Row(states, (number, sequence, position, token), length, (sequence, position) in events))
    return rows


def is_chosen(row: Row, positions: Any) -> bool:
    _, _, position, token = row.place
    if positions == "event":
        return row.is_event
    if positions == "odd tokens":
        return token % 2 == 1
    return positions == "all" or position in positions or position - row.length in positions


def check_batches(batches: Sequence[RowBatch], rows: list[Row], feed: RowFeed) -> list[int]:
    """Every batch holds the rows that it says; returns their numbers."""
    for states, numbers in batches:
        assert states.dtype == feed.dtype
        assert bits(states) == bits(torch.stack([rows[number].states for number in numbers.tolist()]))
        places = feed.locate(numbers)
        assert [*zip(*(column.tolist() for column in places), strict=True)] == [rows[n].place for n in numbers.tolist()]
    return [number for batch in batches for number in batch.rows.tolist()]


def ids(batches: Any) -> list[list[int]]:
    return [batch.rows.tolist() for batch in batches]


CHOICES = st.sampled_from(["all", "event", "odd tokens", [0], [-1, 2], [3, 1, -4]])


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(twins(), CHOICES, st.sampled_from(SHUFFLES), st.booleans(), st.integers(1, 9), st.integers(1, 12), st.data())
def test_each_row_comes_once_as_it_was_captured(twin, positions, shuffle, drop_last, batch_rows, batches_held, data):
    if not twin.fingerprint["boundaries"]:
        return
    labels = data.draw(st.lists(st.sampled_from([*twin.fingerprint["checkpoints"]]), min_size=1, unique=True))
    boundaries = data.draw(st.lists(st.sampled_from(twin.fingerprint["boundaries"]), min_size=1, unique=True))
    world, workers = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    rows = rows_of(twin, labels, boundaries)
    chosen = [number for number, row in enumerate(rows) if is_chosen(row, positions)]
    options = {
        "positions": (lambda places: places.token_id % 2 == 1) if positions == "odd tokens" else positions,
        "memory_bytes": batches_held * batch_rows * len(labels) * len(boundaries) * twin.fingerprint["width"] * 4,
    } | {"labels": labels, "boundaries": boundaries, "batch_rows": batch_rows, "shuffle": shuffle, "seed": 7}
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(actcache.store.rows, "_CHUNK_BYTES", 40):
        path = write_store(Path(folder) / "store", twin.fingerprint, twin.segments)
        if not chosen:
            with pytest.raises(InputError, match=r"no row of .* is chosen"):
                RowFeed(path, **options)
            return
        found = []
        for rank in range(world):
            feed = RowFeed(path, rank=rank, world=world, drop_last=drop_last, **options)
            batches = [*itertools.chain(*(run_worker(feed, worker, workers) for worker in range(workers)))]
            assert len(batches) == len(feed)
            sizes = sorted((len(batch.rows) for batch in batches), reverse=True)
            assert set(sizes[:-1]) <= {batch_rows}
            assert not drop_last or (set(sizes) <= {batch_rows} and len(feed) == len(chosen) // world // batch_rows)
            found += check_batches(batches, rows, feed)
        assert len(found) == len(set(found))
        assert set(found) <= set(chosen)
        if not drop_last:
            assert len(found) == len(chosen)


def run_worker(feed: RowFeed, worker: int, workers: int) -> list[RowBatch]:
    """What one of several workers reads, in this process."""
    info = mock.Mock(id=worker, num_workers=workers)
    with mock.patch.object(actcache.store.feed, "get_worker_info", return_value=info):
        return list(feed)


# ---- one store for the rest ------------------------------------------------------------------------------------------


def make_twin(lengths: Sequence[Sequence[int]], **changes: Any) -> Twin:
    fingerprint = make_fingerprint(dtype="bfloat16", width=5, **changes)
    segments = {}
    for number, of_segment in enumerate(lengths):
        places = [(sequence, length - 1) for sequence, length in enumerate(of_segment) if length]
        segments[f"s-{number}"] = make_segment(fingerprint, of_segment, places, name=f"s{number}", seed=number)
    return Twin(fingerprint, segments)


@pytest.fixture(scope="module")
def twin() -> Twin:
    return make_twin([[9, 14, 1], [], [31, 0, 8], [5] * 4])


@pytest.fixture(scope="module")
def rows(twin) -> list[Row]:
    return rows_of(twin, ["pt", "it"], [1, 2])


@pytest.fixture
def path(twin, tmp_path) -> Path:
    with mock.patch("actcache.store.shard.CHUNK_BYTES", 40):  # four rows: several chunks an array
        return write_store(tmp_path / "store", twin.fingerprint, twin.segments)


ROW_BYTES = 2 * 2 * 5 * 2
N_ROWS = 9 + 14 + 1 + 31 + 8 + 20


def make_feed(path: Path, **changes: Any) -> RowFeed:
    """83 rows in 17 batches, in three rounds where they are shuffled."""
    return RowFeed(path, **({"batch_rows": 5, "memory_bytes": 33 * ROW_BYTES} | changes))


def test_the_order_is_that_of_seed_and_epoch_alone(path, rows):
    feed = make_feed(path)
    assert (feed.chosen.n_rows, feed.pool_rows, len(feed), feed.row_bytes) == (N_ROWS, 30, 17, ROW_BYTES)
    first = ids(feed)
    assert sorted(check_batches([*feed], rows, feed)) == [*range(N_ROWS)]
    assert ids(feed) == first == ids(make_feed(path)) == ids(make_feed(open_store(path)))
    assert ids(pickle.loads(pickle.dumps(feed))) == first
    feed.set_epoch(1)
    assert ids(feed) == ids(make_feed(path, epoch=1)) != first
    assert ids(make_feed(path, seed=1)) not in (first, ids(feed))
    feed.set_epoch(0)
    assert ids(feed) == first


@pytest.mark.parametrize("shuffle", ["blocks", "rows"])
def test_other_rows_meet_in_another_epoch(path, shuffle):
    first_rounds = {
        frozenset(flat(make_feed(path, shuffle=shuffle, epoch=epoch, seed=seed))[:25])
        for epoch, seed in itertools.product(range(3), repeat=2)
    }
    assert len(first_rounds) == 9


def test_unshuffled_rows_come_in_stored_order(path):
    feed = make_feed(path, shuffle=False)
    for workers in (0, 3):
        assert [number for batch in feed.batches(workers) for number in batch.rows.tolist()] == [*range(N_ROWS)]


def test_epochs_change_only_between_iterations(path):
    feed = make_feed(path)
    whole, batches = ids(feed), iter(feed)
    begun = [next(batches) for _ in range(4)]
    feed.set_epoch(5)
    assert ids([*begun, *batches]) == whole


# ---- how well it shuffles --------------------------------------------------------------------------------------------


@pytest.fixture
def no_reading() -> Iterator[None]:
    """The order alone: pools stay as they are."""
    with mock.patch.object(RowFeed, "_fill"):
        yield


def flat(feed: RowFeed) -> list[int]:
    return [number for batch in ids(feed) for number in batch]


@pytest.fixture(scope="module")
def long_path(tmp_path_factory) -> Path:
    twin = make_twin([[40] * 8, [64] * 5, [7] * 30, [30] * 5])
    return write_store(tmp_path_factory.mktemp("long") / "store", twin.fingerprint, twin.segments)


@pytest.mark.slow
def test_rows_shuffle_is_the_uniform_permutation(tmp_path, no_reading):
    twin = make_twin([[3, 1], [4]])
    path = write_store(tmp_path / "store", twin.fingerprint, twin.segments)
    n, n_seeds = 8, 2500
    where, pairs = np.zeros((n, n)), np.zeros((n, n))
    for seed in range(n_seeds):
        order = flat(RowFeed(path, batch_rows=2, memory_bytes=2 * ROW_BYTES, shuffle="rows", seed=seed))
        where[np.arange(n), order] += 1
        pairs[order[0], order[1]] += 1
    # Sums of squared deviations are chi-squared with 49 and 55 degrees of freedom: 110 is beyond one in a million.
    assert ((where - n_seeds / n) ** 2 / (n_seeds / n)).sum() < 110
    expected = n_seeds / (n * (n - 1))
    assert ((pairs[~np.eye(n, dtype=bool)] - expected) ** 2 / expected).sum() < 115


@pytest.mark.slow
def test_blocks_shuffle_mixes_all_segments(long_path, no_reading):
    """1,000 rows, a pool of 256, blocks of 4: no trace of the stored order beyond what the module's docstring says."""
    with mock.patch.object(actcache.store.rows, "_CHUNK_BYTES", 80):
        feeds = [RowFeed(long_path, batch_rows=64, memory_bytes=256 * ROW_BYTES, seed=seed) for seed in range(300)]
    assert (feeds[0].chosen.chunk_rows, feeds[0].block_rows, feeds[0].pool_rows) == (8, 4, 256)
    segment_of = np.repeat(np.arange(4), [320, 320, 210, 150])
    slopes, n_segments, beside, met = [], [], [], Counter()
    watched = [(0, 999), (0, 320), (319, 320), (0, 319), (5, 500), (998, 3), (1, 2)]
    for feed in feeds:
        batches = ids(feed)
        order = np.concatenate(batches)
        assert sorted(order) == [*range(1000)]
        slopes.append(np.corrcoef(np.arange(1000), order)[0, 1])
        for batch in batches[:-1]:
            n_segments.append(len(set(segment_of[batch])))
            of_block = Counter(number // 4 for number in batch)
            beside += [of_block[number // 4] - 1 for number in batch]
        batch_of = {number: i for i, batch in enumerate(batches) for number in batch}
        met.update(pair for pair in watched if batch_of[pair[0]] == batch_of[pair[1]])
    # The slope of a random order of 250 blocks has a standard deviation of 1/sqrt(250), its mean over the seeds less.
    assert abs(np.mean(slopes)) < 5 / np.sqrt(250 * len(slopes))
    assert max(np.abs(slopes)) < 5 / np.sqrt(250)
    # Of the 3 other rows of its block a row meets 63 / 255 in its batch, but for blocks that a round's edge cuts; in a
    # uniform permutation it would be 63 / 999.
    assert 0.9 * 3 * 63 / 255 < np.mean(beside) < 3 * 63 / 255
    assert np.mean(np.array(n_segments) == 4) > 0.99
    assert all(met[pair] > 0 for pair in watched), met


@pytest.mark.slow
def test_a_round_that_holds_everything_is_a_uniform_order_too(long_path, no_reading):
    order = np.array([flat(RowFeed(long_path, batch_rows=64, seed=seed)) for seed in range(200)])
    neighbours = np.abs(np.diff(order, axis=1)) == 1
    # Of 999 neighbours in a uniform order 2 are so in the store, on average.
    assert neighbours.sum() < 2 * 200 + 5 * np.sqrt(2 * 200)


# ---- memory and reading ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_path(tmp_path_factory) -> Path:
    """4,000 rows, 16 MB a checkpoint and boundary, 125 chunks."""
    fingerprint = make_fingerprint(dtype="bfloat16", width=2048)
    segment = make_segment(fingerprint, [40] * 50, [(0, 1)])
    zeros = {key: torch.zeros(2000, 2048, dtype=torch.bfloat16) for key in segment.states}
    twin = {name: replace(segment, states=zeros) for name in ("a", "b")}
    return write_store(tmp_path_factory.mktemp("wide") / "store", fingerprint, twin)


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_memory_is_bounded(wide_path, shuffle):
    memory, batch_rows = 6_000_000, 100
    feed = RowFeed(wide_path, batch_rows=batch_rows, memory_bytes=memory, shuffle=shuffle)
    assert feed.pool_rows * feed.row_bytes <= memory < feed.chosen.n_rows * feed.row_bytes / 10
    tracemalloc.start()
    try:
        for _ in feed:
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    in_flight = (os.cpu_count() or 1) * (2**20 + 3 * actcache.store.rows._CHUNK_BYTES)
    assert peak < memory + 2 * batch_rows * feed.row_bytes + in_flight + 200_000


def test_a_blocks_epoch_decodes_little_more_than_once(wide_path):
    feed = RowFeed(wide_path, batch_rows=64, memory_bytes=1000 * 16384)
    n_rounds = -(-len(feed) // (feed.pool_rows // 64))
    # 64 blocks must fit into a round, so that a block is a quarter of a chunk here, and most come alone.
    assert (feed.chosen.chunk_rows, feed.block_rows, n_rounds) == (64, 15, 5)
    n_whole = 4 * 2 * -(-2000 // 64)
    assert n_whole < count_decoded(feed) < n_whole * 64 / 15
    feed = RowFeed(wide_path, batch_rows=64, memory_bytes=2000 * 16384, labels=["it"], boundaries=[2])
    assert feed.pool_rows == 4000, "one round"
    assert count_decoded(feed) == n_whole / 4


def count_decoded(feed: RowFeed) -> int:
    """Chunks that an epoch decodes."""
    with mock.patch.object(shard.StoredArray, "decode", autospec=True, side_effect=shard.StoredArray.decode) as decode:
        assert len([*feed]) == len(feed)
    return decode.call_count


@pytest.mark.slow
def test_workers_may_be_forked_after_reading(wide_path):
    feed = RowFeed(wide_path, batch_rows=500)
    batches = [*feed]
    assert sorted(number for batch in ids(feed.batches(2)) for number in batch) == [*range(4000)]
    assert len(batches) == 8


# ---- resume ----------------------------------------------------------------------------------------------------------


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_resume_at_every_batch(path, rows, shuffle):
    feed = make_feed(path, shuffle=shuffle, epoch=3)
    whole = [*feed]
    for n in range(len(whole) + 1):
        left = make_feed(path, shuffle=shuffle, epoch=3)
        batches = iter(left)
        for _ in range(n):
            next(batches)
        state = through_json(left.state_dict())
        resumed = make_feed(path, shuffle=shuffle)
        resumed.load_state_dict(state)
        assert through_json(resumed.state_dict()) == state
        rest = [*resumed]
        assert ids(rest) == ids(whole[n:])
        assert [bits(batch.states) for batch in rest] == [bits(batch.states) for batch in whole[n:]]
        assert ids(resumed) == ids(whole), "the next iteration is the whole epoch"


def test_resume_reads_no_round_before(path):
    for n_drawn, n_rounds in [(0, 3), (4, 3), (5, 2), (10, 2), (11, 1), (16, 1), (17, 0)]:  # of 5, 6 and 6 batches
        feed = make_feed(path)
        feed.load_state_dict(feed.state_dict(batches=n_drawn))
        with mock.patch.object(RowFeed, "_fill", autospec=True) as fill:
            assert len([*feed]) == 17 - n_drawn
        assert fill.call_count == n_rounds


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_resume_with_workers(path, rows, workers):
    whole = [*make_feed(path).batches(workers)]
    assert sorted(check_batches(whole, rows, make_feed(path))) == [*range(N_ROWS)]
    for n in (0, 1, 2, 5, len(whole) - 1, len(whole)):
        left = make_feed(path)
        for _ in itertools.islice(left.batches(workers), n):
            pass
        state = through_json(left.state_dict())
        assert state == left.state_dict(batches=n), "also right for a plain DataLoader"
        resumed = make_feed(path)
        resumed.load_state_dict(state)
        assert ids(resumed.batches(workers)) == ids(whole[n:])
        assert resumed.state_dict() == make_feed(path).state_dict(batches=len(whole))


@pytest.mark.slow
def test_a_workers_own_state_resumes_that_worker(path):
    for worker in range(2):
        whole = run_worker(make_feed(path), worker, 2)
        for n in range(len(whole) + 1):
            info = mock.Mock(id=worker, num_workers=2)
            with mock.patch.object(actcache.store.feed, "get_worker_info", return_value=info):
                left, resumed = make_feed(path), make_feed(path)
                batches = iter(left)
                for _ in range(n):
                    next(batches)
                resumed.load_state_dict(through_json(left.state_dict()))
                assert ids(resumed) == ids(whole[n:])


@pytest.mark.slow
def test_torchdatas_stateful_loader_resumes(path):
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    whole = ids(make_feed(path).batches(2))
    for workers, n in [(2, 5), (2, 6), (0, 5)]:
        loader = stateful.StatefulDataLoader(make_feed(path), batch_size=None, num_workers=workers)
        batches = iter(loader)
        begun = ids(next(batches) for _ in range(n))
        state = loader.state_dict()
        again = stateful.StatefulDataLoader(make_feed(path), batch_size=None, num_workers=workers)
        again.load_state_dict(state)
        assert begun + ids(again) == (whole if workers else ids(make_feed(path)))


def test_a_state_is_that_of_its_feed(path, twin):
    state = make_feed(path).state_dict()
    for field, value in {"seed": 1, "batch_rows": 4, "shuffle": "rows", "drop_last": True, "labels": ["it"]}.items():
        with pytest.raises(IncompatibleError, match=field) as found:
            make_feed(path, **{field: value}).load_state_dict(state)
        assert found.value.field == field
    with pytest.raises(IncompatibleError, match="pool_rows"):
        make_feed(path, memory_bytes=10 * ROW_BYTES).load_state_dict(state)
    StoreWriter(path, twin.fingerprint).append("s-9", twin.segments["s-0"])
    with pytest.raises(IncompatibleError, match="the store has grown") as found:
        make_feed(path).load_state_dict(state)
    assert found.value.field == "rows"


# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_worker_processes(path, rows, start):
    feed = make_feed(path)
    loader = DataLoader(feed, batch_size=None, num_workers=2, multiprocessing_context=start)
    batches = [*loader]
    assert len(batches) == len(feed) == len(loader)
    assert sorted(check_batches(batches, rows, feed)) == [*range(N_ROWS)]
    shares = [ids(run_worker(feed, worker, 2)) for worker in range(2)]
    dealt = [share for pair in itertools.zip_longest(*shares) for share in pair if share]
    assert ids(batches) == dealt


@pytest.mark.slow
def test_workers_that_outlive_an_epoch_see_the_next(path):
    feed = make_feed(path)
    loader = DataLoader(feed, batch_size=None, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in range(3):
        feed.set_epoch(epoch)
        epochs.append(ids(loader))
    assert epochs == [ids(make_feed(path, epoch=epoch).batches(2)) for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.slow
def test_a_process_opens_the_store_for_itself(path):
    feed = make_feed(path)
    mine = feed.chosen.store
    queue = multiprocessing.get_context("fork").SimpleQueue()
    child = multiprocessing.get_context("fork").Process(target=lambda: queue.put(feed.chosen.store is mine))
    child.start()
    child.join()
    assert queue.get() is False
    assert feed.chosen.store is mine


@pytest.mark.slow
def test_workers_read_an_object_store(path, rows):
    """Through obstore a store is remote, whatever lies behind it: many threads a process, and no process is forked."""
    stores = pytest.importorskip("obstore.store", reason="obstore is not installed")
    feed = make_feed(open_store(stores.LocalStore(prefix=path)))
    assert not feed.chosen.is_local
    assert sorted(check_batches([*feed.batches(2)], rows, feed)) == [*range(N_ROWS)]
    assert ids(feed) == ids(make_feed(path))


def test_segments_committed_later_are_left_out(path, twin):
    feed = make_feed(path)
    before = ids(feed.batches(2))
    StoreWriter(path, twin.fingerprint).append("a-first", twin.segments["s-2"])
    assert ids(feed.batches(2)) == before
    assert make_feed(path).chosen.n_rows == N_ROWS + 39


def test_a_segment_that_is_gone_is_named(path):
    feed = make_feed(path)
    (record,) = path.glob("commits/s-2*")
    record.unlink()
    shutil.rmtree(next(path.glob("segments/s-2*")))
    with pytest.raises(InputError, match=r"segment s-2 is not in .* any more as it was; open it again"):
        ids(pickle.loads(pickle.dumps(feed)))


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_is_named_and_never_skipped(path, workers):
    (shard,) = path.glob("segments/s-2*/states/it/b002/c/0/0")
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(data)
    feed = make_feed(path)
    with pytest.raises(CorruptStoreError, match="segment s-2, array states/it/b002, chunk 0"):
        [*feed.batches(workers)]
    assert not multiprocessing.active_children()
    assert len([*make_feed(path, labels=["pt"], memory_bytes=1 << 20).batches(workers)]) == 17


# ---- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": ["sft"]}, "checkpoint 'sft' is not in the store; it has pt, it"),
        ({"labels": []}, "no checkpoint is chosen"),
        ({"boundaries": [1, 3]}, "boundary 3 is not in the store; it has 1, 2"),
        ({"positions": "last"}, "positions is 'last', expected 'all', 'train', 'held_out', 'event'"),
        ({"positions": [0.5]}, "positions are float64, expected integers"),
        ({"positions": [True]}, "positions are bool, expected integers"),
        ({"positions": [99]}, "no row of .* is chosen; it has 83"),
        ({"positions": lambda places: places.position}, r"positions\(...\) gave int64 \(24,\), expected bool \(24,\)"),
        ({"memory_bytes": 5 * ROW_BYTES - 1}, "memory_bytes is 199; one batch of 5 rows needs 200"),
        ({"shuffle": "global"}, "shuffle is 'global', expected one of blocks, rows, none"),
        ({"batch_rows": 0}, "batch_rows 0, .*expected at least"),
        ({"rank": 2, "world": 2}, "rank 2, world 2"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_what_cannot_be_is_named(path, changes, said):
    with pytest.raises(InputError, match=said):
        make_feed(path, **changes)


def test_an_empty_store_and_rows_that_are_not_there(path, tmp_path):
    StoreWriter(tmp_path / "empty", make_fingerprint())
    with pytest.raises(InputError, match=r"no row of .* is chosen; it has 0"):
        RowFeed(tmp_path / "empty")
    for row in (-1, N_ROWS):
        with pytest.raises(InputError, match=f"row {row} is not in the store; it has 83"):
            make_feed(path).locate([0, row])
    with pytest.raises(InputError, match="epoch -1 is negative"):
        make_feed(path).set_epoch(-1)


# ---- the endless buffer ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_buffer_goes_through_epochs(path, rows, workers):
    feed = make_feed(path, drop_last=True)
    buffer = ActivationBuffer(feed, dtype=None, workers=workers)
    drawn = [next(buffer) for _ in range(2 * len(feed) + 3)]
    assert feed.epoch == 2
    batches = [batch for epoch in range(3) for batch in make_feed(path, drop_last=True, epoch=epoch).batches(workers)]
    assert [bits(one) for one in drawn] == [bits(batch.states) for batch in batches[: len(drawn)]]

    again = ActivationBuffer(make_feed(path, drop_last=True), dtype=None, workers=workers)
    again.load_state_dict(through_json(buffer.state_dict()))
    for _ in range(len(feed)):
        assert bits(next(again)) == bits(next(buffer))


def test_the_buffer_gives_the_shape_that_a_trainer_wants(path):
    def shape(flatten: bool = False, **changes: Any) -> tuple[int, ...]:
        states = next(ActivationBuffer(make_feed(path, **changes), flatten=flatten))
        assert (states.dtype, states.device.type) == (torch.float32, "cpu")
        return tuple(states.shape)

    assert shape() == (5, 2, 2, 5)
    assert shape(boundaries=[2]) == shape(labels=["it"]) == (5, 2, 5)
    assert shape(labels=["it"], boundaries=[1]) == shape(True, labels=["it"], boundaries=[1]) == (5, 5)
    assert shape(True) == (5, 20)
    buffer = ActivationBuffer(make_feed(path))
    assert iter(buffer) is buffer
    assert json.loads(json.dumps(buffer.config))["labels"] == ["pt", "it"]
    with pytest.raises(InputError, match="no batch in an epoch: 83 rows, 100 a batch"):
        ActivationBuffer(make_feed(path, batch_rows=100, drop_last=True, memory_bytes=1 << 20))
