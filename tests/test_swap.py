"""Modules of another checkpoint in a late stack: equal to a model that is assembled from both checkpoints' weights."""

from __future__ import annotations

import pytest
import torch
from tiny import ALL_ARCHS, N_BLOCKS, make_pair
from twins import reference

from actcache.errors import InputError
from actcache.models.blocks import find_site
from actcache.models.checkpoint import Checkpoint
from actcache.replay.edits import PLAIN, Add, Edit, Variant
from actcache.replay.late_stack import LateStack
from actcache.replay.streamed_late import StreamedLate
from actcache.replay.swap import Swap

IDS = torch.randint(3, 60, (17,), generator=torch.Generator().manual_seed(0)).tolist()
SWAPS = [("mlp", 0, 2), ("attention", 1, 4), ("block", 0, 1), ("block", 2, N_BLOCKS), ("mlp", 4, N_BLOCKS)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pairs = {}

    def of(arch):
        if arch not in pairs:
            pairs[arch] = make_pair(tmp_path_factory.mktemp(arch), arch)
        return pairs[arch]

    return of


def assembled(host, source, module, first, stop):
    """The host with these weights of the source copied into it."""
    for index in range(first, stop):
        one, other = (reference.parts(model).blocks[index] for model in (host, source))
        if module != "block":
            one, other = (find_site(block, module) for block in (one, other))
        one.load_state_dict(other.state_dict())
    return host


@pytest.mark.parametrize("arch", ALL_ARCHS)
@pytest.mark.parametrize(("module", "first", "stop"), SWAPS)
def test_equals_a_model_assembled_from_both(pair, arch, module, first, stop):
    pt, it = pair(arch)
    model = assembled(reference.load(pt, torch.float32), reference.load(it, torch.float32), module, first, stop)
    host, source = LateStack.load(pt, first), LateStack.load(it, 0)
    swapped = host.swapped(source, Swap("it", module, first, stop))
    rows = reference.states(model, IDS, first)  # before the first swapped block: the host's own
    expected = reference.final_hidden(model, IDS)
    assert torch.equal(swapped.run(rows, [0, 17], strict=True)[0], expected[-1])
    offsets, positions = [0, 17, 34], [(0, 16), (1, 16), (1, 8)]
    packed = swapped.run(torch.cat([rows, rows]), offsets, positions=positions)
    torch.testing.assert_close(packed, expected[[16, 16, 8]], rtol=1e-4, atol=1e-4)
    assert not torch.equal(expected, reference.final_hidden(reference.load(pt, torch.float32), IDS))


def test_host_and_source_stay_as_they_are(pair):
    pt, it = pair("llama")
    host, source = LateStack.load(pt, 1), LateStack.load(it, 1)
    rows = torch.randn(17, host.width, generator=torch.Generator().manual_seed(1))
    before = [late.run(rows, [0, 17], strict=True) for late in (host, source)]
    swapped = host.swapped(source, Swap("it", "mlp", 2, 4))
    weights = [block.mlp.up_proj.weight.data_ptr() for block in (swapped.blocks[1], source.blocks[1])]
    assert weights[0] == weights[1]
    assert swapped.blocks[1].self_attn is host.blocks[1].self_attn
    swapped.run(rows, [0, 17])
    after = [late.run(rows, [0, 17], strict=True) for late in (host, source)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_swapped_stack_takes_edits_and_later_boundaries(pair):
    pt, it = pair("llama")
    model = assembled(reference.load(pt, torch.float32), reference.load(it, torch.float32), "mlp", 1, 5)
    swapped = LateStack.load(pt, 1).swapped(LateStack.load(it, 1), Swap("it", "mlp", 1, 5))
    later = swapped.at(3)
    rows = reference.states(model, IDS, 3)
    assert torch.equal(later.run(rows, [0, 17], strict=True)[0], reference.final_hidden(model, IDS)[-1])
    shift = torch.ones(later.width)
    variant = Variant("shifted", (Edit(Add(shift), site="mlp", layers=(4,)),))

    def shifted(_, args, output):
        return torch.cat([output[:, :-1], output[:, -1:] + shift], dim=1)

    hook = model.model.layers[4].mlp.register_forward_hook(shifted)
    expected = reference.final_hidden(model, IDS)[-1]
    hook.remove()
    for strict in (True, False):
        found = later.run_variants(rows, [0, 17], [PLAIN, variant], strict=strict)[0, 1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_states_behind_a_window_are_those_of_an_assembled_model(pair, arch):
    pt, it = pair(arch)
    model = assembled(reference.load(pt, torch.float32), reference.load(it, torch.float32), "mlp", 1, 3)
    swapped = LateStack.load(pt, 0).swapped(LateStack.load(it, 0), Swap("it", "mlp", 1, 3))
    rows, expected = reference.states(model, IDS, 0), reference.states(model, IDS, 3)
    assert torch.equal(swapped.states(rows, [0, 17], 3, strict=True), expected)
    assert torch.equal(swapped.states(rows, [0, 17], 1, strict=True), reference.states(model, IDS, 1))
    several = torch.cat([rows[:5], rows, rows[:9]]), [0, 5, 22, 31]
    wanted = torch.cat([expected[:5], expected, expected[:9]])
    for how in ({}, {"max_tokens": 20}, {"strict": True}):
        torch.testing.assert_close(swapped.states(*several, 3, **how), wanted, rtol=1e-4, atol=1e-4)
    swapped.mode = "padded"
    torch.testing.assert_close(swapped.states(*several, 3), wanted, rtol=1e-4, atol=1e-4)
    for boundary in (0, 5):
        with pytest.raises(InputError, match=rf"boundary {boundary} is none of 1\.\.4"):
            swapped.states(rows, [0, 17], boundary)


def test_what_cannot_be_swapped_is_refused(pair, tmp_path):
    pt, it = pair("llama")
    host, source = LateStack.load(pt, 2), LateStack.load(it, 3)
    with pytest.raises(InputError, match=r"blocks 2\.\.3: the late stacks have 3\.\.4"):
        host.swapped(source, Swap("it", "mlp", 2, 4))
    with pytest.raises(InputError, match=r"blocks 4\.\.6: the late stacks have 3\.\.4"):
        host.swapped(source, Swap("it", "mlp", 4, 7))
    with pytest.raises(InputError, match="module 'norm' is unknown"):
        Swap("it", "norm", 2, 4)
    with pytest.raises(InputError, match="has none"):
        Swap("it", "mlp", 4, 4)
    with pytest.raises(InputError, match="leave out --stream"):
        StreamedLate.open(Checkpoint.open("pt", pt), 3).swapped(source, Swap("it", "mlp", 3, 4))
    wide, _ = make_pair(tmp_path, "llama", intermediate_size=96)
    with pytest.raises(InputError, match=r"here and \(96, 32\) in the source|here and \(64, 32\) in the source"):
        host.swapped(LateStack.load(wide, 2), Swap("it", "mlp", 3, 4))
