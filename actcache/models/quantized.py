"""Quantized weights: what a config says of them, and the plain tensors that they stand for.

A method that is known here is dequantized on the CPU while a checkpoint is loaded, tensor by tensor, by the arithmetic
of transformers' own loader: products in float32, rounded once, to the dtype of the run. So a quantized checkpoint is
the same model on every device. All other methods are refused by name. Knows safetensors slices; knows no models.

* **fp8**: `X.weight` in 8 bits, with `X.weight_scale_inv` for each block of it (128 x 128 as a rule), or for all.
* **mxfp8**: the same in blocks of 1 x 32, whose scales are powers of two, stored as their exponents (E8M0).
* **mxfp4**: `X_blocks`, two 4-bit numbers (E2M1) per byte, in groups of 32 along the inputs; exponents in `X_scales`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actcache.errors import InputError

# Where a config.json, at any depth, says that weights are quantized.
KEYS = ("quantization_config", "compression_config", "quantization")
DEQUANTIZED = ("fp8", "mxfp8", "mxfp4")

# How tensors are stored that are weights only together with their scales.
DTYPES = {
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"F8_E8M0": torch.float8_e8m0fnu, "U8": torch.uint8},
}
_FP8 = ("F8_E4M3", "F8_E5M2")
# Names that files give to the scales of `X.weight`, and to what only running in 8 bits needs.
_SCALES = ("weight_scale_inv", "scale", "qscale_weight")
_OF_ACTIVATIONS = re.compile(r"(^|[._])(activation_scale|input_scale|qscale_act)$")
_BLOCKS, _EXPONENTS = "_blocks", "_scales"
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_GROUP = 32  # numbers of 4 bits under one exponent
_BIAS = 127  # of an exponent in E8M0
_AT_ONCE = 1 << 24  # numbers that are in float32 at a time


@dataclass(frozen=True)
class Quantization:
    """How the weights of a checkpoint are quantized.

    Attributes:
        method: one of DEQUANTIZED.
        block: rows and columns under one scale, where the config says so.
    """

    method: str
    block: tuple[int, int] | None = None

    @property
    def said(self) -> str:
        """What the fingerprint says of it."""
        return f"{self.method}, dequantized in float32"


def find_quantization(file: Path, config: Mapping[str, Any]) -> Quantization | None:
    """What a config.json says of quantized weights, in itself or in the part for text; None where it says nothing.

    Raises:
        InputError: of a method that is not dequantized here.
    """
    for place, key, found in _said(config):
        method = _method_of(found)
        if key == KEYS[0] and method in DEQUANTIZED and place in ((), ("text_config",)):
            return Quantization(method, _block_of(file, found))
        raise InputError(
            f"{file}: {key} says that the weights are quantized ({method or 'by no method that it names'}), which only "
            f"run by a package of their own; what is dequantized here: {', '.join(DEQUANTIZED)}. Give the model that "
            "they were made from, or save it in bfloat16 or float32"
        )
    return None


def _said(config: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """The keys of a config and its parts that speak of quantized weights: which part, the key and its value."""
    for key, value in config.items():
        if key in KEYS and value:
            yield place, key, value
        elif isinstance(value, Mapping):
            yield from _said(value, (*place, key))


def _method_of(found: Any) -> str | None:
    if not isinstance(found, Mapping):
        return None
    for bits in (4, 8):
        if found.get(f"load_in_{bits}bit"):
            return f"bitsandbytes, {bits} bits"
    method = found.get("quant_method")
    return method if isinstance(method, str) else None


def _block_of(file: Path, found: Mapping[str, Any]) -> tuple[int, int] | None:
    block = found.get("weight_block_size")
    if block is None:
        return None
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise InputError(f"{file}: weight_block_size is {block!r}, expected two sizes such as [128, 128]")
    return block[0], block[1]


@dataclass(frozen=True)
class Dequantized:
    """A tensor that is computed when it is asked for, behind the few words of a safetensors slice that loaders use.

    Attributes:
        name: of the quantized tensor.
        shape: of the result.
        read: gives it.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    def get_shape(self) -> list[int]:
        """As of a slice."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """As of a slice: what it is computed in."""
        return "F32"

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self.read()


def dequantized(
    path: Path, tensors: Mapping[str, Any], quantization: Quantization, dtype: torch.dtype
) -> dict[str, Any]:
    """The tensors of a quantized checkpoint as those of a plain one, under the names of a plain one.

    Args:
        path: of the folder, for messages.
        tensors: by name, as slices.
        quantization: what its config says.
        dtype: to round to.

    Raises:
        InputError: a scale is missing, or is not of the shape that it must have; or nothing is quantized.
    """
    of_fp4 = quantization.method == "mxfp4"
    found = _of_fp4(path, tensors, dtype) if of_fp4 else _of_fp8(path, tensors, quantization, dtype)
    replaced = dict(found)
    if not replaced:
        raise InputError(
            f"{path}: its config says that the weights are quantized ({quantization.method}), and none of them is; "
            f"remove {KEYS[0]} from config.json if they have been dequantized"
        )
    used = {name for names, _ in replaced.values() for name in names}
    plain = {name: tensor for name, tensor in tensors.items() if name not in used and not _OF_ACTIVATIONS.search(name)}
    if twice := sorted(plain.keys() & replaced.keys()):
        raise InputError(f"{path}: {twice[0]} is there both quantized and not; remove one of them")
    return plain | {name: tensor for name, (_, tensor) in replaced.items()}


_Found = Iterator[tuple[str, tuple[tuple[str, str], Dequantized]]]


def _of_fp8(path: Path, tensors: Mapping[str, Any], quantization: Quantization, dtype: torch.dtype) -> _Found:
    for name, tensor in tensors.items():
        if tensor.get_dtype() not in _FP8:
            continue
        stem = name.removesuffix("weight")
        scale = f"{name}_scale_inv"
        if stem != name:
            scale = next((stem + one for one in _SCALES if stem + one in tensors), scale)
        if scale not in tensors:
            raise InputError(f"{path}: {name} is stored as {tensor.get_dtype()} without its scales, {scale}")
        shape, grid = tuple(tensor.get_shape()), tuple(tensors[scale].get_shape())
        block = _fitting(shape, grid, quantization.block)
        if block is None:
            raise InputError(
                f"{path}: {name} is {list(shape)}, its scales {scale} are {list(grid)}, which is not one for each "
                f"block{f' of {list(quantization.block)}' if quantization.block else ''}"
            )

        def read(tensor: Any = tensor, scales: Any = tensors[scale], block: tuple[int, int] = block) -> torch.Tensor:
            return _scaled(tensor[...], scales[...], block, dtype)

        yield name, ((name, scale), Dequantized(name, shape, read))


def _fitting(shape: tuple[int, ...], grid: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns under one scale: of the config, or as the scales divide the weight; None where neither fits."""
    if len(shape) < 2:
        return None
    rows, columns = shape[-2:]
    if math.prod(grid) == 1:
        return rows, columns
    if len(grid) < 2 or grid[:-2] != shape[:-2]:
        return None
    if block is not None and grid[-2:] == (-(-rows // block[0]), -(-columns // block[1])):
        return block
    n_rows, n_columns = grid[-2:]
    if n_rows and n_columns and rows % n_rows == 0 and columns % n_columns == 0:
        return rows // n_rows, columns // n_columns
    return None


def _scaled(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """``weight[..., N, K]`` times the scale of each block, ``[..., ceil(N / rows), ceil(K / columns)]`` or one for all.

    Returns:
        ``[..., N, K]`` in ``dtype``: products in float32, rounded once.
    """
    n, k = weight.shape[-2:]
    grid = -(-n // block[0]), -(-k // block[1])
    # Of a byte, the exponent of a power of two.
    factors = (scales.float() - _BIAS).exp2() if scales.dtype == torch.uint8 else scales.float()
    factors = factors.reshape(-1, *grid).expand(math.prod(weight.shape[:-2]), -1, -1)
    stacked = weight.reshape(-1, n, k)
    out = torch.empty(stacked.shape, dtype=dtype)
    n_rows = block[0] * max(1, _AT_ONCE // (block[0] * k))
    for index in range(len(stacked)):
        for start in range(0, n, n_rows):
            rows = slice(start, min(start + n_rows, n))
            of_blocks = factors[index, start // block[0] : -(-rows.stop // block[0])]
            factor = of_blocks.repeat_interleave(block[0], dim=0)[: rows.stop - start]
            factor = factor.repeat_interleave(block[1], dim=1)[:, :k]
            out[index, rows] = (stacked[index, rows].float() * factor).to(dtype)
    return out.reshape(weight.shape)


def _of_fp4(path: Path, tensors: Mapping[str, Any], dtype: torch.dtype) -> _Found:
    for name, tensor in tensors.items():
        if not name.endswith(_BLOCKS) or tensor.get_dtype() != "U8":
            continue
        stem = name.removesuffix(_BLOCKS)
        scale, shape = stem + _EXPONENTS, tuple(tensor.get_shape())
        if scale not in tensors:
            raise InputError(f"{path}: {name} is stored in 4 bits without its exponents, {scale}")
        grid = tuple(tensors[scale].get_shape())
        if len(shape) != 4 or shape[-1] * 2 != _GROUP or grid != shape[:-1]:
            raise InputError(
                f"{path}: {name} is {list(shape)}, its exponents {scale} are {list(grid)}; expected "
                f"[experts, outputs, groups, {_GROUP // 2}] and [experts, outputs, groups]"
            )

        def read(blocks: Any = tensor, exponents: Any = tensors[scale]) -> torch.Tensor:
            return _unpacked(blocks[...], exponents[...], dtype)

        yield stem, ((name, scale), Dequantized(name, (shape[0], shape[2] * _GROUP, shape[1]), read))


def _unpacked(blocks: torch.Tensor, exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of 4 bits, ``[E, N, groups, 16]`` with ``[E, N, groups]`` -> ``[E, 32 * groups, N]``, inputs before
    outputs, as experts in transformers hold them."""
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    n_experts, n, groups, _ = blocks.shape
    out = torch.empty(n_experts, groups * _GROUP, n, dtype=dtype)
    n_rows = max(1, _AT_ONCE // (groups * _GROUP))
    for expert in range(n_experts):
        for rows in torch.arange(n).split(n_rows):
            packed = blocks[expert, rows].int()
            pairs = torch.stack([values[packed & 0xF], values[packed >> 4]], dim=-1)
            scaled = torch.ldexp(pairs.flatten(-2), exponents[expert, rows].int()[..., None] - _BIAS)
            out[expert, :, rows] = scaled.flatten(-2).T.to(dtype)
    return out
