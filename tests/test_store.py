"""The store against an obvious twin in memory, against plain Zarr, and against every kind of damage."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import INT_OF, bits, make_fingerprint, make_segment, read_tree, write_store
from twins.store import Twin, twins
from zarr.codecs import BloscCodec, Crc32cCodec

from actcache.canonical import digest_of
from actcache.errors import ActcacheError, CorruptStoreError, FormatVersionError, IncompatibleError, InputError
from actcache.store import (
    Problem,
    Segment,
    SegmentData,
    Store,
    StoreWriter,
    commit_record,
    compact,
    layout,
    open_store,
    shard,
    verify,
)
from actcache.store.chunks import BLOSC, CODECS
from actcache.store.verify import _check_files
from actcache.store.zarr_codec import Bf16Planes

# ---- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(twins(), st.data(), st.sampled_from([1, 40, 300, shard.CHUNK_BYTES]))
def test_a_store_answers_as_its_twin(twin, data, chunk_bytes):
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(shard, "CHUNK_BYTES", chunk_bytes):
        store = open_store(write_store(Path(folder) / "store", twin.fingerprint, twin.segments))
        assert (store.uncommitted, verify(store.path)) == ([], [])
        twin.check(store, range(len(store)))
        twin.check_tables(store)
        if len(store):
            twin.check(store, data.draw(st.lists(st.integers(0, len(store) - 1), max_size=8), label="events"))


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(twins(), st.sampled_from([40, shard.CHUNK_BYTES]))
def test_plain_zarr_sees_the_same_bits(twin, chunk_bytes):
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(shard, "CHUNK_BYTES", chunk_bytes):
        check_plain_zarr(write_store(Path(folder) / "store", twin.fingerprint, twin.segments), twin)


def check_plain_zarr(path: Path, twin: Twin) -> None:
    """zarr-python, with default settings, sees the same bits."""
    root = zarr.open_group(path, mode="r")
    assert root.attrs["actcache"]["fingerprint"] == twin.fingerprint
    assert set(root["segments"].group_keys()) == set(twin.segments)
    for name, segment in twin.segments.items():
        group = root["segments"][name]
        assert {path for path, node in group.members(max_depth=None) if isinstance(node, zarr.Array)} == set(
            open_segment(path, name).arrays
        )
        folders = {"state": "states"}
        for (site, label, block), rows in segment.rows.items():
            array = group[f"{folders.get(site, site)}/{label}/b{block:03d}"]
            assert array.attrs["dtype"] == twin.fingerprint["dtype"]
            assert array[...].tobytes() == rows.view(INT_OF[rows.dtype]).numpy().tobytes()
        for label, rows in segment.final.items():
            assert group[f"final/{label}"][...].tobytes() == rows.view(INT_OF[rows.dtype]).numpy().tobytes()
        assert group["token_ids"][...].tolist() == segment.token_ids.tolist()
        assert group["sequence_offsets"][...].tolist() == segment.sequence_offsets.tolist()
        assert group["events/position"][...].tolist() == segment.events["position"].to_pylist()
        data, offsets = group["texts/bytes"][...].tobytes(), group["texts/offsets"][...].tolist()
        assert [data[a:b].decode() for a, b in itertools.pairwise(offsets)] == texts_of(segment)


def texts_of(segment: SegmentData) -> list[str]:
    """All texts of a segment, as FORMAT.md orders them."""
    texts = []
    for table in (segment.events, segment.excluded, segment.sequences):
        for column in sorted(table.column_names):
            texts += table[column].to_pylist() if table.schema.field(column).type == pa.string() else []
    return texts


def open_segment(path: Path, name: str) -> Any:
    return next(segment for segment in open_store(path).segments if segment.name == name)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (1,), (7,), (300, 1024), (5, 70_000)])
@pytest.mark.parametrize("dtype", shard.DTYPES)
def test_an_array_has_the_metadata_that_zarr_itself_would_write(dtype, shape, tmp_path):
    encoded = shard.EncodedArray(np.zeros(shape, dtype), ["n", "width"][: len(shape)], {"a": 1})
    assert (b"".join(encoded.parts()) == b"") == (shape[0] == 0)
    ours = encoded.metadata()
    grid = ours["chunk_grid"]["configuration"]["chunk_shape"]
    blosc = BloscCodec(typesize=np.dtype(dtype).itemsize, cname="lz4", clevel=5, shuffle="bitshuffle")
    zarr.create_array(
        tmp_path / "array",
        shape=shape,
        dtype=dtype,
        chunks=tuple(ours["codecs"][0]["configuration"]["chunk_shape"]),
        shards=tuple(grid),
        compressors=[blosc, Crc32cCodec()],
        filters=None,
        fill_value=0,
        attributes=ours["attributes"],
        dimension_names=ours["dimension_names"],
    )
    theirs = json.loads((tmp_path / "array" / "zarr.json").read_bytes())
    assert ours == theirs
    rows = grid[0] // max(1, len(ours["attributes"][shard.CHECKSUMS]))
    assert rows == 1 or rows * np.prod(shape[1:], dtype=int) * np.dtype(dtype).itemsize <= shard.CHUNK_BYTES


@pytest.mark.parametrize("n", [0, 1, 700])
def test_planes_are_what_zarr_itself_would_write(n, tmp_path):
    """Metadata and every byte of the shard; so is what zarr-python alone reads back."""
    words = np.random.default_rng(0).standard_normal((n, 512), np.float32).view(np.uint16)[:, ::2].copy()
    encoded = shard.EncodedArray(words, ["row", "width"], {}, CODECS["actcache.bf16_planes"])
    parts, ours = b"".join(encoded.parts()), encoded.metadata()
    array = zarr.create_array(
        tmp_path / "array",
        shape=words.shape,
        dtype=words.dtype,
        chunks=tuple(ours["codecs"][0]["configuration"]["chunk_shape"]),
        shards=tuple(ours["chunk_grid"]["configuration"]["chunk_shape"]),
        compressors=[Bf16Planes(), Crc32cCodec()],
        filters=None,
        fill_value=0,
        attributes=ours["attributes"],
        dimension_names=ours["dimension_names"],
    )
    array[:] = words
    assert json.loads((tmp_path / "array" / "zarr.json").read_bytes()) == ours
    if n:
        (tmp_path / "array/c/0/0").write_bytes(parts)
    assert (zarr.open_array(tmp_path / "array", mode="r")[:] == words).all()


def test_chunks_that_are_all_zeros_are_read_back(tmp_path):
    """The most that each codec makes out of a byte is not taken for a bomb."""
    for codec, width in itertools.product(CODECS, (1, 512, 200_000)):
        fingerprint = make_fingerprint(dtype="bfloat16", codec=codec, width=width)
        segment = make_segment(fingerprint, [3], [(0, 2)], kinds=["0"])
        path = write_store(tmp_path / f"{codec}-{width}", fingerprint, {"s": segment})
        Twin(fingerprint, {"s": segment}).check(open_store(path), [0])
    fingerprint = make_fingerprint(dtype="bfloat16", codec="actcache.bf16_planes", width=2**21 + 1)
    with pytest.raises(InputError, match="takes at most 4194304"):
        write_store(tmp_path / "wide", fingerprint, {"s": make_segment(fingerprint, [1], [(0, 0)], kinds=["0"])})


def test_the_codec_is_the_fingerprints(tmp_path):
    """Every chunk of states is where the store says; a segment with others is not the one committed."""
    planes = make_fingerprint(dtype="bfloat16", codec="actcache.bf16_planes", width=64)
    plain = planes | {"codec": BLOSC.name}
    segment = make_segment(planes, [40], [(0, 39)])
    sizes = {}
    for fingerprint in (planes, plain):
        path = write_store(tmp_path / fingerprint["codec"], fingerprint, {"s": segment})
        Twin(fingerprint, {"s": segment}).check(open_store(path), [0])
        sizes[fingerprint["codec"]] = (path / "segments/s/states/pt/b001/c/0/0").stat().st_size
        assert verify(path) == []
        stored = open_store(path).segments[0]
        assert stored.open_array("states/pt/b001").codec.name == fingerprint["codec"]
        assert stored.open_array("token_ids").codec is BLOSC
    assert len(set(sizes.values())) == 2
    with pytest.raises(InputError, match="holds bfloat16 states, not float32"):
        StoreWriter(tmp_path / "x", make_fingerprint(codec="actcache.bf16_planes"))
    with pytest.raises(InputError, match="codec is 'zip'"):
        StoreWriter(tmp_path / "x", make_fingerprint(codec="zip"))


def test_equal_arrays_have_equal_bytes(tmp_path):
    fingerprint = make_fingerprint(width=700)
    segment = make_segment(fingerprint, [900], [(0, 3)])
    trees = [read_tree(write_store(tmp_path / name, fingerprint, {"s": segment})) for name in "ab"]
    assert trees[0] == trees[1]


# ---- what is asked -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twin() -> Twin:
    fingerprint = make_fingerprint()
    return Twin(
        fingerprint,
        {
            "s-0": make_segment(fingerprint, [5, 9, 1], [(1, 8), (0, 2), (1, 8), (2, 0)], name="s0", seed=1),
            "s-1": make_segment(fingerprint, [], [], name="s1", seed=2),
            "s-2": make_segment(fingerprint, [4, 6], [(1, 3)], name="s2", seed=3),
        },
    )


@pytest.fixture(scope="module")
def pristine(twin, tmp_path_factory) -> Path:
    with mock.patch.object(shard, "CHUNK_BYTES", 48):  # four rows: several chunks an array
        return write_store(tmp_path_factory.mktemp("pristine") / "store", twin.fingerprint, twin.segments)


@pytest.fixture
def path(pristine, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(pristine, tmp_path / "store")


def test_events_are_asked_for_in_many_ways(pristine, twin):
    store = open_store(pristine)
    for given_events, numbers in [
        (None, range(5)),
        (slice(1, None, 2), [1, 3]),
        (slice(-2, None), [3, 4]),
        (range(3), [0, 1, 2]),
        (np.array([4, 4, 0], np.uint8), [4, 4, 0]),
        (torch.tensor([2]), [2]),
        ((), []),
    ]:
        want = twin.rows(lambda s: s.states["it", 2], "prefix", numbers)
        rows, offsets = store.states("it", 2, given_events)
        assert bits(rows) == bits(torch.cat([torch.empty(0, 3), *want]))
        assert offsets.tolist() == np.cumsum([0, *map(len, want)]).tolist()


@pytest.mark.parametrize(
    ("label", "boundary", "events", "said"),
    [
        ("sft", 1, None, "checkpoint 'sft' is not in the store; it has pt, it"),
        ("pt", 3, None, "boundary 3 is not in the store; it has 1, 2"),
        ("pt", 1, [0, 5], "event 5 is not in the store; it has 5 events, counted from 0"),
        ("pt", 1, [-1], "event -1 is not in the store"),
        ("pt", 1, np.array([2**63], np.uint64), "is not in the store"),
        ("pt", 1, [True, False, True, True], "the mask of events has 4 values, expected 5: one per event"),
        ("pt", 1, [0.5], "events are float64, expected integers"),
    ],
)
def test_what_the_store_has_not_is_named(label, boundary, events, said, pristine):
    with pytest.raises(InputError, match=said):
        open_store(pristine).states(label, boundary, events)


def test_results_are_the_callers_own(pristine, twin):
    store = open_store(pristine)
    store.states("pt", 1)[0].zero_()
    store.token_ids()[0].zero_()
    store.final("pt").zero_()
    twin.check(store, range(5))


def test_summary_counts(pristine):
    summary = open_store(pristine).summary()
    assert summary["checkpoints"] == {"pt": {"weights": "a1"}, "it": {"weights": "b2"}}
    assert list(summary["checkpoints"]) == ["pt", "it"]
    assert (summary["segments"], summary["sequences"], summary["rows"]) == (3, 5, 25 * 4)
    assert summary["events"] == {"later": 3, "first_divergence": 2, "total": 5}
    assert summary["excluded_prompts"] == {"no divergence": 3, "total": 3}
    assert summary["state_bytes"]["raw"] == 25 * 4 * 3 * 4
    assert summary["stored_bytes"] == sum(
        len(data) for name, data in read_tree(pristine / "segments").items() if "/" in name
    )


def test_no_store_there(tmp_path):
    for act in (open_store, verify):
        with pytest.raises(InputError, match="is not a store"):
            act(tmp_path)


# ---- carried keys --------------------------------------------------------------------------------------------------


def test_carried_keys_become_columns_of_their_natural_type(tmp_path):
    carried = [
        {
            "category": "math",
            "level": 3,
            "ratio": 1,
            "hard": True,
            "mixed": 1,
            "tags": ["a"],
            "big": 2**70,
            "odd": "\ud800",
        },
        {"category": "code", "level": -1, "ratio": 0.5, "hard": False, "mixed": "one", "tags": {"b": None}, "big": 1},
        {"category": None, "level": 0, "ratio": float("inf"), "mixed": True, "né": "x", "huge": 2**53 + 1},
        {"huge": 0.5},
    ]
    fingerprint = make_fingerprint()
    segments = {
        "a": make_segment(fingerprint, [3], [(0, 0), (0, 1)], carried=carried[:2]),
        "b": make_segment(fingerprint, [3], [(0, 0), (0, 1)], carried=carried[2:]),
    }
    events = open_store(write_store(tmp_path / "store", fingerprint, segments)).events
    columns = {
        "category": (pa.string(), ["math", "code", None, None]),
        "level": (pa.int64(), [3, -1, 0, None]),
        "ratio": (pa.float64(), [1.0, 0.5, float("inf"), None]),
        "hard": (pa.bool_(), [True, False, None, None]),
        "mixed": (pa.string(), ["1", '"one"', "true", None]),
        "tags": (pa.string(), ['["a"]', '{"b": null}', None, None]),
        "big": (pa.string(), [str(2**70), "1", None, None]),
        "odd": (pa.string(), ['"\\ud800"', None, None, None]),
        "né": (pa.string(), [None, None, "x", None]),
        "huge": (pa.string(), [None, None, str(2**53 + 1), "0.5"]),
    }
    assert events.column_names[-len(columns) :] == list(columns)
    for name, (kind, values) in columns.items():
        assert (events.schema.field(name).type, events[name].to_pylist()) == (kind, values), name


@pytest.mark.parametrize("text", ["[]", "{", '{"position": 1}', '{"gap_pt": 1}', '{"segment": 1}', '{"\\ud800": 1}'])
def test_a_carried_key_that_cannot_be_a_column_is_refused(text):
    segment = make_segment(make_fingerprint(), [3], [(0, 0)])
    column = segment.events.column_names.index("carried")
    events = segment.events.set_column(column, "carried", pa.array([text]))
    with pytest.raises(InputError, match="carried"):
        SegmentData(
            segment.token_ids, segment.sequence_offsets, segment.states, segment.final, events, segment.excluded
        )


def test_more_keys_than_columns_stay_together_as_json(tmp_path):
    """Each segment carries what a segment may; together they carry more keys than a table gets columns."""
    fingerprint = make_fingerprint()
    carried = {name: [{f"{name}{k}": k for k in range(600)}] for name in "abc"}
    carried["b"] = carried["a"]
    segments = {name: make_segment(fingerprint, [3], [(0, 0)], carried=carried[name], name=name) for name in "abc"}
    path = write_store(tmp_path / "store", fingerprint, segments)
    store = open_store(path)
    assert [json.loads(text) for text in store.events["carried"].to_pylist()] == [carried[name][0] for name in "abc"]
    assert "a0" not in store.events.column_names
    before = store.events.drop_columns(["segment", "sequence"])
    assert compact(path) == (3, 2), "neighbours whose keys are too many for a segment are not merged"
    assert open_store(path).events.drop_columns(["segment", "sequence"]).equals(before)
    assert verify(path) == []


# ---- what is given -------------------------------------------------------------------------------------------------


def with_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    kind = table.schema.field(name).type
    return table.set_column(table.column_names.index(name), name, pa.array(values, kind))


def changed(segment: SegmentData, **fields: Any) -> SegmentData:
    return SegmentData(**({name: getattr(segment, name) for name in SegmentData.__dataclass_fields__} | fields))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {"token_ids": s.token_ids.astype(np.int64)}, "token_ids are int64"),
        (lambda s: {"sequence_offsets": np.array([0, 2], np.int64)}, "run from 0 to 3"),
        (lambda s: {"sequence_offsets": np.array([0, 3, 2, 3], np.int64)}, "never down"),
        (lambda s: {"events": s.events.drop_columns(["y_pt"])}, "needs a column 'y_pt' of type int64"),
        (lambda s: {"events": s.events.append_column("x", pa.array([1.0]))}, "column 'x' is double"),
        (lambda s: {"events": s.events.append_column("../x", pa.array(["a"]))}, "column '../x' is not made of"),
        (lambda s: {"events": s.events.append_column("x", pa.array([None], pa.string()))}, "has 1 nulls"),
        (lambda s: {"events": with_column(s.events, "sequence", [1])}, "outside 0..0"),
        (lambda s: {"events": with_column(s.events, "position", [3])}, "outside its sequence"),
        (lambda s: {"events": with_column(s.events, "position", [-1])}, "outside its sequence"),
        (lambda s: {"events": with_column(s.events, "pair", ["pt,sft"])}, "an event's pair is 'pt,sft'"),
        (lambda s: {"events": with_column(s.events, "pair", ["pt,it,pt"])}, "an event's pair is 'pt,it,pt'"),
        (lambda s: {"sequences": s.sequences.slice(0, 0)}, "0 rows for 1 sequences"),
        (
            lambda s: {"sequences": s.sequences.drop_columns(["carried"])},
            "the sequences table needs a column 'carried'",
        ),
        (lambda s: {"sites": {("mlp", "pt", 1): torch.zeros(3, 3)}}, r"rows of .*\('mlp', 'pt', 1\)"),
        (lambda s: {"sites": {("head", "pt", 1): torch.zeros(3, 3)}}, "site 'head' is none of state, attention, mlp"),
        (lambda s: {"sites": {("mlp", x, 1): torch.zeros(2, 3) for x in ("pt", "it")}}, "rows of site mlp"),
        (lambda s: {"final": {"pt": torch.zeros(2, 3), "it": torch.zeros(1, 3)}}, "final states of pt"),
        (lambda s: {"final": {"pt": torch.zeros(1, 3)}}, "final states of"),
        (lambda s: {"states": s.states | {("pt", 9): torch.zeros(3, 3)}}, "states of"),
        (lambda s: {"states": s.states | {("pt", 1): torch.zeros(3, 4)}}, "expected torch.float32"),
        (lambda s: {"states": s.states | {("pt", 1): torch.zeros(3, 3, dtype=torch.float64)}}, "torch.float64"),
    ],
)
def test_content_that_does_not_fit_is_refused(change, said, tmp_path):
    fingerprint = make_fingerprint()
    segment = make_segment(fingerprint, [3], [(0, 0)])
    writer = StoreWriter(tmp_path / "store", fingerprint)
    before = read_tree(tmp_path)
    with pytest.raises(InputError, match=said):
        writer.append("a", changed(segment, **change(segment)))
    assert read_tree(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"row_selection": "all"}, "row_selection is 'all'"),
        ({"width": 0}, "width is 0"),
        ({"width": 3.0}, "width is 3.0"),
        ({"boundaries": [1, 1]}, "boundaries"),
        ({"boundaries": ["1"]}, "boundaries"),
        ({"checkpoints": {}}, "checkpoints"),
        ({"checkpoints": {"../pt": {}}, "pair": []}, "label '../pt'"),
        ({"pair": ["pt", "sft"]}, "pair"),
    ],
)
def test_a_fingerprint_that_is_none_is_refused(change, said, tmp_path):
    with pytest.raises(InputError, match=said):
        StoreWriter(tmp_path / "store", make_fingerprint(**change))
    assert not (tmp_path / "store").exists()
    for field in ("checkpoints", "dtype", "boundaries", "row_selection", "width"):
        lacking = {name: value for name, value in make_fingerprint().items() if name != field}
        with pytest.raises(InputError, match=f"no '{field}'"):
            StoreWriter(tmp_path / "store", lacking)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"checkpoints": {"pt": {"weights": "a1"}, "it": {"weights": "c3"}}}, "checkpoints.it.weights"),
        ({"checkpoints": {"pt": {"weights": "a1"}, "it": {}}}, "checkpoints.it.weights"),
        ({"seed": False}, "seed"),
        ({"more": None}, "more"),
    ],
)
def test_a_store_of_another_run_names_the_field(change, field, path):
    before = read_tree(path)
    with pytest.raises(IncompatibleError, match=f"its {field} is") as caught:
        StoreWriter(path, make_fingerprint(**change))
    assert caught.value.field == field
    assert read_tree(path) == before


def test_segments_are_immutable_and_names_are_folder_names(path, twin):
    writer = StoreWriter(path, twin.fingerprint)
    assert writer.committed == {"s-0", "s-1", "s-2"}
    before = read_tree(path)
    with pytest.raises(InputError, match="'s-0' is committed already"):
        writer.append("s-0", twin.segments["s-1"])
    for name in ("", ".", "..", "a/b", "../a", "a.b", "é", "-a", "a\n"):
        with pytest.raises(InputError, match="segment name"):
            writer.append(name, twin.segments["s-1"])
    assert read_tree(path) == before


def test_a_store_is_made_only_where_nothing_is(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("")
    for name in ("file", "folder"):
        with pytest.raises(InputError, match="not empty and not a store"):
            StoreWriter(tmp_path / name, make_fingerprint())
    assert os.listdir(tmp_path / "folder") == ["thesis.tex"]


def test_records_without_their_root_are_not_adopted(path, twin):
    (path / "zarr.json").unlink()
    with pytest.raises(InputError, match="not a store"):
        open_store(path)
    with pytest.raises(InputError, match="not empty"):
        StoreWriter(path, twin.fingerprint)


# ---- damage --------------------------------------------------------------------------------------------------------


def flip(file: Path, at: int, mask: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= mask
    file.write_bytes(data)


def read_all(path: Path) -> Store:
    """Touch everything that a store can be asked."""
    store = open_store(path)
    assert store.events.num_rows == len(store)
    assert store.excluded.num_rows == 3
    for label in store.checkpoints:
        for boundary in store.boundaries:
            store.states(label, boundary)
        store.final(label)
    store.token_ids()
    return store


FIFTHS = 5
DATA = "segments/s-0/states/pt/b001/c/0/0"
METADATA = "segments/s-0/states/pt/b001/zarr.json"
RECORD = "commits/s-0.json"


def unread(segment: Segment) -> Segment:
    """The same one, of which nothing has been read."""
    return Segment(segment.storage, segment.events, segment.record, segment.fingerprint)


def test_damage_has_a_name_and_a_place(path):
    def error_of(act: Callable[[Path], Any]) -> str:
        with pytest.raises(CorruptStoreError) as caught:
            act(path)
        return str(caught.value)

    def restored(file: str) -> Path:
        (path / file).write_bytes(whole[file])
        return path / file

    whole = read_tree(path)
    (path / DATA).unlink()
    assert "segment s-0, array states/pt/b001: its data file is missing" in error_of(read_all)
    assert next((p.segment, p.where, p.found) for p in verify(path)) == ("s-0", DATA[13:], "no file")
    flip(restored(DATA), 3)
    assert "segment s-0, array states/pt/b001, chunk 0: crc32c" in error_of(read_all)
    assert [p.where for p in verify(path)] == ["array states/pt/b001, chunk 0"]
    restored(DATA).write_bytes(whole[DATA][:-1])
    assert "array states/pt/b001: the index of its chunks is damaged" in error_of(read_all)
    restored(DATA)
    (path / METADATA).unlink()
    assert "array states/pt/b001: its zarr.json is missing" in error_of(read_all)
    flip(restored(METADATA), 20)
    assert "array states/pt/b001: its zarr.json is not the one committed" in error_of(read_all)
    assert [p.where for p in verify(path)] == [METADATA[13:], "array states/pt/b001"]
    restored(METADATA)
    flip(path / RECORD, 40)
    assert "commit record s-0.json" in error_of(open_store)
    assert [(p.segment, p.where) for p in verify(path)] == [("s-0", RECORD)]
    restored(RECORD)
    flip(path / "zarr.json", 40)
    assert "zarr.json" in error_of(open_store)
    assert [p.where for p in verify(path)] == ["zarr.json"]
    restored("zarr.json")
    (path / "segments/s-0/token_ids/notes.txt").write_text("hello")
    assert [(p.segment, p.where, p.found) for p in verify(path)] == [("s-0", "token_ids/notes.txt", "a file")]
    read_all(path)
    (path / "segments/s-0/token_ids/notes.txt").unlink()
    (path / "commits/s-0.json").rename(path / "commits/s-9.json")
    assert "s-9.json is that of segment 's-0'" in error_of(open_store)
    (path / "commits/s-9.json").rename(path / "commits/s-0.json")
    shutil.rmtree(path / "segments/s-0")
    assert "is missing" in error_of(read_all)
    assert {p.segment for p in verify(path)} == {"s-0"}


@pytest.mark.slow
def test_no_flipped_byte_goes_unnoticed(path, twin):
    """A byte of every file, at its start, middle or end: an error, or (where nothing reads it) the right answer."""
    files = [file for file in sorted(read_tree(path)) if file == layout.ROOT or "s-0" in file]
    for turn, file in enumerate(files):
        data = (path / file).read_bytes()
        flip(path / file, [0, len(data) // 2, len(data) - 1][turn % 3], 0x20)
        with contextlib.suppress(CorruptStoreError):
            twin.check(read_all(path), range(5))
        problem = verify(path)[0]
        assert file in {problem.where, f"segments/{problem.segment}/{problem.where}"} or (
            "/c/" in file and problem.where.startswith(f"array {file.split('/c/')[0].split('/', 2)[2]}")
        )
        (path / file).write_bytes(data)
    assert verify(path) == []


@pytest.mark.slow
@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.deep) for turn in range(1, FIFTHS))])
def test_every_byte_flipped_in_turn_is_noticed(turn, tmp_path):
    """One in five, and by deep tests all. Each by the read that takes it in; the metadata of groups by verify."""
    fingerprint = make_fingerprint(checkpoints={"pt": {}}, pair=["pt"], boundaries=[1])
    path = write_store(tmp_path / "store", fingerprint, {"s": make_segment(fingerprint, [3], [(0, 2)])})
    digest = digest_of(fingerprint)
    segment = open_store(path).segments[0]
    n_flipped = 0
    for file, data in read_tree(path).items():
        inside = file.removeprefix("segments/s/")
        array = inside.removesuffix("/zarr.json").split("/c/")[0]
        look: Callable[[], Any]
        if file == "zarr.json":
            look = partial(open_store, path)
        elif file.startswith("commits/"):
            look = lambda: commit_record.decode_record((path / "commits/s.json").read_bytes(), "s", digest)  # noqa: E731
        elif array in segment.arrays:
            look = lambda array=array: unread(segment).read(array)  # noqa: E731
        elif file == "segments/zarr.json":
            continue  # says only that it is a group, to other readers
        else:
            look = lambda: raise_first(_check_files(segment))  # noqa: E731
        for at in range(turn, len(data), FIFTHS):
            flip(path / file, at, 1 << at % 8)
            with pytest.raises((CorruptStoreError, FormatVersionError)):
                look()
            n_flipped += 1
            (path / file).write_bytes(data)
    assert n_flipped > 2_200
    assert verify(path) == []


def raise_first(problems: Iterator[Problem]) -> None:
    for problem in problems:
        raise CorruptStoreError(str(problem))


@pytest.mark.parametrize("file", [DATA, METADATA, RECORD, "zarr.json"])
def test_truncation_at_every_length_is_one_named_error(file, path):
    store = open_store(path)
    read: Callable[[], Any] = {
        RECORD: lambda: commit_record.decode_record((path / RECORD).read_bytes(), "s-0", store.fingerprint.digest),
        "zarr.json": lambda: layout.decode_root((path / "zarr.json").read_bytes(), "store"),
    }.get(file, lambda: unread(store.segments[0]).read("states/pt/b001"))
    for n_bytes in reversed(range((path / file).stat().st_size)):
        os.truncate(path / file, n_bytes)
        with pytest.raises(CorruptStoreError):
            read()


@pytest.mark.slow
def test_no_swap_of_two_files_goes_unnoticed(path, twin):
    """Also of whole and valid files of one size, whose chunks are sound in themselves."""
    files = {name: data for name, data in read_tree(path).items() if "/c/" in name and "s-0" in name}
    pairs = [(a, b) for a in files for b in files if a < b and len(files[a]) == len(files[b]) and files[a] != files[b]]
    assert any("states" in a and "states" in b for a, b in pairs)
    for a, b in pairs:
        (path / a).write_bytes(files[b])
        (path / b).write_bytes(files[a])
        with pytest.raises(CorruptStoreError):
            read_all(path)
        arrays = {f"array {file.split('/', 2)[2].split('/c/')[0]}" for file in (a, b)}
        assert arrays == {problem.where.split(",")[0] for problem in verify(path)}
        (path / a).write_bytes(files[a])
        (path / b).write_bytes(files[b])
    shutil.copytree(path / "segments/s-0/states/pt", path / "swap")
    for of, to in (("segments/s-0/states/it", "segments/s-0/states/pt"), ("swap", "segments/s-0/states/it")):
        shutil.copytree(path / of, path / to, dirs_exist_ok=True)
    with pytest.raises(CorruptStoreError, match=r"array states/pt/b001: its zarr.json is not the one committed"):
        open_store(path).states("pt", 1)
    assert twin.fingerprint["row_selection"] == "prefix"


def test_swapped_commit_records_and_foreign_segments(path, tmp_path):
    records = [path / "commits/s-0.json", path / "commits/s-2.json"]
    contents = [record.read_bytes() for record in records]
    for record, content in zip(records, reversed(contents), strict=True):
        record.write_bytes(content)
    with pytest.raises(CorruptStoreError, match=r"s-0.json is that of segment 's-2'"):
        open_store(path)
    assert [problem.segment for problem in verify(path)] == ["s-0", "s-2"]
    for record, content in zip(records, contents, strict=True):
        record.write_bytes(content)
    other = make_fingerprint(seed=1)
    write_store(tmp_path / "other", other, {"z": make_segment(other, [2], [(0, 1)])})
    shutil.copytree(tmp_path / "other/segments/z", path / "segments/z")
    shutil.copy(tmp_path / "other/commits/z.json", path / "commits/z.json")
    with pytest.raises(CorruptStoreError, match=r"z.json: committed under another fingerprint"):
        open_store(path)
    assert [(problem.segment, problem.where) for problem in verify(path)] == [("z", "commits/z.json")]


def test_the_advice_of_verify_helps(path, twin):
    """Delete the commit record and append again."""
    flip(path / DATA, 0)
    assert all("verify --repair" in str(problem) for problem in verify(path))
    (path / RECORD).unlink()
    assert open_store(path).uncommitted == ["segments/s-0"]
    StoreWriter(path, twin.fingerprint).append("s-0", twin.segments["s-0"])
    assert verify(path) == []
    twin.check(open_store(path), range(5))


def test_a_newer_format_is_said_to_be_newer(path):
    newer = layout.FORMAT_VERSION + 1
    record = json.loads((path / RECORD).read_bytes())
    root = json.loads((path / "zarr.json").read_bytes())
    root["attributes"]["actcache"]["format_version"] = newer
    for file, content in ((RECORD, record | {"format_version": newer}), ("zarr.json", root)):
        (path / file).write_text(json.dumps(content))
        for act in (open_store, verify):
            with pytest.raises(FormatVersionError, match=f"format version {newer}; this version of actcache reads"):
                act(path)
    with pytest.raises(FormatVersionError):
        StoreWriter(path, make_fingerprint())


# ---- attacks: records and metadata that are whole, and lie ---------------------------------------------------------


def forge(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a commit record and give it a checksum that fits."""
    record = json.loads((path / RECORD).read_bytes())
    del record["crc32c"]
    change(record)
    with contextlib.suppress(TypeError, ValueError, AttributeError):  # where the forgery is of the files themselves
        sizes = {file: size for file, (size, _) in record["files"].items()}
        record["stored_bytes"] = sum(sizes.values())
        record["stored_state_bytes"] = sum(sizes[file] for file in sizes if file.startswith("states/"))
    (path / RECORD).write_bytes(commit_record.encode_record(record))


def forge_array(path: Path, array: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change an array's metadata, and the commit record so that it vouches for it."""
    file = f"{array}/zarr.json"
    metadata = json.loads((path / "segments/s-0" / file).read_bytes())
    change(metadata)
    data = layout.encode_json(metadata)
    (path / "segments/s-0" / file).write_bytes(data)
    forge(path, lambda record: record["files"].update({file: [len(data), shard.crc32c(data)]}))


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["files"].update({"../../../secret": [1, 2]}),
        lambda r: r["files"].update({"/etc/hostname": [1, 2]}),
        lambda r: r["files"].update({"states/../../s-2/zarr.json": [1, 2]}),
        lambda r: r["files"].update({"c/0": [-1, 2]}),
        lambda r: r["files"].update({"c/0": None}),
        lambda r: r.update(files=[]),
        lambda r: r.update(segment="../s-0"),
        lambda r: r.update(n_events=-1),
        lambda r: r.update(n_events="4"),
        lambda r: r.update(n_tokens=1.0),
        lambda r: r.pop("n_sequences"),
        lambda r: r.pop("schema"),
        lambda r: r["schema"]["events"].pop("position"),
        lambda r: r["schema"]["events"].update({"../../x": "int64"}),
        lambda r: r["schema"]["events"].update({"x": "object"}),
        lambda r: r["schema"]["events"].update({"position": "string"}),
    ],
)
def test_a_record_that_lies_in_its_form_is_refused(change, path):
    forge(path, change)
    with pytest.raises(CorruptStoreError, match=r"commit record s-0.json"):
        open_store(path)
    assert [problem.where for problem in verify(path)] == [RECORD]


@pytest.mark.parametrize("n", [0, 3, 5, 2**40, 2**47])
@pytest.mark.parametrize("field", ["n_events", "n_tokens", "n_sequences", "n_excluded"])
def test_a_record_that_lies_about_a_count_is_noticed(field, n, path):
    forge(path, lambda record: record.update({field: n}) if record[field] != n else record.update({field: n + 1}))
    with pytest.raises(
        CorruptStoreError, match=r"segment s-0, (array .* committed as|sequence_offsets: offsets must run)"
    ):
        read_all(path)
    assert {problem.segment for problem in verify(path)} == {"s-0"}


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(shape=[2**60, 3]),
        lambda m: m.update(shape=[15, 2**60]),
        lambda m: m.update(shape=[-15, 3]),
        lambda m: m.update(shape=[15.0, 3]),
        lambda m: m.update(shape=[15]),
        lambda m: m.update(shape=[]),
        lambda m: m.update(shape="15"),
        lambda m: m.update(data_type="uint32"),
        lambda m: m.update(data_type="object"),
        lambda m: m.update(fill_value=1.0),
        lambda m: m.update(codecs=[]),
        lambda m: m["codecs"][0]["configuration"].update(chunk_shape=[0, 3]),
        lambda m: m["codecs"][0]["configuration"].update(chunk_shape=[2**60, 3]),
        lambda m: m["attributes"].pop(shard.CHECKSUMS),
        lambda m: m["attributes"].update({shard.CHECKSUMS: []}),
        lambda m: m["attributes"].update({shard.CHECKSUMS: ["x"] * 4}),
    ],
)
def test_metadata_that_lies_is_noticed_before_anything_is_allocated(change, path):
    forge_array(path, "states/pt/b001", change)
    with pytest.raises(CorruptStoreError, match=r"segment s-0, array states/pt/b001"):
        open_store(path).states("pt", 1)
    assert any("states/pt/b001" in problem.where for problem in verify(path))


@pytest.mark.parametrize(
    ("array", "values"),
    [
        ("events/position", [8, 2, 8, 2**62]),
        ("events/position", [8, -3, 8, 0]),
        ("events/sequence", [1, 0, 1, 2**62]),
        ("events/sequence", [1, -1, 1, 2]),
        ("sequence_offsets", [0, 5, 2**62, 15]),
        ("sequence_offsets", [0, 14, 5, 15]),
        ("texts/offsets", [0, 2**62, *[9] * 28]),
    ],
)
def test_indices_that_lie_are_noticed(array, values, path):
    encoded = shard.EncodedArray(np.array(values, np.int64), layout.dimension_names(array), {})
    parts = [*encoded.parts()]
    metadata = encoded.metadata()
    file = path / "segments/s-0" / array / "c/0"
    file.write_bytes(b"".join(parts))
    forge_array(path, array, lambda m: m.update(metadata))
    name = f"{array}/c/0"
    forge(path, lambda record: record["files"].update({name: [file.stat().st_size, None]}))
    with pytest.raises(CorruptStoreError, match=f"segment s-0, {array.split('/')[0]}"):
        read_all(path).states("pt", 1)
    assert [problem.where for problem in verify(path)] == ["content"]


@pytest.mark.slow
def test_every_error_is_the_librarys_own(path):
    """Random bytes in place of any file."""
    rng = np.random.default_rng(0)
    for turn, file in enumerate([RECORD, layout.ROOT] * 6 + sorted(read_tree(path / "segments/s-0"))):
        file = file if turn < 12 else f"segments/s-0/{file}"
        data = (path / file).read_bytes()
        (path / file).write_bytes([b"", b"{}", b"[]", b"null", b"\xff\xfe", rng.bytes(len(data))][turn // 2 % 6])
        for act in (read_all, verify):
            with contextlib.suppress(ActcacheError):
                act(path)
        (path / file).write_bytes(data)
