"""Crosscoders from a corpus: a planted code is found, a killed training ends in the same bytes, the gate tells good
from bad, contexts are those of a search by loops."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace

import forked
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from stores import make_fingerprint, make_table, read_tree, write_store

import actcache
from actcache.analyses.features.contexts import ANALYSIS as CONTEXTS
from actcache.analyses.features.contexts import ContextsOptions, highest
from actcache.analyses.features.crosscoder import DESCRIPTION, WEIGHTS, Crosscoder
from actcache.analyses.features.gate import ANALYSIS as GATE
from actcache.analyses.features.gate import GateOptions, drops_found, judged, measured
from actcache.analyses.features.mediate import ANALYSIS as MEDIATE
from actcache.analyses.features.step import crosscoder_digests
from actcache.analyses.features.train import TrainOptions, _train
from actcache.analyses.features.trainer import Trainer
from actcache.cli import main
from actcache.errors import CorruptFileError, InputError
from actcache.progress import Tally, untold
from actcache.sealed import parquet_bytes
from actcache.store import SegmentData, layout, open_store
from actcache.store.corpus import held_out
from actcache.store.feed import RowFeed
from actcache.study.run_folder import RunFolder

D, N_PLANTED, K = 16, 12, 2
LABELS = ("pt", "it")
SPECIAL = 7
SMALL = {"width": 24, "k": K, "steps": 1200, "batch": 128, "learning_rate": 3e-3, "dead_steps": 100}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A corpus whose rows are sums of two of twelve planted directions per checkpoint, and these directions."""
    draw = np.random.default_rng(0)
    directions = draw.normal(size=(N_PLANTED, 2, D))
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    directions[0, 0] = 0  # a feature of the second checkpoint alone
    offset = draw.normal(size=(2, D))
    fingerprint = make_fingerprint(width=D, boundaries=[], dropped=[SPECIAL], n_prompts=64)
    segments = {}
    for number in range(4):
        n_texts, length = 16, 64
        n = n_texts * length
        on = np.stack([draw.permutation(N_PLANTED)[:K] for _ in range(n)])
        codes = np.zeros((n, N_PLANTED))
        np.put_along_axis(codes, on, draw.uniform(1, 2, (n, K)), axis=1)
        token_ids = np.where(np.arange(n) % 31 == 0, SPECIAL, draw.integers(8, 99, n)).astype(np.int32)
        codes[token_ids == SPECIAL] = 1000.0  # no training on these would find anything
        rows = np.einsum("nf,fkd->nkd", codes, directions) + offset
        segments[f"s{number}"] = SegmentData(
            token_ids=token_ids,
            sequence_offsets=np.arange(0, n + 1, length),
            states={},
            final={label: torch.empty(0, D) for label in LABELS},
            events=make_table([], layout.EVENT_COLUMNS),
            excluded=make_table([], layout.EXCLUDED_COLUMNS),
            sequences=pa.table(
                {"prompt_id": [f"x{number * n_texts + i}" for i in range(n_texts)], "carried": ["{}"] * n_texts}
            ),
            sites={("mlp", label, 5): torch.from_numpy(rows[:, k]).float() for k, label in enumerate(LABELS)},
        )
    path = write_store(tmp_path_factory.mktemp("planted") / "store", fingerprint, segments)
    return open_store(path), torch.from_numpy(directions).float()


def feed_of(store, rows=SMALL["batch"]):
    how = {"site": "mlp", "positions": "train", "batch_rows": rows, "seed": 0, "drop_last": True}
    return RowFeed(store, labels=LABELS, boundaries=[5], **how)


def recipe(**changes):
    return TrainOptions(**SMALL | changes).recipe(D)


@pytest.fixture(scope="module")
def trained(planted, tmp_path_factory):
    store, _ = planted
    torch.set_num_threads(1)
    trainer = Trainer(feed_of(store), recipe())
    return trainer.run(tmp_path_factory.mktemp("trained"), 10_000), trainer.log


def test_a_planted_code_is_found(planted, trained):
    _, directions = planted
    crosscoder, log = trained
    learned = torch.nn.functional.normalize(crosscoder.decoder.flatten(1), dim=1)
    wanted = torch.nn.functional.normalize(directions.flatten(1), dim=1)
    best = (wanted @ learned.T).max(dim=1)
    assert (best.values > 0.95).all()
    own = crosscoder.decoder[best.indices[0]].norm(dim=1)
    assert own[0] < 0.1 * own[1]  # the second checkpoint's feature is its own here too
    assert log[-1]["ve_pt"] > 0.95
    assert log[-1]["ve_it"] > 0.95
    torch.testing.assert_close(crosscoder.decoder.flatten(1).norm(dim=1), torch.ones(24))
    assert log[0]["k"] > log[-1]["k"] == K
    assert crosscoder.threshold > 0


def test_a_step_is_what_its_formulas_say(planted):
    """One step of Adam on the loss that is written out, from the weights that are described."""
    store, _ = planted
    small = recipe(steps=1, anneal_steps=0, k_start=K, warmup_steps=0, dead_steps=10**9)
    trainer = Trainer(feed_of(store), small)
    decoder = trainer._learned["decoder"].detach().clone()
    assert torch.equal(decoder[:, 0], decoder[:, 1])
    torch.testing.assert_close(decoder.norm(dim=2), torch.full((24, 2), 0.1))
    encoder = decoder.permute(1, 2, 0).clone().requires_grad_()
    assert torch.equal(encoder, trainer._learned["encoder"])
    decoder.requires_grad_()
    rows = next(iter(feed_of(store))).states[:, :, 0]
    mean = trainer.mean
    raw = torch.relu(sum((rows[:, m] - mean[m]) @ encoder[m] for m in range(2)))
    scores = (raw * (decoder[:, 0].norm(dim=1) + decoder[:, 1].norm(dim=1))).detach()
    least = scores.flatten().sort(descending=True).values[K * len(rows) - 1]
    features = raw * (scores >= least)
    loss = torch.stack([rows[:, m] - features @ decoder[:, m] - mean[m] for m in range(2)]).square().mean()
    gradients = torch.autograd.grad(loss, [encoder, decoder])
    trainer._take_step(rows)
    assert trainer.log[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    # The first step of Adam goes as far as the learning rate, against the sign of the gradient.
    moved = trainer._learned["encoder"].detach() - encoder.detach()
    clear = gradients[0].abs() > 1e-6
    torch.testing.assert_close(moved[clear], -3e-3 * gradients[0].sign()[clear], rtol=0.02, atol=1e-6)
    after = decoder.detach() - 3e-3 * gradients[1].sign()
    after /= after.flatten(1).norm(dim=1)[:, None, None]
    clear = (gradients[1].abs() > 1e-6).flatten(1).all(dim=1)
    assert clear.any()
    torch.testing.assert_close(trainer._learned["decoder"].detach()[clear], after[clear], rtol=0.02, atol=1e-3)


def test_schedules():
    numbers = TrainOptions(k=64, steps=24_000).recipe(4096)
    assert (numbers.n_features, numbers.k_start, numbers.anneal_steps, numbers.warmup_steps) == (
        131_072,
        256,
        2000,
        1000,
    )
    assert (numbers.aux_k, numbers.aux_weight, numbers.clip, numbers.learning_rate) == (1024, 1 / 32, 1.0, 1e-4)
    assert [numbers.k_at(step) for step in (0, 1000, 2000, 23_999)] == [256, 160, 64, 64]
    assert numbers.learning_rate_at(499) == pytest.approx(5e-5)
    assert numbers.learning_rate_at(5000) == 1e-4
    with pytest.raises(InputError, match="of 32 features"):
        TrainOptions(width=32, k=40).recipe(8)


def test_dead_features_come_back(planted):
    """A feature whose bias keeps it off is reached by the auxiliary loss alone."""
    store, _ = planted
    trainer = Trainer(feed_of(store), recipe(steps=40, dead_steps=5, anneal_steps=0, k_start=K))
    with torch.no_grad():
        trainer._learned["b_enc"][3:] = -0.05
    before = trainer._learned["b_enc"].detach().clone()
    for _ in range(40):
        trainer._take_step(next(trainer._rows))
    assert any(row["aux_loss"] > 0 for row in trainer.log)
    assert (trainer._learned["b_enc"].detach() != before).any()


def test_a_training_that_died_ends_in_the_same_bytes(planted, tmp_path):
    store, _ = planted
    small = recipe(steps=60, dead_steps=10)

    def die(n, doing):
        left[0] -= n
        if not left[0]:
            raise KeyboardInterrupt

    whole = Trainer(feed_of(store), small)
    whole.run(tmp_path / "whole", 7).save(tmp_path / "whole")
    for n in (5, 38):  # before the first save; after another died
        left = [n]
        trainer = Trainer(feed_of(store), small)
        trainer.resume(tmp_path / "died")
        with pytest.raises(KeyboardInterrupt):
            trainer.run(tmp_path / "died", 7, die)
    assert [path.name for path in (tmp_path / "died").glob("*.safetensors")] == ["training-000000035.safetensors"]
    last = Trainer(feed_of(store), small)
    assert last.resume(tmp_path / "died")
    assert last.step == 35
    (tmp_path / "died" / ".training-000000042.safetensors.0123abcd.tmp").touch()  # killed as it was written
    last.run(tmp_path / "died", 7).save(tmp_path / "died")
    assert last.log == whole.log
    assert read_tree(tmp_path / "died") == read_tree(tmp_path / "whole")


@pytest.mark.parametrize("name", [WEIGHTS, DESCRIPTION])
def test_what_is_damaged_is_trained_again(planted, tmp_path, name):
    store, _ = planted

    def train():
        _train(tmp_path, feed_of(store), recipe(steps=4), "cpu", 100, Tally(4, "steps", untold))
        return read_tree(tmp_path)

    whole = train()
    path = tmp_path / name
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises((CorruptFileError, InputError), match="train it again"):
        Crosscoder.load(tmp_path)
    assert train() == whole
    path.write_bytes(data)
    Crosscoder.load(tmp_path).save(tmp_path)  # a person's own, of no known training
    with pytest.raises(InputError, match="is of another training"):
        train()


def test_rows_that_are_all_equal_have_nothing_to_explain(planted):
    trainer = Trainer(feed_of(planted[0]), recipe(steps=4))
    rows = torch.ones(8, 2, D)
    trainer._put_down(rows, rows, 0.0, 0.0, torch.ones(8, 24) > 0, torch.zeros(24))
    assert trainer.log[-1]["ve_pt"] == 0.0


def test_what_was_saved_is_of_the_same_training(planted, tmp_path):
    store, _ = planted
    small = recipe(steps=4)
    Trainer(feed_of(store), small).run(tmp_path, 2)
    with pytest.raises(InputError, match="its k is 2, now it would be 3"):
        Trainer(feed_of(store), replace(small, k=3)).resume(tmp_path)
    with pytest.raises(InputError, match="its batch_rows is 128, now it would be 64"):
        Trainer(feed_of(store, 64), small).resume(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(CorruptFileError, match="is not what was saved"):
        Trainer(feed_of(store), small).resume(tmp_path)


def test_the_gate_measures_what_loops_do(planted, trained):
    store, _ = planted
    crosscoder, _ = trained
    table, alive = measured(crosscoder, store, 64, seed=3)
    held = [one for one in store.sequences["prompt_id"].to_pylist() if held_out(one)]
    assert table["prompt_id"].to_pylist() == held
    feed = RowFeed(store, site="mlp", positions="held_out", batch_rows=64, seed=3)
    rows = [batch.states[:, :, 0] for batch in feed]
    every = torch.cat(rows)
    left, n_on, once = torch.zeros(2), 0, []
    for batch in rows:
        raw = crosscoder.raw(batch)
        scores = raw * crosscoder.scale
        least = scores.flatten().sort(descending=True).values[K * len(batch) - 1]
        features = raw * (scores >= max(float(least), 1e-12))
        left += (batch - crosscoder.decode(features)).square().sum(dim=(0, 2))
        n_on += int((features > 0).sum())
        once += [float((features > 0).any(dim=0).float().mean())] if len(batch) == 64 else []
    about = (every - every.mean(dim=0)).square().sum(dim=(0, 2))
    group = judged(crosscoder, table, alive, GateOptions(alive="0.01,1"))
    for number, label in enumerate(LABELS):
        assert group[f"ve_{label}"]["mean"] == pytest.approx(float(1 - left[number] / about[number]), abs=1e-4)
    assert group["l0"]["mean"] == pytest.approx(n_on / len(every))
    by_threshold = (crosscoder.encode(every) > 0).sum() / len(every)
    assert group["l0_threshold"]["mean"] == pytest.approx(float(by_threshold))
    assert group["alive_code"] == pytest.approx(np.mean(once))
    assert group["alive_paper"] == pytest.approx(n_on / len(every) / 24)


def test_the_gate_tells_good_from_bad(planted, trained):
    store, _ = planted
    crosscoder, _ = trained

    def fails(one, **options):
        return judged(one, *measured(one, store, 64, seed=3), GateOptions(**{"alive": "0.01,1", **options}))["fails"]

    assert fails(crosscoder) == []
    assert fails(crosscoder, alive="0.01,0.2") == ["alive"]
    assert fails(crosscoder, alive="0.01,0.2", alive_rule="paper") == []
    of = judged(
        crosscoder, *measured(crosscoder, store, 64, 3), GateOptions(alive="0,1"), {"k": 25, "top": -0.1, "random": 0.1}
    )
    assert "drop of the best 25" in GATE.section([of]).columns
    assert of["fails"] == ["drop", "drop_random"]
    assert not of["passes_published"]
    assert fails(crosscoder, min_explained=0.9999) == ["ve_pt", "ve_it"]
    deaf = crosscoder.decoder.clone()
    deaf[:, 0] = 0
    assert fails(replace(crosscoder, decoder=deaf)) == ["ve_pt"]
    assert fails(replace(crosscoder, threshold=1e9)) == ["l0_threshold"]
    assert "l0" in fails(replace(crosscoder, b_enc=crosscoder.b_enc - 1e9))


def test_drops_are_of_the_most_features_up_to_200_and_say_of_how_many(planted, monkeypatch, tmp_path):
    store, folder = planted[0], RunFolder(tmp_path)
    assert drops_found(folder, store) == {}
    groups = [
        {"kind": kind, "set": name, "k": k, "drop": {"mean": drop + k / 1000 - 9 * (kind != "first_divergence")}}
        for kind in ("earlier", "first_divergence")
        for name, drop in (("top", 1.0), ("random", 0.0), ("active", 5.0))
        for k in (25, 200, 500)
    ]
    for ks, found in (
        ((25, 200, 500), {"k": 200, "top": 1.2, "random": 0.2}),
        ((25, 500), {"k": 25, "top": 1.025, "random": 0.025}),
        ((500,), {}),
    ):
        given = {"groups": [one for one in groups if one["k"] in ks]}
        monkeypatch.setattr(MEDIATE, "read", lambda folder, store, given=given: given)
        assert drops_found(folder, store) == pytest.approx(found)
    monkeypatch.setattr(MEDIATE, "read", lambda folder, store: None)  # nothing, or of another ranking or other events
    assert drops_found(folder, store) == {}


def test_contexts_are_those_of_a_search_by_loops(planted, trained):
    store, _ = planted
    crosscoder, _ = trained
    found = highest(crosscoder, store, ContextsOptions(top=3, batch=100))
    feed = RowFeed(store, site="mlp", batch_rows=10**5, shuffle=False)
    (batch,) = feed
    features = crosscoder.encode(batch.states[:, :, 0])
    for feature in range(crosscoder.n_features):
        order = sorted(range(len(features)), key=lambda row: (-float(features[row, feature]), row))[:3]
        own = [row for row in order if features[row, feature] > 0]
        assert found.rows[feature, : len(own)].tolist() == batch.rows[own].tolist()
        torch.testing.assert_close(found.values[feature, : len(own)], features[own, feature])
        assert found.active_rate[feature] == pytest.approx(float((features[:, feature] > 0).float().mean()))


# ---- the commands ----

TRAIN = ("--width", 48, "--k", 4, "--steps", 60, "--batch", 32, "--save-steps", 10, "--learning-rate", 1e-3)


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A run with a corpus."""
    place = tmp_path_factory.mktemp("features")
    out = shutil.copytree(tiny_run("llama", torch.float32).out, place / "run")
    lines = [{"id": f"x{i}", "prompt": f"{i}. {text}"} for i, text in enumerate(tiny.PROMPTS * 2)]
    (place / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["capture", "--corpus", place / "texts.jsonl", "--site", "mlp:3,4", "--out", out]
    assert main([str(word) for word in given]) == 0
    return out


def step(name, out, *more):
    return main(["features", name, str(out), *map(str, more)])


@pytest.mark.slow
def test_train_gate_contexts_report(run, tmp_path, capfd):
    out = shutil.copytree(run, tmp_path / "run")
    assert step("gate", out) == 2
    assert "actcache features train" in capfd.readouterr().err
    assert step("train", out, *TRAIN) == 0
    said = capfd.readouterr()
    assert "block 4: loss" in said.err or "120 of 120 steps" in said.err
    groups = json.loads((out / "features" / "train.json").read_text())["groups"]
    assert [(group["block"], group["n_features"]) for group in groups] == [(3, 48), (4, 48)]
    log = pq.read_table(out / "features" / "train.parquet").to_pylist()
    assert {row["block"] for row in log} == {3, 4}
    assert [path.name for path in sorted((out / "features" / "crosscoders" / "b003").iterdir())] == [
        "crosscoder.json",
        "weights.safetensors",
    ]
    before = read_tree(out / "features")
    assert step("train", out, *TRAIN) == 0  # nothing is left to do
    assert read_tree(out / "features") == before
    assert step("train", out, *TRAIN, "--k", 5) == 2
    assert "its k is 4, now it would be 5" in capfd.readouterr().err
    assert step("gate", out, "--batch", 16) == 0
    gate = actcache.Run(out).analyse("features gate", batch=16)["groups"]
    assert [group["block"] for group in gate] == [3, 4]
    assert all(group["n_prompts"] == sum(held_out(f"x{i}") for i in range(48)) for group in gate)
    assert step("contexts", out, "--top", 2, "--features", 5) == 0
    assert re.search(
        r"^block [34], feature \d+: on at \S+% of rows, at most \S+\n    .*\[", capfd.readouterr().out, re.M
    )
    contexts = pq.read_table(out / "features" / "contexts.parquet").to_pylist()
    assert len({(row["block"], row["feature"]) for row in contexts}) == 5
    assert all(f"[{row['token']}]" in row["text"] and row["value"] > 0 for row in contexts)
    texts = {f"x{i}": f"{i}. {text}" for i, text in enumerate(tiny.PROMPTS * 2)}
    assert all(row["text"].replace(f"[{row['token']}]", row["token"]) in texts[row["prompt_id"]] for row in contexts)
    assert main(["report", str(out)]) == 0
    page = (out / "report.html").read_text()
    for name in ("features-train", "features-gate", "features-contexts"):
        assert f'<section id="{name}">' in page
    assert main(["verify", str(out)]) == 0
    said = capfd.readouterr().out
    assert "6 of features/, 1 of features/crosscoders/b003/" in said


@pytest.mark.slow
def test_a_corpus_that_grew_is_noticed(run, tmp_path):
    """By what is shown of the rows that it had; a corpus that is gone says nothing against them."""
    out = shutil.copytree(run, tmp_path / "run")
    assert step("train", out, *TRAIN, "--blocks", 4) == 0
    for name in ("gate", "contexts"):
        assert step(name, out, "--batch", 16) == 0
    folder = actcache.Run(out).folder

    def shown():
        return [one.read(folder, folder.open_store()) is not None for one in (GATE, CONTEXTS)]

    assert shown() == [True, True]
    folder.corpus.rename(tmp_path / "away")
    assert shown() == [True, True]
    (tmp_path / "away").rename(folder.corpus)
    texts = tmp_path / "more.jsonl"
    texts.write_text((run.parent / "texts.jsonl").read_text() + json.dumps({"id": "new", "prompt": "Salt."}) + "\n")
    assert main(["capture", "--corpus", str(texts), "--site", "mlp:3,4", "--out", str(out)]) == 0
    assert shown() == [False, False]
    assert step("gate", out, "--batch", 16) == 0
    assert shown() == [True, False]


@pytest.mark.slow
def test_contexts_notice_another_ranking(run, tmp_path):
    out = shutil.copytree(run, tmp_path / "run")
    assert step("train", out, *TRAIN, "--blocks", 4) == 0
    folder = actcache.Run(out).folder
    ranking = folder.features / "ranking.parquet"
    for ranks in ((1, 2), (2, 1)):
        assert step("contexts", out, "--batch", 16) == 0
        assert CONTEXTS.read(folder, folder.open_store()) is not None
        table = pa.table({"block": pa.array([4, 4], pa.int32()), "feature": [0, 1], "rank": ranks})
        ranking.write_bytes(parquet_bytes(table, {"crosscoders": crosscoder_digests(folder)}))
        assert CONTEXTS.read(folder, folder.open_store()) is None
    assert step("contexts", out, "--batch", 16) == 0
    assert features_of(CONTEXTS.read(folder, folder.open_store())) == {("causal rank", 1), ("causal rank", 0)}
    shutil.rmtree(folder.features / "crosscoders")  # others, of fewer features than were ranked
    assert step("train", out, *TRAIN, "--blocks", 4, "--width", 1, "--k", 1) == 0
    assert step("contexts", out, "--batch", 16) == 0
    assert features_of(CONTEXTS.read(folder, folder.open_store())) == {("activation in all", 0)}


def features_of(found):
    return {(one["ordered_by"], one["feature"]) for one in found["groups"]}


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_weights(run, tmp_path):
    whole, killed = (shutil.copytree(run, tmp_path / name) for name in ("whole", "killed"))
    many = [*TRAIN, "--steps", 400, "--blocks", 3, "--threads", 1]
    assert step("train", whole, *many) == 0
    words = [sys.executable, "-m", "actcache.cli", "features", "train", str(killed), *map(str, many)]
    process = forked.Process(words, env=os.environ | {"OMP_NUM_THREADS": "1"})
    state = killed / "features" / "crosscoders" / "b003" / "training.json"
    while not state.exists() and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert state.exists()
    assert step("train", killed, *many) == 0
    names = ("features/crosscoders/b003/weights.safetensors", "features/train.json", "features/train.parquet")
    for name in names:
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert Crosscoder.load((killed / names[0]).parent).digest == Crosscoder.load((whole / names[0]).parent).digest


def test_what_a_step_refuses(run, tmp_path, capfd):
    assert step("train", run, "--blocks", 2) == 2
    assert "no MLP rows of block 2, but of 3, 4" in capfd.readouterr().err
    assert step("train", run, "--corpus", run / "store") == 2
    assert "is no corpus of texts" in capfd.readouterr().err
    assert step("train", run, "--corpus", tmp_path) == 2
    assert "holds no corpus" in capfd.readouterr().err
    assert step("train", run, "--batch", 99999) == 2
    assert "smaller --batch" in capfd.readouterr().err
    for flag, value, said in (
        ("--labels", "it,it", "name each checkpoint once"),
        ("--k-start", -4, "k_start is -4: give 0 or more"),
        ("--aux-k", -3, "aux_k is -3: give 0 or more"),
        ("--seed", 2**64, "give less than 2**63"),
    ):
        assert step("train", run, flag, value) == 2
        assert said in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main(["features", "trian", str(run)])
    assert "there is no step 'trian'; did you mean train?" in capfd.readouterr().err
