"""Corpora: rows of texts without events are those of plain hooks; what counts, is held out, and is resumed."""

from __future__ import annotations

import json
import shutil
from unittest import mock

import pytest
import tiny
import torch
from stores import bits, read_tree
from transformers import AutoModelForCausalLM, AutoTokenizer

from actcache.cli import main
from actcache.store import StoreWriter, open_store
from actcache.store.corpus import held_out
from actcache.store.feed import RowFeed
from actcache.store.rows import StoreRows

CONTEXT = 12
SITES = ("--site", "mlp:3,4", "--site", "attention:1", "--site", "state:2")
LINES = [
    *({"id": f"text-{i}", "prompt": text, "source": "made up"} for i, text in enumerate(tiny.PROMPTS)),
    {"id": "rollout", "token_ids": [5, 9, tiny.EOS_ID, 17, 30, tiny.PAD_ID, tiny.EOS_ID]},
    {"id": "special alone", "token_ids": [tiny.EOS_ID]},
    *({"id": f"more-{i}", "prompt": f"{i} times {text}"} for i, text in enumerate(tiny.PROMPTS[:8])),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pair, and a file of texts."""
    place = tmp_path_factory.mktemp("corpus")
    tiny.make_pair(place, "llama")
    (place / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return place


def words(place, out, *more, sites=SITES):
    given = ["capture", "--corpus", place / "texts.jsonl", "--pt", place / "pt", "--it", place / "it"]
    return [str(word) for word in [*given, "--out", out, "--context", CONTEXT, "--shard-prompts", 8, *sites, *more]]


@pytest.fixture(scope="module")
def corpus(place):
    """Captured one sequence per forward."""
    out = place / "strict"
    assert main(words(place, out, "--strict")) == 0
    return open_store(out)


def rows_by_hooks(folder):
    """Ids of every text, and its rows at each place, by plain forwards with hooks: special tokens left out."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    blocks, seen = model.model.layers, {}
    for block in (3, 4):
        blocks[block].mlp.register_forward_hook(lambda module, args, out, at=("mlp", block): seen.update({at: out[0]}))
    blocks[1].self_attn.register_forward_hook(lambda module, args, out: seen.update({("attention", 1): out[0][0]}))
    blocks[2].register_forward_pre_hook(lambda module, args: seen.update({("state", 2): args[0][0]}))
    found = {}
    for line in LINES:
        ids = line.get("token_ids") or tokenizer(line["prompt"])["input_ids"]
        ids = ids[:CONTEXT]
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
        kept = [at for at, token in enumerate(ids) if token not in tokenizer.all_special_ids]
        found[line["id"]] = ids, {site: rows[kept].clone() for site, rows in seen.items()}
    return found


def fed(store, site, block, positions="all"):
    """The one batch that all rows are, in the store's order, and where they are from."""
    feed = RowFeed(store, site=site, boundaries=[block], positions=positions, batch_rows=10_000, shuffle=False)
    (batch,) = feed
    return batch.states[:, :, 0], feed.locate(batch.rows)


def texts_of(store, places):
    """The id of the text that each row is of."""
    firsts = [0]
    for segment in store.segments:
        firsts.append(firsts[-1] + segment.n_sequences)
    ids = store.sequences["prompt_id"].to_pylist()
    return [ids[firsts[s] + n] for s, n in zip(places.segment.tolist(), places.sequence.tolist(), strict=True)]


def test_rows_are_those_of_plain_hooks(place, corpus):
    for number, label in enumerate(("pt", "it")):
        expected = rows_by_hooks(place / label)
        for site, block in (("mlp", 3), ("mlp", 4), ("attention", 1), ("state", 2)):
            states, _ = fed(corpus, site, block)
            by_hooks = torch.cat([expected[line["id"]][1][site, block] for line in LINES])
            assert bits(states[:, number].contiguous()) == bits(by_hooks)


def test_packed_rows_differ_by_rounding(place, corpus, tmp_path):
    assert main(words(place, tmp_path / "packed")) == 0
    packed = open_store(tmp_path / "packed")
    for site, block in (("mlp", 4), ("state", 2)):
        torch.testing.assert_close(fed(packed, site, block)[0], fed(corpus, site, block)[0], atol=1e-4, rtol=1e-4)


def test_special_tokens_count_for_nothing(corpus):
    _, places = fed(corpus, "mlp", 3)
    special = {tiny.EOS_ID, tiny.PAD_ID}
    assert not special & set(places.token_id.tolist())
    stored = torch.cat([torch.from_numpy(segment.read("token_ids")) for segment in corpus.segments]).tolist()
    assert len(places.token_id) == sum(token not in special for token in stored) < len(stored)
    assert "special alone" not in texts_of(corpus, places)
    assert texts_of(corpus, places).count("rollout") == 4
    _, chosen = fed(corpus, "mlp", 3, positions=[2])  # where the rollout has an end of text
    assert not special & set(chosen.token_id.tolist())
    assert corpus.sequences["source"].to_pylist()[0] == "made up"
    assert (len(corpus), corpus.sequences.num_rows) == (0, len(LINES))


def test_one_text_in_ten_is_held_out(corpus):
    known = [held_out(str(number)) for number in range(2000)]
    assert 150 < sum(known) < 250
    parts = {split: fed(corpus, "mlp", 3, split)[1] for split in ("train", "held_out")}
    texts = {split: set(texts_of(corpus, places)) for split, places in parts.items()}
    assert texts["held_out"] == {line["id"] for line in LINES if held_out(line["id"])} - {"special alone"}
    assert not texts["train"] & texts["held_out"]
    assert sum(len(places.segment) for places in parts.values()) == StoreRows(corpus, "all").n_rows
    assert "corpus:ID" in corpus.fingerprint.held_out


def test_splits_of_a_store_of_events(tiny_run):
    """By the prompts' ids, there too."""
    store = tiny_run("llama", torch.float32).store
    parts = [StoreRows(store, split) for split in ("train", "held_out")]
    assert sum(part.n_rows for part in parts) == StoreRows(store, "all").n_rows
    ids = store.sequences["prompt_id"].to_pylist()
    sequences = set(parts[1].locate(parts[1].chosen).sequence.tolist())
    assert {ids[number] for number in sequences} == {one for one in ids if held_out(one)} != set()


@pytest.mark.parametrize("n", [1, 40, 53])
def test_whole_texts_that_have_the_rows_asked_for(place, corpus, tmp_path, n):
    assert main(words(place, tmp_path / "some", "--tokens", str(n), "--strict")) == 0
    states, places = fed(open_store(tmp_path / "some"), "mlp", 4)
    every, of_every = fed(corpus, "mlp", 4)
    assert torch.equal(states, every[: len(states)])
    texts, of_all = texts_of(open_store(tmp_path / "some"), places), texts_of(corpus, of_every)
    assert of_all[len(states)] != texts[-1], "the last text is cut"
    assert len(states) >= n > len(states) - texts.count(texts[-1])


def test_more_rows_asked_for_later_are_those_of_all_at_once(place, tmp_path):
    for n, out in ((30, "grown"), (60, "grown"), (60, "once")):
        assert main(words(place, tmp_path / out, "--tokens", str(n), "--strict")) == 0
    grown, once = (open_store(tmp_path / out) for out in ("grown", "once"))
    assert grown.sequences.drop_columns("segment").equals(once.sequences.drop_columns("segment"))
    ids = [torch.cat([torch.from_numpy(of.read("token_ids")) for of in one.segments]) for one in (grown, once)]
    assert torch.equal(*ids)
    for site, block in (("mlp", 3), ("state", 2)):
        (rows, _), (expected, _) = fed(grown, site, block), fed(once, site, block)
        assert torch.equal(rows, expected)


def test_fewer_rows_than_are_asked_for(place, corpus, tmp_path, capfd):
    assert main(words(place, tmp_path / "all", "--tokens", "99999", "--strict")) == 0
    assert "99,999 were asked for" in capfd.readouterr().err
    assert read_tree(tmp_path / "all" / "segments") == read_tree(place / "strict" / "segments")


def test_a_capture_that_died_goes_on_to_the_same_bytes(place, tmp_path):
    died, append, left = tmp_path / "died", StoreWriter.append, [2]

    def die(*args, **more):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return append(*args, **more)

    with mock.patch.object(StoreWriter, "append", die):
        assert main(words(place, died, "--strict")) == 2
    assert len(open_store(died).segments) == 2
    assert main(words(place, died, "--strict")) == 0
    assert read_tree(died) == read_tree(place / "strict")


def test_a_corpus_grows(place, corpus, tmp_path):
    """By texts, and by sites: what is there stays."""
    out = tmp_path / "grown"
    assert main(words(place, out, "--strict", "--limit", "10", sites=("--site", "mlp:4"))) == 0
    before = read_tree(out / "segments")
    assert main(words(place, out, "--strict")) == 0
    grown = open_store(out)
    assert before.items() <= read_tree(out / "segments").items()
    for site, block in (("mlp", 3), ("mlp", 4), ("state", 2)):
        assert torch.equal(fed(grown, site, block)[0], fed(corpus, site, block)[0])


def test_a_corpus_is_a_store_as_any_other(place, corpus, tmp_path, capfd):
    out = shutil.copytree(place / "strict", tmp_path / "store")
    feed = RowFeed(out, site="mlp", boundaries=[3], positions="train", batch_rows=7)
    batches = [batch.states for batch in feed]
    state = feed.state_dict(batches=0)
    assert main(["compact", str(out)]) == 0
    assert main(["verify", str(out)]) == 0
    assert main(["inspect", str(out), "--json"]) == 0
    summary = json.loads(capfd.readouterr().out.partition("\n{")[2].join(["{", ""]))
    assert summary["sites"] == {"mlp": [3, 4], "attention": [1]}
    again = RowFeed(out, site="mlp", boundaries=[3], positions="train", batch_rows=7)
    again.load_state_dict(state)
    assert torch.equal(torch.cat([batch.states for batch in again]), torch.cat(batches))


def test_one_checkpoint_is_enough(place, corpus, tmp_path):
    given = ["capture", "--corpus", place / "texts.jsonl", "--checkpoint", f"mine={place / 'it'}", "--site", "mlp:4"]
    given += ["--context", CONTEXT, "--strict", "--out", tmp_path / "one"]
    assert main([str(word) for word in given]) == 0
    one = open_store(tmp_path / "one")
    assert one.checkpoints == ["mine"]
    assert torch.equal(fed(one, "mlp", 4)[0][:, 0], fed(corpus, "mlp", 4)[0][:, 1])


def test_the_corpus_of_a_run_is_of_its_checkpoints(tiny_run, place, tmp_path):
    run = shutil.copytree(tiny_run("llama", torch.float32).out, tmp_path / "run")
    given = ["capture", "--corpus", place / "texts.jsonl", "--site", "mlp:4", "--out", run, "--tokens", 30]
    assert main([str(word) for word in given]) == 0
    corpus, store = open_store(run / "corpus"), open_store(run / "store")
    assert corpus.fingerprint.checkpoints == store.fingerprint.checkpoints
    assert main(["verify", str(run)]) == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--prompts", "texts.jsonl"), "leave --prompts out"),
        (("--max-new", "4"), "leave --max-new out"),
        (("--support", "rollouts"), "leave --support out"),
        (("--rows", "divergence"), "leave --rows out"),
        (("--site", "head:1"), "give state, attention or mlp"),
    ],
)
def test_what_a_corpus_refuses(place, tmp_path, capfd, more, said):
    assert main(words(place, tmp_path / "none", *more)) == 2
    assert said in capfd.readouterr().err
    assert not (tmp_path / "none").exists()


def test_what_it_lacks_is_said(place, tmp_path, capfd):
    out = str(tmp_path / "none")
    assert main(words(place, out, sites=())) == 2
    assert "--site mlp:29,30" in capfd.readouterr().err
    assert main(["capture", "--corpus", str(place / "texts.jsonl"), "--site", "mlp:1", "--out", out]) == 2
    assert "--checkpoint LABEL=DIR" in capfd.readouterr().err
    pair = ["--pt", str(place / "pt"), "--it", str(place / "it"), "--prompts", str(place / "texts.jsonl")]
    assert main(["capture", *pair, "--out", out, "--tokens", "7"]) == 2
    assert "--corpus" in capfd.readouterr().err
