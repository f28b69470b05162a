"""Replay holds late blocks and readout, never the upstream weights: seen in the module tree and in the process."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys

import pytest
import tiny
import torch

from actcache.replay.late_stack import LateStack

pytestmark = pytest.mark.slow

# Each process has imported everything, and done nothing else, when it begins. What it is held against does all of the
# same with a checkpoint of next to no weights: code is read into memory when it first runs.
PEAK = """
import json, os, re, sys, torch
from pathlib import Path
from actcache.replay.late_stack import LateStack
from actcache.models.checkpoint import Checkpoint
from actcache.models.streamed import Streamed
from transformers import LlamaForCausalLM

def model(folder):
    model = Checkpoint.open("x", folder).load(torch.float32)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 8, dtype=torch.int64))

def late(folder):
    late = LateStack.load(folder, 22)
    late.readout.top2(late.run(torch.zeros(8, late.width), [0, 8]))

def streamed(folder):
    streamed = Streamed(Checkpoint.open("x", folder), torch.float32)
    state = torch.zeros(8, dtype=torch.int64)
    for _ in streamed.pass_over():
        state = streamed.forward([0, 8], state)
    streamed.readout.top2(state)

def peak_of(folder, *acts):
    reading, writing = os.pipe()
    if os.fork() == 0:
        for act in acts:
            act(folder)
        peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
        os.write(writing, peak.encode())
        os._exit(0)
    os.close(writing)
    return 1024 * int(os.read(reading, 99))

large, small = sys.argv[1:]
peaks = {act.__name__: peak_of(large, act) for act in (model, late, streamed)}
print(json.dumps({"small": peak_of(small, model, late, streamed), **peaks}))
"""


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", tiny.ALL_ARCHS)
def test_a_late_stack_holds_no_upstream_parameters(tmp_path, arch, tie, shards):
    folder = tiny.make_checkpoint(tmp_path, arch, tie=tie, shards=shards)
    late = LateStack.load(folder, 3)
    held = {name for name, _ in late._forwards.backbone.decoder.named_parameters()}
    assert any(re.search(r"\.?(3|4)\.", name) for name in held)
    assert not [name for name in held if re.search(r"(layers|h)\.[012]\.", name)]
    embeddings = [name for name in held if re.search(r"embed_tokens|wte", name)]
    assert bool(embeddings) == tie, "token embeddings are kept for the head alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_converted_on_load(tmp_path, dtype):
    folder = tiny.make_checkpoint(tmp_path, "llama")
    late = LateStack.load(folder, 3, dtype=dtype)
    assert late.dtype == dtype
    assert late.run(torch.zeros(4, late.width, dtype=dtype), [0, 4]).dtype == dtype


def test_peak_memory_is_that_of_what_is_held(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
    folder = tiny.make_checkpoint(tmp_path / "large", "llama", num_hidden_layers=24, **sizes)
    small = tiny.make_checkpoint(tmp_path / "small", "llama", num_hidden_layers=24)
    weights = (folder / "model.safetensors").stat().st_size
    ran = subprocess.run([sys.executable, "-c", PEAK, folder, small], check=True, capture_output=True, text=True)
    peak = json.loads(ran.stdout)
    assert peak["model"] - peak["small"] > 0.7 * weights, "the measure would see the upstream weights"
    assert peak["late"] - peak["small"] < 0.4 * weights
    assert peak["streamed"] - peak["small"] < 0.4 * weights, "two of 24 blocks, and one that is being read"


FAULTS = """
import resource, sys, torch
from actcache.replay.late_stack import LateStack
torch.set_num_threads(1)
late = LateStack.load(sys.argv[1], 1)
rows = torch.randn(1024, late.width)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def forward():
    before = faults()
    late.run(rows, range(0, 1025, 32), max_tokens=1024)
    return faults() - before
forward(), forward()
print(sorted(forward() for _ in range(5))[2])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives freed memory back")
def test_activations_take_the_place_of_those_before_them(tmp_path):
    """A forward whose blocks write 8 MiB at a time touches few new pages once the heap has grown to what it needs.

    That takes one or two. The median of five tells: else most touch ten thousand or more, some by chance fewer.
    """
    folder = tiny.make_checkpoint(
        tmp_path, "llama", num_hidden_layers=6, hidden_size=256, intermediate_size=2048, num_attention_heads=4
    )
    ran = subprocess.run([sys.executable, "-c", FAULTS, folder], check=True, capture_output=True, text=True)
    pages = 5 * 3 * 1024 * 2048 * 4 // os.sysconf("SC_PAGE_SIZE")  # of the MLPs' three products in five late blocks
    assert int(ran.stdout) < pages / 10
