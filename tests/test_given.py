"""Events that are given: any pair of tokens at any position, stored and scored as those that a search finds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
import torch
from stores import bits, read_tree

from actcache.cli import main
from actcache.models.checkpoint import Checkpoint
from actcache.store import compact, open_store, verify

PAIR = ("pt", "it")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    return tiny.make_pair(tmp_path_factory.mktemp("pair"), "llama")


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def capture(pair, out: Path, *more: Any) -> int:
    words = ["capture", "--pt", pair[0], "--it", pair[1], "--out", out, "--boundary", 3]
    return main([str(word) for word in [*words, *more]])


def fixed(pair, out: Path, lines: list[Any], *more: Any) -> int:
    return capture(pair, out, "--support", "fixed", "--events", write(out.with_suffix(".jsonl"), lines), *more)


LINES = [
    {"prompt_id": "p03", "y_pt": 40, "y_it": 41, "note": "at the end"},
    {"id": "ioi", "prompt": "The river runs past", "position": 1, "y_pt": 50, "y_it": 51, "kind": "ioi"},
    {"id": "ids", "token_ids": [5, 6, 7, 8, 9, 10], "position": 4, "y_pt": 9, "y_it": 60, "step": 2},
    {"id": "ids", "token_ids": [5, 6, 7, 8, 9, 10, 11, 12], "y_pt": 70, "y_it": 9},
    {"id": "ids", "token_ids": [5, 6, 7], "position": 0, "y_pt": 9, "y_it": 10},
    {"id": "ids", "token_ids": [5, 6, 7, 8, 9, 10], "position": 4, "y_pt": 9, "y_it": 61},
    {"id": "ids", "token_ids": [5, 6, 99], "position": 2, "y_pt": 9, "y_it": 61},
]


@pytest.fixture(scope="module")
def run(pair, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    prompts = tiny.write_prompts(folder / "p.jsonl", 6)
    assert fixed(pair, folder / "run", LINES, "--prompts", prompts, "--strict") == 0
    return folder / "run"


def test_every_event_is_where_and_what_was_given(run):
    store = open_store(run / "store")
    found = store.events.to_pylist()
    assert [(e["event_id"], e["prompt_id"], e["position"], e["y_pt"], e["y_it"], e["step"]) for e in found] == [
        (f"p03@{found[0]['position']}:fixed", "p03", found[0]["position"], 40, 41, 0),
        ("ioi@1:ioi", "ioi", 1, 50, 51, 0),
        ("ids@0:fixed", "ids", 0, 9, 10, 0),
        ("ids@4:fixed", "ids", 4, 9, 60, 2),
        ("ids@4:fixed#2", "ids", 4, 9, 61, 0),
        ("ids@7:fixed", "ids", 7, 70, 9, 0),
        ("ids@2:fixed", "ids", 2, 9, 61, 0),
    ]
    assert [e["kind"] for e in found] == ["fixed", "ioi", *["fixed"] * 5]
    assert {e["pair"] for e in found} == {"pt,it"}
    assert (found[0]["note"], found[0]["category"], found[1]["note"]) == ("at the end", "prose", None)
    ids, offsets = store.token_ids()
    assert ids[offsets[5] : offsets[6]].tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert ids[offsets[3] : offsets[4]].tolist() == [5, 6, 7, 8, 9]
    assert ids[offsets[6] :].tolist() == [5, 6, 99]
    assert sum(segment.n_sequences for segment in store.segments) == 4, "events over one sequence share it"
    assert store.sequences["prompt_id"].to_pylist() == ["p03", "ioi", "ids", "ids"]
    assert (store.n_prompts, store.fingerprint.support, verify(run / "store")) == (3, "fixed", [])


def test_states_and_margins_are_those_of_a_plain_forward(run, pair):
    store = open_store(run / "store")
    ids, offsets = store.token_ids()
    for label, folder in zip(PAIR, pair, strict=True):
        model = Checkpoint.open(label, folder).load(torch.float32, "cpu")
        for i, event in enumerate(store.events.to_pylist()):
            with torch.no_grad():
                out = model(input_ids=ids[None, offsets[i] : offsets[i + 1]], output_hidden_states=True)
            rows, _ = store.states(label, 3, [i])
            assert torch.allclose(rows, out.hidden_states[3][0], atol=1e-4)
            logits = out.logits[0, -1].double()
            assert float(logits[event["y_it"]] - logits[event["y_pt"]]) == pytest.approx(
                event[f"margin_{label}"], abs=1e-3
            )
            best = logits.topk(2).values
            assert event[f"gap_{label}"] == pytest.approx(float(best[0] - best[1]), abs=1e-3)


def test_the_grid_scores_them(run):
    assert main(["grid", str(run)]) == 0
    cells = pq.read_table(run / "cells.parquet")
    assert set(cells["kind"].to_pylist()) == {"fixed", "ioi"}
    assert cells.num_rows == 7 * 4 * 3
    deltas = [abs(delta) for delta in cells["noop_delta"].to_pylist() if delta is not None]
    assert deltas
    assert max(deltas) < 1e-4
    assert main(["effects", str(run)]) == 0


def test_nothing_is_decided_at_tokens_that_were_given(run, tmp_path, capfd):
    out = shutil.copytree(run, tmp_path / "run")
    assert main(["grid", str(out)]) == 0
    capfd.readouterr()
    assert main(["stability", str(out), "--dtype", "float32"]) == 0
    said = capfd.readouterr()
    assert "no event to analyse" in said.out
    assert "the tokens of all events were given: nothing decides them" in said.err
    assert main(["effects", str(out), "--stable-only", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["n_left_out"] == 0


@pytest.mark.slow
def test_events_of_another_run_are_taken_tokens_and_all(pair, tmp_path):
    prompts = tiny.write_prompts(tmp_path / "p.jsonl", 6)
    assert capture(pair, tmp_path / "one", "--prompts", prompts, "--max-new", 24, "--strict") == 0
    assert capture(pair, tmp_path / "two", "--support", "fixed", "--events", tmp_path / "one", "--strict") == 0
    one, two = (open_store(tmp_path / name / "store") for name in ("one", "two"))
    columns = ["event_id", "prompt_id", "kind", "pair", "step", "position", "y_pt", "y_it", "category"]
    assert two.events.select(columns).equals(one.events.select(columns))
    assert set(one.events["kind"].to_pylist()) == {"first_divergence"}
    for label in PAIR:
        assert bits(two.states(label, 3)[0]) == bits(one.states(label, 3)[0])
        assert bits(two.final(label)) == bits(one.final(label))
    other = tiny.make_pair(tmp_path / "other", "llama", seed=7)
    assert capture(other, tmp_path / "three", "--support", "fixed", "--events", tmp_path / "one") == 0
    three = open_store(tmp_path / "three/store")
    assert set(three.excluded["reason"].to_pylist()) == {"contradicts_its_kind"}, "another pair chooses other tokens"
    assert len(three) + three.excluded.num_rows == len(one)


def test_a_kind_that_the_pair_must_choose_is_checked(pair, tmp_path):
    line = {"id": "x", "token_ids": [5, 6, 7], "y_pt": 40, "y_it": 41}
    lines = [line | {"kind": "first_divergence"}, line | {"kind": "mine"}]
    assert fixed(pair, tmp_path / "run", lines) == 0
    store = open_store(tmp_path / "run/store")
    assert store.events["event_id"].to_pylist() == ["x@2:mine"]
    assert store.excluded.select(["prompt_id", "reason"]).to_pylist() == [
        {"prompt_id": "x", "reason": "contradicts_its_kind"}
    ]


@pytest.mark.slow
def test_it_resumes_grows_and_compacts(run, pair, tmp_path, capfd):
    prompts = tiny.write_prompts(tmp_path / "p.jsonl", 6)
    more = ["--prompts", prompts, "--strict", "--shard-prompts", 1]
    assert fixed(pair, tmp_path / "run", LINES[:2], *more) == 0
    files = read_tree(tmp_path / "run/store")
    assert fixed(pair, tmp_path / "run", LINES[:2], *more) == 0
    assert read_tree(tmp_path / "run/store") == files
    assert fixed(pair, tmp_path / "run", LINES, *more, "--boundary", "2") == 0
    assert read_tree(tmp_path / "run/store").items() >= files.items()
    whole, grown = open_store(run / "store"), open_store(tmp_path / "run/store")
    assert grown.boundaries == [3, 2]
    assert bits(grown.states("it", 3)[0]) == bits(whole.states("it", 3)[0])
    assert compact(tmp_path / "run/store") == (3, 1)
    assert bits(open_store(tmp_path / "run/store").states("it", 3)[0]) == bits(whole.states("it", 3)[0])
    capfd.readouterr()
    assert capture(pair, tmp_path / "run", *more) == 2
    assert "support" in capfd.readouterr().err, "what a search finds does not go into a store of given events"


def test_rows_of_events_alone(run, pair, tmp_path):
    prompts = tiny.write_prompts(tmp_path / "p.jsonl", 6)
    assert fixed(pair, tmp_path / "run", LINES, "--prompts", prompts, "--strict", "--rows", "divergence") == 0
    store, whole = open_store(tmp_path / "run/store"), open_store(run / "store")
    rows, offsets = whole.states("pt", 3)
    assert bits(store.states("pt", 3)[0]) == bits(rows[offsets[1:] - 1])
    assert bits(store.final("pt")) == bits(whole.final("pt"))


def test_packs_give_what_single_forwards_give(run, pair, tmp_path):
    prompts = tiny.write_prompts(tmp_path / "p.jsonl", 6)
    assert fixed(pair, tmp_path / "run", LINES, "--prompts", prompts) == 0
    store, whole = open_store(tmp_path / "run/store"), open_store(run / "store")
    assert store.events["event_id"].equals(whole.events["event_id"])
    assert torch.allclose(store.states("it", 3)[0], whole.states("it", 3)[0], atol=1e-4)


def test_events_of_two_regimes_are_of_two_sequences(tmp_path):
    """Beyond 12 tokens all positions are computed otherwise: an event before is not read from such a sequence."""
    pair = tiny.make_pair(tmp_path, "phi3")
    ids = list(range(5, 25))
    lines = [{"id": "x", "token_ids": ids, "position": p, "y_pt": 40, "y_it": 41} for p in (3, 11, 12, 19)]
    assert fixed(pair, tmp_path / "run", lines) == 0
    store = open_store(tmp_path / "run/store")
    assert store.events["sequence"].to_pylist() == [0, 0, 1, 1]
    assert [segment.row_offsets.tolist() for segment in store.segments] == [[0, 12, 32]]
    assert main(["grid", str(tmp_path / "run")]) == 0


LINE = {"id": "x", "token_ids": [5, 6, 7], "y_pt": 40, "y_it": 41}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (5, "line 2: a JSON int, expected an object"),
        ({"y_pt": 1, "y_it": 2}, "of a 'prompt_id', a 'prompt' or 'token_ids', one of these; this line has none"),
        (LINE | {"prompt": "x"}, "this line has prompt and token_ids"),
        ({"prompt_id": "p99", "y_pt": 40, "y_it": 41}, "no prompt 'p99' in the prompts file"),
        (LINE | {"id": ""}, "'id' is"),
        (LINE | {"token_ids": [5, 120]}, "token id 120 is beyond the 120 rows"),
        (LINE | {"token_ids": [5, True]}, "expected a list of whole numbers"),
        (LINE | {"token_ids": [5] * 129}, "129 tokens; the model has 128 positions"),
        (LINE | {"position": 3}, "position 3 is not one of its 3 tokens, counted from 0"),
        (LINE | {"position": -1}, "position -1 is not one of"),
        (LINE | {"y_it": 500}, "y_it 500 is not the id of a token"),
        (LINE | {"y_it": 40}, "y_pt and y_it are both 40"),
        ({"id": "x", "token_ids": [5, 6, 7], "y_pt": 40}, "y_it null is not the id of a token"),
        (LINE | {"kind": "a b"}, "is not made of letters, digits"),
        (LINE | {"step": 9}, "step 9 is not a number of tokens before the event"),
        (LINE | {"boundary": 3}, "key 'boundary' is the name of a result column"),
        ({"id": "first", "token_ids": [1, 2], "y_pt": 40, "y_it": 41}, "the same event as"),
    ],
)
def test_a_line_that_is_no_event_is_named(line, said, pair, tmp_path, capfd):
    first = {"id": "first", "token_ids": [1, 2], "y_pt": 40, "y_it": 41}
    prompts = tiny.write_prompts(tmp_path / "p.jsonl", 6)
    assert fixed(pair, tmp_path / "run", [first, line], "--prompts", prompts) == 2
    err = capfd.readouterr().err
    assert "line 2" in err
    assert said in err
    assert not (tmp_path / "run").exists()


def test_the_arguments_belong_together(pair, tmp_path, capfd):
    events = write(tmp_path / "e.jsonl", [LINE])
    assert capture(pair, tmp_path / "run", "--events", events) == 2
    assert "--support fixed and --events belong together" in capfd.readouterr().err
    assert capture(pair, tmp_path / "run", "--support", "fixed") == 2
    assert "--support fixed and --events belong together" in capfd.readouterr().err
    assert capture(pair, tmp_path / "run") == 2
    assert "required: --prompts" in capfd.readouterr().err
    assert fixed(pair, tmp_path / "run", []) == 2
    assert "no events" in capfd.readouterr().err
