"""Linear layers by other means: products are the layers' own, nothing else is replaced, and not where it counts.

The native core's product runs here by plain loops as well, so that its steps are tested on CPUs without tiles. That
packed replay stays what it is with every layer replaced is seen against forward hooks.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from twins.replay import BOUNDARY, N_BLOCKS, WIDTH, Sequences, build

from actcache.models import linear
from actcache.models.linear import fast_linear, fast_products, linear_in_core, onednn_is_faster, tiles_are_there
from actcache.native import native
from actcache.replay.edits import Add, Edit, Variant
from actcache.replay.late_stack import LateStack

HAS_CORE = native("cpu")[0] is not None
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this torch has no oneDNN",
)
needs_core = pytest.mark.skipif(not HAS_CORE, reason="the native core is not built")
needs_tiles = pytest.mark.skipif(not HAS_CORE or not tiles_are_there(), reason="this CPU has no matrix tiles")
MEANS = [pytest.param("_OneDnnLinear", marks=needs_onednn), pytest.param("_TileLinear", marks=needs_core)]


@pytest.fixture(params=MEANS)
def faster(request, monkeypatch):
    """As on a machine where these means are the fastest; which layers they then compute."""
    computed = []
    means = getattr(linear, request.param)
    own = means.forward

    def forward(self, states):
        computed.append((self.in_features, self.out_features))
        return own(self, states)

    monkeypatch.setattr(linear, "_fastest_means", lambda: means)
    monkeypatch.setattr(linear, "_ROWS_FOR_TILES", 1)
    monkeypatch.setattr(means, "forward", forward)
    return computed


# Of these weights the core leaves out none of its products, one and three of the six.
STORED_AS = [torch.float32, torch.float16, torch.bfloat16]

# The native core's two ways to the same sums.
WAYS = pytest.mark.parametrize(
    "way", [pytest.param("tiles", marks=needs_tiles), pytest.param("loops", marks=needs_core)]
)


def in_core(way, *tensors):
    core = native("cpu")[0]
    widest = core.isa()
    if way == "loops":
        core.limit_isa(0)
    try:
        assert core.has_tiles() == (way == "tiles")
        return linear_in_core(*tensors)
    finally:
        core.limit_isa(widest)


def as_defined(rows, weight, bias):
    """In float64, where every product of two float32 is exact."""
    found = rows.double() @ weight.double().t()
    return found if bias is None else found + bias.double()


def layer_of(means, n_in, n_out, bias, dtype):
    layer = nn.Linear(n_in, n_out, bias=bias).to(dtype).requires_grad_(False)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "_fastest_means", lambda: getattr(linear, means))
        holder = nn.Sequential(layer)
        with fast_products(holder):
            other = holder[0]
    return layer, other


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_by_itself_is_that_of_a_layer(bias):
    layer, other = nn.Linear(70, 90, bias=bias).requires_grad_(False), nn.Linear(70, 90).bfloat16()
    states = torch.randn(2, 5, 70)
    with torch.no_grad():
        holder = nn.Sequential(layer)
        with fast_products(holder):
            expected = holder(states)
        assert torch.equal(fast_linear(states, layer.weight, layer.bias), expected)
        assert fast_linear(states[:0], layer.weight, layer.bias).shape == (0, 5, 90)
        by_torch = torch.nn.functional.linear(states.bfloat16(), other.weight, other.bias)
        assert torch.equal(fast_linear(states.bfloat16(), other.weight, other.bias), by_torch)
        turned = torch.randn(70, 90).T
        assert torch.equal(fast_linear(states, turned, None), torch.nn.functional.linear(states, turned))
    with torch.enable_grad():
        trained = nn.Linear(70, 90)
        assert fast_linear(states, trained.weight, trained.bias).requires_grad


# Beyond what is laid out at a time: 24 steps of 32, and blocks of 32 either way.
@WAYS
@given(
    n_rows=st.integers(0, 70),
    n_in=st.one_of(st.integers(1, 100), st.integers(760, 800)),
    n_out=st.integers(1, 70),
    bias=st.booleans(),
    gap=st.sampled_from([0, 3]),
    stored_as=st.sampled_from(STORED_AS),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_cores_sums_are_those_of_a_linear_layer(way, n_rows, n_in, n_out, bias, gap, stored_as, seed):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(n_rows, n_in + gap, generator=generator)
    rows, weight = table[:, :n_in], torch.randn(n_out, n_in, generator=generator).to(stored_as).float()
    added = torch.randn(n_out, generator=generator) if bias else None
    found = in_core(way, rows, weight, added)
    assert found.shape == (n_rows, n_out)
    sizes = as_defined(rows.abs(), weight.abs(), None if added is None else added.abs())
    assert ((found - as_defined(rows, weight, added)).abs() <= 6 * n_in * 2**-24 * sizes).all()


@WAYS
@given(seed=st.integers(0, 2**32 - 1), shift=st.integers(-40, 40))
def test_no_bit_of_a_float32_is_lost(way, seed, shift):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-(2**24), 2**24, (33, 40), generator=generator).float() * 2.0**shift
    powers = torch.randint(-10, 11, (35,), generator=generator)
    one_hot = torch.zeros(35, 40).index_put((torch.arange(35), torch.arange(35) % 40), 2.0**powers)
    assert torch.equal(in_core(way, rows, one_hot, None), torch.nn.functional.linear(rows, one_hot))
    assert torch.equal(in_core(way, one_hot, rows, None), torch.nn.functional.linear(one_hot, rows))
    whole = torch.randint(-(2**9), 2**9, (33, 40), generator=generator).float()
    other = torch.randint(-(2**9), 2**9, (35, 40), generator=generator).float()
    assert torch.equal(in_core(way, whole, other, None).double(), as_defined(whole, other, None))


@WAYS
@pytest.mark.parametrize("stored_as", STORED_AS)
def test_products_that_are_left_out_change_no_sum(way, stored_as):
    rows, weight = torch.randn(70, 900), torch.randn(96, 900).to(stored_as).float()
    found = in_core(way, rows, weight, None)
    beside = torch.randn(192, 900)  # in every block of 32, so that no product is left out
    beside[::2] = weight
    assert torch.equal(in_core(way, rows, beside, None)[:, ::2], found)
    one_more = weight.clone()  # and where a single weight has all bits, at the end of the second block
    one_more[63, 899] = 1 + 2**-23
    others = torch.arange(96) != 63
    assert torch.equal(in_core(way, rows, one_more, None)[:, others], found[:, others])


@needs_tiles
@pytest.mark.parametrize(("n_rows", "n_in", "n_out"), [(300, 576, 200), (130, 1536, 576), (200, 4000, 64)])
def test_tiles_are_as_near_to_the_truth_as_torchs_product(n_rows, n_in, n_out):
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, n_in, generator=generator) for n in (n_rows, n_out))
    truth = as_defined(rows, weight, None)
    off = [
        (found - truth).square().mean().sqrt().item()
        for found in (linear_in_core(rows, weight, None), torch.nn.functional.linear(rows, weight))
    ]
    assert off[0] <= 1.5 * off[1], off


@WAYS
def test_a_row_does_not_depend_on_the_others(way):
    rows, weight = torch.randn(100, 80), torch.randn(70, 80)
    found = in_core(way, rows, weight, None)
    order = torch.randperm(100)
    assert torch.equal(in_core(way, rows[order], weight, None), found[order])
    for n in (1, 31, 33):
        assert torch.equal(in_core(way, rows[:n], weight, None), found[:n])


@needs_tiles
def test_threads_share_the_rows_bit_for_bit():
    rows, weight = torch.randn(700, 1200), torch.randn(900, 1200)  # enough for several threads to be started
    core = native("cpu")[0]
    found = [torch.full((700, 900), torch.nan) for _ in range(3)]
    for n_threads, out in zip((1, 2, 5), found, strict=True):
        core.linear(rows.data_ptr(), weight.data_ptr(), 0, out.numpy(), 700, 1200, 900, 1200, n_threads=n_threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@WAYS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3.4e38])
def test_what_is_not_finite_stays_in_its_row_and_is_seen(way, bad):
    rows, weight = torch.randn(40, 40), torch.randn(50, 40)
    rows[7, 3] = bad
    found = in_core(way, rows, weight, None)
    assert not found[7].isfinite().any()
    others = torch.arange(40) != 7
    torch.testing.assert_close(found[others], torch.nn.functional.linear(rows, weight)[others], rtol=0, atol=1e-4)
    rows[7, 3], weight[9, 0] = 1, bad
    found = in_core(way, rows, weight, None)
    assert (~found.isfinite()).all(dim=0).tolist() == [column == 9 for column in range(50)]


@needs_tiles
def test_others_who_keep_tiles_find_them_as_they_left_them():
    rows, weight = torch.randn(200, 300), torch.randn(100, 300)
    halves = torch.randn(200, 300).bfloat16(), torch.randn(100, 300).bfloat16()
    own, theirs = linear_in_core(rows, weight, None), torch.nn.functional.linear(*halves)
    for _ in range(20):  # in one thread, as oneDNN's bfloat16 keeps its tiles for each
        assert torch.equal(torch.nn.functional.linear(*halves), theirs)
        assert torch.equal(linear_in_core(rows, weight, None), own)


@needs_core
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_rows": -1}, "n_rows and row_stride must not be negative"),
        ({"n_in": 0}, "n_in and n_out must be at least 1"),
        ({"n_out": 0}, "n_in and n_out must be at least 1"),
        ({"row_stride": -4}, "n_rows and row_stride must not be negative"),
        ({"n_rows": 2**40, "n_out": 2**40}, "must not exceed"),
        ({"n_rows": 2**40, "row_stride": 2**40}, "must not exceed"),
        ({"rows_ptr": 0}, "must not be null"),
        ({"weight_ptr": 0}, "must not be null"),
        ({"n_threads": 0}, "n_threads is 0, expected 1 or more"),
    ],
)
def test_the_core_refuses_what_cannot_be(wrong, message):
    tensors = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, 5)
    given = {"rows_ptr": tensors[0].data_ptr(), "weight_ptr": tensors[1].data_ptr(), "out": tensors[2].numpy()}
    given |= {"bias_ptr": 0, "n_rows": 3, "n_in": 4, "n_out": 5, "row_stride": 4, "n_threads": 1}
    with pytest.raises(ValueError, match=message):
        native("cpu")[0].linear(**given | wrong)
    assert not tensors[2].any()


@needs_tiles
def test_few_rows_are_torchs_own(monkeypatch):
    _, other = layer_of("_TileLinear", 64, 64, True, torch.float32)
    made = []
    monkeypatch.setattr(linear, "linear_in_core", lambda states, *_: made.append(len(states)) or states)
    for n_rows in (0, 1, linear._ROWS_FOR_TILES - 1, linear._ROWS_FOR_TILES):
        other(torch.randn(n_rows, 64))
    assert made == [linear._ROWS_FOR_TILES]


@pytest.mark.parametrize("means", MEANS)
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    n_in=st.integers(1, 70),
    n_out=st.integers(1, 70),
    bias=st.booleans(),
    turned=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
)
def test_other_means_compute_what_the_layer_does(means, shape, n_in, n_out, bias, turned, dtype):
    layer, other = layer_of(means, n_in, n_out, bias, dtype)
    states = torch.randn(*shape, n_in, dtype=dtype)
    if turned:
        states = torch.randn(n_in, *shape, dtype=dtype).movedim(0, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "_ROWS_FOR_TILES", 1)
        found, expected = other(states), layer(states)
    assert (type(other) is nn.Linear) == (dtype != torch.float32)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * n_in**0.5)
    assert other.weight is layer.weight


class Doubles(nn.Linear):
    def forward(self, states):
        return 2 * super().forward(states)


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
    with torch.enable_grad(), fast_products(blocks):  # other means know no gradients
        assert list(blocks) == before


@pytest.mark.parametrize("name", ["llama", "opt", "qwen3", "gptj", "deepseek_v3", "bloom"])
def test_packed_replay_by_other_means_equals_hooks_and_strict_replay_never_comes_there(name, faster):
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


def test_tiles_come_first_then_onednn_and_neither_without_reason(monkeypatch):
    for tiles, onednn, expected, said in (
        (True, True, linear._TileLinear, ": matrix tiles (AMX), by actcache._core"),
        (True, False, linear._TileLinear, ": matrix tiles (AMX), by actcache._core"),
        (False, True, linear._OneDnnLinear, ": oneDNN"),
        (False, False, None, ": torch"),
    ):
        monkeypatch.setattr(linear, "tiles_are_there", lambda tiles=tiles: tiles)
        monkeypatch.setattr(linear, "onednn_is_faster", lambda onednn=onednn: onednn)
        assert linear._fastest_means() is expected
        assert linear.describe_products().endswith(said)


@needs_core
def test_no_tiles_without_the_native_core(monkeypatch):
    monkeypatch.setattr(linear, "native", lambda kind: (None, "ACTCACHE_ENGINE=torch"))
    assert not linear.tiles_are_there()
