"""Packs: how sequences are cut into them, and that packed and branched attention is each sequence's own attention."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from actcache.models import packing
from actcache.models.packing import (
    Prefix,
    attend_in_core,
    attend_varlen,
    branched_attention,
    offsets_of,
    packed_attention,
    plan_evenly,
    plan_packs,
    restarting_positions,
    takes_core,
    takes_varlen,
)
from actcache.native import native

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "eos_token_id": 1,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "gemma3 with windows": Gemma3TextConfig(**SMALL, sliding_window=4),
    "gemma2 with soft-caps": Gemma2Config(**SMALL, sliding_window=4),
    "gpt2": GPT2Config(n_embd=16, n_layer=3, n_head=4, vocab_size=50, n_positions=64, bos_token_id=0, eos_token_id=1),
    "mistral with a window": MistralConfig(**SMALL, sliding_window=4),
    "qwen3": Qwen3Config(**SMALL),
    "gpt-oss with sinks and windows": GptOssConfig(
        **SMALL, sliding_window=4, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64
    ),
}
EAGER_ONLY = ("gemma2", "gpt-oss")  # transformers' sdpa has no soft-cap and no sinks
LENGTHS = [5, 9, 1, 13, 4]


def build(name, attention="sdpa"):
    if name.startswith(EAGER_ONLY) and attention == "sdpa":
        pytest.skip("transformers' sdpa has no soft-cap and no sinks")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:  # larger than a fresh model's, so that attention tells in the logits
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(0, 60), st.booleans())
def test_packs_are_all_sequences_in_order_within_the_budget(lengths, max_tokens, padded):
    def tokens(pack):
        taken = [lengths[i] for i in pack]
        return len(taken) * max(taken) if padded else sum(taken)

    packs = plan_packs(lengths, max_tokens, padded=padded)
    assert [index for pack in packs for index in pack] == list(range(len(lengths)))
    for pack in packs:
        assert len(pack) == 1 or tokens(pack) <= max_tokens
    for first, second in itertools.pairwise(packs):  # greedy: the next sequence did not fit
        assert tokens([*first, second.start]) > max_tokens


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 60), st.integers(1, 5), st.booleans())
def test_even_packs_are_those_of_the_lowest_budget_that_takes_no_more_rounds(lengths, max_tokens, n_workers, padded):
    def plan(budget):
        return plan_packs(lengths, budget, padded=padded)

    def rounds(budget):
        return -(-len(plan(budget)) // n_workers)

    lowest = next(budget for budget in range(1, max_tokens + 1) if rounds(budget) <= rounds(max_tokens))
    assert plan_evenly(plan, max_tokens, n_workers) == plan(lowest)


@given(st.lists(st.integers(0, 9), max_size=12))
def test_offsets_and_positions(lengths):
    bounds = offsets_of(lengths).tolist()
    assert bounds == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    if lengths:
        assert restarting_positions(bounds).tolist() == [[i for length in lengths for i in range(length)]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_pack_equals_its_sequences_one_by_one(name, attention):
    model, lengths = build(name, attention), LENGTHS
    ids = [torch.randint(2, 50, (1, length)) for length in lengths]
    bounds = offsets_of(lengths).tolist()
    with torch.no_grad():
        alone = torch.cat([model(one).logits for one in ids], dim=1)
        with packed_attention(model.config, bounds):
            packed = model(torch.cat(ids, dim=1), position_ids=restarting_positions(bounds), use_cache=False).logits
        again = model(ids[1]).logits
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, alone[:, 5:14]), "the model's own attention is back"


def test_the_switch_is_undone_after_an_error():
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"]))
    with pytest.raises(KeyError), packed_attention(model.config, [0, 1]):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


# ---- branches ----


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("where", ["at the end", "anywhere"])
def test_branches_equal_sequences_with_another_last_token(name, attention, where, monkeypatch):
    """Also where one sequence has more of them than one call takes, some have one, and some none."""
    monkeypatch.setattr(packing, "_BRANCHED_AT_ONCE", 3)
    model = build(name, attention)
    ids = [torch.randint(2, 50, (1, length)) for length in LENGTHS]
    bounds, prefix = offsets_of(LENGTHS).tolist(), Prefix()
    sequence_of = [3] * 8 + [0] + [2] * 2 + [1] * 3
    last = [LENGTHS[number] - 1 for number in sequence_of]
    positions = last if where == "at the end" else [(5 * i) % (p + 1) for i, p in enumerate(last)]
    tokens = torch.randint(2, 50, (len(sequence_of),))
    with torch.no_grad():
        with packed_attention(model.config, bounds, prefix):
            model(torch.cat(ids, dim=1), position_ids=restarting_positions(bounds), use_cache=False)
        with branched_attention(model.config, prefix, sequence_of, positions):
            found = model(tokens[None], position_ids=torch.tensor([positions]), use_cache=False).logits[0]
        whole = [
            model(torch.cat([ids[number][:, :position], token.view(1, 1)], dim=1), use_cache=False).logits[0, -1]
            for number, position, token in zip(sequence_of, positions, tokens, strict=True)
        ]
    torch.testing.assert_close(found, torch.stack(whole), rtol=1e-5, atol=2e-5)
    assert model.config._attn_implementation == attention


@st.composite
def tails(draw):
    """Lengths of sequences, and branches of theirs: the sequence, the first position and the last one of each."""
    lengths = draw(st.lists(st.integers(1, 14), min_size=1, max_size=4))
    found = []
    for sequence, length in enumerate(lengths):
        for _ in range(draw(st.integers(0, 5))):
            last = draw(st.integers(0, length - 1))
            found.append((sequence, draw(st.integers(0, last)), last))
    return lengths, found or [(0, 0, 0)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_branches_of_several_tokens_equal_sequences_that_end_in_them(name, attention):
    model = build(name, attention)

    @given(tails(), st.integers(1, 9))
    @settings(max_examples=15)
    def check(drawn, at_once):
        lengths, branches = drawn
        ids = [torch.randint(2, 50, (1, length)) for length in lengths]
        bounds, prefix = offsets_of(lengths).tolist(), Prefix()
        own = [torch.randint(2, 50, (1, last + 1 - first)) for _, first, last in branches]
        sequence_of = [sequence for sequence, first, last in branches for _ in range(first, last + 1)]
        positions = [position for _, first, last in branches for position in range(first, last + 1)]
        sizes = [one.shape[1] for one in own]
        with torch.no_grad(), mock.patch.object(packing, "_BRANCHED_AT_ONCE", at_once):
            with packed_attention(model.config, bounds, prefix):
                model(torch.cat(ids, dim=1), position_ids=restarting_positions(bounds), use_cache=False)
            with branched_attention(model.config, prefix, sequence_of, positions, offsets_of(sizes).tolist()):
                places = {"position_ids": torch.tensor([positions]), "use_cache": False}
                found = model(torch.cat(own, dim=1), **places).logits[0].split(sizes)
            for (sequence, first, _), tokens, logits in zip(branches, own, found, strict=True):
                whole = model(torch.cat([ids[sequence][:, :first], tokens], dim=1), use_cache=False).logits[0, first:]
                torch.testing.assert_close(logits, whole, rtol=1e-5, atol=2e-5)

    check()


# ---- the native core's attention ----


def slow_attention(query, key, value, bounds, scale, window):
    """One query of one head after the other, in float64: ``[T, H, d]`` -> ``[T, H, d_v]``."""
    out = torch.zeros(len(query), query.shape[1], value.shape[2], dtype=torch.float64)
    group = query.shape[1] // key.shape[1]
    for start, stop in itertools.pairwise(bounds):
        for head, i in itertools.product(range(query.shape[1]), range(start, stop)):
            seen = range(max(start, i + 1 - (window or len(query))), i + 1)
            keys, values = (tensor[seen.start : seen.stop, head // group].double() for tensor in (key, value))
            out[i, head] = (keys @ query[i, head].double() * scale).softmax(0) @ values
    return out


def laid_out(tensor, how):
    """``[T, H, d]`` as ``[1, H, T, d]``, in one of the forms that models hand to attention."""
    as_given = tensor.transpose(0, 1)[None]
    if how == "heads first":
        return as_given.contiguous()
    if how == "sliced":
        wide = torch.full((len(tensor), tensor.shape[1] + 2, tensor.shape[2] + 3), torch.nan)
        wide[:, 1:-1, 2:-1] = tensor
        return wide[:, 1:-1, 2:-1].transpose(0, 1)[None]
    return as_given.transpose(2, 3).contiguous().transpose(2, 3) if how == "turned" else as_given


needs_core = pytest.mark.skipif(native("cpu")[0] is None, reason="no native core")


@needs_core
@pytest.mark.parametrize("isa", [0, 1, 2])
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    how=st.sampled_from(["tokens first", "heads first", "sliced", "turned"]),
    window=st.none() | st.integers(1, 80),
    scale=st.sampled_from([None, 0.02, 0.5]),
    n_threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_attend_in_core_equals_one_query_after_the_other(
    isa, lengths, heads, widths, how, window, scale, n_threads, seed
):
    generator = torch.Generator().manual_seed(seed)
    bounds = offsets_of(lengths).tolist()
    shapes = [(heads[0], widths[0]), (heads[1], widths[0]), (heads[1], widths[1])]
    query, key, value = (torch.randn(bounds[-1], *shape, generator=generator) for shape in shapes)
    expected = slow_attention(query, key, value, bounds, widths[0] ** -0.5 if scale is None else scale, window)
    core, before = native("cpu")[0], torch.get_num_threads()
    widest = core.isa()
    core.limit_isa(isa)
    torch.set_num_threads(n_threads)
    try:
        found = attend_in_core(*(laid_out(one, how) for one in (query, key, value)), bounds, scale, window)
    finally:
        core.limit_isa(widest)
        torch.set_num_threads(before)
    assert found.shape == (1, *expected.shape)
    assert found.is_contiguous()
    torch.testing.assert_close(found[0].double(), expected, rtol=0, atol=2e-5)


@needs_core
def test_attend_in_core_hands_on_what_is_not_finite():
    query, key, value = torch.randn(3, 1, 2, 40, 16)
    key[0, 0, 5, 3], value[0, 1, 33, 7] = torch.nan, torch.inf
    found = attend_in_core(query, key, value, [0, 30, 40], None, None)[0]
    assert found[:5].isfinite().all()
    assert found[5:30, 0].isnan().all()
    assert found[5:, 1].nan_to_num(0, 0, 0).isfinite().all()
    assert not found[33:, 1, 7].isfinite().any()
    assert found[30:, 0].isfinite().all()  # another sequence
    huge = attend_in_core(1e4 * query, torch.ones_like(key), value.nan_to_num(0, 0, 0), [0, 40], 1.0, 1)[0]
    torch.testing.assert_close(huge, value[0].nan_to_num(0, 0, 0).transpose(0, 1))  # one key seen: its value


@needs_core
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_heads": (3, 2)}, "n_heads must be a multiple"),
        ({"widths": (0, 4)}, "widths and window must be at least 1"),
        ({"window": 0}, "widths and window must be at least 1"),
        ({"n_tokens": 6}, "offsets must run from 0 to n_tokens"),
        ({"n_sequences": -1}, "counts must not be negative"),
        ({"n_threads": 0}, "n_threads is 0, expected 1 or more"),
        ({"query_ptr": 0}, "must not be null"),
        ({"offsets_ptr": 0}, "offsets must not be null"),
        ({"widths": (2**62, 2**62)}, "must not exceed"),
        ({"offsets": [0, 5, 3, 5], "n_sequences": 3}, "offsets must not decrease"),
    ],
    ids=str,
)
def test_attention_in_core_refuses_what_does_not_fit(change, words):
    tensors = [torch.zeros(5, 2, 4) for _ in range(4)]
    change = dict(change)
    offsets = torch.tensor(change.pop("offsets", [0, 2, 5]))
    names = ("query_ptr", "key_ptr", "value_ptr")
    given = {name: tensor.data_ptr() for name, tensor in zip(names, tensors[:3], strict=True)}
    given |= {
        "out": tensors[3].numpy(),
        "offsets_ptr": offsets.data_ptr(),
        "n_sequences": 2,
        "n_tokens": 5,
        "n_heads": (2, 2),
        "widths": (4, 4),
    }
    given |= {f"{name}_strides": (8, 4) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match=words):
        native("cpu")[0].attend(**given | {"window": 5, "scale": 1.0, "n_threads": 1} | change)


@needs_core
@pytest.mark.parametrize(
    ("name", "attention", "taken"),
    [
        ("llama", "sdpa", [True] * 4),
        ("qwen3", "sdpa", [True] * 4),
        ("mistral with a window", "sdpa", [True] * 4),
        ("gemma3 with windows", "sdpa", [True] * 4),
        ("gpt2", "sdpa", [True] * 3),
        ("llama", "eager", [False] * 4),
        ("gemma2 with soft-caps", "eager", [False] * 4),
        ("gpt-oss with sinks and windows", "eager", [False] * 4),
    ],
)
def test_packs_go_to_the_core_where_it_computes_the_same(name, attention, taken, monkeypatch):
    model, answers = build(name, attention), []

    def decide(*given):
        answers.append(takes_core(*given))
        return answers[-1]

    monkeypatch.setattr(packing, "takes_core", decide)
    ids = [torch.randint(2, 50, (1, length)) for length in LENGTHS]
    bounds = offsets_of(LENGTHS).tolist()

    def packed():
        with packed_attention(model.config, bounds):
            return model(torch.cat(ids, dim=1), position_ids=restarting_positions(bounds), use_cache=False).logits

    with torch.no_grad():
        alone = torch.cat([model(one, use_cache=False).logits for one in ids], dim=1)
        torch.testing.assert_close(packed(), alone, rtol=1e-5, atol=2e-5)
        assert answers == (taken if native("cpu")[0].isa() else [False] * len(taken))
        answers.clear()
        monkeypatch.setattr(packing, "_LONGEST_IN_CORE", max(LENGTHS) - 1)
        torch.testing.assert_close(packed(), alone, rtol=1e-5, atol=2e-5)
        assert answers == []
    monkeypatch.setattr(packing, "_LONGEST_IN_CORE", max(LENGTHS))
    torch.testing.assert_close(packed(), alone, rtol=1e-5, atol=2e-5)  # with gradients, which the core has none of
    assert answers == [False] * len(taken)


# ---- the varlen kernel ----


def varlen_reference(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """What torch documents of varlen_attn, one sequence and one head after the other: query ``[T, H, d]``."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert int(cu_seq_q[-1]) == len(query) == len(key) == len(value)
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert all(tensor.is_contiguous() for tensor in (query, key, value))
    n_heads, n_key_heads = query.shape[1], key.shape[1]
    assert n_heads % n_key_heads == 0
    assert enable_gqa or n_heads == n_key_heads
    left, right = window_size
    out = torch.zeros_like(query)
    for start, stop in itertools.pairwise(cu_seq_q.tolist()):
        for head, i in itertools.product(range(n_heads), range(start, stop)):
            seen = [j for j in range(start, stop) if (left < 0 or i - j <= left) and (right < 0 or j - i <= right)]
            keys, values = (tensor[seen, head * n_key_heads // n_heads] for tensor in (key, value))
            scores = keys @ query[i, head] * (query.shape[-1] ** -0.5 if scale is None else scale)
            out[i, head] = scores.softmax(0) @ values
    return out


@pytest.fixture
def as_if_on_cuda(monkeypatch):
    """Packs take the varlen path if they would as bfloat16 on a GPU, and the slow reference computes it; how often."""
    answers = []

    def on_cuda(module, query, key, value, masks, arguments):
        there = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=query.shape)
        answers.append(takes_varlen(module, there, key, value, masks, arguments))
        return answers[-1]

    monkeypatch.setattr(packing, "varlen_attn", varlen_reference)
    monkeypatch.setattr(packing, "takes_varlen", on_cuda)
    return answers


@pytest.mark.parametrize(
    ("name", "attention", "taken"),
    [
        ("llama", "sdpa", [True] * 4),
        ("qwen3", "sdpa", [True] * 4),
        ("mistral with a window", "sdpa", [True] * 4),
        ("gemma3 with windows", "sdpa", [True] * 4),
        ("gpt2", "sdpa", [False] * 3),  # heads of 4: the kernel moves 16 bytes at a time
        ("llama", "eager", [False] * 4),
        ("gemma2 with soft-caps", "eager", [False] * 4),
        ("gpt-oss with sinks and windows", "eager", [False] * 4),
    ],
)
def test_the_varlen_path_equals_sequences_one_by_one(name, attention, taken, as_if_on_cuda):
    model = build(name, attention)
    ids = [torch.randint(2, 50, (1, length)) for length in LENGTHS]
    bounds = offsets_of(LENGTHS).tolist()
    with torch.no_grad():
        alone = torch.cat([model(one, use_cache=False).logits for one in ids], dim=1)
        with packed_attention(model.config, bounds):
            packed = model(torch.cat(ids, dim=1), position_ids=restarting_positions(bounds), use_cache=False).logits
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=2e-5)
    assert as_if_on_cuda == taken


@pytest.mark.parametrize("window", [None, 1, 3, 40])
@pytest.mark.parametrize("n_key_heads", [1, 2, 6])
def test_attend_varlen_equals_sdpa_sequence_by_sequence(window, n_key_heads, monkeypatch):
    monkeypatch.setattr(packing, "varlen_attn", varlen_reference)
    bounds = [0, 5, 6, 13]
    generator = torch.Generator().manual_seed(0)
    # Sliced out of a wider tensor, as heads of one fused projection are.
    query = torch.randn(1, 13, 6 + n_key_heads, 8, generator=generator)[:, :, :6].transpose(1, 2)
    key, value = torch.randn(2, 1, n_key_heads, 13, 8, generator=generator)
    found = attend_varlen(query, key, value, bounds, {"sliding_window": window, "scaling": 0.3})
    assert found.shape == (1, 13, 6, 8)
    for start, stop in itertools.pairwise(bounds):
        at = torch.arange(stop - start)
        distance = at[:, None] - at[None, :]
        mask = (distance >= 0) & (distance < (window or 99))
        q, k, v = (tensor[:, :, start:stop] for tensor in (query, key, value))
        one = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(found[:, start:stop], one.transpose(1, 2), rtol=1e-5, atol=1e-5)


def heads(n_heads=4, width=16, dtype=torch.bfloat16, device="cuda"):
    return torch.empty(1, 12, n_heads, width, dtype=dtype, device=device).transpose(1, 2)


def mask_of(length, sees):
    at = torch.arange(length)
    return sees(at[:, None], at[None, :])[None, None]


CAUSAL = mask_of(7, lambda i, j: i >= j)
WINDOW = mask_of(7, lambda i, j: (i >= j) & (i - j < 3))
CHUNKS = mask_of(7, lambda i, j: (i >= j) & (i // 3 == j // 3))
BOTH_WAYS = mask_of(7, lambda i, j: (i - j).abs() < 3)
ADDED = torch.zeros(1, 1, 7, 7).masked_fill(~WINDOW, -torch.inf)
PASSED_THROUGH = {"use_cache": False, "output_attentions": False, "output_router_logits": False, "position_ids": 1}


@pytest.mark.parametrize(
    ("expected", "change"),
    [
        (True, {}),
        (True, {"dtype": torch.float16}),
        (True, {"arguments": {"scaling": 0.1, "dropout": 0.0, "is_causal": None, "softcap": None, "s_aux": None}}),
        (True, {"arguments": PASSED_THROUGH}),
        (True, {"masks": [None, WINDOW], "arguments": {"sliding_window": 3}}),
        (True, {"masks": [None, None], "arguments": {"sliding_window": 12}}),
        (False, {"dtype": torch.float32}),
        (False, {"device": "cpu"}),
        (False, {"width": 20}),
        (False, {"width": 264}),
        (False, {"value_width": 24}),
        (False, {"sinks": torch.zeros(4)}),
        (False, {"arguments": {"softcap": 50.0}}),
        (False, {"arguments": {"s_aux": torch.zeros(4)}}),
        (False, {"arguments": {"dropout": 0.1}}),
        (False, {"arguments": {"is_causal": False}}),
        (False, {"arguments": {"position_bias": torch.zeros(1)}}),
        (False, {"masks": [None, CAUSAL]}),
        (False, {"masks": [None, WINDOW]}),
        (False, {"masks": [WINDOW, CAUSAL], "arguments": {"sliding_window": 3}}),
        (False, {"masks": [WINDOW], "arguments": {"sliding_window": 4}}),
        (False, {"masks": [CHUNKS], "arguments": {"sliding_window": 3}}),
        (False, {"masks": [BOTH_WAYS], "arguments": {"sliding_window": 3}}),
        (False, {"masks": [ADDED], "arguments": {"sliding_window": 3}}),
        (False, {"no_kernel": True}),
    ],
    ids=str,
)
def test_varlen_is_taken_only_where_it_computes_the_same(expected, change, monkeypatch):
    if change.get("no_kernel"):
        monkeypatch.setattr(packing, "varlen_attn", None)
    module = SimpleNamespace(sinks=change.get("sinks"))
    place = {"dtype": change.get("dtype", torch.bfloat16), "device": change.get("device", "cuda")}
    width = change.get("width", 16)
    with FakeTensorMode():
        query = heads(4, width, **place)
        key, value = heads(2, width, **place), heads(2, change.get("value_width", width), **place)
    masks, arguments = change.get("masks", [None, None]), change.get("arguments", {"scaling": 0.25})
    assert takes_varlen(module, query, key, value, masks, arguments) is expected


@pytest.mark.skipif(packing.varlen_attn is None, reason="this torch has no varlen kernel")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arguments", [{}, {"sliding_window": 3, "scaling": 0.3, "use_cache": False}], ids=str)
def test_the_varlen_kernel_takes_a_pack_of_these_shapes_on_a_gpu(dtype, arguments):
    """Without one: shapes, dtypes and devices, by torch's own rules for the kernel."""
    with FakeTensorMode():
        query, key, value = heads(4, dtype=dtype), heads(2, dtype=dtype), heads(2, dtype=dtype)
        assert takes_varlen(SimpleNamespace(), query, key, value, [None, None], arguments)
        out = attend_varlen(query, key, value, [0, 5, 12], arguments)
        assert out.shape == (1, 12, 4, 16)
        assert out.dtype == dtype
        assert out.device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral with a window", "gemma3 with windows"])
def test_the_varlen_kernel_equals_sdpa_on_a_gpu(name, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    model = build(name).to("cuda", torch.bfloat16)
    ids = torch.randint(2, 50, (1, sum(LENGTHS)), device="cuda")
    bounds, taken = offsets_of(LENGTHS).tolist(), []

    def run(answer):
        def decide(*given):
            taken.append(takes_varlen(*given))
            return answer and taken[-1]

        monkeypatch.setattr(packing, "takes_varlen", decide)
        with torch.no_grad(), packed_attention(model.config, bounds):
            return model(ids, position_ids=restarting_positions(bounds, "cuda"), use_cache=False).logits.float()

    one_kernel, one_by_one = run(answer=True), run(answer=False)
    assert all(taken)
    assert (one_kernel - one_by_one).abs().max() <= 0.05 * one_by_one.abs().max()
