"""Decode: the next tokens of sequences by a cached forward, in padded batches or in even ones, as a model allows.

Knows backbones, caches and tokens; knows no search, no text and no files.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

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
        taken = inspect.signature(backbone.decoder.forward).parameters
        self._takes_positions = "position_ids" in taken
        self._cache_name = "cache" if "cache" in taken else "past_key_values"  # renamed in transformers 5.24

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

    def join(self, other: CachedBatch) -> None:
        """Have the sequences of another batch, of as many tokens or not, go on in this one, behind its own. Both have
        begun, and their checkpoint ``joins`` (see :class:`Found`)."""
        n_tokens = max(self._longest(), other._longest())
        pairs: Any = zip(self._cache.layers, other._cache.layers, strict=True)
        for layer, others in pairs:
            _resize(layer, n_tokens)
            _resize(others, n_tokens)
            if layer.is_initialized:  # one that shares another's keys never is
                layer.keys = torch.cat([layer.keys, others.keys])
                layer.values = torch.cat([layer.values, others.values])
        self._mask = torch.cat([_to_width(mask, n_tokens) for mask in (self._mask, other._mask)])

    def _longest(self) -> int:
        """Tokens of the longest sequence, which is as many as a row needs."""
        return int(self._mask.sum(1).max())

    def _run(self, tokens: torch.Tensor, n_last: int) -> torch.Tensor:
        backbone, mask = self._backbone, self._mask
        device = backbone.device
        inputs: dict[str, Any] = {"input_ids": tokens.to(device), self._cache_name: self._cache}
        if not mask.all():  # recurrent blocks read a mask of ones as one of the new tokens, and go wrong
            inputs["attention_mask"] = mask.to(device)
        if self._takes_positions:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            inputs["position_ids"] = positions.to(device)
        return backbone.run_cached(**inputs)[:, -n_last:]


def _to_width(values: torch.Tensor, n: int, dim: int = -1) -> torch.Tensor:
    """Values whose last tokens, along this dimension, are the same ``n``: cut, or padded with zeros, on the left."""
    behind = (0, 0) * (-1 - dim)
    return pad(values, (*behind, n - values.shape[dim], 0))


def _resize(layer: Any, n_tokens: int) -> None:
    """Have a layer's rows hold so many tokens, or the last ones of these that its window reaches."""
    if layer.is_initialized:
        sliding = isinstance(layer, DynamicSlidingWindowLayer)
        n = min(n_tokens, layer.sliding_window - 1) if sliding else n_tokens
        layer.keys, layer.values = _to_width(layer.keys, n, -2), _to_width(layer.values, n, -2)
        if sliding:
            layer.cumulative_length = n_tokens


# ---- the probe ----

# How far a cached choice's state may be from a full forward's, relative to its largest value. It is a proposal: more
# than rounding is allowed (recurrences are summed in another order), less than what a lost token or a wrong mask does.
_PROPOSED = 1e-2
_N_STEPS = 4


class Found(NamedTuple):
    """How a search may decode with a model.

    Attributes:
        decoding: the best that gives what full forwards give.
        reason: why not in padded batches, where it may not.
        in_chunks: whether a cache takes several tokens at once.
        joins: whether batches on their way may become one: they are padded, and caches hold keys and values alone.
    """

    decoding: Decoding
    reason: str | None
    in_chunks: bool
    joins: bool = False


_known: WeakKeyDictionary[Backbone, Found] = WeakKeyDictionary()


def decoding_of(backbone: Backbone) -> Found:
    """What :func:`find_decoding` finds, whose forwards run once for a backbone."""
    if (found := _known.get(backbone)) is None:
        with backbone.being_probed():
            found = _known[backbone] = find_decoding(backbone)
    return found


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
        for in_chunks in (True, False):
            found = why_not(rows, decoding, in_chunks=in_chunks)
            if found is None:
                of_keys = (DynamicLayer, DynamicSlidingWindowLayer)
                joins = all(type(layer) in of_keys for layer in DynamicCache(config=backbone.config).layers)
                return Found(decoding, reason, in_chunks, joins and decoding is Decoding.PADDED)
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
    parts = chosen.split([1, 1, _N_STEPS - 2] if in_chunks else 1, dim=1)  # what takes chunks takes single tokens, too
    return torch.cat([first, *(batch.feed(part) for part in parts)], dim=1).float()


def _indexer(block: nn.Module) -> str | None:
    return next((path for path, module in block.named_modules() if "indexer" in type(module).__name__.lower()), None)
