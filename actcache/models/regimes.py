"""Regimes: lengths within which a model computes alike, and so which sequences may share a forward or a cache.

Of most models, what a position becomes depends on the tokens up to it and on nothing else. Some look at more: at the
longest sequence of the batch, or at the place of a token in its row. A few tokens cannot show that, as it begins at
thousands of them; so the config tells. Everything that packs, pads or caches asks here. What in transformers 5.24 looks
at more than the tokens up to a position, and what is made of it:

* **longrope** (Phi-3, Phi-4 multimodal, PhiMoE and whoever sets it): angles, and PhiMoE's scale, switch for a whole
  forward once its longest sequence is beyond ``original_max_position_embeddings``; keys cached before keep the old
  ones. A switch: no forward and no cache goes across it.
* **dynamic NTK** (any ``rope_type`` with "dynamic" in it): angles follow the longest sequence, and the longest one ever
  seen, beyond ``max_position_embeddings``. No sequence is longer than that here: each path refuses it, or ends there.
* **scales by the place in the row**: Llama 4's temperature (``attn_temperature_tuning``, from ``floor_scale`` on) and
  Inkling's logarithmic one (``log_scaling_n_floor``) count the tokens of the row, padding and neighbours too. A row
  stays below that; a longer sequence is alone, from its first token on.
* scales by the position (Ministral 3, Mistral 4, Inkling 2): they read ``position_ids``, which restart in a pack.
* chunked attention (Llama 4) and windows: the masks of a pack are the model's own, and its caches keep what they need.
  Only Moshi's cache forgets what lies before ``sliding_window`` while its attention reads it: searches end there.
* ALiBi (BLOOM, MPT, Falcon), learned positions counted in the cache (BART and its kin), recurrences and convolutions
  (Mamba and its kin, RecurrentGemma, RWKV, xLSTM, MiniMax, Nemotron-H): a few tokens show it; the probes at load do.
* indexers (DeepSeek 3.2, GLM DSA, MiniMax M3) choose among the keys of a row: never packed, searched without cache.
* mixture-of-experts with a capacity that drops tokens, and norms over a batch: no causal LM of transformers has them
  (Switch and NLLB, which do, are encoder-decoders; batch norms are in towers for images and sound, in eval mode).

Knows configs; knows no modules, no tensors.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from actcache.models.packing import plan_packs

_LIMIT = "original_max_position_embeddings"


@dataclass(frozen=True)
class Regimes:
    """At which lengths a model changes what it computes.

    Attributes:
        switches: in order; what is computed of *all* positions changes once the longest sequence of the forward, or the
            tokens seen by a cache, are more than one of these.
        longest_row: a token's place in its row counts beyond so many tokens, or None where it never does.
        longest_cached: a cache forgets what attention still reads, beyond so many tokens; None where it never does.
    """

    switches: tuple[int, ...] = ()
    longest_row: int | None = None
    longest_cached: int | None = None

    @classmethod
    def of_config(cls, config: Any) -> Regimes:
        """Of a decoder's config (see :func:`actcache.models.blocks.text_config`)."""
        rows = []
        if getattr(config, "attn_temperature_tuning", False):
            rows.append(config.floor_scale - 1)
        if config.model_type.startswith("inkling") and (floor := getattr(config, "log_scaling_n_floor", None)):
            rows.append(floor)
        cached = config.sliding_window if config.model_type.startswith("moshi") else None
        return cls(tuple(sorted(set(_longrope_switches(config)))), min(rows, default=None), cached)

    @classmethod
    def joined(cls, several: Iterable[Regimes]) -> Regimes:
        """Of models that run the same sequences together: what is alike for all of them."""
        every = list(several)
        rows = [one.longest_row for one in every if one.longest_row is not None]
        cached = [one.longest_cached for one in every if one.longest_cached is not None]
        switches = sorted({switch for one in every for switch in one.switches})
        return cls(tuple(switches), min(rows, default=None), min(cached, default=None))

    def of(self, n_tokens: int) -> int:
        """A number for the regime of a sequence of this length; those of one number may share a forward."""
        return bisect_left(self.switches, n_tokens)

    def last(self, n_tokens: int) -> int | None:
        """The greatest length of the same regime, or None where there is no end."""
        regime = self.of(n_tokens)
        return self.switches[regime] if regime < len(self.switches) else None

    def legs(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The lengths from ``first`` to ``last``, cut where a regime ends: the first and the last length of each."""
        while first <= last:
            end = self.last(first)
            stop = last if end is None else min(end, last)
            yield first, stop
            first = stop + 1

    def in_row(self, n_tokens: int) -> bool:
        """Whether the place in a row of so many tokens counts for nothing."""
        return self.longest_row is None or n_tokens <= self.longest_row

    def row(self, max_tokens: int) -> int:
        """The most tokens of a row that many share, of ``max_tokens`` that are allowed."""
        return max_tokens if self.longest_row is None else min(max_tokens, self.longest_row)

    def packs(self, lengths: Sequence[int], max_tokens: int, *, padded: bool = False) -> list[range]:
        """Sequences, in order, cut into forwards that each may share (see :func:`actcache.models.packing.plan_packs`).

        One whose own place in a row counts is alone. In rows of their own, padded on the right, all begin at 0.
        """
        most = max_tokens if padded else self.row(max_tokens)
        kinds = [self.of(length) for length in lengths] if self.switches else None  # most have one kind
        return plan_packs(lengths, most, padded=padded, kinds=kinds)


ONE_REGIME = Regimes()  # of most models


def _longrope_switches(config: Any) -> Iterator[int]:
    parameters = getattr(config, "rope_parameters", None) or {}
    for one in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if one.get("rope_type") == "longrope":
            # Both places are read, by one part of transformers or another.
            given = (one.get(_LIMIT), getattr(config, _LIMIT, None))
            yield from {limit for limit in given if limit is not None} or {config.max_position_embeddings}
