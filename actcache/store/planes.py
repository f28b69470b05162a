"""The codec of bf16 words: sign and mantissa as they are, exponents in the escape code. PLANES.md is the format.

Lossless for all 65,536 words. ``encode`` and ``decode`` work on bytes in memory, one chunk a call, by the native core
where it is built and by NumPy otherwise, with the same bytes. A chunk carries no checksum: who stores it adds one, as
the store does. Knows bytes; knows neither tensors nor arrays on disk.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from actcache.errors import InputError
from actcache.native import native

Bytes = npt.NDArray[np.uint8]
Buffer = bytes | bytearray | memoryview | npt.NDArray[Any]

MAGIC = b"ABP1"
HEADER = struct.Struct("<4sB3sQQQ8s")
STORED, CODED = 0, 1
N_SYMBOLS = 16
OUTSIDE = 15
N_LEVELS = 5
# What the encoder looks at to choose bases and ranks; csrc/codec.cpp says why.
_PIECES, _PIECE_WORDS, _LARGEST = 32, 512, 5
_RUNS, _RUN_WORDS = 128, 64
_ROWS_WORTH_BASES = 16


def encode(words: Buffer, row_words: int = 1) -> bytes:
    """A chunk that holds bf16 words.

    Args:
        words: little-endian 16-bit words in C order, as any object with a contiguous buffer: bytes, an array.
        row_words: the width D where the words are rows ``[n, D]``: each column then has a base of its own, which makes
            the chunk smaller. Any number of 1 or more gives a chunk that decodes.

    Returns:
        at most 40 bytes more than the words; equal bytes for equal arguments.

    Raises:
        InputError: half a word, or row_words below 1.
    """
    raw = _bytes_of(words)
    if len(raw) % 2:
        raise InputError(f"{len(raw)} bytes, expected words of 2 bytes")
    n_words = len(raw) // 2
    row_words = _checked_width(row_words, n_words)
    if native("cpu")[0] is not None:
        from actcache import _core

        return _core.encode_words(raw.ctypes.data, n_words, row_words)
    return _encode(raw.view("<u2"), row_words)


def decode(data: Buffer, n_bytes: int) -> Bytes:
    """The words of a chunk, bit for bit as encoded.

    Args:
        data: what ``encode`` returned, as any object with a contiguous buffer.
        n_bytes: the size of the words, which the caller knows.

    Returns:
        uint8 ``[n_bytes]``, writable, of its own memory.

    Raises:
        InputError: the data are no chunk of so many bytes; says which rule they break. All sizes are checked before
            memory of those sizes is taken. Changed bytes of a plane decode to other words: see above on checksums.
    """
    chunk = _bytes_of(data)
    header = _header(chunk, n_bytes)
    out = np.empty(n_bytes, np.uint8)
    _decode_into(header, chunk, out)
    return out


def decode_into(data: Buffer, out: bytearray | memoryview | npt.NDArray[Any]) -> None:
    """As ``decode``, to memory that is there: an array or any object with a contiguous buffer, of the words' size.

    Raises:
        InputError: as ``decode``, and ``out`` may be half filled then; or ``out`` may not be written, is not contiguous
            or shares memory with the data, and nothing is written.
    """
    chunk, target = _bytes_of(data), _bytes_of(out)
    if not target.flags.writeable:
        raise InputError(f"out is read-only memory ({type(out).__name__}), expected memory that may be written")
    if np.may_share_memory(chunk, target):
        raise InputError("out shares memory with data, expected memory of its own")
    _decode_into(_header(chunk, len(target)), chunk, target)


def _decode_into(header: _Header, chunk: Bytes, out: Bytes) -> None:
    try:
        if native("cpu")[0] is None:
            _decode(header, chunk, out.view("<u2"))
        else:
            from actcache import _core

            _core.decode_words(chunk.ctypes.data, len(chunk), len(out) // 2, out)
    except ValueError as error:
        raise _malformed(str(error)) from error


class _Header(NamedTuple):
    mode: int
    n_words: int
    n_coded: int
    row_words: int
    symbol_of_rank: list[int]


def _header(chunk: Bytes, n_bytes: int) -> _Header:
    """The fixed part of a chunk, checked against the sizes of the chunk and of the words."""
    if len(chunk) < HEADER.size:
        raise _malformed("it ends within its header")
    magic, mode, reserved, n_words, n_coded, row_words, symbols = HEADER.unpack(chunk[: HEADER.size].tobytes())
    if magic != MAGIC:
        raise _malformed("it does not begin with ABP1")
    if mode not in (STORED, CODED):
        raise _malformed("its mode is unknown")
    if reserved != bytes(3):
        raise _malformed("its reserved bytes are not zero")
    if 2 * n_words != n_bytes:
        raise _malformed("it holds another number of words", f": {n_words}, expected {n_bytes} bytes")
    symbol_of_rank = [nibble for byte in symbols for nibble in (byte & 0xF, byte >> 4)]
    n_behind = len(chunk) - HEADER.size
    if mode == STORED:
        if n_coded or row_words or any(symbol_of_rank):
            raise _malformed("fields of a coded chunk are set in a stored one")
        if n_behind != n_bytes:
            raise _malformed("its size does not fit")
    else:
        if not 0 < n_coded <= n_words:
            raise _malformed("its number of coded words does not fit")
        if not 0 < row_words <= n_coded:
            raise _malformed("its row of bases does not fit")
        if len(set(symbol_of_rank)) != N_SYMBOLS:
            raise _malformed("its symbols are not all different")
        if n_behind < row_words:
            raise _malformed("it ends within its bases")
        if n_behind < row_words + n_coded:
            raise _malformed("it ends within its plane of rests")
    return _Header(mode, n_words, n_coded, row_words, symbol_of_rank)


def _malformed(rule: str, found: str = "") -> InputError:
    return InputError(f"not a chunk of bf16 planes: {rule}{found}")


def _bytes_of(data: Buffer) -> Bytes:
    if isinstance(data, np.ndarray) and data.flags.c_contiguous and not data.dtype.hasobject:
        return data.reshape(-1).view(np.uint8)  # dtypes that have no buffer, such as ml_dtypes' bfloat16
    try:
        if "O" in memoryview(data).format:  # type: ignore[arg-type]
            raise TypeError("it holds Python objects")
        return np.frombuffer(data, np.uint8)
    except (BufferError, ValueError, TypeError) as error:
        raise InputError(f"{type(data).__name__} without a contiguous buffer: {error}") from error


def _checked_width(row_words: int, n_words: int) -> int:
    if row_words < 1:
        raise InputError(f"row_words is {row_words}, expected 1 or more")
    return min(row_words, n_words + 1)  # wider ones are all alike; theirs need not fit in 64 bits


# From here on what the native core does, in NumPy: the same bytes and the same errors, far slower.


def _split(words: npt.NDArray[np.uint16]) -> tuple[Bytes, Bytes]:
    """Exponents and rests."""
    return (words >> 7 & 0xFF).astype(np.uint8), (words >> 8 & 0x80 | words & 0x7F).astype(np.uint8)


def _merge(exponents: Bytes, rests: Bytes) -> npt.NDArray[np.uint16]:
    rest = rests.astype(np.uint16)
    return ((rest & 0x80) << 8 | exponents.astype(np.uint16) << 7 | rest & 0x7F).astype(np.uint16)


def _encode(words: npt.NDArray[np.uint16], row_words: int) -> bytes:
    n_words = len(words)
    stored = HEADER.pack(MAGIC, STORED, bytes(3), n_words, 0, 0, bytes(8)) + words.tobytes()
    coded = np.flatnonzero(words)
    if not len(coded):
        return stored
    n = int(coded[-1]) + 1
    exponents, rests = _split(words[:n])
    base, symbol_of_rank = _choose(exponents, row_words)
    symbols = np.minimum(exponents - np.resize(base, n), OUTSIDE)
    values = np.argsort(symbol_of_rank).astype(np.uint8)[symbols]
    nibbles = symbol_of_rank[::2] | symbol_of_rank[1::2] << 4
    parts = [
        HEADER.pack(MAGIC, CODED, bytes(3), n_words, n, len(base), nibbles.tobytes()),
        base.tobytes(),
        rests.tobytes(),
    ]
    for _ in range(N_LEVELS):
        codes = np.zeros(-(-len(values) // 4) * 4, np.uint8)
        codes[: len(values)] = np.minimum(values, 3)
        parts.append((codes.reshape(-1, 4) << np.arange(0, 8, 2, dtype=np.uint8)).sum(axis=1, dtype=np.uint8).tobytes())
        values = values[values >= 3] - 3
    parts.append(exponents[symbols == OUTSIDE].tobytes())
    chunk = b"".join(parts)
    return chunk if len(chunk) < len(stored) else stored


def _choose(exponents: Bytes, row_words: int) -> tuple[Bytes, Bytes]:
    """The row of bases and the symbols by rank: the choice of csrc/codec.cpp."""
    n = len(exponents)
    row = row_words if row_words <= n // _ROWS_WORTH_BASES else 1
    piece = row * min(n // row, max(1, _PIECE_WORDS // row))
    n_pieces = n // piece
    looked_at = np.arange(min(n_pieces, _PIECES)) * n_pieces // min(n_pieces, _PIECES)
    sample = exponents[: n_pieces * piece].reshape(n_pieces, piece)[looked_at]
    nth = max(1, len(sample) * _LARGEST // _PIECES) - 1
    largest = np.sort(sample, axis=0)[::-1][nth].astype(np.int64)
    base = (largest.reshape(-1, row).sum(axis=0) // (piece // row)).astype(np.uint8)

    run = min(n, _RUN_WORDS)
    n_runs = min(n // run, _RUNS)
    at = (np.arange(n_runs) * (n // n_runs))[:, None] + np.arange(run)
    histogram = np.bincount((exponents[at] - base[at % row]).reshape(-1), minlength=256)
    window = np.arange(256)[:, None] + np.arange(OUTSIDE)
    inside = histogram[window % 256].sum(axis=1)
    start = int(inside.argmax())
    counts = np.append(histogram[window[start] % 256], histogram.sum() - inside[start])
    return base + np.uint8(start), np.argsort(-counts, kind="stable").astype(np.uint8)


def _decode(header: _Header, chunk: Bytes, words: npt.NDArray[np.uint16]) -> None:
    """Raises ValueError with the rule that is broken."""
    mode, _, n, row_words, symbol_of_rank = header
    body = chunk[HEADER.size :]
    if mode == STORED:
        words[:] = np.frombuffer(body.tobytes(), "<u2")
        return
    base, rests, body = np.split(body, [row_words, row_words + n])
    levels: list[Bytes] = []
    n_values = n
    for _ in range(N_LEVELS):
        n_packed = -(-n_values // 4)
        if len(body) < n_packed:
            raise ValueError("it ends within its codes")
        packed, body = np.split(body, [n_packed])
        codes = (packed[:, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3).reshape(-1).astype(np.uint8)
        if codes[n_values:].any():
            raise ValueError("bits behind its codes are set")
        levels.append(codes[:n_values])
        n_values = int((levels[-1] == 3).sum())
    values = levels.pop()
    while levels:
        codes = levels.pop()
        codes[codes == 3] = values + 3
        values = codes
    symbols = np.array(symbol_of_rank, np.uint8)[values]
    outside = symbols == OUTSIDE
    if len(body) != int(outside.sum()):
        raise ValueError("its size does not fit")
    exponents = symbols + np.resize(base, n)
    exponents[outside] = body
    words[:n] = _merge(exponents, rests)
    words[n:] = 0
