"""Digests of weight files: read once, remembered while the file is the same, and never wrong."""

from __future__ import annotations

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from actcache.models import digests
from actcache.models.checkpoint import Checkpoint
from actcache.models.digests import cache_folder, digest


def plain(file: Path) -> bytes:
    """The slow way."""
    return hashlib.sha256(file.read_bytes()).digest()


@pytest.fixture
def reads(tmp_path, monkeypatch) -> list[Path]:
    """The files that are read, with a cache of its own that remembers small and young ones, too."""
    found: list[Path] = []
    own = digests._read

    def read(file: Path) -> bytes:
        found.append(file)
        return own(file)

    monkeypatch.setenv("ACTCACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_read", read)
    monkeypatch.setattr(digests, "SMALLEST", 0)
    monkeypatch.setattr(digests, "SETTLED", -1.0)
    return found


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"abc")
    return path


def memos() -> list[Path]:
    return sorted((cache_folder() / "digests").glob("*"))


def test_a_file_is_read_once(file, reads, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(file)
    assert digest(file) == digest(file) == digest(link) == plain(file)
    assert len(reads) == len(memos()) == 1


@pytest.mark.parametrize("keep_times", [True, False])
def test_a_file_that_has_changed_is_read_again(keep_times, file, reads):
    """Also one whose size and time of change are put back."""
    digest(file)
    state = file.stat()
    time.sleep(0.02)  # beyond the grain of the clock
    file.write_bytes(b"xyz")
    if keep_times:
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert digest(file) == plain(file)
    assert len(reads) == 2


def test_a_file_that_takes_the_place_of_another_is_read(file, reads, tmp_path):
    digest(file)
    state = file.stat()
    other = tmp_path / "other"
    other.write_bytes(b"xyz")
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
    other.replace(file)
    assert digest(file) == plain(file)


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"5", b"\xff", b"[" * 10**5, b"{}", b'{"sha256": 5}', b'{"sha256": "abc"}']
)
def test_a_damaged_memory_is_as_none(damage, file, reads):
    digest(file)
    (memo,) = memos()
    memo.write_bytes(damage)
    assert digest(file) == plain(file)
    assert len(reads) == 2
    assert json.loads(memo.read_bytes())["sha256"] == plain(file).hex()


@pytest.mark.parametrize("wrong", ["z" * 64, "A" * 64, None])
def test_what_is_no_digest_is_not_taken_for_one(wrong, file, reads):
    digest(file)
    (memo,) = memos()
    memo.write_text(json.dumps(json.loads(memo.read_bytes()) | {"sha256": wrong}))
    assert digest(file) == plain(file)


def test_without_a_place_to_remember_files_are_read(file, reads, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("no folder")
    assert digest(file) == digest(file) == plain(file)
    monkeypatch.setenv("ACTCACHE_CACHE", "/proc/nothing")
    assert digest(file) == plain(file)
    assert len(reads) == 3


def test_what_has_just_changed_may_change_again_unnoticed(file, reads, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED", 3600.0)
    assert digest(file) == digest(file) == plain(file)
    assert len(reads) == 2
    assert not memos()


def test_small_files_leave_nothing(file, tmp_path, monkeypatch):
    monkeypatch.setenv("ACTCACHE_CACHE", str(tmp_path / "cache"))
    assert digest(file) == plain(file)
    assert not cache_folder().exists()


def test_several_at_once(file, reads):
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(digest, [file] * 32)) == {plain(file)}
    assert [json.loads(memo.read_bytes())["sha256"] for memo in memos()] == [plain(file).hex()]


@given(st.binary(max_size=64))
def test_any_bytes(data):
    place = Path(os.environ["ACTCACHE_CACHE"]) / "any"
    place.parent.mkdir(exist_ok=True, parents=True)
    place.write_bytes(data)
    assert digest(place) == hashlib.sha256(data).digest()


def in_hub(folder: Path, name: str, data: bytes) -> Path:
    """A file in a snapshot of the Hub's cache, whose content has this name there."""
    repository = folder / "models--a--b"
    for place in (repository / "blobs", repository / "snapshots/0"):
        place.mkdir(parents=True, exist_ok=True)
    (repository / "blobs" / name).write_bytes(data)
    link = repository / "snapshots/0/model.safetensors"
    link.symlink_to(Path("../../blobs") / name)
    return link


def test_a_blob_of_the_hub_is_named_by_its_digest(reads, tmp_path):
    data = b"abc"
    link = in_hub(tmp_path, hashlib.sha256(data).hexdigest(), data)
    assert digest(link) == hashlib.sha256(data).digest()
    assert not reads


def test_a_blob_that_was_written_to_is_read(reads, tmp_path):
    link = in_hub(tmp_path, "0" * 64, b"abc")
    blob = link.resolve()
    assert digest(link) == bytes(32)
    later = link.lstat().st_mtime_ns + 1
    os.utime(blob, ns=(later, later))
    assert digest(link) == plain(blob)
    os.utime(blob, ns=(1, 1))  # put back
    assert digest(link) == plain(blob)


@pytest.mark.parametrize("name", ["0" * 40, "0" * 63 + "g", "model.safetensors"])
def test_other_names_say_nothing(name, reads, tmp_path):
    link = in_hub(tmp_path, name, b"abc")
    assert digest(link) == plain(link)
    assert len(reads) == 1


def test_files_elsewhere_are_read_whatever_their_name(reads, tmp_path):
    file = tmp_path / ("0" * 64)
    file.write_bytes(b"abc")
    link = tmp_path / "model.safetensors"
    link.symlink_to(file)
    assert digest(file) == digest(link) == plain(file)


@pytest.mark.parametrize("shards", [False, True])
def test_a_checkpoint_is_opened_again_without_reading_its_weights(shards, reads, tmp_path):
    folder = tiny.make_checkpoint(tmp_path / "model", "llama", shards=shards)
    files = sorted(folder.glob("*.safetensors"))
    found = Checkpoint.open("it", folder).fingerprint
    assert found.weights == hashlib.sha256(b"".join(map(plain, files))).hexdigest()  # as earlier versions recorded
    assert sorted(reads) == files
    assert Checkpoint.open("it", folder).fingerprint == found
    assert len(reads) == len(files)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"ACTCACHE_CACHE": "/a"}, "/a"),
        ({"ACTCACHE_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/actcache"),
        ({"ACTCACHE_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/actcache"),
    ],
)
def test_where_it_is_remembered(given, expected, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(digests.sys, "platform", "linux")
    assert cache_folder() == Path(expected)
