"""Vocabularies that differ in their tail: what is shared is compared, and the tail is never chosen, but counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from stores import read_tree
from test_rollouts import following, planted
from test_tokens import add
from transformers import AutoModelForCausalLM

import actcache
from actcache.capture.continuations import read_continuations
from actcache.cli import main
from actcache.errors import IncompatibleError, InputError
from actcache.models.lineup import Lineup
from actcache.models.vocabulary import Tokens, Vocabulary
from actcache.prompts import Prompt
from actcache.report.visible import plain

V = tiny.VOCAB_SIZE


def vocabulary(*tokens: dict[int, str], rows: list[int] | None = None, added: tuple[str, ...] = ()) -> Vocabulary:
    rows = rows or [8] * len(tokens)
    every = [Tokens(f"m{i}", f"/m{i}", of, added, n) for i, (of, n) in enumerate(zip(tokens, rows, strict=True))]
    return Vocabulary(every, frozenset())


BASE = dict(enumerate("abcd"))


@pytest.mark.parametrize(
    ("others", "rows", "rule", "masked"),
    [
        ([BASE], [4, 4], None, []),
        ([BASE], [6, 6], "real tokens", [4, 5]),
        ([BASE], [4, 5], "4 shared tokens", [4]),
        ([BASE], [5, 6], "4 shared tokens, real tokens", [4, 5]),
        ([{**BASE, 4: "<x>"}], [5, 5], "4 shared tokens", [4]),
        ([{**BASE, 4: "<x>"}], [4, 5], "4 shared tokens", [4]),
        ([{**BASE, 4: "<x>"}], [4, 4], None, []),
        ([{**BASE, 4: "e", 5: "f"}], [6, 6], "4 shared tokens", [4, 5]),
        ([{**BASE, 4: "<x>"}, {**BASE, 4: "<x>", 5: "<y>"}], [6, 6, 7], "4 shared tokens", [4, 5, 6]),
        ([{**BASE, 6: "<x>"}], [7, 7], "4 shared tokens, real tokens", [4, 5, 6]),
        ([{**BASE, 4: "[unused1]"}], [5, 5], "4 shared tokens, real tokens", [4]),
    ],
)
def test_what_is_shared_and_what_is_masked(others, rows, rule, masked):
    found = vocabulary(BASE, *others, rows=rows, added=("<x>", "<y>", "[unused1]"))
    found.check()
    assert found.rule == rule
    assert found.masked(found.rule) == masked
    assert found.masked(None) == found.masked("of any checkpoint") == []


@given(
    st.lists(st.tuples(st.dictionaries(st.integers(4, 9), st.just("<x>")), st.integers(4, 12)), min_size=2, max_size=3)
)
def test_masked_ids_are_all_but_the_shared(tails):
    found = vocabulary(*({**BASE, **tail} for tail, _ in tails), rows=[n for _, n in tails], added=("<x>",))
    found.check()
    shared = {i for i in range(12) if all(i < n and i in {**BASE, **tail} for tail, n in tails)}
    chosen = set(range(max(n for _, n in tails))) - set(found.masked(found.rule))
    assert shared == found.shared
    assert chosen == shared


def test_different_tokens_of_one_id_at_the_end_are_masked():
    found = vocabulary({**BASE, 4: "<x>"}, {**BASE, 4: "<y>"}, added=("<x>", "<y>"), rows=[5, 5])
    found.check()
    assert found.masked(found.rule) == [4]
    assert 4 not in found.known, "no text stands for it"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({**BASE, 2: "x"}, "id 2 is 'c' in /m0 and 'x' in /m1"),
        ({0: "b", 1: "a", 2: "c", 3: "d"}, "id 0 is 'a' in /m0 and 'b' in /m1"),
        ({0: "a", 2: "c", 3: "d"}, "id 1 is 'b' in /m0 and None in /m1"),
        ({**BASE, 2: "<x>"}, "id 2 is 'c' in /m0 and '<x>' in /m1"),
    ],
)
def test_anything_else_is_refused_by_its_first_token(other, said):
    for tokens in ((BASE, other), (BASE, BASE, other)):
        with pytest.raises(IncompatibleError) as caught:
            vocabulary(*tokens, added=("<x>",)).check()
        assert said.replace("/m1", f"/m{len(tokens) - 1}") in str(caught.value)


def resized(folder: Path, to: Path, n: int, generator: torch.Generator | None = None) -> Path:
    """The same checkpoint with the first ``n`` rows, or with further random ones."""
    shutil.copytree(folder, to)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for path in ("model.embed_tokens", "lm_head"):
            old = model.get_submodule(path).weight
            more = torch.randn(max(0, n - len(old)), old.shape[1], generator=generator) * old.std()
            model.get_submodule(path).weight = torch.nn.Parameter(torch.cat([old[:n], more]))
    model.config.vocab_size = n
    model.save_pretrained(to)
    return to


def run(folders: dict[str, Path], prompts: Path, out: Path, *words: str) -> actcache.Run:
    given = [word for label, folder in folders.items() for word in (f"--{label}", str(folder))]
    command = ["run", *given, "--prompts", str(prompts), "--out", str(out), "--strict", "--stability", "0"]
    assert main([*command, "--boundary", "3", "--max-new", "16", *words]) == 0
    return actcache.Run(out)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return dict(zip(("pt", "it"), tiny.make_pair(folder, "llama", tie=False), strict=True))


@pytest.fixture(scope="module")
def plain_run(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return run(pair, tiny.write_prompts(folder / "p.jsonl", 8), folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("longer", "tail"), [("pt", 1), ("it", 256)])
def test_a_tail_changes_nothing_but_what_it_says(pair, plain_run, tmp_path, longer, tail, capfd):
    """Events, states and cells are those of the pair whose models have the shared rows alone; the page tells the
    rule."""
    folders = pair | {longer: resized(pair[longer], tmp_path / longer, V + tail, torch.Generator().manual_seed(1))}
    sweep = tmp_path / "sweep.toml"
    sweep.write_text("kl = true\n")
    found = run(folders, plain_run.folder.path.parent / "p.jsonl", tmp_path / "run")
    said = capfd.readouterr().err
    assert found.store.fingerprint.vocabulary == f"{V} shared tokens"
    outvoted = [f"outvoted_{role}" for role in ("pt", "it")]
    assert found.store.events.drop_columns(outvoted).equals(plain_run.store.events)
    mine, other = (
        found.store.events[f"outvoted_{role}"].to_pylist() for role in (longer, {"pt": "it"}.get(longer, "pt"))
    )
    assert set(other) == {-1}
    assert all(one == -1 or one >= V for one in mine)
    if tail == 256:
        assert max(mine) >= V, "of 256 random rows one wins now and then"
    n = sum(one >= 0 for one in mine)
    told = (
        f"{V} shared tokens; at {n} of {len(found.store)} events a token that not every checkpoint has would have won"
    )
    assert told in said
    assert told in plain(found.folder.report.read_text())
    cells = [pq.read_table(one.folder.cells) for one in (found, plain_run)]
    assert cells[0].equals(cells[1])
    for label in ("pt", "it"):
        for one, twin in zip(found.store.states(label, 3), plain_run.store.states(label, 3), strict=True):
            assert torch.equal(one, twin)
    readout, shared = (one.load_readout(longer) for one in (found, plain_run))
    states = found.store.final(longer)
    assert torch.equal(readout.top(states, 5)[0], shared.top(states, 5)[0])
    for one, twin in zip(
        readout.compare(states, states.flip(0), torch.arange(len(states))),
        shared.compare(states, states.flip(0), torch.arange(len(states))),
        strict=True,
    ):
        torch.testing.assert_close(one, twin)


@pytest.mark.slow
def test_a_tail_that_would_win_is_counted_at_every_event(tmp_path):
    """IT alone has further ids and likes the last of them best; PT has none."""
    folders = {"pt": planted(tmp_path / "pt", {}), "it": planted(tmp_path / "it", {50: 9}, beyond=3)}
    found = run(folders, tiny.write_prompts(tmp_path / "p.jsonl", 12), tmp_path / "run", "--max-new", "40")
    events = found.store.events
    assert len(events) >= 6
    assert set(events["outvoted_it"].to_pylist()) == {V + 2}
    assert set(events["outvoted_pt"].to_pylist()) == {-1}
    assert set(events["y_it"].to_pylist()) == {9}
    assert set(found.cells["top1_id"].to_pylist()) == {9, following(50)}


@pytest.mark.slow
def test_an_added_token_of_one_tokenizer_is_a_tail(tmp_path):
    """Both models have the rows; the tokenizer of one has a token there, which both would choose."""
    folders = {"pt": planted(tmp_path / "pt", {}, beyond=1), "it": planted(tmp_path / "it", {50: 9}, beyond=1)}
    add("<|pad|>2")(folders["it"])
    lineup = Lineup.open(folders)
    assert lineup.rule == f"{V} shared tokens"
    found = run(folders, tiny.write_prompts(tmp_path / "p.jsonl", 12), tmp_path / "run", "--max-new", "40")
    assert {*found.store.events["outvoted_it"].to_pylist(), *found.store.events["outvoted_pt"].to_pylist()} == {V}


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--resident", "one"], ["--stream"]], ids=["one resident", "streamed"])
def test_a_tail_is_told_alike_however_checkpoints_are_held(pair, plain_run, tmp_path, how):
    prompts = plain_run.folder.path.parent / "p.jsonl"
    longer = resized(pair["it"], tmp_path / "it", V + 256, torch.Generator().manual_seed(1))
    stores = []
    for name, words in (("all", ["--resident", "all"]), ("other", how)):
        given = ["capture", "--pt", pair["pt"], "--it", longer, "--prompts", prompts, "--out", tmp_path / name]
        assert main([str(word) for word in [*given, "--strict", "--max-new", "16", *words]]) == 0
        stores.append(read_tree(tmp_path / name / "store"))
    assert stores[0] == stores[1]


def test_a_continuation_ends_where_the_tail_begins(pair, tmp_path):
    longer = resized(pair["it"], tmp_path / "it", V + 3)
    lineup = Lineup.open({"pt": pair["pt"], "it": longer})
    lines = [{"prompt_id": f"p{i}", "label": "it", "token_ids": ids} for i, ids in enumerate([[5, V + 2, 6], [V]])]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    known = read_continuations(tmp_path / "c.jsonl", lineup, [Prompt("p0", "x"), Prompt("p1", "x")])
    assert {name: {label: list(ids) for label, ids in of.items()} for name, of in known.items()} == {"p0": {"it": [5]}}
    (tmp_path / "c.jsonl").write_text(json.dumps({**lines[0], "token_ids": [V + 3]}))
    with pytest.raises(InputError, match=f"token id {V + 3} is beyond the {V + 3} rows"):
        read_continuations(tmp_path / "c.jsonl", lineup, [Prompt("p0", "x")])


def test_the_first_different_token_is_named_on_the_command_line(pair, tmp_path, capfd):
    other = shutil.copytree(pair["it"], tmp_path / "it")
    text = json.loads((other / "tokenizer.json").read_text())
    vocab = text["model"]["vocab"]
    (last,) = (token for token, index in vocab.items() if index == V - 1)
    vocab["<new>"] = vocab.pop(last)
    text["model"]["merges"] = [one for one in text["model"]["merges"] if "".join(one) != last]
    (other / "tokenizer.json").write_text(json.dumps(text))
    prompts = tiny.write_prompts(tmp_path / "p.jsonl", 2)
    words = [
        "run",
        "--pt",
        str(pair["pt"]),
        "--it",
        str(other),
        "--prompts",
        str(prompts),
        "--out",
        str(tmp_path / "r"),
    ]
    assert main(words) == 2
    assert f"have different tokenizers: id {V - 1} is {last!r}" in capfd.readouterr().err
