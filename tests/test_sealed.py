"""Sealed files: no bit of a file changes unnoticed, and other programs read it as ever."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from actcache.analyses.stability import read_stability
from actcache.cli import main
from actcache.errors import ActcacheError, CorruptFileError, InputError
from actcache.sealed import NoSealError, html_bytes, json_bytes, parquet_bytes, read_json, read_parquet, seal_of
from actcache.study.cells import gather_cells
from actcache.study.run import read_run_cells
from actcache.study.run_folder import RunFolder

N_FLIPS = 200  # of the bits of one file

# What reads each file of a run.
READERS = {
    "run.json": lambda run, store: run.record(),
    "plan.json": lambda run, store: run.read_plan().content,
    "timings.json": lambda run, store: run.timings(),
    "effects.json": lambda run, store: read_json(run.effects, "effects", "make them again").content,
    "stability.parquet": lambda run, store: read_stability(store, run.stability),
    "cells.parquet": lambda run, store: read_run_cells(run, store).content,
    "cells/*.parquet": lambda run, store: gather_cells(run.cell_groups, store, strict=False, max_tokens=None),
}


@pytest.fixture(scope="module")
def made(tiny_run, tmp_path_factory):
    """A finished run that was planned, and its store."""
    run = tiny_run("llama", torch.float32, "--stability", "4")
    out = shutil.copytree(run.out, tmp_path_factory.mktemp("sealed") / "run")
    planned = tmp_path_factory.mktemp("planned") / "run"
    words = ["--pt", run.pt, "--it", run.it, "--prompts", run.prompts, "--rate", "1e9", "--out", planned]
    assert main(["plan", *map(str, words)]) == 0
    shutil.copy(planned / "plan.json", out)
    return out, run.store


def same(a, b):
    return a.equals(b) if isinstance(a, pa.Table) else a == b


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_flipped_bit_is_a_named_error_or_changes_no_number(made, tmp_path, name):
    out, store = made
    out = shutil.copytree(out, tmp_path / "run", ignore=shutil.ignore_patterns("store"))
    (path,) = sorted(out.glob(name))[:1]
    run, data, rng = RunFolder(out), path.read_bytes(), random.Random(0)
    want = READERS[name](run, store)
    n_noticed = 0
    tail = range(max(0, len(data) - 24), len(data))  # where a Parquet file says how long its metadata is
    for at in [*(rng.randrange(len(data)) for _ in range(N_FLIPS)), *tail]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            assert same(READERS[name](run, store), want), f"byte {at} of {name}"
        except ActcacheError as error:
            n_noticed += str(path) in str(error)  # it names the file
    assert n_noticed > 0.9 * N_FLIPS
    for length in range(0, len(data), max(1, len(data) // 40)):
        path.write_bytes(data[:length])
        with pytest.raises(ActcacheError, match=path.name):
            READERS[name](run, store)
    path.write_bytes(data)
    assert same(READERS[name](run, store), want)


def test_other_programs_read_the_files(made):
    out, _ = made
    for path in sorted(out.glob("*.parquet")):
        table = pq.read_table(path)
        assert table.num_rows
        assert table.replace_schema_metadata(None).equals(read_parquet(path, "", "").content)
    for path in sorted(out.glob("*.json")):
        content = json.loads(path.read_text())
        assert list(content)[-2:] == ["made_from", "seal"]
    page = (out / "report.html").read_text()
    assert page.rstrip().endswith("-->")
    assert page.count("<!--") == page.count("-->") == 1


LOOKALIKE = f"actcache-seal:{'0' * 64}"


def test_texts_that_look_like_a_seal_are_texts(tmp_path):
    table = pa.table({"text": [LOOKALIKE, "actcache-seal:", f"actcache-seal:{'f' * 64}"]})
    (tmp_path / "t.parquet").write_bytes(parquet_bytes(table, {LOOKALIKE: LOOKALIKE}))
    (tmp_path / "o.json").write_bytes(json_bytes({"a": LOOKALIKE}, {LOOKALIKE: LOOKALIKE}))
    content, made_from, seal = read_parquet(tmp_path / "t.parquet", "", "")
    assert content.equals(table)
    assert made_from == {LOOKALIKE: LOOKALIKE}
    assert seal == seal_of((tmp_path / "t.parquet").read_bytes()) != "0" * 64
    assert read_json(tmp_path / "o.json", "", "").content == {"a": LOOKALIKE}
    page = html_bytes(f"<p>{LOOKALIKE}</p>", {"a": "--> <script>"}).decode()
    assert page.count("-->") == 1
    assert seal_of(page.encode()) != "0" * 64


@pytest.mark.parametrize("change", ["filtered", "renamed", "by pandas", "with another column"])
def test_what_others_make_of_a_table_of_ours_is_theirs(made, tmp_path, capsys, change):
    """Arrow hands the metadata of a schema on, with a seal that was never filled in."""
    out, _ = made
    table, path = pq.read_table(out / "cells.parquet"), tmp_path / "mine.parquet"
    changed = {
        "filtered": lambda: table.filter(pc.equal(table["readout"], "native")),
        "renamed": lambda: table.rename_columns([{"kl": "nats"}.get(name, name) for name in table.column_names]),
        "by pandas": lambda: pa.Table.from_pandas(table.to_pandas()).replace_schema_metadata(table.schema.metadata),
        "with another column": lambda: table.append_column("mine", pa.array(range(table.num_rows))),
    }[change]()
    pq.write_table(changed, path)
    with pytest.raises(NoSealError, match="or another program"):
        read_parquet(path, "", "")
    assert main(["effects", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {group["readout"] for group in found["groups"]} == set(changed["readout"].to_pylist())


def test_one_content_is_one_file():
    table = pa.table({"x": [1.5, None]})
    assert parquet_bytes(table, {"a": 1}) == parquet_bytes(table.replace_schema_metadata({"b": "c"}), {"a": 1})
    assert seal_of(parquet_bytes(table, {"a": 1})) != seal_of(parquet_bytes(table, {"a": 2}))
    assert seal_of(json_bytes({}, {"a": 1})) != seal_of(json_bytes({}, {"a": 2}))


def test_what_is_wrong_is_said(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(NoSealError, match=r"x.json is not a plan of this version: it has no seal .*; plan again"):
        read_json(path, "a plan", "plan again")
    assert issubclass(NoSealError, InputError)
    assert read_json(path, "a plan", "", without_seal=True) == ({}, {}, "")
    path.write_text("{")
    with pytest.raises(InputError, match=r"x.json is not a plan: "):
        read_json(path, "a plan", "", without_seal=True)
    path.write_bytes(json_bytes({"a": 1}, {}).replace(b'"a": 1', b'"a": 2'))
    with pytest.raises(CorruptFileError, match=r"x.json is damaged: the SHA-256 .*; plan again"):
        read_json(path, "a plan", "plan again")
    with pytest.raises(CorruptFileError, match="is damaged"):
        read_json(path, "a plan", "plan again", without_seal=True)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_table_is_read_by_no_thread_that_may_outlive_the_interpreter(tmp_path):
    """One of Arrow's that lets go of Python's bytes as the process ends aborts it."""
    path = tmp_path / "cells.parquet"
    path.write_bytes(parquet_bytes(pa.table({f"c{i}": list(range(1000)) for i in range(8)}), {}))
    code = (
        "import os, sys, pyarrow.parquet\nfrom actcache.sealed import read_parquet\n"
        "def count(): return len(os.listdir('/proc/self/task'))\n"
        "before = count(); read_parquet(sys.argv[1], 'cells', ''); print(count() - before)"
    )
    ran = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert ran.stdout == "0\n"
