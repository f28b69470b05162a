"""The published way, for comparison: forward hooks, one event at a time, full passes at batch one. Uses no actcache.

Search: both checkpoints decode greedily with a key-value cache, in lockstep, one prompt at a time. A native pass is a
plain forward that keeps the states at some boundaries; a replay is a plain forward in which the state entering block b
is overwritten. A 2x2 grid is two native passes and two replays per event, the fewest that give it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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


def path_of(model: nn.Module, names: Sequence[str]) -> str:
    """Which of these names the model has: ``BLOCKS`` or ``NORMS``."""
    modules = dict(model.named_modules())
    return next(name for name in names if name in modules)


def blocks_of(model: PreTrainedModel) -> Any:
    """The list of its blocks."""
    return model.get_submodule(path_of(model, BLOCKS))


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
            choice[label] = int(_next_logits(model, step, caches[label]).argmax())
        if choice["pt"] != choice["it"]:
            return HookEvent([*ids, *shared], choice["pt"], choice["it"])
        if choice["pt"] in end_ids:
            return None
        shared.append(choice["pt"])
        step = torch.tensor([[choice["pt"]]])
    return None


@torch.no_grad()
def greedy(
    model: PreTrainedModel, ids: Sequence[int], max_new: int, end_ids: Collection[int], never: Sequence[int] = ()
) -> list[int]:
    """What a model writes after a sequence, an end token included; nothing follows one. Tokens of ``never`` are not
    chosen."""
    written: list[int] = []
    cache, step = DynamicCache(config=model.config), torch.tensor([list(ids)])
    while len(written) < max_new and int(step[0, -1]) not in end_ids:
        logits = _next_logits(model, step, cache)
        logits[list(never)] = -torch.inf
        written.append(int(logits.argmax()))
        step = torch.tensor([written[-1:]])
    return written


def _next_logits(model: PreTrainedModel, step: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """``[V]`` float32, after further tokens ``[1, n]``."""
    name = "cache" if "cache" in inspect.signature(model.base_model.forward).parameters else "past_key_values"
    logits = model(input_ids=step, use_cache=True, logits_to_keep=1, **{name: cache}).logits
    return logits[0, -1].float()


def native(
    model: PreTrainedModel, ids: torch.Tensor, boundaries: Sequence[int], *, whole: bool = False
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """One plain forward over ``[1, T]`` ids: the states entering these blocks, ``[1, T, D]``, and the last block's
    output at the last position, ``[1, D]``, or at all positions, ``[1, T, D]``, if ``whole``."""
    states: dict[int, torch.Tensor] = {}

    def keep(boundary: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states[boundary] = (args[0] if args else kwargs["hidden_states"]).clone()

        return hook

    return states, _forward(model, ids, {boundary: keep(boundary) for boundary in boundaries}, whole)


def replay(
    model: PreTrainedModel, ids: torch.Tensor, boundary: int, states: torch.Tensor, *, whole: bool = False
) -> torch.Tensor:
    """One plain forward over ``[B, T]`` ids whose state entering block ``boundary`` is overwritten with ``[B, T, D]``:
    the last block's output at the last position, ``[B, D]``, or at all positions, ``[B, T, D]``, if ``whole``."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    return _forward(model, ids, {boundary: hook}, whole)


@torch.no_grad()
def taken(
    model: PreTrainedModel, ids: torch.Tensor, modules: Mapping[Any, tuple[nn.Module, bool]]
) -> tuple[dict[Any, torch.Tensor], torch.Tensor]:
    """One plain forward over ``[1, T]`` ids: by its name what each module gives, or reads where it is so marked, at the
    last position, ``[W]``; and the last block's output there, ``[1, D]``."""
    seen: dict[Any, torch.Tensor] = {}

    def keeping(name: Any) -> Callable[[torch.Tensor], None]:
        return lambda rows: seen.update({name: rows[-1].clone()})

    with ExitStack() as hooks:
        for name, (module, is_input) in modules.items():
            hooks.callback(_changing(module, keeping(name), is_input).remove)
        return seen, _forward(model, ids, {}, False)


@torch.no_grad()
def put(
    model: PreTrainedModel, ids: torch.Tensor, module: nn.Module, row: torch.Tensor, columns: slice, is_input: bool
) -> torch.Tensor:
    """One plain forward in which some columns of what a module gives, or reads, at the last position are those of
    ``row`` ``[W]``: the last block's output at the last position, ``[1, D]``."""

    def change(rows: torch.Tensor) -> None:
        rows[-1, columns] = row[columns]

    handle = _changing(module, change, is_input)
    try:
        return _forward(model, ids, {}, False)
    finally:
        handle.remove()


@contextmanager
def editing(changes: Mapping[nn.Module, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
    """Within this context, what a module gives at the last position, ``[1, W]``, is what its function makes of it."""

    def changing(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            own = output[0] if isinstance(output, tuple) else output
            last = change(own[:, -1])
            changed = torch.cat([own[:, :-1], last[:, None]], dim=1)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    with ExitStack() as handles:
        for module, change in changes.items():
            handles.callback(module.register_forward_hook(changing(change)).remove)
        yield


def gradients(
    model: PreTrainedModel,
    ids: torch.Tensor,
    modules: Sequence[nn.Module],
    event: HookEvent,
    state: tuple[int, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward over ``[1, T]`` ids, and one backward from the margin to what some modules give at the last position:
    this, and the margin's gradient by it, ``[n, W]`` each, in the order in which they run.

    Args:
        model: reads the margin, too.
        ids: of the event.
        modules: n of them; no graph is kept of what comes before the first.
        event: whose margin.
        state: a boundary, and what enters it in place of the model's own, ``[1, T, D]``; None for nothing.
    """
    outputs: list[torch.Tensor] = []
    added: list[torch.Tensor] = []

    def adding(rows: torch.Tensor) -> torch.Tensor:
        torch.set_grad_enabled(True)  # from here on, until the forward ends
        outputs.append(rows.detach())
        added.append(torch.zeros_like(outputs[-1]).requires_grad_())
        return rows + added[-1]

    with editing(dict.fromkeys(modules, adding)):
        last = native(model, ids, [])[1] if state is None else replay(model, ids, *state)
    with torch.enable_grad():
        found = torch.autograd.grad(_margins(model, last, event).sum(), added)
    return torch.cat(outputs), torch.cat(found)


def _changing(module: nn.Module, change: Callable[[torch.Tensor], None], is_input: bool) -> Any:
    """A hook, by which ``change`` sees what a module gives or reads, ``[T, W]``, and may change it."""

    def hook(_: nn.Module, given: Any, *output: Any) -> Any:
        given = output[0] if output else given
        own = given[0] if isinstance(given, tuple) else given
        changed = own.clone()
        change(changed[0])
        return (changed, *given[1:]) if isinstance(given, tuple) else changed

    return module.register_forward_pre_hook(hook) if is_input else module.register_forward_hook(hook)


@torch.no_grad()
def margins(model: PreTrainedModel, last: torch.Tensor, event: HookEvent) -> torch.Tensor:
    """``[B, D]`` last block's output -> ``[B]``, logit(y_it) - logit(y_pt) under this model's norm and head."""
    return _margins(model, last, event)


@torch.no_grad()
def log_probs(model: PreTrainedModel, last: torch.Tensor, never: Sequence[int] = ()) -> torch.Tensor:
    """``[n, D]`` last block's output -> ``[n, V]`` float64, of the next token under this model's norm and head, those
    of ``never`` left out."""
    logits = model.get_output_embeddings()(model.get_submodule(path_of(model, NORMS))(last)).double()
    logits[:, list(never)] = -torch.inf
    return logits.log_softmax(dim=-1)


def _margins(model: PreTrainedModel, last: torch.Tensor, event: HookEvent) -> torch.Tensor:
    normed = model.get_submodule(path_of(model, NORMS))(last).float()
    logits = normed @ model.get_output_embeddings().weight[[event.y_pt, event.y_it]].float().T
    return logits[:, 1] - logits[:, 0]


@torch.no_grad()
def _forward(model: PreTrainedModel, ids: torch.Tensor, at_blocks: dict[int, Any], whole: bool) -> torch.Tensor:
    last: list[torch.Tensor] = []

    def at_norm(module: nn.Module, args: tuple[Any, ...]) -> None:
        last.append((args[0] if whole else args[0][:, -1]).clone())

    blocks = blocks_of(model)
    handles = [blocks[b].register_forward_pre_hook(hook, with_kwargs=True) for b, hook in at_blocks.items()]
    handles.append(model.get_submodule(path_of(model, NORMS)).register_forward_pre_hook(at_norm))
    try:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return last[0]
