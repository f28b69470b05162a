"""The codec inside Zarr v3: round trips through zarr-python, its metadata, and damage that must not pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from twins.planes import states
from zarr.codecs import Crc32cCodec
from zarr.registry import register_codec

from actcache.errors import InputError
from actcache.store.planes import decode, encode
from actcache.store.zarr_codec import NAME, Bf16Planes

register_codec(NAME, Bf16Planes)  # as the entry point does; its own test is below


def create(path: Path, words: np.ndarray, chunk_rows: int = 32, shards: tuple[int, int] | None = None) -> zarr.Array:
    array = zarr.create_array(
        path,
        shape=words.shape,
        dtype="uint16",
        chunks=(chunk_rows, *words.shape[1:]),
        shards=shards,
        compressors=[Bf16Planes(), Crc32cCodec()],
    )
    array[...] = words
    return array


@pytest.mark.parametrize("shape", [(100, 65), (1, 1), (64, 64), (33, 576)])
@pytest.mark.parametrize("sharded", [False, True])
def test_arrays_come_back(tmp_path: Path, shape: tuple[int, int], sharded: bool) -> None:
    words = states(*shape)
    create(tmp_path, words, shards=(128, shape[1]) if sharded else None)
    assert np.array_equal(zarr.open_array(tmp_path, mode="r")[...], words)
    assert np.array_equal(zarr.open_array(tmp_path, mode="r")[shape[0] // 2 :, ::2], words[shape[0] // 2 :, ::2])


def test_a_chunk_is_what_encode_makes(tmp_path: Path) -> None:
    words = states(64, 65)
    create(tmp_path, words)
    stored = (tmp_path / "c" / "1" / "0").read_bytes()[:-4]
    assert stored == encode(words[32:], 65)
    assert decode(stored, words[32:].nbytes).tobytes() == words[32:].tobytes()


def test_metadata(tmp_path: Path) -> None:
    create(tmp_path, states(64, 65))
    written = json.loads((tmp_path / "zarr.json").read_text())
    assert written["codecs"][1] == {"name": "actcache.bf16_planes", "configuration": {"row_words": 65}}
    for codec in (Bf16Planes(), Bf16Planes(row_words=65)):
        assert Bf16Planes.from_dict(codec.to_dict()) == codec
    assert Bf16Planes.from_dict({"name": NAME}) == Bf16Planes()


@pytest.mark.parametrize("row_words", [0, -1, 1.5, "65", True])
def test_a_wrong_width_is_refused(row_words: object) -> None:
    with pytest.raises(InputError, match="row_words is"):
        Bf16Planes.from_dict({"name": NAME, "configuration": {"row_words": row_words}})  # type: ignore[dict-item]


def test_a_wrong_configuration_is_refused() -> None:
    with pytest.raises(InputError, match=r"\['level'\] in its configuration"):
        Bf16Planes.from_dict({"name": NAME, "configuration": {"level": 3}})
    with pytest.raises(ValueError, match="zstd"):
        Bf16Planes.from_dict({"name": "zstd", "configuration": {}})


@pytest.mark.parametrize("dtype", ["uint8", "float32", "int64"])
def test_other_elements_are_refused(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(InputError, match="expected 16-bit words"):
        zarr.create_array(tmp_path, shape=(4, 4), chunks=(4, 4), dtype=dtype, compressors=[Bf16Planes()])


@pytest.mark.parametrize("dtype", ["int16", "float16"])
def test_any_16_bits_will_do(tmp_path: Path, dtype: str) -> None:
    words = states(40, 9).view(dtype)
    array = zarr.create_array(tmp_path, shape=words.shape, chunks=(16, 9), dtype=dtype, compressors=[Bf16Planes()])
    array[...] = words
    assert zarr.open_array(tmp_path, mode="r")[...].tobytes() == words.tobytes()


def test_behind_another_codec_it_refuses(tmp_path: Path) -> None:
    array = zarr.create_array(
        tmp_path, shape=(8, 8), chunks=(8, 8), dtype="uint16", compressors=[Crc32cCodec(), Bf16Planes()]
    )
    array[...] = states(8, 8)
    with pytest.raises(InputError, match="another number of words"):
        zarr.open_array(tmp_path, mode="r")[...]


def test_damage_does_not_pass(tmp_path: Path) -> None:
    create(tmp_path, states(32, 65))
    chunk = tmp_path / "c" / "0" / "0"
    whole = chunk.read_bytes()
    for at in range(0, len(whole), 97):
        chunk.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"checksum|not a chunk"):
            zarr.open_array(tmp_path, mode="r")[...]
    for n in range(0, len(whole), 501):
        chunk.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"checksum|not a chunk|buffer"):
            zarr.open_array(tmp_path, mode="r")[...]


def test_the_entry_point_is_enough(tmp_path: Path) -> None:
    """A program that never names actcache reads the array."""
    words = states(64, 65)
    create(tmp_path, words)
    code = f"import zarr; print(int(zarr.open_array({str(tmp_path)!r}, mode='r')[...].astype('u8').sum()))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) == int(words.astype("u8").sum())
