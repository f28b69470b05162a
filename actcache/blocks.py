"""Where a causal language model keeps its blocks and final norm, and the stand-ins that take their place.

Knows transformers modules; knows no files, no stores, no tokens.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from actcache.errors import InputError, UnsupportedModelError

# The names that transformers' decoders give to the norm after the last block, beside their list of blocks.
FINAL_NORM_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")


@dataclass(frozen=True)
class Anatomy:
    """Dotted module names, relative to the causal LM.

    Attributes:
        decoder: the module that runs embeddings, blocks and final norm (``model``, ``transformer``...).
        blocks: the ``ModuleList`` of the L blocks.
        final_norm: the norm that reads the last block's output.
        n_blocks: L.
        width: D.
    """

    decoder: str
    blocks: str
    final_norm: str
    n_blocks: int
    width: int


def find_anatomy(model: PreTrainedModel) -> Anatomy:
    """Locate decoder, blocks and final norm by structure.

    Raises:
        UnsupportedModelError: no unique list of ``num_hidden_layers`` blocks, no final norm beside it, or no head.
    """
    name = type(model).__name__
    decoder = model.base_model_prefix
    if not hasattr(model, decoder) or model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{name} is not a decoder with a language-model head on top")
    n_blocks = model.config.num_hidden_layers
    lists = [
        path
        for path, module in getattr(model, decoder).named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_blocks and path.count(".") <= 1
    ]
    if len(lists) != 1:
        raise UnsupportedModelError(f"{name}: {len(lists)} lists of {n_blocks} blocks found, expected one")
    blocks = f"{decoder}.{lists[0]}"
    parent = blocks.rpartition(".")[0]
    norms = [n for n in FINAL_NORM_NAMES if isinstance(getattr(model.get_submodule(parent), n, None), nn.Module)]
    if len(norms) != 1:
        raise UnsupportedModelError(f"{name}: {len(norms)} final norms found beside {blocks}, expected one")
    return Anatomy(decoder, blocks, f"{parent}.{norms[0]}", n_blocks, model.config.hidden_size)


def check_boundary(boundary: int, n_blocks: int) -> None:
    """Raise InputError unless ``1 <= boundary <= n_blocks - 1``."""
    if not 1 <= boundary <= n_blocks - 1:
        raise InputError(f"boundary {boundary} is outside 1..{n_blocks - 1} (the model has {n_blocks} blocks)")


class StateSource:
    """The state at the boundary that the stand-ins of one late stack hand on; set before each forward."""

    def __init__(self) -> None:
        self.state: torch.Tensor | None = None
        self.in_tuple = False  # whether this architecture's blocks return (hidden_states, ...)


class UpstreamStandIn(nn.Module):
    """Takes the place of one upstream block: ignores its input and hands on the state at the boundary.

    Keeps the plain attributes that a model's forward may read off a block (its attention type, for example). Holds no
    weights and computes nothing.
    """

    def __init__(self, block: nn.Module, source: StateSource) -> None:
        super().__init__()
        self._source = source
        for name, value in vars(block).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the source's state, in the type that a real block returns."""
        return (self._source.state,) if self._source.in_tuple else self._source.state


class NoEmbedding(nn.Module):
    """Takes the place of token embeddings that nothing reads (the head has its own weights)."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Replay passes states, never token ids."""
        raise RuntimeError("the late stack was given token ids; it reads states")


def cut_upstream(model: PreTrainedModel, boundary: int) -> StateSource:
    """Replace blocks 0..boundary-1 (and untied token embeddings) in place; their parameters are dropped."""
    anatomy = find_anatomy(model)
    check_boundary(boundary, anatomy.n_blocks)
    source = StateSource()
    blocks = model.get_submodule(anatomy.blocks)
    for index in range(boundary):
        blocks[index] = UpstreamStandIn(blocks[index], source)  # type: ignore[index,operator]
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight and not is_tied(model):
        model.set_input_embeddings(NoEmbedding())
    return source


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head's weight is the token embedding's."""
    return bool(getattr(model.config, "tie_word_embeddings", False))


def shallow_clone(model: PreTrainedModel, *paths: str) -> PreTrainedModel:
    """A copy of the module tree along ``paths`` that shares everything else: submodules on these paths may be replaced
    in the clone without touching ``model``."""
    clone = _shallow(model)
    for path in paths:
        parent = clone
        for name in path.split("."):
            child = _shallow(getattr(parent, name))
            parent._modules[name] = child
            parent = child
    return clone


def _shallow(module: nn.Module) -> Any:
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    return clone
