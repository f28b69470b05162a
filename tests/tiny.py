"""Tiny random checkpoints on disk: real folders that transformers loads, small enough to make inside a test.

A checkpoint has five blocks, a width of 32 or 40 and a byte-level tokenizer trained on the text below. Its weights are
random, scaled so that greedy text varies and float32 rounding decides no token; a pair is a checkpoint and a perturbed
copy of it, whose greedy continuations part after a few tokens on most prompts. Same arguments, same weights.
"""

import copy
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ARCHS = ("llama", "qwen3", "gemma3", "olmo2", "gpt2")
ALL_ARCHS = (*ARCHS, "gemma2", "mistral")

N_BLOCKS = 5
MAX_POSITIONS = 128
VOCAB_SIZE = 120
EOS, PAD = "<|endoftext|>", "<|pad|>"
EOS_ID, PAD_ID = 0, 1

_CORPUS = (
    "The river runs past the old stone mill and on to the sea.",
    "In the morning the baker opened the door and lit the oven.",
    "She asked whether the train would stop at the next station.",
    "What is the capital of the country where the match was held?",
    "Add the numbers, then divide the total by three: 12 + 15 + 18 = 45.",
    "def area(width, height):\n    return width * height\n",
    "There are seven days in the week and twelve months in the year.",
    "Please write a short note to thank the teacher for the lesson.",
)

PROMPTS = (
    "Yes",
    "12 + 7 =",
    "The sea",
    "Once upon a time",
    "def area(w, h):",
    "What is the capital?",
    "Name three rivers",
    "Hi!",
    "In the morning the baker",
    "Please write a short note.",
    "She asked",
    "seven days in the week",
    "To be, or not to be",
    "Q: How far? A:",
    "[1, 2, 3, 4",
    "the other station and then the",
    "x = y * z\nprint(",
    "Why?",
    "Stone by stone",
    "Thank the teacher for",
    "Dear Sir,\n",
    "1, 1, 2, 3, 5, 8,",
    "A match was held where the train stops",
    "Zebra",
)
_CATEGORIES = ("prose", "question", "code")

# Both kinds on either side of the default boundary, 3.
_WINDOWED = ("sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention")

# Widths and head counts differ on purpose: 40 is no power of two, and qwen3's heads are together wider than D.
_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": N_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
}
_GEMMA: dict[str, Any] = {
    **_COMMON,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 6,
    "layer_types": list(_WINDOWED),
}
LIMIT = 12
_LONGROPE: dict[str, Any] = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
    **{"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [3.0, 5.0, 7.0, 9.0]},
    "original_max_position_embeddings": LIMIT,
}
_ARCH: dict[str, tuple[type, type, dict[str, Any], bool]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, _COMMON, False),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {**_COMMON, "hidden_size": 40, "head_dim": 16}, True),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, _GEMMA, True),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {**_COMMON, "num_key_value_heads": 4}, False),
    "gpt2": (
        GPT2Config,
        GPT2LMHeadModel,
        {"n_embd": 40, "n_layer": N_BLOCKS, "n_head": 4, "n_positions": MAX_POSITIONS, "n_inner": 64},
        True,
    ),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {**_GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 10.0},
        True,
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {**_COMMON, "sliding_window": 9}, False),
    # Whose forwards depend on the longest sequence of a batch, and on places in a row, beyond LIMIT tokens.
    "phi3": (
        Phi3Config,
        Phi3ForCausalLM,
        {**_COMMON, "rope_parameters": _LONGROPE, "original_max_position_embeddings": LIMIT},
        False,
    ),
    "llama4": (
        Llama4TextConfig,
        Llama4ForCausalLM,
        {
            **{**_COMMON, "head_dim": 8, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 9},
            **{
                "attention_chunk_size": 7,
                "floor_scale": LIMIT + 1,
                "attn_scale": 0.5,
                "no_rope_layers": [1, 0, 1, 1, 0],
            },
        },
        False,
    ),
}

# Measured at seed 0 over PROMPTS and 24 new tokens in both dtypes: 19 to 24 of 24 prompts diverge, at a median step of
# 1 to 3.5; in float32 every compared choice leads by at least 5e-4, against logits within 4e-5 of float64.
EPS = 0.025
_EMBEDDING_STD = 0.2
_BLOCK_GAIN = 1.4
_LOGIT_STD = 4.0

CHANGES = ("all", "late", "upstream", "none")


@functools.cache
def _tokenizer_backend() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Printable ASCII stands for itself in the byte-level alphabet; Ġ, Ċ and ĉ stand for space, newline and tab.
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "ĉ"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def write_tokenizer(folder: str | Path) -> None:
    """Save the tokenizer files into `folder`: always the same tokenizer, round-tripping ASCII text, with no BOS."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer_backend(), eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    tokenizer.save_pretrained(folder)


def _block_index(name: str) -> int | None:
    match = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def _noise(param: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(param.shape, generator=generator, dtype=torch.float32)


@torch.no_grad()
def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Random weights whose blocks write far more into the residual stream than the embedding does.

    Were the embedding to dominate, a tied head would repeat the last token for ever.
    """
    is_gemma = model.config.model_type.startswith("gemma")
    width = model.config.hidden_size
    # Gemma multiplies looked-up embeddings by sqrt(D).
    embedding_std = _EMBEDDING_STD / (width**0.5 if is_gemma else 1)
    # The head sees a vector of RMS 1 times this, so logits have a standard deviation of _LOGIT_STD.
    final_norm_scale = _LOGIT_STD / (embedding_std * width**0.5)
    for name, param in model.named_parameters():
        noise = _noise(param, generator)
        if _block_index(name) is None and param.ndim == 2:
            param.copy_(embedding_std * noise)
        elif param.ndim == 2:
            fan_in = param.shape[0] if model.config.model_type == "gpt2" else param.shape[1]
            param.copy_(_BLOCK_GAIN / fan_in**0.5 * noise)
        elif name.endswith("bias"):
            param.copy_(0.1 * noise)
        else:
            scale = final_norm_scale if _block_index(name) is None else 1.0
            # Gemma's norms multiply by 1 + weight.
            param.copy_(scale * (1 + 0.1 * noise) - (1 if is_gemma else 0))


@torch.no_grad()
def _perturb(model: PreTrainedModel, generator: torch.Generator, eps: float, change: str, boundary: int) -> None:
    """Add noise of relative size `eps` to the parameters that `change` names."""
    for name, param in model.named_parameters():
        noise = _noise(param, generator)
        block = _block_index(name)
        selected = {
            "all": True,
            "late": block is not None and block >= boundary,
            "upstream": block is not None and block < boundary,
            "none": False,
        }[change]
        if selected:
            param.add_(eps * param.square().mean().sqrt() * noise)


def _build(arch: str, seed: int, tie: bool | None, overrides: dict[str, Any]) -> PreTrainedModel:
    config_class, model_class, settings, tied_by_default = _ARCH[arch]
    config = config_class(
        **{
            "vocab_size": VOCAB_SIZE,
            "tie_word_embeddings": tied_by_default if tie is None else tie,
            "bos_token_id": None,
            "eos_token_id": EOS_ID,
            "pad_token_id": PAD_ID,
            **settings,
            **overrides,
        }
    )
    model = model_class(config)
    _randomise(model, torch.Generator().manual_seed(seed))
    return model


def _save(model: PreTrainedModel, folder: str | Path, dtype: torch.dtype, shards: bool) -> Path:
    folder = Path(folder)
    copied: Any = copy.deepcopy(model)
    copied.to(dtype).save_pretrained(folder, max_shard_size="40KB" if shards else "1GB")
    write_tokenizer(folder)
    return folder


def make_checkpoint(
    folder: str | Path,
    arch: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tie: bool | None = None,
    shards: bool = False,
    **config_overrides: Any,
) -> Path:
    """Write a random checkpoint of `arch` into `folder` and return the folder.

    `tie` ties (or unties) the head and the embedding; None keeps the architecture's habit, and ALL_ARCHS has both.
    `shards` splits the weights over several safetensors files with an index. `config_overrides` go to the config.
    """
    return _save(_build(arch, seed, tie, config_overrides), folder, dtype, shards)


def make_pair(
    folder: str | Path,
    arch: str,
    *,
    seed: int = 0,
    eps: float = EPS,
    dtype: torch.dtype = torch.float32,
    change: str = "all",
    boundary: int = 3,
    tie: bool | None = None,
    shards: bool = False,
    **config_overrides: Any,
) -> tuple[Path, Path]:
    """Write `folder`/pt and `folder`/it, the second a copy of the first with noise of relative size `eps`.

    `change` says where: "all" parameters, only the "late" blocks (>= `boundary`), only the "upstream" blocks
    (< `boundary`; embedding, final norm and head stay), or "none" (the same weights twice).
    """
    if change not in CHANGES:
        raise ValueError(f"change is {change!r}, expected one of {CHANGES}")
    model = _build(arch, seed, tie, config_overrides)
    pt_dir = _save(model, Path(folder) / "pt", dtype, shards)
    _perturb(model, torch.Generator().manual_seed(seed + 1), eps, change, boundary)
    it_dir = _save(model, Path(folder) / "it", dtype, shards)
    return pt_dir, it_dir


def make_lineup(
    folder: str | Path,
    arch: str,
    labels: Sequence[str],
    *,
    seed: int = 0,
    eps: float = EPS,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Path]:
    """Write a folder per label: a checkpoint, then each the one before with noise of relative size `eps`."""
    model = _build(arch, seed, None, {})
    folders = {}
    for number, label in enumerate(labels):
        if number:
            _perturb(model, torch.Generator().manual_seed(seed + number), eps, "all", 0)
        folders[label] = _save(model, Path(folder) / label, dtype, shards=False)
    return folders


def write_prompts(path: str | Path, n: int | None = None) -> Path:
    """Write the first `n` (None: all) of PROMPTS as JSON lines with the keys id, prompt and category."""
    path = Path(path)
    with path.open("w", encoding="utf-8") as file:
        for index, prompt in enumerate(PROMPTS[:n]):
            line = {"id": f"p{index:02d}", "prompt": prompt, "category": _CATEGORIES[index % len(_CATEGORIES)]}
            file.write(json.dumps(line) + "\n")
    return path
