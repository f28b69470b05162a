"""Jobs: plain data that any process turns into the same table; finished ones are not run again."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import actcache
from actcache.analyses.grid import GridSettings, jobs_left, run_grid
from actcache.cli import main
from actcache.errors import CorruptFileError, IncompatibleError
from actcache.replay.edits import Add, Edit, Interpolate, Variant
from actcache.replay.late_stack import LateStack
from actcache.study import results
from actcache.study.cells import finished_cells
from actcache.study.engine import LocalEngine

pytestmark = pytest.mark.slow

SEGMENTS = ("--shard-prompts", "4", "--boundary", "2,3", "--stability", "0")


@pytest.fixture(scope="module")
def captured(tiny_run):
    """A run, and the folders of its checkpoints."""
    run = tiny_run("llama", torch.float32, *SEGMENTS)
    return run, {"pt": run.pt, "it": run.it}


def settings(**more):
    variants = (
        Variant("half", (Edit(Interpolate("it", 0.5)),)),
        Variant("pushed", (Edit(Add(torch.ones(32)), positions="last"),)),
    )
    return GridSettings(**{"boundaries": (2, 3), "scopes": ("prefix", "position"), "variants": variants, **more})


WORKER = """
import pickle, sys
from pathlib import Path
import pyarrow.parquet as pq
import actcache
from actcache.study.engine import LocalEngine
job, place, checkpoints = pickle.loads(Path(sys.argv[1]).read_bytes())
engine = LocalEngine.of(actcache.open_store(place), checkpoints)
result = job.run(engine, job.read(engine))
pq.write_table(result.table, sys.argv[2])
"""


@pytest.mark.parametrize("strict", [True, False])
def test_a_job_in_a_fresh_process_gives_the_same_table(captured, tmp_path, strict):
    run, checkpoints = captured
    jobs = jobs_left(run.store, {}, settings(strict=strict))
    assert {(job.boundary, job.late) for job in jobs} == {(b, late) for b in (2, 3) for late in ("pt", "it")}
    job = jobs[1]
    engine = LocalEngine.of(run.store, checkpoints)
    here = job.run(engine, job.read(engine)).table
    (tmp_path / "job").write_bytes(pickle.dumps((job, str(run.out / "store"), checkpoints)))
    command = [sys.executable, "-c", WORKER, str(tmp_path / "job"), str(tmp_path / "table")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there = pq.read_table(tmp_path / "table")
    if strict:
        assert there.equals(here)
    else:
        assert there.drop_columns(["margin", "noop_delta"]).equals(here.drop_columns(["margin", "noop_delta"]))
        assert max(abs(a - b) for a, b in zip(*(t["margin"].to_pylist() for t in (here, there)), strict=True)) < 1e-4


def test_equal_jobs_have_equal_keys_and_others_have_not(captured):
    run, _ = captured
    one, again = (jobs_left(run.store, {}, settings())[0] for _ in range(2))
    turned = jobs_left(run.store, {}, settings(scopes=("position", "prefix"), variants=settings().variants[::-1]))[0]
    assert one.key == again.key == turned.key
    assert results.file_name(one.key) == results.file_name(turned.key)
    others = [
        jobs_left(run.store, {}, settings(**more))[0]
        for more in (
            {"strict": True},
            {"max_tokens": 64},
            {"readouts": ("native",)},
            {"kl": True},
            {"top1": True},
            {"scopes": ("prefix",)},
            {"variants": settings().variants[:1]},
            {"boundaries": (3,)},
        )
    ]
    assert len({results.file_name(job.key) for job in [one, *others]}) == len(others) + 1


def test_a_job_of_another_store_is_refused(captured):
    run, checkpoints = captured
    job = jobs_left(run.store, {}, settings())[0]
    gone = dataclasses.replace(job, segment="elsewhere")
    with pytest.raises(IncompatibleError, match="has no segment 'elsewhere'"):
        gone.read(LocalEngine.of(run.store, checkpoints))


def load_counted(checkpoints, loads):
    def load(label, boundary):
        loads.append((label, boundary))
        return LateStack.load(checkpoints[label], boundary, dtype=torch.float32)

    return load


@pytest.mark.parametrize("strict", [True, False])
def test_a_further_readout_replays_nothing(captured, tmp_path, monkeypatch, strict):
    """Its cells are bit for bit those of a grid that had it from the start."""
    run, checkpoints = captured
    whole = settings(variants=(), strict=strict)
    expected = run_grid(run.store, load_counted(checkpoints, []), tmp_path / "whole", whole)
    first = settings(variants=(), strict=strict, readouts=("native",))
    run_grid(run.store, load_counted(checkpoints, []), tmp_path / "cells", first)
    kept = {path.name for path in (tmp_path / "cells").glob("*.safetensors")}
    assert {name.partition(".")[0] for name in kept} == {path.name.partition(".")[0] for path in files(tmp_path)}

    def refuse(*args, **more):
        raise AssertionError("something was replayed")

    monkeypatch.setattr(LateStack, "iterate_variants", refuse)
    loads = []
    found = run_grid(run.store, load_counted(checkpoints, loads), tmp_path / "cells", whole)
    assert found.equals(expected)
    last = run.store.fingerprint.n_blocks - 1
    assert sorted(loads) == [("it", last), ("pt", last)], "more than a head was loaded"
    with_kl = settings(variants=(), strict=strict, kl=True)
    assert run_grid(run.store, load_counted(checkpoints, []), tmp_path / "cells", with_kl)["kl"].null_count == 0


def files(folder: Path) -> list[Path]:
    return results.result_files(folder / "cells")


def test_kept_final_states_are_what_the_late_stacks_give(captured, tmp_path):
    run, checkpoints = captured
    run_grid(run.store, load_counted(checkpoints, []), tmp_path / "cells", settings(variants=(), strict=True))
    finished = finished_cells(tmp_path / "cells", run.store)
    for (boundary, scope, late), of_place in finished.items():
        stack = LateStack.load(checkpoints[late], boundary, dtype=torch.float32)
        for scored in of_place:
            states = scored.final()
            for upstream in ("pt", "it"):
                rows, offsets = run.store.states(upstream, boundary, scored.events)
                own, _ = run.store.states(late, boundary, scored.events)
                if scope == "position":
                    last = offsets[1:] - 1
                    rows, from_upstream = own.clone(), rows
                    rows[last] = from_upstream[last]
                assert torch.equal(states[f"{scope}/{upstream}"], stack.run(rows, offsets, strict=True))


def test_damaged_final_states_are_refused_by_name(captured, tmp_path):
    run, checkpoints = captured
    first = settings(variants=(), readouts=("native",), boundaries=(3,), scopes=("prefix",))
    run_grid(run.store, load_counted(checkpoints, []), tmp_path / "cells", first)
    path = min((tmp_path / "cells").glob("*.safetensors"))
    good = path.read_bytes()
    path.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    more = settings(variants=(), boundaries=(3,), scopes=("prefix",))
    with pytest.raises(CorruptFileError, match=path.name):
        run_grid(run.store, load_counted(checkpoints, []), tmp_path / "cells", more)
    path.unlink()  # as the message says: what needs it is replayed
    assert run_grid(run.store, load_counted(checkpoints, []), tmp_path / "cells", more).num_rows


def test_the_command_says_when_nothing_is_left(captured, capfd):
    run, _ = captured
    before = {path.name: path.stat().st_mtime_ns for path in files(run.out)}
    assert main(["grid", str(run.out)]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in files(run.out)} == before


def test_a_table_is_in_one_order_whatever_the_files(captured, tmp_path):
    """By boundary, scope, event, variant, upstream, late, readout; also where parts were scored one after another."""
    run, checkpoints = captured
    load = load_counted(checkpoints, [])
    at_once = run_grid(run.store, load, tmp_path / "one", settings(strict=True))
    for part in (
        settings(strict=True, boundaries=(3,), variants=()),
        settings(strict=True, scopes=("position",), readouts=("common_it",)),
        settings(strict=True),
    ):
        by_parts = run_grid(run.store, load, tmp_path / "parts", part)
    assert by_parts.equals(at_once)
    events = {event: number for number, event in enumerate(actcache.Run(run.out).store.events["event_id"].to_pylist())}
    rows = at_once.select(["boundary", "scope", "event_id", "variant", "upstream", "late", "readout"]).to_pylist()
    labels = ("pt", "it")
    places = [
        (
            row["boundary"],
            row["scope"],
            events[row["event_id"]],
            (row["variant"] != "none", row["variant"]),
            labels.index(row["upstream"]),
            labels.index(row["late"]),
            (row["readout"] != "native", row["readout"]),
        )
        for row in rows
    ]
    assert places == sorted(places)
    assert pa.table({"place": [str(place) for place in places]}).group_by("place").aggregate([]).num_rows == len(rows)
