"""Several families together: balanced means against loops, planted families, other analyses, and what is refused."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from actcache.analyses.across import AcrossOptions, Family, across
from actcache.cli import main
from actcache.errors import InputError
from actcache.sealed import Sealed
from actcache.study.contrasts import contrasts
from actcache.study.statistics import Sample, sign_flip_null

GRID = [("pt", "pt"), ("pt", "it"), ("it", "pt"), ("it", "it")]
QUANTITIES = ("late_from_pt", "late_from_it", "interaction", "late_main", "upstream_main", "native_shift")


def cells_of(seed, n=40, per_prompt=1, labels=("pt", "it"), boundary=19, steps=12, **more):
    """Cells of a family: its own means, events of ``n`` prompts, steps from 0 on."""
    rng = np.random.default_rng(seed)
    grids = rng.normal([-3.0, -2.0, -1.0, 3.0 + seed], 0.5, size=(n * per_prompt, 4))
    name_of = dict(zip(("pt", "it"), labels, strict=True))
    rows = []
    for event, grid in enumerate(grids):
        for (upstream, late), margin in zip(GRID, grid, strict=True):
            row = {"event_id": f"e{event:04d}", "prompt_id": f"p{event // per_prompt:03d}", "step": event % steps}
            row |= {"kind": "first_divergence", "pair": ",".join(labels), "boundary": boundary, "scope": "prefix"}
            row |= {"readout": f"common_{labels[1]}", "variant": "none", "margin": float(margin)}
            rows.append(row | {"upstream": name_of[upstream], "late": name_of[late]} | more)
    return pa.Table.from_pylist(rows)


def family(name, cells, n_blocks=32, **more):
    pairs = [tuple(pair.split(",")) for pair in sorted(set(cells["pair"].to_pylist()))]
    known = {"n_blocks": n_blocks, "pairs": pairs, "weights": {"pt": f"{name} base", "it": f"{name} tuned"}}
    return Family(name, f"runs/{name}", Sealed(cells, {}, f"seal of {name}"), **(known | more))


@pytest.fixture
def three():
    return [
        family("olmo", cells_of(0)),
        family("llama", cells_of(1, n=15, per_prompt=3, labels=("base", "dpo"), boundary=22), n_blocks=36),
        family("qwen", cells_of(2, n=30, boundary=38), n_blocks=64),
    ]


def whole(found, subset="all", kind="first_divergence"):
    (group,) = (group for group in found["groups"] if (group["subset"], group["kind"]) == (subset, kind))
    return group


def means_of(one, keep=lambda step: True):
    """Per prompt first, then over prompts."""
    rows = [row for row in contrasts(one.cells.content).to_pylist() if keep(row["step"])]
    of_prompt = {}
    for row in rows:
        of_prompt.setdefault(row["prompt_id"], []).append(row)
    return {name: np.mean([np.mean([row[name] for row in of]) for of in of_prompt.values()]) for name in QUANTITIES}


@pytest.mark.parametrize("rule", ["reported", "drawn"])
def test_balanced_means_equal_loops(three, rule):
    found = across(three, AcrossOptions(rule=rule))
    group, single = whole(found), [means_of(one) for one in three]
    assert group["families"] == ["olmo", "llama", "qwen"]
    assert (group["n_events"], group["n_prompts"]) == (40 + 45 + 30, 40 + 15 + 30)
    for name in QUANTITIES:
        assert group[name]["mean"] == pytest.approx(np.mean([of[name] for of in single]), abs=1e-12), name
        values = {one.name: of[name] for one, of in zip(three, single, strict=True)}
        spread = group["spread"][name]
        assert (spread["min"], spread["max"]) == pytest.approx((min(values.values()), max(values.values())))
        assert spread["median"] == spread["trimmed_mean"] == pytest.approx(np.median(list(values.values())))
        assert spread["leave_one_out"]["qwen"] == pytest.approx((values["olmo"] + values["llama"]) / 2)
    share = np.mean([of["late_from_pt"] for of in single]) / np.mean([of["late_from_it"] for of in single])
    assert group["portable_share"]["mean"] == pytest.approx(share, abs=1e-12)
    spread = group["spread"]["portable_share"]
    rest = [sum(of[name] for of in single[:2]) for name in ("late_from_pt", "late_from_it")]
    assert spread["leave_one_out"]["qwen"] == pytest.approx(rest[0] / rest[1], abs=1e-12)
    assert spread["trimmed_mean"] is None, "no mean of shares is taken"
    assert share != pytest.approx(np.mean([of["late_from_pt"] / of["late_from_it"] for of in single]), abs=1e-3)


def test_intervals_follow_from_those_of_the_families(three):
    found = across(three)
    of = [entry["groups"][0] for entry in found["families"]]
    for name in QUANTITIES:
        errors = [(one[name]["high"] - one[name]["low"]) / (2 * 1.959964) for one in of]
        half = 1.959964 * math.sqrt(sum(error**2 for error in errors)) / 3
        mean = sum(one[name]["mean"] for one in of) / 3
        assert whole(found)[name] == pytest.approx({"mean": mean, "low": mean - half, "high": mean + half}, abs=1e-12)


def test_intervals_of_draws_are_of_independent_families(three):
    group = whole(across(three, AcrossOptions(rule="drawn", draws=300, seed=4)))
    drawn = []
    for at, one in enumerate(sorted(three, key=lambda one: one.name)):
        table = contrasts(one.cells.content)
        values = {name: table[name].to_numpy() for name in ("interaction", "late_from_pt", "late_from_it")}
        sample = Sample.of(table["prompt_id"], values, draws=300, seed=5 + at)
        drawn.append({name: sample.draws_of(name) for name in values})
    of = {name: np.mean([one[name] for one in drawn], axis=0) for name in drawn[0]}
    for name, values in (*of.items(), ("portable_share", of["late_from_pt"] / of["late_from_it"])):
        low, high = np.percentile(values, [2.5, 97.5])
        assert (group[name]["low"], group[name]["high"]) == pytest.approx((low, high), abs=1e-12), name


def test_a_family_is_as_in_its_own_effects(three):
    from actcache.analyses.effects import effects

    found = across(three)
    for entry, one in zip(found["families"], three, strict=True):
        alone = effects(one.cells.content, weights="prompt", by=["step"])["groups"]
        assert [group["subset"] for group in entry["groups"]] == [group["subset"] for group in alone]
        for group, expected in zip(entry["groups"], alone, strict=True):
            for name in (*QUANTITIES, "portable_share", "cells", "n_events", "n_prompts", "share_of_events"):
                assert group[name] == expected[name], name


def test_families_weigh_the_same_in_the_null(three):
    found = across(three, AcrossOptions(null=400))
    of_prompts = {}
    for one in three:
        table = contrasts(one.cells.content)
        sample = Sample.of(table["prompt_id"], {"x": table["interaction"].to_numpy()})
        of_prompts[one.name] = sample.of_prompts("x")
    expected = sign_flip_null(of_prompts, 400) | {"draws": 400, "seed": 23}
    assert whole(found)["label_swap"] == pytest.approx(expected, abs=1e-12)
    assert whole(found)["label_swap"]["observed"] == pytest.approx(whole(found)["interaction"]["mean"])
    assert "label_swap" not in whole(across(three, AcrossOptions(null=0)))


def test_the_position_curve_leaves_out_families_without_such_events(three):
    families = [*three[:2], family("short", cells_of(5, steps=3, boundary=19))]
    found = across(families)
    assert [group["subset"] for group in found["groups"]] == [
        "all",
        "step=0",
        "step>=1",
        "step>=3",
        "step>=5",
        "step>=10",
    ]
    assert [len(group["families"]) for group in found["groups"]] == [3, 3, 3, 2, 2, 2]
    single = [means_of(one, lambda step: step >= 3)["interaction"] for one in families[:2]]
    assert whole(found, "step>=3")["interaction"]["mean"] == pytest.approx(np.mean(single))


def test_planted_families():
    """One family with an interaction of 4, one whose late effects are the same on both states."""
    gated = cells_of(0)
    gated = gated.set_column(gated.column_names.index("margin"), "margin", pa.array([-1.0, -1.0, -1.0, 3.0] * 40))
    late = gated.set_column(gated.column_names.index("margin"), "margin", pa.array([-2.0, 0.0, -1.0, 1.0] * 40))
    group = whole(across([family("gated", gated), family("late", late)]))
    assert (group["interaction"]["mean"], group["late_from_pt"]["mean"], group["late_from_it"]["mean"]) == (2, 1, 3)
    assert group["portable_share"]["mean"] == pytest.approx(1 / 3)
    assert group["spread"]["portable_share"]["min"] == 0
    assert group["spread"]["portable_share"]["max"] == 1
    assert group["interaction"]["high"] - group["interaction"]["low"] == 0


def test_shares_of_opposed_means_are_flagged():
    cells = cells_of(0)
    at = cells.column_names.index("margin")
    one, two = (
        cells.set_column(at, "margin", pa.array(of * 40)) for of in ([-1.0, -3.0, -1.0, 3.0], [-1.0, -2.0, -1.0, 1.0])
    )
    group = whole(across([family("one", one), family("two", two)]))
    assert group["flags"] == ["portable_share", "matched_ratio"]
    assert group["portable_share"]["mean"] == pytest.approx(-1.5 / 3)


def test_few_prompts_have_no_interval_or_a_caution(three):
    said = []
    few = across([three[0], family("few", cells_of(3, n=9))], say=said.append)
    assert whole(few)["interaction"]["low"] is None
    assert whole(few)["interaction"]["mean"] is not None
    assert any("few has 9 prompts" in line for line in said)
    said.clear()
    some = across([three[0], family("some", cells_of(3, n=29))], say=said.append)
    assert whole(some)["interaction"]["low"] is not None
    assert [line for line in said if "some has 29 prompts" in line]


# ---- which cells ----


def test_ties_are_left_out_and_counted(three):
    cells = cells_of(4, readout="native")
    margins = cells["margin"].to_pylist()
    margins[0] = 0.0
    tied = cells.set_column(cells.column_names.index("margin"), "margin", pa.array(margins))
    families = [family("tied", tied), family("other", cells_of(5, readout="native"))]
    for keep in (False, True):
        found = across(families, AcrossOptions(keep_ties=keep))
        assert found["families"][0]["n_ties"] == 1
        assert found["families"][0]["groups"][0]["n_events"] == 39 + keep


@pytest.mark.parametrize(
    ("n_blocks", "boundary", "match"),
    [(36, 22, True), (34, 20, True), (64, 38, True), (36, 19, False), (64, 19, False), (64, 51, False)],
)
def test_boundaries_match_in_depth(three, n_blocks, boundary, match):
    other = family("other", cells_of(7, boundary=boundary), n_blocks=n_blocks)
    if match:
        assert across([three[0], other])["families"][1]["boundary"] == boundary
    else:
        with pytest.raises(
            InputError, match=f"boundaries do not match in depth: that of olmo is 19 of 32 .* that of other {boundary}"
        ):
            across([three[0], other])


def test_boundaries_from_the_end():
    families = [
        family(
            name, pa.concat_tables([cells_of(seed, boundary=n_blocks - 3), cells_of(seed + 5, boundary=5)]), n_blocks
        )
        for name, seed, n_blocks in (("one", 0, 32), ("two", 1, 64))
    ]
    assert [one["boundary"] for one in across(families, AcrossOptions(boundary="-3"))["families"]] == [29, 61]
    with pytest.raises(InputError, match=r"one has no cells at boundary 28 \(-4 of 32 blocks\); it has 5, 29"):
        across(families, AcrossOptions(boundary="-4"))


def test_a_table_does_not_tell_its_blocks(three):
    said = []
    table = family("table", cells_of(3, boundary=38), None, weights={})
    across([three[0], table], say=said.append)
    assert any(line.endswith("depths are not compared of table at boundary 38") for line in said)
    both = family("both", pa.concat_tables([cells_of(3, boundary=38), cells_of(4, boundary=40)]), None)
    with pytest.raises(InputError, match="both is a table with boundaries 38, 40"):
        across([three[0], both])
    assert across([three[2], both], AcrossOptions(boundary="38"))["families"][1]["boundary"] == 38


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f[:1], "1 of families: give at least two runs or tables of cells"),
        (lambda f: [f[0], family("olmo", f[1].cells.content)], "two families are called 'olmo'"),
        (lambda f: [f[0], family("again", f[2].cells.content, weights=f[0].weights)], "olmo and again are one family"),
        (lambda f: [f[0], replace(f[0], name="again", weights={})], "olmo and again are one family"),
        (lambda f: [f[0], family("other", cells_of(3, readout="common_x"))],
         "no common readout: other has no cells of common_it, it has common_x"),
        (lambda f: [f[0], family("other", cells_of(3, scope="position"))], "other has no plain cells of scope prefix"),
        (lambda f: [f[0], family("other", cells_of(3, kind="fixed"))],
         "no kind of events is in two of the families; they have first_divergence; fixed"),
        (lambda f: [f[0], family("two", pa.concat_tables([cells_of(3), cells_of(4, labels=("pt", "x"))]))],
         "two has events of the pairs pt,it; pt,x: choose one of them with --pair A,B"),
    ],
)  # fmt: skip
def test_what_is_refused(three, change, said):
    with pytest.raises(InputError, match=re.escape(said)):
        across(change(three))


def test_options_that_are_none(three):
    for options, said in (
        ({"rule": "mean"}, "rule 'mean' is unknown; choose reported or drawn"),
        ({"weights": "family"}, "weights 'family' are unknown"),
        ({"draws": 3}, "draws=3"),
        ({"null": -1}, "-1 draws of the null"),
        ({"readout": "common_y"}, "no cells of common_y"),
    ):
        with pytest.raises(InputError, match=said):
            across(three, AcrossOptions(**options))


def test_one_shared_checkpoint_is_said(three):
    said = []
    across([three[0], family("other", cells_of(3), weights=dict(three[0].weights, it="another"))], say=said.append)
    assert "olmo and other share a checkpoint: they are not independent, and count twice" in said


# ---- other analyses ----


def test_analyses_that_two_families_share(three):
    def depth(name, labels, main, n_blocks, scale):
        groups = [
            {
                **{"kind": "first_divergence", "pair": ",".join(labels), "readout": f"common_{labels[1]}"},
                **{"boundary": boundary, "main_boundary": main, "n_events": 40, "n_prompts": 40},
                "interaction": {"mean": scale * mean, "low": scale * mean - 1, "high": scale * mean + 1},
                "main_interaction": {"mean": scale * 4.0, "low": 3.0, "high": 5.0},
                "retention": {"mean": mean / 4, "low": None, "high": None},
            }
            for boundary, mean in ((main, 4.0), (n_blocks - 3, 2.0), (5, 1.0))[: 3 if name == "olmo" else 2]
        ]
        return {"depth": {"groups": groups}}

    one, two, _ = three
    one = family("olmo", one.cells.content, answers=depth("olmo", ("pt", "it"), 19, 32, 1.0))
    two = family("llama", two.cells.content, 36, answers=depth("llama", ("base", "dpo"), 22, 36, 3.0))
    groups = across([one, two])["analyses"]["depth"]
    assert [(group["boundary"], group["readout"], group["pair"]) for group in groups] == [
        ("0.6", "common_it", "pt,it"), ("-3", "common_it", "pt,it"),
    ]  # fmt: skip
    terminal = groups[1]
    assert terminal["families"] == ["olmo", "llama"]
    half = math.sqrt(2) / 2
    assert terminal["interaction"] == pytest.approx({"mean": 4.0, "low": 4 - half, "high": 4 + half})
    assert terminal["retention"] == {"mean": 0.5, "low": None, "high": None}, "a ratio of balanced means"
    assert terminal["spread"]["interaction"]["max"] == 6.0
    assert across([one, three[2]])["analyses"] == {}


def test_of_boundaries_of_one_depth_the_nearest_is_taken(three):
    def depth(of):
        groups = [
            {"kind": "x", "boundary": boundary, "n_events": 1, "n_prompts": 1}
            | {"mean": {"mean": v, "low": None, "high": None}}
            for boundary, v in of
        ]
        return {"depth": {"groups": groups}}

    one = family("olmo", three[0].cells.content, answers=depth([(12, 5.0), (13, 1.0), (14, 7.0)]))  # 0.375 to 0.44
    two = family("qwen", three[2].cells.content, 64, answers=depth([(25, 9.0), (26, 3.0)]))
    (group,) = across([one, two])["analyses"]["depth"]
    assert (group["boundary"], group["mean"]["mean"]) == ("0.4", 2.0)


# ---- the command ----


@pytest.fixture
def tables(tmp_path):
    for name, seed in (("one", 0), ("two", 1), ("three", 2)):
        pq.write_table(cells_of(seed), tmp_path / f"{name}.cells.parquet")
    return tmp_path


def test_across_tables(tables, capsys):
    out = tables / "all"
    words = [
        "across",
        *(str(tables / f"{name}.cells.parquet") for name in ("one", "two")),
        f"last={tables}/three.cells.parquet",
    ]
    assert main([*words, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "The balanced interaction of 3 families is +" in said.out
    assert f"{out / 'across.json'} holds them" in said.err
    found = json.loads((out / "across.json").read_text())
    assert [entry["name"] for entry in found["families"]] == ["one", "two", "last"]
    page = (out / "report.html").read_text()
    for name in ("families", "positions", "maps"):
        assert f'<section id="{name}">' in page
    assert "balanced without last" in page
    assert "mean without lowest and highest" in page
    assert main([*words, "--out", str(out), "--json", "--rule", "drawn", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((out / "across.json").read_text())
    for place, reason in (
        (tables, "is not empty and holds no across.json"),
        (tables / "one.cells.parquet", "is a file"),
    ):
        assert main([*words, "--out", str(place)]) == 2
        assert reason in capsys.readouterr().err
    assert main(["across", words[1], f"again={words[1]}", "--out", str(out)]) == 2
    assert "one and again are one family" in capsys.readouterr().err


@pytest.mark.slow
def test_across_runs(tiny_run, tmp_path, capsys):
    runs = [tiny_run(arch, torch.float32, "--boundary", "2,3", "--stability", "0").out for arch in ("llama", "gemma2")]
    for run in runs:
        assert main(["depth", str(run)]) == 0
    capsys.readouterr()
    words = ["across", f"llama={runs[0]}", f"gemma={runs[1]}", "--out", str(tmp_path / "all")]
    assert main(words) == 0
    found = json.loads((tmp_path / "all" / "across.json").read_text())
    assert {entry["n_blocks"] for entry in found["families"]} == {5}
    assert [entry["boundary"] for entry in found["families"]] == [3, 3]
    of_effects = [json.loads((run / "effects.json").read_text())["groups"] for run in runs]
    main_groups = [
        next(g for g in groups if (g["boundary"], g["readout"], g["scope"]) == (3, "common_it", "prefix"))
        for groups in of_effects
    ]
    mean = np.mean([group["interaction"]["mean"] for group in main_groups])
    assert whole(found)["interaction"]["mean"] == pytest.approx(mean, abs=1e-9)
    assert found["analyses"]["depth"]
    page = (tmp_path / "all" / "report.html").read_text()
    assert '<section id="depth">' in page
    assert "Depth, over families" in page
    assert "<td>retention</td>" in page.replace(' class="n"', "")
    assert main(["across", f"a={runs[0]}", f"b={runs[0]}", "--out", str(tmp_path / "x")]) == 2
    assert "a and b are one family" in capsys.readouterr().err
    assert main([*words[:-1], str(runs[0])]) == 2
    assert "holds a run; give a folder of its own" in capsys.readouterr().err
