"""Forwards that depend on their company or on a cache: what each path makes of a sequence is what it gives alone."""

from __future__ import annotations

import functools
import itertools
import json
from unittest import mock

import families
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from twins import reference

import actcache
from actcache.capture.decode import Decoding
from actcache.capture.forward import Resident
from actcache.capture.residency import AllResident
from actcache.capture.search import Outcome, SearchLimits, propose
from actcache.cli import main, stages
from actcache.errors import InputError
from actcache.models.backbone import Backbone
from actcache.models.checkpoint import Checkpoint
from actcache.models.regimes import ONE_REGIME, Regimes
from actcache.replay.edits import Add, Edit, Variant
from actcache.replay.late_stack import LateStack
from actcache.study.decisions import check_stability

pytestmark = pytest.mark.slow

BOUNDARY, MAX_NEW = 3, 8
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
# What is random and tiny, and begins to look at more than the tokens up to a position at LIMIT.
MODELS = {
    "longrope": ("phi3", {}),
    "place in the row": ("llama4", {}),
    "dynamic NTK": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 40}),
}

limits = st.lists(st.integers(1, 20), max_size=3, unique=True).map(lambda found: tuple(sorted(found)))


# ---- the lengths ----


@given(limits, st.integers(1, 25), st.integers(0, 25))
def test_legs_are_the_lengths_of_one_regime_each(switches, first, more):
    regimes = Regimes(switches)
    legs = list(regimes.legs(first, first + more))
    assert [length for a, b in legs for length in range(a, b + 1)] == list(range(first, first + more + 1))
    assert all(regimes.of(a) == regimes.of(b) for a, b in legs)
    assert all(regimes.of(before[1]) < regimes.of(after[0]) for before, after in itertools.pairwise(legs))
    for length in range(1, 25):
        last = regimes.last(length)
        crossed = sum(length > switch for switch in switches)
        assert regimes.of(length) == crossed
        assert last == (switches[crossed] if crossed < len(switches) else None)


@given(limits, st.none() | st.integers(1, 20), st.lists(st.integers(1, 25), max_size=20), st.booleans())
def test_packs_are_of_one_regime_and_within_the_row(switches, longest_row, lengths, padded):
    regimes = Regimes(switches, longest_row)
    packs = regimes.packs(lengths, 30, padded=padded)
    assert [i for pack in packs for i in pack] == list(range(len(lengths)))
    for pack in packs:
        taken = [lengths[i] for i in pack]
        assert len({regimes.of(length) for length in taken}) == 1
        row = 1 if padded else sum(taken)
        assert len(taken) == 1 or regimes.in_row(row)


def test_regimes_are_read_off_the_config():
    def of(name, **form):
        fields = families._fields(families.CONFIG_MAPPING[name], form)
        return Regimes.of_config(families.CONFIG_MAPPING[name](**fields).get_text_config(decoder=True))

    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 9, **factors}
    assert of("phi3", rope_parameters=rope, original_max_position_embeddings=9) == Regimes((9,))
    assert of("phi3") == of("llama") == of("qwen3") == of("ministral3") == ONE_REGIME
    mscales = {"short_mscale": 1.0, "long_mscale": 1.5}
    assert of("phimoe", rope_parameters=rope | mscales) == Regimes((9,))
    assert of("llama4_text", floor_scale=100).longest_row == 99
    assert of("llama4_text", attn_temperature_tuning=False) == ONE_REGIME
    assert of("inkling_text", log_scaling_n_floor=50).longest_row == 50
    assert of("moshi").longest_cached == families.WINDOW
    by_kind = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": rope}
    assert of("gemma3_text", rope_parameters=by_kind).switches == (9,)
    both = Regimes.joined([Regimes((9, 20), 50), Regimes((9, 30), None, 7)])
    assert both == Regimes((9, 20, 30), 50, 7)


# ---- a run: every path beside plain forwards ----


@functools.cache
def decided(models, ids):
    """(step, y_pt, y_it) or the reason why there is no event, a full forward for each token."""
    sequence = list(ids)
    for step in range(MAX_NEW):
        with torch.no_grad():
            a, b = (int(model(torch.tensor([sequence]), use_cache=False).logits[0, -1].argmax()) for model in models)
        if a != b:
            return step, a, b
        if a == tiny.EOS_ID:
            return Outcome.ENDED.value
        sequence.append(a)
    return Outcome.NO_DIVERGENCE.value


def beginning(tokenizer, text, n_tokens):
    return next(text[:n] for n in range(len(text)) if len(tokenizer(text[:n])["input_ids"]) == n_tokens)


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """By model and numerics: a run over prompts on both sides of the limit, with a sweep, and its two checkpoints."""

    @functools.cache
    def pair(name):
        folder = tmp_path_factory.mktemp("regimes")
        arch, overrides = MODELS[name]
        paths = tiny.make_pair(folder, arch, eps=0.01, **overrides)
        tokenizer = Checkpoint.open("pt", paths[0]).tokenizer
        lengths = (4, tiny.LIMIT + 9, tiny.LIMIT, tiny.LIMIT - 2, tiny.LIMIT + 14, tiny.LIMIT, 2, tiny.LIMIT - 1)
        texts = [beginning(tokenizer, " ".join(tiny.PROMPTS[i:]), n) for i, n in enumerate(lengths)]
        lines = [{"id": f"p{i:02}", "prompt": text} for i, text in enumerate(texts)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "sweep.toml").write_text(
            '[[variants]]\nname="half"\n[[variants.edits]]\nedit="interpolate"\ndonor="it"\nweight=0.5\n'
            '[[variants]]\nname="third"\n[[variants.edits]]\nedit="interpolate"\ndonor="it"\nweight=0.3\n'
        )
        models = [reference.remember(reference.load(path, torch.float32)) for path in paths]
        return paths, dict(zip(("pt", "it"), models, strict=True)), lines

    @functools.cache
    def make(name, *flags):
        (pt, it), models, lines = pair(name)
        run = pt.parent / "-".join(("run", *flags))
        given = ["--pt", pt, "--it", it, "--prompts", pt.parent / "prompts.jsonl", "--out", run, "--max-new", MAX_NEW]
        given += ["--sweep", pt.parent / "sweep.toml", "--boundary", BOUNDARY, "--stability", "0"]
        with mock.patch.object(stages, "write_report"):
            assert main(["run", *map(str, given), "--scope", "prefix,position", *flags]) == 0
        return run, models, lines

    return make


FLAGS = pytest.mark.parametrize("flags", [(), ("--strict",)], ids=["packed", "strict"])


@FLAGS
@pytest.mark.parametrize("name", MODELS)
def test_a_capture_decides_and_stores_what_each_sequence_gives_alone(captured, name, flags):
    run, models, lines = captured(name, *flags)
    store = actcache.open_store(run / "store")
    tokenizer = Checkpoint.open("pt", json.loads((run / "run.json").read_text())["checkpoints"]["pt"]).tokenizer
    got = {event["prompt_id"]: (event["step"], event["y_pt"], event["y_it"]) for event in store.events.to_pylist()}
    got |= {line["prompt_id"]: line["reason"] for line in store.excluded.to_pylist()}
    ids = {line["id"]: tokenizer(line["prompt"])["input_ids"] for line in lines}
    assert got == {name: decided(tuple(models.values()), tuple(of_prompt)) for name, of_prompt in ids.items()}
    limit, events = tiny.LIMIT, store.events.to_pylist()
    crossing = [event for event in events if event["position"] + 1 - event["step"] <= limit < event["position"] + 1]
    assert crossing, "else it says little"
    for event, (label, model) in itertools.product(range(len(store)), models.items()):
        sequence = store.token_ids([event])[0].tolist()
        states = store.states(label, BOUNDARY, [event])[0]
        torch.testing.assert_close(states, reference.states(model, sequence, BOUNDARY), rtol=1e-4, atol=1e-4)


@FLAGS
@pytest.mark.parametrize("name", MODELS)
def test_cells_are_what_hooked_forwards_give(captured, name, flags):
    run, models, _ = captured(name, *flags)
    store = actcache.open_store(run / "store")
    cells = pq.read_table(run / "cells.parquet").to_pylist()
    events = {event["event_id"]: number for number, event in enumerate(store.events.to_pylist())}
    heads = {label: reference.parts(model) for label, model in models.items()}
    states = {
        (label, number): reference.states(model, store.token_ids([number])[0].tolist(), BOUNDARY)
        for label, model in models.items()
        for number in events.values()
    }
    expected = {}
    for cell in cells:
        if cell["readout"] != "native":
            continue
        number, late = events[cell["event_id"]], cell["late"]
        upstream, own, it = (states[label, number] for label in (cell["upstream"], late, "it"))
        state = upstream.clone() if cell["scope"] == "prefix" else torch.cat([own[:-1], upstream[-1:]])
        weight = {"none": 0.0, "half": 0.5, "third": 0.3}[cell["variant"]]
        state[-1] += weight * (it[-1] - state[-1])
        key = number, late, state.numpy().tobytes()
        if key not in expected:
            ids = store.token_ids([number])[0].tolist()
            final = reference.overwritten(models[late], ids, BOUNDARY, state)[-1]
            with torch.no_grad():
                expected[key] = heads[late].head(heads[late].norm(final))
        logits = expected[key]
        margin = float(logits[cell["y_it"]] - logits[cell["y_pt"]])
        assert cell["margin"] == pytest.approx(margin, abs=2e-4), cell


@pytest.mark.parametrize("name", MODELS)
def test_stability_finds_what_was_captured(captured, name):
    run, _, _ = captured(name)
    paths = json.loads((run / "run.json").read_text())["checkpoints"]

    def load(label, dtype):
        return Backbone(Checkpoint.open(label, paths[label]).load(dtype))

    table = check_stability(actcache.open_store(run / "store"), load, ["float32"], max_tokens=4096)
    assert table["not_packable"].null_count == table.num_rows
    assert set(table["stable"].to_pylist()) == set(table["as_stored"].to_pylist()) == {True}


@pytest.mark.parametrize("name", ["longrope", "place in the row"])
def test_several_variants_of_long_and_short_sequences_are_what_hooks_give(tmp_path, name):
    """Long enough for packs in two steps; the variants share the earlier positions where they may."""
    arch, overrides = MODELS[name]
    model = reference.load(tiny.make_checkpoint(tmp_path, arch, **overrides), torch.float32)
    late = LateStack.load(model, BOUNDARY)
    assert late.mode == "packed"
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(late.width, generator=generator) for _ in range(2 * tiny.LIMIT)]
    variants = [Variant(f"v{i}", (Edit(Add(direction)),)) for i, direction in enumerate(directions)]
    for lengths in ((3, 5, 2, tiny.LIMIT), (4, 90, 5, tiny.LIMIT + 1, 70, 2), (90,)):
        ids = [torch.randint(2, tiny.VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]
        states = [reference.states(model, sequence, BOUNDARY) for sequence in ids]
        got = late.run_variants(torch.cat(states), [0, *itertools.accumulate(lengths)], variants)
        for number, (sequence, state) in enumerate(zip(ids, states, strict=True)):
            for variant in (0, 7, len(variants) - 1):
                edited = torch.cat([state[:-1], state[-1:] + directions[variant]])
                expected = reference.overwritten(model, sequence, BOUNDARY, edited)[-1]
                torch.testing.assert_close(got[number, variant], expected, rtol=1e-4, atol=2e-4)


def test_sequences_end_where_dynamic_angles_would_begin_to_follow_the_longest(tmp_path, capsys):
    """They would follow the longest one ever seen, too: here none is longer than the model's positions."""
    pt, it = tiny.make_pair(tmp_path, "llama", rope_parameters=DYNAMIC, max_position_embeddings=tiny.LIMIT)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"id": "long", "prompt": "seven days in the week " * 3}) + "\n")
    given = ["--pt", pt, "--it", it, "--prompts", prompts, "--out", tmp_path / "run"]
    assert main(["capture", *map(str, given)]) == 2
    assert f"the model has {tiny.LIMIT} positions" in capsys.readouterr().err
    late = LateStack.load(pt, BOUNDARY)
    with pytest.raises(InputError, match=f"the model has {tiny.LIMIT} positions"):
        late.run(torch.zeros(tiny.LIMIT + 1, late.width), [0, tiny.LIMIT + 1])


# ---- the search ----


DECODINGS = {
    **{"llama": Decoding.PADDED, "gemma3_text": Decoding.PADDED, "jamba": Decoding.PADDED, "bloom": Decoding.PADDED},
    **{"mamba": Decoding.EVEN, "falcon_mamba": Decoding.EVEN, "mbart": Decoding.EVEN, "deepseek_v32": Decoding.FULL},
    **{"minimax_m3_vl_text": Decoding.FULL, "recurrent_gemma": Decoding.FULL, "minimax": Decoding.FULL},
    **{"xlstm": Decoding.FULL, "roberta-prelayernorm": Decoding.FULL, "moshi": Decoding.FULL},
    **{
        "llama4_text": Decoding.PADDED,
        "mpt": Decoding.PADDED,
        "falcon_h1": Decoding.PADDED,
        "nemotron_h": Decoding.PADDED,
    },
}


@pytest.mark.parametrize("name", DECODINGS)
def test_a_search_finds_what_full_forwards_find(name):
    if name not in families.NAMES:
        pytest.skip("not in this transformers")
    backbones = [Backbone(families.build(name)) for _ in range(2)]
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():  # the second differs a little
        for parameter in backbones[1].decoder.parameters():
            std = parameter.std(correction=0)
            parameter.add_(0.01 * std * torch.randn(parameter.shape, generator=noise))
    residents = {label: Resident(one) for label, one in zip(("pt", "it"), backbones, strict=True)}
    decoding, reason, *_ = residents["pt"].decoding
    assert decoding is DECODINGS[name]
    assert (reason is None) == (decoding is Decoding.PADDED)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, families.VOCAB_SIZE, (n,), generator=generator).tolist() for n in (3, 9, 4, 9, 1, 6)]
    limits = SearchLimits(8, frozenset({2}), 64)
    found = propose(AllResident(residents), ("pt", "it"), prompts, [0] * len(prompts), limits)
    for prompt, proposal in zip(prompts, found, strict=True):
        sequence = list(prompt)
        for token in proposal.shared:
            assert chosen(backbones, sequence) == [token, token]
            sequence.append(token)
        a, b = chosen(backbones, sequence)
        assert (a != b) == (proposal.outcome is Outcome.DIVERGED)
    assert len({proposal.outcome for proposal in found}) > 1 or max(len(one.shared) for one in found) > 2


@torch.no_grad()
def chosen(backbones, sequence):
    ids = torch.tensor([sequence])
    return [
        int(backbone.readout.top2(backbone.forward([0, len(sequence)], input_ids=ids)[-1:])[0][0, 0])
        for backbone in backbones
    ]
