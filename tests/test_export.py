"""Exports, read back by the libraries they are for, against the twin that knows what was appended."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from stores import bits, make_fingerprint, make_segment, read_tree, write_store
from twins.store import Twin

import actcache.store.export
from actcache.cli import main
from actcache.errors import CorruptStoreError, InputError
from actcache.progress import Progress
from actcache.store import Store, open_store
from actcache.store.export import FORMATS, export, parse_events


def make_twin(path: Path, **changes: Any) -> tuple[Store, Twin]:
    fingerprint = make_fingerprint(width=5) | changes
    segments = {
        "a": make_segment(fingerprint, [5, 9, 1], [(1, 8), (0, 2), (1, 3), (2, 0)], name="a", seed=1),
        "b": make_segment(fingerprint, [], [], name="b", seed=2),
        "c": make_segment(fingerprint, [4, 6], [(1, 3)], name="c", seed=3),
    }
    return open_store(write_store(path, fingerprint, segments)), Twin(fingerprint, segments)


Exported = dict[str, tuple[torch.Tensor, list[int] | None]]  # name of the array -> rows, offsets


def read_safetensors(out: Path) -> Exported:
    found: Exported = {}
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        offsets = tensors.pop("offsets").tolist() if "offsets" in tensors else None
        ((_, rows),) = tensors.items()
        found[file.stem] = (rows, offsets)
    return found


def read_npy(out: Path) -> Exported:
    found: Exported = {}
    said = json.loads((out / "export.json").read_text())["arrays"]
    for folder in (entry for entry in out.iterdir() if entry.is_dir()):
        (values,) = set(folder.iterdir()) - {folder / "offsets.npy"}
        rows = torch.from_numpy(np.load(values))
        if said[folder.name]["dtype"] == "bfloat16":
            assert said[folder.name]["written_as"] == "uint16"
            rows = rows.view(torch.bfloat16)
        offsets = folder / "offsets.npy"
        found[folder.name] = (rows, np.load(offsets).tolist() if offsets.exists() else None)
    return found


def read_arrow(out: Path) -> Exported:
    found: Exported = {}
    said = json.loads((out / "export.json").read_text())["arrays"]
    event_ids = pq.read_table(out / "events.parquet")["event_id"].to_pylist()
    for file in out.glob("*.arrow"):
        table = pa.ipc.open_file(file).read_all()
        assert table["event_id"].to_pylist() == event_ids
        column = table.schema.field(1)
        array = table[column.name].combine_chunks()
        offsets = None
        if pa.types.is_list(array.type):
            offsets, array = array.offsets.to_pylist() if len(array) else [0], array.flatten()
        shape = [len(array)]
        if pa.types.is_fixed_size_list(array.type):
            shape, array = [len(array), array.type.list_size], array.flatten()
        values = torch.from_numpy(array.to_numpy(zero_copy_only=False).copy()).reshape(shape)
        dtype = column.metadata[b"dtype"].decode()
        assert dtype == said[file.stem]["dtype"]
        found[file.stem] = (values.view(torch.bfloat16) if dtype == "bfloat16" else values, offsets)
    return found


READ = {"safetensors": read_safetensors, "npy": read_npy, "arrow": read_arrow}


def expected(twin: Twin, labels: Sequence[str], boundaries: Sequence[int], events: Sequence[int]) -> Exported:
    """By loops over what was appended."""
    store_dtype = next(iter(twin.segments.values())).final["pt"].dtype
    nothing = torch.empty((0, twin.fingerprint["width"]), dtype=store_dtype)

    def ragged(parts: list[torch.Tensor]) -> list[int]:
        return np.cumsum([0, *map(len, parts)]).tolist()

    found: Exported = {}
    for label in labels:
        for b in boundaries:
            key = (label, b)
            rows = twin.rows(lambda s, key=key: s.states[key], twin.fingerprint["row_selection"], events)
            found[f"{label}.b{b:03d}"] = (torch.cat([nothing, *rows]), ragged(rows))
        rows = twin.rows(lambda s, label=label: s.final[label], "divergence", events)
        found[f"{label}.final"] = (torch.cat([nothing, *rows]), None)
    ids = twin.rows(lambda s: torch.from_numpy(s.token_ids).long(), "prefix", events)
    found["tokens"] = (torch.cat([torch.empty(0, dtype=torch.int64), *ids]), ragged(ids))
    return found


def check(out: Path, to: str, want: Exported) -> None:
    found = READ[to](out)
    assert found.keys() == want.keys()
    index = json.loads((out / "export.json").read_text())
    for name, (rows, offsets) in want.items():
        assert (bits(found[name][0]), found[name][1]) == (bits(rows), offsets), name
        assert index["arrays"][name]["shape"] == list(rows.shape)
    named = {file for array in index["arrays"].values() for file in array["files"]} | {"events.parquet", "export.json"}
    assert set(read_tree(out)) == named


# Each dtype beside every format, every selection and every size of a batch.
SELECTIONS, DTYPES = ("prefix", "divergence"), ("float32", "float16", "bfloat16")
SIZES = (1, 100, actcache.store.export.BATCH_BYTES)
CASES = [
    (to, selection, size, DTYPES[(number + SELECTIONS.index(selection) + SIZES.index(size)) % len(DTYPES)])
    for number, to in enumerate(FORMATS)
    for selection in SELECTIONS
    for size in SIZES
]


@pytest.mark.slow
@pytest.mark.parametrize(("to", "selection", "batch_bytes", "dtype"), CASES)
def test_an_export_holds_what_was_captured(to, selection, dtype, batch_bytes, tmp_path):
    store, twin = make_twin(tmp_path / "store", dtype=dtype, row_selection=selection)
    with mock.patch.object(actcache.store.export, "BATCH_BYTES", batch_bytes):
        export(store, tmp_path / "all", to)
        check(tmp_path / "all", to, expected(twin, ["pt", "it"], [1, 2], range(5)))
        assert pq.read_table(tmp_path / "all/events.parquet").equals(store.events)
        some = [4, 0, 0, 2]
        export(store, tmp_path / "some", to, checkpoints=["it"], boundaries=[2], events=some)
        check(tmp_path / "some", to, expected(twin, ["it"], [2], some))
        assert pq.read_table(tmp_path / "some/events.parquet").equals(store.events.take(some))
    index = json.loads((tmp_path / "some/export.json").read_text())
    assert (index["format"], index["row_selection"], index["events"]["n"]) == (to, selection, 4)
    assert index["fingerprint"] == store.fingerprint.to_json()


@pytest.mark.parametrize("to", FORMATS)
def test_no_events_are_empty_files(to, tmp_path):
    store, twin = make_twin(tmp_path / "store", dtype="bfloat16")
    export(store, tmp_path / "none", to, events=[])
    check(tmp_path / "none", to, expected(twin, ["pt", "it"], [1, 2], []))
    export(store, tmp_path / "no boundary", to, boundaries=[], events=slice(1, 3))
    check(tmp_path / "no boundary", to, expected(twin, ["pt", "it"], [], [1, 2]))
    fingerprint = make_fingerprint()
    empty = open_store(write_store(tmp_path / "empty", fingerprint, {"a": make_segment(fingerprint, [], [])}))
    export(empty, tmp_path / "of empty", to)
    assert pq.read_table(tmp_path / "of empty/events.parquet").num_rows == 0


@pytest.mark.parametrize("to", FORMATS)
def test_rows_of_another_site(to, tmp_path):
    fingerprint = make_fingerprint()
    segment = make_segment(fingerprint, [5, 9], [(1, 8), (0, 2)], sites=[("mlp", 4), ("mlp", 0), ("attention", 4)])
    store = open_store(write_store(tmp_path / "store", fingerprint, {"a": segment}))
    mask = [False, True]
    out = tmp_path / "out"
    assert main(["export", store.path, "--to", to, "--out", str(out), "--site", "mlp", "--boundary", "4,0"]) == 0
    export(store, tmp_path / "some", to, site="attention", events=mask)
    twin = Twin(fingerprint, {"a": segment})
    for folder, site, blocks, events in ((out, "mlp", [4, 0], [0, 1]), (tmp_path / "some", "attention", [4], [1])):
        want = expected(twin, ["pt", "it"], [], events)
        for label in ("pt", "it"):
            for block in blocks:
                rows = twin.rows(lambda s, key=(site, label, block): s.rows[key], "prefix", events)
                want[f"{label}.{site}.b{block:03d}"] = (torch.cat(rows), np.cumsum([0, *map(len, rows)]).tolist())
        check(folder, to, want)
    said = json.loads((out / "export.json").read_text())["arrays"]["it.mlp.b004"]
    assert (said["checkpoint"], said["site"], said["block"]) == ("it", "mlp", 4)


def test_npy_files_can_be_mapped_and_safetensors_read_in_part(tmp_path):
    store, twin = make_twin(tmp_path / "store")
    want, offsets = expected(twin, ["pt"], [1], range(5))["pt.b001"]
    export(store, tmp_path / "npy", "npy")
    mapped = np.load(tmp_path / "npy/pt.b001/rows.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    assert mapped.tobytes() == want.numpy().tobytes()
    export(store, tmp_path / "st", "safetensors")
    with safe_open(tmp_path / "st/pt.b001.safetensors", "pt") as file:
        assert file.metadata() == {"checkpoint": "pt", "boundary": "1"}
        assert bits(file.get_slice("rows")[offsets[1] : offsets[2]]) == bits(want[offsets[1] : offsets[2]])


def test_rows_pass_through_memory_a_batch_at_a_time(tmp_path):
    fingerprint = make_fingerprint(width=64)
    places = [(i, 9) for i in range(40)]
    store = open_store(
        write_store(tmp_path / "store", fingerprint, {"a": make_segment(fingerprint, [10] * 40, places)})
    )
    asked = []

    def states(label: str, boundary: int, events: Any, read: Any = store.states, **options: Any) -> Any:
        asked.append(len(events))
        return read(label, boundary, events, **options)

    with (
        mock.patch.object(actcache.store.export, "BATCH_BYTES", 3 * 10 * 64 * 4),
        mock.patch.object(store, "states", states),
    ):
        export(store, tmp_path / "out", "safetensors", checkpoints=["pt"], boundaries=[1])
    assert asked == [3] * 13 + [1]


def test_progress_counts_to_its_total(tmp_path):
    store, _ = make_twin(tmp_path / "store")
    told: list[Progress] = []
    with mock.patch.object(actcache.store.export, "BATCH_BYTES", 1):
        export(store, tmp_path / "out", "npy", on_progress=told.append)
    assert len(told) == 1 + 5 * (2 * 2 + 2 + 1), "at the start, and an event of an array at a time"
    assert [step.done for step in told] == sorted({step.done for step in told})
    assert told[-1].done == told[-1].total == told[0].total


# ---- what is refused, and what an error leaves ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"to": "hdf5"}, "the format is 'hdf5', expected one of safetensors, npy, arrow"),
        ({"checkpoints": ["pt", "sft"]}, "checkpoint 'sft' is not in the store; it has pt, it"),
        ({"boundaries": [3]}, "boundary 3 is not in the store; it has 1, 2"),
        ({"site": "mpl"}, "site is 'mpl', expected one of state, attention, mlp"),
        ({"site": "mlp"}, "the store has no rows of mlp; 'actcache capture ... --site mlp:BLOCKS' keeps them"),
        ({"events": [5]}, "event 5 is not in the store; it has 5 events, counted from 0"),
        ({"events": [-1]}, "event -1 is not in the store"),
        ({"events": [0.5]}, "events are float64, expected integers"),
        ({"out": "store/export"}, "lies within the store"),
        ({"out": "store"}, "lies within the store"),
        ({"out": "full"}, "exists and is not an empty folder"),
        ({"out": "file"}, "exists and is not an empty folder"),
    ],
)
def test_what_cannot_be_exported_is_refused(given, said, tmp_path):
    store, _ = make_twin(tmp_path / "store")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = read_tree(tmp_path)
    given = {"out": "out", "to": "npy"} | given
    with pytest.raises(InputError, match=said):
        export(store, tmp_path / given.pop("out"), given.pop("to"), **given)
    assert read_tree(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_filled_and_parents_are_made(tmp_path, monkeypatch):
    store, twin = make_twin(tmp_path / "store")
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    export(store, tmp_path / "link", "npy")
    check(tmp_path / "there", "npy", expected(twin, ["pt", "it"], [1, 2], range(5)))
    export(store, tmp_path / "deep/er", "npy", events=[])
    assert (tmp_path / "deep/er/export.json").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(store, ".", "npy", events=[])
    assert (tmp_path / "here/export.json").is_file()
    assert not list(tmp_path.rglob(".*.tmp"))


@pytest.mark.parametrize("to", FORMATS)
def test_an_error_leaves_nothing(to, tmp_path):
    store, _ = make_twin(tmp_path / "store")
    shard = tmp_path / "store/segments/c/states/it/b002/c/0/0"
    data = bytearray(shard.read_bytes())
    data[20] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptStoreError, match="segment c, array states/it/b002, chunk 0"):
        export(store, tmp_path / "out", to)
    assert os.listdir(tmp_path) == ["store"]
    with mock.patch.object(os, "replace", side_effect=OSError("full")), pytest.raises(OSError, match="full"):
        export(store, tmp_path / "out", to, boundaries=[1])
    assert os.listdir(tmp_path) == ["store"]


def test_positions_that_change_meanwhile_are_noticed(tmp_path):
    """The headers are written before the rows, so their number must hold."""
    store, _ = make_twin(tmp_path / "store")
    one_token = (torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1]))
    with (
        mock.patch.object(store, "token_ids", return_value=one_token),
        pytest.raises(CorruptStoreError, match="tokens: 1 rows of events, their positions say"),
    ):
        export(store, tmp_path / "out", "npy")


def test_the_verb(tmp_path, capsys):
    _, twin = make_twin(tmp_path / "store")
    asked = ["--checkpoint", "it", "--boundary", "2", "--events", "4,0,2"]
    words = ["export", str(tmp_path / "store"), "--to", "npy", "--out"]
    assert main([*words, str(tmp_path / "some"), *asked]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'some'}\n"
    check(tmp_path / "some", "npy", expected(twin, ["it"], [2], [4, 0, 2]))
    assert main([*words, str(tmp_path / "all"), "--boundary", "all", "--events", "1:"]) == 0
    check(tmp_path / "all", "npy", expected(twin, ["pt", "it"], [1, 2], range(1, 5)))
    assert main([*words, str(tmp_path / "new"), "--events", "9"]) == 2
    assert "event 9 is not in the store" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "all")]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "events"),
    [("0", [0]), ("0,5, 9", [0, 5, 9]), ("2:5", slice(2, 5)), (":5", slice(None, 5)), ("2:", slice(2, None))],
)
def test_events_on_the_command_line(text, events):
    assert parse_events(text) == events


@pytest.mark.parametrize("text", ["", "x", "1,", "1:2:3", "1.5", "1-3"])
def test_events_that_are_none(text):
    with pytest.raises(InputError, match="expected numbers"):
        parse_events(text)
