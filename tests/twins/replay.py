"""Replay by hooks on the whole model: small models in memory, sequences, and what their last states must be."""

from __future__ import annotations

import itertools

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    Phi3Config,
    Qwen3Config,
)

from twins import reference

WIDTH, N_BLOCKS, BOUNDARY, VOCAB_SIZE = 32, 4, 2, 50
LENGTHS = (7, 1, 12, 3, 9)
TOKENS = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
LLAMA = {
    **{"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": N_BLOCKS, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, **TOKENS},
}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [3.0, 5.0, 7.0, 9.0]}
LIMIT = 8  # positions of the original training
CONFIGS = {
    "llama": LlamaConfig(**LLAMA),
    "gpt2": GPT2Config(n_embd=WIDTH, n_layer=N_BLOCKS, n_head=4, n_positions=64, **TOKENS),
    "gptj": GPTJConfig(n_embd=WIDTH, n_layer=N_BLOCKS, n_head=4, rotary_dim=4, n_positions=64, **TOKENS),
    "deepseek_v3": DeepseekV3Config(
        **LLAMA | {"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 12, "first_k_dense_replace": N_BLOCKS},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
    ),
    "bloom": BloomConfig(hidden_size=WIDTH, n_layer=N_BLOCKS, n_head=4, **TOKENS),
    "opt": OPTConfig(
        **{"hidden_size": WIDTH, "num_hidden_layers": N_BLOCKS, "num_attention_heads": 4, "ffn_dim": 48, **TOKENS},
        **{"word_embed_proj_dim": WIDTH, "max_position_embeddings": 64},
    ),
    "qwen3": Qwen3Config(**LLAMA, head_dim=8),
    "mamba": MambaConfig(hidden_size=WIDTH, state_size=4, num_hidden_layers=N_BLOCKS, **TOKENS),
    "phi3 longrope": Phi3Config(
        **LLAMA,
        original_max_position_embeddings=LIMIT,
        rope_parameters={
            **{"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, **FACTORS},
            "original_max_position_embeddings": LIMIT,
        },
    ),
}


def build(name):
    """With larger weights than a fresh model's, so that every token of a sequence tells in its last state."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval().requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim == 2 and not parameter_name.endswith("A_log"):
            parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5)
    return model


class Sequences:
    """Sequences of these lengths: the states of a model, edited or not, and what hooks make of them."""

    def __init__(self, model, lengths=LENGTHS, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.model, self.lengths = model, lengths
        self.ids = [torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
        # Not the model's own states, which a replay that ignored them would give too.
        self.states = [
            reference.states(model, ids, BOUNDARY) + torch.randn(len(ids), WIDTH, generator=generator)
            for ids in self.ids
        ]
        self.rows = torch.cat(self.states)
        self.offsets = [0, *itertools.accumulate(lengths)]

    def hooked(self, edit=lambda state: state):
        """``[n, D]``."""
        return torch.stack(
            [
                reference.overwritten(self.model, ids, BOUNDARY, edit(state))[-1]
                for ids, state in zip(self.ids, self.states, strict=True)
            ]
        )


SHIFT = torch.linspace(-1, 1, WIDTH)


def separate(late, rows, offsets, positions, variants, *, donors=None, keys=None, prompts=None, **how):
    """``[m, n_variants, D]``: each event by a replay of its sequence alone, cut after its position."""
    found = []
    for event, (sequence, position) in enumerate(positions):
        span = slice(offsets[sequence], offsets[sequence] + position + 1)
        cut = {label: other[span] for label, other in (donors or {}).items()}
        key = [str(event) if keys is None else keys[event]]
        names = {"keys": key, "prompts": [str(sequence) if prompts is None else prompts[event]]}
        found.append(late.run_variants(rows[span], [0, position + 1], variants, donors=cut, **names, **how)[0])
    return torch.stack(found)
