"""Checkpoints whose blocks are loaded one at a time: equal to the plain forward, and read block by block."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
from tiny import make_checkpoint, write_tokenizer

from actcache.errors import UnsupportedModelError
from actcache.models import checkpoint_files
from actcache.models.backbone import Backbone
from actcache.models.checkpoint import Checkpoint
from actcache.models.parts import Frame
from actcache.models.streamed import Streamed

FAMILIES = ("llama", "qwen2", "gemma2", "gemma3_text", "gpt_neox", "opt", "phi", "mixtral", "roberta-prelayernorm")


def saved(folder: Path, name: str) -> Checkpoint:
    families.build(name).save_pretrained(folder)
    write_tokenizer(folder)
    return Checkpoint.open("a", folder)


def streamed_forward(streamed: Streamed, bounds: list[int], ids: torch.Tensor) -> torch.Tensor:
    given = ids
    for _ in streamed.pass_over():
        given = streamed.forward(bounds, given)
    return given


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_plain_forward(tmp_path, name):
    checkpoint = saved(tmp_path, name)
    backbone = Backbone(checkpoint.load(torch.float32))
    streamed = Streamed(checkpoint, torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (20,), generator=generator)
    for n in (1, 20):
        plain = backbone.forward([0, n], input_ids=ids[None, :n])
        assert torch.equal(streamed_forward(streamed, [0, n], ids[:n]), plain)
    assert (streamed.why_not_packable() is None) == (backbone.why_not_packable() is None)
    if streamed.why_not_packable() is None:
        packed = backbone.forward([0, 13, 20], input_ids=ids[None])
        assert (streamed_forward(streamed, [0, 13, 20], ids) - packed).abs().max() < 1e-4
    assert torch.equal(streamed.readout.top2(plain)[0], backbone.readout.top2(plain)[0])


@pytest.mark.parametrize("name", ["gemma3n_text", "zamba", "zaya"])
def test_what_passes_more_than_the_state_is_refused_by_name(tmp_path, name):
    checkpoint = saved(tmp_path, name)
    with pytest.raises(UnsupportedModelError, match=f"checkpoint a, {tmp_path}"):
        streamed_forward(Streamed(checkpoint, torch.float32), [0, 5], torch.arange(5) + 3)


@pytest.mark.parametrize("tie", [True, False])
def test_a_part_reads_its_own_bytes_only(tmp_path, monkeypatch, tie):
    checkpoint = Checkpoint.open("a", make_checkpoint(tmp_path, "llama", tie=tie, shards=True))
    read: list[str] = []
    own = checkpoint_files.open_tensors

    class Watched:
        def __init__(self, name, tensor):
            self.name, self.tensor = name, tensor

        def __getattr__(self, name):
            return getattr(self.tensor, name)

        def __getitem__(self, index):
            read.append(self.name)
            return self.tensor[index]

    monkeypatch.setattr(
        checkpoint_files,
        "open_tensors",
        lambda files, **how: {name: Watched(name, one) for name, one in own(files, **how).items()},
    )
    names = set(own(checkpoint_files.weight_files(tmp_path)))
    frame = Frame.load(checkpoint, torch.float32)
    assert sorted(read) == sorted(name for name in names if ".layers." not in name)
    for index in (3, 0):
        read.clear()
        frame.load_block(index)
        assert sorted(read) == sorted(name for name in names if f".layers.{index}." in name)
    monkeypatch.undo()
    sizes = frame.block_bytes()
    assert len(sizes) == 5
    assert len(set(sizes)) == 1
    assert sizes[0] == sum(p.nbytes for p in frame.load_block(0).parameters())


def test_blocks_stay_no_longer_than_they_run(tmp_path):
    streamed = Streamed(Checkpoint.open("a", make_checkpoint(tmp_path, "llama")), torch.float32)
    told: list[int] = []
    for _ in streamed.pass_over(told=told.append):
        assert len(streamed.backbone.blocks) == 1
    assert not len(streamed.backbone.blocks)
    assert streamed.n_bytes == sum(told) > 0
    for index in streamed.pass_over(first=2):  # left in the middle
        if index == 3:
            break
    assert not len(streamed.backbone.blocks)
    assert sum(p.numel() for p in streamed.backbone.decoder.parameters()) < 120 * 32 * 2 + 100
