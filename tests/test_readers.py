"""Readers that know nothing of actcache open the default store and see the bits that were captured."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tensorstore
import torch
import xarray
import zarr
from stores import INT_OF, make_fingerprint, make_segment, write_store
from zarrs import ZarrsCodecPipeline

from actcache.store import SegmentData, layout, shard


@pytest.fixture(
    scope="module",
    params=[("float32", "prefix"), ("bfloat16", "prefix"), ("bfloat16", "divergence"), ("float16", "divergence")],
    ids="-".join,
)
def stored(request, tmp_path_factory) -> tuple[Path, dict[str, Any], dict[str, SegmentData]]:
    """A store of several segments: ragged sequences, an empty one among them, several chunks; nothing at all."""
    dtype, selection = request.param
    fingerprint = make_fingerprint(dtype=dtype, row_selection=selection, width=7)
    segments = {
        "s-0": make_segment(
            fingerprint, [5, 0, 90, 1], [(2, 88), (0, 2), (2, 88), (3, 0)], name="a", sites=[("mlp", 4)], seed=1
        ),
        "s-1": make_segment(fingerprint, [], [], n_excluded=0, seed=2),
        "s-2": make_segment(fingerprint, [4, 6], [], kinds=["0", "-0"], n_excluded=3, seed=3),
    }
    with mock.patch.object(shard, "CHUNK_BYTES", 200):
        path = write_store(tmp_path_factory.mktemp("stored") / "store", fingerprint, segments)
    return path, fingerprint, segments


def captured(segment: SegmentData) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Shape and bytes of every array that FORMAT.md says a segment has, by its path."""
    arrays: dict[str, np.ndarray] = {"token_ids": segment.token_ids, "sequence_offsets": segment.sequence_offsets}
    folders = {"state": "states", "attention": "attention", "mlp": "mlp"}
    rows = {f"{folders[site]}/{label}/b{b:03d}": values for (site, label, b), values in segment.rows.items()}
    rows |= {f"final/{label}": states for label, states in segment.final.items()}
    arrays |= {path: states.view(INT_OF[states.dtype]).numpy() for path, states in rows.items()}
    texts: list[bytes] = []
    for name, table in (("events", segment.events), ("excluded", segment.excluded), ("sequences", segment.sequences)):
        for column in sorted(table.column_names):
            if table.schema.field(column).type == "string":
                texts += [text.encode() for text in table[column].to_pylist()]
            else:
                arrays[f"{name}/{column}"] = table[column].to_numpy()
    arrays["texts/bytes"] = np.frombuffer(b"".join(texts), np.uint8)
    arrays["texts/offsets"] = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return {path: (array.shape, array.tobytes()) for path, array in arrays.items()}


def check_all(stored: Any, read: Callable[[Path], np.ndarray]) -> int:
    """Every array of every segment, read by ``read``, has the bits captured; how many had any."""
    path, fingerprint, segments = stored
    n_read = 0
    for name, segment in segments.items():
        want = captured(segment)
        folder = path / "segments" / name
        on_disk = {file.parent for file in folder.rglob("zarr.json") if b'"node_type":"array"' in file.read_bytes()}
        assert {array.relative_to(folder).as_posix() for array in on_disk} == set(want)
        for array, (shape, data) in want.items():
            found = read(folder / array)
            assert (found.shape, found.tobytes()) == (shape, data), array
            if array.startswith(("states", "final", "mlp")):
                assert found.dtype == layout.stored_dtype(fingerprint["dtype"])
            n_read += found.size > 0
    return n_read


def test_zarr_python(stored):
    assert check_all(stored, lambda array: np.asarray(zarr.open_array(array, mode="r")[...])) > 20


def test_tensorstore(stored):
    def read(array: Path) -> np.ndarray:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(array)}}
        return tensorstore.open(spec, read=True).result().read().result()

    assert check_all(stored, read) > 20


def test_zarrs(stored):
    pipelines = []

    def read(array: Path) -> np.ndarray:
        opened = zarr.open_array(array, mode="r")
        pipelines.append(opened.async_array.codec_pipeline)
        return np.asarray(opened[...])

    # Strict: where zarrs itself cannot read an array it says so and zarr-python does not step in.
    with (
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}),
        mock.patch.object(ZarrsCodecPipeline, "read", autospec=True, side_effect=ZarrsCodecPipeline.read) as reads,
    ):
        n_read = check_all(stored, read)
    assert all(isinstance(pipeline, ZarrsCodecPipeline) and pipeline.impl is not None for pipeline in pipelines)
    assert reads.call_count >= n_read > 20


def test_the_attributes_say_what_uint16_words_are(stored):
    path, fingerprint, segments = stored
    array = zarr.open_group(path, mode="r")["segments/s-0/states/pt/b001"]
    assert array.attrs["dtype"] == fingerprint["dtype"]
    words = torch.from_numpy(array[...])
    rows = words.view(torch.bfloat16) if array.attrs["dtype"] == "bfloat16" else words
    want = segments["s-0"].states["pt", 1]
    assert rows.dtype == want.dtype
    assert torch.equal(rows.view(INT_OF[rows.dtype]), want.view(INT_OF[want.dtype]))


# ---- xarray --------------------------------------------------------------------------------------------------------


def open_dataset(path: Path, group: str) -> xarray.Dataset:
    return xarray.open_dataset(path, group=group, engine="zarr", zarr_format=3, consolidated=False)


@pytest.mark.filterwarnings("error")
def test_xarray_opens_events_and_states_lazily(stored):
    path, fingerprint, segments = stored
    for name, segment in segments.items():
        folder = path / "segments" / name
        shards = [file for file in folder.rglob("*") if "c" in file.relative_to(folder).parts and file.is_file()]
        assert shards or name == "s-1"
        for file in shards:
            file.rename(file.with_suffix(".away"))
        states = {label: open_dataset(path, f"segments/{name}/states/{label}") for label in fingerprint["checkpoints"]}
        final = open_dataset(path, f"segments/{name}/final")
        events = open_dataset(path, f"segments/{name}/events")
        for file in shards:  # nothing was read so far: there was nothing to read
            file.with_suffix(".away").rename(file)

        n_rows = len(segment.states["pt", 1])
        for (label, b), rows in segment.states.items():
            dataset = states[label]
            assert dict(dataset.sizes) == {"row": n_rows, "width": 7}
            array = dataset[f"b{b:03d}"]
            words = rows.view(INT_OF[rows.dtype]).numpy()
            assert array[2:5].values.tobytes() == words[2:5].tobytes()
            assert array.values.tobytes() == words.tobytes()
            assert array.attrs["dtype"] == fingerprint["dtype"]
        assert dict(final.sizes) == {"event": segment.events.num_rows, "width": 7}
        for label, rows in segment.final.items():
            assert final[label].values.tobytes() == rows.view(INT_OF[rows.dtype]).numpy().tobytes()
        assert dict(events.sizes) == {"event": segment.events.num_rows}
        numeric = {field.name for field in segment.events.schema if field.type != "string"}
        assert set(events.data_vars) == numeric > {"sequence", "position", "y_pt", "y_it"}
        for column in numeric:
            want = segment.events[column].to_numpy()
            assert (events[column].dtype, events[column].values.tobytes()) == (want.dtype, want.tobytes())
        text = open_dataset(path, f"segments/{name}/texts")
        data, offsets = text["bytes"].values.tobytes(), text["offsets"].values.tolist()
        texts = [data[a:b].decode() for a, b in itertools.pairwise(offsets)]
        columns = sorted(field.name for field in segment.events.schema if field.type == "string")
        first = columns.index("prompt_id") * segment.events.num_rows
        assert texts[first : first + segment.events.num_rows] == segment.events["prompt_id"].to_pylist()


@pytest.mark.filterwarnings("error")
def test_xarray_opens_a_segment_as_one_tree(stored):
    path, fingerprint, segments = stored
    for name, segment in segments.items():
        tree = xarray.open_datatree(path, group=f"segments/{name}", engine="zarr", zarr_format=3, consolidated=False)
        assert tree["token_ids"].values.tolist() == segment.token_ids.tolist()
        assert set(tree["states"].children) == set(fingerprint["checkpoints"])
        assert set(tree["states/pt"].data_vars) == {"b001", "b002"}
        assert tree["events"].sizes["event"] == segment.events.num_rows
        n_texts = 5 * segment.events.num_rows + 3 * segment.excluded.num_rows + 2 * segment.n_sequences
        assert tree["texts"].sizes["text_offset"] == n_texts + 1


@pytest.mark.filterwarnings("error")
def test_xarray_takes_labels_that_are_names_of_dimensions(tmp_path):
    fingerprint = make_fingerprint(checkpoints={"event": {}, "width": {}}, pair=["event", "width"])
    segment = make_segment(fingerprint, [4], [(0, 3), (0, 1)])
    path = write_store(tmp_path / "store", fingerprint, {"a": segment})
    final = open_dataset(path, "segments/a/final")
    for label, rows in segment.final.items():
        assert final[label].values.tobytes() == rows.numpy().tobytes()
