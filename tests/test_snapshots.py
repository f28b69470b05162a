"""An open store, and a feed of it, stay what they were: through compactions, repair, another store in its place."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from stores import make_fingerprint, make_segment
from twins.store import Twin

from actcache import RowFeed
from actcache.canonical import digest_of
from actcache.errors import CorruptStoreError, IncompatibleError, InputError
from actcache.store import Store, StoreWriter, commit_record, compact, open_store, records, verify
from actcache.store.feed import RowBatch
from actcache.store.storage import LocalStorage, open_storage

FINGERPRINT = make_fingerprint(checkpoints={"pt": {}, "it": {}}, boundaries=[1])
SEGMENTS = {
    f"s-{i}": make_segment(FINGERPRINT, [4, 2 + i], [(0, 3), (1, i)][: 1 + i % 2], name=f"e{i}", seed=i)
    for i in range(6)
}
pytestmark = pytest.mark.slow


def fill(place: Path, *names: str) -> Store:
    writer = StoreWriter(place, FINGERPRINT)
    for name in names:
        writer.append(name, SEGMENTS[name])
    return open_store(place)


def check(store: Store, *names: str) -> None:
    """The store is these segments, one after another: every bit, table and number."""
    twin = Twin(FINGERPRINT, {name: SEGMENTS[name] for name in names})
    n_events = sum(SEGMENTS[name].events.num_rows for name in names)
    assert len(store) == n_events
    twin.check(store, [*range(n_events)])
    assert store.excluded.num_rows == len(names)


def merge_around(place: Path) -> None:
    """Another writer commits s-3 while s-0 and s-5 are being merged."""
    merge = compact_module().merge

    def later(parts: Any) -> Any:
        fill(place, "s-3")
        return merge(parts)

    with mock.patch.object(compact_module(), "merge", later):
        compact(place)


def compact_module() -> Any:
    import sys

    return sys.modules["actcache.store.compact"]


def merge_twice(place: Path) -> None:
    """The merged segment is itself merged with newer ones."""
    compact(place)
    fill(place, "s-1", "s-2", "s-4")
    compact(place)


def merge_all(place: Path) -> None:
    fill(place, "s-1", "s-3")
    compact(place)


@pytest.mark.parametrize("change", [merge_around, merge_twice, merge_all, compact])
@pytest.mark.parametrize("through", ["nothing", "pickle"])
def test_a_reader_keeps_its_events_whatever_is_merged(change: Callable[[Path], None], through, tmp_path):
    place = tmp_path / "store"
    untouched = fill(place, "s-0", "s-5")
    read = open_store(place)
    check(read, "s-0", "s-5")
    change(place)
    for store in (untouched, read):
        if through == "pickle":
            store = pickle.loads(pickle.dumps(store))
        check(store, "s-0", "s-5")
        for segment in store.segments:
            data = SEGMENTS[segment.name]
            assert (segment.read("token_ids") == data.token_ids).all()
            assert (segment.row_offsets == data.sequence_offsets).all()
            with pytest.raises(InputError):
                segment.read("token_ids", 0, len(data.token_ids) + 1)
    assert verify(place) == []


def test_a_reader_that_opened_between_keeps_its_events(tmp_path):
    """s-3 lies between the two that are merged around it: afterwards it comes last in the store, but not here."""
    place = tmp_path / "store"
    fill(place, "s-0", "s-5")
    opened: list[Store] = []
    merge = compact_module().merge

    def later(parts: Any) -> Any:
        opened.append(fill(place, "s-3"))
        return merge(parts)

    with mock.patch.object(compact_module(), "merge", later):
        compact(place)
    check(opened[0], "s-0", "s-3", "s-5")
    compact(place)
    check(opened[0], "s-0", "s-3", "s-5")


def capture_again(place: Path) -> None:
    """The same names and counts, other rows: as after a repair, or on a device that rounds otherwise."""
    shutil.rmtree(place)
    writer = StoreWriter(place, FINGERPRINT)
    for name in ("s-0", "s-5"):
        i = int(name[2:])
        lengths, events = [4, 2 + i], [(0, 3), (1, i)][: 1 + i % 2]
        writer.append(name, make_segment(FINGERPRINT, lengths, events, name=f"e{i}", seed=77 + i))


def drop(place: Path) -> None:
    (place / "commits/s-0.json").unlink()
    shutil.rmtree(place / "segments/s-0")


def merge_by_an_earlier_version(place: Path) -> None:
    """Its records do not say what was merged, in which order."""
    with mock.patch("actcache.store.writer.encode_parts", return_value=None):
        real = commit_record.encode_record
        with mock.patch.object(
            commit_record, "encode_record", lambda record: real({k: v for k, v in record.items() if k != "parts"})
        ):
            compact(place)


def another_store(place: Path) -> None:
    shutil.rmtree(place)
    writer = StoreWriter(place, FINGERPRINT | {"prompts": "others"})
    for name in ("s-0", "s-5"):
        writer.append(name, SEGMENTS["s-1"])


def no_store(place: Path) -> None:
    shutil.rmtree(place)


GONE = {
    capture_again: (InputError, r"segment s-0 is not in .* any more as it was; open it again"),
    drop: (InputError, r"segment s-0 is not in .* any more as it was; open it again"),
    merge_by_an_earlier_version: (InputError, r"segment s-0 is not in .* any more as it was; open it again"),
    another_store: (IncompatibleError, r"is not the store any more that was opened: its prompts is another"),
    no_store: (InputError, "is not a store"),
}


@pytest.mark.parametrize("change", GONE)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_not_the_same_any_more_is_refused_by_name(change, workers, tmp_path):
    """Never the rows of another under the numbers of the one that was opened."""
    place = tmp_path / "store"
    untouched, read = fill(place, "s-0", "s-5"), open_store(place)
    feed = RowFeed(place, batch_rows=4, seed=1)
    check(read, "s-0", "s-5")
    assert sum(len(batch.rows) for batch in feed) == feed.chosen.n_rows
    change(place)
    error, said = GONE[change]
    for store in (untouched, read):
        with pytest.raises(error, match=said):
            store.states("pt", 1)
    with pytest.raises(error if not workers else Exception, match=said):
        [*feed.batches(workers)]


def test_damage_is_still_called_damage(tmp_path):
    place = tmp_path / "store"
    store = fill(place, "s-0", "s-5")
    compact(place)
    check(store, "s-0", "s-5")
    (shard,) = place.glob("segments/*/states/pt/b001/c/0/0")
    data = bytearray(shard.read_bytes())
    data[20] ^= 1
    shard.write_bytes(data)
    for opened in (store, open_store(place)):
        with pytest.raises(CorruptStoreError, match=r"states/pt/b001, chunk 0: crc32c"):
            opened.states("pt", 1)


def bits_of(batch: RowBatch) -> dict[int, bytes]:
    """Rows by number, NaNs and all."""
    return {int(n): row.contiguous().view(torch.uint8).numpy().tobytes() for n, row in zip(*batch[::-1], strict=True)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("change", [merge_around, merge_twice, compact])
def test_a_feed_goes_on_through_a_compaction_in_mid_epoch(change, workers, tmp_path):
    place = tmp_path / "store"
    fill(place, "s-0", "s-5")
    feed = RowFeed(place, batch_rows=2, seed=1, memory_bytes=2 * 2 * RowFeed(place).row_bytes)
    expected = [*feed]
    places = [feed.locate(batch.rows) for batch in expected]
    batches = feed.batches(workers)
    got = [next(batches)]
    change(place)
    got += batches
    if not workers:
        assert [*map(bits_of, got)] == [*map(bits_of, expected)]
    assert {n: row for batch in got for n, row in bits_of(batch).items()} == {
        n: row for batch in expected for n, row in bits_of(batch).items()
    }
    assert sorted(n for batch in got for n in batch.rows.tolist()) == [*range(feed.chosen.n_rows)]
    after = pickle.loads(pickle.dumps(feed))
    for batch, before in zip(expected, places, strict=True):
        for a, b in zip(after.locate(batch.rows), before, strict=True):
            assert (a == b).all()


@pytest.mark.parametrize("positions", ["all", "event"])
@pytest.mark.parametrize("shuffle", ["blocks", "rows", "none"])
@pytest.mark.parametrize("merged_before", [False, True])
def test_a_saved_state_goes_on_after_a_compaction(merged_before, shuffle, positions, tmp_path):
    place = tmp_path / "store"
    fill(place, "s-0", "s-5")
    if merged_before:
        compact(place)
    fill(place, "s-1", "s-2", "s-4")
    n_bytes = 3 * RowFeed(place).row_bytes

    def feed() -> RowFeed:
        return RowFeed(place, batch_rows=2, memory_bytes=n_bytes, shuffle=shuffle, positions=positions)

    live = feed()
    batches = iter(live)
    for _ in range(3):
        next(batches)
    state = json.loads(json.dumps(live.state_dict()))
    compact(place)
    assert len(open_store(place).segments) == 1
    resumed = feed()
    resumed.load_state_dict(state)
    assert json.loads(json.dumps(resumed.state_dict())) == state
    assert [*map(bits_of, resumed)] == [*map(bits_of, batches)]
    for one in (live, resumed):
        one.set_epoch(1)
    assert [*map(bits_of, resumed)] == [*map(bits_of, live)], "and so in the epochs that follow"
    for batch in resumed:
        tokens = resumed.locate(batch.rows).token_id
        assert (tokens == live.locate(batch.rows).token_id).all()
    fill(place, "s-3")
    with pytest.raises(IncompatibleError, match="rows"):
        feed().load_state_dict(state)


def test_many_threads_follow_one_compaction(tmp_path):
    place = tmp_path / "store"
    store = fill(place, *SEGMENTS)
    compact(place)
    failures: list[BaseException] = []
    gate = threading.Barrier(6)

    def read() -> None:
        gate.wait()
        try:
            check(store, *SEGMENTS)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("lacking", [("s-0", "s-0--s-5"), ("s-0", "s-5", "s-0--s-5"), ("s-0--s-5",)])
def test_a_listing_made_during_a_compaction_loses_nothing(lacking, tmp_path):
    """A listing may lack what is renamed or deleted while it is made: then the next one has what took its place."""
    place = tmp_path / "store"
    fill(place, "s-0", "s-5")
    before = {name: (place / f"commits/{name}.json").read_bytes() for name in ("s-0", "s-5")}
    compact(place)
    digest = digest_of(FINGERPRINT)
    real, count = LocalStorage.names, iter(range(100))

    def names(self: LocalStorage, folder: str) -> list[str]:
        if next(count) == 0:
            for name, data in before.items():
                (place / f"commits/{name}.json").write_bytes(data)
            listed = {f"{name}.json" for name in lacking}
            return sorted({"s-0.json", "s-5.json", "s-0--s-5.json"} - listed)
        for name in before:
            (place / f"commits/{name}.json").unlink(missing_ok=True)
        return real(self, folder)

    with mock.patch.object(LocalStorage, "names", names):
        found = records.without_replaced(records.read_records(open_storage(place), digest))
    assert [record["segment"] for record in found] == ["s-0--s-5"]


def test_a_path_stays_the_place_that_was_opened(tmp_path, monkeypatch):
    for name, segment in (("a", "s-0"), ("b", "s-1")):
        fill(tmp_path / name / "store", segment)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path / "a")
    relative, linked, feed = open_store("store"), open_store(tmp_path / "link/store"), RowFeed("store")
    writer = StoreWriter("store", FINGERPRINT)
    monkeypatch.chdir(tmp_path / "b")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "b")
    writer.append("s-2", SEGMENTS["s-2"])
    for store in (relative, linked):
        check(store, "s-0")
    assert sum(len(batch.rows) for batch in feed) == len(SEGMENTS["s-0"].token_ids)
    assert os.path.isabs(relative.path)
    check(open_store(tmp_path / "b/store"), "s-1")
    check(open_store(tmp_path / "a/store"), "s-0", "s-2")
