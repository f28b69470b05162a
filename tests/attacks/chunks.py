"""Shards: indices that overlap, run in circles or wrap around, and chunks that are bombs or rubbish."""

from __future__ import annotations

import os
import struct

import numpy as np

from attacks.forger import STATES, Forger, compressed


def _lengths(forger: Forger) -> list[int]:
    return [len(chunk) for chunk in forger.chunks(STATES)]


def _header(payload: bytes, **fields: int) -> bytes:
    """A chunk with other fields in its Blosc header: version, format, flags, typesize, nbytes, blocksize, ctbytes."""
    names = ("version", "format", "flags", "typesize", "nbytes", "blocksize", "ctbytes")
    values = dict(zip(names, struct.unpack("<BBBBIII", payload[:16]), strict=True)) | fields
    return struct.pack("<BBBBIII", *values.values()) + payload[16:]


def _with_first(forger: Forger, change: object) -> None:
    payloads = [chunk[:-4] for chunk in forger.chunks(STATES)]
    payloads[0] = change(payloads[0])  # type: ignore[operator]
    forger.write_chunks(STATES, payloads)


def chunks_that_overlap(forger: Forger) -> None:
    """Every chunk is the first one."""
    n = _lengths(forger)
    forger.write_index(STATES, [(0, n[0])] * 4)


def chunks_in_a_circle(forger: Forger) -> None:
    """Each entry points to the next chunk, the last to the first."""
    n = _lengths(forger)
    starts = np.cumsum([0, *n[:-1]]).tolist()
    forger.write_index(STATES, [(starts[(i + 1) % 4], n[(i + 1) % 4]) for i in range(4)])


def chunk_with_a_negative_offset(forger: Forger) -> None:
    """An offset of -1, which is 2**64 - 1."""
    n = _lengths(forger)
    forger.write_index(STATES, [(-1, n[0] + 1), (n[0], n[1]), (n[0] + n[1], n[2]), (sum(n[:3]), n[3])])


def chunks_that_are_missing(forger: Forger) -> None:
    """All bits set: to Zarr, chunks that were never written, and so zeros."""
    forger.write_index(STATES, [(-1, -1)] * 4)


def chunk_of_no_bytes(forger: Forger) -> None:
    """The second chunk has no bytes and the first has all of its."""
    n = _lengths(forger)
    forger.write_index(STATES, [(0, n[0] + n[1]), (n[0] + n[1], 0), (n[0] + n[1], n[2]), (sum(n[:3]), n[3])])


def chunk_of_negative_length(forger: Forger) -> None:
    """Chunks lie one after another, modulo 2**64: one is half the address space long, the next steps back."""
    n = _lengths(forger)
    half = 2**63
    forger.write_index(STATES, [(0, half), (half, n[0] + n[1] - half), (n[0] + n[1], n[2]), (sum(n[:3]), n[3])])


def chunks_that_wrap_around(forger: Forger) -> None:
    """Four lengths of 2**62 and a little, whose sum is right modulo 2**64."""
    quarter, total = 2**62, sum(_lengths(forger))
    lengths = [quarter, quarter, quarter, quarter + total]
    forger.write_index(STATES, [(sum(lengths[:i]), length) for i, length in enumerate(lengths)])


def bytes_between_chunks(forger: Forger) -> None:
    """A gap before the index, in which anything could hide."""
    n = _lengths(forger)
    forger.write_index(STATES, [(0, n[0]), (n[0], n[1]), (n[0] + n[1], n[2]), (sum(n[:3]), n[3] - 1)])


def index_of_another_length(forger: Forger) -> None:
    """An index of one entry where there are four chunks."""
    forger.write_index(STATES, [(0, sum(_lengths(forger)))])


def empty_shard(forger: Forger) -> None:
    """No bytes, and a record that says so."""
    forger.write_shard(STATES, b"")


def shard_of_its_index_only(forger: Forger) -> None:
    """No chunk, but an index."""
    forger.write_chunks(STATES, [])


def shard_where_none_should_be(forger: Forger) -> None:
    """An array without rows that has a shard."""
    forger.write_all_texts({key: [b""] * len(column) for key, column in forger.texts().items()})
    forger.write_shard("texts/bytes", b"hidden")


def blosc_claims_two_gigabytes(forger: Forger) -> None:
    """A chunk whose header says that 2 GiB come out of it."""
    _with_first(forger, lambda payload: _header(payload, nbytes=2**31 - 17))


def blosc_claims_more_than_its_bytes(forger: Forger) -> None:
    """A chunk whose header says that it is longer than it is."""
    _with_first(forger, lambda payload: _header(payload, ctbytes=2**31 - 17))


def blosc_claims_nothing(forger: Forger) -> None:
    """A chunk out of which nothing comes: what was in memory before would pass for rows."""
    _with_first(forger, lambda payload: _header(payload, nbytes=0))


def blosc_in_blocks_of_nothing(forger: Forger) -> None:
    """Blocks of zero bytes: a division by zero in C."""
    _with_first(forger, lambda payload: _header(payload, blocksize=0))


def blosc_in_huge_blocks(forger: Forger) -> None:
    """A block far larger than the chunk: scratch space is made by its size."""
    _with_first(forger, lambda payload: _header(payload, blocksize=2**31 - 1))


def blosc_of_another_version(forger: Forger) -> None:
    """A version of Blosc that does not exist."""
    _with_first(forger, lambda payload: _header(payload, version=255))


def blosc_of_another_codec(forger: Forger) -> None:
    """Flags of a codec that does not exist."""
    _with_first(forger, lambda payload: _header(payload, flags=0xE4))


def blosc_bomb(forger: Forger) -> None:
    """A gigabyte of zeros in a chunk that should hold four rows."""
    bomb = compressed(np.zeros(2**28, np.float32))
    _with_first(forger, lambda payload: bomb)


def chunk_shorter_than_a_header(forger: Forger) -> None:
    """Three bytes, with a checksum."""
    _with_first(forger, lambda payload: payload[:3])


def chunk_of_its_checksum_only(forger: Forger) -> None:
    """No byte before the checksum."""
    _with_first(forger, lambda payload: b"")


def chunk_of_another_length(forger: Forger) -> None:
    """A sound chunk of one row more than it should have."""
    more = compressed(np.zeros((5, 3), np.float32))
    _with_first(forger, lambda payload: more)


def chunk_of_rubbish(forger: Forger) -> None:
    """Offsets within the chunk that lead out of it."""
    _with_first(forger, lambda payload: payload[:16] + b"\xff" * (len(payload) - 16))


def shard_that_goes_on(forger: Forger) -> None:
    """Bytes after the committed end of a shard: the index would be sought elsewhere."""
    with open(forger.shard_file(STATES), "ab") as stream:
        stream.write(os.urandom(20))
