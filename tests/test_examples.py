"""The examples, run as a reader would run them; and the trainers that the buffer is made for."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import forked
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

import actcache
from actcache.cli import main
from actcache.store.feed import ActivationBuffer, RowFeed

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_train_crosscoder(tiny_run):
    pytest.importorskip("sae_lens", reason="SAELens is not installed; pip install 'actcache[examples]'")
    store = tiny_run("llama", torch.float32).out / "store"
    words = [store, "--steps", 200, "--latents", 64, "--k", 8, "--batch-rows", 32]
    ran = forked.run(
        [sys.executable, EXAMPLES / "train_crosscoder.py", *map(str, words)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"},
    )
    assert ran.returncode == 0, ran.stderr
    found = dict(re.findall(r"^  (loss|explained variance) +(\S+ -> \S+)$", ran.stdout, re.MULTILINE))
    loss, explained = (tuple(map(float, found[what].split(" -> "))) for what in ("loss", "explained variance"))
    assert loss[1] < loss[0] * 0.7  # the pair's weights are random: there is little to learn for rows held out
    assert explained[0] < explained[1] <= 1


def test_dictionary_learning_draws_from_the_buffer(tiny_run):
    reason = "dictionary-learning is not installed (its release wants an nnsight that is older than the benches')"
    training = pytest.importorskip("dictionary_learning.training", reason=reason)
    trainers = pytest.importorskip("dictionary_learning.trainers", reason=reason)
    run = tiny_run("llama", torch.float32)
    feed = RowFeed(run.store, labels=["it"], batch_rows=32, drop_last=True)
    width = run.store.width
    check = next(ActivationBuffer(RowFeed(run.store, labels=["it"], shuffle=False)))
    losses: list[float] = []
    for steps in (1, 100):
        config = {
            "trainer": trainers.TopKTrainer,
            "steps": steps,
            "activation_dim": width,
            "dict_size": 2 * width,
            "k": 8,
            "layer": feed.boundaries[0],
            "lm_name": "tiny",
            "warmup_steps": 0,
            "decay_start": None,
            "seed": 0,
            "device": "cpu",
        }
        folder = run.out / f"dictionary-{steps}"
        training.trainSAE(ActivationBuffer(feed), [config], steps=steps, save_dir=str(folder), device="cpu")
        dictionary = trainers.top_k.AutoEncoderTopK.from_pretrained(str(folder / "trainer_0" / "ae.pt"))
        losses.append((dictionary(check) - check).square().mean().item())
    assert losses[1] < losses[0] / 2


def test_the_example_sweep_over_the_demo_pair(tmp_path):
    """As its first line says, with fewer prompts."""
    demo = Path(actcache.__file__).parent / "demo"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join((demo / "prompts.jsonl").read_text().splitlines(keepends=True)[:4]))
    words = ["run", "--pt", demo / "pt", "--it", demo / "it", "--prompts", prompts, "--out", tmp_path / "run"]
    assert main([*map(str, words), "--max-new", "48", "--stability", "0"]) == 0
    assert main(["grid", str(tmp_path / "run"), "--sweep", str(EXAMPLES / "sweep.toml")]) == 0
    cells = pq.read_table(tmp_path / "run" / "cells.parquet")
    assert len(set(cells["variant"].to_pylist())) == 1 + 4 + 4 + 1
    assert set(cells["scope"].to_pylist()) == {"prefix", "position"}
    assert pc.all(pc.is_finite(cells["margin"])).as_py()
