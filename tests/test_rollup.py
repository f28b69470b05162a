"""The roll-up against the records themselves: whatever it is, stale, damaged or forged, a store opens as without it."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import FINGERPRINT, SEGMENTS, bits, fill, make_fingerprint, make_segment, make_site_rows

from actcache.canonical import digest_of
from actcache.errors import CorruptStoreError, IncompatibleError
from actcache.store import StoreWriter, compact, layout, open_store, repair, verify, writer
from actcache.store.commit_record import encode_record
from actcache.store.objects import ObjectStorage
from actcache.store.records import committed_names, read_record, read_records
from actcache.store.rollup import decode_rollup, read_rollup, write_rollup
from actcache.store.storage import LocalStorage, Storage, open_storage

GOLDEN = Path(__file__).parent / "golden"
DIGEST = digest_of(FINGERPRINT)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven segments, of which one is merged, and an addition; rolled up."""
    path = tmp_path_factory.mktemp("rolled") / "store"
    store = fill(str(path), ["s-0", "s-1"])
    compact(path)
    fill(str(path), [name for name in SEGMENTS if name > "s-1"])
    record = open_store(path).segments[-1].record
    rows = make_site_rows(FINGERPRINT, record["n_tokens"], [("mlp", 0)], 9)
    StoreWriter(path, FINGERPRINT).add_rows("more", record, rows)
    write_rollup(open_storage(path), store.fingerprint)
    return path


@pytest.fixture
def path(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "store"))  # with the times of its files


def twin(storage: Storage, digest: str = DIGEST) -> dict[str, Any]:
    """What the records say, read one by one."""
    return {name: dict(read_record(storage, name, digest)) for name in committed_names(storage)}


def said(path: Any) -> list[Any]:
    """What a reader finds."""
    return [(one.name, one.events, one.parts, dict(one.record), one.sites) for one in open_store(path).segments]


def reads(path: Any, act: Callable[[], Any]) -> list[str]:
    """The keys that are read."""
    found: list[str] = []
    real = LocalStorage.read

    def read(self: LocalStorage, key: str) -> bytes:
        found.append(key)
        return real(self, key)

    with mock.patch.object(LocalStorage, "read", read):
        act()
    return found


def test_it_says_what_the_records_say(path):
    storage = open_storage(path)
    expected = twin(storage)
    rolled = read_rollup(storage, DIGEST)
    assert {name: dict(one.record) for name, one in rolled.items()} == expected
    assert {name: one.record.digest for name, one in rolled.items()} == {
        name: digest_of(record) for name, record in expected.items()
    }
    assert any(layout.is_addition(record) for record in expected.values())
    assert any(record["replaces"] for record in expected.values())


def test_a_store_opens_with_a_few_reads_whatever_its_segments(path):
    before = said(path)
    assert reads(path, lambda: open_store(path)) == [layout.ROOT]
    (path / layout.ROLLUP).unlink()
    assert said(path) == before
    assert len(reads(path, lambda: open_store(path))) == 1 + len(committed_names(open_storage(path)))


def test_only_records_that_it_lacks_are_read(path):
    segment = make_segment(FINGERPRINT, [3], [(0, 1)], name="new")
    StoreWriter(path, FINGERPRINT).append("s-9", segment)
    assert reads(path, lambda: open_store(path)) == [layout.ROOT, "commits/s-9.json"]
    assert "s-9" in [name for name, *_ in said(path)]


def test_a_pickled_store_reads_on(path):
    store = pickle.loads(pickle.dumps(open_store(path)))
    assert [segment.record for segment in store.segments] == [one.record for one in open_store(path).segments]
    assert bits(store.states("pt", 1)[0]) == bits(open_store(path).states("pt", 1)[0])


# ---- stale ---------------------------------------------------------------------------------------------------------


def check_as_without(path: Path) -> None:
    """A store opens as it would without the roll-up."""
    with_it = said(path)
    os.rename(path / layout.ROLLUP, path / "elsewhere")
    assert with_it == said(path)
    os.rename(path / "elsewhere", path / layout.ROLLUP)


@pytest.mark.parametrize("seed", range(2))
def test_a_segment_that_was_captured_anew_is_not_the_one_it_has(seed, path):
    """By a version that knows of no roll-up: the record has the same name and the same size."""
    data = (path / "commits/s-4.json").read_bytes()
    (path / "commits/s-4.json").unlink()
    shutil.rmtree(path / "segments/s-4")
    check_as_without(path)
    anew = make_segment(FINGERPRINT, [4, 6], [(0, 3)], name="e4", seed=77 + seed)
    StoreWriter(path, FINGERPRINT).append("s-4", anew)
    record = (path / "commits/s-4.json").read_bytes()
    assert record != data
    check_as_without(path)
    events = [event for one in open_store(path).segments if one.name == "s-4" for event in one.events]
    assert bits(open_store(path).states("pt", 1, events)[0]) == bits(anew.states["pt", 1][:4])
    assert verify(path) == []


def test_a_repair_takes_it_away_first(path):
    (shard,) = path.glob("segments/s-3/states/it/b001/c/0/0")
    shard.write_bytes(b"x" * shard.stat().st_size)
    with (
        mock.patch.object(LocalStorage, "move", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        repair(path)
    assert not (path / layout.ROLLUP).exists()
    assert {problem.segment for problem in repair(path)} == {"s-3"}
    assert verify(path) == []
    compact(path)
    check_as_without(path)


def test_a_compaction_writes_it_anew(path):
    old = (path / layout.ROLLUP).read_bytes()
    n_before, n_after = compact(path)
    assert (n_before, n_after) == (6, 2)  # the segment with an addition has other sites than the rest
    check_as_without(path)
    assert reads(path, lambda: open_store(path)) == [layout.ROOT]
    new = (path / layout.ROLLUP).read_bytes()
    assert new != old
    (path / layout.ROLLUP).write_bytes(old)
    check_as_without(path)
    assert verify(path) == [], "a stale one is no damage"
    compact(path)
    assert (path / layout.ROLLUP).read_bytes() == new


# ---- damaged, and forged -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_one_is_as_good_as_none(kept, data):
    """Cut off anywhere, or with any byte changed; what gzip does not look at changes nothing."""
    whole = (kept / layout.ROLLUP).read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole[:at] if data.draw(st.booleans()) else whole)
    if len(damaged) > at:
        damaged[at] ^= data.draw(st.integers(1, 255))
    expected = {name: dict(one.record) for name, one in decode_rollup(whole, DIGEST).items()}
    try:
        found = decode_rollup(bytes(damaged), DIGEST)
    except CorruptStoreError:
        return
    assert {name: dict(one.record) for name, one in found.items()} == expected


def test_damage_is_named_and_mended(path):
    before = said(path)
    data = bytearray((path / layout.ROLLUP).read_bytes())
    data[len(data) // 2] ^= 1
    (path / layout.ROLLUP).write_bytes(data)
    assert said(path) == before
    (problem,) = verify(path)
    assert (problem.segment, "'actcache compact' writes it anew" in problem.advice) == (layout.ROLLUP, True)
    assert said(path) == before
    compact(path, max_bytes=1)
    assert verify(path) == []
    assert reads(path, lambda: open_store(path)) == [layout.ROOT]


def forge(path: Path, change: Callable[[list[Any]], Any]) -> None:
    """Change the lines of the roll-up, and put right what checks them."""
    lines = gzip.decompress((path / layout.ROLLUP).read_bytes()).splitlines()[:-1]
    parsed = [[json.loads(part) for part in line.split(b"\t")] for line in lines]
    change(parsed)
    lines = [b"\t".join(json.dumps(part).encode() for part in line) + b"\n" for line in parsed]
    n = sum(len(line) > 1 for line in parsed)
    import google_crc32c

    end = json.dumps({"crc32c": google_crc32c.value(b"".join(lines)), "n": n}).encode() + b"\n"
    members = [lines[0], b"".join(lines[1:]), end]
    (path / layout.ROLLUP).write_bytes(b"".join(gzip.compress(member) for member in members))


def entry(parsed: list[Any], name: str) -> Any:
    return next(line for line in parsed if len(line) > 1 and line[0][0] == name)


def shape(parsed: list[Any], name: str) -> Any:
    shapes = [line[0]["shape"] for line in parsed[1:] if len(line) == 1]
    return shapes[entry(parsed, name)[0][4]]


FORGED: dict[str, Callable[[list[Any]], Any]] = {
    "nothing": lambda lines: None,
    "a folder outside": lambda lines: entry(lines, "s-2")[0][-1].update(folder="../outside"),
    "another's folder": lambda lines: entry(lines, "s-2")[0][-1].update(folder="s-3"),
    "no folder": lambda lines: entry(lines, "s-2")[0][-1].pop("folder"),
    "counts that are none": lambda lines: entry(lines, "s-2")[0][-1].update(n_events=-1),
    "bytes that are none": lambda lines: entry(lines, "s-2")[0][-1].update(raw_state_bytes="x"),
    "a digest that is none": lambda lines: entry(lines, "s-2")[0].__setitem__(3, "x"),
    "a shape that is not there": lambda lines: entry(lines, "s-2")[0].__setitem__(4, 99),
    "a file outside": lambda lines: shape(lines, "s-2")[0].__setitem__(0, "../../zarr.json"),
    "a schema of no tables": lambda lines: shape(lines, "s-2")[1].update(schema={}),
    "a newer version of a record": lambda lines: shape(lines, "s-2")[1].update(format_version=99),
    "a newer roll-up": lambda lines: lines[0][0].update(rollup=2),
    "another store's": lambda lines: lines[0][0].update(fingerprint="0" * 64),
    "no entry": lambda lines: lines[3].__setitem__(slice(None), [[]]),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_one_is_not_believed(what, path):
    before = said(path)
    forge(path, FORGED[what])
    assert said(path) == before
    assert bool(verify(path)) == (what != "nothing")
    assert (reads(path, lambda: open_store(path)) == [layout.ROOT]) == (what == "nothing")


def test_another_content_is_found_by_verify(path):
    """Whoever forges it well is believed, as one who forges a record is; verify compares it with the records."""
    forge(path, lambda lines: entry(lines, "s-2")[1].__setitem__(0, [5, 5]))
    (problem,) = verify(path)
    assert (problem.segment, problem.where) == (layout.ROLLUP, "entry s-2")
    forge(path, lambda lines: entry(lines, "s-2")[1].__setitem__(0, ["x", None]))
    with pytest.raises(CorruptStoreError, match=r"the roll-up gives .* the size 'x'"):
        open_store(path).segments[1].read("token_ids")


def test_what_unpacks_to_very_much_is_refused_before_it_does(path):
    before = said(path)
    packer = zlib.compressobj(wbits=31)
    bomb = b"".join(packer.compress(b" " * 2**20) for _ in range(20)) + packer.flush()
    with pytest.raises(CorruptStoreError, match="longer than records can be"):
        decode_rollup(bomb, DIGEST)
    (path / layout.ROLLUP).write_bytes(bomb)
    assert said(path) == before


# ---- other places, other versions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "name"), [("v1", "float32-prefix"), ("v2", "float32-grown")])
def test_stores_of_every_version_are_rolled_up(version, name, tmp_path):
    path = shutil.copytree(GOLDEN / version / name, tmp_path / "store")
    before = said(path)
    storage, fingerprint = open_storage(path), open_store(path).fingerprint
    write_rollup(storage, fingerprint)
    assert said(path) == before
    assert reads(path, lambda: open_store(path)) == [layout.ROOT]
    assert verify(path) == []


@pytest.mark.parametrize("tagged", [True, False])
def test_an_object_store_gives_tags_or_nothing_is_rolled_up(tagged):
    stores = pytest.importorskip("obstore.store", reason="obstore is not installed")
    place = ObjectStorage(stores.MemoryStore(), "memory")
    real = ObjectStorage.marks
    untagged = lambda self, folder: {name: (size, None) for name, (size, _) in real(self, folder).items()}  # noqa: E731
    with mock.patch.object(ObjectStorage, "marks", real if tagged else untagged):
        fill(place, ["s-0", "s-1", "s-2"])
        before = said(place)
        assert compact(place, max_bytes=1) == (3, 3)
        assert len(read_rollup(place, DIGEST)) == (3 if tagged else 0)
        assert said(place) == before
        place.remove("commits/s-1.json")
        StoreWriter(place, FINGERPRINT).append("s-1", SEGMENTS["s-1"])  # in another folder
        with_it = said(place)
        assert verify(place) == []
        place.remove(layout.ROLLUP)
        assert said(place) == with_it != before


# ---- writers of many segments --------------------------------------------------------------------------------------


def test_a_commit_looks_at_the_others_now_and_then(tmp_path):
    """Where there are many: or else a capture of n segments would list n records n times."""
    n, listed = 30, []
    real = LocalStorage.names

    def names(self: LocalStorage, folder: str) -> list[str]:
        found = real(self, folder)
        listed.extend(found if folder == layout.COMMITS else [])
        return found

    segment = make_segment(FINGERPRINT, [2], [(0, 1)])
    with mock.patch.object(writer, "_FEW", 5), mock.patch.object(writer, "_LOOKS", 4):
        mine = StoreWriter(tmp_path / "store", FINGERPRINT)
        with mock.patch.object(LocalStorage, "names", names):
            for i in range(n):
                mine.append(f"s-{i:02d}", segment)
        assert len(listed) < n * n / 2, "each look at all takes two lists, and there were two looks a commit"
        assert mine.is_committed("s-00")
        assert not mine.is_committed("s-99")
        assert reads(tmp_path, lambda: mine.committed) == [], "one's own records are known"
        StoreWriter(tmp_path / "store", FINGERPRINT).append("s-99", segment)
        assert mine.is_committed("s-99")
        assert mine.committed == {f"s-{i:02d}" for i in [*range(n), 99]}


def test_other_prompts_in_a_large_store_are_noticed_in_the_end(tmp_path):
    fingerprint = make_fingerprint(prompts="p", n_prompts=9)
    names = [f"s-{i}" for i in range(9)]
    ours, others = ({name: digest_of([name, of]) for name in names} for of in ("ours", "others"))
    segment = make_segment(fingerprint, [2], [(0, 1)])
    with mock.patch.object(writer, "_FEW", 2), mock.patch.object(writer, "_LOOKS", 1):
        mine = StoreWriter(tmp_path / "store", fingerprint, ours)
        foreign = StoreWriter(tmp_path / "store", fingerprint, others)
        for name in names[:4]:
            mine.append(name, segment)
        with mock.patch.object(StoreWriter, "check_prompts"):  # as one that looks as seldom
            foreign.append("s-8", segment)
        mine.append("s-4", segment)
        with pytest.raises(IncompatibleError, match="prompts of its segment s-8"):
            mine.check_prompts()


def test_records_are_read_as_one_by_one(path):
    expected = twin(open_storage(path))
    known: dict[str, Any] = {}
    assert {one["segment"]: dict(one) for one in read_records(open_storage(path), DIGEST, known)} == expected
    assert {name: dict(one) for name, one in known.items()} == expected
    record = expected["s-2"]
    (path / "commits/s-2.json").write_bytes(encode_record(record | {"raw_state_bytes": record["raw_state_bytes"] + 1}))
    assert read_records(open_storage(path), DIGEST, known) == list(known.values()), "a record never changes"
