"""What holds of every analysis: checkpoints that are the same give nothing, a killed one goes on, flags have help."""

from __future__ import annotations

import functools
import io
import json
import shutil
from contextlib import redirect_stderr
from dataclasses import fields, is_dataclass
from unittest import mock

import pyarrow.parquet as pq
import pytest
import tiny
import torch
from shared import DRAWN

import actcache
from actcache.analyses import ANALYSES
from actcache.cli import main
from actcache.report import figures
from actcache.study import results
from actcache.study.analysis import CellAnalysis

pytestmark = pytest.mark.slow

every_analysis = pytest.mark.parametrize("named", ANALYSES, ids=lambda named: named.name)
every_one_of_cells = pytest.mark.parametrize(
    "named", [one for one in ANALYSES if isinstance(one.load(), CellAnalysis)], ids=lambda named: named.name
)
BOUNDARIES = ("--boundary", "2,3", "--stability", "0", "--limit", "7")
ASKED = {"forced": {"max_new": 16}}  # of 128
PAIRS = ("--pair", "pt,it", "--pair", "pt,between")


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """Two pairs, and a third checkpoint on the events of each: every analysis meets more than it asks for."""
    between = tiny.make_pair(tmp_path_factory.mktemp("between"), "llama", eps=tiny.EPS / 2)[1]
    return tiny_run("llama", torch.float32, *BOUNDARIES, "--checkpoint", f"between={between}", *PAIRS)


@pytest.fixture(scope="module")
def answered(run, tmp_path_factory):
    """``answered(name)``: the folder of a run that was asked once, what it gave, and what was told."""

    @functools.cache
    def ask(name):
        out, told = shutil.copytree(run.out, tmp_path_factory.mktemp(name) / "run"), []
        return out, actcache.Run(out).analyse(name, on_progress=told.append, **ASKED.get(name, {})), told

    return ask


@pytest.fixture(scope="module")
def every_answer(run, answered, tmp_path_factory):
    """The folder of a run with the answers of all analyses, and its page."""
    out = tmp_path_factory.mktemp("every") / "run"
    for named in ANALYSES:
        shutil.copytree(answered(named.name)[0], out, dirs_exist_ok=True)
    with mock.patch.object(figures, "_svg", DRAWN):
        assert main(["report", str(out)]) == 0
    return out, (out / "report.html").read_text()


@pytest.fixture(scope="module")
def of_other_cells(every_answer, tmp_path_factory):
    """The folder of that run with other cells, its page, and what was said while that was made."""
    out = shutil.copytree(every_answer[0], tmp_path_factory.mktemp("other") / "run")
    assert main(["grid", str(out), "--strict"]) == 0  # as the ones before were not
    with redirect_stderr(io.StringIO()) as said:
        assert main(["report", str(out)]) == 0
    return out, (out / "report.html").read_text(), said.getvalue()


@pytest.fixture(scope="module")
def without_events(run, tmp_path_factory):
    """The folder of a run of the same checkpoint under three names."""
    out = tmp_path_factory.mktemp("same") / "run"
    words = ["run", "--pt", run.pt, "--it", run.pt, "--prompts", run.prompts, "--out", out]
    words += ["--checkpoint", f"between={run.pt}", *PAIRS]
    assert main([str(word) for word in [*words, "--max-new", 4, *BOUNDARIES]]) == 0
    return out


@every_analysis
def test_it_is_well_described(named):
    analysis = named.load()
    assert analysis.name == named.name
    assert is_dataclass(analysis.options)
    assert analysis.options.__dataclass_params__.frozen
    for entry in fields(analysis.options):
        assert entry.metadata["help"], entry.name
    assert named.question[0].islower()
    assert not named.question.endswith(".")


@every_analysis
def test_what_it_writes(named, answered, every_answer):
    out, found, told = answered(named.name)
    assert all(step.done <= step.total for step in told)
    assert not told or told[-1].done == told[-1].total
    content = json.loads((out / f"{named.name}.json").read_text())
    assert {"analysis", "version", "options", "groups"} <= found.keys()
    assert found == {name: content[name] for name in found}
    assert (content["analysis"], content["version"]) == (named.name, named.load().version)
    assert content["groups"]
    for group in content["groups"]:
        assert {"n_events", "n_prompts"} <= group.keys()
        numbers = [value for value in group.values() if isinstance(value, dict) and "mean" in value]
        assert numbers
        assert all(value.keys() == {"mean", "low", "high"} for value in numbers)
    if not named.of_cells:  # whose table is the run's cells
        assert {"event_id", "prompt_id"} <= set(pq.read_table(out / f"{named.name}.parquet").column_names)
    section = named.load().section(content["groups"])
    assert section.shows
    assert section.does_not_show
    assert {len(row) for row in section.rows} == {len(section.columns)}
    assert f'<section id="{named.name}">' in every_answer[1]


@every_one_of_cells
def test_killed_and_resumed_gives_the_same_bytes(named, run, answered, tmp_path, monkeypatch):
    """Also where nothing was scored before: as where the grid was."""
    killed = shutil.copytree(run.out, tmp_path / "killed")
    shutil.rmtree(killed / "cells")
    write, left = results.write_result, [1]

    def die(*args, **more):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(*args, **more)

    monkeypatch.setattr("actcache.study.runner.write_result", die)
    with pytest.raises(KeyboardInterrupt):
        actcache.Run(killed).analyse(named.name)
    assert not (killed / f"{named.name}.json").exists()
    n_killed = n_results(killed)
    assert left == [0]
    monkeypatch.setattr("actcache.study.runner.write_result", write)
    actcache.Run(killed).analyse(named.name)
    assert 1 <= n_killed < n_results(killed)
    for name in (f"{named.name}.json", f"{named.name}.parquet"):
        assert (killed / name).read_bytes() == (answered(named.name)[0] / name).read_bytes()


def n_results(out):
    return sum(len(results.result_files(place)) for place in out.rglob("*") if place.is_dir())


@every_analysis
def test_identical_checkpoints_give_nothing(named, without_events, tmp_path, capfd):
    """No event, so no number and no section; and it is said."""
    shutil.copytree(without_events, tmp_path / "run")
    assert main([named.name, str(tmp_path / "run")]) == 0
    assert "no event" in capfd.readouterr().out.lower()
    assert json.loads((tmp_path / "run" / f"{named.name}.json").read_text())["groups"] == []
    assert main(["report", str(tmp_path / "run")]) == 0
    assert f'<section id="{named.name}">' not in (tmp_path / "run" / "report.html").read_text()


@every_one_of_cells
def test_numbers_of_other_cells_are_not_shown(named, of_other_cells):
    out, page, said = of_other_cells
    assert f"{out / named.name}.json is of other cells than the run's" in said
    assert f'<section id="{named.name}">' not in page


@every_one_of_cells
def test_a_table_that_is_damaged_or_gone_is_no_answer(named, answered, tmp_path, capfd, monkeypatch):
    """The numbers alone are not enough: who reads the table would read something else."""
    out = shutil.copytree(answered(named.name)[0], tmp_path / "run")
    analysis, opened = named.load(), actcache.Run(out)
    path = analysis.table_path(opened.folder)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    assert main(["report", str(out)]) == 1
    said = capfd.readouterr().err
    assert str(path) in said
    assert f"'actcache {named.name} {out}' makes it again" in said
    monkeypatch.setattr("actcache.report.written.write_report", lambda *args, **more: None)  # seen above
    opened.study(only=named.name)
    assert path.read_bytes() == whole
    path.unlink()
    assert analysis.read(opened.folder, opened.store) is None
    opened.study(only=[named.name])
    assert path.read_bytes() == whole
