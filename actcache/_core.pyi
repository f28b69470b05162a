"""The native core on the CPU, for type checkers. What each function does is said in csrc/core_module.cpp.

Names that end in ``_ptr`` are addresses of memory that the caller keeps alive; what is written is an object with a
buffer. Sizes and strides are in the units that the names say.
"""

from typing import Any, TypeAlias

import numpy.typing as npt
from _typeshed import WriteableBuffer

# Before Python 3.12 type checkers do not know that an array has a buffer.
_Memory: TypeAlias = WriteableBuffer | npt.NDArray[Any]

def version() -> str: ...
def gather_rows(
    src_ptr: int,
    n_src_rows: int,
    n_cols: int,
    elem_bytes: int,
    row_stride_bytes: int,
    col_stride_bytes: int,
    row_ids_ptr: int,
    n_rows: int,
    dst: _Memory,
    n_threads: int,
) -> None: ...
def scatter_rows(
    dst: _Memory,
    n_dst_rows: int,
    n_cols: int,
    elem_bytes: int,
    row_stride_bytes: int,
    col_stride_bytes: int,
    row_ids_ptr: int,
    n_rows: int,
    src_ptr: int,
    n_threads: int,
) -> None: ...
def attend(
    query_ptr: int,
    key_ptr: int,
    value_ptr: int,
    out: _Memory,
    offsets_ptr: int,
    n_sequences: int,
    n_tokens: int,
    n_heads: tuple[int, int],
    widths: tuple[int, int],
    query_strides: tuple[int, int],
    key_strides: tuple[int, int],
    value_strides: tuple[int, int],
    window: int,
    scale: float,
    n_threads: int,
) -> None: ...
def linear(
    rows_ptr: int,
    weight_ptr: int,
    bias_ptr: int,
    out: _Memory,
    n_rows: int,
    n_in: int,
    n_out: int,
    row_stride: int,
    n_threads: int,
) -> None: ...
def has_tiles() -> bool: ...
def encode_words(words_ptr: int, n_words: int, row_words: int) -> bytes: ...
def decode_words(data_ptr: int, n_bytes: int, n_words: int, words: _Memory) -> None: ...
def limit_isa(widest: int) -> None: ...
def isa() -> int: ...
