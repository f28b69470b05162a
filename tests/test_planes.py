"""The codec of bf16 planes against its specification: every engine, word, length, truncation and flip."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from engines import each_engine, native_core, using
from hypothesis import given, settings
from hypothesis import strategies as st
from twins.planes import decode_ref, states

from actcache.errors import InputError
from actcache.store.planes import CODED, HEADER, MAGIC, STORED, decode, encode

TILE = 4096  # of csrc/codec.cpp
ALL_WORDS = np.arange(65536, dtype="<u2")


@pytest.fixture(params=["avx512", "avx2", "portable", "numpy"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way to run the codec; skips what this machine has not."""
    name = request.param
    if name == "numpy":
        with using("torch"):
            yield name
        return
    core, number = native_core(), ["portable", "avx2", "avx512"].index(name)
    core.limit_isa(number)
    try:
        if core.isa() != number:
            pytest.skip(f"this machine has no {name}")
        with using("cpu"):
            yield name
    finally:
        core.limit_isa(2)


def there_and_back(words: np.ndarray, row_words: int = 1) -> bytes:
    """The chunk, after checking what must hold for any."""
    chunk = encode(words, row_words)
    assert len(chunk) <= HEADER.size + words.nbytes
    decoded = decode(chunk, words.nbytes)
    assert decoded.flags.writeable
    assert decoded.tobytes() == words.tobytes()
    return chunk


def test_all_words(engine: str) -> None:
    there_and_back(ALL_WORDS)
    there_and_back(ALL_WORDS, 256)
    for word in ALL_WORDS[::251]:  # each in a chunk of its own kind
        there_and_back(np.full(70, word, "<u2"))
    # All of them behind rows that make the coder narrow: 65,536 ways to be outside the window.
    mixed = np.concatenate([states(2000, 64).reshape(-1), ALL_WORDS])
    assert there_and_back(mixed, 64)[4] == CODED


@pytest.mark.parametrize("row_words", [1, 3, 64])
def test_every_length_up_to_several_blocks(engine: str, row_words: int) -> None:
    words = states(16, 64).reshape(-1)
    modes = {there_and_back(words[:n], row_words)[4] for n in range(4 * 64 + 3 if engine != "numpy" else 70)}
    assert modes == {STORED, CODED}


@pytest.mark.parametrize("n", [TILE - 1, TILE, TILE + 1, TILE + 63, TILE + 64, 2 * TILE, 3 * TILE + 5])
@pytest.mark.parametrize("row_words", [1, 2, 63, 64, 65, 200, 255])
def test_lengths_round_a_tile(engine: str, n: int, row_words: int) -> None:
    assert there_and_back(states(-(-n // row_words), row_words).reshape(-1)[:n], row_words)[4] == CODED


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(0, 700),
    row_words=st.one_of(st.integers(1, 80), st.just(10**30)),
    exponents=st.lists(st.integers(0, 255), min_size=1, max_size=40),
    zeros=st.integers(0, 100),
    seed=st.integers(0, 99),
)
def test_engines_agree_with_the_specification(
    n: int, row_words: int, exponents: list[int], zeros: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 65536, n, np.uint16) & 0x807F | rng.choice(exponents, n).astype(np.uint16) << 7
    words = np.concatenate([words, np.zeros(zeros, np.uint16)]).astype("<u2")
    core = native_core()
    with using("torch"):
        expected = there_and_back(words, row_words)
    try:
        for isa in range(3):
            core.limit_isa(isa)
            with using("cpu"):
                assert there_and_back(words, row_words) == expected
    finally:
        core.limit_isa(2)
    assert np.array_equal(decode_ref(expected), words)


@pytest.mark.parametrize("width", [64, 577])
def test_engines_agree_on_states(engine: str, width: int) -> None:
    words = states(300, width)
    with using("torch"):
        expected = encode(words, width)
    assert there_and_back(words, width) == expected
    assert len(expected) < 0.70 * words.nbytes
    assert len(expected) < len(encode(words)), "a base for each column is worth its byte"


@each_engine
def test_trailing_zeros_take_no_room(name: str) -> None:
    words = states(20, 64).reshape(-1)
    padded = np.concatenate([words, np.zeros(100_000, "<u2")])
    with using(name):
        assert len(there_and_back(padded, 64)) == len(there_and_back(words, 64))


# Written down when version 1 was made: what it wrote must decode for ever.
GOLDEN_EXPONENTS = [127, 126, 127, 128, 125, 127, 130, 127] * 5
GOLDEN_WORDS = np.array([e << 7 for e in GOLDEN_EXPONENTS] + [0x7F80, 1, 0xFF81], "<u2")
GOLDEN_CODED = (
    "41425031010000002b000000000000002b000000000000000200000000000000d03fec21547698ba7f720000000000000000"
    "0000000000000000000000000000000000000000000000000000000000000000000181cc76cc76cc76cc76cc762a49922409"
    "7d7d7d7d7dff00ff"
)
GOLDEN_STORED = "41425031" + "00000000" + "0200000000000000" + "00" * 24 + "803f81bf"


@each_engine
def test_golden_chunks(name: str) -> None:
    with using(name):
        assert decode(bytes.fromhex(GOLDEN_CODED), GOLDEN_WORDS.nbytes).tobytes() == GOLDEN_WORDS.tobytes()
        assert encode(GOLDEN_WORDS, 2).hex() == GOLDEN_CODED
        assert decode(bytes.fromhex(GOLDEN_STORED), 4).tobytes() == bytes.fromhex("803f81bf")
        assert encode(bytes.fromhex("803f81bf")).hex() == GOLDEN_STORED


@pytest.mark.parametrize("kind", ["coded", "stored", "outside", "empty"])
def test_every_truncation_and_extension_is_refused(engine: str, kind: str) -> None:
    words = {
        "coded": states(40, 8).reshape(-1),
        "stored": np.random.default_rng(0).integers(0, 65536, 100).astype("<u2"),
        "outside": np.concatenate([states(40, 8).reshape(-1), ALL_WORDS[1::1500]]),
        "empty": ALL_WORDS[:0],
    }[kind]
    chunk = encode(words, 8)
    assert chunk[4] == (CODED if kind in ("coded", "outside") else STORED)
    for n in range(len(chunk)):
        with pytest.raises(InputError, match=r"not a chunk of bf16 planes: (it ends within|its size does not fit)"):
            decode(chunk[:n], words.nbytes)
    for more in (b"\0", b"\0" * 100):
        with pytest.raises(InputError, match="its size does not fit"):
            decode(chunk + more, words.nbytes)


@pytest.mark.parametrize("stored", [False, True])
def test_every_flip_in_the_header_is_refused(engine: str, stored: bool) -> None:
    words = np.random.default_rng(0).integers(0, 65536, 100).astype("<u2") if stored else states(40, 8).reshape(-1)
    chunk = encode(words, 8)
    assert chunk[4] == (STORED if stored else CODED)
    for bit in range(8 * HEADER.size):
        flipped = bytearray(chunk)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(InputError, match="not a chunk of bf16 planes: "):
            decode(flipped, words.nbytes)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_engines_refuse_alike(data: st.DataObject) -> None:
    """Any flips anywhere: the same words or the same error from every engine, and never a crash."""
    words = np.concatenate([states(20, 8).reshape(-1), ALL_WORDS[1::5000]])
    chunk = bytearray(encode(words, 8))
    for bit in data.draw(st.lists(st.integers(0, 8 * len(chunk) - 1), min_size=1, max_size=4)):
        chunk[bit // 8] ^= 1 << bit % 8
    n_bytes = data.draw(st.sampled_from([words.nbytes, words.nbytes, 0, 2, 10**6]))
    results = []
    for name in ("cpu", "torch"):
        with using(name):
            try:
                results.append(decode(chunk, n_bytes).tobytes())
            except InputError as error:
                results.append(str(error))
    assert results[0] == results[1]


def header(
    mode: int = CODED, n_words: int = 4, n: int = 4, row_words: int = 1, symbols: str = "1032547698badcfe"
) -> bytes:
    return HEADER.pack(MAGIC, mode, bytes(3), n_words, n, row_words, bytes.fromhex(symbols))


@pytest.mark.parametrize(
    ("chunk", "n_bytes", "says"),
    [
        (b"", 0, "ends within its header"),
        (b"ABP2" + header()[4:], 8, "does not begin with ABP1"),
        (header(mode=2), 8, "mode is unknown"),
        (header()[:5] + b"\1\0\0" + header()[8:], 8, "reserved bytes"),
        (header(n_words=2**63), 8, "another number of words: 9223372036854775808, expected 8 bytes"),
        (header(), 9, "another number of words"),
        (header(), 10**15, "another number of words: 4, expected 1000000000000000 bytes"),
        (header(n=0), 8, "number of coded words"),
        (header(n=5), 8, "number of coded words"),
        (header(n=2**64 - 1), 8, "number of coded words"),
        (header(row_words=0), 8, "row of bases"),
        (header(row_words=5), 8, "row of bases"),
        (header(row_words=2**64 - 1), 8, "row of bases"),
        (header(symbols="1132547698badcfe"), 8, "symbols are not all different"),
        (header(), 8, "ends within its bases"),
        (header() + bytes(1), 8, "ends within its plane of rests"),
        (header() + bytes(5), 8, "ends within its codes"),
        (header() + bytes(5) + b"\3", 8, "ends within its codes"),
        (header(n_words=3, n=3) + bytes(4) + b"\x40", 6, "bits behind its codes"),
        (header() + bytes(5) + b"\3\1", 8, None),
        (header() + bytes(5) + b"\3\5", 8, "bits behind its codes"),
        (header() + bytes(5) + b"\3\3\3\3\3", 8, "its size does not fit"),  # rank 15: its exponent is missing
        (header() + bytes(5) + b"\3\3\3\3\3\x7f", 8, None),
        (header() + bytes(5) + b"\3\3\3\3\3\x7f\x7f", 8, "its size does not fit"),
        (header(n_words=2**40, n=2**40, row_words=2**40), 2**41, "ends within its bases"),
        (header(n_words=2**40, n=2**40) + bytes(100), 2**41, "ends within its plane of rests"),
        (header(mode=STORED, n=0, row_words=0, symbols="00" * 8), 8, "its size does not fit"),
        (header(mode=STORED, n=1, row_words=0, symbols="00" * 8) + bytes(8), 8, "fields of a coded chunk"),
        (header(mode=STORED, n=0, row_words=1, symbols="00" * 8) + bytes(8), 8, "fields of a coded chunk"),
        (header(mode=STORED, n=0, row_words=0) + bytes(8), 8, "fields of a coded chunk"),
        (
            header(mode=STORED, n_words=2**62, n=0, row_words=0, symbols="00" * 8) + bytes(8),
            2**63,
            "its size does not fit",
        ),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value),
)
@each_engine
def test_each_rule_is_checked(name: str, chunk: bytes, n_bytes: int, says: str | None) -> None:
    with using(name):
        if says is None:
            assert decode(chunk, n_bytes).tobytes() == decode_ref(chunk).tobytes()
            return
        with pytest.raises(InputError, match=f"not a chunk of bf16 planes: .*{says}"):
            decode(chunk, n_bytes)


@each_engine
def test_arguments_are_checked(name: str) -> None:
    with using(name):
        for wrong, says in (
            (lambda: encode(b"abc"), "3 bytes, expected words of 2 bytes"),
            (lambda: encode(b"ab", 0), "row_words is 0"),
            (lambda: encode(np.zeros((4, 4), "<u2")[:, ::2]), "without a contiguous buffer"),
            (lambda: encode("text"), "str without a contiguous buffer"),  # type: ignore[arg-type]
            (lambda: encode(b"ab", -1), "row_words is -1"),
            (lambda: decode(encode(b"ab"), -2), "another number of words"),
        ):
            with pytest.raises(InputError, match=says):
                wrong()


@each_engine
def test_any_buffer_will_do(name: str) -> None:
    words = states(40, 8)
    with using(name):
        expected = encode(words, 8)
        raw = words.tobytes()
        off = memoryview(b"." + raw)[1:]  # at an odd address
        for same in (raw, bytearray(raw), off, words.view(np.int16), words.view(np.float16)):
            assert encode(same, 8) == expected
        for same in (expected, bytearray(expected), memoryview(b"." + expected)[1:], np.frombuffer(expected, np.uint8)):
            assert decode(same, words.nbytes).tobytes() == raw


def test_threads_may_share_it() -> None:
    chunks = [states(200, 65, seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        coded = list(pool.map(lambda words: encode(words, 65), chunks))
        decoded = list(pool.map(lambda chunk: decode(chunk, chunks[0].nbytes).tobytes(), coded))
    assert coded == [encode(words, 65) for words in chunks]
    assert decoded == [words.tobytes() for words in chunks]


def test_it_needs_neither_torch_nor_zarr() -> None:
    code = "import sys, actcache.store.planes; print([m for m in ('torch', 'zarr') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
