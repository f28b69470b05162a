"""Commitment: views on planted events with known answers; margins by hooks, and a model that has decided early."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from twins import reference

import actcache
from actcache.analyses import find_analysis
from actcache.analyses.commitment import CommitmentOptions as Options
from actcache.analyses.commitment import _groups, thirds
from actcache.cli import main
from actcache.study.contrasts import contrasts

BOUNDARY = 3


def planted(b_pt, b_it, late_from_pt, interaction, prompts=None):
    """Events with these margins at the boundary and these effects."""
    n = len(b_pt)
    return pa.table(
        {
            "event_id": [f"e{i}" for i in range(n)],
            "prompt_id": [f"p{i:03}" for i in range(n)] if prompts is None else prompts,
            "late_from_pt": late_from_pt,
            "late_from_it": np.add(late_from_pt, interaction),
            "interaction": interaction,
            "boundary_margin_pt": b_pt,
            "boundary_margin_it": b_it,
        }
    )


def views_of(table, **options):
    return {group["view"]: group for group in _groups(table, Options(**options))}


def made_up(n=60, seed=0):
    rng = np.random.default_rng(seed)
    b_pt = rng.normal(-1.0, 1.0, n)
    return rng, b_pt, b_pt + rng.normal(1.0, 1.0, n)


def test_an_interaction_that_the_boundary_has_decided_is_gone_where_margins_are_equal():
    """The interaction is twice the difference of the margins, and late effects follow a state's own margin."""
    _, b_pt, b_it = made_up()
    of = views_of(planted(b_pt, b_it, 2 * b_pt, 2 * (b_it - b_pt)))
    assert of["all"]["interaction"]["mean"] == pytest.approx(2 * np.mean(b_it - b_pt))
    for view in ("pairs", "states", "states, overlap"):
        assert of[view]["interaction"]["mean"] == pytest.approx(0, abs=1e-9), view
        assert of[view]["per_logit"]["mean"] == pytest.approx(2), view
        assert of[view]["interaction"]["high"] < 1e-6
    rising = [of[f"{third} third of b_IT - b_PT"]["interaction"]["mean"] for third in ("lowest", "middle", "highest")]
    assert rising[0] < rising[1] < rising[2]


def test_an_interaction_beyond_the_boundary_is_there_in_every_view():
    rng, b_pt, b_it = made_up()
    of = views_of(planted(b_pt, b_it, rng.normal(0.5, 0.1, 60), np.full(60, 1.5)))
    for view, group in of.items():
        assert group["interaction"]["mean"] == pytest.approx(1.5, abs=0.1), view
    assert of["pairs"]["per_logit"]["mean"] == pytest.approx(0, abs=1e-9)
    uncommitted = b_it <= 0
    assert (of["uncommitted"]["n_events"], of["committed"]["n_events"]) == (uncommitted.sum(), (~uncommitted).sum())
    assert of["all"]["committed_share_it"]["mean"] == pytest.approx(np.mean(b_it > 0))
    assert of["uncommitted"]["boundary_margin_it"]["mean"] == pytest.approx(b_it[uncommitted].mean())


def slow_regressions(table, weights):
    """Written out: every state, or every event, with its weight; coefficients by weighted least squares."""
    rows = table.to_pylist()
    per_prompt = {prompt: sum(row["prompt_id"] == prompt for row in rows) for prompt in {r["prompt_id"] for r in rows}}

    def solve(design, y, names):
        counts = {prompt: names.count(prompt) for prompt in names}
        w = np.sqrt([1 / counts[prompt] if weights == "prompt" else 1.0 for prompt in names])
        return np.linalg.lstsq(np.array(design) * w[:, None], np.array(y) * w, rcond=None)[0]

    low = max(min(row[f"boundary_margin_{role}"] for row in rows) for role in ("pt", "it"))
    high = min(max(row[f"boundary_margin_{role}"] for row in rows) for role in ("pt", "it"))
    found = {}
    for view, inside in (("states", (-np.inf, np.inf)), ("states, overlap", (low, high))):
        design, y, names = [], [], []
        for is_it, role in ((0, "pt"), (1, "it")):
            for row in rows:
                if inside[0] <= row[f"boundary_margin_{role}"] <= inside[1]:
                    design.append([1, row[f"boundary_margin_{role}"], is_it])
                    y.append(row[f"late_from_{role}"])
                    names.append(row["prompt_id"])
        found[view] = (*solve(design, y, names)[[2, 1]], len(y))
    design = [[1, row["boundary_margin_it"] - row["boundary_margin_pt"]] for row in rows]
    found["pairs"] = (*solve(design, [row["interaction"] for row in rows], [row["prompt_id"] for row in rows]), None)
    assert max(per_prompt.values()) > 1
    return found


@pytest.mark.parametrize("weights", ["prompt", "event"])
def test_the_regressions_are_weighted_least_squares(weights):
    rng, b_pt, b_it = made_up()
    prompts = [f"p{number}" for number in rng.integers(0, 20, 60)]
    table = planted(b_pt, b_it, rng.normal(size=60), rng.normal(1, 1, 60), prompts)
    of = views_of(table, weights=weights)
    for view, (interaction, per_logit, n_states) in slow_regressions(table, weights).items():
        assert of[view]["interaction"]["mean"] == pytest.approx(interaction, rel=1e-9), view
        assert of[view]["per_logit"]["mean"] == pytest.approx(per_logit, rel=1e-9), view
        assert of[view].get("n_states") == n_states
        assert of[view]["interaction"]["low"] < interaction < of[view]["interaction"]["high"]


def test_thirds_are_cut_at_percentiles():
    assert {third: kept.nonzero()[0].tolist() for third, kept in thirds(np.array([5.0, 1, 9, 3, 7, 2])).items()} == {
        "lowest": [1, 5],
        "middle": [0, 3],
        "highest": [2, 4],
    }
    assert [int(kept.sum()) for kept in thirds(np.ones(4)).values()] == [4, 0, 0]


@pytest.mark.parametrize("n", [1, 2])
def test_few_events_have_no_interval_and_margins_apart_no_overlap(n):
    of = views_of(planted(np.full(n, -2.0), np.full(n, 1.0), np.ones(n), np.full(n, 3.0)))
    assert of["all"]["interaction"] == {"mean": 3.0, "low": None, "high": None}
    assert of["pairs"]["interaction"] == {"mean": None, "low": None, "high": None}, "one difference tells no line"
    assert "states, overlap" not in of
    assert "uncommitted" not in of


@pytest.mark.parametrize(
    ("pairs", "said"), [(["a,b"], "0% of 1 events."), (["a,b", "a,c"], "of a,b; 0% of 1 events of a,c.")]
)
def test_shares_are_said_of_each_pair(pairs, said):
    own = views_of(planted(np.full(1, -2.0), np.full(1, -1.0), np.ones(1), np.full(1, 3.0)))
    names = {"kind": "first_divergence", "boundary": 3, "scope": "prefix", "readout": "common_it"}
    groups = [names | {"pair": pair} | one for pair in pairs for one in own.values()]
    assert said in find_analysis("commitment").section(groups).shows


# ---- runs ----


@pytest.mark.slow
def test_boundary_margins_are_a_readout_of_the_states_at_p(tiny_run, tmp_path):
    run = tiny_run("llama", torch.float32, "--boundary", "2,3", "--stability", "0")
    out = shutil.copytree(run.out, tmp_path / "run")
    found = actcache.Run(out).analyse("commitment", boundary="3")
    table = {row["event_id"]: row for row in pq.read_table(out / "commitment.parquet").to_pylist()}
    head = reference.load(run.it, torch.float32)
    for label, folder in (("pt", run.pt), ("it", run.it)):
        model = reference.load(folder, torch.float32)
        for number, event in enumerate(run.store.events.to_pylist()):
            state = reference.states(model, run.store.token_ids([number])[0].tolist(), BOUNDARY)[-1]
            logits = reference.readout(head, state)
            expected = float(logits[event["y_it"]] - logits[event["y_pt"]])
            assert table[event["event_id"]][f"boundary_margin_{label}"] == pytest.approx(expected, abs=1e-4)
    cells = run.cells.filter(pc.and_(pc.equal(run.cells["boundary"], 3), pc.equal(run.cells["readout"], "common_it")))
    effects = contrasts(cells)
    assert [table[one]["interaction"] for one in effects["event_id"].to_pylist()] == effects["interaction"].to_pylist()
    (whole,) = (group for group in found["groups"] if group["view"] == "all")
    assert whole["n_events"] == len(run.store)
    actcache.Run(out).analyse("commitment", boundary="3", readout="common_pt")
    assert sorted((out / "cells").iterdir()) == sorted(
        out / "cells" / path.name for path in (run.out / "cells").iterdir()
    )


@pytest.mark.slow
def test_a_pair_that_decides_before_the_boundary_is_committed(tmp_path):
    """The late blocks add nothing: a state reads at the boundary as it does at the end, and no late effect is left."""
    pt, it = tiny.make_pair(tmp_path, "llama", change="upstream", boundary=BOUNDARY)
    for folder in (pt, it):
        path = folder / "model.safetensors"
        weights = load_file(path)
        late = [name for name in weights if any(f"layers.{block}." in name for block in range(BOUNDARY, tiny.N_BLOCKS))]
        for name in late:
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weights[name] = torch.zeros_like(weights[name])
        save_file(weights, path, {"format": "pt"})
    words = ["run", "--pt", pt, "--it", it, "--prompts", tiny.write_prompts(tmp_path / "prompts.jsonl")]
    words += ["--out", tmp_path / "run", "--max-new", 24, "--stability", 0]
    assert main([str(word) for word in words]) == 0
    of = {group["view"]: group for group in actcache.Run(tmp_path / "run").analyse("commitment")["groups"]}
    assert of["all"]["committed_share_it"]["mean"] == 1.0
    assert of["all"]["committed_share_pt"]["mean"] == 0.0
    assert "uncommitted" not in of
    for name in ("late_from_pt", "late_from_it", "interaction"):
        assert of["all"][name]["mean"] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_every_pair_is_read_by_its_own_readout(tmp_path):
    folders = tiny.make_lineup(tmp_path, "llama", ["a", "b", "c"])
    words = [word for label, folder in folders.items() for word in ("--checkpoint", f"{label}={folder}")]
    words = ["run", *words, "--prompts", tiny.write_prompts(tmp_path / "prompts.jsonl", 12), "--out", tmp_path / "run"]
    words += ["--max-new", 12, "--stability", 0, "--pair", "a,b", "--pair", "a,c"]
    assert main([str(word) for word in words]) == 0
    groups = actcache.Run(tmp_path / "run").analyse("commitment")["groups"]
    assert {(group["pair"], group["readout"]) for group in groups} == {("a,b", "common_b"), ("a,c", "common_c")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--boundary", "4"], "boundary 4 is not in the store; it has 2, 3"),
        (["--readout", "native"], "readout native would read the states of each checkpoint by its own head"),
        (["--readout", "common_xx"], "readout 'common_xx' is unknown"),
        (["--scope", "suffix"], "scope 'suffix' is unknown"),
        (["--weights", "token"], "weights 'token' are unknown; choose event or prompt"),
    ],
)
def test_what_the_store_cannot_serve_is_refused(tiny_run, capfd, words, said):
    run = tiny_run("llama", torch.float32, "--boundary", "2,3", "--stability", "0")
    assert main(["commitment", str(run.out), *words]) == 2
    err = capfd.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1
