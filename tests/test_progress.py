"""Progress: every stage tells its steps as it makes them, and one line on stderr shows them."""

from __future__ import annotations

import io
import itertools
import re
import shutil
import time
from types import SimpleNamespace

import pytest
import torch

from actcache.analyses import stability
from actcache.cli import main, terminal
from actcache.cli.terminal import LiveLine, say
from actcache.progress import Progress, Tally
from actcache.store import compact, verify


class Clock:
    """Stands for the time module; a second passes when told."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(terminal, "time", clock)
    return clock


class Terminal(io.StringIO):
    """A stderr that is one, with a file number that has no size."""

    def isatty(self):
        return True

    def fileno(self):
        return 2

    def shown(self):
        """What stands on it now: the lines that are over, and the one that lives."""
        *over, last = self.getvalue().split("\n")
        return [line.rpartition("\x1b[K")[2] for line in over], last.rpartition("\x1b[K")[2]


@pytest.fixture
def tty(monkeypatch, clock):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(terminal.os, "get_terminal_size", lambda number: terminal.os.terminal_size((100, 24)))
    monkeypatch.setattr(terminal, "sys", SimpleNamespace(stderr=(stream := Terminal())))
    return stream


def test_a_tally_tells_every_step():
    told = []
    tally = Tally(8, "prompts", told.append)
    tally.add(found=3)
    tally.add(tokens=7, doing="searching")
    tally.add(2, tokens=1)
    assert told == [
        Progress(0, 8, "prompts"),
        Progress(3, 8, "prompts", found=3),
        Progress(3, 8, "prompts", found=3, tokens=7, doing="searching"),
        Progress(5, 8, "prompts", found=3, tokens=8),
    ]


def test_what_was_found_done_says_nothing_of_the_rate(tty, clock):
    """30 of 40 were there; ten seconds a piece for the rest, of which loading took five."""
    with LiveLine("capture") as line:
        tally = Tally(40, "prompts", line)
        tally.add(found=30)
        assert "left" not in line.line()
        with line.during("loading pt"):
            clock.now_s += 5
            assert line.line() == "capture: loading pt, 30 of 40 prompts (30 of them before), 0:05"
        clock.now_s += 20
        tally.add(2, tokens=400, doing="searching: step 3 of at most 8, 1 still alike")
        assert line.line() == (
            "capture: 32 of 40 prompts (30 of them before), 0:25, about 1:20 left, "
            "searching: step 3 of at most 8, 1 still alike, 400 tokens, 20 tokens a second"
        )
        tally.add(8)
        clock.now_s += 5
    over, lives = tty.shown()
    assert over[-1:] == [
        "capture: 40 of 40 prompts (30 of them before), 400 tokens, 16 tokens a second, took 0:30, "
        "0:05 of it loading, which the rate leaves out"
    ]
    assert lives == ""


def test_the_line_lives_while_nothing_is_told(tty, clock, monkeypatch):
    monkeypatch.setattr(terminal, "_REDRAW_S", 0.01)
    with LiveLine("grid") as line, line.during("loading it"):
        clock.now_s = 61
        for _ in range(500):
            if "loading it, 1:01" in tty.getvalue():
                break
            time.sleep(0.01)
    assert "grid: loading it, 1:01" in tty.getvalue()


def test_a_note_stands_above_the_line(tty, clock):
    with LiveLine("grid") as line:
        line(Progress(1, 2, "replays"))
        say("padded sequences, not packed")
        clock.now_s += 1
        line(Progress(2, 2, "replays"))
        over, lives = tty.shown()
    assert over == ["actcache: padded sequences, not packed"]
    assert lives == "grid: 2 of 2 replays, 0:01"


def test_the_line_fits_the_terminal(tty, clock):
    with LiveLine("capture") as line:
        clock.now_s += 1
        line(Progress(1, 2, "prompts", doing="x" * 200))
        assert len(tty.shown()[1]) == 99


def test_plain_lines_are_few(capsys, clock):
    """One after a second, one at the end, one in ten seconds between."""
    with LiveLine("capture") as line:
        tally = Tally(100, "prompts", line)
        for _ in range(100):
            clock.now_s += 0.25
            tally.add(1)
    err = capsys.readouterr().err
    assert "\r" not in err
    assert "\x1b" not in err
    lines = err.splitlines()
    assert [line.split(" prompts")[0] for line in lines] == [
        "capture: 4 of 100",
        "capture: 44 of 100",
        "capture: 84 of 100",
        "capture: 100 of 100",
    ]
    assert lines[-1].endswith("took 0:25")


def test_the_last_plain_line_is_not_said_twice(capsys, clock):
    """All is done at the very moment when a line is due; what is left to do then takes long, and that is said."""
    with LiveLine("capture") as line:
        tally = Tally(40, "prompts", line)
        for _ in range(40):
            clock.now_s += 0.25
            tally.add(1)
    assert [line for line in capsys.readouterr().err.splitlines() if "40 of 40" in line] == [
        "capture: 40 of 40 prompts, 4 prompts a second, took 0:10"
    ]
    with LiveLine("capture") as line:
        Tally(0, "prompts", line)
        clock.now_s += 11
        line._update()
    assert "capture: no prompts are missing, 0:11" in capsys.readouterr().err


def test_a_stage_that_fails_at_once_says_nothing(capsys, clock):
    def fail(line):
        Tally(40, "prompts", line)
        with line.during("loading pt"):
            clock.now_s += 0.9
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), LiveLine("capture") as line:
        fail(line)
    assert capsys.readouterr().err == ""


def test_what_needs_time_to_begin_says_so(capsys, clock):
    with LiveLine("capture") as line:
        clock.now_s += 1
        line._update()
    assert capsys.readouterr().err.splitlines()[0] == "capture: reading what it needs, 0:01"


def test_no_time_left_is_told_where_nobody_knows_how_many_rounds_are(clock, capsys):
    with LiveLine("capture") as line:
        tally = Tally(40, "prompts", line)
        clock.now_s += 20
        tally.add(10)
        assert "about 1:00 left" in line.line()
        tally.add(10, doing="pt: pass 3, block 2 of 30", in_rounds=True)
        assert line.line().startswith("capture: 20 of 40 prompts, 0:20, pt: pass 3, block 2 of 30")
        tally.add(found=10)
        assert "left" not in line.line()


def test_a_stage_that_fails_leaves_no_line_that_says_it_ended(capsys, clock):
    with pytest.raises(ZeroDivisionError), LiveLine("capture"):
        raise ZeroDivisionError
    assert "took" not in capsys.readouterr().err


@pytest.mark.slow
def test_quiet_is_silent_but_for_errors(tiny_run, tmp_path, capsys):
    run = tiny_run("llama", torch.float32)
    out = tmp_path / "run"
    capsys.readouterr()
    words = [*run.arguments(), "--stability", "4", "--quiet"]
    words[words.index("--out") + 1] = str(out)
    assert main(words) == 0
    for verb in (["grid", out], ["stability", out], ["verify", out], ["compact", out], ["effects", out]):
        assert main([*map(str, verb), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["grid", str(tmp_path / "none"), "--quiet"]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["verify", str(out)]) == 0
    assert "verify: " in capsys.readouterr().err, "the next command is not quiet"


@pytest.fixture
def told(monkeypatch):
    """Everything that the stages of a command tell, by stage."""
    by_stage = {}

    class Listener(LiveLine):
        def __call__(self, progress):
            by_stage.setdefault(self._stage, []).append(progress)
            super().__call__(progress)

    for module in ("stages", "analyses", "stores"):
        monkeypatch.setattr(f"actcache.cli.{module}.LiveLine", Listener)
    return by_stage


@pytest.mark.slow
def test_every_stage_tells_its_steps(tiny_run, tmp_path, told):
    """Counts grow, end at their total, and come more often than segments do; a second time, all is found done."""
    run = tiny_run("llama", torch.float32)
    told.clear()  # of what another test may have made before
    out = tmp_path / "run"
    words = [*run.arguments(), "--shard-prompts", "8"]
    words[words.index("--out") + 1] = str(out)
    assert main(words) == 0
    assert main(["verify", str(out)]) == 0
    assert main(["export", str(out), "--to", "npy", "--out", str(tmp_path / "npy")]) == 0
    assert told.keys() == {"capture", "stability", "grid", "verify", "export"}
    for stage, steps in told.items():
        for before, after in itertools.pairwise(steps):
            assert before.done <= after.done <= after.total == before.total, stage
            assert before.tokens <= after.tokens
        assert steps[-1].done == steps[-1].total > 0, stage
        assert steps[-1].found == 0, stage
    assert len(told["capture"]) > 3 * 3, "more than three times for each of three segments"
    searching = [step.doing for step in told["capture"] if step.doing]
    assert re.fullmatch(r"searching: step 1 of at most 24, \d+ still alike", searching[0])
    assert told["capture"][-1].tokens > run.store.events["position"].to_numpy().sum()

    told.clear()
    assert main(words) == 0
    for stage, steps in told.items():
        assert steps[-1].found == steps[-1].done == steps[-1].total, stage
        assert steps[-1].tokens == 0
    assert main(["compact", str(out)]) == 0
    assert [step.done for step in told["compact"]] == [0, 0, 3]


@pytest.mark.slow
def test_a_resumed_capture_knows_what_was_there(tiny_run, tmp_path, told):
    run = tiny_run("llama", torch.float32)
    out = tmp_path / "run"
    words = [*run.arguments("capture"), "--shard-prompts", "8"]
    words[words.index("--out") + 1] = str(out)
    assert main(words) == 0
    (out / "store" / "commits" / "shard-000001.json").unlink()
    shutil.rmtree(next((out / "store" / "segments").glob("shard-000001*")))
    told.clear()
    assert main(words) == 0
    steps = told["capture"]
    assert steps[1] == Progress(16, 24, "prompts", found=16)
    assert (steps[-1].done, steps[-1].found) == (24, 16)


@pytest.mark.slow
def test_a_library_call_needs_no_listener(tiny_run, tmp_path):
    run = tiny_run("llama", torch.float32)
    place = shutil.copytree(run.out / "store", tmp_path / "store")
    assert verify(place) == []
    assert compact(place) == (1, 1)
    told = []
    assert compact(place, on_progress=told.append) == (1, 1)
    assert told[-1] == Progress(1, 1, "segments", found=1)
    assert stability.n_decisions(3) == 12
