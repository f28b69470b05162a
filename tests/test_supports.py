"""Supports: means and ratios on planted events, the audits against a twin, and the analysis of a real run."""

from __future__ import annotations

import json
import shutil
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import reference

import actcache
from actcache.analyses import ANALYSES
from actcache.analyses.supports import COVARIATES, SupportsOptions, certainty, groups_of
from actcache.cli import main, stages
from actcache.errors import InputError
from actcache.models.checkpoint import Checkpoint
from actcache.models.cost import ModelShape
from actcache.store import compact
from actcache.study.earlier_job import Earlier, EarlierJob
from actcache.study.overlap import overlap_weights
from actcache.study.work import total

CLASSES = ("content", "format", "discourse")


def events(rows: list[dict[str, Any]]) -> pa.Table:
    """Events of one pair; each row names what matters."""
    usual = {"step": 5, "late_from_pt": 1.0, "native_shift": 4.0, "class_pt": "content", "class_it": "content"}
    usual |= {"entropy": 1.0, "confidence": 0.5, "gap": 1.0}
    full = [usual | row for row in rows]
    full = [row | {"late_from_it": row["late_from_pt"] + row["interaction"]} for row in full]
    table = pa.Table.from_pylist(full)
    return table.set_column(table.column_names.index("step"), "step", table["step"].cast(pa.int32()))


def found(rows: list[dict[str, Any]], **options: Any) -> dict[str, dict[str, Any]]:
    groups = list(groups_of(events(rows), SupportsOptions(**{"draws": 200} | options)))
    return {one["support"]: one for one in groups if one["part"] == "support"}


def of(kind: str, prompt: int, interaction: float, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "prompt_id": f"p{prompt:03d}", "interaction": interaction, **more}


def test_prompts_with_one_event_and_with_twenty_weigh_the_same():
    rows = [of("native_it", 0, 10.0, step=4) for _ in range(20)] + [
        of("native_it", n, 1.0, step=8) for n in range(1, 12)
    ]
    assert found(rows)["native_it"]["interaction"]["mean"] == pytest.approx((10 + 11 * 1) / 12)
    assert found(rows, weights="event")["native_it"]["interaction"]["mean"] == pytest.approx((20 * 10 + 11) / 31)
    assert (found(rows)["native_it"]["n_events"], found(rows)["native_it"]["n_prompts"]) == (31, 12)


def test_balanced_is_the_mean_of_the_sources_that_a_prompt_has():
    rows = [of("first_divergence", n, 2.0) for n in range(20)]
    rows += [of("pt_rollout", n, 1.0) for n in range(20)]
    rows += [of("it_rollout", n, 3.0) for n in range(10)]
    groups = found(rows)
    assert groups["pt_rollout"]["interaction"]["mean"] == 1.0
    assert groups["it_rollout"]["interaction"]["mean"] == 3.0
    assert groups["balanced"]["interaction"]["mean"] == pytest.approx((10 * 2.0 + 10 * 1.0) / 20)
    assert groups["balanced"]["n_prompts"] == 20
    assert found(rows, weights="event")["balanced"] == groups["balanced"] | {
        name: found(rows, weights="event")["balanced"][name] for name in ("p", "null_q99.9")
    }
    assert groups["balanced"]["ratio"]["mean"] == pytest.approx(0.75)
    assert groups["it_rollout"]["ratio"] == {
        "mean": pytest.approx(1.5),
        "low": pytest.approx(1.5),
        "high": pytest.approx(1.5),
    }
    assert "ratio" not in groups["first_divergence"]
    assert groups["balanced"]["flags"] == []
    assert found([*rows[:20], *(of("pre_divergence", n, -1.0) for n in range(20))])["pre_divergence"]["flags"] == [
        "ratio"
    ]


def test_a_ratio_is_of_means_over_their_own_prompts():
    """Prompts that only one of the two has count on that side, as published; both sides share their draws."""
    rng = np.random.default_rng(1)
    effect = rng.normal(2, 1, 60)
    rows = [of("first_divergence", n, effect[n]) for n in range(60)]
    rows += [of("it_rollout", n, 0.5 * effect[n]) for n in range(20, 60)]
    group = found(rows, draws=2000)["it_rollout"]
    assert group["ratio"]["mean"] == pytest.approx(0.5 * effect[20:].mean() / effect.mean())
    # The twin: prompts are drawn, and each side's mean is over those drawn that it has.
    twin = []
    rng = np.random.default_rng(0)
    for _ in range(2000):
        drawn = rng.integers(0, 60, 60)
        twin.append(0.5 * effect[drawn[drawn >= 20]].mean() / effect[drawn].mean())
    assert [group["ratio"][end] for end in ("low", "high")] == pytest.approx(np.quantile(twin, [0.025, 0.975]))
    few = found([*rows[:60], *(of("pt_rollout", n, 1.0) for n in range(9))])["pt_rollout"]
    assert few["ratio"]["mean"] is not None
    assert few["ratio"]["low"] is None, "nine prompts have no interval"
    assert few["interaction"]["low"] is None


def test_horizons_are_pooled_as_asked_and_told_one_by_one():
    rows = [of("native_pt", n, float(step), step=step) for n in range(12) for step in (0, 4, 8, 16, 32)]
    assert found(rows)["native_pt"]["interaction"]["mean"] == pytest.approx((4 + 8 + 16) / 3)
    assert found(rows, horizons="0,32")["native_pt"]["interaction"]["mean"] == pytest.approx(16)
    groups = list(groups_of(events(rows), SupportsOptions(draws=200)))
    steps = {one["step"]: one["interaction"]["mean"] for one in groups if one["part"] == "horizon"}
    assert steps == {step: float(step) for step in (0, 4, 8, 16, 32)}
    for wrong in ("5", "4,,8", ""):
        with pytest.raises(InputError, match="give a list of some of 0, 1, 2, 4, 8, 16, 32"):
            _ = SupportsOptions(horizons=wrong).steps


def test_shares_are_of_steps_and_of_both_tokens():
    rows = [of("first_divergence", n, 1.0, step=(0, 2, 3, 9)[n % 4], class_it=CLASSES[n % 2]) for n in range(40)]
    group = found(rows)["first_divergence"]
    shares = {name: group[f"share_{name}"]["mean"] for name in ("step_0", "step_3", *CLASSES)}
    assert shares == pytest.approx({"step_0": 0.25, "step_3": 0.5, "content": 0.75, "format": 0.25, "discourse": 0.0})


def test_an_effect_of_the_step_alone_goes_away_on_the_overlap():
    """Drawn events lie later, and the interaction is what the step makes of it, whatever the support."""
    rng = np.random.default_rng(2)
    rows = []
    for kind, least in (("first_divergence", 0), ("it_rollout", 4)):
        for n in range(300):
            step = int(rng.integers(least, least + 20))
            rows.append(
                of(kind, n, 3.0 - 0.1 * step, step=step, entropy=float(rng.normal()), gap=float(rng.exponential()))
            )
    group = found(rows)["it_rollout"]
    assert group["ratio"]["mean"] < 0.85
    assert group["ratio_overlap"]["mean"] == pytest.approx(1, abs=1e-4)
    assert group["smd_step"]["mean"] > 0.5
    assert abs(group["smd_entropy"]["mean"]) < 0.2
    assert group["smd_confidence"]["mean"] is None, "it is the same everywhere: there is nothing to standardise by"
    assert 100 < group["n_effective"] < 300


def test_differences_are_standardised_as_a_twin_does():
    rng = np.random.default_rng(3)
    rows = [of("first_divergence", n, 1.0, gap=float(rng.normal(1, 2))) for n in range(30)]
    rows += [of("native_it", n % 15, 1.0, step=4, gap=float(rng.normal(2, 1))) for n in range(45)]
    group = found(rows)["native_it"]
    gaps = {
        kind: np.array([row["gap"] for row in rows if row["kind"] == kind])
        for kind in ("first_divergence", "native_it")
    }
    own, first = gaps["native_it"], gaps["first_divergence"]  # three events of each of 15 prompts: all weigh the same
    expected = (own.mean() - first.mean()) / np.sqrt((own.var() + first.var()) / 2)
    assert group["smd_gap"]["mean"] == pytest.approx(expected, abs=1e-12)


@given(st.integers(0, 2**32), st.integers(2, 40), st.integers(2, 40))
@settings(max_examples=30)
def test_overlap_weights_balance_every_covariate(seed, n_own, n_first):
    rng = np.random.default_rng(seed)
    own, first = rng.normal(0.5, 1.5, (n_own, 3)), rng.normal(0, 1, (n_first, 3))
    weights = rng.uniform(0.2, 1, n_own), rng.uniform(0.2, 1, n_first)
    of_own, of_first = overlap_weights(own, first, *weights)
    assert ((of_own >= 0) & (of_own <= 1)).all()
    assert ((of_first >= 0) & (of_first <= 1)).all()
    # The regression's own condition; where it nearly parts the two, nearly nothing overlaps and nothing is told.
    totals = [
        (w * of) @ np.column_stack([x, np.ones(len(x))])
        for w, of, x in zip(weights, (of_own, of_first), (own, first), strict=True)
    ]
    assert totals[0] == pytest.approx(totals[1], abs=1e-3 * (n_own + n_first))


def test_supports_without_overlap_weigh_nothing():
    own, first = np.linspace(10, 11, 20)[:, None], np.linspace(0, 1, 30)[:, None]
    of_own, of_first = overlap_weights(own, first, np.ones(20), np.ones(30))
    assert max(of_own.max(), of_first.max()) < 0.1


# ---- of a run ----


def no_page():
    """Nobody looks at the page of such a run, which takes as long as the run."""
    return mock.patch.object(stages, "write_report")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pt, it = tiny.make_pair(folder, "llama")
    prompts = tiny.write_prompts(folder / "p.jsonl")
    words = ["run", "--pt", pt, "--it", it, "--prompts", prompts, "--out", folder / "run", "--support", "rollouts"]
    with no_page():
        assert main([str(word) for word in [*words, "--rollout-tokens", 12, "--stability", 0, "--strict"]]) == 0
    return actcache.Run(folder / "run"), {"pt": pt, "it": it}


@pytest.mark.slow
def test_it_answers_for_a_run_of_rollouts(run):
    run, _ = run
    groups = run.analyse("supports", draws=200)["groups"]
    supports = {one["support"]: one for one in groups if one["part"] == "support"}
    assert {
        "first_divergence",
        "balanced",
        "pt_rollout",
        "it_rollout",
        "pre_divergence",
        "native_it",
    } <= supports.keys()
    cells = run.cells.to_pylist()
    margins = {
        (row["event_id"], row["upstream"], row["late"]): row["margin"] for row in cells if row["readout"] == "common_it"
    }
    for kind in ("first_divergence", "it_rollout", "pre_divergence"):  # one event per prompt
        ids = [row["event_id"] for row in run.store.events.to_pylist() if row["kind"] == kind]
        y = {u + late: np.array([margins[one, u, late] for one in ids]) for u in ("pt", "it") for late in ("pt", "it")}
        interaction = (y["itit"] - y["itpt"]) - (y["ptit"] - y["ptpt"])
        assert supports[kind]["interaction"]["mean"] == pytest.approx(interaction.mean(), abs=1e-6)
        assert supports[kind]["n_events"] == len(ids)
    assert supports["balanced"]["share_step_0"]["mean"] == 0
    assert {f"smd_{name}" for name in COVARIATES} <= supports["balanced"].keys()
    table = pq.read_table(run.path / "supports.parquet")
    assert table.num_rows == len(run.store)
    assert np.isfinite(table["entropy"].to_numpy()).all()


@pytest.fixture(scope="module")
def plain(run, tmp_path_factory):
    """The same pair and prompts, with first divergences alone, in several segments."""
    _, checkpoints = run
    folder = tmp_path_factory.mktemp("plain")
    prompts = tiny.write_prompts(folder / "p.jsonl")
    words = ["run", "--pt", checkpoints["pt"], "--it", checkpoints["it"], "--prompts", prompts, "--out", folder / "run"]
    words += ["--max-new", 13, "--stability", 0, "--strict", "--shard-prompts", 5]
    with no_page():
        assert main([str(word) for word in words]) == 0
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_steps_before_the_first_divergence_are_scored_on_any_run(run, plain, tmp_path, strict):
    """As the events that a capture of rollouts makes of them, to rounding; killed and compacted, too."""
    out = shutil.copytree(plain, tmp_path / "run")
    if not strict:
        assert main(["grid", str(out)]) == 0
    rollouts, _ = run
    rollouts.analyse("supports", draws=200)
    found = actcache.Run(out).analyse("supports", draws=200)
    groups = {one["support"]: one for one in found["groups"]}
    assert groups.keys() == {"first_divergence", "pre_divergence"}
    columns = ["prompt_id", "step", "late_from_pt", "late_from_it", "interaction", "native_shift", "class_it"]
    own, theirs = (
        {
            row["prompt_id"]: row
            for row in pq.read_table(path / "supports.parquet")
            .filter(pc.field("kind") == "pre_divergence")
            .select(columns)
            .to_pylist()
        }
        for path in (out, rollouts.path)
    )
    assert len(own) > 3
    assert own.keys() == theirs.keys()
    for prompt, row in own.items():
        for name, value in row.items():
            expected = theirs[prompt][name]
            assert value == (pytest.approx(expected, abs=1e-4) if isinstance(value, float) else expected)
    assert "smd_step" not in groups["pre_divergence"], "no final state is stored there"
    assert groups["pre_divergence"]["ratio"]["mean"] is not None
    files = sorted((out / "supports/earlier").glob("*.parquet"))
    compact(out / "store")
    with mock.patch.object(EarlierJob, "run", side_effect=AssertionError):
        again = actcache.Run(out).analyse("supports", draws=200)
    assert again["groups"] == found["groups"]
    files[0].unlink()
    again = actcache.Run(out).analyse("supports", draws=200)["groups"]
    means = [[group["interaction"]["mean"] for group in of] for of in (again, found["groups"])]
    assert means[0] == (means[1] if strict else pytest.approx(means[1], abs=1e-4)), (
        "packs are others after a compaction"
    )


@pytest.mark.slow
def test_costs_of_earlier_steps(plain):
    store = actcache.open_store(plain / "store")
    steps = {n: 0 for n, step in enumerate(store.events["step"].to_pylist()) if step >= 3}
    earlier = Earlier(steps, 3, ("pt", "it"), ("native",), strict=True, max_tokens=None)
    jobs = earlier.jobs(store, {})
    shape = ModelShape.of_checkpoint(Checkpoint.open("pt", actcache.Run(plain).lineup.checkpoints["pt"].path))
    lengths = [store.events["position"][n].as_py() - store.events["step"][n].as_py() + 1 for n in steps]
    cost = total(job.cost({"pt": shape, "it": shape}) for job in jobs)["earlier"]
    assert cost == pytest.approx(4 * shape.products(np.array(lengths, float), first=3))
    assert sum(job.n_units for job in jobs) == 4 * len(steps)


@pytest.mark.slow
def test_every_analysis_takes_events_of_every_kind(tmp_path, capfd):
    """Several events per sequence and prompt, three checkpoints, two pairs of one base."""
    folders = tiny.make_lineup(tmp_path, "llama", ("base", "sft", "dpo"))
    prompts = tiny.write_prompts(tmp_path / "p.jsonl", 6)
    words = ["run", *(f"--checkpoint={label}={folder}" for label, folder in folders.items()), "--prompts", prompts]
    words += ["--pair=base,dpo", "--pair=base,sft", "--support=rollouts", "--rollout-tokens=10", "--boundary=2,3"]
    with no_page():
        assert main([str(word) for word in [*words, "--out", tmp_path / "run", "--stability=4"]]) == 0
    run = actcache.Run(tmp_path / "run")
    kinds = set(run.store.events["kind"].to_pylist())
    assert len(kinds) >= 6
    for named in ANALYSES:
        groups = run.analyse(named.name, **({"max_new": 16} if named.name == "forced" else {}))["groups"]
        assert groups, named.name
        if any("kind" in one for one in groups) and named.name not in ("recipes",):  # which is of one kind by an option
            assert kinds <= {one["kind"] for one in groups if "kind" in one}, named.name
        if named.name in ("supports", "depth", "effects"):
            assert {one["pair"] for one in groups} == {"base,dpo", "base,sft"}, named.name
    assert run.analyse("recipes", kind="it_rollout")["groups"]
    assert main(["report", str(run.path)]) == 0
    assert main(["verify", str(run.path)]) == 0
    capfd.readouterr()


@pytest.mark.slow
def test_how_sure_a_checkpoint_is_against_plain_logits(run):
    run, checkpoints = run
    events = run.store.events.to_pylist()[:6]
    ids, offsets = run.store.token_ids(events=list(range(6)))
    model = reference.load(checkpoints["it"], torch.float32)
    entropy, confidence = certainty(run.load_readout("it"), run.store.final("it", list(range(6))))
    for index in range(len(events)):
        own = ids[offsets[index] : offsets[index + 1]].tolist()
        p = reference.readout(model, reference.final_hidden(model, own)[-1]).double().softmax(-1)
        assert confidence[index] == pytest.approx(float(p.max()), abs=1e-5)
        assert entropy[index] == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)


@pytest.mark.slow
def test_classes_of_one_s_own_and_what_is_refused(run, tmp_path, capfd):
    run, _ = run
    file = tmp_path / "classes.toml"
    file.write_text("format = ['.*']\n")
    groups = run.analyse("supports", draws=200, classes=str(file))["groups"]
    assert {one["share_format"]["mean"] for one in groups} == {1.0}
    assert main(["supports", str(run.path), "--horizons", "3"]) == 2
    assert "horizons '3'" in capfd.readouterr().err
    assert main(["supports", str(run.path), "--classes", str(tmp_path / "none.toml")]) == 2
    assert "no such file of token classes" in capfd.readouterr().err
    assert main(["supports", str(run.path), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["analysis"] == "supports"
