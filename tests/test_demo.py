"""The shipped pair: small, really trained, and the demo says what it found."""

from __future__ import annotations

import json
import sys
from collections import Counter
from importlib.resources import files
from pathlib import Path

import forked
import pytest

import actcache
from actcache.cli import main

pytestmark = pytest.mark.slow

DEMO = Path(str(files("actcache") / "demo"))
SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    assert main(["demo", "--out", str(out)]) == 0
    return out


def test_the_pair_is_small_and_holds_no_code_and_no_pickles():
    held = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in held) <= 6_000_000
    assert {path.suffix for path in held} <= {".json", ".jsonl", ".safetensors"}


def test_most_prompts_diverge_and_not_at_once(run):
    store = actcache.open_store(run / "store")
    n_prompts = len((DEMO / "prompts.jsonl").read_text().splitlines())
    assert len(store) >= 0.7 * n_prompts
    assert len(set(store.events["step"].to_pylist())) >= 5


def test_the_interaction_is_not_zero(run):
    groups = json.loads((run / "effects.json").read_text())["groups"]
    (group,) = (group for group in groups if group["readout"] == "common_it")
    assert group["interaction"]["low"] > 0 or group["interaction"]["high"] < 0


def test_the_demo_ends_in_words(run, capsys):
    assert main(["demo", "--out", str(run)]) == 0
    said = capsys.readouterr().out
    for words in ("Asked:", "upstream PT", "late effect from IT upstream", "interaction", f"Report: {run}/report.html"):
        assert words in said


def smoked(script, out):
    """What a script of the demo makes in a few steps, and what it says of it."""
    made = forked.run([sys.executable, SCRIPTS / script, "--smoke", "--out", out])
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout.splitlines()[-1])


def test_the_training_script_makes_loadable_folders(tmp_path):
    out = tmp_path / "demo"
    smoked("train_demo_pair.py", out)
    words = ["--pt", out / "pt", "--it", out / "it", "--prompts", out / "prompts.jsonl", "--limit", 4, "--max-new", 8]
    assert main([str(word) for word in ["run", *words, "--out", tmp_path / "run"]]) == 0


def test_the_lineage_is_of_the_shipped_base(tmp_path):
    out = tmp_path / "lineage"
    said = smoked("train_demo_lineage.py", out)
    weights = {path.parent.name: path.read_bytes() for path in out.glob("*/model.safetensors")}
    labels = list(said["held_out_loss"])
    assert labels == ["base", "sft", "dpo", "math"]
    assert weights.keys() == set(labels)
    assert len(set(weights.values())) == 4
    assert weights["base"] == (DEMO / "pt" / "model.safetensors").read_bytes()
    prompts = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    counted = Counter(prompt["category"] for prompt in prompts)
    assert counted == dict.fromkeys(("question", "arithmetic", "instruction", "story"), 32)
    words = [word for label in labels for word in ("--checkpoint", f"{label}={out / label}")]
    words += ["--pair", "base,dpo", "--prompts", out / "prompts.jsonl", "--limit", 4, "--max-new", 8]
    assert main([str(word) for word in ["run", *words, "--out", tmp_path / "run"]]) == 0
    assert actcache.Run(tmp_path / "run").store.checkpoints == labels
