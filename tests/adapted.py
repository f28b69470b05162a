"""Adapters on tiny checkpoints, made by peft."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

TARGETS = {"gpt2": ["c_attn", "c_proj"]}
EMBEDDING, NORM = {"gpt2": "wte"}, {"gpt2": "ln_1"}


def config_of(name: str, arch: str = "llama") -> Any:
    """Of an adapter for an architecture."""
    targets = TARGETS.get(arch, ["q_proj", "v_proj", "down_proj"])
    embedding, norm = EMBEDDING.get(arch, "embed_tokens"), NORM.get(arch, "input_layernorm")
    own: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": targets}
    lora = {"r": 4, **own}
    configs = {
        "lora": lambda: LoraConfig(**lora),
        "dora": lambda: LoraConfig(**lora, use_dora=True),
        "rslora": lambda: LoraConfig(
            **lora, use_rslora=True, rank_pattern={targets[1]: 2}, alpha_pattern={targets[1]: 3}
        ),
        "first block and head": lambda: LoraConfig(**lora, layers_to_transform=[0], modules_to_save=["lm_head"]),
        "whole modules": lambda: LoraConfig(**lora, modules_to_save=[embedding, "lm_head"]),
        "all linear": lambda: LoraConfig(**lora | {"target_modules": "all-linear"}),
        "some blocks": lambda: LoraConfig(**lora, layers_to_transform=[1, 3]),
        "pattern": lambda: LoraConfig(**lora | {"target_modules": rf".*\.[24]\..*\.({'|'.join(targets)})"}),
        "biases": lambda: LoraConfig(**lora, bias="all"),
        "embedding": lambda: LoraConfig(**lora | {"target_modules": [*targets, embedding]}),
        "tokens": lambda: LoraConfig(**lora, trainable_token_indices=[3, 5]),
        "adalora": lambda: AdaLoraConfig(**own, init_r=4, target_r=4, total_step=10),
        "loha": lambda: LoHaConfig(**lora),
        "lokr": lambda: LoKrConfig(**lora),
        "ia3": lambda: IA3Config(**own, feedforward_modules=targets[-1:]),
        "oft": lambda: OFTConfig(**own, r=0, oft_block_size=4),
        "boft": lambda: BOFTConfig(**own, boft_block_size=4),
        "hra": lambda: HRAConfig(**lora),
        "miss": lambda: MissConfig(**lora),
        "norms": lambda: LNTuningConfig(**own | {"target_modules": [norm]}),
    }
    return configs[name]()


KINDS = (
    *("lora", "dora", "rslora", "first block and head", "whole modules", "all linear", "some blocks", "pattern"),
    *("biases", "embedding", "tokens", "adalora", "loha", "lokr", "ia3", "oft", "boft", "hra", "miss", "norms"),
)


def plain_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """As transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def make_adapter(folder: Path, base: Path, config: Any, *, n_steps: int = 2, rate: float = 0.05) -> Path:
    """An adapter on a base, trained for some steps on random ids."""
    torch.manual_seed(0)
    # peft names a compiler in the environment, and where it cannot build an extension the name stays there.
    with mock.patch.dict(os.environ), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = get_peft_model(plain_model(base), config)
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=rate)
        for _ in range(n_steps):
            ids = torch.randint(2, 100, (4, 12))
            adapted(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.save_pretrained(str(folder))
    return folder
