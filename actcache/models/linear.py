"""Linear layers by other means than torch's usual product, for the length of a packed or a cached forward.

Where nobody reads what a layer makes, zeros; and on CPUs with better means for float32 than torch's product, those:

- by matrix tiles (Intel's AMX), which the native core uses to float32's precision (csrc/linear.h);
- by oneDNN, which torch ships as well, on CPUs with AVX-512 that are not Intel's: torch multiplies float32 with MKL,
  which uses AVX-512 on Intel's only.

These differ from torch's by rounding, as packs do anyway: a forward that shall be the model's own does not come here.

Knows torch's modules and the native core; knows no models, no packs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import nn

from actcache.native import native

# The names of a linear layer that makes queries and nothing else; the second is latent attention's.
_QUERY_NAMES = ("q_proj", "q_b_proj")

# Of fewer rows torch's product is the faster one: splitting the weights costs as much as so many rows.
_ROWS_FOR_TILES = 128


@contextmanager
def without_queries(block: nn.Module) -> Iterator[None]:
    """Within this context a block's attention makes keys and values, but its queries are zeros that cost nothing.

    Only where one linear layer makes the queries and nothing else; where they come out of one product together with
    keys and values (GPT-2, GPT-NeoX, Phi-3), nothing changes.
    """
    layers = [(parent, name) for parent, name in _linear_layers(block) if name in _QUERY_NAMES]
    with _replaced(layers if len(layers) == 1 else [], _Unread):
        yield


@contextmanager
def fast_products(blocks: nn.Module) -> Iterator[None]:
    """Within this context the linear layers in ``blocks`` are computed by the means that suit this CPU.

    Only float32 on the CPU, outside of autograd, and layers that nobody has hooked or wrapped. The layers are replaced
    in the modules that hold them: for blocks that no other thread runs meanwhile.
    """
    means = _fastest_means()
    if means is None or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        yield
        return

    def make(layer: nn.Linear) -> nn.Linear:
        other = copy.copy(layer)  # with the same weights
        other.__class__ = means
        return other

    with _replaced([place for place in _linear_layers(blocks) if _is_untouched(_layer_at(place))], make):
        yield


def _fastest_means() -> type[_FastLinear] | None:
    """By what the CPU is, not by a measurement: a run that goes on later takes the same path."""
    if tiles_are_there():
        return _TileLinear
    return _OneDnnLinear if onednn_is_faster() else None


def describe_products() -> str:
    """One line: what multiplies in packed float32 forwards on the CPU."""
    names: dict[type[_FastLinear] | None, str] = {
        _TileLinear: "matrix tiles (AMX), by actcache._core",
        _OneDnnLinear: "oneDNN",
        None: "torch",
    }
    return f"float32 products in packs on the CPU: {names[_fastest_means()]}"


def tiles_are_there() -> bool:
    """Whether the native core has matrix tiles on this machine."""
    if native("cpu")[0] is None:
        return False
    from actcache import _core

    return _core.has_tiles()


@cache
def onednn_is_faster() -> bool:
    """Whether this machine's CPU has AVX-512 and is not Intel's, and torch has both MKL and oneDNN."""
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        vendor = re.search(r"^vendor_id\s*:\s*(\w+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux: who made the CPU is not known
        return False
    return vendor is not None and vendor[1] != "GenuineIntel"


_Place = tuple[nn.Module, str]  # the module that holds a layer, and the name that it has there


def _linear_layers(module: nn.Module) -> list[_Place]:
    """Where torch's own linear layers are: of subclasses nobody knows what they compute."""
    return [
        (parent, name)
        for parent in module.modules()
        for name, layer in parent._modules.items()
        if type(layer) is nn.Linear
    ]


def _layer_at(place: _Place) -> nn.Linear:
    parent, name = place
    return parent._modules[name]  # type: ignore[return-value]


@contextmanager
def _replaced(places: list[_Place], make: Callable[[nn.Linear], nn.Module]) -> Iterator[None]:
    layers = [_layer_at(place) for place in places]
    try:
        for (parent, name), layer in zip(places, layers, strict=True):
            parent._modules[name] = make(layer)
        yield
    finally:
        for (parent, name), layer in zip(places, layers, strict=True):
            parent._modules[name] = layer


class _Unread(nn.Module):
    """Takes the place of a linear layer whose output nobody reads: zeros in its shape, nothing is computed."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias  # some models look at these for the dtype
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states.new_zeros(*states.shape[:-1], self.out_features)


def fast_linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What a linear layer of this weight ``[n_out, n_in]`` makes of states ``[..., n_in]``, by the means that suit this
    CPU; on other devices, of other dtypes and within autograd, by torch's."""
    means = None if torch.is_grad_enabled() or not weight.is_contiguous() else _fastest_means()
    if means is None or {states.device.type, states.dtype, weight.dtype} != {"cpu", torch.float32}:
        return nn.functional.linear(states, weight, bias)
    return means.product(states, weight, bias)


class _FastLinear(nn.Linear):
    """A linear layer by other means, in float32 on the CPU."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return (
            super().forward(states) if states.dtype != torch.float32 else self.product(states, self.weight, self.bias)
        )

    @staticmethod
    def product(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As torch's linear."""
        raise NotImplementedError


class _OneDnnLinear(_FastLinear):
    """By oneDNN: the operation that torch's own compiler uses for it."""

    @staticmethod
    def product(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not states.numel():
            return nn.functional.linear(states, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")


class _TileLinear(_FastLinear):
    """By the native core's matrix tiles."""

    @staticmethod
    def product(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        n_rows = states.numel() // max(1, weight.shape[1])
        if n_rows < _ROWS_FOR_TILES:
            return nn.functional.linear(states, weight, bias)
        return linear_in_core(states, weight, bias)


def linear_in_core(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The native core's linear layer, float32 on the CPU: states ``[..., n_in]``, of any strides, contiguous weight
    ``[n_out, n_in]`` and bias ``[n_out]`` -> ``[..., n_out]``.

    A row's result is the same, bit for bit, whatever the other rows and the number of threads.
    """
    from actcache import _core  # tiles_are_there() said that it is there

    rows = states.reshape(-1, weight.shape[1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = states.new_empty(*states.shape[:-1], weight.shape[0])
    _core.linear(
        rows.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.numpy(),
        n_rows=rows.shape[0],
        n_in=weight.shape[1],
        n_out=weight.shape[0],
        row_stride=rows.stride(0),
        n_threads=torch.get_num_threads(),
    )
    return out


def _is_untouched(layer: nn.Linear) -> bool:
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return False
    weights = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    return all(one.device.type == "cpu" and one.dtype == torch.float32 and one.is_contiguous() for one in weights)
