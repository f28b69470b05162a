"""Two real processes on one run compute each segment and each job once, and leave the bytes that one process leaves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from conftest import MAX_NEW
from forked import Process
from shared import CANARIES

import actcache
from actcache.cli import main
from actcache.store.patience import Patience
from actcache.store.storage import open_storage

pytestmark = pytest.mark.slow

# Notes what is computed, and holds the first unit of each stage until the other process has one of that stage, too.
COUNTED = """
import os, pathlib, sys, time
from actcache.cli import main
from actcache.study import capture
from actcache.study.capture_job import CaptureJob
from actcache.study.replay_job import ReplayJob

notes, number, words = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
capture.TOGETHER = 4  # one segment


def meet(what):
    (notes / f"{what}-{number}").touch()
    until = time.monotonic() + 120
    while not (notes / f"{what}-{1 - number}").exists() and time.monotonic() < until:
        time.sleep(0.01)


def counted(kind, method):
    of = getattr(kind, method)

    def act(job, *args):
        with open(notes / f"computed-{number}", "a") as file:
            print(kind.__name__, job.segment, getattr(job, "late", ""), file=file)
        meet(kind.__name__)
        return of(job, *args)

    setattr(kind, method, act)


counted(CaptureJob, "steps")
counted(ReplayJob, "run")
sys.exit(main(words))
"""


def command(pair: list[Path], prompts: Path, out: object) -> list[str]:
    words = ["run", "--pt", *pair[:1], "--it", *pair[1:], "--prompts", prompts, "--out", out, "--shard-prompts", 4]
    return [str(word) for word in [*words, "--max-new", MAX_NEW, "--boundary", "2", "--stability", 0]]


def two_at_once(notes: Path, words: list[str]) -> list[Counter[str]]:
    """Run a command in two processes; what each computed."""
    notes.mkdir()
    children = [
        Process(
            [sys.executable, "-c", COUNTED, str(notes), str(number), *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for child in children:
        _, said = child.communicate(timeout=600)
        assert child.returncode == 0, said
    return [Counter((notes / f"computed-{number}").read_text().splitlines()) for number in range(2)]


def check_shared(computed: list[Counter[str]], n_segments: int) -> None:
    """Each did something of each stage, and nothing was done twice."""
    for own in computed:
        assert {line.split()[0] for line in own} == {"CaptureJob", "ReplayJob"}
    together = computed[0] + computed[1]
    assert set(together.values()) == {1}, together
    kinds = Counter(line.split()[0] for line in together)
    assert kinds == {"CaptureJob": n_segments, "ReplayJob": 2 * n_segments}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    pair, prompts = tiny.make_pair(folder, "llama"), tiny.write_prompts(folder / "prompts.jsonl", 8)
    assert main(command(pair, prompts, folder / "run")) == 0
    return pair, prompts, folder / "run"


def files_of(place: str | Path) -> dict[str, bytes]:
    """Every file of a run but what the stages took: by its path, on a disk or an object store."""
    storage = open_storage(place)
    return {path: storage.read(path, at_most=None) for path in storage.sizes("") if path != "timings.json"}


def check_same(found: dict[str, bytes], alone: dict[str, bytes]) -> None:
    """The same files; the same bytes, but of those that hold the command, or a name drawn by chance."""
    assert {unnamed(path) for path in found} == {unnamed(path) for path in alone}
    of_path = {unnamed(path): data for path, data in found.items()}
    for path, data in alone.items():
        if path not in ("run.json", "report.html") and "/commits/" not in path:
            assert of_path[unnamed(path)] == data, path


def unnamed(path: str) -> str:
    """Without the token of a segment's folder on an object store."""
    return re.sub(r"(segments/[^/.]+)\.[0-9a-f]{12}/", r"\1/", path)


def test_two_processes_share_a_run_on_a_disk(reference, tmp_path):
    pair, prompts, alone = reference
    check_shared(two_at_once(tmp_path / "notes", command(pair, prompts, tmp_path / "run")), 2)
    check_same(files_of(tmp_path / "run"), files_of(alone))


def test_two_processes_share_a_run_on_an_object_store(reference, tmp_path, s3):
    pair, prompts, alone = reference
    place = f"{s3}/two/run"
    check_shared(two_at_once(tmp_path / "notes", command(pair, prompts, place)), 2)
    check_same(files_of(place), files_of(alone))


def test_a_run_on_an_object_store_is_that_of_a_disk(reference, s3, tmp_path, capfd):
    """Every stage and reader; what the disk's run says of its folder, this one says of its address. No credential is
    written or said."""
    pair, prompts, alone = reference
    alone, place = shutil.copytree(alone, tmp_path / "run"), f"{s3}/one/run"
    capfd.readouterr()
    assert main(command(pair, prompts, place)) == 0
    told = capfd.readouterr()
    assert told.out.endswith(f"Report: {place}/report.html\n")
    check_same(files_of(place), files_of(alone))
    said, told = [], "".join(told)
    for run in (alone, place):
        for words in (["depth"], ["forced", "--max-new", "2"], ["effects"]):
            assert main([*words, str(run), "--json"]) == 0
        for words in (["grid", "--scope", "position"], ["report"], ["inspect"], ["verify"]):
            assert main([words[0], str(run), *words[1:]]) == 0
        out, err = capfd.readouterr()
        said.append(out.replace(str(run), "RUN"))
        told += out + err
    assert said[0] == said[1]
    check_same(files_of(place), files_of(alone))

    of_disk, far = actcache.Run(alone), actcache.Run(place)
    assert far.cells.equals(of_disk.cells)
    assert far.effects.equals(of_disk.effects)
    final = {"upstream": "pt", "late": "it"}
    assert torch.equal(far.final(**final), of_disk.final(**final))

    assert main(["report", f"{s3}/none"]) == 2
    nobody = mock.patch.dict(os.environ, AWS_ENDPOINT_URL="http://127.0.0.1:9")
    with nobody, mock.patch("actcache.store.objects.Patience", return_value=Patience(total_s=0)):
        assert main(["report", place]) == 2
    told += "".join(capfd.readouterr())
    assert "127.0.0.1:9" in told
    assert [canary for canary in CANARIES if canary in told] == []
    assert [path for path, data in files_of(place).items() for canary in CANARIES if canary.encode() in data] == []
