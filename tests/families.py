"""A tiny random model of every decoder family that transformers has a causal language model for, and of models for
images and text.

A family is a model type; some have a second form that takes another path (`falcon, ALiBi`). Every model has four
blocks of width 32, a window of five tokens where it knows one, and both kinds of blocks on either side of block 2 where
it has two. It shares no code with the package.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

N_BLOCKS, WIDTH, VOCAB_SIZE, WINDOW, BOUNDARY = 4, 32, 61, 5, 2
# What configs call a window.
WINDOWS = (
    *("sliding_window", "sliding_window_size", "window_size", "local_attention"),
    *("attention_window_size", "attention_chunk_size", "keep_window_size"),
)

# Every field that some config has for a size, by the value it gets here.
_SIZES: dict[int, str] = {
    N_BLOCKS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks "
    "num_decoder_layers num_encoder_layers",
    WIDTH: "hidden_size n_embd d_model emb_dim embedding_size embedding_dim word_embed_proj_dim input_embedding_size "
    "output_embedding_size hidden_size_global",
    48: "intermediate_size moe_intermediate_size shared_expert_intermediate_size n_inner ffn_dim decoder_ffn_dim "
    "encoder_ffn_dim ffn_hidden_size expert_ffn_hidden_size d_inner dff dim_ff shared_intermediate_size "
    "intermediate_size_mlp prefix_dense_intermediate_size dense_intermediate_size feed_forward_size "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size",
}
_COUNTS: dict[int, str] = {
    1: "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group first_k_dense_replace "
    "mamba_n_groups n_groups mamba_ngroups",
    2: "num_key_value_heads swa_num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k top_k_experts",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads num_experts n_routed_experts "
    "num_local_experts moe_num_experts mamba_n_heads mamba_num_heads linear_num_heads linear_num_key_heads "
    "linear_num_value_heads qk_rope_head_dim rotary_dim index_topk index_n_heads",
    8: "head_dim swa_head_dim global_head_dim kv_channels qk_nope_head_dim v_head_dim attention_head_dim "
    "linear_head_dim linear_key_head_dim linear_value_head_dim dim_head attention_head_size kv_lora_rank "
    "mamba_d_state ssm_state_size state_size index_head_dim chunk_size mamba_chunk_size",
    12: "qk_head_dim q_lora_rank",
    16: "mamba_head_dim",
    64: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions mamba_d_ssm",
}
_FIELDS: dict[str, Any] = {
    **{name: value for sizes in (_SIZES, _COUNTS) for value, names in sizes.items() for name in names.split()},
    **dict.fromkeys(WINDOWS, WINDOW),
    **{"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True},
    **{"use_sliding_window": True, "use_cache": False, "image_size": 28, "patch_size": 14},
}
_PATTERNS = ("layer_types", "mlp_layer_types", "layers_block_type")
_WINDOWED = ["sliding_attention", "full_attention"] * 2
_INKLING = {"unpadded_vocab_size": VOCAB_SIZE - 1, "rel_extent": 16, "d_rel": 4}
_GEMMA3N = {"vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 8}
_NO_LAYER_INPUTS = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SECTIONS = {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}

# What a family needs beside these, by its model type (of a part, too).
_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 16},
    "cohere_compass_text": {
        "layer_types": _WINDOWED,
        "rope_parameters": {"sliding_attention": {**_ROPE, "mrope_section": [2, 1, 1]}, "full_attention": None},
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {
        **{"layer_types": _WINDOWED[::-1], "use_dsa": False, "head_dim": 12, "swa_head_dim": 12},
        **{"swa_num_key_value_heads": 4, "swa_num_attention_heads": 4, "swa_v_head_dim": 8},
        **{"swa_q_lora_rank": 12, "swa_kv_lora_rank": 8, "swa_qk_nope_head_dim": 8},
    },
    "dots3_note_vision_encoder": {
        **{"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH, "num_local_experts": 4},
        "mlp_layer_types": ["dense"] * N_BLOCKS,
    },
    "dots3_note_audio_encoder": {"adapter_out_dim": WIDTH, "adapter_input_size": WIDTH, "downsample_hidden_size": 16},
    "gemma3n_text": {**_GEMMA3N, "num_kv_shared_layers": 1, "layer_types": _WINDOWED},
    "gemma4_text": _GEMMA3N,
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", **_NO_LAYER_INPUTS},
        "backbone_hidden_size": WIDTH,
    },
    "gemma4_unified_assistant": {"backbone_hidden_size": WIDTH},
    "qwen2_vl_vision": {"depth": 1, "embed_dim": WIDTH},
    **{
        f"{name}_vision": {"depth": 1, "out_hidden_size": WIDTH, "deepstack_visual_indexes": [0]}
        for name in ("glm4v", "glm4v_moe", "glm_ocr", "qwen3_vl", "qwen3_vl_moe")
    },
    "cohere2_vision": {"alignment_intermediate_size": 48},
    **dict.fromkeys(("glm4v_text", "glm_ocr_text", "qwen2_vl_text", "qwen2_5_vl_text"), _SECTIONS),
    "paddleocr_vl_text": {**_SECTIONS, "rope_theta": 1e4},
    "glm4v_moe_text": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "inkling_text": _INKLING,
    "inkling2_text": {**_INKLING, "n_layers_per_attn_res_block": 2},
    "inkling2_loop_text": {
        **{**_INKLING, "n_layers_per_attn_res_block": 1},
        **{"loop_layer_index_start": 1, "loop_layer_index_end": 3},
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0},
    "laguna": {"layer_types": _WINDOWED},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2, "head_dim": 4},
    "mamba2": {"head_dim": 16},
    "mellum": {"layer_types": _WINDOWED},
    "minimax": {"block_size": 4},
    "minimax_m3_vl_text": {
        **{"index_block_size": 2, "index_topk_blocks": 2, "index_local_blocks": 1},
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
    },
    "nemotron_h": {"layers_block_type": ["full_attention", "moe", "linear_attention", "full_attention"]},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4},
        **{"indexer_compress_ratio": 2, "hc_lowrank": 8, "ngram_vocab_size_base": 50, "ple_layer_ids": [1, 3]},
        **{"split_ngram_parts": 1, "heads_per_ngram": 2},
    },
    "reformer": {
        **{"attn_layers": ["local", "lsh"] * 2, "axial_pos_embds": False, "hash_seed": 0, "num_buckets": 2},
        **{"local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4},
    },
    "roc_bert": {
        **{"pronunciation_vocab_size": 9, "shape_vocab_size": 9, "pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    },
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
# A second form of a family, which takes another path through its code.
_FORMS: dict[str, dict[str, Any]] = {
    "falcon, ALiBi": {"alibi": True},
    "falcon, new decoder": {"new_decoder_architecture": True},
    "gemma4_text, dense": {**_NO_LAYER_INPUTS, "num_kv_shared_layers": 0},
    "gemma4_unified_text, shared upstream": {"num_kv_shared_layers": 1, "layer_types": _WINDOWED},
    "gemma4_unified_text, shared late": {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * N_BLOCKS},
    "glm_moe_dsa, shared late": {"indexer_types": ["full", "full", "full", "shared"]},
    "glm_moe_dsa, shared upstream": {"indexer_types": ["full", "full", "shared", "full"]},
    "gpt_neox, sequential": {"use_parallel_residual": False},
    "minimax_m3_vl_text, longer blocks": {"index_block_size": 8, "index_topk_blocks": 1},
    "opt, norm after": {"do_layer_norm_before": False},
    "stablelm, parallel": {"use_parallel_residual": True},
}


def model_type_of(name: str) -> str:
    """The model type of a name of `NAMES`."""
    return name.partition(",")[0]


# Models for images and text whose part for text is an ordinary decoder, beside those of the map of causal models. Of
# those that are left out, no tiny form is known here.
TOWERS = (
    *("aria", "aya_vision", "cohere2_vision", "cohere_compass", "deepseek_vl", "deepseek_vl_hybrid", "diffusion_gemma"),
    *("evolla", "exaone4_5", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "hyperclovax_vision_v2", "idefics", "idefics2"),
    *("idefics3", "inkling_mm_model", "internvl", "kimi_k25", "kosmos-2", "lfm2_vl", "lfm3_vl", "lighton_ocr"),
    *("llava", "llava_next", "llava_next_video", "llava_onevision", "minicpmv4_6", "minicpmv4_7", "minimax_m3_vl"),
    *("mistral3", "mistral4", "mistral_large4", "ovis2", "paddleocr_vl", "paligemma", "qianfan_ocr", "qwen2_5_vl"),
    *("qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "step3p7", "unlimited_ocr", "video_llama_3", "video_llava"),
    "vipllava",
)
CLASS_NAMES: dict[str, str] = {
    **{name: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(name, "") for name in TOWERS},
    **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}

# What the installed transformers knows.
NAMES = tuple(
    sorted(
        name for name in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *TOWERS, *_FORMS) if CLASS_NAMES.get(model_type_of(name))
    )
)


def _default(config_class: type[PreTrainedConfig]) -> PreTrainedConfig | None:
    try:
        return config_class()
    except StrictDataclassError:  # some refuse their own defaults
        return None


def _fields(config_class: type[PreTrainedConfig], form: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The arguments of a tiny config of this class."""
    known = {field.name for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    default = _default(config_class)
    fields = {name: value for name, value in _FIELDS.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention has a key head for each query head
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if "max_window_layers" in known:  # windows are there, but not by default
        fields["layer_types"] = _WINDOWED
    for name in _PATTERNS:
        kinds = list(dict.fromkeys(getattr(default, name, None) or []))
        if name in known and len(kinds) > 1:
            fields[name] = (kinds * N_BLOCKS)[:N_BLOCKS]
    fields.update({**_SPECIAL.get(config_class.model_type, {}), **form})
    for name in getattr(config_class, "sub_configs", {}):
        given = fields.get(name, {})
        part = getattr(default, name, None)
        part_class = CONFIG_MAPPING[given["model_type"]] if "model_type" in given else type(part)
        if issubclass(part_class, PreTrainedConfig) and not (given and "model_type" not in given):
            fields[name] = {"model_type": part_class.model_type, **_fields(part_class), **given}
    return fields


def build(name: str, *, tie: bool | None = None, seed: int = 0) -> PreTrainedModel:
    """The family's model, in float32 and eval mode, always the same for the same arguments.

    `tie` ties or unties head and embeddings; None is the family's habit.
    """
    config_class = CONFIG_MAPPING[model_type_of(name)]
    config = config_class(**_fields(config_class, _FORMS.get(name, {})))
    config = getattr(config, "decoder", config) if name.startswith("musicgen") else config
    if name == "gemma3n":  # its tower for images comes from another package; any tower does where there are no images
        config.__dict__["vision_config"] = config.audio_config
    model_class: Any = getattr(transformers, CLASS_NAMES[model_type_of(name)])
    if not issubclass(model_class.config_class, type(config)) and "text_config" in config.sub_configs:
        config = config.get_text_config(decoder=True)
    for part in {id(part): part for part in (config, config.get_text_config(decoder=True))}.values():
        if tie is not None:
            part.tie_word_embeddings = tie
    torch.manual_seed(seed)
    model = model_class(config)
    _randomise(model, torch.Generator().manual_seed(seed))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Larger weights than a fresh model has, so that every token of a sequence tells in its last state."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2 and not name.endswith("A_log"):
            parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.1 * noise)
