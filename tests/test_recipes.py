"""Recipes: P, M and C of descendants on their own events, and contrasts between them, on cells with planted answers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from numpy.linalg import lstsq

import actcache
from actcache.analyses.recipes import ANALYSIS, RecipesOptions
from actcache.cli import main
from actcache.errors import InputError

LABELS = ("base", "sft", "dpo", "math")
TOKENS = {"content": " castle", "format": "\n", "discourse": " Sure"}


def planted(events):
    """A run and its cells, of events ``(prompt, descendant, category, step, token class, P, M)``."""
    rows, cells = [], []
    for prompt, label, category, step, token, p, m in events:
        row = {
            "event_id": f"{prompt}@{label}",
            "prompt_id": prompt,
            "kind": "first_divergence",
            "pair": f"base,{label}",
        }
        row |= {"step": step, "position": 9 + step, "y_it": 1, "token_it": TOKENS[token], "special_it": 0}
        rows.append(row | {"segment": "s", "category": category})
        margins = {("base", "base"): -3.0, ("base", label): p - 3.0, (label, "base"): 1.5, (label, label): 1.5 + m}
        for upstream in LABELS:
            for late in LABELS:
                for readout in ("native", *(f"common_{one}" for one in LABELS)):
                    margin = margins.get((upstream, late), 99.0) + (50.0 if readout != f"common_{label}" else 0.0)
                    cell = {"boundary": 5, "scope": "prefix", "upstream": upstream, "late": late, "readout": readout}
                    kept = {name: row[name] for name in ("event_id", "prompt_id", "kind", "pair", "step")}
                    cells.append(kept | cell | {"variant": "none", "margin": margin, "top1_id": 1})
    table = pa.Table.from_pylist(rows)
    fingerprint = SimpleNamespace(n_blocks=8, pair=("base", "sft"), event_pairs=[], has_prefix_rows=True)
    known = {"checkpoints": list(LABELS), "boundaries": [5], "main_boundary": 5}
    known |= {"path": "S", "width": 8, "dtype": "float32"}
    store = Store(fingerprint=fingerprint, events=table, **known)
    return SimpleNamespace(store=store), pa.Table.from_pylist(cells)


class Store(SimpleNamespace):
    def __len__(self):
        return len(self.events)


def drawn_events(n_prompts=40, labels=("sft", "dpo", "math"), seed=0, *, missing=0.0):
    """Events whose P and M depend on descendant, category, step and token, and on chance."""
    rng = np.random.default_rng(seed)
    found = []
    for at in range(n_prompts):
        category = ("story", "sums")[at % 2]
        for number, label in enumerate(labels):
            if rng.random() < missing:
                continue
            step, token = int(rng.integers(0, 9)), list(TOKENS)[rng.integers(0, 3)]
            p = rng.normal(1.0 + number, 0.5)
            c = (
                rng.normal(1.0 - number, 0.5)
                + (2.0 if category == "sums" else 0.0)
                - 0.3 * (step > 5)
                + (token == "format")
            )
            found.append((f"p{at:02d}", label, category, step, token, p, p + c))
    return found


def groups_of(found, part, **of):
    return [one for one in found.groups if one["part"] == part and all(one[name] == of[name] for name in of)]


def bootstrap(of_prompt, draws=2000, seed=0):
    rng = np.random.default_rng(seed)
    of_prompt = np.asarray(of_prompt)
    return np.array([of_prompt[rng.integers(0, len(of_prompt), len(of_prompt))].mean(axis=0) for _ in range(draws)])


def test_each_descendant_has_its_own_events_under_its_own_readout():
    events = drawn_events()
    run, cells = planted(events)
    found = ANALYSIS.numbers(cells, run, RecipesOptions())
    assert [one["descendant"] for one in groups_of(found, "recipe", subset="all")] == ["sft", "dpo", "math"]
    for one in groups_of(found, "recipe"):
        mine = [e for e in events if e[1] == one["descendant"] and one["subset"] in ("all", f"category={e[2]}")]
        p, m = np.array([e[5:] for e in mine]).T
        drawn = bootstrap(np.stack([p, m], axis=1))
        assert (one["n_events"], one["n_prompts"]) == (len(mine), len(mine))
        assert one["late_from_pt"]["mean"] == pytest.approx(p.mean())
        assert one["late_from_it"]["mean"] == pytest.approx(m.mean())
        assert one["interaction"]["mean"] == pytest.approx((m - p).mean())
        ends = np.quantile(drawn[:, 1] - drawn[:, 0], [0.025, 0.975])
        assert [one["interaction"]["low"], one["interaction"]["high"]] == pytest.approx(ends)
        assert one["portable_share"]["mean"] == pytest.approx(p.mean() / m.mean())
        assert one["conditional_share"]["mean"] == pytest.approx(1 - p.mean() / m.mean())
    assert found.table.num_rows == len(events)
    section = ANALYSIS.section(found.groups)
    assert {len(row) for row in section.rows} == {len(section.columns)}
    assert len(section.rows) == 3 * 3 + 1 + 3 * 3


def test_shares_of_a_matched_effect_that_may_be_nothing_are_not_told():
    events = [(f"p{at:02d}", "sft", "story", 0, "content", 1.0, 2.0 * (-1) ** at) for at in range(20)]
    run, cells = planted(events)
    (one,) = groups_of(ANALYSIS.numbers(cells, run, RecipesOptions()), "recipe", subset="all")
    assert one["late_from_it"]["low"] < 0 < one["late_from_it"]["high"]
    assert one["portable_share"]["mean"] is one["conditional_share"]["mean"] is None


def test_contrasts_are_of_matched_prompts():
    """A prompt that one of the sides lacks counts for neither."""
    events = drawn_events(missing=0.2)
    run, cells = planted(events)
    found = ANALYSIS.numbers(cells, run, RecipesOptions(contrast="sft+dpo:math"))
    (one,) = groups_of(found, "contrast", subset="all")
    c = {(e[0], e[1]): e[6] - e[5] for e in events}
    matched = sorted({e[0] for e in events if all((e[0], label) in c for label in ("sft", "dpo", "math"))})
    assert 10 < len(matched) < 40
    assert (one["n_prompts"], one["n_events"]) == (len(matched), 3 * len(matched))
    of_prompt = [(c[p, "sft"] + c[p, "dpo"]) / 2 - c[p, "math"] for p in matched]
    ends = np.quantile(bootstrap(of_prompt), [0.025, 0.975])
    assert list(one["interaction"].values()) == pytest.approx([np.mean(of_prompt), *ends])


def test_controls_take_out_what_they_explain():
    """The slow twin: dummies written out, solved by least squares, prompts drawn one by one."""
    events = drawn_events(60)
    run, cells = planted(events)
    found = ANALYSIS.numbers(cells, run, RecipesOptions(contrast="sft:math", draws=200))
    (one,) = groups_of(found, "contrast", subset="all")

    def row(e):
        bins = [1 <= e[3] <= 2, 3 <= e[3] <= 5, e[3] >= 6]
        return [1, e[1] == "sft", e[2] == "sums", *bins, e[4] == "format", e[4] == "discourse"]

    def difference(prompts):
        mine = [e for p in prompts for e in events if e[0] == p and e[1] in ("sft", "math")]
        return lstsq(np.array([row(e) for e in mine], float), np.array([e[6] - e[5] for e in mine]), rcond=None)[0][1]

    prompts = sorted({e[0] for e in events})
    rng = np.random.default_rng(0)
    drawn = [difference([prompts[i] for i in rng.integers(0, 60, 60)]) for _ in range(200)]
    expected = [difference(prompts), *np.quantile(drawn, [0.025, 0.975])]
    assert list(one["interaction_adjusted"].values()) == pytest.approx(expected, abs=1e-9)
    assert one["interaction_adjusted"]["mean"] == pytest.approx(2.0, abs=0.3), "as planted"


def test_a_difference_that_position_alone_explains_is_none_with_controls():
    """Math parts late, where C is small for whoever parts there: the plain contrast sees a recipe."""
    rng = np.random.default_rng(2)
    events = []
    for at in range(60):
        for label, late in (("sft", 0.3), ("math", 0.7)):
            step = 8 if rng.random() < late else 0
            events.append((f"p{at:02d}", label, "story", step, "content", 1.0, 4.0 if step == 0 else 1.0))
    run, cells = planted(events)
    (one,) = groups_of(ANALYSIS.numbers(cells, run, RecipesOptions()), "contrast", subset="all")
    assert one["interaction"]["low"] > 0.5
    assert one["interaction_adjusted"]["mean"] == pytest.approx(0.0, abs=1e-9)


def test_all_descendants_weigh_the_same_where_they_are_pooled():
    events = drawn_events(missing=0.3)
    run, cells = planted(events)
    (one,) = groups_of(ANALYSIS.numbers(cells, run, RecipesOptions()), "pooled")
    means = [np.mean([e[6] - e[5] for e in events if e[1] == label]) for label in ("sft", "dpo", "math")]
    assert one["interaction"]["mean"] == pytest.approx(np.mean(means))
    assert one["interaction"]["low"] < np.mean(means) < one["interaction"]["high"]
    assert one["n_events"] == len(events)
    assert one["p"] < 0.01


def test_equal_descendants_differ_in_nothing():
    events = drawn_events(labels=("sft",))
    run, cells = planted([*events, *((e[0], "math", *e[2:]) for e in events)])
    found = ANALYSIS.numbers(cells, run, RecipesOptions())
    for one in groups_of(found, "contrast"):
        for name in ("late_from_pt", "late_from_it", "interaction", "interaction_adjusted"):
            assert list(one[name].values()) == pytest.approx([0.0, 0.0, 0.0], abs=1e-9)


@pytest.mark.parametrize("n_prompts", [0, 1, 2, 9])
def test_few_events_have_no_interval(n_prompts):
    run, cells = planted(drawn_events(9))
    chosen = pa.compute.is_in(
        cells["prompt_id"], value_set=pa.array([f"p{i:02d}" for i in range(n_prompts)], pa.string())
    )
    found = ANALYSIS.numbers(cells.filter(chosen), run, RecipesOptions())
    assert bool(found.groups) == bool(n_prompts)
    for one in found.groups:
        assert one["interaction"]["mean"] is not None
        assert one["interaction"]["low"] is None
    assert not n_prompts or ANALYSIS.section(found.groups).rows


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"base": "pt"}, "there is no checkpoint 'pt' in S; it has base, sft, dpo, math"),
        ({"base": "math"}, "recipes are of math and two descendants or more: capture with --pair math,A"),
        ({"by": "topic"}, "carry no column 'topic'; they carry category"),
        ({"kind": "fixed"}, "has no events of kind 'fixed'; it has first_divergence"),
        ({"readout": "common_it_"}, "readout 'common_it_' is unknown; choose from native"),
        ({"weights": "word"}, "weights 'word' are unknown"),
        ({"draws": 3}, "draws=3"),
        ({"boundary": "3"}, "boundary 3 is not in the store; it has 5"),
        ({"contrast": "sft"}, "the contrast 'sft' is none; give two sides"),
        ({"contrast": "sft+dpo:dpo"}, "the contrast 'sft.dpo:dpo' is none"),
    ],
)
def test_what_the_store_cannot_serve_is_refused(options, said):
    run, _ = planted(drawn_events(3))
    with pytest.raises(InputError, match=said):
        ANALYSIS.check(run.store, RecipesOptions(**options))


def test_a_column_that_tells_prompts_apart_makes_no_subsets():
    events = [(*e[:2], f"topic {e[0]}", *e[3:]) for e in drawn_events(60)]
    run, cells = planted(events)
    found = ANALYSIS.numbers(cells, run, RecipesOptions())
    assert {one["subset"] for one in found.groups} == {"all"}
    with pytest.raises(InputError, match="column 'category' has 60 values; subsets are of at most 50"):
        ANALYSIS.check(run.store, RecipesOptions(by="category"))


@pytest.mark.parametrize("options", [{"descendants": "sft,rl"}, {"contrast": "sft:rl"}])
def test_a_descendant_without_events_is_named(options):
    run, cells = planted(drawn_events(3))
    with pytest.raises(InputError, match="there are no events of base and 'rl'; there are of sft, dpo, math"):
        ANALYSIS.numbers(cells, run, RecipesOptions(**options))


# ---- on real checkpoints ----


@pytest.mark.slow
def test_runs_of_a_pair_each_make_one_table(tmp_path, capfd):
    """Two runs of one base: a descendant of all, and one whose late blocks alone were changed."""
    base, tuned = tiny.make_pair(tmp_path / "tuned", "llama")
    late = tiny.make_pair(tmp_path / "late", "llama", change="late")[1]
    prompts = tiny.write_prompts(tmp_path / "prompts.jsonl")
    for name, folder in (("tuned", tuned), ("late", late)):
        words = ["--checkpoint", f"base={base}", "--checkpoint", f"{name}={folder}", "--prompts", prompts, "--strict"]
        words += ["--out", tmp_path / f"run-{name}", "--max-new", 12, "--stability", 0]
        assert main([str(word) for word in ["run", *words]]) == 0
    run = tmp_path / "run-tuned"
    with pytest.raises(InputError, match="has events of base,tuned, and recipes are of base and two descendants"):
        actcache.Run(run).analyse("recipes")
    assert main(["recipes", str(run), "--further", str(tmp_path / "run-late"), "--contrast", "late:tuned"]) == 0
    assert "late - tuned, all" in capfd.readouterr().out
    found = json.loads((run / "recipes.json").read_text())["groups"]
    recipes = {one["descendant"]: one for one in found if one["part"] == "recipe" and one["subset"] == "all"}
    assert recipes["late"]["interaction"]["mean"] == 0
    assert recipes["late"]["portable_share"]["mean"] == 1
    assert {one["subset"] for one in found} == {"all", "category=prose", "category=question", "category=code"}
    of_effects = {one["readout"]: one for one in actcache.Run(run).effects.to_pylist()}
    n_prompts = recipes["tuned"]["n_prompts"]
    assert recipes["tuned"]["interaction"]["mean"] == pytest.approx(of_effects["common_tuned"]["interaction"])
    (contrast,) = (one for one in found if one["part"] == "contrast" and one["subset"] == "all")
    assert contrast["n_prompts"] <= n_prompts
    table = pq.read_table(run / "recipes.parquet")
    assert set(table["token_class"].to_pylist()) <= {"content", "format", "discourse"}
    assert main(["report", str(run)]) == 0
    assert '<section id="recipes">' in (run / "report.html").read_text()
