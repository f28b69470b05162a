"""A store on an object store that loses answers, conflicts, is late, cuts short: whole or not there, never half."""

from __future__ import annotations

import http.server
import itertools
import socket
import threading
from collections.abc import Iterator
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest
from stores import make_fingerprint, make_segment
from twins.store import Twin

from actcache.errors import AlreadyCommittedError, CorruptStoreError, InputError
from actcache.store import BackgroundWriter, StoreWriter, compact, open_store, repair, verify
from actcache.store.storage import LocalStorage, open_storage

pytest.importorskip("obstore")

from obstore.store import S3Store

from actcache.store.objects import _CREDENTIALS, ObjectStorage
from actcache.store.patience import Patience
from actcache.testing import KINDS, Clock, Faults, SimulatedObjects

FINGERPRINT = make_fingerprint(checkpoints={"pt": {}, "it": {}}, boundaries=[1])
SEGMENTS = {f"s-{i}": make_segment(FINGERPRINT, [4, 2 + i], [(0, 3), (1, i)], name=f"e{i}", seed=i) for i in range(3)}
LOCK = "commits/.compaction"


def storage_over(objects: Any) -> ObjectStorage:
    """With pauses on a simulated clock."""
    storage = open_storage(objects)
    assert isinstance(storage, ObjectStorage)
    clock = objects.clock if isinstance(objects, SimulatedObjects) else Clock()
    storage.patience = Patience(now=clock.now, sleep=clock.sleep)
    return storage


ALWAYS = 50  # tries, more than patience has


def fill(storage: ObjectStorage, names: list[str] | None = None) -> None:
    writer = StoreWriter(storage, FINGERPRINT)
    for name in SEGMENTS if names is None else names:
        writer.append(name, SEGMENTS[name])


def check(objects: SimulatedObjects, names: list[str] | None = None) -> None:
    """What is in memory, read without faults, is these segments and nothing half."""
    store = open_store(storage_over(SimulatedObjects(inner=objects.inner)))
    segments = {name: SEGMENTS[name] for name in (SEGMENTS if names is None else names)}
    Twin(FINGERPRINT, segments).check(store, [*range(len(store))])
    assert len(store) == 2 * len(segments)
    assert verify(store.storage) == []


# ---- what one writer alone may create --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["zarr.json", "commits/s-1.json", LOCK, "commits/s-0--s-2.json"])
@pytest.mark.parametrize("fault", KINDS)
def test_what_has_no_answer_is_asked_for_again(fault, key):
    """The root, a record, the lock and a compaction's record: each twice in a row."""
    objects = SimulatedObjects(Faults(planned={("put", key): [fault] * 2}))
    storage = storage_over(objects)
    fill(storage)
    assert compact(storage) == (3, 1)
    assert objects.faults.met == {fault: 1 if fault in ("lost", "twice") else 2}
    objects.land()
    check(objects)
    assert open_store(storage).uncommitted == []


def test_a_commit_without_an_answer_keeps_its_files():
    """It lands when its writer has given up: the segment is whole."""
    late = Faults(planned={("put", "commits/s-1.json"): ["late", *["failed"] * ALWAYS]})
    objects = SimulatedObjects(late, late_calls=10**6)
    storage = storage_over(objects)
    fill(storage, ["s-0"])
    with pytest.raises(OSError, match=r"timed out; it may still appear; given up after \d+ tries in \d+ s"):
        fill(storage, ["s-1"])
    check(objects, ["s-0"])
    assert [name[:13] for name in open_store(storage).uncommitted] == ["segments/s-1."]
    objects.land()
    check(objects, ["s-0", "s-1"])
    with pytest.raises(AlreadyCommittedError):
        fill(storage, ["s-1"])


def test_a_commit_that_lands_behind_a_rival_s_changes_nothing():
    late = Faults(planned={("put", "commits/s-1.json"): ["late", *["failed"] * ALWAYS]})
    objects = SimulatedObjects(late, late_calls=10**6)
    storage = storage_over(objects)
    with pytest.raises(OSError, match="may still appear"):
        fill(storage, ["s-1"])
    late.planned.clear()
    fill(storage)
    compact(storage)  # the rival's record is gone, and the late one's condition holds
    objects.land()
    check(objects)
    compact(storage)
    check(objects)
    assert open_store(storage).uncommitted == []


@pytest.mark.parametrize("fault", ["lost", "failed", "late", "torn"])
@pytest.mark.parametrize("n_times", [3, ALWAYS])
def test_a_file_without_an_answer_is_put_again_and_ends_the_segment_at_last(n_times, fault):
    objects = SimulatedObjects(Faults(planned={("put", "/states/pt/b001/c/0/0"): [fault] * n_times}))
    storage = storage_over(objects)
    if n_times == ALWAYS:
        with pytest.raises(OSError, match=r"timed out; given up after \d+ tries in \d+ s: .*/states/pt/b001/c/0/0"):
            fill(storage)
        objects.faults.planned.clear()
    fill(storage)
    objects.land()
    check(objects)


def test_a_conflict_on_a_file_is_no_committed_segment():
    """One who takes it for "committed already" leaves the segment out and says nothing."""
    keys = ("/states/pt/b001/c/0/0", "segments/zarr.json")
    objects = SimulatedObjects(Faults(planned={("put", key): ["conflict"] for key in keys}))
    with BackgroundWriter(StoreWriter(storage_over(objects), FINGERPRINT)) as writer:
        for name, segment in SEGMENTS.items():
            writer.append(name, segment)
    assert objects.faults.met == {"conflict": 2}
    check(objects)


class Overtaken(SimulatedObjects):
    """A rival commits a segment just before it is committed here."""

    def put(self, path: str, file: bytes, **options: Any) -> Any:
        if path == "commits/s-1.json":
            fill(storage_over(SimulatedObjects(inner=self.inner)), ["s-1"])
        return super().put(path, file, **options)


def test_what_a_loser_cannot_clear_stays_and_is_listed():
    objects = Overtaken(Faults(planned={("list", "segments/s-1.*"): ["failed"] * ALWAYS}))
    storage = storage_over(objects)
    with pytest.raises(AlreadyCommittedError, match="by another writer meanwhile"):
        fill(storage, ["s-1"])
    assert objects.faults.met["failed"] > 3
    objects.faults.planned.clear()
    check(objects, ["s-1"])
    assert len(open_store(storage).uncommitted) == 1


# ---- the lock of a compaction ----------------------------------------------------------------------------------------


def test_a_lock_says_whose_and_since_when():
    objects = SimulatedObjects()
    storage = storage_over(objects)
    fill(storage)
    held = r"commits/\.compaction is held by another process \(\d+ on .* since 20..-.*\); wait for it, or delete"
    with storage.exclusively(LOCK), pytest.raises(InputError, match=held):
        compact(storage)
    assert compact(storage) == (3, 1)
    assert LOCK not in objects.there()


@pytest.mark.parametrize(
    ("call", "fault"), [("delete", "lost"), ("delete", "failed"), ("get", "failed"), ("get", "busy")]
)
def test_a_lock_is_given_back_whatever_answers_are_lost(call, fault):
    objects = SimulatedObjects(Faults(planned={(call, LOCK): [fault] * 3}))
    storage = storage_over(objects)
    fill(storage)
    with storage.exclusively(LOCK):
        assert LOCK in objects.there()
    assert LOCK not in objects.there()
    assert objects.faults.met[fault] == (1 if fault == "lost" else 3)


def test_a_lock_that_another_has_taken_is_not_given_back():
    objects = SimulatedObjects()
    storage = storage_over(objects)
    with storage.exclusively(LOCK):
        storage.remove(LOCK)  # by a person, who took its holder for dead
        storage.put(LOCK, b"another's")
    assert storage.read(LOCK) == b"another's"
    with storage.exclusively("other"):
        storage.remove("other")


def test_a_lock_whose_holder_is_interrupted_as_it_takes_it_is_given_back():
    objects = SimulatedObjects()
    storage = storage_over(objects)

    class Interrupted(SimulatedObjects):
        def put(self, path: str, file: bytes, **options: Any) -> Any:
            super().put(path, file, **options)
            raise KeyboardInterrupt

    storage.objects = Interrupted(inner=objects.inner)
    with pytest.raises(KeyboardInterrupt), storage.exclusively(LOCK):
        pass
    assert objects.there() == []


# ---- a server that does not keep the promise -------------------------------------------------------------------------


class Refusing(SimulatedObjects):
    """A server, or settings of a client, without conditional puts."""

    def put(self, path: str, file: bytes, **options: Any) -> Any:
        if options.get("mode") == "create":
            raise NotImplementedError("put with mode Create is not implemented")
        return super().put(path, file, **options)


@pytest.mark.parametrize(
    ("objects", "why"),
    [
        (SimulatedObjects(broken={"conditions"}), "ignores the condition of a put"),
        (Refusing(), r"creates nothing on condition that it is not there \(put with mode Create is not implemented"),
        (SimulatedObjects(broken={"listings"}), "does not list what was just put"),
        (SimulatedObjects(broken={"listings"}, lists_late=1), "lists what was just deleted"),
    ],
    ids=["ignores", "refuses", "lists late", "lists the deleted"],
)
def test_an_unfit_server_is_found_out_when_a_store_is_created(objects, why):
    if objects.lists_late == 1:  # up to date, but for what is deleted
        objects._listed = lambda prefix: [one for _, entries in objects._history for one in entries]
    with pytest.raises(InputError, match=rf"MemoryObjects: this server {why}.*; give a local folder, or a server with"):
        StoreWriter(_named(objects), FINGERPRINT)
    assert objects.there() == []


def _named(objects: SimulatedObjects) -> ObjectStorage:
    storage = storage_over(objects)
    storage.where = "MemoryObjects"
    return storage


def test_a_server_without_faults_is_not_found_out():
    storage = storage_over(objects := SimulatedObjects())
    StoreWriter(storage, FINGERPRINT)
    assert objects.there() == ["segments/zarr.json", "zarr.json"]
    assert storage.describe_drafts() == []
    storage.put(LOCK, b"1 on a machine")
    assert open_store(storage).uncommitted == [LOCK]


# ---- objects cut short -----------------------------------------------------------------------------------------------


def test_ranges_past_the_end_come_back_short(tmp_path):
    """Of every size, as on a disk: obstore gives an error, and for neighbours that it merges a panic."""
    far, near = storage_over(SimulatedObjects()), LocalStorage(tmp_path)
    asked = [(0, 3), (3, 4), (5, 9), (12, 4), (16, 1), (40, 2), (2**21, 5), (0, 3)]
    for size in range(20):
        for storage in (far, near):
            storage.put("file", bytes(range(size)))
        for n in range(1, len(asked) + 1):
            for ranges in itertools.islice(itertools.permutations(asked, n), 20):
                assert far.read_ranges("file", ranges) == near.read_ranges("file", ranges)
    with pytest.raises(FileNotFoundError):
        far.read_ranges("nothing", asked)


@pytest.mark.parametrize("end", ["states/pt/b001/c/0/0", "states/pt/b001/zarr.json", "commits/s-1.json"])
def test_an_object_cut_short_is_named_and_repaired(end):
    for keep in (0.0, 0.9):
        storage = storage_over(objects := SimulatedObjects())
        fill(storage)
        key = next(key for key in objects.there() if key.endswith(end) and "s-1" in key)
        data = storage.read(key)
        storage.put(key, data[: int(keep * len(data))])
        with pytest.raises(CorruptStoreError, match="s-1"):
            open_store(storage).states("pt", 1)
        assert {problem.segment for problem in verify(storage)} == {"s-1"}
        assert {problem.segment for problem in repair(storage)} == {"s-1"}
        check(objects, ["s-0", "s-2"])
        fill(storage, ["s-1"])
        check(objects)


# ---- over HTTP -------------------------------------------------------------------------------------------------------


class FaultyServer(http.server.BaseHTTPRequestHandler):
    """What S3 does with single objects, and the faults that the next puts are to meet."""

    protocol_version = "HTTP/1.1"
    held: dict[str, bytes]
    faults: list[str]

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        fault = self.faults.pop(0) if self.faults else None
        if fault == "conflict":
            return self._answer(409)
        if self.headers["If-None-Match"] and self.path in self.held:
            return self._answer(412)
        if fault != "failed":
            self.held[self.path] = data
        if fault == "cut off":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        return self._answer(500 if fault in ("lost", "failed") else 200)

    def do_GET(self) -> None:
        data = self.held.get(self.path)
        if data is None:
            return self._answer(404)
        if "Range" not in self.headers:
            return self._answer(200, data)
        first, last = (int(n) for n in self.headers["Range"].removeprefix("bytes=").split("-"))
        if first >= len(data):
            return self._answer(416)
        part = data[first : last + 1]
        return self._answer(206, part, f"bytes {first}-{first + len(part) - 1}/{len(data)}")

    do_HEAD = do_GET

    def _answer(self, code: int, data: bytes = b"", content_range: str | None = None) -> None:
        self.send_response(code)
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.send_header("Content-Length", str(len(data)))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served() -> Iterator[tuple[ObjectStorage, type[FaultyServer]]]:
    """Storage on a server on loopback, whose client sends nothing twice of its own accord."""
    handler = type("Handler", (FaultyServer,), {"held": {}, "faults": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    objects = S3Store(
        "bucket",
        endpoint=f"http://127.0.0.1:{server.server_port}",
        access_key_id="id",
        secret_access_key="secret",
        region="us-east-1",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    yield storage_over(objects), handler
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("fault", ["lost", "failed", "conflict", "cut off"])
def test_a_put_that_meets_a_fault_over_http(fault, served):
    storage, handler = served
    handler.faults += [fault] * 2
    with storage.creating("key") as publish:
        publish(b"mine")
    assert storage.read("key") == b"mine"
    handler.faults[:] = [fault] * 2
    with pytest.raises(FileExistsError), storage.creating("key") as publish:
        publish(b"another's")
    assert storage.read("key") == b"mine"
    handler.faults[:] = ["failed"] * ALWAYS
    with (
        pytest.raises(OSError, match=r"500 Internal Server Error.*may still appear"),
        storage.creating("other") as publish,
    ):
        publish(b"mine")
    handler.faults[:] = [fault]
    storage.put("key", b"in its place")
    assert storage.read("key") == b"in its place"


def test_ranges_past_the_end_over_http(served):
    storage, _ = served
    storage.put("key", b"0123456789")
    for ranges in ([(0, 4), (4, 9)], [(2, 3), (20, 5)], [(10, 1)], [(2**21, 1), (3, 2)]):
        expected = [b"0123456789"[offset : offset + length] for offset, length in ranges]
        assert storage.read_ranges("key", ranges) == expected
    assert storage.size("key") == 10
    assert storage.size("nothing") is None


class Listener(http.server.BaseHTTPRequestHandler):
    """Has nothing, and keeps what was asked for: it stands as S3, and as the proxy to every address."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(urlsplit(self.path).path)
        self.send_error(404)

    do_PUT = do_HEAD = do_POST = do_CONNECT = do_GET

    def log_message(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize("given", [False, True])
def test_nobody_is_asked_for_credentials_that_were_not_given(given, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in (*_CREDENTIALS["s3"], "AWS_SECRET_ACCESS_KEY", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    settings = {"AWS_ENDPOINT_URL": address, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
    settings |= {"HTTP_PROXY": address, "http_proxy": address}
    settings |= {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"} if given else {}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    Listener.asked.clear()
    try:
        with pytest.raises(FileNotFoundError):
            open_storage("s3://bucket/x").read("zarr.json")
    finally:
        server.shutdown()
        server.server_close()
    assert Listener.asked == ["/bucket/x/zarr.json"]
