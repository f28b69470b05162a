"""Copies of a late stack's modules: what ``copy.deepcopy`` makes, but for the weights and what no forward changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from twins.replay import BOUNDARY, Sequences, build

from actcache.models.blocks import UpstreamStandIn
from actcache.replay.copies import apart, copies_of
from actcache.replay.late_stack import LateStack


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3", "bloom", "mamba", "phi3 longrope"])
def test_a_copy_is_what_deepcopy_makes_with_weights_and_hooks_shared(name):
    model = build(name)
    own = LateStack.load(model, BOUNDARY)._forwards
    own.blocks[0].register_forward_hook(lambda *_: None)
    own.blocks[0].of_mine = {"list": [1, 2], "self": own.blocks[0]}
    one, other = copies_of(own, 2)
    twin = copy.deepcopy(own.model)
    parts, expected = dict(one.model.named_modules()), dict(twin.named_modules())
    assert list(parts) == list(expected)
    for path, module in own.model.named_modules():
        mine, theirs = parts[path], expected[path]
        assert type(mine) is type(theirs)
        assert list(vars(mine)) == list(vars(theirs))
        assert all(mine._parameters[key] is weight for key, weight in module._parameters.items())
        assert list(mine._forward_hooks.values()) == list(module._forward_hooks.values())
        for key, buffer in theirs._buffers.items():
            assert buffer is None or torch.equal(mine._buffers[key], buffer)
            assert buffer is None or mine._buffers[key].data_ptr() != module._buffers[key].data_ptr()
        if mine is module:
            stateless = isinstance(module, UpstreamStandIn) or type(module).__module__.startswith("torch.nn.modules.")
            assert stateless
            assert not module._buffers
            assert not module._modules
            continue
        for key, value in vars(module).items():
            if isinstance(value, dict | list | set):
                assert vars(mine)[key] is not value
                assert len(vars(mine)[key]) == len(value)
    blocks = one.blocks
    assert blocks[0].of_mine["self"] is blocks[0]
    assert blocks[0].of_mine["list"] == [1, 2]
    assert blocks[0].of_mine["list"] is not own.blocks[0].of_mine["list"]
    assert not {id(block) for block in blocks} & {id(block) for block in (*own.blocks, *other.blocks)}
    assert one.backbone.blocks is dict(one.model.named_modules())[_path(own.model, own.backbone.blocks)]
    assert one.model.config is not own.model.config
    assert one.model.config.to_dict() == own.model.config.to_dict()
    state = Sequences(model).states[0][None]
    with torch.no_grad():
        assert torch.equal(one.plain(state), own.plain(state))


def _path(model, module):
    return next(path for path, one in model.named_modules() if one is module)


class CopiedItsOwnWay(nn.Module):
    def __init__(self):
        super().__init__()
        self.n_copies = 0

    def __deepcopy__(self, memo):
        other = CopiedItsOwnWay()
        other.n_copies = self.n_copies + 1
        return other


class SetsItsState(nn.Module):
    def __setstate__(self, state):
        super().__setstate__(state)
        self.was_set = True


def test_modules_that_say_how_they_are_copied_are_copied_so():
    whole = nn.Module()
    whole.first, whole.second, whole.layer = CopiedItsOwnWay(), SetsItsState(), nn.Linear(2, 2)
    one, other = apart({"whole": whole}, [whole], 2, hooked=())
    for copied in (one["whole"], other["whole"]):
        assert copied is not whole
        assert copied.first.n_copies == 1
        assert copied.second.was_set
        assert copied.layer is whole.layer
    (hooked,) = apart(whole, [whole], 1, hooked=[whole.layer])
    assert hooked.layer is not whole.layer
    assert hooked.layer.weight is whole.layer.weight
    handle = hooked.layer.register_forward_hook(lambda *_: None)
    assert not whole.layer._forward_hooks
    handle.remove()


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_the_last_block_runs_alone_and_the_others_are_there_again(name):
    own = LateStack.load(build(name), 1)._forwards
    (one,) = copies_of(own, 1)
    blocks, calls = list(one.backbone.blocks), []
    for number, block in enumerate(blocks[1:], 1):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    state = torch.randn(1, 5, own.backbone.width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with one._last_block_alone():
            found = one.plain(state)
        assert calls == [len(blocks) - 1]
        assert list(one.backbone.blocks) == blocks
        assert torch.equal(found, LateStack.load(build(name), len(blocks) - 1)._forwards.plain(state))
        one.plain(state)
    assert calls[1:] == list(range(1, len(blocks)))
