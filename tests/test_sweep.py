"""Grids over variants against forward hooks: scored, resumed and added to."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from conftest import MAX_NEW
from safetensors.torch import save_file
from sweeps import TENSORS, WIDTH, digests, one_edit
from twins import reference
from twins.edits import Changes, Study, hooked
from twins.reference import exact_margin

import actcache
from actcache.analyses import grid
from actcache.analyses.effects import effects
from actcache.analyses.grid import GridSettings, run_grid
from actcache.cli import main
from actcache.errors import InputError
from actcache.files import write_atomically
from actcache.replay.edits import (
    Add,
    Edit,
    Replace,
    Variant,
)
from actcache.replay.late_stack import LateStack
from actcache.replay.sweep import read_sweep
from actcache.study.run_folder import RunFolder

# ---- grids over variants ----

SWEEP = """
boundaries = [2, 3]
scopes = ["prefix", "position"]
readouts = ["native", "common_it", "common_pt"]
[[variants]]
name = "towards"
edits = [{ edit = "interpolate", donor = "it", sweep = { weight = [0.25, 0.75] } }]
[[variants]]
name = "everywhere"
edits = [{ edit = "replace", donor = "it", positions = "all" }]
[[variants]]
name = "pushed"
edits = [{ edit = "add", vector = { file = "x.safetensors", tensor = "d{boundary}" }, scale = 2.0 }]
[[variants]]
name = "no mlp"
edits = [{ edit = "replace", vector = "zeros", site = "mlp", layers = [3, 4] }]
[[variants]]
name = "no attention"
edits = [{ edit = "replace", vector = "zeros", site = "attention", layers = [4], positions = "all" }]
[[variants]]
name = "ends"
boundaries = [3]
edits = [{ edit = "add", vector = { file = "x.safetensors", tensor = "d" }, positions = [0, -1] }]
"""
COMMON_NAMES = ["towards[weight=0.25]", "towards[weight=0.75]", "everywhere", "pushed", "no mlp", "no attention"]
NAMES = {2: COMMON_NAMES, 3: [*COMMON_NAMES, "ends"]}
READOUTS = {"native": None, "common_it": "it", "common_pt": "pt"}


def changes_at(boundary):
    """SWEEP once more, as functions of single rows."""
    c = Changes(WIDTH)
    return {
        "none": [],
        "towards[weight=0.25]": [c.towards(0.25)],
        "towards[weight=0.75]": [c.towards(0.75)],
        "everywhere": [c.replace("all")],
        "pushed": [c.add_vector(TENSORS[f"d{boundary}"], 2.0)],
        "no mlp": [c.zero(site="mlp", layers=(3, 4))],
        "no attention": [c.zero("all", site="attention", layers=(4,))],
        "ends": [c.add_vector(TENSORS["d"], positions=(0, -1))],
    }


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """The checkpoints, and a run that is captured at boundaries 2 and 3 in two segments, but not scored. Strictly, for
    cells that hooked forwards shall equal bit for bit: states of a pack differ by rounding."""
    folder = tmp_path_factory.mktemp("captured")
    pair = dict(zip(("pt", "it"), tiny.make_pair(folder, "llama"), strict=True))
    prompts = tiny.write_prompts(folder / "prompts.jsonl", 5)
    words = ["capture", "--pt", pair["pt"], "--it", pair["it"], "--prompts", prompts, "--out", folder / "run"]
    words += ["--max-new", MAX_NEW, "--boundary", "2,3", "--shard-prompts", 3, "--strict"]
    assert main([str(word) for word in words]) == 0
    return pair, folder / "run"


@pytest.fixture
def run(captured, tmp_path):
    """A copy of it."""
    return shutil.copytree(captured[1], tmp_path / "run")


@pytest.fixture(scope="module")
def strict_cells(captured, tmp_path_factory):
    """Of SWEEP, by the command line: the folder of the run."""
    folder = tmp_path_factory.mktemp("strict")
    save_file(TENSORS, folder / "x.safetensors")
    (folder / "s.toml").write_text(SWEEP)
    run = shutil.copytree(captured[1], folder / "run")
    assert main(["grid", str(run), "--sweep", str(folder / "s.toml"), "--strict"]) == 0
    return run


def score(run, *more):
    assert main(["grid", str(run), *map(str, more)]) == 0
    return cells_of(run)


def cells_of(run):
    return pq.read_table(run / "cells.parquet")


KEYS = ("event_id", "boundary", "scope", "upstream", "late", "readout", "variant")


def by_key(cells, *columns):
    """Key of a cell -> its values; every key once."""
    rows = cells.select([*KEYS, *columns]).to_pylist()
    found = {tuple(row[key] for key in KEYS): tuple(row[column] for column in columns) for row in rows}
    assert len(found) == cells.num_rows
    return found


def earlier_files(run):
    return {path.name for path in (run / "cells").iterdir() if path.name.count(".") == 1}


def group_files(run):
    return {path.name: path.read_bytes() for path in (run / "cells").glob("*.parquet")}


@pytest.fixture
def scored(monkeypatch):
    """Names of the group files that are written from here on."""
    names = []

    def write(path, data):
        if path.suffix == ".parquet":  # the final states beside it apart
            names.append(path.name)
        write_atomically(path, data)

    monkeypatch.setattr("actcache.study.results.write_atomically", write)
    return names


def models_and_events(captured, run):
    """What cells are recomputed from: whole models by label, and events, each with its token ids, by name."""
    models = {label: reference.load(path, torch.float32) for label, path in captured[0].items()}
    store = actcache.open_store(run / "store")
    ids, offsets = store.token_ids()
    sequences = [ids[start:stop].tolist() for start, stop in itertools.pairwise(offsets.tolist())]
    events = zip(store.events.to_pylist(), sequences, strict=True)
    return models, {event["event_id"]: (event, sequence) for event, sequence in events}


@pytest.mark.slow
def test_cells_under_variants_equal_hooked_forwards(captured, strict_cells):
    models, events = models_and_events(captured, strict_cells)
    cells = cells_of(strict_cells)
    n_variants = sum(len(names) + 1 for names in NAMES.values())
    assert cells.num_rows == len(events) * 2 * 4 * len(READOUTS) * n_variants
    some = sorted(events)[:: max(1, len(events) // 2)][:2]
    hidden, states, n_checked = {}, {}, 0
    for cell in cells.to_pylist():
        if cell["event_id"] not in some:
            continue
        event, sequence = events[cell["event_id"]]
        boundary, scope, u, late = (cell[name] for name in ("boundary", "scope", "upstream", "late"))
        key = tuple(cell[name] for name in KEYS if name != "readout")
        if key not in hidden:
            place = cell["event_id"], boundary
            if place not in states:
                states[place] = {label: reference.states(model, sequence, boundary) for label, model in models.items()}
            state = states[place]
            rows = state[u] if scope == "prefix" else torch.cat([state[late][:-1], state[u][-1:]])
            study = Study(models[late], [sequence], [rows], [state["it"]], boundary)
            hidden[key] = hooked(study, 0, changes_at(boundary)[cell["variant"]])
        readout_model = models[READOUTS[cell["readout"]] or late]
        tokens = event["y_pt"], event["y_it"]
        logits = reference.readout(readout_model, hidden[key])
        assert cell["margin"] == exact_margin(readout_model, hidden[key], *tokens)
        assert cell["margin"] == pytest.approx(float(logits[tokens[1]] - logits[tokens[0]]), abs=1e-4)
        plain = cell["variant"] == "none"
        assert cell["top1_id"] == (int(logits.argmax()) if plain else None)
        assert cell["noop_delta"] == (0.0 if plain and u == late else None)
        n_checked += 1
    assert n_checked == 2 * 2 * 4 * len(READOUTS) * n_variants
    assert len({value.norm().item() for value in hidden.values()}) >= len(hidden) // 2, "most variants are one"


@pytest.mark.slow
def test_packed_cells_equal_strict_ones_to_rounding(run, strict_cells):
    packed = by_key(score(run, "--sweep", strict_cells.parent / "s.toml"), "margin", "top1_id")
    strict = by_key(cells_of(strict_cells), "margin", "top1_id")
    assert packed.keys() == strict.keys()
    for key, (margin, top1) in packed.items():
        assert margin == pytest.approx(strict[key][0], abs=1e-4)
        assert top1 == strict[key][1]


def settings_of(strict_cells, boundaries=(2, 3), scopes=("prefix", "position"), **more):
    sweep = read_sweep(strict_cells.parent / "s.toml", WIDTH)
    return GridSettings(boundaries, scopes, tuple(READOUTS), sweep.variants_at, strict=True, **more)


@pytest.mark.slow
@pytest.mark.parametrize("boundaries", [(2, 3), (3, 2)])
def test_strict_groups_are_the_same_bytes_whatever_the_order_of_boundaries(
    captured, strict_cells, boundaries, tmp_path
):
    """And late stacks are loaded once a checkpoint, from the first boundary on."""
    pair, run = captured
    loads = []

    def load(label, boundary):
        loads.append((label, boundary))
        return LateStack.load(pair[label], boundary)

    settings = settings_of(strict_cells, boundaries)
    told = []
    table = run_grid(actcache.open_store(run / "store"), load, tmp_path / "cells", settings, on_progress=told.append)
    assert {path.name: path.read_bytes() for path in (tmp_path / "cells").glob("*.parquet")} == group_files(
        strict_cells
    )
    assert table.equals(cells_of(strict_cells))
    assert sorted(loads) == [("it", 2), ("pt", 2)]
    n_replays = grid.count_replays(actcache.open_store(run / "store"), settings)
    assert (told[-1].done, told[-1].total, told[-1].found) == (n_replays, n_replays, 0)


@pytest.mark.slow
def test_removed_groups_alone_are_scored_again(strict_cells, tmp_path, scored):
    run = shutil.copytree(strict_cells, tmp_path / "run")
    before, cells = group_files(run), cells_of(run)
    removed = sorted(before)[1::3]
    assert 0 < len(removed) < len(before)
    for name in removed:
        (run / "cells" / name).unlink()
    again = score(run, "--sweep", strict_cells.parent / "s.toml", "--strict")
    assert sorted(scored) == removed
    assert group_files(run) == before
    assert again.equals(cells)


@pytest.mark.slow
def test_a_grid_killed_between_two_groups_goes_on(captured, strict_cells, tmp_path, monkeypatch):
    pair, run = captured
    store, left = actcache.open_store(run / "store"), [3]

    def die(path, data):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= path.suffix == ".parquet"
        write_atomically(path, data)

    def go_on():
        return run_grid(
            store, lambda label, b: LateStack.load(pair[label], b), tmp_path / "cells", settings_of(strict_cells)
        )

    monkeypatch.setattr("actcache.study.results.write_atomically", die)
    with pytest.raises(KeyboardInterrupt):
        go_on()
    survived = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").glob("*.parquet")}
    assert len(survived) == 3
    monkeypatch.setattr("actcache.study.results.write_atomically", write_atomically)
    assert go_on().equals(cells_of(strict_cells))
    for name, written_at in survived.items():
        assert (tmp_path / "cells" / name).stat().st_mtime_ns == written_at


FIRST = """
[[variants]]
name = "towards"
edits = [{ edit = "interpolate", donor = "it", weight = 0.5 }]
[[variants]]
name = "pushed"
edits = [{ edit = "add", vector = { file = "x.safetensors", tensor = "d" } }]
"""
SECOND = """
[[variants]]
name = "pushed"
edits = [{ edit = "add", vector = { file = "x.safetensors", tensor = "d" } }]
[[variants]]
name = "everywhere"
edits = [{ edit = "replace", donor = "it", positions = "all" }]
"""


def variants_in(cells):
    return sorted(cells["variant"].unique().to_pylist())


def of_variants(cells, *names):
    return {key: value for key, value in by_key(cells, "margin", "top1_id", "noop_delta").items() if key[-1] in names}


@pytest.mark.slow
def test_variants_leave_the_plain_cells_as_they_are(run, written, scored):
    plain = score(run)
    files, n_files = group_files(run), len(scored)
    more = score(run, "--sweep", written(FIRST))
    assert of_variants(more, "none") == of_variants(plain, "none")
    assert (
        more.filter(pc.equal(more["variant"], "none"))
        .sort_by([(key, "ascending") for key in KEYS])
        .equals(plain.sort_by([(key, "ascending") for key in KEYS]))
    )
    assert variants_in(more) == ["none", "pushed", "towards"]
    assert group_files(run).items() >= files.items()
    assert len(scored) == 2 * n_files
    assert score(run).equals(more), "a plain grid after it has nothing to do"
    assert len(scored) == 2 * n_files


@pytest.mark.slow
def test_a_second_sweep_keeps_the_first_and_scores_what_is_new(run, written, scored):
    first = score(run, "--sweep", written(FIRST))
    files = group_files(run)
    second = score(run, "--sweep", written(SECOND))
    assert variants_in(second) == ["everywhere", "none", "pushed", "towards"]
    assert of_variants(second, "none", "pushed", "towards") == of_variants(first, "none", "pushed", "towards")
    assert group_files(run).items() >= files.items()
    added = [pq.read_table(run / "cells" / name) for name in group_files(run).keys() - files.keys()]
    assert [variants_in(table) for table in added] == [["everywhere"]] * len(files)
    n_files = len(scored)
    assert score(run, "--sweep", written(FIRST)).equals(second)
    assert len(scored) == n_files


@pytest.mark.slow
def test_sweeps_that_overlap_give_each_cell_once(run, written):
    """Also where the groups of one were scored without knowing of the other's, on two machines say."""
    how = ("--strict", "--boundary", "3")
    first = score(run, "--sweep", written(FIRST), *how)
    elsewhere = shutil.copytree(run, run.parent / "elsewhere")
    shutil.rmtree(elsewhere / "cells")
    second = score(elsewhere, "--sweep", written(SECOND), *how)
    for path in (elsewhere / "cells").iterdir():
        shutil.copy(path, run / "cells")
    both = by_key(score(run, *how), "margin")
    assert both == by_key(first, "margin") | by_key(second, "margin")


@pytest.mark.slow
def test_a_name_stands_for_one_thing(run, written, capfd, scored):
    before = score(run, "--sweep", written(FIRST))
    scored.clear()
    assert main(["grid", str(run), "--sweep", str(written(FIRST.replace("0.5", "0.25")))]) == 2
    err = capfd.readouterr().err
    assert "variant 'towards' at boundary 2 has been scored with other edits" in err
    assert not scored
    assert cells_of(run).equals(before)
    assert variants_in(score(run, "--sweep", written(FIRST.replace("0.5", "0.25").replace("towards", "nearer")))) == [
        *("nearer", "none", "pushed", "towards")
    ]


@pytest.fixture(scope="module")
def grid_of(captured, tmp_path_factory):
    """``grid_of(swept, *arguments)``: a run that nothing but this scored, with FIRST or without; look, do not touch."""

    @functools.cache
    def make(swept, *more):
        folder = tmp_path_factory.mktemp("grid")
        save_file(TENSORS, folder / "x.safetensors")
        (folder / "s.toml").write_text(FIRST)
        run = shutil.copytree(captured[1], folder / "run")
        score(run, *more, *(("--sweep", folder / "s.toml") if swept else ()))
        return run

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("--readout", "native"), ("--readout", "common_it")),
        ((), ("--strict",)),
        (("--strict",), ("--max-tokens", "7")),
        (("--scope", "position"), ("--scope", "prefix")),
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["sweep first", "plain first", "both sweep"])
def test_what_is_asked_is_what_the_table_holds(grid_of, written, tmp_path, first, then, order):
    """Cells that were scored in another way before do not stand in for those asked now, whichever file they lie in."""
    first, then = (("--boundary", "3", *more) for more in (first, then))
    run = shutil.copytree(grid_of(order != "plain first", *first), tmp_path / "run")
    swept = order != "sweep first"
    found = by_key(score(run, *then, *(("--sweep", written(FIRST)) if swept else ())), "margin")
    alone = by_key(cells_of(grid_of(swept, *then)), "margin")
    tolerance = 0 if "--strict" in then else 1e-4
    assert all(abs(found[key][0] - margin) <= tolerance for key, (margin,) in alone.items())
    if "--readout" in first:  # scored again with both, so that nothing scored is lost
        assert {key[5] for key in found} == {"native", "common_it"}
    if "--scope" in first:
        assert {key[2] for key in found} == {"prefix", "position"}


@pytest.mark.slow
def test_groups_of_earlier_versions_are_scored_again(run, written, scored):
    """Those have no seal, so that nothing they say can be checked."""
    plain = score(run)
    for path in list((run / "cells").glob("*.parquet")):
        notes = {b"actcache": pq.read_schema(path).metadata[b"actcache"]}
        earlier = path.with_name(f"{path.name.partition('.')[0]}.parquet")
        pq.write_table(pq.read_table(path).replace_schema_metadata(notes), earlier)
        path.unlink()
    scored.clear()
    assert score(run).equals(plain)
    assert sorted(scored) == sorted(set(group_files(run)) - earlier_files(run))


@pytest.mark.slow
def test_the_best_token_of_a_variant_is_looked_up_only_if_asked(run, written, scored):
    at = ("--boundary", "3")
    without = score(run, *at, "--sweep", written(FIRST), "--readout", "native,common_it")
    of_plain = pc.equal(without["variant"], "none")
    assert without.filter(of_plain)["top1_id"].null_count == 0
    assert without.filter(pc.invert(of_plain))["top1_id"].null_count == pc.sum(pc.invert(of_plain)).as_py()
    asked = written("top1 = true\n" + FIRST)
    scored.clear()
    with_top1 = score(run, *at, "--sweep", asked, "--readout", "native")
    assert with_top1["top1_id"].null_count == 0
    assert with_top1["readout"].unique().to_pylist() == ["native", "common_it"], "a readout scored before is lost"
    assert of_variants(with_top1, "none") == of_variants(without, "none")
    n_files = len(scored)
    assert score(run, *at, "--sweep", asked, "--readout", "native").equals(with_top1)
    assert score(run, *at, "--sweep", written(FIRST), "--readout", "native").equals(with_top1)
    assert len(scored) == n_files
    more = score(run, *at, "--sweep", written(FIRST))
    assert more["top1_id"].null_count == 0, "a best token found before is lost"
    assert set(more["readout"].to_pylist()) == set(READOUTS)


@pytest.fixture(scope="module")
def compared(captured, tmp_path_factory):
    """A strict run with ``kl``, of two of its variants."""
    folder = tmp_path_factory.mktemp("compared")
    run = shutil.copytree(captured[1], folder / "run")
    save_file(TENSORS, folder / "x.safetensors")
    (folder / "s.toml").write_text("kl = true\n" + FIRST)
    score(run, "--sweep", folder / "s.toml", "--strict", "--boundary", "3")
    return run


@pytest.mark.slow
def test_kl_is_that_of_hooked_forwards(captured, compared):
    models, events = models_and_events(captured, compared)
    some, n_checked = list(events)[:3], 0
    states = {
        event: {label: reference.states(model, events[event][1], 3) for label, model in models.items()}
        for event in some
    }
    cells = [cell for cell in cells_of(compared).to_pylist() if cell["event_id"] in some]
    for cell in cells:
        if cell["variant"] not in ("none", "towards"):
            continue
        (_, sequence), u, late = events[cell["event_id"]], cell["upstream"], cell["late"]
        state = states[cell["event_id"]]
        rows = state[u].clone()
        if cell["variant"] == "towards":
            rows[-1] = torch.lerp(rows[-1], state["it"][-1], 0.5)
        model = models[late]
        own, found = (hooked(Study(model, [sequence], [r], [state["it"]], 3), 0, []) for r in (state[late], rows))
        by = models[READOUTS[cell["readout"]] or late]
        p, q = (reference.readout(by, hidden).double().log_softmax(-1) for hidden in (own, found))
        expected = float((p.exp() * (p - q)).sum())
        assert cell["kl"] == pytest.approx(expected, abs=1e-6, rel=1e-4)
        assert cell["top1_id"] == int(q.argmax())
        if cell["variant"] == "none" and u == late:
            assert cell["kl"] == 0
        n_checked += 1
    assert n_checked == 3 * 4 * len(READOUTS) * 2
    assert max(cell["kl"] for cell in cells) > 0.01, "nothing is far from anything"


@pytest.mark.slow
def test_packed_kl_equals_strict_to_rounding(run, compared, written):
    packed = by_key(score(run, "--sweep", written("kl = true\n" + FIRST), "--boundary", "3"), "kl", "top1_id")
    strict = by_key(cells_of(compared), "kl", "top1_id")
    assert packed.keys() == strict.keys()
    for key, (kl, top1) in packed.items():
        assert kl == pytest.approx(strict[key][0], abs=1e-5)
        assert top1 == strict[key][1]


@pytest.mark.slow
def test_kl_is_there_only_if_asked_and_is_not_lost(run, written, scored):
    asked, at = written("kl = true\n" + FIRST, "kl.toml"), ("--boundary", "3")
    without = score(run, *at, "--sweep", written(FIRST))
    assert "kl" not in without.column_names
    scored.clear()
    with_kl = score(run, *at, "--sweep", asked)
    assert with_kl.column_names.index("kl") == with_kl.column_names.index("noop_delta") + 1
    assert with_kl["kl"].null_count == with_kl["top1_id"].null_count == 0
    assert by_key(with_kl, "margin", "noop_delta") == by_key(without, "margin", "noop_delta")
    n_files = len(scored)
    assert score(run, *at, "--sweep", asked).equals(with_kl)
    assert score(run, *at, "--sweep", written(FIRST)).equals(with_kl)
    assert score(run, *at).equals(with_kl)
    assert len(scored) == n_files, "scored again"
    more = score(run, *at, "--sweep", written(FIRST.replace("towards", "another")))
    assert more["kl"].null_count == pc.sum(pc.equal(more["variant"], "another")).as_py()


@pytest.mark.slow
def test_effects_are_averaged_by_variant(strict_cells):
    run = strict_cells
    found = effects(cells_of(run), draws=40)["groups"]
    groups = {(g["boundary"], g["scope"], g["readout"], g["variant"]): g for g in found}
    assert set(groups) == {
        (boundary, scope, readout, variant)
        for boundary, names in NAMES.items()
        for scope in ("prefix", "position")
        for readout in READOUTS
        for variant in ["none", *names]
    }
    # With IT's state everywhere, PT's upstream is IT's: what is left is what the late layers make.
    for boundary in NAMES:
        plain, everywhere = (groups[boundary, "prefix", "common_it", name] for name in ("none", "everywhere"))
        assert everywhere["late_from_pt"]["mean"] == everywhere["late_from_it"]["mean"]
        # The plain diagonal is the capture forward's own, which was packed.
        assert everywhere["late_from_it"]["mean"] == pytest.approx(plain["late_from_it"]["mean"], abs=1e-4)
        assert everywhere["interaction"]["mean"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["everywhere", "pushed"])
def test_scope_position_of_the_own_upstream_is_scope_prefix(strict_cells, variant):
    cells = by_key(cells_of(strict_cells), "margin")
    for (event, boundary, scope, upstream, late, readout, name), (margin,) in cells.items():
        if name == variant and scope == "position" and upstream == late:
            assert cells[event, boundary, "prefix", upstream, late, readout, name] == (margin,)


@pytest.mark.parametrize("boundary", [3, 4])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_a_late_stack_cut_later_is_the_one_loaded_there(arch, boundary, tmp_path):
    folder = tiny.make_checkpoint(tmp_path / "m", arch)
    first, there = LateStack.load(folder, 2), LateStack.load(folder, boundary)
    later = first.at(boundary)
    assert later is first.at(boundary)
    assert later.at(boundary) is later
    assert later.readout is first.readout
    assert (later.boundary, later.mode, len(later.blocks)) == (boundary, there.mode, len(there.blocks))
    lengths = [9, 1, 14]
    rows = torch.randn(sum(lengths), first.width, generator=torch.Generator().manual_seed(0))
    offsets = [0, 9, 10, 24]
    zeros = Edit(Replace(vector=torch.zeros(first.width)), "all", "mlp", (4,))
    variants = [Variant("none"), Variant("added", [Edit(Add(torch.ones(first.width)))]), Variant("no mlp", [zeros])]
    for strict in (True, False):
        found = later.run_variants(rows, offsets, variants, strict=strict)
        assert torch.equal(found, there.run_variants(rows, offsets, variants, strict=strict))
    before = first.run(rows, offsets, strict=True)
    later.run(rows, offsets)
    assert torch.equal(first.run(rows, offsets, strict=True), before), "the first stack was changed"


# ---- at the command line ----


def refused(capfd, *words):
    capfd.readouterr()
    assert main([str(word) for word in words]) == 2
    err = capfd.readouterr().err
    (said,) = [line for line in err.splitlines() if line.startswith("actcache: ")]
    assert "Traceback" not in err
    return said


@pytest.mark.slow
def test_a_sweep_that_says_what_an_argument_says_is_refused(run, written, capfd):
    for key, argument in (('scopes = ["position"]', "--scope prefix"), ('readouts = ["native"]', "--readout native")):
        path = written(key)
        said = refused(capfd, "grid", run, "--sweep", path, *argument.split())
        name = argument.split()[0]
        assert said == f"actcache: {name} is given twice: by the command, and by {path}; leave one of them out"
    path = written("boundaries = [2]")
    assert "--boundary is given twice" in refused(capfd, "grid", run, "--sweep", path, "--boundary", 3)
    assert not (run / "cells.parquet").exists()
    assert set(score(run, "--sweep", path, "--scope", "position")["boundary"].to_pylist()) == {2}


@pytest.mark.slow
def test_scopes_may_be_a_list(run, capfd):
    both = score(run, "--scope", "position,prefix", "--boundary", "3")
    assert set(both["scope"].to_pylist()) == {"prefix", "position"}
    said = refused(capfd, "grid", run, "--scope", "prefix,suffix")
    assert said == "actcache: scope 'suffix' is unknown; choose prefix or position"


@pytest.mark.slow
def test_a_carried_column_is_not_overwritten_by_kl(run, written, tmp_path, monkeypatch, capfd):
    """One that an earlier version let into a store; now such prompts are refused."""
    record = RunFolder(run).record()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"id": "a", "prompt": "Once upon a time", "kl": 3}) + "\n")
    words = ["--pt", record.checkpoints["pt"], "--it", record.checkpoints["it"], "--prompts", prompts]
    words += ["--out", tmp_path / "carries", "--boundary", "3", "--max-new", 24]
    assert "key 'kl'" in refused(capfd, "capture", *words)
    monkeypatch.setattr("actcache.prompts.RESERVED_NAMES", frozenset())
    assert main([str(word) for word in ["capture", *words]]) == 0
    said = refused(capfd, "grid", tmp_path / "carries", "--sweep", written("kl = true"))
    assert "carry a column 'kl'" in said
    assert score(tmp_path / "carries")["kl"].unique().to_pylist() == [3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("boundaries = [4]", "boundary 4 is not in the store; it has 2, 3"),
        ("boundaries = [9]", "boundary 9"),
        ('readouts = ["common_sft"]', "readout 'common_sft' is unknown"),
        (
            one_edit('edit = "replace"\ndonor = "sft"'),
            "variant 'v' names the donor 'sft'; name one of the store's, pt, it",
        ),
        (one_edit('edit = "replace"\nvector = "zeros"\nsite = "mlp"\nlayers = [2]'), "variant 'v' edits layer 2"),
        (one_edit('edit = "add"\nvector = { file = "x.safetensors", tensor = "e{boundary}" }'), "no tensor 'e2'"),
        (one_edit('edit = "replace"\ndonor = "it"\npositions = [99]'), "variant 'v' edits position 99; the shortest"),
    ],
)
def test_a_sweep_that_does_not_fit_the_store_is_refused(run, written, capfd, text, words):
    assert words in refused(capfd, "grid", run, "--sweep", written(text))
    assert not (run / "cells.parquet").exists()
    assert not group_files(run)


@pytest.mark.slow
def test_a_position_that_some_sequence_lacks_is_refused_before_anything_is_scored(run, written, capfd):
    """Also where the sequences of the first segment are all long enough."""
    store = actcache.open_store(run / "store")
    lengths = [
        min(position + 1 for position in store.events["position"].slice(s.events.start, s.n_events).to_pylist())
        for s in store.segments
    ]
    shortest, longest = min(lengths), max(lengths)
    assert shortest < longest
    for position in (shortest, -shortest - 1):
        text = one_edit(f'edit = "replace"\ndonor = "it"\npositions = [{position}]')
        said = refused(capfd, "grid", run, "--sweep", written(text))
        assert f"variant 'v' edits position {position}; the shortest sequence has {shortest} positions" in said
        assert not group_files(run)
    text = one_edit(f'edit = "replace"\ndonor = "it"\npositions = [{shortest - 1}, {-shortest}]')
    assert variants_in(score(run, "--sweep", written(text))) == ["none", "v"]


@pytest.mark.slow
def test_a_broken_sweep_stops_a_run_before_its_capture(captured, written, tmp_path, capfd):
    pair, run = captured
    words = ["run", "--pt", pair["pt"], "--it", pair["it"], "--prompts", run.parent / "prompts.jsonl"]
    words += ["--out", tmp_path / "new", "--boundary", 3]
    broken = {
        "scopes = [1]": "scopes is [1]",
        'scopes = ["suffix"]': "scope 'suffix' is unknown",
        one_edit('edit = "add"\nvector = { file = "no", tensor = "d{boundary}" }'): "no is not a safetensors file",
        one_edit('edit = "replace"\ndonor = "it"\nsite = "mlp"\nlayers = [3]'): "donors have states only",
    }
    for text, said in broken.items():
        assert said in refused(capfd, *words, "--sweep", written(text))
        assert not (tmp_path / "new").exists()
    assert "no such file" in refused(capfd, *words, "--sweep", tmp_path / "none.toml")


# ---- a vector for each event ----


def own_vectors(run):
    """Event id -> vector."""
    events = actcache.open_store(run / "store").events["event_id"].to_pylist()
    generator = torch.Generator().manual_seed(5)
    return {event: torch.randn(WIDTH, generator=generator) for event in events}


OWN = """
scopes = ["prefix", "position"]
readouts = ["common_it"]
[[variants]]
name = "own"
[[variants.edits]]
edit = "add"
per = "event"
vector = { %s }
sweep = { scale = [1, -2.0] }
"""
WAYS = {  # to say where the vectors are
    "named": 'file = "own.safetensors", tensor = "v/{event}/{boundary}"',
    "array": 'file = "own{boundary}.npy", events = "ids.json"',
    "table": 'file = "own.safetensors", tensor = "table{boundary}", events = "ids.json"',
}


def write_vectors(folder, vectors):
    """In each of the three ways; at boundary 2 the negative ones."""
    ids = sorted(vectors, reverse=True)
    table = torch.stack([vectors[event] for event in ids])
    tensors = {"table2": -table, "table3": table}
    tensors |= {f"v/{event}/{b}": sign * vector for event, vector in vectors.items() for b, sign in ((2, -1), (3, 1))}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "own.safetensors")
    np.save(folder / "own2.npy", -table.numpy())
    np.save(folder / "own3.npy", table.numpy())
    (folder / "ids.json").write_text(json.dumps(ids))


@pytest.fixture(scope="module")
def own_margins(captured):
    """Key of a cell of OWN -> its margin by hooked forwards, of two events."""
    run = captured[1]
    vectors, (models, events) = own_vectors(run), models_and_events(captured, run)
    c, found = Changes(WIDTH), {}
    for name, boundary in itertools.product(sorted(events)[:2], (2, 3)):
        event, sequence = events[name]
        state = {label: reference.states(model, sequence, boundary) for label, model in models.items()}
        vector = vectors[name] * (-1 if boundary == 2 else 1)
        for scope, u, late in itertools.product(("prefix", "position"), models, models):
            rows = state[u] if scope == "prefix" else torch.cat([state[late][:-1], state[u][-1:]])
            study = Study(models[late], [sequence], [rows], [state["it"]], boundary)
            for variant, scale in (("own[scale=1]", 1.0), ("own[scale=-2.0]", -2.0)):
                hidden = hooked(study, 0, [c.add_vector(vector, scale)])
                margin = exact_margin(models["it"], hidden, event["y_pt"], event["y_it"])
                found[name, boundary, scope, u, late, "common_it", variant] = (margin,)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("way", "then"), [("named", "packed"), ("array", "killed"), ("table", "packed")])
def test_a_sweep_adds_each_events_own_vector(own_margins, run, written, scored, tmp_path, way, then):
    """Against hooked forwards; then killed between two groups, or packed. All ways are one edit, as the next test says:
    each is followed by one of these."""
    write_vectors(tmp_path, own_vectors(run))
    path = written(OWN % WAYS[way])
    strict = score(run, "--sweep", path, "--strict")
    assert len(own_margins) == 2 * 2 * 2 * 4 * 2
    assert by_key(strict, "margin").items() >= own_margins.items()
    if then == "killed":
        before = group_files(run)
        removed = sorted(before)[::2]
        for name in removed:
            (run / "cells" / name).unlink()
        scored.clear()
        assert score(run, "--sweep", path, "--strict").equals(strict)
        assert sorted(scored) == removed
        assert group_files(run) == before
    else:
        packed = by_key(score(run, "--sweep", path), "margin")
        for key, (margin,) in by_key(strict, "margin").items():
            assert packed[key][0] == pytest.approx(margin, abs=1e-4)


@pytest.mark.slow
def test_the_ways_to_give_vectors_are_one_edit(run, written, tmp_path):
    write_vectors(tmp_path, own_vectors(run))
    found = [
        read_sweep(written(OWN % way), WIDTH).variants_at(boundary) for boundary in (2, 3) for way in WAYS.values()
    ]
    assert len({str(digests(variants)) for variants in found}) == 2
    expected = Variant("own[scale=1]", [Edit(Add(own_vectors(run), per="event"))])
    assert digests(found[-1])["own[scale=1]"] == expected.digest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vector", "words"),
    [
        ('file = "own.safetensors", tensor = "table2"', "found by its tensor's name"),
        ('file = "own.safetensors", tensor = "v/{event}/2", events = "ids.json"', "found by its tensor's name"),
        ('file = "own.safetensors", tensor = "w/{event}"', "has no tensor 'w/{event}'"),
        ('file = "own.safetensors", tensor = "table2", events = "none.json"', "none.json is not a JSON list"),
        ('file = "own.safetensors", tensor = "table2", events = "s.toml"', "s.toml is not a JSON list"),
        ('file = "own.safetensors", tensor = "table2", events = "two.json"', r"expected \[2, D\] for its events"),
        ('file = "own.safetensors", tensor = "table2", events = "map.json"', "map.json holds a dict, expected a list"),
        ('file = "none.npy", events = "ids.json"', "none.npy is not a safetensors file or an array"),
        ('file = "ids.json", tensor = "{event}"', "ids.json is not a safetensors file"),
        ('file = "bad.npy", events = "ids.json"', "bad.npy is not an array of numbers in NumPy's format"),
        ('file = "narrow.npy", events = "two.json"', r"narrow.npy has shape \[2, 3\], expected \[E, 32\]"),
        ('file = 3, events = "ids.json"', "vector is .*, expected { file"),
    ],
)
def test_vectors_of_events_that_are_not_there_are_one_line(run, written, tmp_path, vector, words):
    write_vectors(tmp_path, own_vectors(run))
    (tmp_path / "two.json").write_text('["a", "b"]')
    (tmp_path / "map.json").write_text("{}")
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / "narrow.npy", np.ones((2, 3)))
    with pytest.raises(InputError, match=words) as caught:
        read_sweep(written(OWN % vector), WIDTH)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_an_event_without_a_vector_is_named_before_anything_is_scored(run, written, tmp_path, capfd):
    vectors = own_vectors(run)
    missing = sorted(vectors)[3]
    write_vectors(tmp_path, {event: vector for event, vector in vectors.items() if event != missing})
    said = refused(capfd, "grid", run, "--sweep", written(OWN % WAYS["named"]))
    assert f"variant 'own[scale=1]' has no vector for event '{missing}'; it has {len(vectors) - 1}" in said
    assert not group_files(run)


# ---- edits that move nothing ----


@pytest.mark.slow
def test_cells_without_displacement_are_counted_and_mistakes_are_named(run, written, scored, capfd):
    placebo = 'name = "same"\nplacebo = true\nedits = [{ edit = "add", vector = "zeros" }]\n'
    text = 'scopes = ["prefix", "position"]\nreadouts = ["native"]\n[[variants]]\n' + placebo + FIRST
    cells = score(run, "--sweep", written(text))
    n_events = len(actcache.open_store(run / "store"))
    err = capfd.readouterr().err
    # Both boundaries and scopes, four crossings; half-way to IT nothing moves where the state is IT's already.
    assert f"'same' in {n_events * 16} of {n_events * 16}" in err
    assert f"'towards' in {n_events * 8} of {n_events * 16}" in err
    (said,) = (line for line in err.splitlines() if "'same'" in line)
    assert "some cells equal the plain ones, which is no error" in said
    assert "pushed" not in said
    counts = {}
    for path in (run / "cells").glob("*.parquet"):
        key = json.loads(pq.read_schema(path).metadata[b"actcache"])
        for name, n in key["still"].items():
            counts[name] = counts.get(name, 0) + n
    assert counts == {"same": n_events * 16, "towards": n_events * 8}
    n_files = len(scored)
    assert score(run, "--sweep", written(text)).equals(cells)
    assert len(scored) == n_files
    assert f"'towards' in {n_events * 8} of {n_events * 16}" in capfd.readouterr().err, "found finished"
    assert "still" not in score(run, "--scope", "prefix").column_names

    said = refused(capfd, "grid", run, "--sweep", written(text.replace("placebo = true\n", "").replace("same", "new")))
    assert "variant 'new': its edit Add of the state moves nothing at '" in said


# ---- layers of any pair, and bounds ----


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_example_fits_any_pair(arch, tmp_path):
    example = Path(__file__).parents[1] / "examples" / "sweep.toml"
    pt, it = tiny.make_pair(tmp_path, arch)
    prompts = tiny.write_prompts(tmp_path / "prompts.jsonl", 3)
    words = ["run", "--pt", pt, "--it", it, "--prompts", prompts, "--out", tmp_path / "run", "--max-new", MAX_NEW]
    assert main([str(word) for word in [*words, "--sweep", example, "--stability", 0]]) == 0
    assert "no-last-mlp" in variants_in(cells_of(tmp_path / "run"))


@pytest.mark.slow
def test_layers_from_the_end_are_the_blocks_that_they_are(run, written, scored):
    text = one_edit('edit = "replace"\nvector = "zeros"\nsite = "mlp"\nlayers = %s')
    first = score(run, "--sweep", written(text % "[4, 3]"))
    n_files = len(scored)
    for layers in ("[-1, -2]", "[-1, 0.6]", '[4, "3..3"]'):
        assert score(run, "--sweep", written(text % layers)).equals(first)
    assert len(scored) == n_files, "the same edits, scored again"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layers = [9]", "variant 'v' edits layer 9; the late stack has blocks 2..4"),
        ("layers = [-4]", "variant 'v' edits layer -4, which is 1; the late stack has blocks 2..4"),
        ("layers = [0.1]", "variant 'v' edits layer 0.1, which is 0; the late stack has blocks 2..4"),
        ('layers = ["3..9"]', "variant 'v' edits layer 3..9, which is 3..9; the late stack has blocks 2..4"),
        ('layers = ["last"]', "layer 'last': expected a block, -1 for the last"),
        ("layers = [true]", "layer True: expected a block"),
    ],
)
def test_layers_out_of_range_are_named(run, written, capfd, text, words):
    said = refused(
        capfd, "grid", run, "--sweep", written(one_edit(f'edit = "replace"\nvector = "zeros"\nsite = "mlp"\n{text}'))
    )
    assert words in said
    assert not group_files(run)


TEN = 'edit = "add"\nvector = "zeros"\nsweep = { scale = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] }\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '[[variants]]\nname = "v"\n' + ("[[variants.edits]]\n" + TEN) * 10,
            "the sweep has 10,000,000,000 variants; at most",
        ),
        (
            '[[variants]]\nname = "v"\n' + ("[[variants.edits]]\n" + TEN) * 40,
            "has 10.15 or more variants; at most 100,000",
        ),
        (
            "".join(f'[[variants]]\nname = "v{n}"\n' + ("[[variants.edits]]\n" + TEN) * 4 for n in range(11)),
            "the sweep has 110,000 variants",
        ),
        (
            one_edit(
                f'edit = "matched_norm"\nsweep = {{ seed = {[*range(400)]}, positions = {[[n] for n in range(400)]} }}'
            ),
            "the sweep has 160,000 variants",
        ),
        (one_edit('edit = "matched_norm"\nseed = 1').replace('"v"', f'"{"v" * 501}"'), "its name has 501 bytes"),
        (
            one_edit(f'edit = "matched_norm"\nseed = 1\nsweep = {{ positions = [{list(range(300))}] }}'),
            r"its name has 1,\d+ bytes, at most 500",
        ),
        (f"scopes = {'[' * 5000}{']' * 5000}", "is not TOML: .*recursion"),
        (f"scopes = {[1] * 5000}", r"scopes is \[1, 1, .*\.\.\., expected a list of texts"),
    ],
)
def test_a_sweep_is_counted_before_it_is_expanded(written, text, words):
    before = time.process_time()
    with pytest.raises(InputError, match=words) as caught:
        read_sweep(written(text), WIDTH)
    assert len(str(caught.value)) < 1000
    assert time.process_time() - before < 5


@pytest.mark.slow
def test_a_hundred_thousand_variants_are_taken(written):
    text = one_edit(f'edit = "matched_norm"\nsweep = {{ seed = {list(range(100_000))} }}')
    assert len(read_sweep(written(text), WIDTH).variants_at(2)) == 100_000


@pytest.mark.parametrize(
    "variants",
    [
        "(Variant(str(n)) for n in range(10**10))",
        "[Variant('v')] * (10**5 + 1)",
        "lambda boundary: (Variant(str(n)) for n in range(10**10))",
    ],
)
def test_a_python_sweep_is_counted_too(written, variants):
    head = "from actcache.replay.edits import Variant\nfrom actcache.replay.sweep import Sweep\n"
    with pytest.raises(InputError, match="the sweep has more than 100,000 variants; at most 100,000 are scored"):
        read_sweep(written(f"{head}sweep = Sweep(variants={variants})", "s.py"), WIDTH).variants_at(2)
    with pytest.raises(InputError, match="its name has 600 bytes"):
        read_sweep(written(f"{head}sweep = Sweep(variants=[Variant('v' * 600)])", "t.py"), WIDTH)
    few = read_sweep(written(f"{head}sweep = Sweep(variants=(Variant(name) for name in 'ab'))", "few.py"), WIDTH)
    for boundary in (2, 3):
        assert [variant.name for variant in few.variants_at(boundary)] == ["a", "b"]


@pytest.mark.slow
def test_a_run_scores_a_sweep(captured, written, tmp_path):
    pair, run = captured
    words = ["run", "--pt", pair["pt"], "--it", pair["it"], "--prompts", run.parent / "prompts.jsonl"]
    words += ["--out", tmp_path / "new", "--boundary", "2,3", "--limit", 4, "--max-new", MAX_NEW]
    assert main([str(word) for word in [*words, "--sweep", written(FIRST)]]) == 0
    assert variants_in(cells_of(tmp_path / "new")) == ["none", "pushed", "towards"]
    assert (tmp_path / "new" / "report.html").stat().st_size > 1000
