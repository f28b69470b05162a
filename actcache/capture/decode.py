"""Decode: the next tokens of sequences by a cached forward, in padded batches or in even ones, as a model allows.

Knows backbones, caches and tokens; knows no search, no text and no files.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NamedTuple

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


class CachedBatch:
    """Sequences that a checkpoint goes on with side by side, padded on the left, with a cache."""

    def __init__(self, backbone: Backbone, sequences: Sequence[Sequence[int]]) -> None:
        """Of sequences of token ids, each of one at least; nothing runs yet."""
        self._backbone = backbone
        self._tokens, self._mask = left_padded(sequences)
        self._cache = DynamicCache(config=backbone.config)

    def begin(self) -> torch.Tensor:
        """``[B, D]``, the last block's output at the end of each."""
        return self._run(self._tokens, 1)[:, 0]

    def feed(self, tokens: torch.Tensor, *, at_once: bool = True) -> torch.Tensor:
        """``[B, n, D]``, the same at each of ``tokens [B, n]``, the next of every sequence: by one forward, or by
        one for each."""
        hidden = []
        for part in [tokens] if at_once else tokens.split(1, dim=1):
            self._mask = torch.cat([self._mask, torch.ones(part.shape, dtype=torch.int64)], dim=1)
            hidden.append(self._run(part, part.shape[1]))
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1)

    def keep(self, rows: Sequence[int]) -> None:
        """Have only these sequences stay."""
        at = torch.tensor(rows, dtype=torch.int64)
        self._mask = self._mask[at]
        # Unlike batch_select_indices, the states of recurrent blocks have it too.
        self._cache.reorder_cache(at.to(self._backbone.device))  # type: ignore[arg-type]

    def _run(self, tokens: torch.Tensor, n_last: int) -> torch.Tensor:
        backbone, mask = self._backbone, self._mask
        device = backbone.device
        taken = inspect.signature(backbone.decoder.forward).parameters
        inputs: dict[str, Any] = {"input_ids": tokens.to(device)}
        if not mask.all():  # recurrent blocks read a mask of ones as one of the new tokens, and go wrong
            inputs["attention_mask"] = mask.to(device)
        inputs["cache" if "cache" in taken else "past_key_values"] = self._cache  # renamed in transformers 5.24
        if "position_ids" in taken:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            inputs["position_ids"] = positions.to(device)
        return backbone.run(**inputs, use_cache=True)[:, -n_last:]


# ---- the probe ----

# How far a cached choice's state may be from a full forward's, relative to its largest value. It is a proposal: more
# than rounding is allowed (recurrences are summed in another order), less than what a lost token or a wrong mask does.
_PROPOSED = 1e-2
_N_STEPS = 3


class Found(NamedTuple):
    """How a search may decode with a model.

    Attributes:
        decoding: the best that gives what full forwards give.
        reason: why not in padded batches, where it may not.
        in_chunks: whether a cache takes several tokens at once.
    """

    decoding: Decoding
    reason: str | None
    in_chunks: bool


@torch.no_grad()
def find_decoding(backbone: Backbone) -> Found:
    """How a search may decode with this model.

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
        return Found(Decoding.FULL, f"{name}: its blocks' {indexer} chooses among the keys of a row", False)

    def why_not(rows: slice, what: str, *, in_chunks: bool) -> str | None:
        try:
            found = _decoded(backbone, prompts[rows], chosen[rows], in_chunks)
        except FAILURES as error:
            return why_failed(backbone.decoder, "cached", error)
        pairs = zip(found, expected[rows], strict=True)
        off = max(((one - whole).abs().max() / whole.abs().max()).item() for one, whole in pairs)
        if not off > allowed:  # what is no number is found where it is read
            return None
        return f"{name}: a cached, {what} batch gives states that are off by {off:.2g} of the largest value"

    reason = None
    for decoding, rows in ((Decoding.PADDED, slice(0, 2)), (Decoding.EVEN, slice(1, 2))):
        found = why_not(rows, decoding, in_chunks=False)
        if found is None:
            return Found(decoding, reason, why_not(rows, decoding, in_chunks=True) is None)
        reason = found
    return Found(Decoding.FULL, reason, False)


def _decoded(
    backbone: Backbone, prompts: Sequence[Sequence[int]], chosen: torch.Tensor, in_chunks: bool
) -> torch.Tensor:
    """``[B, n + 1, D]`` float32: what a search reads after the prompts, and after each of ``chosen [B, n]``, beside a
    sequence that leaves the batch after the first choice."""
    batch = CachedBatch(backbone, [prompts[-1][::-1], *prompts])
    first = batch.begin()[1:, None]
    batch.keep(range(1, len(prompts) + 1))
    parts = [chosen[:, :1], chosen[:, 1:]] if in_chunks else [chosen]
    return torch.cat([first, *(batch.feed(part, at_once=in_chunks) for part in parts)], dim=1).float()


def _indexer(block: nn.Module) -> str | None:
    return next((path for path, module in block.named_modules() if "indexer" in type(module).__name__.lower()), None)
