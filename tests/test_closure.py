"""Closure: components and controls against written-out ones, cells against hooks, and shifts of a known rank."""

from __future__ import annotations

import hashlib
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from twins import reference

import actcache
from actcache.analyses import find_analysis
from actcache.analyses.closure import Fit, is_training
from actcache.cli import main
from actcache.errors import InputError
from actcache.replay.operations import Inject, Rows
from actcache.replay.vectors import EventVectors

BOUNDARY = 3
EVENTS = [f"e{i}" for i in range(6)]


def rows_at(n, donors=None):
    """One row per event, each at position 3 of its sequence."""
    at = torch.arange(n)
    return Rows(at, torch.full((n,), 3), at, torch.full((n,), 4), EVENTS[:n], donors or {})


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- components and controls ----


def test_components_are_those_of_the_covariance():
    deltas = drawn(40, 8) @ drawn(8, 8, seed=1) + 3
    fit = Fit.of(deltas)
    assert torch.allclose(fit.mean, deltas.mean(dim=0))
    values, vectors = np.linalg.eigh(np.cov(deltas.numpy().T))
    for rank in (1, 3, 8):
        basis = vectors[:, np.argsort(values)[::-1][:rank]]
        found = fit.components[:rank].numpy()
        np.testing.assert_allclose(found.T @ found, basis @ basis.T, atol=1e-9)


def test_there_are_no_more_components_than_events_span():
    assert len(Fit.of(drawn(5, 8)).components) == 4
    assert len(Fit.of(drawn(1, 8)).components) == 0
    flat = drawn(20, 2) @ drawn(2, 8, seed=1)
    fit = Fit.of(flat)
    assert len(fit.components) == 2
    centred = flat - fit.mean
    assert torch.allclose(centred @ fit.components.T @ fit.components, centred)


def test_the_split_is_by_a_digest_of_the_prompt():
    assert is_training("a", 0.7) == (int(hashlib.sha256(b"exp48:a").hexdigest(), 16) < 0.7 * 2**256)
    names = [f"prompt {i}" for i in range(2000)]
    share = np.mean([is_training(name, 0.7) for name in names])
    assert share == pytest.approx(0.7, abs=0.03)
    assert all(is_training(name, 0.7) for name in names if is_training(name, 0.3))


@pytest.mark.parametrize("scale", [1.0, -1.0, 0.25])
def test_what_is_injected_is_the_reduced_difference(scale):
    deltas, rows = drawn(6, 8).float(), drawn(6, 8, seed=2).float()
    basis, mean = torch.linalg.qr(drawn(8, 3, seed=3))[0].T.float(), drawn(8, seed=4).float()
    expected = rows + scale * (mean + (deltas - mean) @ basis.T @ basis)
    by_donor = Inject(basis, mean, scale, "it")(rows, rows_at(6, {"it": rows + deltas}))
    given = EventVectors.of(deltas, EVENTS, "delta")
    by_delta = Inject(basis, mean, scale, None, given)(rows, rows_at(6))
    for found in (by_donor, by_delta):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    whole = Inject(None, None, scale, None, given)(rows, rows_at(6))
    torch.testing.assert_close(whole, rows + scale * deltas, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("direction", ["random", "in_span"])
def test_a_drawn_direction_is_as_long_as_what_it_stands_for(direction):
    deltas, rows = drawn(6, 8).float(), drawn(6, 8, seed=2).float()
    basis, mean = torch.linalg.qr(drawn(8, 3, seed=3))[0].T.float(), drawn(8, seed=4).float()
    at = rows_at(6, {"it": rows + deltas})
    found = Inject(basis, mean, 1.0, "it", None, direction, 5)(rows, at) - rows
    lengths = (mean + (deltas - mean) @ basis.T @ basis).norm(dim=1)
    torch.testing.assert_close(found.norm(dim=1), lengths, rtol=1e-4, atol=1e-4)
    inside = found @ basis.T @ basis
    assert torch.allclose(inside, found, atol=1e-4) == (direction == "in_span")
    again = Inject(basis, mean, 1.0, "it", None, direction, 5)(rows[2:3], at.chosen(torch.tensor([2]))) - rows[2:3]
    torch.testing.assert_close(again[0], found[2])  # whatever else is in the batch
    other = Inject(basis, mean, 1.0, "it", None, direction, 6)(rows, at) - rows
    assert not torch.allclose(other, found)


def test_what_cannot_be_injected_is_refused():
    basis, mean = torch.eye(8)[:3], torch.zeros(8)
    for given, said in (
        ((basis, mean), "either a donor or delta"),
        ((basis * 2, mean, 1.0, "it"), "not orthonormal"),
        ((basis, mean, float("nan"), "it"), "scale is float nan"),
        ((basis, mean, 1.0, "it", None, "up"), "direction is 'up'"),
        ((basis, None, 1.0, "it"), "basis and mean go together"),
        ((None, None, 1.0, "it", None, "in_span"), "a direction in the span needs both"),
    ):
        with pytest.raises(InputError, match=said):
            Inject(*given)
    still = Inject(basis, mean, 1.0, "it").may_stay(torch.ones(2, 8), rows_at(2, {"it": torch.ones(2, 8)}))
    assert still.tolist() == [True, True]


# ---- runs ----


@pytest.mark.slow
def test_cells_equal_hooked_forwards(tiny_run, tmp_path):
    run = tiny_run("llama", torch.float32, "--boundary", "2,3", "--stability", "0", "--limit", "12", "--strict")
    out = shutil.copytree(run.out, tmp_path / "run")
    found = actcache.Run(out).analyse("closure", boundaries="3", ranks="1,2", scales="0.5,1")
    table = pq.read_table(out / "closure.parquet").to_pylist()
    models = {label: reference.load(folder, torch.float32) for label, folder in (("pt", run.pt), ("it", run.it))}
    store = run.store
    events = store.events.to_pylist()
    ids = [store.token_ids([number])[0].tolist() for number in range(len(events))]
    states = {label: [reference.states(model, one, BOUNDARY) for one in ids] for label, model in models.items()}
    deltas = torch.stack([of_it[-1] - of_pt[-1] for of_pt, of_it in zip(states["pt"], states["it"], strict=True)])
    train = [number for number, event in enumerate(events) if is_training(event["prompt_id"], 0.7)]
    assert 0 < len(train) < len(events)
    mean = deltas[train].mean(dim=0)
    basis = torch.linalg.svd((deltas[train] - mean).double())[2].float()

    def margin(number, row):
        event, state = events[number], states["pt"][number].clone()
        state[-1] = row
        hidden = reference.overwritten(models["it"], ids[number], BOUNDARY, state)[-1]
        return reference.exact_margin(models["it"], hidden, event["y_pt"], event["y_it"])

    def reduced(number, rank):
        return mean + (deltas[number] - mean) @ basis[:rank].T @ basis[:rank]

    by = {(row["event_id"], row["what"], row["rank"], row["scale"]): row for row in table}
    for number, event in enumerate(events):
        own = states["pt"][number][-1]
        floor = margin(number, own)
        native = reference.readout(models["it"], reference.final_hidden(models["it"], ids[number])[-1])
        missing = float(native[event["y_it"]] - native[event["y_pt"]]) - floor
        for what, rank, scale, row in (
            ("injected", "full", 1.0, own + deltas[number]),
            ("injected", "full", 0.5, own + 0.5 * deltas[number]),
            ("injected", "2", 0.5, own + 0.5 * reduced(number, 2)),
            ("injected", "1", 1.0, own + reduced(number, 1)),
            ("flipped", "full", 1.0, own - deltas[number]),
            ("flipped", "2", 1.0, own - reduced(number, 2)),
            ("mean", "0", 1.0, own + mean),
        ):
            of = by[event["event_id"], what, rank, scale]
            assert of["missing"] == pytest.approx(missing, abs=1e-4)
            assert of["gain"] == pytest.approx(margin(number, row) - floor, abs=1e-4), (what, rank, scale)
            assert of["closure"] == pytest.approx(of["gain"] / of["missing"])
            assert of["trains"] == (number in train)
    held_out = [row for row in table if not row["trains"] and (row["what"], row["rank"]) == ("injected", "2")]
    (group,) = (one for one in found["groups"] if (one["what"], one["rank"], one["scale"]) == ("injected", "2", 1.0))
    rows = [row for row in held_out if row["scale"] == 1.0]
    assert group["n_events"] == len(rows) == len(events) - len(train)
    assert group["closure"]["mean"] == pytest.approx(np.mean([row["closure"] for row in rows]))
    ratio = np.mean([row["gain"] for row in rows]) / np.mean([row["missing"] for row in rows])
    assert group["closure_of_means"]["mean"] == pytest.approx(ratio)


def plant(folder, rank):
    """A pair whose states at the boundary differ by a shift of this rank alone, behind late blocks that read no earlier
    position."""
    pt, it = tiny.make_pair(folder, "llama", change="none")
    generator = torch.Generator().manual_seed(0)
    for place in (pt, it):
        weights = load_file(place / "model.safetensors")
        for block in range(BOUNDARY, tiny.N_BLOCKS):
            weights[f"model.layers.{block}.self_attn.o_proj.weight"].zero_()
        if place == it:
            down = weights[f"model.layers.{BOUNDARY - 1}.mlp.down_proj.weight"]
            n_out, n_in = down.shape
            into, out = (torch.randn(*shape, generator=generator) for shape in ((rank, n_in), (n_out, rank)))
            down += 0.5 * out @ into
        save_file(weights, place / "model.safetensors", {"format": "pt"})
    return pt, it


@pytest.mark.slow
def test_a_shift_of_low_rank_is_closed_at_its_rank(tmp_path):
    pt, it = plant(tmp_path, 2)
    words = ["run", "--pt", pt, "--it", it, "--prompts", tiny.write_prompts(tmp_path / "prompts.jsonl")]
    words += ["--out", tmp_path / "run", "--max-new", 24, "--stability", 0]
    assert main([str(word) for word in words]) == 0
    found = actcache.Run(tmp_path / "run").analyse("closure", ranks="1,2,16", scales="1")
    of = {(one["what"], one["rank"]): one for one in found["groups"]}
    assert ("injected", "16") not in of, "the shift spans two directions"
    for rank in ("2", "full"):
        assert of["injected", rank]["closure"]["mean"] == pytest.approx(1.0, abs=1e-3)
        assert of["injected", rank]["closure_of_means"]["mean"] == pytest.approx(1.0, abs=1e-3)
    assert abs(of["injected", "1"]["closure_of_means"]["mean"] - 1) > 0.05
    for control in ("flipped", "random", "shuffled"):
        assert of[control, "2"]["closure_of_means"]["mean"] < 0.7, control
    lines, bars = find_analysis("closure").section(found["groups"]).figures
    assert [[rank for rank, _ in line] for line in lines.lines.values()] == [[1.0, 2.0]]
    names = [name for name, _ in next(iter(bars.bars.values()))]
    assert {"full difference", "rank 2", "rank 2, random", "mean alone"} < set(names)
    assert "rank 1" not in names


@pytest.mark.slow
def test_equal_upstreams_leave_nothing_to_close(tiny_run, tmp_path):
    run = tiny_run("llama", torch.float32, "--strict", change="late")
    out = shutil.copytree(run.out, tmp_path / "run")
    groups = actcache.Run(out).analyse("closure", events="all")["groups"]
    assert groups
    for group in groups:
        assert group["gain"]["mean"] == pytest.approx(0, abs=1e-6)
        assert group["n_left_out"] == group["n_events"]
        assert group["closure"] == {"mean": None, "low": None, "high": None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ranks", "0,4"], "ranks '0,4': give a list of whole numbers from 1 on"),
        (["--scales", "0.5"], "scales '0.5': give a list of numbers other than 0, with 1"),
        (["--events", "test"], "events is 'test'; choose held_out, train, all"),
        (["--share", "1"], "share is 1.0; expected more than 0 and less than 1"),
        (["--boundary", "4"], "boundary 4 is not in the store"),
    ],
)
def test_what_cannot_be_is_refused(tiny_run, capfd, words, said):
    run = tiny_run("llama", torch.float32, "--boundary", "2,3", "--stability", "0", "--limit", "12", "--strict")
    assert main(["closure", str(run.out), *words]) == 2
    err = capfd.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1
