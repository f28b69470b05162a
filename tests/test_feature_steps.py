"""Features that were trained are ranked, removed, brought back and dialled: a planted one is found, and hooks agree.

Two checkpoints are alike but for two neurons, which write in the descendant and are silent in the base. One is in block
2. The other, in the last MLP, writes along a direction that nothing else in that MLP writes along. Its feature is the
only one of a crosscoder that carries anything, so that the descendant's last block without it is the base's.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from conftest import MAX_NEW
from hypothesis import given
from hypothesis import strategies as st
from twins import reference
from twins.features import HookedMlp, activation

import actcache
from actcache.analyses import find_analysis
from actcache.analyses.features.crosscoder import Crosscoder, crosscoder_folder
from actcache.analyses.features.edited import with_controls
from actcache.analyses.features.gate import drops_found
from actcache.analyses.features.rank import read_ranked
from actcache.analyses.features.ranked import Ranked, Reading, ranking_prompts
from actcache.cli import main
from actcache.errors import InputError
from actcache.study import results

pytestmark = pytest.mark.slow

PLANTED, LAST, F = 2, 4, 8  # number of the feature, its block, features of the crosscoder
NEURON, MARKED = 5, 2
STEPS = ("rank", "mediate", "gate-test", "rescue", "dial", "handoff")
ALL = {"tested": "all"}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plant(folder):
    """The pair, and the direction ``[D]``.

    In block 2 a neuron of the descendant writes a mark, which the neuron of the last MLP reads.
    """
    folders = tiny.make_pair(folder, "llama", change="none")
    width = reference.load(folders[0], torch.float32).config.hidden_size
    mark, direction = torch.nn.functional.normalize(drawn(2, width, seed=3), dim=1)
    for place, written in zip(folders, (0.0, 1.0), strict=True):
        model = reference.load(place, torch.float32)
        early, last = (model.model.layers[at].mlp for at in (MARKED, LAST))
        with torch.no_grad():
            last.gate_proj.weight[NEURON] = mark
            for mlp in (early, last):
                mlp.up_proj.weight[NEURON] = mlp.gate_proj.weight[NEURON]  # silu(z) z is never negative
            early.down_proj.weight[:, NEURON] = 20 * written * mark
            last.down_proj.weight -= direction[:, None] * (direction @ last.down_proj.weight)
            last.down_proj.weight[:, NEURON] = 3 * written * direction
        model.save_pretrained(place)
    return *folders, direction


def crosscoder_of(direction, block=LAST, planted=PLANTED):
    """Whose one feature is the direction; the others hardly write anything."""
    width = len(direction)
    encoder, decoder = drawn(2, width, F, seed=4), 1e-4 * drawn(F, 2, width, seed=5)
    encoder[1, :, planted] = direction
    decoder[planted] = torch.stack([torch.zeros(width), direction])
    zeros = {"b_enc": torch.zeros(F), "b_dec": torch.zeros(2, width), "mean": torch.zeros(2, width)}
    return Crosscoder(("pt", "it"), block, encoder, decoder=decoder, **zeros, threshold=1e-6, k=2)


def save(out, *crosscoders):
    for one in crosscoders:
        one.save(crosscoder_folder(out / "features", one.block))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A run of the pair with its crosscoder, ranked by the default split."""
    folder = tmp_path_factory.mktemp("planted")
    pt, it, direction = plant(folder)
    prompts, out = tiny.write_prompts(folder / "prompts.jsonl", 16), folder / "run"
    words = ["run", "--pt", pt, "--it", it, "--prompts", prompts, "--out", out, "--max-new", MAX_NEW]
    more = ["--boundary", "3,1,4", "--stability", "0", "--dtype", "float32", "--shard-prompts", "8"]
    assert main([str(word) for word in [*words, *more]]) == 0
    save(out, crosscoder_of(direction))
    models = {label: reference.load(place, torch.float32) for label, place in (("pt", pt), ("it", it))}
    analyse(out, "rank")
    return out, models, direction


def analyse(out, step, **options):
    return actcache.Run(out).analyse(f"features {step}", **options)["groups"]


def table(out, step):
    return pq.read_table(out / "features" / f"{step}.parquet")


def of(groups, **wanted):
    (found,) = (one for one in groups if wanted.items() <= one.items())
    return found


def events(out):
    """id -> (token ids up to p, (y_pt, y_it))."""
    store = actcache.open_store(out / "store")
    rows = store.events.to_pylist()
    return {
        row["event_id"]: (store.token_ids(events=[at])[0].tolist(), (row["y_pt"], row["y_it"]))
        for at, row in enumerate(rows)
    }


def states(out, models, ids, boundary=LAST):
    return {label: reference.states(model, ids, boundary) for label, model in models.items()}


def test_the_planted_feature_ranks_first(planted):
    out, models, direction = planted
    ranking = pq.read_table(out / "features" / "ranking.parquet").to_pylist()
    assert [row["rank"] for row in ranking] == list(range(1, F + 1))
    assert (ranking[0]["block"], ranking[0]["feature"]) == (LAST, PLANTED)
    assert ranking[0]["score"] > 100 * abs(ranking[1]["score"])
    assert ranking[0]["active_rate"] == 1.0
    found = json.loads((out / "features" / "rank.json").read_text())
    first = found["groups"][0]
    assert first["feature"] == f"{LAST}:{PLANTED}"
    assert first["score"]["mean"] == pytest.approx(ranking[0]["score"])
    store = actcache.open_store(out / "store")
    ranked = read_ranked(actcache.Run(out).folder, store)
    assert len(ranked.prompts) == -(-len(set(store.events["prompt_id"].to_pylist())) // 4)
    # By hooks: the activation, times the slope of the margin along the direction.
    hooked, scores = HookedMlp(models["it"], LAST, LAST), []
    prompt_of = dict(zip(*(store.events[name].to_pylist() for name in ("event_id", "prompt_id")), strict=True))
    for event, (ids, tokens) in events(out).items():
        if prompt_of[event] not in ranked.prompts:
            continue
        attributed = {}
        for label, state in states(out, models, ids).items():
            up, rows = hooked.run(ids, state, tokens, lambda x: x + 1e-2 * direction)
            down, _ = hooked.run(ids, state, tokens, lambda x: x - 1e-2 * direction)
            attributed[label] = float(rows @ direction) * (up - down) / 2e-2
        scores.append(attributed["it"] - attributed["pt"])
    assert len(scores) == first["n_events"]
    assert ranking[0]["score"] == pytest.approx(np.mean(scores), rel=0.02)


def test_removing_it_removes_the_whole_interaction_and_removing_others_does_not(planted):
    out, models, direction = planted
    groups = analyse(out, "mediate", k=(1,))
    top, random = of(groups, set="top", k=1), of(groups, set="random", k=1)
    assert top["share"]["mean"] == pytest.approx(1.0, abs=1e-3)
    assert abs(random["share"]["mean"]) < 0.01
    assert abs(of(groups, set="active", k=1)["share"]["mean"]) < 0.01
    assert abs(of(groups, set="same_norm", k=1)["share"]["mean"]) < 0.5
    assert top["minus_random"]["mean"] == pytest.approx(top["drop"]["mean"] - random["drop"]["mean"])
    assert top["boundary"] == LAST
    rows = table(out, "mediate").filter(pc.equal(table(out, "mediate")["set"], "top")).to_pylist()
    assert len(rows) == top["n_events"] > 5
    ranked = read_ranked(actcache.Run(out).folder, actcache.open_store(out / "store"))
    assert not {row["prompt_id"] for row in rows} & ranked.prompts
    given, hooked = events(out), HookedMlp(models["it"], LAST, LAST)
    for row in rows:
        assert row["drop"] == pytest.approx(row["interaction"], abs=1e-3)
        ids, tokens = given[row["event_id"]]
        lost = {}
        for label, state in states(out, models, ids).items():
            plain, _ = hooked.run(ids, state, tokens)
            without, _ = hooked.run(ids, state, tokens, lambda x: x - (x @ direction).relu() * direction)
            lost[label] = plain - without
        assert row["drop"] == pytest.approx(lost["it"] - lost["pt"], abs=1e-3)


def test_the_gate_of_crosscoders_counts_drops_of_the_ranking_that_there_is(planted, tmp_path):
    out = shutil.copytree(planted[0], tmp_path / "run")
    top = of(analyse(out, "mediate", k=(1,)), set="top", k=1)
    folder = actcache.Run(out).folder
    found = drops_found(folder, folder.open_store())
    assert (found["k"], found["top"]) == (1, top["drop"]["mean"])
    analyse(out, "rank", ranking="4")  # other prompts rank, and others test
    assert drops_found(folder, folder.open_store()) == {}


def test_the_curve_is_capped_by_the_features_that_there_are(planted, capfd):
    out, _, _ = planted
    assert main(["features", "mediate", str(out), "--k", "1,4,500", "--seeds", "1"]) == 0
    said = capfd.readouterr()
    assert "most active others, 4" in said.out
    # 16 events and 2 upstreams: plain, and under four, four and two sets.
    assert re.search(r"352 replays: \S+ multiply-adds", said.err), said.err
    groups = json.loads((out / "features" / "mediate.json").read_text())["groups"]
    assert sorted({one["k"] for one in groups}) == [1, 4, F]
    assert {one["set"] for one in groups if one["k"] == F} == {"top", "same_norm"}  # no other feature is left
    assert main(["report", str(out)]) == 0
    assert '<section id="features-mediate">' in (out / "report.html").read_text()


def test_the_gate_is_what_removing_does_more_on_the_descendants_states(planted):
    out, _, _ = planted
    (mediated,) = (one["drop"] for one in analyse(out, "mediate", k=(1,), **ALL) if one["set"] == "top")
    groups = analyse(out, "gate-test", k=1, **ALL)
    top = of(groups, set="top")
    assert top["gate"] == mediated
    assert top["gate"]["mean"] > 0
    assert top["n_prompts"] == len(set(actcache.open_store(out / "store").events["prompt_id"].to_pylist()))
    assert top["minus_active"]["mean"] == pytest.approx(top["gate"]["mean"], rel=0.01)
    rows = table(out, "gate-test").filter(pc.equal(table(out, "gate-test")["set"], "top"))
    ranked = read_ranked(actcache.Run(out).folder, actcache.open_store(out / "store"))
    own = pc.is_in(rows["prompt_id"], value_set=pa.array(sorted(ranked.prompts)))
    score = pq.read_table(out / "features" / "ranking.parquet")["score"][0].as_py()
    assert np.mean(rows.filter(own)["activation_gate"].to_numpy()) == pytest.approx(score)
    assert "activation_gate" not in of(groups, set="same_norm")


def test_setting_it_to_what_it_is_natively_brings_back_what_hooks_say(planted):
    out, models, direction = planted
    groups = analyse(out, "rescue", k=1, **ALL)
    assert of(groups, set="top", alpha=0.0)["gain"]["mean"] == pytest.approx(0, abs=1e-6)
    whole = of(groups, set="top", alpha=1.0)
    assert whole["gain"]["mean"] > 10 * abs(of(groups, set="random", alpha=1.0)["gain"]["mean"])
    every = table(out, "rescue").filter(pc.equal(table(out, "rescue")["set"], "top")).to_pylist()
    given, hooked = events(out), HookedMlp(models["it"], LAST, LAST)
    for row in every:
        ids, tokens = given[row["event_id"]]
        of_label = states(out, models, ids)
        native_margin, native = hooked.run(ids, of_label["it"], tokens)
        plain, now = hooked.run(ids, of_label["pt"], tokens)
        step = row["amount"] * ((native @ direction).relu() - (now @ direction).relu()) * direction
        after, _ = hooked.run(ids, of_label["pt"], tokens, lambda x, step=step: x + step)
        assert row["gain"] == pytest.approx(after - plain, abs=1e-3)
        assert row["missing"] == pytest.approx(native_margin - plain, abs=1e-3)
    at_1 = [row for row in every if row["amount"] == 1.0]
    share = np.mean([row["gain"] for row in at_1]) / np.mean([row["missing"] for row in at_1])
    assert whole["share"]["mean"] == pytest.approx(share)
    kept = [row["gain"] / row["missing"] for row in at_1 if row["missing"] > 1e-6]
    assert whole["fraction"]["mean"] == pytest.approx(np.mean(kept))
    assert whole["n_of_fraction"] == len(kept)


def test_a_dial_at_1_removes_and_at_2_goes_as_far_again(planted):
    out, _, _ = planted
    removed = of(analyse(out, "mediate", k=(1,)), set="top")
    groups = analyse(out, "dial", features=f"{LAST}:{PLANTED}")
    assert [one["alpha"] for one in groups if one["set"] == "top"] == [0.5, 1.0, 1.5, 2.0]
    assert of(groups, set="top", alpha=1.0)["drop"]["mean"] == pytest.approx(removed["drop"]["mean"], abs=1e-5)
    for alpha in (0.5, 2.0):
        assert abs(of(groups, set="random", alpha=alpha)["share"]["mean"]) < 0.02
    drops = [one["drop"]["mean"] for one in groups if one["set"] == "top"]
    assert drops[0] < drops[1]
    with pytest.raises(InputError, match=r"no feature '4:99'; expected BLOCK:FEATURE"):
        analyse(out, "dial", features="4:99")


def test_a_joint_encoding_reads_the_base_on_the_same_state(planted, tmp_path):
    out = shutil.copytree(planted[0], tmp_path / "run")
    models = planted[1]
    joint = crosscoder_of(planted[2])
    joint = replace(joint, decoder=drawn(F, 2, len(planted[2]), seed=8), threshold=5.0)
    save(out, joint)
    analyse(out, "rank", encoding="joint", ranking="4")
    analyse(out, "mediate", k=(F,))
    rows = table(out, "mediate").filter(pc.equal(table(out, "mediate")["set"], "top")).to_pylist()
    given, hooked = events(out), {label: HookedMlp(model, LAST, LAST) for label, model in models.items()}
    for row in rows:
        ids, tokens = given[row["event_id"]]
        lost = {}
        for label, state in states(out, models, ids).items():
            mlps = {name: one.run(ids, state, tokens)[1] for name, one in hooked.items()}
            step = sum(activation(joint, i, mlps) * joint.decoder[i, 1] for i in range(F))
            without, _ = hooked["it"].run(ids, state, tokens, lambda x, step=step: x - step)
            lost[label] = hooked["it"].run(ids, state, tokens)[0] - without
        assert row["drop"] == pytest.approx(lost["it"] - lost["pt"], abs=1e-2)
    with pytest.raises(InputError, match="a handoff reads the descendant's branch alone"):
        analyse(out, "handoff")


def test_what_a_window_hands_on_is_what_an_assembled_model_says(planted):
    out, models, direction = planted
    groups = analyse(out, "handoff", k=1, window="some=1:3", **ALL)
    rows = table(out, "handoff").filter(pc.equal(table(out, "handoff")["set"], "top")).to_pylist()
    given, remove = events(out), lambda x: x - (x @ direction).relu() * direction
    for row in rows:
        ids, tokens = given[row["event_id"]]
        changed = {}
        for label, model in models.items():
            other = models["it" if label == "pt" else "pt"]
            own = reference.parts(model).blocks
            kept = [own[at].mlp for at in (1, 2)]
            state = [reference.states(model, ids, LAST)]
            for at in (1, 2):
                own[at].mlp = reference.parts(other).blocks[at].mlp
            state.append(reference.states(model, ids, LAST))
            for at, mlp in zip((1, 2), kept, strict=True):
                own[at].mlp = mlp
            hooked = HookedMlp(models["it"], LAST, LAST)
            changed[label] = [[hooked.run(ids, one, tokens, how)[0] for how in (lambda x: x, remove)] for one in state]
        (pt, with_it), (it, with_pt) = np.array(changed["pt"]), np.array(changed["it"])
        expected = {"rescue": with_it - pt, "degrade": it - with_pt, "both": it - pt}[row["direction"]]
        assert row["change"] == pytest.approx(expected[0], abs=2e-3)
        assert row["mediated"] == pytest.approx(expected[0] - expected[1], abs=2e-3)
    assert {one["window"] for one in groups} == {"some", "entry"}
    with pytest.raises(InputError, match="ends before block 4"):
        analyse(out, "handoff", window="some=1:5")


@pytest.mark.parametrize("step", STEPS)
def test_killed_and_resumed_gives_the_same_bytes(planted, step, tmp_path, monkeypatch):
    whole, killed = (shutil.copytree(planted[0], tmp_path / name) for name in ("whole", "killed"))
    for out in (whole, killed):
        for place in ("gradients",) if step == "rank" else (step,):
            shutil.rmtree(out / "features" / place, ignore_errors=True)
        for name in (f"{step}.json", f"{step}.parquet"):
            (out / "features" / name).unlink(missing_ok=True)
    options = {} if step in ("rank", "dial") else {"k": (2,) if step == "mediate" else 2}
    analyse(whole, step, **options)
    write, left = results.write_result, [1]

    def die(*args, **more):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(*args, **more)

    monkeypatch.setattr("actcache.study.runner.write_result", die)
    with pytest.raises(KeyboardInterrupt):
        analyse(killed, step, **options)
    monkeypatch.setattr("actcache.study.runner.write_result", write)
    analyse(killed, step, **options)
    analysis = find_analysis(f"features {step}")
    for path in (analysis.path(actcache.Run(whole).folder), analysis.table_path(actcache.Run(whole).folder)):
        assert (killed / path.relative_to(whole)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_events(planted, n, tmp_path, capfd):
    """None where checkpoints are identical; of one prompt that ranks, no other tests."""
    folder, direction = planted[0].parent, planted[2]
    it = folder / ("it" if n else "pt")
    words = ["run", "--pt", folder / "pt", "--it", it, "--prompts", folder / "prompts.jsonl", "--out", tmp_path / "run"]
    words += ["--max-new", MAX_NEW, "--boundary", "3,1,4", "--stability", "0"]
    wanted = actcache.open_store(planted[0] / "store").events["prompt_id"].to_pylist()
    if n:
        lines = (folder / "prompts.jsonl").read_text().splitlines()
        kept = [line for line in lines if json.loads(line)["id"] in wanted[:n]]
        (tmp_path / "few.jsonl").write_text("\n".join(kept) + "\n")
        words[words.index("--prompts") + 1] = tmp_path / "few.jsonl"
    assert main([str(word) for word in words]) == 0
    save(tmp_path / "run", crosscoder_of(direction))
    for step in STEPS:
        groups = analyse(tmp_path / "run", step)
        assert bool(groups) == (n == 2 or (n == 1 and step == "rank")), step
        if n == 1 and step != "rank":
            assert analyse(tmp_path / "run", step, **ALL)
        for one in groups:
            assert one["n_prompts"] == 1
    capfd.readouterr()
    assert main(["features", "mediate", str(tmp_path / "run")]) == 0
    assert ("no event" in capfd.readouterr().out) == (n < 2)


def test_what_was_made_with_other_crosscoders_is_not_shown(planted, tmp_path):
    out = shutil.copytree(planted[0], tmp_path / "run")
    run = actcache.Run(out)
    analyse(out, "mediate", k=(1,))
    mediate = find_analysis("features mediate")
    assert mediate.read(run.folder, run.store) is not None
    analyse(out, "rank", ranking="3")
    assert mediate.read(run.folder, run.store) is None
    save(out, replace(crosscoder_of(planted[2]), threshold=1e-5))
    with pytest.raises(InputError, match=r"'actcache features rank .*' makes it"):
        analyse(out, "mediate")


def test_what_cannot_be_served_is_refused(planted, tmp_path):
    out = shutil.copytree(planted[0], tmp_path / "run")
    for options, words in (
        ({"ranking": "1.5"}, "expected a share of the prompts"),
        ({"encoding": "both"}, "choose branch or joint"),
        ({"pair": "it,pt"}, "no events of the pair"),
        ({"boundary": "0.2", "ranking": "0"}, "expected a share"),
    ):
        with pytest.raises(InputError, match=words):
            analyse(out, "rank", **options)
    save(out, crosscoder_of(planted[2], block=2))
    assert analyse(out, "rank")[0]["boundary"] == 1
    with pytest.raises(InputError, match="boundary 3 is not one that was captured at or before block 2"):
        analyse(out, "rank", boundary="3")
    save(out, crosscoder_of(planted[2], block=0))
    with pytest.raises(InputError, match="no boundary at or before block 0"):
        analyse(out, "rank")
    shutil.rmtree(out / "features")
    with pytest.raises(InputError, match=r"'actcache features train .*' trains them"):
        analyse(out, "rank")


# ---- sets of features ----


def ranked_of(weights, blocks=None):
    n = len(weights)
    columns = {
        "block": np.array(blocks or [1] * n, np.int32),
        "feature": np.arange(n, dtype=np.int32),
        "score": np.linspace(1, -1, n),
        "active_rate": np.ones(n),
        "mean_abs_attribution": np.array(weights, float),
        "mean_activation": np.arange(n, 0, -1.0),
    }
    return Ranked(Reading(("pt", "it"), 1, "branch"), set(), pa.table(columns), "")


def test_matched_features_are_near_and_of_the_same_block():
    n = 400
    ranked = ranked_of(np.random.default_rng(0).permutation(n), [1, 2] * (n // 2))
    rows = ranked.top(10)
    found = {seed: ranked.matched(rows, seed) for seed in range(3)}
    weight = ranked.table["mean_abs_attribution"].to_numpy()
    for one in found.values():
        assert len(set(one.tolist())) == 10
        assert not set(one.tolist()) & set(rows.tolist())
        assert [len(of) for of in ranked.features(one).values()] == [5, 5]
        # 50 of 200 of a block, and those taken before.
        assert all(np.abs(weight[row] - weight[rows]).min() <= 2 * 60 for row in one)
    assert len({tuple(one.tolist()) for one in found.values()}) == 3
    assert (ranked.matched(rows, 0) == found[0]).all()


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 150), n_weights=st.integers(1, 40), k=st.integers(1, 20))
def test_matched_features_are_those_of_a_whole_sort(seed, n, n_weights, k):
    """Many of the same weight: of equally near ones, the first."""
    rng = np.random.default_rng(seed)
    ranked = ranked_of(rng.integers(0, n_weights, n), rng.integers(1, 3, n).tolist())
    rows = np.sort(rng.choice(n, min(k, n), replace=False))
    block, weight = (ranked.table[name].to_numpy() for name in ("block", "mean_abs_attribution"))
    free, drawn, found = [row for row in range(n) if row not in rows], np.random.default_rng(1), []
    for row in rows:
        of_block = [other for other in free if block[other] == block[row]]
        nearest = sorted(of_block, key=lambda other: abs(weight[other] - weight[row]))[:50]
        if nearest:
            found.append(drawn.choice(nearest))
            free.remove(found[-1])
    assert ranked.matched(rows, 1).tolist() == sorted(found)


def test_the_most_active_others_are_idle():
    ranked = ranked_of([1.0] * 101)
    found = ranked.most_active(ranked.top(5))
    score = np.abs(ranked.table["score"].to_numpy())
    assert len(found) == 5
    others = np.sort(score[5:])
    assert score[found].max() <= others[len(others) // 2]
    idle = np.flatnonzero(score <= others[len(others) // 2 - 1])
    assert found.min() == idle[idle >= 5].min()  # activity falls with the row


def test_a_set_of_everything_has_no_other_features():
    ranked = ranked_of([1.0] * 6)
    names = [one.name for one in with_controls(ranked, ranked.top(9), 1, ("random", "same_norm", "active"))]
    assert names == ["top[k=6,amount=1.0]", "same_norm[k=6,amount=1.0,seed=0]"]


def test_features_are_named_once_each():
    ranked = ranked_of([1.0] * 6)
    assert ranked.rows_of(["1:3", " 1:0"]).tolist() == [0, 3]
    with pytest.raises(InputError, match="feature 1:3 is named twice"):  # it would be removed twice
        ranked.rows_of(["1:3", "1:0", "1:3"])


def test_ranking_prompts_go_by_their_hash_or_their_place():
    prompts = [f"p{i}" for i in range(40)]
    by_hash = ranking_prompts([*prompts, *prompts], "0.25")
    assert len(by_hash) == 10
    assert by_hash != set(prompts[:10])
    assert ranking_prompts(reversed(prompts), "0.25") == by_hash
    assert ranking_prompts(prompts, "3") == set(prompts[:3])
    assert ranking_prompts(["one"], "0.01") == {"one"}
    for wrong in ("0", "1.0", "-3", "some", "nan", "\u00b2"):
        with pytest.raises(InputError, match="ranking is"):
            ranking_prompts(prompts, wrong)


@pytest.mark.parametrize(("step", "by"), [("mediate", "k"), ("dial", "alpha")])
def test_shares_of_an_interaction_that_may_be_none_are_said_to_say_nothing(step, by):
    def of_interaction(low, high):
        number = {"mean": (low + high) / 2, "low": low, "high": high}
        group = {"kind": "first_divergence", "set": "top", by: 5, "features": 5, "boundary": 3}
        group |= {"n_events": 40, "n_prompts": 40, "interaction": number, "drop": number, "share": number}
        return find_analysis(f"features {step}").section([group]).shows

    said = "may be 0, +0.500 [-1.000, +2.000]: its shares say nothing"
    assert said in of_interaction(-1.0, 2.0)
    assert "may be 0" not in of_interaction(0.5, 2.0)
    assert "may be 0" not in of_interaction(-2.0, -0.5)
