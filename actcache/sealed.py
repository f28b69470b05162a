"""Sealed files: each says what it was made from, and holds a checksum of all its bytes.

For the files of a run, whose numbers are read again long after they were written. A *seal* is ``actcache-seal:`` and
the SHA-256 of the file, taken with these 64 digits as zeros. It stands where the format has room for a text: in the
metadata of a Parquet table, as the last key of a JSON object, in a comment of a page. Other programs read the files as
ever. Knows formats, nothing of what the files are for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from actcache.errors import CorruptFileError, InputError
from actcache.files import as_path

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

_MARK = "actcache-seal:"
_BLANK = f"{_MARK}{'0' * 64}"
_SEAL = re.compile(_MARK.encode() + rb"([0-9a-f]{64})")
_NOTES = b"actcache"  # key of a table's metadata: what it was made from, as JSON
_NOTES_SEAL = b"actcache.seal"

_DICTIONARY_BYTES = 2**30  # beyond it, Parquet repeats each text in every row that has it


class NoSealError(InputError):
    """A file without a seal: an earlier version's, or not one of ours. The message says what to do."""


class Sealed(NamedTuple):
    """What a sealed file holds.

    Attributes:
        content: a table, or the values of an object.
        made_from: what the writer said that it was made from.
        seal: SHA-256 of the file, in hex: names this very file in ``made_from`` of others.
    """

    content: Any
    made_from: dict[str, Any]
    seal: str


def json_bytes(content: dict[str, Any], made_from: dict[str, Any]) -> bytes:
    """An object as a sealed file: its own keys, then ``made_from`` and ``seal``."""
    return _sealed(json.dumps({**content, "made_from": made_from, "seal": _BLANK}, indent=1).encode() + b"\n")


def parquet_bytes(table: pa.Table, made_from: dict[str, Any]) -> bytes:
    """A table as a sealed Parquet file; what metadata its schema has is left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    notes = {_NOTES: json.dumps(made_from, sort_keys=True), _NOTES_SEAL: _BLANK}
    sink = pa.BufferOutputStream()
    repeating = [field.name for field in table.schema if not pa.types.is_floating(field.type)]
    pq.write_table(
        table.replace_schema_metadata(notes),
        sink,
        use_dictionary=repeating,
        dictionary_pagesize_limit=_DICTIONARY_BYTES,
    )
    return _sealed(sink.getvalue().to_pybytes())


def safetensors_bytes(tensors: Mapping[str, torch.Tensor], made_from: dict[str, Any]) -> bytes:
    """Tensors as a sealed safetensors file."""
    from safetensors.torch import save

    # One entry: the library writes several in any order, and the same content shall be the same bytes.
    notes = json.dumps({"made_from": made_from, "seal": _BLANK}, sort_keys=True)
    return _sealed(save({name: tensor.contiguous() for name, tensor in tensors.items()}, {_NOTES.decode(): notes}))


def html_bytes(page: str, made_from: dict[str, Any]) -> bytes:
    """A page as a sealed file: a comment at its end has what it was made from, and the seal."""
    notes = json.dumps(made_from).replace("-", "\\u002d")  # a comment holds no "--"
    return _sealed(f"{page.rstrip()}\n<!-- made from {notes} {_BLANK} -->\n".encode())


def read_json(path: str | Path, what: str, advice: str, *, without_seal: bool = False) -> Sealed:
    """What :func:`json_bytes` made; ``content`` is the object without its last two keys.

    Args:
        path: of the file.
        what: it should be ("a plan"), for the message of an error.
        advice: what a person can do where it is not, for that message.
        without_seal: whether an object without a seal is taken as it is, made from nothing known.

    Raises:
        NoSealError: it has no seal.
        InputError: it is not JSON.
        CorruptFileError: its bytes are not those written.
        FileNotFoundError: there is no such file.
    """
    data = as_path(path).read_bytes()
    if without_seal and _last_seal(data) is None:
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not {what}: {error}; {advice}") from error
        if isinstance(content, dict) and "seal" in content:
            raise CorruptFileError(f"{path} is damaged: its seal is no SHA-256; {advice}")
        return Sealed(content, {}, "")
    seal = check_seal(data, path, what, advice)
    content = json.loads(data)
    made_from = content.pop("made_from")
    del content["seal"]
    return Sealed(content, made_from, seal)


def read_parquet(path: str | Path, what: str, advice: str, columns: list[str] | None = None) -> Sealed:
    """What :func:`parquet_bytes` made, or some of its columns (arguments and errors as :func:`read_json`)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = as_path(path).read_bytes()
    seal = check_seal(data, path, what, advice)
    # Not by threads of Arrow: where the last to hold these bytes is one, as the process ends, that aborts the process.
    table = pq.ParquetFile(pa.BufferReader(data)).read(columns=columns, use_threads=False)
    made_from = json.loads(table.schema.metadata[_NOTES])
    if columns is not None:
        table = table.select(columns)  # KeyError for one that is not there, which the read leaves out
    return Sealed(table.replace_schema_metadata(None), made_from, seal)


def read_safetensors(path: str | Path, what: str, advice: str) -> Sealed:
    """What :func:`safetensors_bytes` made (arguments and errors as :func:`read_json`)."""
    from safetensors.torch import load

    data = as_path(path).read_bytes()
    seal = check_seal(data, path, what, advice)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return Sealed(load(data), json.loads(header["__metadata__"][_NOTES.decode()])["made_from"], seal)


def seal_of(data: bytes) -> str:
    """The seal of bytes that one of the functions above made."""
    found = _last_seal(data)
    assert found is not None
    return found[1].decode()


def check_seal(data: bytes, path: str | Path, what: str, advice: str) -> str:
    """The seal of a file's bytes (errors as :func:`read_json`)."""
    found = _last_seal(data)
    # Arrow hands the blank one on with a table's schema, to what others make of a table of ours.
    if found is None or found[0] == _BLANK.encode():
        raise NoSealError(
            f"{path} is not {what} of this version: it has no seal (an earlier version wrote it, or another "
            f"program); {advice}"
        )
    digest = _digest(data, found)
    if digest.encode() != found[1]:
        raise CorruptFileError(
            f"{path} is damaged: the SHA-256 of its bytes is {digest[:12]}, its seal says {found[1].decode()[:12]}; "
            f"{advice}"
        )
    return digest


def _sealed(data: bytes) -> bytes:
    blank = _last_seal(data)
    assert blank is not None
    return b"".join((data[: blank.start(1)], _digest(data, blank).encode(), data[blank.end(1) :]))


def _last_seal(data: bytes) -> re.Match[bytes] | None:
    """The last one counts: texts of a table or an object that look like one come before."""
    found = None
    start = data.rfind(_MARK.encode())
    while found is None and start >= 0:
        found = _SEAL.match(data, start)
        start = data.rfind(_MARK.encode(), 0, start)
    return found


def _digest(data: bytes, seal: re.Match[bytes]) -> str:
    view = memoryview(data)
    digest = hashlib.sha256(view[: seal.start(1)])
    digest.update(b"0" * 64)
    digest.update(view[seal.end(1) :])
    return digest.hexdigest()
