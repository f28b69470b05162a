"""Jobs: plain data that any process turns into the same table; finished ones are not run again."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import pickle
import sys
import weakref
from functools import partial
from pathlib import Path

import forked
import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from conftest import MAX_NEW
from twins import reference

import actcache
from actcache.analyses.grid import GridSettings, jobs_left, run_grid
from actcache.capture.given import given_by
from actcache.capture.settings import CaptureSettings
from actcache.capture.streams import Streaming
from actcache.cli import main
from actcache.errors import CheckError, CorruptFileError, IncompatibleError, InputError
from actcache.models.checkpoint import Checkpoint
from actcache.models.cost import ModelShape
from actcache.models.lineup import Lineup
from actcache.models.parts import load_readout
from actcache.prompts import read_prompts
from actcache.replay.edits import Add, Edit, Interpolate, Variant
from actcache.replay.late_stack import LateStack
from actcache.replay.streamed_late import StreamedLate
from actcache.study import results
from actcache.study.capture import LocalCapture
from actcache.study.capture_job import CaptureJob, RowsJob
from actcache.study.cells import finished_cells
from actcache.study.decode_job import DecodeJob
from actcache.study.engine import LocalEngine
from actcache.study.finished import truth
from actcache.study.forward_job import ForwardJob
from actcache.study.holding import Holding
from actcache.study.plan import Study
from actcache.study.runner import run_replays
from actcache.study.size_job import read_sizes, size_jobs
from actcache.study.work import Expected, total

pytestmark = pytest.mark.slow

N_PROMPTS, OF_SEGMENT = 8, 3  # so that there are three segments
SEGMENTS = ("--shard-prompts", str(OF_SEGMENT), "--limit", str(N_PROMPTS), "--boundary", "2,3", "--stability", "0")


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
import actcache
from actcache.models.lineup import Lineup
from actcache.study.capture import LocalCapture
from actcache.study.engine import LocalEngine
from actcache.study.finished import settings_of
from actcache.study.held import Held
jobs, place, checkpoints, holding = pickle.loads(Path(sys.argv[1]).read_bytes())
store = actcache.open_store(place)
lineup = Lineup.open(checkpoints)
given = {}
for name, job in jobs.items():
    if name in ("searched", "given", "rows"):
        engine = LocalCapture(lineup, getattr(job, "settings", settings_of(store)), held=Held(lineup, holding))
        assert not engine.is_together
        engine.hold(store.segments)
    else:
        engine = LocalEngine.of(store, checkpoints, holding)
        assert engine.one_at_a_time
    given[name] = job.run(engine, job.read(engine))
Path(sys.argv[2]).write_bytes(pickle.dumps(given))
"""


@pytest.fixture(scope="module")
def jobs(captured):
    """A job of each kind, by name."""
    run, checkpoints = captured
    replays = {
        f"replay, {'strict' if strict else 'packed'}": replay_job(run, strict=strict) for strict in (True, False)
    }
    sizes = size_jobs(run.store, {}, 3, ("pt", "it"), strict=True, max_tokens=None)[1]
    of_models = {"forward": forward_job(run), "decode": decode_job(run)}
    return replays | {"sizes": sizes} | of_models | capture_jobs(run, checkpoints)


@pytest.fixture(scope="module")
def there(captured, jobs, tmp_path_factory):
    """What a fresh process makes of them, which has no more than the jobs, the store, the folders of the models, and
    how these are to be held."""
    run, checkpoints = captured
    folder = tmp_path_factory.mktemp("worker")
    (folder / "jobs").write_bytes(pickle.dumps((jobs, str(run.out / "store"), checkpoints, Holding(resident="one"))))
    command = [sys.executable, "-c", WORKER, str(folder / "jobs"), str(folder / "given")]
    done = forked.run(command)
    assert done.returncode == 0, done.stderr
    return pickle.loads((folder / "given").read_bytes())


def replay_job(run, strict):
    jobs = jobs_left(run.store, {}, settings(strict=strict))
    assert {(job.boundary, job.late) for job in jobs} == {(b, late) for b in (2, 3) for late in ("pt", "it")}
    return jobs[1]


@pytest.mark.parametrize("how", ["strict", "packed"])
def test_a_replay_job_in_a_fresh_process_gives_the_same_table(captured, jobs, there, how):
    run, checkpoints = captured
    job, engine = jobs[f"replay, {how}"], LocalEngine.of(run.store, checkpoints)
    here, there = job.run(engine, job.read(engine)).table, there[f"replay, {how}"].table
    if how == "strict":
        assert there.equals(here)
    else:
        assert there.drop_columns(["margin", "noop_delta"]).equals(here.drop_columns(["margin", "noop_delta"]))
        assert max(abs(a - b) for a, b in zip(*(t["margin"].to_pylist() for t in (here, there)), strict=True)) < 1e-4


def test_a_size_job_in_a_fresh_process_gives_the_same_table_as_hooks(captured, jobs, there):
    run, checkpoints = captured
    job, engine = jobs["sizes"], LocalEngine.of(run.store, checkpoints)
    assert (job.boundary, job.late, job.n_units) == (3, "it", 2 * len(job.lengths))
    table = job.run(engine, job.read(engine)).table
    assert there["sizes"].table.equals(table)
    model, rows = reference.load(run.it, torch.float32), table.to_pylist()
    first = run.store.events["event_id"].to_pylist().index(rows[0]["event_id"])
    assert [row["upstream"] for row in rows] == ["pt", "it"] * len(job.lengths)
    for number, row in enumerate(rows):
        event = first + number // 2
        ids, states = run.store.token_ids([event])[0].tolist(), run.store.states(row["upstream"], 3, [event])[0]
        outputs = reference.overwritten(model, ids, 3, states).double().numpy()
        assert row["event_id"] == run.store.events["event_id"][event].as_py()
        assert row["rms"] == pytest.approx(np.sqrt(np.mean(outputs**2)), rel=1e-12)
        assert row["std_p"] == pytest.approx(np.std(outputs[-1]), rel=1e-12)


def test_sizes_that_are_there_are_not_replayed_again(captured, tmp_path):
    run, checkpoints = captured
    given = run.store, {}, 3, ("pt", "it")
    how = {"strict": False, "max_tokens": None}
    jobs, engine = size_jobs(*given, **how), LocalEngine.of(run.store, checkpoints)
    assert {(job.late, job.upstreams) for job in jobs} == {("pt", ("pt", "it")), ("it", ("pt", "it"))}
    run_replays(jobs[:3], engine, tmp_path)
    with pytest.raises(CheckError, match="lacks sizes of some events"):
        read_sizes(tmp_path, run.store, 3, ("pt", "it"), **how)
    finished = finished_cells(tmp_path, run.store)
    left = size_jobs(run.store, finished, 3, ("pt", "it"), **how)
    assert [job.key for job in left] == [job.key for job in jobs[3:]]
    assert len(size_jobs(run.store, finished, 2, ("pt", "it"), **how)) == len(jobs)
    assert len(size_jobs(run.store, finished, 3, ("pt", "it"), strict=True, max_tokens=None)) == len(jobs)
    run_replays(left, engine, tmp_path)
    found = read_sizes(tmp_path, run.store, 3, ("pt", "it"), **how)
    for (upstream, late), sizes in found.items():
        rows, offsets = run.store.states(upstream, 3)
        expected = engine.late(late, 3).sizes(rows, offsets, strict=True)
        assert np.allclose(sizes, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kept", ["one", "block"])
def test_a_worker_holds_checkpoints_as_it_is_told(captured, jobs, kept):
    run, checkpoints = captured
    holding = pickle.loads(pickle.dumps(Holding.of("cpu", kept)))
    engine, plain = LocalEngine.of(run.store, checkpoints, holding), LocalEngine.of(run.store, checkpoints)
    job = jobs["replay, strict"]
    assert job.run(engine, job.read(engine)).table.equals(job.run(plain, job.read(plain)).table)
    first = weakref.ref(engine.late("pt", 2))
    assert isinstance(engine.late("it", 2), StreamedLate) == (kept == "block")
    gc.collect()
    assert first() is None, "one late stack at a time"
    assert plain.late("pt", 2) is not plain.late("it", 2)
    assert isinstance(engine.forwarder("pt", "float32"), Streaming) == (kept == "block")


def test_a_worker_is_told_of_other_checkpoints(captured):
    run, checkpoints = captured
    with pytest.raises(IncompatibleError, match=r"checkpoint pt at .* is not the one captured: its weights"):
        LocalEngine.of(run.store, {"pt": checkpoints["it"]})
    with pytest.raises(InputError, match="the store has no checkpoint 'sft'; it has pt, it"):
        LocalEngine.of(run.store, {"sft": checkpoints["it"]})


# ---- jobs over full models ----


def sequences_of(run, n=6):
    ids, offsets = run.store.token_ids(range(n))
    return tuple(tuple(ids[a:b].tolist()) for a, b in itertools.pairwise(offsets.tolist()))


def forward_job(run, **more):
    sequences = sequences_of(run)
    first = tuple(max(0, len(ids) - 5) for ids in sequences)
    return ForwardJob(
        **{"checkpoint": "c", "label": "it", "dtype": "float32", "sequences": sequences, "first": first}
        | {"strict": True, "max_tokens": 64}
        | more
    )


def decode_job(run, **more):
    sequences = tuple(ids[: 4 + number] for number, ids in enumerate(sequences_of(run)))
    return DecodeJob(
        **{"checkpoint": "c", "label": "it", "dtype": "float32", "sequences": sequences, "max_new": 9}
        | {"end_ids": (tiny.EOS_ID,), "max_positions": None, "max_tokens": 4096}
        | more
    )


@pytest.mark.parametrize("kind", ["forward", "decode"])
def test_a_job_over_a_full_model_in_a_fresh_process_gives_the_same_table(captured, jobs, there, kind):
    run, checkpoints = captured
    here = jobs[kind].run(LocalEngine.of(run.store, checkpoints))
    assert here.table.num_rows
    assert there[kind].table.equals(here.table)
    assert there[kind].notes == here.notes


@pytest.mark.parametrize("strict", [True, False])
def test_a_forward_job_chooses_as_plain_forwards_do(captured, strict):
    run, checkpoints = captured
    job = forward_job(run, strict=strict)
    rows = job.run(LocalEngine.of(run.store, checkpoints)).table.to_pylist()
    model = reference.load(checkpoints["it"], torch.float32)
    expected = []
    for number, (ids, first) in enumerate(zip(job.sequences, job.first, strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].float()
        for position in range(first, len(ids)):
            top = logits[position].topk(2)
            expected.append((number, position, int(top.indices[0]), float(top.values[0] - top.values[1])))
    assert [(r["sequence"], r["position"], r["top1_id"]) for r in rows] == [one[:3] for one in expected]
    assert [r["gap"] for r in rows] == pytest.approx([one[3] for one in expected], abs=1e-4)


@pytest.mark.parametrize(
    ("more", "why"),
    [({}, {"max_new"}), ({"end_ids": "some"}, {"end_token"}), ({"max_positions": 12}, {"position_limit"})],
)
def test_a_decode_job_writes_what_a_loop_of_forwards_writes(captured, more, why):
    run, checkpoints = captured
    engine = LocalEngine.of(run.store, checkpoints)
    if more.get("end_ids"):  # what is chosen at the third step of each, so that all end there or before
        written = decode_job(run, end_ids=()).run(engine).table["token_ids"].to_pylist()
        more = {"end_ids": tuple(sorted({ids[2] for ids in written}))}
    job = decode_job(run, **more)
    rows = job.run(engine).table.to_pylist()
    model = reference.load(checkpoints["it"], torch.float32)
    for row, given in zip(rows, job.sequences, strict=True):
        ids, ended_by = list(given), "max_new"
        for _ in range(job.max_new):
            with torch.no_grad():
                token = int(model(torch.tensor([ids])).logits[0, -1].float().argmax())
            if token in job.end_ids:
                ended_by = "end_token"
                break
            ids.append(token)
            last = len(ids) - len(given) == job.max_new
            if not last and job.max_positions is not None and len(ids) > job.max_positions:
                ended_by = "position_limit"
                break
        assert (row["token_ids"], row["ended_by"]) == (ids[len(given) :], ended_by)
    assert why <= {row["ended_by"] for row in rows}


def capture_jobs(run, checkpoints):
    lineup = Lineup.open(checkpoints)
    job_settings = CaptureSettings((2, 3), max_new=MAX_NEW, shard_prompts=4)
    prompts = read_prompts(run.prompts)[:4]
    segment = run.store.segments[0]
    given = given_by(run.store, lineup, limit=4)
    return {
        "searched": CaptureJob(
            store="s",
            segment="one",
            settings=job_settings,
            prompts=tuple(prompts),
            ids=tuple(map(tuple, lineup.encode(prompts))),
        ),
        "given": CaptureJob(
            store="s",
            segment="two",
            settings=job_settings,
            prompts=tuple(one.as_prompt() for one in given),
            given=tuple(given),
        ),
        "rows": RowsJob(
            store="s",
            segment=segment.name,
            lengths=tuple(segment.row_offsets[1:] - segment.row_offsets[:-1]),
            sites=(("state", (1,)), ("mlp", (2,))),
        ),
    }


@pytest.mark.parametrize("kind", ["searched", "given", "rows"])
def test_a_capture_job_in_a_fresh_process_gives_the_same_rows(captured, jobs, there, kind):
    run, checkpoints = captured
    job = jobs[kind]
    engine = LocalCapture(Lineup.open(checkpoints), getattr(job, "settings", CaptureSettings((2, 3))))
    engine.hold(run.store.segments)
    here, there = job.run(engine, job.read(engine)), there[kind]
    if kind != "rows":
        assert here.events.num_rows
        assert here.events.equals(there.events)
        here, there = here.states | here.final, there.states | there.final
    assert here.keys() == there.keys()
    for key, rows in here.items():
        assert len(rows)
        assert torch.equal(rows, there[key])


def test_keys_hold_what_is_given_depends_on(captured):
    run, checkpoints = captured
    forward, decode = forward_job(run), decode_job(run)
    others = [
        forward_job(run, **more).key
        for more in ({"dtype": "bfloat16"}, {"strict": False}, {"checkpoint": "d"}, {"first": (0,) * 6})
    ]
    assert all(other != forward.key for other in others)
    assert forward_job(run, max_tokens=9).key == forward.key, "a strict forward has no packs"
    others = [decode_job(run, **more).key for more in ({"max_new": 8}, {"end_ids": ()}, {"max_positions": 99})]
    assert all(other != decode.key for other in others)
    searched = capture_jobs(run, checkpoints)["searched"]
    assert dataclasses.replace(searched, prompts=searched.prompts[::-1]).key != searched.key
    assert dataclasses.replace(searched, expected=Expected(1.0, 3.0, 3.0)).key == searched.key


def test_costs_of_jobs_sum_up_to_what_a_run_took(captured):
    """What the planner counts of a whole run is the sum over its jobs."""
    run, checkpoints = captured
    lineup = Lineup.open(checkpoints)
    shapes = {label: ModelShape.of_checkpoint(checkpoint) for label, checkpoint in lineup.checkpoints.items()}
    prompts = read_prompts(run.prompts)[:N_PROMPTS]
    lengths = [len(ids) for ids in lineup.encode(prompts)]
    study = Study(shapes, lengths, CaptureSettings((2, 3), shard_prompts=OF_SEGMENT))
    asked = GridSettings((2, 3)).of_pair(["pt", "it"], ("pt", "it"))
    took = truth(study, run.store, {}, finished_cells(run.out / "cells", run.store))
    parts = total(job.cost(shapes) for job in jobs_left(run.store, {}, asked))
    assert parts["grid"] == pytest.approx(took["grid_multiply_adds"])
    ids = sequences_of(run, len(run.store))
    forward = forward_job(run, sequences=ids, first=tuple(len(one) - 1 for one in ids)).cost(shapes).parts["forward"]
    shape = shapes["it"]
    counted = sum(shape.products(np.array([len(one)], float)) + shape.head_products for one in ids)
    assert forward == pytest.approx(counted)
    decode = decode_job(run)
    counted = sum(
        shape.products(np.array([len(one)], float))
        + shape.head_products
        + sum(shape.step_products(np.array([len(one) + step], float)) + shape.head_products for step in range(8))
        for one in decode.sequences
    )
    assert decode.cost(shapes).parts["decode"] == pytest.approx(counted)


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

    monkeypatch.setattr(LateStack, "replay", refuse)
    heads = []

    def load_head(label):
        heads.append(label)
        return load_readout(Checkpoint.open(label, checkpoints[label]), torch.float32)

    found = run_grid(run.store, refuse, tmp_path / "cells", whole, load_readout=load_head)
    assert found.equals(expected)
    assert sorted(heads) == ["it", "pt"]
    with_kl = settings(variants=(), strict=strict, kl=True)
    found = run_grid(run.store, refuse, tmp_path / "cells", with_kl, load_readout=load_head)
    assert found["kl"].null_count == 0


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
    heads = {label: LateStack.load(of, 4).readout for label, of in checkpoints.items()}
    again = partial(run_grid, run.store, load_counted(checkpoints, []), tmp_path / "cells", more)
    with pytest.raises(CorruptFileError, match=path.name):
        again(load_readout=heads.__getitem__)
    path.unlink()  # as the message says: what needs it is replayed
    assert again(load_readout=heads.__getitem__).num_rows


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
