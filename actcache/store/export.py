"""Export: what a store answers, as files that other tools read without actcache: safetensors, .npy or Arrow.

The files hold, per checkpoint and boundary (or block of another site), the rows and offsets of ``Store.states``; per
checkpoint, what ``Store.final`` gives; the token ids of ``Store.token_ids``; and the events as Parquet.
``export.json`` says what each file is. Events come in the order asked, the same in every file. Knows the public face
of a store; knows no segments, chunks or models.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from actcache.errors import CorruptStoreError, InputError
from actcache.files import fsync, make_folder, naming
from actcache.progress import OnProgress, Tally, untold
from actcache.store import Store, layout
from actcache.store.selection import Events

FORMATS = ("safetensors", "npy", "arrow")
EVENTS_FILE = "events.parquet"
INDEX_FILE = "export.json"
# Rows in memory at once, whatever the size of the store; one event's rows where they alone are more.
BATCH_BYTES = 64 * 1024 * 1024

_SAFETENSORS_DTYPE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}
_MOST_OF_AN_ARROW_LIST = 2**31 - 1
_ARROW_TYPE = {"float32": pa.float32(), "float16": pa.float16(), "uint16": pa.uint16(), "int64": pa.int64()}


def parse_events(text: str) -> list[int] | slice:
    """Events as the command line writes them: ``0,5,9``, or ``100:200`` with either end left out.

    Raises:
        InputError: it is neither.
    """
    try:
        if ":" in text:
            start, stop = (int(part) if part.strip() else None for part in text.split(":"))
            return slice(start, stop)
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"events are {text!r}, expected numbers as 0,5,9 or a range as 100:200") from error


def export(
    store: Store,
    out: str | Path,
    to: str,
    *,
    checkpoints: Sequence[str] | None = None,
    boundaries: Sequence[int] | None = None,
    site: str = layout.STATE,
    events: Events = None,
    on_progress: OnProgress = untold,
) -> None:
    """Write states, final states, token ids and events of a store into a new folder, durable when this returns.

    Rows pass through memory ``BATCH_BYTES`` at a time. An event's rows are written with the event: events of one
    sequence repeat the rows that they share, as ``Store.states`` does. An export that is killed leaves nothing at
    ``out`` but a folder ``.NAME.*.tmp`` beside it.

    What a checkpoint has at a boundary becomes, by format (``pt.final`` and ``tokens`` likewise; rows of another site
    are ``pt.mlp.b018``):

    - safetensors: ``pt.b018.safetensors`` with tensors ``rows`` ``[N, D]`` and ``offsets`` ``[n + 1]`` int64.
    - npy: ``pt.b018/rows.npy`` and ``pt.b018/offsets.npy``; bfloat16 as its uint16 words, as ``export.json`` says.
    - arrow: ``pt.b018.arrow``, an IPC file with one row per event: ``event_id`` and ``rows``, a list of fixed-size
      lists (bfloat16 as its uint16 words, as the field's metadata says).

    Args:
        store: to read.
        out: folder to make; one that is there must be empty.
        to: one of ``FORMATS``.
        checkpoints: labels, all by default.
        boundaries: of those stored, all by default; of other sites than ``state``, the indices of the blocks.
        site: ``state``; ``attention`` or ``mlp`` for what that part of the blocks gives.
        events: see :class:`Store`; None for all.
        on_progress: told of rows, token ids among them, after every batch.

    Raises:
        InputError: an unknown format, label, boundary, site or event; ``out`` is not empty, or lies within the store.
        CorruptStoreError: stored bytes are not those committed. Nothing is left at ``out``, as after every error.
        OSError: the disk refuses.
    """
    if to not in FORMATS:
        raise InputError(f"the format is {to!r}, expected one of {', '.join(FORMATS)}")
    if to == "arrow" and store.width > _MOST_OF_AN_ARROW_LIST:
        raise InputError(f"Arrow has no lists of {store.width} values; export to npy or safetensors")
    target = _checked_target(Path(out), store)
    labels = _chosen(checkpoints, store.checkpoints, "checkpoint")
    known = store.sites.get(layout.check_site(site), [])
    if site != layout.STATE and not known:
        raise InputError(f"the store has no rows of {site}; 'actcache capture ... --site {site}:BLOCKS' keeps them")
    blocks = _chosen(boundaries, known, layout.block_of(site))
    arrays = _arrays(store, labels, site, blocks, store.numbers(events))
    make_folder(target.parent)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    draft.mkdir()
    try:
        with naming(target):
            index = _write_all(store, draft, to, arrays, on_progress)
            (draft / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        for path in (*draft.rglob("*"), draft):
            fsync(path)
        os.replace(draft, target)  # takes the place of an empty folder, and fails on one that was filled meanwhile
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    fsync(target.parent)


def _checked_target(out: Path, store: Store) -> Path:
    target = out.resolve()  # also so that '.' has a name
    if target.is_relative_to(Path(store.path).resolve()):
        raise InputError(f"{out} lies within the store; give another folder")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder; give a new one")
    return target


# ---- what is exported ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Array:
    """One thing that every event has: its rows at a boundary, its final state, or its token ids.

    Attributes:
        name: of its file or folder.
        column: what its values are called within.
        dtype: as captured.
        row_shape: ``(D,)``, or ``()`` for token ids.
        offsets: ``[n + 1]`` int64, where each event's rows begin.
        is_ragged: whether the offsets say anything: a final state is one row per event.
        events: ``[n]``, the events in the order asked.
        read: the rows of some events.
        said: what the index says of it.
    """

    name: str
    column: str
    dtype: str
    row_shape: tuple[int, ...]
    offsets: npt.NDArray[np.int64]
    is_ragged: bool
    events: npt.NDArray[np.int64]
    read: Callable[[npt.NDArray[np.int64]], torch.Tensor]
    said: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all rows together, ``[N, D]`` or ``[T]``."""
        return (int(self.offsets[-1]), *self.row_shape)

    @property
    def stored_dtype(self) -> str:
        """Of the values where no bfloat16 can be: its 16-bit words."""
        return "uint16" if self.dtype == "bfloat16" else self.dtype

    def batches(self) -> Iterator[tuple[slice, npt.NDArray[Any]]]:
        """Rows ``[m, D]`` of consecutive events, at most ``BATCH_BYTES`` or one event, and which events these are."""
        row_bytes = math.prod(self.row_shape) * np.dtype(self.stored_dtype).itemsize
        start = 0
        while start < len(self.events):
            most = self.offsets[start] + BATCH_BYTES // row_bytes
            stop = max(start + 1, int(np.searchsorted(self.offsets, most, side="right")) - 1)
            rows = self.read(self.events[start:stop])
            expected = int(self.offsets[stop] - self.offsets[start])
            if len(rows) != expected:  # headers written before the rows rely on it
                raise CorruptStoreError(f"{self.name}: {len(rows)} rows of events, their positions say {expected}")
            yield slice(start, stop), _words(rows)
            start = stop


def _words(rows: torch.Tensor) -> npt.NDArray[Any]:
    return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()


def _arrays(
    store: Store, labels: list[str], site: str, blocks: list[int], numbers: npt.NDArray[np.int64]
) -> list[_Array]:
    """Every array to write."""
    single = np.arange(len(numbers) + 1, dtype=np.int64)
    prefix = np.zeros(len(numbers) + 1, np.int64)
    np.cumsum(store.events["position"].to_numpy()[numbers] + 1, out=prefix[1:])
    rows = prefix if store.fingerprint.has_prefix_rows else single
    dtype, vector = str(store.dtype).removeprefix("torch."), (store.width,)

    def row_reader(label: str, block: int) -> Callable[[npt.NDArray[np.int64]], torch.Tensor]:
        return lambda of: store.states(label, block, of, site=site)[0]

    def final_reader(label: str) -> Callable[[npt.NDArray[np.int64]], torch.Tensor]:
        return lambda of: store.final(label, of)

    arrays = []
    for label in labels:
        for b in blocks:
            is_state = site == layout.STATE
            said: dict[str, Any] = {"checkpoint": label} | ({"boundary": b} if is_state else {"site": site, "block": b})
            name = f"{label}.b{b:03d}" if is_state else f"{label}.{site}.b{b:03d}"
            arrays.append(_Array(name, "rows", dtype, vector, rows, True, numbers, row_reader(label, b), said))
        said = {"checkpoint": label, "of": "the last block's output, before the final norm, at each event's position"}
        reader = final_reader(label)
        arrays.append(_Array(f"{label}.final", "rows", dtype, vector, single, False, numbers, reader, said))
    said = {"of": "the tokens of positions 0..p of each event"}
    arrays.append(
        _Array("tokens", "token_ids", "int64", (), prefix, True, numbers, lambda of: store.token_ids(of)[0], said)
    )
    return arrays


def _chosen(given: Sequence[Any] | None, known: list[Any], what: str) -> list[Any]:
    """What is asked for, each once, or all that is known; InputError for anything else."""
    for value in given or ():
        if isinstance(value, bool | float) or value not in known:  # True is 1, and 2.0 is 2
            raise InputError(f"{what} {value!r} is not in the store; it has {', '.join(map(str, known))}")
    return known if given is None else list(dict.fromkeys(given))


# ---- how it is written -----------------------------------------------------------------------------------------------


def _write_all(store: Store, folder: Path, to: str, arrays: list[_Array], on_progress: OnProgress) -> dict[str, Any]:
    """Every file but the index; the content of the index."""
    write = {"safetensors": _write_safetensors, "npy": _write_npy, "arrow": _write_arrow}[to]
    numbers = arrays[0].events
    table = store.events.take(pa.array(numbers))
    pq.write_table(table, folder / EVENTS_FILE)
    files: dict[str, Any] = {}
    tally = Tally(sum(int(array.offsets[-1]) for array in arrays), "rows", on_progress)
    for array in arrays:
        written_as = array.dtype if to == "safetensors" else array.stored_dtype
        files[array.name] = {
            **array.said,
            "files": write(folder, array, table["event_id"], tally),
            "values": array.column,
            "shape": list(array.shape),
            "dtype": array.dtype,
            "written_as": written_as,
        }
    return {
        "export_version": 1,
        "format": to,
        "events": {"files": [EVENTS_FILE], "n": len(numbers)},
        "row_selection": store.fingerprint.row_selection,
        "arrays": files,
        "note": "event i has rows offsets[i]:offsets[i + 1]; bfloat16 that is written as uint16 is its 16-bit words",
        "fingerprint": store.fingerprint.to_json(),
    }


def _write_safetensors(folder: Path, array: _Array, event_ids: pa.ChunkedArray, tally: Tally) -> list[str]:
    """The header first, which says where everything will lie; then the bytes as they come."""
    header: dict[str, Any] = {"__metadata__": {key: str(value) for key, value in array.said.items()}}
    at = 0
    if array.is_ragged:  # before the rows: multiples of eight bytes, so that all is aligned
        header["offsets"] = {"dtype": "I64", "shape": [len(array.offsets)], "data_offsets": [0, array.offsets.nbytes]}
        at = array.offsets.nbytes
    n_bytes = math.prod(array.shape) * np.dtype(array.stored_dtype).itemsize
    header[array.column] = {
        "dtype": _SAFETENSORS_DTYPE[array.dtype],
        "shape": list(array.shape),
        "data_offsets": [at, at + n_bytes],
    }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file = f"{array.name}.safetensors"
    with open(folder / file, "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        if array.is_ragged:
            stream.write(array.offsets.data)
        _write_rows(stream, array, tally)
    return [file]


def _write_npy(folder: Path, array: _Array, event_ids: pa.ChunkedArray, tally: Tally) -> list[str]:
    (folder / array.name).mkdir()
    files = [f"{array.name}/{array.column}.npy"]
    with open(folder / files[0], "wb") as stream:
        described = {
            "descr": np.dtype(array.stored_dtype).newbyteorder("<").str,
            "fortran_order": False,
            "shape": array.shape,
        }
        np.lib.format.write_array_header_1_0(stream, described)
        _write_rows(stream, array, tally)
    if array.is_ragged:
        files.append(f"{array.name}/offsets.npy")
        with open(folder / files[1], "wb") as stream:
            np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array.offsets))
            stream.write(array.offsets.data)  # np.save would not say why it cannot
    return files


def _write_rows(stream: BinaryIO, array: _Array, tally: Tally) -> None:
    for _, rows in array.batches():
        stream.write(np.ascontiguousarray(rows).data)
        tally.add(len(rows))


def _write_arrow(folder: Path, array: _Array, event_ids: pa.ChunkedArray, tally: Tally) -> list[str]:
    """An IPC file, a record batch at a time."""
    value = _ARROW_TYPE[array.stored_dtype]
    row = pa.list_(value, *array.row_shape) if array.row_shape else value
    column = pa.field(
        array.column,
        pa.list_(row) if array.is_ragged else row,
        metadata={"dtype": array.dtype} | {key: str(said) for key, said in array.said.items()},
    )
    schema = pa.schema([pa.field("event_id", pa.string()), column])
    file = f"{array.name}.arrow"
    ids = event_ids.combine_chunks()
    with pa.OSFile(str(folder / file), "wb") as stream, pa.ipc.new_file(stream, schema) as writer:
        for events, rows in array.batches():
            values = pa.Array.from_buffers(value, rows.size, [None, pa.py_buffer(np.ascontiguousarray(rows))])
            if array.row_shape:
                values = pa.FixedSizeListArray.from_arrays(values, *array.row_shape)
            if array.is_ragged:
                starts = array.offsets[events.start : events.stop + 1] - array.offsets[events.start]
                values = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), values)
            part = [ids[events.start : events.stop], values.cast(column.type)]
            writer.write_batch(pa.record_batch(part, schema=schema))
            tally.add(len(rows))
    return [file]
