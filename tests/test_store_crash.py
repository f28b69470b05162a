"""Writers that die, collide or run out of disk: what was committed stays, what was not is gone or taken up again.

The writers here are processes of their own (forked, so that each is there in milliseconds), killed by SIGKILL at every
single act upon the disk. SIGKILL loses nothing that the kernel has: only the order of fsyncs matters here, and one test
looks at that.
"""

from __future__ import annotations

import builtins
import errno
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import forked
import pytest
from stores import make_fingerprint, make_segment, read_tree, write_store
from twins.store import Twin

from actcache import files
from actcache.errors import IncompatibleError, InputError
from actcache.files import sole_creator, write_atomically
from actcache.store import StoreWriter, open_store, storage, verify

pytestmark = pytest.mark.slow

FINGERPRINT = make_fingerprint(checkpoints={"pt": {}, "it": {}}, boundaries=[1])
SEGMENTS = {
    "a": make_segment(FINGERPRINT, [5, 2], [(0, 4), (1, 1)], name="a", seed=1),
    "b": make_segment(FINGERPRINT, [3, 4], [(1, 2)], name="b", seed=2),
}
OTHER_B = make_segment(FINGERPRINT, [6], [(0, 5)], name="other", seed=3)

DONE, REFUSED, INCOMPATIBLE, FULL, BROKEN = 0, 3, 4, 5, 6
ACTS = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")


def start(act: Callable[[], Any]) -> int:
    """Run ``act`` in a process of its own; the process id."""
    pid = os.fork()
    if pid:
        return pid
    code = BROKEN
    try:
        act()
        code = DONE
    except InputError:
        code = REFUSED
    except IncompatibleError:
        code = INCOMPATIBLE
    except OSError as error:
        code = FULL if error.errno in (errno.ENOSPC, errno.EFBIG) else BROKEN
    finally:
        if code == BROKEN:
            traceback.print_exc()
        os._exit(code)


def end(pid: int) -> int:
    """Wait for a process: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextmanager
def acting_at(step: int, act: Callable[[], None], *, acts: tuple[str, ...] = ACTS) -> Iterator[Iterator[int]]:
    """Call ``act`` instead of the ``step``-th thing done to the disk; a write is done by half first."""
    count = itertools.count()
    lock = threading.Lock()

    def take(half: Callable[[], Any] = lambda: None) -> None:
        with lock:
            if next(count) == step:
                half()
                act()

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            take()
            return real(*args, **options)

        return call

    class Stream:
        """A file whose every write is a step, and on disk when it returns."""

        def __init__(self, path: Path, mode: str) -> None:
            self.stream = builtins.open(path, mode, buffering=0)  # noqa: SIM115
            self.flush, self.fileno = self.stream.flush, self.stream.fileno

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *_: object) -> None:
            self.stream.close()

        def write(self, data: Any) -> int:
            take(lambda: self.stream.write(memoryview(data)[: len(data) // 2]))
            assert self.stream.write(data) == len(data)
            return len(data)

    with mock.patch.multiple(os, **{name: counted(getattr(os, name)) for name in acts}), opening_by(Stream):
        yield count


@contextmanager
def opening_by(opener: Callable[..., Any]) -> Iterator[None]:
    """Files that the store writes are opened by ``opener(path, mode)``."""
    with (
        mock.patch.object(files, "open", opener, create=True),
        mock.patch.object(storage, "open", opener, create=True),
    ):
        yield


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def uninterrupted(tmp_path) -> dict[str, bytes]:
    return read_tree(write_store(tmp_path / "uninterrupted", FINGERPRINT, SEGMENTS))


def append_missing(path: Path) -> None:
    """What a resumed run does."""
    store_writer = StoreWriter(path, FINGERPRINT)
    for name, segment in SEGMENTS.items():
        if name not in store_writer.committed:
            store_writer.append(name, segment)


# ---- killed --------------------------------------------------------------------------------------------------------


def test_a_writer_killed_anywhere_loses_only_its_open_segment(tmp_path):
    """All in a process without what other tests left in memory: each of hundreds of forks copies a map of it."""
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_store_crash as t; t.kill_anywhere({str(tmp_path)!r})"
    ran = forked.run([sys.executable, "-c", code])
    assert ran.returncode == 0, ran.stderr


@mock.patch.object(os, "fsync", return_value=None)  # as conftest.py does
def kill_anywhere(folder: str, _: mock.Mock) -> None:
    uninterrupted = read_tree(write_store(Path(folder, "uninterrupted"), FINGERPRINT, SEGMENTS))
    path = write_store(Path(folder, "store"), FINGERPRINT, {"a": SEGMENTS["a"]})
    store_writer = StoreWriter(path, FINGERPRINT)
    committed_before = read_tree(path)
    left: set[str] = set()
    for step in itertools.count():

        def append_b(step: int = step) -> None:
            with acting_at(step, kill_self):
                store_writer.append("b", SEGMENTS["b"])

        if end(start(append_b)) == DONE:
            break
        found = read_tree(path)
        assert found.items() >= committed_before.items()
        store = open_store(path)
        if len(store.segments) == 2:
            assert found == uninterrupted
        else:
            names = {name for name in found if name not in committed_before}
            assert all(name.startswith(tuple(store.uncommitted)) for name in names)
            left.update(store.uncommitted)
        if step % 8 == 0 or step > 500:  # all the steps of the commit
            append_missing(path)
            assert read_tree(path) == uninterrupted
            assert open_store(path).uncommitted == []
        remove_b(path)
    assert step > 200
    assert left == {"segments/b", "commits/.b.json.tmp"}


def remove_b(path: Path) -> None:
    shutil.rmtree(path / "segments/b", ignore_errors=True)
    for name in ("b.json", ".b.json.tmp"):
        (path / "commits" / name).unlink(missing_ok=True)


def test_a_writer_killed_over_what_another_left(tmp_path, uninterrupted):
    """Each begins on the leftovers of the one before and dies one step later."""
    path = write_store(tmp_path / "store", FINGERPRINT, {"a": SEGMENTS["a"]})
    store_writer = StoreWriter(path, FINGERPRINT)
    for step in itertools.count(0, 11):

        def append_b(step: int = step) -> None:
            with acting_at(step, kill_self):
                store_writer.append("b", SEGMENTS["b"])

        done = end(start(append_b)) == DONE
        n_events = len(open_store(path))
        if done or n_events == 3:  # it died between its commit and its end
            break
        assert n_events == 2
    assert step > 150
    assert read_tree(path) == uninterrupted


def test_a_store_killed_while_it_is_made(tmp_path, uninterrupted):
    for step in itertools.count():
        path = tmp_path / f"store-{step}"

        def make(step: int = step, path: Path = path) -> None:
            with acting_at(step, kill_self):
                StoreWriter(path, FINGERPRINT)

        status = end(start(make))
        append_missing(path)
        assert read_tree(path) == uninterrupted
        if status == DONE:
            break
    assert step >= 8


def test_an_interrupt_just_after_the_commit_leaves_the_segment(tmp_path):
    """Ctrl-C between the rename and the end of append: the segment is committed, so its files must stay."""
    path = write_store(tmp_path / "store", FINGERPRINT, {"a": SEGMENTS["a"]})

    def rename_and_stop(source: Path, target: Path) -> None:
        os.replace(source, target)
        raise KeyboardInterrupt

    with mock.patch.object(os, "rename", rename_and_stop), pytest.raises(KeyboardInterrupt):
        StoreWriter(path, FINGERPRINT).append("b", SEGMENTS["b"])
    Twin(FINGERPRINT, SEGMENTS).check(open_store(path), range(3))
    assert (verify(path), open_store(path).uncommitted) == ([], [])


def test_nothing_is_named_before_it_is_durable(tmp_path):
    """At the rename of a record, all that it names, and the way there, has been through fsync since it changed."""
    path = tmp_path / "store"
    changed: dict[int, str] = {}
    at_rename: list[list[str]] = []

    def note(path: Path) -> None:
        changed[path.stat().st_ino] = str(path)

    def fsync(handle: int) -> None:
        changed.pop(os.fstat(handle).st_ino, None)

    def mkdir(target: Path, *args: Any, real: Callable[..., Any] = os.mkdir) -> None:
        real(target, *args)
        note(Path(target).parent)

    def rename(source: Path, target: Path) -> None:
        at_rename.append(sorted(name for name in changed.values() if name != str(target.parent)))
        os.replace(source, target)
        note(target.parent)

    def opened(target: Path | int, mode: str) -> Any:
        stream = builtins.open(target, mode)  # noqa: SIM115
        path = Path(os.readlink(f"/proc/self/fd/{stream.fileno()}"))
        note(path)
        note(path.parent)
        return stream

    with mock.patch.multiple(os, fsync=fsync, mkdir=mkdir, rename=rename), opening_by(opened):
        append_missing(path)
    assert at_rename == [[], [], []]  # of the root and of two commit records
    assert changed == {}, "each rename itself is durable when append returns"


# ---- a disk that refuses -------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing_half_written(tmp_path, uninterrupted):
    path = write_store(tmp_path / "store", FINGERPRINT, {"a": SEGMENTS["a"]})
    before = read_tree(path)
    store_writer = StoreWriter(path, FINGERPRINT)

    def refuse() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    n_refused = 0
    for step in itertools.count():
        with acting_at(step, refuse, acts=("mkdir", "fsync", "rename")) as count:
            try:
                store_writer.append("b", SEGMENTS["b"])
            except OSError as error:
                n_refused += error.errno == errno.ENOSPC
        found = read_tree(path)
        if (path / "commits/b.json").exists():  # a folder was there already, or only the last fsync said no
            assert found == uninterrupted
            remove_b(path)
        else:
            assert found == before
            assert open_store(path).uncommitted == []
        if next(count) <= step:
            break
    assert n_refused > 150


def test_a_limit_on_file_size_stops_a_write_midway(tmp_path):
    """A refusal by the kernel itself: the largest file of a segment does not fit."""
    big = make_segment(FINGERPRINT, [50_000], [(0, 5)], name="big")
    path = write_store(tmp_path / "store", FINGERPRINT, SEGMENTS)
    before = read_tree(path)

    def append() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        StoreWriter(path, FINGERPRINT).append("big", big)

    assert end(start(append)) == FULL
    assert read_tree(path) == before
    StoreWriter(path, FINGERPRINT).append("big", big)
    Twin(FINGERPRINT, SEGMENTS | {"big": big}).check(open_store(path), range(4))


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of two MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only a privileged user may mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    """Segments until one does not fit: that one is gone without a trace, and fits once there is room."""
    path = small_disk / "store"
    store_writer = StoreWriter(path, FINGERPRINT)
    fitted: dict[str, Any] = {}
    name, segment = "", SEGMENTS["a"]
    with pytest.raises(OSError, match="No space left") as caught:  # noqa: PT012
        for i in range(1000):
            name, segment = f"s-{i:03d}", make_segment(FINGERPRINT, [2000], [(0, 5)], name=f"e{i}", seed=i)
            store_writer.append(name, segment)
            fitted[name] = segment
    assert caught.value.errno == errno.ENOSPC
    assert len(fitted) > 2
    assert (verify(path), open_store(path).uncommitted) == ([], [])
    Twin(FINGERPRINT, fitted).check(open_store(path), range(len(fitted)))
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    store_writer.append(name, segment)
    fitted[name] = segment
    Twin(FINGERPRINT, fitted).check(open_store(path), range(len(fitted)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_store_can_be_read(tmp_path):
    path = write_store(tmp_path / "store", FINGERPRINT, {"a": SEGMENTS["a"]})
    folders = [path, *(entry for entry in path.rglob("*") if entry.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        Twin(FINGERPRINT, {"a": SEGMENTS["a"]}).check(open_store(path), range(2))
        assert verify(path) == []
        with pytest.raises(PermissionError):
            StoreWriter(path, FINGERPRINT).append("b", SEGMENTS["b"])
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_a_result_file_is_the_old_whole_or_the_new_whole(tmp_path):
    target = tmp_path / "effects.json"
    write_atomically(target, b"old" * 100)
    for step in itertools.count():

        def write(step: int = step) -> None:
            with acting_at(step, kill_self):
                write_atomically(target, b"new" * 200)

        if end(start(write)) == DONE:
            break
        assert target.read_bytes() in (b"old" * 100, b"new" * 200)
        target.write_bytes(b"old" * 100)
    assert target.read_bytes() == b"new" * 200
    assert step == 4
    (tmp_path / "ordinary").touch()
    assert target.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


# ---- several writers -----------------------------------------------------------------------------------------------


def start_together(acts: list[Callable[[], Any]]) -> list[int]:
    """Run each in a process of its own, all let go at once; exit codes."""
    gate_out, gate_in = os.pipe()

    def when_let_go(act: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            os.close(gate_in)
            os.read(gate_out, 1)
            return act()

        return run

    pids = [start(when_let_go(act)) for act in acts]
    os.close(gate_in)
    codes = [end(pid) for pid in pids]
    os.close(gate_out)
    return codes


def test_of_two_writers_of_one_segment_one_wins(tmp_path):
    winners = set()
    for turn in range(20):
        path = write_store(tmp_path / f"store-{turn}", FINGERPRINT, {"a": SEGMENTS["a"]})
        rivals = {"first": SEGMENTS["b"], "second": OTHER_B}
        codes = start_together(
            [lambda b=b, path=path: StoreWriter(path, FINGERPRINT).append("b", b) for b in rivals.values()]
        )
        assert sorted(codes) == [DONE, REFUSED]
        winner = rivals[list(rivals)[codes.index(DONE)]]
        winners.add(codes.index(DONE))
        store = open_store(path)
        Twin(FINGERPRINT, {"a": SEGMENTS["a"], "b": winner}).check(store, range(len(store)))
        assert (verify(path), store.uncommitted) == ([], [])


def test_a_writer_waits_for_a_living_one_and_takes_over_from_a_dead_one(tmp_path, uninterrupted):
    path = write_store(tmp_path / "store", FINGERPRINT, {"a": SEGMENTS["a"]})
    told_out, told_in = os.pipe()

    def hold() -> None:
        with sole_creator(path / "commits/b.json"):
            os.write(told_in, b".")
            signal.pause()

    holder = start(hold)
    os.read(told_out, 1)
    waiter = start(lambda: StoreWriter(path, FINGERPRINT).append("b", SEGMENTS["b"]))
    assert open_store(path).uncommitted == ["commits/.b.json.tmp"]
    threading.Event().wait(0.3)
    assert os.waitpid(waiter, os.WNOHANG) == (0, 0)
    os.kill(holder, signal.SIGKILL)
    assert (end(holder), end(waiter)) == (-signal.SIGKILL, DONE)
    assert read_tree(path) == uninterrupted


def test_writers_of_many_segments_and_a_reader_among_them(tmp_path):
    """What a reader sees at any moment is whole segments, and right."""
    path = tmp_path / "store"
    segments = {f"s-{i}": make_segment(FINGERPRINT, [4], [(0, 3)], name=f"e{i}", seed=i) for i in range(12)}
    StoreWriter(path, FINGERPRINT)

    def append(names: list[str]) -> None:
        for name in names:
            StoreWriter(path, FINGERPRINT).append(name, segments[name])

    pids = [start(lambda part=part: append(list(segments)[part::3])) for part in range(3)]
    seen = {0}
    while pids:
        pids = [pid for pid in pids if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        store = open_store(path)
        Twin(FINGERPRINT, {s.name: segments[s.name] for s in store.segments}).check(store, range(len(store)))
        assert not {f"segments/{segment.name}" for segment in store.segments} & set(store.uncommitted)
        seen.add(len(store))
    assert max(seen) == 12
    assert (verify(path), open_store(path).uncommitted) == ([], [])


def test_a_segment_committed_after_opening_is_not_called_uncommitted(tmp_path):
    path = write_store(tmp_path / "store", FINGERPRINT, {"a": SEGMENTS["a"]})
    store = open_store(path)
    StoreWriter(path, FINGERPRINT).append("b", SEGMENTS["b"])
    assert (len(store.segments), store.uncommitted) == (1, [])


def test_a_store_is_made_by_one_of_two(tmp_path):
    for turn in range(10):
        path = tmp_path / f"store-{turn}"
        rivals = [FINGERPRINT, FINGERPRINT | {"seed": 1}]
        codes = start_together([lambda f=f, path=path: StoreWriter(path, f) for f in rivals])
        assert sorted(codes) == [DONE, INCOMPATIBLE]
        assert open_store(path).fingerprint.to_json() == rivals[codes.index(DONE)]


def test_threads_of_one_process_exclude_each_other_too(tmp_path):
    path = write_store(tmp_path / "store", FINGERPRINT, {"a": SEGMENTS["a"]})
    outcomes = []

    def append() -> None:
        try:
            StoreWriter(path, FINGERPRINT).append("b", SEGMENTS["b"])
            outcomes.append(DONE)
        except InputError:
            outcomes.append(REFUSED)

    threads = [threading.Thread(target=append) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [DONE, REFUSED, REFUSED, REFUSED]
    assert verify(path) == []
    assert len(open_store(path)) == 3
