"""A run stays one study: which store, which events and which files its numbers come from."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from conftest import MAX_NEW

import actcache
from actcache.analyses import grid
from actcache.cli import main
from actcache.errors import IncompatibleError
from actcache.sealed import json_bytes, read_json
from actcache.store import compact
from actcache.study import cells as cells_module
from actcache.study.replay_job import ReplayJob
from actcache.study.run_folder import RunFolder

pytestmark = pytest.mark.slow

SEGMENTS = ("--limit", "12", "--shard-prompts", "3", "--boundary", "2,3", "--stability", "0")
KEYS = ("event_id", "boundary", "scope", "upstream", "late", "readout", "variant")


@pytest.fixture
def run(tiny_run, tmp_path):
    """A finished run of several segments, to change."""
    return shutil.copytree(tiny_run("llama", torch.float32, *SEGMENTS).out, tmp_path / "run")


@pytest.fixture
def small(tiny_run, tmp_path):
    """A finished run of two segments, to change."""
    words = ("--limit", "6", *SEGMENTS[2:])
    return shutil.copytree(tiny_run("llama", torch.float32, *words).out, tmp_path / "run")


@pytest.fixture
def sweep(tmp_path):
    """``sweep(name)``: a file of one variant of that name."""

    def write(name, weight=0.5):
        path = tmp_path / f"{name}.toml"
        edit = f'edit = "interpolate"\ndonor = "it"\nweight = {weight}\n'
        path.write_text(f'[[variants]]\nname = "{name}"\n[[variants.edits]]\n{edit}')
        return str(path)

    return write


def cells_of(run):
    return pq.read_table(run / "cells.parquet")


def by_key(cells):
    """Key of a cell -> its margin; every key once."""
    rows = cells.select([*KEYS, "margin"]).to_pylist()
    found = {tuple(row[key] for key in KEYS): row["margin"] for row in rows}
    assert len(found) == cells.num_rows
    return found


def variants_in(cells):
    return sorted(cells["variant"].unique().to_pylist())


@contextmanager
def between(owner, name, number, action):
    """``action`` happens before the call of this number, from 0 on, of ``owner.name``."""
    real, calls = getattr(owner, name), []

    def wrapped(*args, **more):
        calls.append(args)
        if len(calls) == number + 1:
            action()
        return real(*args, **more)

    setattr(owner, name, wrapped)
    try:
        yield
    finally:
        setattr(owner, name, real)


def refused(capfd, words, *arguments, code=2):
    capfd.readouterr()
    assert main([str(word) for word in arguments]) == code
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("actcache: "))
    assert words in line


# ---- the events that a grid began with ----


@pytest.mark.parametrize("merged", ["all", "two in the middle"])
@pytest.mark.parametrize("at_read", [0, 1, 3])
def test_a_grid_beside_a_compaction_has_every_cell(run, merged, at_read):
    want = by_key(cells_of(run))
    sizes = [segment.record["raw_state_bytes"] for segment in actcache_store(run).segments]
    most = sum(sizes) if merged == "all" else sizes[1] + sizes[2]
    shutil.rmtree(run / "cells")
    with between(ReplayJob, "read", at_read, lambda: compact(str(run / "store"), most)):
        assert main(["grid", str(run)]) == 0
    found = by_key(cells_of(run))
    assert found.keys() == want.keys()
    assert max(abs(found[key] - want[key]) for key in want) < 1e-4


def actcache_store(run):
    return RunFolder(run).open_store()


def test_a_compaction_loses_no_sweep_and_nothing_is_scored_again(small, sweep, monkeypatch):
    assert main(["grid", str(small), "--sweep", sweep("a")]) == 0
    before = by_key(cells_of(small))
    compact(str(small / "store"))
    assert main(["grid", str(small), "--sweep", sweep("b")]) == 0
    after = cells_of(small)
    assert variants_in(after) == ["a", "b", "none"]
    of_a = by_key(after.filter(pc.not_equal(after["variant"], "b")))
    assert of_a == before

    def refuse(*args, **more):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(grid.LateStack, "load", refuse)
    assert main(["grid", str(small), "--sweep", sweep("a")]) == 0


@pytest.mark.parametrize("lost", ["a group of this grid", "all groups"])
def test_cells_that_vanish_are_a_failed_check(run, capfd, lost):
    before = (run / "cells.parquet").read_bytes()

    def remove():
        for path in sorted((run / "cells").glob("*.parquet"))[: 1 if lost == "a group of this grid" else None]:
            path.unlink()

    shutil.rmtree(run / "cells")
    with between(grid, "gather_cells", 0, remove):
        refused(capfd, "events have the cell boundary 2, scope prefix", "grid", run, code=1)
    assert (run / "cells.parquet").read_bytes() == before, "nothing is shown as complete"


# ---- two at once ----


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("--sweep", "a"), ("--sweep", "b")),
        (("--readout", "native", "--strict"), ("--readout", "common_it", "--strict")),
        (("--scope", "position"), ("--sweep", "b")),
    ],
    ids=str,
)
@pytest.mark.parametrize("when", ["before it reads", "before it writes"])
def test_two_grids_at_once_are_both_in_the_table(small, sweep, first, second, when):
    first, second = ([sweep(word) if len(word) == 1 else word for word in words] for words in (first, second))

    def other():
        assert main(["grid", str(small), "--boundary", "3", *second]) == 0

    owner, name = (ReplayJob, "read") if when == "before it reads" else (cells_module, "parquet_bytes")
    with between(owner, name, 0, other):
        assert main(["grid", str(small), "--boundary", "3", *first]) == 0
    at_once = by_key(cells_of(small))
    assert main(["grid", str(small), "--boundary", "3", *second]) == 0
    assert main(["grid", str(small), "--boundary", "3", *first]) == 0
    assert at_once == by_key(cells_of(small))
    for words in (first, second):
        if "--sweep" in words:
            assert {key[-1] for key in at_once} >= {Path(words[-1]).stem}
        if "--scope" in words:
            assert {key[2] for key in at_once} >= {words[-1]}


def test_two_stability_checks_at_once_are_both_in_the_table(run):
    def other():
        assert main(["stability", str(run), "--sample", "3", "--dtype", "float32"]) == 0

    import actcache.analyses.stability as stability

    with between(stability, "check_stability", 0, other):
        assert main(["stability", str(run), "--sample", "2", "--dtype", "bfloat16"]) == 0
    assert pq.read_table(run / "stability.parquet")["dtype"].to_pylist() == ["float32"] * 3 + ["bfloat16"] * 2


# ---- files that are damaged, or of other cells ----


def test_a_damaged_group_is_scored_again_or_refused(small, sweep, capfd):
    assert main(["grid", str(small), "--sweep", sweep("a")]) == 0
    cells = cells_of(small)
    plain = next(
        path for path in sorted((small / "cells").glob("*.parquet")) if variants_in(pq.read_table(path)) == ["none"]
    )
    others = next(
        path for path in sorted((small / "cells").glob("*.parquet")) if variants_in(pq.read_table(path)) == ["a"]
    )
    for path in (plain, others):
        good = path.read_bytes()
        data = bytearray(good)
        data[len(data) // 3] ^= 4
        path.write_bytes(data)
        if path == others:
            refused(capfd, f"{path} is damaged", "grid", small, code=1)
            refused(capfd, f"{path} is damaged", "plan", small, code=1)
        capfd.readouterr()
        assert main(["grid", str(small), "--sweep", sweep("a")]) == 0
        assert f"actcache: {path} is damaged; its cells are scored again" in capfd.readouterr().err
        assert path.read_bytes() == good
        assert cells_of(small).equals(cells)


def test_damaged_cells_are_refused_and_made_again(run, capfd):
    path = run / "cells.parquet"
    good = path.read_bytes()
    path.write_bytes(good.replace(b"native", b"nativf", 1))
    for verb in ("effects", "report"):
        refused(capfd, "cells.parquet is damaged: ", verb, run, code=1)
        refused(capfd, f"'actcache grid {run}' makes it again", verb, run, code=1)
    refused(capfd, "cells.parquet is damaged", "effects", path, code=1)
    assert main(["grid", str(run)]) == 0
    assert path.read_bytes() == good


def test_a_report_is_of_the_cells_that_are_there(small, sweep, capfd):
    assert main(["effects", str(small), "--draws", "50", "--seed", "3"]) == 0
    assert main(["grid", str(small), "--sweep", sweep("new")]) == 0
    capfd.readouterr()
    assert main(["report", str(small)]) == 0
    assert "effects.json is of other cells than" in capfd.readouterr().err
    effects = json.loads((small / "effects.json").read_text())
    assert {group["variant"] for group in effects["groups"]} == {"none", "new"}
    assert (effects["draws"], effects["seed"]) == (50, 3)
    before = (small / "effects.json").read_bytes()
    for damage in (before.replace(b"mean", b"maen", 1), b"", None):
        if damage is None:
            (small / "effects.json").unlink()
        else:
            (small / "effects.json").write_bytes(damage)
        assert main(["report", str(small)]) == 0
        again = json.loads((small / "effects.json").read_text())
        assert [group["interaction"]["mean"] for group in again["groups"]] == [
            group["interaction"]["mean"] for group in effects["groups"]
        ]
        assert again["draws"] == 2000, "what was asked before is not known"


def test_a_report_shows_the_effects_as_they_were_asked_for(small, sweep, capfd):
    words = ["--draws", "50", "--by", "step", "--weights", "prompt"]
    assert main(["effects", str(small), *words]) == 0
    before = json.loads((small / "effects.json").read_text())
    assert main(["report", str(small)]) == 0
    page = (small / "report.html").read_text()
    assert "step&gt;=1" in page
    assert "weigh every prompt the same" in page
    assert json.loads((small / "effects.json").read_text()) == before
    assert main(["grid", str(small), "--sweep", sweep("other")]) == 0
    assert main(["report", str(small)]) == 0
    again = json.loads((small / "effects.json").read_text())
    assert again["options"] == before["options"]
    plain = [group for group in again["groups"] if group["variant"] == "none"]
    assert plain == before["groups"]


def test_verify_names_damaged_files_of_the_run(small, capfd):
    assert main(["verify", str(small)]) == 0
    names = sorted([*small.glob("*.*"), *(small / "cells").iterdir()])
    assert len(names) == 5 + len(list((small / "cells").iterdir()))
    for path in names:
        good = path.read_bytes()
        path.write_bytes(good[:-30] + bytes([good[-30] ^ 1]) + good[-29:])
        capfd.readouterr()
        assert main(["verify", str(small)]) == 1
        assert path.name in "".join(capfd.readouterr())
        path.write_bytes(good)
    assert main(["verify", str(small)]) == 0


def test_a_record_whose_seal_is_none_is_damaged(run, capfd):
    """One letter of it is no hexadecimal digit any more: that is no earlier version's record, which has no seal."""
    path = run / "run.json"
    good = path.read_text()
    start = good.rindex('"seal": "') + len('"seal": "')
    path.write_text(good[:start] + "g" + good[start + 1 :])
    assert main(["verify", str(run)]) == 1
    assert "run.json is damaged: its seal is no SHA-256; put back what was there" in "".join(capfd.readouterr())
    path.write_text(good)
    assert main(["verify", str(run)]) == 0


@pytest.mark.parametrize("left", [0, 1, -100])
def test_verify_names_files_that_were_cut(run, capfd, left):
    """A seal that was cut off was there: the run's record has one."""
    ways_on = {
        "run.json": "put back what was there",
        "cells.parquet": f"'actcache grid {run}' makes it again",
        "effects.json": f"'actcache effects {run}' makes it again",
        "effects-stable-only-min-gap-0.json": f"'actcache effects {run} --stable-only --min-gap 0' makes it again",
        "report.html": f"'actcache report {run}' makes it again",
        "stability.parquet": f"'actcache stability {run}' makes it again",
        "timings.json": "remove it",
    }
    ways_on[min((run / "cells").iterdir()).name] = "give the 'actcache grid' command again"
    assert main(["stability", str(run), "--dtype", "float32"]) == 0
    assert main(["effects", str(run), "--stable-only", "--min-gap", "-0.0"]) == 0
    assert f"next: actcache report {run} --stable-only --min-gap 0\n" in capfd.readouterr().err
    (run / "effects-mine.json").write_text("{}")
    assert main(["verify", str(run)]) == 0
    (said,) = (line for line in capfd.readouterr().out.splitlines() if line.startswith(f"{run}: as written are "))
    assert all(name in said for name in ways_on if name[0] != "b")
    assert said.endswith("timings.json, 32 of cells/")
    for name, way_on in ways_on.items():
        path = run / name if (run / name).is_file() else run / "cells" / name
        good = path.read_bytes()
        path.write_bytes(good[:left])
        capfd.readouterr()
        assert main(["verify", str(run)]) == (2 if name == "run.json" else 1)
        said = "".join(capfd.readouterr())
        assert str(path) in said
        assert way_on in said
        path.write_bytes(good)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({name: record[name] for name in list(record)[:-2]}))
    (run / "report.html").write_text("an earlier version's")
    assert main(["verify", str(run)]) == 0
    assert "which cannot be checked: run.json, report.html" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"store": 5}, "'store' is 5, expected text"),
        ({"fingerprint": []}, "'fingerprint' is [], expected text"),
        ({"prompts": None}, "'prompts' is None, expected text"),
        ({"checkpoints": 3}, "'checkpoints' is 3, expected an object of folders by label"),
        ({"checkpoints": {"pt": "/a", "it": 1}}, "expected an object of folders by label"),
        ({"checkpoints": {}}, "says where no checkpoint is, the store"),
        ({"checkpoints": {"pt": "/a"}}, "says where pt is, the store"),
        ({"more": ""}, "see 'more'"),
        ("[]", "it holds a JSON list, expected an object"),
        ("{}", "see 'checkpoints'"),
        ("[" * 100_000, "is not a run record: "),
        ("", "is not a run record: "),
    ],
)
def test_a_record_that_is_none_is_one_line(run, capfd, change, words):
    path = run / "run.json"
    record = json.loads(path.read_text())
    unsealed = {name: value for name, value in record.items() if name not in ("made_from", "seal")}
    path.write_text(change if isinstance(change, str) else json.dumps(unsealed | change))
    for verb in ("effects", "report", "plan", "inspect"):
        refused(capfd, words, verb, run)


def test_cells_are_not_written_through_a_link(run, capfd):
    shutil.rmtree(run / "cells")
    theirs = run.parent / "theirs"
    theirs.mkdir()
    (run / "cells").symlink_to(theirs)
    refused(capfd, f"{run / 'cells'} is a link: nothing is changed through it", "grid", run)
    assert not list(theirs.iterdir())


@pytest.mark.parametrize("lacking", ["pair", "late_main"])
def test_effects_of_an_earlier_version_are_made_again_for_a_report(run, capfd, lacking):
    whole = (run / "effects.json").read_bytes()
    found = read_json(run / "effects.json", "effects", "")
    for group in found.content["groups"]:
        del group[lacking]
    (run / "effects.json").write_bytes(json_bytes(found.content, found.made_from))
    assert main(["report", str(run)]) == 0
    assert "it is made again" in capfd.readouterr().err
    assert (run / "effects.json").read_bytes() == whole


def test_effects_that_leave_events_out_are_another_file(run, capfd):
    n_events = len(actcache_store(run))
    gaps = actcache_store(run).events
    gap = sorted(map(min, zip(gaps["gap_pt"].to_pylist(), gaps["gap_it"].to_pylist(), strict=True)))[3]
    before, page = (run / "effects.json").read_bytes(), (run / "report.html").read_bytes()
    capfd.readouterr()
    assert main(["effects", str(run), "--min-gap", repr(gap), "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed == json.loads((run / f"effects-min-gap-{gap!r}.json").read_text())
    assert {group["n_events"] for group in printed["groups"]} == {n_events - 3}
    assert (run / "effects.json").read_bytes() == before
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_bytes() == page
    assert main(["report", str(run), "--min-gap", repr(gap)]) == 0
    assert "more events are left out" in (run / "report.html").read_text()
    assert main(["stability", str(run), "--dtype", "float32"]) == 0
    assert main(["effects", str(run), "--min-gap", "0", "--stable-only"]) == 0
    assert (run / "effects-stable-only-min-gap-0.json").is_file()
    assert (run / "effects.json").read_bytes() == before


# ---- which store, which place ----


def test_what_a_run_records_is_absolute(tmp_path, monkeypatch, capfd):
    """And a relative place in the record of an earlier version is refused, until the capture is given there again."""
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
    monkeypatch.chdir(tmp_path / "a")
    for name, prompts in (("a", tiny.PROMPTS[:4]), ("b", tiny.PROMPTS[4:8])):
        lines = (json.dumps({"id": f"{name}{i}", "prompt": text}) for i, text in enumerate(prompts))
        (tmp_path / name / "prompts.jsonl").write_text("\n".join(lines))
    tiny.make_pair(tmp_path, "llama")
    words = ["--pt", "../pt", "--it", "../it", "--prompts", "prompts.jsonl", "--out", "run", "--store", "store"]
    words += ["--max-new", str(MAX_NEW)]
    for name in ("b", "a"):
        os.chdir(tmp_path / name)
        assert main(["capture", *words]) == 0
    record = RunFolder(tmp_path / "a" / "run").record()
    places = [*record.checkpoints.values(), record.prompts, record.store]
    assert all(Path(place).is_absolute() for place in places)
    os.chdir(tmp_path / "b")
    assert main(["grid", "../a/run"]) == 0
    assert all(name.startswith("a") for name in cells_of(tmp_path / "a" / "run")["prompt_id"].to_pylist())

    path = tmp_path / "a" / "run" / "run.json"
    earlier = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("made_from", "seal")}
    del earlier["fingerprint"]
    path.write_text(json.dumps(earlier | {"store": "store"}))
    refused(capfd, "relative to a folder that it does not name; give the capture command again", "grid", "../a/run")
    os.chdir(tmp_path / "a")
    assert main(["capture", *words]) == 0
    assert RunFolder("run").record() == record
    refused(capfd, "has its store at", "capture", *words[:-4], *words[-2:])


def test_a_store_that_was_replaced_is_refused(tiny_run, run, sweep, capfd):
    other = tiny_run("llama", torch.float32, *SEGMENTS, "--strict")
    shutil.rmtree(run / "store")
    shutil.copytree(other.out / "store", run / "store")
    export = ["export", "--to", "npy", "--out", run.parent / "exported"]
    for words in (["grid"], ["report"], ["plan"], ["effects"], ["stability"], ["inspect"], export):
        refused(capfd, "is not the one that", words[0], run, *words[1:])
    with pytest.raises(IncompatibleError, match="is not the one that"):
        actcache.open_store(run)
    again = ["capture", "--pt", other.pt, "--it", other.it, "--prompts", other.prompts, "--out", run]
    again += ["--max-new", MAX_NEW, *SEGMENTS[:4]]
    refused(capfd, "is not the one that", *again)
    shutil.rmtree(run / "store")
    assert main([str(word) for word in [*again, "--strict"]]) == 0, "begun anew"
    assert actcache_store(run).events.equals(other.store.events)
    refused(capfd, "cells.parquet was made from another store", "report", run)


def test_cells_of_another_store_are_refused(tiny_run, run, capfd):
    other = tiny_run("llama", torch.float32, *SEGMENTS, "--strict")
    shutil.copy(other.out / "cells.parquet", run)
    for verb in ("effects", "report"):
        refused(capfd, "cells.parquet was made from another store", verb, run)
    shutil.copytree(other.out / "cells", run / "cells", dirs_exist_ok=True)
    want = by_key(cells_of(other.out))
    assert main(["grid", str(run)]) == 0
    found = by_key(cells_of(run))
    assert found.keys() == want.keys()
    assert found != want, "packed, as the run was"


def test_cells_of_other_events_do_not_count(run):
    """Of a store whose fingerprint is the same, as that of one captured anew on another machine may be."""
    store = actcache_store(run)
    moved = store.events.set_column(
        store.events.column_names.index("position"), "position", pc.add(store.events["position"], 1)
    )
    assert len(grid.find_finished(run / "cells", store)[0]) == 4
    store._tables["events"] = moved
    assert grid.find_finished(run / "cells", store) == ({}, {})


# ---- earlier versions ----


def test_a_run_of_an_earlier_version_is_scored_again_where_nothing_can_be_checked(run, capfd):
    cells = cells_of(run)
    for path in [*(run / "cells").glob("*.parquet"), run / "cells.parquet"]:
        table = pq.read_table(path)
        notes = {key: value for key, value in (table.schema.metadata or {}).items() if key == b"actcache"}
        path.unlink()
        name = path.name if path.parent == run else f"{path.name.partition('.')[0]}.parquet"
        pq.write_table(table.replace_schema_metadata(notes), path.with_name(name))
    for name in ("effects.json", "run.json", "timings.json"):
        content = json.loads((run / name).read_text())
        unsealed = {key: value for key, value in content.items() if key not in ("made_from", "seal", "fingerprint")}
        (run / name).write_text(json.dumps(unsealed))
    for verb in ("effects", "report"):
        refused(capfd, "it has no seal (an earlier version wrote it, or another program)", verb, run)
        refused(capfd, f"'actcache grid {run}' makes it again", verb, run)
    refused(capfd, "timings.json is not timings of this version: it has no seal", "plan", run)
    capfd.readouterr()
    assert main(["grid", str(run)]) == 0
    assert "have no checksum: they are scored again" in capfd.readouterr().err
    assert cells_of(run).equals(cells)
    assert main(["report", str(run)]) == 0
    assert read_json(run / "effects.json", "effects", "").content["groups"]
