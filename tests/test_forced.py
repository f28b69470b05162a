"""Forced: planted checkpoints in which the token decides what follows, or nothing; replies by plain forwards."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from twins import continuation as twin
from twins import reference

import actcache
from actcache.analyses import forced, whole
from actcache.analyses.forced import ANALYSIS, BRANCHES, VIEWS, alternatives
from actcache.analyses.forced import ForcedOptions as Options
from actcache.cli import main
from actcache.errors import InputError
from actcache.models.lineup import Lineup
from actcache.study import runner
from actcache.study.plan import shapes_of

FEW = ("--limit", "8", "--stability", "0")


def table_of(out):
    return pq.read_table(out / "forced.parquet").to_pylist()


def n_letters(text, prompt):
    return len(text)


# ---- planted checkpoints ----


def bigrams(folder, follows):
    """A checkpoint that looks at the last token alone: what follows it is as ``follows`` says, by their texts."""
    width = tiny.VOCAB_SIZE
    tiny.make_checkpoint(folder, "llama", tie=False, hidden_size=width, head_dim=30)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
        elif name.endswith("norm.weight"):
            tensor.fill_(1.0)
    tensors["model.embed_tokens.weight"] = torch.eye(width)
    head = 1e-3 * torch.rand(width, width, generator=torch.Generator().manual_seed(0))
    tokenizer = tiny._tokenizer_backend()
    for before, after in follows.items():
        (at,), (to,) = (tokenizer.encode(text).ids for text in (before, after))
        head[to, at] = 1.0
    tensors["lm_head.weight"] = head
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


END = tiny.EOS
SHARED = {"b": "7", "a": "3", "c": "7", "d": "7", "7": END, "3": END}
DECIDES = "ABCDEFGHIJKL"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """After "?" IT writes b and PT a: 7 follows b, 3 follows a. After "!" they write d and c, and 7 follows both."""
    folder = tmp_path_factory.mktemp("planted")
    pt = bigrams(folder / "pt", {"?": "a", "!": "c", **SHARED})
    it = bigrams(folder / "it", {"?": "b", "!": "d", **SHARED})
    prompts = [
        {"id": f"{letter}{mark}", "prompt": f"{letter}{mark}", "category": kind, "answer": 7, "expected": "comply"}
        | {"mixed": mixed, "tone": "polite"}
        for letter in DECIDES
        for mark, kind, mixed in (("?", "decided", 7), ("!", "equal", "Seven"))
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    words = ["run", "--pt", pt, "--it", it, "--prompts", folder / "prompts.jsonl", "--out", folder / "run", *FEW[2:]]
    assert main([str(word) for word in words]) == 0
    return folder / "run"


def by_group(groups):
    return {(one["score"], one["subset"], one["view"]): one for one in groups}


def test_a_token_that_decides_the_answer_is_found(planted, tmp_path):
    out = shutil.copytree(planted, tmp_path / "run")
    found = actcache.Run(out).analyse("forced", answer="answer", expected="expected")
    of = by_group(found["groups"])
    decided, equal = ("category=decided", "category=equal")
    for score in ("exact", "same"):
        assert of[score, decided, "suffix"]["effect"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
        assert of[score, equal, "suffix"]["effect"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
        assert of[score, "all", "suffix"]["effect"]["mean"] == 0.5
        assert of[score, "all", "suffix"]["effect"]["low"] < 0.5 < of[score, "all", "suffix"]["effect"]["high"]
    assert of["exact", decided, "suffix"]["y_pt"]["mean"] == 0.0
    assert ("same", equal, "whole") not in of  # the forced token is part of that
    assert of["behaviour", "all", "suffix"]["effect"]["mean"] == 0.0
    texts = {(row["prompt_id"], row["branch"], row["view"]): row["text"] for row in table_of(out)}
    assert (texts["A?", "y_it", "suffix"], texts["A?", "y_it", "whole"]) == ("7", "b7")
    assert (texts["A?", "y_pt", "suffix"], texts["A!", "y_pt", "whole"]) == ("3", "c7")
    assert {row["ended_by"] for row in table_of(out) if row["branch"] in ("y_it", "y_pt")} == {"end_token"}
    section = ANALYSIS.section(found["groups"])
    assert {len(row) for row in section.rows} == {len(section.columns)}
    assert main(["report", str(out)]) == 0
    assert '<section id="forced">' in (out / "report.html").read_text()


def test_a_function_scores_from_python_and_from_a_file(planted, tmp_path, capfd):
    out = shutil.copytree(planted, tmp_path / "run")
    asked = []

    def is_seven(text, prompt):
        asked.append((prompt["prompt_id"], text))
        return text == "7" if prompt["category"] == "decided" else None

    of = by_group(actcache.Run(out).analyse("forced", checker=is_seven)["groups"])
    assert of["checker", "all", "suffix"]["n_events"] == len(DECIDES)
    assert of["checker", "all", "suffix"]["effect"]["mean"] == 1.0
    assert len(asked) == len(set(asked))  # equal texts are scored once
    assert json.loads((out / "forced.json").read_text())["options"]["checker"].endswith("is_seven")
    file = tmp_path / "mine.py"
    file.write_text("def seven(text, prompt):\n    return text.strip() == '7'\n")
    assert main(["forced", str(out), "--checker", f"{file}:seven"]) == 0
    printed = capfd.readouterr().out
    assert "checker, suffix" in printed
    of = by_group(json.loads((out / "forced.json").read_text())["groups"])
    assert of["checker", "category=decided", "suffix"]["effect"]["mean"] == 1.0
    folder = actcache.Run(out).folder
    assert forced.ANALYSIS.read(folder, folder.open_store()) is not None
    file.write_text(file.read_text() + "\n# another one\n")
    assert forced.ANALYSIS.read(folder, folder.open_store()) is None
    assert main(["forced", str(out), "--checker", str(file)]) == 2
    assert "is not FILE.py:function" in capfd.readouterr().err


def test_a_column_of_numbers_and_texts_holds_both(planted, tmp_path):
    out = shutil.copytree(planted, tmp_path / "run")
    asked = set()
    found = actcache.Run(out).analyse(
        "forced", answer="mixed", by="mixed", checker=lambda text, prompt: asked.add(prompt["mixed"])
    )
    of = by_group(found["groups"])
    assert asked == {7, "Seven"}  # and no '"Seven"', which no reply says
    assert of["exact", "mixed=7", "suffix"]["effect"]["mean"] == 1.0
    assert of["exact", "mixed=Seven", "suffix"]["y_it"]["mean"] == 0.0


def test_what_no_position_is_left_for_is_left_out(planted, tmp_path, monkeypatch, capfd):
    out = shutil.copytree(planted, tmp_path / "run")
    monkeypatch.setattr(Lineup, "max_positions", 2)  # all prompts have as many tokens
    assert main(["forced", str(out), "--max-new", "3,decided=1,decide=2"]) == 0
    said = capfd.readouterr()
    assert "24 of 24 events are left out" in said.err
    assert "max_new: no event has category 'decide'" in said.err
    assert "no event" in said.out


def test_lengths_by_column(planted, tmp_path):
    out = shutil.copytree(planted, tmp_path / "run")
    actcache.Run(out).analyse("forced", max_new="3,decided=1")
    lengths = {(row["prompt_id"][-1], row["branch"]): row["n_tokens"] for row in table_of(out)}
    assert (lengths["?", "y_it"], lengths["!", "y_it"]) == (1, 2)
    assert Options(max_new="a=3,b=9").lengths == {"": 9, "a": 3, "b": 9}
    for wrong in ("0", "x", "a=", "3,4"):
        with pytest.raises(InputError, match="max_new is"):
            _ = Options(max_new=wrong).lengths


# ---- any checkpoints ----


@pytest.fixture(scope="module")
def run(tiny_run):
    return tiny_run("llama", torch.float32, *FEW)


def test_branches_are_what_plain_forwards_write(run, tmp_path):
    out = shutil.copytree(run.out, tmp_path / "run")
    groups = actcache.Run(out).analyse("forced", checker=n_letters, max_new=12)["groups"]
    model, encoder = reference.load(run.it, torch.float32), actcache.Run(out).lineup.checkpoints["it"].encoder
    ids, offsets = run.store.token_ids()
    never = {tiny.EOS_ID, tiny.PAD_ID}
    rows = {(row["event_id"], row["branch"], row["view"]): row for row in table_of(out)}
    effects = []
    for number, event in enumerate(run.store.events.to_pylist()):
        if never & {event["y_pt"], event["y_it"]}:
            assert (event["event_id"], "y_it", "suffix") not in rows
            continue
        prefix = ids[offsets[number] : offsets[number + 1]].tolist()
        log_probs = reference.readout(model, reference.final_hidden(model, prefix)[-1]).double().log_softmax(-1)
        distance = {
            token: abs(float(log_probs[token] - log_probs[event["y_pt"]]))
            for token in range(tiny.VOCAB_SIZE)
            if token not in never | {event["y_pt"], event["y_it"]}
            and encoder.encode([encoder.decode([token])], add_special_tokens=False) == [[token]]
        }
        of = {branch: rows[event["event_id"], branch, "suffix"] for branch in BRANCHES}
        assert (of["y_it"]["token_id"], of["y_pt"]["token_id"]) == (event["y_it"], event["y_pt"])
        assert of["rank_matched"]["token_id"] == min(distance, key=distance.get)
        assert of["class_matched"]["token_id"] not in (of[name]["token_id"] for name in BRANCHES[:3])
        scores = {}
        for branch, row in of.items():
            assert row["log_prob"] == pytest.approx(float(log_probs[row["token_id"]]), abs=1e-4)
            tail = twin.greedy(model, [*prefix, row["token_id"]], 12, {tiny.EOS_ID})
            plain = [token for token in tail if token not in never]
            assert row["n_tokens"] == len(tail)
            assert row["text"] == (encoder.decode(plain) if plain else "")
            assert rows[event["event_id"], branch, "whole"]["text"] == encoder.decode([row["token_id"], *plain])
            assert row["checker"] == len(row["text"])
            scores[branch] = row["checker"]
        effects.append(scores["y_it"] - scores["y_pt"])
    of = by_group(groups)["checker", "all", "suffix"]
    assert of["n_events"] == len(effects)
    assert of["effect"]["mean"] == pytest.approx(np.mean(effects))
    assert of["effect"]["low"] is None  # of few prompts
    for score, views in (("checker", list(VIEWS)), ("same", ["suffix", "first"])):
        assert [view for name, subset, view in by_group(groups) if (name, subset) == (score, "all")] == views


def test_the_first_tokens_are_those_of_the_suffix(run, tmp_path, monkeypatch):
    monkeypatch.setattr(forced, "FIRST_TOKENS", 3)
    out = shutil.copytree(run.out, tmp_path / "run")
    actcache.Run(out).analyse("forced", max_new=8)
    rows = {(row["event_id"], row["branch"], row["view"]): row["text"] for row in table_of(out)}
    suffixes = {key: text for key, text in rows.items() if key[2] == "suffix"}
    assert all(text.startswith(rows[event, branch, "first"]) for (event, branch, _), text in suffixes.items())
    assert any(len(rows[event, branch, "first"]) < len(text) for (event, branch, _), text in suffixes.items())


def test_alternatives_are_the_nearest_that_may_be_forced():
    log_probs = torch.tensor([-1.0, -3.0, -3.1, -2.8, -torch.inf, -3.3, -9.0, -9.0])
    classes = ["a", "b", "a", "a", "b", "a", "b", "b"]

    def found(may_be=lambda token: True, classes=classes):
        return alternatives(log_probs, 0, 1, may_be, classes.__getitem__)

    assert found() == {"rank_matched": 2, "class_matched": 6}  # of equal ones the lower
    assert found(may_be=lambda token: token not in (2, 6)) == {"rank_matched": 3, "class_matched": 7}
    assert found(classes=["b"] * 8) == {"rank_matched": 2, "class_matched": 3}
    assert found(classes=["a", "b", *"a" * 6]) == {"rank_matched": 2}
    assert found(may_be=lambda token: False) == {}


@pytest.mark.parametrize("n_events", [1, 2])
def test_few_events(planted, tmp_path, n_events):
    record = json.loads((planted / "run.json").read_text())["checkpoints"]
    prompts = [{"id": str(n), "prompt": f"{DECIDES[n]}?"} for n in range(n_events)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    words = ["run", "--pt", record["pt"], "--it", record["it"], "--prompts", tmp_path / "few.jsonl"]
    assert main([str(word) for word in [*words, "--out", tmp_path / "run", *FEW[2:]]]) == 0
    (suffix, *_) = actcache.Run(tmp_path / "run").analyse("forced")["groups"]
    assert (suffix["score"], suffix["n_events"]) == ("same", n_events)
    assert suffix["effect"] == {"mean": 1.0, "low": None, "high": None}


def test_killed_it_goes_on_to_the_same_bytes(planted, tmp_path, monkeypatch):
    finished, out = (shutil.copytree(planted, tmp_path / name) for name in ("finished", "killed"))
    actcache.Run(finished).analyse("forced", answer="answer")
    write, left = runner.write_result, [2]

    def die(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(*args)

    monkeypatch.setattr(runner, "write_result", die)
    with pytest.raises(KeyboardInterrupt):
        actcache.Run(out).analyse("forced", answer="answer")
    left[0] = 2  # what was written is not written again
    actcache.Run(out).analyse("forced", answer="answer")
    assert left[0] == 0
    for name in ("forced.json", "forced.parquet"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    opened = actcache.Run(finished)
    monkeypatch.setattr(opened, "load_blocks", None)
    opened.analyse("forced", expected="expected")  # other scores of the same replies
    assert by_group(json.loads((finished / "forced.json").read_text())["groups"])["behaviour", "all", "suffix"]


def test_it_is_planned(planted, tmp_path):
    opened = actcache.Run(shutil.copytree(planted, tmp_path / "run"))
    assert "forced" not in [one.analysis.name for one in whole.plan_study(opened)]
    (planned,) = whole.plan_study(opened, only=["forced"])
    ((n_units, products),) = whole.costs([planned], shapes_of(opened.lineup))
    assert n_units == 4 * len(opened.store)
    assert products > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"answer": "solution"}, "the prompts have no column 'solution', which --answer names"),
        ({"expected": "x"}, "the prompts have no column 'x', which --expected names"),
        ({"expected": "tone"}, "column 'tone' says 'polite'; expected refuse or comply"),
        ({"by": "x"}, "the prompts have no column 'x', which --by names"),
        ({"checker": 3}, "checker is 3, expected a function"),
        ({"checker": lambda text, prompt: None, "colour": 1}, "forced has no option 'colour'"),
        ({"weights": "x"}, "weights 'x' are unknown"),
    ],
)
def test_bad_options(planted, options, said):
    with pytest.raises(InputError, match=said):
        actcache.Run(planted).analyse("forced", **options)
