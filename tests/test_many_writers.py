"""Many writers into one store, on a disk and on an S3 server: what one writer would have made, and no damage."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tiny
from forked import Process
from stores import FINGERPRINT, SEGMENTS, fill, make_segment, read_tree, write_store
from twins.store import Twin

from actcache.errors import AlreadyCommittedError, CorruptStoreError, IncompatibleError, InputError
from actcache.prompts import read_prompts
from actcache.store import (
    BackgroundWriter,
    Store,
    StoreWriter,
    commit_record,
    compact,
    layout,
    open_store,
    repair,
    verify,
)
from actcache.store.storage import open_storage

EVENTS = sum(segment.events.num_rows for segment in SEGMENTS.values())


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.slow)])
def place(request, tmp_path) -> str:
    if request.param == "disk":
        return str(tmp_path / "store")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def check(store: Store, segments: dict[str, Any] = SEGMENTS) -> None:
    """Bits and tables are those of the segments, one after another, whatever segments hold them now."""
    twin = Twin(FINGERPRINT, segments)
    n_events = sum(segment.events.num_rows for segment in segments.values())
    assert len(store) == n_events
    twin.check(store, [*reversed(range(n_events)), 0, 0])
    if not store.storage.is_far:  # the server of these tests takes longer over a file than a disk over all of them
        twin.check(store, [*range(n_events)])


def change(place: str, key: str, edit: Any) -> None:
    """Bypass the store: put other bytes in a file's place, or none."""
    storage = open_storage(place)
    (data,) = storage.read_ranges(key, [(0, 2**24)])
    storage.remove(key)
    if edit is not None:
        storage.put(key, edit(data))


# ---- one store, many places ----------------------------------------------------------------------------------------


def test_a_store_is_the_same_on_a_disk_and_on_s3(place, tmp_path):
    check(fill(place))
    assert verify(place) == []
    assert open_store(place).uncommitted == []
    on_disk = read_tree(write_store(tmp_path / "twin", FINGERPRINT, SEGMENTS))
    storage = open_storage(place)
    for segment in open_store(place).segments:
        for path, size in storage.sizes(segment.folder).items():
            (data,) = storage.read_ranges(f"{segment.folder}/{path}", [(0, size + 1)])
            assert data == on_disk[f"segments/{segment.name}/{path}"]
    assert storage.read("zarr.json") == on_disk["zarr.json"]


def test_a_segment_is_written_once(place):
    fill(place, ["s-0"])
    with pytest.raises(AlreadyCommittedError, match="'s-0' is committed already"):
        StoreWriter(place, FINGERPRINT).append("s-0", SEGMENTS["s-1"])
    with pytest.raises(IncompatibleError):
        StoreWriter(place, FINGERPRINT | {"seed": 1})
    check(open_store(place), {"s-0": SEGMENTS["s-0"]})


def test_of_writers_of_one_segment_one_wins(place):
    """All write at once; where nothing locks, all but one find out when they commit."""
    StoreWriter(place, FINGERPRINT)
    rivals = [make_segment(FINGERPRINT, [3], [(0, 2)], name=f"r{i}", seed=i) for i in range(4)]
    outcomes: list[int | None] = [None] * 4
    gate = threading.Barrier(4)

    def write(i: int) -> None:
        writer = StoreWriter(place, FINGERPRINT)
        gate.wait()
        try:
            writer.append("s", rivals[i])
            outcomes[i] = 1
        except AlreadyCommittedError:
            outcomes[i] = 0

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [0, 0, 0, 1]
    check(open_store(place), {"s": rivals[outcomes.index(1)]})
    assert (verify(place), open_store(place).uncommitted) == ([], [])


def test_what_a_dead_writer_left_is_reported_and_harmless(place):
    fill(place, ["s-0"])
    open_storage(place).put("segments/s-1.0abc/token_ids/zarr.json", b"half")
    store = open_store(place)
    assert store.uncommitted == ["segments/s-1.0abc"]
    check(fill(place, ["s-1"]), {name: SEGMENTS[name] for name in ("s-0", "s-1")})
    assert verify(place) == []


def test_damage_is_named_and_repaired(place):
    fill(place)
    storage = open_storage(place)
    folder = next(segment.folder for segment in open_store(place).segments if segment.name == "s-3")
    change(place, f"{folder}/states/pt/b001/c/0/0", lambda data: data[:5] + bytes([data[5] ^ 1]) + data[6:])
    change(place, "commits/s-5.json", lambda data: data[:-9] + b"x" + data[-8:])
    assert [(p.segment, p.where) for p in verify(place)] == [
        ("s-5", "commits/s-5.json"),
        ("s-3", "array states/pt/b001, chunk 0"),
    ]
    with pytest.raises(CorruptStoreError, match=r"commit record s-5\.json"):
        open_store(place)
    before = {key: storage.read(f"commits/{key}") for key in storage.names("commits")}
    assert {problem.segment for problem in repair(place)} == {"s-3", "s-5"}
    assert {key: storage.read(f"dropped/{key}") for key in storage.names("dropped")} == {
        "s-3.1.json": before["s-3.json"],
        "s-5.1.json": before["s-5.json"],
    }
    assert verify(place) == []
    check(open_store(place), {name: s for name, s in SEGMENTS.items() if name not in ("s-3", "s-5")})
    assert len(open_store(place).uncommitted) == 2
    check(fill(place, ["s-3", "s-5"]))
    assert repair(place) == []


def test_a_store_removed_meanwhile_is_a_named_error(place):
    writer = StoreWriter(place, FINGERPRINT)
    writer.append("s-0", SEGMENTS["s-0"])
    if "://" in place:
        pytest.skip("an object store has no folder to remove: what is written again is a store again")
    shutil.rmtree(place)
    with pytest.raises(FileNotFoundError, match="the store has been removed; give the command again"):
        writer.append("s-1", SEGMENTS["s-1"])
    check(fill(place))


def test_an_address_that_is_none_is_refused():
    with pytest.raises(InputError, match="not an address of an object store"):
        open_store("gopher://bucket/prefix")


# ---- compact -------------------------------------------------------------------------------------------------------


def test_compact_keeps_every_event_and_bit_under_its_number(place):
    old = fill(place)
    moved = ["segment", "sequence"]  # which counts within the segment
    expected = old.events.drop_columns(moved)
    untouched = open_store(place)  # has read nothing yet
    sizes = [segment.record["raw_state_bytes"] for segment in old.segments]
    assert compact(place, max_bytes=sum(sizes[:3])) == (7, 4)
    for store in (old, untouched, open_store(place)):
        check(store)
        assert store.events.drop_columns(moved).equals(expected)
        assert store.excluded.num_rows == 7
    assert (verify(place), open_store(place).uncommitted) == ([], [])
    assert compact(place) == (4, 1)
    check(old)
    (merged,) = open_store(place).segments
    assert (merged.name, merged.record["replaces"][0]) == ("s-0--s-6", "s-0")
    assert open_storage(place).names("commits") == ["s-0--s-6.json"]
    writer = StoreWriter(place, FINGERPRINT)
    assert writer.committed >= set(SEGMENTS)
    with pytest.raises(AlreadyCommittedError):
        writer.append("s-2", SEGMENTS["s-2"])
    assert compact(place) == (1, 1)


def test_a_reader_reads_on_while_segments_are_merged(place):
    store = fill(place)
    failures: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        rng = np.random.default_rng(0)
        twin = Twin(FINGERPRINT, SEGMENTS)
        try:
            while not stop.is_set():
                twin.check(store, rng.integers(0, EVENTS, 4).tolist())
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    compact(place, max_bytes=200)
    compact(place)
    stop.set()
    reader.join()
    assert failures == []
    check(store)


@pytest.mark.slow
def test_a_compaction_killed_at_any_step_loses_nothing(tmp_path):
    """Killed between its steps: readers see each event once, and the next one clears up."""
    path, whole = str(tmp_path / "store"), tmp_path / "whole"
    fill(str(whole))
    steps = 0
    for step in range(100):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        store = open_store(path)
        count = iter(range(1000))

        class Killed(BaseException):
            pass

        def counted(real: Any, step: int = step, count: Iterator[int] = count, killed: Any = Killed) -> Any:
            def call(self: Any, *args: Any) -> Any:
                if next(count) == step:
                    raise killed
                return real(self, *args)

            return call

        kind = type(store.storage)
        patches = {name: counted(getattr(kind, name)) for name in ("remove", "remove_files", "creating")}
        try:
            with mock.patch.multiple(kind, **patches):
                compact(path, max_bytes=sum(s.record["raw_state_bytes"] for s in store.segments) // 2)
        except Killed:
            steps += 1
        check(open_store(path))
        check(store)
        assert verify(path) == []
        compact(path)
        check(store)
        assert open_store(path).uncommitted == []
        if next(count) <= step:
            break
    assert steps > 10


@pytest.mark.slow
def test_two_compactions_do_not_meet(s3, tmp_path):
    place = f"{s3}/{tmp_path.name}"
    fill(place)
    storage = open_storage(place)
    with storage.exclusively("commits/.compaction"), pytest.raises(InputError, match="held by another process"):
        compact(place)
    assert compact(place) == (7, 1)


def test_parts_that_come_out_of_order_are_merged_until_one_is_left(place):
    """The names from first to last are those of an earlier merge, again and again."""
    for names in (["s-0", "s-6"], ["s-3"], ["s-1", "s-5"], ["s-2", "s-4"]):
        fill(place, names)
        assert compact(place)[1] == 1
    ids = open_store(place).events["event_id"].to_pylist()
    assert sorted(ids) == sorted(one for s in SEGMENTS.values() for one in s.events["event_id"].to_pylist())
    assert (verify(place), len(open_storage(place).names("commits"))) == ([], 1)
    assert open_store(place).uncommitted == []


def test_long_names_are_merged_too(tmp_path):
    path, names = str(tmp_path / "store"), [letter * layout.MAX_NAME for letter in "abc"]
    writer = StoreWriter(path, FINGERPRINT)
    for name, segment in zip(names, SEGMENTS.values(), strict=False):
        writer.append(name, segment)
        compact(path)
    check(open_store(path), dict(zip(names, SEGMENTS.values(), strict=False)))


@pytest.mark.parametrize("at", ["_check_files", "_check_chunks", "_check_content"])
def test_verify_beside_a_compaction_finds_nothing(at, tmp_path):
    path = str(tmp_path / "store")
    fill(path)
    module = sys.modules["actcache.store.verify"]
    real, begun = getattr(module, at), []

    def check_part(*args: Any) -> Any:
        if not begun:
            begun.append(compact(path))
        return real(*args)

    with mock.patch.object(module, at, check_part):
        assert verify(path) == []
    (shard,) = (tmp_path / "store").glob("segments/*/states/pt/b001/c/0/0")
    shard.unlink()
    with mock.patch.object(module, at, check_part):
        assert {problem.segment for problem in verify(path)} == {"s-0--s-6"}


def test_a_writer_goes_on_beside_a_compaction(tmp_path):
    """What a listing has may be gone before it is read."""
    path = str(tmp_path / "store")
    fill(path, ["s-0", "s-1"])
    writer, real, begun = StoreWriter(path, FINGERPRINT), type(open_storage(path)).read, []

    def read(self: Any, key: str) -> bytes:
        if not begun:
            begun.append(True)
            compact(path)
        return real(self, key)

    with mock.patch.object(type(open_storage(path)), "read", read):
        assert writer.committed >= {"s-0", "s-1"}
    writer.append("s-2", SEGMENTS["s-2"])
    check(open_store(path), {name: SEGMENTS[name] for name in ("s-0", "s-1", "s-2")})


def test_records_that_replace_the_same_segment_are_refused(tmp_path):
    path = tmp_path / "store"
    fill(str(path), ["s-0", "s-1", "s-2"])
    for name in ("s-1", "s-2"):
        file = path / layout.commit_key(name)
        record = layout.decode_json(file.read_bytes())
        del record["crc32c"]
        file.write_bytes(commit_record.encode_record(record | {"replaces": ["s-0"]}))
    with pytest.raises(CorruptStoreError, match="both replace 's-0'"):
        open_store(path)
    assert any("both replace" in problem.found for problem in verify(path))


# ---- writing beside other work -------------------------------------------------------------------------------------


def test_the_background_writes_the_same_store(tmp_path):
    done: list[str] = []
    with BackgroundWriter(StoreWriter(tmp_path / "a", FINGERPRINT), on_committed=done.append) as writer:
        for name, segment in SEGMENTS.items():
            writer.append(name, segment)
    assert sorted(done) == [*SEGMENTS]
    assert read_tree(tmp_path / "a") == read_tree(write_store(tmp_path / "b", FINGERPRINT, SEGMENTS))


def hand_over(store_writer: StoreWriter, handed: list[str]) -> None:
    """Every segment in turn; ``handed`` says how far it has come."""
    with BackgroundWriter(store_writer) as writer:
        for name, segment in SEGMENTS.items():
            writer.append(name, segment)
            handed.append(name)


@pytest.mark.slow
def test_a_slow_disk_holds_the_computation_back(tmp_path):
    """At most two segments are being written."""
    store_writer = StoreWriter(tmp_path / "a", FINGERPRINT)
    gate = threading.Semaphore(0)
    append = store_writer.append

    def slow(name: str, segment: Any) -> None:
        gate.acquire()
        append(name, segment)

    handed: list[str] = []

    with mock.patch.object(store_writer, "append", slow):
        thread = threading.Thread(target=hand_over, args=(store_writer, handed))
        thread.start()
        for n_written in range(5):
            deadline = time.monotonic() + 60
            while len(handed) < n_written + 2 and time.monotonic() < deadline:
                time.sleep(0.005)
            thread.join(0.05)  # time for one more, were there room
            assert len(handed) == n_written + 2
            gate.release()
        for _ in SEGMENTS:
            gate.release()
        thread.join()
    check(open_store(tmp_path / "a"))


def test_a_failed_write_stops_the_run(tmp_path):
    store_writer = StoreWriter(tmp_path / "a", FINGERPRINT)
    append = store_writer.append

    def failing(name: str, segment: Any) -> None:
        if name == "s-1":
            raise OSError(28, "No space left on device")
        append(name, segment)

    handed: list[str] = []

    with mock.patch.object(store_writer, "append", failing), pytest.raises(OSError, match="No space left"):
        hand_over(store_writer, handed)
    assert len(handed) < len(SEGMENTS)
    check(open_store(tmp_path / "a"), {"s-0": SEGMENTS["s-0"]})


def test_a_failed_last_write_is_not_lost(tmp_path):
    store_writer = StoreWriter(tmp_path / "a", FINGERPRINT)
    with (
        mock.patch.object(store_writer, "append", side_effect=OSError(5, "Input/output error")),
        pytest.raises(OSError, match="Input/output error"),
        BackgroundWriter(store_writer) as writer,
    ):
        writer.append("s-0", SEGMENTS["s-0"])


def test_what_has_begun_is_finished_when_the_run_is_interrupted(tmp_path):
    def interrupted() -> None:
        with BackgroundWriter(StoreWriter(tmp_path / "a", FINGERPRINT)) as writer:
            writer.append("s-0", SEGMENTS["s-0"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    check(open_store(tmp_path / "a"), {"s-0": SEGMENTS["s-0"]})


# ---- captures side by side -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    pt, it = tiny.make_pair(folder, "llama")
    return pt, it, tiny.write_prompts(folder / "prompts.jsonl", 16)


def capture(pair: tuple[Path, Path, Path], out: Path, *more: str) -> subprocess.Popen[str]:
    given = ["--pt", str(pair[0]), "--it", str(pair[1]), "--prompts", str(pair[2]), "--out", str(out)]
    given += ["--shard-prompts", "2", "--max-new", "8", *more]
    return Process([sys.executable, "-m", "actcache.cli", "capture", *given], stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["disk", "s3"])
def test_four_processes_capture_what_one_does(where, pair, request, tmp_path):
    store = ["--store", f"{request.getfixturevalue('s3')}/{tmp_path.name}"] if where == "s3" else []
    outs = [tmp_path / "run"] * 4 if where == "disk" else [tmp_path / f"machine-{i}" for i in range(4)]
    processes = [capture(pair, out, *store, "--part", f"{i + 1}/4") for i, out in enumerate(outs)]
    for process in processes:
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert capture(pair, tmp_path / "alone").wait() == 0
    alone = open_store(tmp_path / "alone/store")
    many = open_store(store[1] if store else tmp_path / "run/store")
    assert len(many.segments) == 8
    assert many.events.equals(alone.events)
    assert many.excluded.equals(alone.excluded)
    assert len(read_prompts(pair[2])) == len(many) + many.excluded.num_rows
    for label in many.checkpoints:
        for boundary in many.boundaries:
            rows, offsets = many.states(label, boundary)
            expected, expected_offsets = alone.states(label, boundary)
            assert rows.equal(expected)
            assert offsets.equal(expected_offsets)
    assert verify(many.path) == []
