"""The residual stream around modules: equal to hooks on a plain model, in every architecture and way of replaying."""

from __future__ import annotations

import families
import pytest
import torch
from tiny import ALL_ARCHS, N_BLOCKS, make_pair
from twins import reference

from actcache.errors import InputError, UnsupportedModelError
from actcache.models.blocks import find_site
from actcache.models.checkpoint import Checkpoint
from actcache.replay.late_stack import LateStack
from actcache.replay.streamed_late import StreamedLate
from actcache.replay.swap import MODULES

IDS = torch.randint(3, 60, (17,), generator=torch.Generator().manual_seed(0)).tolist()
# Whose input is the residual stream between the two modules: by the module's name in a block.
MIDDLE = {
    **dict.fromkeys(("llama", "qwen3", "mistral"), "post_attention_layernorm"),
    **dict.fromkeys(("gemma2", "gemma3"), "pre_feedforward_layernorm"),
    **{"olmo2": "mlp", "gpt2": "ln_2"},
}


def by_hooks(model, ids, middle, layers):
    """What enters each of these blocks, what stands between its modules, and what leaves it: ``[k, 3, T, D]``."""
    blocks = reference.parts(model).blocks
    seen = {}

    def keep(place):
        def hook(_, args, kwargs):
            seen[place] = (args[0] if args else next(iter(kwargs.values())))[0].clone()

        return hook

    handles = []
    for layer in layers:
        handles.append(blocks[layer].register_forward_pre_hook(keep((layer, "in")), with_kwargs=True))
        part = blocks[layer].get_submodule(middle)
        handles.append(part.register_forward_pre_hook(keep((layer, "mid")), with_kwargs=True))
    final = reference.final_hidden(model, ids)
    for handle in handles:
        handle.remove()
    last = len(blocks)
    for layer in layers:
        seen[layer, "out"] = reference.states(model, ids, layer + 1) if layer + 1 < last else final
    return torch.stack([torch.stack([seen[layer, what] for what in ("in", "mid", "out")]) for layer in layers])


def expected_of(module, around):
    return {"mlp": around[:, 1:], "attention": around[:, :2], "block": around[:, ::2]}[module]


def gathered(late, *args, **how):
    parts = list(late.around(*args, **how))
    rows = torch.cat([rows for _, rows in parts])
    return rows[torch.cat([events for events, _ in parts]).argsort()]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    made = {}

    def of(arch):
        if arch not in made:
            folder, _ = make_pair(tmp_path_factory.mktemp(arch), arch)
            made[arch] = folder, reference.load(folder, torch.float32)
        return made[arch]

    return of


@pytest.mark.parametrize("arch", ALL_ARCHS)
def test_equals_hooks(model_of, arch):
    folder, model = model_of(arch)
    layers = [1, 2, N_BLOCKS - 1]
    around = by_hooks(model, IDS, MIDDLE[arch], layers)
    late, rows = LateStack.load(folder, 1), reference.states(model, IDS, 1)
    final = reference.final_hidden(model, IDS)
    several = torch.cat([rows, rows[:9]]), [0, 17, 26]
    for module in MODULES:
        expected = expected_of(module, around)
        one = gathered(late, rows, [0, 17], module, layers, strict=True)
        assert torch.equal(one[0, 0], final[-1])
        torch.testing.assert_close(one[0, 1:].view(3, 2, -1), expected[:, :, -1], rtol=1e-5, atol=1e-5)
        for how in ({}, {"max_tokens": 9}):
            at = [(1, 8), (0, 16), (0, 3)]
            packed = gathered(late, *several, module, layers, positions=at, **how)
            torch.testing.assert_close(packed[:, 0], final[[8, 16, 3]], rtol=1e-4, atol=1e-4)
            wanted = expected[:, :, [8, 16, 3]].permute(2, 0, 1, 3).flatten(1, 2)
            torch.testing.assert_close(packed[:, 1:], wanted, rtol=1e-4, atol=1e-4)


def test_workers_and_padded_rows_give_the_same(model_of, three_workers):
    folder, model = model_of("gemma3")
    late, rows = LateStack.load(folder, 2), reference.states(model, IDS, 2)
    several = torch.cat([rows[:n] for n in (17, 5, 11, 8)]), [0, 17, 22, 33, 41]
    plain = gathered(late, *several, "mlp", [2, 4], strict=True)
    torch.testing.assert_close(gathered(late, *several, "mlp", [2, 4]), plain, rtol=1e-4, atol=1e-4)
    late.mode = "padded"
    torch.testing.assert_close(gathered(late, *several, "mlp", [2, 4]), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt_neox, sequential", "cohere", "granite", "gptj", "qwen2_moe"])
def test_parallel_scaled_and_mixed_blocks(family):
    """What the two modules add is what a block adds; with a module's output zeroed, the block adds the rest."""
    model = families.build(family).eval()
    late = LateStack.load(model, families.BOUNDARY)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(7, families.WIDTH, generator=generator)
    layers = [families.BOUNDARY, families.N_BLOCKS - 1]
    before, after = gathered(late, rows, [0, 7], "mlp", layers, strict=True)[0, 1:3]
    mlp = find_site(late.blocks[0], "mlp")
    zeroed = mlp.register_forward_hook(
        lambda _, args, of: (torch.zeros_like(of[0]), *of[1:]) if isinstance(of, tuple) else torch.zeros_like(of)
    )
    (_, without) = gathered(late, rows, [0, 7], "block", layers[:1], strict=True)[0, 1:3]
    zeroed.remove()
    torch.testing.assert_close(without, before, rtol=1e-4, atol=1e-5)
    entered, left = gathered(late, rows, [0, 7], "block", layers[:1], strict=True)[0, 1:3]
    assert torch.equal(entered, rows[-1])
    assert torch.equal(left, after)
    assert not torch.allclose(before, after)


def test_a_block_that_does_more_than_add_is_refused(model_of):
    folder, model = model_of("llama")

    def halved(_, args, output):
        return output / 2

    block = reference.parts(model).blocks[3]
    hook = block.register_forward_hook(halved)
    late = LateStack.load(model, 2)
    rows = reference.states(model, IDS, 2)
    try:
        with pytest.raises(
            UnsupportedModelError, match="LlamaDecoderLayer does more than add what its self_attn and mlp"
        ):
            list(late.around(rows, [0, 17], "mlp", [2, 3]))
        assert len(gathered(late, rows, [0, 17], "block", [3])) == 1
        assert len(gathered(late, rows, [0, 17], "mlp", [2])) == 1
    finally:
        hook.remove()
    with pytest.raises(InputError, match=r"block 1 is none of 2\.\.4"):
        list(late.around(rows, [0, 17], "mlp", [1]))
    with pytest.raises(InputError, match="leave out --stream"):
        list(StreamedLate.open(Checkpoint.open("pt", folder), 2).around(rows, [0, 17], "mlp", [2]))
