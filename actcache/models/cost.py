"""Shape: what a checkpoint's architecture costs, in parameters, multiply-adds and cached values.

Counted exactly, from the model as transformers builds it without weights, on torch's meta device. Multiply-adds are
those of the blocks' linear layers, of attention, and of the head. Of experts, those count to which a token is sent.
Attention is causal: each position attends to itself and those before it, within the block's window. Norms, rotary
angles and activation functions are not counted. Knows transformers modules and configs; knows no prompts, no stores,
no time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from actcache.errors import InputError
from actcache.models.blocks import find_anatomy, text_config
from actcache.models.checkpoint import Checkpoint
from actcache.models.regimes import Regimes

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ModelShape:
    """What a checkpoint's architecture costs.

    Attributes:
        architecture: the config's model type.
        n_blocks, width, vocab_size: L, D and V.
        n_parameters: of the whole model; a head that is tied to the embedding counts once.
        block_parameters: of each block.
        block_products: multiply-adds of a token in the linear layers of each block.
        pair_products: multiply-adds of one query with one key, over all heads: scores and weighted values.
        windows: of each block's attention, in tokens; None sees everything before.
        n_heads: of a block's attention.
        cache_width: values that one block caches a token.
        readout_parameters: final norm and head.
        widest: ``(rows, columns)`` of the largest matrix that tokens go through whole.
        widest_side: the widest activation inside a block.
        active_experts: ``(a token's, all)``, or None where blocks have none.
        regimes: which sequences may share a forward.
    """

    architecture: str
    n_blocks: int
    width: int
    vocab_size: int
    n_parameters: int
    block_parameters: tuple[int, ...]
    block_products: tuple[int, ...]
    pair_products: int
    windows: tuple[int | None, ...]
    n_heads: int
    cache_width: int
    readout_parameters: int
    widest: tuple[int, int]
    widest_side: int
    active_experts: tuple[int, int] | None
    regimes: Regimes

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> ModelShape:
        """From the config alone."""
        return cls.of_model(checkpoint.skeleton)

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> ModelShape:
        """From a causal LM, with weights or without.

        Raises:
            UnsupportedModelError: its blocks cannot be found.
            InputError: its blocks have experts, and its config does not say how many of them a token is sent to.
        """
        anatomy, config = find_anatomy(model), text_config(model.config)
        blocks: Any = model.get_submodule(anatomy.blocks)
        head = model.get_output_embeddings()
        active = _active_experts(model)
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or anatomy.width // heads
        key_dim = getattr(config, "qk_head_dim", None) or head_dim
        value_dim = getattr(config, "v_head_dim", None) or head_dim
        matrices = [p for block in blocks for name, p in block.named_parameters() if _is_matrix(name, p)]
        return cls(
            architecture=model.config.model_type,
            n_blocks=anatomy.n_blocks,
            width=anatomy.width,
            vocab_size=head.weight.shape[0],
            n_parameters=_count(model),
            block_parameters=tuple(_count(block) for block in blocks),
            block_products=tuple(_token_products(block, active) for block in blocks),
            pair_products=heads * (key_dim + value_dim),
            windows=tuple(_window(config, index) for index in range(anatomy.n_blocks)),
            n_heads=heads,
            cache_width=(getattr(config, "num_key_value_heads", None) or heads) * (key_dim + value_dim),
            readout_parameters=_count(model.get_submodule(anatomy.final_norm)) + _count(head),
            widest=tuple(max(matrices, key=torch.Tensor.numel).shape[-2:]),
            widest_side=max(max(p.shape[-2:]) for p in matrices),
            active_experts=active,
            regimes=Regimes.of_config(config),
        )

    @property
    def head_products(self) -> int:
        """Multiply-adds of one row of whole-vocabulary logits."""
        return self.vocab_size * self.width

    def products(self, lengths: Numbers, *, first: int = 0) -> float:
        """Multiply-adds of blocks ``first..L-1`` over whole sequences of these lengths."""
        return self._products(first, float(lengths.sum()), lambda window: float(_pairs(lengths, window).sum()))

    def step_products(self, contexts: Numbers, *, first: int = 0) -> float:
        """Multiply-adds of blocks ``first..L-1`` for one more token after each of these many others."""

        def pairs(window: int | None) -> float:
            seen = contexts + 1
            return float((seen if window is None else np.minimum(seen, window)).sum())

        return self._products(first, float(len(contexts)), pairs)

    def tail_products(self, lengths: Numbers, n: int, *, first: int = 0) -> float:
        """Multiply-adds of blocks ``first..L-1`` for the last ``n`` tokens of sequences of these lengths, after the
        others; of shorter sequences for all."""
        return self.products(lengths, first=first) - self.products(np.maximum(lengths - n, 0.0), first=first)

    def _products(self, first: int, n_tokens: float, pairs: Callable[[int | None], float]) -> float:
        linear = n_tokens * sum(self.block_products[first:])
        late = self.windows[first:]
        return linear + sum(late.count(window) * self.pair_products * pairs(window) for window in set(late))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Linear layers keep ``[out, in]`` (or its transpose), stacked experts ``[experts, ., .]``; their biases, stacked
    too, are named so."""
    return parameter.ndim >= 2 and not name.endswith("bias")


def _token_products(block: nn.Module, active: tuple[int, int] | None) -> int:
    total = 0
    for name, parameter in block.named_parameters():
        if _is_matrix(name, parameter):
            share = active if active and _is_expert(name) else (1, 1)
            total += parameter.numel() * share[0] // share[1]
    return total


def _is_expert(name: str) -> bool:
    return "experts" in name.split(".")


def _active_experts(model: PreTrainedModel) -> tuple[int, int] | None:
    if not any(_is_expert(name) for name, _ in model.named_parameters()):
        return None
    found = []
    for names in (
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"),
        ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"),
    ):
        values = [value for name in names if isinstance(value := getattr(text_config(model.config), name, None), int)]
        if not values:
            raise InputError(
                f"{model.config.model_type} has experts, and its config has none of {', '.join(names)}: the "
                "multiply-adds of a token are unknown"
            )
        found.append(values[0])
    return found[0], found[1]


def _window(config: Any, index: int) -> int | None:
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None)
    return window if kinds is None or kinds[index] == "sliding_attention" else None


def _pairs(lengths: Numbers, window: int | None) -> Numbers:
    """Pairs of a position and one that it attends to, in causal attention over sequences of these lengths."""
    seen = lengths if window is None else np.minimum(lengths, window)
    return seen * (seen + 1) / 2 + (lengths - seen) * seen
