"""Shapes, counts and sizes that lie: huge, negative, of another kind, or larger than what is there."""

from __future__ import annotations

import os

import numpy as np

from attacks.forger import FINAL, STATES, Forger, compressed, sealed


def _chunk_rows(forger: Forger, n: object, array: str = STATES) -> None:
    forger.metadata(array, lambda m: m["codecs"][0]["configuration"]["chunk_shape"].__setitem__(0, n))


def shape_of_2_to_the_62(forger: Forger) -> None:
    """2**62 rows; the record agrees."""
    forger.metadata(STATES, lambda m: m.update(shape=[2**62, 3]))
    forger.record(lambda r: r.update(n_tokens=2**62))


def shape_whose_bytes_wrap_around(forger: Forger) -> None:
    """Rows times width times size is 0 modulo 2**64."""
    forger.metadata(STATES, lambda m: m.update(shape=[2**62, 2**62]))


def shape_that_is_negative(forger: Forger) -> None:
    """-15 rows."""
    forger.metadata(STATES, lambda m: m.update(shape=[-15, 3]))


def width_that_is_a_text(forger: Forger) -> None:
    """A width of '3' in chunks of 2**40 rows: a product with a text is a text of 2**40 threes."""

    def change(metadata: dict) -> None:
        metadata["shape"] = [15, "3"]
        metadata["attributes"]["chunk_crc32c"] = [0]
        metadata["codecs"][0]["configuration"]["chunk_shape"] = [2**40, "3"]
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = [2**40, "3"]

    forger.metadata(STATES, change)


def width_that_is_a_list(forger: Forger) -> None:
    """A width of [3] in chunks of 2**40 rows: the product is a list of as many."""

    def change(metadata: dict) -> None:
        metadata["shape"] = [15, [3]]
        metadata["attributes"]["chunk_crc32c"] = [0]
        metadata["codecs"][0]["configuration"]["chunk_shape"] = [2**40, [3]]
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = [2**40, [3]]

    forger.metadata(STATES, change)


def shape_without_axes(forger: Forger) -> None:
    """A scalar."""
    forger.metadata(STATES, lambda m: m.update(shape=[]))


def shape_of_a_thousand_axes(forger: Forger) -> None:
    """More axes than any array library takes."""
    forger.metadata(STATES, lambda m: m.update(shape=[15, 3] + [1] * 1000))


def chunks_of_no_rows(forger: Forger) -> None:
    """A division by zero."""
    _chunk_rows(forger, 0)


def chunks_of_negative_rows(forger: Forger) -> None:
    """Chunks that run backwards."""
    _chunk_rows(forger, -4)


def chunks_of_true_rows(forger: Forger) -> None:
    """True is 1 in Python only."""
    _chunk_rows(forger, True)


def small_array_in_a_huge_chunk(forger: Forger) -> None:
    """Fifteen rows in one chunk of 1.6 GB of zeros, which are 6 MB on disk, and valid in every other respect."""
    rows = 2**27
    payload = compressed(np.zeros((rows, 3), np.float32))

    def change(metadata: dict) -> None:
        metadata["codecs"][0]["configuration"]["chunk_shape"] = [rows, 3]
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = [rows, 3]

    forger.metadata(STATES, change)
    forger.write_chunks(STATES, [payload])


def checksums_of_the_wrong_number(forger: Forger) -> None:
    """One checksum more than chunks."""
    forger.metadata(STATES, lambda m: m["attributes"]["chunk_crc32c"].append(1))


def checksums_by_the_million(forger: Forger) -> None:
    """A million checksums for four chunks."""
    forger.metadata(STATES, lambda m: m["attributes"].update(chunk_crc32c=[1] * 1_000_000))


def rows_by_the_million(forger: Forger) -> None:
    """A shape that agrees with a million checksums, over a shard of four chunks."""

    def change(metadata: dict) -> None:
        metadata["shape"] = [4_000_000, 3]
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = [4_000_000, 3]
        metadata["attributes"]["chunk_crc32c"] = [1] * 1_000_000

    forger.metadata(STATES, change)
    forger.record(lambda r: r.update(n_tokens=4_000_000))
    forger.write_values("sequence_offsets", np.array([0, 5, 14, 4_000_000]))


def checksums_that_are_texts(forger: Forger) -> None:
    """Checksums of another kind."""
    forger.metadata(STATES, lambda m: m["attributes"].update(chunk_crc32c=["x"] * 4))


def checksums_in_an_object(forger: Forger) -> None:
    """An object in place of the list."""
    forger.metadata(STATES, lambda m: m["attributes"].update(chunk_crc32c={"0": 1, "1": 1, "2": 1, "3": 1}))


def width_of_2_to_the_40(forger: Forger) -> None:
    """Fingerprint and metadata agree on a width that no machine has room for."""

    def change(metadata: dict) -> None:
        sharding = metadata["codecs"][0]["configuration"]
        for shape in (
            metadata["shape"],
            metadata["chunk_grid"]["configuration"]["chunk_shape"],
            sharding["chunk_shape"],
        ):
            shape[1] = 2**40
        n_rows = metadata["shape"][0]
        sharding["chunk_shape"][0] = 1
        metadata["chunk_grid"]["configuration"]["chunk_shape"][0] = n_rows
        metadata["attributes"]["chunk_crc32c"] = [1] * n_rows

    forger.fingerprint(lambda f: f.update(width=2**40))
    for label in ("pt", "it"):
        for array in (f"states/{label}/b001", f"states/{label}/b002", f"final/{label}"):
            forger.metadata(array, change)


def events_beyond_64_bits(forger: Forger) -> None:
    """A count that does not fit the machine's integers."""
    forger.record(lambda r: r.update(n_events=2**63))


def events_whose_sum_is_beyond_64_bits(forger: Forger) -> None:
    """Two counts that fit, and whose sum does not."""
    for segment in ("a", "b"):
        forger.record(lambda r: r.update(n_events=2**62), segment)


def tokens_beyond_64_bits(forger: Forger) -> None:
    """The same for tokens."""
    forger.record(lambda r: r.update(n_tokens=2**70))


def file_beyond_64_bits(forger: Forger) -> None:
    """A shard's committed size is no offset that a file can have."""
    forger.commit_size(STATES, 2**70)


def file_of_2_to_the_62(forger: Forger) -> None:
    """A shard's committed size is far beyond the file."""
    forger.commit_size(STATES, 2**62)


def shard_with_a_hole(forger: Forger) -> None:
    """A sparse file of a terabyte: its one chunk claims all of it, the index at the end is sound."""
    n_bytes = 2**40

    def change(metadata: dict) -> None:
        metadata["attributes"]["chunk_crc32c"] = [1]
        metadata["codecs"][0]["configuration"]["chunk_shape"] = [15, 3]
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = [15, 3]

    forger.metadata(STATES, change)
    tail = sealed((0).to_bytes(8, "little") + (n_bytes - 20).to_bytes(8, "little"))
    with open(forger.shard_file(STATES), "r+b") as stream:
        os.truncate(stream.fileno(), n_bytes)
        stream.seek(n_bytes - 20)
        stream.write(tail)
    forger.commit_size(STATES, n_bytes)


def metadata_with_a_hole(forger: Forger) -> None:
    """A sparse zarr.json of a terabyte, whose size the record gives."""
    os.truncate(forger.array(STATES) / "zarr.json", 2**40)
    forger.record(lambda r: r["files"].update({f"{STATES}/zarr.json": [2**40, 0]}))


def record_with_a_hole(forger: Forger) -> None:
    """A sparse commit record of a terabyte."""
    os.truncate(forger.record_file(), 2**40)


def stored_bytes_of_nothing(forger: Forger) -> None:
    """States of many bytes, stored in none: a ratio divides by it."""
    forger.record(lambda r: r.update(stored_state_bytes=0, raw_state_bytes=1))
    forger.record(lambda r: r.update(stored_state_bytes=0, raw_state_bytes=1), "b")


def stored_bytes_that_are_a_text(forger: Forger) -> None:
    """A size that a summary adds up is a text."""
    forger.record(lambda r: r.update(stored_bytes="many"))


def boundary_of_many_digits(forger: Forger) -> None:
    """A boundary that makes a folder's name longer than any file system takes."""
    forger.fingerprint(lambda f: f["boundaries"].append(10**4000))


def boundaries_by_the_million(forger: Forger) -> None:
    """A million boundaries, of which no array is there."""
    forger.fingerprint(lambda f: f.update(boundaries=list(range(1_000_000))))


def final_with_rows_of_more_events(forger: Forger) -> None:
    """Final states have a row more than there are events."""
    forger.write_values(FINAL, np.zeros((5, 3), np.float32))


def states_of_another_dtype(forger: Forger) -> None:
    """float16 in a store of float32."""

    def change(metadata: dict) -> None:
        metadata["data_type"] = "float16"
        metadata["codecs"][0]["configuration"]["codecs"][1]["configuration"]["typesize"] = 2

    forger.metadata(STATES, change)


def states_in_a_dtype_of_objects(forger: Forger) -> None:
    """A data type that would run code to decode."""
    forger.metadata(STATES, lambda m: m.update(data_type="object"))


def states_through_another_codec(forger: Forger) -> None:
    """A codec that this format does not use."""
    forger.metadata(STATES, lambda m: m["codecs"][0]["configuration"]["codecs"].append({"name": "gzip"}))
