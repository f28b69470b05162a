"""Map: every patch against two hooked forwards; a change of one block, found; the numbers against a loop."""

from __future__ import annotations

import functools
import json
import shutil
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from conftest import first_quick
from transformers import AutoModelForCausalLM
from twins import patches as hooked
from twins import reference
from twins.replay import CONFIGS

import actcache
from actcache.analyses import find_analysis
from actcache.analyses.map import COLUMNS, MapOptions, _groups
from actcache.cli import main
from actcache.models.cost import ModelShape
from actcache.replay.late_stack import LateStack
from actcache.study.map_job import MapJob, Patch
from actcache.study.results import result_files

CAPTURED = ("--boundary", "3,2", "--stability", "0", "--limit", "12")
WHOLE = {"positions": "all", "sites": "attention,mlp,head", "layers": "2..-1", "swaps": "2..3,3..-1"}
N_HEADS = 4


@pytest.fixture(scope="module")
def run(tiny_run):
    return tiny_run("llama", torch.float32, *CAPTURED)


def analysed(out, **options):
    found = actcache.Run(out).analyse("map", **options)
    return found, pq.read_table(out / "map.parquet")


# ---- every cell is what hooks make ----


@pytest.mark.slow
@pytest.mark.parametrize("arch", first_quick(tiny.ARCHS))
def test_every_patch_is_what_hooks_make(tiny_run, tmp_path, arch):
    """Of some events all patches: the strict map to the last digit, the packed one to rounding."""
    run = tiny_run(arch, torch.float32, *CAPTURED[:4], "--limit", "3", "--strict")
    packed, strict = (shutil.copytree(run.out, tmp_path / name) for name in ("packed", "strict"))
    assert main(["grid", str(packed)]) == 0
    models = {label: reference.load(getattr(run, label), torch.float32) for label in ("pt", "it")}
    (_, table), (_, of_strict) = analysed(packed, **WHOLE), analysed(strict, **WHOLE)
    assert tuple(table.column_names) == COLUMNS
    assert table.drop_columns(["margin"]).equals(of_strict.drop_columns(["margin"]))
    exact = of_strict["margin"].to_pylist()
    events = {event["event_id"]: (n, event) for n, event in enumerate(run.store.events.to_pylist())}
    given = functools.cache(hooked.given)
    checked, lengths = 0, sorted({event["position"] for _, event in events.values()})
    chosen = {lengths[0], lengths[len(lengths) // 2]}
    for number, row in enumerate(table.to_pylist()):
        n, event = events[row["event_id"]]
        if event["position"] not in chosen:
            continue
        ids = tuple(run.store.token_ids([n])[0].tolist())
        host, source = models[row["host"]], models[row["source"]]
        place = {name: row[name] for name in ("head", "offset") if row[name] is not None} | {"given": given}
        final = hooked.patched(host, source, ids, row["site"], row["boundary"], end=row["end_block"], **place)
        expected = hooked.margin(host, final, event["y_pt"], event["y_it"])
        assert exact[number] == expected, row
        assert row["margin"] == pytest.approx(expected, abs=1e-4), row
        checked += 1
    n_parts = 3 * (2 + N_HEADS)
    assert checked >= 2 * (2 * min(chosen) + n_parts + 2)
    of_event = table.filter(pc.equal(table["event_id"], table["event_id"][0]))
    position = events[of_event["event_id"][0].as_py()][1]["position"]
    assert len(of_event) == 2 * (2 * (position + 1) + n_parts + 2)
    assert len(set(of_event["margin"].to_pylist())) > len(of_event) // 2, "their equality says little"


@pytest.mark.slow
def test_states_of_all_positions_at_once_are_the_grid_and_the_last_is_its_position_scope(run, tmp_path):
    out = shutil.copytree(run.out, tmp_path / "run")
    assert main(["grid", str(out), "--scope", "prefix,position"]) == 0
    found, table = analysed(out)
    cells = actcache.Run(out).cells
    crossed = pc.and_(pc.equal(cells["readout"], "native"), pc.not_equal(cells["upstream"], cells["late"]))
    of = {(c["scope"], c["boundary"], c["late"], c["event_id"]): c["margin"] for c in cells.filter(crossed).to_pylist()}
    last = table.filter(pc.and_(pc.equal(table["site"], "state"), pc.equal(table["offset"], 0))).to_pylist()
    assert len(last) == 2 * 2 * len(run.store)
    for row in last:
        expected = of["position", row["boundary"], row["host"], row["event_id"]]
        assert row["margin"] == pytest.approx(expected, abs=1e-4)
    for group in found["groups"]:
        if group["site"] == "prefix":
            own = [m for (s, b, h, _), m in of.items() if (s, b, h) == ("prefix", group["boundary"], group["host"])]
            assert group["margin"]["mean"] == pytest.approx(np.mean(own), rel=1e-6)


@pytest.mark.slow
def test_blocks_in_memory_one_at_a_time_are_patched_and_not_swapped(run, tmp_path, capfd):
    whole, streamed = (shutil.copytree(run.out, tmp_path / name) for name in ("whole", "streamed"))
    _, table = analysed(whole, sites="mlp,head", layers="3")
    assert main(["map", str(streamed), "--sites", "mlp,head", "--layers", "3", "--stream"]) == 0
    found = pq.read_table(streamed / "map.parquet")
    assert found.drop_columns(["margin"]).equals(table.drop_columns(["margin"]))
    np.testing.assert_allclose(found["margin"].to_numpy(), table["margin"].to_numpy(), atol=1e-4)
    capfd.readouterr()
    assert main(["map", str(streamed), "--swaps", "2..3", "--stream"]) == 2
    assert "leave out --stream" in capfd.readouterr().err


@pytest.mark.slow
def test_one_checkpoint_is_in_memory_at_a_time(run, tmp_path, capfd, monkeypatch):
    """Parts and paths let the one go before the other is loaded; swaps need both, and are refused."""
    whole, apart = (shutil.copytree(run.out, tmp_path / name) for name in ("whole", "apart"))
    assert main(["map", str(apart), "--swaps", "2..3", "--resident", "one"]) == 2
    assert "both are in memory: give --resident all" in capfd.readouterr().err
    alive, loaded, load = [], [], LateStack.load

    def watched(*args, **more):
        assert not [one for one in alive if one() is not None], "another late stack is in memory"
        stack = load(*args, **more)
        alive.append(weakref.ref(stack._forwards.model))
        loaded.append(args[0].label)
        return stack

    for name, place, words in (("map", "patches", ("--sites", "mlp,head", "--layers", "3")), ("path", "parts", ())):
        assert main([name, str(whole), *words]) == 0
        with monkeypatch.context() as patched:
            patched.setattr(LateStack, "load", watched)
            loaded.clear()
            assert main([name, str(apart), *words, "--resident", "one"]) == 0
        expected, found = (pq.read_table(out / f"{name}.parquet") for out in (whole, apart))
        assert found.drop_columns(["margin"]).equals(expected.drop_columns(["margin"]))
        np.testing.assert_allclose(found["margin"].to_numpy(), expected["margin"].to_numpy(), atol=1e-4)
        assert 2 <= len(loaded) <= 2 * len(result_files(apart / name / place)), loaded


# ---- planted ----


@pytest.mark.slow
def test_a_change_of_the_last_block_alone_shows_there_and_nowhere_else(tmp_path):
    """All that the source does otherwise, its last block does: swapped for the source's, the host is the source."""
    pt, it = tiny.make_pair(tmp_path, "llama", change="late", boundary=4, eps=0.3)
    prompts, out = tiny.write_prompts(tmp_path / "prompts.jsonl", 16), tmp_path / "run"
    words = ["run", "--pt", pt, "--it", it, "--prompts", prompts, "--out", out, "--max-new", 16, *CAPTURED[:4]]
    assert main([str(word) for word in words]) == 0
    found, _ = analysed(out, sites="attention,mlp,head", swaps="2..3,3..-1,3..3")
    for group in found["groups"]:
        effect = group["effect"]["mean"]
        if group["site"] == "block" and group["end_block"] == 4:
            assert group["share"]["mean"] == pytest.approx(1, abs=1e-4)
        elif group["site"] in ("attention", "mlp") and group["boundary"] == 4:
            assert abs(effect) > 0.05, group
        elif group["site"] != "head" or group["boundary"] != 4:
            assert effect == pytest.approx(0, abs=1e-4), group
    assert "of block 4" in json.dumps(actcache.analyses.map.ANALYSIS.section(found["groups"]).shows)


# ---- numbers ----


def test_groups_are_means_over_the_events_that_have_the_position():
    """Against a loop: every prompt weighs the same, and effects are over the host's own margin."""
    rng = np.random.default_rng(0)
    ids, prompts = [f"e{n}" for n in range(9)], [f"p{n % 4}" for n in range(9)]
    own, others = rng.normal(size=(2, 9))
    rows = [
        {"event_id": ids[event], "prompt_id": prompts[event], "site": "state", "boundary": boundary, "offset": -back}
        for event in rng.permutation(9)
        for boundary in (2, 3)
        for back in range(1 + event % 3)
    ]
    for row in rows:
        row |= {"head": None, "end_block": None, "margin": rng.normal()}
    table = pa.Table.from_pylist(rows)
    groups = list(_groups(table, pa.array(ids), own, others, MapOptions(event="e4")))
    assert len(groups) == 2 * 3 + 2 * 2
    for group in groups:
        mine = [row for row in rows if (row["boundary"], row["offset"]) == (group["boundary"], group["offset"])]
        if "event_id" in group:
            (row,) = (row for row in mine if row["event_id"] == "e4")
            effect = row["margin"] - own[4]
            assert group["effect"] == {"mean": pytest.approx(effect), "low": None, "high": None}
            assert group["share"]["mean"] == pytest.approx(effect / (others[4] - own[4]))
            continue
        assert group["n_events"] == len(mine)

        def mean(value):
            of = {}
            for row in mine:  # noqa: B023
                of.setdefault(row["prompt_id"], []).append(value(row, ids.index(row["event_id"])))
            return np.mean([np.mean(values) for values in of.values()])

        assert group["margin"]["mean"] == pytest.approx(mean(lambda row, event: row["margin"]))
        effect = mean(lambda row, event: row["margin"] - own[event])
        assert group["effect"]["mean"] == pytest.approx(effect)
        difference = mean(lambda row, event: others[event] - own[event])
        assert group["share"]["mean"] == pytest.approx(effect / difference)


# ---- what is kept, and what is refused ----


@pytest.mark.slow
def test_more_patches_replay_what_is_new_alone(run, tmp_path):
    out, at_once = (shutil.copytree(run.out, tmp_path / name) for name in ("run", "at once"))
    place = out / "map" / "patches"
    analysed(out, positions="2", sites="mlp")
    before = set(result_files(place))
    assert len(before) == 4, "a job per host and boundary"
    _, table = analysed(out, positions="3", sites="mlp,attention")
    added = set(result_files(place)) - before
    names = {name for path in added for name in set(pq.read_table(path)["patch"].to_pylist())}
    assert names == {"state:2:-2", "state:3:-2", "attention:3", "attention:4"}
    _, whole = analysed(at_once, positions="3", sites="mlp,attention")
    assert table.drop_columns(["margin"]).equals(whole.drop_columns(["margin"]))
    np.testing.assert_allclose(table["margin"].to_numpy(), whole["margin"].to_numpy(), atol=1e-4)
    analysed(out, positions="3", sites="mlp,attention")
    assert set(result_files(place)) == before | added
    event = run.store.events["event_id"][0].as_py()
    found, _ = analysed(out, positions="3", sites="mlp,attention", event=event)
    of_event = [group for group in found["groups"] if group.get("event_id") == event]
    margins = whole.filter(pc.equal(whole["event_id"], event))["margin"].to_pylist()
    of_patches = [group["margin"]["mean"] for group in of_event if group["site"] != "prefix"]
    assert sorted(of_patches) == pytest.approx(sorted(margins), abs=1e-4)
    assert main(["report", str(out)]) == 0
    assert event in (out / "report.html").read_text()
    (place / next(iter(added)).name).write_bytes(b"damaged")
    assert main(["verify", str(out)]) == 1
    assert main(["map", str(out)]) == 2


@pytest.mark.slow
def test_every_pair_has_a_map_of_its_own_events(tmp_path):
    folders = tiny.make_lineup(tmp_path, "llama", ["a", "b", "c"])
    prompts, out = tiny.write_prompts(tmp_path / "prompts.jsonl", 8), tmp_path / "run"
    words = [word for label, folder in folders.items() for word in ("--checkpoint", f"{label}={folder}")]
    words = ["run", *words, "--prompts", prompts, "--out", out, "--max-new", 12, "--stability", 0]
    assert main([str(word) for word in [*words, "--pair", "a,b", "--pair", "c,a"]]) == 0
    found, table = analysed(out)
    events = actcache.open_store(out).events
    pair_of = dict(zip(events["event_id"].to_pylist(), events["pair"].to_pylist(), strict=True))
    for row in table.to_pylist():
        assert sorted((row["host"], row["source"])) == sorted(pair_of[row["event_id"]].split(","))
    for group in found["groups"]:
        assert {group["host"], group["source"]} == set(group["pair"].split(","))
    assert {(group["pair"], group["host"]) for group in found["groups"]} == {
        *(("a,b", "a"), ("a,b", "b"), ("c,a", "a"), ("c,a", "c"))
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--boundary", "4"], "boundary 4 is not in the store; it has 3, 2"),
        (["--positions", "0"], "positions '0': give how many of the last ones, such as 4, or all"),
        (["--sites", "mlp,state"], "site 'state' is unknown; choose of attention, mlp, head, or none"),
        (["--layers", "1..3"], "layers '1..3': block 1 is before 2, the first boundary that was captured"),
        (["--layers", "7"], "blocks '7': expected some of 0..4, in order"),
        (["--layers", "x"], "layer 'x..x'"),
        (["--swaps", "4"], "swap 4..4: block 4 is no boundary of the store; it has 2, 3"),
        (["--event", "nobody"], "event 'nobody' is not in the store"),
        (["--weights", "token"], "weights 'token' are unknown"),
    ],
)
def test_what_the_store_cannot_serve_is_refused(run, capfd, words, said):
    assert main(["map", str(run.out), *words]) == 2
    err = capfd.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1


# ---- cost ----


@pytest.mark.parametrize("strict", [False, True])
def test_the_cost_of_a_job_is_that_of_its_rows(strict):
    """Two events on one sequence and one on another: each patch by the rows that it changes, or by a whole replay."""
    shape = ModelShape.of_model(AutoModelForCausalLM.from_config(CONFIGS["llama"]))
    patches = [Patch("state", 2, 0), Patch("state", 2, 3), Patch("mlp", 3), Patch("head", 2), Patch("block", 2, end=3)]
    how = {"store": "s", "segment": "a", "events": (0, 1, 2), "lengths": (5, 9, 2), "sequences": (0, 0, 1)}
    how |= {"upstreams": ("it",), "boundary": 2, "late": "pt", "strict": strict}
    job = MapJob(patches=tuple(patches), **how)

    def rows(n, length):
        """The last ``n`` of so many."""
        return shape.products(np.array([length], float), first=2) - shape.products(
            np.array([max(0, length - n)], float), first=2
        )

    whole = sum(rows(length, length) for length in ((5, 9, 2) if strict else (9, 2)))
    of_patches = sum((1 + 1 + 4) * rows(length if strict else 1, length) for length in (5, 9, 2))
    of_patches += sum(rows(length if strict else 4, length) for length in (5, 9, 2))
    expected = whole + of_patches + whole + (0 if strict else whole)  # what the source gives, the swap, the keys
    parts = job.cost({"pt": shape, "it": shape}).parts
    assert parts["map"] == pytest.approx(expected)
    assert parts["hooks"] > parts["map"]
    assert job.n_units == 3 * 5


def test_the_largest_patch_of_every_direction_is_named():
    """Also where one checkpoint is the host of several; of other kinds, and of all positions, none is."""

    def patch(pair, host, source, boundary, effect, site="state", kind="first_divergence"):
        names = {"kind": kind, "pair": pair, "host": host, "source": source, "site": site, "boundary": boundary}
        numbers = {name: {"mean": effect, "low": None, "high": None} for name in ("margin", "effect", "share")}
        return names | {"head": None, "end_block": None, "offset": 0, "n_events": 3, "n_prompts": 3} | numbers

    groups = [
        *(patch("base,sft", "base", "sft", at, effect) for at, effect in ((2, 1.0), (4, 3.0))),
        *(patch("base,dpo", "base", "dpo", at, effect) for at, effect in ((2, 7.0), (4, -2.0))),
        patch("base,dpo", "dpo", "base", 4, -8.5),
        patch("base,dpo", "dpo", "base", 4, -9.0, site="prefix"),
        patch("base,dpo", "dpo", "base", 2, 20.0, kind="pt_rollout"),
    ]
    shows = find_analysis("map").section(groups).shows
    named = (
        "base into dpo: state at 4, p (-8.50)",
        "dpo into base: state at 2, p (+7.00)",
        "sft into base: state at 4, p (+3.00)",
    )
    assert f"The single patches with the largest mean effects: {'; '.join(named)}. " in shows
