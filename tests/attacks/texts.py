"""JSON that Python's parser takes, or chokes on in ways of its own."""

from __future__ import annotations

from attacks.forger import STATES, Forger, dumps


def _text_of(forger: Forger, segment: str = "a") -> bytes:
    """The record's JSON without its checksum."""
    found = {}
    forger.record(lambda r: found.update(r), segment)
    return dumps(found)


def record_nested_deeply(forger: Forger) -> None:
    """A hundred thousand brackets: RecursionError in the parser."""
    forger.write_record(_text_of(forger)[:-1] + b',"z":' + b"[" * 100_000 + b"]" * 100_000 + b"}")


def root_nested_deeply(forger: Forger) -> None:
    """The same in the root."""
    (forger.path / "zarr.json").write_bytes(b'{"attributes":' * 50_000 + b"1" + b"}" * 50_000)


def metadata_nested_deeply(forger: Forger) -> None:
    """The same in an array's metadata."""
    forger.write_metadata(STATES, b'{"attributes":' * 50_000 + b"1" + b"}" * 50_000)


def record_nested_just_too_deeply_to_write(forger: Forger, depth: int = 985) -> None:
    """Nesting that the parser, called from less deep, still takes, but not the encoder that checks the checksum."""
    forger.write_record(_text_of(forger)[:-1] + b',"z":' + b"[" * depth + b"]" * depth + b"}")


def root_nested_just_too_deeply_to_write(forger: Forger, depth: int = 985) -> None:
    """The same in the fingerprint."""
    text = (forger.path / "zarr.json").read_bytes()
    nested = b'"fingerprint":{"a":' + b"[" * depth + b"]" * depth + b","
    (forger.path / "zarr.json").write_bytes(text.replace(b'"fingerprint":{', nested, 1))


def record_with_a_number_of_many_digits(forger: Forger) -> None:
    """An integer beyond the number of digits that Python converts: ValueError."""
    forger.write_record(_text_of(forger)[:-1] + b',"z":' + b"9" * 5000 + b"}")


def counts_of_many_digits(forger: Forger) -> None:
    """Counts that Python holds and nothing else does."""
    forger.write_record(_text_of(forger).replace(b'"n_events":4', b'"n_events":' + b"9" * 4000))


def metadata_with_a_number_of_many_digits(forger: Forger) -> None:
    """A shape beyond the number of digits that Python converts."""
    text = (forger.array(STATES) / "zarr.json").read_bytes()
    forger.write_metadata(STATES, text.replace(b'"shape":[15', b'"shape":[' + b"9" * 5000))


def record_with_nan(forger: Forger) -> None:
    """NaN, which is no JSON, for a count."""
    forger.write_record(_text_of(forger).replace(b'"n_events":4', b'"n_events":NaN'))


def record_with_infinity(forger: Forger) -> None:
    """Infinity, which is no JSON, for a size."""
    forger.record(lambda r: r["files"].update({"token_ids/c/0": [float("inf"), None]}))


def fingerprint_with_nan(forger: Forger) -> None:
    """NaN in the fingerprint: a root that is no JSON, which other Zarr readers refuse."""
    forger.fingerprint(lambda f: f.update(seed=float("nan")))


def shape_of_infinity(forger: Forger) -> None:
    """Infinity for a shape: arithmetic on it raises OverflowError."""
    forger.metadata(STATES, lambda m: m.update(shape=[float("inf"), 3]))


def chunks_of_nan_rows(forger: Forger) -> None:
    """NaN for the rows of a chunk."""
    forger.metadata(STATES, lambda m: m["codecs"][0]["configuration"].update(chunk_shape=[float("nan"), 3]))


def record_with_a_key_twice(forger: Forger) -> None:
    """Two values of one key: one reader checks the first, another uses the second."""
    forger.write_record(_text_of(forger)[:-1] + b',"n_events":4}')


def root_with_a_key_twice(forger: Forger) -> None:
    """Two fingerprints in one root."""
    text = (forger.path / "zarr.json").read_bytes()
    (forger.path / "zarr.json").write_bytes(
        text.replace(b'"format_version":2', b'"format_version":3,"format_version":2')
    )


def metadata_with_a_key_twice(forger: Forger) -> None:
    """Two shapes of one array: this reader and another would take different ones."""
    text = (forger.array(STATES) / "zarr.json").read_bytes()
    forger.write_metadata(STATES, b'{"shape":[1,3],' + text[1:])


def root_with_more_keys(forger: Forger) -> None:
    """A root that says more than this version knows."""
    forger.root(lambda root: root["attributes"]["actcache"].update(also="this"))


def root_of_another_kind(forger: Forger) -> None:
    """The fingerprint is a text in which all required names occur."""
    fields = "checkpoints dtype boundaries row_selection width"
    forger.root(lambda root: root["attributes"]["actcache"].update(fingerprint=fields))


def record_of_a_hundred_megabytes(forger: Forger) -> None:
    """A record that a reader would have to take into memory before it can check it."""
    forger.write_record(_text_of(forger)[:-1] + b',"z":"' + b"z" * 100_000_000 + b'"}')


def fingerprint_of_a_hundred_megabytes(forger: Forger) -> None:
    """The same as a fingerprint."""
    forger.fingerprint(lambda f: f.update(seed="z" * 100_000_000))


def record_of_many_empty_lists(forger: Forger) -> None:
    """Sixty megabytes of '[],', of which Python makes more than a gigabyte."""
    forger.write_record(_text_of(forger)[:-1] + b',"z":[' + b"[]," * 20_000_000 + b"[]]}")


def metadata_of_many_empty_lists(forger: Forger) -> None:
    """The same as the checksums of an array's chunks."""
    text = (forger.array(STATES) / "zarr.json").read_bytes()
    forger.write_metadata(STATES, text.replace(b'"chunk_crc32c":[', b'"chunk_crc32c":[' + b"[]," * 20_000_000))


def empty_record(forger: Forger) -> None:
    """No bytes."""
    forger.record_file().write_bytes(b"")


def empty_root(forger: Forger) -> None:
    """No bytes."""
    (forger.path / "zarr.json").write_bytes(b"")


def empty_metadata(forger: Forger) -> None:
    """No bytes, and a record that vouches for them."""
    forger.write_metadata(STATES, b"")


def record_in_utf_16(forger: Forger) -> None:
    """Python's parser guesses encodings; the checksum is of other bytes then."""
    forger.record_file().write_bytes(forger.record_file().read_bytes().decode().encode("utf-16"))
