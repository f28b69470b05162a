"""The whole study of a run: what it would take, every analysis that can be served, what a killed one leaves."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

import actcache
from actcache.analyses import ANALYSES, whole
from actcache.cli import main
from actcache.errors import InputError
from actcache.models.cost import ModelShape
from actcache.study import results
from actcache.study.finished import replay_rate
from actcache.study.plan import shapes_of

pytestmark = pytest.mark.slow

FEW = ("--only", "depth,effects")


@pytest.fixture(scope="module")
def run(tiny_run):
    return tiny_run("llama", torch.float32, "--boundary", "3,2", "--stability", "0", "--limit", "12")


@pytest.fixture
def out(run, tmp_path):
    """A run with the cells of one boundary."""
    folder = shutil.copytree(run.out, tmp_path / "run")
    for path in (folder / "cells").glob("b002-*"):
        path.unlink()
    for name in ("effects.json", "report.html"):
        (folder / name).unlink()
    assert main(["grid", str(folder), "--boundary", "3", "--quiet"]) == 0
    return folder


def shown(captured):
    """Lines of stdout by their first word."""
    lines = [line for line in captured.out.splitlines() if line]
    return {line.split()[0]: line.partition("  ")[2].strip() for line in lines}


@pytest.mark.usefixtures("drawn")
def test_all_that_the_run_can_serve(out, capfd):
    assert main(["study", str(out)]) == 0
    captured = capfd.readouterr()
    said = shown(captured)
    n_replays = 2 * 2 * len(actcache.Run(out).store)  # of depth: every upstream and late stack at the other boundary
    assert re.fullmatch(rf"{n_replays} replays, \S+ multiply-adds, about (\d:\d\d|\d\S* s)", said["depth"])
    assert said["lineage"].startswith("left out: ")
    assert "capture with --checkpoint STAGE=DIR" in said["lineage"]
    assert "capture with --pair pt,A --pair pt,B" in said["recipes"]
    assert said["effects"] == "no replay is missing"
    asked_for_by_name = ", ".join(named.name for named in ANALYSES if named.load().opt_in)
    assert f"not asked for: {asked_for_by_name}; --also NAME answers one" in captured.out
    assert captured.out.endswith(f"Report: {out / 'report.html'}\n")
    html = (out / "report.html").read_text()
    for named in ANALYSES:
        served = named.name not in ("lineage", "recipes") and not named.load().opt_in
        assert (out / f"{named.name}.json").exists() == served, named.name
        if served and json.loads((out / f"{named.name}.json").read_text())["groups"]:
            assert f'<section id="{named.name}">' in html, named.name
    assert captured.err.count("depth: ") >= 1

    assert main(["study", str(out)]) == 0
    captured = capfd.readouterr()
    again = shown(captured)
    assert {name for name, text in again.items() if text == "answered already"} == said.keys() - {
        *("lineage", "recipes", "together", "not", "Report:")
    }
    assert "replays" not in captured.out + captured.err
    assert main(["study", str(out), "--also", "depth", "--only", "", "--quiet"]) == 0
    assert not capfd.readouterr().err


def test_a_killed_study_goes_on_to_the_same_bytes(out, tmp_path, monkeypatch):
    unkilled = shutil.copytree(out, tmp_path / "unkilled")
    actcache.Run(unkilled).study(only=["depth", "effects"])
    write, left = results.write_result, [1]

    def die(*args, **more):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(*args, **more)

    monkeypatch.setattr("actcache.study.runner.write_result", die)
    assert main(["study", str(out), *FEW, "--quiet"]) == 130
    assert not (out / "report.html").exists()
    n_results = len(results.result_files(out / "cells"))
    monkeypatch.setattr("actcache.study.runner.write_result", write)
    assert main(["study", str(out), *FEW, "--quiet"]) == 0
    assert len(results.result_files(out / "cells")) > n_results
    for name in ("depth.json", "depth.parquet", "cells.parquet"):
        assert (out / name).read_bytes() == (unkilled / name).read_bytes(), name


def test_a_study_from_python(out):
    run = actcache.Run(out)
    told, said = [], []
    found = run.study(only=["depth"], on_progress=told.append, say=said.append)
    assert list(found.answers) == ["depth"]
    assert found.answers["depth"]["groups"] == json.loads((out / "depth.json").read_text())["groups"]
    assert found.refused == {}
    assert told[-1].done == told[-1].total > 0
    assert (out / "report.html").exists()
    plan = {one.analysis.name: one for one in whole.plan_study(run)}
    assert plan["depth"].content == found.answers["depth"]
    assert "no stage between" in plan["lineage"].refused
    with pytest.raises(InputError, match=r"lineage: .* has no stage between"):
        run.study(also=["lineage"])
    with pytest.raises(InputError, match="there is no analysis 'depht'"):
        run.study(only=["depht"])


def test_an_answer_of_ones_own_stays(out, capfd):
    """What a person asked for under other options is not overwritten."""
    actcache.Run(out).analyse("depth", boundaries=[3, 2], seed=5)
    before = (out / "depth.json").read_bytes()
    assert main(["study", str(out), *FEW]) == 0
    assert shown(capfd.readouterr())["depth"] == "answered already"
    assert (out / "depth.json").read_bytes() == before
    (out / "depth.json").write_text("{}")  # damaged: it is made again
    assert main(["study", str(out), *FEW]) == 0
    assert json.loads((out / "depth.json").read_text())["options"]["seed"] == 0


def test_what_an_analysis_refuses_late_is_said_and_the_rest_goes_on(out, capfd, monkeypatch):
    def refuse(*args, **more):
        raise InputError("that cannot be")

    monkeypatch.setattr("actcache.analyses.depth.Depth.numbers", refuse)
    assert main(["study", str(out), *FEW]) == 0
    captured = capfd.readouterr()
    assert "actcache: depth is left out: that cannot be" in captured.err
    assert (out / "effects.json").exists()
    assert "Report: " in captured.out


def test_the_cost_counts_each_replay_once(out):
    run = actcache.Run(out)
    (planned,) = whole.plan_study(run, only=["depth"])
    shapes = shapes_of(run.lineup)
    (one, twice) = whole.costs([planned, planned], shapes)
    assert one[0] == sum(job.n_units for _, job in planned.jobs) > 0
    assert one[1] > 0
    assert twice == (0, 0)
    assert isinstance(shapes["pt"], ModelShape)


def test_the_time_comes_of_the_grid(run, out, capfd):
    timed = actcache.Run(run.out).folder.timings()["grid"]
    assert replay_rate({"grid": timed}) == timed["multiply_adds"] / (timed["elapsed_s"] - timed["load_s"])
    assert replay_rate({}) is None
    (out / "timings.json").unlink()
    assert main(["study", str(out), *FEW]) == 0
    assert "multiply-adds, at least about" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "depht"], "there is no analysis 'depht'; there are depth, "),
        (["--also", "lineage"], "lineage: .* has no stage between pt and it"),
    ],
)
def test_names_that_are_none(out, capfd, words, said):
    assert main(["study", str(out), *words, "--quiet"]) == 2
    err = capfd.readouterr().err
    assert re.search(said, err)
    assert len(err.splitlines()) == 1


def test_a_run_without_cells(out, capfd):
    (out / "cells.parquet").unlink()
    assert main(["study", str(out)]) == 2
    assert f"{out} has no cells yet: 'actcache grid {out}' scores them" in capfd.readouterr().err
