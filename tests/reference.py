"""The slow obvious twin: what every number of the package must equal, computed with forward hooks and nothing else.

One event at a time, batch one, no cache, no packing, no padding: each cell is a full forward of the upstream model and
a full forward of the late model. It shares no code with the package, so that agreement means something.

D is the width, T the sequence length, V the vocabulary. `ids` is always a plain list of token ids.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel


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
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def parts(model: PreTrainedModel) -> Parts:
    """Blocks, final norm and head, one line per architecture."""
    match model.config.model_type:
        case "llama" | "qwen3" | "gemma3_text" | "olmo2" | "gemma2" | "mistral":
            return Parts(model.model.layers, model.model.norm, model.lm_head)
        case "gpt2":
            trunk: Any = model.transformer
            return Parts(trunk.h, trunk.ln_f, model.lm_head)
    raise ValueError(f"no table entry for architecture {model.config.model_type!r}")


def forward(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """A plain full forward; the model's own logits [T, V] in its own dtype."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def _block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def states(model: PreTrainedModel, ids: Sequence[int], boundary: int) -> Tensor:
    """The hidden state that enters block `boundary`: [T, D] in the model's dtype."""
    seen = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_block_input(args, kwargs)[0].clone())

    handle = parts(model).blocks[boundary].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        forward(model, ids)
    finally:
        handle.remove()
    (state,) = seen
    return state


def final_hidden(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """The last block's output, before the final norm: [T, D] in the model's dtype."""
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
    rows = {"prefix": slice(None), "position": slice(-1, None)}[scope]

    def overwrite(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = _block_input(args, kwargs).clone()
        hidden[0, rows] = state[rows]
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handle = parts(model).blocks[boundary].register_forward_pre_hook(overwrite, with_kwargs=True)
    try:
        return final_hidden(model, ids)
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
