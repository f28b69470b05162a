"""Gather by its definition, byte by byte, and rows to gather: any bits, dtypes and views."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

DTYPES = (
    torch.uint8,
    torch.float8_e4m3fn,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int64,
)


def rows_ref(src: torch.Tensor, row_ids: Sequence[int]) -> np.ndarray:
    """The definition: element (r, c) lies storage_offset + r * stride[0] + c * stride[1] elements into the storage."""
    storage = torch.empty(0, dtype=torch.uint8).set_(src.untyped_storage()).numpy()
    size = src.element_size()
    rows = np.empty((len(row_ids), src.shape[1], size), np.uint8)
    for i, r in enumerate(row_ids):
        for c in range(src.shape[1]):
            first = (src.storage_offset() + r * src.stride(0) + c * src.stride(1)) * size
            rows[i, c] = storage[first : first + size]
    return rows


def raw(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a contiguous [n, D], as [n, D, bytes of an element]."""
    size = tensor.element_size()
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().reshape(*tensor.shape, size)


def random_bits(n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """[n] elements of any bits: for floats also infinities, subnormals, both zeros and NaNs with payloads."""
    numbers = np.random.default_rng(seed).integers(0, 256, (n + 1) * dtype.itemsize, np.uint8)
    return torch.from_numpy(numbers).view(dtype)[:n]


VIEWS = {
    "plain": lambda x: x,
    "one row": lambda x: x[4:5],
    "one column": lambda x: x[:, 3:4],
    "every second row": lambda x: x[::2],
    "every second column": lambda x: x[:, ::2],
    "both": lambda x: x[1::3, 2::5],
    "transposed": lambda x: x.t(),
    "transposed and sliced": lambda x: x.t()[3:, ::2],
    "columns from the middle": lambda x: x[:, 5:27],
    "one element behind an aligned address": lambda x: x.reshape(-1)[1:901].view(20, 45),
    "a row, repeated": lambda x: x[2:3].expand(6, -1),
    "a column, repeated": lambda x: x[:, 2:3].expand(-1, 11),
    "a scalar, repeated": lambda x: x[2:3, 1:2].expand(4, 9),
    "overlapping windows": lambda x: x.reshape(-1).unfold(0, 32, 3),
    "of three dimensions": lambda x: x[None].expand(2, -1, -1)[1],
    "permuted from three": lambda x: x.view(20, 23, 2).permute(2, 0, 1)[1],
}
