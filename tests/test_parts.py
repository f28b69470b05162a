"""Parts: a stage shared by commands that know nothing of each other gives what one command gives, byte for byte."""

from __future__ import annotations

import json

import pytest
import torch
from same import SEGMENTS, fresh, results

from actcache.cli import main
from actcache.study import runner
from actcache.study.part import Part

pytestmark = pytest.mark.slow

# Jobs of its own, those of whole checkpoints in two steps, and no others.
ANALYSES = ("map", "continuation", "forced")


@pytest.fixture(scope="module")
def captured(tiny_run):
    return tiny_run("llama", torch.float32, *SEGMENTS)


@pytest.fixture(scope="module")
def whole(captured, tmp_path_factory):
    folder = fresh(captured, tmp_path_factory.mktemp("whole") / "run")
    assert main(["grid", str(folder), "--strict"]) == 0
    for name in ANALYSES:
        assert main([name, str(folder)]) == 0
    return folder


def test_parts_of_every_stage_give_the_bytes_of_one_command(captured, whole, tmp_path, capsys):
    folder = fresh(captured, tmp_path / "run")
    for part in ("3/3", "1/3"):
        assert main(["grid", str(folder), "--strict", "--part", part]) == 0
        assert f"part {part} is done" in capsys.readouterr().err
        assert not (folder / "cells.parquet").exists()
    assert main(["grid", str(folder), "--strict", "--part", "1/3"]) == 0  # again: nothing is left of it
    assert "no replays are missing" not in (err := capsys.readouterr().err)
    assert "jobs of other parts are not" in err
    assert main(["grid", str(folder), "--strict", "--part", "2/3"]) == 0  # it finds the others' results
    assert (folder / "cells.parquet").read_bytes() == (whole / "cells.parquet").read_bytes()
    before = json.loads((folder / "timings.json").read_text())["content"] if (folder / "timings.json").exists() else {}
    assert "grid" not in before
    for name in ANALYSES:
        for part in ("2/2", "1/2", "2/2"):  # the last time, for those that wait for what others write
            assert main([name, str(folder), "--part", part]) == 0
    assert results(folder) == results(whole)


def test_a_part_runs_its_own_segments_whatever_is_finished(captured, tmp_path, monkeypatch):
    folder, ran = fresh(captured, tmp_path / "run"), []
    write = runner.write_result

    def note(folder, key, *more):
        ran.append(key["segment"])
        write(folder, key, *more)

    monkeypatch.setattr(runner, "write_result", note)
    names = [segment.name for segment in captured.store.segments]
    assert len(names) == 3
    assert main(["grid", str(folder), "--strict", "--part", "2/2", "--boundary", "3"]) == 0
    assert set(ran) == {names[1]}
    ran.clear()
    assert main(["grid", str(folder), "--strict", "--part", "2/2"]) == 0
    assert sorted(ran) == [names[1]] * 2  # at the other boundary, one per late stack
    ran.clear()
    assert main(["grid", str(folder), "--strict"]) == 0  # without a part: all that is left
    assert set(ran) == {names[0], names[2]}


def test_a_study_goes_by_parts(captured, whole, tmp_path, capsys):
    folder = fresh(captured, tmp_path / "run")
    assert main(["grid", str(folder), "--strict"]) == 0
    for part in ("1/2", "2/2"):
        assert main(["study", str(folder), "--only", "map", "--part", part]) == 0
    assert "map: part 1/2 is done" in capsys.readouterr().err
    assert (folder / "map.json").read_bytes() == (whole / "map.json").read_bytes()
    assert (folder / "report.html").exists()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_every_job_is_of_one_part(captured, n):
    from actcache.analyses.grid import GridSettings, jobs_left

    store = captured.store
    jobs = jobs_left(store, {}, GridSettings((2, 3), readouts=("native",)))
    dealt = [Part(i, n).own(jobs, store) for i in range(n)]
    assert sorted(str(job.key) for part in dealt for job in part) == sorted(str(job.key) for job in jobs)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= len(jobs) // len(store.segments)


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b"])
def test_a_part_that_is_none_is_refused(captured, part, capsys):
    with pytest.raises(SystemExit):
        main(["depth", str(captured.out), "--part", part])
    assert "is not I/N" in capsys.readouterr().err
