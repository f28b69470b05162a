"""Continuation: cells teacher-forced by hooks, planted checkpoints, tails that end, and what a killed one leaves."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from conftest import first_quick
from twins import continuation as twin
from twins import reference

import actcache
from actcache.analyses import continuation, whole
from actcache.analyses.continuation import ANALYSIS, groups_of
from actcache.analyses.continuation import ContinuationOptions as Options
from actcache.cli import main
from actcache.errors import CheckError, InputError
from actcache.study import runner
from actcache.study.branch_job import BranchJob, Limits, branch_jobs
from actcache.study.continuation_job import CONTRASTS
from actcache.study.engine import LocalEngine
from actcache.study.plan import shapes_of

BOUNDARY, N = 3, 8
CELLS = [(upstream, late) for upstream in ("pt", "it") for late in ("pt", "it")]
COLUMNS = ["event_id", "prompt_id", "upstream", "late", "readout", "contrast", "n", "y"]
FEW = ("--limit", "8", "--stability", "0")


def copied(run, tmp_path, name="run"):
    return shutil.copytree(run.out, tmp_path / name)


def table_of(out):
    return pq.read_table(out / "continuation.parquet")


def y_of(table):
    """By event, upstream, late, contrast and n."""
    rows = table.to_pylist()
    return {tuple(row[name] for name in ("event_id", "upstream", "late", "contrast", "n")): row["y"] for row in rows}


def models_of(run):
    return {label: reference.load(folder, torch.float32) for label, folder in (("pt", run.pt), ("it", run.it))}


def sequences_of(store):
    ids, offsets = store.token_ids()
    return [ids[a:b].tolist() for a, b in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)]


def slow_candidates(models, prefix, y_pt, y_it, ends):
    """All but the shuffled one, by greedy loops of plain forwards."""
    desc, base, forced = (
        [token, *twin.greedy(models[who], [*prefix, token], N, ends)]
        for who, token in (("it", y_it), ("pt", y_pt), ("pt", y_it))
    )
    return {"desc_primary": desc, "base_primary": base, "base_forced_desc": forced}


@pytest.mark.parametrize(
    "case", first_quick([("llama", ()), ("llama", ("--strict",)), ("gemma3", ()), ("gpt2", ())]), ids=str
)
def test_it_is_what_teacher_forced_hooks_give(tiny_run, tmp_path, case):
    arch, more = case
    run = tiny_run(arch, torch.float32, *FEW, *more)
    out = copied(run, tmp_path)
    actcache.Run(out).analyse("continuation", draws=100)
    table, found = table_of(out), y_of(table_of(out))
    assert table.column_names == COLUMNS
    assert set(table["readout"].to_pylist()) == {"common_it"}
    models, events, store = models_of(run), run.store.events.to_pylist()[:3], run.store
    tails = {}
    n_rows = 0
    for event, prefix in zip(events, sequences_of(store), strict=False):
        of = slow_candidates(models, prefix, event["y_pt"], event["y_it"], {tiny.EOS_ID})
        tails[event["event_id"]] = of["desc_primary"][1:]
        kept = {name: ids[: twin.n_valid(ids, {tiny.EOS_ID}, {tiny.EOS_ID, tiny.PAD_ID})] for name, ids in of.items()}
        for upstream, late in CELLS:
            scored = {
                name: np.cumsum(
                    twin.log_probs(models[upstream], models[late], models["it"], prefix, ids, BOUNDARY) if ids else []
                )
                for name, ids in kept.items()
            }
            for contrast, (one, other) in list(CONTRASTS.items())[:2]:
                for n in (0, 1, 2, 4, 8):
                    key = event["event_id"], upstream, late, contrast, n
                    assert (key in found) == (n < min(len(kept[one]), len(kept[other]))), key
                    if key in found:
                        n_rows += 1
                        assert found[key] == pytest.approx(scored[one][n] - scored[other][n], abs=1e-4), key
    assert n_rows > 4 * 2 * 3 * len(events)  # most events go on
    assert all(found[key] == 0 for key in found if key[3:] == ("same_forced", 0))


@pytest.fixture(scope="module")
def run(tiny_run):
    return tiny_run("llama", torch.float32, *FEW)


@pytest.fixture(scope="module")
def answered(run, tmp_path_factory):
    out = shutil.copytree(run.out, tmp_path_factory.mktemp("answered") / "run")
    actcache.Run(out).analyse("continuation")
    return out


def test_at_0_it_is_the_grid(run, answered):
    cells = [row for row in run.cells.to_pylist() if (row["scope"], row["variant"]) == ("prefix", "none")]
    margins = {
        (row["event_id"], row["upstream"], row["late"]): row["margin"]
        for row in cells
        if (row["boundary"], row["readout"]) == (BOUNDARY, "common_it")
    }
    found = {key: y for key, y in y_of(table_of(answered)).items() if key[3:] == ("primary", 0)}
    assert {key[:3] for key in found} == margins.keys()
    assert all(y == pytest.approx(margins[key[:3]], abs=1e-5) for key, y in found.items())
    groups = json.loads((answered / "continuation.json").read_text())["groups"]
    effects = {(one["readout"], one["boundary"]): one for one in run.effects["groups"] if one["scope"] == "prefix"}
    (at_0,) = (one for one in groups if (one["contrast"], one["n"]) == ("primary", 0))
    for name in ("late_from_pt", "late_from_it", "interaction"):
        assert at_0[name]["mean"] == pytest.approx(effects["common_it", BOUNDARY][name]["mean"], abs=1e-5)
    assert at_0["drift_max"] < 1e-5
    assert at_0["tail"]["mean"] == pytest.approx(0, abs=1e-12)


def test_a_shuffled_candidate_is_the_tail_of_an_event_that_is_alike(run, answered):
    """Its own y_it, then what IT wrote for another prompt of its category and class; scored by hooks too."""
    store, options = run.store, Options()
    (pair,) = [("pt", "it")]
    tails = continuation._tails(store, options, pair, Limits())
    place = answered / "continuation" / "tails"
    candidates = continuation._candidates(place, store, options, pair, tails)
    events, models, found = store.events.to_pylist(), models_of(run), y_of(table_of(answered))
    own = {number: of[0][1:] for number, of in candidates.items()}
    some = [number for number, of in candidates.items() if len(of[3]) == N + 1 and len(of[1]) > 4]
    assert len(some) >= 3
    classes = continuation._classes(options)
    for number in some:
        desc, base, _, shuffled = candidates[number]
        assert shuffled[0] == events[number]["y_it"] == desc[0]
        donors = [other for other in own if own[other] == shuffled[1:] and other != number]
        alike = [
            events[other]["category"] == events[number]["category"]
            and classes.of(events[other]["token_it"]) == classes.of(events[number]["token_it"])
            for other in donors
        ]
        assert any(alike)
    prefix = sequences_of(store)[some[0]]
    _, base, _, shuffled = candidates[some[0]]
    for upstream, late in CELLS:
        sums = [
            sum(twin.log_probs(models[upstream], models[late], models["it"], prefix, ids[:5], BOUNDARY))
            for ids in (shuffled, base)
        ]
        key = events[some[0]]["event_id"], upstream, late, "shuffled", 4
        assert found[key] == pytest.approx(sums[0] - sums[1], abs=1e-4)


def test_no_event_takes_a_tail_where_none_is_alike():
    store = type("Store", (), {})()
    store.events = pa.table(
        {
            "event_id": ["a", "b", "c", "d"],
            "prompt_id": ["1", "1", "2", "3"],
            "kind": ["first_divergence"] * 4,
            "category": ["x", "x", "x", "y"],
            "token_it": ["sea", "mill", "oven", "door"],
        }
    )
    donors = continuation._donors(store, Options(), range(4), {"a", "b", "c", "d"})
    assert donors.keys() == {0, 1, 2}
    assert donors[0] == donors[1] == 2  # of another prompt
    assert donors[2] in (0, 1)
    assert continuation._donors(store, Options(), range(4), {"a"}) == {2: 0}
    assert continuation._donors(store, Options(alike=""), range(4), {"d"}) == {0: 3, 1: 3, 2: 3}


@pytest.mark.slow
@pytest.mark.parametrize(("change", "nothing"), [("upstream", "late_from_pt"), ("late", "interaction")])
def test_planted_checkpoints(tiny_run, tmp_path, change, nothing):
    """Late blocks that are the same do nothing, at any n. States that are the same take part in nothing."""
    run = tiny_run("llama", torch.float32, *FEW, change=change)
    out = copied(run, tmp_path)
    groups = actcache.Run(out).analyse("continuation", draws=100)["groups"]
    assert {one["n"] for one in groups} == {0, 1, 2, 4, 8}
    for one in groups:
        assert one[nothing]["mean"] == pytest.approx(0, abs=1e-4)
        assert one["interaction"]["mean"] == pytest.approx(0, abs=1e-4)
    if change == "late":
        (at_8,) = (one for one in groups if (one["contrast"], one["n"]) == ("primary", 8))
        assert abs(at_8["late_from_pt"]["mean"]) > 0.1


def test_the_curve_tells_what_the_events_that_are_left_had_at_0():
    events = [f"e{i}" for i in range(24)]
    rows = []
    for i, event in enumerate(events):
        for n in (0, 1, 4) if i % 2 else (0, 1):
            a, b = 1.0, 1.0 + i % 2 + n
            effects = {"late_from_pt": a, "late_from_it": b, "interaction": b - a}
            rows.append({"event_id": event, "prompt_id": event, "contrast": "primary", "n": n, **effects})
    found = {one["n"]: one for one in groups_of(pa.Table.from_pylist(rows), [0.1, -0.3], Options(n="1,4,9"))}
    assert list(found) == [0, 1, 4]
    assert [one["n_events"] for one in found.values()] == [24, 24, 12]
    assert [one["interaction"]["mean"] for one in found.values()] == pytest.approx([0.5, 1.5, 5.0])
    assert [one["interaction_0"]["mean"] for one in found.values()] == pytest.approx([0.5, 0.5, 1.0])
    assert [one["tail"]["mean"] for one in found.values()] == pytest.approx([0.0, 1.0, 4.0])
    assert found[4]["tail"] == {"mean": 4.0, "low": 4.0, "high": 4.0}
    assert (found[0]["drift_median"], found[0]["drift_max"]) == pytest.approx((0.2, 0.3))
    section = ANALYSIS.section([{"kind": "k", "pair": "pt,it", **one} for one in found.values()])
    assert [x for x, _ in section.figures[0].lines["primary"]] == [0, 1, 4]
    assert {len(row) for row in section.rows} == {len(section.columns)}


# ---- tails ----


@pytest.fixture(scope="module")
def branches(run):
    """A job over the first events, and what plain forwards write."""
    tokens = {number: run.store.events["y_it"][number].as_py() for number in range(6)}
    models = models_of(run)
    prefixes = sequences_of(run.store)[:6]
    written = [twin.greedy(models["it"], [*prefix, tokens[n]], 9, ()) for n, prefix in enumerate(prefixes)]
    return tokens, prefixes, written


def branch_rows(run, tokens, limits, max_new=9):
    jobs = branch_jobs(run.store, "y_it", tokens, "it", max_new, limits)
    engine = LocalEngine.of(run.store, {"pt": run.pt, "it": run.it})
    return [row for job in jobs for row in job.run(engine).table.to_pylist()]


def test_a_branch_is_what_plain_forwards_write(run, branches):
    tokens, _, written = branches
    rows = branch_rows(run, tokens, Limits())
    assert [row["tail"] for row in rows] == written
    assert [row["token"] for row in rows] == list(tokens.values())
    assert {row["ended_by"] for row in rows} == {"max_new"}
    assert [row["n_plain"] for row in rows] == [10] * 6


def test_a_branch_ends_where_a_text_does(run, branches):
    tokens, _, written = branches
    ends = frozenset({tokens[0], *(tail[2] for tail in written[1:])})
    rows = branch_rows(run, tokens, Limits(ends))
    for n, (row, tail) in enumerate(zip(rows, written, strict=True)):
        at = next((i for i, token in enumerate(tail) if token in ends), len(tail) - 1)
        expected = [] if tokens[n] in ends else tail[: at + 1]
        assert row["tail"] == expected
        assert (row["ended_by"] == "end_token") == (not expected or expected[-1] in ends)
        assert row["n_plain"] == 1 + len(expected)
    assert rows[0]["tail"] == []


def test_a_branch_counts_tokens_before_a_special_one_and_those_that_fit(run, branches):
    tokens, prefixes, written = branches
    special = frozenset({written[1][3], tokens[2]})
    most = len(prefixes[0]) + 3
    rows = branch_rows(run, tokens, Limits(frozenset(), special, most))
    for n, (row, tail) in enumerate(zip(rows, written, strict=True)):
        room = most - len(prefixes[n]) + 1
        fits = max(0, min(room - 1, len(tail)))
        assert row["tail"] == tail[:fits]
        assert row["room"] == room
        whole_text = [tokens[n], *tail[:fits]]
        assert row["n_plain"] == next((i for i, one in enumerate(whole_text) if one in special), len(whole_text))


@pytest.mark.slow
def test_tails_that_end_count_up_to_their_end(tmp_path):
    """Checkpoints for which frequent tokens end a text: some candidates end, and count at no later n."""
    pt, it = tiny.make_pair(tmp_path / "plain", "llama")
    prompts = tiny.write_prompts(tmp_path / "prompts.jsonl", 8)
    words = ["run", "--prompts", str(prompts), "--max-new", "12", *FEW[2:]]
    assert main([*words, "--pt", str(pt), "--it", str(it), "--out", str(tmp_path / "first")]) == 0
    actcache.Run(tmp_path / "first").analyse("continuation", draws=100)
    tails = list((tmp_path / "first" / "continuation" / "tails").glob("*.parquet"))
    written = Counter(
        token for path in tails for tail in pq.read_table(path)["tail"].to_pylist() for token in tail[2:4]
    )
    ends = [tiny.EOS_ID, *(token for token, _ in written.most_common(4))]
    pt, it = tiny.make_pair(tmp_path / "ending", "llama", eos_token_id=ends)
    assert main([*words, "--pt", str(pt), "--it", str(it), "--out", str(tmp_path / "run")]) == 0
    run = actcache.Run(tmp_path / "run")
    run.analyse("continuation", draws=100)
    found, store = y_of(table_of(tmp_path / "run")), run.store
    models = {label: reference.load(folder, torch.float32) for label, folder in (("pt", pt), ("it", it))}
    lengths = []
    for event, prefix in zip(store.events.to_pylist(), sequences_of(store), strict=True):
        of = slow_candidates(models, prefix, event["y_pt"], event["y_it"], ends)
        kept = {name: twin.n_valid(ids, ends, {*ends, tiny.PAD_ID}) for name, ids in of.items()}
        lengths.append(min(kept["desc_primary"], kept["base_primary"]))
        for contrast, (one, other) in list(CONTRASTS.items())[:2]:
            steps = {key[4] for key in found if key[0] == event["event_id"] and key[3] == contrast}
            assert steps == {n for n in (0, 1, 2, 4, 8) if n < min(kept[one], kept[other])}
    assert len(set(lengths)) > 2


# ---- a whole run ----


@pytest.mark.parametrize("n_events", [1, 2])
def test_few_events(run, tmp_path, n_events, monkeypatch):
    out = tmp_path / "few"
    prompts = [json.loads(line) for line in run.prompts.read_text().splitlines()]
    wanted = run.store.events["prompt_id"].to_pylist()[:n_events]
    lines = [json.dumps(prompt) for prompt in prompts if prompt["id"] in wanted]
    (tmp_path / "few.jsonl").write_text("\n".join(lines) + "\n")
    words = ["run", "--pt", run.pt, "--it", run.it, "--prompts", tmp_path / "few.jsonl", "--out", out, *FEW[2:]]
    assert main([str(word) for word in words]) == 0
    groups = actcache.Run(out).analyse("continuation")["groups"]
    assert {one["n_events"] for one in groups if one["n"] == 0 and one["contrast"] == "primary"} == {n_events}
    assert all(one["interaction"]["low"] is None for one in groups)
    assert main(["report", str(out)]) == 0
    assert '<section id="continuation">' in (out / "report.html").read_text()


@pytest.mark.parametrize("n_results", [1, 3])
def test_killed_while_models_run_it_goes_on_to_the_same_bytes(run, answered, tmp_path, monkeypatch, n_results):
    out = copied(run, tmp_path)
    write, left = runner.write_result, [n_results]

    def die(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(*args)

    monkeypatch.setattr(runner, "write_result", die)
    with pytest.raises(KeyboardInterrupt):
        actcache.Run(out).analyse("continuation")
    ran = []
    of = BranchJob.run
    monkeypatch.setattr(BranchJob, "run", lambda job, *args: ran.append(job) or of(job, *args))
    monkeypatch.setattr(runner, "write_result", write)
    actcache.Run(out).analyse("continuation")
    for name in ("continuation.json", "continuation.parquet"):
        assert (out / name).read_bytes() == (answered / name).read_bytes()
    n_branches = 3 * len(run.store.segments)
    assert len(ran) == max(0, n_branches - n_results)


def test_what_is_done_is_planned_and_not_run_again(run, answered, tmp_path, monkeypatch):
    opened = actcache.Run(copied(run, tmp_path))
    (planned,) = whole.plan_study(opened, only=["continuation"])
    kinds = Counter(type(job).__name__ for _, job in planned.jobs)
    n = len(run.store.segments)
    assert kinds == {"BranchJob": 3 * n, "StatesJob": 2 * n, "ContinuationJob": 2 * n}
    ((n_units, products),) = whole.costs([planned], shapes_of(opened.lineup))
    assert n_units > 0
    assert products > 0
    again = actcache.Run(answered)
    assert "continuation" not in [one.analysis.name for one in whole.plan_study(actcache.Run(opened.path))]
    table = (answered / "continuation.parquet").read_bytes()
    monkeypatch.setattr(again, "load_blocks", None)
    monkeypatch.setattr(again, "load_late", None)
    again.analyse("continuation")
    assert (answered / "continuation.parquet").read_bytes() == table
    assert main(["verify", str(answered)]) == 0


def test_a_diagonal_that_is_off_is_an_error(run, tmp_path, monkeypatch):
    """Rows of another event's candidates would be."""
    from actcache.study.continuation_job import ContinuationJob

    assembled = ContinuationJob._assembled

    def wrong(job, states, upstream, further):
        rows, offsets = assembled(job, states, upstream, further)
        return rows.roll(1, 0), offsets

    monkeypatch.setattr(ContinuationJob, "_assembled", wrong)
    with pytest.raises(CheckError, match="with candidates behind events, is not a no-op: event"):
        actcache.Run(copied(run, tmp_path)).analyse("continuation")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n": "1,x"}, "n is '1,x': give a list of whole numbers from 0 on"),
        ({"n": "-1"}, "give a list of whole numbers"),
        ({"alike": "colour"}, "the prompts have no column 'colour', which --alike names"),
        ({"boundary": "1"}, "boundary 1 is not in the store"),
        ({"readout": "x"}, "readout 'x' is unknown"),
        ({"weights": "x"}, "weights 'x' are unknown"),
    ],
)
def test_bad_options(run, options, said):
    with pytest.raises(InputError, match=said):
        actcache.Run(run.out).analyse("continuation", **options)


def test_numbers_at_0_are_the_same_whatever_else_is_asked(run, tmp_path, monkeypatch):
    """Which events count there is no matter of later tokens, where a chosen token is a special one neither."""
    opened, first = actcache.Run(copied(run, tmp_path)), run.store.events.slice(0, 1).to_pylist()[0]
    special = frozenset({first["y_it"], tiny.EOS_ID, tiny.PAD_ID})
    monkeypatch.setattr(type(opened.lineup), "special_ids", property(lambda _: special))
    groups, ys = {}, {}
    for n in ("0", "0,1", "3"):
        groups[n] = [one for one in opened.analyse("continuation", n=n, draws=100)["groups"] if one["n"] == 0]
        ys[n] = {key: y for key, y in y_of(table_of(opened.folder.path)).items() if key[4] == 0}
        assert ys[n] == pytest.approx(ys["0"], abs=1e-5)
        assert [one["n_events"] for one in groups[n]] == [one["n_events"] for one in groups["0"]]
    primary = {key[0] for key in ys["0"] if key[3] == "primary"}
    assert primary
    assert first["event_id"] not in primary


def test_a_changed_file_of_classes_is_noticed(run, tmp_path):
    opened, file = actcache.Run(copied(run, tmp_path)), tmp_path / "classes.toml"
    file.write_text("discourse = ['^so$']")
    opened.analyse("continuation", n="0", draws=100, classes=file)
    assert ANALYSIS.read(opened.folder, opened.store) is not None
    text = file.read_text()
    file.write_text("discourse = ['^no$']")
    assert ANALYSIS.read(opened.folder, opened.store) is None
    file.write_text(text)
    assert ANALYSIS.read(opened.folder, opened.store) is not None
    file.unlink()  # what is gone cannot be held against them
    assert ANALYSIS.read(opened.folder, opened.store) is not None


def test_log_probabilities_are_of_the_tokens_that_may_be_chosen(run):
    readout = actcache.Run(run.out).load_readout("it")
    final = run.store.final("it")
    tokens = torch.tensor([[3, 5]] * len(final))
    readout.mask([7, 9])
    logits = readout.logits(final).double()
    expected = logits.log_softmax(dim=-1)[:, [3, 5]]
    assert torch.allclose(readout.log_probs(final, tokens), expected, atol=1e-5)
    assert torch.isinf(logits[:, 7]).all()
    assert readout.log_probs(final[:0], tokens[:0]).shape == (0, 2)
