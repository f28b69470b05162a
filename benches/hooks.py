"""The published way, for comparison: forward hooks, one event at a time, full passes at batch one. Uses no actcache.

Search: both checkpoints decode greedily with a key-value cache, in lockstep, one prompt at a time. Cells: one plain
forward of each checkpoint (states at the boundary kept, native margins), then one forward of each whose state entering
block b is overwritten with the other's: four passes an event, the fewest that give a 2x2 grid.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

BLOCKS = ("model.layers", "transformer.h", "gpt_neox.layers")
NORMS = ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm")


@dataclass(frozen=True)
class HookEvent:
    """A first divergence: ids (prompt and shared prefix) and the two tokens."""

    ids: list[int]
    y_pt: int
    y_it: int


def _first(model: PreTrainedModel, names: Sequence[str]) -> nn.Module:
    modules = dict(model.named_modules())
    return next(modules[name] for name in names if name in modules)


@torch.no_grad()
def search(
    models: dict[str, PreTrainedModel], ids: list[int], max_new: int, end_ids: frozenset[int]
) -> HookEvent | None:
    """The first token at which the two greedy continuations differ, or None."""
    caches = {label: DynamicCache(config=model.config) for label, model in models.items()}
    shared: list[int] = []
    step = torch.tensor([ids])
    for _ in range(max_new):
        choice = {}
        for label, model in models.items():
            name = "cache" if "cache" in inspect.signature(model.base_model.forward).parameters else "past_key_values"
            logits = model(input_ids=step, use_cache=True, logits_to_keep=1, **{name: caches[label]}).logits
            choice[label] = int(logits[0, -1].float().argmax())
        if choice["pt"] != choice["it"]:
            return HookEvent([*ids, *shared], choice["pt"], choice["it"])
        if choice["pt"] in end_ids:
            return None
        shared.append(choice["pt"])
        step = torch.tensor([[choice["pt"]]])
    return None


@torch.no_grad()
def grid(models: dict[str, PreTrainedModel], event: HookEvent, boundary: int) -> dict[tuple[str, str, str], float]:
    """(upstream, late, readout) -> margin for all four cells and the readouts native, common_it and common_pt."""
    ids = torch.tensor([event.ids])
    states: dict[str, torch.Tensor] = {}
    last: dict[tuple[str, str], torch.Tensor] = {}
    for label, model in models.items():
        states[label], last[label, label] = _forward(model, ids, boundary, None)
    for upstream, late in (("pt", "it"), ("it", "pt")):
        _, last[upstream, late] = _forward(models[late], ids, boundary, states[upstream])
    margins = {}
    for (upstream, late), hidden in last.items():
        for name, model in (("native", models[late]), ("common_it", models["it"]), ("common_pt", models["pt"])):
            normed = _first(model, NORMS)(hidden).float()
            head = model.get_output_embeddings().weight[[event.y_pt, event.y_it]].float()
            logits = normed @ head.T
            margins[upstream, late, name] = float(logits[1] - logits[0])
    return margins


def _forward(
    model: PreTrainedModel, ids: torch.Tensor, boundary: int, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One full forward; returns the state entering block ``boundary`` and the last block's output at the end."""
    seen: dict[str, torch.Tensor] = {}

    def at_boundary(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if state is not None:
            return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})
        seen["state"] = (args[0] if args else kwargs["hidden_states"]).clone()
        return None

    def at_norm(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen["last"] = args[0][0, -1].clone()

    blocks: Any = _first(model, BLOCKS)
    handles = [
        blocks[boundary].register_forward_pre_hook(at_boundary, with_kwargs=True),
        _first(model, NORMS).register_forward_pre_hook(at_norm),
    ]
    try:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return seen.get("state", ids), seen["last"]
