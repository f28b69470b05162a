"""Benches at a size of seconds, so that they cannot rot; their own equality checks run first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

BENCHES = Path(__file__).parent.parent / "benches"


@pytest.mark.parametrize("name", ["codec", "feed", "gather", "store"])
def test_a_bench_at_a_small_size(name):
    """Each compares what it times first, bit for bit, and exits otherwise."""
    ran = subprocess.run([sys.executable, BENCHES / f"bench_{name}.py", "--smoke"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    assert (result["bench"], result["cpus"] > 0) == (name, True)


def test_the_verb_runs_them_and_keeps_the_figures(tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "actcache.cli", "bench", "gather", "store", "--smoke", "--out", str(out)]
    ran = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert [result["bench"] for result in json.loads(out.read_text())] == ["gather", "store"]
    assert "TensorStore" in ran.stdout
    assert [*tmp_path.iterdir()] == [out]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_bench_run(tmp_path, arch):
    pt, it = tiny.make_pair(tmp_path, arch)
    prompts = tiny.write_prompts(tmp_path / "prompts.jsonl", 6)
    words = ["--pt", pt, "--it", it, "--prompts", prompts, "--max-new", 12]
    ran = subprocess.run([sys.executable, BENCHES / "bench_run.py", *map(str, words)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result["events"] > 0
    assert result["peak_bytes"]["late"] > 0
    assert "cells equal to the hooks'" in ran.stdout
