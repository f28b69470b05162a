"""A store that grows by prompts, boundaries and sites: what it had is untouched, and it equals one made whole."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from stores import SEGMENTS, bits, fill, make_fingerprint, make_segment, make_site_rows, read_tree

import actcache
from actcache.capture.growth import digests_of_segments, segments_of
from actcache.cli import main
from actcache.errors import CorruptStoreError, InputError
from actcache.models.checkpoint import Checkpoint
from actcache.prompts import Prompt
from actcache.store import StoreWriter, compact, layout, open_store, repair, verify

MAX_NEW = 24
GOLDEN = Path(__file__).parent / "golden"


# ---- which segments ------------------------------------------------------------------------------------------------


def prompts_named(n: int, word: str = "p") -> list[Prompt]:
    return [Prompt(f"{word}{i}", f"text {i}") for i in range(n)]


@given(st.integers(1, 5), st.lists(st.integers(0, 9), min_size=1, max_size=5), st.data())
def test_segments_stay_as_they_are_however_a_file_grows(shard_prompts, grows, data):
    """Each file is the one before and some more; of its segments, some are captured before the next one comes."""
    captured: dict[str, str] = {}
    shapes: dict[str, range] = {}
    n = 1
    for more in grows:
        n += more
        prompts = prompts_named(n)
        segments = segments_of(prompts, shard_prompts, captured)
        assert list(segments) == [f"shard-{i:06d}" for i in range(len(segments))]
        assert [i for shard in segments.values() for i in shard] == list(range(n))
        assert all(1 <= len(shard) <= shard_prompts for shard in segments.values())
        assert shapes.items() <= segments.items(), "a captured segment is of other prompts now"
        done = data.draw(st.sets(st.sampled_from(sorted(segments)), max_size=2), label="captured")
        digests = digests_of_segments(prompts, shard_prompts, captured)
        captured |= {name: digests[name] for name in done}
        shapes |= {name: segments[name] for name in done}


def test_other_prompts_are_not_taken_for_those_captured():
    captured = digests_of_segments(prompts_named(5), 2)
    assert digests_of_segments(prompts_named(7), 2, captured).items() >= captured.items()
    for others in (prompts_named(5, "q"), prompts_named(4), prompts_named(5)[::-1]):
        assert not digests_of_segments(others, 2, captured).items() >= captured.items()


# ---- additions in a store ------------------------------------------------------------------------------------------


FINGERPRINT = make_fingerprint()
SEGMENT = make_segment(FINGERPRINT, [5, 0, 9], [(2, 8), (0, 2), (2, 8)], name="a", sites=[("mlp", 4)])
OTHER = make_segment(FINGERPRINT, [4], [(0, 3)], name="b", seed=7)
N_ROWS = 14


def rows_of(n: int, sites, seed: int):
    return make_site_rows(FINGERPRINT, n, sites, seed)


@pytest.fixture
def path(tmp_path) -> Path:
    writer = StoreWriter(tmp_path / "store", FINGERPRINT)
    writer.append("a", SEGMENT)
    writer.append("b", OTHER)
    return tmp_path / "store"


def record_of(path: Path, name: str) -> dict:
    return next(segment.record for segment in open_store(path).segments if segment.name == name)


def add(path: Path, name: str, to: str, sites, seed: int = 0):
    """Add random rows to a segment; what was added."""
    rows = rows_of(sum(np_lengths(to)), sites, seed)
    StoreWriter(path, FINGERPRINT).add_rows(name, record_of(path, to), rows)
    return rows


def np_lengths(segment: str) -> list[int]:
    return [5, 0, 9] if segment == "a" else [4]


def test_rows_that_all_segments_have_are_the_stores(path):
    before, opened = read_tree(path), open_store(path)
    added = add(path, "a-more", "a", [("state", 7), ("attention", 0)])
    store = open_store(path)
    assert (store.sites, store.boundaries) == ({"state": [1, 2]}, [1, 2])
    with pytest.raises(InputError, match="boundary 7 is in the store in 1 of 2 segments only: give the command again"):
        store.states("pt", 7)
    with pytest.raises(InputError, match="attention of block 3 is not in the store; it has 1, 2"):
        store.states("pt", 3, site="attention")
    more = add(path, "b-more", "b", [("attention", 0), ("state", 7)], seed=1)
    store = open_store(path)
    assert store.sites == {"state": [1, 2, 7], "attention": [0]}
    for site, block in (("state", 7), ("attention", 0)):
        rows, offsets = store.states("it", block, site=site)
        one, other = added[site, "it", block], more[site, "it", block]
        want = [one[5:14], one[0:3], one[5:14], other]
        assert bits(rows) == bits(torch.cat(want))
        assert offsets.tolist() == [0, 9, 12, 21, 25]
    assert bits(store.states("pt", 1)[0]) == bits(opened.states("pt", 1)[0])
    assert read_tree(path).items() >= before.items(), "what was committed was changed"
    assert (verify(path), store.uncommitted) == ([], [])
    assert store.summary()["sites"] == {"attention": [0]}
    assert opened.boundaries == [1, 2], "a snapshot does not grow"


def test_the_first_of_two_additions_counts(path):
    one = add(path, "a-1", "a", [("state", 7)], seed=1)
    add(path, "a-2", "a", [("state", 7)], seed=2)
    add(path, "b-1", "b", [("state", 7)], seed=3)
    assert bits(open_store(path).states("pt", 7, [1])[0]) == bits(one["state", "pt", 7][:3])


def test_what_is_added_must_fit(path):
    writer, record = StoreWriter(path, FINGERPRINT), record_of(path, "a")
    for rows, said in (
        (rows_of(N_ROWS - 1, [("state", 7)], 0), r"expected torch.float32 \(14, 3\)"),
        ({("state", "pt", 7): torch.zeros(N_ROWS, 3)}, "states of"),
        ({("head", label, 7): torch.zeros(N_ROWS, 3) for label in ("pt", "it")}, "site 'head' is none"),
    ):
        with pytest.raises(InputError, match=said):
            writer.add_rows("a-more", record, rows)
    writer.add_rows("a-more", record, rows_of(N_ROWS, [("state", 7)], 0))
    with pytest.raises(InputError, match="committed already"):
        writer.add_rows("a-more", record, rows_of(N_ROWS, [("state", 7)], 0))


def test_compaction_merges_segments_with_what_was_added(path):
    for name, to in (("a-more", "a"), ("b-more", "b")):
        add(path, name, to, [("state", 7)])
    before = open_store(path)
    fresh = open_store(path)  # reads nothing before the compaction
    want = [bits(before.states("pt", b)[0]) for b in (1, 2, 7)]
    with pytest.raises(InputError, match="mlp of block 4 is in the store in 1 of 2"):
        before.states("pt", 4, site="mlp")
    assert compact(path) == (2, 2), "segments of other sites are not merged"
    StoreWriter(path, FINGERPRINT).add_rows("b-mlp", record_of(path, "b"), rows_of(4, [("mlp", 4)], 3))
    mlp = bits(open_store(path).states("it", 4, site="mlp")[0])
    assert compact(path) == (2, 1)
    (merged,) = open_store(path).segments
    assert {"a", "b", "a-more", "b-more", "b-mlp"} <= set(merged.record["replaces"])
    for store in (before, fresh, open_store(path)):
        assert [bits(store.states("pt", b)[0]) for b in (1, 2, 7)] == want
    assert bits(open_store(path).states("it", 4, site="mlp")[0]) == mlp
    assert [file.name for file in (path / "commits").glob("*.json")] == [f"{merged.name}.json"]
    assert (verify(path), open_store(path).uncommitted) == ([], [])


def test_an_addition_to_a_segment_that_is_merged_meanwhile_does_not_count(path):
    record = record_of(path, "b")
    StoreWriter(path, FINGERPRINT).add_rows("b-mlp", record, rows_of(4, [("mlp", 4)], 3))
    compact(path)
    StoreWriter(path, FINGERPRINT).add_rows("late", record, rows_of(4, [("state", 9)], 3))
    store = open_store(path)
    assert store.boundaries == [1, 2]
    assert store.uncommitted == ["segments/late"]
    assert verify(path) == []
    compact(path)
    assert not (path / "commits/late.json").exists()


def test_a_damaged_addition_is_named_and_dropped_alone(path):
    for name, to in (("a-more", "a"), ("b-more", "b")):
        add(path, name, to, [("state", 7)])
    file = path / "segments/a-more/states/pt/b007/c/0/0"
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptStoreError, match="segment a-more, array states/pt/b007, chunk 0"):
        open_store(path).states("pt", 7)
    assert {problem.segment for problem in repair(path)} == {"a-more"}
    assert open_store(path).boundaries == [1, 2]
    assert len(open_store(path)) == 4
    assert verify(path) == []


@pytest.mark.parametrize("name", sorted(entry.name for entry in (GOLDEN / "v1").iterdir() if entry.is_dir()))
def test_a_store_of_version_1_grows(name, tmp_path):
    """New segments and additions are of version 2, under the root that it has; what it had is read as before."""
    path = shutil.copytree(GOLDEN / "v1" / name, tmp_path / "store")
    before, files = open_store(path), read_tree(path)
    fingerprint = before.fingerprint
    made = make_segment(fingerprint.to_json(), [6, 2], [(0, 5), (1, 1)], name="new", sites=[("mlp", 0)])
    writer = StoreWriter(path, fingerprint)
    writer.append("z-new", made)
    for segment in before.segments:
        rows = make_site_rows(fingerprint.to_json(), segment.n_rows, [("mlp", 0)], 5)
        writer.add_rows(f"{segment.name}-mlp", segment.record, rows)
    assert read_tree(path).items() >= files.items()
    store, n = open_store(path), len(before)
    assert (len(store), verify(path)) == (n + 2, [])
    assert store.events["pair"].to_pylist() == ["pt,it"] * n + made.events["pair"].to_pylist()
    assert store.events.slice(0, n).select(before.events.column_names).equals(before.events)
    assert store.sequences.num_rows == sum(segment.n_sequences for segment in store.segments)
    label, boundary = store.checkpoints[0], store.boundaries[0]
    assert bits(store.states(label, boundary, range(n))[0]) == bits(before.states(label, boundary)[0])
    assert len(store.states(label, 0, site="mlp")[1]) == n + 3
    assert {segment.record["format_version"] for segment in store.segments} == {1, 2}


# ---- capture -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    return tiny.make_pair(tmp_path_factory.mktemp("pair"), "llama")


def capture(pair, prompts: Path, out: Path, *more: str) -> int:
    words = ["capture", "--pt", pair[0], "--it", pair[1], "--prompts", prompts, "--out", out, "--shard-prompts", 3]
    return main([str(word) for word in [*words, "--max-new", MAX_NEW, "--strict", *more]])


def by_event(path: Path, boundary: int, site: str = "state") -> dict[tuple, tuple]:
    store = open_store(path)
    found = {}
    for i, event in enumerate(store.events.to_pylist()):
        rows = [bits(store.states(label, boundary, [i], site=site)[0]) for label in ("pt", "it")]
        del event["segment"], event["sequence"]
        found[event["event_id"]] = (event, rows, bits(store.final("pt", [i])))
    return found


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory) -> Path:
    """Captured in one go: ten prompts, two boundaries, the output of two MLPs."""
    folder = tmp_path_factory.mktemp("whole")
    prompts = tiny.write_prompts(folder / "p.jsonl", 10)
    assert capture(pair, prompts, folder / "run", "--boundary", "2,3", "--site", "mlp:1,4") == 0
    return folder / "run/store"


@pytest.fixture(scope="module")
def of_boundary_3(pair, tmp_path_factory) -> Path:
    """A folder with six prompts, and a run of them in two segments."""
    folder = tmp_path_factory.mktemp("small")
    assert capture(pair, tiny.write_prompts(folder / "p.jsonl", 6), folder / "run", "--boundary", "3") == 0
    return folder


@pytest.fixture
def small(of_boundary_3, tmp_path) -> tuple[Path, Path]:
    """Prompts and run of one's own."""
    folder = shutil.copytree(of_boundary_3, tmp_path / "small")
    return folder / "p.jsonl", folder / "run"


@pytest.mark.slow
def test_the_same_command_with_more_of_all_ends_in_the_same_rows(pair, whole, tmp_path, capfd):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "run"
    assert capture(pair, tiny.write_prompts(prompts, 4), out, "--boundary", "3") == 0
    files = read_tree(out / "store")
    assert capture(pair, tiny.write_prompts(prompts, 10), out, "--boundary", "3") == 0
    assert open_store(out / "store").n_prompts == 10
    capfd.readouterr()
    assert capture(pair, prompts, out, "--boundary", "2,3", "--site", "mlp:1,4") == 0
    assert "the store gains boundaries 2; mlp of blocks 1, 4" in capfd.readouterr().err
    assert read_tree(out / "store").items() >= files.items(), "what was committed was changed"
    store = open_store(out / "store")
    assert (store.boundaries, store.sites) == ([3, 2], {"state": [3, 2], "mlp": [1, 4]})
    store.check_prompts()
    for boundary, site in ((2, "state"), (3, "state"), (1, "mlp"), (4, "mlp")):
        assert by_event(out / "store", boundary, site) == by_event(whole, boundary, site)
    assert verify(out / "store") == []
    before = read_tree(out / "store")
    assert capture(pair, prompts, out, "--boundary", "2") == 0
    assert "the store has boundaries 3; mlp of blocks 1, 4 too, which stay" in capfd.readouterr().err
    assert read_tree(out / "store") == before


@pytest.mark.slow
def test_a_whole_run_grows(pair, tmp_path, capfd):
    """Capture, grid, effects and report of more prompts of another file; cells that were scored stay as they are."""
    few, many = tiny.write_prompts(tmp_path / "few.jsonl", 4), tiny.write_prompts(tmp_path / "many.jsonl", 10)
    out = tmp_path / "run"

    def run(prompts: Path, *more: str) -> int:
        words = ["run", "--pt", pair[0], "--it", pair[1], "--prompts", prompts, "--out", out, "--shard-prompts", 3]
        words += ["--max-new", MAX_NEW, "--strict", "--stability", 0, "--boundary", "3"]
        return main([str(word) for word in [*words, *more]])

    assert run(few) == 0
    before = {path.name: path.read_bytes() for path in (out / "cells").iterdir()}
    assert run(many) == 0
    after = {path.name: path.read_bytes() for path in (out / "cells").iterdir()}
    assert after.items() > before.items()
    grown = actcache.Run(out)
    assert set(grown.cells["event_id"].to_pylist()) == set(grown.store.events["event_id"].to_pylist())
    assert json.loads((out / "run.json").read_text())["prompts"] == str(many.resolve())
    capfd.readouterr()
    assert main(["plan", str(out), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["truth"]["prompts"] == 10
    assert main(["depth", str(out)]) == 0
    assert main(["stability", str(out), "--dtype", "float32"]) == 0
    assert run(few) == 2, "fewer prompts than are there"
    assert "give another folder" in capfd.readouterr().err
    assert json.loads((out / "run.json").read_text())["prompts"] == str(many.resolve())


def keep(
    seen: list[torch.Tensor], module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
) -> None:
    seen.append(output[0])


def test_a_site_is_what_a_hook_sees(pair, whole):
    store = open_store(whole)
    for label, folder in zip(("pt", "it"), pair, strict=True):
        model = Checkpoint.open(label, folder).load(torch.float32, "cpu")
        seen: list[torch.Tensor] = []
        hook = model.model.layers[4].mlp.register_forward_hook(partial(keep, seen))
        ids, offsets = store.token_ids()
        with torch.no_grad():
            for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
                model(input_ids=ids[None, start:stop])
        hook.remove()
        assert torch.equal(store.states(label, 4, site="mlp")[0], torch.cat(seen))


@pytest.mark.slow
def test_a_killed_growth_goes_on(pair, small, monkeypatch):
    prompts, out = small
    add_rows, done = StoreWriter.add_rows, []

    def die(self, name, *given):
        if done:
            raise OSError("the disk is full")
        done.append(name)
        add_rows(self, name, *given)

    monkeypatch.setattr(StoreWriter, "add_rows", die)
    with pytest.raises(OSError, match="the disk is full"):
        capture_or_raise(pair, prompts, out)
    monkeypatch.undo()
    assert open_store(out / "store").boundaries == [3]
    first = read_tree(out / "store")
    assert capture(pair, prompts, out, "--boundary", "2,3") == 0
    assert open_store(out / "store").boundaries == [3, 2]
    assert read_tree(out / "store").items() >= first.items()
    assert main(["compact", str(out)]) == 0
    assert len(open_store(out / "store").segments) == 1
    assert capture(pair, prompts, out, "--boundary", "2,3,1") == 0, "a merged store grows too"
    assert open_store(out / "store").boundaries == [3, 2, 1]


def capture_or_raise(pair, prompts: Path, out: Path) -> None:
    if capture(pair, prompts, out, "--boundary", "2,3"):
        raise OSError("the disk is full")


@pytest.mark.slow
def test_parts_grow_a_store_together(pair, small):
    prompts, out = small
    for part in ("1/2", "2/2"):
        assert open_store(out / "store").boundaries == [3]
        assert capture(pair, prompts, out, "--boundary", "2", "--part", part) == 0
    assert open_store(out / "store").boundaries == [3, 2]


@pytest.mark.slow
def test_rows_of_events_alone_grow(pair, whole, tmp_path):
    prompts, out = tiny.write_prompts(tmp_path / "p.jsonl", 10), tmp_path / "run"
    assert capture(pair, prompts, out, "--boundary", "3", "--rows", "divergence") == 0
    assert capture(pair, prompts, out, "--boundary", "2", "--rows", "divergence") == 0
    store, other = open_store(out / "store"), open_store(whole)
    for b in (2, 3):
        rows, offsets = other.states("it", b)
        assert bits(store.states("it", b)[0]) == bits(rows[offsets[1:] - 1])


@pytest.mark.parametrize(
    ("n", "more", "said"),
    [
        (4, (), "the prompts of its segment shard-000001 are not this run's"),
        (6, ("--max-new", "3"), "its max_new is 24"),
        (6, ("--dtype", "bfloat16"), "its dtype is float32"),
        (6, ("--boundary", "5"), "boundary 5"),
        (6, ("--site", "mlp:9"), "block 9 is not one of 0..4"),
        (6, ("--site", "head:1"), "give state, attention or mlp"),
    ],
)
def test_what_cannot_be_added_is_said_in_one_line(n, more, said, pair, small, capfd):
    prompts, out = small
    before = read_tree(out / "store")
    capfd.readouterr()
    assert capture(pair, tiny.write_prompts(prompts, n), out, *("--boundary", "3"), *more) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("actcache: ")]
    assert len([line for line in errors if said in line]) == 1
    assert read_tree(out / "store") == before


def test_a_store_of_seven_segments_is_as_it_was(tmp_path):
    """That stores which no capture made, without digests of prompts, are written and read as ever."""
    store = fill(str(tmp_path / "store"))
    assert (len(store.segments), store.n_prompts, store.prompts) == (len(SEGMENTS), 0, {})
    record = json.loads((tmp_path / "store/commits/s-0.json").read_text())
    assert (record["format_version"], record["sites"]) == (layout.FORMAT_VERSION, {"state": [1]})
