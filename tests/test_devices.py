"""Checkpoints dealt to devices, and tensors copied between these."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import tiny
import torch
from engines import using
from pretended import Pretended

import actcache
from actcache.cli import main
from actcache.errors import CheckError, InputError
from actcache.models import fit, linear
from actcache.models.devices import check_copies, place
from actcache.models.lineup import Lineup

LABELS = ("a", "b", "c")


@pytest.mark.parametrize(
    ("given", "n_cuda", "kind", "devices"),
    [
        ("cpu", 0, "cpu", ["cpu", "cpu", "cpu"]),
        ("cuda", 2, "cuda", ["cuda", "cuda", "cuda"]),
        ("cuda:1", 2, "cuda", ["cuda:1", "cuda:1", "cuda:1"]),
        ("cuda:0,cuda:1", 2, "cuda", ["cuda:0", "cuda:1", "cuda:0"]),
        ("cuda:2, cuda:0", 3, "cuda", ["cuda:2", "cuda:0", "cuda:2"]),
        ("auto", 0, "cpu", ["cpu", "cpu", "cpu"]),
        ("auto", 2, "cuda", ["cuda:0", "cuda:1", "cuda:0"]),
        ("auto", 8, "cuda", ["cuda:0", "cuda:1", "cuda:2"]),
    ],
)
def test_checkpoints_are_dealt_in_order(given, n_cuda, kind, devices):
    placement = place(given, LABELS, lambda: n_cuda)
    assert placement.kind == kind
    assert [placement.of[label] for label in LABELS] == devices


@pytest.mark.parametrize(
    ("given", "n_cuda", "said"),
    [
        ("cuda", 0, "sees no CUDA device; use --device cpu"),
        ("cuda:2", 2, "sees 2 CUDA devices"),
        ("cuda:0,cuda:1,cuda:2,cuda:3", 8, "4 devices for 3 checkpoints"),
        ("cuda:0,cuda:0", 2, "cuda:0 is named twice"),
        ("cpu,cuda:0", 2, "devices of one kind"),
        ("tpu", 2, "'tpu' is no device"),
        ("cuda:", 2, "'cuda:' is no device"),
        ("", 2, "'' is no device"),
    ],
)
def test_what_is_no_placement_is_refused(given, n_cuda, said):
    with pytest.raises(InputError, match=said):
        place(given, LABELS, lambda: n_cuda)


def test_a_tensor_goes_there_and_back_between_each_pair():
    trips = []

    def copied(tensor, device):
        trips.append(device)
        return tensor.clone()

    check_copies(["x", "y", "z"], copied)
    assert len(trips) == 6 * 4
    assert {(trips[n], trips[n + 1]) for n in range(0, 24, 4)} == {(a, b) for a in "xyz" for b in "xyz" if a != b}
    check_copies(["cpu"])


def test_a_link_that_changes_values_is_named():
    def broken(tensor, device):
        out = tensor.clone()
        if device == "y":
            out[-1] += 1
        return out

    with pytest.raises(CheckError, match="from x to y and back came back with 1 of"):
        check_copies(["x", "y"], broken)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two CUDA devices")
def test_copies_between_real_devices():
    check_copies([f"cuda:{n}" for n in range(torch.cuda.device_count())])


def test_what_fits_is_in_memory_together_on_each_device(monkeypatch, tmp_path):
    pt, it = tiny.make_pair(tmp_path, "llama")
    lineup = Lineup.open({"pt": pt, "it": it})
    n_bytes = sum(weight.numel() for weight in lineup.checkpoints["pt"].skeleton.parameters()) * 4
    free: dict[str, float] = {}
    monkeypatch.setattr(fit, "free_bytes", free.__getitem__)
    said: list[str] = []

    def together(devices, resident="auto", **how):
        return fit.are_together(resident, lineup, "float32", devices, say=said.append, **how)

    one, two = {"pt": "a", "it": "a"}, {"pt": "a", "it": "b"}
    free |= {"a": 1.9 * n_bytes / fit.FOR_WEIGHTS, "b": 1.1 * n_bytes / fit.FOR_WEIGHTS}
    assert not together(one)
    assert "on a the weights of pt, it take" in said.pop()
    assert together(two)
    assert together(one, "all")
    assert not together(two, "one")
    assert together(one, first=lineup.n_blocks - 1)  # late stacks of one block each
    free["a"] = 1000.0
    assert not together(one, first=lineup.n_blocks - 1)
    assert f"blocks {lineup.n_blocks - 1} to {lineup.n_blocks - 1} of pt, it" in said.pop()


# ---- a pair on a list of devices ----


def placed_run(pair, prompts, out, devices):
    """A strict run, its late stacks and heads on these devices; what it gives."""
    words = ["run", *(f"--{label}={path}" for label, path in zip(("pt", "it"), pair, strict=True)), "--strict"]
    words += ["--prompts", str(prompts), "--out", str(out), "--device", devices, "--resident", "all"]
    words += [
        "--max-new",
        "6",
        "--boundary",
        "3,2",
        "--site",
        "mlp:1",
        "--stability",
        "2",
        "--scope",
        "prefix,position",
    ]
    assert main(words) == 0
    run = actcache.Run(out)
    states = {(label, b): run.store.states(label, b)[0] for label in ("pt", "it") for b in (2, 3)}
    return run, states, run.cells


@pytest.mark.slow
def test_a_pair_on_two_devices_gives_what_it_gives_on_one(tmp_path, monkeypatch):
    pair, prompts = tiny.make_pair(tmp_path, "llama"), tiny.write_prompts(tmp_path / "p.jsonl", 4)
    monkeypatch.setattr(
        linear, "_fastest_means", lambda: None
    )  # another means rounds otherwise, and is the CPU's alone
    plain, of_plain, cells = placed_run(pair, prompts, tmp_path / "plain", "cpu")
    streams = Mock()
    monkeypatch.setattr(torch.cuda, "current_stream", streams)
    monkeypatch.setattr(place, "__defaults__", (lambda: 2,))
    with using("torch"), Pretended() as pretended:
        with pytest.raises(RuntimeError, match="tensors on cuda"):
            torch.zeros(2, device="cuda:0") + torch.zeros(2, device="cuda:1")
        run, of_run, found = placed_run(pair, prompts, tmp_path / "placed", "cuda:0,cuda:1")
        for number, label in enumerate(("pt", "it")):
            late = actcache.Run(run.path, device="cuda:0,cuda:1").load_late(label, 3)
            assert late.device == late.readout.device == torch.device("cuda", number)
    assert len(plain.store) > 2
    assert run.store.events.equals(plain.store.events)
    assert all(torch.equal(of_run[key], of_plain[key]) for key in of_plain)
    assert found.equals(cells)
    assert pretended.products["cuda:0"] > 100
    assert pretended.products["cuda:1"] > 100
    assert not pretended.products["cpu"]
    assert {call.args[0] for call in streams.call_args_list} == {torch.device("cuda", 0), torch.device("cuda", 1)}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two CUDA devices")
def test_a_pair_on_two_real_devices_gives_what_it_gives_on_one(tmp_path):
    pair, prompts = tiny.make_pair(tmp_path, "llama"), tiny.write_prompts(tmp_path / "p.jsonl", 5)
    (one, of_one, cells), (two, of_two, found) = (
        placed_run(pair, prompts, tmp_path / devices, devices) for devices in ("cuda:0", "cuda:0,cuda:1")
    )
    assert len(one.store) > 2
    assert two.store.events.equals(one.store.events)
    assert all(torch.equal(of_two[key], of_one[key]) for key in of_one)
    assert found.equals(cells)
