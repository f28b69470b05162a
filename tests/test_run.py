"""A run from Python: the same as by the command line, and its tables flat."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shutil

import pyarrow.compute as pc
import pytest
import torch

import actcache
from actcache.cli import build_parser, main
from actcache.errors import IncompatibleError, InputError, NotFiniteError
from actcache.models import parts

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


def test_every_option_of_the_verb_is_an_argument():
    (verbs,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    options = {action.dest for action in verbs.choices["run"]._actions} - {"help"}
    plural = {"checkpoint": "checkpoints", "site": "sites"}
    given = inspect.signature(actcache.run).parameters
    assert {plural.get(name, name) for name in options} == given.keys() - {"options"}, (
        "cli/run.py passes every option of 'actcache run' on, by name"
    )


@pytest.mark.parametrize(
    ("pair", "options"),
    [
        (("pt", "dpo"), {"sites": {"mlp": [3, 4], "attention": "all"}}),
        ("pt,dpo", {"sites": ["mlp:3,4", "attention:all"]}),
        (["pt,dpo", ("sft", "dpo")], {"site": "mlp:3,4", "sites": "attention:all"}),
    ],
)
def test_options_become_those_of_the_verb(made, tmp_path, monkeypatch, pair, options):
    """Each at another value than its default."""
    seen, threads = [], []

    def run_study(args):
        seen.append(args)
        return actcache.Run(made.out).folder, {}

    monkeypatch.setattr("actcache.cli.run.run_study", run_study)
    monkeypatch.setattr("actcache.cli.run.settle_threads", threads.append)
    actcache.run(
        prompts=made.prompts,
        out=tmp_path / "run",
        pt=made.pt,
        checkpoints={"dpo": made.it, "sft": made.pt},
        it=made.it,
        pair=pair,
        support="rollouts",
        rollout_tokens=5,
        events=made.out,
        store="s3://bucket/store",
        boundary=[0.6, -3],
        dtype="bfloat16",
        dequantize=True,
        device="cuda",
        template="it",
        add_special_tokens=False,
        continuations=made.prompts,
        stream=True,
        resident="one",
        max_new=9,
        limit=7,
        rows="divergence",
        codec="actcache.bf16_planes",
        shard_prompts=5,
        scope=["prefix", "position"],
        readout=["native", "common_dpo"],
        sweep=tmp_path / "sweep.toml",
        strict=True,
        max_tokens=300,
        stability="all",
        stable_only=True,
        engine="ray",
        address="auto",
        workers=2,
        threads=3,
        quiet=True,
        **options,
    )
    (args,) = seen
    found = {name: value for name, value in vars(args).items() if name not in ("command", "site")}
    assert found == {
        "prompts": made.prompts,
        "out": tmp_path / "run",
        "pt": str(made.pt),
        "it": str(made.it),
        "checkpoint": [("dpo", str(made.it)), ("sft", str(made.pt))],
        "pair": [("pt", "dpo"), ("sft", "dpo")] if isinstance(pair, list) else [("pt", "dpo")],
        "support": "rollouts",
        "rollout_tokens": 5,
        "events": made.out,
        "store": "s3://bucket/store",
        "boundary": "0.6,-3",
        "dtype": "bfloat16",
        "dequantize": True,
        "device": "cuda",
        "template": "it",
        "add_special_tokens": "no",
        "continuations": made.prompts,
        "stream": True,
        "resident": "one",
        "max_new": 9,
        "limit": 7,
        "rows": "divergence",
        "codec": "actcache.bf16_planes",
        "shard_prompts": 5,
        "scope": "prefix,position",
        "readout": "native,common_dpo",
        "sweep": tmp_path / "sweep.toml",
        "strict": True,
        "max_tokens": 300,
        "stability": None,
        "stable_only": True,
        "engine": "ray",
        "address": "auto",
        "workers": 2,
        "threads": 3,
        "quiet": True,
    }
    assert args.site == ["mlp:3,4", "attention:all"]
    assert threads == [3]


def test_a_run_with_rows_of_other_sites(made, tmp_path):
    places = {"pt": made.pt, "it": made.it, "prompts": made.prompts, "out": tmp_path / "run"}
    run = actcache.run(**places, limit=4, max_new=8, stability=0, sites={"mlp": [3, 4]}, quiet=True)
    assert run.store.sites["mlp"] == [3, 4]
    batch = next(iter(actcache.RowFeed(run.store, site="mlp", positions="event", batch_rows=2)))
    assert batch.states.shape == (2, 2, 2, run.store.width)


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


def cell(run, upstream, late, boundary, scope, numbers):
    """Final states of a cell, replayed one event at a time."""
    stack, found = run.load_late(late, boundary), []
    for number in numbers:
        rows, offsets = run.store.states(upstream, boundary, [number])
        if scope == "position":
            own, _ = run.store.states(late, boundary, [number])
            rows = torch.cat([own[:-1], rows[-1:]])
        found.append(stack.run(rows, offsets, strict=True))
    return torch.cat(found)


def test_final_states_that_the_grid_kept(run, monkeypatch):
    boundary, numbers = 2, [4, 0, 4]
    ids = [run.store.events["event_id"][number].as_py() for number in numbers]
    wanted = {late: cell(run, "it", late, boundary, "prefix", numbers) for late in ("pt", "it")}
    monkeypatch.setattr(actcache.LateStack, "load", lambda *given, **more: pytest.fail("something was loaded"))
    for late, want in wanted.items():
        found = run.final(upstream="it", late=late, boundary=boundary, events=ids)
        assert (found.dtype, found.shape) == (torch.float32, want.shape)
        torch.testing.assert_close(found, want, rtol=0, atol=1e-4)
    assert torch.equal(run.final(upstream="it", late="it"), run.store.final("it"))
    mask = pc.field("step") > 1
    assert torch.equal(
        run.final(upstream="it", late="pt", events=mask), run.final(upstream="it", late="pt")[run.store.numbers(mask)]
    )
    assert run.final(upstream="it", late="pt", events=[]).shape == (0, run.store.width)


def test_what_final_states_make_is_what_the_cells_say(run):
    cells = run.cells.filter((pc.field("boundary") == 3) & (pc.field("readout") == "common_it"))
    readout = run.load_readout("it")
    pairs = torch.tensor([run.store.events["y_pt"].to_pylist(), run.store.events["y_it"].to_pylist()]).T
    for upstream in ("pt", "it"):
        for late in ("pt", "it"):
            of_cell = cells.filter((pc.field("upstream") == upstream) & (pc.field("late") == late))
            final = run.final(upstream=upstream, late=late, boundary=3)
            assert readout.top(final, 1)[0][:, 0].tolist() == of_cell["top1_id"].to_pylist()
            y = readout.scores(final, pairs)
            assert (y[:, 1] - y[:, 0]).tolist() == pytest.approx(of_cell["margin"].to_pylist(), abs=1e-4)


def test_final_states_of_both_scopes_and_of_a_strict_grid(made, tmp_path):
    folder = shutil.copytree(made.out, tmp_path / "run")
    run = actcache.Run(folder)
    asked = {"upstream": "pt", "late": "it", "boundary": 2}
    before = run.final(**asked)
    with pytest.raises(InputError, match=r"'actcache grid .* --boundary 2 --scope position' keeps them$"):
        run.final(**asked, scope="position")
    words = ["grid", str(folder), "--boundary", "2", "--quiet"]
    assert main([*words, "--scope", "position"]) == 0
    numbers = range(0, len(run.store), 5)
    want = cell(run, "pt", "it", 2, "position", numbers)
    torch.testing.assert_close(run.final(**asked, scope="position", events=numbers), want, rtol=0, atol=1e-4)
    assert torch.equal(run.final(**asked), before)
    assert main([*words, "--strict"]) == 0  # whose cells are the table's now
    assert torch.equal(run.final(**asked, events=numbers), cell(run, "pt", "it", 2, "prefix", numbers))


def test_final_states_that_nobody_kept(made, tmp_path):
    folder = shutil.copytree(made.out, tmp_path / "run")
    run, asked = actcache.Run(folder), {"upstream": "pt", "late": "it", "boundary": 3}
    kept = run.final(**asked)
    for path in (folder / "cells").glob("b003-*.safetensors"):
        path.unlink()
    with pytest.raises(InputError, match=r"no final states are kept of .* events .pt behind it, boundary 3") as caught:
        run.final(**asked)
    said = str(caught.value)
    command = said.partition("'")[2].partition("'")[0].split()
    for name in said.partition("once ")[2].partition(" of ")[0].split(", "):
        (folder / "cells" / name).unlink()
    assert main([*command[1:], "--quiet"]) == 0
    torch.testing.assert_close(run.final(**asked), kept)
    assert run.final(upstream="it", late="it", boundary=3).shape == kept.shape, "the capture's own"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"late": "sft"}, "the run has no checkpoint 'sft'; it has pt, it"),
        ({"boundary": 1}, "boundary 1 is not in the store; it has 2, 3"),
        ({"boundary": True}, "boundary is True, expected a whole number"),
        ({"scope": "all"}, "scope 'all' is unknown; choose prefix or position"),
        ({"events": ["nobody"]}, "event 'nobody' is not in the store"),
    ],
)
def test_final_states_that_cannot_be(run, changes, said):
    with pytest.raises(InputError, match=said):
        run.final(**{"upstream": "pt", "late": "it", **changes})


def test_a_logit_lens(run):
    events = run.store.events
    numbers = [2, 5, 0]
    readout = run.load_readout("it")
    table = run.lens("pt", readout=readout, k=3, events=numbers)
    assert table.equals(run.lens("pt", readout="it", k=3, events=events["event_id"].take(numbers)))
    assert table["boundary"].to_pylist() == [2] * 3 + [3] * 3 + [run.store.fingerprint.n_blocks] * 3
    for at, row in enumerate(table.to_pylist()):
        number, boundary = numbers[at % 3], row["boundary"]
        event = events.slice(number, 1).to_pylist()[0]
        assert row["event_id"] == event["event_id"]
        if boundary == run.store.fingerprint.n_blocks:
            state = run.store.final("pt", [number])
        else:
            state = run.store.states("pt", boundary, [number])[0][-1:]
        logits = readout.logits(state)[0]
        order = logits.argsort(descending=True).tolist()
        assert row["top_ids"] == order[:3]
        assert row["top_texts"] == [run.lineup.decode([token]) for token in order[:3]]
        assert row["top_logits"] == pytest.approx(logits[order[:3]].tolist(), abs=1e-5)
        assert (row["rank_pt"], row["rank_it"]) == (order.index(event["y_pt"]), order.index(event["y_it"]))
        assert row["margin"] == pytest.approx(float(logits[event["y_it"]] - logits[event["y_pt"]]), abs=1e-5)
        p = logits.double().softmax(0)
        assert row["entropy"] == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)


def test_a_lens_by_its_own_head_ends_in_its_own_choice(run):
    last = run.store.fingerprint.n_blocks
    for label in ("pt", "it"):
        table = run.lens(label, boundaries=[last])
        assert table.num_rows == len(run.store)
        assert set(table[f"rank_{label}"].to_pylist()) == {0}
        assert [texts[0] for texts in table["top_texts"].to_pylist()] == run.store.events[f"token_{label}"].to_pylist()
    assert run.lens("pt", events=[]).num_rows == 0
    with pytest.raises(InputError, match="no checkpoint 'sft'"):
        run.lens("sft")
    with pytest.raises(InputError, match="no checkpoint 'sft'"):
        run.lens("pt", readout="sft")
    with pytest.raises(InputError, match="boundary 1 is not in the store"):
        run.lens("pt", boundaries=[1])
    with pytest.raises(InputError, match="the lens has no boundary to read at"):
        run.lens("pt", boundaries=[])
    for wrong in (True, 2, "2"):
        with pytest.raises(InputError, match=f"boundaries are {wrong!r}, expected a list of whole numbers"):
            run.lens("pt", boundaries=wrong)
    for wrong in (True, 2.0, "2"):
        with pytest.raises(InputError, match=f"boundary is {wrong!r}, expected a whole number"):
            run.lens("pt", boundaries=[wrong])
    for wrong in (2.5, True, "5", None):
        with pytest.raises(InputError, match=f"k is {wrong!r}, expected a whole number"):
            run.lens("pt", k=wrong)
    with pytest.raises(InputError, match="k is 0, expected 1 to"):
        run.lens("pt", k=0)


def test_a_lens_loads_a_head_and_no_block(run, monkeypatch):
    loaded, load = [], parts.load_weights
    monkeypatch.setattr(parts, "load_weights", lambda *given: loaded.append(load(*given)) or loaded[-1])
    run.lens("pt", readout="it", events=[0])
    names = {name for model in loaded for name, _ in model.named_parameters()}
    assert names
    assert not [name for name in names if ".layers." in name]


def test_a_lens_names_the_event_that_it_cannot_read(run, monkeypatch):
    states = run.store.states

    def damaged(*given, **more):
        rows, offsets = states(*given, **more)
        rows[1] = torch.inf
        return rows, offsets

    monkeypatch.setattr(run.store, "states", damaged)
    name = run.store.events["event_id"][7].as_py()
    with pytest.raises(NotFiniteError, match=f"states of pt at boundary 2, event {re.escape(name)}: the final state"):
        run.lens("pt", events=[3, 7])


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
