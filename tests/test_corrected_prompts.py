"""A prompts file that is corrected while it is captured: what is committed is not concerned, two files never mix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from conftest import MAX_NEW
from stores import make_fingerprint, make_segment

from actcache.capture.growth import digests_of_segments
from actcache.cli import main
from actcache.errors import IncompatibleError
from actcache.prompts import read_prompts
from actcache.store import StoreWriter, commit_record, compact, open_store, verify

# What a file's segments are digested to; the second differs in one segment, the third in another one.
FIRST = {"s0": "a0", "s1": "a1", "s2": "a2"}
SECOND = FIRST | {"s2": "b2"}
THIRD = FIRST | {"s0": "c0"}


def writer_of(path: Path, prompts: dict[str, str]) -> StoreWriter:
    return StoreWriter(path, make_fingerprint(prompts=f"all of {prompts}"), prompts)


def append(writer: StoreWriter, *names: str) -> None:
    for name in names:
        writer.append(name, make_segment(make_fingerprint(), [3], [(0, 0)], name=name))


@pytest.mark.parametrize("compacted", [False, True])
def test_prompts_may_change_until_they_are_captured(tmp_path, compacted):
    append(writer_of(tmp_path, FIRST), "s0", "s1")
    if compacted:
        assert compact(tmp_path) == (2, 1)
    with pytest.raises(IncompatibleError, match="prompts of its segment s0 are not this run's") as caught:
        writer_of(tmp_path, THIRD)
    assert caught.value.field == "prompts"
    append(writer_of(tmp_path, SECOND), "s2")
    store = open_store(tmp_path)
    assert store.prompts == SECOND
    store.check_prompts()
    writer_of(tmp_path, SECOND)
    for earlier in (FIRST, THIRD):
        with pytest.raises(IncompatibleError, match="prompts of its segment"):
            writer_of(tmp_path, earlier)
    if compacted:
        assert compact(tmp_path) == (2, 1)
        open_store(tmp_path).check_prompts()
        assert open_store(tmp_path).prompts == SECOND
    assert verify(tmp_path) == []


def test_nothing_else_may_change(tmp_path):
    append(writer_of(tmp_path, FIRST), "s0")
    with pytest.raises(IncompatibleError) as caught:
        StoreWriter(tmp_path, make_fingerprint(prompts="x", seed=1), FIRST)
    assert caught.value.field == "seed"


@pytest.mark.parametrize("late", ["before it commits", "as it commits"])
def test_two_files_at_once_end_one_writer(tmp_path, monkeypatch, late):
    one, other = writer_of(tmp_path, FIRST), writer_of(tmp_path, SECOND)
    if late == "before it commits":
        append(one, "s2")
        with pytest.raises(IncompatibleError, match="prompts of its segment s2"):
            append(other, "s0")
        assert [segment.name for segment in open_store(tmp_path).segments] == ["s2"]
        return
    commit = commit_record.encode_record

    def encode_record(record):
        monkeypatch.setattr(commit_record, "encode_record", commit)
        append(one, "s2")
        return commit(record)

    monkeypatch.setattr(commit_record, "encode_record", encode_record)
    with pytest.raises(IncompatibleError, match="prompts of its segment s2"):
        append(other, "s0")


def test_a_complete_store_of_two_files_is_refused(tmp_path, monkeypatch):
    """Both committed within the same moment, and both died before they looked again."""
    monkeypatch.setattr(StoreWriter, "check_prompts", lambda self: None)
    append(writer_of(tmp_path, SECOND), "s2", "s1")
    append(writer_of(tmp_path, THIRD), "s0")
    monkeypatch.undo()
    with pytest.raises(IncompatibleError, match="segments of two prompts files") as caught:
        open_store(tmp_path).check_prompts()
    assert caught.value.field == "prompts"


def test_a_store_of_an_earlier_version_goes_on_with_the_same_prompts_only(tmp_path):
    append(StoreWriter(tmp_path, make_fingerprint(prompts=f"all of {FIRST}")), "s0")
    with pytest.raises(IncompatibleError, match="its prompts is") as caught:
        writer_of(tmp_path, SECOND)
    assert caught.value.field == "prompts"
    append(writer_of(tmp_path, FIRST), "s1")
    assert compact(tmp_path) == (2, 1)
    with pytest.raises(IncompatibleError, match="its prompts is"):
        writer_of(tmp_path, SECOND)
    append(writer_of(tmp_path, FIRST), "s2")
    open_store(tmp_path).check_prompts()


@pytest.mark.parametrize(
    "prompts",
    [[], {"all": [], "of": {"other": "x"}}, {"all": [1], "of": {}}, {"all": [], "of": {"s0": 1}}, {"of": {}}],
)
def test_a_record_says_it_by_the_format(tmp_path, prompts):
    append(writer_of(tmp_path, FIRST), "s0")
    path = tmp_path / "commits" / "s0.json"
    record = json.loads(path.read_text())
    del record["crc32c"]
    path.write_bytes(commit_record.encode_record(record | {"prompts": prompts}))
    assert [problem for problem in verify(tmp_path) if "not as this format writes it" in str(problem)]


@pytest.mark.slow
def test_a_capture_goes_on_with_a_corrected_file(tmp_path, capfd):
    pair, prompts, out = (
        tiny.make_pair(tmp_path, "llama"),
        tiny.write_prompts(tmp_path / "p.jsonl", 6),
        tmp_path / "run",
    )
    words = ["capture", "--pt", *pair[:1], "--it", *pair[1:], "--prompts", prompts, "--out", out, "--shard-prompts", 2]
    words = [str(word) for word in [*words, "--max-new", MAX_NEW]]
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]

    def capture(*more: str) -> int:
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return main([*words, *more])

    assert capture("--part", "1/3") == 0
    rows[5]["category"], rows[4]["prompt"] = "corrected", "Stone by stone and"
    assert capture() == 0
    found = open_store(out / "store")
    rows_of = found.events.to_pylist() + found.excluded.to_pylist()
    assert {row["prompt_id"]: row["category"] for row in rows_of}["p05"] == "corrected"
    assert found.prompts == digests_of_segments(read_prompts(prompts), 2)
    assert main(["plan", str(out), "--json"]) == 0
    rows[0]["category"] = "too late"
    capfd.readouterr()
    assert capture() == 2
    assert "the prompts of its segment shard-000000 are not this run's" in capfd.readouterr().err
