"""Ragged batches without padding: many sequences concatenated into one row of tokens, attention kept apart.

A *pack* is one forward over ``[1, T]`` tokens that belong to several sequences; ``offsets`` (``[n + 1]``) says where
each begins. Everything but attention works on tokens one by one, so only attention has to know. The registered
attention function cuts queries, keys and values at the offsets and hands each sequence to the model's *own* attention
implementation, with the mask that the model's own mask builder makes for it: windows, soft-caps, scales, grouped
heads and sinks stay the model's. Positions restart at 0 in every sequence.

Knows tensors and transformers' attention registry; knows no model, no tokens, no files.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IMPLEMENTATION = "actcache_packed"


@dataclass(frozen=True)
class _Pack:
    bounds: tuple[int, ...]
    implementation: str  # the model's own attention, which serves each sequence


_current: ContextVar[_Pack | None] = ContextVar("actcache_pack", default=None)


def plan_packs(lengths: Sequence[int], max_tokens: int) -> list[range]:
    """Cut sequences, in order, into packs of at most ``max_tokens`` tokens (a longer sequence is a pack alone)."""
    packs: list[range] = []
    start, n_tokens = 0, 0
    for index, length in enumerate(lengths):
        if index > start and n_tokens + length > max_tokens:
            packs.append(range(start, index))
            start, n_tokens = index, 0
        n_tokens += length
    if start < len(lengths):
        packs.append(range(start, len(lengths)))
    return packs


def offsets_of(lengths: Sequence[int]) -> torch.Tensor:
    """``[n + 1]`` int64: where each sequence of these lengths begins when they are concatenated."""
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int64), 0, out=offsets[1:])
    return offsets


def restarting_positions(bounds: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """``[1, T]`` int64: 0, 1, 2, ... within every sequence."""
    return torch.cat([torch.arange(b - a, device=device) for a, b in itertools.pairwise(bounds)])[None]


def why_not_packable(decoder: torch.nn.Module) -> str | None:
    """The reason why packs cannot be run through this decoder, or None. Static; callers also probe the numbers."""
    if not getattr(decoder, "_supports_attention_backend", False):
        return f"{type(decoder).__name__} does not use transformers' attention interface"
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return f"{type(decoder).__name__} takes no position_ids"
    return None


@contextmanager
def packed_attention(config: PretrainedConfig, bounds: Sequence[int]) -> Iterator[None]:
    """Within this block, models that share ``config`` treat a ``[1, T]`` batch as sequences cut at ``bounds``.

    The switch is on the config object, which the attention modules read at every call: not for use from two threads
    on one model.
    """
    _register()
    own = config._attn_implementation
    token = _current.set(_Pack(tuple(bounds), own))
    config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = own
        _current.reset(token)


def _register() -> None:
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _masks)


def _pack() -> _Pack:
    pack = _current.get()
    if pack is None:
        raise RuntimeError("packed attention was called outside of packed_attention()")
    return pack


def _masks(
    batch_size: int,
    q_length: int,
    kv_length: int,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> list[torch.Tensor | None]:
    """Mask builder of the registry: one mask for each sequence, made by the model's own builder."""
    pack = _pack()
    kwargs.update(batch_size=batch_size, use_vmap=use_vmap, local_size=local_size)
    masks: list[torch.Tensor | None] = []
    for start, stop in zip(pack.bounds, pack.bounds[1:], strict=False):
        length = stop - start
        # The skip (mask None, kernel told "causal") was switched off for the whole pack only because positions restart
        # in it. One sequence alone is plain causal unless a window shorter than it, or an overlay, says otherwise.
        plain = not use_vmap and (local_size is None or length <= local_size)
        kwargs.update(q_length=length, kv_length=length, q_offset=start, kv_offset=start, allow_is_causal_skip=plain)
        if pack.implementation == "sdpa" and plain:
            masks.append(None)
        else:
            masks.append(ALL_MASK_ATTENTION_FUNCTIONS[pack.implementation](**kwargs))
    return masks


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: list[torch.Tensor | None],
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the registry: query ``[1, H, T, d]``, key and value ``[1, H_kv, T, d]`` -> ``[1, T, H, d]``."""
    pack = _pack()
    attend = _own_attention(module, pack.implementation)
    outputs = []
    for start, stop, mask in zip(pack.bounds, pack.bounds[1:], attention_mask, strict=False):
        part = slice(start, stop)
        outputs.append(attend(module, query[:, :, part], key[:, :, part], value[:, :, part], mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def _own_attention(module: torch.nn.Module, implementation: str) -> Callable[..., tuple[torch.Tensor, Any]]:
    if implementation == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[implementation]
