"""Depth: interactions over boundaries and what is left of the main one, on cells with planted answers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import actcache
from actcache.analyses.depth import ANALYSIS, DepthOptions
from actcache.analyses.effects import effects
from actcache.cli import main
from actcache.errors import InputError

GRID = [("pt", "pt"), ("pt", "it"), ("it", "pt"), ("it", "it")]


def store_of(n_blocks=30, boundaries=(18, 27, 29)):
    return SimpleNamespace(
        fingerprint=SimpleNamespace(n_blocks=n_blocks, event_pairs=[("pt", "it")]),
        boundaries=list(boundaries),
        main_boundary=boundaries[0],
        checkpoints=["pt", "it"],
    )


def run_of(store):
    return SimpleNamespace(store=store)


def planted(interactions, prompts, **more):
    """Cells whose interaction at boundary b is ``interactions[b][event]``: A is 1 everywhere, B is 1 more than that."""
    rows = []
    for boundary, of_events in interactions.items():
        for event, value in enumerate(of_events):
            margins = [-3.0, -2.0, -1.0, float(value)]  # A = 1, B = value + 1, B - A = value
            for (upstream, late), margin in zip(GRID, margins, strict=True):
                row = {"event_id": f"e{event}", "prompt_id": prompts[event], "kind": "first_divergence", "step": 0}
                row |= {"boundary": boundary, "scope": "prefix", "readout": "common_it", "variant": "none"}
                rows.append(row | {"upstream": upstream, "late": late, "margin": margin} | more)
    return pa.Table.from_pylist(rows).cast(
        pa.schema([(name, kind) for name, kind in SCHEMA.items() if name in rows[0]])
    )


SCHEMA = dict.fromkeys(
    ["event_id", "prompt_id", "kind", "step", "boundary", "scope", "readout", "variant", "upstream", "late", "margin"],
    pa.string(),
) | {"step": pa.int64(), "boundary": pa.int32(), "margin": pa.float64()}


def slow_retention(interactions, prompts, main_boundary, boundary, draws=2000, seed=0):
    """Draw prompts, take all their events at both boundaries, divide the two means; percentiles of the draws."""
    names = sorted(set(prompts))
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(draws):
        picked = [names[i] for i in rng.integers(0, len(names), len(names))]
        events = [event for prompt in picked for event in range(len(prompts)) if prompts[event] == prompt]
        at = {b: np.mean([interactions[b][event] for event in events]) for b in (main_boundary, boundary)}
        ratios.append(at[boundary] / at[main_boundary])
    return np.quantile(ratios, [0.025, 0.975])


def test_retention_is_paired():
    """Each event keeps a share of what it had: the interval of the ratio is narrow although the effects vary."""
    rng = np.random.default_rng(3)
    prompts = [f"p{event // 2:02d}" for event in range(40)]
    main = rng.normal(3.0, 1.0, 40)
    interactions = {18: main, 27: main * 0.5 + rng.normal(0, 0.01, 40), 29: main * 0.25}
    found = ANALYSIS.numbers(planted(interactions, prompts), run_of(store_of()), DepthOptions())
    of = {group["boundary"]: group for group in found.groups}
    assert [group["boundary"] for group in found.groups] == [18, 27, 29]
    assert {group["main_boundary"] for group in found.groups} == {18}
    assert (of[27]["n_events"], of[27]["n_prompts"]) == (40, 20)
    for boundary, values in interactions.items():
        assert of[boundary]["interaction"]["mean"] == pytest.approx(values.mean())
        assert of[boundary]["late_from_pt"]["mean"] == pytest.approx(1.0)
        assert of[boundary]["retention"]["mean"] == pytest.approx(values.mean() / main.mean())
        low, high = slow_retention(interactions, prompts, 18, boundary)
        assert (of[boundary]["retention"]["low"], of[boundary]["retention"]["high"]) == pytest.approx((low, high))
    assert of[29]["retention"]["high"] - of[29]["retention"]["low"] < 1e-9
    assert of[27]["retention"]["high"] - of[27]["retention"]["low"] < 0.01
    assert of[27]["interaction"]["high"] - of[27]["interaction"]["low"] > 0.2
    assert found.table.num_rows == 3 * 40


def test_the_first_boundary_listed_is_the_main_one():
    prompts = [f"p{event}" for event in range(12)]
    interactions = {18: np.full(12, 4.0), 27: np.full(12, 2.0), 29: np.full(12, 1.0)}
    cells = planted(interactions, prompts)
    groups = ANALYSIS.numbers(cells, run_of(store_of()), DepthOptions(boundaries="-3,0.6")).groups
    assert [(group["boundary"], group["retention"]["mean"]) for group in groups] == [(27, 1.0), (18, 2.0)]


@pytest.mark.parametrize("boundaries", ["all", "0.6,-3,-1", "18,27,29"])
def test_by_default_the_boundary_at_six_tenths_is_the_main_one(boundaries):
    cells = planted({b: [1.0] for b in (18, 27, 29)}, ["p"])
    groups = ANALYSIS.numbers(cells, run_of(store_of()), DepthOptions(boundaries=boundaries)).groups
    assert [group["main_boundary"] for group in groups] == [18] * 3


def test_events_that_a_boundary_lacks_count_nowhere():
    prompts = [f"p{event}" for event in range(4)]
    cells = pa.concat_tables([planted({18: [1.0, 2.0, 3.0, 4.0]}, prompts), planted({27: [1.0, 1.0]}, prompts[:2])])
    groups = ANALYSIS.numbers(cells, run_of(store_of(boundaries=(18, 27))), DepthOptions()).groups
    assert [(group["n_events"], group["interaction"]["mean"]) for group in groups] == [(2, 1.5), (2, 1.0)]


@pytest.mark.parametrize("n_events", [0, 1, 2])
def test_few_events_have_no_interval(n_events):
    cells = planted({18: [2.0] * 2, 27: [1.0] * 2}, ["p", "q"])
    cells = cells.filter(
        pa.compute.is_in(cells["event_id"], value_set=pa.array([f"e{i}" for i in range(n_events)], pa.string()))
    )
    found = ANALYSIS.numbers(cells, run_of(store_of(boundaries=(18, 27))), DepthOptions())
    assert len(found.groups) == (2 if n_events else 0)
    for group in found.groups:
        assert group["n_events"] == n_events
        assert group["retention"] == {"mean": group["interaction"]["mean"] / 2, "low": None, "high": None}


def test_an_interaction_of_nothing_has_no_retention():
    cells = planted({18: [0.0] * 12, 27: [1.0] * 12}, [f"p{event}" for event in range(12)])
    groups = ANALYSIS.numbers(cells, run_of(store_of(boundaries=(18, 27))), DepthOptions()).groups
    assert [group["retention"]["mean"] for group in groups] == [None, None]


# ---- the command ----


@pytest.fixture(scope="module")
def run(tiny_run):
    return tiny_run("llama", torch.float32, "--boundary", "2,3", "--stability", "0")


@pytest.mark.slow
def test_depth_of_a_run(run, tmp_path, capfd):
    assert main(["depth", str(run.out)]) == 0
    out = capfd.readouterr().out
    assert "retention" in out
    answer = json.loads((run.out / "depth.json").read_text())
    assert (answer["analysis"], answer["version"], answer["options"]["readout"]) == ("depth", 1, "common_it")
    of_effects = {
        group["boundary"]: group["interaction"]
        for group in effects(run.cells)["groups"]
        if (group["readout"], group["scope"]) == ("common_it", "prefix")
    }
    for group in answer["groups"]:
        assert group["interaction"] == pytest.approx(of_effects.pop(group["boundary"]), rel=1e-9)
    assert not of_effects
    assert pq.read_table(run.out / "depth.parquet").num_rows == 2 * len(run.store)
    assert main(["report", str(run.out)]) == 0
    assert '<section id="depth">' in (run.out / "report.html").read_text()
    assert main(["verify", str(run.out)]) == 0
    assert "depth.json" in capfd.readouterr().out


@pytest.mark.slow
def test_missing_cells_are_replayed_and_nothing_else(run, tmp_path):
    import shutil

    out = shutil.copytree(run.out, tmp_path / "run")
    before = {path.name for path in (out / "cells").iterdir()}
    found = actcache.Run(out).analyse("depth", scope="position", boundaries="3,2")
    added = {path.name for path in (out / "cells").iterdir()} - before
    assert added
    assert all("-position-" in name for name in added)
    assert [group["boundary"] for group in found["groups"]] == [3, 2]
    assert actcache.Run(out).analyse("depth", scope="position", boundaries="3,2") == found
    assert {path.name for path in (out / "cells").iterdir()} == before | added
    assert set(actcache.Run(out).cells["scope"].to_pylist()) == {"prefix", "position"}, "the run's cells gain them"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--boundary", "5"], "boundary"),
        (["--readout", "common_xx"], "readout 'common_xx' is unknown"),
        (["--scope", "suffix"], "scope 'suffix' is unknown"),
        (["--draws", "0"], "draws=0"),
        (["--draws", "1"], "draws=1: an interval of 0.95 needs at least 40 draws"),
    ],
)
def test_what_the_store_cannot_serve_is_refused(run, capfd, words, said):
    assert main(["depth", str(run.out), *words]) == 2
    err = capfd.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.slow
def test_unknown_names_are_refused(run):
    with pytest.raises(InputError, match="there is no analysis 'deep'; there are depth"):
        actcache.Run(run.out).analyse("deep")
    with pytest.raises(InputError, match="depth has no option 'boundary'; it has boundaries"):
        actcache.Run(run.out).analyse("depth", boundary="3")


@pytest.mark.slow
def test_the_first_boundary_listed_at_capture_leads(tiny_run, tmp_path):
    """In the store, for every analysis, and on the page; the same command in another order goes on with it."""
    run = tiny_run("llama", torch.float32, "--boundary", "3,2", "--stability", "0", "--limit", "6")
    opened = actcache.Run(run.out)
    assert opened.store.boundaries == [3, 2]
    assert opened.store.main_boundary == 3
    assert {group["main_boundary"] for group in opened.analyse("depth")["groups"]} == {3}
    assert opened.final(upstream="pt", late="it").equal(opened.final(upstream="pt", late="it", boundary=3))
    assert main(["report", str(run.out)]) == 0
    assert "handed over at boundary 3." in (run.out / "report.html").read_text()
    words = [*run.arguments(), "--boundary", "2,3", "--stability", "0", "--limit", "6"]
    assert main(words) == 0
    assert actcache.open_store(run.out / "store").boundaries == [3, 2]


@pytest.mark.slow
def test_of_all_boundaries_the_one_at_six_tenths_leads(tiny_run):
    run = tiny_run("llama", torch.float32, "--boundary", "all", "--stability", "0", "--limit", "6")
    n_blocks = run.store.fingerprint.n_blocks
    assert run.store.boundaries == list(range(1, n_blocks))
    assert run.store.main_boundary == round(0.6 * n_blocks)
