"""CPUs: quotas of both kinds of cgroups, threads that sleep while they wait, and a number of threads that is heeded."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from actcache.cpus import quota, usable_cpus


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("200000 100000", 2.0), ("150000 100000\n", 1.5), ("max 100000", math.inf), ("", math.inf), ("1 0", math.inf)],
)
def test_a_quota_of_version_2(tmp_path, text, expected):
    write(tmp_path / "self", "0::/a/b\n")
    write(tmp_path / "groups/a/b/cpu.max", text)
    assert quota(tmp_path / "self", tmp_path / "groups") == expected


@pytest.mark.parametrize(("most", "expected"), [("350000", 3.5), ("-1", math.inf)])
@pytest.mark.parametrize("mounted_at", ["cpu,cpuacct", "cpu"])
def test_a_quota_of_version_1(tmp_path, most, expected, mounted_at):
    write(tmp_path / "self", "3:memory:/m\n4:cpu,cpuacct:/a\n0::/\n")
    for name, value in (("quota", most), ("period", "100000")):
        write(tmp_path / f"groups/{mounted_at}/a/cpu.cfs_{name}_us", f"{value}\n")
    assert quota(tmp_path / "self", tmp_path / "groups") == expected


def test_groups_that_contain_a_group_limit_it_too(tmp_path):
    write(tmp_path / "self", "0::/a/b/c\n")
    write(tmp_path / "groups/a/cpu.max", "100000 100000")
    write(tmp_path / "groups/a/b/cpu.max", "400000 100000")
    write(tmp_path / "cpu.max", "1000 100000")  # not a group: above what is mounted
    assert quota(tmp_path / "self", tmp_path / "groups") == 1.0


def test_a_container_that_sees_its_own_group_only(tmp_path):
    write(tmp_path / "self", "0::/of/the/host\n")
    write(tmp_path / "groups/cpu.max", "300000 100000")
    assert quota(tmp_path / "self", tmp_path / "groups") == 3.0


def test_no_groups_at_all(tmp_path):
    assert quota(tmp_path / "none", tmp_path) == math.inf


def test_cpus_that_this_process_is_bound_to():
    assert 1 <= usable_cpus() <= len(os.sched_getaffinity(0))


SHOW = """
import json, os, sys
from actcache.cpus import settle_threads, usable_cpus
import actcache.cpus
if len(sys.argv) > 2:
    actcache.cpus.usable_cpus = lambda: int(sys.argv[2])
    os.cpu_count = lambda: 64
settle_threads(json.loads(sys.argv[1]))
assert "torch" not in sys.modules
import torch
print(json.dumps([torch.get_num_threads(), os.environ["OMP_WAIT_POLICY"]]))
"""


def shown(*arguments: str, **environment: str) -> list[object]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))}
    command = [sys.executable, "-c", SHOW, *arguments]
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True, env=clean | environment).stdout
    )


@pytest.mark.slow
def test_threads_sleep_and_are_as_many_as_asked_for():
    assert shown("1") == [1, "PASSIVE"]


@pytest.mark.slow
def test_a_quota_gives_fewer_threads():
    assert shown("null", "1") == [1, "PASSIVE"]


@pytest.mark.slow
def test_what_the_environment_says_stays():
    assert shown("null", "1", OMP_NUM_THREADS="2", OMP_WAIT_POLICY="ACTIVE") == [2, "ACTIVE"]


@pytest.mark.slow
def test_a_number_asked_for_goes_before_the_environment():
    assert shown("1", OMP_NUM_THREADS="2") == [1, "PASSIVE"]
