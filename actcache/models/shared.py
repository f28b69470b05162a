"""Shared: weights of a folder that are in memory already, for a checkpoint that has an adapter on the same folder.

What the adapter leaves alone is then one tensor in both models. Nothing is kept alive: models that are let go are no
longer found. Knows parameters by name; knows no files.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Hashable
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel


class _Held(NamedTuple):
    parameter: weakref.ref[nn.Parameter]
    version: int  # of the parameter when it was loaded: one that was written to since is no longer the folder's


_LOCK = threading.Lock()
_HELD: dict[tuple[Hashable, bool], dict[str, _Held]] = {}


def find_shared(of: Hashable, *, adapted: bool) -> dict[str, torch.Tensor]:
    """Weights by their names in the model, wherever they are.

    Args:
        of: names files, dtype and model class.
        adapted: whether they are for a model with an adapter. One without takes only what such a model holds, so that
            two loads of a folder are two models.
    """
    found = {}
    with _LOCK:
        for place in [(of, True), (of, False)] if adapted else [(of, True)]:
            for name, held in _HELD.get(place, {}).items():
                parameter = held.parameter()
                if parameter is not None and parameter._version == held.version:
                    found[name] = parameter.detach()
    return found


def hold(of: Hashable, model: PreTrainedModel, *, changed: Collection[str], adapted: bool) -> None:
    """Let others find the weights of a model, but for those that its adapter changed."""
    with _LOCK:
        for place in list(_HELD):
            _HELD[place] = {name: held for name, held in _HELD[place].items() if held.parameter() is not None}
            if not _HELD[place]:
                del _HELD[place]
        held = _HELD.setdefault((of, adapted), {})
        for name, own in model.named_parameters(remove_duplicate=False):
            if name not in changed:
                held[name] = _Held(weakref.ref(own), own._version)


def take(model: PreTrainedModel, shared: dict[str, torch.Tensor]) -> None:
    """Have a model's parameters be these, where it has them; those that were tied stay so."""
    taken: dict[int, nn.Parameter] = {}
    for name, own in list(model.named_parameters(remove_duplicate=False)):
        if name in shared and own.shape == shared[name].shape and own.dtype == shared[name].dtype:
            path, _, last = name.rpartition(".")
            new = taken.setdefault(id(own), nn.Parameter(shared[name], requires_grad=False))
            model.get_submodule(path)._parameters[last] = new
