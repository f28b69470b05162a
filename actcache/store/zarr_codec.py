"""``actcache.bf16_planes``: the codec of planes.py for Zarr v3 arrays of 16-bit words. Opt-in: other readers lack it.

Registered through the ``zarr.codecs`` entry point, so any program that has actcache installed reads such arrays with
zarr-python alone. It is the only module that imports zarr. Knows Zarr's codec interface; PLANES.md has the metadata.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from zarr.abc.codec import BytesBytesCodec
from zarr.core.common import JSON, parse_named_configuration

from actcache.errors import InputError
from actcache.store.planes import HEADER, decode, encode

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer

NAME = "actcache.bf16_planes"


@dataclass(frozen=True)
class Bf16Planes(BytesBytesCodec):
    """bf16 words as planes; stands directly behind ``bytes`` (little endian) of a 16-bit data type.

    Attributes:
        row_words: width of a row; None takes the last axis of the chunk.
    """

    is_fixed_size = False

    row_words: int | None = None

    def __post_init__(self) -> None:
        # bool is an int, and JSON's true would pass for 1.
        if self.row_words is not None and (type(self.row_words) is not int or self.row_words < 1):
            raise InputError(f"{NAME}: row_words is {self.row_words!r}, expected an integer of 1 or more")

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        """From the array's metadata. Raises ValueError and InputError for another name or a wrong configuration."""
        _, configuration = parse_named_configuration(data, NAME, require_configuration=False)
        unknown = sorted((configuration or {}).keys() - {"row_words"})
        if unknown:
            raise InputError(f"{NAME}: {unknown} in its configuration, expected row_words or nothing")
        return cls(**(configuration or {}))  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, JSON]:
        """For the array's metadata."""
        return {"name": NAME, "configuration": {} if self.row_words is None else {"row_words": self.row_words}}

    def evolve_from_array_spec(self, array_spec: ArraySpec) -> Self:
        """The codec of an array's chunks, its ``row_words`` known.

        Raises:
            InputError: the array's elements are not of 2 bytes.
        """
        item_bytes = array_spec.dtype.to_native_dtype().itemsize
        if item_bytes != 2:
            raise InputError(f"{NAME}: elements of {item_bytes} bytes, expected 16-bit words")
        if self.row_words is not None or not array_spec.shape:
            return self
        return type(self)(row_words=max(1, array_spec.shape[-1]))

    def compute_encoded_size(self, input_byte_length: int, _chunk_spec: ArraySpec) -> int:
        """The most that a chunk can take."""
        return HEADER.size + input_byte_length

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        words = decode(chunk_bytes.as_numpy_array(), 2 * math.prod(chunk_spec.shape))
        return chunk_spec.prototype.buffer.from_bytes(words.data)

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)

    def _encode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer | None:
        return chunk_spec.prototype.buffer.from_bytes(encode(chunk_bytes.as_numpy_array(), self.row_words or 1))

    async def _encode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer | None:
        return await asyncio.to_thread(self._encode_sync, chunk_bytes, chunk_spec)
