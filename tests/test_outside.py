"""Nothing outside a store is written, moved or deleted, and nothing in it that is not ours, whatever it holds."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from stores import FINGERPRINT, SEGMENTS, fill, read_tree

from actcache.errors import ActcacheError, InputError
from actcache.store import StoreWriter, compact, open_store, repair, verify


@pytest.fixture
def outside(tmp_path) -> Path:
    """A home in which a store lies, and files that any name of a store could mean."""
    folder = tmp_path / "home"
    for name in ("s-0", "s-1", "s-2", "Documents"):
        for file in ("zarr.json", "token_ids/zarr.json", "token_ids/c/0", "letter.txt"):
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / file).write_text(f"years of work on {file}")
    for name in ("zarr.json", "s-0.json", "s-1.json", "s-1.1.json", "notes.json", ".compaction"):
        (folder / name).write_text("not a record")
    return folder


@pytest.fixture
def store(tmp_path) -> Path:
    path = tmp_path / "home/Downloads/store"
    fill(str(path), ["s-0", "s-1"])
    return path


def instead(path: Path, target: Path) -> None:
    """A link in the place of a file or folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(target)


def second_name(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    os.link(target, path)


def replaces(*names: str) -> Callable[[Path, Path], None]:
    """A record of s-1 that claims to replace what lies outside."""

    def change(store: Path, outside: Path) -> None:
        (store / "commits/s-0.json").unlink()
        (store / "commits/s-1.json").write_bytes((store / "commits/s-1.json").read_bytes())
        forge_replaces(store, names)

    return change


def forge_replaces(store: Path, names: tuple[str, ...]) -> None:
    from actcache.store import commit_record, layout

    file = store / "commits/s-1.json"
    record = layout.decode_json(file.read_bytes())
    del record["crc32c"]
    file.write_bytes(commit_record.encode_record(record | {"replaces": sorted(names)}))


def linked_and_replaced(where: str) -> Callable[[Path, Path], None]:
    """What a record truly lists, behind a link: another store's files, of the same names."""

    def change(store: Path, outside: Path) -> None:
        other = outside / "another"
        if not other.exists():
            shutil.copytree(store, other)
        forge_replaces(store, ("s-0",))
        instead(store / where, other / where)

    return change


LINKS: dict[str, Callable[[Path, Path], None]] = {
    "segments": lambda store, outside: instead(store / "segments", outside),
    "a segment": lambda store, outside: instead(store / "segments/s-0", outside / "s-0"),
    "a folder of a segment": lambda store, outside: instead(
        store / "segments/s-0/token_ids", outside / "s-0/token_ids"
    ),
    "the folder of a segment to come": lambda store, outside: instead(store / "segments/s-2", outside / "s-2"),
    "commits": lambda store, outside: instead(store / "commits", outside),
    "a record": lambda store, outside: instead(store / "commits/s-0.json", outside / "notes.json"),
    "dropped": lambda store, outside: (
        instead(store / "dropped", outside),
        (store / "commits/s-1.json").write_text("damaged"),
    ),
    "what is dropped": lambda store, outside: (
        (store / "dropped").mkdir(),
        instead(store / "dropped/s-1.1.json", outside / "notes.json"),
        (store / "commits/s-1.json").write_text("damaged"),
    ),
    "the draft of a record": lambda store, outside: instead(store / "commits/.s-2.json.tmp", outside / "notes.json"),
    "the lock of a compaction": lambda store, outside: instead(
        store / "commits/..compaction.tmp", outside / "notes.json"
    ),
    "a second name as draft": lambda store, outside: second_name(
        store / "commits/.s-2.json.tmp", outside / "notes.json"
    ),
    "a second name as lock": lambda store, outside: second_name(
        store / "commits/..compaction.tmp", outside / "notes.json"
    ),
    "the draft of the root": lambda store, outside: (
        shutil.rmtree(store),
        store.mkdir(),
        instead(store / ".zarr.json.tmp", outside / "notes.json"),
    ),
    "the group of segments": lambda store, outside: (
        shutil.rmtree(store),
        (store / "segments").mkdir(parents=True),
        instead(store / "segments/zarr.json", outside / "zarr.json"),
    ),
    "forged replaces": replaces("Documents", "s-0"),
    "forged replaces and a link": lambda store, outside: (
        replaces("Documents", "s-0")(store, outside),
        instead(store / "segments", outside),
    ),
    "replaced, behind a link": linked_and_replaced("segments/s-0"),
    "all replaced, behind a link": linked_and_replaced("segments"),
    "records behind a link": linked_and_replaced("commits"),
}


def write_anew(store: Path) -> None:
    if not (store / "commits").is_symlink():
        (store / "commits/s-0.json").unlink(missing_ok=True)
    StoreWriter(store, FINGERPRINT).append("s-0", SEGMENTS["s-0"])


ACTS: dict[str, Callable[[Path], object]] = {
    "compact": compact,
    "repair": repair,
    "append": lambda path: StoreWriter(path, FINGERPRINT).append("s-2", SEGMENTS["s-2"]),
    "write anew": write_anew,
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("link", LINKS)
def test_nothing_outside_is_touched(link, act, store, outside):
    LINKS[link](store, outside)

    def others() -> dict[str, bytes]:
        return {name: data for name, data in read_tree(outside).items() if not name.startswith("Downloads/")}

    before = others()
    for _ in range(2):
        with contextlib.suppress(ActcacheError, OSError):
            ACTS[act](store)
        assert others() == before


def test_a_link_is_named(store, outside):
    instead(store / "segments", outside)
    with pytest.raises(InputError, match=r"segments is a link: nothing is changed through it"):
        StoreWriter(store, FINGERPRINT).append("s-2", SEGMENTS["s-2"])
    (store / "segments").unlink()
    (store / "segments").mkdir()
    instead(store / "commits/.s-2.json.tmp", outside / "notes.json")
    with pytest.raises(InputError, match=r"s-2\.json\.tmp is a link, or no ordinary file: nothing is written there"):
        StoreWriter(store, FINGERPRINT).append("s-2", SEGMENTS["s-2"])


def test_a_store_may_be_reached_through_a_link(store, tmp_path):
    (tmp_path / "link").symlink_to(store)
    fill(str(tmp_path / "link"), ["s-2"])
    assert compact(str(tmp_path / "link")) == (3, 1)
    assert verify(store) == []
    assert (tmp_path / "link").is_symlink()


def test_files_of_a_user_in_a_segments_folder_stay(store):
    """A compaction deletes what records list; a writer refuses a folder that holds more than it would write."""
    (store / "segments/s-0/states/my notes.txt").write_text("keep")
    (store / "segments/s-2/c/0").mkdir(parents=True)
    (store / "segments/s-2/c/0/0").write_text("a file that no segment has")
    with pytest.raises(InputError, match="s-2 holds what no writer of this segment left there; move it away"):
        fill(str(store), ["s-2"])
    compact(store)
    assert sorted(name for name in read_tree(store / "segments") if "--" not in name) == [
        "s-0/states/my notes.txt",
        "s-2/c/0/0",
        "zarr.json",
    ]
    assert verify(store) == []
    assert open_store(store).uncommitted == ["segments/s-0", "segments/s-2"]


def test_what_a_dead_writer_left_is_cleared(store):
    fill(str(store), ["s-2"])
    expected = read_tree(store)
    (store / "commits/s-2.json").unlink()
    shutil.rmtree(store / "segments/s-2/final")
    (store / "segments/s-2/token_ids/c/0").write_bytes(b"half")
    (store / "commits/.s-2.json.tmp").write_bytes(b"half a record")
    fill(str(store), ["s-2"])
    assert read_tree(store) == expected
