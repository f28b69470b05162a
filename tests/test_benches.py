"""Benches at a size of seconds, so that they cannot rot; their own equality checks run first."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import tiny
import torch

from actcache.analyses import EVERY
from actcache.cli import main
from actcache.models.packing import attend_in_core

pytestmark = pytest.mark.slow

TRANSFORMER_LENS = int(version("transformer-lens").split(".")[0]) if find_spec("transformer_lens") else 0
BENCHES = Path(__file__).parent.parent / "benches"


@pytest.mark.parametrize("name", ["codec", "feed", "gather", "kernels", "linear", "store", "stream"])
def test_a_bench_at_a_small_size(name, page, monkeypatch, capsys):
    """Each compares what it times first, bit for bit or to rounding, and exits otherwise; the docs can show what it
    finds."""
    monkeypatch.syspath_prepend(BENCHES)
    threads = torch.get_num_threads()
    try:
        assert importlib.import_module(f"bench_{name}").main(["--smoke"]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["bench"], result["cpus"] > 0) == (name, True)
    assert page(result).count("\n| --- |") >= 1


def test_a_large_prompts_file_at_a_small_size(benches, forking, capfd):
    assert importlib.import_module("bench_prompts").main(["--smoke"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["n_prompts"] == 3_000
    assert set(result["ways"]) == {"loads", "read", "csv", "parquet", "capture", "plan"}


def test_opening_many_segments_at_a_small_size(benches, capfd):
    pytest.importorskip("moto")
    assert importlib.import_module("bench_open").main(["--smoke"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert set(result["ways"]) == {"nothing", "records", "roll-up", "stale"}
    requests = {way: found["requests"] for way, found in result["far"].items()}
    assert requests["records"] > result["far_segments"] > 6 >= requests["roll-up"]


@pytest.mark.parametrize("window", [None, 3])
def test_the_rival_of_packed_attention_computes_the_same(window, monkeypatch):
    monkeypatch.syspath_prepend(BENCHES)
    attend_padded = importlib.import_module("bench_kernels").attend_padded
    generator, bounds = torch.Generator().manual_seed(0), [0, 7, 8, 20, 23]
    given = [torch.randn(1, n_heads, bounds[-1], 8, generator=generator) for n_heads in (6, 2, 2)]
    for scaling in (None, 0.5):
        found = attend_padded(*given, bounds, scaling, window)
        assert torch.allclose(found, attend_in_core(*given, bounds, scaling, window), atol=1e-5)


def test_a_kernel_that_gives_other_margins_than_its_rival_ends_the_bench(benches, monkeypatch):
    kernels = importlib.import_module("bench_kernels")
    wrong = lambda query, key, value, *more: torch.zeros_like(query).transpose(1, 2)  # noqa: E731
    monkeypatch.setattr(kernels, "attend_padded", wrong)
    with pytest.raises(SystemExit, match=r"right-padded: a margin differs by .*; no figures"):
        kernels.main(["--smoke"])
    with pytest.raises(SystemExit):
        kernels.main(["--smoke", "--dtype", "bfloat16"])


def test_the_verb_runs_them_and_keeps_the_figures(forking, tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert main(["bench", "gather", "store", "--smoke", "--out", str(out), "--folder", str(tmp_path)]) == 0
    assert [result["bench"] for result in json.loads(out.read_text())] == ["gather", "store"]
    assert "TensorStore" in capsys.readouterr().out
    assert [*tmp_path.iterdir()] == [out]


REPLAYS = ("replay, boundary 5 of 8",)
STAGES = tuple(
    f"actcache run: {stage}"
    for stage in ("loads", "search", "capture forward", "write", "read", "replay", "report", "all")
)
WORKLOADS = ("cold grid", *STAGES, *REPLAYS, "added boundary", "added readout", "prefix-wide edit", "position edits")


def test_sweep_has_everything_beside_every_rival_that_is_there(page):
    """On the pair that the package ships; each rival's margins equal the hooks', or nothing is printed."""
    ran = run_smoke("sweep")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    workloads = result["workloads"]
    assert page(result).count("x**)") == sum(len(one["ratios"]) for one in workloads)
    rivals = ("nnsight", "TransformerBridge" if TRANSFORMER_LENS >= 4 else "TransformerLens")
    installed = [name for name in rivals if f"{name} is not installed" not in ran.stderr]
    for workload, name in zip(workloads, WORKLOADS, strict=True):
        assert workload["name"].startswith(name)
        alone = (*REPLAYS, *STAGES)
        rivals = set() if name in alone else {"hooks", *installed}
        rivals |= {"in lockstep"} if name == "cold grid" else set()
        assert workload["seconds"].keys() == {"actcache", *rivals}
        if name in ("added readout", STAGES[-1]):  # one replays nothing: its final states were kept; one has stages
            assert workload["limit_s"] is None
        else:
            assert workload["limit_s"][0] >= workload["limit_s"][1] > 0
    n_beside = len(WORKLOADS) - len(STAGES) - len(REPLAYS)
    assert ran.stderr.count("margins equal to the hooks'") == len(REPLAYS) + n_beside * (1 + len(installed))


def test_study_has_every_analysis_beside_hooks(page):
    ran = run_smoke("study")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    *names, late_only, whole = [one["name"] for one in result["workloads"]]
    covered = {name for of in names for name in of.split(", ")} - {"grid"}
    belong_to_no_event = {"stability", *(f"features {step}" for step in ("train", "gate", "contexts"))}
    assert covered == {named.name for named in EVERY} - belong_to_no_event
    assert (late_only, whole) == ("late-only", "whole")
    for one in result["workloads"]:
        assert one["seconds"].keys() == {"hooks", "actcache"}
    assert ran.stderr.count("margins equal to the hooks'") == len(names)
    assert page(result).count("x**)") == len(names) + 2
    # What hooks run of one event, forward by forward: of a 2x2 grid two native ones and two replays.
    passes = result["passes"]
    assert passes.keys() == {*names, "late-only", "whole"}
    by_hooks = {name: round(of["hooks"], 2) for name, of in passes.items()}
    assert (by_hooks["grid, effects"], by_hooks["lineage"], by_hooks["commitment"]) == (4, 9, 2)
    assert by_hooks["features mediate"] == 2 * (2 + 5 * 8)
    assert by_hooks["features rescue"] == 3 + 3 + 7
    assert passes["commitment"]["actcache"] == 0
    assert passes["commitment"]["bound"] is None
    late = result["late_only"]
    assert set(late) < set(names)
    for means in ("hooks", "actcache"):
        assert passes["late-only"][means] == pytest.approx(sum(passes[name][means] for name in late))
        seconds = {one["name"]: one["seconds"][means] for one in result["workloads"]}
        assert seconds["late-only"] == pytest.approx(sum(seconds[name] for name in late))


def test_study_counts_the_products_of_blocks_and_no_others(benches):
    """Two layers of 8 x 16 over three rows, one of them twice as its gradient is wanted; the head is left out."""
    study = importlib.import_module("bench_study")
    head, layer = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(8, 16)
    model = SimpleNamespace(get_output_embeddings=lambda: head)
    rows = torch.randn(1, 3, 8)
    with study.counted([model]) as products:
        layer.requires_grad_(False)(rows)
        layer(rows.requires_grad_())
        head(rows)
    layer(rows)
    assert products == [3 * 8 * 16, 2 * 3 * 8 * 16]


def test_map_has_states_beside_every_rival_that_is_there(page):
    ran = run_smoke("map")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    states, parts = result["workloads"]
    assert {"hooks", "actcache"} <= states["seconds"].keys()
    assert parts["seconds"].keys() == {"hooks", "actcache"}
    assert ran.stderr.count("margins equal to the hooks'") == len(states["seconds"])
    assert page(result).count("x**)") == len(states["ratios"]) + len(parts["ratios"])


def test_sweep_without_the_rivals(tmp_path):
    """A rival that is not installed, or does not know the architecture, is left out and named."""
    (tmp_path / "missing").mkdir()
    (tmp_path / "missing/nnsight.py").write_text("raise ModuleNotFoundError('nnsight')")
    (tmp_path / "missing/transformer_lens.py").write_text("raise RuntimeError('no such family')")
    pt, it = tiny.make_pair(tmp_path, "gpt2")
    prompts = tiny.write_prompts(tmp_path / "prompts.jsonl", 6)
    ran = run_smoke("sweep", "--pt", pt, "--it", it, "--prompts", prompts, "--max-new", 12, path=tmp_path / "missing")
    assert ran.returncode == 0, ran.stderr
    assert "nnsight is not installed: pip install 'actcache[bench]'" in ran.stderr
    assert "TransformerLens cannot load this pair: RuntimeError: no such family" in ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result["prompts"] == 4, "of six: seconds, whatever the pair and its prompts"
    for workload in result["workloads"]:
        alone = workload["name"].startswith(("replay", "actcache run"))
        others = {"in lockstep"} if workload["name"].startswith("cold") else set()
        assert workload["seconds"].keys() == ({"actcache"} if alone else {"hooks", "actcache", *others})


def test_a_pair_without_events_is_said(tmp_path):
    pt, it = tiny.make_pair(tmp_path, "llama", change="none")
    prompts = tiny.write_prompts(tmp_path / "prompts.jsonl", 2)
    ran = run_smoke("replay", "--pt", pt, "--it", it, "--prompts", prompts)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == "no event on 2 prompts within 8 choices: give more, or --max-new"


def test_replay_reports_time_and_memory(benches, forking, tmp_path, capsys):
    pt, it = tiny.make_pair(tmp_path, "llama")
    prompts = tiny.write_prompts(tmp_path / "prompts.jsonl", 6)
    words = ["--pt", pt, "--it", it, "--prompts", prompts, "--max-new", 12, "--boundaries", "2,3", "--smoke"]
    assert importlib.import_module("bench_replay").main([*map(str, words)]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert [w["name"].split(",")[0] for w in result["workloads"]] == ["read", "run", "replay", "grid"] * 2 + [
        "replay"
    ] * 2, "two boundaries; the first again alone and beside busy processes"
    assert result["peak_bytes"].keys() == {"imports", "model", "late 3"}
    assert "cells equal to the hooks'" in err


def test_a_wrong_margin_ends_a_bench(benches):
    assert benches.sweep.check("x", {1: 0.5}, {1: 0.5 + 5e-5, 2: 0.0}, "float32") == pytest.approx(5e-5)
    for found in ({1: 0.6}, {1: float("nan")}, {3: 0.5}, {}):
        with pytest.raises(SystemExit, match="no figures"):
            benches.sweep.check("x", found, {1: 0.5, 2: 0.0}, "float32")


def test_targets_are_judged_on_what_was_measured(benches):
    def workload(**targets):
        times = {"hooks": [9.0, 8.0, 30.0], "actcache": [6.0, 4.0, 5.0]}
        return benches.measure.Workload.of("x", "cell", times, {"hooks": 3, "actcache": 5}, (0.8, 0.5), targets)

    assert workload().seconds == {"hooks": 3, "actcache": 1}
    assert workload().spread_s["hooks"] == (8 / 3, 10)
    assert (workload().ratios, workload().percent_of_limit, workload().reached()) == ({"hooks": 3}, (80, 50), None)
    assert (workload(hooks=3).reached(), workload(hooks=3.1).reached()) == (True, False)
    assert (workload(hooks=3, limit=1.25).reached(), workload(hooks=3, limit=1.2).reached()) == (True, False)
    assert (workload(nnsight=2).reached(), workload(hooks=3, nnsight=99).reached()) == (None, True)


def test_the_limit_counts_every_product(benches):
    """Two packs through a block of two matrices, three times: twelve products at the rates of their own shapes."""
    products = benches.measure.Products(torch.float32)
    work = benches.measure.Work(Counter({(8, 16): 2, (16, 8): 1}), [4, 6], 3)
    products.expect([work])
    products.sample()
    products.sample()
    assert products.samples_s.keys() == {(4, 8, 16), (4, 16, 8), (6, 8, 16), (6, 16, 8)}
    for samples in products.samples_s.values():
        assert len(samples) == 2
        assert min(samples) > 0
    products.samples_s = {(4, 8, 16): [9, 1, 0], (4, 16, 8): [10], (6, 8, 16): [90, 110], (6, 16, 8): [1000]}
    assert products.seconds([work, work]) == (
        2 * 3 * (2 * 1 + 10 + 2 * 100 + 1000),
        2 * 3 * (2 * 0 + 10 + 2 * 90 + 1000),
    )


@pytest.fixture
def page(tmp_path, monkeypatch):
    """What the docs show of one result."""
    monkeypatch.syspath_prepend(BENCHES.parent / "scripts")
    docs_pages = importlib.import_module("docs_pages")
    monkeypatch.setattr(docs_pages, "RESULTS", tmp_path)

    def shown(result):
        (tmp_path / "one.json").write_text(json.dumps(result))
        return docs_pages.benchmarks()

    return shown


@pytest.fixture
def benches(monkeypatch):
    monkeypatch.syspath_prepend(BENCHES)
    return SimpleNamespace(sweep=importlib.import_module("bench_sweep"), measure=importlib.import_module("measure"))


@pytest.fixture
def forking(monkeypatch):
    """Processes that a bench starts are there at once."""
    monkeypatch.setattr(subprocess, "Popen", forked.Process)


def run_smoke(name, *words, path=None):
    """``path``: where modules are sought before all others."""
    code = "import runpy, sys; path, *sys.argv = sys.argv[1:]; sys.path[:0] = path.split(':'); "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    before = ["-c", code, f"{path}:{BENCHES}"] if path else []
    return forked.run([sys.executable, *before, BENCHES / f"bench_{name}.py", "--smoke", *map(str, words)])
