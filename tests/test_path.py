"""Path: direct effects against hooks that add up, and blocks that do more than add, refused."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from twins import patches, reference

import actcache
from actcache.cli import main

CAPTURED = ("--boundary", "3,2", "--stability", "0", "--limit", "12")


def given(model, ids, site, block):
    """What a part gives at the last position, [D]."""
    seen = []
    with patches.changing(patches.part(model, site, block), lambda rows: seen.append(rows[-1].clone()), input=False):
        reference.forward(model, ids)
    return seen[0]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3"])
def test_direct_effects_are_what_hooks_add_up(tiny_run, tmp_path, arch):
    run = tiny_run(arch, torch.float32, *CAPTURED)
    out = shutil.copytree(run.out, tmp_path / "run")
    found = actcache.Run(out).analyse("path", boundary="2")
    table = pq.read_table(out / "path.parquet")
    assert table.column_names == ["event_id", "prompt_id", "host", "source", "site", "boundary", "margin"]
    assert len(table) == len(run.store) * 2 * 2 * 3
    models = {label: reference.load(getattr(run, label), torch.float32) for label in ("pt", "it")}
    margins = {(*tuple(row.values())[2:6], row["event_id"]): row["margin"] for row in table.to_pylist()}
    for n, event in enumerate(run.store.events.to_pylist()[:4]):
        ids = run.store.token_ids([n])[0].tolist()
        for host, source in (("pt", "it"), ("it", "pt")):
            final = reference.final_hidden(models[host], ids)[-1]
            for site, block in ((site, block) for site in ("attention", "mlp") for block in (2, 3, 4)):
                own, other = (given(models[label], ids, site, block) for label in (host, source))
                expected = patches.margin(models[host], final - own + other, event["y_pt"], event["y_it"])
                place = host, source, site, block, event["event_id"]
                assert margins[place] == pytest.approx(expected, abs=1e-4), place
    own = run.store.events["margin_pt"].to_numpy()
    for group in (one for one in found["groups"] if one["host"] == "pt"):
        mine = table.filter(pc.and_(pc.equal(table["host"], "pt"), pc.equal(table["site"], group["site"])))
        mine = mine.filter(pc.equal(mine["boundary"], group["boundary"]))
        assert mine["event_id"].equals(run.store.events["event_id"])
        assert group["effect"]["mean"] == pytest.approx((mine["margin"].to_numpy() - own).mean(), abs=1e-6)


@pytest.mark.slow
def test_the_effect_of_the_last_mlp_is_direct_and_that_of_others_is_not(tiny_run, tmp_path):
    """Behind the last MLP there is nothing but the final norm: patched at p, all it does is direct."""
    out = shutil.copytree(tiny_run("llama", torch.float32, *CAPTURED).out, tmp_path / "run")
    actcache.Run(out).analyse("path")
    actcache.Run(out).analyse("map", sites="attention,mlp")
    direct, total = (pq.read_table(out / f"{name}.parquet") for name in ("path", "map"))
    of = {}
    for name, table in (("direct", direct), ("total", total)):
        for row in table.to_pylist():
            of[name, row["event_id"], row["host"], row["site"], row["boundary"]] = row["margin"]
    off = {(site, block): 0.0 for site in ("attention", "mlp") for block in (3, 4)}
    for (name, *place), margin in of.items():
        if name == "direct":
            site, block = place[2:]
            off[site, block] = max(off[site, block], abs(margin - of["total", *place]))
    assert off["mlp", 4] < 1e-4
    assert min(off["mlp", 3], off["attention", 3], off["attention", 4]) > 0.01, "their equality says little"
    assert np.isfinite(list(off.values())).all()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gemma3", "olmo2"])
def test_blocks_that_norm_what_they_add_are_refused(tiny_run, tmp_path, capfd, arch):
    out = shutil.copytree(tiny_run(arch, torch.float32, *CAPTURED).out, tmp_path / "run")
    assert main(["path", str(out)]) == 2
    assert "does not add up to the final state" in capfd.readouterr().err.strip().splitlines()[-1]
    assert not (out / "path.json").exists()


@pytest.mark.slow
def test_more_of_a_run_is_done_anew_alone(tiny_run, tmp_path):
    """A grown run keeps what is finished; a late change alone has no direct effect before it."""
    pt, it = tiny.make_pair(tmp_path, "llama", change="late", boundary=4, eps=0.3)
    prompts, out = tiny.write_prompts(tmp_path / "prompts.jsonl", 16), tmp_path / "run"
    words = ["run", "--pt", pt, "--it", it, "--prompts", prompts, "--out", out, "--max-new", 16, *CAPTURED[:4]]
    assert main([str(word) for word in words]) == 0
    for group in actcache.Run(out).analyse("path")["groups"]:
        assert (abs(group["effect"]["mean"]) > 0.05) == (group["boundary"] == 4), group
