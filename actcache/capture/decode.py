"""Decode: the next tokens of sequences by a cached forward, in padded batches or in even ones, as a model allows.

Knows backbones, caches and tokens; knows no search, no text and no files.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from actcache.models.backbone import FAILURES, Backbone, rounding_of, why_failed


class Decoding(StrEnum):
    """How a search chooses its tokens: the first of these that gives what full forwards give."""

    PADDED = "padded"  # with a cache, prompts of different lengths in one batch, padded on the left
    EVEN = "even"  # with a cache, only prompts of one length in a batch, without padding
    FULL = "full"  # without a cache: a forward over the whole sequence for each token


def left_padded(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, ``[B, T]`` int64 each, of sequences that end together."""
    longest = max(len(ids) for ids in sequences)
    tokens = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(sequences):
        tokens[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
    return tokens, mask


def leave(cache: DynamicCache, rows: torch.Tensor) -> None:
    """Have only these rows of a batch stay in the cache."""
    cache.reorder_cache(rows)  # type: ignore[arg-type]  # unlike batch_select_indices, the states of recurrent blocks have it too


def decode(backbone: Backbone, tokens: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """``[B, D]``, last block's output at the end of each row, after ``tokens [B, t]``: the newest columns of a
    left-padded batch with ``mask [B, T]``."""
    device = backbone.device
    taken = inspect.signature(backbone.decoder.forward).parameters
    inputs: dict[str, Any] = {"input_ids": tokens.to(device)}
    if not mask.all():  # recurrent blocks read a mask of ones as one of the new tokens, and go wrong
        inputs["attention_mask"] = mask.to(device)
    inputs["cache" if "cache" in taken else "past_key_values"] = cache  # renamed in transformers 5.24
    if "position_ids" in taken:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        inputs["position_ids"] = positions.to(device)
    return backbone.run(**inputs, use_cache=True)[:, -1]


# ---- the probe ----

# How far a cached choice's state may be from a full forward's, relative to its largest value. It is a proposal: more
# than rounding is allowed (recurrences are summed in another order), less than what a lost token or a wrong mask does.
_PROPOSED = 1e-2
_N_STEPS = 3


@torch.no_grad()
def find_decoding(backbone: Backbone) -> tuple[Decoding, str | None]:
    """How a search may decode with this model, and why not in padded batches, where it may not.

    Decodes two short random sequences with a cache, side by side and one alone, and compares every step with the same
    position of a full forward. What begins beyond a few tokens, ``backbone.regimes`` knows.
    """
    name = type(backbone.decoder).__name__
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(backbone.readout.vocab_size, (n,), generator=generator).tolist() for n in (2, 5)]
    chosen = torch.randint(backbone.readout.vocab_size, (2, _N_STEPS), generator=generator)
    expected = []
    for prompt, tokens in zip(prompts, chosen.tolist(), strict=True):
        ids = torch.tensor([prompt + tokens], device=backbone.device)
        expected.append(backbone.forward([0, ids.shape[1]], input_ids=ids)[len(prompt) - 1 :].float())
    allowed = max(_PROPOSED, rounding_of(backbone.dtype))
    indexer = next((path for block in backbone.blocks if (path := _indexer(block)) is not None), None)
    if indexer is not None:
        return Decoding.FULL, f"{name}: its blocks' {indexer} chooses among the keys of a row"
    reason = None
    for decoding, rows in ((Decoding.PADDED, slice(0, 2)), (Decoding.EVEN, slice(1, 2))):
        try:
            found = _decoded(backbone, prompts[rows], chosen[rows])
        except FAILURES as error:
            reason = why_failed(backbone.decoder, "cached", error)
            continue
        pairs = zip(found.unbind(1), expected[rows], strict=True)
        off = max(((one - whole).abs().max() / whole.abs().max()).item() for one, whole in pairs)
        if not off > allowed:  # what is no number is found where it is read
            return decoding, reason
        reason = f"{name}: a cached, {decoding} batch gives states that are off by {off:.2g} of the largest value"
    return Decoding.FULL, reason


def _decoded(backbone: Backbone, prompts: Sequence[Sequence[int]], chosen: torch.Tensor) -> torch.Tensor:
    """``[n + 1, B, D]`` float32: what a search reads after the prompts, and after each of ``chosen [B, n]``, beside a
    sequence that leaves the batch after the first choice."""
    tokens, mask = left_padded([prompts[-1][::-1], *prompts])
    cache = DynamicCache(config=backbone.config)
    hidden = [decode(backbone, tokens, mask, cache)[1:].float()]
    mask = mask[1:]
    leave(cache, torch.arange(1, len(prompts) + 1, device=backbone.device))
    for step in range(chosen.shape[1]):
        tokens = chosen[:, step : step + 1]
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.int64)], dim=1)
        hidden.append(decode(backbone, tokens, mask, cache).float())
    return torch.stack(hidden)


def _indexer(block: nn.Module) -> str | None:
    return next((path for path, module in block.named_modules() if "indexer" in type(module).__name__.lower()), None)
