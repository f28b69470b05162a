"""Runs that were killed: the same command goes on and ends in the same bytes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pyarrow.parquet as pq
import pytest
import tiny
import torch
from conftest import MAX_NEW
from forked import Process
from safetensors.torch import load_file, save_file

import actcache
from actcache.analyses import grid
from actcache.cli import main, stages
from actcache.errors import CheckError
from actcache.files import write_atomically
from actcache.models.checkpoint import Checkpoint
from actcache.replay.late_stack import LateStack

pytestmark = pytest.mark.slow


def command(pair, prompts, out, *more):
    words = ["run", "--pt", *pair[:1], "--it", *pair[1:], "--prompts", prompts, "--out", out, "--shard-prompts", 4]
    return [str(word) for word in [*words, "--max-new", MAX_NEW, "--boundary", "2,3", *more]]


# Where the checks of rounding are not looked at; `whole` has them.
NO_CHECKS = ("--stability", "0")
NO_PAGE = mock.patch.object(stages, "write_report")


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    # Four segments: one can be killed behind any of three.
    pair, prompts = tiny.make_pair(folder, "llama"), tiny.write_prompts(folder / "prompts.jsonl", 16)
    assert main(command(pair, prompts, folder / "run")) == 0
    return pair, prompts, folder / "run"


@pytest.mark.parametrize("after_segments", [0, 1, 3])
def test_a_killed_capture_goes_on_to_the_same_bytes(whole, tmp_path, after_segments):
    pair, prompts, reference = whole
    out = tmp_path / "run"
    child = Process(
        [sys.executable, "-m", "actcache.cli", *command(pair, prompts, out, *NO_CHECKS)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    commits = out / "store" / "commits"
    while child.poll() is None and len(list(commits.glob("*.json"))) < after_segments:
        time.sleep(0.002)
    if after_segments == 0:
        while child.poll() is None and not commits.exists():
            time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    survived = {name: data for name, data in bytes_below(out / "store").items() if name.startswith("commits/shard")}
    with NO_PAGE:
        assert main(command(pair, prompts, out, *NO_CHECKS)) == 0
    assert bytes_below(out / "store") == bytes_below(reference / "store")
    for name, data in survived.items():
        assert (out / "store" / name).read_bytes() == data, "a committed segment was changed"
    assert pq.read_table(out / "cells.parquet").equals(pq.read_table(reference / "cells.parquet"))
    assert (out / "effects.json").read_bytes() == (reference / "effects.json").read_bytes()


def test_a_finished_run_loads_no_weights(whole, monkeypatch):
    pair, prompts, out = whole
    before = bytes_below(out)

    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("actcache.models.checkpoint.load_weights", refuse)
    monkeypatch.setattr(LateStack, "load", refuse)
    assert main(command(pair, prompts, out)) == 0
    assert bytes_below(out) == before


def test_a_grid_goes_on_group_by_group(whole, tmp_path, monkeypatch):
    out = shutil.copytree(whole[2], tmp_path / "run")
    cells = pq.read_table(out / "cells.parquet")
    groups = sorted((out / "cells").glob("*.parquet"))
    for path in groups[1:4]:
        path.unlink()
    scored = []

    def write(path, data):
        scored.append(path)
        write_atomically(path, data)

    monkeypatch.setattr("actcache.study.results.write_atomically", write)
    assert main(["grid", str(out)]) == 0
    assert sorted(path for path in scored if path.suffix == ".parquet") == groups[1:4]
    assert pq.read_table(out / "cells.parquet").equals(cells)


def test_readouts_add_up_and_modes_replace(whole, tmp_path):
    out = shutil.copytree(whole[2], tmp_path / "run")
    cells = pq.read_table(out / "cells.parquet")
    shutil.rmtree(out / "cells")
    assert main(["grid", str(out), "--readout", "native"]) == 0
    assert pq.read_table(out / "cells.parquet").num_rows * 3 == cells.num_rows
    assert main(["grid", str(out), "--readout", "common_it,common_pt"]) == 0
    keys = [(name, "ascending") for name in ("event_id", "boundary", "upstream", "late", "readout")]
    assert pq.read_table(out / "cells.parquet").sort_by(keys).equals(cells.sort_by(keys))
    assert main(["grid", str(out), "--strict"]) == 0
    assert pq.read_table(out / "cells.parquet").num_rows == cells.num_rows, "strict cells stand in for packed ones"


def test_a_replay_that_is_not_a_no_op_stops_the_grid(whole, tmp_path, monkeypatch, capfd):
    out = shutil.copytree(whole[2], tmp_path / "run")
    shutil.rmtree(out / "cells")
    prepare = LateStack.prepare
    monkeypatch.setattr(
        LateStack, "prepare", lambda self, rows, *args, **more: prepare(self, rows * 1.01, *args, **more)
    )
    assert main(["grid", str(out)]) == 1
    assert "is not a no-op: event p00@" in capfd.readouterr().err
    assert not list((out / "cells").glob("*.parquet"))
    store = actcache.open_store(out / "store")
    settings = grid.GridSettings((3,))
    with pytest.raises(CheckError, match="off its native margin"):
        grid.run_grid(store, lambda label, b: LateStack.load(whole[0][label == "it"], b), tmp_path / "g", settings)


def test_stages_one_by_one_equal_run(whole, tmp_path, capsys):
    pair, prompts, reference = whole
    out = tmp_path / "run"
    words = command(pair, prompts, out)
    assert main(["capture", *words[1:]]) == 0
    assert not (out / "cells.parquet").exists()
    assert main(["grid", str(out)]) == 0
    capsys.readouterr()
    assert main(["effects", str(out), "--json"]) == 0
    printed = capsys.readouterr().out
    assert main(["effects", str(out / "cells.parquet"), "--json"]) == 0
    assert capsys.readouterr().out == printed
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    assert bytes_below(out / "store") == bytes_below(reference / "store")
    assert pq.read_table(out / "cells.parquet").equals(pq.read_table(reference / "cells.parquet"))
    assert json.loads(printed) == json.loads((reference / "effects.json").read_text())


def test_inspect_and_verify(whole, tmp_path, capsys):
    out = shutil.copytree(whole[2], tmp_path / "run")
    assert main(["inspect", str(out), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    store = actcache.open_store(out / "store")
    assert summary["events"]["total"] == len(store)
    assert summary["boundaries"] == [2, 3]
    assert main(["inspect", str(out / "store"), "--engine"]) == 0
    assert capsys.readouterr().out.startswith("cpu: ")
    assert main(["verify", str(out)]) == 0
    assert "every committed byte is as written" in capsys.readouterr().out
    victim = next((out / "store" / "segments").glob("*/states/pt/b002/c/0/0"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert main(["verify", str(out)]) == 1
    assert "states/pt/b002" in capsys.readouterr().out
    shutil.rmtree(out / "cells")
    assert main(["grid", str(out)]) == 1, "a corrupt store is a failed check, not bad input"
    assert "states/pt/b002" in capsys.readouterr().err


def test_a_compacted_run_is_scored_as_before(whole, tmp_path, capsys):
    """Each event once, though the groups of the merged segments still lie there; and nothing is captured again."""
    pair, prompts, reference = whole
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    assert main(["compact", str(run)]) == 0
    assert len(actcache.open_store(run / "store").segments) == 1
    with NO_PAGE:
        assert main(command(pair, prompts, run)) == 0
    assert len(actcache.open_store(run / "store").segments) == 1
    keys = ["event_id", "boundary", "upstream", "late", "readout"]
    order = [(key, "ascending") for key in keys]
    before, after = (pq.read_table(folder / "cells.parquet").sort_by(order) for folder in (reference, run))
    assert before.select(keys).equals(after.select(keys))
    margins = zip(before["margin"].to_pylist(), after["margin"].to_pylist(), strict=True)
    assert max(abs(a - b) for a, b in margins) < 1e-4
    assert main(["report", str(run)]) == 0


def test_the_grid_waits_for_every_part(whole, tmp_path, capfd):
    """A mean over the prompts of one part would pass for that of all."""
    pair, prompts, reference = whole
    words = command(pair, prompts, tmp_path / "run")[1:]
    assert main(["capture", *words, "--part", "1/2"]) == 0
    assert main(["grid", str(tmp_path / "run")]) == 2
    assert "give the capture command again until all are captured" in capfd.readouterr().err
    assert main(["capture", *words, "--part", "2/2"]) == 0
    assert main(["grid", str(tmp_path / "run")]) == 0
    cells = [pq.read_table(folder / "cells.parquet") for folder in (reference, tmp_path / "run")]
    assert cells[0].equals(cells[1])


def scale_norm(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= torch.linspace(0.5, 1.5, len(weights["model.norm.weight"]))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_a_head_that_is_not_the_captured_one_is_noticed(whole, tmp_path, capfd):
    pair, _, reference = whole
    out, changed = shutil.copytree(reference, tmp_path / "run"), shutil.copytree(pair[1], tmp_path / "it")
    shutil.rmtree(out / "cells")
    scale_norm(changed)
    assert main(["grid", str(out), "--it", str(changed)]) == 2
    assert "is not the one captured: its weights" in capfd.readouterr().err
    folders = {"pt": pair[0], "it": changed}
    store, settings = actcache.open_store(out / "store"), grid.GridSettings((3,))
    with pytest.raises(CheckError, match="the final norm and head of it are not those of the capture"):
        grid.run_grid(store, lambda label, b: LateStack.load(folders[label], b), tmp_path / "cells", settings)


def test_a_checkpoint_written_anew_between_the_stages_of_a_run_is_noticed(whole, tmp_path, monkeypatch, capfd):
    pair, prompts, _ = whole
    changed = shutil.copytree(pair[1], tmp_path / "it")
    monkeypatch.setattr("actcache.cli.stages.check_run", lambda *args: scale_norm(changed))
    assert main(command((pair[0], changed), prompts, tmp_path / "run")) == 2
    assert "is not the one captured: its weights" in capfd.readouterr().err


def test_a_checkpoint_written_anew_while_it_is_loaded_is_noticed(whole, tmp_path, monkeypatch, capfd):
    pair, _, reference = whole
    out, changed = shutil.copytree(reference, tmp_path / "run"), shutil.copytree(pair[1], tmp_path / "it")
    shutil.rmtree(out / "cells")
    load = LateStack.load

    def change_first(checkpoint: Checkpoint, *args: object, **more: object) -> LateStack:
        if checkpoint.path == changed:
            scale_norm(changed)
        return load(checkpoint, *args, **more)

    monkeypatch.setattr(LateStack, "load", change_first)
    assert main(["grid", str(out), "--it", str(changed)]) == 2
    assert "its files have changed since they were opened" in capfd.readouterr().err
