"""The slow obvious twin: what every number of the package must equal, computed with forward hooks and nothing else.

One event at a time, batch one, no cache, no packing, no padding: each cell is a full forward of the upstream model and
a full forward of the late model. It shares no code with the package, so that agreement means something.

Of a model given to `remember`, the same forward over the same ids is run once, however many ask for what it gives.

D is the width, T the sequence length, V the vocabulary. `ids` is always a plain list of token ids.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel


class Parts(NamedTuple):
    """Where a model keeps its blocks, its final norm and its head."""

    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Linear


class Cell(NamedTuple):
    """One scored combination.

    margin is logit(y_it) - logit(y_pt), top1_id the argmax of the logits, final_hidden_last the last block's output [D]
    at the last position.
    """

    margin: float
    top1_id: int
    final_hidden_last: Tensor


def load(folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """The checkpoint in `folder`, in `dtype` and evaluation mode, with the attention that transformers picks."""
    causal = type(AutoConfig.from_pretrained(folder)) in AutoModelForCausalLM._model_mapping
    auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    return auto.from_pretrained(folder, dtype=dtype).eval()


# Blocks, final norm and head of the architectures that keep them elsewhere than most do, by dotted name.
_ELSEWHERE = {
    ("model.layers", "model.final_layernorm", "lm_head"): "bamba falcon_h1 jamba persimmon phi",
    ("model.layers", "model.norm_f", "lm_head"): "nemotron_h",
    ("model.layers", "model.embedding_norm", "lm_head"): "lfm2 lfm2_moe lfm3",
    ("model.layers", "model.final_norm", "lm_head"): "recurrent_gemma",
    ("model.layers", "model.final_norm", "decoder"): "modernbert-decoder",
    ("model.layers", "model.layer_norm", "lm_head"): "xglm",
    ("model.decoder.layers", "model.decoder.final_layer_norm", "lm_head"): "opt",
    ("model.decoder.layers", "model.decoder.layer_norm", "lm_head"): "blenderbot mbart pegasus",
    ("model.decoder.layers", "model.decoder.layer_norm", "proj_out"): "whisper",
    ("model.language_model.layers", "model.language_model.norm", "lm_head"): "gemma3 gemma4_unified got_ocr2 "
    "moss_transcribe_diarize aria aya_vision cohere2_vision cohere_compass deepseek_vl deepseek_vl_hybrid exaone4_5 "
    "glm46v glm4v glm4v_moe glm_ocr hyperclovax_vision_v2 inkling_mm_model internvl kimi_k25 lighton_ocr llava "
    "llava_next llava_next_video llava_onevision minicpmv4_6 minicpmv4_7 minimax_m3_vl mistral3 mistral_large4 ovis2 "
    "paddleocr_vl paligemma qianfan_ocr qwen2_5_vl qwen2_vl qwen3_vl qwen3_vl_moe step3p7 unlimited_ocr video_llama_3 "
    "video_llava vipllava",
    ("model.language_model.layers", "model.language_model.embedding_norm", "lm_head"): "lfm2_vl lfm3_vl",
    ("model.text_model.layers", "model.text_model.norm", "lm_head"): "idefics2 idefics3 smolvlm",
    ("model.language_model.layers", "model.language_model.final_layernorm", "lm_head"): "fuyu",
    ("transformer.h", "transformer.ln_f", "lm_head"): "bloom codegen falcon gpt2 gpt_bigcode gpt_neo gptj",
    ("transformer.h", "transformer.layernorm", "lm_head"): "ctrl",
    ("transformer.blocks", "transformer.norm_f", "lm_head"): "dbrx mpt",
    ("backbone.layers", "backbone.norm_f", "lm_head"): "falcon_mamba mamba mamba2",
    ("backbone.blocks", "backbone.out_norm", "lm_head"): "xlstm",
    ("biogpt.layers", "biogpt.layer_norm", "output_projection"): "biogpt",
    ("gpt_neox.layers", "gpt_neox.final_layer_norm", "lm_head"): "gpt_neox",
    ("gpt_neox_japanese.layers", "gpt_neox_japanese.final_layer_norm", "embed_out"): "gpt_neox_japanese",
    ("bert.encoder.layer", "bert.encoder.ln", "cls.predictions.decoder"): "megatron-bert",
    ("roberta.encoder.layer", "roberta.encoder.LayerNorm", "lm_head.decoder"): "xlm-roberta-xl",
    (
        "roberta_prelayernorm.encoder.layer",
        "roberta_prelayernorm.LayerNorm",
        "lm_head.decoder",
    ): "roberta-prelayernorm",
}
_PATHS = {model_type: paths for paths, model_types in _ELSEWHERE.items() for model_type in model_types.split()}


def parts(model: PreTrainedModel) -> Parts:
    """Blocks, final norm and head, by a table written by hand."""
    paths = _PATHS.get(model.config.model_type, ("model.layers", "model.norm", "lm_head"))
    blocks, norm, head = (model.get_submodule(path) for path in paths)
    return Parts(blocks, norm, head)  # type: ignore[arg-type]


def forward(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """A plain full forward; the model's own logits [T, V] in its own dtype."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def _block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]  # blocks name it otherwise only where it is given by position


_memory: WeakKeyDictionary[PreTrainedModel, dict[Any, Any]] = WeakKeyDictionary()


def remember(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, which nobody changes or hooks from here on: what a forward of it gave, it would give again."""
    _memory[model] = {}
    return model


def _seen(model: PreTrainedModel, ids: Sequence[int], boundaries: Sequence[int]) -> list[Tensor]:
    """One plain forward: what enters each of these blocks, then what leaves the last one."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_block_input(args, kwargs)[0].clone())

    blocks = parts(model).blocks
    handles = [blocks[boundary].register_forward_pre_hook(keep, with_kwargs=True) for boundary in boundaries]
    try:
        final = _final_hidden(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == len(boundaries)
    return [*seen, final]


def _remembered(model: PreTrainedModel, ids: Sequence[int]) -> list[Tensor]:
    memory, key = _memory[model], tuple(ids)
    if key not in memory:
        memory[key] = _seen(model, ids, range(len(parts(model).blocks)))
    return memory[key]


def states(model: PreTrainedModel, ids: Sequence[int], boundary: int) -> Tensor:
    """The hidden state that enters block `boundary`: [T, D] in the model's dtype."""
    if model in _memory:
        return _remembered(model, ids)[boundary].clone()
    return _seen(model, ids, [boundary])[0]


def final_hidden(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """The last block's output, before the final norm: [T, D] in the model's dtype."""
    return _remembered(model, ids)[-1].clone() if model in _memory else _final_hidden(model, ids)


def _final_hidden(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    seen = []
    handle = parts(model).norm.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].clone()))
    try:
        forward(model, ids)
    finally:
        handle.remove()
    (hidden,) = seen
    return hidden


def overwritten(
    model: PreTrainedModel, ids: Sequence[int], boundary: int, state: Tensor, scope: str = "prefix"
) -> Tensor:
    """The last block's output [T, D] when the state entering block `boundary` is overwritten by `state` [T, D].

    scope "prefix" overwrites every position, "position" only the last one.
    """
    if model not in _memory:
        return _overwritten(model, ids, boundary, state, scope)
    memory, key = _memory[model], (tuple(ids), boundary, scope, state.view(torch.uint8).numpy().tobytes())
    if key not in memory:
        memory[key] = _overwritten(model, ids, boundary, state, scope)
    return memory[key].clone()


def _overwritten(model: PreTrainedModel, ids: Sequence[int], boundary: int, state: Tensor, scope: str) -> Tensor:
    rows = {"prefix": slice(None), "position": slice(-1, None)}[scope]

    def overwrite(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = _block_input(args, kwargs).clone()
        hidden[0, rows] = state[rows]
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handle = parts(model).blocks[boundary].register_forward_pre_hook(overwrite, with_kwargs=True)
    try:
        return _final_hidden(model, ids)
    finally:
        handle.remove()


def readout(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Float32 logits of last-block outputs `hidden` [..., D]: [..., V].

    The final norm runs as the model runs it, in the model's dtype; its output and the head are upcast, so that no logit
    is rounded to bfloat16; then the model's own soft-cap, where it has one.
    """
    _, norm, head = parts(model)
    with torch.no_grad():
        logits = norm(hidden).float() @ head.weight.float().T
        if head.bias is not None:
            logits = logits + head.bias.float()
        cap = getattr(model.config, "final_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
    return logits


def _choice(model: PreTrainedModel, ids: Sequence[int]) -> tuple[int, float]:
    """The greedy next token after `ids` and how far its logit lies above the second."""
    logits = readout(model, final_hidden(model, ids)[-1])
    top = logits.topk(2).values
    return int(logits.argmax()), float(top[0] - top[1])


def first_divergence(
    pt: PreTrainedModel, it: PreTrainedModel, ids: Sequence[int], max_new: int, eos_ids: Sequence[int]
) -> dict[str, Any] | str:
    """The first step at which the greedy continuations of prompt `ids` differ, or the reason why there is none.

    An event has: ids (prompt and shared prefix), position (the last of them), step (length of the shared prefix), y_pt,
    y_it, gap_pt, gap_it (top-1 minus top-2 logit of each). The reasons: "no_divergence", `max_new` choices compared and
    all equal; "both_ended", both chose the same token of `eos_ids`.
    """
    ids = list(ids)
    for step in range(max_new):
        y_pt, gap_pt = _choice(pt, ids)
        y_it, gap_it = _choice(it, ids)
        if y_pt != y_it:
            return {
                "ids": ids,
                "position": len(ids) - 1,
                "step": step,
                "y_pt": y_pt,
                "y_it": y_it,
                "gap_pt": gap_pt,
                "gap_it": gap_it,
            }
        if y_pt in eos_ids:
            return "both_ended"
        ids.append(y_pt)
    return "no_divergence"


def cell(
    model_u: PreTrainedModel,
    model_l: PreTrainedModel,
    ids: Sequence[int],
    boundary: int,
    y_pt: int,
    y_it: int,
    scope: str = "prefix",
    readout_model: PreTrainedModel | None = None,
) -> Cell:
    """Score the last position of `ids` with the state at `boundary` from `model_u` and the late blocks of `model_l`.

    `readout_model` gives final norm and head; None is the native readout, `model_l`'s own.
    """
    state = states(model_u, ids, boundary)
    last = overwritten(model_l, ids, boundary, state, scope)[-1]
    logits = readout(model_l if readout_model is None else readout_model, last)
    return Cell(float(logits[y_it] - logits[y_pt]), int(logits.argmax()), last)


def grid(
    lineup: dict[str, PreTrainedModel],
    event: dict[str, Any],
    boundary: int,
    scope: str = "prefix",
    readout_model: PreTrainedModel | None = None,
) -> dict[tuple[str, str], Cell]:
    """Every cell of an event: (upstream label, late label) -> cell, for all pairs of labels in `lineup`."""
    return {
        (u, late): cell(
            lineup[u], lineup[late], event["ids"], boundary, event["y_pt"], event["y_it"], scope, readout_model
        )
        for u in lineup
        for late in lineup
    }


def exact_margin(model, hidden, y_pt, y_it):
    """The margin in the arithmetic that the package promises: products summed in float64, logits rounded to float32."""
    _, norm, head = parts(model)
    with torch.no_grad():
        normed = norm(hidden[None, None])[0, 0].double()
        logits = (head.weight[[y_pt, y_it]].double() * normed).sum(-1)
        if head.bias is not None:
            logits = logits + head.bias[[y_pt, y_it]].double()
        cap = getattr(model.config, "final_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
    logits = logits.float()
    return float(logits[1] - logits[0])
