"""What prompts carry: columns of events and cells, and documents that thousands of cells repeat."""

from __future__ import annotations

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stores import make_fingerprint, make_segment, write_store

from actcache.carried import as_columns, encode, values_of
from actcache.sealed import parquet_bytes
from actcache.store import open_store
from actcache.study.cells import cell_table, gather_cells
from actcache.study.results import write_result

N_VARIANTS = 800
DOCUMENTS = [f"{i} " + "lorem ipsum dolor sit amet " * 12_000 for i in range(3)]


def cells_of(folder, carried):
    """A store of one segment whose prompts carry this, and the cells of as many variants."""
    fingerprint = make_fingerprint()
    places = [(0, i) for i in range(len(carried))]
    segment = make_segment(fingerprint, [len(carried)], places, carried=carried)
    store = open_store(write_store(folder / "store", fingerprint, {"s": segment}))
    variants = [f"v{i}" for i in range(N_VARIANTS)]
    key = {
        "store": store.fingerprint.digest,
        "segment": "s",
        "boundary": 1,
        "late": "it",
        "scopes": ["prefix"],
    }
    key |= {"strict": False, "max_tokens": None, "readouts": ["native"], "variants": dict.fromkeys(variants, "x")}
    key |= {"top1": False, "kl": False, "whole": [], "mode": "packed"}
    fields = {"boundary": 1, "scope": "prefix", "late": "it", "readout": "native", "top1_id": None, "noop_delta": None}
    columns = [
        fields | {"variant": variant, "upstream": upstream, "margin": torch.arange(len(carried)) / 7}
        for upstream in ("pt", "it")
        for variant in variants
    ]
    (folder / "groups").mkdir()
    write_result(folder / "groups", key, cell_table(store.events, columns, with_kl=False), {})
    return store, gather_cells(folder / "groups", store, strict=False, max_tokens=None)


@pytest.mark.slow
def test_a_document_stands_once_however_many_cells_repeat_it(tmp_path):
    """As plain text these cells have 1.5 GB of it, and 2 GiB are too many for a column."""
    store, cells = cells_of(tmp_path, [{"document": text, "n": i} for i, text in enumerate(DOCUMENTS)])
    assert cells.num_rows == 3 * 2 * N_VARIANTS
    assert cells.nbytes < 10 * len(DOCUMENTS[0])
    assert sum(path.stat().st_size for path in (tmp_path / "groups").iterdir()) < len(DOCUMENTS[0])
    path = tmp_path / "cells.parquet"
    path.write_bytes(parquet_bytes(cells, {}))
    assert path.stat().st_size < 3 * len(DOCUMENTS[0])
    expected = dict(zip(store.events["event_id"].to_pylist(), zip(DOCUMENTS, range(3), strict=True), strict=True))
    read = pq.read_table(path)
    assert read.nbytes < 10 * len(DOCUMENTS[0])
    for row in read.take(pa.array([0, 1, 2000, 4799])).to_pylist():
        assert (row["document"], row["n"]) == expected[row["event_id"]]
    frame = pd.read_parquet(path)
    for event, part in frame.groupby("event_id"):
        assert [set(part["document"]), set(part["n"])] == [{expected[event][0]}, {expected[event][1]}]


@pytest.mark.parametrize(
    "carried",
    [
        [{"category": "a", "x": 1, "ok": True}, {"category": "b", "x": 0.5}, {"category": None}],
        [{"mixed": 1}, {"mixed": "one"}, {"tags": ["a"]}],
        [{f"k{i}": i} for i in range(3)],
        [{}, {}, {}],
    ],
    ids=["natural types", "as JSON", "nulls", "nothing"],
)
def test_cells_have_the_columns_of_their_events(tmp_path, carried):
    store, cells = cells_of(tmp_path, carried)
    columns = list(as_columns([encode(one) for one in carried]))
    assert cells.column_names[17:] == store.events.column_names[len(store.events.column_names) - len(columns) :]
    read = pq.read_table(pa.BufferReader(parquet_bytes(cells, {})))
    of_event = {row["event_id"]: [row[name] for name in columns] for row in store.events.to_pylist()}
    for row in read.to_pylist():
        assert [row[name] for name in columns] == of_event[row["event_id"]]


@pytest.mark.parametrize(
    "values",
    [[7, "seven", None, 1.5], ["7", "seven", None], ['"quoted"', "not"], [True, "x", [1, "y"]], [1, 2.5], [None]],
)
def test_values_of_mixed_types_are_what_was_carried(values):
    column = as_columns([encode({"key": value}) for value in values])["key"]
    assert values_of(pa.chunked_array([column])) == values
