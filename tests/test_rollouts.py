"""Rollouts of both checkpoints, forwarded through all: the events on them are those of a twin and of planted models."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from stores import bits, read_tree
from transformers import LlamaConfig, LlamaForCausalLM
from twins import reference
from twins.supports import choices, support

import actcache
from actcache.capture import answers, search
from actcache.capture.supports import HORIZONS
from actcache.capture.token_class import FORMAT, TokenClasses, is_marker
from actcache.cli import main
from actcache.models.lineup import Lineup
from actcache.prompts import Prompt
from actcache.schema import CHOSEN_KINDS
from actcache.store import BackgroundWriter, compact, open_store, verify

N_TOKENS = 20
ITS = ("first_divergence", "it_rollout", "native_it")  # kinds on histories that IT chose, too
KINDS = {*CHOSEN_KINDS, "pre_divergence"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return tiny.write_prompts(tmp_path_factory.mktemp("prompts") / "p.jsonl", 10)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    return tiny.make_pair(tmp_path_factory.mktemp("pair"), "llama")


def words(verb: str, pair, prompts: Path, out: Path, *more: Any) -> list[str]:
    given = [verb, "--pt", pair[0], "--it", pair[1], "--prompts", prompts, "--out", out, "--boundary", 3]
    return [str(word) for word in [*given, "--support", "rollouts", "--rollout-tokens", N_TOKENS, *more]]


def capture(pair, prompts: Path, out: Path, *more: Any) -> Path:
    assert main(words("capture", pair, prompts, out, *more)) == 0
    return out


@pytest.fixture(scope="module")
def run(pair, prompts, tmp_path_factory) -> Path:
    return capture(pair, prompts, tmp_path_factory.mktemp("strict") / "run", "--strict", "--shard-prompts", 4)


@pytest.fixture(scope="module")
def packed(pair, prompts, tmp_path_factory) -> Path:
    return capture(pair, prompts, tmp_path_factory.mktemp("packed") / "run")


def sequences_of(store) -> dict[str, list[list[int]]]:
    """Token ids of the sequences of each prompt, in order."""
    found: dict[str, list[list[int]]] = {}
    for segment in store.segments:
        ids, offsets = segment.read("token_ids"), segment.row_offsets
        names = segment.read_table("sequences")["prompt_id"].to_pylist()
        for name, (start, stop) in zip(names, itertools.pairwise(offsets), strict=True):
            found.setdefault(name, []).append(ids[start:stop].tolist())
    return found


def events_of(store) -> dict[str, set[tuple[str, int, int, int]]]:
    found: dict[str, set[tuple[str, int, int, int]]] = {}
    for event in store.events.to_pylist():
        found.setdefault(event["prompt_id"], set()).add(tuple(event[name] for name in ("kind", "step", "y_pt", "y_it")))
    return found


@pytest.mark.slow
def test_events_are_the_twin_s(run, pair, prompts):
    lineup = Lineup.open(dict(zip(("pt", "it"), pair, strict=True)))
    models = [reference.load(folder, torch.float32) for folder in pair]
    classes, text = TokenClasses(), lambda token: lineup.decode([token])
    store = open_store(run / "store")
    found, sequences = events_of(store), sequences_of(store)
    special = lineup.special_ids
    for line in map(json.loads, prompts.read_text().splitlines()):
        (ids,) = lineup.encode([Prompt(line["id"], line["prompt"])])
        twin = support(
            *models,
            line["id"],
            ids,
            N_TOKENS,
            [tiny.EOS_ID],
            lambda token: classes.of(text(token), special=token in special) == FORMAT,
            lambda token: is_marker(text(token)),
        )
        expected = [events for _, events in twin.values()]
        assert found.get(line["id"], set()) == set.union(*expected)
        assert sequences.get(line["id"], []) == [sequence for sequence, events in twin.values() if events]
    assert {kind for events in found.values() for kind, *_ in events} >= KINDS - {"first_marker"}


def test_states_are_those_of_one_forward_over_each_sequence(run, pair):
    store = open_store(run / "store")
    models = dict(zip(("pt", "it"), (reference.load(folder, torch.float32) for folder in pair), strict=True))
    for segment in list(store.segments)[:1]:
        ids, offsets = segment.read("token_ids"), segment.row_offsets
        table = segment.read_table("events")
        for label, model in models.items():
            rows = actcache.store.layout.to_torch(segment.read(f"states/{label}/b003"), torch.float32)
            final = actcache.store.layout.to_torch(segment.read(f"final/{label}"), torch.float32)
            for number, (start, stop) in enumerate(itertools.pairwise(offsets)):
                sequence = ids[start:stop].tolist()
                assert bits(rows[start:stop]) == bits(reference.states(model, sequence, 3))
                hidden = reference.final_hidden(model, sequence)
                for event, (of, position) in enumerate(
                    zip(*(table[n].to_pylist() for n in ("sequence", "position")), strict=True)
                ):
                    if of == number:
                        assert bits(final[event]) == bits(hidden[position])


@pytest.mark.slow
def test_no_event_contradicts_its_own_diagonal(run, packed):
    assert main(["grid", str(run), "--strict"]) == 0
    assert main(["grid", str(packed)]) == 0
    for out in (run, packed):
        store = open_store(out / "store")
        assert len(set(store.events["event_id"].to_pylist())) == len(store)
        cells = pq.read_table(out / "cells.parquet").to_pylist()
        diagonal = [one for one in cells if one["readout"] == "native" and one["upstream"] == one["late"]]
        assert len(diagonal) == 2 * len(store)
        for one in diagonal:
            if one["kind"] in CHOSEN_KINDS:
                assert (one["margin"] < 0) == (one["late"] == "pt"), one
                assert one["top1_id"] == one[f"y_{one['late']}"]
            assert abs(one["noop_delta"]) < 1e-4


@pytest.mark.slow
def test_packs_and_single_forwards_find_the_same(run, packed, pair, prompts, tmp_path):
    packed = open_store(packed / "store")
    strict = open_store(run / "store")
    names = ["event_id", "step", "position", "y_pt", "y_it", "pair", "category"]
    assert packed.events.select(names).equals(strict.events.select(names))
    assert torch.allclose(packed.states("it", 3)[0], strict.states("it", 3)[0], atol=1e-4)
    of_events = open_store(capture(pair, prompts, tmp_path / "rows", "--strict", "--rows", "divergence") / "store")
    rows, offsets = strict.states("pt", 3)
    assert bits(of_events.states("pt", 3)[0]) == bits(rows[offsets[1:] - 1])
    assert bits(of_events.final("it")) == bits(strict.final("it"))


@pytest.mark.slow
def test_every_event_but_given_ones_is_as_stable_as_a_first_divergence(run, tmp_path):
    """Of each on its writer's history: float32 rounding decides none of the tiny pairs' tokens."""
    out = shutil.copytree(run, tmp_path / "run")
    table = actcache.Run(out).analyse("stability", dtype="float32") and pq.read_table(out / "stability.parquet")
    chosen = [row for row in open_store(out / "store").events.to_pylist() if row["kind"] in CHOSEN_KINDS]
    assert table["event_id"].to_pylist() == [row["event_id"] for row in chosen]
    assert set(table["stable"].to_pylist()) == set(table["as_stored"].to_pylist()) == {True}


@pytest.mark.slow
@pytest.mark.parametrize("pack", [False, True])
def test_checks_of_stability_run_each_sequence_once(run, tmp_path, monkeypatch, pack):
    """A choice that is changed on the way to an event counts where it is its writer's."""
    from actcache.study.forward_job import ForwardJob

    out, seen = shutil.copytree(run, tmp_path / "run"), []
    plain = ForwardJob.run

    def changed(job, *given):
        seen.append(job)
        result = plain(job, *given)
        if job.label != "it" or job.strict == pack:
            return result
        tokens = result.table["top1_id"].to_numpy().copy()
        tokens[:] = -1  # a choice that nobody made
        return result._replace(table=result.table.set_column(2, "top1_id", pa.array(tokens)))

    monkeypatch.setattr(ForwardJob, "run", changed)
    actcache.Run(out).analyse("stability", dtype="float32")
    store = open_store(out / "store")
    n_sequences = sum(len({tuple(ids) for ids in of}) for of in sequences_of(store).values())
    assert {len(job.sequences) for job in seen} == {n_sequences}
    assert len(seen) == 4
    positions = {
        row["event_id"]: row["position"] - (row["step"] if row["kind"] in ITS else 0)
        for row in store.events.to_pylist()
    }
    table = pq.read_table(out / "stability.parquet").to_pylist()
    for row in table:
        assert not row["stable"]
        assert row["changed"] == "it"
        assert row["position"] == positions[row["event_id"]], "of pt's rollouts, what it chose before does not count"


def test_first_divergences_are_those_of_a_search(run, pair, prompts, tmp_path):
    given = ["capture", "--pt", pair[0], "--it", pair[1], "--prompts", prompts, "--out", tmp_path / "run"]
    assert main([str(word) for word in [*given, "--boundary", 3, "--strict", "--max-new", N_TOKENS + 1]]) == 0
    searched, found = open_store(tmp_path / "run/store"), open_store(run / "store")
    names = ["event_id", "step", "position", "y_pt", "y_it"]
    of_kind = [
        row for row in found.events.select([*names, "kind"]).to_pylist() if row.pop("kind") == "first_divergence"
    ]
    assert of_kind == searched.events.select(names).to_pylist()
    assert found.excluded.equals(searched.excluded)


@pytest.mark.slow
def test_it_grows_resumes_compacts_exports_and_feeds(run, pair, prompts, tmp_path):
    few = capture(pair, prompts, tmp_path / "run", "--strict", "--shard-prompts", 4, "--limit", 4)
    before = read_tree(few / "store")
    capture(pair, prompts, few, "--strict", "--shard-prompts", 4)
    after = read_tree(few / "store")
    assert before.items() <= after.items()
    whole, grown = open_store(run / "store"), open_store(few / "store")
    assert grown.events.equals(whole.events)
    assert bits(grown.states("it", 3)[0]) == bits(whole.states("it", 3)[0])
    capture(pair, prompts, few, "--strict", "--shard-prompts", 4, "--boundary", "2", "--site", "mlp:4")
    assert open_store(few / "store").boundaries == [3, 2]
    assert verify(few / "store") == []
    assert compact(few / "store")[1] == 1
    compacted = open_store(few / "store")
    assert compacted.events.drop_columns(["segment", "sequence"]).equals(
        whole.events.drop_columns(["segment", "sequence"])
    )
    assert bits(compacted.states("it", 3)[0]) == bits(whole.states("it", 3)[0])
    assert main(["export", str(few / "store"), "--to", "npy", "--out", str(tmp_path / "npy"), "--events", "0:3"]) == 0
    feed = actcache.RowFeed(few / "store", boundaries=[3], batch_rows=64)
    n_tokens = sum(len(one) for of in sequences_of(whole).values() for one in of)
    assert sum(len(batch.rows) for batch in feed) == n_tokens


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 1, 2])
def test_killed_and_resumed_gives_the_same_bytes(run, pair, prompts, tmp_path, monkeypatch, after):
    append, left = BackgroundWriter.append, [after]

    def die(self, *given, **more):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return append(self, *given, **more)

    monkeypatch.setattr(BackgroundWriter, "append", die)
    assert main(words("capture", pair, prompts, tmp_path / "run", "--strict", "--shard-prompts", 4)) != 0
    assert len(list((tmp_path / "run/store/commits").glob("*.json"))) <= after
    monkeypatch.setattr(BackgroundWriter, "append", append)
    capture(pair, prompts, tmp_path / "run", "--strict", "--shard-prompts", 4)
    assert read_tree(tmp_path / "run/store") == read_tree(run / "store")


# ---- the capture forward decides ----


def misleading(monkeypatch, how: str, times: int) -> list[int]:
    """Have the first searches propose what no checkpoint writes."""
    told, called = search.propose, [0]

    def propose(*given, **more):
        proposals = told(*given, **more)
        called[0] += 1
        if called[0] > times:
            return proposals
        for proposal in proposals:
            if how == "another token" and len(proposal.shared) > 2:
                proposal.shared[len(proposal.shared) // 2] = 60 + called[0]
            elif how == "too short":
                del proposal.shared[3:]
            elif how == "too long":
                proposal.shared += [50, 51]
        return proposals

    monkeypatch.setattr(answers, "propose", propose)
    return called


@pytest.mark.parametrize("how", ["another token", "too short"])
def test_what_a_search_gets_wrong_is_put_right(run, pair, prompts, tmp_path, monkeypatch, how):
    called = misleading(monkeypatch, how, 2)
    found = open_store(capture(pair, prompts, tmp_path / "run", "--strict", "--shard-prompts", 64) / "store")
    assert called[0] > 2
    whole = open_store(run / "store")
    names = ["event_id", "step", "y_pt", "y_it"]
    assert found.events.select(names).equals(whole.events.select(names))
    assert bits(found.states("pt", 3)[0]) == bits(whole.states("pt", 3)[0])


def test_a_search_that_is_always_wrong_ends(run, pair, prompts, tmp_path, monkeypatch):
    """What its forwards confirmed is a rollout as well, only a shorter one."""
    misleading(monkeypatch, "another token", 10**6)
    found = open_store(capture(pair, prompts, tmp_path / "run", "--strict") / "store")
    whole = sequences_of(open_store(run / "store"))
    for name, sequences in sequences_of(found).items():
        for sequence in sequences:
            assert any(one[: len(sequence)] == sequence for one in whole[name])
    assert set(found.excluded["reason"].to_pylist()) <= {"undecided", "both_ended"}


@pytest.mark.slow
def test_regimes_have_sequences_of_their_own(tmp_path):
    """Beyond 12 tokens all positions are computed otherwise: each event is of a forward that is as long as its own."""
    pair = tiny.make_pair(tmp_path, "phi3")
    prompts = tiny.write_prompts(tmp_path / "p.jsonl", 5)
    store = open_store(capture(pair, prompts, tmp_path / "run", "--strict") / "store")
    models = dict(zip(("pt", "it"), (reference.load(folder, torch.float32) for folder in pair), strict=True))
    lengths = {name: [len(one) for one in several] for name, several in sequences_of(store).items()}
    assert any(12 in several and max(several) > 12 for several in lengths.values())
    ids, offsets = store.token_ids()
    for event, (start, stop) in zip(store.events.to_pylist(), itertools.pairwise(offsets.tolist()), strict=True):
        own = ids[start:stop].tolist()
        for label in ("pt", "it"):
            (choice,) = choices(models[label], own, len(own))
            if event["kind"] in CHOSEN_KINDS:
                assert choice == event[f"y_{label}"]
    assert main(["grid", str(tmp_path / "run")]) == 0


# ---- several pairs ----

LABELS = ("base", "sft", "dpo", "far")
PAIRS = ("base,sft", "base,dpo")


@pytest.fixture(scope="module")
def lineup(tmp_path_factory) -> dict[str, Path]:
    return tiny.make_lineup(tmp_path_factory.mktemp("lineup"), "llama", LABELS)


def of_pairs(lineup, prompts: Path, out: Path, *pairs: str, more: Any = ("--strict",)) -> actcache.Store:
    given = ["capture", *(f"--checkpoint={label}={folder}" for label, folder in lineup.items()), "--out", out]
    given += [*(f"--pair={pair}" for pair in pairs), "--prompts", prompts, "--boundary", 3, "--max-new", 24, *more]
    assert main([str(word) for word in given]) == 0
    return open_store(out / "store")


@pytest.fixture(scope="module")
def several(lineup, prompts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("several") / "run"
    of_pairs(lineup, prompts, out, *PAIRS, more=("--strict", "--shard-prompts", 4))
    return out


PLACE = ("prompt_id", "kind", "pair", "step", "position", "y_pt", "y_it", "category")


def rows_of(store, *pairs: str) -> list[tuple[Any, ...]]:
    rows = [tuple(row[name] for name in PLACE) for row in store.events.to_pylist() if not pairs or row["pair"] in pairs]
    return sorted(rows)


@pytest.mark.slow
def test_events_of_several_pairs_are_those_of_each(several, lineup, prompts, tmp_path):
    store = open_store(several / "store")
    for number, pair in enumerate(PAIRS):
        alone = of_pairs(lineup, prompts, tmp_path / str(number), pair)
        assert rows_of(alone) == rows_of(store, pair)
        reasons = [(row["prompt_id"], row["reason"]) for row in alone.excluded.to_pylist()]
        excluded = store.excluded.to_pylist()
        assert reasons == [(row["prompt_id"], row["reason"]) for row in excluded if row["pair"] == pair]
        margins = {row["prompt_id"]: row for row in alone.events.to_pylist()}
        for row in store.events.to_pylist():
            if row["pair"] == pair:
                for name in ("margin_pt", "margin_it", "gap_pt", "gap_it", "margin_far"):
                    assert row[name] == pytest.approx(margins[row["prompt_id"]][name], abs=1e-4)
    assert {row["event_id"].rpartition(":")[2] for row in store.events.to_pylist()} == set(PAIRS)
    assert len(set(store.events["event_id"].to_pylist())) == len(store)
    assert store.n_without_event == 10 - len(set(store.events["prompt_id"].to_pylist()))


def test_a_base_runs_once_for_all_its_pairs(several, lineup):
    """One sequence per prompt, the base's own continuation, up to the last of its partners' divergences."""
    store, (base,) = open_store(several / "store"), [reference.load(lineup["base"], torch.float32)]
    sequences = sequences_of(store)
    last: dict[str, int] = {}
    first: dict[str, int] = {}
    for row in store.events.to_pylist():
        last[row["prompt_id"]] = max(last.get(row["prompt_id"], 0), row["position"])
        first[row["prompt_id"]] = row["position"] - row["step"]
    assert {name: [len(one) - 1 for one in several] for name, several in sequences.items()} == {
        name: [position] for name, position in last.items()
    }
    for name, (sequence,) in sequences.items():
        assert choices(base, sequence, first[name] + 1)[:-1] == sequence[first[name] + 1 :]
    assert len(store) > len(sequences)


@pytest.mark.slow
def test_cells_and_analyses_of_several_pairs(several, lineup, tmp_path):
    out = shutil.copytree(several, tmp_path / "run")
    assert main(["grid", str(out), "--strict"]) == 0
    run = actcache.Run(out)
    cells = run.cells.to_pylist()
    assert {row["readout"] for row in cells} == {"native", "common_base", "common_sft", "common_dpo"}
    for row in cells:
        if row["readout"] == "native" and row["upstream"] == row["late"] and row["late"] in row["pair"].split(","):
            role = ("pt", "it")[row["pair"].split(",").index(row["late"])]
            assert (row["margin"] < 0) == (role == "pt")
            assert row["top1_id"] == row[f"y_{role}"]
    groups = run.analyse("depth")["groups"]
    assert [(one["pair"], one["readout"]) for one in groups] == [("base,dpo", "common_dpo"), ("base,sft", "common_sft")]
    table = run.analyse("stability", dtype="float32")
    assert [one["n_changed"] for one in table["groups"]] == [0]
    assert pq.read_table(out / "stability.parquet").num_rows == len(run.store)
    assert main(["effects", str(out)]) == 0
    assert main(["report", str(out)]) == 0


@pytest.mark.slow
def test_several_pairs_resume_pack_and_are_given_again(several, lineup, prompts, tmp_path):
    store = open_store(several / "store")
    packed = of_pairs(lineup, prompts, tmp_path / "packed", *PAIRS, more=())
    assert rows_of(packed) == rows_of(store)
    grown = of_pairs(lineup, prompts, tmp_path / "run", *PAIRS, more=("--strict", "--shard-prompts", 4, "--limit", 4))
    grown = of_pairs(lineup, prompts, tmp_path / "run", *PAIRS, more=("--strict", "--shard-prompts", 4))
    assert (
        read_tree(tmp_path / "run/store").items()
        >= {
            name: data for name, data in read_tree(several / "store").items() if name.startswith("segments/shard")
        }.items()
    )
    again = of_pairs(
        lineup, prompts, tmp_path / "again", *PAIRS, more=("--strict", "--support=fixed", f"--events={several}")
    )
    assert rows_of(again) == rows_of(store)
    assert again.excluded.num_rows == 0
    assert bits(again.states("far", 3)[0]) == bits(grown.states("far", 3)[0])


@pytest.mark.slow
def test_rollouts_of_several_pairs(lineup, prompts, tmp_path):
    """Base, SFT and DPO each write once; what is on base's rollout is of both pairs."""
    more = ("--strict", "--support=rollouts", "--rollout-tokens=12")
    given = ["capture", *(f"--checkpoint={label}={folder}" for label, folder in lineup.items()), "--prompts", prompts]
    stores = []
    for name, pairs in (("both", PAIRS), ("sft", PAIRS[:1]), ("dpo", PAIRS[1:])):
        words = [*given, *(f"--pair={pair}" for pair in pairs), "--boundary", 3, "--out", tmp_path / name, *more]
        assert main([str(word) for word in words]) == 0
        stores.append(open_store(tmp_path / name / "store"))
    both, *alone = stores
    assert rows_of(both) == sorted(row for one in alone for row in rows_of(one))
    n_sequences = [sum(map(len, sequences_of(one).values())) for one in stores]
    assert n_sequences[0] < n_sequences[1] + n_sequences[2]


@pytest.mark.slow
def test_several_pairs_across_regimes(tmp_path):
    """Beyond 12 tokens all positions are computed otherwise: the pairs of one prompt may be of two sequences."""
    lineup = tiny.make_lineup(tmp_path, "phi3", LABELS[:3], eps=tiny.EPS / 8)
    prompts = tiny.write_prompts(tmp_path / "p.jsonl", 14)
    both = of_pairs(lineup, prompts, tmp_path / "both", *PAIRS)
    alone = [of_pairs(lineup, prompts, tmp_path / str(number), pair) for number, pair in enumerate(PAIRS)]
    assert rows_of(both) == sorted(row for one in alone for row in rows_of(one))
    lengths = [sorted(map(len, several)) for several in sequences_of(both).values()]
    assert any(len(several) == 2 and several[0] <= 12 < several[1] for several in lengths)
    assert main(["grid", str(tmp_path / "both"), "--strict"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["parted at once", "never parted", "another token"])
def test_what_a_search_gets_wrong_of_several_pairs_is_put_right(several, lineup, prompts, tmp_path, monkeypatch, how):
    told, called = search.propose, [0]

    def propose(*given, **more):
        proposals, called[0] = told(*given, **more), called[0] + 1
        for proposal in proposals if called[0] <= 2 else ():
            if how == "parted at once":
                proposal.shared, proposal.parted = proposal.shared[:1], [0 for _ in proposal.parted]
                proposal.outcome = search.Outcome.DIVERGED
            elif how == "never parted" and len(proposal.shared) > 1:
                proposal.outcome, proposal.parted = search.Outcome.OPEN, [None for _ in proposal.parted]
                proposal.shared = proposal.shared[:1]
            elif len(proposal.shared) > 2:
                proposal.shared[1] = 77
        return proposals

    monkeypatch.setattr(answers, "propose", propose)
    found = of_pairs(lineup, prompts, tmp_path / "run", *PAIRS, more=("--strict", "--shard-prompts", 64))
    assert called[0] > 2
    store = open_store(several / "store")
    assert rows_of(found) == rows_of(store)
    assert sorted(found.excluded["reason"].to_pylist()) == sorted(store.excluded["reason"].to_pylist())


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (("base,sft", "base,sft"), "the pair base,sft is given twice"),
        (("base,sft", "base,none"), "the pair is base,none, expected two different labels of base, sft, dpo, far"),
    ],
)
def test_pairs_that_are_none(lineup, prompts, tmp_path, capfd, pairs, said):
    given = ["capture", *(f"--checkpoint={label}={folder}" for label, folder in lineup.items()), "--prompts", prompts]
    given += [*(f"--pair={pair}" for pair in pairs), "--out", tmp_path / "run"]
    assert main([str(word) for word in given]) == 2
    assert said in capfd.readouterr().err


# ---- planted ----

VOCAB = tiny.VOCAB_SIZE


def following(token: int, n: int = 7) -> int:
    """A cycle through all tokens but the two special ones."""
    return 2 + (token - 2 + n) % (VOCAB - 2)


def planted(folder: Path, changed: dict[int, int], *, beyond: int = 0) -> Path:
    """A checkpoint that chooses ``following(t)`` after a token t, or what ``changed`` says; by its last token alone.

    With ``beyond``, its vocabulary has so many ids more than its tokenizer, and it likes the last of them best.
    """
    config = LlamaConfig(
        **{**tiny._COMMON, "hidden_size": 128, "vocab_size": VOCAB + beyond, "tie_word_embeddings": False},
        bos_token_id=None,
        eos_token_id=tiny.EOS_ID,
        pad_token_id=tiny.PAD_ID,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight", "embed_tokens.weight")):
                param.zero_()
        for token in range(VOCAB):
            model.get_input_embeddings().weight[token, token] = 1.0
            if token >= 2:
                model.lm_head.weight[changed.get(token, following(token)), token] = 1.0
        if beyond:
            model.lm_head.weight[-1] = 2.0
    model.save_pretrained(folder)
    tiny.write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("beyond", [0, 5])
def test_planted_disagreements_are_all_found_at_the_right_kinds(tmp_path, beyond):
    """The tuned checkpoint chooses otherwise after 24 tokens, so that every disagreement of every rollout is known."""
    changed = {token: following(token, 14) for token in range(3, 120, 5)}
    pair = planted(tmp_path / "pt", {}, beyond=beyond), planted(tmp_path / "it", changed, beyond=beyond)
    prompts = tiny.write_prompts(tmp_path / "p.jsonl")
    store = open_store(capture(pair, prompts, tmp_path / "run", "--rollout-tokens", 40) / "store")
    lineup = Lineup.open(dict(zip(("pt", "it"), pair, strict=True)))
    assert len(lineup.masked_ids) == beyond
    assert store.fingerprint.vocabulary == ("real tokens" if beyond else None)
    found, n_found = events_of(store), Counter()
    for line in map(json.loads, prompts.read_text().splitlines()):
        (ids,) = lineup.encode([Prompt(line["id"], line["prompt"])])
        own = found.get(line["id"], set())
        for writer, step_of in (("pt", {}), ("it", changed)):
            tokens = [ids[-1]]
            for _ in range(40):
                tokens.append(step_of.get(tokens[-1], following(tokens[-1])))
            disagreements = {
                (step, following(token), changed[token]) for step, token in enumerate(tokens) if token in changed
            }
            of_kind = {kind: {one[1:] for one in own if one[0] == kind} for kind in KINDS}
            at_horizons = {one for one in disagreements if one[0] in HORIZONS}
            assert of_kind[f"native_{writer}"] == at_horizons
            assert of_kind[f"{writer}_rollout"] <= disagreements - {min(disagreements, default=None)}
            n_found[writer] += len(disagreements)
            n_found[f"{writer}_rollout"] += len(of_kind[f"{writer}_rollout"])
            if writer == "pt":
                assert of_kind["first_divergence"] == {min(disagreements)}
                (before,) = of_kind["pre_divergence"] or {None}
                first = min(disagreements)
                assert (before is not None) == (first[0] >= 3)
                assert before is None or (before[0] <= first[0] - 2 and before[1:] == first[1:])
    assert n_found["pt"] > 100
    assert n_found["it"] > 100
    assert min(n_found["pt_rollout"], n_found["it_rollout"]) >= 12, "of 24: 8 of 40 steps are drawn, about 8 disagree"
    assert set(store.events["margin_pt"].to_pylist()) != {0.0}


@pytest.mark.slow
def test_ids_without_a_token_are_never_chosen(tmp_path):
    """The head likes an id beyond the tokenizer best: searches, forwards, replays and checks of stability go on."""
    pair = planted(tmp_path / "pt", {}, beyond=3), planted(tmp_path / "it", {50: 9}, beyond=3)
    prompts = tiny.write_prompts(tmp_path / "p.jsonl", 12)
    given = ["run", "--pt", pair[0], "--it", pair[1], "--prompts", prompts, "--out", tmp_path / "run", "--boundary", 3]
    assert main([str(word) for word in [*given, "--stability", "all"]]) == 0
    run = actcache.Run(tmp_path / "run")
    assert len(run.store) >= 6
    assert set(run.store.events["y_it"].to_pylist()) == {9}
    assert set(run.cells["top1_id"].to_pylist()) == {9, following(50)}
    groups = run.analyse("stability", sample="all")["groups"]
    assert all(group["n_changed"] == group["n_not_as_stored"] == 0 for group in groups)


def test_an_end_token_may_diverge_and_ends_a_rollout(tmp_path):
    """PT ends after token 50; IT does not: y_pt is the end token, and no prefix contains one."""
    start = 50 - 7 * 5
    pair = planted(tmp_path / "pt", {50: tiny.EOS_ID}), planted(tmp_path / "it", {})
    lineup = Lineup.open(dict(zip(("pt", "it"), pair, strict=True)))
    text = lineup.decode([start])
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "a", "prompt": text}) + "\n")
    (ids,) = lineup.encode([Prompt("a", text)])
    assert ids == [start]
    store = open_store(capture(pair, tmp_path / "p.jsonl", tmp_path / "run") / "store")
    found = events_of(store)["a"]
    assert ("first_divergence", 5, tiny.EOS_ID, 57) in found
    assert {step for kind, step, *_ in found if kind in CHOSEN_KINDS} == {5}
    assert all(tiny.EOS_ID not in sequence for sequence in sequences_of(store)["a"])
    assert [len(sequence) for sequence in sequences_of(store)["a"]] == [6], "IT's own rollout disagrees nowhere else"


# ---- the command line ----


def test_the_arguments_belong_together(pair, prompts, tmp_path, capfd):
    assert main([*words("capture", pair, prompts, tmp_path / "run"), "--max-new", "5"]) == 2
    assert "give --rollout-tokens instead" in capfd.readouterr().err
    given = [*map(str, ["capture", "--pt", pair[0], "--it", pair[1], "--prompts", prompts, "--out", tmp_path / "run"])]
    assert main([*given, "--rollout-tokens", "5"]) == 2
    assert "--rollout-tokens belongs to --support rollouts" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_from_python(pair, prompts, tmp_path):
    run = actcache.run(
        pt=pair[0],
        it=pair[1],
        prompts=prompts,
        out=tmp_path / "run",
        support="rollouts",
        rollout_tokens=8,
        limit=3,
        stability=0,
        quiet=True,
    )
    assert run.store.fingerprint.support == "rollouts"
    assert run.store.fingerprint.max_new == 9
    kinds = set(run.effects["kind"].to_pylist())
    assert {"first_divergence", "it_rollout", "native_pt"} <= kinds
    assert main(words("capture", pair, prompts, tmp_path / "run")) == 2, "a store of other rollouts"
