"""Stability against a slow twin: each event decided alone and in a pack by plain forwards, one position after another.

The twin shares the packed attention with the package, which has its own tests, and nothing else.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from transformers import AutoTokenizer
from twins import reference

import actcache
from actcache.analyses.effects import effects
from actcache.analyses.stability import describe, read_stability, run_stability, spread, summarise
from actcache.cli import main
from actcache.errors import InputError
from actcache.models.backbone import Backbone
from actcache.models.lineup import Lineup
from actcache.models.packing import offsets_of, packed_attention, plan_packs, restarting_positions
from actcache.progress import Tally
from actcache.study import decisions
from actcache.study.decisions import check_stability

pytestmark = pytest.mark.slow

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
DTYPES = {"float32": FLOAT32, "bfloat16": BFLOAT16}
LABELS = ("pt", "it")
MAX_TOKENS = 90  # a few packs of a few sequences each
FEW = ("--limit", "12")


def load(run):
    lineup = Lineup.open({"pt": run.pt, "it": run.it})
    return lambda label, dtype: Backbone(lineup.checkpoints[label].load(dtype))


def copied(run, tmp_path):
    return shutil.copytree(run.out, tmp_path / "run")


# ---- the slow twin ----


@functools.cache
def model_of(folder, dtype):
    return reference.load(folder, dtype)


def packed_hidden(model, sequences):
    """The last block's output of each sequence, from one forward over all of them."""
    bounds = offsets_of([len(ids) for ids in sequences]).tolist()
    seen = []
    handle = reference.parts(model).norm.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].clone()))
    try:
        with packed_attention(model.config, bounds), torch.no_grad():
            ids = torch.tensor([list(itertools.chain(*sequences))])
            model(input_ids=ids, position_ids=restarting_positions(bounds), use_cache=False)
    finally:
        handle.remove()
    return [seen[0][a:b] for a, b in itertools.pairwise(bounds)]


def choices(model, hidden, first):
    """(token, gap) at every position from ``first`` on."""
    found = []
    for position in range(first, len(hidden)):
        top = reference.readout(model, hidden[position]).topk(2)
        found.append((int(top.indices[0]), float(top.values[0] - top.values[1])))
    return found


def decision(ids, first, of):
    """Position and tokens at which the event is decided; ``of`` is label -> choices from ``first`` on."""
    for position in range(first, len(ids)):
        pair = tuple(of[label][position - first][0] for label in LABELS)
        if position == len(ids) - 1 or pair != (ids[position + 1],) * 2:
            return position, pair
    raise AssertionError


def difference(ids, first, strict, other):
    """(same, position, changed, gap) as the table has them."""
    mine, theirs = (decision(ids, first, of) for of in (strict, other))
    if mine == theirs:
        return True, None, None, None
    at = min(mine[0], theirs[0]) - first
    changed = [label for label in LABELS if strict[label][at][0] != other[label][at][0]]
    return False, at + first, ",".join(changed), max(strict[label][at][1] for label in changed)


def twin(run, dtype, indices, coarser=lambda hidden: hidden):
    """Rows of the table, for these events in one dtype; ``coarser`` is applied to what packs give."""
    store = run.store
    events = [store.events.slice(index, 1).to_pylist()[0] for index in indices]
    ids, offsets = store.token_ids(indices)
    sequences = [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    tokenizer = AutoTokenizer.from_pretrained(run.pt)
    text_of = {prompt["id"]: prompt["prompt"] for prompt in map(json.loads, run.prompts.read_text().splitlines())}
    firsts = [len(tokenizer(text_of[event["prompt_id"]])["input_ids"]) - 1 for event in events]
    models = {label: model_of(getattr(run, label), dtype) for label in LABELS}
    packed = {label: [] for label in LABELS}
    for label, model in models.items():
        for pack in plan_packs([len(sequence) for sequence in sequences], MAX_TOKENS):
            for index, hidden in zip(pack, packed_hidden(model, [sequences[i] for i in pack]), strict=True):
                hidden = coarser(hidden) if len(pack) > 1 else hidden
                packed[label].append(choices(model, hidden, firsts[index]))
    for number, (event, sequence, first) in enumerate(zip(events, sequences, firsts, strict=True)):
        alone = {label: choices(m, reference.final_hidden(m, sequence), first) for label, m in models.items()}
        in_pack = {label: packed[label][number] for label in LABELS}
        shared = [(token, None) for token in sequence[first + 1 :]]
        stored = {label: [*shared, (event[f"y_{label}"], None)] for label in LABELS}
        yield (
            event["event_id"],
            difference(sequence, first, alone, in_pack),
            difference(sequence, first, alone, stored),
        )


def assert_rows(table, dtype, expected):
    rows = [row for row in table.to_pylist() if row["dtype"] == dtype]
    for row, (event_id, packed, stored) in zip(rows, expected, strict=True):
        assert row["event_id"] == event_id
        for names, want in (
            (("stable", "position", "changed", "gap"), packed),
            (("as_stored", "position_vs_stored", "changed_vs_stored", "gap_vs_stored"), stored),
        ):
            *got, gap = (row[name] for name in names)
            assert tuple(got) == want[:3], row
            assert gap == (None if want[3] is None else pytest.approx(want[3], abs=1e-3)), row


def test_any_two_choices_are_compared_as_the_twin_compares_them():
    """With few tokens, everything happens: decisions before the end, differences after them, both checkpoints moved."""
    rng = np.random.default_rng(0)
    steps, prompts = rng.integers(0, 5, 3000), rng.integers(1, 4, 3000)
    sequences = [rng.integers(0, 2, step + prompt).tolist() for step, prompt in zip(steps, prompts, strict=True)]
    offsets = offsets_of([len(ids) for ids in sequences]).numpy()
    ids = torch.tensor(list(itertools.chain(*sequences)))
    compared = decisions._Compared(ids, offsets, steps, [LABELS] * len(steps), [LABELS] * len(steps))
    n_compared = int(compared.starts[-1])

    def any_choices():
        often = {label: np.where(rng.random(n_compared) < 0.7, compared.following(steps * 0), 1) for label in LABELS}
        return decisions._Choices(often, {label: rng.random(n_compared, np.float32) for label in LABELS})

    strict, other = any_choices(), any_choices()
    found = decisions._where_parted(compared, strict, other, ("same", "position", "changed", "gap"))
    for index, ids in enumerate(sequences):
        span = range(compared.starts[index], compared.starts[index + 1])
        first = int(prompts[index]) - 1
        mine, theirs = (
            {label: [(int(of.tokens[label][k]), float(of.gaps[label][k])) for k in span] for label in LABELS}
            for of in (strict, other)
        )
        assert tuple(column[index].as_py() for column in found.values()) == difference(ids, first, mine, theirs)


@pytest.mark.parametrize("stored_in", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "gpt2"])
def test_the_table_equals_the_slow_twin(tiny_run, arch, stored_in):
    run = tiny_run(arch, stored_in, *FEW, verb="capture")
    table = check_stability(run.store, load(run), list(DTYPES), max_tokens=MAX_TOKENS)
    assert table.num_rows == 2 * len(run.store)
    for dtype in DTYPES:
        assert_rows(table, dtype, twin(run, DTYPES[dtype], range(len(run.store))))
    events = run.store.events
    for name in ("event_id", "prompt_id", "gap_pt", "gap_it"):
        assert table[name].to_pylist() == 2 * events[name].to_pylist()
    float32 = summarise(table)[0]
    assert float32["n_changed"] == 0, "float32 rounding decides none of the tiny pairs' tokens"
    if stored_in == FLOAT32:
        assert float32["n_not_as_stored"] == 0
        assert summarise(table)[1]["n_not_as_stored"] > 0, "bfloat16 decides some of them otherwise"


def test_a_strict_store_is_as_stored(tiny_run):
    for dtype in DTYPES:
        run = tiny_run("gemma3", DTYPES[dtype], *FEW, "--strict", verb="capture")
        table = check_stability(run.store, load(run), [dtype], max_tokens=MAX_TOKENS)
        assert table["as_stored"].to_pylist() == [True] * len(run.store)


# ---- numerics that do depend on the batch's shape ----


def coarser(hidden):
    """What a state may lose to another order of summation, and more: three of the seven bits of its fraction."""
    return ((hidden.contiguous().view(torch.int16) + 4) & ~7).view(BFLOAT16)


@pytest.fixture
def shape_matters(monkeypatch):
    """Packs of several sequences round bfloat16 otherwise than a sequence alone."""
    forward = Backbone.forward

    def rounded(backbone, bounds, **inputs):
        hidden = forward(backbone, bounds, **inputs)
        return coarser(hidden) if len(bounds) > 2 and hidden.dtype == BFLOAT16 else hidden

    monkeypatch.setattr(Backbone, "forward", rounded)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "mistral"])
def test_what_the_shape_changes_is_found(tiny_run, arch, shape_matters):
    run = tiny_run(arch, FLOAT32, verb="run" if arch == "llama" else "capture")  # llama's run is there
    table = check_stability(run.store, load(run), list(DTYPES), max_tokens=MAX_TOKENS)
    assert_rows(table, "bfloat16", twin(run, BFLOAT16, range(len(run.store)), coarser))
    float32, bfloat16 = summarise(table)
    assert float32["n_changed"] == 0
    assert 0 < bfloat16["n_changed"] < len(run.store)
    assert bfloat16["gap_max"] < 0.5, "only near ties change"


def test_stable_only_leaves_out_exactly_those(tiny_run, tmp_path, shape_matters, capsys):
    out = copied(tiny_run("gemma2", BFLOAT16), tmp_path)
    before = (out / "cells.parquet").read_bytes()
    assert main(["stability", str(out), "--dtype", "bfloat16", "--max-tokens", str(MAX_TOKENS)]) == 0
    said = capsys.readouterr().out
    store, table = actcache.open_store(out / "store"), pq.read_table(out / "stability.parquet")
    rows = [row for row in table.to_pylist() if row["dtype"] == "bfloat16"]
    assert len(rows) == len(store)
    stay = [row["event_id"] for row in rows if row["stable"] and row["as_stored"]]
    assert 0 < len(stay) < len(rows)
    assert f"bfloat16: {[row['stable'] for row in rows].count(False)} of {len(rows)}, at gaps up to 0." in said

    assert main(["effects", str(out), "--stable-only", "--json"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result == json.loads((out / "effects-stable-only.json").read_text())
    assert "stable_only" not in json.loads((out / "effects.json").read_text())
    n_unstable = len(rows) - len(stay)
    assert f"events left out: {n_unstable} ({n_unstable} not stable)" in said.err
    assert (result["stable_only"], result["n_unstable"], result["n_left_out"]) == (True, n_unstable, n_unstable)
    cells = pq.read_table(out / "cells.parquet")
    expected = effects(cells.filter(pa.array([event in stay for event in cells["event_id"].to_pylist()])))
    assert result["groups"] == expected["groups"]
    assert {group["n_events"] for group in result["groups"]} == {len(stay)}
    assert (out / "cells.parquet").read_bytes() == before, "the cells stay complete"

    assert main(["report", str(out), "--stable-only"]) == 0
    page = (out / "report.html").read_text()
    assert f"{n_unstable} more events are left out" in page
    assert "Events that rounding would change" in page
    assert main(["report", str(out)]) == 0
    assert "more events are left out" not in (out / "report.html").read_text()


def test_a_run_over_stable_events_only(tiny_run, tmp_path, shape_matters, capsys):
    """A strict capture whose events packs would change, as a pack's rounding is not the states' own."""
    words = [*tiny_run("gemma2", BFLOAT16).arguments(), "--strict"]
    words[words.index("--out") + 1] = str(tmp_path / "run")
    assert main([*words, "--stable-only"]) == 0
    said, n_events = capsys.readouterr(), len(actcache.open_store(tmp_path / "run" / "store"))
    result = json.loads((tmp_path / "run" / "effects-stable-only.json").read_text())
    assert f"{result['n_unstable']} more events are left out" in (tmp_path / "run" / "report.html").read_text()
    everything = json.loads((tmp_path / "run" / "effects.json").read_text())
    assert {group["n_events"] for group in everything["groups"]} == {n_events}
    counts = {summary["dtype"]: summary for summary in summarise(pq.read_table(tmp_path / "run" / "stability.parquet"))}
    assert counts["bfloat16"]["n_events"] == n_events, "the run's own dtype: all of them"
    assert counts["float32"]["n_events"] == 16, "the other one: a sample"
    assert result["n_unstable"] == counts["bfloat16"]["n_changed"] > 0
    assert f"events left out: {result['n_unstable']} ({result['n_unstable']} not stable)" in said.out
    assert f"bfloat16: {counts['bfloat16']['n_changed']} of {n_events}, at gaps" in said.err


# ---- the file, and what is not computed twice ----


def refuse(*args, **kwargs):
    raise AssertionError("weights were loaded")


def test_a_run_checks_a_sample_of_both_dtypes(tiny_run):
    run = tiny_run("llama", FLOAT32)
    table = read_stability(run.store, run.out / "stability.parquet")
    ids = run.store.events["event_id"].to_pylist()
    sample = [ids[index] for index in spread(len(ids), 16)]
    assert table["event_id"].to_pylist() == 2 * sample
    assert table["dtype"].to_pylist() == ["float32"] * 16 + ["bfloat16"] * 16
    whole = check_stability(
        run.store, load(run), ["float32"], max_tokens=run.store.fingerprint.max_tokens, events=spread(len(ids), 16)
    )
    assert whole.equals(table.slice(0, 16))
    assert "Events that rounding would change" in (run.out / "report.html").read_text()


def test_what_was_checked_is_not_checked_again(tiny_run, tmp_path, monkeypatch, capsys):
    run = tiny_run("llama", FLOAT32)
    out = copied(run, tmp_path)
    path = out / "stability.parquet"
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("actcache.models.checkpoint.load_weights", refuse)
        for sample in ("16", "5"):  # fewer are among them
            assert main(["stability", str(out), "--sample", sample]) == 0
            assert path.read_bytes() == before
            assert "float32: 0 of 16 events change between strict and packed" in capsys.readouterr().out
        with pytest.raises(AssertionError, match="weights were loaded"):
            main(["stability", str(out), "--sample", "17"])
        with pytest.raises(AssertionError, match="weights were loaded"):
            main(["stability", str(out), "--sample", "5", "--max-tokens", "100"])
    # One dtype on all events; the other one's rows stay.
    assert main(["stability", str(out), "--dtype", "bfloat16"]) == 0
    n_events = len(run.store)
    assert pq.read_table(path)["dtype"].to_pylist() == ["float32"] * 16 + ["bfloat16"] * n_events
    monkeypatch.setattr("actcache.models.checkpoint.load_weights", refuse)
    words = run.arguments()
    words[words.index("--out") + 1] = str(out)
    after = path.read_bytes()
    assert main(words) == 0, "a finished run loads nothing"
    assert path.read_bytes() == after


def test_a_table_of_other_events_is_made_anew(tiny_run, tmp_path):
    out = copied(tiny_run("llama", FLOAT32), tmp_path)
    other = tiny_run("llama", BFLOAT16, *FEW, verb="capture")
    assert read_stability(other.store, out / "stability.parquet").num_rows == 0
    table = run_stability(other.store, load(other), out / "stability.parquet", {"bfloat16": 3}, max_tokens=99)
    assert table["dtype"].to_pylist() == ["bfloat16"] * 3
    assert read_stability(other.store, out / "stability.parquet").equals(table)


def test_a_check_that_is_killed_goes_on_after_the_last_dtype(tiny_run, tmp_path):
    run, path = tiny_run("llama", FLOAT32), tmp_path / "stability.parquet"
    loaded = []

    def killed(label, dtype):
        loaded.append(dtype)
        if dtype == BFLOAT16 and loaded.count(dtype) == 2:
            raise KeyboardInterrupt
        return load(run)(label, dtype)

    asked = dict.fromkeys(DTYPES, 3)
    with pytest.raises(KeyboardInterrupt):
        run_stability(run.store, killed, path, asked, max_tokens=99)
    assert read_stability(run.store, path)["dtype"].to_pylist() == ["float32"] * 3
    table = run_stability(run.store, killed, path, asked, max_tokens=99)
    assert loaded == [FLOAT32, FLOAT32, *[BFLOAT16] * 4]
    assert table.equals(run_stability(run.store, load(run), tmp_path / "whole.parquet", asked, max_tokens=99))
    assert path.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_no_table_where_none_is_asked(tiny_run):
    run = tiny_run("llama", FLOAT32, "--stability", "0", "--limit", "3")
    assert not (run.out / "stability.parquet").exists()
    assert "Events that rounding would change" not in (run.out / "report.html").read_text()


def test_one_model_is_in_memory_at_a_time(tiny_run):
    run = tiny_run("llama", FLOAT32)
    loaded, alive = [], []

    def watched(label, dtype):
        assert all(backbone() is None for backbone in alive)
        backbone = load(run)(label, dtype)
        alive.append(weakref.ref(backbone))
        loaded.append((label, dtype))
        return backbone

    told = []
    tally = Tally(3 * 4 * 2, "decisions", told.append)
    check_stability(run.store, watched, list(DTYPES), max_tokens=99, events=[3, 1, 4], tally=tally)
    assert loaded == [("pt", FLOAT32), ("it", FLOAT32), ("pt", BFLOAT16), ("it", BFLOAT16)]
    assert (told[-1].done, told[-1].found) == (told[-1].total, 0)


def test_a_store_without_prefix_rows_is_enough(tiny_run, tmp_path, capsys):
    run = tiny_run("llama", FLOAT32)
    words = [*run.arguments("capture"), "--rows", "divergence", "--limit", "5"]
    words[words.index("--out") + 1] = str(tmp_path / "run")
    assert main(words) == 0
    assert main(["stability", str(tmp_path / "run")]) == 0
    assert "float32: 0 of 5 events change" in capsys.readouterr().out


def test_what_is_never_packed_cannot_change(tiny_run, tmp_path, monkeypatch, capsys, shape_matters):
    out = copied(tiny_run("llama", FLOAT32), tmp_path)
    monkeypatch.setattr(Backbone, "why_not_packable", lambda *args: "its attention knows no packs")
    (out / "stability.parquet").unlink()
    assert main(["stability", str(out)]) == 0
    said = capsys.readouterr()
    assert "packed is strict here, one sequence per forward: no event can change between them" in said.out
    assert "bfloat16: one sequence per forward: its attention knows no packs" in said.err
    table = pq.read_table(out / "stability.parquet")
    assert table["stable"].to_pylist() == [True] * table.num_rows
    assert set(table["not_packable"].to_pylist()) == {"its attention knows no packs"}
    assert main(["report", str(out)]) == 0
    assert "never packed" in (out / "report.html").read_text()


def test_without_events(tiny_run, capsys):
    run = tiny_run("llama", FLOAT32, "--limit", "6", change="none")
    capsys.readouterr()
    assert main(["stability", str(run.out)]) == 0
    assert capsys.readouterr().out == "no event to analyse\n"
    assert check_stability(run.store, refuse, ["float32"], max_tokens=99).num_rows == 0


# ---- what is refused ----


def test_stable_only_needs_every_event_checked(tiny_run, tmp_path, capsys):
    run = tiny_run("llama", FLOAT32)
    out = copied(run, tmp_path)
    n_events = len(run.store)
    advice = "to leave out the others, check all; 'actcache stability RUN --dtype float32' does"
    before = (out / "effects.json").read_bytes()
    for n_checked in (16, 0):
        assert main(["effects", str(out), "--stable-only"]) == 2
        said = capsys.readouterr().err
        assert f"{n_checked} of {n_events} events have been checked for stability in float32: {advice}" in said
        (out / "stability.parquet").unlink(missing_ok=True)
    assert main(["stability", str(out), "--dtype", "bfloat16"]) == 0
    assert main(["effects", str(out), "--stable-only"]) == 2, "the other dtype does not count"
    assert (out / "effects.json").read_bytes() == before
    assert main(["stability", str(out), "--dtype", "float32"]) == 0
    assert main(["effects", str(out), "--stable-only"]) == 0
    assert json.loads((out / "effects-stable-only.json").read_text())["n_unstable"] == 0
    assert (out / "effects.json").read_bytes() == before


def test_min_gap(tiny_run, tmp_path, capsys):
    run = tiny_run("llama", FLOAT32)
    out = copied(run, tmp_path)
    events = run.store.events
    smaller = sorted(map(min, zip(events["gap_pt"].to_pylist(), events["gap_it"].to_pylist(), strict=True)))
    assert main(["effects", str(out), "--min-gap", repr(smaller[5]), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["n_below_min_gap"], result["n_left_out"]) == (5, 5)
    assert {group["n_events"] for group in result["groups"]} == {len(run.store) - 5}
    assert main(["report", str(out)]) == 0
    for gap, said in (
        ("-1", "give a number of logits, from 0 on"),
        ("nan", "give a number"),
        ("99", "no event is left"),
    ):
        assert main(["effects", str(out), f"--min-gap={gap}"]) == 2
        assert said in capsys.readouterr().err


def test_a_table_of_cells_alone_is_not_enough(tiny_run, capsys):
    cells = str(tiny_run("llama", FLOAT32).out / "cells.parquet")
    for flags in (["--stable-only"], ["--min-gap", "0.1"]):
        assert main(["effects", cells, *flags]) == 2
        assert "--stable-only and --min-gap need the folder of a run" in capsys.readouterr().err


def test_bad_arguments(tiny_run, tmp_path, capsys):
    run = tiny_run("llama", FLOAT32)
    for words, said in (
        (["--dtype", "float16"], "dtype 'float16' is unknown; choose from float32, bfloat16"),
        (["--sample", "0"], "a sample of 0 events: give at least 1, or all"),
        (["--sample", "some"], "a sample of some events"),
        (["--sample", "float32=3,float16=all"], "has 'float16', of which --dtype float32,bfloat16 knows nothing"),
        (["--sample", "float32=3,7"], "has '7', of which --dtype float32,bfloat16 knows nothing"),
        (["--sample", "float32=3", "--dtype", "bfloat16"], "has 'float32', of which --dtype bfloat16 knows nothing"),
        (["--max-tokens", "0"], "0 tokens per pack: give at least 1"),
    ):
        capsys.readouterr()
        assert main(["stability", str(run.out), *words]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(InputError, match="dtype 'float16' is unknown; choose from float32, bfloat16"):
        check_stability(run.store, refuse, ["float16"], max_tokens=99)
    with pytest.raises(InputError, match="event 999 is not in the store"):
        check_stability(run.store, refuse, ["float32"], max_tokens=99, events=[999])
    with pytest.raises(InputError, match="a sample of 0 events: give at least 1, or all"):
        run_stability(run.store, refuse, tmp_path / "none.parquet", {"float32": 0}, max_tokens=99)
    capsys.readouterr()
    assert main(["stability", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    out = copied(run, tmp_path)
    other = tiny.make_pair(tmp_path, "llama", seed=5)[0]
    assert main(["stability", str(out), "--pt", str(other)]) == 2
    assert "is not the one captured: its weights is" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"", b"PAR1 and nothing else", None])
def test_a_file_that_is_no_such_table(tiny_run, tmp_path, capsys, damage):
    out = copied(tiny_run("llama", FLOAT32), tmp_path)
    path = out / "stability.parquet"
    if damage is None:
        shutil.copy(out / "cells.parquet", path)
    else:
        path.write_bytes(damage)
    assert main(["stability", str(out)]) == 2
    said = capsys.readouterr().err
    assert "stability.parquet is not a table of stability" in said
    assert "remove it" in said


# ---- small parts ----


def test_spread():
    assert spread(10, 10) == spread(10, 99) == list(range(10))
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 1) == [0]
    assert spread(0, 5) == []
    for n_events in range(1, 40):
        for n in range(1, n_events + 1):
            assert len(set(spread(n_events, n))) == n


def test_the_summary_in_words():
    row = {"n_events": 98, "not_packable": None}
    none = {"n_changed": 0, "gap_median": None, "gap_max": None}
    some = {"n_changed": 3, "gap_median": 0.0312, "gap_max": 0.0625}

    def against(n, median, largest):
        return {"n_not_as_stored": n, "gap_median_vs_stored": median, "gap_max_vs_stored": largest}

    summaries = [
        row | none | against(0, None, None) | {"dtype": "float32"},
        row | some | against(5, 0.11, 0.2) | {"dtype": "bfloat16"},
    ]
    assert describe(summaries) == [
        "float32: 0 of 98 events change between strict and packed; "
        "bfloat16: 3 of 98, at gaps up to 0.062 (median 0.031)",
        "float32: 0 of 98 events differ from the stored decision; bfloat16: 5 of 98, at gaps up to 0.2 (median 0.11)",
    ]
    assert describe([]) == []
