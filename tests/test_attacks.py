"""Every attack of ``attacks/`` ends in a named error, at once, within little memory, and changes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from attacks.content import carried_is_nested_just_too_deeply_to_write
from attacks.forger import Forger
from attacks.names import record_of_a_name_that_steers_the_terminal
from attacks.texts import record_nested_just_too_deeply_to_write, root_nested_just_too_deeply_to_write
from forked import Process
from stores import bits, make_fingerprint, make_segment, write_store

from actcache.cli import main
from actcache.errors import ActcacheError
from actcache.store import Store, StoreWriter, open_store, shard, verify
from actcache.store.export import export

ROOM_BYTES = 512 * 2**20  # what an attack may make a reader set aside
LIMIT_S = 10
ATTACKS = {
    f"{theme}.{name}": attack
    for theme in ("names", "texts", "shapes", "chunks", "content", "commits", "files")
    for name, attack in inspect.getmembers(importlib.import_module(f"attacks.{theme}"), inspect.isfunction)
    if attack.__module__ == f"attacks.{theme}" and not name.startswith("_")
}
# What may come of an attack is an answer, where the limits of the machine allow one.
MAY_PASS = {
    "texts.record_nested_just_too_deeply_to_write": "a key that is not read",
    "content.carried_is_nested_just_too_deeply_to_write": "a value like any other",
    "content.carried_keys_by_the_hundred_thousand": "columns like any other",
    "chunks.chunk_of_rubbish": "rows like any others: whoever forges the checksums chooses the bits",
}
# The table shows these columns as they are stored; what goes by them, rows and verify, does not believe them.
SHOWN = {name for name in ATTACKS if name.startswith("content.event_")}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fingerprint = make_fingerprint()
    segments = {
        "a": make_segment(fingerprint, [5, 9, 1], [(1, 8), (0, 2), (1, 8), (2, 0)], name="a", seed=1),
        "b": make_segment(fingerprint, [4, 6], [(1, 3)], name="b", seed=3),
    }
    with mock.patch.object(shard, "CHUNK_BYTES", 48):  # four rows: several chunks an array
        return write_store(tmp_path_factory.mktemp("pristine") / "store", fingerprint, segments)


@pytest.fixture
def forger(pristine: Path, tmp_path: Path) -> Forger:
    outside = tmp_path / "outside"
    shutil.copytree(pristine / "segments/a", outside / "segment")
    (outside / "secret").write_text("secret")
    return Forger(shutil.copytree(pristine, tmp_path / "store"), outside)


# ---- what is asked of a store that lies ----------------------------------------------------------------------------


def acts(path: Path, scratch: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Everything that a store can be asked; each answers with something to compare."""
    opened: list[Store] = []
    yield "open", lambda: opened.append(open_store(path))
    if opened:
        yield from reads(opened[0], scratch)
    for verb in ("inspect", "verify"):
        yield f"actcache {verb}", lambda verb=verb: main([verb, str(path)])


def reads(store: Store, scratch: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "events", lambda: digest(store.events.to_pylist())
    yield "excluded", lambda: digest(store.excluded.to_pylist())
    for label in ("pt", "it"):
        for b in (1, 2):
            yield f"states {label} {b}", lambda label=label, b=b: digest(*map(bits, store.states(label, b)))
        yield f"final {label}", lambda label=label: digest(bits(store.final(label)))
    yield "one event", lambda: digest(*map(bits, store.states("pt", 1, [0])))
    yield "token ids", lambda: digest(*map(bits, store.token_ids()))
    yield "uncommitted", lambda: store.uncommitted
    yield "export", lambda: export(store, scratch / "export", "safetensors")


def digest(*values: Any) -> str:
    return hashlib.sha256(pickle.dumps(values)).hexdigest()


def outcomes(path: Path, scratch: Path) -> dict[str, Any]:
    """By act, its answer, or the class and text of its error; what was going on when time or memory was over."""
    out, into = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(out)
        with open(into, "w", encoding="utf-8") as told, open(os.devnull, "w", encoding="utf-8") as nowhere:
            sys.stdout = sys.stderr = nowhere  # as strict about what it can print as a terminal or a file
            with open("/proc/self/statm", encoding="ascii") as stream:
                taken = int(stream.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM_BYTES, taken + ROOM_BYTES))
            for name, act in acts(path, scratch):
                signal.alarm(LIMIT_S)
                print(json.dumps([name, "over", f"more than {LIMIT_S} s, or a crash"]), file=told, flush=True)
                try:
                    outcome = ["answer", act()]
                except BaseException as error:
                    kind = "named" if isinstance(error, ActcacheError) else "unnamed"
                    outcome = [kind, f"{type(error).__name__}: {ascii(error)[:300]}"]
                print(json.dumps([name, *outcome]), file=told, flush=True)
        os._exit(0)
    os.close(into)
    with open(out, encoding="utf-8") as stream:
        found = {name: tuple(outcome) for name, *outcome in map(json.loads, stream)}
    os.waitpid(pid, 0)
    return found


def state_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Everything below a folder as it is, without opening anything."""
    found = {}
    for top, folders, files in os.walk(os.fsencode(folder)):
        for name in [*folders, *files]:
            stat = os.lstat(os.path.join(top, name))
            found[ascii(os.path.join(top, name))] = (stat.st_ino, stat.st_mode, stat.st_size, stat.st_mtime_ns)
    return found


# Each store is asked in a process of its own, forked from one that has done nothing but import this file and ask the
# pristine store: a fork copies a map of the memory that there is, which in pytest's process takes longer than to ask.
ASKING = """
import contextlib, functools, io, json, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[1])
import test_attacks
from actcache import cli
cli.build_parser = functools.cache(cli.build_parser)
test_attacks.open_store(Path(sys.argv[2])).events.to_pylist()  # what libraries set aside once is not the attack's
with contextlib.redirect_stdout(io.StringIO()):
    test_attacks.main(["inspect", sys.argv[2]])
for line in sys.stdin:
    print(json.dumps(test_attacks.outcomes(*map(Path, json.loads(line)))), flush=True)
"""


@pytest.fixture(scope="module")
def asked(pristine: Path) -> Iterator[Callable[[Path, Path], dict[str, Any]]]:
    """``asked(path, scratch)``: the outcomes by such a process."""
    command = [sys.executable, "-c", ASKING, json.dumps(sys.path), str(pristine)]
    with Process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def ask(path: Path, scratch: Path) -> dict[str, Any]:
            print(json.dumps([str(path), str(scratch)]), file=process.stdin, flush=True)
            return {name: tuple(outcome) for name, outcome in json.loads(process.stdout.readline()).items()}

        yield ask
        process.stdin.close()


@pytest.fixture(scope="module")
def truth(pristine: Path, asked: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return asked(pristine, tmp_path_factory.mktemp("scratch"))


def test_a_store_that_does_not_lie_passes(truth):
    assert len(truth) == 15
    assert {kind for kind, _ in truth.values()} == {"answer"}
    assert truth["actcache inspect"] == truth["actcache verify"] == ("answer", 0)


def test_a_forger_who_changes_nothing_is_believed(forger, asked, truth, tmp_path):
    """The tools themselves: what they write passes every check but those that an attack is for."""
    before = {file: file.read_bytes() for file in forger.path.rglob("*") if file.is_file()}
    forger.record(lambda r: None)
    forger.fingerprint(lambda f: None)
    forger.metadata("states/pt/b001", lambda m: None)
    forger.write_chunks("states/pt/b001", [chunk[:-4] for chunk in forger.chunks("states/pt/b001")])
    assert before == {file: file.read_bytes() for file in forger.path.rglob("*") if file.is_file()}
    forger.write_values("sequence_offsets", open_store(forger.path).segments[0].read("sequence_offsets"))
    assert asked(forger.path, tmp_path / "scratch") == truth


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name, forger, asked, truth, tmp_path):
    assert ATTACKS[name].__doc__
    ATTACKS[name](forger)
    before = state_of(forger.path), state_of(forger.outside)
    found = asked(forger.path, tmp_path / "scratch")
    assert (state_of(forger.path), state_of(forger.outside)) == before
    assert not [path for path in tmp_path.iterdir() if path.name not in ("store", "outside", "scratch")]
    bad = {act: outcome for act, outcome in found.items() if outcome[0] not in ("answer", "named")}
    assert not bad
    codes = {act: found.pop(act)[1] for act in ("actcache inspect", "actcache verify")}
    assert set(codes.values()) <= {0, 1, 2}
    if name not in MAY_PASS:
        wrong = {act for act, outcome in found.items() if outcome[0] == "answer" and outcome != truth[act]}
        assert wrong <= {"uncommitted"} | ({"events"} if name in SHOWN else set()), "answers that are not the truth"
        assert codes["actcache verify"] > 0, "verify finds nothing"


@pytest.mark.slow
@pytest.mark.parametrize(
    "attack",
    [
        record_nested_just_too_deeply_to_write,
        root_nested_just_too_deeply_to_write,
        carried_is_nested_just_too_deeply_to_write,
    ],
)
def test_nesting_at_every_depth_near_the_limit(attack, forger):
    """Parser and encoder give up at different depths, which also depend on who calls them."""
    sound = {file: file.read_bytes() for file in (forger.path / "zarr.json", forger.record_file())}
    for depth in range(sys.getrecursionlimit() - 130, sys.getrecursionlimit() - 30, 2):
        attack(forger, depth)
        for act in (open_store, verify, lambda path: open_store(path).events):
            with contextlib.suppress(ActcacheError):
                act(forger.path)
        for file, data in sound.items():
            file.write_bytes(data)


@pytest.mark.parametrize("where", ["segments/a", "segments/a/states", "segments/a/states/pt/b001/c"])
def test_a_writer_does_not_clear_what_a_link_leads_to(where, forger, pristine):
    """A segment without a record is cleared by the next writer of its name: the link, not what is outside."""
    (forger.path / "commits/a.json").unlink()
    shutil.rmtree(forger.path / where)
    (forger.path / where).symlink_to(forger.outside)
    before = state_of(forger.outside)
    fingerprint = make_fingerprint()
    segment = make_segment(fingerprint, [2], [(0, 1)])
    try:
        StoreWriter(forger.path, fingerprint).append("a", segment)
    except (ActcacheError, OSError):
        assert not (forger.path / "commits/a.json").exists()
    else:
        assert bits(open_store(forger.path).states("pt", 1, [0])[0]) == bits(segment.states["pt", 1])
    assert state_of(forger.outside) == before


def test_no_name_of_a_file_steers_the_terminal(forger, capsys):
    record_of_a_name_that_steers_the_terminal(forger)
    for verb in ("inspect", "verify"):
        assert main([verb, str(forger.path)]) == 1
        out, err = capsys.readouterr()
        assert "owned" in out + err
        assert all(line.isprintable() for line in (out + err).splitlines())
        assert not any(line.startswith("a: fine") for line in (out + err).splitlines())


def test_errors_do_not_show_what_a_link_leads_to(forger):
    for file in (forger.path / "zarr.json", forger.record_file()):
        file.unlink()
        file.symlink_to(forger.outside / "secret")
        with pytest.raises(ActcacheError) as caught:
            open_store(forger.path)
        assert "secret" not in str(caught.value)
        file.unlink()
        file.write_text("x")


def test_rows_of_many_events_over_one_sequence_are_not_set_aside_unasked(tmp_path):
    """A million tokens, of which half a million events each want all: only who asks for all of them needs the room."""
    fingerprint = make_fingerprint(width=1, boundaries=[1], checkpoints={"pt": {}}, pair=["pt"])
    places = [(0, 1_000_000 - 1)] * 2000
    path = tmp_path / "store"
    write_store(path, fingerprint, {"a": make_segment(fingerprint, [1_000_000], places, kinds=["0"])})
    assert verify(path) == []
    store = open_store(path)
    assert store.events.num_rows == 2000
    assert torch.equal(store.states("pt", 1, [1999])[0], torch.zeros(1_000_000, 1))
