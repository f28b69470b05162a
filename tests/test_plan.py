"""Plan: exact where configs and prompts decide, near the truth where a pilot tells, and one clear line otherwise."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from conftest import MAX_NEW
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

import actcache
from actcache.analyses import STEPS, whole
from actcache.analyses.features.before import Before
from actcache.analyses.features.cell_step import CellStep
from actcache.analyses.features.crosscoder import Crosscoder, crosscoder_folder
from actcache.capture.corpus import CONTEXT
from actcache.capture.counter import SearchCounter
from actcache.capture.forward import Resident
from actcache.capture.given import given_by
from actcache.capture.residency import AllResident
from actcache.capture.search import SearchLimits, propose
from actcache.capture.settings import CaptureSettings
from actcache.cli import main, stages
from actcache.models.backbone import Backbone
from actcache.models.checkpoint import Checkpoint
from actcache.models.cost import ModelShape
from actcache.models.lineup import Lineup
from actcache.prompts import read_prompts
from actcache.replay.late_stack import LateStack
from actcache.sealed import json_bytes
from actcache.study import planned_cluster
from actcache.study.capture_job import CaptureJob
from actcache.study.cells import finished_cells
from actcache.study.finished import _shared_counts, replays_of, settings_of, truth
from actcache.study.plan import Study, default_assumptions, estimate, shapes_of
from actcache.study.planned_store import PlannedStore
from actcache.study.run import Run
from actcache.study.run_folder import RunFolder
from actcache.study.work import CaptureWork, Places, ReplayWork, total

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
MADE = ("llama", "qwen3", "gemma2", "gemma3", "olmo2", "gpt2", "mistral")
COUNTS = ("tokens", "rows", "raw_bytes", "stored_bytes")
WORK = ("search_multiply_adds", "capture_multiply_adds", "grid_multiply_adds", "multiply_adds")


def mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        **{**tiny._COMMON, "vocab_size": tiny.VOCAB_SIZE, "num_local_experts": 6, "num_experts_per_tok": 2},
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=tiny.EOS_ID,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return MixtralForCausalLM(config).eval()


@pytest.fixture
def no_pages(monkeypatch):
    """Nobody looks at the pages of the runs that a test makes, which take as long as tiny runs do."""
    monkeypatch.setattr(stages, "write_report", lambda *args, **more: None)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Real models with weights, and the shape that their config alone gives."""
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for arch in MADE:
        path = tiny.make_checkpoint(folder / arch, arch)
        made[arch] = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval(), path
    mixtral().save_pretrained(folder / "mixtral")
    tiny.write_tokenizer(folder / "mixtral")
    made["mixtral"] = mixtral(), folder / "mixtral"
    return {
        arch: (model, ModelShape.of_checkpoint(Checkpoint.open(arch, path))) for arch, (model, path) in made.items()
    }


# ---- a checkpoint ----


@pytest.mark.parametrize("arch", [*MADE, "mixtral"])
def test_parameters_are_those_of_the_real_model(models, arch):
    model, shape = models[arch]
    assert shape.n_parameters == sum(p.numel() for p in model.parameters())
    assert shape == ModelShape.of_model(model)
    blocks = model.get_submodule("transformer.h" if arch == "gpt2" else "model.layers")
    assert list(shape.block_parameters) == [sum(p.numel() for p in block.parameters()) for block in blocks]
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    outside = shape.n_parameters - sum(shape.block_parameters) - shape.readout_parameters
    embedding = model.get_input_embeddings().weight.numel()
    assert outside == (0 if tied else embedding) + (40 * tiny.MAX_POSITIONS if arch == "gpt2" else 0)


@pytest.mark.parametrize("n_tokens", [1, 7])
@pytest.mark.parametrize("arch", [*MADE, "mixtral"])
def test_multiply_adds_are_those_that_torch_counts(models, arch, n_tokens):
    model, shape = models[arch]
    ids = torch.arange(2, 2 + n_tokens)[None]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    for index in range(shape.n_blocks):
        (counted,) = (
            value for name, value in flops.items() if name.endswith(f".{'h' if arch == 'gpt2' else 'layers'}.{index}")
        )
        # The eager attention multiplies every query with every key, and masks.
        assert counted == 2 * (n_tokens * shape.block_products[index] + n_tokens**2 * shape.pair_products)
    head = next(value for name, value in flops.items() if name.endswith("lm_head"))
    assert head == 2 * n_tokens * shape.head_products
    if n_tokens == 1:
        blocks = sum(
            value for name, value in flops.items() if name.split(".")[-1].isdecimal() and "experts" not in name
        )
        assert blocks == 2 * shape.products(np.array([1.0]))


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mistral"])
def test_attention_is_causal_and_within_windows(models, arch):
    _, shape = models[arch]
    windows = {"llama": [None] * 5, "mistral": [9] * 5, "gemma3": [6, 6, None, 6, None]}[arch]
    assert list(shape.windows) == windows
    lengths, first = [1, 4, 9, 23], 2
    pairs = [
        sum(1 for q in range(n) for k in range(q + 1) if window is None or q - k < window)
        for window in windows[first:]
        for n in lengths
    ]
    linear = sum(lengths) * sum(shape.block_products[first:])
    assert shape.products(np.array(lengths, float), first=first) == linear + sum(pairs) * shape.pair_products
    for n in lengths:  # token by token is the same as all at once
        steps = shape.step_products(np.arange(n, dtype=float), first=first)
        assert steps == pytest.approx(shape.products(np.array([n], float), first=first))


def test_a_token_goes_through_its_own_experts_only(models):
    _, shape = models["mixtral"]
    assert shape.active_experts == (2, 6)
    dense = models["llama"][1]
    own_mlp, router = 3 * 32 * 64, 6 * 32
    assert shape.block_products[0] == dense.block_products[0] + own_mlp + router


def test_experts_whose_number_the_config_does_not_tell():
    model = mixtral()
    model.config.__dict__["num_experts_per_tok"] = None  # its class refuses it
    with pytest.raises(
        actcache.errors.InputError, match="mixtral has experts, and its config has none of num_experts_"
    ):
        ModelShape.of_model(model)


# ---- the estimate ----


def test_every_row_against_a_loop_over_events(models):
    shape = models["gemma3"][1]
    capture = CaptureSettings((2, 3), max_new=8, shard_prompts=3, max_tokens=40)
    all_readouts = ("common_it", "common_pt", "native")
    work = [
        one
        for late in ("pt", "it")
        for one in (
            ReplayWork(2, late, ("prefix",), all_readouts),
            ReplayWork(3, late, ("position",), ("native",)),
            ReplayWork(3, late, ("position", "prefix"), ("native", "common_it"), n_last=5, n_whole=2),
            ReplayWork(4, late, ("prefix",), ("common_pt",), n_last=3, top1=True, kl=True),
            ReplayWork(4, late, ("position",), ("native",), n_last=3, n_whole=1, mode="single"),
        )
    ]
    lengths = [9, 4, 30, 12, 7]
    study = Study({"pt": shape, "it": shape}, lengths, capture, work)
    found = estimate(study, default_assumptions(capture))  # all prompts give an event, after 7 = max_new - 1 tokens
    blocks = range(shape.n_blocks)

    def token(seen: int, first: int = 0) -> float:
        return sum(
            shape.block_products[b] + shape.pair_products * min(seen + 1, shape.windows[b] or seen + 1)
            for b in blocks[first:]
        )

    def sequence(n: int, first: int = 0) -> float:
        return sum(token(seen, first) for seen in range(n))

    head = shape.vocab_size * shape.width
    padded = [9, 9, 9, 12, 30]  # segments share batches, in which 3 x 9, 1 x 12 and 1 x 30 fit into 40 tokens
    search = sum(2 * (sequence(n) + head + sum(token(n + step) + head for step in range(7))) for n in padded)
    grid = variants = 0.0
    for n in (length + 7 for length in lengths):
        whole, last = sequence(n, 3), token(n - 1, 3)
        grid += 2 * 2 * head  # stored final states, by either head
        grid += 4 * sequence(n, 2) + 4 * 2 * head  # native is one of the two
        grid += 2 * whole + 2 * last + (2 + 2) * head  # own rows twice, and the other's last row in each
        grid += 4 * whole + 2 * last + 3 * (2 + 1) * head  # behind IT, native is common_it
        variants += 5 * (4 + 2) * last + 2 * (4 + 2) * whole
        grid += 4 * (sequence(n, 4) + 2 * head)  # and what each is compared with
        variants += 3 * 4 * (token(n - 1, 4) + head)  # best tokens too
        grid += (2 + 2) * (sequence(n, 4) + head)  # not packed: nothing is shared
        variants += (3 + 1) * (2 + 2) * sequence(n, 4)
    captured = sum(2 * (sequence(n + 7) + 8 * head) for n in lengths)
    hooked = sum(
        (2 + 2 + 2 + 4 + 42 + 2 + 12 + 2 + 16) * (sequence(n + 7) + head)
        + 2 * (sequence(n) + head + sum(token(n + step) + head for step in range(7)))
        for n in lengths
    )
    assert found["grid_multiply_adds"] == pytest.approx(grid)
    assert found["variants_multiply_adds"] == pytest.approx(variants)
    assert found["capture_multiply_adds"] == pytest.approx(captured)
    # Windows bend the growth of attention with every step, which the estimate takes as straight.
    assert found["search_multiply_adds"] == pytest.approx(search, rel=1e-3)
    assert found["hooks_multiply_adds"] == pytest.approx(hooked, rel=1e-3)
    assert found["multiply_adds"] == pytest.approx(search + captured + grid + variants, rel=1e-3)
    assert found["tokens"] == sum(lengths) + 5 * 7
    assert found["rows"] == found["tokens"] * 2 * 2
    assert found["raw_bytes"] == found["rows"] * 32 * 4


@pytest.mark.parametrize("mode", ["packed", "padded", "single"])
def test_replays_are_counted_by_sequence_place_and_event(models, mode):
    """Four events on the first sequence, two of them at one place, and one on the second."""
    shape = models["llama"][1]
    lengths, sequences = [5, 9, 9, 12, 7], [0, 0, 0, 0, 1]
    scored = Places.of(lengths, sequences)
    assert [scored.sequences.tolist(), scored.places.tolist()] == [[12, 7], [5, 9, 12, 7]]
    how = {"n_last": 5, "tails": (2, 6), "n_whole": 3, "n_apart": 2, "mode": mode}
    work = ReplayWork(3, "it", ("position", "prefix"), ("native",), **how)

    def blocks(tokens: list[float]) -> float:
        return shape.products(np.array(tokens, float), first=3)

    head, step = shape.head_products, shape.step_products(np.array(lengths, float) - 1, first=3)
    replay = blocks([5, 9, 12, 7]) if mode == "single" else blocks([12, 7])
    last = {"packed": step, "padded": blocks(lengths), "single": blocks([5, 9, 12, 7])}[mode]
    before = [[max(0, length - n) for length in lengths] for n in (2, 6)]
    tails = sum(blocks(lengths) - blocks(of) for of in before) if mode == "packed" else 2 * last
    found = total([work.cost(shape, 2, scored)])
    assert found["grid"] == pytest.approx(2 * replay + last + (3 + 1) * 5 * head)
    assert found["variants"] == pytest.approx(3 * (5 * last + tails + replay + 2 * blocks(lengths)))
    n_passes = (3 - 1) + 10 * 3 + 1
    assert found["hooks"] == pytest.approx(n_passes * (shape.products(np.array(lengths, float)) + 5 * head))


def test_a_plan_of_rollouts_against_a_loop(models):
    shape = models["llama"][1]
    capture = CaptureSettings((3,), max_new=9, support="rollouts", shard_prompts=3)
    lengths = [9, 4, 30]
    work = [ReplayWork(3, late, ("prefix",), ("native",)) for late in ("pt", "it")]
    study = Study({"pt": shape, "it": shape}, lengths, capture, work)
    assumed = replace(default_assumptions(capture), sequences=2, events=4, places=3, place_tokens=2, last_tokens=5)
    found = estimate(study, assumed)
    assert found["events"] == 3 * 2 * 4
    assert found["tokens"] == 2 * sum(n + 8 for n in lengths)
    head = shape.head_products

    def whole(n: int, first: int = 0) -> float:
        return shape.products(np.array([n], float), first=first)

    assert found["capture_multiply_adds"] == pytest.approx(2 * 2 * sum(whole(n + 8) + 9 * head for n in lengths))
    grid = sum(2 * 2 * (2 * whole(n + 5, 3) + 4 * (2 + 1) * head) for n in lengths)
    assert found["grid_multiply_adds"] == pytest.approx(grid)


def test_searches_are_batched_as_the_search_does(models):
    rng = random.Random(0)
    lengths = [rng.randint(1, 60) for _ in range(50)]
    capture = CaptureSettings((1,), shard_prompts=8, max_tokens=100)
    batches = CaptureWork(lengths, capture).batches({"pt": models["llama"][1]})
    assert sum(n for _, n in batches) == len(lengths)
    assert all(n * longest <= 100 or n == 1 for longest, n in batches)


def test_the_counter_counts_what_a_search_runs(tmp_path):
    paths = tiny.make_pair(tmp_path, "gemma3", eps=0.01)
    lineup = Lineup.open(dict(zip(("pt", "it"), paths, strict=True)))
    counter, readers, shapes = SearchCounter(), {}, []
    for label, checkpoint in lineup.checkpoints.items():
        shapes.append(ModelShape.of_checkpoint(checkpoint))
        readers[label] = Resident(counter.watch(Backbone(checkpoint.load(torch.float32)), shapes[-1]))
    ids = lineup.checkpoints["pt"].tokenizer("In the morning the baker")["input_ids"]
    for reader in readers.values():
        _ = reader.decoding  # which decodes, too
    (proposal,) = propose(AllResident(readers), lineup.pair, [ids], [0], SearchLimits(MAX_NEW, lineup.end_ids, None))
    n_shared = len(proposal.shared)
    assert n_shared > 1
    n, steps = len(ids), next(end for end in (0, 1, 3, 7, 15) if end >= n_shared)  # of drafts of 1, 2, 4, 8 tokens
    one = shapes[0].products(np.array([n], float)) + shapes[0].step_products(np.arange(n, n + steps, dtype=float))
    assert counter.multiply_adds == 2 * (one + (steps + 1) * shapes[0].head_products)


# ---- beside a run ----


@pytest.fixture
def plan(capsys):
    """``plan(*arguments)``: the JSON that the verb prints."""

    def ask(*arguments):
        capsys.readouterr()
        assert main(["plan", *map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return ask


def of(run):
    return ["--pt", run.pt, "--it", run.it, "--prompts", run.prompts, "--max-new", MAX_NEW]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_with_a_runs_own_numbers_the_bytes_are_equal(tiny_run, plan, tmp_path, arch):
    run = tiny_run(arch, torch.float32)
    diverging = set(run.store.events["prompt_id"].to_pylist())
    lines = [line for line in run.prompts.read_text().splitlines() if json.loads(line)["id"] in diverging]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "run"
    prompts.write_text("\n".join(lines) + "\n")
    given = ["--pt", run.pt, "--it", run.it, "--prompts", prompts, "--max-new", MAX_NEW, "--boundary", "2,3"]
    shared = run.store.events["step"].to_numpy().mean()
    planned = plan(*given, "--shared-tokens", repr(float(shared)), "--rate", "1e9")
    assert main([str(word) for word in ["capture", *given, "--out", out]]) == 0
    summary = actcache.open_store(out / "store").summary()
    found = planned["estimate"]
    tokenizer = AutoTokenizer.from_pretrained(run.pt)
    texts = [json.loads(line)["prompt"] for line in lines]
    assert found["prompt_tokens"] == sum(len(ids) for ids in tokenizer(texts)["input_ids"])
    assert found["events"] == summary["events"]["total"] == len(lines)
    assert found["rows"] == summary["rows"]
    assert found["raw_bytes"] == summary["state_bytes"]["raw"]


@pytest.fixture(scope="module")
def piloted(tmp_path_factory):
    """A pair, many prompts, a run of the first 40, and a plan and then a run of all."""
    folder = tmp_path_factory.mktemp("piloted")
    pt, it = tiny.make_pair(folder, "llama")
    rng = random.Random(1)
    texts = [" ".join(pair) for pair in itertools.permutations(tiny.PROMPTS, 2)]
    prompts = folder / "prompts.jsonl"
    lines = [json.dumps({"id": f"p{i}", "prompt": text}) for i, text in enumerate(rng.sample(texts, 200))]
    prompts.write_text("\n".join(lines) + "\n")
    words = ["--pt", pt, "--it", it, "--prompts", prompts, "--max-new", MAX_NEW, "--boundary", "2,3"]
    words = [str(word) for word in words]
    pilot, out = str(folder / "pilot"), str(folder / "all")
    with mock.patch.object(stages, "write_report"):  # nobody looks at the pages
        assert main(["run", *words, "--out", pilot, "--limit", "40"]) == 0
        assert main(["plan", *words, "--pilot", pilot, "--out", out]) == 0
        assert main(["run", *words, "--out", out]) == 0
    return folder, words


def test_a_pilot_tells_the_whole_run_within_a_fifth(piloted, plan):
    folder, words = piloted
    found = plan(folder / "all")
    for name in ("prompts", "prompt_tokens", "events", *COUNTS, *WORK):
        assert found["ratio"][name] == pytest.approx(1, abs=0.2), name
    assert {"capture_s", "stability_s", "grid_s"} <= found["truth"].keys()
    assert found["estimate"] == plan(*words, "--pilot", folder / "pilot")["estimate"]
    truth, store = found["truth"], actcache.open_store(folder / "all" / "store")
    summary = store.summary()
    assert truth["rows"] == summary["rows"]
    assert [truth["raw_bytes"], truth["stored_bytes"]] == [summary["state_bytes"][key] for key in ("raw", "stored")]
    assert truth["tokens"] == len(store.token_ids()[0])


def test_a_run_without_a_plan_is_its_own(piloted, plan, capsys):
    folder, _ = piloted
    found = plan(folder / "pilot")
    assert found["assumed"]["sources"]["event_share"] == "the run itself"
    for name in (*COUNTS, *WORK):
        assert found["ratio"][name] == pytest.approx(1, abs=0.05), name
    for name in ("capture_s", "stability_s", "grid_s"):
        assert found["ratio"][name] == pytest.approx(1, abs=0.2), name
    assert main(["plan", str(folder / "pilot")]) == 0
    out = capsys.readouterr().out
    assert "2 x llama" in out
    assert " off" not in out


@pytest.mark.usefixtures("no_pages")
@pytest.mark.parametrize("support", ["rollouts", "pairs", "fixed"])
def test_runs_of_other_supports_are_their_own_plans(tmp_path, plan, support):
    """And a pilot of half of the prompts tells the whole within a fifth or so."""
    folders = tiny.make_lineup(tmp_path, "llama", ("base", "sft", "dpo"))
    prompts = tiny.write_prompts(tmp_path / "p.jsonl")
    words = [*(f"--checkpoint={label}={folder}" for label, folder in folders.items()), "--prompts", prompts]
    words += {
        "rollouts": ["--support=rollouts", "--rollout-tokens=16"],
        "pairs": ["--pair=base,sft", "--pair=base,dpo"],
    }.get(support, [])
    words += ["--boundary=2,3", "--dtype=float32"]
    pilot = tmp_path / "pilot"
    if support == "fixed":
        assert (
            main([*map(str, ["capture", *words, "--support=rollouts", "--out", tmp_path / "from", "--limit", 8])]) == 0
        )
        words += ["--support=fixed", "--events", tmp_path / "from"]
    assert main([*map(str, ["run", *words, "--out", pilot, *([] if support == "fixed" else ["--limit", 12])])]) == 0
    if support == "fixed":
        store = actcache.open_store(pilot / "store")
        lineup = Lineup.open(folders)
        shapes = {label: ModelShape.of_checkpoint(checkpoint) for label, checkpoint in lineup.checkpoints.items()}
        study = Study(shapes, [1], settings_of(store))
        took = truth(study, store, {}, finished_cells(pilot / "cells", store))
        assert took["tokens"] == sum(segment.record["n_tokens"] for segment in store.segments)
        given = given_by(store, lineup)
        job = CaptureJob("s", "one", settings_of(store), tuple(one.as_prompt() for one in given), given=tuple(given))
        assert took["capture_multiply_adds"] == pytest.approx(job.cost(shapes).parts["capture"])
        return
    found = plan(pilot)
    for name in ("events", *COUNTS, *WORK, "stability_multiply_adds"):
        assert found["ratio"][name] == pytest.approx(1, abs=0.1), name
    assert main([*map(str, ["run", *words, "--out", tmp_path / "all", "--stability=0"])]) == 0
    planned = plan(*words, "--stability=0", "--pilot", pilot)["estimate"]
    truly = plan(tmp_path / "all")["truth"]
    for name in ("events", *COUNTS, *WORK):
        assert planned[name] == pytest.approx(truly[name], rel=0.3), name


def test_how_long_searches_last_is_told_of_every_prompt():
    """The last one that is undecided keeps its batch going, so the mean of those without an event would not do."""
    reasons = ["no_divergence", "both_ended", "no_divergence", "position_limit"]
    store = SimpleNamespace(
        fingerprint=SimpleNamespace(max_new=8),
        excluded=pa.table({"reason": reasons}),
    )
    steps = np.array([0, 2, 2])
    assert _shared_counts(store, steps, 4, (7 + 3 + 7 + 4) / 4) == [1, 0, 2, 0, 2, 0, 0, 2]
    store.excluded = store.excluded.slice(0, 1)
    assert _shared_counts(store, steps, 1, 7.0) == [1, 0, 2, 0, 0, 0, 0, 1]


def test_what_is_far_off_is_marked(piloted, tmp_path, capsys):
    folder, _ = piloted
    out = shutil.copytree(folder / "all", tmp_path / "run")
    saved, made_from, _ = RunFolder(out).read_plan()
    saved["assumed"]["shared_tokens"] = 100.0
    (out / "plan.json").write_bytes(json_bytes(saved, made_from))
    assert main(["plan", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("rows stored") and line.endswith(" off") for line in lines)
    assert not any(line.startswith("their tokens") and line.endswith(" off") for line in lines)


@pytest.mark.usefixtures("no_pages")
def test_times_are_only_of_stages_that_ran_in_one_go(piloted, tmp_path, plan, capsys):
    folder, words = piloted
    out = shutil.copytree(folder / "pilot", tmp_path / "run")
    timings = RunFolder(out).timings()
    assert timings["capture"]["elapsed_s"] > timings["capture"]["load_s"] > 0
    again = ["run", *words, "--out", str(out), "--limit", "40", "--stability", "0"]
    assert main(again) == 0
    assert RunFolder(out).timings() == timings, "nothing was left to do"
    next((out / "cells").glob("b003*.parquet")).unlink()
    assert main(again) == 0
    assert RunFolder(out).timings() == {name: timings[name] for name in ("capture", "stability")}
    found = plan(out)
    assert "grid_s" not in found["truth"]
    assert found["untimed"] == {"grid": "scored in more than one go"}
    assert main(["plan", str(out)]) == 0
    assert capsys.readouterr().out.endswith("without a time: grid: scored in more than one go\n")
    (commit,) = (out / "store" / "commits").glob("shard*")
    commit.unlink()
    shutil.rmtree(out / "store" / "segments")
    assert main([*again, "--shard-prompts", "64"]) == 0
    assert RunFolder(out).timings().keys() >= {"capture"}, "all prompts anew: in one go again"


def test_stability_is_a_stage_of_its_own(piloted, tmp_path, plan):
    folder, words = piloted
    found, none = (plan(*words, "--rate", "1e9", *more)["estimate"] for more in ([], ["--stability", 0]))
    n_events, dtypes, ways = 16, 2, 2  # by default; strict and packed
    share = dtypes * ways * n_events / found["events"]
    assert found["stability_multiply_adds"] == pytest.approx(share * found["capture_multiply_adds"])
    assert found["stability_s"] == pytest.approx(found["stability_multiply_adds"] / 1e9)
    assert none["stability_multiply_adds"] == 0
    assert found["multiply_adds"] - none["multiply_adds"] == pytest.approx(found["stability_multiply_adds"])
    out = shutil.copytree(folder / "pilot", tmp_path / "run")
    before = plan(out)["truth"]
    n_checked = RunFolder(out).timings()["stability"]["n_events"]
    assert n_checked == [n_events, n_events]
    assert before["stability_multiply_adds"] == pytest.approx(
        ways * sum(n_checked) / before["events"] * before["capture_multiply_adds"]
    )
    # More events, checked later: what is there took two goes.
    assert main(["stability", str(out), "--sample", "20"]) == 0
    assert "stability" not in RunFolder(out).timings()
    assert "stability_s" not in plan(out)["truth"]


def test_a_run_of_other_cells_than_its_time_was_taken_of(piloted, tmp_path, plan):
    folder, _ = piloted
    out = shutil.copytree(folder / "pilot", tmp_path / "run")
    before = plan(out)
    assert main(["grid", str(out), "--scope", "position", "--boundary", "3"]) == 0
    found = plan(out)
    assert "grid_s" in before["truth"]
    assert "grid_s" not in found["truth"]
    assert found["truth"]["grid_multiply_adds"] > before["truth"]["grid_multiply_adds"]


SWEEP = """
boundaries = [3]
scopes = ["prefix", "position"]
readouts = ["native"]
top1 = true
[[variants]]
name = "towards"
edits = [{ edit = "interpolate", donor = "it", sweep = { weight = [0.25, 0.5] } }]
[[variants]]
name = "no-mlp"
edits = [{ edit = "replace", vector = "zeros", site = "mlp", layers = [3] }]
[[variants]]
name = "everywhere"
edits = [{ edit = "signed_permutation", seed = 1, positions = "all" }]
[[variants]]
name = "elsewhere"
boundaries = [2]
edits = [{ edit = "signed_permutation", seed = 1, positions = [0] }]
"""


@pytest.fixture
def sweep(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP)
    return path


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.usefixtures("no_pages")
def test_a_sweep_is_planned_from_its_file_and_known_from_what_it_left(piloted, sweep, tmp_path, plan, strict):
    _, words = piloted
    more = ["--sweep", sweep, *(["--strict"] if strict else [])]
    planned = plan(*words, "--limit", 12, *more, "--rate", "1e9")["estimate"]
    out = tmp_path / "run"
    words = [str(word) for word in [*words, "--limit", 12, "--out", out, "--stability", 0, *more]]
    assert main(["run", *words]) == 0
    store = actcache.open_store(out / "store")
    mode = "single" if strict else "packed"
    alike = {"n_last": 3, "n_whole": 1, "top1": True, "mode": mode}
    expected = [ReplayWork(3, late, ("position", "prefix"), ("native",), **alike) for late in ("it", "pt")]
    assert list(dict.fromkeys(one for one, _ in replays_of(finished_cells(out / "cells", store)))) == expected
    found = plan(out)
    for name in ("grid", "variants", "capture"):
        assert found["ratio"][f"{name}_multiply_adds"] == pytest.approx(1, abs=0.05), name
        # Planned without a pilot: 10 shared tokens, and an event of every prompt.
        assert planned[f"{name}_multiply_adds"] == pytest.approx(found["truth"][f"{name}_multiply_adds"], rel=0.5), name
    assert "grid_s" in found["truth"]
    share = found["truth"]["variants_multiply_adds"] / found["truth"]["grid_multiply_adds"]
    assert share > 3 if strict else share < 3, "variants at position p cost replays only where nothing is shared"


@pytest.fixture(scope="module")
def few(piloted):
    """The folder of a run of the first of these prompts."""
    folder, words = piloted
    with mock.patch.object(stages, "write_report"):
        assert main(["run", *words, "--out", str(folder / "few"), "--limit", "12", "--stability", "0"]) == 0
    return folder / "few"


@pytest.mark.parametrize("mode", ["packed", "padded", "single"])
def test_rows_that_go_through_a_late_block_are_those_planned(few, sweep, tmp_path, mode, monkeypatch):
    """Counted in the block itself."""
    out, counted, lates, load = shutil.copytree(few, tmp_path / "run"), [], [], LateStack.load
    shutil.rmtree(out / "cells")

    def watched(*args, **more):
        late = load(*args, **more)
        late.mode = mode
        late.blocks[0].register_forward_pre_hook(lambda module, args: counted.append(args[0].shape[:-1].numel()))
        lates.append(late)
        return late

    monkeypatch.setattr(LateStack, "load", watched)
    assert main(["grid", str(out), "--sweep", str(sweep)]) == 0
    store = actcache.open_store(out / "store")
    assert {one.mode for one, _ in replays_of(finished_cells(out / "cells", store))} == {mode}
    lengths = np.diff(store.token_ids()[1].numpy())
    if mode == "packed":
        # Of the cells' own rows and of every variant; where those share keys and values, the plain cell is one more.
        expected = sum(4 * (n + 1) + 2 + 6 * (3 + n) for n in lengths)
    elif mode == "single":
        expected = 6 * (1 + 3 + 1) * sum(lengths)
    else:
        packs = lates[0].packs(lengths.tolist())
        expected = 6 * (1 + 3 + 1) * sum(len(pack) * max(lengths[pack.start : pack.stop]) for pack in packs)
    assert sum(counted) == expected


def test_what_files_of_earlier_versions_took_is_not_known(piloted, tmp_path, plan):
    """They have no seal, so that nothing they say can be checked."""
    folder, _ = piloted
    out = shutil.copytree(folder / "pilot", tmp_path / "run")
    for path in list((out / "cells").glob("*.parquet")):
        pq.write_table(pq.read_table(path), path.with_name(f"{path.name.partition('.')[0]}.parquet"))
        path.unlink()
    found = plan(out)["truth"]
    assert not {"grid_multiply_adds", "variants_multiply_adds", "multiply_adds"} & found.keys()
    assert found["capture_multiply_adds"] > 0


# ---- every analysis ----


@pytest.mark.usefixtures("no_pages")
def test_every_analysis_is_planned_as_it_will_run(tmp_path, plan):
    """Before the capture: within a fifth of what its jobs cost when the cells of a grid are there."""
    folders = tiny.make_lineup(tmp_path, "llama", ("base", "sft", "dpo"))
    words = [*(f"--checkpoint={label}={folder}" for label, folder in folders.items()), "--pair=base,dpo"]
    words += ["--pair=base,sft", "--prompts", tiny.write_prompts(tmp_path / "p.jsonl"), "--shard-prompts=8"]
    words += ["--boundary=2,3", "--dtype=float32", "--rate=1e9", "--readout=native", "--study"]
    out = tmp_path / "run"
    assert main([*map(str, ["capture", *words[:-3], "--out", out])]) == 0
    assert main(["grid", str(out), "--readout=native"]) == 0  # what common readouts take is left to the analyses
    found = plan(*words, "--pilot", out)["study"]
    before = {one["name"]: one for one in found["analyses"]}
    run = Run(out)
    truly = whole.plan_study(run, also=[name for name, one in before.items() if one["opt_in"]])
    costs = whole.costs(truly, shapes_of(run.lineup))
    told = set()
    for one, (_, products) in zip(truly, costs, strict=True):
        name = one.analysis.name
        if one.jobs is None:  # checks of stability are no jobs that are known before
            assert name == "stability"
            assert before[name]["multiply_adds"] > 0
            continue
        assert "not_told" not in before[name], name
        assert before[name]["multiply_adds"] == pytest.approx(products, rel=0.2), name
        told |= {name} if products else set()
    assert before.keys() == {one.analysis.name for one in truly}
    assert {"depth", "supports", "controls", "closure", "map", "continuation", "forced"} <= told
    default = [one.get("multiply_adds", 0) for one in found["analyses"] if not one["opt_in"]]
    assert found["together"]["multiply_adds"] == sum(default) + sum(one["multiply_adds"] for one in found["stages"])
    check_steps(run, {one["name"]: one for one in found["steps"]}, found["features"])
    # What the states are, nobody knows before.
    store = PlannedStore.of(
        run.lineup,
        read_prompts(tmp_path / "p.jsonl"),
        [9] * 24,
        settings_of(run.store),
        default_assumptions(settings_of(run.store), 2),
    )
    assert len(store) == 24 * len(run.lineup.pairs)
    for read in (lambda: store.states("base", 2), lambda: store.excluded):
        with pytest.raises(actcache.errors.InputError, match="before"):
            read()


def check_steps(run, before, features):
    """The steps of features, beside what they cost once there are crosscoders, of as many features, and a ranking."""
    assert before.keys() == {"capture --corpus", *(named.name for named in STEPS["features"])}
    assert features == {"tokens": 2_000_000, "blocks": [2, 3, 4], "width": 32 * run.store.width}
    n, width, drawn = features["width"], run.store.width, torch.Generator().manual_seed(0)
    for block in features["blocks"]:
        encoder = torch.randn(2, width, n, generator=drawn)
        zeros = {"b_enc": torch.zeros(n), "b_dec": torch.zeros(2, width), "mean": torch.zeros(2, width)}
        one = Crosscoder(("base", "dpo"), block, encoder, decoder=encoder.permute(2, 0, 1), **zeros, threshold=1, k=2)
        one.save(crosscoder_folder(run.folder.features, block))
    for named in STEPS["features"]:
        step = named.load()
        if not isinstance(step, CellStep):
            continue
        assert "not_told" not in before[step.name], step.name
        work = step.work(run.folder, run.store, finished_cells(run.folder.cell_groups, run.store), step.options())
        work.pop(run.folder.cell_groups, None)  # of plain cells, which earlier analyses ask for
        parts = total(job.cost(shapes_of(run.lineup)) for jobs in work.values() for job in jobs)
        products = sum(of for part, of in parts.items() if part != "hooks")
        assert before[step.name]["multiply_adds"] == pytest.approx(products, rel=0.2), step.name
        if step.name == "features rank":
            run.analyse(step.name)
    texts = tuple((0,) * CONTEXT for _ in range(3))
    shapes = {label: shapes_of(run.lineup)[label] for label in ("base", "dpo")}
    told = Before(run.store, 3 * CONTEXT, n).corpus(shapes)
    assert (
        told.multiply_adds
        == CaptureJob("", "", replace(settings_of(run.store), support="corpus"), (), texts)
        .cost(shapes)
        .parts["capture"]
    )
    assert told.stored_bytes == 3 * CONTEXT * 3 * 2 * width * 4


def test_gpus_share_jobs_and_checkpoints(tiny_run, plan):
    words = [*of(tiny_run("llama", torch.float32)), "--rate=1e9", "--study", "--device=cuda", "--shard-prompts=8"]
    one, two, many = (plan(*words, "--gpus", n)["study"] for n in (1, 2, 64))
    for whole_of, half, least in zip(one["stages"], two["stages"], many["stages"], strict=True):
        assert whole_of["jobs"] == 3 * 2, "segments x late stacks, or checkpoints"
        assert half["time_s"] == pytest.approx(whole_of["time_s"] / 2)
        assert least["time_s"] == pytest.approx(whole_of["time_s"] / whole_of["jobs"])
        assert least["memory_bytes"] == half["memory_bytes"] < whole_of["memory_bytes"]
        assert {name: whole_of[name] for name in ("multiply_adds", "stored_bytes", "read_bytes")} == {
            name: least[name] for name in ("multiply_adds", "stored_bytes", "read_bytes")
        }
    told = [found for found in one["analyses"] if found.get("multiply_adds")]
    for found in told:
        (least,) = (other for other in many["analyses"] if other["name"] == found["name"])
        assert least["time_s"] == pytest.approx(found["time_s"] / found["jobs"])
    apart = plan(*words, "--gpus", 2, "--resident=one")
    assert [of_stage["memory_bytes"] for of_stage in apart["study"]["stages"]][-1] == apart["estimate"][
        "grid_memory_bytes"
    ]


def test_stages_are_planned_for_the_workers_of_a_cluster(tiny_run, plan, capsys):
    run = tiny_run("llama", torch.float32)
    words = [*of(run), "--device=cuda", "--shard-prompts=2", "--engine=ray"]
    told = plan(*words, "--rate=1e9", "--gpus=4")
    capture, grid = told["cluster"]["stages"]
    n_segments = -(-told["estimate"]["prompts"] // 2)
    assert grid["tasks"] == n_segments * 2
    assert n_segments >= capture["tasks"] >= min(n_segments, 4 * planned_cluster.ROUNDS)
    for stage in (capture, grid):
        alone_s = told["estimate"][f"{stage['name']}_s"]
        assert alone_s / 4 <= stage["time_s"] * (1 + 1e-9) <= alone_s
        assert stage["gpu_hours"] == pytest.approx(4 * stage["time_s"] / 3600)
        assert stage["busy"] == pytest.approx(alone_s / (4 * stage["time_s"]))
    assert capture["held_bytes"] == told["estimate"]["capture_memory_bytes"]
    assert grid["held_bytes"] < told["estimate"]["grid_memory_bytes"], "one late stack"
    assert capture["written_bytes"] == told["estimate"]["stored_bytes"]
    assert grid["read_bytes"] > 2 * told["estimate"]["stored_bytes"], "by the workers of each late stack, and weights"
    (alone,) = (plan(*words, "--rate=1e9")["cluster"]["stages"][1:],)
    assert alone[0]["time_s"] == pytest.approx(told["estimate"]["grid_s"])
    capsys.readouterr()
    assert main([*map(str, ["plan", *words, "--rate=1e9", "--gpus=4"])]) == 0
    assert "estimates for a Ray cluster with 4 workers, a GPU each" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tasks", "n", "busy"), [({"a": 400, "b": 400}, 8, 0.95), ({"a": 90_000, "b": 90_000}, 64, 0.99)], ids=str
)
def test_what_is_too_much_to_simulate_is_nearly_divided(tasks, n, busy):
    time_s = planned_cluster._simulated(tasks, 2.0, 5.0, n)
    assert busy <= 2.0 * sum(tasks.values()) / (n * time_s) <= 1


def test_what_a_stage_took_on_a_cluster_is_told(tiny_run, plan, tmp_path, capsys):
    run = tiny_run("llama", torch.float32)
    out = shutil.copytree(run.out, tmp_path / "run")
    taken = {"workers": 8, "gpus": 8, "tasks": 64, "elapsed_s": 90.0, "busy_s": 684.0, "requeued": 3}
    RunFolder(out).record_timing("grid on ray", taken)
    RunFolder(out).record_timing("grid", None)
    assert plan(out)["on_ray"] == {"grid on ray": taken}
    assert main(["plan", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "grid on ray: 64 tasks by 8 workers in 90.0 s, 95.0% of it busy, 0.2 GPU-hours, 3 requeued" in shown
    assert "grid: its workers' is told above" in shown


def test_large_pairs_are_planned_from_configs_that_a_script_writes(tmp_path, plan, capsys):
    spec = importlib.util.spec_from_file_location("make_plan_configs", SCRIPTS / "make_plan_configs.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main(["--out", str(tmp_path / "plans")]) == 0
    assert script.main(["--out", str(tmp_path / "plans")]) == 2
    assert not [path for path in (tmp_path / "plans").rglob("*") if path.suffix == ".safetensors"]
    prompts = tmp_path / "plans" / "prompts.jsonl"
    sizes = {"llama-8b": 8_030_261_248, "qwen-32b": 32_763_876_352}  # as their makers tell them
    for name, n_parameters in sizes.items():
        pair = tmp_path / "plans" / name
        words = ["--pt", pair / "pt", "--it", pair / "it", "--prompts", prompts, "--limit=3"]
        words += ["--device=cuda", "--rate=200TFLOP/s"]
        found = plan(*words, "--study", "--gpus=2")
        assert found["model"]["n_parameters"] == n_parameters
        capture = found["study"]["stages"][0]
        assert 2 * n_parameters < capture["memory_bytes"] < 1.2 * 2 * n_parameters, "one checkpoint in bfloat16 each"
    capsys.readouterr()
    assert main([*map(str, ["plan", *words, "--study", "--gpus=2"])]) == 0
    shown = capsys.readouterr().out
    assert "estimates for 2 GPUs, weights unread" in shown
    assert "features of blocks 61, 62, 63, one step after another: 163,840 of each" in shown
    assert "not in windows: no state is captured before early, mid: --boundary 38,0 serves all" in shown
    assert main([*map(str, ["capture", *words[:7], "--out", tmp_path / "run", "--device=cpu"])]) == 2, "no weights"


# ---- the command line ----


def test_no_weights_are_needed(tiny_run, plan, tmp_path):
    run = tiny_run("llama", torch.float32)
    expected = plan(*of(run), "--rate", "1e9")
    folders = {}
    for label, path in (("--pt", run.pt), ("--it", run.it)):
        folders[label] = shutil.copytree(path, tmp_path / label.strip("-"))
        (folders[label] / "model.safetensors").unlink()
    words = [word for item in folders.items() for word in item]
    found = plan(*words, "--prompts", run.prompts, "--max-new", MAX_NEW, "--rate", "1e9")
    assert found == expected


@pytest.mark.parametrize(("rate", "per_second"), [("1e9", 1e9), ("0.5TFLOP/s", 2.5e11), ("3 GFLOP/s", 1.5e9)])
def test_time_at_a_given_rate(tiny_run, plan, rate, per_second):
    found = plan(*of(tiny_run("llama", torch.float32)), "--rate", rate)["estimate"]
    assert found["grid_s"] == pytest.approx(found["grid_multiply_adds"] / per_second)
    work = found["search_multiply_adds"] + found["capture_multiply_adds"]
    assert found["capture_s"] == pytest.approx(work / per_second)


def test_a_rate_is_measured_where_none_is_given(tiny_run, plan, capsys):
    run = tiny_run("llama", torch.float32)
    assert min(plan(*of(run))["assumed"]["rates"].values()) > 1e6
    assert main(["plan", *map(str, of(run))]) == 0
    out = capsys.readouterr().out
    assert "measured here" in out
    times = [line for line in out.splitlines() if line.startswith("time: ") or line.endswith(" s")]
    assert len(times) == 3
    assert all(" >= " in line for line in times), "what operations take beside multiply-adds is not in it"


def test_more_of_everything_costs_more(tiny_run, plan):
    run = tiny_run("llama", torch.float32)
    one = plan(*of(run), "--rate", "1e9")["estimate"]
    every = plan(*of(run), "--rate", "1e9", "--boundary", "all", "--scope", "prefix,position", "--variants", 10)[
        "estimate"
    ]
    assert every["rows"] == 4 * one["rows"]
    assert every["search_multiply_adds"] == one["search_multiply_adds"]
    assert every["variants_multiply_adds"] > 0 == one["variants_multiply_adds"]
    native = plan(*of(run), "--rate", "1e9", "--readout", "native")["estimate"]
    assert native["grid_multiply_adds"] < one["grid_multiply_adds"]
    bare = plan(*of(run), "--rate", "1e9", "--rows", "divergence")["estimate"]
    assert bare["rows"] == bare["events"] * 2
    assert bare["grid_multiply_adds"] == 0


def test_a_gpu_is_planned_for_without_one(tiny_run, plan, monkeypatch):
    monkeypatch.setattr("actcache.study.work.share_threads", None)  # this machine's threads have no part in it
    found = plan(
        *of(tiny_run("llama", torch.float32)), "--device", "cuda", "--dtype", "bfloat16", "--rate", "300TFLOP/s"
    )
    assert found["estimate"]["raw_bytes"] == found["estimate"]["rows"] * 32 * 2


@pytest.fixture
def refused(capsys):
    def check(words, *arguments):
        capsys.readouterr()
        assert main(["plan", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line

    return check


def test_bad_input(tiny_run, refused, tmp_path):
    run = tiny_run("llama", torch.float32)
    refused("give --pt, --it, --prompts to plan a run, or the folder of a finished one")
    refused("give --it, --prompts to plan", "--pt", run.pt)
    bare = shutil.copytree(run.it, tmp_path / "bare")
    (bare / "config.json").unlink()
    refused("bare has no config.json", "--pt", run.pt, "--it", bare, "--prompts", run.prompts)
    refused("boundary 5 is outside 0..4", *of(run), "--boundary", "5")
    refused("scope 'suffix' is unknown; choose prefix or position", *of(run), "--scope", "prefix,suffix")
    refused("readout 'common_xx' is unknown", *of(run), "--readout", "common_xx")
    refused("-1 variants asked for", *of(run), "--variants", "-1")
    refused("no such file; give a sweep as .toml or .py", *of(run), "--sweep", tmp_path / "none.toml")
    refused("keeps no rows to replay: leave out --sweep", *of(run), "--rows", "divergence", "--variants", "3")
    refused("no such prompts file", *of(run)[:-3], tmp_path / "none.jsonl")
    refused("holds no run", tmp_path / "none")
    refused("holds no run", *of(run), "--pilot", tmp_path)
    refused("holds a run already", *of(run), "--out", run.out)
    refused("is not empty and holds no run", *of(run), "--out", tmp_path)
    refused("--gpus is of the work of a study", *of(run), "--gpus", "2")
    refused("--corpus-tokens is of the work of a study", *of(run), "--corpus-tokens", "9")
    refused("--gpus is a number of CUDA devices", *of(run), "--rate", "1e9", "--study", "--gpus", "2")
    refused("--study is planned before a run", run.out, "--study")
    refused("planned for first divergences", *of(run), "--rate", "1e9", "--study", "--rows", "divergence")


@pytest.mark.parametrize("rate", ["fast", "0", "3TB/s", "-1e9", "TFLOP/s"])
def test_rates_that_are_none(tiny_run, rate, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["plan", *map(str, of(tiny_run("llama", torch.float32))), f"--rate={rate}"])
    assert caught.value.code == 2
    assert "is not a number of multiply-adds per second" in capsys.readouterr().err


def test_pilots_that_tell_nothing(tiny_run, refused, tmp_path):
    run, other = tiny_run("llama", torch.float32), tiny_run("gpt2", torch.float32)
    refused("the pilot is of another pair: its pt is", *of(run), "--pilot", other.out)
    changed = tiny.make_pair(tmp_path, "llama", seed=7)
    words = ["--pt", changed[0], "--it", changed[1], "--prompts", run.prompts, "--max-new", MAX_NEW]
    refused("the pilot is of another pair: its pt is", *words, "--pilot", run.out)
    refused("made with max_new 24, the plan has 12", *of(run), "--max-new", "12", "--pilot", run.out)
    refused("made with dtype float32, the plan has bfloat16", *of(run), "--dtype", "bfloat16", "--pilot", run.out)


def test_a_pilot_whose_folders_were_moved_is_known_by_its_weights(tiny_run, plan, tmp_path):
    run = tiny_run("llama", torch.float32)
    moved = [shutil.copytree(path, tmp_path / path.name) for path in (run.pt, run.it)]
    words = ["--pt", moved[0], "--it", moved[1], "--prompts", run.prompts, "--max-new", MAX_NEW]
    # A rate is given, as one measured here differs from one time to the next where the run's own is off its record.
    given = ["--pilot", run.out, "--rate", "1e9"]
    assert plan(*words, *given)["assumed"] == plan(*of(run), *given)["assumed"]


def test_runs_that_cannot_be_put_beside(tiny_run, refused, tmp_path):
    run = tiny_run("llama", torch.float32)
    out = shutil.copytree(run.out, tmp_path / "run")
    other = tiny.write_prompts(tmp_path / "prompts.jsonl", 5)
    refused("no longer holds the prompts that", out, "--prompts", other)
    (out / "plan.json").write_text("{}")
    refused("plan.json is not a plan", out)
    prompts = run.store.fingerprint.prompts
    (out / "plan.json").write_bytes(json_bytes({"assumed": {"event_share": "half"}}, {"prompts": "others"}))
    refused("is a plan for other prompts", out)
    (out / "plan.json").write_bytes(json_bytes({"assumed": {"event_share": "half"}}, {"prompts": prompts}))
    refused("is not a plan", out)
    (out / "plan.json").unlink()
    (out / "timings.json").write_text("x")
    refused("timings.json is not timings", out)
    wide = tiny.make_pair(tmp_path / "wide", "qwen3")
    refused("the checkpoints have width 40", out, "--pt", wide[0], "--it", wide[1])


def test_a_pilot_without_an_event(tmp_path, refused):
    pt, it = tiny.make_pair(tmp_path, "llama", change="none")
    prompts = tiny.write_prompts(tmp_path / "prompts.jsonl", 4)
    words = ["--pt", pt, "--it", it, "--prompts", prompts, "--max-new", 4]
    assert main([str(word) for word in ["capture", *words, "--out", tmp_path / "run"]]) == 0
    refused("holds 0 events and 4 prompts without one", *words, "--pilot", tmp_path / "run")


def test_planning_leaves_a_folder_that_a_run_begins_in(tiny_run, plan, tmp_path):
    run = tiny_run("llama", torch.float32)
    out = tmp_path / "run"
    plan(*of(run), "--rate", "1e9", "--out", out)
    assert [path.name for path in out.iterdir()] == ["plan.json"]
    plan(*of(run), "--rate", "2e9", "--out", out)  # planned again
    assert main([str(word) for word in ["capture", *of(run), "--out", out]]) == 0
    found = plan(out)
    assert found["assumed"]["rates"]["grid"] == 2e9
    assert found["assumed"]["sources"]["shared_tokens"] == "default"
    assert "grid_multiply_adds" not in found["truth"], "not scored yet"
