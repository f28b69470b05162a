"""Linear layers by other means: oneDNN's product is the layer's own, nothing else is replaced, and not where it counts.

That packed replay stays what it is with every layer replaced is seen against forward hooks.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_replay import BOUNDARY, N_BLOCKS, WIDTH, Sequences, build
from torch import nn

from actcache import linear
from actcache.edits import Add, Edit, Variant
from actcache.linear import fast_products, onednn_is_faster
from actcache.replay import LateStack

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this torch has no oneDNN",
)


@pytest.fixture
def faster(monkeypatch):
    """As on a machine where oneDNN is; which layers it then computes."""
    computed = []
    own = linear._OneDnnLinear.forward

    def forward(self, states):
        computed.append((self.in_features, self.out_features))
        return own(self, states)

    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(linear._OneDnnLinear, "forward", forward)
    return computed


@needs_onednn
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    n_in=st.integers(1, 70),
    n_out=st.integers(1, 70),
    bias=st.booleans(),
    turned=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
)
def test_onednn_computes_what_the_layer_does(shape, n_in, n_out, bias, turned, dtype):
    layer = nn.Linear(n_in, n_out, bias=bias).to(dtype).requires_grad_(False)
    other = linear._by_onednn(layer)
    states = torch.randn(*shape, n_in, dtype=dtype)
    if turned:
        states = torch.randn(n_in, *shape, dtype=dtype).movedim(0, -1)
    found, expected = other(states), layer(states)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * n_in**0.5)
    assert other.weight is layer.weight


class Doubles(nn.Linear):
    def forward(self, states):
        return 2 * super().forward(states)


@needs_onednn
def test_only_layers_that_are_torchs_own_and_untouched_are_replaced(faster):
    blocks = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)), Doubles(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    seen = []
    blocks[1].register_forward_hook(lambda *args: seen.append("hook"))
    blocks[2].register_forward_pre_hook(lambda *args: seen.append("pre-hook"))
    forward = blocks[3].forward
    blocks[3].forward = lambda states: (seen.append("wrapped"), forward(states))[1]
    blocks[4].to(torch.float64)
    blocks[5].weight = nn.Parameter(torch.randn(4, 4).t(), requires_grad=False)
    before = list(blocks)
    replaced = [0, 7]
    with torch.no_grad():
        with fast_products(blocks):
            assert [i for i in range(8) if blocks[i] is not before[i]] == replaced
            for i in (0, 1, 2, 3, 5, 6, 7):
                states = torch.randn(3, 4)
                torch.testing.assert_close(blocks[i](states), before[i](states))
        assert list(blocks) == before
        assert faster == [(4, 4)] * 2
        assert seen == ["hook"] * 2 + ["pre-hook"] * 2 + ["wrapped"] * 2
        with pytest.raises(KeyError), fast_products(blocks):
            raise KeyError
        assert list(blocks) == before
        with torch.autocast("cpu"), fast_products(blocks):
            assert list(blocks) == before
    with torch.enable_grad(), fast_products(blocks):  # oneDNN's knows no gradients
        assert list(blocks) == before


@needs_onednn
@pytest.mark.parametrize("name", ["llama", "opt", "qwen3", "gptj", "deepseek_v3", "bloom"])
def test_packed_replay_by_onednn_equals_hooks_and_strict_replay_never_comes_there(name, faster):
    model = build(name)
    late, sequences = LateStack.load(model, BOUNDARY), Sequences(model)
    faster.clear()
    shift = Add(torch.full((WIDTH,), 0.5))
    variants = [Variant("plain"), Variant("shifted", (Edit(shift),)), Variant("all", (Edit(shift, positions="all"),))]
    if name != "bloom":  # whose MLP adds the residual stream itself
        variants.append(Variant("inside", (Edit(shift, site="mlp", layers=(3,)),)))
    found = late.run_variants(sequences.rows, sequences.offsets, variants)
    assert len(faster) >= 3 * (N_BLOCKS - BOUNDARY)
    faster.clear()
    strict = late.run_variants(sequences.rows, sequences.offsets, variants, strict=True)
    assert faster == []
    assert (strict[:, 1:] - strict[:, :1]).abs().amax(dim=2).min() > 1e-2  # every variant tells
    assert torch.equal(strict[:, 0], sequences.hooked())
    torch.testing.assert_close(found, strict, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("vendor_id\t: AuthenticAMD\n", "AVX512", True),
        ("processor\t: 0\nvendor_id\t: HygonGenuine\nflags\t: fpu\n", "AVX512", True),
        ("vendor_id\t: GenuineIntel\n", "AVX512", False),
        ("vendor_id\t: AuthenticAMD\n", "AVX2", False),
        ("CPU implementer\t: 0x41\n", "AVX512", False),
        (None, "AVX512", False),
    ],
)
def test_onednn_is_for_cpus_with_avx512_that_mkl_does_not_use(vendor, capability, expected, monkeypatch):
    def read_text(path):
        assert path == Path("/proc/cpuinfo")
        if vendor is None:
            raise FileNotFoundError
        return vendor

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert onednn_is_faster.__wrapped__() is expected
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert onednn_is_faster.__wrapped__() is False
