"""A run from Python: the same as by the command line, and its tables flat."""

from __future__ import annotations

import json

import pyarrow.compute as pc
import pytest
import torch

import actcache
from actcache.errors import IncompatibleError, InputError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tiny_run):
    return tiny_run("llama", torch.float32, "--boundary", "2,3", "--stability", "0")


@pytest.fixture(scope="module")
def run(made):
    return actcache.Run(made.out)


def test_the_same_call_makes_the_same_run(made, tmp_path, capfd):
    found = actcache.run(
        pt=made.pt,
        it=made.it,
        prompts=made.prompts,
        out=tmp_path / "run",
        boundary=[2, 3],
        stability=0,
        dtype="float32",
        max_new=json.loads((made.out / "store" / "zarr.json").read_text())["attributes"]["actcache"]["fingerprint"][
            "max_new"
        ],
        quiet=True,
    )
    assert found.cells.drop_columns(["noop_delta", "margin"]).equals(
        actcache.Run(made.out).cells.drop_columns(["noop_delta", "margin"])
    )
    assert found.effects.column_names == actcache.Run(made.out).effects.column_names
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.strip() == ""
    assert "actcache run --prompts=" in (tmp_path / "run" / "run.json").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"boundry": 3}, "did you mean --boundary"),
        ({"dtype": "float8"}, "float8"),
        ({}, "--pt"),
    ],
)
def test_options_that_are_none_are_named(made, tmp_path, options, said):
    places = {"pt": made.pt, "it": made.it} if options else {}
    with pytest.raises(InputError, match=said):
        actcache.run(prompts=made.prompts, out=tmp_path / "run", **places, **options)
    assert not (tmp_path / "run").exists()


def test_cells_have_the_texts_and_gaps_of_their_events(run):
    cells, events = run.cells, {row["event_id"]: row for row in run.store.events.to_pylist()}
    assert cells.num_rows == len(run.store) * 2 * 4 * 3
    for row in cells.to_pylist()[::7]:
        for name in ("token_pt", "token_it", "gap_pt", "gap_it"):
            assert row[name] == events[row["event_id"]][name]


def test_effects_are_one_row_per_group(run, made):
    groups = made.effects["groups"]
    table = run.effects
    assert table.num_rows == len(groups)
    for row, group in zip(table.to_pylist(), groups, strict=True):
        assert (row["boundary"], row["readout"]) == (group["boundary"], group["readout"])
        low, high = row["interaction_low"], row["interaction_high"]
        assert {"mean": row["interaction"], "low": low, "high": high} == group["interaction"]
        assert row["y_it_pt"] == group["cells"]["it_pt"]["mean"]
    assert pc.min(table["n_events"]).as_py() == len(run.store)


def test_a_late_stack_of_the_run(run):
    late = run.load_late("it", 3)
    assert (late.boundary, late.dtype) == (3, torch.float32)
    with pytest.raises(InputError, match="no checkpoint 'sft'; it has pt, it"):
        run.load_late("sft", 3)


def test_a_run_whose_checkpoint_is_another(made):
    other = actcache.Run(made.out, checkpoints={"it": made.pt})
    with pytest.raises(IncompatibleError, match=r"checkpoint it at .* is not the one captured: its weights"):
        other.load_late("pt", 3)


def test_what_is_no_run(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        actcache.Run(tmp_path)


def test_it_shows_itself(run):
    assert repr(run).endswith(f"{len(run.store)} events of pt, it>")
    assert f"<td>{len(run.store):,}</td>" in run._repr_html_()


def test_every_public_name_is_there():
    for name in actcache.__all__:
        assert getattr(actcache, name) is not None
    wanted = {"Run", "run", "open_store", "Store", "LateStack", "RowFeed", "ActivationBuffer", "Variant", "Add"}
    assert wanted | {"ActcacheError"} <= set(dir(actcache))
