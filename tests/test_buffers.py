"""Memory that is given to the native core: what may not be written, does not hold the result or overlaps is refused."""

from __future__ import annotations

import array
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import each_engine, native_core, using

from actcache.errors import InputError
from actcache.store import planes

WORDS = np.arange(12, dtype=np.uint16).reshape(4, 3)
CHUNK = np.frombuffer(planes.encode(WORDS, 3), np.uint8)
IDS = np.array([2, 0], np.int64)
FLOATS = np.arange(12, dtype=np.float32).reshape(4, 3)
OFFSETS = np.array([0, 4], np.int64)


def gathered(src: np.ndarray) -> dict[str, Any]:
    """The arguments that gathers have in common."""
    return {
        "src_ptr": src.ctypes.data,
        "n_src_rows": 4,
        "n_cols": 3,
        "elem_bytes": src.itemsize,
        "row_stride_bytes": src.strides[0],
        "col_stride_bytes": src.strides[1],
        "row_ids_ptr": IDS.ctypes.data,
        "n_rows": 2,
        "n_threads": 1,
    }


def scattered() -> dict[str, Any]:
    given = gathered(FLOATS)
    given["n_dst_rows"] = given.pop("n_src_rows")
    return given


def attending() -> dict[str, Any]:
    given: dict[str, Any] = {f"{name}_ptr": FLOATS.ctypes.data for name in ("query", "key", "value")}
    given |= {f"{name}_strides": (3, 3) for name in ("query", "key", "value")}
    given |= {"offsets_ptr": OFFSETS.ctypes.data, "n_sequences": 1, "n_tokens": 4, "n_heads": (1, 1), "widths": (3, 3)}
    return given | {"window": 4, "scale": 1.0, "n_threads": 1}


LINEAR = {"rows_ptr": FLOATS.ctypes.data, "weight_ptr": FLOATS.ctypes.data, "bias_ptr": 0, "n_rows": 4, "n_in": 3}
LINEAR |= {"n_out": 4, "row_stride": 3, "n_threads": 1}
# Function, what it is given, and the bytes of each output.
BINDINGS: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("gather_rows", gathered(FLOATS), {"dst": 24}),
    ("scatter_rows", scattered() | {"src_ptr": FLOATS.ctypes.data}, {"dst": 48}),
    ("attend", attending(), {"out": 48}),
    ("linear", LINEAR, {"out": 64}),
    ("decode_words", {"data_ptr": CHUNK.ctypes.data, "n_bytes": len(CHUNK), "n_words": 12}, {"words": 24}),
]
OUTPUTS = [(function, given, sizes, name) for function, given, sizes in BINDINGS for name in sizes]
each_output = pytest.mark.parametrize(
    ("function", "given", "sizes", "name"), OUTPUTS, ids=[f"{output[0]}, {output[3]}" for output in OUTPUTS]
)


def mapped(path: Path, n_bytes: int) -> memoryview:
    """A file that is mapped for reading: to write there ends the process."""
    path.write_bytes(bytes(n_bytes))
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ))


def frozen(n_bytes: int) -> np.ndarray:
    locked = np.zeros(n_bytes, np.uint8)
    locked.flags.writeable = False
    return locked


@each_output
def test_a_binding_writes_only_where_it_may(function, given, sizes, name, tmp_path):
    core, n_bytes = native_core(), sizes[name]
    others = {other: np.zeros(size, np.uint8) for other, size in sizes.items() if other != name}
    call = getattr(core, function)
    held = [bytes(n_bytes), memoryview(bytes(n_bytes)), frozen(n_bytes), mapped(tmp_path / "map", n_bytes)]
    for refused in held:
        with pytest.raises(BufferError, match=f"{function}: {name} is read-only memory, expected writable memory"):
            call(**given, **others, **{name: refused})
        assert bytes(refused) == bytes(n_bytes)
    with pytest.raises(BufferError, match=f"{name} is of Python objects, expected writable memory"):
        call(**given, **others, **{name: np.zeros(n_bytes // 8 + 1, object)})
    for refused in (held[2].ctypes.data, None, "text", [0] * n_bytes):
        with pytest.raises(BufferError, match=rf"{name} is of type \w+, expected writable memory"):
            call(**given, **others, **{name: refused})
    assert not any(other.any() for other in others.values())


@each_output
def test_a_binding_writes_only_into_what_holds_it(function, given, sizes, name):
    core, n_bytes = native_core(), sizes[name]
    others = {other: np.zeros(size, np.uint8) for other, size in sizes.items() if other != name}
    call = getattr(core, function)
    wrong = [np.zeros(n_bytes - 1, np.uint8), np.zeros(0, np.uint8)]
    if function != "scatter_rows":  # whose table may be wider, or scattered
        wrong += [
            np.zeros(n_bytes + 1, np.uint8),
            np.zeros(2 * n_bytes, np.uint8)[::2],
            np.zeros(n_bytes, np.uint8)[::-1],
        ]
    for refused in wrong:
        with pytest.raises(BufferError, match=rf"{function}: {name} has \d+ (scattered )?bytes, expected {n_bytes} "):
            call(**given, **others, **{name: refused})
        assert not refused.any()


@each_output
def test_a_binding_writes_into_any_buffer(function, given, sizes, name):
    core, n_bytes = native_core(), sizes[name]
    found = []
    for kind in (bytearray, lambda n: memoryview(bytearray(n)), lambda n: array.array("B", bytes(n)), np.zeros):
        out = kind(n_bytes) if kind is not np.zeros else np.zeros(n_bytes, np.uint8)
        others = {other: np.zeros(size, np.uint8) for other, size in sizes.items() if other != name}
        getattr(core, function)(**given, **others, **{name: out})
        found.append(bytes(out))
    assert set(found) == {found[0]}
    assert found[0] != bytes(n_bytes)


READ = [
    *((function, given, {"dst": "src_ptr"}) for function, given, _ in BINDINGS[:2]),
    *((function, given, {"dst": "row_ids_ptr"}) for function, given, _ in BINDINGS[:2]),
    *(("attend", BINDINGS[2][1], {"out": f"{name}_ptr"}) for name in ("query", "key", "value")),
    *(("linear", LINEAR, {"out": name}) for name in ("rows_ptr", "weight_ptr", "bias_ptr")),
    ("decode_words", BINDINGS[4][1], {"words": "data_ptr"}),
]


@pytest.mark.parametrize(("function", "given", "shared"), READ, ids=[f"{r[0]} {r[2]}" for r in READ])
def test_a_binding_reads_and_writes_apart(function, given, shared):
    """At either end by one byte, and inside of one another."""
    ((name, pointer),) = shared.items()
    sizes = next(sizes for other, _, sizes in BINDINGS if other == function)
    memory = np.zeros(400, np.uint8)
    n_read = {"row_ids_ptr": 16, "bias_ptr": 16, "data_ptr": len(CHUNK)}.get(pointer, 48)
    if pointer == "src_ptr":
        n_read = 24 if function == "scatter_rows" else 48
    if pointer == "data_ptr":
        memory[200 : 200 + n_read] = CHUNK
    others = {other: np.zeros(size, np.uint8) for other, size in sizes.items() if other != name}
    changed = given | {pointer: memory.ctypes.data + 200} | others
    for at in (200 - sizes[name] + 1, 200, 200 + n_read - 1):
        with pytest.raises(
            BufferError, match=rf"{function}: {name} shares memory with \w+, expected memory of its own"
        ):
            getattr(native_core(), function)(**changed, **{name: memory[at : at + sizes[name]]})
    for at in (200 - sizes[name], 200 + n_read):
        getattr(native_core(), function)(**changed, **{name: memory[at : at + sizes[name]]})


def test_nothing_is_written_to_nowhere():
    """No rows, no words: the memory may be none, but not read-only."""
    core = native_core()
    none = np.zeros(0, np.uint8)
    core.gather_rows(**BINDINGS[0][1] | {"n_rows": 0}, dst=none)
    core.linear(**LINEAR | {"n_rows": 0}, out=none)
    empty = np.frombuffer(planes.encode(b""), np.uint8)
    core.decode_words(empty.ctypes.data, len(empty), 0, none)
    with pytest.raises(BufferError, match="read-only"):
        core.decode_words(empty.ctypes.data, len(empty), 0, b"")


# ---- through planes --------------------------------------------------------------------------------------------------


@each_engine
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (lambda path: bytes(24), r"read-only memory \(bytes\), expected memory that may be written"),
        (lambda path: memoryview(bytes(24)), r"read-only memory \(memoryview\)"),
        (lambda path: frozen(24), r"read-only memory \(ndarray\)"),
        (lambda path: mapped(path / "map", 24), r"read-only memory \(memoryview\)"),
        (lambda path: np.zeros(48, np.uint8)[::2], "without a contiguous buffer"),
        (lambda path: np.zeros(24, np.uint8)[::-1], "without a contiguous buffer"),
        (lambda path: np.zeros((3, 4), np.uint16).T, "without a contiguous buffer"),
        (lambda path: np.zeros(3, object), "without a contiguous buffer: it holds Python objects"),
        (lambda path: memoryview(np.zeros(3, object)), "without a contiguous buffer: it holds Python objects"),
        (lambda path: [0] * 24, "list without a contiguous buffer"),
        (lambda path: np.zeros(13, np.uint16), "holds another number of words: 12, expected 26 bytes"),
        (lambda path: np.zeros(23, np.uint8), "holds another number of words"),
        (lambda path: np.zeros(0, np.uint8), "holds another number of words"),
    ],
)
def test_decode_into_what_it_may_not_write(name: str, kind: Callable[[Path], Any], says: str, tmp_path: Path):
    out = kind(tmp_path)
    with using(name), pytest.raises(InputError, match=says):
        planes.decode_into(CHUNK, out)
    assert not any(np.asarray(out).reshape(-1).tolist())


@each_engine
def test_decode_into_its_own_data(name):
    whole = np.zeros(200, np.uint8)
    whole[50 : 50 + len(CHUNK)] = CHUNK
    before = whole.copy()
    for at in (27, 50, 49 + len(CHUNK)):
        with using(name), pytest.raises(InputError, match="out shares memory with data"):
            planes.decode_into(whole[50 : 50 + len(CHUNK)], whole[at : at + 24])
    assert np.array_equal(whole, before)


@each_engine
@pytest.mark.parametrize(
    "kind", [bytearray, lambda n: memoryview(bytearray(n)), lambda n: np.zeros((2, n // 4), np.uint16)]
)
def test_decode_into_any_memory(name, kind):
    out = kind(24)
    with using(name):
        planes.decode_into(CHUNK, out)
        assert bytes(out) == WORDS.tobytes()
        planes.decode_into(planes.encode(b""), kind(0))


@each_engine
def test_what_is_read_may_be_read_only_and_is_contiguous_bytes(name, tmp_path):
    chunk = CHUNK.tobytes()
    locked = WORDS.copy()
    locked.flags.writeable = False
    with using(name):
        for words in (locked, WORDS.tobytes(), memoryview(WORDS.tobytes()), WORDS.view(np.int16), WORDS.view("<f2")):
            assert planes.encode(words, 3) == chunk
        for data in (chunk, memoryview(chunk), CHUNK, mapped_copy(tmp_path / "chunk", chunk)):
            assert planes.decode(data, 24).tobytes() == WORDS.tobytes()
        for words in (WORDS[::-1], WORDS[:, ::2], WORDS.T, np.array([None]), np.array(["a"], object)):
            with pytest.raises(InputError, match="without a contiguous buffer"):
                planes.encode(words)
            with pytest.raises(InputError, match="without a contiguous buffer"):
                planes.decode(words, 24)


def mapped_copy(path: Path, data: bytes) -> memoryview:
    path.write_bytes(data)
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), len(data), access=mmap.ACCESS_READ))
