"""Three and four checkpoints through the command line: every verb serves any lineup, and a pair is as it was.

The labels are none of the roles pt and it. Numbers are compared with forward hooks, one event at a time.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from twins import reference

import actcache
from actcache.analyses.effects_text import described
from actcache.cli import main
from actcache.models.lineup import Lineup
from actcache.schema import readouts_of
from actcache.store.verify import verify

BOUNDARIES = (2, 3)
MAX_NEW = 16
N_PROMPTS = 12
CLOSE = 1e-4  # logits: what packing may change in float32


@dataclass(frozen=True)
class LineupRun:
    """One run of the command line over a tiny lineup."""

    folders: dict[str, Path]
    pair: tuple[str, str]
    prompts: Path
    out: Path
    given: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        return list(self.folders)

    @property
    def store(self) -> actcache.Store:
        return actcache.open_store(self.out)

    @property
    def cells(self) -> pa.Table:
        return pq.read_table(self.out / "cells.parquet")

    @property
    def effects(self) -> dict[str, Any]:
        return json.loads((self.out / "effects.json").read_text())

    def command(self, verb: str = "run", *, out: Path | None = None) -> list[str]:
        return [verb, *self.given, "--prompts", str(self.prompts), *settings(), "--out", str(out or self.out)]


def settings() -> list[str]:
    return ["--max-new", str(MAX_NEW), "--boundary", ",".join(map(str, BOUNDARIES))]


def flags(folders: dict[str, Path]) -> list[str]:
    return [word for label, folder in folders.items() for word in ("--checkpoint", f"{label}={folder}")]


@functools.cache
def loaded(folder: Path) -> Any:
    return reference.load(folder, torch.float32)


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> LineupRun:
    """The default pair: the first and the last."""
    folder = tmp_path_factory.mktemp("three")
    folders = tiny.make_lineup(folder, "llama", ["base", "sft", "dpo"])
    prompts = tiny.write_prompts(folder / "prompts.jsonl", N_PROMPTS)
    run = LineupRun(folders, ("base", "dpo"), prompts, folder / "run", tuple(flags(folders)))
    assert main([*run.command(), "--stability", "4"]) == 0
    return run


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> LineupRun:
    """A pair that is asked for, against the order of the lineup; a label that the other pair of flags would give."""
    folder = tmp_path_factory.mktemp("four")
    folders = tiny.make_lineup(folder, "llama", ["pt", "a-1", "rl_2", "x"])
    prompts = tiny.write_prompts(folder / "prompts.jsonl", N_PROMPTS)
    given = ("--pt", str(folders["pt"]), *flags({label: folders[label] for label in ("a-1", "rl_2", "x")}))
    run = LineupRun(folders, ("x", "a-1"), prompts, folder / "run", (*given, "--pair", "x,a-1"))
    assert main([*run.command(), "--stability", "0", "--scope", "prefix,position"]) == 0
    return run


@pytest.fixture(params=["three", "four"])
def run(request) -> LineupRun:
    return request.getfixturevalue(request.param)


def a_few(run: LineupRun) -> list[int]:
    return [0, len(run.store) // 2, len(run.store) - 1]


# ---- capture ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_events_are_the_pairs_and_states_everyones(run):
    store, events = run.store, run.store.events.to_pylist()
    assert store.checkpoints == run.labels, "in the order given"
    assert store.fingerprint.pair == run.pair
    assert len(store) > 5
    first, second = (loaded(run.folders[label]) for label in run.pair)
    for number in a_few(run):
        event = events[number]
        ids = store.token_ids([number])[0].tolist()
        assert event["pair"] == ",".join(run.pair)
        found = reference.first_divergence(first, second, ids[: len(ids) - event["step"]], MAX_NEW, [tiny.EOS_ID])
        assert {name: event[name] for name in ("step", "position", "y_pt", "y_it")} == {
            name: found[name] for name in ("step", "position", "y_pt", "y_it")
        }
        for role in ("pt", "it"):
            assert event[f"gap_{role}"] == pytest.approx(found[f"gap_{role}"], abs=CLOSE)
        assert event["margin_pt" if "pt" not in run.labels else f"margin_{run.pair[0]}"] < 0 < event["margin_it"]
        for label in run.labels:
            model = loaded(run.folders[label])
            hidden = reference.final_hidden(model, ids)[-1]
            logits = reference.readout(model, hidden)
            margin = float(logits[event["y_it"]] - logits[event["y_pt"]])
            assert event[f"margin_{label}"] == pytest.approx(margin, abs=CLOSE)
            assert torch.allclose(store.final(label, [number])[0], hidden, atol=1e-3)
            for boundary in BOUNDARIES:
                rows, _ = store.states(label, boundary, [number])
                assert torch.allclose(rows, reference.states(model, ids, boundary), atol=1e-4)


def test_a_role_that_is_no_label_has_its_margins_too(three, four):
    for role, label in zip(("pt", "it"), three.pair, strict=True):
        assert three.store.events[f"margin_{role}"].equals(three.store.events[f"margin_{label}"])
    # There is a checkpoint pt, which is not in the role pt: the column is the checkpoint's.
    events = four.store.events
    assert not events["margin_pt"].equals(events["margin_x"])
    assert events["margin_it"].equals(events["margin_a-1"])


@pytest.mark.slow
def test_a_lineup_scores_its_pair_as_the_pair_alone_does(three, tmp_path):
    folders = {label: three.folders[label] for label in three.pair}
    alone = LineupRun(folders, three.pair, three.prompts, tmp_path / "run", tuple(flags(folders)))
    assert main([*alone.command(), "--stability", "0"]) == 0
    names = ["event_id", "boundary", "upstream", "late", "readout", "margin", "top1_id"]
    of_pair = pc.and_(*(pc.is_in(three.cells[name], pa.array(three.pair)) for name in ("upstream", "late")))
    within, without = (cells.select(names).to_pandas() for cells in (three.cells.filter(of_pair), alone.cells))
    key = names[:5]
    both = within.merge(without, on=key, suffixes=("", "_alone"))
    assert len(both) == len(within) == len(without)
    assert np.allclose(both["margin"], both["margin_alone"], atol=CLOSE)
    assert (both["top1_id"] == both["top1_id_alone"]).all()
    found = {group_key(group): group for group in three.effects["groups"]}
    for group in alone.effects["groups"]:
        assert "margins" not in group
        for name in ("late_from_pt", "late_from_it", "interaction", "native_shift"):
            assert found[group_key(group)][name]["mean"] == pytest.approx(group[name]["mean"], abs=CLOSE)


def group_key(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group[name] for name in ("kind", "pair", "boundary", "scope", "readout", "variant", "pt", "it"))


def test_the_short_form_writes_the_fingerprint_that_it_wrote_before(tiny_run):
    content = tiny_run("llama", torch.float32).store.fingerprint.to_json()
    assert "lineup" not in content
    assert content["pair"] == ["pt", "it"]
    assert content.keys() == {
        *("checkpoints", "pair", "prompts", "n_prompts", "dtype", "boundaries", "row_selection", "width", "n_blocks"),
        *("max_new", "strict", "max_tokens", "shard_prompts", "codec", "device", "processor", "versions"),
    }


# ---- cells -----------------------------------------------------------------------------------------------------------


def test_every_cell_is_what_hooks_give(run):
    store, models = run.store, {label: loaded(folder) for label, folder in run.folders.items()}
    events, cells = store.events.to_pylist(), run.cells
    scopes, readouts = (sorted(set(cells[name].to_pylist())) for name in ("scope", "readout"))
    heads = {f"common_{label}" for label in run.pair}
    heads |= {"common_pt"} - heads if "pt" in run.labels else set()
    assert set(readouts) == {"native", *heads} - ({"common_x"} if "pt" in run.labels else set())
    assert set(cells["pair"].to_pylist()) == {",".join(run.pair)}
    n = len(run.labels) ** 2 * len(scopes) * len(readouts) * len(BOUNDARIES)
    assert cells.num_rows == n * len(store)
    number, boundary = len(store) // 2, BOUNDARIES[-1]
    event = events[number] | {"ids": store.token_ids([number])[0].tolist()}
    rows = cells.filter(
        pc.and_(pc.equal(cells["event_id"], event["event_id"]), pc.equal(cells["boundary"], boundary))
    ).to_pylist()
    for scope, readout in itertools.product(scopes, readouts):
        head = None if readout == "native" else models[readout.removeprefix("common_")]
        expected = reference.grid(models, event, boundary, scope, head)
        found = {
            (row["upstream"], row["late"]): row for row in rows if (row["scope"], row["readout"]) == (scope, readout)
        }
        assert found.keys() == expected.keys()
        for place, cell in expected.items():
            assert found[place]["margin"] == pytest.approx(cell.margin, abs=CLOSE), (scope, readout, place)
            assert found[place]["top1_id"] == cell.top1_id


def test_readouts_may_name_roles():
    labels, pair = ["base", "sft", "dpo"], ("base", "dpo")
    asked = ("common_it", "native", "common_pt", "common_sft", "common_dpo", "common_x")
    assert readouts_of(asked, labels, pair) == ("common_dpo", "native", "common_base", "common_sft", "common_x")
    asked = ("common_it", "common_pt")
    assert readouts_of(asked, ["pt", "it", "sft"], ("pt", "sft")) == asked, "a label goes before a role"
    assert readouts_of(asked, ["it", "pt"], ("it", "pt")) == asked


@pytest.mark.slow
def test_further_readouts_and_a_sweep_go_by_label(three, tmp_path, capsys):
    out = shutil.copytree(three.out, tmp_path / "run")
    assert main(["grid", str(out), "--readout", "common_sft,common_it", "--boundary", "3"]) == 0
    cells = pq.read_table(out / "cells.parquet")
    at = {
        boundary: set(cells.filter(pc.equal(cells["boundary"], boundary))["readout"].to_pylist())
        for boundary in BOUNDARIES
    }
    assert at[3] == {"native", "common_base", "common_sft", "common_dpo"}
    assert at[2] == {"native", "common_base", "common_dpo"}
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(
        'boundaries = "3"\nreadouts = ["native", "common_it"]\n'
        '[[variants]]\nname = "from_sft"\n[[variants.edits]]\nedit = "interpolate"\nweight = 0.5\ndonor = "sft"\n'
    )
    assert main(["grid", str(out), "--sweep", str(sweep)]) == 0
    cells = pq.read_table(out / "cells.parquet")
    swept = cells.filter(pc.equal(cells["variant"], "from_sft"))
    assert swept.num_rows == 9 * 2 * len(three.store)
    assert set(swept["readout"].to_pylist()) == {"native", "common_dpo"}
    capsys.readouterr()
    assert main(["grid", str(out), "--readout", "common_rl"]) == 2
    assert "choose from native, common_base, common_sft, common_dpo" in capsys.readouterr().err


# ---- effects and the report ------------------------------------------------------------------------------------------


def test_effects_map_every_checkpoint(run):
    cells = run.cells.to_pandas()
    for group in run.effects["groups"]:
        assert (group["pair"], group["pt"], group["it"]) == (",".join(run.pair), *run.pair)
        of_group = cells[
            (cells["boundary"] == group["boundary"])
            & (cells["scope"] == group["scope"])
            & (cells["readout"] == group["readout"])
        ]
        assert sorted(group["margins"]) == sorted(run.labels)
        for upstream, late in itertools.product(run.labels, run.labels):
            of_cell = of_group[(of_group["upstream"] == upstream) & (of_group["late"] == late)]
            assert len(of_cell) == group["n_events"]
            number = group["margins"][upstream][late]
            assert number["mean"] == pytest.approx(of_cell["margin"].astype(float).mean(), abs=1e-6)
            if group["n_prompts"] >= 10:
                assert number["low"] <= number["mean"] <= number["high"]
        first, second = run.pair
        assert group["margins"][first][second] == pytest.approx(group["cells"]["pt_it"])


@pytest.mark.slow
def test_effects_of_any_pair(run, capsys):
    """The run's own, either way round, and each checkpoint with its neighbour."""
    cells, labels = run.cells.to_pandas(), run.labels
    for pair in {run.pair, run.pair[::-1], *itertools.pairwise([*labels, labels[0]])}:
        capsys.readouterr()
        assert main(["effects", str(run.out), "--pair", ",".join(pair), "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        for group in printed["groups"]:
            assert (group["pt"], group["it"], group["pair"]) == (*pair, ",".join(run.pair))
            rows = cells[
                (cells["boundary"] == group["boundary"])
                & (cells["scope"] == group["scope"])
                & (cells["readout"] == group["readout"])
            ]
            mean = rows.groupby(["upstream", "late"])["margin"].apply(lambda column: column.astype(float).mean())
            a, b = (mean[upstream, pair[1]] - mean[upstream, pair[0]] for upstream in pair)
            assert group["late_from_pt"]["mean"] == pytest.approx(a, abs=1e-6)
            assert group["interaction"]["mean"] == pytest.approx(b - a, abs=1e-6)
        name = "effects.json" if pair == run.pair else f"effects-pair-{','.join(pair)}.json"
        assert json.loads((run.out / name).read_text())["groups"] == printed["groups"]
        assert main(["effects", str(run.out / "cells.parquet"), "--pair", ",".join(pair), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["groups"] == printed["groups"]
    assert main(["verify", str(run.out)]) == 0


def test_one_group_in_words_is_the_map_and_the_pairs_effects(run):
    (group, *more) = run.effects["groups"]
    lines = described({"groups": [group]}, run.store)
    at = next(number for number, line in enumerate(lines) if line.startswith("mean margin"))
    called = [label.upper() if label in ("pt", "it") else label for label in run.labels]
    assert lines[at].split()[5:] == [word for label in called for word in ("late", label)]
    for label, name, line in zip(run.labels, called, lines[at + 1 :], strict=False):
        means = [f"{group['margins'][label][late]['mean']:+.3f}" for late in run.labels]
        assert line.split() == ["upstream", name, *means]
    first, second = run.pair
    said = [line.split() for line in lines[at + len(called) + 2 :]]
    for words, effect in zip(said, ("late_from_pt", "late_from_it", "interaction"), strict=False):
        assert f"{group[effect]['mean']:+.3f}" in words
    assert said[0][:4] == ["late", "effect", "from", first]
    assert said[1][:4] == ["late", "effect", "from", second]
    table = described({"groups": [group, *more]}, run.store)
    assert any(f"A: late, from {first}" in line and f"B: late, from {second}" in line for line in table)


def test_the_report_shows_every_checkpoint(run):
    page = (run.out / "report.html").read_text()
    assert 'id="lineup"' in page
    for upstream, late in itertools.product(run.labels, run.labels):
        assert f"upstream {upstream}, late {late}: " in page
    first, second = run.pair
    assert f'<h1>What makes <span class="pt">{first}</span> and <span class="it">{second}</span> part ways</h1>' in page
    for label in run.labels:
        assert f"checkpoint {label}" in page, "how the run was made"
    assert main(["report", str(run.out)]) == 0


# ---- the other verbs -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_command_goes_on_and_another_order_is_refused(three, tmp_path, capsys):
    before = (three.out / "cells.parquet").read_bytes()
    assert main([*three.command(), "--stability", "4"]) == 0
    assert (three.out / "cells.parquet").read_bytes() == before
    capsys.readouterr()
    folders = {label: three.folders[label] for label in ("sft", "base", "dpo")}
    other = [*flags(folders), "--pair", "base,dpo", "--prompts", str(three.prompts), *settings()]
    assert main(["capture", *other, "--out", str(three.out)]) == 2
    assert "its lineup is" in capsys.readouterr().err
    other = [*flags(three.folders), "--pair", "base,sft", "--prompts", str(three.prompts), *settings()]
    assert main(["capture", *other, "--out", str(three.out)]) == 2
    assert "its pair is ['base', 'dpo'], this run's is ['base', 'sft']" in capsys.readouterr().err


def test_a_checkpoint_may_have_moved(three, tmp_path, capsys):
    out = shutil.copytree(three.out, tmp_path / "run")
    moved = shutil.copytree(three.folders["sft"], tmp_path / "elsewhere")
    record = json.loads((out / "run.json").read_text())
    record = {name: value for name, value in record.items() if name not in ("made_from", "seal")}
    record["checkpoints"]["sft"] = str(tmp_path / "gone")
    (out / "run.json").write_text(json.dumps(record))
    command = ["grid", str(out), "--readout", "common_sft"]
    assert main(command) == 2
    assert main([*command, "--checkpoint", f"sft={moved}"]) == 0
    assert main([*command, "--checkpoint", f"sft={three.folders['base']}"]) == 2
    assert "checkpoint sft at" in capsys.readouterr().err
    assert main([*command, "--checkpoint", f"rl={moved}"]) == 2
    assert "checkpoint rl is not in the run; it has base, sft, dpo" in capsys.readouterr().err


def test_stability_is_of_the_pair(three, four, capsys):
    for run in (three, four):
        assert main(["stability", str(run.out), "--sample", "4"]) == 0
        table = pq.read_table(run.out / "stability.parquet")
        assert set(table["dtype"].to_pylist()) == {"float32", "bfloat16"}
        of_float32 = table.filter(pc.equal(table["dtype"], "float32"))
        assert all(of_float32["stable"].to_pylist())
        assert all(of_float32["as_stored"].to_pylist())
        events = {event["event_id"]: event for event in run.store.events.to_pylist()}
        for row in table.to_pylist():
            assert row["gap_it"] == events[row["event_id"]]["gap_it"]
            assert set((row["changed_vs_stored"] or run.pair[0]).split(",")) <= set(run.pair)
    assert main(["effects", str(three.out), "--min-gap", "0.01", "--pair", "base,sft"]) == 0
    assert (three.out / "effects-min-gap-0.01-pair-base,sft.json").is_file()
    assert main(["verify", str(three.out)]) == 0


@pytest.mark.slow
def test_an_analysis_goes_by_the_pair(run, capsys):
    assert main(["depth", str(run.out), "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    found = {group_key(group)[:5]: group for group in run.effects["groups"]}
    assert [group["boundary"] for group in groups] == [2, 3], "the main one first"
    for group in groups:
        assert group["pair"] == ",".join(run.pair)
        assert group["readout"] == f"common_{run.pair[1]}"
        key = tuple(group[name] for name in ("kind", "pair", "boundary", "scope", "readout"))
        assert group["interaction"]["mean"] == pytest.approx(found[key]["interaction"]["mean"])
    assert main(["report", str(run.out)]) == 0


def test_plan_counts_every_checkpoint(run, capsys):
    assert main(["plan", *run.given, "--prompts", str(run.prompts), *settings(), "--rate", "1e9", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["estimate"]
    assert main(["plan", str(run.out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    n, store = len(run.labels), run.store
    n_tokens = int(sum(store.events["position"].to_pylist())) + len(store)
    assert (
        found["truth"]["rows"]
        == n * len(BOUNDARIES) * n_tokens
        == sum(len(store.states(label, boundary)[0]) for label in run.labels for boundary in BOUNDARIES)
    )
    for name in ("rows", "raw_bytes", "capture_multiply_adds", "grid_multiply_adds"):
        assert found["ratio"][name] == pytest.approx(1, abs=0.05), name
    assert found["ratio"]["search_multiply_adds"] == pytest.approx(1, abs=0.15), "of the pair alone"
    assert planned["prompts"] == N_PROMPTS
    assert planned["grid_multiply_adds"] > 0


def test_the_stores_verbs_serve_every_checkpoint(run, tmp_path, capsys):
    assert verify(run.out / "store") == []
    capsys.readouterr()
    assert main(["inspect", str(run.out), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert list(summary["checkpoints"]) == run.labels
    assert main(["export", str(run.out), "--to", "npy", "--out", str(tmp_path / "all"), "--events", "0,1"]) == 0
    for label in run.labels:
        rows, _ = run.store.states(label, BOUNDARIES[0], [0, 1])
        found = np.load(tmp_path / f"all/{label}.b{BOUNDARIES[0]:03d}/rows.npy")
        assert np.array_equal(found, rows.numpy())
    feed = actcache.RowFeed(run.out / "store", batch_rows=64)
    (batch, *_) = feed.batches()
    assert batch.states.shape[1:] == (len(run.labels), len(BOUNDARIES), run.store.width)
    where = feed.locate(batch.rows)
    assert len(where) > 0


@pytest.mark.slow
def test_capture_in_parts_then_grid(three, tmp_path):
    out = tmp_path / "run"
    more = ["--shard-prompts", "5"]
    for part in ("1/2", "2/2"):
        assert main([*three.command("capture", out=out), *more, "--part", part]) == 0
    assert main(["compact", str(out)]) == 0
    assert main(["grid", str(out)]) == 0
    assert main(["effects", str(out)]) == 0
    assert main(["report", str(out)]) == 0
    cells, expected = (pq.read_table(folder / "cells.parquet") for folder in (out, three.out))
    assert cells.select(["event_id", "upstream", "late"]).num_rows == expected.num_rows


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--checkpoint", "base={base}"], "required: --pt, --it, or --checkpoint LABEL=DIR for each of two or more"),
        (["--checkpoint", "a={base}", "--checkpoint", "a={sft}"], "checkpoint a is given twice"),
        (["--pt", "{base}", "--checkpoint", "pt={sft}"], "checkpoint pt is given twice"),
        (["--checkpoint", "a,b={base}", "--checkpoint", "c={sft}"], "checkpoint label 'a,b' is not made of letters"),
        (["--checkpoint", "a={base}", "--checkpoint", "b={sft}", "--pair", "a,c"], "the pair is a,c, expected two"),
        (["--checkpoint", "a={base}", "--checkpoint", "b={sft}", "--pair", "a,a"], "the pair is a,a, expected two"),
    ],
)
def test_what_is_no_lineup_is_refused(words, said, three, tmp_path, capsys):
    words = [word.format(**three.folders) for word in words]
    for verb in ("run", "capture"):
        assert main([verb, *words, "--prompts", str(three.prompts), "--out", str(tmp_path / "run")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--checkpoint", "base"], "'base' is not LABEL=DIR, such as base=models/base"),
        (["--checkpoint", "=x"], "'=x' is not LABEL=DIR"),
        (["--pair", "a"], "'a' is not two labels, such as base,dpo"),
        (["--pair", "a,b,c"], "'a,b,c' is not two labels"),
    ],
)
def test_what_is_no_label_is_refused_by_the_parser(words, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["run", *words])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_effects_of_a_pair_that_is_not_there(three, capsys):
    assert main(["effects", str(three.out), "--pair", "base,rl"]) == 2
    assert "checkpoint 'rl' of the pair is not in the run; it has base, sft, dpo" in capsys.readouterr().err
    assert main(["effects", str(three.out), "--pair", "base,base"]) == 2
    assert "pass two different labels" in capsys.readouterr().err


@pytest.mark.slow
def test_a_lineup_from_python(three):
    before = (three.out / "cells.parquet").read_bytes()
    found = actcache.run(
        checkpoints=three.folders,
        pair=three.pair,
        prompts=three.prompts,
        out=three.out,
        max_new=MAX_NEW,
        boundary=BOUNDARIES,
        stability=4,
        quiet=True,
    )
    assert found.store.checkpoints == three.labels
    assert (three.out / "cells.parquet").read_bytes() == before
    lineup = Lineup.open(three.folders)
    assert lineup.pair == ("base", "dpo")
    assert Lineup.open(three.folders, ("dpo", "sft")).pair == ("dpo", "sft")
