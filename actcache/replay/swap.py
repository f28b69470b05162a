"""Swaps: some modules of a late stack with another checkpoint's weights, run on the late stack's own inputs.

This is a swap of weights, not a patch of stored outputs: what the module is given is what the host computes, which an
earlier module of the same swap may have changed. Knows modules; knows no rows and no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from actcache.errors import InputError
from actcache.models.blocks import find_anatomy, find_site, replace, shallow_clone
from actcache.replay.copies import apart

Module = Literal["mlp", "attention", "block"]
MODULES: tuple[Module, ...] = get_args(Module)


@dataclass(frozen=True)
class Swap:
    """Which modules of a host are another checkpoint's.

    Attributes:
        source: label of that checkpoint.
        module: ``mlp`` or ``attention``, or ``block`` for the whole of it, norms too.
        first, stop: blocks ``first..stop-1``.
    """

    source: str
    module: Module
    first: int
    stop: int

    def __post_init__(self) -> None:
        if self.module not in MODULES:
            raise InputError(f"module {self.module!r} is unknown; choose {', '.join(MODULES)}")
        if not 0 <= self.first < self.stop:
            raise InputError(f"a swap of blocks {self.first}..{self.stop - 1} has none; expected 0 <= first < stop")

    def __str__(self) -> str:
        return f"{self.module} of {self.source} in {self.first}..{self.stop - 1}"


def with_swapped(host: PreTrainedModel, source: PreTrainedModel, swap: Swap) -> PreTrainedModel:
    """A model that shares all with ``host`` but these modules, whose weights it shares with ``source``.

    Masks, positions, configs, hooks, and what else is no weight, stay the host's.

    Args:
        host, source: causal LMs of one architecture, which hold these blocks with their weights.
        swap: what to take from the source.

    Raises:
        UnsupportedModelError: the blocks have no such module.
        InputError: the two modules do not have the same weights.
    """
    anatomy = find_anatomy(host)
    clone = shallow_clone(host, anatomy.blocks)
    own, others = (model.get_submodule(anatomy.blocks) for model in (host, source))
    for index in range(swap.first, swap.stop):
        block = own.get_submodule(str(index))
        path = "" if swap.module == "block" else path_in(block, find_site(block, swap.module))
        at = ".".join(part for part in (str(index), path) if part)
        module = with_weights_of(own.get_submodule(at), others.get_submodule(at), f"{swap.module} of block {index}")
        replace(clone, f"{anatomy.blocks}.{at}", module)
    return clone


def with_weights_of(module: nn.Module, other: nn.Module, what: str) -> nn.Module:
    """A module that is ``module`` with the weights of ``other``, parameters and saved buffers, and shares them.

    Raises:
        InputError: the names or shapes of the weights differ; ``what`` it names.
    """
    mine, given = (_weights(one) for one in (module, other))
    wrong = sorted(mine.keys() ^ given.keys()) or [name for name in mine if mine[name].shape != given[name].shape]
    if wrong:
        shapes = (tuple(of[wrong[0]].shape) if wrong[0] in of else "none" for of in (mine, given))
        raise InputError("{}: {} is {} here and {} in the source".format(what, wrong[0], *shapes))
    # How attention is to run is read off the config at every call, which is the host's.
    configs = [one for part in module.modules() for one in vars(part).values() if isinstance(one, PreTrainedConfig)]
    (copied,) = apart(module, [module], 1, hooked=set(module.modules()), share=configs)
    for path, part in copied.named_modules():
        of = other.get_submodule(path)
        for name, own in part._parameters.items():
            if own is not None:
                part._parameters[name] = nn.Parameter(of.get_parameter(name).to(own.device), requires_grad=False)
        for name in _saved(part):
            own = part.get_buffer(name)
            part._buffers[name] = of.get_buffer(name).to(own.device)
    return copied


def path_in(block: nn.Module, module: nn.Module) -> str:
    """The dotted name of a module of a block."""
    return next(path for path, one in block.named_modules() if one is module)


def _saved(part: nn.Module) -> Sequence[str]:
    buffers = (name for name, one in part._buffers.items() if one is not None)
    return [name for name in buffers if name not in part._non_persistent_buffers_set]


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    places = [(path, part, name) for path, part in module.named_modules() for name in _saved(part)]
    buffers = {f"{path}.{name}".lstrip("."): part.get_buffer(name) for path, part, name in places}
    return dict(module.named_parameters()) | buffers
