"""Lineage: scores of stages on the final's events and what they are of the final's, on cells with planted answers."""

from __future__ import annotations

import json
import shutil
from itertools import product
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

import actcache
from actcache.analyses.lineage import ANALYSIS, LineageOptions
from actcache.cli import main, stages
from actcache.errors import IncompatibleError, InputError

LABELS = ("base", "sft", "dpo", "math")
AT = {"base": 0.0, "sft": 0.5, "dpo": 1.0, "math": -1.0}


def run_of():
    fingerprint = SimpleNamespace(n_blocks=8, pair=("base", "dpo"), event_pairs=[("base", "dpo")], has_prefix_rows=True)
    events = pa.table({"pair": pa.array([], pa.string()), "event_id": pa.array([], pa.string()), "position": []})
    known = {"checkpoints": list(LABELS), "boundaries": [5], "main_boundary": 5}
    known |= {"path": "S", "width": 8, "dtype": "float32"}
    return SimpleNamespace(store=SimpleNamespace(fingerprint=fingerprint, events=events, **known))


def cells_of(y, *, prompts=None, steps=None, pair="base,dpo", best=None):
    """The cells of margins ``y`` ``[E, K, K]``, and of best tokens ``best`` of the same shape; y_it is token 1.

    Natively, the cell of checkpoints u and v lies 10 (u + 1) (v + 1) higher.
    """
    rows = []
    labels = list(enumerate(LABELS))
    for event, readout, (u, upstream), (v, late) in product(range(len(y)), ("common_dpo", "native"), labels, labels):
        row = {"event_id": f"{pair}:{event:03d}", "prompt_id": prompts[event] if prompts else f"p{event:03d}"}
        row |= {"kind": "first_divergence", "pair": pair, "step": steps[event] if steps else 0, "y_it": 1}
        row |= {"boundary": 5, "scope": "prefix", "upstream": upstream, "late": late, "readout": readout}
        shift = 0.0 if readout != "native" else 10.0 * (v + 1) * (u + 1)
        top1 = 1 if best is None else int(best[event, u, v])
        rows.append(row | {"variant": "none", "margin": float(y[event, u, v]) + shift, "top1_id": top1})
    return pa.Table.from_pylist(rows)


def bilinear(n_events, seed=0):
    """Margins whose interaction is g times where both checkpoints are: Y = c + a u + b v + g u v."""
    rng = np.random.default_rng(seed)
    c, a, b, g = (rng.normal(m, 1.0, n_events)[:, None, None] for m in (-4, 2, 3, 2))
    at = np.array([AT[label] for label in LABELS])
    return c + a * at[None, :, None] + b * at[None, None, :] + g * at[None, :, None] * at[None, None, :], g[:, 0, 0]


def stages_of(found, **of):
    return {
        one["stage"]: one
        for one in found.groups
        if one["part"] == "stage" and all(one[name] == value for name, value in ({"subset": "all"} | of).items())
    }


def slow_scores(y, prompts, stage, draws, seed):
    """Event by event: A, B and B - A of base and a stage; then prompt by prompt; then draw by draw."""
    s, base, final = LABELS.index(stage), 0, LABELS.index("dpo")
    of_events = []
    for event in range(len(y)):
        a = y[event, base, s] - y[event, base, base]
        b = y[event, s, s] - y[event, s, base]
        of_final = y[event, final, final] - y[event, final, base] - (y[event, base, final] - y[event, base, base])
        of_events.append((a, b, b - a, of_final))
    names = sorted(set(prompts))
    of_prompt = np.array(
        [np.mean([of_events[i] for i in range(len(y)) if prompts[i] == name], axis=0) for name in names]
    )
    rng = np.random.default_rng(seed)
    drawn = np.array([of_prompt[rng.integers(0, len(names), len(names))].mean(axis=0) for _ in range(draws)])
    ends = np.quantile(np.concatenate([drawn[:, :3], drawn[:, 2:3] / drawn[:, 3:]], axis=1), [0.025, 0.975], axis=0)
    mean = of_prompt.mean(axis=0)
    return [*mean[:3], mean[2] / mean[3]], ends


def test_a_stage_that_is_half_way_has_a_quarter_of_the_interaction():
    """Upstream and late are half of the way each, and an interaction is what both make together."""
    y, g = bilinear(40)
    of = stages_of(ANALYSIS.numbers(cells_of(y), run_of(), LineageOptions()))
    assert list(of) == ["sft", "dpo"], "math comes after the final in the lineup"
    assert of["dpo"]["interaction"]["mean"] == pytest.approx(g.mean())
    assert of["sft"]["interaction"]["mean"] == pytest.approx(g.mean() / 4)
    assert of["sft"]["fraction"] == pytest.approx({"mean": 0.25, "low": 0.25, "high": 0.25})
    assert of["dpo"]["fraction"] == pytest.approx({"mean": 1.0, "low": 1.0, "high": 1.0})
    assert of["sft"]["native_interaction"]["mean"] == pytest.approx(g.mean() / 4 + 10)


def test_numbers_are_those_of_a_slow_twin():
    rng = np.random.default_rng(5)
    y = rng.normal(0, 1, (30, 4, 4))
    y[:, 2, 2] += 4
    best = rng.integers(0, 3, y.shape)
    prompts = [f"p{event % 14}" for event in range(30)]
    options = LineageOptions(draws=200, seed=3, stages="math,sft")
    found = ANALYSIS.numbers(cells_of(y, prompts=prompts, best=best), run_of(), options)
    of = stages_of(found)
    assert list(of) == ["math", "sft", "dpo"]
    for stage, group in of.items():
        mean, ends = slow_scores(y, prompts, stage, 200, 3)
        for at, name in enumerate(("late_from_pt", "late_from_it", "interaction", "fraction")):
            assert list(group[name].values()) == pytest.approx([mean[at], *ends[:, at]], abs=1e-9), name
        s = LABELS.index(stage)
        chosen = [np.mean([best[i, s, s] == 1 for i in range(30) if prompts[i] == name]) for name in set(prompts)]
        assert group["chooses_y_it"]["mean"] == pytest.approx(np.mean(chosen))
        assert (group["n_events"], group["n_prompts"]) == (30, 14)
    assert found.table.num_rows == 3 * 30
    shown = {(one["upstream"], one["late"]): one["margin"]["mean"] for one in found.groups if one["part"] == "map"}
    assert shown.keys() == set(product(LABELS, LABELS))
    of_prompt = [np.mean([y[i, 3, 1] for i in range(30) if prompts[i] == name]) for name in sorted(set(prompts))]
    assert shown["math", "sft"] == pytest.approx(np.mean(of_prompt))


def test_later_events_are_a_subset_of_their_own():
    y, g = bilinear(40)
    steps = [event % 5 for event in range(40)]
    found = ANALYSIS.numbers(cells_of(y, steps=steps), run_of(), LineageOptions())
    later = stages_of(found, subset="step>=3")["dpo"]
    assert later["n_events"] == 16
    assert later["interaction"]["mean"] == pytest.approx(g[[step >= 3 for step in steps]].mean())
    assert not stages_of(ANALYSIS.numbers(cells_of(y), run_of(), LineageOptions()), subset="step>=3")


def test_a_final_whose_interaction_may_be_nothing_has_no_fractions():
    y, _ = bilinear(40)
    y[:20, 2, 2] -= 10
    y[20:, 2, 2] += 10
    y[:, 2, 2] -= np.mean(y[:, 2, 2] - y[:, 2, 0] - y[:, 0, 2] + y[:, 0, 0]) - 0.1
    of = stages_of(ANALYSIS.numbers(cells_of(y), run_of(), LineageOptions()))
    assert of["dpo"]["interaction"]["low"] < 0 < of["dpo"]["interaction"]["high"]
    assert {tuple(group["fraction"].values()) for group in of.values()} == {(None, None, None)}


def test_a_null_of_random_signs_is_beside_each_score():
    y, g = bilinear(40)
    of = stages_of(ANALYSIS.numbers(cells_of(y), run_of(), LineageOptions()))
    assert of["dpo"]["p"] == pytest.approx(1 / 20_001)
    assert of["dpo"]["null_sd"] == pytest.approx(np.sqrt((g**2).sum()) / 40, rel=0.05)


def test_events_of_an_earlier_stage_are_a_support_of_their_own():
    """With their tokens, under the final's readout all the same."""
    first, second = bilinear(12)[0], bilinear(15, seed=8)[0]
    parts = [cells_of(first), cells_of(second, pair="base,sft"), cells_of(second, pair="sft,dpo")]
    found = ANALYSIS.numbers(pa.concat_tables(parts), run_of(), LineageOptions())
    assert {one["pair"] for one in found.groups} == {"base,dpo", "base,sft"}
    for pair, y in (("base,dpo", first), ("base,sft", second)):
        alone = ANALYSIS.numbers(cells_of(y, pair=pair), run_of(), LineageOptions())
        assert stages_of(found, pair=pair) == stages_of(alone)
    section = ANALYSIS.section(found.groups)
    assert "The events of earlier stages are the check" in section.does_not_show
    assert len(section.rows) == 4


@pytest.mark.parametrize("n_events", [0, 1, 9])
def test_few_events_have_no_interval(n_events):
    found = ANALYSIS.numbers(cells_of(bilinear(9)[0]).slice(0, n_events * 32), run_of(), LineageOptions())
    of = stages_of(found)
    assert len(of) == (2 if n_events else 0)
    for stage, fraction in (("sft", 0.25), ("dpo", 1.0)) if n_events else ():
        assert of[stage]["fraction"] == {"mean": pytest.approx(fraction), "low": None, "high": None}
    assert not n_events or ANALYSIS.section(found.groups).rows


def test_an_event_that_lacks_a_cell_is_an_error():
    cells = cells_of(bilinear(3)[0])
    with pytest.raises(InputError, match="not every event has each of the 16 cells under common_dpo once"):
        ANALYSIS.numbers(cells.slice(1), run_of(), LineageOptions())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"base": "pt"}, "there is no checkpoint 'pt' in S; it has base, sft, dpo, math"),
        ({"final": "it"}, "there is no checkpoint 'it' in S"),
        ({"stages": "sft, rl"}, "there is no checkpoint 'rl' in S"),
        ({"stages": "base,sft"}, "base base, stages base, sft, final dpo: each must be another checkpoint"),
        ({"stages": "sft,sft"}, "each must be another checkpoint"),
        ({"base": "dpo"}, "each must be another checkpoint"),
        ({"base": "sft"}, "has no stage between sft and dpo, but base, sft, dpo, math"),
        ({"base": "sft", "stages": "math"}, "has events of base,dpo, and none of sft and a stage of it"),
        ({"weights": "word"}, "weights 'word' are unknown"),
        ({"draws": 3}, "draws=3"),
        ({"boundary": "3"}, "boundary 3 is not in the store; it has 5"),
        ({"scope": "suffix"}, "scope 'suffix' is unknown"),
    ],
)
def test_what_the_store_cannot_serve_is_refused(options, said):
    with pytest.raises(InputError, match=said):
        ANALYSIS.check(run_of().store, LineageOptions(**options))


# ---- on real checkpoints ----


def captured(place, folders, pair, *more):
    words = [word for label, folder in folders.items() for word in ("--checkpoint", f"{label}={folder}")]
    words += ["--pair", pair, "--prompts", tiny.write_prompts(place.parent / "prompts.jsonl"), "--out", place]
    with mock.patch.object(stages, "write_report"):  # nobody looks at the page, which takes as long as the run
        assert main([str(word) for word in ["run", *words, "--max-new", 12, "--strict", "--stability", 0, *more]]) == 0
    return place


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, the same again, a checkpoint half of the way to the final, and the final."""
    place = tmp_path_factory.mktemp("lineage")
    base, final = tiny.make_pair(place / "whole", "llama", eps=tiny.EPS / 5)
    half = tiny.make_pair(place / "half", "llama", eps=tiny.EPS / 10)[1]
    return {"base": base, "same": base, "half": half, "final": final}


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    return captured(tmp_path_factory.mktemp("run") / "run", folders, "base,final")


@pytest.fixture(scope="module")
def further(folders, tmp_path_factory):
    """Of the events of an earlier stage."""
    return captured(tmp_path_factory.mktemp("further") / "run", folders, "base,half")


@pytest.fixture(scope="module")
def of_both(run, further, tmp_path_factory):
    """What the run gives beside the further one, which is answered too."""
    here = shutil.copytree(run, tmp_path_factory.mktemp("of-both") / "run")
    return actcache.Run(here).analyse("lineage", stages="half", further=str(further))


@pytest.mark.slow
def test_half_way_in_weights_is_a_quarter_of_the_interaction(run, capfd):
    """As far as the checkpoints are near enough for what is not bilinear to be small."""
    assert main(["lineage", str(run), "--stages", "same,half"]) == 0
    assert "fraction" in capfd.readouterr().out
    table = pq.read_table(run / "lineage.parquet").to_pandas()
    scores = table.pivot(index="event_id", columns="stage", values="interaction")
    assert len(scores) >= 10
    assert (scores["same"] == 0).all()
    slope = (scores["half"] * scores["final"]).sum() / (scores["final"] ** 2).sum()
    assert slope == pytest.approx(0.25, abs=0.02)
    groups = {one["stage"]: one for one in json.loads((run / "lineage.json").read_text())["groups"] if "stage" in one}
    assert groups["same"]["chooses_y_it"]["mean"] == 0
    assert groups["final"]["chooses_y_it"]["mean"] == 1
    assert main(["report", str(run)]) == 0
    assert '<section id="lineage">' in (run / "report.html").read_text()


@pytest.mark.slow
def test_a_change_of_late_blocks_alone_has_no_interaction(tmp_path):
    """And its late effect is the same from every state."""
    base, final = tiny.make_pair(tmp_path / "whole", "llama", change="late")
    half = tiny.make_pair(tmp_path / "half", "llama", change="late", eps=tiny.EPS / 2)[1]
    run = captured(tmp_path / "run", {"base": base, "half": half, "final": final}, "base,final", "--limit", 12)
    groups = [one for one in actcache.Run(run).analyse("lineage")["groups"] if one["part"] == "stage"]
    assert {one["stage"] for one in groups} == {"half", "final"}
    for one in groups:
        assert one["interaction"]["mean"] == 0
        assert one["fraction"] == {"mean": None, "low": None, "high": None}
        assert one["late_from_pt"] == one["late_from_it"]
        assert one["late_from_it"]["mean"] > 0
        assert one["p"] == 1


@pytest.mark.slow
def test_further_runs_have_the_events_of_earlier_stages(run, further, of_both):
    """Their cells under the final's readout are replayed where they are; the same numbers come of both at once."""
    found = of_both
    assert {one["pair"] for one in found["groups"]} == {"base,final", "base,half"}
    of_further = json.loads((further / "lineage.json").read_text())["groups"]
    assert [one for one in found["groups"] if one["pair"] == "base,half" and one["part"] == "stage"] == [
        one for one in of_further if one["part"] == "stage"
    ]
    assert of_further[0]["readout"] == "common_final"
    with pytest.raises(InputError, match=r"has events of base,half .first_divergence., which another of the runs has"):
        actcache.Run(run).analyse("lineage", stages="half", further=f"{further},{further}")


@pytest.mark.slow
def test_a_further_run_of_other_checkpoints_is_refused(run, folders, tmp_path):
    others = folders | {"half": folders["final"]}
    other = captured(tmp_path / "other", others, "base,half", "--limit", 4)
    with pytest.raises(IncompatibleError, match=r"checkpoint half of .* is not that of .*: its weights is another"):
        actcache.Run(run).analyse("lineage", stages="half", further=str(other))
    two = {"base": folders["base"], "final": folders["final"]}
    fewer = captured(tmp_path / "fewer", two, "base,final", "--limit", 4)
    with pytest.raises(InputError, match=r"there is no checkpoint 'half' in .*; it has base, final"):
        actcache.Run(run).analyse("lineage", stages="half", further=str(fewer))
    with pytest.raises(InputError, match=r"has no stage between base and final, but base, final: name some"):
        actcache.Run(fewer).analyse("lineage")


@pytest.mark.slow
def test_one_capture_of_several_pairs_has_all_supports(of_both, folders, tmp_path):
    """As of runs of one pair each; and its recipes are of both descendants."""
    several = captured(tmp_path / "several", folders, "base,final", "--pair", "base,half")
    found, expected = actcache.Run(several).analyse("lineage", stages="half"), of_both
    key = ("part", "pair", "subset", "stage", "upstream", "late")
    of = {tuple(one.get(name) for name in key): one for one in found["groups"]}
    for one in expected["groups"]:
        same = of[tuple(one.get(name) for name in key)]
        assert same["n_events"] == one["n_events"]
        for name in ("interaction", "native_interaction", "margin"):
            assert one.get(name) is None or same[name]["mean"] == pytest.approx(one[name]["mean"], abs=1e-4)
    recipes = actcache.Run(several).analyse("recipes")["groups"]
    own = {one["descendant"]: one for one in recipes if one["part"] == "recipe" and one["subset"] == "all"}
    assert list(own) == ["half", "final"]
    for label, one in own.items():
        (score,) = (g for g in found["groups"] if g["pair"] == f"base,{label}" and g.get("stage") == label
                    and g["subset"] == "all")  # fmt: skip
        assert one["n_events"] == score["n_events"]
        if label == "final":  # the readout of both
            assert one["interaction"] == pytest.approx(score["interaction"])
