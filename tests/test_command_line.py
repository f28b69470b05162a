"""The command line by itself: what was probably meant, pipes that close, Ctrl-C, no memory, paths that cannot be."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from forked import Process

from actcache.capture import forward
from actcache.cli import build_parser, main
from actcache.models.checkpoint import Checkpoint
from actcache.replay import late_stack as replay
from actcache.store import compact
from actcache.study import decisions

COMMAND = [sys.executable, "-m", "actcache.cli"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gird", "RUN"], "actcache: there is no verb 'gird'; did you mean grid?"),
        (["captrue", "--pt", "x"], "did you mean capture?"),
        (["frobnicate"], "there is no verb 'frobnicate'; 'actcache --help' lists what there is"),
        (["run", "--boundry", "5"], "actcache run: there is no option --boundry; did you mean --boundary?"),
        (["run", "--boundry=5", "--pt", "x"], "there is no option --boundry; did you mean --boundary?"),
        (["run", "--max_new", "5"], "did you mean --max-new?"),
        (["grid", "RUN", "--scopes", "prefix"], "did you mean --scope?"),
        (["effects", "RUN", "--jsno"], "did you mean --json?"),
        (["export", "S", "--too", "npy"], "did you mean --to?"),
        (["run", "--bogus", "3"], "there is no option --bogus; 'actcache run --help' lists what there is"),
        (["verify", "S", "--zzzzzz"], "there is no option --zzzzzz; 'actcache verify --help' lists what there is"),
        (["run", "--pt", "x"], "the following arguments are required: --out"),
        (["run", "--max-new", "x"], "argument --max-new: 'x' is not a whole number from 1 on"),
        (["run", "--max-new", "9" * 5000], "is not a whole number from 1 on"),
        (["run", "--stability", "some"], "argument --stability: 'some' is not a whole number from 1 on"),
        (["run", "--dtype", "float23"], "argument --dtype: invalid choice: 'float23'"),
        (["export", "S", "--boundary", "a"], "'a' is not a list of whole numbers, such as 5,10, nor all"),
        (["plan", "--event-share", "half"], "argument --event-share: 'half' is not a number"),
        (["plan", "--shared-tokens", "x"], "argument --shared-tokens: 'x' is not a number"),
    ],
)
def test_a_command_that_is_none_is_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    err = capsys.readouterr().err
    assert caught.value.code == 2
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "given", [["--boundary", "-3,-1"], ["--boundary=-3,-1"], ["--boundary", "-.5"], ["--boun", "-3"]]
)
def test_a_list_may_begin_with_a_minus(given):
    args = build_parser().parse_args(["grid", "RUN", *given, "--quiet"])
    assert args.boundary == given[-1].partition("=")[2] or args.boundary == given[-1]
    assert args.quiet


def test_a_prefix_of_an_option_is_enough(capsys):
    assert main(["verify", "/nowhere", "--rep"]) == 2
    assert "is not a store" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("words", [["inspect"], ["inspect", "--json"], ["effects"], ["effects", "--json"], ["--help"]])
def test_a_reader_that_goes_is_no_error(tiny_run, words):
    """As 'actcache inspect RUN | head -1' does, whose reader has what it wants."""
    given = [*COMMAND, *words, *([] if words == ["--help"] else [str(tiny_run("llama", torch.float32).out)])]
    ran = Process(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ran.stdout.close()
    err = ran.stderr.read()
    notes = ("next:", "see them as a hint")  # of effects; nothing is said of the reader
    assert (ran.wait(), [line for line in err.splitlines() if not any(note in line for note in notes)]) == (0, [])


@pytest.mark.slow
def test_progress_whose_reader_goes(tiny_run, tmp_path):
    """2>&1 | head: the command ends, and without a traceback anywhere."""
    reading, writing = os.pipe()
    ran = Process([*COMMAND, "verify", str(tiny_run("llama", torch.float32).out)], stdout=writing, stderr=writing)
    os.close(writing)
    os.close(reading)
    assert ran.wait() == 0


@pytest.mark.slow
def test_another_broken_pipe_is_an_error(tiny_run, monkeypatch, capsys):
    def fail(*args):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("actcache.store.open_store", fail)
    assert main(["inspect", str(tiny_run("llama", torch.float32).out / "store")]) == 2
    assert "Broken pipe" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_is_one_line(tmp_path):
    command = [*COMMAND, "demo", "--out", str(tmp_path / "run")]
    ran = Process(command, stderr=subprocess.PIPE, text=True)
    said = ran.stderr.readline()
    while said and "capture" not in said:
        said = ran.stderr.readline()
    ran.send_signal(signal.SIGINT)
    err = ran.stderr.read()
    assert ran.wait() == 130
    assert "actcache: interrupted; what is committed stays" in err
    assert "Traceback" not in err


KINDS = {
    "Python's": MemoryError(),
    "torch's on a device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    "torch's on the CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 1152921504606846976 bytes. Error code 12 (Cannot allocate memory)"
    ),
}
# What fails, in which module, under which command, and what needs less.
PLACES = {
    "loading": (Checkpoint, "load", "capture", "actcache: loading pt: out of memory", "--dtype bfloat16"),
    "capture": (forward, "forward_and_gather", "capture", "actcache: capture: out of memory", "--max-tokens"),
    "grid": (replay.LateStack, "replay", "grid", "actcache: grid: out of memory", "--max-tokens"),
    "grid, loading": (replay.LateStack, "load", "grid", "loading pt from block 3 on: out of memory", "--boundary"),
    "stability": (decisions, "_choose", "stability", "actcache: stability: out of memory", "--max-tokens"),
    "compact": (compact, "merge", "compact", "actcache: compact: out of memory", "--max-mb"),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_no_memory_is_one_line(tiny_run, tmp_path, monkeypatch, capsys, place):
    whose, name, verb, said, advice = PLACES[place]
    run = tiny_run("llama", torch.float32)
    out = tmp_path / "run"
    words = [*run.arguments("capture"), "--shard-prompts", "12"]
    words[words.index("--out") + 1] = str(out)
    if verb != "capture":
        assert main(words) == 0
        words = [verb, str(out)]
    module = sys.modules["actcache.store.compact"] if whose is compact else whose
    for kind, error in KINDS.items():

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(module, name, fail)
        capsys.readouterr()
        assert main(words) == 2, kind
        err = capsys.readouterr().err
        assert said in err
        assert advice in err
        assert "Traceback" not in err
    monkeypatch.undo()
    assert main(words) == 0


def test_the_message_of_torch_is_the_one_looked_for():
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_other_errors_of_torch_stay_what_they_are():
    from actcache.cli.memory import enough_memory

    with pytest.raises(RuntimeError, match="size mismatch"), enough_memory("grid", "less"):
        raise RuntimeError("size mismatch")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="/proc, where no folder can be made")
def test_a_path_that_cannot_be_made_is_one_line(tiny_run, tmp_path, capsys):
    run = tiny_run("llama", torch.float32)
    (tmp_path / "file").write_text("x")
    made = shutil.copytree(run.out, tmp_path / "made")
    pair = run.arguments("capture")[1:7]
    commands = {
        "capture": lambda out: ["capture", *pair, "--out", out],
        "run": lambda out: ["run", *pair, "--out", out],
        "plan": lambda out: ["plan", *pair, "--rate", "1e9", "--out", out],
        "export": lambda out: ["export", str(made), "--to", "npy", "--out", out],
        "bench": lambda out: ["bench", "gather", "--smoke", "--out", out],
        "demo": lambda out: ["demo", "--out", out],
    }
    for verb, command in commands.items():
        for out in ("/proc/nowhere/RUN", str(tmp_path / "file" / "RUN"), str(tmp_path / ("x" * 300))):
            if verb == "bench" and "xxx" in out:
                continue  # a file there is none before it is written
            capsys.readouterr()
            assert main(command(out)) == 2, (verb, out)
            err = capsys.readouterr().err
            said = [line for line in err.splitlines() if line.startswith("actcache: ")]
            assert len(said) == 1, err
            assert "Traceback" not in err
    assert not [path for path in tmp_path.iterdir() if path not in (tmp_path / "file", made)]
