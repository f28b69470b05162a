"""Packs: how sequences are cut into them, and that packed attention is each sequence's own attention."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, GPT2Config, LlamaConfig

from actcache.packing import offsets_of, packed_attention, plan_packs, restarting_positions

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
}


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(0, 60))
def test_packs_are_all_sequences_in_order_within_the_budget(lengths, max_tokens):
    packs = plan_packs(lengths, max_tokens)
    assert [index for pack in packs for index in pack] == list(range(len(lengths)))
    for pack in packs:
        assert len(pack) == 1 or sum(lengths[i] for i in pack) <= max_tokens
    for first, second in itertools.pairwise(packs):  # greedy: the next sequence did not fit
        assert sum(lengths[i] for i in first) + lengths[second.start] > max_tokens


@given(st.lists(st.integers(0, 9), max_size=12))
def test_offsets_and_positions(lengths):
    bounds = offsets_of(lengths).tolist()
    assert bounds == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    if lengths:
        assert restarting_positions(bounds).tolist() == [[i for length in lengths for i in range(length)]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_pack_equals_its_sequences_one_by_one(name, attention):
    if name.startswith("gemma2") and attention == "sdpa":
        pytest.skip("transformers' sdpa has no soft-cap")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation=attention).eval()
    lengths = [5, 9, 1, 13, 4]
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
