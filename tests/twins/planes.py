"""PLANES.md word by word, and words like those of a residual stream."""

from __future__ import annotations

import numpy as np

from actcache.store.planes import HEADER, MAGIC, STORED


def states(n_rows: int, width: int, seed: int = 0) -> np.ndarray:
    """bf16 words of rows like those of a residual stream: a scale for each column, and a few rows far larger."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_rows, width)) * np.exp(rng.standard_normal(width)) * 3
    x[:: max(2, n_rows // 5)] *= 50
    return (x.astype(np.float32).view("<u4") >> 16).astype("<u2")


def decode_ref(chunk: bytes) -> np.ndarray:
    """PLANES.md, word by word."""
    magic, mode, reserved, n_words, n, row_words, packed = HEADER.unpack_from(chunk)
    assert (magic, reserved) == (MAGIC, bytes(3))
    body = list(chunk[HEADER.size :])
    if mode == STORED:
        return np.frombuffer(bytes(body), "<u2")
    symbol_of_rank = [packed[r // 2] >> 4 * (r % 2) & 15 for r in range(16)]

    def take(count: int) -> list[int]:
        taken, body[:] = body[:count], body[count:]
        return taken

    base, rests = take(row_words), take(n)
    levels, count = [], n
    for _ in range(5):
        packed_codes = take((count + 3) // 4)
        codes = [packed_codes[i // 4] >> 2 * (i % 4) & 3 for i in range(count)]
        levels.append(iter(codes))
        count = codes.count(3)
    words = np.zeros(n_words, "<u2")
    for i in range(n):
        rank = 0
        for level in range(5):
            code = next(levels[level])
            rank += code
            if code < 3:
                break
        symbol = symbol_of_rank[rank]
        exponent = body.pop(0) if symbol == 15 else (base[i % row_words] + symbol) % 256
        words[i] = (rests[i] & 0x80) << 8 | exponent << 7 | rests[i] & 0x7F
    assert not body
    return words
