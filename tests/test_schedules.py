"""Whatever order writers, readers, a compactor and a verifier act in, and wherever they are killed: nothing is lost."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("obstore")

from obstore.store import MemoryStore

from actcache.store import StoreWriter, compact, open_store, records
from actcache.store.commit_record import encode_record
from actcache.store.feed import RowFeed
from actcache.store.storage import Storage
from actcache.testing import PROMISES, Disk, ObjectPlace, StoreSchedule
from actcache.testing.__main__ import main, play
from actcache.testing.content import Content, make_segment, small_content
from actcache.testing.invariants import check_batch, check_rows, check_verified, check_whole

FAST, SOME, ALL = 2, 200, 5000  # seeds on an object store: of make test-fast, of make test, of make test-deep
ON_DISK = 10  # times fewer on a disk
CONTENT = small_content()


def blocks(share: int) -> list[object]:
    """Ranges of seeds, each played by one test."""
    some, everything = SOME // share, ALL // share
    found: list[Any] = [range(FAST)]
    found += [pytest.param(range(i, min(i + 20, some)), marks=pytest.mark.slow) for i in range(FAST, some, 20)]
    found += [
        pytest.param(range(i, min(i + 100, everything)), marks=pytest.mark.deep) for i in range(some, everything, 100)
    ]
    return found


@pytest.mark.parametrize("seeds", blocks(1), ids=str)
def test_schedules_on_an_object_store(seeds):
    for seed in seeds:
        play(seed)


@pytest.mark.parametrize("seeds", blocks(ON_DISK), ids=str)
def test_schedules_on_a_disk(seeds):
    for seed in seeds:
        play(seed, "disk")


@pytest.mark.slow
@pytest.mark.parametrize("on", ["disk", "objects"])
def test_a_seed_gives_the_same_schedule_again(on, capsys):
    assert play(7, on) == play(7, on)
    assert main(["7", "--on", on]) == 0
    assert capsys.readouterr().out == f"7 on {on}: nothing lost, nothing twice, nothing half\n"


def test_a_schedule_on_an_obstore_store():
    StoreSchedule(1, ObjectPlace(1, MemoryStore())).run()


# ---- that schedules find what is wrong -----------------------------------------------------------------------------


def find(said: str, hint: int, place: Callable[[int], Any]) -> None:
    """Some seed of ``make test`` shows a fault by this check; one that is known to is played first, for time's sake."""
    for seed in (hint, *range(SOME)):
        try:
            StoreSchedule(seed, place(seed)).run()
        except AssertionError as error:
            if re.match(rf"seed {seed}: [^\n]*(?:{said})[^\n]*; play it again by: python -m actcache", str(error)):
                return
    raise AssertionError(f"no seed finds: {said}")


class Unkept(ObjectPlace):
    """A server that keeps a promise until the store is there, so that its creation does not find it out."""

    def __init__(self, seed: int, promise: str) -> None:
        super().__init__(seed)
        StoreWriter(self.storage(None), CONTENT.fingerprint)
        self.objects.broken = {promise}


UNKEPT = {
    "conditions": ("committed twice", 58),
    "listings": ("lost", 1),
    "durability": ("lost", 1),
    "wholeness": ("CorruptStoreError", 0),
    "bits": ("CorruptStoreError", 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("promise", PROMISES)
def test_schedules_find_a_server_that_breaks_a_promise(promise):
    said, hint = UNKEPT[promise]
    find(said, hint, lambda seed: Unkept(seed, promise))


def taken_name(replaces: Sequence[str], taken: set[str]) -> str:
    """A compaction calls what it makes from its first segment to its last, whether an earlier one is called so or not:
    it is stuck where segments between these came later."""
    return f"{replaces[0]}--{replaces[-1]}"


def one_listing(storage: Storage, digest: str, known: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Records are listed once, so that those are missed which a compaction replaces before they are read."""
    names = records.committed_names(storage)
    found = [(known or {}).get(name) or records.read_if_there(storage, name, digest) for name in names]
    return [record for record in found if record is not None]


class Keeping(StoreWriter):
    """A compaction does not say what it replaces: then all is there twice."""

    def append(self, name: str, segment: Any, *, replaces: Sequence[str] = (), parts: Any = ()) -> None:
        super().append(name, segment)


MERGE = importlib.import_module("actcache.store.compact").merge


def turned_round(parts: Sequence[Any]) -> Any:
    """A compaction puts segments in another order than it says."""
    return MERGE([*reversed(parts)])


PLANTED = {  # what is said of it, what is put where, and seeds that find it on a disk and on an object store
    "taken name": ("is committed already", taken_name, ["compact._free_name"], 20, 15),
    "one listing": ("lost", one_listing, [f"{one}.read_records" for one in ("compact", "reader", "writer")], 11, 26),
    "keeps": ("twice", Keeping, ["compact.StoreWriter"], 0, 9),
    "turned round": ("not that of one writer|is another row", turned_round, ["compact.merge"], 0, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("on", ["disk", "objects"])
@pytest.mark.parametrize("fault", PLANTED)
def test_schedules_find_a_fault(fault, on, tmp_path):
    said, planted, places, *hints = PLANTED[fault]

    def place(seed: int) -> Any:
        if on == "objects":
            return ObjectPlace(seed)
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        folder.mkdir()
        return Disk(folder)

    with ExitStack() as patches:
        for where in places:
            patches.enter_context(mock.patch(f"actcache.store.{where}", planted))
        hint = hints[on == "objects"]
        find(said, hint, place)


# ---- that each check can fail --------------------------------------------------------------------------------------


@pytest.fixture
def stored() -> Storage:
    """All of the content on an object store without faults."""
    storage = ObjectPlace(0).storage(None)
    writer = StoreWriter(storage, CONTENT.fingerprint)
    for name, segment in CONTENT.segments.items():
        writer.append(name, segment)
    return storage


def test_what_is_as_written_passes(stored):
    for _ in range(2):
        check_whole(open_store(stored), CONTENT, CONTENT.segments)
        check_rows(open_store(stored), CONTENT, CONTENT.segments, range(9))
        check_verified(stored)
        feed = RowFeed(open_store(stored), batch_rows=2)
        seen: dict[int, bytes] = {}
        for batch in feed:
            check_batch(feed, batch, CONTENT, seen)
        assert len(seen) == feed.chosen.n_rows
        compact(stored)


def change(storage: Storage, key: str, edit: Callable[[bytes], bytes]) -> None:
    storage.put(key, edit(storage.read(key)))


def test_a_lost_record_fails(stored):
    stored.remove("commits/s-1.json")
    for check in (
        lambda: check_whole(open_store(stored), CONTENT, {"s-1"}),
        lambda: check_rows(open_store(stored), CONTENT, {"s-1"}, []),
    ):
        with pytest.raises(AssertionError, match="lost: s-1"):
            check()


def test_a_merged_segment_that_replaces_nothing_fails(stored):
    record = stored.read("commits/s-1.json")
    folder = open_store(stored).segments[1].folder
    files = {file: stored.read_ranges(f"{folder}/{file}", [(0, 2**20)])[0] for file in stored.sizes(folder)}
    compact(stored)
    merged = json.loads(stored.read("commits/s-0--s-2.json"))
    del merged["crc32c"], merged["parts"]
    stored.put("commits/s-0--s-2.json", encode_record(merged | {"replaces": []}))
    stored.put("commits/s-1.json", record)
    for file, data in files.items():
        stored.put(f"{folder}/{file}", data)
    with pytest.raises(AssertionError, match="events twice"):
        check_rows(open_store(stored), CONTENT, (), ())
    store = open_store(stored)
    store.segments *= 2
    with pytest.raises(AssertionError, match=r"^twice: s-0--s-2, s-1"):
        check_whole(store, CONTENT, ())


@pytest.mark.parametrize("end", ["states/pt/b001/c/0/0", "token_ids/zarr.json"])
def test_another_byte_fails(end, stored):
    (segment, *_) = open_store(stored).segments
    change(stored, f"{segment.folder}/{end}", lambda data: data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    with pytest.raises(AssertionError, match="the files of segment s-0 are not those of one writer"):
        check_whole(open_store(stored), CONTENT, ())
    with pytest.raises(AssertionError, match="verify: s-0"):
        check_verified(stored)


def test_other_content_fails(stored):
    """Rows of one segment where another's were to be."""
    segments = dict(CONTENT.segments)
    changed = {"pt": segments["s-1"].final["pt"].flip(0)}
    other = Content(CONTENT.fingerprint, segments | {"s-1": replace(segments["s-1"], final=changed)})
    with pytest.raises(AssertionError, match="event e1-0 has other rows"):
        check_rows(open_store(stored), other, (), range(9))
    with pytest.raises(AssertionError, match=r"s-1 (is|are) not th"):
        check_whole(open_store(stored), other, ())
    fewer = Content(
        CONTENT.fingerprint, segments | {"s-1": make_segment(CONTENT.fingerprint, [2], [(0, 1)], name="e1")}
    )
    with pytest.raises(AssertionError, match="half of a segment"):
        check_rows(open_store(stored), fewer, (), ())


def test_a_row_twice_and_another_row_fail(stored):
    feed = RowFeed(open_store(stored), batch_rows=2)
    batch = next(iter(feed))
    check_batch(feed, batch, CONTENT, seen := {})
    with pytest.raises(AssertionError, match="twice"):
        check_batch(feed, batch, CONTENT, seen)
    with pytest.raises(AssertionError, match="is another row"):
        check_batch(feed, batch._replace(states=batch.states + 1), CONTENT, {})


def test_what_lies_around_a_disk_s_store_fails_where_it_was_touched(tmp_path):
    place = Disk(tmp_path)
    StoreWriter(place.storage(None), CONTENT.fingerprint)
    place.check()
    (place.root / "more").mkdir()
    with pytest.raises(AssertionError, match="more"):
        place.check()
    (place.root / "more").rmdir()
    (tmp_path / "commits/s-0.json").write_text("ours")
    with pytest.raises(AssertionError, match="commits/s-0"):
        place.check()
