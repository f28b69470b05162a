"""Stores that earlier versions wrote are read by this one, and FORMAT.md's worked example is a real store."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numcodecs.blosc
import numpy as np
import pytest
import zarr
from stores import bits, read_tree

from actcache.store import layout, open_store, verify

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(folder.name for folder in GOLDEN.glob("v*"))
STORES = [
    pytest.param(folder, name, id=f"{folder.name}-{name}")
    for folder in (GOLDEN / version for version in VERSIONS)
    for name in sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden = script("write_golden_stores")
format_example = script("format_example")


def said_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "expected.json").read_text())


def test_every_version_has_its_stores():
    assert f"v{layout.FORMAT_VERSION}" in VERSIONS, "run scripts/write_golden_stores.py and keep what it writes"
    for version in VERSIONS:
        said = said_of(GOLDEN / version)
        assert said["format_version"] == int(version[1:])
        assert set(said["stores"]) == {entry.name for entry in (GOLDEN / version).iterdir() if entry.is_dir()}
    names = {"float32-prefix", "bfloat16-prefix", "float32-divergence"}
    assert names <= set(said_of(GOLDEN / "v1")["stores"])
    assert names | {"float32-grown"} <= set(said_of(GOLDEN / "v2")["stores"])


@pytest.mark.parametrize(("folder", "name"), STORES)
def test_todays_code_reads_it(folder, name):
    before = read_tree(folder / name)
    want = said_of(folder)["stores"][name]
    store = open_store(folder / name)
    assert verify(folder / name) == []
    for answer, described in want["answers"].items():
        what, *given = answer.split()
        if what == "states":
            rows, offsets = store.states(given[0], int(given[1]))
        elif what == "rows":
            rows, offsets = store.states(given[1], int(given[2]), site=given[0])
        elif what == "final":
            rows, offsets = store.final(given[0]), None
        else:
            rows, offsets = store.token_ids()
        assert golden.described(golden.bits(rows)) == described, answer
        if what == "token" or (what in ("states", "rows") and store.fingerprint.has_prefix_rows):
            assert np.diff(offsets).tolist() == [row["position"] + 1 for row in want["events"]]
    assert {answer.split()[0] for answer in want["answers"]} & {"states", "rows"}
    tables = ("events", "excluded", "sequences") if "sequences" in want else ("events", "excluded")
    for table, rows in ((getattr(store, table), want[table]) for table in tables):
        found = [{key: value for key, value in row.items() if key != "segment"} for row in table.to_pylist()]
        if folder.name == "v1" and rows and "event_id" in rows[0]:  # the reader adds what version 1 left out
            assert {row.pop("pair") for row in found} == {"pt,it"}
        assert found == [
            {key: value for key, value in (row | carried(row)).items() if key != "carried"} for row in rows
        ]
    for i, row in enumerate(want["events"]):  # one by one, as a sparse read does
        rows, _ = store.states("pt", store.boundaries[0], [i])
        whole, offsets = store.states("pt", store.boundaries[0])
        assert bits(rows) == bits(whole[offsets[i] : offsets[i + 1]]), row["event_id"]
    assert read_tree(folder / name) == before


def carried(row: dict[str, Any]) -> dict[str, Any]:
    return json.loads(row["carried"])


def arrays_of(path: Path) -> dict[str, Any]:
    """Every array as plain zarr-python sees it."""
    members = zarr.open_group(path / "segments", mode="r").members(max_depth=None)
    arrays = {f"segments/{name}": node for name, node in members if isinstance(node, zarr.Array)}
    return {name: golden.described(np.asarray(array[...])) for name, array in arrays.items()}


@pytest.mark.parametrize(("folder", "name"), STORES)
def test_plain_zarr_reads_it(folder, name):
    assert arrays_of(folder / name) == said_of(folder)["stores"][name]["arrays"]


@pytest.mark.parametrize("name", golden.contents())
def test_todays_writer_writes_the_same_bytes(name, tmp_path):
    """Where Blosc is another version than it was, its chunks may be others: then the same values, by name."""
    folder = GOLDEN / f"v{layout.FORMAT_VERSION}"
    golden.write(tmp_path / "store", *golden.contents()[name])
    found, want = read_tree(tmp_path / "store"), read_tree(folder / name)
    if said_of(folder)["written_by"]["blosc"] == numcodecs.blosc.VERSION_STRING:
        assert found == want
    else:
        assert found.keys() == want.keys()
        assert found["zarr.json"] == want["zarr.json"]
        assert arrays_of(tmp_path / "store") == said_of(folder)["stores"][name]["arrays"]


@pytest.mark.parametrize("name", golden.contents())
def test_the_script_expects_what_it_put_in(name):
    """That ``expected.json`` is of the content that the script writes today."""
    said = said_of(GOLDEN / f"v{layout.FORMAT_VERSION}")["stores"][name]
    assert json.loads(json.dumps(golden.expected(*golden.contents()[name]))) == said


def test_the_script_never_writes_over_a_golden_store(tmp_path, capsys):
    (tmp_path / f"v{golden.FORMAT_VERSION}").mkdir()
    assert golden.main(["--out", str(tmp_path)]) == 2
    assert "never written again" in capsys.readouterr().err
    assert read_tree(tmp_path) == {}
    assert golden.FORMAT_VERSION == layout.FORMAT_VERSION, "a new version has new stores, beside the old ones"


def test_golden_stores_are_small():
    for folder, name in (param.values for param in STORES):
        assert sum(map(len, read_tree(folder / name).values())) < 60_000


# ---- FORMAT.md -----------------------------------------------------------------------------------------------------


def test_the_worked_example_of_the_format_is_a_real_store():
    page = format_example.FORMAT.read_text(encoding="utf-8")
    if said_of(GOLDEN / "v1")["written_by"]["blosc"] == numcodecs.blosc.VERSION_STRING:
        assert format_example.replaced(page) == page, "run scripts/format_example.py --write"
    assert format_example.START in page
    assert max(map(len, format_example.example().splitlines())) <= 120
