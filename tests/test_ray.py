"""Jobs on a Ray cluster give what one process gives, byte for byte, whatever dies meanwhile.

One cluster of this machine and its two workers serve the whole file. Skipped where Ray is absent.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import forked
import pytest
import torch
from same import SEGMENTS, fresh, results

import actcache
from actcache.analyses.grid import GridSettings, run_grid
from actcache.cli import main
from actcache.errors import CheckError, InputError
from actcache.models.lineup import Lineup
from actcache.progress import Progress
from actcache.prompts import read_prompts
from actcache.study.capture import capture
from actcache.study.cells import publish_cells
from actcache.study.cluster import Cluster, imported
from actcache.study.engine import nothing_given
from actcache.study.finished import settings_of
from actcache.study.holding import Holding
from actcache.study.worker import Answer, Worker, device_is_lost

pytestmark = pytest.mark.slow

ANALYSES = ("map", "continuation")
OF_RAY = (b"raylet", b"gcs_server", b"/ray/_private/", b"/ray/autoscaler/", b"/ray/dashboard/")
FEW = {"dtype": "float32", "sample": "2"}
BOTH = {"boundaries": (2, 3), "strict": True}


class Steered(Worker):
    """A worker that does what a file beside the run says of some jobs, once or always."""

    def _run(self, stage, jobs, first, kept):
        steer = Path(stage.run).parent / "steer.json"
        said = json.loads(steer.read_text()) if steer.exists() else {}
        for number, (what, segment, boundary, late) in enumerate(said.get("jobs", ())):
            if (jobs[0].segment, jobs[0].boundary, jobs[0].late) == (segment, boundary, late):
                once = steer.with_name(f"done-{number}")
                if what == "raise":
                    raise ValueError("this one is poison")
                if what == "cuda" and not once.exists():
                    once.touch()
                    raise RuntimeError("CUDA error: an illegal memory access was encountered")
        go = steer.with_name("go")
        while "hold" in said and not go.exists() and random.random() < said["hold"]:
            while not go.exists():
                time.sleep(0.05)
        return super()._run(stage, jobs, first, kept)


class SteeredCluster(Cluster):
    worker = Steered


@pytest.fixture(scope="module")
def workers():
    """A cluster that is begun as a command begins one, of two workers; it leaves no process and no port."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    imported(None)  # as a command does: at once, Ray reads where it shall listen
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    before = of_ray()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps({"GPU": 4}))  # nobody uses them
        cluster = SteeredCluster("none", Holding(), workers=2)
        cluster.begin()
        yield cluster
        assert open_to_others(of_ray() - before) == []
        cluster.close()
    assert left(lambda: of_ray() - before) == set()


@pytest.fixture(scope="module")
def captured(tiny_run):
    return tiny_run("llama", torch.float32, *SEGMENTS)


@pytest.fixture(scope="module")
def whole(captured, tmp_path_factory):
    folder = fresh(captured, tmp_path_factory.mktemp("whole") / "run")
    assert main(["grid", str(folder), "--strict"]) == 0
    for name in ANALYSES:
        assert main([name, str(folder)]) == 0
    actcache.Run(folder).analyse("stability", **FEW)
    return folder


def of_ray() -> set[int]:
    """Processes of Ray."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes()
            if words.startswith(b"ray::") or any(name in words for name in OF_RAY):
                found.add(int(path.parts[2]))
    return found - {os.getpid()}


def actors() -> list[int]:
    """Processes of workers that are there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::Actor"):
                found.append(int(path.parts[2]))
    return found


def open_to_others(pids) -> list[str]:
    """Addresses other than loopback at which processes listen."""
    sockets = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            sockets |= {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    found = []
    for table, loopback in (("tcp", ("0100007F",)), ("tcp6", ("0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F"))):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets and local.split(":")[0] not in loopback:
                found.append(local)
    return found


def left(of, seconds=30.0):
    """What is left after a while, if it does not end before."""
    end = time.monotonic() + seconds
    while (found := of()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def on(workers, folder, **more):
    """The workers, for this run."""
    workers._run, workers._holding = str(folder), Holding(**more)
    workers._say = lambda line: None
    return workers


def grid(workers, folder, told=lambda progress: None):
    """As the command does."""
    store = actcache.Run(folder).store
    at = folder / "cells"
    run_grid(store, nothing_given, at, GridSettings(**BOTH), runner=on(workers, folder), on_progress=told)
    publish_cells(folder / "cells.parquet", at, store, strict=True, max_tokens=None)


def test_every_stage_gives_the_bytes_of_one_process(captured, whole, workers, tmp_path):
    folder = fresh(captured, tmp_path / "run")
    shutil.rmtree(folder / "store")
    lineup = Lineup.open({"pt": captured.pt, "it": captured.it})
    prompts = read_prompts(captured.prompts, 6)
    told: list[Progress] = []
    how = {"elsewhere": on(workers, folder), "on_progress": told.append}
    searched = capture(lineup, prompts, folder / "store", settings_of(captured.store), **how)
    assert searched.n_sequences == 6
    assert (told[-1].done, told[-1].total) == (6, 6)
    assert told[-1].doing == "2 workers alive, 0 requeued"
    store = folder / "store"
    names = sorted(str(path.relative_to(store)) for path in store.rglob("*") if path.is_file())
    here = captured.out / "store"
    assert names == sorted(str(path.relative_to(here)) for path in here.rglob("*") if path.is_file())
    assert all((store / name).read_bytes() == (here / name).read_bytes() for name in names)
    grid(workers, folder)
    run = actcache.Run(folder)
    run.runner = workers
    for name in ANALYSES:
        run.analyse(name)
    assert run.analyse("stability", **FEW)["groups"][0]["n_events"] == 2  # which has no jobs to share
    assert results(folder) == results(whole)


def kill_at_random(workers, folder, n, seed):
    """A grid during which workers are killed n times."""
    chance, killed = random.Random(seed), []
    steer = folder.parent / "steer.json"
    steer.write_text(json.dumps({"hold": 0.5}))

    def kill():
        while len(killed) < n:
            there = [pid for pid in actors() if pid not in killed]
            if there:
                killed.append(chance.choice(there))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(killed[-1], signal.SIGKILL)
            time.sleep(chance.uniform(0.0, 0.3))
        (folder.parent / "go").touch()

    killer = threading.Thread(target=kill)
    killer.start()
    told: list[Progress] = []
    try:
        grid(workers, folder, told.append)
    finally:
        killer.join()
        steer.unlink()
    assert len(killed) == n
    return told


@pytest.mark.parametrize("n", [5, pytest.param(50, marks=pytest.mark.deep)])
def test_workers_killed_at_random_lose_nothing(captured, whole, workers, tmp_path, n):
    folder = fresh(captured, tmp_path / "run")
    told = kill_at_random(workers, folder, n, seed=n)
    assert told[-1].done == told[-1].total
    assert (folder / "cells.parquet").read_bytes() == (whole / "cells.parquet").read_bytes()
    names = sorted(path.name for path in (folder / "cells").iterdir())
    assert all((folder / "cells" / name).read_bytes() == (whole / "cells" / name).read_bytes() for name in names)


def test_a_poison_job_does_not_stop_the_others_and_a_lost_device_its_worker(captured, whole, workers, tmp_path):
    folder = fresh(captured, tmp_path / "run")
    names = [segment.name for segment in captured.store.segments]
    steer = {"jobs": [["raise", names[1], 3, "it"], ["cuda", names[0], 2, "pt"]]}
    (tmp_path / "steer.json").write_text(json.dumps(steer))
    before = set(actors())
    with pytest.raises(CheckError, match=r"1 of 12 jobs failed again and again, all others are finished: b003-"):
        grid(workers, folder)
    assert (tmp_path / "done-1").exists()
    assert len(before - {*actors()}) == 1  # the worker whose device was lost has left its process
    there = {path.name for path in (folder / "cells").glob("*.parquet")}
    (missing,) = {path.name for path in (whole / "cells").glob("b00*prefix*.parquet")} - there
    assert missing.startswith(f"b003-prefix-{names[1]}")
    (tmp_path / "steer.json").unlink()
    grid(workers, folder)  # once the reason is gone
    assert (folder / "cells.parquet").read_bytes() == (whole / "cells.parquet").read_bytes()


def test_a_driver_that_is_killed_goes_on_where_it_stopped(captured, whole, workers, tmp_path):
    import ray

    folder = fresh(captured, tmp_path / "run")
    address = ray.get_runtime_context().gcs_address
    before = {*actors()}
    words = ["grid", str(folder), "--strict", "--engine", "ray", "--address", address, "--workers", "1"]
    with forked.Process([sys.executable, "-m", "actcache.cli", *words]) as driver:
        while not list((folder / "cells").glob("*.parquet")):
            assert driver.poll() is None
            time.sleep(0.02)
        driver.kill()
    assert left(lambda: {*actors()} - before) == set()  # its workers end with it
    grid(workers, folder)
    assert (folder / "cells.parquet").read_bytes() == (whole / "cells.parquet").read_bytes()


def test_workers_of_several_gpus_are_in_groups_that_are_removed(workers):
    import ray
    from ray.util import placement_group_table

    cluster = Cluster("none", Holding("cuda:0,cuda:1"))
    cluster.begin()
    assert (cluster._shape.n, cluster._shape.n_gpus, cluster._shape.device) == (2, 2, "cuda:0,cuda:1")
    made = [group.id.hex() for group in cluster._groups]
    assert len(made) == 2
    cluster.close()
    assert ray.is_initialized()  # it was there before
    assert left(lambda: [one for one in made if placement_group_table()[one]["state"] != "REMOVED"]) == []


def test_the_bench_at_a_small_size(workers, monkeypatch, capsys):
    from ray import cloudpickle

    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benches")
    bench = importlib.import_module("bench_scale")
    cloudpickle.register_pickle_by_value(bench)
    assert bench.main(["--smoke"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["simulated"]["16 workers"]["share"] >= 0.95
    assert found["overhead"].keys() == {"job_s", "local_s", "ray_s", "share", "empty_job_s"}
    assert 0 < found["workers"]["2"] <= 1


# ---- without a cluster ----


@pytest.mark.parametrize(
    ("device", "asked", "found"),
    [
        ("cpu", None, ("cpu", 0, 3)),
        ("cpu", 8, ("cpu", 0, 8)),
        ("auto", None, ("cuda", 1, 8)),
        ("cuda", 5, ("cuda", 1, 5)),
        ("cuda:1,cuda:3", None, ("cuda:0,cuda:1", 2, 4)),
    ],
)
def test_there_is_a_worker_for_each_gpu_or_group_of_them(device, asked, found):
    cluster = Cluster("none", Holding(device), workers=asked)
    shape = cluster._shape_of({"GPU": 8.0, "CPU": 64.0}, 3)
    assert (shape.device, shape.n_gpus, shape.n) == found
    assert shape.threads >= 1


def test_too_few_gpus_are_named():
    with pytest.raises(InputError, match="a worker takes 2 GPUs, and the cluster has 1; use --device cpu"):
        Cluster("none", Holding("cuda:0,cuda:1"))._shape_of({"GPU": 1.0}, 1)


def test_ray_that_is_absent_is_named(captured, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    folder = fresh(captured, tmp_path / "run")
    assert main(["grid", str(folder), "--engine", "ray"]) == 2
    assert "pip install 'actcache[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workers", "2"], "--workers is of --engine ray"),
        (["--address", "auto"], "--address is of --engine ray"),
        (["--engine", "ray", "--part", "1/2"], "shares the jobs by itself: leave out --part"),
    ],
)
def test_options_that_contradict_are_refused(captured, words, said, capsys):
    assert main(["map", str(captured.out), *words]) == 2
    assert said in capsys.readouterr().err


def test_only_an_error_of_the_device_loses_it():
    assert device_is_lost(RuntimeError("CUDA error: device-side assert triggered"))
    assert not device_is_lost(torch.OutOfMemoryError("CUDA out of memory"))
    assert not device_is_lost(RuntimeError("shapes do not fit"))


def test_a_worker_whose_device_is_lost_takes_nothing_more():
    worker = Worker(1)

    def refuse():
        raise RuntimeError("CUDA error: an illegal memory access")

    assert worker._answer(refuse).is_lost
    assert worker._answer(lambda: Answer(5)).is_lost  # it is not run
