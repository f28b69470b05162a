"""Copies: the modules of a late stack several times over, for calls and for workers.

A forward switches modules, hooks to them and replaces some. So every call runs copies, which share the weights: threads
may call at once, and the model itself, and whoever else runs it, sees nothing of it. Knows modules; knows no variants.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from actcache.models.blocks import UpstreamStandIn, is_wrapped
from actcache.replay.forwards import Forwards

T = TypeVar("T")


def copies_of(forwards: Forwards, n: int, sites: Collection[nn.Module] = ()) -> list[Forwards]:
    """These forwards ``n`` times over, each with modules and config of its own; ``sites`` will be hooked to.

    Made anew for every call, so that whatever was done to the blocks since is in them. One whose forward somebody has
    wrapped is run itself, a sequence at a time, which switches nothing.
    """
    if is_wrapped(forwards.model):
        return [forwards]
    hooked = {*forwards.blocks, *sites}
    return apart(
        forwards,
        [forwards.model, *forwards.passed],
        n,
        hooked=hooked,
        share=[forwards.backbone.readout, forwards.source],
    )


def apart(
    holder: T, roots: Iterable[nn.Module], n: int, *, hooked: Collection[nn.Module], share: Sequence[Any] = ()
) -> list[T]:
    """``n`` copies of what holds these modules, each with modules and configs of its own: forwards and hooks of one
    change nothing in the others, nor in the modules given.

    Weights are shared, and what is hooked to the modules is, but ``hooked`` names those that more will be hooked to;
    so is what ``share`` names. What a stand-in hands on is its thread's.
    """
    shared: dict[int, Any] = {id(one): one for one in share}
    own: list[nn.Module] = []
    for module in dict.fromkeys(module for root in roots for module in root.modules()):
        shared.update((id(weight), weight) for weight in module._parameters.values())
        if isinstance(module, UpstreamStandIn):
            shared[id(module._source)] = module._source
        if _is_stateless(module) and module not in hooked:
            shared[id(module)] = module
        elif _is_copied_as_modules_are(type(module)):
            own.append(module)
    copies = []
    for _ in range(n):
        memo = shared | {id(module): type(module).__new__(type(module)) for module in own}
        for module in own:
            vars(memo[id(module)]).update((name, _copied(name, value, memo)) for name, value in vars(module).items())
        copies.append(copy.deepcopy(holder, memo))
    return copies


def _is_stateless(module: nn.Module) -> bool:
    """Whether threads may share a module: torch's own layers and stand-ins, without parts or buffers.

    A layer of torch's has no state but its weights and buffers. One of a model's own code may, though it has no parts:
    RecurrentGemma's recurrence keeps its last state on itself. So each copy has its own, of buffers as well.
    """
    stateless = isinstance(module, UpstreamStandIn) or type(module).__module__.startswith("torch.nn.modules.")
    return stateless and not module._buffers and not module._modules


_WAYS_TO_COPY = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__new__")
_ATOMS = (bool, int, float, str, type(None), torch.dtype, torch.device)
# Hooks, and names of buffers: nearly all are empty. Who is hooked to a module is hooked to its copies, too.
_SHALLOW = {name for name, value in vars(nn.Module()).items() if isinstance(value, OrderedDict | set)}
_SHALLOW = (_SHALLOW | {"_parameters"}) - {"_buffers", "_modules"}


def _is_copied_as_modules_are(kind: type) -> bool:
    return all(getattr(kind, way, None) is getattr(nn.Module, way, None) for way in _WAYS_TO_COPY)


def _copied(name: str, value: Any, memo: dict[int, Any]) -> Any:
    """An attribute of a module, as ``copy.deepcopy`` copies it, which takes ten times as long for all of a model."""
    if type(value) in _ATOMS:
        return value
    if name in _SHALLOW:
        return value.copy()
    return copy.deepcopy(value, memo)
